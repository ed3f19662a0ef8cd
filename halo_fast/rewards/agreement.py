"""How far two sets of scores agree: rank figures, pairs with ties, calibration, with intervals over prompts.

Everything is a plain function of arrays; what is compared with people's labels is compared by `video_agreement` and
`patch_agreement`, which give every figure an interval from a bootstrap over prompts.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = [
    "Figure",
    "auc",
    "bootstrap_interval",
    "calibration_error",
    "calibration_slope",
    "centred",
    "kendall",
    "pair_accuracy",
    "patch_agreement",
    "rater_ceiling",
    "ridge_folds",
    "spearman",
    "video_agreement",
]

_BINS = 10


class Figure(NamedTuple):
    """A figure and its 95% interval from a bootstrap over prompts; NaN where it is not defined."""

    value: float
    low: float
    high: float


def bootstrap_interval(
    statistic: Callable[[NDArray[np.int64]], float], count: int, resamples: int, seed: int, level: float = 0.95
) -> tuple[float, float]:
    """Percentile bootstrap interval (Efron, 1979) of a statistic of `count` units.

    Args:
        statistic: its value on the units with the given indices, [count] with repetitions.
        count: units; here prompts, since the clips and patches of one prompt are not independent.
        resamples: draws; those on which the statistic is not defined (NaN) are left out.
        seed: of the draws.
        level: share of the resampled values inside the interval.
    """
    rng = np.random.default_rng(seed)
    values = np.array([statistic(rng.integers(count, size=count)) for _ in range(resamples)])
    if np.isnan(values).all():
        return float("nan"), float("nan")
    low, high = np.nanquantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def spearman(x: ArrayLike, y: ArrayLike) -> float:
    """Rank correlation of two arrays, flattened; ties share their mean rank. NaN if either is constant."""
    from scipy.stats import rankdata

    ranks = [rankdata(np.asarray(values).ravel()) for values in (x, y)]
    centred = [rank - rank.mean() for rank in ranks]
    scale = np.sqrt((centred[0] ** 2).sum() * (centred[1] ** 2).sum())
    return float((centred[0] * centred[1]).sum() / scale) if scale > 0 else float("nan")


def kendall(x: ArrayLike, y: ArrayLike) -> float:
    """Kendall's tau-b of two arrays, flattened: (concordant - discordant) over the geometric mean of untied pairs."""
    from scipy.stats import kendalltau

    return float(kendalltau(np.asarray(x).ravel(), np.asarray(y).ravel(), variant="b").statistic)


def auc(scores: ArrayLike, positive: ArrayLike) -> float:
    """Chance that a positive scores above a negative, ties counting half; NaN without both.

    Args:
        scores: any shape, flattened.
        positive: bool, the same shape.
    """
    from scipy.stats import rankdata

    positive = np.asarray(positive, dtype=bool).ravel()
    count = positive.sum()
    if count in (0, positive.size):
        return float("nan")
    ranks = rankdata(np.asarray(scores).ravel())
    return float((ranks[positive].sum() - count * (count + 1) / 2) / (count * (positive.size - count)))


def pair_accuracy(score_gaps: ArrayLike, label_gaps: ArrayLike) -> float:
    """Share of pairs judged like the label, ties included, at the tie threshold that is best for these scores.

    acc(epsilon) = mean[ label tie and |gap| <= epsilon, or sign(gap) = sign(label) and |gap| > epsilon ], maximised
    over epsilon (Deutsch, Foster and Freitag, "Ties Matter", 2023). Scores that are continuous never tie by themselves.

    Args:
        score_gaps: [K] score of the one minus score of the other.
        label_gaps: [K] likewise of the label; 0 is a tie.

    Returns:
        the share, NaN without pairs. Saying "tie" everywhere gets the share of tied labels: the floor of this figure.
    """
    gaps, labels = np.asarray(score_gaps, dtype=float), np.asarray(label_gaps, dtype=float)
    if not len(gaps):
        return float("nan")
    order = np.argsort(np.abs(gaps), kind="stable")
    size, right, tied = np.abs(gaps)[order], (np.sign(gaps) == np.sign(labels))[order] & (gaps[order] != 0), labels == 0
    # with the k closest pairs called ties: ties among them are right, and the rightly ordered ones beyond them
    correct = np.append(0, np.cumsum(tied[order])) + np.append(np.cumsum(right[::-1])[::-1], 0)
    # a threshold cannot part pairs of equal gap, and a gap of 0 is always a tie
    allowed = np.append(size[0] > 0, np.append(size[1:] > size[:-1], True))
    return float(correct[allowed].max() / len(gaps))


