"""What a training tells of itself: rows of log.csv and diagnostics.csv, previews, a word on the pairs."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from halo_fast.data import Pair
from halo_fast.errors import UserError
from halo_fast.families.sampling import GenerateConfig
from halo_fast.loss.functional import GranDPOOutput, patch_error
from halo_fast.train import diagnostics
from halo_fast.train.draws import Batch, make_batch
from halo_fast.train.guards import fresh_pairs, off_policy_gap, warn
from halo_fast.train.job import Job
from halo_fast.train.parallel import compact, merged
from halo_fast.train.previews import write_previews
from halo_fast.train.schedules import Passed
from halo_fast.train.steps import learning_rate

__all__ = ["Row", "diagnose", "hold_out", "preview", "read_rows", "record", "row_of", "tell_off_policy"]


@dataclass
class Row:
    """A step's figures on the device, read together with others."""

    outputs: list[GranDPOOutput]
    norm: Tensor
    skipped: int
    betas: dict[str, Tensor] = field(default_factory=dict)


def row_of(job: Job, passes: Sequence[tuple[Batch, Passed]], norm: Tensor) -> Row:
    outputs = [compact(passed.out, job.family.layout) for _, passed in passes]
    betas = {"beta": job.auto_beta.beta} if job.auto_beta is not None else {}
    return Row(outputs, norm, sum(passed.skipped for _, passed in passes), betas)


def read_rows(job: Job, rows: Sequence[Row], done: int) -> list[dict[str, float]]:
    """Rows of the log: figures of all processes' pairs, read from the device at once."""
    if not rows:
        return []
    names: list[str] = []
    values = []
    for row in rows:
        out = merged(row.outputs)
        metrics = {"loss": out.loss, "grad_norm": row.norm, **out.metrics(), **row.betas}
        if job.config.skip_below:
            skipped = torch.tensor(float(row.skipped), device=job.accelerator.device)
            metrics["skipped"] = job.accelerator.reduce(skipped, "sum")
        names = list(metrics)
        values.append(torch.stack([value.detach().float() for value in metrics.values()]))
    return [
        {"step": step + 1, "learning_rate": learning_rate(step, job.config), **dict(zip(names, row, strict=True))}
        for step, row in enumerate(torch.stack(values).tolist(), start=done)
    ]


def record(job: Job, batch: Batch, passed: Passed) -> diagnostics.Record:
    out = passed.out
    error = (
        out._error
        if out._error is not None
        else patch_error(passed.prediction, batch.target, out.patch_logits.shape[1:], job.family.layout)
    )
    reference = error if out.log_ratio is None else error + out.log_ratio
    return diagnostics.record(passed.prediction, reference, batch, job.objective, job.family.layout)


def hold_out(job: Job, heldout: Sequence[Pair]) -> list[Tensor]:
    """The reference's errors on the held-out pairs, in the precision of training."""
    if not heldout:
        return []
    with job.reference(), job.accelerator.autocast():
        return diagnostics.hold_out(job.family, job.model, heldout, job.config, job.accelerator.device)


def diagnose(
    job: Job, records: Sequence[diagnostics.Record], heldout: Sequence[Pair], held: Sequence[Tensor], step: int
) -> list[dict[str, float | str]]:
    objective = job.steered()
    rows = diagnostics.summarize(records, objective, step, "train") if records else []
    if held:
        with job.accelerator.autocast():
            rows += diagnostics.evaluate(job.family, job.model, heldout, held, job.config, objective, step)
    return rows


def preview(job: Job, folder: Path | None, generate: GenerateConfig | None, step: int) -> None:
    if folder is None or generate is None or not job.config.validation_prompts:
        raise UserError("train.validation_prompts: previews need a run directory; use `halo train` or set null")
    write_previews(folder, job.family, job.reference, job.config.validation_prompts, generate, job.config.seed, step)


def tell_off_policy(job: Job, generate: GenerateConfig | None) -> None:
    """Print how far the clips are from the model's own."""
    config, device = job.config, job.accelerator.device
    count = min(len(job.pairs), config.off_policy_pairs)

    def batches(pairs: Sequence[Pair], count: int) -> list[Batch]:
        places = [(index, 0) for index in range(count)]
        size = config.train_batch_size
        return [
            make_batch(job.family, pairs, places[start : start + size], config.seed, device)
            for start in range(0, count, size)
        ]

    fresh: list[Batch] = []
    if config.off_policy_fresh and generate is not None:
        some = [job.pairs[index] for index in range(min(count, config.off_policy_fresh))]
        fresh = batches(fresh_pairs(job.family, some, generate, config.seed), len(some))
    with job.accelerator.autocast():
        found = off_policy_gap(job.family, job.model, batches(job.pairs, count), fresh)
    if job.accelerator.is_main_process:
        warn(found.report())
