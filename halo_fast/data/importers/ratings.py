"""Scores of single clips, in the layouts they are published in."""

import logging
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from halo_fast.data.importers.base import PatchScores, Ratings, read_array, read_scores, rescaled_score
from halo_fast.data.records import Row, exists, is_empty, read_records, required_text
from halo_fast.errors import UserError

__all__ = ["FETV_COLUMNS", "FOLDERS", "TABLES", "fetv_scores"]

logger = logging.getLogger(__name__)

_FETV = {"static_quality": "static", "temporal_quality": "temporal", "text_alignment": "align"}
FETV_COLUMNS = tuple(f"{short}_h0" for short in _FETV.values())
"""Columns by which FETV's table of ratings is known."""

_MOST_SCORES = 100_000_000

# columns of a plain table that are numbers but no scores
_NO_SCORES = {
    *("", "id", "index", "row", "seed", "split", "fps", "frames", "num_frames", "width", "height", "duration", "size"),
    *("steps", "guidance", "guidance_scale", "timestamp", "time", "candidate", "prompt_id", "clip_id"),
}


def _fetv(folder: Path) -> Ratings:
    """Folder with clips.csv, row by row three raters' scores, and an npz of the clips (FETV).

    If patch_labels.csv is there, a vision-language model scored the patches of the clips in videos/, whose names begin
    with the row's number.
    """
    path = folder / "clips.csv"
    rows = read_records(path)
    missing = [name for name in ("prompt", "model") if rows and name not in rows[0]]
    if missing or (rows and not rows[0].keys() >= set(FETV_COLUMNS)):
        raise UserError(f"{path}: expected columns prompt, model, {', '.join(FETV_COLUMNS)}, ... as FETV has")
    videos = read_array(folder, "video", 5)
    if len(videos) != len(rows):
        raise UserError(f"{path}: expected a row for each of {len(videos)} clips, got {len(rows)}")
    return Ratings(
        "FETV",
        list(torch.from_numpy(videos)),
        [row["prompt"] for row in rows],
        fetv_scores(path, rows),
        [row["model"] for row in rows],
        patches=_fetv_patches(folder, len(rows)) if (folder / "patch_labels.csv").exists() else None,
    )


def _fetv_patches(folder: Path, count: int) -> PatchScores:
    """The patch scores of `count` clips: rows of row, pass, half, patch_row, patch_column, score.

    Raises:
        UserError: a missing column or clip, no number, a patch that a pass scored twice.
    """
    path = folder / "patch_labels.csv"
    columns = ("row", "pass", "half", "patch_row", "patch_column")
    named = {file: re.match(r"\d+(?=_)", file.name) for file in sorted((folder / "videos").glob("*.mp4"))}
    files = {int(number[0]): file for file, number in named.items() if number}
    missing = [row for row in range(count) if row not in files]
    if missing:
        raise UserError(f"{folder / 'videos'}: expected a clip {missing[0]:03d}_*.mp4, got none; put it there")
    found: dict[tuple[int, ...], float] = {}
    for number, row in enumerate(read_records(path), 1):
        place = f"{path}: row {number}"
        try:
            key = tuple(int(row[name]) for name in columns)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{place}: expected whole numbers in {', '.join(columns)}, got {dict(row)}") from error
        if not (0 <= key[0] < count and min(key) >= 0):
            raise UserError(f"{place}: expected a clip from 0 to {count - 1} and places from 0 on, got {key}")
        if key in found:
            raise UserError(f"{place}: pass {key[1]} scores this patch twice; keep one row")
        found[key] = rescaled_score(row.get("score"), 1, 5, "score", place)
    if not found:
        raise UserError(f"{path}: expected at least one row, got none")
    passes = {name: index for index, name in enumerate(sorted({key[1] for key in found}))}
    grid = [1 + max(key[axis] for key in found) for axis in (2, 3, 4)]
    if count * len(passes) * math.prod(grid) > _MOST_SCORES:
        raise UserError(f"{path}: expected patches of one grid, got numbers up to {[side - 1 for side in grid]}")
    scores = np.full((count, len(passes), *grid), np.nan)
    for (row_number, name, *patch), score in found.items():
        scores[(row_number, passes[name], *patch)] = score
    return PatchScores([files[row] for row in range(count)], scores, "a vision-language model")


