"""The whole pipeline by the command line on the demo, killed in its stages: the same results as undisturbed."""

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
    "generate.num_prompts": 8, "generate.batch_size": 4, "annotate.num_clips": 12,
    "reward.video_steps": 10, "reward.patch_steps": 20, "reward.checkpointing_steps": 5, "reward.num_examples": 64,
    "train.max_train_steps": 8, "train.train_batch_size": 4, "train.checkpointing_steps": 2,
    "evaluate.num_prompts": 8, "evaluate.bootstrap": 100, "evaluate.judges": "[frames]", "report.num_clips": 2,
}  # fmt: skip


def halo_run(folder: Path, *words: str) -> subprocess.Popen:
    # one thread: sums in another order would be another result
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    config = [f"--{setting}={value}" for setting, value in CHANGES.items()]
    command = [sys.executable, "-m", "halo_fast", "run", "demo", *config, *words]
    return subprocess.Popen(command, env=environment, cwd=folder)


def kill_in_each(stages: dict[str, str], run: Path, folder: Path, *words: str) -> None:
    """Start the run once for each stage: it goes on with the stage killed before, and is killed in this one."""
    for stage, sign in stages.items():
        process = halo_run(folder, *words)
        try:
            while not list(run.glob(f"{stage}/{sign}")):
                assert process.poll() is None, f"{stage} ended by itself with {process.returncode}"
                time.sleep(0.001)
        finally:
            process.kill()
        assert process.wait() == -signal.SIGKILL
        assert not (run / stage / "manifest.json").exists(), f"{stage} was over before it was killed"
    assert halo_run(folder, *words).wait() == 0


def hashes(run: Path) -> dict[str, object]:
    return {str(path.parent.relative_to(run)): output_hashes(path.parent) for path in run.rglob("manifest.json")}


@pytest.mark.slow
def test_a_run_and_its_second_round_killed_in_their_stages_end_as_undisturbed_ones(tmp_path):
    # the report names the run directory, so both have the same relative name
    whole, killed = (tmp_path / name / "runs" / "demo" for name in ("whole", "killed"))
    for run in (whole, killed):
        run.mkdir(parents=True)
    assert halo_run(whole.parents[1]).wait() == 0
    kill_in_each(STAGES, killed, killed.parents[1])
    first = hashes(whole)
    assert first.keys() >= STAGES.keys() and hashes(killed) == first
    assert hash_file(killed / "metrics.json") == hash_file(whole / "metrics.json")
    metrics = json.loads((whole / "metrics.json").read_text())
    assert 0.25 <= metrics["base_defect_rate"] <= 1
    assert metrics["mitigated_interval"][0] <= metrics["mitigated"] <= metrics["mitigated_interval"][1]
    assert (whole / "report" / "report.html").read_text().count('<figure class="screen') >= 4

    assert halo_run(whole.parents[1], "--rounds=2").wait() == 0
    of_many_steps = {stage: STAGES[stage] for stage in ("generate", "reward", "train", "evaluate")}
    kill_in_each(of_many_steps, killed / "round_2", killed.parents[1], "--rounds=2")
    both = hashes(whole)
    assert len(both) == 2 * len(first) and first.items() <= both.items() and hashes(killed) == both
    page = (killed / "round_2/report/report.html").read_text()
    assert "What each round began with" in page and (killed / "round_2/report/rounds.html").exists()
