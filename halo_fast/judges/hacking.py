"""Is a gain real? The gain on the training reward against the gain on judges that training never optimised."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from halo_fast.agreement.figures import bootstrap_interval, spearman

__all__ = ["OVERALL", "Gain", "gains", "overall"]

OVERALL = "all dimensions"
"""The dimension that stands for all of a judge's."""


@dataclass(frozen=True)
class Gain:
    """How a score changed from the base model to the aligned one, over prompts.

    Args:
        dimension: of the judge.
        prompts: that have both scores.
        base: mean score of the base model's clips.
        aligned: likewise.
        gain: mean difference.
        low: of the 95% interval of the gain, from a bootstrap over prompts; NaN for a single prompt.
        high: likewise.
        wins: share of the prompts whose aligned clip scores higher; equal scores are half a win.
        agreement: rank correlation, over prompts, of this gain with the gain on the training reward; NaN if constant.
        hacked: share of the prompts on which the training reward rose and this score fell.
    """

    dimension: str
    prompts: int
    base: float
    aligned: float
    gain: float
    low: float
    high: float
    wins: float
    agreement: float
    hacked: float

    @property
    def verdict(self) -> str:
        """ "rises", "falls" or "unclear", by the interval of the gain."""
        return "rises" if self.low > 0 else "falls" if self.high < 0 else "unclear"


def overall(base: Sequence[Mapping[str, float]], aligned: Sequence[Mapping[str, float]]) -> NDArray[np.float64]:
    """One score of each clip: the mean of its dimensions, each less its mean over its deviation over all clips.

    Args:
        base: scores of the base model's clips, by dimension.
        aligned: of the aligned model's, in the same order of prompts.

    Returns:
        [2, N], base first. A dimension that is constant counts as 0; NaN where a clip has no score at all.
    """
    names = list(base[0])
    scores = np.array([[[row[name] for name in names] for row in arm] for arm in (base, aligned)], dtype=float)
    usable = ~np.isnan(scores)
    count = np.maximum(usable.sum((0, 1)), 1)
    mean = np.where(usable, scores, 0).sum((0, 1)) / count
    deviation = np.sqrt(np.where(usable, (scores - mean) ** 2, 0).sum((0, 1)) / count)
    scaled = np.where(usable, (scores - mean) / np.where(deviation > 0, deviation, 1), 0)
    found = usable.sum(-1)
    return np.where(found > 0, scaled.sum(-1) / np.maximum(found, 1), np.nan)


def gains(
    base: Sequence[Mapping[str, float]],
    aligned: Sequence[Mapping[str, float]],
    reward: ArrayLike,
    resamples: int,
    seed: int,
) -> list[Gain]:
    """The gains of a judge: of all its dimensions together, then of each.

    Args:
        base: scores of the base model's clips by dimension, a row a prompt.
        aligned: likewise, from the same noise.
        reward: gain on the training reward of each prompt, [N].
        resamples: of the prompts, behind each interval.
        seed: of the draws.
    """
    together = overall(base, aligned)
    rows = [_gain(OVERALL, together[0], together[1], np.asarray(reward, dtype=float), resamples, seed)]
    for name in base[0]:
        arms = [np.array([row[name] for row in arm], dtype=float) for arm in (base, aligned)]
        rows.append(_gain(name, arms[0], arms[1], np.asarray(reward, dtype=float), resamples, seed))
    return rows


def _gain(
    name: str,
    base: NDArray[np.float64],
    aligned: NDArray[np.float64],
    reward: NDArray[np.float64],
    resamples: int,
    seed: int,
) -> Gain:
    """The gain of one dimension over the prompts that have both scores."""
    both = ~np.isnan(base) & ~np.isnan(aligned)
    base, aligned, reward = base[both], aligned[both], reward[both]
    difference = aligned - base
    if not len(difference):
        nan = float("nan")
        return Gain(name, 0, nan, nan, nan, nan, nan, nan, nan, nan)
    low, high = bootstrap_interval(lambda rows: difference[rows].mean(), len(difference), resamples, seed)
    return Gain(
        name, len(difference), float(base.mean()), float(aligned.mean()), float(difference.mean()), low, high,
        float(((difference > 0) + (difference == 0) / 2).mean()),
        spearman(difference, reward) if len(difference) > 1 else float("nan"),
        float(((reward > 0) & (difference < 0)).mean()),
    )  # fmt: skip
