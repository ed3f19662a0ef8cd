"""Which pairs a step takes, their noise and their times: functions of the step's number and the seed alone.

A draw is (index of the pair, number): the number-th noise and time of that pair. Pairs of one latent shape and one grid
are a bucket, and every batch is of one bucket.
"""

import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from halo_fast.data import Pair
from halo_fast.data.cache import CachedPairs
from halo_fast.errors import UserError, check_finite
from halo_fast.families import Denoiser
from halo_fast.families.sampling import clip_noise
from halo_fast.loss.given import given_frames, without_preference

__all__ = [
    "Batch",
    "Buckets",
    "Drawn",
    "batches_alike",
    "buckets_of",
    "check_pairs",
    "draw_batch",
    "draws_of_step",
    "generator",
    "make_batch",
    "place_batch",
    "tell_noise",
    "weights_at",
]

logger = logging.getLogger(__name__)

_SAME_FRAME = 0.3  # of the norm; unlike frames are about as far from each other as they are large
_SHOWN = 10  # buckets that are listed

Item = TypeVar("Item")
Draw = tuple[int, int]
Errors = Tensor | Sequence[Tensor]
"""The reference's errors by pair and draw, [pairs, draws, 2, f, h, w]; of several buckets a tensor for each pair."""


class Buckets(NamedTuple):
    """The buckets of some pairs, numbered in the order of their first pairs.

    Args:
        of: number of each pair's bucket.
        sizes: latent_shape and grid (f, h, w) of each bucket.
    """

    of: tuple[int, ...] = ()
    sizes: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...] = ()

    def firsts(self) -> list[int]:
        """Index of the first pair of each bucket, that of the largest latents last."""
        found = [self.of.index(number) for number in range(len(self.sizes))]
        return sorted(found, key=lambda index: prod(self.sizes[self.of[index]][0]))

    def lines(self, notes: Sequence[str] = ()) -> list[str]:
        """A line for each bucket, the largest latents first; none if there is but one.

        Args:
            notes: of each bucket, by its number.
        """
        if len(self.sizes) == 1:
            return []
        counts, lines = Counter(self.of), [f"buckets: {len(self.sizes)}, each batch is of one"]
        for number in [self.of[index] for index in reversed(self.firsts())][:_SHOWN]:
            shape, grid = self.sizes[number]
            note = f", {notes[number]}" if notes else ""
            lines.append(f"  latents {list(shape)}, {' x '.join(map(str, grid))} patches: {counts[number]} pairs{note}")
        return lines + [f"  and {len(self.sizes) - _SHOWN} smaller ones"] * (len(self.sizes) > _SHOWN)


class Drawn(NamedTuple):
    """What is read and drawn for B pairs, on the CPU: all of a batch that needs no model and no device.

    Args:
        latents: clean, of samples a and then of their partners b, [2B, *latent_shape].
        noise: of the pairs, [B, *latent_shape]; or of all samples, [2B, *latent_shape].
        u: uniform draws in [0, 1) that become times, [B].
        conditions: of the prompts, [B, ...] each.
        patch_rewards: [2B, f, h, w].
        video_rewards: [2B].
        reference_error: [2B, f, h, w], or None.
    """

    latents: Tensor
    noise: Tensor
    u: Tensor
    conditions: dict[str, Tensor]
    patch_rewards: Tensor
    video_rewards: Tensor
    reference_error: Tensor | None


@dataclass(frozen=True)
class Batch:
    """B pairs at their noise and times: samples a of all pairs, then their partners b, at the same times.

    Partners share their noise too, unless each has the noise that it was sampled from (train.noise).

    Args:
        noisy: model input x_t, [2B, *latent_shape].
        target: what the model regresses to, of the same shape.
        t: times in [0, 1], [2B].
        conditions: of the prompts, [2B, ...] each.
        patch_rewards: [2B, f, h, w]; NaN is not labelled.
        video_rewards: [2B]; NaN is not labelled.
        reference_error: E_p of the reference's prediction, [2B, f, h, w]; None if it was not computed before training.
        pair_weight: what multiplies the preferences of each pair in the loss, [B]; None for 1. A selection has none.
    """

    noisy: Tensor
    target: Tensor
    t: Tensor
    conditions: dict[str, Tensor]
    patch_rewards: Tensor
    video_rewards: Tensor
    reference_error: Tensor | None = None
    pair_weight: Tensor | None = None

    def select(self, samples: slice) -> "Batch":
        """Some samples of the batch."""
        error = self.reference_error
        return Batch(
            noisy=self.noisy[samples],
            target=self.target[samples],
            t=self.t[samples],
            conditions={name: value[samples] for name, value in self.conditions.items()},
            patch_rewards=self.patch_rewards[samples],
            video_rewards=self.video_rewards[samples],
            reference_error=None if error is None else error[samples],
        )


