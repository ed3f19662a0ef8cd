"""diagnostics.csv: is it learning? Accuracies, margins and errors by timestep and by patch.

A training loss says little: it follows the timesteps that were drawn. Held-out pairs have the same noise and times
every time, so their figures move by learning alone. Everything stays on the device until a row is due.

train/diagnostics.csv has one row for each (step, split, label, group, bucket):
    step                optimiser steps done
    split               "heldout" (always the same pairs, noise and times) or "train" (the batches since the last row)
    label               "video" or "patch": whose preference says which sample is the winner
    group, bucket       "all", ""; "timestep", "0.25-0.50"; "patch", "f.h.w" (label patch only), with several grids
                        "f.h.w of 3.4.4"
    count               labelled pairs or patches behind the row; without any there is no row
    accuracy            share whose logit is above 0, a zero counting one half: 0.5 at the start
    margin              mean logit z, signed by the preference: 0 at the start
    winner_policy, winner_reference, loser_policy, loser_reference    mean errors E
    gradient_factor     mean sigma(-z): 0.5 at the start, 0 when there is nothing left to learn
    saturation          share of |z| > 10
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from halo_fast.data import Pair
from halo_fast.families import Denoiser
from halo_fast.files import write_csv
from halo_fast.loss.figures import PairFigures
from halo_fast.loss.functional import gran_dpo_coefficients, patch_error
from halo_fast.loss.objectives import Objective, PairObjective, PooledDPO
from halo_fast.train.config import TrainConfig
from halo_fast.train.draws import Batch, batches_alike, buckets_of, make_batch
from halo_fast.train.job import Job
from halo_fast.train.observers.base import Observer
from halo_fast.train.observers.log import read_rows
from halo_fast.train.schedules import loss_arguments

__all__ = [
    "Diagnostics",
    "displacement_warning",
    "heldout_errors",
    "heldout_figures",
    "margin_warning",
    "summarize",
    "winner_warning",
]

logger = logging.getLogger(__name__)

BUCKETS = 4
_FILE = "diagnostics.csv"

Row = dict[str, float | str]


class Diagnostics(Observer):
    """Rows of diagnostics.csv, of the training's own pairs and of held-out ones, and the warnings from them.

    Args:
        job: before its first step.
        heldout: pairs that are not trained on; none for rows of the training's own pairs alone.
    """

    name = "diagnostics"

    def __init__(self, job: Job, heldout: Sequence[Pair]) -> None:
        self.rows: list[Row] = []
        self._job, self._heldout = job, heldout
        self._figures: dict[int, list[PairFigures]] = {}  # by bucket, of the training's own pairs
        self._errors: list[Tensor] = []
        if heldout and job.objective.paired:
            with job.reference_mode(), job.accelerator.autocast():
                self._errors = heldout_errors(job.family, job.model, heldout, job.config, job.accelerator.device)

    def after_step(self, step: int, figures: Sequence[PairFigures], norm: Tensor) -> None:
        for draws, part in zip(self._job.draws(step), figures, strict=True):
            self._figures.setdefault(self._job.buckets.of[draws[0][0]], []).append(part)

    def due(self, done: int) -> bool:
        config = self._job.config
        return done > 0 and (done % config.diagnostics_steps == 0 or done == config.max_train_steps)

    def report(self, done: int) -> None:
        if not self.due(done):
            return
        job = self._job
        own = {tuple(grid) for _, grid in job.buckets.sizes}
        grids = len(own | {tuple(pair.patch_rewards.shape[1:]) for pair in self._heldout}) > 1
        new = summarize(self._joined(), done, "train", grids)
        if self._errors:
            with job.accelerator.autocast():
                figures = heldout_figures(
                    job.family, job.model, self._heldout, self._errors, job.config, job.current_objective()
                )
            new += summarize(figures, done, "heldout", grids)
        self._figures.clear()
        self.rows += new
        for warning in self._warnings(new) if job.is_main else ():
            logger.warning(warning)

    def _joined(self) -> list[PairFigures]:
        """The figures of each bucket since the last row."""
        return [PairFigures.join(self._figures[bucket]) for bucket in sorted(self._figures)]

    def _warnings(self, rows: Sequence[Row]) -> list[str]:
        """What the newest rows warn of."""
        objective, config = self._job.objective, self._job.config
        known = {row["label"] for row in rows}
        used = [one for one in ("patch", "video") if getattr(objective, f"{one}_weight", 0) and one in known]
        label = "patch" if "patch" in used else "video"
        if isinstance(objective, PooledDPO):
            used = ["video"]  # the one logit of all patches
        # a preference that is met ends at its cap, whatever the margin
        pushing = [one for one in used if getattr(objective, f"{one}_cap", None) is None]
        found = [
            winner_warning(rows, label, config.winner_alarm),
            displacement_warning(rows, label, config.displacement_alarm),
            *(margin_warning(rows, one, config.margin_alarm) for one in pushing),
        ]
        return [warning for warning in found if warning]

    def write(self, folder: Path) -> None:
        if self.rows:
            write_csv(folder / _FILE, self.rows)

    def state(self) -> dict[str, Any]:
        return {
            f"{_prefix(bucket)}{field.name}": value
            for bucket, joined in zip(sorted(self._figures), self._joined(), strict=True)
            for field in fields(joined)
            # No row reads the loss, and the mean of a mean would not have the same bits as the mean of all.
            if (value := getattr(joined, field.name)) is not None and field.name != "loss"
        }

    def restore(self, folder: Path, step: int, state: dict[str, Any]) -> None:
        self.rows = read_rows(folder / _FILE, step)  # type: ignore[assignment]
        device = self._job.accelerator.device
        absent: dict[str, Any] = {field.name: None for field in fields(PairFigures)}
        found = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in state.items()}
        for bucket in range(len(self._job.buckets.sizes)):
            own = {name: found[kept] for name in absent if (kept := f"{_prefix(bucket)}{name}") in found}
            if own:
                self._figures[bucket] = [PairFigures(**absent | own | {"loss": torch.zeros((), device=device)})]


def _prefix(bucket: int) -> str:
    """Before the names of a bucket's figures in a checkpoint; the first one's have none."""
    return f"{bucket}." if bucket else ""


@torch.no_grad()
def heldout_errors(
    family: Denoiser, model: nn.Module, pairs: Sequence[Pair], config: TrainConfig, device: torch.device
) -> list[Tensor]:
    """The reference's errors on the held-out pairs, for `heldout_figures`, [2B, f, h, w] of each batch.

    Args:
        family: of the model.
        model: the reference.
        pairs: not trained on; the first `config.heldout_pairs`, each at `heldout_draws` evenly spread times.
        config: the settings.
        device: of the model.
    """
    return [
        patch_error(
            family.predict(model, batch.noisy, batch.t, batch.conditions),
            batch.target, tuple(batch.patch_rewards.shape[1:]), family.layout,
        )
        for batch in _batches(family, pairs, config, device)
    ]  # fmt: skip


@torch.no_grad()
def heldout_figures(
    family: Denoiser,
    model: nn.Module,
    pairs: Sequence[Pair],
    reference_errors: Sequence[Tensor],
    config: TrainConfig,
    objective: Objective,
) -> list[PairFigures]:
    """The policy's figures on the held-out pairs, of each bucket: one forward pass over the same draws every time.

    Args:
        family: of the model.
        model: the policy.
        pairs: as for `heldout_errors`.
        reference_errors: what that gave.
        config: the settings.
        objective: with the betas that are in use.
    """
    if isinstance(objective, PairObjective):
        # The anchor changes no figure, and its value would need the reference's predictions.
        objective = replace(objective, anchor_weight=0.0)
    figures: dict[tuple[torch.Size, ...], list[PairFigures]] = {}
    for batch, errors in zip(
        _batches(family, pairs, config, reference_errors[0].device), reference_errors, strict=True
    ):
        prediction = family.predict(model, batch.noisy, batch.t, batch.conditions)
        known = replace(batch, reference_error=errors)
        _, out = gran_dpo_coefficients(**loss_arguments(known, prediction, None, objective, family.layout))
        size = batch.noisy.shape[1:], batch.patch_rewards.shape[1:]
        figures.setdefault(size, []).append(out.figures(batch.t))
    return [PairFigures.join(parts) for parts in figures.values()]


def _batches(family: Denoiser, pairs: Sequence[Pair], config: TrainConfig, device: torch.device) -> Iterator[Batch]:
    # assembled each time: latents with noise take far more room than the counters they come from
    count = min(len(pairs), config.heldout_pairs)
    draws = [(index, draw) for draw in range(config.heldout_draws) for index in range(count)]
    buckets = buckets_of(pairs, count).of
    for chosen in batches_alike(draws, config.train_batch_size, lambda draw: buckets[draw[0]]):
        yield make_batch(
            family, pairs, chosen, config.seed, device, limit=config.heldout_draws, own=config.noise == "own"
        )


@torch.no_grad()
def summarize(figures: Sequence[PairFigures], step: int, split: str, grids: bool = False) -> list[Row]:
    """Rows of diagnostics.csv, over all buckets; waits for the device once.

    Args:
        figures: of each bucket, with times.
        step: optimiser steps done.
        split: "heldout" or "train".
        grids: whether rows by place name their grid, because there are several.

    Returns:
        A row for each label and group with at least one labelled pair or patch; none for unpaired objectives.
    """
    sums: dict[tuple[str, str, str], Tensor] = {}
    columns: list[str] = []
    for label, part in ((label, part) for label in ("video", "patch") for part in figures if label in part.labels):
        values = part.values(label)
        columns = list(values)
        table = torch.stack(list(values.values()))
        for group, bucket, weight in _groups(part, label, grids):
            row = label, group, bucket
            own = torch.cat([weight.sum()[None], (table * weight).flatten(1).sum(1)])
            sums[row] = sums[row] + own if row in sums else own
    if not sums:
        return []
    numbers = torch.stack([torch.cat([row[:1], row[1:] / row[0]]) for row in sums.values()])
    rows: list[Row] = []
    for place, (count, *means) in zip(sums, numbers.tolist(), strict=True):
        if count:
            name: Row = {"step": step, "split": split, **dict(zip(("label", "group", "bucket"), place, strict=True))}
            rows.append(name | {"count": int(count)} | dict(zip(columns, means, strict=True)))
    return rows


def _groups(figures: PairFigures, label: str, grids: bool) -> Iterator[tuple[str, str, Tensor]]:
    """(group, bucket, weights) of all rows of a label; only the label "patch" has rows by place, of each grid."""
    weight, t = figures.weights(label), figures.t
    yield "all", "", weight
    if t is not None:
        for bucket in range(BUCKETS):
            low, high = bucket / BUCKETS, (bucket + 1) / BUCKETS
            # pure noise, t = 1, belongs to the last one
            inside = (t >= low) & ((t < high) | (bucket == BUCKETS - 1))
            yield "timestep", f"{low:.2f}-{high:.2f}", weight * inside[:, None].to(weight)
    if label == "patch":
        of_grid = f" of {'.'.join(map(str, figures.grid))}" if grids else ""
        for place, index in enumerate(product(*map(range, figures.grid))):
            mask = torch.zeros_like(weight)
            mask[:, place] = weight[:, place]
            yield "patch", ".".join(map(str, index)) + of_grid, mask


def winner_warning(rows: Sequence[Mapping[str, float | str]], label: str, limit: float | None) -> str | None:
    """One line if the policy has become much worse at the winners than the reference is, else None.

    The limit is a share a of the reference's error power. With E - E_ref = (|o - o_ref|^2 + 2 <o - o_ref, o_ref - tau>)
    / N, the second term vanishes in the mean where the policy's change has nothing to do with what the reference got
    wrong. Then E = (1 + a) E_ref says that the policy has moved sqrt(a) times as far from the reference as the
    reference is from the truth: 71% of it for 0.5, all of it for 1. A change that helps makes the second term negative.

    Preference training can lower its loss by spoiling losers more than winners. A video that wins as a whole has
    patches that lose, whose error is meant to rise, so videos are judged only where there is no patch preference.

    Args:
        rows: new ones of diagnostics.csv; held-out pairs are judged where there are some, else the training's own.
        label: "patch", or "video" where there is no patch preference, or no labelled patch.
        limit: a; None for no warning.
    """
    row = _judged(rows, label)
    if limit is None or row is None:
        return None
    rise = _rise(row, "winner")
    if rise <= limit:
        return None
    return (
        f"train: error on winning {'patches' if label == 'patch' else 'videos'} is {100 * rise:.0f}% "
        f"above the reference's at step {row['step']}, expected at most {100 * limit:.0f}%: the loss "
        "falls by spoiling losers; raise objective.patch_sft_weight or sft_weight, set objective.loser_guard, or lower "
        "the betas"
    )


def displacement_warning(rows: Sequence[Mapping[str, float | str]], label: str, limit: float | None) -> str | None:
    """One line if the errors on winners and losers have risen together (likelihood displacement), else None.

    A preference is satisfied by the gap between two errors. Where two samples are nearly as good, what moves the loser
    away moves the winner too: both become less likely, and the gap grows although the policy predicts both worse.

    Args:
        rows: as for `winner_warning`.
        label: likewise.
        limit: share by which both errors may exceed the reference's; None for no warning.

    Source: the first failure that PG-DPO names, arXiv 2511.19049.
    """
    row = _judged(rows, label)
    if limit is None or row is None:
        return None
    winner, loser = _rise(row, "winner"), _rise(row, "loser")
    if min(winner, loser) <= limit:
        return None
    return (
        f"train: likelihood displacement at step {row['step']}: the errors on winning and losing "
        f"{'patches' if label == 'patch' else 'videos'} rise together, {100 * winner:.0f}% and {100 * loser:.0f}% "
        f"above the reference's, expected at most {100 * limit:.0f}% of both; raise objective.{label}_delta, so that "
        "pairs of nearly equal rewards teach nothing, and objective.patch_sft_weight or sft_weight"
    )


def margin_warning(rows: Sequence[Mapping[str, float | str]], label: str, limit: float | None) -> str | None:
    """One line if the mean margin is over-maximised, else None.

    The sigmoid link never stops pushing: at a logit of 5 its slope is 0.7% of 1, and most of what still moves is the
    loser's error, which is cheap to raise. A cap ends that.

    Args:
        rows: as for `winner_warning`.
        label: "patch" or "video".
        limit: largest mean logit; None for no warning.

    Source: the second failure that PG-DPO names, arXiv 2511.19049.
    """
    row = _judged(rows, label)
    if limit is None or row is None or float(row["margin"]) <= limit:
        return None
    return (
        f"train: over-maximised margin at step {row['step']}: the mean logit of "
        f"{'patches' if label == 'patch' else 'videos'} is {float(row['margin']):.1f}, expected at most {limit:g}, and "
        f"the preference pushes on; set objective.{label}_cap, or lower objective.{label}_beta or the learning rate"
    )


def _judged(rows: Sequence[Mapping[str, float | str]], label: str) -> Mapping[str, float | str] | None:
    """The row over all pairs of a label: of the held-out pairs where there are some, else of the training's own."""
    whole = {row["split"]: row for row in rows if row["group"] == "all" and row["label"] == label}
    return whole.get("heldout", whole.get("train"))


def _rise(row: Mapping[str, float | str], outcome: str) -> float:
    """By which share the policy's error exceeds the reference's on winners or losers."""
    return float(row[f"{outcome}_policy"]) / float(row[f"{outcome}_reference"]) - 1
