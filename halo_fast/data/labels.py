"""Labels of several tables joined into one for each clip."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from halo_fast.data.tables import LabelRow, read_rows

__all__ = ["has_scores", "join_labels"]


def join_labels(tables: Sequence[Path]) -> list[LabelRow]:
    """The usable labels of all tables, one for each clip.

    Args:
        tables: labels.parquet of one or several. Of a clip in several the scores of the first count, and those of the
            next where it has none.
    """
    joined: dict[str, LabelRow] = {}
    for row in (row for table in tables for row in read_rows(table, LabelRow) if row.status == "ok"):
        first = joined.setdefault(row.clip_id, row)
        if first is not row:
            joined[row.clip_id] = replace(
                first, video=_filled(first.video, row.video), patches=_filled(first.patches, row.patches)
            )
    return list(joined.values())


def _filled(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """The scores of two labels; the second's where the first has none."""
    return dict(first) | {name: scores for name, scores in second.items() if not has_scores(first.get(name, math.nan))}


def has_scores(scores: float | Sequence[float]) -> bool:
    """Whether there is any score."""
    return not bool(np.isnan(scores).all())
