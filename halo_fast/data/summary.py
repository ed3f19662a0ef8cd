"""What there is to know of clips, labels and pairs before a day of training: counts, scores, ties, the worst clips."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from halo_fast.data.imports import ImportedRow
from halo_fast.data.sources import LeftOutRow
from halo_fast.data.tables import ClipRow, LabelRow, PairRow

__all__ = ["Section", "format_section", "summarise"]

_WORST = 10
_WIDEST = 72  # characters of a cell in the terminal
_QUANTILES = (0, 0.25, 0.5, 0.75, 1)


@dataclass(frozen=True)
class Section:
    """A titled table of texts; the first column names the row."""

    title: str
    columns: list[str]
    rows: list[list[str]]


def format_section(section: Section) -> str:
    """A section as a title and aligned columns."""
    rows = [section.columns, *section.rows] if any(section.columns) else section.rows
    cells = [[cell if len(cell) <= _WIDEST else f"{cell[: _WIDEST - 3]}..." for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    return "\n".join([section.title, *(f"  {line}" for line in lines)])


def summarise(
    clips: Sequence[ClipRow],
    labels: Sequence[LabelRow],
    pairs: Sequence[PairRow],
    imported: Sequence[ImportedRow],
    left_out: Sequence[LeftOutRow],
) -> list[Section]:
    """The sections of a summary; those of which there is nothing are left out.

    Args:
        clips: all clips.
        labels: of the clips.
        pairs: of the clips.
        imported: those of the clips that were imported.
        left_out: by the import.
    """
    sections = [_counts(clips, labels, pairs, left_out)]
    if imported:
        sections += [
            _tally("sources: frames x height x width", [_size(row) for row in imported]),
            _tally("sources: frames a second", [f"{row.source_fps:.4g}" for row in imported]),
            _tally("what the import did", [row.changes or "nothing" for row in imported]),
        ]
    if left_out:
        sections.append(_tally("left out", [row.reason for row in left_out]))
    if labels:
        sections += [_scores(labels), *_patch_averages(labels), _worst(clips, labels)]
    if pairs:
        sections.append(_margins(pairs))
    return [section for section in sections if section.rows]


def _size(row: ImportedRow) -> str:
    return f"{row.source_frames} x {row.source_height} x {row.source_width}"


def _counts(
    clips: Sequence[ClipRow], labels: Sequence[LabelRow], pairs: Sequence[PairRow], left_out: Sequence[LeftOutRow]
) -> Section:
    prompts = Counter(clip.prompt for clip in clips)
    rows = [
        ["clips", str(len(clips))],
        ["prompts", str(len(prompts))],
        ["clips a prompt", f"{min(prompts.values())} to {max(prompts.values())}" if prompts else "0"],
        ["clips with labels", str(len(labels))],
        ["pairs", str(len(pairs))],
        ["left out", str(len(left_out))],
    ]
    return Section("counts", ["", ""], rows)


def _tally(title: str, values: Sequence[str]) -> Section:
    """How often each value occurs, the most frequent first."""
    counted = Counter(values).most_common()
    rows = [[value, str(count)] for value, count in counted[:_WORST]]
    if len(counted) > _WORST:
        rows.append([f"{len(counted) - _WORST} others", str(sum(count for _, count in counted[_WORST:]))])
    return Section(title, ["", "clips"], rows)


def _scores(labels: Sequence[LabelRow]) -> Section:
    """Number, mean, deviation and extremes of the scores of each dimension."""
    names = dict.fromkeys(name for label in labels for name in label.video)
    columns = {name: np.array([label.video.get(name, math.nan) for label in labels], float) for name in names}
    for name in dict.fromkeys(name for label in labels for name in label.patches):
        scores = [label.patches[name] for label in labels if name in label.patches]
        columns[f"{name} of patches"] = np.concatenate([np.asarray(one, float) for one in scores])
    rows = []
    for name, values in columns.items():
        known = values[~np.isnan(values)]
        if len(known):
            figures = known.mean(), known.std(), known.min(), known.max()
            rows.append([name, str(len(known)), *(f"{figure:.2f}" for figure in figures)])
    return Section("scores", ["", "scored", "mean", "deviation", "least", "most"], rows)


def _patch_averages(labels: Sequence[LabelRow]) -> list[Section]:
    """The mean score at each place of the grid, a section for each time; labels of another grid do not count."""
    grid = tuple(labels[0].grid)
    alike = [label.patches["quality"] for label in labels if tuple(label.grid) == grid and "quality" in label.patches]
    scores = np.array(alike, float).reshape(-1, *grid)
    if np.isnan(scores).all():
        return []
    means = _nanmean(scores)
    return [
        Section(
            f"mean quality of patches, time {time + 1} of {grid[0]}",
            ["row", *(f"column {column + 1}" for column in range(grid[2]))],
            [[str(row + 1), *(f"{value:.2f}" for value in means[time, row])] for row in range(grid[1])],
        )
        for time in range(grid[0])
    ]


def _nanmean(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """The mean over the first axis, NaN left out; NaN where nothing is known, without a warning."""
    known = ~np.isnan(scores)
    return np.where(known, scores, 0).sum(axis=0) / np.where(known.any(axis=0), known.sum(axis=0), np.nan)


def _worst(clips: Sequence[ClipRow], labels: Sequence[LabelRow]) -> Section:
    """The clips with the least mean of all their scores, video dimensions and patches counting one each."""
    prompts = {clip.clip_id: clip.prompt for clip in clips}
    means = []
    for label in labels:
        groups = [[score] for score in label.video.values()] + [list(scores) for scores in label.patches.values()]
        known = [np.array(group)[~np.isnan(group)] for group in groups]
        values = [group.mean() for group in known if len(group)]
        if values:
            means.append((float(np.mean(values)), label.clip_id))
    rows = [[clip, f"{mean:.2f}", prompts.get(clip, "")] for mean, clip in sorted(means)[:_WORST]]
    return Section("worst clips", ["clip", "mean score", "prompt"], rows)


def _margins(pairs: Sequence[PairRow]) -> Section:
    """Margins and ties of the pairs."""
    video = np.abs([pair.video_margin for pair in pairs])
    patches = np.concatenate(
        [np.abs(np.subtract(pair.patch_rewards_a, pair.patch_rewards_b, dtype=float)) for pair in pairs]
    )
    rows = []
    for name, margins in (("videos", video), ("patches", patches)):
        known = margins[~np.isnan(margins)]
        figures = [f"{value:.2f}" for value in np.quantile(known, _QUANTILES)] if len(known) else ["-"] * 5
        rows.append(
            [name, f"{len(known)} of {len(margins)}", f"{(known == 0).mean():.0%}" if len(known) else "-", *figures]
        )
    return Section("margins of pairs", ["", "labelled", "equal", "least", "25%", "median", "75%", "most"], rows)
