"""Training on preference pairs: policy and reference are one model."""

import logging
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from halo_fast.data import Pair
from halo_fast.export.lora import export_lora
from halo_fast.families import family_of
from halo_fast.families.sampling import GenerateConfig
from halo_fast.files import progress
from halo_fast.train.checkpoint import prune_checkpoints, resume, save_checkpoint
from halo_fast.train.config import TrainConfig
from halo_fast.train.job import Job, Progress, prepared_job
from halo_fast.train.observers.base import Observer
from halo_fast.train.observers.diagnostics import Diagnostics
from halo_fast.train.observers.guards import Guards
from halo_fast.train.observers.log import Log
from halo_fast.train.observers.previews import Previews
from halo_fast.train.observers.trackers import open_trackers
from halo_fast.train.off_policy import measure_off_policy
from halo_fast.train.parallel import any_process, gather_shards
from halo_fast.train.steps import take_step

__all__ = ["Fit", "fit"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Fit:
    """What training gives.

    Args:
        lora: the LoRA under the names of diffusers, its scale folded in; `pipeline.load_lora_weights(lora)` takes it.
            Empty at rank 0.
        log: one row a step, under the names of log.csv.
        gap: of the off-policy check; None where it was not made.
        weights: at rank 0 the trained network's, for its `load_state_dict`; else empty.
    """

    lora: dict[str, Tensor]
    log: list[dict[str, float]]
    weights: dict[str, Tensor]
    gap: float | None = None


def fit(
    pipeline: Any,
    pairs: Sequence[Pair],
    config: TrainConfig,
    *,
    folder: Path | str | None = None,
    references: Path | str | None = None,
    heldout: Sequence[Pair] = (),
    generate: GenerateConfig | None = None,
    progress: Progress = progress,
    start: Mapping[str, Tensor] | None = None,
) -> Fit:
    """Train a LoRA, or the weights themselves, on preference pairs; the pipeline is left as it was.

    Each (pair, draw) seeds its own noise and time. A step's data depends only on its number and the seed. The model
    stays in eval mode throughout: dropout would make policy and reference differ by chance.

    Args:
        pipeline: a diffusers pipeline, a `Family` or a `Denoiser`.
        pairs: any sequence of `Pair`, in memory or `CachedPairs`, of one or several sizes.
        config: the settings; `config.objective` is the loss.
        folder: where log.csv, diagnostics.csv, previews and checkpoints go and training resumes from; SIGTERM then ends
            the step, saves and exits. None keeps everything in memory.
        references: where the reference's errors are kept (config.reference_draws), for other trainings too.
        heldout: pairs for diagnostics.csv alone, so without a folder none are judged.
        generate: size and sampling of the clips, of previews and fresh samples too; guidance scale and frame rate are
            inputs of some networks in training. None leaves these as the family has them.
        progress: wraps the iterable of steps, (iterable, total, label).
        start: what the policy starts from, the `lora` of an earlier `Fit` with the same rank and layers, or at rank 0
            its `weights`; None for the pipeline as it is. `config.reference` says what it is compared with.

    Raises:
        UserError: a setting without a meaning, no pairs, a start of other layers, a grid larger than the latent, a
            model whose reference is not what it should be, a loss that is not finite or spikes, or checkpoints of other
            settings.
    """
    folder, references = (None if place is None else Path(place) for place in (folder, references))
    family = family_of(pipeline, config.network)
    if folder is None and heldout:
        logger.warning("train: %d held-out pairs are not judged, for diagnostics.csv needs a folder", len(heldout))
    if generate is not None:
        family.set_conditions(generate.guidance_scale, generate.fps)
    with prepared_job(
        family, pairs, config, folder=folder, references=references, progress=progress, start=start
    ) as job:
        if folder is not None and job.is_main:
            logger.info("\n".join([*job.buckets.lines(), job.plan.text]))
        gap = None
        if folder is not None and config.off_policy_pairs:
            found = measure_off_policy(job, generate)
            gap = found.gap
            if job.is_main:
                logger.info(found.report("the policy" if job.start else "the base"))
        log = Log(job)
        with open_trackers(job.accelerator, config, folder, log) as trackers:
            observers = [log, Guards(log, config), *trackers]
            if folder is not None and config.diagnostics_steps:
                observers.append(Diagnostics(job, heldout))
            observers.append(Previews(job, folder, generate))
            _train(job, folder, observers, progress)
        if config.rank:
            parameters = {name: gather_shards(value) for name, value in job.parameters.items()}
            return Fit(export_lora(job.family, parameters, config), log.rows, {}, gap)
        # Copies, for the model gets its first weights back.
        state = job.model.state_dict().items()
        return Fit({}, log.rows, {name: gather_shards(value).to("cpu", copy=True) for name, value in state}, gap)


def _train(job: Job, folder: Path | None, observers: Sequence[Observer], progress: Progress) -> None:
    """Take all steps that are left; observers report when one of them is due, and before each checkpoint."""
    config = job.config
    first = resume(folder, job, observers)
    if not first:
        for observer in observers:
            if observer.due(0):
                observer.report(0)
    steps = range(first, config.max_train_steps)
    with _sigterm_noted(folder is not None) as sigterm_came, job.reading_ahead(steps):
        for step in progress(steps, len(steps), "train") if job.is_main else steps:
            figures, norm = take_step(job, step)
            for observer in observers:
                observer.after_step(step, figures, norm)
            done = step + 1
            saving = folder is not None and done % config.checkpointing_steps == 0
            due = saving or any(observer.due(done) for observer in observers)
            stopping = _stopping(job, sigterm_came(), due)
            if not (due or stopping):
                continue
            for observer in observers:
                observer.report(done)
            if folder is None:
                continue
            if job.is_main:
                for observer in observers:
                    observer.write(folder)
            if saving or stopping:
                save_checkpoint(folder, done, job, observers)
            if stopping and done < config.max_train_steps:
                if job.is_main:
                    logger.warning("train: SIGTERM, saved after step %d; the same command continues", done)
                raise SystemExit(128 + signal.SIGTERM)
    if folder is not None and job.is_main:
        prune_checkpoints(folder, config)


def _stopping(job: Job, sigterm: bool, due: bool) -> bool:
    """Whether to stop after this step.

    A single process stops at once. Several stop at the next report, where they synchronise anyway.
    """
    if job.accelerator.num_processes == 1:
        return sigterm
    return due and bool(any_process(torch.tensor([sigterm]), job.accelerator.device))


@contextmanager
def _sigterm_noted(wanted: bool) -> Iterator[Callable[[], bool]]:
    """Whether SIGTERM has come inside the block, where it does not end the process."""
    came = threading.Event()
    if not wanted or threading.current_thread() is not threading.main_thread():
        yield came.is_set
        return
    before = signal.signal(signal.SIGTERM, lambda *_: came.set())
    try:
        yield came.is_set
    finally:
        # None: a handler that was not installed by Python, which Python cannot put back
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)
