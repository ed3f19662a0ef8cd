"""The run directory: kept, continued, redone, refused; atomic files; the same hashes after kill -9."""

import dataclasses
import errno
import fcntl
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch

from halo_fast.data.tables import ScoreRow, shared_rows, write_rows
from halo_fast.errors import UserError
from halo_fast.files import (
    hash_bytes,
    hash_file,
    hash_tensors,
    hash_text,
    progress,
    read_checkpoint,
    read_table,
    replacing,
    write_bytes,
    write_checkpoint,
    write_csv,
    write_json,
    write_parquet,
    write_safetensors,
)
from halo_fast.pipeline.config import Config
from halo_fast.pipeline.run import Run
from halo_fast.train.config import TrainConfig

EMPTY_SHA256 = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


@pytest.fixture
def config(tmp_path) -> Config:
    return Config(output_dir=str(tmp_path / "run"))


def work(config, settings=None, inputs=None, name="score", force=False, text="x") -> bool:
    """One stage that writes a file; whether it had anything to do."""
    with Run(config, force=force).stage(name, settings or {"size": 2}, inputs or {}) as stage:
        if stage.done:
            return False
        write_bytes(stage.folder / "out.txt", text.encode())
        stage.finish({"files": 1})
    return True


def manifest(config, name="score") -> dict:
    return json.loads((Run(config).path / name / "manifest.json").read_text())


def stages_of(config) -> list[str]:
    return [path.name for path in Run(config).path.iterdir() if not path.name.endswith((".lock", ".stamps.json"))]


def test_finished_stage_is_kept(config):
    assert work(config)
    before = manifest(config)
    assert not work(config)
    assert manifest(config) == before
    assert before["settings"] == {"size": 2} and before["counts"] == {"files": 1}
    assert before["outputs"] == {"out.txt": {"sha256": hash_text("x"), "bytes": 1}}
    assert before["versions"]["torch"] == torch.__version__
    assert not (Run(config).path / "score" / "pending.json").exists()


def test_stages_say_what_they_did(config, caplog):
    caplog.set_level("INFO")
    work(config)
    assert "score: finished, 1 files" in caplog.text
    folder = Run(config).path / "score"
    assert [line for line in caplog.messages if "begins" in line] == [f"score: begins ({folder})"]
    caplog.clear()
    work(config)
    assert "score: finished before, kept" in caplog.text and "begins" not in caplog.text


def test_stages_of_a_whole_run_say_where_they_stand(config, caplog):
    caplog.set_level("INFO")
    run = Run(config)
    run.planned = ["annotate", "score", "train"]
    with pytest.raises(KeyboardInterrupt), run.stage("score", {}, {}) as stage:
        write_bytes(stage.folder / "part.txt", b"1")
        raise KeyboardInterrupt
    with run.stage("score", {}, {}) as stage:
        stage.finish({})
    with run.stage("train_transformer_2", {}, {}) as stage:  # another network's training
        stage.finish({})
    with run.stage("evaluate", {}, {}) as stage:
        stage.finish({})
    assert [line for line in caplog.messages if "finished" not in line] == [
        "score: begins (stage 2 of 3)",
        "score: goes on (stage 2 of 3)",
        "train_transformer_2: begins (stage 3 of 3)",
        f"evaluate: begins ({run.path / 'evaluate'})",
    ]


def test_partial_work_is_continued(config):
    with pytest.raises(KeyboardInterrupt), Run(config).stage("score", {"a": 1}, {}) as stage:
        write_bytes(stage.folder / "part.txt", b"1")
        (stage.folder / ".next.txt.1.tmp").write_bytes(b"half")
        raise KeyboardInterrupt
    assert not (stage.folder / "manifest.json").exists()
    with Run(config).stage("score", {"a": 1}, {}) as stage:
        assert not stage.done
        assert sorted(path.name for path in stage.folder.iterdir()) == ["part.txt", "pending.json"]
        stage.finish({})
    assert list(manifest(config)["outputs"]) == ["part.txt"]