def calibration_slope(scores: ArrayLike, labels: ArrayLike) -> float:
    """Least-squares slope of labels on scores: 1 is calibrated, below 1 the scores spread too far. NaN if constant."""
    scores, labels = np.asarray(scores, dtype=float).ravel(), np.asarray(labels, dtype=float).ravel()
    spread = ((scores - scores.mean()) ** 2).sum()
    return float(((scores - scores.mean()) * (labels - labels.mean())).sum() / spread) if spread > 0 else float("nan")


def calibration_error(scores: ArrayLike, labels: ArrayLike) -> float:
    """Mean distance, in points of the scale, between mean score and mean label over ten bins of equally many scores."""
    scores, labels = np.asarray(scores, dtype=float).ravel(), np.asarray(labels, dtype=float).ravel()
    bins = np.array_split(np.argsort(scores, kind="stable"), min(_BINS, len(scores)))
    return float(sum(len(rows) * abs(scores[rows].mean() - labels[rows].mean()) for rows in bins) / len(scores))


def centred(values: ArrayLike, *groups: ArrayLike) -> NDArray[np.float64]:
    """What is left of values [N] after the least-squares effects of groupings: the residual of y ~ 1 + g1 + g2 + ...

    Args:
        values: [N].
        groups: for each grouping a label for each value, [N].
    """
    values = np.asarray(values, dtype=float)
    columns = [np.ones((len(values), 1))]
    for group in groups:
        _, index = np.unique(np.asarray(group), return_inverse=True)
        columns.append(np.eye(index.max() + 1)[index])
    design = np.concatenate(columns, axis=1)
    return values - design @ np.linalg.lstsq(design, values, rcond=None)[0]


def video_agreement(
    scores: ArrayLike,
    labels: ArrayLike,
    prompts: Sequence[str],
    generators: Sequence[str] | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Figure]:
    """Agreement of a video score with a label of the same dimension.

    Args:
        scores: [N].
        labels: [N], from 1 to 5; clips whose label is NaN do not count.
        prompts: of each clip; the unit of the bootstrap.
        generators: the model that made each clip; with them, spearman_centred is given.
        resamples: draws of the bootstrap.
        seed: of the draws.

    Returns:
        spearman, kendall (tau-b), pair_accuracy (of the pairs that share a prompt, ties included), auc (of labels above
        the median), calibration_slope, calibration_error, and spearman_centred: what is left when prompt and generator
        means are removed from both sides. A score that knows only which prompt or generator it sees has none of it.
    """
    scores, labels = np.asarray(scores, dtype=float), np.asarray(labels, dtype=float)
    known = ~(np.isnan(labels) | np.isnan(scores))
    scores, labels = scores[known], labels[known]
    _, prompt = np.unique(np.asarray(prompts)[known], return_inverse=True)
    good = labels > np.median(labels) if len(labels) else labels > 0
    figures: dict[str, Callable[[NDArray[np.int64]], float]] = {
        "spearman": lambda rows: spearman(scores[rows], labels[rows]),
        "kendall": lambda rows: kendall(scores[rows], labels[rows]),
        "auc": lambda rows: auc(scores[rows], good[rows]),
        "calibration_slope": lambda rows: calibration_slope(scores[rows], labels[rows]),
        "calibration_error": lambda rows: calibration_error(scores[rows], labels[rows]),
    }
    if generators is not None:
        generator = np.asarray(generators)[known]
        residuals = [centred(values, prompt, generator) for values in (scores, labels)]
        figures["spearman_centred"] = lambda rows: _spearman_of(residuals[0][rows], residuals[1][rows])
    first, second = np.nonzero(np.triu(prompt[:, None] == prompt[None], 1))
    result = _figures(figures, prompt, resamples, seed)
    gaps = [values[first] - values[second] for values in (scores, labels)]
    pairs = {"pair_accuracy": lambda rows: pair_accuracy(gaps[0][rows], gaps[1][rows])}
    return result | _figures(pairs, prompt[first], resamples, seed)


def patch_agreement(
    scores: ArrayLike,
    severity: ArrayLike,
    prompts: Sequence[str],
    defective: float = 0.0,
    resamples: int = 300,
    seed: int = 0,
) -> dict[str, Figure]:
    """Agreement of patch scores with how damaged each patch is.

    Args:
        scores: [N, P], high is good.
        severity: [N, P], 0 is sound; patches that are NaN do not count.
        prompts: of each clip, or the clip itself; the unit of the bootstrap.
        defective: patches of a greater severity are the positives of the AUC.
        resamples: draws of the bootstrap.
        seed: of the draws.

    Returns:
        spearman (of score and -severity) and auc over all patches, and both within clips: the mean over the clips in
        which they are defined, blind to which clip is the worse.
    """
    scores, severity = (np.asarray(values, dtype=float).reshape(len(prompts), -1) for values in (scores, severity))
    scores = np.where(np.isnan(severity), np.nan, scores)
    known = ~np.isnan(severity)
    _, prompt = np.unique(np.asarray(prompts), return_inverse=True)
    clips = list(zip(scores, severity, known, strict=True))
    within = {
        "spearman_within": np.array([spearman(score[k], -damage[k]) for score, damage, k in clips]),
        "auc_within": np.array([auc(-score[k], damage[k] > defective) for score, damage, k in clips]),
    }

    def pooled(statistic: Callable[..., float]) -> Callable[[NDArray[np.int64]], float]:
        return lambda rows: statistic(-scores[rows][known[rows]], severity[rows][known[rows]])

    figures = {
        "spearman": pooled(spearman),
        "auc": pooled(lambda score, damage: auc(score, damage > defective)),
    }
    for name, values in within.items():
        figures[name] = lambda rows, values=values: _mean(values[rows])
    return _figures(figures, prompt, resamples, seed)


