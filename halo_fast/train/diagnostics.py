"""Is it learning? Accuracies, margins and errors by timestep and by patch, of held-out pairs and of the training's own.

A training loss says little: it follows the timesteps that were drawn. Held-out pairs are looked at with the same noise
and times every time, so their numbers move by learning alone. Everything is gathered on the device and read at once.

train/diagnostics.csv has one row for each (step, split, label, group, bucket):
    step                optimiser steps done
    split               "heldout" (always the same pairs, noise and times) or "train" (the batches since the last row)
    label               "video" or "patch": whose preference says which sample is the winner
    group, bucket       "all", ""; "timestep", "0.25-0.50"; "patch", "f.h.w" (label patch only)
    count               labelled pairs or patches behind the row; without any there is no row
    accuracy            share whose logit is above 0, a zero counting one half: 0.5 at the start
    margin              mean logit z, signed by the preference: 0 at the start
    winner_policy, winner_reference, loser_policy, loser_reference    mean errors E
    gradient_factor     mean sigma(-z): 0.5 at the start, 0 when there is nothing left to learn
    saturation          share of |z| > 10
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor, nn

from halo_fast.data import Pair
from halo_fast.families import Family
from halo_fast.loss.functional import GranDPO, patch_error
from halo_fast.loss.objectives import preferences, volume_share
from halo_fast.train.config import TrainConfig
from halo_fast.train.draws import Batch, make_batch

__all__ = ["Record", "evaluate", "held_out", "hold_out", "record", "summarize"]

BUCKETS = 4
_VALUES = (
    "accuracy", "margin", "winner_policy", "winner_reference", "loser_policy", "loser_reference", "gradient_factor",
    "saturation",
)  # fmt: skip


def held_out(prompts: Sequence[str], share: float) -> list[bool]:
    """Which pairs are kept out of training: those whose prompt's hash falls into the lowest `share` of all hashes.

    All pairs of a prompt fall on one side, and a prompt stays on its side when others come or go.
    """
    hashes = {prompt: int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:8], "big") for prompt in set(prompts)}
    return [hashes[prompt] < share * 2**64 for prompt in prompts]


@dataclass(frozen=True)
class Record:
    """What one batch of pairs says, as small device tensors without a graph.

    Args:
        t: [B] times.
        errors: by label, "video" [4, B, 1] and "patch" [4, B, P]: policy and reference of the winner, then loser.
        weights: by label, [B, 1] and [B, P]: 1 where there is a preference, 0 for ties.
        grid: (f, h, w) of the patches.
    """

    t: Tensor
    errors: dict[str, Tensor]
    weights: dict[str, Tensor]
    grid: tuple[int, ...]


@torch.no_grad()
def record(
    prediction: Tensor, reference_error: Tensor, batch: Batch, objective: GranDPO, layout: str = "BCFHW"
) -> Record:
    """What a batch says about policy and reference; costs one pass over the latents and no wait for the device.

    Args:
        prediction: the policy's, [2B, ...] as the batch.
        reference_error: [2B, f, h, w] float32: `patch_error` of the reference's prediction, or E + out.log_ratio.
        batch: where it was predicted.
        objective: whose deltas say what is a tie.
        layout: of the family.
    """
    error = patch_error(prediction.detach(), batch.target, tuple(reference_error.shape[1:]), layout)
    latent = prediction.transpose(1, 2) if layout == "BFCHW" else prediction
    volume = volume_share(tuple(latent.shape[1:]), error)
    video, patch = preferences(objective, batch.patch_rewards.to(error), batch.video_rewards.to(error))
    assert video is not None and patch is not None
    tables = torch.stack([error, reference_error.to(error)])
    whole = (volume * tables).flatten(2).sum(2, keepdim=True)
    return Record(
        t=batch.t[: len(video)],
        errors={"video": _by_outcome(whole, video[:, None]), "patch": _by_outcome(tables.flatten(2), patch.flatten(1))},
        weights={"video": (video != 0).to(error)[:, None], "patch": (patch != 0).to(error).flatten(1)},
        grid=tuple(error.shape[1:]),
    )


def _by_outcome(tables: Tensor, sign: Tensor) -> Tensor:
    """[2, 2B, P] of samples a and b as [4, B, P]: policy and reference of the winner, then of the loser."""
    a, b = tables.chunk(2, dim=1)
    return torch.cat([torch.where(sign > 0, a, b), torch.where(sign > 0, b, a)])


@torch.no_grad()
def summarize(records: Sequence[Record], objective: GranDPO, step: int, split: str) -> list[dict[str, float | str]]:
    """Rows of diagnostics.csv out of the records since the last time; the only place that waits for the device.

    Args:
        records: at least one, all of one grid.
        objective: whose betas turn error gaps into logits, z = beta / 2 ((E_ref - E)(winner) - (E_ref - E)(loser)).
        step: optimiser steps done.
        split: "heldout" or "train".
    """
    names: list[dict[str, float | str]] = []
    numbers = []
    t = torch.cat([one.t for one in records])
    for label in ("video", "patch"):
        errors = torch.cat([one.errors[label] for one in records], dim=1)
        weight = torch.cat([one.weights[label] for one in records])
        values = torch.stack(_values(errors, _beta(objective, label, records[0].grid)))
        for group, bucket, chosen in _groups(t, weight, label, records[0].grid):
            names.append({"step": step, "split": split, "label": label, "group": group, "bucket": bucket})
            numbers.append(torch.cat([chosen.sum()[None], (values * chosen).flatten(1).sum(1) / chosen.sum()]))
    rows = []
    for name, (count, *means) in zip(names, torch.stack(numbers).tolist(), strict=True):
        if count:
            rows.append(name | {"count": int(count)} | dict(zip(_VALUES, means, strict=True)))
    return rows


def _beta(objective: GranDPO, label: str, grid: tuple[int, ...]) -> float | Tensor:
    if label == "video":
        return objective.video_beta
    return objective.video_beta / math.prod(grid) ** 0.5 if objective.patch_beta is None else objective.patch_beta


def _values(errors: Tensor, beta: float | Tensor) -> list[Tensor]:
    winner, winner_reference, loser, loser_reference = errors
    z = 0.5 * beta * ((winner_reference - winner) - (loser_reference - loser))
    accuracy = (z > 0).to(z) + 0.5 * (z == 0).to(z)
    return [accuracy, z, winner, winner_reference, loser, loser_reference, torch.sigmoid(-z), (z.abs() > 10).to(z)]


def _groups(t: Tensor, weight: Tensor, label: str, grid: tuple[int, ...]) -> Iterator[tuple[str, str, Tensor]]:
    """(group, bucket, weights) of all rows of a label; a patch's place has a row in every label but "video"."""
    yield "all", "", weight
    for bucket in range(BUCKETS):
        low, high = bucket / BUCKETS, (bucket + 1) / BUCKETS
        # pure noise, t = 1, belongs to the last one
        inside = (t >= low) & ((t < high) | (bucket == BUCKETS - 1))
        yield "timestep", f"{low:.2f}-{high:.2f}", weight * inside[:, None].to(weight)
    if label == "patch":
        for place, index in enumerate(product(*map(range, grid))):
            mask = torch.zeros_like(weight)
            mask[:, place] = weight[:, place]
            yield "patch", ".".join(map(str, index)), mask


