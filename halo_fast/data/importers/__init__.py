"""Scores, marks and preferences of people, in the layouts they are published in, recognised by their content.

Scores are given on the rubric's scale from 1 to 5, whatever the scale of the source.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from halo_fast.data.importers import marks, preferences, ratings
from halo_fast.data.importers.base import PatchScores, Preference, Ratings, load_frames
from halo_fast.data.importers.marks import pool_marks
from halo_fast.data.records import SUFFIXES, Row, exists, read_records
from halo_fast.errors import UserError

__all__ = [
    "PatchScores",
    "Preference",
    "Ratings",
    "load_frames",
    "pool_marks",
    "read_human",
    "read_preferences",
    "read_ratings",
]

_FOLDERS: dict[tuple[str, ...], Callable[[Path], Ratings | list[Preference]]] = {
    **ratings.FOLDERS,
    **marks.FOLDERS,
    **preferences.FOLDERS,
}
_RATED = {**marks.TABLES, **ratings.TABLES}
_OPTIONAL = (
    *("generator", "rater", "mask", "VQ", "MQ", "TA", "Overall"),
    *("temporal consistency", "dynamic degree", "text-to-video alignment", "factual consistency"),
    *("misalignment_score", "aesthetics_score", "overall_score"),
)
# written in capitals, or with blanks around it, a column is the same
_COLUMNS = {
    name.casefold(): name for name in (*(name for key in (*_RATED, *preferences.TABLES) for name in key), *_OPTIONAL)
}
_KNOWN = (
    "a folder like FETV's (clips.csv, npz), of local defects (manifest.csv, npz), like VideoDPO's (metadata.json,"
    " pair.json), or a csv, tsv, json, jsonl or parquet table with columns video and prompt and scores, id and"
    " 'text prompt' (VideoFeedback), img_path and total_score (EvalMuse), filename and artifact_score (RichHF),"
    " path_A and path_B (VideoAlign), pos_video_path (Local-DPO), chosen and rejected (TRL, UnifiedReward) or jpg_0 and"
    " label_0 (Pick-a-Pic)"
)


def read_human(path: Path | str) -> Ratings | list[Preference]:
    """Ratings or preferences, whichever the file or folder holds.

    Raises:
        UserError: neither, naming the known layouts; a bad row, naming its number.
    """
    path = Path(path)
    if not exists(path):
        raise UserError(f"{path}: does not exist; expected {_KNOWN}")
    if path.is_dir():
        for names, read_folder in _FOLDERS.items():
            if all(any(path.glob(name)) for name in names):
                return read_folder(path)
        path = _only_table(path)
    rows = [_renamed(row) for row in read_records(path)]
    if not rows:
        raise UserError(f"{path}: expected at least one row, got none")
    columns = {column for row in rows for column in row}
    for needed, read_row in preferences.TABLES.items():
        if columns >= set(needed):
            _require_columns(path, rows, needed)
            return [
                preferences.check_preference(path, read_row(path, number, row)) for number, row in enumerate(rows, 1)
            ]
    for needed, read_table in _RATED.items():
        if columns >= set(needed):
            return read_table(path, rows)
    raise UserError(f"{path}: expected {_KNOWN}; got columns {', '.join(map(repr, rows[0]))}")


def read_ratings(path: Path | str) -> Ratings:
    """Ratings of clips, as `read_human` reads them.

    Raises:
        UserError: the file holds preferences, or as `read_human`.
    """
    found = read_human(path)
    if not isinstance(found, Ratings):
        raise UserError(f"{path}: expected scores of clips, got preferences between two")
    return found


def read_preferences(path: Path | str) -> list[Preference]:
    """Preferences between clips, as `read_human` reads them.

    Raises:
        UserError: the file holds ratings, or as `read_human`.
    """
    found = read_human(path)
    if isinstance(found, Ratings):
        raise UserError(f"{path}: expected preferences between two clips, got scores of single ones")
    return found


def _only_table(folder: Path) -> Path:
    tables = sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES and file.name[0] != ".")
    if len(tables) != 1:
        raise UserError(f"{folder}: expected {_KNOWN}; got a folder with {len(tables)} tables; name one of them")
    return tables[0]


def _renamed(row: Row) -> Row:
    """The row under the columns' known names."""
    return {_COLUMNS.get(str(name).strip().casefold(), str(name).strip()): value for name, value in row.items()}


def _require_columns(path: Path, rows: Sequence[Row], needed: Sequence[str]) -> None:
    for number, row in enumerate(rows, 1):
        missing = [name for name in needed if name not in row]
        if missing:
            raise UserError(f"{path}: row {number}: expected a column {missing[0]!r} as in other rows")
