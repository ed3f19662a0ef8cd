"""How far two sets of scores agree: rank figures, pairs with ties, calibration, with intervals over prompts.

Plain functions of arrays. `video_agreement`, `patch_agreement` and `pair_agreement` give every figure an interval from
a bootstrap over prompts.
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
    "mean_over",
    "pair_accuracy",
    "pair_agreement",
    "patch_agreement",
    "patch_figures",
    "pearson",
    "rater_ceiling",
    "spearman",
    "video_agreement",
]

_BINS = 10

Statistic = Callable[[NDArray[np.int64]], float]
"""A figure of the rows with the given indices, which may repeat."""


class Figure(NamedTuple):
    """A figure and its 95% interval from a bootstrap over prompts; NaN where not defined, as of a single prompt."""

    value: float
    low: float
    high: float


def bootstrap_interval(
    statistic: Statistic, count: int, resamples: int, seed: int, level: float = 0.95
) -> tuple[float, float]:
    """Percentile bootstrap interval (Efron, 1979) of a statistic of `count` units.

    Args:
        statistic: its value on the units with the given indices, [count] with repetitions.
        count: units; here prompts, since the clips and patches of one prompt are not independent.
        resamples: draws; those on which the statistic is not defined (NaN) are left out.
        seed: of the draws.
        level: share of the resampled values inside the interval.

    Returns:
        low, high; NaN for a single unit, which says nothing of how units differ.
    """
    if count < 2:
        return float("nan"), float("nan")
    rng = np.random.default_rng(seed)
    values = np.array([statistic(rng.integers(count, size=count)) for _ in range(resamples)])
    if np.isnan(values).all():
        return float("nan"), float("nan")
    low, high = np.nanquantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def spearman(x: ArrayLike, y: ArrayLike) -> float:
    """Rank correlation of two arrays, flattened; ties share their mean rank. NaN if either is constant."""
    from scipy.stats import rankdata

    return pearson(*(rankdata(np.asarray(values).ravel()) for values in (x, y)))


def pearson(x: ArrayLike, y: ArrayLike) -> float:
    """Linear correlation of two arrays, flattened; NaN if either is constant."""
    centred = [values - values.mean() for values in (np.asarray(one, dtype=float).ravel() for one in (x, y))]
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

    chosen = np.asarray(positive, dtype=bool).ravel()
    count = chosen.sum()
    if count in (0, chosen.size):
        return float("nan")
    ranks = rankdata(np.asarray(scores).ravel())
    return float((ranks[chosen].sum() - count * (count + 1) / 2) / (count * (chosen.size - count)))


def pair_accuracy(score_gaps: ArrayLike, label_gaps: ArrayLike) -> float:
    """Share of pairs judged like the label, ties included, at the tie threshold that is best for these scores.

    acc(epsilon) = mean[ label tie and |gap| <= epsilon, or sign(gap) = sign(label) and |gap| > epsilon ], maximised
    over epsilon (Deutsch, Foster and Freitag, "Ties Matter", 2023). Scores that are continuous never tie by themselves.

    Args:
        score_gaps: [K] score of the one minus score of the other.
        label_gaps: [K] likewise of the label; 0 is a tie.

    Returns:
        the share, NaN without pairs. Saying "tie" everywhere gets the share of tied labels: the floor of this figure.

    Raises:
        ValueError: a gap that is NaN.
    """
    gaps, labels = np.asarray(score_gaps, dtype=float), np.asarray(label_gaps, dtype=float)
    _require_known(gaps, "score_gaps")
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
    x, y = np.asarray(scores, dtype=float).ravel(), np.asarray(labels, dtype=float).ravel()
    spread = ((x - x.mean()) ** 2).sum()
    return float(((x - x.mean()) * (y - y.mean())).sum() / spread) if spread > 0 else float("nan")


def calibration_error(scores: ArrayLike, labels: ArrayLike) -> float:
    """Mean distance, in points of the scale, between mean score and mean label over ten bins of equally many scores.

    Equal scores share the bin that the middle one of them falls into, so the order of the rows says nothing.
    """
    x, y = np.asarray(scores, dtype=float).ravel(), np.asarray(labels, dtype=float).ravel()
    _, group, size = np.unique(x, return_inverse=True, return_counts=True)
    middle = size.cumsum() - size + (size - 1) // 2
    parts = np.array_split(np.arange(len(x)), min(_BINS, len(x)))
    number = np.repeat(np.arange(len(parts)), [len(part) for part in parts])[middle][group]
    return float(np.abs(np.bincount(number, x - y)).sum() / len(x))


def centred(values: ArrayLike, *groups: ArrayLike) -> NDArray[np.float64]:
    """What is left of values [N] after the least-squares effects of groupings: the residual of y ~ 1 + g1 + g2 + ...

    Args:
        values: [N].
        groups: for each grouping a label for each value, [N].
    """
    given = np.asarray(values, dtype=float)
    columns = [np.ones((len(given), 1))]
    for group in groups:
        _, index = np.unique(np.asarray(group), return_inverse=True)
        columns.append(np.eye(index.max() + 1)[index])
    design = np.concatenate(columns, axis=1)
    return given - design @ np.linalg.lstsq(design, given, rcond=None)[0]


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
        scores: [N], a number for every clip that has a label.
        labels: [N], from 1 to 5; clips whose label is NaN do not count.
        prompts: of each clip; the unit of the bootstrap.
        generators: the model that made each clip; with them, spearman_centred is given.
        resamples: draws of the bootstrap.
        seed: of the draws.

    Returns:
        spearman, kendall (tau-b), pair_accuracy (of the pairs that share a prompt, ties included), auc (of labels above
        the median), calibration_slope, calibration_error, and spearman_centred: what is left when prompt and generator
        means are removed from both sides. A score that only recognises the prompt or the generator has none of it.

    Raises:
        ValueError: the score of a labelled clip is NaN; left out, it would flatter who failed on the hard clips.
    """
    x, y = np.asarray(scores, dtype=float), np.asarray(labels, dtype=float)
    known = ~np.isnan(y)
    x, y = x[known], y[known]
    _require_known(x, "scores of labelled clips")
    prompt = _numbered(np.asarray(prompts)[known])
    good = y > np.median(y) if len(y) else y > 0
    figures: dict[str, Statistic] = {
        "spearman": lambda rows: spearman(x[rows], y[rows]),
        "kendall": lambda rows: kendall(x[rows], y[rows]),
        "auc": lambda rows: auc(x[rows], good[rows]),
        "calibration_slope": lambda rows: calibration_slope(x[rows], y[rows]),
        "calibration_error": lambda rows: calibration_error(x[rows], y[rows]),
    }
    if generators is not None:
        # rounding left over from centring must not be ranked as if it were a score
        left = [centred(values, prompt, np.asarray(generators)[known]).round(9) for values in (x, y)]
        figures["spearman_centred"] = lambda rows: spearman(left[0][rows], left[1][rows])
    first, second = np.nonzero(np.triu(prompt[:, None] == prompt[None], 1))
    gaps = [values[first] - values[second] for values in (x, y)]
    pairs: dict[str, Statistic] = {"pair_accuracy": lambda rows: pair_accuracy(gaps[0][rows], gaps[1][rows])}
    return _figures(figures, prompt, resamples, seed) | _figures(pairs, prompt[first], resamples, seed)


