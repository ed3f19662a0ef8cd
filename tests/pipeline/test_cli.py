"""The command line: verbs, settings, and one line for every mistake."""

import errno
import subprocess
import sys
from pathlib import Path

import pytest
from recipe import demo_config
from tiny import tiny_wan
from verbs import NEEDED, refuse, replace_stages

from halo_fast import registry
from halo_fast.errors import UserError
from halo_fast.files import write_bytes
from halo_fast.pipeline import cli, preflight
from halo_fast.pipeline.arguments import load_config
from halo_fast.pipeline.config import Config
from halo_fast.pipeline.run import Run
from halo_fast.pipeline.stages import STAGES

yaml = pytest.importorskip("yaml")
pytest.importorskip("jsonargparse")


MODEL = ("--pretrained_model_name_or_path", "model")


def test_overrides_win_over_the_file_and_the_file_over_defaults(calls, tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(
        "seed: 5\ntrain: {learning_rate: 1e-3, rank: 4, objective: {preset: halo, patch_beta: null}}\ngrid: [1, 2, 2]\n"
    )
    words = ["train", str(file), *MODEL, "--train.learning_rate", "1e-4", "--train.objective.video_beta=9"]
    assert cli.main(words) == 0
    ((name, config, run),) = calls
    assert name == "halo_fast.pipeline.stages.train.train" and run.config is config and not run.force
    expected = Config(seed=5, grid=(1, 2, 2), pretrained_model_name_or_path="model")
    expected.train.rank = 4
    expected.train.learning_rate = 1e-4
    expected.train.objective = {"preset": "halo", "patch_beta": None, "video_beta": 9}
    assert config == expected


def test_printed_config_reads_back(calls, tmp_path, capsys):
    assert cli.main(["run", "--print-config", "--seed", "3", "--pairs.dimensions", '{"visual_quality": 2.0}']) == 0
    text = capsys.readouterr().out
    assert yaml.safe_load(text)["seed"] == 3
    (tmp_path / "config.yaml").write_text(text)
    assert cli.main(["score", str(tmp_path / "config.yaml")]) == 0
    ((_, config, _),) = calls
    assert (config.seed, config.pairs.dimensions) == (3, {"visual_quality": 2.0})


def test_run_goes_through_all_stages_in_order(calls, monkeypatch):
    checked = []
    monkeypatch.setattr(preflight, "check_run", lambda config, run: checked.append(config))
    assert cli.main(["run", "--force"]) == 0
    assert checked == [calls[0][1]]
    assert [name.split(".")[-1] for name, _, _ in calls] == [
        "generate", "annotate", "train_reward", "score", "build_pairs", "build_cache", "train", "evaluate",
        "write_report",
    ]  # fmt: skip
    assert all(run.force and run.config is config for _, config, run in calls)


@pytest.mark.parametrize("verb", [verb for verb in cli.VERBS if verb != "run"])
def test_every_verb_has_its_function(verb):
    assert callable(registry.load(cli.VERBS[verb].target))


@pytest.mark.parametrize("command", registry.known("command"))
def test_every_registered_command_has_its_function(command):
    assert callable(registry.load(cli._command(registry.target("command", command)).target))


@pytest.mark.parametrize("stage", STAGES)
def test_a_setting_without_a_default_is_asked_for_by_the_stages_that_read_it(capsys, calls, stage):
    given = [f"--{setting}={value}" for setting, value in NEEDED.items() if setting in STAGES[stage].required]
    assert cli.main([stage, *given]) == 0 and len(calls) == 1
    for missing in given:
        line = refuse(capsys, stage, *[word for word in given if word != missing])
        assert line.startswith(f"halo: error: {missing[2:].split('=')[0]}: required; give "), line
    assert len(calls) == 1


def test_run_asks_for_every_missing_setting_before_it_starts(capsys, calls):
    given = {f"--{setting}={value}" for setting, value in NEEDED.items()}
    for setting, value in NEEDED.items():
        assert f"{setting}: required" in refuse(capsys, "run", *(given - {f"--{setting}={value}"}))
    assert "openai" in refuse(capsys, "run", *(given - {"--annotate.teacher=human:anna"}))
    assert not calls


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--train.objective.preset", "hallo"], ["train.objective", "hallo", "halo"]),
        (["--train.objective.video_bet", "3"], ["train.objective", "video_bet", "video_beta"]),
        (["--train.report_to", "[mlflow]"], ["train.report_to", "mlflow", "wandb"]),
        (["--prompts", "nowhere.txt"], ["prompts", "nowhere.txt"]),
        (["--train.objective", "nowhere:Loss"], ["error: train.objective must be one of halo, ", "nowhere:Loss"]),
        (["--annotate.teacher", "human:"], ["error: annotate.teacher: expected letters", "human:anna"]),
        (["--annotate.teacher", "robot"], ["annotate.teacher", "robot", "openai"]),
        (["--reward.backbone", "spine"], ["reward.backbone", "spine", "compact", "frames"]),
        (["--reward.backbone", "nowhere:Spine"], ["reward.backbone", "nowhere:Spine", "compact", "frames"]),
        (["--reward.examples", "nothing"], ["reward.examples", "nothing", "demo"]),
        (["--evaluate.meter", "ruler"], ["evaluate.meter", "ruler", "reward"]),
        (["--grid", "[3,4,3]"], ["grid", "(3, 4, 4)", "(3, 4, 3)"]),
    ],
)
def test_run_finds_the_mistakes_of_late_stages_before_it_starts(capsys, calls, tmp_path, arguments, words):
    line = refuse(capsys, "run", "demo", "--output_dir", str(tmp_path / "run"), *arguments)
    assert all(word in line for word in words), line
    assert not calls and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        # 400 prompts with four candidates each, and every two of a prompt compared
        (["--annotate.openai.pairwise", "true"], ["1600 clips, 2400 pairs", "budget $5.00"]),
        (["--annotate.openai.budget", "0.4", "--annotate.num_clips", "40"], ["40 clips", "budget $0.40"]),
    ],
)
def test_run_refuses_a_budget_that_cannot_be_enough_before_it_generates(
    capsys, calls, tmp_path, monkeypatch, arguments, words
):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    (tmp_path / "prompts.txt").write_text("\n".join(f"a ball rolls to the left, {index}" for index in range(400)))
    (tmp_path / "held.txt").write_text("a square stands still\n")
    saved_tiny_wan(model := tmp_path / "model")
    capsys.readouterr()
    given = {
        "output_dir": tmp_path / "run", "pretrained_model_name_or_path": model, "annotate.teacher": "openai",
        "prompts": tmp_path / "prompts.txt", "evaluation_prompts": tmp_path / "held.txt",
        "generate.num_prompts": 400, "generate.num_videos_per_prompt": 4, "reward.backbone": "compact",
    }  # fmt: skip
    words_given = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    line = refuse(capsys, "run", *words_given, *arguments)
    assert line.startswith("halo: error: annotate.openai.budget: ") and all(word in line for word in words), line
    assert not calls and not (tmp_path / "run").exists()
    enough = ["--annotate.openai.budget", "400"]
    assert cli.main(["run", *words_given, *arguments, *enough]) == 0 and calls