def fetv_scores(path: Path, rows: Sequence[Row]) -> dict[str, NDArray[np.float64]]:
    """The scores in FETV's table, three dimensions by several raters; see `Ratings.scores`."""
    columns = {
        name: sorted(column for column in (rows[0] if rows else ()) if column.startswith(f"{short}_h"))
        for name, short in _FETV.items()
    }
    return read_scores(path, rows, columns, 1, 5)


def _video_feedback(path: Path, rows: Sequence[Row]) -> Ratings:
    """Table with 'text prompt', 'images' (names of frames) and five scores from 1 to 4 (VideoFeedback)."""
    columns = {
        "visual_quality": ["visual quality"],
        "temporal_consistency": ["temporal consistency"],
        "dynamic_degree": ["dynamic degree"],
        "text_alignment": ["text-to-video alignment"],
        "factual_consistency": ["factual consistency"],
    }
    clips = []
    for number, row in enumerate(rows, 1):
        missing = [name for name in ("id", "text prompt", *(name for (name,) in columns.values())) if name not in row]
        if missing:
            raise UserError(f"{path}: row {number}: expected VideoFeedback's five scores, got no {', '.join(missing)}")
        # frames lie in a folder named after the clip, as the published archives have them
        found = [path.parent / folder / str(row["id"]) for folder in ("images", "frames", ".")]
        found += [path.parent / folder / f"{row['id']}.mp4" for folder in ("videos", ".")]
        existing = [file for file in found if exists(file)]
        if not existing:
            raise UserError(f"{path}: row {number}: no frames of {row['id']!r}; expected {found[0]} or {found[-1]}")
        clips.append(existing[0])
    prompts = [required_text(row, "text prompt", f"{path}: row {number}") for number, row in enumerate(rows, 1)]
    return Ratings("VideoFeedback", clips, prompts, read_scores(path, rows, columns, 1, 4))


def _eval_muse(path: Path, rows: Sequence[Row]) -> Ratings:
    """Table with img_path, prompt and total_score, a list of raters' scores from 1 to 5 (EvalMuse)."""
    clips: list[Path] = []
    given: list[list[float]] = []
    for number, row in enumerate(rows, 1):
        place = f"{path}: row {number}"
        name = required_text(row, "img_path", place)
        found = [path.parent / folder / name for folder in ("images", ".")]
        existing = [file for file in found if exists(file)]
        if not existing:
            raise UserError(f"{place}: no picture {name!r}; expected {found[0]} or {found[1]}")
        clips.append(existing[0])
        scores = row.get("total_score")
        listed = scores if isinstance(scores, list | tuple | np.ndarray) else [scores]
        given.append([rescaled_score(score, 1, 5, "total_score", place) for score in listed])
    table = np.full((len(rows), max(map(len, given)) or 1), np.nan)
    for number, scores_of_row in enumerate(given):
        table[number, : len(scores_of_row)] = scores_of_row
    prompts = [required_text(row, "prompt", f"{path}: row {number}") for number, row in enumerate(rows, 1)]
    return Ratings("EvalMuse", clips, prompts, {"text_alignment": table})


def _plain(path: Path, rows: Sequence[Row]) -> Ratings:
    """Table with video, prompt and a column of scores from 1 to 5 for each dimension; generator and rater if known."""
    dimensions = _dimensions(path, rows)
    files = [_clip_file(path, number, row) for number, row in enumerate(rows, 1)]
    clips = list(dict.fromkeys(files))
    prompts, generators = (_of_each_clip(path, files, rows, column) for column in ("prompt", "generator"))
    return Ratings(
        "table",
        clips,
        [prompts[clip] for clip in clips],
        _score_tables(path, files, rows, dimensions),
        [generators[clip] for clip in clips] if "generator" in rows[0] else None,
    )


