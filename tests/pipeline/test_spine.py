"""The whole pipeline through the command line on the demo: every stage is killed once, and the figures are the same."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny import output_hashes

from halo_fast.files import hash_file

# files that exist in the middle of a stage; one that writes all at once is killed as soon as it begins
STAGES = {
    "generate": "videos/p*.mp4",
    "annotate": "pending.json",
    "reward": "checkpoint.safetensors",
    "score": "pending.json",
    "pairs": "pending.json",
    "cache": "pending.json",
    "train": "checkpoints/step_*.safetensors",
    "evaluate": "videos/base/*.mp4",
    "report": "pending.json",
}
CHANGES = {
    "generate.num_prompts": 8, "generate.batch_size": 4,
    "reward.video_steps": 10, "reward.patch_steps": 20, "reward.checkpointing_steps": 5, "reward.num_examples": 64,
    "train.max_train_steps": 8, "train.train_batch_size": 4, "train.checkpointing_steps": 2,
    "evaluate.num_prompts": 8, "evaluate.bootstrap": 100, "report.num_clips": 2,
}  # fmt: skip


def halo(folder: Path, *words: str | Path) -> subprocess.Popen:
    # one thread: sums in another order would be another result
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-m", "halo_fast", *map(str, words)], env=environment, cwd=folder)


@pytest.mark.slow
def test_a_run_whose_every_stage_was_killed_ends_as_an_undisturbed_one(tmp_path):
    config = ["demo", *(f"--{setting}={value}" for setting, value in CHANGES.items())]
    # the report names the run directory, so both have the same relative name
    whole, killed = tmp_path / "whole" / "runs" / "demo", tmp_path / "killed" / "runs" / "demo"
    for run in (whole, killed):
        run.mkdir(parents=True)
    assert halo(whole.parents[1], "run", *config).wait() == 0
    for stage, sign in STAGES.items():
        process = halo(killed.parents[1], stage, *config)
        try:
            while not list(killed.glob(f"{stage}/{sign}")):
                assert process.poll() is None, f"{stage} ended by itself with {process.returncode}"
                time.sleep(0.001)
        finally:
            process.kill()
        assert process.wait() == -signal.SIGKILL
        assert not (killed / stage / "manifest.json").exists(), f"{stage} was over before it was killed"
        assert halo(killed.parents[1], stage, *config).wait() == 0
        assert output_hashes(killed / stage) == output_hashes(whole / stage), stage
    assert hash_file(killed / "metrics.json") == hash_file(whole / "metrics.json")
    metrics = json.loads((whole / "metrics.json").read_text())
    assert 0.25 <= metrics["base_defect_rate"] <= 1
    assert metrics["mitigated_interval"][0] <= metrics["mitigated"] <= metrics["mitigated_interval"][1]
    assert (whole / "report" / "report.html").read_text().count('<figure class="screen') >= 4