@torch.no_grad()
def hold_out(
    family: Family, model: nn.Module, pairs: Sequence[Pair], config: TrainConfig, device: torch.device
) -> list[Tensor]:
    """The reference's errors on the held-out pairs, for `evaluate`, computed once; `model` is the reference."""
    return [
        patch_error(
            family.predict(model, batch.noisy, batch.t, batch.conditions),
            batch.target, tuple(batch.patch_rewards.shape[1:]), family.layout,
        )
        for batch in _batches(family, pairs, config, device)
    ]  # fmt: skip


@torch.no_grad()
def evaluate(
    family: Family,
    model: nn.Module,
    pairs: Sequence[Pair],
    reference_errors: Sequence[Tensor],
    config: TrainConfig,
    objective: GranDPO,
    step: int,
) -> list[dict[str, float | str]]:
    """Rows of diagnostics.csv for the held-out pairs: one forward pass of the policy over the same draws every time.

    Args:
        family, model: the policy.
        pairs: not trained on; the first `config.heldout_pairs`, each at `heldout_draws` evenly spread times.
        reference_errors: what `hold_out` gave for them.
        config: the settings.
        objective: with the betas that are in use.
        step: optimiser steps done.
    """
    records = []
    batches = _batches(family, pairs, config, reference_errors[0].device)
    for batch, reference in zip(batches, reference_errors, strict=True):
        prediction = family.predict(model, batch.noisy, batch.t, batch.conditions)
        records.append(record(prediction, reference, batch, objective, family.layout))
    return summarize(records, objective, step, "heldout")


def _batches(family: Family, pairs: Sequence[Pair], config: TrainConfig, device: torch.device) -> Iterator[Batch]:
    # made anew each time: latents with noise take far more room than the counters they come from
    count = min(len(pairs), config.heldout_pairs)
    places = [(index, draw) for draw in range(config.heldout_draws) for index in range(count)]
    for start in range(0, len(places), config.train_batch_size):
        chosen = places[start : start + config.train_batch_size]
        yield make_batch(family, pairs, chosen, config.seed, device, limit=config.heldout_draws)
