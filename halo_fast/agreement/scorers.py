"""Two who scored the same clips: teachers, people, reward models."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from halo_fast.agreement.figures import patch_agreement, video_agreement
from halo_fast.agreement.tables import Table

__all__ = ["Scores", "compare_scorers"]

Scores = Mapping[str, NDArray[np.float64]]
"""Dimension -> scores from 1 to 5: [N] of videos, [N, P] of patches; NaN is not scored."""

_BEST = 5
_POINT = 1.0  # a patch further than this below the best counts as damaged


def compare_scorers(
    judged: Scores, truth: Scores, prompts: Sequence[str], chosen: NDArray[np.bool_], resamples: int
) -> Table:
    """Agreement on the chosen clips that both scored, a row for each dimension of both.

    Args:
        judged: the scores in question.
        truth: the scores that count as true.
        prompts: of the N clips; the unit of the bootstrap.
        chosen: bool [N].
        resamples: draws of the bootstrap.
    """
    table: Table = {}
    for name in judged:
        if name not in truth:
            continue
        x, y = (np.where(np.isnan(judged[name] + truth[name]), np.nan, scores[name]) for scores in (judged, truth))
        both = np.flatnonzero(~np.isnan(x.reshape(len(x), -1)).all(axis=1) & chosen)
        kept = [prompts[row] for row in both.tolist()]
        if x.ndim == 2 and len(both):
            table[f"patch {name}"] = patch_agreement(x[both], _BEST - y[both], kept, _POINT, resamples)
        elif len(both) > 1:
            table[name] = video_agreement(x[both], y[both], kept, resamples=resamples)
    return table