def pair_agreement(
    score_gaps: ArrayLike, label_gaps: ArrayLike, prompts: Sequence[str], resamples: int = 1000, seed: int = 0
) -> dict[str, Figure]:
    """Agreement of a score with preferences between two clips.

    Args:
        score_gaps: [K] score of the one minus score of the other.
        label_gaps: [K] likewise of the label; 0 is a tie; pairs whose label is NaN do not count.
        prompts: of each pair; the unit of the bootstrap.
        resamples: draws of the bootstrap.
        seed: of the draws.

    Returns:
        pair_accuracy, ties included, and without_ties: the share of untied pairs that are ordered like the label.

    Raises:
        ValueError: a gap of a labelled pair is NaN.
    """
    known = ~np.isnan(np.asarray(label_gaps, dtype=float))
    gaps, labels = (np.asarray(values, dtype=float)[known] for values in (score_gaps, label_gaps))
    _require_known(gaps, "score_gaps")
    right = np.where(labels == 0, np.nan, np.sign(gaps) == np.sign(labels))
    figures: dict[str, Statistic] = {
        "pair_accuracy": lambda rows: pair_accuracy(gaps[rows], labels[rows]),
        "without_ties": lambda rows: _mean(right[rows]),
    }
    return _figures(figures, _numbered(np.asarray(prompts)[known]), resamples, seed)


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

    Raises:
        ValueError: the score of a patch whose severity is known is NaN.
    """
    x, y = (np.asarray(values, dtype=float).reshape(len(prompts), -1) for values in (scores, severity))
    known = ~np.isnan(y)
    _require_known(x[known], "scores of labelled patches")
    clips = list(zip(-x, y, known, strict=True))
    ranks = np.array([spearman(score[k], damage[k]) for score, damage, k in clips])
    areas = np.array([auc(score[k], damage[k] > defective) for score, damage, k in clips])
    figures: dict[str, Statistic] = {
        "spearman": lambda rows: spearman(-x[rows][known[rows]], y[rows][known[rows]]),
        "auc": lambda rows: auc(-x[rows][known[rows]], y[rows][known[rows]] > defective),
        "spearman_within": lambda rows: _mean(ranks[rows]),
        "auc_within": lambda rows: _mean(areas[rows]),
    }
    return _figures(figures, _numbered(prompts), resamples, seed)


def patch_figures(
    scores: ArrayLike,
    labels: ArrayLike,
    prompts: Sequence[str],
    folds: ArrayLike,
    bad: float = 2.5,
    resamples: int = 300,
    seed: int = 0,
) -> dict[str, Figure]:
    """Agreement of patch scores with patch labels: over all patches, within clips and across clips.

    Args:
        scores: [N, P], high is good.
        labels: [N, P]; patches that are NaN do not count.
        prompts: of each clip; the unit of the bootstrap.
        folds: [N], fold of each clip, for the threshold of F1 and IoU.
        bad: a patch whose label is at most this is a positive.
        resamples: draws of the bootstrap.
        seed: of the draws.

    Returns:
        srocc and plcc (Spearman, Pearson) over all patches; both within clips: of what is left when its clip's mean is
        taken from both sides; both across clips: of the clips' means. auc of the positives, and auc_within, its mean
        over clips that have both kinds. f1 and iou of calling a patch bad up to the score that has the best F1 on the
        other folds: 2 TP / (2 TP + FP + FN) and TP / (TP + FP + FN).

    Raises:
        ValueError: the score of a labelled patch is NaN.
    """
    x, y = (np.asarray(values, dtype=float).reshape(len(prompts), -1) for values in (scores, labels))
    known = ~np.isnan(y)
    _require_known(x[known], "scores of labelled patches")
    x = np.where(known, x, np.nan)
    positive, found = y <= bad, _found(x, y <= bad, known, np.asarray(folds))
    means = [_clip_means(values) for values in (x, y)]
    # rounding left over from centring must not be ranked as if it were a score
    left = [(values - mean[:, None]).round(9) for values, mean in zip((x, y), means, strict=True)]
    areas = np.array([auc(-a[k], p[k]) for a, p, k in zip(x, positive, known, strict=True)])
    pairs = {"": (x, y, known), "_within": (*left, known), "_across": (*means, known.any(axis=1))}
    figures: dict[str, Statistic] = {
        name + part: _rowwise(correlation, *pair)
        for part, pair in pairs.items()
        for name, correlation in (("srocc", spearman), ("plcc", pearson))
    }
    figures["auc"] = lambda rows: auc(-x[rows][known[rows]], positive[rows][known[rows]])
    figures["auc_within"] = lambda rows: _mean(areas[rows])
    right, either = (found & positive).sum(axis=1), (found | positive).sum(axis=1)
    figures["f1"] = lambda rows: _share(2 * right[rows].sum(), (right + either)[rows].sum())
    figures["iou"] = lambda rows: _share(right[rows].sum(), either[rows].sum())
    return _figures(figures, _numbered(prompts), resamples, seed)


def _rowwise(
    correlation: Callable[[ArrayLike, ArrayLike], float],
    x: NDArray[np.float64],
    y: NDArray[np.float64],
    known: NDArray[np.bool_],
) -> Statistic:
    """A correlation of what is known in given rows of x and y."""
    return lambda rows: correlation(x[rows][known[rows]], y[rows][known[rows]])


def _found(
    scores: NDArray[np.float64], positive: NDArray[np.bool_], known: NDArray[np.bool_], folds: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """The patches [N, P] that score no more than the threshold which has the best F1 on the other folds."""
    found = np.zeros_like(positive)
    for fold in np.unique(folds):
        others = known & (folds != fold)[:, None]
        if (positive & others).any():
            limit = _best_limit(scores[others], positive[others])
            found[folds == fold] = (scores <= limit)[folds == fold]
    return found


def _best_limit(scores: NDArray[np.float64], positive: NDArray[np.bool_]) -> float:
    """The score up to which calling everything positive has the best F1."""
    order = np.argsort(scores, kind="stable")
    ranked, right = scores[order], positive[order].cumsum()
    quality = 2 * right / (np.arange(1, len(ranked) + 1) + right[-1])
    last = np.append(ranked[1:] > ranked[:-1], True)  # a limit cannot part equal scores
    return float(ranked[last][quality[last].argmax()])


def _clip_means(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean of each row, NaN left out; NaN of a row without numbers."""
    known = ~np.isnan(values)
    return np.where(known, values, 0).sum(axis=1) / np.where(known.any(axis=1), known.sum(axis=1), np.nan)