def _dimensions(path: Path, rows: Sequence[Row]) -> list[str]:
    """The columns that hold scores; every row must have them."""
    described = {"video", "prompt", "generator", "rater"}
    columns = list(dict.fromkeys(column for row in rows for column in row))
    others = [column for column in columns if column not in described]
    dimensions = [name for name in others if not _is_index(name) and any(_is_number(row.get(name)) for row in rows)]
    ignored = [name for name in others if name not in dimensions]
    if not dimensions:
        raise UserError(f"{path}: expected a column of scores from 1 to 5 beside video and prompt, got none")
    if ignored:
        logger.info("%s: columns that are no scores are left out: %s", path, ", ".join(map(repr, ignored)))
    for number, row in enumerate(rows, 1):
        missing = [name for name in ("video", "prompt", *dimensions) if name not in row]
        if missing:
            raise UserError(
                f"{path}: row {number}: expected a column {missing[0]!r} as in other rows; null where not scored"
            )
    return dimensions


def _is_index(name: str) -> bool:
    return name.casefold() in _NO_SCORES or name.casefold().startswith(("unnamed:", "__index"))


def _is_number(value: Any) -> bool:
    if is_empty(value):
        return False
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return True


def _clip_file(path: Path, number: int, row: Row) -> Path:
    """The clip of a row, under one name however it is written."""
    place = f"{path}: row {number}"
    file = path.parent / required_text(row, "video", place)
    if not exists(file):
        raise UserError(f"{place}: {file} does not exist; put the clip there or leave the row out")
    return file.resolve()


def _of_each_clip(path: Path, files: Sequence[Path], rows: Sequence[Row], column: str) -> dict[Path, str]:
    """What a column says of each clip, the same in all of its rows."""
    found: dict[Path, str] = {}
    for number, (file, row) in enumerate(zip(files, rows, strict=True), 1):
        if column not in row and column != "prompt":
            continue
        value = required_text(row, column, f"{path}: row {number}")
        if found.setdefault(file, value) != value:
            raise UserError(f"{path}: row {number}: another {column} for {file.name} than before")
    return found


def _score_tables(
    path: Path, files: Sequence[Path], rows: Sequence[Row], dimensions: Sequence[str]
) -> dict[str, NDArray[np.float64]]:
    """For each dimension the scores [clips, raters]."""
    clips, raters = (
        {name: index for index, name in enumerate(dict.fromkeys(names))}
        for names in (files, [str(row.get("rater", "")) for row in rows])
    )
    scores = {name: np.full((len(clips), len(raters)), np.nan) for name in dimensions}
    taken: dict[tuple[int, int], int] = {}
    for number, (file, row) in enumerate(zip(files, rows, strict=True), 1):
        cell = clips[file], raters[str(row.get("rater", ""))]
        if taken.setdefault(cell, number) != number:
            raise UserError(
                f"{path}: rows {taken[cell]} and {number} score {file.name} twice; keep one, or name the rater of each"
            )
        for name in dimensions:
            scores[name][cell] = rescaled_score(row[name], 1, 5, name, f"{path}: row {number}")
    return scores


# files of a folder, or columns of a table -> the reader
FOLDERS: dict[tuple[str, ...], Callable[[Path], Ratings]] = {("clips.csv", "*.npz"): _fetv}
TABLES: dict[tuple[str, ...], Callable[[Path, Sequence[Row]], Ratings]] = {
    ("id", "text prompt", "visual quality"): _video_feedback,
    ("img_path", "prompt", "total_score"): _eval_muse,
    ("video", "prompt"): _plain,
}
