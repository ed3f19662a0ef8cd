"""Patches of clips whose first latent frame is given, as in image-to-video: that frame counts nowhere.

Patch k of n along F frames covers the frames floor(k F / n) .. floor((k + 1) F / n). Its mean is over those of them
that are made. Kernels divide evenly what they see. So they see the made frames alone, each as a patch row of its own. A
patch's frames have equally many elements, so the mean of their means is the patch's mean.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["GIVEN_FIRST", "by_frame", "empty_rows", "given_frames", "made_frames", "patch_means", "without_preference"]

GIVEN_FIRST = "BC(1+F)HW"  # the layout BCFHW of a clip whose first latent frame is given


def given_frames(layout: str) -> int:
    """How many latent frames at the beginning of a clip are given."""
    return 1 if layout == GIVEN_FIRST else 0


def made_frames(view: Tensor, given: int) -> Tensor:
    """The frames of [N, C, F, H, W] that are not given."""
    return view[:, :, given:] if given else view


def _counts(made: int, rows: int, given: int) -> list[int]:
    """Made frames of each patch row, of `given` + `made` frames in all."""
    edges = [max(k * (given + made) // rows, given) for k in range(rows + 1)]
    return [end - start for start, end in zip(edges[:-1], edges[1:], strict=True)]


def empty_rows(made: int, rows: int, given: int) -> int:
    """How many patch rows, from the first on, lie wholly inside the given frames."""
    return _counts(made, rows, given).count(0) if given else 0


def patch_means(measure: Callable[[tuple[int, ...]], Tensor], grid: Sequence[int], made: int, given: int) -> Tensor:
    """Means [N, f, h, w] over the made elements of each patch; 0 for a patch that has none.

    Args:
        measure: means of the made frames alone over a grid that divides them evenly.
        grid: (f, h, w) patches of all frames.
        made: frames that are made.
        given: frames that are given.
    """
    if not given:
        return measure(tuple(grid))
    frames = measure((made, *grid[1:]))
    rows = frames.split(_counts(made, grid[0], given), dim=1)
    # a sum over no frame is 0, where its mean would be NaN
    return torch.stack([row.mean(1) if row.shape[1] else row.sum(1) for row in rows], dim=1)


def by_frame(coefficients: Tensor, made: int, given: int) -> Tensor:
    """Coefficients dL/dE_p [N, f, h, w] as those of the made frames' errors, [N, made, h, w]."""
    if not given:
        return coefficients
    counts = _counts(made, coefficients.shape[1], given)
    rows = zip(coefficients.split(1, dim=1), counts, strict=True)
    return torch.cat([row.expand(-1, count, -1, -1) / count for row, count in rows if count], dim=1)


def without_preference(rewards: Tensor, made: int, given: int) -> Tensor:
    """Patch rewards [N, f, h, w] that are NaN where a patch lies wholly inside the given frames."""
    empty = empty_rows(made, rewards.shape[1], given)
    return torch.cat([torch.full_like(rewards[:, :empty], torch.nan), rewards[:, empty:]], dim=1) if empty else rewards
