"""Hashes are made once: stamps stand for content, damage is still found, and a stage over many files starts soon."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest

from halo_fast.errors import UserError
from halo_fast.files import write_bytes
from halo_fast.pipeline import hashes
from halo_fast.pipeline.cli import main
from halo_fast.pipeline.config import Config
from halo_fast.pipeline.run import Run


@pytest.fixture
def run(tmp_path):
    return Run(Config(output_dir=str(tmp_path / "run")))


@pytest.fixture
def read_files(monkeypatch):
    """The files whose content is read for a hash, in order."""
    read: list[str] = []

    def counted(path):
        read.append(Path(path).name)
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()

    monkeypatch.setattr(hashes, "hash_file", counted)
    return read


def make(run, name="generate", files=("a.bin", "deep/b.bin"), inputs=None):
    with run.stage(name, {}, inputs or {}) as stage:
        if not stage.done:
            for file in files:
                write_bytes(stage.folder / file, file.encode())
            stage.finish({})


def enter_next(run):
    with run.stage("score", {}, {"clips": run.path / "generate"}) as stage:
        write_bytes(stage.folder / "scores.bin", b"1")
        stage.finish({})


def test_a_file_is_hashed_when_it_is_made_and_not_again(run, read_files):
    make(run)
    assert read_files == ["a.bin", "b.bin"]
    read_files.clear()
    enter_next(run)
    assert read_files == ["scores.bin"]


def test_a_copied_run_is_read_once(run, read_files, tmp_path):
    make(run)
    copy = Run(Config(output_dir=str(tmp_path / "copy")))
    shutil.copytree(run.path, copy.path, copy_function=shutil.copyfile)
    for file in (copy.path / "generate").rglob("*.bin"):
        os.utime(file, ns=(1, 1))
    read_files.clear()
    enter_next(copy)
    assert read_files == ["a.bin", "b.bin", "scores.bin"]
    read_files.clear()
    Run(copy.config, force=True).path.mkdir(exist_ok=True)
    assert hashes.changed_outputs(copy.path / "generate", ".", "again") == [] == read_files


@pytest.mark.parametrize("content", [b"A.bin", b"longer than before", None])
def test_a_changed_file_is_named_whatever_its_size(run, content):
    make(run)
    path = run.path / "generate" / "a.bin"
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(UserError, match=r"generate/a\.bin: damaged since it was made; .* run `halo generate`"):
        enter_next(run)


def test_only_the_part_that_a_stage_reads_is_looked_at(run):
    make(run, files=("clips/a.bin", "clips2/b.bin"))
    (run.path / "generate" / "clips2" / "b.bin").write_bytes(b"x")
    assert hashes.changed_outputs(run.path / "generate", "clips", "") == []
    assert [path.name for path in hashes.changed_outputs(run.path / "generate", ".", "")] == ["b.bin"]


def test_verify_reads_everything_and_names_all_that_changed(run, capsys):
    make(run)
    enter_next(run)
    assert main(["verify", str(run.path)]) == 0
    assert "generate" in (shown := capsys.readouterr().out) and "2 files" in shown and "15 bytes" in shown
    for name in ("generate/deep/b.bin", "score/scores.bin"):
        path = run.path / name
        times = path.stat()
        path.write_bytes(path.read_bytes()[::-1] if path.stat().st_size > 1 else b"2")
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # bits that rot leave the time stamp
    assert main(["verify", str(run.path)]) == 2
    message = capsys.readouterr().err
    assert "2 files" in message and "generate/deep/b.bin, score/scores.bin" in message
    assert main(["verify", str(run.path / "generate")]) == 2


def test_files_of_a_model_are_hashed_once_in_a_run(run, read_files, tmp_path):
    model = tmp_path / "model"
    write_bytes(model / "transformer" / "weights", b"1")
    write_bytes(model / "model_index.json", b"{}")
    make(run, inputs={"model": model})
    assert sorted(read_files) == ["a.bin", "b.bin", "model_index.json", "weights"]
    read_files.clear()
    make(run, "cache", (), {"model": model})
    assert read_files == []
    write_bytes(model / "transformer" / "weights", b"2")
    with pytest.raises(UserError, match="was made from other model"):
        make(run, inputs={"model": model})
    assert read_files == ["weights"]
    # the same digest as of a folder that was never seen
    listed = {
        name: hashlib.sha256((model / name).read_bytes()).hexdigest()
        for name in ("model_index.json", "transformer/weights")
    }
    expected = hashlib.sha256(json.dumps(listed, sort_keys=True).encode()).hexdigest()
    assert run.input_hash("model", model) == expected