def rater_ceiling(ratings: ArrayLike, prompts: Sequence[str], resamples: int = 1000, seed: int = 0) -> Figure:
    """How far people agree: the mean over raters of the Spearman between one and the mean of the others.

    Args:
        ratings: [N, R], NaN where a rater gave none.
        prompts: of each clip; the unit of the bootstrap.
        resamples: draws of the bootstrap.
        seed: of the draws.
    """
    ratings = np.asarray(ratings, dtype=float)
    _, prompt = np.unique(np.asarray(prompts), return_inverse=True)

    def ceiling(rows: NDArray[np.int64]) -> float:
        part = ratings[rows]
        values = []
        for rater in range(part.shape[1]):
            others = np.delete(part, rater, axis=1)
            known = ~np.isnan(part[:, rater]) & ~np.isnan(others).all(axis=1)
            values.append(spearman(part[known, rater], np.nanmean(others[known], axis=1)))
        return _mean(np.array(values))

    return _figures({"ceiling": ceiling}, prompt, resamples, seed)["ceiling"]


def ridge_folds(
    features: ArrayLike, labels: ArrayLike, folds: ArrayLike, strengths: Sequence[float] = (1, 10, 100, 1000)
) -> NDArray[np.float64]:
    """Ridge regression whose prediction of a row never saw the row's fold; the penalty is chosen within the rest.

    Args:
        features: [N, K], standardised here by the training rows.
        labels: [N] or [N, D].
        folds: [N] fold of each row.
        strengths: penalties to choose from by the error on one inner fold after another.
    """
    features, folds = np.asarray(features, dtype=float), np.asarray(folds)
    targets = np.asarray(labels, dtype=float).reshape(len(features), -1)
    result = np.empty_like(targets)
    for fold in np.unique(folds):
        train, test = folds != fold, folds == fold
        errors = np.zeros(len(strengths))
        for inner in np.unique(folds[train]):
            fitted, left = train & (folds != inner), train & (folds == inner)
            for index, predicted in enumerate(_ridge(features[fitted], targets[fitted], features[left], strengths)):
                errors[index] += ((predicted - targets[left]) ** 2).sum()
        best = strengths[int(errors.argmin())]
        (result[test],) = _ridge(features[train], targets[train], features[test], [best])
    return result.reshape(np.shape(labels))


def _ridge(
    features: NDArray[np.float64], labels: NDArray[np.float64], others: NDArray[np.float64], strengths: Sequence[float]
) -> list[NDArray[np.float64]]:
    centre, scale = features.mean(axis=0), features.std(axis=0) + 1e-6
    left, values, right = np.linalg.svd((features - centre) / scale, full_matrices=False)
    projected = left.T @ (labels - labels.mean(axis=0))
    basis = (others - centre) / scale @ right.T
    return [
        basis @ ((values / (values**2 + strength))[:, None] * projected) + labels.mean(axis=0) for strength in strengths
    ]


def _figures(
    statistics: Mapping[str, Callable[[NDArray[np.int64]], float]],
    units: NDArray[np.int64],
    resamples: int,
    seed: int,
) -> dict[str, Figure]:
    """Each statistic of the rows, and its interval when the units that rows belong to are drawn anew."""
    names = np.unique(units)
    members = [np.flatnonzero(units == name) for name in names]
    result = {}
    for name, statistic in statistics.items():
        if not members:
            result[name] = Figure(*[float("nan")] * 3)
            continue
        value = statistic(np.arange(len(units)))
        interval = bootstrap_interval(
            lambda drawn, statistic=statistic: statistic(np.concatenate([members[unit] for unit in drawn])),
            len(members),
            resamples,
            seed,
        )
        result[name] = Figure(value, *interval)
    return result


def _mean(values: NDArray[np.float64]) -> float:
    return float(np.nanmean(values)) if not np.isnan(values).all() else float("nan")


def _spearman_of(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """Spearman of residuals: rounding left over from centring must not be ranked as if it were a score."""
    return spearman(np.round(x, 9), np.round(y, 9))
