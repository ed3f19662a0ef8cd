"""Exact resume: after SIGKILL and SIGTERM, with all that changes while training; what is kept, what is refused."""

import csv
import dataclasses
import math
import os
import random
import signal

import pytest
import torch
from tiny import kill_when, output_hashes, run_to_cache, tiny_config
from training import ARMS, CONFIG, at_step, objective_with, quiet

from halo_fast.pipeline.run import Run
from halo_fast.pipeline.stages.train import dry_run, train
from halo_fast.train import fit, planner
from halo_fast.train.config import TrainConfig
from halo_fast.train.steps import learning_rate

KILLED = """
import time, torch
from pathlib import Path
from tiny import tiny_config
from halo_fast.pipeline.run import Run
from halo_fast.pipeline.stages.train import train
from halo_fast.train import loop
torch.set_num_threads({threads})
take_step = loop.take_step
def stopping(job, step):
    if step == {step}:
        Path({marker!r}).touch()
        time.sleep(1000)  # time to be killed in
    return take_step(job, step)
loop.take_step = stopping
config = tiny_config(Path({folder!r}), **{settings!r})
train(config, Run(config))
"""
# all that has a state: moments, an adjusted beta, a schedule of the learning rate, draws, diagnostics between two rows
SETTINGS = {
    "max_train_steps": 14, "train_batch_size": 1, "gradient_accumulation_steps": 2, "checkpointing_steps": 3,
    "checkpoints_total_limit": 2, "auto_beta": 0.3, "lr_scheduler": "cosine", "reference_draws": 3,
    "heldout_share": 0.4, "diagnostics_steps": 5, "logging_steps": 4,
}  # fmt: skip


@pytest.fixture(scope="module")
def cached(tmp_path_factory):
    """A run directory up to its cache."""
    folder = tmp_path_factory.mktemp("resume")
    config = tiny_config(folder, **SETTINGS)
    run = run_to_cache(config)
    return folder, config, run


@pytest.mark.slow
def test_killed_at_three_random_steps_equals_undisturbed(cached, monkeypatch):
    folder, config, run = cached
    for step in sorted(random.Random(5).sample(range(2, 14), 3)):
        marker = folder / f"step_{step}"
        code = KILLED.format(
            threads=torch.get_num_threads(), step=step, marker=str(marker), folder=str(folder), settings=SETTINGS
        )
        kill_when(code, marker.exists)
        assert not (run.path / "train/manifest.json").exists()
    train(config, run)
    continued = output_hashes(run.path / "train")
    rows = list(csv.DictReader((run.path / "train/diagnostics.csv").open()))
    assert {row["step"] for row in rows} == {"5", "10", "14"} and {row["split"] for row in rows} == {"train", "heldout"}
    train(config, Run(config, force=True))
    assert output_hashes(run.path / "train") == continued
    names = {"lora/pytorch_lora_weights.safetensors", "log.csv", "diagnostics.csv"}
    states = {f"checkpoints/step_{step:06d}.safetensors" for step in (9, 12)}
    assert names | states <= continued.keys() and sum("checkpoints/" in name for name in continued) == 2


def test_dry_run_prints_plan_and_time_and_writes_nothing(cached, capsys):
    _, config, run = cached
    before = sorted(run.path.rglob("*"))
    dry_run(config, run)
    printed = capsys.readouterr().out
    for part in ("pairs: ", "plan: batched", "predicted peak", "s a step"):
        assert part in printed
    assert sorted(run.path.rglob("*")) == before


def test_sigterm_ends_the_step_saves_and_the_same_command_continues(pipeline, pairs, tmp_path, caplog):
    whole = fit(pipeline, pairs, CONFIG, folder=tmp_path / "whole", progress=quiet)
    before = signal.getsignal(signal.SIGTERM)
    folder = tmp_path / "stopped"
    with pytest.raises(SystemExit) as stopped:
        fit(
            pipeline, pairs, CONFIG, folder=folder,
            progress=at_step(2, lambda: os.kill(os.getpid(), signal.SIGTERM)),
        )  # fmt: skip
    assert stopped.value.code == 143 and signal.getsignal(signal.SIGTERM) is before
    assert "SIGTERM, saved after step 3; the same command continues" in caplog.text
    assert (folder / "checkpoints/step_000003.safetensors").exists()
    started = []
    resumed = fit(pipeline, pairs, CONFIG, folder=folder, progress=lambda steps, *_: started.append(steps[0]) or steps)
    assert started[-1] == 3 and resumed.log == whole.log
    assert all(torch.equal(value, whole.lora[name]) for name, value in resumed.lora.items())
    # the checkpoint off schedule is gone, so both folders hold the same
    files = [sorted(path.relative_to(place) for path in place.rglob("*")) for place in (folder, tmp_path / "whole")]
    assert files[0] == files[1]


def test_newest_checkpoints_are_kept(pipeline, pairs, tmp_path):
    config = dataclasses.replace(CONFIG, max_train_steps=5, checkpointing_steps=1, checkpoints_total_limit=2)
    fit(pipeline, pairs, config, folder=tmp_path, progress=quiet)
    assert sorted(path.stem for path in (tmp_path / "checkpoints").iterdir()) == ["step_000004", "step_000005"]


@pytest.mark.slow
def test_a_schedule_chosen_by_free_memory_stays_when_memory_changes(pipeline, pairs, tmp_path, monkeypatch):
    monkeypatch.setattr(planner, "_free_memory", lambda device: 0)
    config = dataclasses.replace(CONFIG, max_train_steps=4, objective=objective_with(**ARMS["both"]))
    whole = fit(pipeline, pairs, config, folder=tmp_path / "whole", progress=quiet)

    class Stop(Exception):
        pass

    def stop():
        raise Stop

    with pytest.raises(Stop):
        fit(pipeline, pairs, config, folder=tmp_path / "cut", progress=at_step(3, stop))
    monkeypatch.setattr(planner, "_free_memory", lambda device: 2**40)
    resumed = fit(pipeline, pairs, config, folder=tmp_path / "cut", progress=quiet)
    assert resumed.log == whole.log
    assert all(torch.equal(value, whole.lora[name]) for name, value in resumed.lora.items())


def test_learning_rate_warms_up_and_falls_as_set():
    config = TrainConfig(learning_rate=2.0, lr_warmup_steps=4, max_train_steps=12)
    rates = {
        name: [learning_rate(step, dataclasses.replace(config, lr_scheduler=name)) for step in range(12)]
        for name in ("constant", "linear", "cosine")
    }
    assert all(rate[:4] == [0.5, 1.0, 1.5, 2.0] for rate in rates.values())
    assert rates["constant"][4:] == [2.0] * 8
    assert rates["linear"][4:] == pytest.approx([2.0 * (8 - k) / 8 for k in range(8)])
    assert rates["cosine"][4:] == pytest.approx([1 + math.cos(math.pi * k / 8) for k in range(8)])