def _share(part: float, whole: float) -> float:
    return float(part / whole) if whole else float("nan")


def rater_ceiling(ratings: ArrayLike, prompts: Sequence[str], resamples: int = 1000, seed: int = 0) -> Figure:
    """How far people agree: the mean over raters of the Spearman between one and the mean of the others.

    Args:
        ratings: [N, R], NaN where a rater gave none.
        prompts: of each clip; the unit of the bootstrap.
        resamples: draws of the bootstrap.
        seed: of the draws.
    """
    given = np.asarray(ratings, dtype=float)

    def ceiling(rows: NDArray[np.int64]) -> float:
        part = given[rows]
        values = []
        for rater in range(part.shape[1]):
            others = np.delete(part, rater, axis=1)
            known = ~np.isnan(part[:, rater]) & ~np.isnan(others).all(axis=1)
            values.append(spearman(part[known, rater], np.nanmean(others[known], axis=1)))
        return _mean(np.array(values))

    return _figures({"ceiling": ceiling}, _numbered(prompts), resamples, seed)["ceiling"]


def mean_over(values: ArrayLike, prompts: Sequence[str], resamples: int = 1000, seed: int = 0) -> Figure:
    """Mean of values [N], NaN left out, with its interval over prompts."""
    given = np.asarray(values, dtype=float)
    return _figures({"mean": lambda rows: _mean(given[rows])}, _numbered(prompts), resamples, seed)["mean"]