def saved_tiny_wan(model):
    """A model of 12 tokens of text, whose weights cannot be read."""
    tiny_wan().save_pretrained(model)
    for file in model.glob("*/*.safetensors"):
        file.write_bytes(b"")


def run_of_tiny_wan(tmp_path, prompts, held_out, **changes):
    """The words of `halo run` with such a model."""
    saved_tiny_wan(model := tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    (tmp_path / "held.txt").write_text("\n".join(held_out))
    given = {
        "output_dir": tmp_path / "run", "pretrained_model_name_or_path": model, "annotate.teacher": "human:anna",
        "prompts": tmp_path / "prompts.txt", "evaluation_prompts": tmp_path / "held.txt",
    }  # fmt: skip
    return [word for name, value in (given | changes).items() for word in (f"--{name}", str(value))]


def test_run_lists_prompts_that_are_cut_before_any_weights_are_read(capsys, calls, tmp_path):
    long = [" ".join(["a red ball rolls"] * count) for count in (2, 4, 5)]
    assert cli.main(["run", *run_of_tiny_wan(tmp_path, ["a cube", *long], [long[2], "a ball"])]) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "text encoder" in line]
    assert [line.split(" is longer")[0] for line in lines] == [
        "prompts: number 3", "prompts: number 4",
        "prompts: 2 of 4 are cut by the text encoder, but teacher and reward model judge the whole; shorten them",
        "evaluation_prompts: number 1",
        "evaluation_prompts: 1 of 2 are cut by the text encoder, but teacher and reward model judge the whole; "
        "shorten them",
    ]  # fmt: skip
    assert calls