def buckets_of(pairs: Sequence[Pair], count: int | None = None) -> Buckets:
    """The buckets of the first `count` pairs, or of all.

    Of `CachedPairs` the files' headers are read, of other sequences every pair.

    Raises:
        UserError: a cached pair whose clips differ in size.
    """

    def size(index: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        if isinstance(pairs, CachedPairs):
            return pairs.size(index)
        pair = pairs[index]
        return tuple(pair.latents.shape[1:]), tuple(pair.patch_rewards.shape[1:])

    sizes = [size(index) for index in range(len(pairs) if count is None else count)]
    numbers = {size: number for number, size in enumerate(dict.fromkeys(sizes))}
    return Buckets(tuple(numbers[size] for size in sizes), tuple(numbers))


def check_pairs(family: Denoiser, pairs: Sequence[Pair]) -> Buckets:
    """The buckets of the pairs, of which there are some, of sizes that the model takes and grids that fit them.

    `make_batch` checks each pair it takes.

    Raises:
        UserError: naming what does not fit.
    """
    if not len(pairs):
        raise UserError("pairs: training needs at least one, got none; generate more candidates or lower the deltas")
    buckets = buckets_of(pairs)
    for index in buckets.firsts():
        try:
            _check_size(family, *buckets.sizes[buckets.of[index]])
        except UserError as error:
            raise UserError(f"{_named(pairs, index)}: {error}" if len(buckets.sizes) > 1 else f"{error}") from None
    missing = [name for name in family.image_conditions if name not in pairs[0].conditions]
    if missing:
        raise UserError(
            f"pairs: {type(family).__name__} goes on from a first frame, and the conditions of the first pair have no "
            f"{', '.join(missing)}; add those of Family.encode_images, or run `halo cache` again"
        )
    return buckets


def _check_size(family: Denoiser, shape: Sequence[int], grid: Sequence[int]) -> None:
    size = family.latent_size(shape)
    family.check_size(size)
    if any(patches > length for patches, length in zip(grid, size, strict=True)):
        raise UserError(f"grid: at most {tuple(size)} patches on these latents, got {tuple(grid)}; use fewer patches")


def _named(pairs: Sequence[Pair], index: int) -> str:
    """A pair's number, and its clips where they have names."""
    return f"pair {index}" + (f" ({' and '.join(pairs.clips[index])})" if isinstance(pairs, CachedPairs) else "")


def tell_noise(known: Sequence[bool], why: str = "they have no seeds") -> None:
    """Say how many pairs train on noise of their own.

    Args:
        known: of each pair, whether the noise of both clips is known.
        why: it is not, for the others.

    Raises:
        UserError: of no pair.
    """
    if not any(known):
        raise UserError(f"train.noise: own needs the seeds of clips, got none: {why}; set shared")
    logger.info(
        "train.noise: %d of %d pairs train on the noise that made them%s", sum(known), len(known),
        "" if all(known) else f", the others share theirs: {why}",
    )  # fmt: skip


def draws_of_step(
    step: int, count: int, size: int, buckets: Sequence[int], seed: int, limit: int | None
) -> list[list[Draw]]:
    """The draws of a step: which pairs its batches take, and which noise and time of each.

    Every epoch takes all pairs once, in an order of its own. In epoch k each draw has the number k, or k modulo
    `limit`. With one bucket an epoch begins in the batch in which the one before ends. With several each bucket ends an
    epoch with what it has left, which may be less than a batch.

    Args:
        step: from 0.
        count: batches of a step, over all processes.
        size: pairs of a full batch.
        buckets: number of each pair's bucket, from 0.
        seed: of the orders.
        limit: draws of a pair; None for any number.

    Returns:
        For each batch its draws (index of the pair, number), of one bucket.
    """
    numbers = range(step * count, (step + 1) * count)
    if any(buckets):
        taken = _by_bucket(numbers, size, buckets, seed)
    else:
        taken = _without_gap(numbers, size, len(buckets), seed)
    return [[(index, epoch % limit if limit else epoch) for index, epoch in batch] for batch in taken]


def _without_gap(numbers: range, size: int, count: int, seed: int) -> list[list[Draw]]:
    """Pairs of full batches, counted from the first step on, each with its epoch."""
    places = [range(number * size, (number + 1) * size) for number in numbers]
    return [
        [(_order(place // count, count, seed)[place % count], place // count) for place in batch] for batch in places
    ]


def _by_bucket(numbers: range, size: int, buckets: Sequence[int], seed: int) -> list[list[Draw]]:
    """As `_without_gap`, of batches that are of one bucket and of one epoch each."""
    known = tuple(buckets)
    each = len(_batches_of_epoch(0, size, known, seed))  # every epoch has as many
    epochs = range(numbers.start // each, (numbers.stop - 1) // each + 1)
    batches = {epoch: _batches_of_epoch(epoch, size, known, seed) for epoch in epochs}
    return [[(index, number // each) for index in batches[number // each][number % each]] for number in numbers]


@lru_cache(maxsize=4)
def _batches_of_epoch(epoch: int, size: int, buckets: tuple[int, ...], seed: int) -> list[list[int]]:
    """The batches in which an epoch takes all pairs."""
    return batches_alike(_order(epoch, len(buckets), seed), size, lambda index: buckets[index])


def batches_alike(items: Iterable[Item], size: int, bucket: Callable[[Item], Hashable]) -> list[list[Item]]:
    """Items in batches of one bucket each.

    A batch takes the place of its first item. So items of one bucket stay in their order.

    Args:
        items: in the order in which they are taken.
        size: items of a full batch; the last of each bucket may have fewer.
        bucket: of an item.
    """
    batches: list[list[Item]] = []
    unfilled: dict[Hashable, list[Item]] = {}
    for item in items:
        batch = unfilled.get(bucket(item))
        if batch is None or len(batch) == size:
            batch = unfilled[bucket(item)] = []
            batches.append(batch)
        batch.append(item)
    return batches


@lru_cache(maxsize=4)  # every batch of an epoch asks for it
def _order(epoch: int, count: int, seed: int) -> list[int]:
    """The order in which an epoch takes all pairs."""
    order: list[int] = torch.randperm(count, generator=generator(seed, "order", epoch)).tolist()
    return order


def generator(*counter: object) -> torch.Generator:
    """A generator on the CPU whose seed is a hash of the counter."""
    digest = hashlib.sha256(" ".join(map(str, counter)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))


def _noise_and_time(shape: torch.Size, index: int, draw: int, seed: int, limit: int | None) -> tuple[Tensor, Tensor]:
    """Noise and u in [0, 1) of a pair's draw.

    With a limit the pair's draws are stratified: [0, 1) has `limit` equal parts, and each draw lies in one of its own.
    """
    each = generator(seed, "pair", index, draw)
    noise, u = torch.randn(shape, generator=each), torch.rand(1, generator=each)
    if limit:
        # Each pair visits the strata in its own order. The first draws of all pairs then also cover all times.
        strata = torch.randperm(limit, generator=generator(seed, "strata", index))
        u = (strata[draw] + u) / limit
    return noise, u


def make_batch(
    family: Denoiser,
    pairs: Sequence[Pair],
    draws: Sequence[Draw],
    seed: int,
    device: torch.device,
    *,
    limit: int | None = None,
    errors: Errors | None = None,
    own: bool = False,
) -> Batch:
    """Pairs at their noise and times; `draw_batch` and `place_batch` in one."""
    return place_batch(family, draw_batch(family, pairs, draws, seed, limit=limit, errors=errors, own=own), device)


def draw_batch(
    family: Denoiser,
    pairs: Sequence[Pair],
    draws: Sequence[Draw],
    seed: int,
    *,
    limit: int | None = None,
    errors: Errors | None = None,
    own: bool = False,
) -> Drawn:
    """Read pairs and draw their noise and times, on the CPU, so that they are the same for every device.

    Args:
        family: stacks conditions.
        pairs: all pairs.
        draws: (index of the pair, number) of the B pairs of the batch.
        seed: of noise and times.
        limit: number of draws of a pair; None for any number.
        errors: the reference's errors at all draws; None if not computed.
        own: whether each clip gets the noise that it was sampled from; pairs without seeds share one all the same.

    Raises:
        UserError: a pair that is not of two clips, of another size or grid than the first, with infinite rewards, with
            latents or conditions that are not finite, or, in image-to-video, with clips of different first frames.
    """
    chosen = [pairs[index] for index, _ in draws]
    _check_alike(chosen, [index for index, _ in draws])
    for pair, (index, _) in zip(chosen, draws, strict=True):
        _check_first_frames(pair, index)
    shape = chosen[0].latents.shape[1:]
    drawn = [_noise_and_time(shape, index, draw, seed, limit) for index, draw in draws]
    shared = torch.stack([noise for noise, _ in drawn])
    found = None if errors is None else torch.stack([errors[index][draw] for index, draw in draws], dim=1).flatten(0, 1)
    return Drawn(
        latents=torch.stack([pair.latents for pair in chosen], dim=1).flatten(0, 1),
        noise=_own_noise(chosen, shared) if own else shared,
        u=torch.cat([u for _, u in drawn]),
        conditions=family.stack([pair.conditions for pair in chosen]),
        patch_rewards=_decidable(family, chosen),
        video_rewards=torch.stack([pair.video_rewards for pair in chosen], dim=1).flatten(0, 1),
        reference_error=found,
    )


def _decidable(family: Denoiser, pairs: Sequence[Pair]) -> Tensor:
    """Patch rewards of all samples, [2B, f, h, w]; a patch wholly inside given frames has no label."""
    rewards = torch.stack([pair.patch_rewards for pair in pairs], dim=1).flatten(0, 1)
    given = given_frames(family.layout)
    return without_preference(rewards, family.latent_size(pairs[0].latents.shape)[0] - given, given)


def _own_noise(pairs: Sequence[Pair], shared: Tensor) -> Tensor:
    """The noise that each sample was made from, [2B, *latent_shape]; of pairs without seeds the shared one, twice."""
    own = [
        noise.expand(2, *noise.shape)
        if pair.seeds is None
        else torch.stack([clip_noise(noise.shape, seed) for seed in pair.seeds])
        for pair, noise in zip(pairs, shared, strict=True)
    ]
    return torch.stack(own, dim=1).flatten(0, 1)


def place_batch(family: Denoiser, drawn: Drawn, device: torch.device) -> Batch:
    """Put what was drawn on the device, and mix latents and noise there; waits for no copy from pinned memory.

    Conditions whose values the family reads stay on the CPU.

    Args:
        family: gives times and noise process.
        drawn: on the CPU.
        device: of the batch.
    """

    def placed(value: Tensor) -> Tensor:
        return value.to(device, non_blocking=device.type == "cuda")

    def condition(name: str, value: Tensor) -> Tensor:
        value = value if name in family.host_conditions else placed(value)
        return value.repeat(2, *[1] * (value.ndim - 1))

    latents, shape = placed(drawn.latents), drawn.latents.shape[1:]
    noise = placed(drawn.noise)
    noise = noise if len(noise) == len(latents) else noise.repeat(2, *[1] * len(shape))
    t = placed(family.timesteps(drawn.u, shape)).repeat(2)
    return Batch(
        noisy=family.add_noise(latents, noise, t),
        target=family.target(latents, noise, t),
        t=t,
        conditions={name: condition(name, value) for name, value in drawn.conditions.items()},
        patch_rewards=placed(drawn.patch_rewards),
        video_rewards=placed(drawn.video_rewards),
        reference_error=None if drawn.reference_error is None else placed(drawn.reference_error),
    )


def _check_alike(chosen: Sequence[Pair], indices: Sequence[int]) -> None:
    """Raise unless all pairs have the first one's size and grid, finite inputs, and rewards that are not infinite."""
    first = chosen[0]
    for pair, index in zip(chosen, indices, strict=True):
        for name, value, expected in [
            ("latents", pair.latents, (2, *first.latents.shape[1:])),
            ("patch_rewards", pair.patch_rewards, (2, *first.patch_rewards.shape[1:])),
            ("video_rewards", pair.video_rewards, (2,)),
        ]:
            if tuple(value.shape) != expected:
                raise UserError(
                    f"pairs: {name} of pair {index} are {list(value.shape)}, expected {list(expected)} as in pair "
                    f"{indices[0]} of its batch; a batch is of one size and one grid"
                )
            if name != "latents" and value.isinf().any():
                raise UserError(f"pairs: {name} of pair {index} are infinite; expected numbers, or NaN for no label")
        for name, value in {"latents": pair.latents, **pair.conditions}.items():
            check_finite(value[None], [f"pair {index}"], name, "make its clips and the cache again, or leave it out")


def _check_first_frames(pair: Pair, index: int) -> None:
    """Raise unless both clips begin with the frame that the network is given, up to what files and autoencoders lose.

    Networks that see a picture in another way have no `first_frame`; their clips are compared when they are cached.
    """
    given = pair.conditions.get("first_frame")
    if given is None:
        return
    for clip, latents in zip("ab", pair.latents, strict=True):
        off = float((latents[:, :1] - given).norm() / given.norm())
        if not off <= _SAME_FRAME:
            raise UserError(
                f"pairs: the first latent frame of clip {clip} of pair {index} is {100 * off:.0f}% off the given one, "
                f"expected at most {100 * _SAME_FRAME:.0f}%; pair clips that begin with the same picture"
            )


def weights_at(t: Tensor, weights: Sequence[float]) -> Tensor:
    """The weight of each time's part of 0..1; t = 1 belongs to the last one."""
    part = (t * len(weights)).long().clamp(max=len(weights) - 1)
    return t.new_tensor(weights)[part]
