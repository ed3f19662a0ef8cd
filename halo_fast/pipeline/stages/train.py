"""The stage that trains."""

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from halo_fast import processes
from halo_fast.data import CachedPairs, Pair
from halo_fast.data.pairs import heldout_mask
from halo_fast.errors import UserError
from halo_fast.export.lora import LORA_FILE, metadata, read_trained, save_network
from halo_fast.families import Family, load, source
from halo_fast.files import progress, write_safetensors
from halo_fast.pipeline.clips import noise_seeds, run_clips
from halo_fast.pipeline.config import Config
from halo_fast.pipeline.hashes import read_manifest
from halo_fast.pipeline.run import Run
from halo_fast.train.config import CHANGEABLE, deciding_settings
from halo_fast.train.draws import Buckets, buckets_of, tell_noise
from halo_fast.train.job import Job, prepared_job
from halo_fast.train.loop import fit
from halo_fast.train.steps import take_step

__all__ = ["dry_run", "folder_of", "train", "trained_results", "training_folder", "training_pairs", "trainings"]


def train(config: Config, run: Run) -> None:
    """Train on a run directory's pairs: the LoRA goes to train/lora, at rank 0 the network to train/model; a stage.

    A network that is not the model's first, such as transformer_2, goes to train_transformer_2 instead of train. A
    later round goes on from what the round before trained.

    Raises:
        UserError: whatever `fit` finds wrong.
    """
    name = config.pretrained_model_name_or_path
    inputs = {
        "pairs": run.require("pairs"),
        "cache": run.require("cache"),
        "pretrained_model_name_or_path": source(name),
    }
    inputs |= run_clips(run).inputs if config.train.noise == "own" else {}
    start = _start(config, run)
    inputs |= {} if start is None else {"start": start}
    base = {"precision": config.precision, "quantization": config.quantization}
    settings = deciding_settings(config.train, start is not None) | base
    with run.stage(training_folder(config), settings, inputs, changeable=CHANGEABLE) as stage:
        if stage.done:
            return
        family, pairs, heldout = _load(config, run)
        result = fit(
            family, pairs, config.train, folder=stage.folder, references=run.root / "reference_errors",
            heldout=heldout, generate=config.generate, start=None if start is None else read_trained(family, start),
        )  # fmt: skip
        if not processes.is_first():
            return
        about = metadata(family, name, config.train, len(result.log))
        if config.train.rank:
            write_safetensors(stage.folder / "lora" / LORA_FILE, result.lora, about)
        else:
            save_network(stage.folder / "model", family, result.weights, about)
        counts = {"steps": len(result.log), "loss": result.log[-1]["loss"]}
        if config.rounds > 1 and result.gap is not None:
            counts["off_policy_gap"] = result.gap
        stage.finish(counts)


def training_folder(config: Config) -> str:
    """Name of the stage that trains the config's network: each network has a place of its own, on the same pairs."""
    return folder_of(config.train.network)


def folder_of(network: str | None) -> str:
    """Name of the stage that trains a network; None is the model's first."""
    return "train" if network in (None, "transformer", "unet") else f"train_{network}"


def trainings(run: Run) -> list[Path]:
    """The folders of all finished trainings of a run; of a network that several rounds trained, the last one's.

    A folder that does not bear the name of its network, such as a copy, is none.
    """
    found = {}
    for place in (path.parent for one in run.rounds for path in one.path.glob("train*/manifest.json")):
        manifest = read_manifest(place)
        if manifest and place.name == folder_of(manifest["settings"].get("network")):
            found[place.name] = place
    return [found[name] for name in sorted(found)]


def trained_results(config: Config, run: Run) -> dict[str, Path]:
    """The LoRA or network of each training, by its stage's name, that of the config's own network first.

    Others are of further networks of the model, such as Wan 2.2's other expert.

    Raises:
        UserError: the config's own network is not trained in this round.
    """
    own = training_folder(config)
    found = {own: run.require(f"{own}/{'lora' if config.train.rank else 'model'}")}
    return found | {path.name: _result(path) for path in trainings(run) if path.name != own}


def _start(config: Config, run: Run) -> Path | None:
    """The LoRA or network that a later round goes on from; None in the first, and for a network not yet trained."""
    before = trainings(run.rounds[-2]) if run.number > 1 else []
    return next((_result(path) for path in before if path.name == training_folder(config)), None)