def test_rows_are_kept_until_their_stage_is_finished(config):
    made = []

    def rows_of(batch):
        made.append(batch)
        return [ScoreRow(name, {"visual_quality": 1 / 3}, {"quality": [0.1, float("nan")]}) for name in batch]

    batches = [["a", "b"], ["c"], ["d"]]
    with pytest.raises(KeyboardInterrupt), Run(config).stage("score", {}, {}) as stage:
        rows = shared_rows(stage.folder, "clips", batches, rows_of, ScoreRow)
        assert [row.clip_id for row in rows] == ["a", "b", "c", "d"] and made == batches
        (second,) = stage.folder.glob(".clips.000002-*.part")
        second.unlink()
        raise KeyboardInterrupt
    with Run(config).stage("score", {}, {}) as stage:
        again = shared_rows(stage.folder, "clips", batches, rows_of, ScoreRow)
        assert made == [*batches, ["c"]]
        assert repr(shared_rows(stage.folder, "clips", [["a", "b"], ["c", "d"]], rows_of, ScoreRow)) == repr(rows)
        assert made == [*batches, ["c"], ["c", "d"]]
        assert repr(again) == repr(rows) and again[0].video["visual_quality"] == 1 / 3
        write_rows(stage.folder / "scores.parquet", again)
        stage.finish({})
    assert list(manifest(config)["outputs"]) == ["scores.parquet"]
    assert sorted(path.name for path in stage.folder.iterdir()) == ["manifest.json", "scores.parquet"]


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_locked_by_a_file(config, monkeypatch, recwarn, code):
    def flock(descriptor, operation):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    with Run(config).stage("score", {}, {}) as stage:
        with pytest.raises(UserError, match=r"another process is working on it.*remove .*\.score\.lock(ed)?"):
            work(config)
        stage.finish({})
    # one left by a process that is gone
    file = ".train.lock" if code == errno.ENOSYS else ".train.locked"
    (Run(config).path / file).write_text(f"999999999\n{socket.gethostname()}\n")
    assert work(config, name="train")


@pytest.mark.parametrize("finished", [True, False])
def test_other_settings_are_refused_by_name(config, finished):
    settings = dataclasses.asdict(TrainConfig())
    with Run(config).stage("train", settings, {}) as stage:
        write_bytes(stage.folder / "part.txt", b"1")
        stage.finish({})
    if not finished:
        key = manifest(config, "train")
        write_json(stage.folder / "pending.json", {name: key[name] for name in ("settings", "inputs", "started")})
        (stage.folder / "manifest.json").unlink()
    files = {path: hash_file(path) for path in stage.folder.iterdir()}
    other = TrainConfig()
    other.objective = {"preset": "halo"}
    with pytest.raises(UserError, match=r"objective\.preset = halo_bounded, now it is halo; pass --force"):
        work(config, other, name="train")
    assert {path: hash_file(path) for path in stage.folder.iterdir()} == files


def test_what_a_command_does_not_offer_is_no_cure(config):
    work(config, inputs={"prompts": "x"})
    given = ({"size": 1}, "x", "with size = 2, now it is 1"), ({"size": 2}, "y", "from other prompts")
    for settings, prompts, differs in given:
        with pytest.raises(UserError, match=f"was made {differs}; choose another output_dir$"):
            work(config, settings, {"prompts": prompts}, force=None)


def test_dict_and_dataclass_and_tuple_and_list_are_the_same_settings(config):
    assert work(config, Config())
    assert not work(config, dataclasses.asdict(Config()))


def test_settings_that_one_side_lacks_are_named(config):
    work(config, {"a": 1})
    with pytest.raises(UserError, match="with b = unset, now it is 2"):
        work(config, {"a": 1, "b": 2})


def test_force_redoes_with_an_empty_folder(config):
    work(config)
    write_bytes(Run(config).path / "score" / "older.txt", b"")
    assert work(config, {"size": 3}, force=True)
    assert list(manifest(config)["outputs"]) == ["out.txt"]
    assert stages_of(config) == ["score"]


