"""The command line: verbs, settings, and one line for every mistake."""

import errno
import subprocess
import sys
from pathlib import Path

import pytest

from halo_fast import registry
from halo_fast.errors import UserError
from halo_fast.files import write_bytes
from halo_fast.pipeline import cli
from halo_fast.pipeline.config import Config
from halo_fast.pipeline.run import Run
from halo_fast.pipeline.stages import STAGES

yaml = pytest.importorskip("yaml")
pytest.importorskip("jsonargparse")


@pytest.fixture
def calls(monkeypatch):
    """Stages are noted instead of run."""
    noted = []

    def load(target):
        return lambda config, run: noted.append((target.replace(":", "."), config, run))

    monkeypatch.setattr(registry, "load", load)
    return noted


NEEDED = {
    "pretrained_model_name_or_path": "model",
    "prompts": "prompts.txt",
    "evaluation_prompts": "heldout.txt",
    "annotate.teacher": "human:anna",
}
MODEL = ("--pretrained_model_name_or_path", "model")


def refuse(capsys, *arguments) -> str:
    """The one line with which a command is refused."""
    assert cli.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("halo: error: ") and err.count("\n") == 1
    return err


def test_overrides_win_over_the_file_and_the_file_over_defaults(calls, tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("seed: 5\ntrain: {learning_rate: 1e-3, rank: 4, objective: {patch_beta: null}}\ngrid: [1, 2, 2]\n")
    assert cli.main(["train", str(file), "--train.learning_rate", "1e-4", "--train.objective.video_beta=9"]) == 0
    ((name, config, run),) = calls
    assert name == "halo_fast.pipeline.stages.train.train" and run.config is config and not run.force
    expected = Config(seed=5, grid=(1, 2, 2))
    expected.train.rank = 4
    expected.train.learning_rate = 1e-4
    expected.train.objective.patch_beta = None
    expected.train.objective.video_beta = 9.0
    assert config == expected


def test_printed_config_reads_back(calls, tmp_path, capsys):
    assert cli.main(["run", "--print-config", "--seed", "3", "--pairs.dimensions", '{"visual_quality": 2.0}']) == 0
    text = capsys.readouterr().out
    assert yaml.safe_load(text)["seed"] == 3
    (tmp_path / "config.yaml").write_text(text)
    assert cli.main(["score", str(tmp_path / "config.yaml")]) == 0
    ((_, config, _),) = calls
    assert (config.seed, config.pairs.dimensions) == (3, {"visual_quality": 2.0})


def test_run_goes_through_all_stages_in_order(calls):
    assert cli.main(["run", "--force"]) == 0
    assert [name.split(".")[-1] for name, _, _ in calls] == [
        "generate", "annotate", "train_reward", "score", "build_pairs", "build_cache", "train", "evaluate",
        "write_report",
    ]  # fmt: skip
    assert all(run.force and run.config is config for _, config, run in calls)


@pytest.mark.parametrize("verb", [*cli._STAGES, *cli._DEMO])
def test_every_verb_has_its_function(verb):
    module, function, _ = (cli._STAGES | cli._DEMO)[verb]
    assert callable(cli._load(module, function))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trian"], ["unknown verb 'trian'", "train"]),
        (["demo"], ["halo demo", "pretrain", "compare"]),
        (["demo", "dance"], ["'dance'", "pretrain", "compare"]),
        (["doctor", "who"], ["doctor", "'who'"]),
        (["train", "--train.lr", "3"], ["--train.lr", "halo train --help"]),
        (["train", "--colour", "3"], ["--colour"]),
        (["train", "--train.learning_rate", "fast"], ["train.learning_rate", "float", "fast"]),
        (["train", "--train.max_train_steps", "1.5"], ["train.max_train_steps", "int", "1.5"]),
        (["train", "--grid", "[2,2]"], ["grid", "3 elements"]),
        (["train", "--grid", "[3,4,64]"], ["grid", "(9, 32, 32)", "(3, 4, 64)", "fewer patches"]),
        (["train", "nowhere.yaml"], ["nowhere.yaml", "not exist"]),
        (["train", "--seed", "1", "stray"], ["stray"]),
    ],
)
def test_mistakes_in_words(capsys, calls, arguments, words):
    line = refuse(capsys, *arguments)
    assert all(word in line for word in words), line
    assert not calls


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train: {learning_rat: 1}", ["config.yaml: ", "train", "learning_rat"]),
        ("colour: 1", ["colour"]),
        ("train: {learning_rate: fast}", ["train.learning_rate", "fast"]),
        ("train: [", ["config.yaml", "line"]),
        ("just words", ["config.yaml"]),
        ("generate: {num_frames: 2}", ["grid", "(2, 32, 32)"]),
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

    monkeypatch.setattr(registry, "load", lambda target: score)
    arguments = ["score", "--output_dir", str(tmp_path)]
    assert cli.main(arguments) == 0
    capsys.readouterr()
    line = refuse(capsys, *arguments, "--score.batch_size", "7")
    assert "batch_size = 32, now it is 7" in line and "--force" in line
    assert cli.main([*arguments, "--score.batch_size", "7", "--force"]) == 0


@pytest.mark.parametrize("place", ["file", "file/run"])
def test_output_dir_that_cannot_be(capsys, monkeypatch, tmp_path, place):
    (tmp_path / "file").write_text("")

    def score(config, run):
        with run.stage("score", {}, {}) as stage:
            stage.finish({})

    monkeypatch.setattr(registry, "load", lambda target: score)
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

    monkeypatch.setattr(registry, "load", lambda target: stage)
    assert cli.main(["train"]) == code
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("halo: ") and err.count("\n") == 1


@pytest.mark.parametrize(
    "bug", [ZeroDivisionError(), FileNotFoundError(errno.ENOENT, "x"), ModuleNotFoundError(name="halo_fast.trane")]
)
def test_bugs_keep_their_traceback(monkeypatch, bug):
    def stage(config: Config, run: Run) -> None:
        raise bug

    monkeypatch.setattr(registry, "load", lambda target: stage)
    with pytest.raises(type(bug)):
        cli.main(["train"])


def test_demo_takes_the_arguments_of_its_function(capsys, monkeypatch):
    got = {}

    def pretrain(world: str = "graded", steps: int = 3000, output_dir: str | None = None) -> None:
        """Train."""
        got.update(world=world, steps=steps, output_dir=output_dir)

    monkeypatch.setattr(registry, "load", lambda target: pretrain)
    assert cli.main(["demo", "pretrain", "--steps", "5"]) == 0
    assert got == {"world": "graded", "steps": 5, "output_dir": None}
    assert "--stops" in refuse(capsys, "demo", "pretrain", "--stops", "5")


def test_command_and_module_answer_alike(tmp_path):
    for command in ([str(Path(sys.executable).with_name("halo"))], [sys.executable, "-m", "halo_fast"]):
        done = subprocess.run([*command, "--help"], capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0 and all(verb in done.stdout for verb in cli._STAGES)
        done = subprocess.run([*command, "train", "--seed", "x"], capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 2 and "seed" in done.stderr and "Traceback" not in done.stderr


def test_help_of_a_verb_lists_settings(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["train", "--help"])
    assert stopped.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "--train.objective.patch_sft_weight" in text and "supervised term on the winning patches" in text


def test_doctor_names_versions_and_backends(capsys):
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("python", "torch", "reference", "cpp", "triton"))
