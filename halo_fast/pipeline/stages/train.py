"""The stage that trains."""

import time
from collections.abc import Sequence
from contextlib import ExitStack

import torch

from halo_fast.data import CachedPairs, Pair
from halo_fast.errors import UserError
from halo_fast.export.lora import metadata, save_network
from halo_fast.families import load, source
from halo_fast.files import progress, write_safetensors
from halo_fast.pipeline.config import Config
from halo_fast.pipeline.run import Run
from halo_fast.train import diagnostics
from halo_fast.train.config import TrainConfig
from halo_fast.train.job import prepared
from halo_fast.train.loop import fit
from halo_fast.train.steps import take_step

__all__ = ["dry_run", "train"]


def train(config: Config, run: Run) -> None:
    """Train on a run directory's pairs: the LoRA goes to train/lora, at rank 0 the network to train/model; a stage.

    Raises:
        UserError: whatever `fit` finds wrong.
    """
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    name = config.pretrained_model_name_or_path
    inputs = {
        "pairs": run.require("pairs"),
        "cache": run.require("cache"),
        "pretrained_model_name_or_path": source(name),
    }
    # Without an accelerator accelerate must be told so before it looks for other processes.
    main = PartialState(cpu=not torch.accelerator.is_available()).is_main_process
    stage = run.stage("train", config.train, inputs)
    with ExitStack() as stack:
        if main:
            stack.enter_context(stage)
        done = [stage.done]
        broadcast_object_list(done)
        if done[0]:
            return
        training, heldout = _split(CachedPairs(run.require("pairs/pairs.parquet"), run.require("cache")), config.train)
        family = load(name, device="cpu", network=config.train.network)
        family.set_guidance(config.generate.guidance_scale)
        result = fit(
            family, training, config.train, folder=stage.folder, references=run.path / "reference_errors",
            heldout=heldout, generate=config.generate,
        )  # fmt: skip
        if main:
            told = metadata(family, name, config.train, len(result.log))
            if config.train.rank:
                write_safetensors(stage.folder / "lora" / "pytorch_lora_weights.safetensors", result.lora, told)
            else:
                save_network(stage.folder / "model", family, result.weights, told)
            stage.finish({"steps": len(result.log), "loss": result.log[-1]["loss"]})


def dry_run(config: Config, run: Run) -> None:
    """Print what `train` would do: pairs, plan, predicted memory and time of a step, measured on one; writes nothing.

    Raises:
        UserError: whatever `fit` finds wrong at its start.
    """
    training, heldout = _split(CachedPairs(run.require("pairs/pairs.parquet"), run.require("cache")), config.train)
    family = load(config.pretrained_model_name_or_path, device="cpu", network=config.train.network)
    family.set_guidance(config.generate.guidance_scale)
    some = training[: config.train.train_batch_size * config.train.gradient_accumulation_steps]
    with prepared(family, some, config.train, folder=None, references=None, progress=progress) as job:
        take_step(job, 0)  # kernels and compiled blocks warm up
        started = time.perf_counter()
        _, norm = take_step(job, 1)
        norm.item()
        seconds = time.perf_counter() - started
        print(f"pairs: {len(training)} to train on, {len(heldout)} held out; latents {list(some[0].latents.shape[1:])}")
        print(job.plan.text)
        steps = config.train.max_train_steps
        print(f"time: {seconds:.3g} s a step, {seconds * steps / 60:.3g} min for {steps} steps")


def _split(pairs: CachedPairs, config: TrainConfig) -> tuple[Sequence[Pair], Sequence[Pair]]:
    """Pairs to train on and pairs kept out for diagnostics; all of a prompt's on one side."""
    away = diagnostics.held_out(pairs.prompts, config.heldout_share)
    if all(away):
        raise UserError(f"train.heldout_share: all {len(pairs)} pairs would be kept out of training; lower it")
    return pairs.where([not out for out in away]), pairs.where(away)