def _result(training: Path) -> Path:
    """Where a training's LoRA or network is."""
    return next(path for name in ("lora", "model") if (path := training / name).exists())


def dry_run(config: Config, run: Run) -> None:
    """Print what `train` would do: pairs, plan, predicted memory and the measured time of a step; writes nothing.

    Raises:
        UserError: whatever `fit` finds wrong at its start.
    """
    family, pairs, heldout = _load(config, run)
    settings, buckets = config.train, buckets_of(pairs)
    numbers = range(len(buckets.sizes))
    count = settings.train_batch_size * (settings.gradient_accumulation_steps if len(numbers) == 1 else 1)
    few = [pairs[i] for number in numbers for i in _places(buckets, number)[:count]]
    path = _start(config, run)
    start = None if path is None else read_trained(family, path)
    with prepared_job(family, few, settings, progress=progress, start=start) as job:
        times = [_seconds_of_step(job, number) for number in numbers]
    print(f"pairs: {len(pairs)} to train on, {len(heldout)} held out", end="")
    print(f"; latents {list(few[0].latents.shape[1:])}" if len(numbers) == 1 else "")
    for line in buckets.lines([f"{one:.3g} s a step of these alone" for one in times]):
        print(line)
    print(job.plan.text)
    # a bucket has its share of the steps by its batches
    batches = [math.ceil(len(_places(buckets, number)) / settings.train_batch_size) for number in numbers]
    seconds = sum(one * share for one, share in zip(times, batches, strict=True)) / sum(batches)
    steps = settings.max_train_steps
    print(f"time: {seconds:.3g} s a step, {seconds * steps / 60:.3g} min for {steps} steps")


def _places(buckets: Buckets, number: int) -> list[int]:
    """The pairs of a bucket."""
    return [index for index, own in enumerate(buckets.of) if own == number]


def _seconds_of_step(job: Job, number: int) -> float:
    """Time of a step on the pairs of one bucket."""
    places, errors = _places(job.buckets, number), job.reference_errors
    alone = replace(
        job, pairs=[job.pairs[index] for index in places],
        buckets=Buckets((0,) * len(places), (job.buckets.sizes[number],)),
        reference_errors=None if errors is None else [errors[index] for index in places],
    )  # fmt: skip
    take_step(alone, 0)  # kernels and compiled blocks warm up
    started = time.perf_counter()
    _, norm = take_step(alone, 1)
    norm.item()
    return time.perf_counter() - started


def training_pairs(config: Config, run: Run, family: Family) -> CachedPairs:
    """All pairs of a run, with the noise of their clips where `train.noise` asks for it; sets the family's conditions.

    Args:
        config: settings of the run.
        run: whose stages pairs and cache are finished.
        family: the model that trains on them.
    """
    family.set_conditions(config.generate.guidance_scale, config.generate.fps)
    own = config.train.noise == "own"
    seeds, others = noise_seeds(run_clips(run).rows, family) if own else ({}, "")
    pairs = CachedPairs(run.require("pairs/pairs.parquet"), run.require("cache"), seeds)
    if own:
        tell_noise([a in seeds and b in seeds for a, b in pairs.clips], others)
    return pairs


def _load(config: Config, run: Run) -> tuple[Family, Sequence[Pair], Sequence[Pair]]:
    """The model, pairs to train on, and pairs kept out for diagnostics; all pairs of a prompt are on one side."""
    settings = config.train
    # only what samples clips needs the other parts
    sampling = settings.validation_prompts or (settings.off_policy_pairs and settings.off_policy_fresh)
    family = load(
        config.pretrained_model_name_or_path, "cpu", settings.network, config.precision if settings.rank else "fp32",
        None if sampling else [settings.network or "transformer", "unet"], config.quantization,
    )  # fmt: skip
    pairs = training_pairs(config, run, family)
    if not len(pairs):
        raise UserError(f"{run.path / 'pairs'}: no pair to train on, all have the weight 0; give some a weight above 0")
    heldout = heldout_mask(pairs.prompts, settings.heldout_share)
    if all(heldout):
        raise UserError(f"train.heldout_share: all {len(pairs)} pairs would be kept out of training; lower it")
    return family, pairs.where([not out for out in heldout]), pairs.where(heldout)
