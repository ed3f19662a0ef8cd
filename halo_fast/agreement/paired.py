"""Base and aligned clips of the same prompt and seed against each other: ratios, wins with ties, the sign test.

Every interval is a bootstrap over pairs: both clips of a pair are drawn together, so that what a prompt or a seed does
to both of them cancels.
"""

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from halo_fast.agreement.figures import Figure

__all__ = ["Paired", "Parts", "Wins", "count_wins", "paired_mean", "paired_ratio", "ratio", "read_in_both", "sign_test"]

Parts = tuple[ArrayLike, ArrayLike]
"""Numerators and denominators of a ratio, [N] each, one of every clip."""


class Paired(NamedTuple):
    """A figure of both arms, and the aligned arm's less the base's; 95% intervals, paired."""

    base: Figure
    aligned: Figure
    difference: Figure


class Wins(NamedTuple):
    """How often the aligned clip of a pair is the better one.

    Args:
        wins: pairs in which it is better.
        ties: pairs in which neither is.
        losses: pairs in which the base's is.
        rate: (wins + ties / 2) / pairs, with its interval; 0.5 is no difference.
        p: of the sign test, which leaves ties out.
    """

    wins: int
    ties: int
    losses: int
    rate: Figure
    p: float


def paired_ratio(base: Parts, aligned: Parts, resamples: int = 1000, seed: int = 0) -> Paired:
    """A ratio of sums over clips, sum(numerators) / sum(denominators), for both arms.

    Args:
        base: of the base's clips.
        aligned: of the aligned model's clips of the same prompts and seeds, in the same order.
        resamples: draws of the bootstrap over pairs.
        seed: of the draws.

    Returns:
        the figures; NaN where all denominators are 0.
    """
    arms = [_resampled(arm, resamples, seed) for arm in (base, aligned)]
    return Paired(*(_figure(*values) for values in (*arms, (arms[1][0] - arms[0][0], arms[1][1] - arms[0][1]))))


def ratio(parts: Parts, resamples: int = 1000, seed: int = 0) -> Figure:
    """A ratio of sums over clips; see `paired_ratio`."""
    return _figure(*_resampled(parts, resamples, seed))


def _resampled(parts: Parts, resamples: int, seed: int) -> tuple[float, NDArray[np.float64]]:
    """A ratio of sums over all clips, and in each draw of the bootstrap."""
    above, below = (np.asarray(part, dtype=np.float64) for part in parts)
    if not len(above):
        return math.nan, np.empty(0)
    drawn = _draws(len(above), resamples if len(above) > 1 else 0, seed).reshape(-1, len(above))
    sums = np.append(below.sum(), drawn @ below), np.append(above.sum(), drawn @ above)
    values = np.divide(sums[1], sums[0], out=np.full(len(sums[0]), np.nan), where=sums[0] > 0)
    return float(values[0]), values[1:]


@lru_cache(maxsize=4)
def _draws(count: int, resamples: int, seed: int) -> NDArray[np.float64]:
    """How often each of `count` clips is in each draw, [resamples, count]: the draws of `bootstrap_interval`.

    Dozens of figures share them, and a product with them is all that a figure takes.
    """
    rng = np.random.default_rng(seed)
    drawn = [np.bincount(rng.integers(count, size=count), minlength=count) for _ in range(resamples)]
    return np.array(drawn, dtype=np.float64)


def _figure(value: float, values: NDArray[np.float64]) -> Figure:
    """A figure with the percentile interval of its resampled values; none for a single clip."""
    known = values[~np.isnan(values)]
    if not len(known):
        return Figure(value, float("nan"), float("nan"))
    low, high = np.quantile(known, [0.025, 0.975])
    return Figure(value, float(low), float(high))


def paired_mean(base: ArrayLike, aligned: ArrayLike, resamples: int = 1000, seed: int = 0) -> Paired:
    """The mean over clips, of both arms; see `paired_ratio`.

    Args:
        base: a number of every clip, [N].
        aligned: likewise.
        resamples: draws of the bootstrap over pairs.
        seed: of the draws.
    """
    ones = np.ones(len(np.asarray(base)))
    return paired_ratio((base, ones), (aligned, ones), resamples, seed)


def read_in_both(arms: Sequence[Mapping[str, ArrayLike]], name: str) -> NDArray[np.float64]:
    """A column of base and aligned, [2, n], of the prompts of which a meter read something in both clips: no NaN.

    Args:
        arms: columns [N] by name, of the base and of the aligned model.
        name: of the column.
    """
    values = np.stack([np.asarray(arm[name], dtype=np.float64) for arm in arms])
    return values[:, ~np.isnan(values).any(axis=0)]


def count_wins(gaps: ArrayLike, tie: float = 0.0, resamples: int = 1000, seed: int = 0) -> Wins:
    """Wins, ties and losses of the aligned clips.

    Args:
        gaps: score of the aligned clip less that of the base's, [N]; more is better.
        tie: gaps of no more than this are ties.
        resamples: draws of the bootstrap over pairs.
        seed: of the draws.

    Raises:
        ValueError: a gap is NaN.
    """
    values = np.asarray(gaps, dtype=np.float64)
    if np.isnan(values).any():
        raise ValueError(f"gaps: expected numbers, got NaN in {int(np.isnan(values).sum())} of {len(values)}")
    points = np.where(np.abs(values) <= tie, 0.5, values > 0)
    wins, losses = int((points == 1).sum()), int((points == 0).sum())
    rate = ratio((points, np.ones(len(points))), resamples, seed)
    return Wins(wins, len(points) - wins - losses, losses, rate, sign_test(wins, losses))


def sign_test(wins: int, losses: int) -> float:
    """Two-sided exact p of wins and losses if both were equally likely: the chance of a split at least as uneven.

    Args:
        wins: pairs for one side.
        losses: pairs for the other; ties belong to neither.

    Returns:
        p; 1 without decided pairs.
    """
    from scipy.stats import binomtest

    return float(binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0