def _figures(
    statistics: Mapping[str, Statistic], units: NDArray[np.int64], resamples: int, seed: int
) -> dict[str, Figure]:
    """Each statistic of the rows, and its interval when the units that rows belong to are resampled."""
    members = [np.flatnonzero(units == name) for name in np.unique(units)]
    if not members:
        return {name: Figure(*[float("nan")] * 3) for name in statistics}
    result = {}
    for name, statistic in statistics.items():

        def resampled(drawn: NDArray[np.int64], statistic: Statistic = statistic) -> float:
            return statistic(np.concatenate([members[unit] for unit in drawn]))

        interval = bootstrap_interval(resampled, len(members), resamples, seed)
        result[name] = Figure(statistic(np.arange(len(units))), *interval)
    return result


def _require_known(scores: NDArray[np.float64], name: str) -> None:
    missing = int(np.isnan(scores).sum())
    if missing:
        raise ValueError(f"{name}: expected numbers, got NaN in {missing} of {scores.size}; find out why first")


def _numbered(names: ArrayLike) -> NDArray[np.int64]:
    return np.unique(np.asarray(names), return_inverse=True)[1]


def _mean(values: NDArray[np.float64]) -> float:
    return float(np.nanmean(values)) if not np.isnan(values).all() else float("nan")