def test_stage_is_redone_when_the_stage_before_it_changed(config):
    earlier = Run(config).path / "pairs"
    work(config, name="pairs")
    assert work(config, inputs={"pairs": earlier})
    assert not work(config, inputs={"pairs": earlier})
    work(config, name="pairs", force=True)
    assert not work(config, inputs={"pairs": earlier}), "the same content made again is no change"
    work(config, name="pairs", force=True, text="y")
    write_bytes(Run(config).path / "score" / "older.txt", b"")
    assert work(config, inputs={"pairs": earlier})
    assert list(manifest(config)["outputs"]) == ["out.txt"]


def test_changed_outside_input_is_refused(config, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat")
    work(config, inputs={"prompts": prompts})
    prompts.write_text("a dog")
    with pytest.raises(UserError, match="was made from other prompts; pass --force"):
        work(config, inputs={"prompts": prompts})
    with pytest.raises(UserError, match="was made from other prompts"):
        work(config, inputs={"prompts": "demo:train"})


def test_missing_input_is_named(config, tmp_path):
    with pytest.raises(UserError, match=r"prompts: .*nowhere\.txt does not exist"):
        work(config, inputs={"prompts": tmp_path / "nowhere.txt"})
    assert not Run(config).path.exists()


def test_folder_input_is_hashed_by_content_and_name(config, tmp_path):
    model = tmp_path / "model"
    write_bytes(model / "a" / "weights", b"1")
    work(config, inputs={"model": model})
    os.utime(model / "a" / "weights", (0, 0))
    assert not work(config, inputs={"model": model})
    (model / "a" / "weights").rename(model / "a" / "other")
    with pytest.raises(UserError, match="other model"):
        work(config, inputs={"model": model})


@pytest.mark.parametrize("damage", ["gone", "short"])
def test_damaged_output_is_made_again(config, damage):
    work(config)
    before = manifest(config)["outputs"]
    output = Run(config).path / "score" / "out.txt"
    output.unlink() if damage == "gone" else output.write_bytes(b"")
    assert work(config)
    assert manifest(config)["outputs"] == before


@pytest.mark.parametrize("force", [True, False])
def test_files_of_others_are_never_touched(config, force):
    own = Run(config).path / "score" / "thesis.txt"
    write_bytes(own, b"mine")
    with pytest.raises(UserError, match="no stage has written"):
        work(config, force=force)
    assert own.read_bytes() == b"mine"


def test_stage_must_finish(config):
    with pytest.raises(RuntimeError, match="without finish"), Run(config).stage("score", {}, {}):
        pass


def test_require_names_the_stage_to_run(config):
    with pytest.raises(UserError, match="run `halo score`"):
        Run(config).require("score/out.txt")
    work(config)
    assert Run(config).require("score/out.txt").read_text() == "x"


def test_damaged_manifest_is_named(config):
    work(config)
    (Run(config).path / "score" / "manifest.json").write_text("{")
    with pytest.raises(UserError, match=r"manifest\.json: missing or damaged"):
        work(config)


def test_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "table.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="NaN|JSON"):
        write_json(path, {"a": float("nan")})
    with pytest.raises(ZeroDivisionError), replacing(path) as temporary:
        temporary.write_text("half")
        1 / 0  # noqa: B018
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_written_files_read_back(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from safetensors import safe_open

    table = pyarrow.table({"clip_id": ["p0", "p1"], "patch_quality": [[1.0, 2.0], [3.0, 4.0]]})
    write_parquet(tmp_path / "t.parquet", table)
    assert pyarrow.parquet.read_table(tmp_path / "t.parquet").equals(table)
    tensors = {"b": torch.arange(6.0).reshape(2, 3).T, "a": torch.ones(1, dtype=torch.bfloat16)}
    write_safetensors(tmp_path / "t.safetensors", tensors, {"format": "pt", "step": "3"})
    with safe_open(tmp_path / "t.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "step": "3"}
        assert all(torch.equal(file.get_tensor(name), tensor) for name, tensor in tensors.items())
    write_csv(tmp_path / "t.csv", [{"step": 0, "loss": 0.5}, {"step": 1, "lr": 0.1}])
    assert (tmp_path / "t.csv").read_text() == "step,loss,lr\n0,0.5,\n1,,0.1\n"


def test_checkpoints_read_back(tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    tensors = {"b": torch.arange(6.0).reshape(2, 3).T, "a": torch.tensor(3)}
    state = {"step": 3, "history": [{"loss": 0.5, "held_out": float("nan")}], "name": "Würfel"}
    write_checkpoint(path, tensors, state)
    found, kept = read_checkpoint(path)
    assert found.keys() == tensors.keys() and all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert repr(kept) == repr(state)
    write_safetensors(tmp_path / "weights.safetensors", tensors)
    path.write_bytes(path.read_bytes()[:-1])
    for damaged in (path, tmp_path / "weights.safetensors", tmp_path / "missing"):
        with pytest.raises(UserError, match=rf"{damaged.name}: missing or damaged checkpoint .*; remove it"):
            read_checkpoint(damaged)


def test_hashes_of_tensors_follow_everything_in_them():
    value = torch.arange(6, dtype=torch.float32)
    first = hash_tensors("text", {"a": value})
    assert first == hash_tensors("text", {"a": value.clone()}) == hash_tensors("te", "xt", {"a": value})
    others = [{"b": value}, {"a": value.view(2, 3)}, {"a": value.double()}, {"a": value + 1}]
    assert len({first, *(hash_tensors("text", other) for other in others), hash_tensors({"a": value})}) == 6
    strided = torch.stack([value, value], dim=1)[:, 0]
    assert hash_tensors({"a": strided}) == hash_tensors({"a": value})
    data = b"a torch.float32 [6]" + value.numpy().tobytes()
    assert hash_tensors({"a": value}) == hash_bytes(data)


def test_safetensors_metadata_has_one_order(tmp_path):
    metadata = {letter: letter for letter in "zyxwvutsrq"}
    hashes = set()
    for number in range(5):
        write_safetensors(tmp_path / f"{number}", {"a": torch.zeros(3)}, metadata)
        hashes.add(hash_file(tmp_path / f"{number}"))
    assert len(hashes) == 1


def test_hashes_are_sha256(tmp_path):
    write_bytes(tmp_path / "empty", b"")
    assert hash_file(tmp_path / "empty") == hash_bytes(b"") == hash_text("") == EMPTY_SHA256


def test_progress_passes_items_on_and_reports_time_left(capsys, monkeypatch):
    clock = iter(range(0, 1000, 20))
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    assert list(progress(iter("abcd"), 4, "clips")) == list("abcd")
    assert capsys.readouterr().err.splitlines() == ["clips: 1/4, 120 s left", "clips: 3/4, 27 s left"]


KILLED = """
import sys, time
from halo_fast.pipeline.config import Config
from halo_fast.files import write_bytes
from halo_fast.pipeline.run import Run
with Run(Config(output_dir=sys.argv[1])).stage("generate", {"clips": 6}, {}) as stage:
    for number in range(6):
        path = stage.folder / f"clip{number}.bin"
        if not path.exists():
            write_bytes(path, bytes(range(256)) * 1000 + str(number).encode())
            print(number, flush=True)
            time.sleep(float(sys.argv[2]))
    stage.finish({"clips": 6})
"""


def test_killed_stage_continues_to_the_same_hashes(tmp_path):
    def start(folder, pause):
        command = [sys.executable, "-c", KILLED, str(tmp_path / folder), str(pause)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    killed = start("killed", 60)
    assert killed.stdout.readline() == "0\n"
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    assert not (tmp_path / "killed" / "generate" / "manifest.json").exists()
    again, undisturbed = start("killed", 0), start("whole", 0)
    assert again.communicate()[0].split() == ["1", "2", "3", "4", "5"]
    assert undisturbed.communicate()[0].split() == ["0", "1", "2", "3", "4", "5"]
    outputs = [
        json.loads((tmp_path / folder / "generate" / "manifest.json").read_text())["outputs"]
        for folder in ("killed", "whole")
    ]
    assert outputs[0] == outputs[1] and len(outputs[0]) == 6


def test_kill_while_discarding_leaves_no_partial_work_behind(config, monkeypatch):
    work(config)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("halo_fast.pipeline.run.write_json", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        work(config, force=True)
    assert work(config)
    assert stages_of(config) == ["score"]


def test_force_with_a_mistake_loses_nothing(config):
    work(config)
    before = manifest(config)
    with pytest.raises(UserError, match="grid"), Run(config, force=True).stage("score", {"a": 1}, {}) as stage:
        assert not list(stage.folder.glob("*.txt"))
        raise UserError("grid: too fine")
    assert manifest(config) == before
    assert not work(config)


def test_old_work_stands_until_the_new_is_finished(config):
    work(config)
    with pytest.raises(KeyboardInterrupt), Run(config, force=True).stage("score", {"a": 1}, {}) as stage:
        write_bytes(stage.folder / "part.txt", b"1")
        raise KeyboardInterrupt
    assert (Run(config).path / ".score.old" / "out.txt").exists()
    with Run(config).stage("score", {"a": 1}, {}) as stage:
        assert (stage.folder / "part.txt").exists()
        stage.finish({})
    assert sorted(path.name for path in Run(config).path.iterdir()) == [
        ".score.lock",
        ".score.stamps.json",
        "score",
    ]


def test_a_first_attempt_that_failed_stands_in_nobodys_way(config):
    with pytest.raises(UserError, match="no such model"), Run(config).stage("score", {"model": "typo"}, {}):
        raise UserError("no such model")
    assert work(config, {"model": "right"})


def test_two_processes_in_one_stage_are_refused(config):
    with Run(config).stage("score", {}, {}) as stage:
        with pytest.raises(UserError, match=r"score: another process is working on it"):
            work(config)
        stage.finish({})
    assert work(config, {"other": 1}, force=True)


def test_a_stage_of_another_process_is_refused_until_that_is_killed(config):
    code = KILLED.replace('"generate"', '"score"')
    command = [sys.executable, "-c", code, config.output_dir, "60"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "0\n"
        with pytest.raises(UserError, match="another process is working on it"):
            work(config, {"clips": 6})
        other.kill()
    assert work(config, {"clips": 6})


def test_damage_of_equal_size_is_found_by_the_next_stage(config):
    work(config, name="pairs")
    path = Run(config).path / "pairs" / "out.txt"
    path.write_bytes(b"y" * path.stat().st_size)
    with pytest.raises(UserError, match=r"pairs/out\.txt: damaged.*run `halo pairs`"):
        work(config, inputs={"pairs": path.parent})
    path.unlink()
    work(config, name="pairs")
    assert work(config, inputs={"pairs": path.parent})


def test_require_refuses_a_stage_of_another_config(config):
    work(config, dataclasses.asdict(config.score) | {"seed": config.seed})
    assert Run(config).require("score")
    other = dataclasses.replace(config, seed=5)
    with pytest.raises(UserError, match=r"score: was made with seed = 0, now it is 5; .* `halo score --force`"):
        Run(other).require("score")


def test_require_compares_nested_settings(config):
    work(config, config.train, name="train")
    assert Run(config).require("train")
    other = dataclasses.replace(config, train=TrainConfig(objective={"preset": "halo"}))
    with pytest.raises(UserError, match=r"train: was made with objective\.preset = halo_bounded, now it is halo"):
        Run(other).require("train")


def test_what_a_user_names_freely_counts_also_where_a_name_is_gone(config):
    pairs = dataclasses.replace(config.pairs, dimensions={"visual_quality": 1.0, "text_alignment": 2.0})
    config = dataclasses.replace(config, pairs=pairs)
    work(config, pairs, name="pairs")
    assert Run(config).require("pairs")
    fewer = dataclasses.replace(config, pairs=dataclasses.replace(pairs, dimensions={"visual_quality": 1.0}))
    with pytest.raises(UserError, match=r"was made with dimensions\.text_alignment = 2\.0, now it is unset"):
        Run(fewer).require("pairs")
    more = {**pairs.dimensions, "motion": 1.0}
    with pytest.raises(UserError, match=r"was made with dimensions\.motion = unset, now it is 1\.0"):
        Run(dataclasses.replace(config, pairs=dataclasses.replace(pairs, dimensions=more))).require("pairs")
    # a section of which the stage kept a part
    work(config, {"generate": {"height": config.generate.height}}, name="score")
    assert Run(config).require("score")


def test_an_infinite_setting_is_kept_and_compared(config):
    unclipped = dataclasses.replace(config, train=TrainConfig(max_grad_norm=math.inf))
    work(unclipped, unclipped.train, name="train")
    assert not work(unclipped, unclipped.train, name="train") and Run(unclipped).require("train")
    with pytest.raises(UserError, match=r"was made with max_grad_norm = inf, now it is 1\.0"):
        Run(config).require("train")


def test_files_of_the_user_may_lie_in_the_run_directory(config):
    """Prompts beside the stages, and a model in a folder that no stage made."""
    root = Run(config).path
    (root / "models" / "wan").mkdir(parents=True)
    (root / "prompts.txt").write_text("a cube\n")
    (root / "models" / "wan" / "model_index.json").write_text("{}")
    inputs = {"prompts": root / "prompts.txt", "model": root / "models" / "wan"}
    assert work(config, name="generate", inputs=inputs)
    assert work(config, name="pairs", inputs={"clips": root / "generate", **inputs})
    assert Run(config).require("pairs") and not work(config, name="generate", inputs=inputs)
    (root / "prompts.txt").write_text("a ball\n")
    with pytest.raises(UserError, match="generate: was made from other prompts"):
        work(config, name="generate", inputs=inputs)


def test_a_derived_stage_is_made_again_whatever_differs(config):
    def report(size, text):
        with Run(config).stage("report", {"size": size}, {"notes": text}, derived=True) as stage:
            if not stage.done:
                write_bytes(stage.folder / "page.html", f"{size} {text}".encode())
                stage.finish({})
            return (stage.folder / "page.html").read_text()

    assert report(1, "a") == "1 a" and report(2, "a") == "2 a" and report(2, "b") == "2 b"
    (Run(config).path / "report" / "page.html").write_text("2 x")  # of the same size: kept as it is
    assert report(2, "b") == "2 x"


def test_the_command_of_another_networks_training_is_train(config):
    with pytest.raises(UserError, match=r"train_transformer_2/lora: not there or unfinished; run `halo train` with"):
        Run(config).require("train_transformer_2/lora")


def test_require_refuses_a_stage_whose_input_changed_since(config):
    run = Run(config)
    work(config, name="generate")
    work(config, name="pairs", inputs={"clips": run.path / "generate"})
    work(config, name="cache", inputs={"pairs": run.path / "pairs" / "out.txt"})
    assert run.require("cache")
    work(config, name="generate", force=True, text="y")
    with pytest.raises(UserError, match=r"pairs: generate changed since it was made; run `halo pairs`"):
        run.require("cache")


def test_a_moved_run_directory_is_kept(config, tmp_path):
    work(config, name="generate")
    work(config, inputs={"clips": Run(config).path / "generate"})
    moved = Run(config).path.rename(tmp_path / "elsewhere")
    config = dataclasses.replace(config, output_dir=str(moved))
    assert not work(config, inputs={"clips": moved / "generate"})


@pytest.mark.parametrize("text", ["{", "[]", "{}", "null", "\xff"])
def test_damaged_manifest_of_an_earlier_stage_is_named(config, text):
    work(config, name="pairs")
    (Run(config).path / "pairs" / "manifest.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"pairs/manifest\.json: missing or damaged .* run `halo pairs` again"):
        Run(config).require("pairs")


def test_damaged_table_is_named(tmp_path):
    (tmp_path / "score").mkdir()
    path = tmp_path / "score" / "scores.parquet"
    for content in (b"PAR1", b""):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"scores\.parquet: missing or damaged .* run `halo score` again"):
            read_table(path)