def test_run_without_the_teachers_key_is_refused_before_it_generates(capsys, calls, tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    words = run_of_tiny_wan(tmp_path, ["a cube"], ["a ball"], **{"annotate.teacher": "openai"})
    capsys.readouterr()
    line = refuse(capsys, "run", *words)
    assert line.startswith("halo: error: OPENAI_API_KEY: expected an API key in the environment"), line
    assert not calls and not (tmp_path / "run").exists()


def test_a_recipe_is_taken_by_name_and_overrides_win(calls, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["score", "demo", "--output_dir", "elsewhere", "--score.batch_size", "3"]) == 0
    ((_, config, _),) = calls
    assert config == demo_config(output_dir="elsewhere", score={"batch_size": 3})
    assert config.pretrained_model_name_or_path == "demo:graded"
    assert load_config("demo", {"output_dir": "elsewhere", "score.batch_size": 3}) == config


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trian"], ["unknown verb 'trian'", "train"]),
        (["demo"], ["halo demo", "pretrain", "compare", "nothing"]),
        (["demo", "dance"], ["'dance'", "pretrain", "compare"]),
        (["doctor", "who"], ["doctor", "'who'"]),
        (["train", "--train.lr", "3"], ["--train.lr", "halo train --help"]),
        (["train", "--train.learning_rat", "3"], ["did you mean train.learning_rate? `halo train --help`"]),
        (["train", "--colour", "3"], ["--colour"]),
        (["train", "--train.learning_rate", "fast"], ["train.learning_rate", "fast"]),
        (["train", "--train.max_train_steps", "1.5"], ["train.max_train_steps", "int", "1.5"]),
        (["train", "--grid", "[2,2]"], ["grid", "3 elements"]),
        (["train", "--grid", "[3,4,900]"], ["grid", "(81, 480, 832)", "(3, 4, 900)", "fewer patches"]),
        (["train", "nowhere.yaml"], ["nowhere.yaml", "not exist"]),
        (["run", "norecipe"], ["expected a YAML file or the name of a recipe (demo", "'norecipe'"]),
        (["train", "--seed", "1", "stray"], ["stray"]),
        (["train", "--seed", "-1"], ["seed", "0", "-1"]),
        (["train", "--report.num_clips", "0"], ["report.num_clips", "1", "0"]),
        (["train", *MODEL, "--train.objective", "hallo"], ["train.objective must be one of halo, ", "'hallo'"]),
        (["train", "--train.lr_scheduler", "cosin"], ["train.lr_scheduler", "constant", "cosin"]),
    ],
)
def test_mistakes_in_words(capsys, calls, arguments, words):
    line = refuse(capsys, *arguments)
    assert all(word in line for word in words), line
    assert not calls


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train: {learning_rat: 1}", ["config.yaml: ", "train", "'learning_rat'; did you mean train.learning_rate?"]),
        ("colour: 1", ["colour"]),
        ("train: {learning_rate: fast}", ["train.learning_rate", "fast"]),
        ("train: [", ["config.yaml", "line"]),
        ("just words", ["config.yaml"]),
        ("train: [3]", ["config.yaml: train: expected a section", "[3]"]),
        ("score: 3", ["config.yaml: score: expected a section", "3"]),
        ("annotate: {openai: [3]}", ["config.yaml: annotate.openai: ", "[3]"]),
        ("generate: {num_frames: 2}", ["grid", "(2, 480, 832)"]),
    ],
)
def test_mistakes_in_files(capsys, calls, tmp_path, text, words):
    (tmp_path / "config.yaml").write_text(text)
    line = refuse(capsys, "train", str(tmp_path / "config.yaml"))
    assert all(word in line for word in words), line
    assert not calls


def test_run_directory_of_another_config(capsys, monkeypatch, tmp_path):
    def score(config, run):
        with run.stage("score", config.score, {}) as stage:
            if not stage.done:
                write_bytes(stage.folder / "out", b"1")
                stage.finish({})

    replace_stages(monkeypatch, lambda target: score)
    arguments = ["score", "--output_dir", str(tmp_path)]
    assert cli.main(arguments) == 0
    capsys.readouterr()
    line = refuse(capsys, *arguments, "--score.batch_size", "7")
    assert f"batch_size = {Config().score.batch_size}, now it is 7" in line and "--force" in line
    assert cli.main([*arguments, "--score.batch_size", "7", "--force"]) == 0


@pytest.mark.parametrize("place", ["file", "file/run"])
def test_output_dir_that_cannot_be(capsys, monkeypatch, tmp_path, place):
    (tmp_path / "file").write_text("")

    def score(config, run):
        with run.stage("score", {}, {}) as stage:
            stage.finish({})

    replace_stages(monkeypatch, lambda target: score)
    assert str(tmp_path / "file") in refuse(capsys, "score", "--output_dir", str(tmp_path / place))


