"""The reduced demo on two processes: outputs of one process, also when a process is killed in each stage."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow.csv
import pyarrow.parquet
import pytest
from launches import ACCELERATE, TORCHRUN, ended, kill_worker, launch
from safetensors.torch import load_file
from tiny import output_hashes

from halo_fast.files import read_json

# in stages that are shared the second process is killed, in others the one that works; and what is there by then
KILLED = {
    "generate": (1, "videos/p*.mp4"),
    "annotate": (0, "pending.json"),
    "reward": (1, "checkpoint.safetensors"),
    "score": (1, ".clips.*.part"),
    "pairs": (0, "pending.json"),
    "cache": (1, "latents/*.safetensors"),
    "train": (1, "checkpoints/step_*.safetensors"),
    "evaluate": (1, "videos/aligned/*.mp4"),
    "report": (0, "pending.json"),
}
CHANGES = {
    "generate.num_prompts": 12, "generate.batch_size": 2,
    "reward.video_steps": 10, "reward.patch_steps": 20, "reward.checkpointing_steps": 5, "reward.num_examples": 64,
    "score.batch_size": 2, "train.max_train_steps": 6, "train.train_batch_size": 2, "train.checkpointing_steps": 2,
    "evaluate.num_prompts": 6, "evaluate.bootstrap": 100, "report.num_clips": 2,
}  # fmt: skip
CONFIG = ["demo", *(f"--{setting}={value}" for setting, value in CHANGES.items())]
LORA = "train/lora/pytorch_lora_weights.safetensors"
MULTI = (*ACCELERATE, "--multi_gpu")  # also what starts several processes on a CPU


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """The run of one process, with as many pairs in a step as two have."""
    folder = tmp_path_factory.mktemp("alone")
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "halo_fast", "run", *CONFIG, "--train.gradient_accumulation_steps=2"]
    subprocess.run(command, env=environment, cwd=folder, check=True)
    return folder / "runs" / "demo"


def assert_close(stage: Path, alone: Path) -> None:
    """Every table of the stage reward as that of one process, but for what thirty steps make of the rounding of sums.

    Scores are 1 to 5. The first steps of a training are equal to 1e-6.
    """
    tables = [path for path in alone.iterdir() if path.suffix in (".parquet", ".csv")]
    assert tables
    for path in tables:
        read = pyarrow.parquet.read_table if path.suffix == ".parquet" else pyarrow.csv.read_csv
        found, expected = (read(folder / path.name) for folder in (stage, alone))
        assert found.schema == expected.schema
        for name, kind in zip(expected.schema.names, expected.schema.types, strict=True):
            columns = [table[name].to_pylist() for table in (found, expected)]
            if pyarrow.types.is_floating(kind) or pyarrow.types.is_list(kind):
                numbers = [np.array(column, dtype=float) for column in columns]
                np.testing.assert_allclose(*numbers, rtol=0, atol=1e-3, err_msg=f"{path}: {name}")
                if path.name == "history.csv":
                    first = [column[:4] for column in numbers]
                    np.testing.assert_allclose(*first, rtol=1e-6, atol=1e-6, err_msg=f"{path}: {name}")
            else:
                assert columns[0] == columns[1], f"{path}: {name}"


def go_on(launcher: Sequence[str], verb: str, folder: Path) -> subprocess.CompletedProcess:
    done = ended(launch(launcher, "-m", "halo_fast", verb, *CONFIG, folder=folder))
    assert done.returncode == 0, done.stderr[-4000:]
    return done


def take(stage: Path, alone: Path) -> None:
    """Put the stage of one process in place: with the same weights all that follows is the same."""
    shutil.rmtree(stage)
    shutil.copytree(alone, stage)
    manifest = read_json(stage / "manifest.json")
    if stage.name == "train":
        manifest["settings"]["gradient_accumulation_steps"] = 1  # one process has as many pairs in a step by two
    (stage / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.slow
def test_a_process_killed_in_each_stage_changes_no_result(alone, tmp_path):
    """The reward model differs by rounding and the LoRA by 1e-5, every other file of a stage not at all."""
    run = tmp_path / "runs" / "demo"
    for stage, (rank, sign) in KILLED.items():
        # goes on with the stage that was killed before, and ends in this one
        process = launch(TORCHRUN, "-m", "halo_fast", "run", *CONFIG, folder=tmp_path)
        kill_worker(process, rank, lambda stage=stage, sign=sign: list(run.glob(f"{stage}/{sign}")))
        killed = ended(process)
        assert killed.returncode != 0 and f"exitcode  : -{int(signal.SIGKILL)}" in killed.stderr
        assert not (run / stage / "manifest.json").exists(), f"{stage} was over before a process was killed"
        if stage == "reward":
            go_on(TORCHRUN, "reward", tmp_path)
            assert_close(run / stage, alone / stage)
            take(run / stage, alone / stage)
        if stage == "train":
            go_on(TORCHRUN, "train", tmp_path)
            found, expected = load_file(run / LORA), load_file(alone / LORA)
            assert max(float(value.abs().max()) for value in expected.values()) > 1e-2
            for name, value in expected.items():
                assert float((found[name] - value).abs().max()) < 1e-5
            take(run / stage, alone / stage)
    done = go_on(MULTI, "run", tmp_path)
    # the first process alone says something
    assert done.stderr.count("report: begins (stage 9 of 9)") == 1 and done.stdout.count("report: ") == 1
    for stage in KILLED:
        written = {str(path.relative_to(run / stage)) for path in (run / stage).rglob("*") if path.is_file()}
        assert written - {"manifest.json"} == read_json(run / stage / "manifest.json")["outputs"].keys(), stage
        counts = [read_json(one / stage / "manifest.json")["counts"] for one in (run, alone)]
        assert counts[0] == pytest.approx(counts[1], rel=1e-5, nan_ok=True), stage
        if stage != "report":
            assert output_hashes(run / stage) == output_hashes(alone / stage), stage
    assert (run / "judges/judges.json").read_bytes() == (alone / "judges/judges.json").read_bytes()


@pytest.mark.slow
def test_a_launcher_may_start_all_processes_again(alone, tmp_path):
    again = (*TORCHRUN, "--max_restarts", "1")
    process = launch(again, "-m", "halo_fast", "generate", *CONFIG, folder=tmp_path)
    run = tmp_path / "runs" / "demo"
    kill_worker(process, 0, lambda: list(run.glob("generate/videos/p*.mp4")))
    done = ended(process)
    assert done.returncode == 0 and "generate: goes on" in done.stderr
    assert output_hashes(run / "generate") == output_hashes(alone / "generate")
