"""Sanity probes: what any reward model must get right before its scores are trusted.

Each probe changes clips in one known way and measures how the scores change. Its figure has an interval over prompts
and passes a threshold or not. Thresholds are fixed here, not fitted to a model.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from halo_fast.agreement.figures import Figure, mean_over
from halo_fast.rewards import RewardModel, Rewards
from halo_fast.rewards.clips import names_direction

__all__ = ["Probe", "brightness", "frame_order", "planted_damage", "probe_all", "prompt_swap", "static_copy"]

_BRIGHTER = 12  # of 255 levels
_Change = Callable[[Tensor, int], Tensor]  # of some clips, the number of the first among all of them


@dataclass(frozen=True)
class Probe:
    """Outcome of a probe.

    Args:
        name: of the probe.
        figure: what was measured, and its interval over prompts.
        threshold: bound of the figure.
        at_least: whether the figure must be at least the threshold, or at most.
        meaning: the figure in words.
    """

    name: str
    figure: Figure
    threshold: float
    at_least: bool
    meaning: str

    @property
    def passed(self) -> bool | None:
        """Whether the figure is within the threshold; None if there was nothing to measure it on."""
        if np.isnan(self.figure.value):
            return None
        return self.figure.value >= self.threshold if self.at_least else self.figure.value <= self.threshold

    def as_dict(self) -> dict[str, Any]:
        """For JSON; NaN becomes null."""
        values = {name: None if np.isnan(value) else value for name, value in self.figure._asdict().items()}
        return asdict(self) | {"figure": values, "passed": self.passed}


def probe_all(
    model: RewardModel,
    videos: Tensor,
    prompts: Sequence[str],
    grid: tuple[int, int, int],
    seed: int = 0,
    batch_size: int = 32,
) -> list[Probe]:
    """All probes on clips that show what their prompts say, and move.

    Args:
        model: the reward model.
        videos: uint8 [N, F, H, W, 3].
        prompts: of each.
        grid: patches (f, h, w).
        seed: of the damaged patches.
        batch_size: clips that are scored at once.

    Raises:
        ValueError: the model gives NaN; a probe must not pass, or count as not measured, because scores are missing.
    """
    return [
        prompt_swap(model, videos, prompts, grid, batch_size),
        static_copy(model, videos, prompts, grid, batch_size),
        planted_damage(model, videos, prompts, grid, seed, batch_size),
        frame_order(model, videos, prompts, grid, batch_size),
        brightness(model, videos, prompts, grid, batch_size),
    ]


def prompt_swap(
    model: RewardModel, videos: Tensor, prompts: Sequence[str], grid: tuple[int, int, int], size: int
) -> Probe:
    """Under another clip's prompt, text_alignment falls: in at least 0.8 of the clips."""
    other = [*prompts[len(prompts) // 2 :], *prompts[: len(prompts) // 2]]
    own, foreign = (_video(model, videos, names, grid, size, "text_alignment") for names in (prompts, other))
    fall = own - foreign
    fall[[name == another for name, another in zip(prompts, other, strict=True)]] = torch.nan
    return Probe("prompt swap", _share(fall > 0, fall, prompts), 0.8, True, "clips whose text_alignment falls")


def static_copy(
    model: RewardModel, videos: Tensor, prompts: Sequence[str], grid: tuple[int, int, int], size: int
) -> Probe:
    """A copy frozen at its middle frame does not win on dynamic_degree: in at most 0.1 of the clips that move."""

    def freeze(part: Tensor, start: int) -> Tensor:
        return part[:, part.shape[1] // 2, None].expand_as(part).contiguous()

    scores = [_video(model, videos, prompts, grid, size, "dynamic_degree", change) for change in (freeze, _as_is)]
    gain = scores[0] - scores[1]
    gain[[bool((video == video[:1]).all()) for video in videos]] = torch.nan
    return Probe(
        "static copy", _share(gain >= 0, gain, prompts), 0.1, False, "frozen copies that win on dynamic_degree"
    )


def planted_damage(
    model: RewardModel, videos: Tensor, prompts: Sequence[str], grid: tuple[int, int, int], seed: int, size: int
) -> Probe:
    """Of all patches the damaged one falls most: in at least 0.9 of the clips (by chance one in as many as patches).

    The damage is plain to a person: colour channels exchanged, the contents displaced by half a patch, and lightened or
    darkened by a third of the range, in one patch drawn at random.
    """
    frames, height, width = videos.shape[1:4]
    patches = model.config.patches(grid, (frames, height, width))
    chosen = torch.randint(int(np.prod(grid)), (len(videos),), generator=torch.Generator().manual_seed(seed))

    def damage(part: Tensor, start: int) -> Tensor:
        damaged = part.clone()
        for clip, patch in enumerate(chosen[start : start + len(part)].tolist()):
            box = (clip, *patches.pixel_box([int(index) for index in np.unravel_index(patch, grid)]))
            inside = part[box]
            moved = inside[..., [1, 2, 0]].roll((inside.shape[1] // 2, inside.shape[2] // 2), dims=(1, 2)).float()
            damaged[box] = (moved + (85 if moved.mean() < 128 else -85)).clamp(0, 255).to(torch.uint8)
        return damaged

    measured = torch.zeros(len(videos))
    if model.config.patch_dimensions:
        before, after = (
            _rewards(model, videos, prompts, grid, size, change).patches[:, 0].flatten(1) for change in (_as_is, damage)
        )
        hit = (before - after).argmax(dim=1) == chosen
    else:
        hit, measured = measured > 0, measured * torch.nan
    figure = _share(hit, measured, prompts)
    return Probe("planted damage", figure, 0.9, True, "clips whose damaged patch falls most")


def frame_order(
    model: RewardModel, videos: Tensor, prompts: Sequence[str], grid: tuple[int, int, int], size: int
) -> Probe:
    """Backwards, a clip that moves and whose prompt names a direction falls on dynamic_degree: in at least 0.8."""

    def turn(part: Tensor, start: int) -> Tensor:
        return part.flip(1).contiguous()

    forwards, backwards = (
        _video(model, videos, prompts, grid, size, "dynamic_degree", change) for change in (_as_is, turn)
    )
    fall = forwards - backwards
    same = [bool((video == video.flip(0)).all()) for video in videos]
    fall[[still or not names_direction(prompt) for still, prompt in zip(same, prompts, strict=True)]] = torch.nan
    meaning = "clips that fall on dynamic_degree backwards, of those whose prompt names a direction"
    return Probe("frame order", _share(fall > 0, fall, prompts), 0.8, True, meaning)


def brightness(
    model: RewardModel, videos: Tensor, prompts: Sequence[str], grid: tuple[int, int, int], size: int
) -> Probe:
    """Twelve levels of 255 brighter, scores barely move: by at most 0.25 of a point on average, patches and video."""

    def brighten(part: Tensor, start: int) -> Tensor:
        return (part.int() + _BRIGHTER).clamp(max=255).to(torch.uint8)

    before, after = (_rewards(model, videos, prompts, grid, size, change) for change in (_as_is, brighten))
    changes = []
    if model.config.video_dimensions:
        changes.append((before.video - after.video).abs().mean(dim=1))
    if model.config.patch_dimensions:
        changes.append((before.patches - after.patches).abs().flatten(1).mean(dim=1))
    moved = torch.stack(changes).mean(dim=0)
    return Probe("brightness", mean_over(moved.numpy(), prompts), 0.25, False, "mean change of a score, in points")


def _as_is(part: Tensor, start: int) -> Tensor:
    return part


@torch.no_grad()
def _rewards(
    model: RewardModel,
    videos: Tensor,
    prompts: Sequence[str],
    grid: tuple[int, int, int],
    size: int,
    change: _Change = _as_is,
) -> Rewards:
    """Scores of the changed clips, batch by batch; ValueError if one is NaN."""
    parts = [
        model(change(videos[start : start + size], start), list(prompts[start : start + size]), grid)
        for start in range(0, len(videos), size)
    ]
    rewards = Rewards(torch.cat([part.video for part in parts]), torch.cat([part.patches for part in parts]))
    for name, scores in (("video", rewards.video), ("patch", rewards.patches)):
        missing = int(scores.isnan().flatten(1).any(dim=1).sum())
        if missing:
            raise ValueError(
                f"model: expected numbers, got NaN {name} scores for {missing} of {len(videos)} clips; train it again"
            )
    return rewards


def _video(
    model: RewardModel,
    videos: Tensor,
    prompts: Sequence[str],
    grid: tuple[int, int, int],
    size: int,
    dimension: str,
    change: _Change = _as_is,
) -> Tensor:
    """One video score of each clip [N]; NaN if the model has no such dimension."""
    if dimension not in model.config.video_dimensions:
        return torch.full((len(videos),), torch.nan)
    return (
        _rewards(model, videos, prompts, grid, size, change)
        .video[:, model.config.video_dimensions.index(dimension)]
        .clone()
    )


def _share(true: Tensor, measured: Tensor, prompts: Sequence[str]) -> Figure:
    """Share of the clips for which it is true, among those that were measured."""
    return mean_over(torch.where(measured.isnan(), torch.nan, true.float()).numpy(), prompts)
