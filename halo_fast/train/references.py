"""The reference's patch errors at fixed draws, computed once before training.

The reference enters the loss only through E_p(o_ref), one number a patch (docs/dropin.md). For K draws of noise and
time of each pair these are computed before training, by the plain base model. They are kept as small files named by
content: latents, prompts' conditions, model, precision, noise process and seeds. So a file is never stale, a killed
computation continues, and a sweep over betas, ranks or learning rates reads what the first training computed. Noise is
drawn from its seed whenever it is needed and never stored.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from halo_fast import processes
from halo_fast.data import Pair
from halo_fast.errors import UserError, check_finite
from halo_fast.families import Denoiser
from halo_fast.families.fingerprint import fingerprint
from halo_fast.files import hash_tensors, write_safetensors
from halo_fast.loss.functional import patch_error
from halo_fast.train.draws import Batch, Errors, batches_alike, make_batch

__all__ = ["check_reference_errors", "reference_errors"]

_PAIRS_IN_A_FILE = 64


def reference_errors(
    family: Denoiser,
    model: nn.Module,
    pairs: Sequence[Pair],
    seed: int,
    count: int,
    *,
    device: torch.device,
    batch_size: int,
    autocast: Callable[[], AbstractContextManager[Any]],
    precision: str,
    folder: Path | None,
    progress: Callable[[Iterable[int], int, str], Iterable[int]],
    share: tuple[int, int] = (0, 1),
    wait: Callable[[], None] = lambda: None,
    own: bool = False,
    buckets: Sequence[int] | None = None,
) -> Errors:
    """E_p(o_ref) of `count` draws of every pair, float32 [pairs, count, 2, f, h, w] on the CPU.

    Pairs of several buckets have tensors of their own, [count, 2, f, h, w] each.

    Args:
        family: of the model.
        model: the base, without adapters.
        pairs: to train on.
        seed: of the draws.
        count: draws of a pair.
        device: where the model is.
        batch_size: pairs in one forward pass.
        autocast: the context in which training will run the model.
        precision: what that context does, for the files' names.
        folder: where the files are kept; None computes everything and keeps nothing.
        progress: wraps the iterable of files to compute, (iterable, total, label).
        share: this process's number and how many share the work, where there is a folder.
        wait: returns once all processes have called it.
        own: whether each clip has the noise that it was sampled from.
        buckets: number of each pair's bucket; None for one bucket.
    """
    buckets = buckets or [0] * len(pairs)
    groups = batches_alike(range(len(pairs)), _PAIRS_IN_A_FILE, buckets.__getitem__)

    def compute(group: int) -> Tensor:
        indices = groups[group]
        with torch.no_grad():
            found = _compute(family, model, pairs, indices, seed, count, device, batch_size, autocast, own)
        names = [f"pair {index}" for index in indices]
        check_finite(found, names, "errors of the reference", "check that the model runs in this precision")
        return found

    every = range(len(groups))
    if folder is None:
        parts = [compute(group) for group in progress(every, len(every), "train: reference errors")]
        return _by_pair(parts, groups, buckets)
    settings = _settings(family, model, seed, count, precision)
    files = [folder / f"{_key(settings, family, indices, pairs, own)}.safetensors" for indices in groups]
    # shared before looking which there are: another process may have written some by now
    todo = [group for group in every[share[0] :: share[1]] if not files[group].exists()]
    for group in progress(todo, len(todo), "train: reference errors"):
        write_safetensors(files[group], {"errors": compute(group)})
    wait()
    from safetensors.torch import load_file

    return _by_pair([load_file(processes.seen(file))["errors"] for file in files], groups, buckets)


def _by_pair(parts: Sequence[Tensor], groups: Sequence[Sequence[int]], buckets: Sequence[int]) -> Errors:
    """The errors of groups of pairs in the order of the pairs; one tensor if there is one bucket."""
    if not any(buckets):
        return torch.cat(list(parts))
    found = {
        index: own for group, part in zip(groups, parts, strict=True) for index, own in zip(group, part, strict=True)
    }
    return [found[index] for index in range(len(buckets))]


def _compute(
    family: Denoiser,
    model: nn.Module,
    pairs: Sequence[Pair],
    indices: Sequence[int],
    seed: int,
    count: int,
    device: torch.device,
    batch_size: int,
    autocast: Callable[[], AbstractContextManager[Any]],
    own: bool,
) -> Tensor:
    """The errors of some pairs, [indices, count, 2, f, h, w] on the CPU."""
    draws = [(index, draw) for index in indices for draw in range(count)]
    parts = []
    for first in range(0, len(draws), batch_size):
        batch = make_batch(family, pairs, draws[first : first + batch_size], seed, device, limit=count, own=own)
        with autocast():
            prediction = family.predict(model, batch.noisy, batch.t, batch.conditions)
        error = patch_error(prediction, batch.target, batch.patch_rewards.shape[1:], layout=family.layout)
        parts.append(error.float().unflatten(0, (2, -1)).transpose(0, 1).cpu())
    return torch.cat(parts).unflatten(0, (-1, count))


def _settings(family: Denoiser, model: nn.Module, seed: int, count: int, precision: str) -> dict[str, Any]:
    """What all files depend on: weights, precision, draws, and the family's own numbers."""
    return {
        "model": fingerprint([model]),
        "family": type(family).__name__,
        # such as the guidance scale that HunyuanVideo's network takes
        "settings": {name: value for name, value in vars(family).items() if isinstance(value, int | float | str)},
        "process": None,  # of each file, by its latents; its place is part of the files' names
        "precision": precision,
        "seed": seed,
        "count": count,
    }


