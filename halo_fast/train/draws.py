"""Which pairs a step takes, and their noise and times: all out of counters, so a step depends on its number alone."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from halo_fast.config import TrainConfig
from halo_fast.data import Pair
from halo_fast.families import Family
from halo_fast.runs import UserError

__all__ = ["Batch", "check_pairs", "draws", "generator", "make_batch"]


@dataclass(frozen=True)
class Batch:
    """[2B, ...] each: samples a of all pairs first, then their partners b, which share noise, time and conditions."""

    noisy: Tensor
    target: Tensor
    t: Tensor
    conditions: dict[str, Tensor]
    patch_rewards: Tensor
    video_rewards: Tensor


def check_pairs(family: Family, pairs: Sequence[Pair]) -> None:
    if not len(pairs):
        raise UserError("pairs: training needs at least one, got none; generate more candidates or lower the deltas")
    pair = pairs[0]
    shape = pair.latents.shape[-4:]
    size = shape[1:] if family.layout == "BCFHW" else (shape[0], *shape[2:])
    grid = tuple(pair.patch_rewards.shape[1:])
    if any(patches > length for patches, length in zip(grid, size, strict=True)):
        raise UserError(f"grid: at most {tuple(size)} patches on these latents, got {grid}; use fewer patches")


def draws(step: int, count: int, config: TrainConfig) -> list[tuple[int, int]]:
    """Pair and visit of each place in the step's batch: every epoch takes all pairs once, in an order of its own."""
    places = range(step * config.train_batch_size, (step + 1) * config.train_batch_size)
    orders = {
        epoch: torch.randperm(count, generator=generator(config.seed, "order", epoch)).tolist()
        for epoch in {place // count for place in places}
    }
    return [(orders[place // count][place % count], place // count) for place in places]


def generator(*counter: object) -> torch.Generator:
    digest = hashlib.sha256(" ".join(map(str, counter)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))


def make_batch(
    family: Family, pairs: Sequence[Pair], draws: Sequence[tuple[int, int]], seed: int, device: torch.device
) -> Batch:
    """Assemble the pairs of (index, visit) draws; the noise is drawn on the CPU, so it is the same on every device."""
    chosen = [pairs[index] for index, _ in draws]
    generators = [generator(seed, "pair", index, visit) for index, visit in draws]
    latents = torch.stack([pair.latents for pair in chosen], dim=1).flatten(0, 1).to(device)
    noise = torch.stack([torch.randn(latents.shape[1:], generator=each) for each in generators])
    u = torch.cat([torch.rand(1, generator=each) for each in generators])
    noise, t = noise.to(device).repeat(2, *[1] * (noise.ndim - 1)), family.timesteps(u).to(device).repeat(2)
    conditions = family.stack([pair.conditions for pair in chosen])
    return Batch(
        noisy=family.add_noise(latents, noise, t),
        target=family.target(latents, noise, t),
        t=t,
        conditions={name: torch.cat((value, value)).to(device) for name, value in conditions.items()},
        patch_rewards=torch.stack([pair.patch_rewards for pair in chosen], dim=1).flatten(0, 1).to(device),
        video_rewards=torch.stack([pair.video_rewards for pair in chosen], dim=1).flatten(0, 1).to(device),
    )