@pytest.mark.parametrize(
    ("raised", "code"),
    [
        (UserError("clip.mp4: unreadable;\n redo generate"), 2),
        (PermissionError(errno.EACCES, "Permission denied", "/data"), 2),
        (ModuleNotFoundError("No module named 'openai'", name="openai"), 2),
        (KeyboardInterrupt(), 130),
    ],
)
def test_what_a_stage_raises_becomes_one_line(capsys, monkeypatch, raised, code):
    def stage(config: Config, run: Run) -> None:
        raise raised

    replace_stages(monkeypatch, lambda target: stage)
    assert cli.main(["train", *MODEL]) == code
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("halo: ") and err.count("\n") == 1


@pytest.mark.parametrize(
    "bug", [ZeroDivisionError(), FileNotFoundError(errno.ENOENT, "x"), ModuleNotFoundError(name="halo_fast.trane")]
)
def test_bugs_keep_their_traceback(monkeypatch, bug):
    def stage(config: Config, run: Run) -> None:
        raise bug

    replace_stages(monkeypatch, lambda target: stage)
    with pytest.raises(type(bug)):
        cli.main(["train", *MODEL])


def test_demo_takes_the_arguments_of_its_function(capsys, monkeypatch):
    got = {}

    def pretrain(world: str = "graded", steps: int = 3000, output_dir: str | None = None) -> None:
        """Train."""
        got.update(world=world, steps=steps, output_dir=output_dir)

    monkeypatch.setattr(registry, "load", lambda target: pretrain)
    assert cli.main(["demo", "pretrain", "--steps", "5"]) == 0
    assert got == {"world": "graded", "steps": 5, "output_dir": None}
    assert "--stops" in refuse(capsys, "demo", "pretrain", "--stops", "5")


def test_a_file_does_not_stand_for_the_arguments_of_the_function(capsys, monkeypatch, tmp_path):
    got = {}

    def label(config: Config, name: str, port: int = 0) -> None:
        """Label."""
        got.update(seed=config.seed, name=name)

    monkeypatch.setattr(registry, "load", lambda target: label)
    file = tmp_path / "config.yaml"
    file.write_text("seed: 7\n")
    assert cli.main(["label", str(file), "--name", "anna"]) == 0
    assert got == {"seed": 7, "name": "anna"}
    assert "error: the following arguments are required: name" in refuse(capsys, "label", str(file))
    file.write_text("seed: x\n")
    assert f"error: {file}: seed" in refuse(capsys, "label", str(file), "--name", "anna")


def test_every_command_has_a_line_in_the_help(capsys):
    assert cli.main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name in registry.known("command"):
        (line,) = [line for line in lines if line.startswith(f"  {name} ")]
        assert len(line.removeprefix(f"  {name}").split()) > 3, line


def test_modules_in_the_current_folder_are_found_and_hide_nothing(tmp_path):
    (tmp_path / "my_losses.py").write_text("from halo_fast import GranDPO\nmine = GranDPO(video_beta=7.0)\n")
    (tmp_path / "torch.py").write_text("raise RuntimeError('this is not torch')\n")
    words = ["halo", "train", "--train.objective", "my_losses:mine", "--pretrained_model_name_or_path", "demo:graded"]
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.remove(''); sys.argv = {words}; "
         "from halo_fast.pipeline.cli import main; raise SystemExit(main())"],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    # the objective was taken: the next thing that is missing is named
    assert done.returncode == 2 and "run `halo pairs`" in done.stderr, done.stderr


def test_command_and_module_answer_alike(tmp_path):
    for command in ([str(Path(sys.executable).with_name("halo"))], [sys.executable, "-m", "halo_fast"]):
        done = subprocess.run([*command, "--help"], capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0 and all(verb in done.stdout for verb in STAGES)
        done = subprocess.run([*command, "train", "--seed", "x"], capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 2 and "seed" in done.stderr and "Traceback" not in done.stderr


def test_help_of_a_verb_lists_settings(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["train", "--help"])
    assert stopped.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "--train.heldout_share" in text and "share of the prompts whose pairs are kept out of training" in text
    assert "(type: float >= 0, <= 1, default: 0.1)" in text and "(type: int >= 0, <= 51 or null, default: 12)" in text
    assert not any(word in text for word in ("Annotated[", "Literal[", "Optional["))


def test_a_command_says_what_it_does_and_nothing_else(tmp_path):
    """What packages warn of while they are imported is not the user's to read, and hides what is."""
    done = subprocess.run(
        [Path(sys.executable).with_name("halo"), "generate", "demo", f"--output_dir={tmp_path}",
         "--generate.num_prompts=1", "--generate.num_videos_per_prompt=2", "--generate.num_inference_steps=1"],
        capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0
    assert [line for line in done.stderr.splitlines() if not line.startswith("generate: ")] == []


def test_doctor_names_versions_and_backends(capsys):
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("python", "torch", "reference", "cpp", "triton"))