def _process(family: Denoiser, shape: Sequence[int]) -> list[list[float]]:
    """How the family makes noise, target and times of latents of a shape, by their values at a few points."""
    probe = torch.linspace(0.05, 0.95, 7)
    times = family.timesteps(probe, shape)
    ones = torch.ones(7, 1, 1, 1, 1)
    process = [family.add_noise(ones, -2 * ones, times), family.target(ones, -2 * ones, times), times]
    return [value.flatten().tolist() for value in process]


def _key(settings: dict[str, Any], family: Denoiser, indices: Sequence[int], pairs: Sequence[Pair], own: bool) -> str:
    """Hash of what a file depends on: pairs of one bucket, and their numbers, which seed their noise."""
    chosen = [pairs[index] for index in indices]
    known = json.dumps(settings | {"process": _process(family, chosen[0].latents.shape[1:])})
    numbers = indices[0] if indices[-1] - indices[0] == len(indices) - 1 else indices
    parts: list[str | dict[str, Tensor]] = [f"{known} {numbers}"]
    for pair in chosen:
        grid = str(list(pair.patch_rewards.shape))
        parts += [{"latents": pair.latents, **dict(sorted(pair.conditions.items()))}, grid]
        parts += [f"noise of {pair.seeds}"] if own and pair.seeds is not None else []
    return hash_tensors(*parts)


def check_reference_errors(batch: Batch, base: Tensor, layout: str) -> None:
    """Raise unless a batch's errors are those of the base model's prediction, up to rounding.

    Args:
        batch: one pair; without errors nothing is checked.
        base: the base's prediction, [2, ...].
        layout: of the family.

    Raises:
        UserError: they are others.
    """
    if batch.reference_error is None:
        return
    error = patch_error(base, batch.target, batch.reference_error.shape[1:], layout=layout).float()
    tolerance = 1e-3 if base.dtype == torch.float32 else 5e-2
    if not torch.allclose(batch.reference_error, error, rtol=tolerance, atol=1e-6):
        raise UserError(
            f"train.reference_draws: expected the base's errors, got {(batch.reference_error - error).abs().max()} off "
            "on the first pair; remove the run's folder reference_errors"
        )
