"""Training with Gran-DPO: policy and reference are one model, switched from the one to the other."""

import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from halo_fast.data import Pair
from halo_fast.export.lora import export
from halo_fast.families.sampling import GenerateConfig
from halo_fast.files import progress, write_csv
from halo_fast.train.checkpoint import prune, resume, save
from halo_fast.train.config import TrainConfig
from halo_fast.train.guards import check_rows, warn, winner_alarm
from halo_fast.train.job import Job, Progress, prepared
from halo_fast.train.parallel import any_process, full
from halo_fast.train.steps import take_step
from halo_fast.train.trackers import tracked
from halo_fast.train.watch import Row, diagnose, hold_out, preview, read_rows, record, row_of, tell_off_policy

__all__ = [
    "Fit",
    "fit",
]


@dataclass(frozen=True)
class Fit:
    """What training gives.

    Args:
        lora: the LoRA under the names of diffusers, its scale folded in; `pipeline.load_lora_weights(lora)` takes it.
            Empty at rank 0.
        log: one row a step, under the names of log.csv.
        weights: at rank 0 the trained network's, for its `load_state_dict`; else empty.
    """

    lora: dict[str, Tensor]
    log: list[dict[str, float]]
    weights: dict[str, Tensor]


def fit(
    pipeline: Any,
    pairs: Sequence[Pair],
    config: TrainConfig,
    *,
    folder: Path | None = None,
    references: Path | None = None,
    heldout: Sequence[Pair] = (),
    generate: GenerateConfig | None = None,
    progress: Progress = progress,
) -> Fit:
    """Train a LoRA, or the weights themselves, on preference pairs; the pipeline is left as it was.

    Noise and time of a pair's draws come from a seed of their own, so a step depends on nothing but its number. The
    model stays in eval mode throughout: dropout would tell policy and reference apart by chance.

    Args:
        pipeline: a diffusers pipeline or a `Family`.
        pairs: any sequence of `Pair`, in memory or `CachedPairs`.
        config: the settings; `config.objective` says which terms the loss has.
        folder: where log.csv, diagnostics.csv, previews and checkpoints go and training resumes from; SIGTERM then ends
            the step, saves and exits. None keeps everything in memory.
        references: where the reference's errors are kept (config.reference_draws), for other trainings too.
        heldout: pairs for diagnostics.csv alone.
        generate: size and sampling of previews and fresh samples.
        progress: wraps the iterable of steps, (iterable, total, label).

    Raises:
        UserError: no pairs, a grid larger than the latent, a model whose reference is not the base model, a loss
            that is not finite or spikes, or checkpoints of other settings.
    """
    with prepared(pipeline, pairs, config, folder=folder, references=references, progress=progress) as job:
        if folder is not None and job.accelerator.is_main_process:
            warn(job.plan.text)
        if folder is not None and config.off_policy_pairs:
            tell_off_policy(job, generate)
        log = _run(job, folder, heldout, generate, progress)
        if config.rank:
            lora = export(job.family, {name: full(value) for name, value in job.parameters.items()}, config)
            return Fit(lora, log, {})
        # copies, for the model's own go back to where they were
        state = job.model.state_dict().items()
        return Fit({}, log, {name: full(value).to("cpu", copy=True) for name, value in state})


def _run(
    job: Job, folder: Path | None, heldout: Sequence[Pair], generate: GenerateConfig | None, progress: Progress
) -> list[dict[str, float]]:
    config, main = job.config, job.accelerator.is_main_process
    state = resume(folder, job)
    log, seen, records = state.log, state.diagnostics, state.records
    rows: list[Row] = []
    looking = folder is not None and config.diagnostics_steps > 0
    held = hold_out(job, heldout)
    steps = range(len(log), config.max_train_steps)
    with ExitStack() as stack:
        send = stack.enter_context(tracked(job.accelerator, config, folder))
        asked_to_stop = stack.enter_context(_sigterm(folder is not None))
        if config.validation_prompts and not log:
            preview(job, folder, generate, 0)
        for step in progress(steps, len(steps), "train") if main else steps:
            passes, norm = take_step(job, step)
            rows.append(row_of(job, passes, norm))
            done, last = step + 1, step + 1 == config.max_train_steps
            if looking:
                records += [record(job, batch, passed) for batch, passed in passes]
            diagnosing = looking and (done % config.diagnostics_steps == 0 or last)
            saving = done % config.checkpointing_steps == 0
            previewing = bool(config.validation_prompts) and done % config.validation_steps == 0
            reading = saving or diagnosing or previewing or last or done % config.logging_steps == 0
            # One process saves at once; several agree when they read, so that no step waits for the others.
            stopping = asked_to_stop() if job.accelerator.num_processes == 1 else False
            if reading and job.accelerator.num_processes > 1:
                stopping = bool(any_process(torch.tensor([asked_to_stop()]), job.accelerator.device))
            if not (reading or stopping):
                continue
            fresh = read_rows(job, rows, len(log))
            log += fresh
            rows.clear()
            check_rows(log, len(log) - len(fresh), config)
            send(fresh)
            if diagnosing:
                looked = diagnose(job, records, heldout, held, done)
                if main:
                    warn(winner_alarm(looked, config))
                seen += looked
                records.clear()
            if previewing:
                preview(job, folder, generate, done)
            if folder is None:
                continue
            if main:
                write_csv(folder / "log.csv", log)
                if seen:
                    write_csv(folder / "diagnostics.csv", seen)
            if saving or stopping:
                save(folder, done, job, records)
            if stopping and not last:
                if main:
                    print(f"train: SIGTERM, saved after step {done}; the same command continues", file=sys.stderr)
                raise SystemExit(128 + signal.SIGTERM)
    if folder is not None and main:
        prune(folder, config)
    return log


@contextmanager
def _sigterm(wanted: bool) -> Iterator[Callable[[], bool]]:
    """Whether SIGTERM has come inside the block, which then does not end the process."""
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
