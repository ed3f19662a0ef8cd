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


def assert_equal(run: Path, alone: Path, trained: Sequence[str] = ()) -> None:
    """To the bit, but for stages that hang on a training of the reward model; the LoRA to 1e-5.

    Args:
        run: of two processes.
        alone: of one.
        trained: stages that hang on the reward model that two processes trained.
    """
    for stage in ("generate", "annotate", "reward", "score", "pairs", "cache"):
        if stage in trained:
            assert_close(run / stage, alone / stage)
        else:
            assert output_hashes(run / stage) == output_hashes(alone / stage), stage
    trained, expected = load_file(run / LORA), load_file(alone / LORA)
    assert max(float(value.abs().max()) for value in expected.values()) > 1e-2
    for name, value in expected.items():
        assert float((trained[name] - value).abs().max()) < 1e-5
    for stage in ("generate", "annotate", "reward", "score", "pairs", "cache", "train", "evaluate", "report"):
        written = {str(path.relative_to(run / stage)) for path in (run / stage).rglob("*") if path.is_file()}
        outputs = read_json(run / stage / "manifest.json")["outputs"]
        assert written - {"manifest.json"} == outputs.keys(), stage
        counts = [read_json(one / stage / "manifest.json")["counts"] for one in (run, alone)]
        assert counts[0] == pytest.approx(counts[1], rel=1e-5, nan_ok=True), stage
    base = {name: value for name, value in output_hashes(alone / "evaluate").items() if "/base/" in name}
    assert len(base) == CHANGES["evaluate.num_prompts"]
    assert base.items() <= output_hashes(run / "evaluate").items()


def assert_close(stage: Path, alone: Path) -> None:
    """Every table of a stage as that of one process, but for what thirty steps make of the rounding of sums.

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


@pytest.mark.slow
def test_two_processes_run_to_the_end_as_one_does(alone, tmp_path):
    done = ended(launch(MULTI, "-m", "halo_fast", "run", *CONFIG, folder=tmp_path))
    assert done.returncode == 0, done.stderr[-4000:]
    run = tmp_path / "runs" / "demo"
    assert_equal(run, alone, ["reward", "score", "pairs"])
    # the first process alone says something
    assert done.stderr.count("evaluate: begins (stage 8 of 9)") == 1 and done.stdout.count("report: ") == 1
    assert done.stdout.count("severity, flicker") == 1
    # with the same LoRA the tables of evaluate are the same
    shutil.rmtree(run)
    shutil.copytree(alone, run)
    for finished in ("evaluate", "judges", "report"):
        shutil.rmtree(run / finished)
    manifest = json.loads((run / "train" / "manifest.json").read_text())
    manifest["settings"]["gradient_accumulation_steps"] = 1
    (run / "train" / "manifest.json").write_text(json.dumps(manifest))
    done = ended(launch(TORCHRUN, "-m", "halo_fast", "evaluate", *CONFIG, folder=tmp_path))
    assert done.returncode == 0, done.stderr[-4000:]
    assert output_hashes(run / "evaluate") == output_hashes(alone / "evaluate")
    assert (run / "judges/judges.json").read_bytes() == (alone / "judges/judges.json").read_bytes()


@pytest.mark.slow
def test_a_process_killed_in_each_stage_changes_no_result(alone, tmp_path):
    run = tmp_path / "runs" / "demo"
    for stage, (rank, sign) in KILLED.items():
        words = ("-m", "halo_fast", stage, *CONFIG)
        process = launch(TORCHRUN, *words, folder=tmp_path)
        kill_worker(process, rank, lambda stage=stage, sign=sign: list(run.glob(f"{stage}/{sign}")))
        killed = ended(process)
        assert killed.returncode != 0 and f"exitcode  : -{int(signal.SIGKILL)}" in killed.stderr
        assert not (run / stage / "manifest.json").exists(), f"{stage} was over before a process was killed"
        done = ended(launch(TORCHRUN, *words, folder=tmp_path))
        assert done.returncode == 0, done.stderr[-4000:]
        if stage == "reward":
            assert_close(run / stage, alone / stage)
            # with the same reward model all that follows is the same
            shutil.rmtree(run / stage)
            shutil.copytree(alone / stage, run / stage)
    assert_equal(run, alone)


@pytest.mark.slow
def test_a_launcher_may_start_all_processes_again(alone, tmp_path):
    again = (*TORCHRUN, "--max_restarts", "1")
    process = launch(again, "-m", "halo_fast", "generate", *CONFIG, folder=tmp_path)
    run = tmp_path / "runs" / "demo"
    kill_worker(process, 0, lambda: list(run.glob("generate/videos/p*.mp4")))
    done = ended(process)
    assert done.returncode == 0 and "generate: goes on" in done.stderr
    assert output_hashes(run / "generate") == output_hashes(alone / "generate")
