"""Do the rewards of videos and of their patches say the same? Correlation, overlap of the worst, distributions.

And how far the clips of an arm differ from each other.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from halo_fast.agreement.figures import Figure, bootstrap_interval, spearman
from halo_fast.agreement.paired import Paired

__all__ = ["QUANTILES", "distance", "diversity", "quantiles", "reward_consistency", "worst_overlap"]

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def worst_overlap(x: ArrayLike, y: ArrayLike, share: float = 0.1) -> float:
    """Intersection over union of the items that are lowest by x and those that are lowest by y.

    Args:
        x: scores of the items, flattened.
        y: likewise.
        share: of the items that count as the worst; at least one does. Equal scores go by their order.

    Returns:
        from 0 to 1; share / (2 - share) is what chance gives. NaN if either is constant.
    """
    scores = [np.asarray(values, dtype=np.float64).ravel() for values in (x, y)]
    if any(np.ptp(values) == 0 for values in scores):
        return float("nan")
    count = max(1, round(share * len(scores[0])))
    first, second = (set(np.argsort(values, kind="stable")[:count].tolist()) for values in scores)
    return len(first & second) / len(first | second)


def distance(x: ArrayLike, y: ArrayLike) -> tuple[float, float]:
    """How far two samples are apart.

    Args:
        x: a sample, flattened.
        y: another, of any size.

    Returns:
        the largest difference of their distribution functions (Kolmogorov and Smirnov), from 0 to 1, and the mean
        distance by which one has to be moved to become the other (Wasserstein), in the samples' unit.
    """
    from scipy.stats import wasserstein_distance

    samples = [np.sort(np.asarray(values, dtype=np.float64).ravel()) for values in (x, y)]
    # scipy's test would also work out a p at every draw of a bootstrap
    below = [np.searchsorted(values, np.concatenate(samples), side="right") / len(values) for values in samples]
    return float(np.abs(below[0] - below[1]).max()), float(wasserstein_distance(*samples))


def quantiles(values: ArrayLike) -> dict[str, float]:
    """The quantiles `QUANTILES` of a sample by name: "5%", "25%", ..."""
    found = np.quantile(np.asarray(values, dtype=np.float64).ravel(), QUANTILES)
    return {f"{100 * level:.0f}%": float(value) for level, value in zip(QUANTILES, found, strict=True)}


def reward_consistency(video: ArrayLike, patches: ArrayLike, resamples: int = 1000, seed: int = 0) -> dict[str, Figure]:
    """How far a clip's video reward and the rewards of its patches agree, with intervals over clips.

    Args:
        video: reward of every clip, [N].
        patches: of all patches of every clip, [N, P].
        resamples: draws of the bootstrap over clips.
        seed: of the draws.

    Returns:
        spearman of the video reward and the mean of the patches; the overlap of the worst tenth by either, and of the
        worst tenth by video and by its worst patch; KS and Wasserstein distance of video rewards and mean patch
        rewards.
    """
    whole = np.asarray(video, dtype=np.float64)
    parts = np.asarray(patches, dtype=np.float64).reshape(len(whole), -1)
    mean, worst = parts.mean(axis=1), parts.min(axis=1)
    statistics = {
        "spearman": lambda rows: spearman(whole[rows], mean[rows]),
        "overlap of the worst tenth": lambda rows: worst_overlap(whole[rows], mean[rows]),
        "overlap by the worst patch": lambda rows: worst_overlap(whole[rows], worst[rows]),
        "KS distance": lambda rows: distance(whole[rows], mean[rows])[0],
        "Wasserstein distance": lambda rows: distance(whole[rows], mean[rows])[1],
    }
    everything = np.arange(len(whole))
    return {
        name: Figure(statistic(everything), *bootstrap_interval(statistic, len(whole), resamples, seed))
        for name, statistic in statistics.items()
    }


def diversity(base: ArrayLike, aligned: ArrayLike, resamples: int = 1000, seed: int = 0) -> Paired:
    """Mean distance between two clips of an arm that belong to different prompts, for both arms, paired.

    The distance is the root mean square difference of their features. A model that has collapsed onto one look gives
    clips that are closer together.

    Args:
        base: features of the base's clips, [N, D].
        aligned: of the aligned model's clips of the same prompts and seeds.
        resamples: draws of the bootstrap over pairs of the same prompt; a clip is never compared with itself.
        seed: of the draws.
    """
    from scipy.spatial.distance import cdist

    distances = []
    for arm in (base, aligned):
        features = np.asarray(arm, dtype=np.float64)
        distances.append(cdist(features, features) / np.sqrt(max(features.shape[1], 1)))
    count = len(distances[0])

    def mean(arm: int, rows: NDArray[np.int64]) -> float:
        drawn = np.bincount(rows, minlength=count).astype(np.float64)
        pairs = drawn.sum() ** 2 - (drawn**2).sum()
        return float(drawn @ distances[arm] @ drawn / pairs) if pairs > 0 else float("nan")

    def gap(rows: NDArray[np.int64]) -> float:
        return mean(1, rows) - mean(0, rows)

    return Paired(
        *(
            Figure(statistic(np.arange(count)), *bootstrap_interval(statistic, count, resamples, seed))
            for statistic in (lambda rows: mean(0, rows), lambda rows: mean(1, rows), gap)
        )
    )
