"""What a user brings: folders and tables of clips, scores, preferences, masks, boxes and scores of patches.

`read_source` recognises the layout by its content and gives one `Source`, whatever the layout. docs/data.md lists the
layouts.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from halo_fast.data.clips import natural_order, read_clip, read_frames, read_picture, visible_files
from halo_fast.data.fitting import VideoFormat
from halo_fast.data.importers import Preference, Ratings, read_human
from halo_fast.data.importers.base import load_array, rescaled_score
from halo_fast.data.importers.ratings import FETV_COLUMNS, fetv_scores
from halo_fast.data.records import SUFFIXES, Row, exists, is_empty, read_records, required_text
from halo_fast.errors import UserError

__all__ = [
    "CaptionedClip",
    "ClipDamage",
    "ClipScores",
    "DamageOf",
    "LeftOutRow",
    "Source",
    "damage_of_file",
    "preference_refs",
    "read_source",
]

VIDEOS = (".mp4", ".mkv", ".webm", ".mov", ".avi", ".gif", ".ts", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv", ".ogv")
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")

DamageOf = Callable[[VideoFormat], Callable[[int], NDArray[np.floating]]]
"""Of a clip's own format, a function of the frame's number that gives its damage [Y, X] in [0, 1]; NaN unlabelled."""

# names of a column in tables that users bring -> ours; the first that a table has counts
_ALIASES = {
    "video": ("video", "file_name", "filename", "video_path", "path", "file", "clip"),
    "prompt": ("prompt", "caption", "prompt_en", "text prompt", "gen_caption", "text"),
    "generator": ("generator", "model", "source_model"),
    "mask": ("mask", "mask_path", "heat_map", "heatmap"),
    "rater": ("rater", "pass"),
    "patch_frame": ("patch_frame", "half"),
    "frame": ("frame", "frame_index"),
}
# columns that describe a clip and score nothing
_DESCRIBE = {
    *_ALIASES, "", "id", "index", "row", "seed", "split", "fps", "frames", "num_frames", "height", "width", "duration",
    "size", "steps", "guidance", "guidance_scale", "num_inference_steps", "timestamp", "time", "candidate",
    "prompt_id", "clip_id", "n_frames", "pair_id", "first_frame", "last_frame", "x0", "y0", "x1", "y1",
    "patch_row", "patch_column", "changes", "source", "latents",
}  # fmt: skip
_LONGEST_SIDE = 16384  # frames or pixels
_EXPORTED = {"labeller", "grid", "frame_edges", "row_edges", "column_edges"}
_PUBLISHED = (
    ("path_a", "path_b", "prompt"), ("pos_video_path", "neg_video_path"), ("jpg_0", "jpg_1", "label_0"),
    ("chosen", "rejected"), ("filename", "artifact_score"), ("id", "text prompt", "visual quality"),
    ("img_path", "prompt", "total_score"),
)  # fmt: skip
_KNOWN = (
    "a folder of videos with captions (x.mp4 and x.txt, or metadata.csv), a table with columns video and prompt, "
    "video (or row) and scores, patch_row, patch_column and score, or x0, y0, x1 and y1, or a layout that "
    "`halo reward eval` reads; see docs/data.md"
)


@dataclass(frozen=True)
class CaptionedClip:
    """A clip and its prompt.

    Args:
        ref: by which scores, masks and preferences name the clip.
        clip: its file, its folder of frames, its frames, or an encoded picture.
        prompt: the prompt.
        place: where it is listed, for messages.
        generator: the model that made it; empty if unknown.
        seed: of its noise, if known.
        fps: of frames that have no times of their own, if known.
    """

    ref: str
    clip: Path | Tensor | bytes
    prompt: str
    place: str
    generator: str = ""
    seed: int | None = None
    fps: float | None = None


@dataclass(frozen=True)
class ClipScores:
    """Scores of a clip by one rater, from 1 to 5; `ref` may be the clip's number in its listing, 0 the first."""

    ref: str | int
    scores: Mapping[str, float]
    place: str


@dataclass(frozen=True)
class ClipDamage:
    """Where a clip is damaged; `ref` as in `ClipScores`."""

    ref: str | int
    damage: DamageOf
    place: str


@dataclass(frozen=True)
class LeftOutRow:
    """Something that was not imported, in left_out.parquet.

    Args:
        what: the file or the row.
        reason: why.
    """

    what: str
    reason: str


@dataclass(frozen=True)
class Source:
    """Everything that a source holds.

    Args:
        clips: that are there and have a prompt.
        scores: of clips.
        damage: of clips.
        preferences: each with its place.
        left_out: what is not among them.
        listed: the ref of every clip in the order of the listing, those that are left out too.
    """

    clips: list[CaptionedClip] = field(default_factory=list)
    scores: list[ClipScores] = field(default_factory=list)
    damage: list[ClipDamage] = field(default_factory=list)
    preferences: list[tuple[str, Preference]] = field(default_factory=list)
    left_out: list[LeftOutRow] = field(default_factory=list)
    listed: list[str] = field(default_factory=list)

    def extend(self, other: "Source") -> None:
        """Add what another source holds."""
        for one in fields(self):
            getattr(self, one.name).extend(getattr(other, one.name))

    def name_clips(self, listed: Sequence[str]) -> None:
        """Put refs in the place of the clips' numbers.

        Args:
            listed: the ref of each number.

        Raises:
            UserError: a number beyond them.
        """
        self.scores[:] = [replace(one, ref=_named(one.ref, listed, one.place)) for one in self.scores]
        self.damage[:] = [replace(one, ref=_named(one.ref, listed, one.place)) for one in self.damage]


def _named(ref: str | int, listed: Sequence[str], place: str) -> str:
    """The ref of a clip that may be given by its number."""
    if isinstance(ref, str):
        return ref
    if ref >= len(listed):
        raise UserError(f"{place}: expected a row from 0 to {len(listed) - 1}, got {ref}")
    return listed[ref]


def read_source(path: Path, scores: Sequence[str] | None = None) -> Source:
    """Everything that a folder or table holds; videos are not opened.

    Args:
        path: the folder, the table, or one video.
        scores: names of the columns of tables that hold scores from 1 to 5; None for all numbers that do not describe
            the clip.

    Raises:
        UserError: no known layout, or a row that cannot be meant, with its number.
    """
    found = _read_source(path, scores)
    if found.listed:  # else the numbers are of another source's clips
        found.name_clips(found.listed)
    return found


def _read_source(path: Path, scores: Sequence[str] | None) -> Source:
    """As `read_source`, with clips by their numbers."""
    if not exists(path):
        raise UserError(f"{path}: does not exist; expected {_KNOWN}")
    if path.is_file():
        if path.suffix.lower() in SUFFIXES:
            return _read_table(path, scores)
        return _captioned_files([path])
    files = visible_files(path)
    tables = [file for file in files if file.suffix.lower() in SUFFIXES]
    if any(file.stem == "pair" for file in tables) or any(file.name == "manifest.csv" for file in tables):
        return _from_human(path)
    folders = [file for file in files if file.is_dir() and file.name in ("videos", "clips")]
    if not folders and tables and any(path.glob("*.npz")):
        return _from_human(path)
    # the list of clips comes first, tables that speak of them afterwards
    listed = [file for file in tables if file.stem == "metadata"][:1]
    if not listed and len(tables) == 1 and not folders and not any(map(_is_clip, files)):
        listed = tables
    if listed:
        found = _read_table(listed[0], scores)
    else:
        found = _read_source(folders[0], scores) if folders else _captioned_files(_clips_below(path))
        if not (found.clips or found.left_out or tables):
            raise UserError(f"{path}: holds neither videos nor a table; expected {_KNOWN}")
    for table in tables:
        if table not in listed:
            found.extend(_read_table(table, scores, beside=True))
    return found


def _is_clip(file: Path) -> bool:
    """Whether a path is a video, or a folder of nothing but pictures."""
    if not file.is_dir():
        return file.suffix.lower() in VIDEOS
    inside = visible_files(file)
    return bool(inside) and all(one.suffix.lower() in PICTURES for one in inside)


def _clips_below(folder: Path) -> list[Path]:
    """The videos and folders of frames in a folder and below it, in natural order."""
    if _is_clip(folder):
        return [folder]
    found: list[Path] = []
    for file in visible_files(folder):
        if _is_clip(file):
            found.append(file)
        elif file.is_dir():
            found += _clips_below(file)
    return found


def _captioned_files(files: Iterable[Path]) -> Source:
    """Clips with a text file of the same name beside each."""
    source = Source()
    for file in sorted(files, key=lambda one: [natural_order(Path(part)) for part in one.parts]):
        source.listed.append(_ref(file))
        caption = file.with_name((file.name if file.is_dir() else file.stem) + ".txt")
        try:
            prompt = " ".join(caption.read_text(encoding="utf-8-sig").split())
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "no UTF-8 text"
            source.left_out.append(LeftOutRow(str(file), f"no caption: {caption.name}: {reason}"))
            continue
        if not prompt:
            source.left_out.append(LeftOutRow(str(file), f"no caption: {caption.name} is empty"))
            continue
        source.clips.append(CaptionedClip(_ref(file), file, prompt, str(file)))
    return source


def _ref(file: Path) -> str:
    """One name for a file, however it is written."""
    return str(file.resolve())


def _read_table(path: Path, scores: Sequence[str] | None, beside: bool = False) -> Source:
    """A table of any known layout; one of another layout is left out if it only stands `beside` the clips."""
    plain = [{str(name).strip(): value for name, value in row.items()} for row in read_records(path)]
    if not plain:
        raise UserError(f"{path}: expected at least one row, got none")
    columns = {name.casefold() for row in plain for name in row}
    if any(columns >= set(needed) for needed in _PUBLISHED):
        return _from_human(path)
    rows = [_renamed(row, columns) for row in plain]
    columns = {name for row in rows for name in row}
    if columns >= {"row", *FETV_COLUMNS}:
        return _fetv_table(path, rows)
    if not columns & {"video", "row"}:
        names = ", ".join(map(repr, plain[0]))
        if beside:
            return Source(left_out=[LeftOutRow(str(path), f"a table of no known layout, with columns {names}")])
        raise UserError(f"{path}: expected {_KNOWN}; got columns {names}")
    if columns >= {"patch_row", "patch_column"}:
        return _patch_scores(path, rows)
    if columns >= {"x0", "y0", "x1", "y1"}:
        return _boxes(path, rows)
    found = Source()
    if columns >= {"video", "prompt"}:
        _add_clips(found, path, rows)
    if columns >= _EXPORTED:
        # our own export of labels
        _add_exported(found, path, rows)
        return found
    _add_scores(found, path, rows, _score_columns(path, rows, scores))
    _add_masks(found, path, rows)
    if not (found.clips or found.scores or found.damage or found.left_out):
        raise UserError(f"{path}: expected a prompt, scores or masks beside each video, got none of them")
    return found


def _renamed(row: Row, columns: set[str]) -> dict[str, Any]:
    """The row under our names of columns."""
    ours = {next((name for name in names if name in columns), ""): own for own, names in _ALIASES.items()}
    return {
        ours.get(name.casefold(), name.casefold() if name.casefold() in _DESCRIBE | {"score"} else name): value
        for name, value in row.items()
    }


def _add_clips(found: Source, path: Path, rows: Sequence[Row]) -> None:
    """The clips of a table with columns video and prompt, each once."""
    listed: dict[tuple[str, str], int] = {}
    for number, row in enumerate(rows, 1):
        place = f"{path}: row {number}"
        file = path.parent / required_text(row, "video", place)
        prompt = " ".join(required_text(row, "prompt", place).split())
        # one row for each rater is one clip
        again = listed.setdefault((_ref(file), prompt), number) != number
        found.listed.extend([] if again else [_ref(file)])
        if not exists(file):
            found.left_out.append(LeftOutRow(place, f"{file} does not exist"))
        if again or not exists(file):
            continue
        found.clips.append(
            CaptionedClip(
                _ref(file), file, prompt, place,
                generator="" if is_empty(row.get("generator")) else str(row["generator"]).strip(),
                seed=_whole_number(row, "seed", place),
                fps=_positive(row, "fps", place),
            )
        )  # fmt: skip


def _add_exported(found: Source, path: Path, rows: Sequence[Row]) -> None:
    """The labels of a table that `halo export --format huggingface` wrote."""
    for number, row in enumerate(rows, 1):
        if is_empty(row.get("labeller")):
            continue
        place = f"{path}: row {number}"
        ref = _row_ref(path, row, place)
        names = [name for name in row if name.startswith("video_")]
        scores = {name.removeprefix("video_"): rescaled_score(row[name], 1, 5, name, place) for name in names}
        found.scores.append(ClipScores(ref, scores, place))
        try:
            sizes = [np.diff(row[f"{name}_edges"]).astype(np.int64) for name in ("frame", "row", "column")]
            scores_of_patches = np.array(row["patch_quality"], float).reshape([len(line) for line in sizes])
            if not all((line > 0).all() and 0 < line.sum() <= _LONGEST_SIDE for line in sizes):
                raise ValueError("edges that do not rise")
        except (TypeError, ValueError, KeyError) as error:
            raise UserError(f"{place}: expected edges and a score for each patch between them ({error})") from error
        found.damage.append(ClipDamage(ref, _damage_between(scores_of_patches, sizes), place))


def _damage_between(scores: NDArray[np.float64], sizes: Sequence[NDArray[np.int64]]) -> DamageOf:
    """Damage of patches [f, h, w] of the given sizes along time, height and width."""
    for axis, lengths in enumerate(sizes):
        if axis:
            scores = scores.repeat(lengths, axis=axis)
    ends = np.cumsum(sizes[0])
    return lambda source: lambda frame: (5 - scores[min(int((ends <= frame).sum()), len(scores) - 1)]) / 4


def _score_columns(path: Path, rows: Sequence[Row], wanted: Sequence[str] | None) -> list[str]:
    """The columns that hold scores."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    if wanted is not None:
        return [name for name in columns if name in wanted]
    others = [name for name in columns if name not in _DESCRIBE and not re.match(r"(?i)unnamed:|__index", name)]
    return [name for name in others if any(_is_number(row.get(name)) for row in rows)]


def _is_number(value: Any) -> bool:
    if is_empty(value) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(float(value))
    except (TypeError, ValueError, OverflowError):
        return False


def _as_float(value: Any) -> float:
    return float(value)


def _add_scores(found: Source, path: Path, rows: Sequence[Row], names: Sequence[str]) -> None:
    """The scores of a table, one rater a row."""
    if not names:
        return
    taken: dict[tuple[str | int, str], int] = {}
    for number, row in enumerate(rows, 1):
        place = f"{path}: row {number}"
        ref = _row_ref(path, row, place)
        key = ref, str(row.get("rater", ""))
        if taken.setdefault(key, number) != number:
            raise UserError(
                f"{path}: rows {taken[key]} and {number} score one clip twice; keep one, or name the rater of each"
            )
        try:
            scores = {name: rescaled_score(row.get(name), 1, 5, name, place) for name in names}
        except UserError as error:
            raise UserError(
                f"{error}; rescale the column to 1 to 5, or name the columns that hold scores in imports.scores "
                "([] for none)"
            ) from error
        found.scores.append(ClipScores(ref, scores, place))


def _row_ref(path: Path, row: Row, place: str) -> str | int:
    """The clip that a row speaks of: its file, or its number in the listing of clips."""
    if "video" in row:
        return _ref(path.parent / required_text(row, "video", place))
    number = _whole_number(row, "row", place)
    if number is None:
        raise UserError(f"{place}: expected a clip's number in 'row', got {row.get('row')!r}")
    return number


def _whole_number(row: Row, column: str, place: str) -> int | None:
    """A whole number from 0 on, or None for an empty cell."""
    value = row.get(column)
    if is_empty(value):
        return None
    if _is_number(value) and 0 <= (number := _as_float(value)) < 2**63 and number == int(number):
        return int(str(value)) if str(value).strip().isdecimal() else int(number)
    raise UserError(f"{place}: expected a whole number from 0 on in {column!r}, got {value!r}")


def _positive(row: Row, column: str, place: str) -> float | None:
    """A number above 0, or None for an empty cell."""
    value = row.get(column)
    if is_empty(value):
        return None
    if not _is_number(value) or _as_float(value) <= 0:
        raise UserError(f"{place}: expected a number above 0 in {column!r}, got {value!r}")
    return _as_float(value)


def _number(row: Row, column: str, place: str) -> float:
    value = row.get(column)
    if not _is_number(value):
        raise UserError(f"{place}: expected a number in {column!r}, got {value!r}")
    return _as_float(value)


def _fetv_table(path: Path, rows: Sequence[Row]) -> Source:
    """FETV's clips.csv, whose column row numbers the clips."""
    found = fetv_scores(path, rows)
    return Source(
        scores=[
            ClipScores(
                _row_ref(path, row, f"{path}: row {number}"),
                {name: values[number - 1, rater] for name, values in found.items() if rater < values.shape[1]},
                f"{path}: row {number}",
            )
            for number, row in enumerate(rows, 1)
            for rater in range(max(values.shape[1] for values in found.values()))
        ]
    )


def _patch_scores(path: Path, rows: Sequence[Row]) -> Source:
    """A row for each patch: the clip, patch_frame (0 if there is none), patch_row, patch_column, score from 1 to 5.

    The patches divide the clip evenly: patch k of n along F frames covers frames floor(k F/n) to floor((k+1) F/n).
    """
    cells: dict[str | int, list[tuple[int, int, int, float]]] = {}
    taken: dict[tuple[Any, ...], int] = {}
    for number, row in enumerate(rows, 1):
        place = f"{path}: row {number}"
        ref = _row_ref(path, row, place)
        patch = [_whole_number(row, name, place) for name in ("patch_frame", "patch_row", "patch_column")]
        if patch[0] is None and "patch_frame" not in row:
            patch[0] = 0
        if None in patch:
            raise UserError(f"{place}: expected whole numbers from 0 on for the patch, got {patch}")
        key = (ref, str(row.get("rater", "")), *patch)
        if taken.setdefault(key, number) != number:
            raise UserError(
                f"{path}: rows {taken[key]} and {number} score one patch twice; keep one, or name the rater of each"
            )
        score = rescaled_score(row.get("score"), 1, 5, "score", place)
        cells.setdefault(ref, []).append((*patch, score))  # type: ignore[arg-type]
    grid = [1 + max(int(cell[axis]) for group in cells.values() for cell in group) for axis in range(3)]
    if math.prod(grid) > 10_000_000:
        raise UserError(f"{path}: expected patches of one grid, got numbers up to {[side - 1 for side in grid]}")
    return Source(
        damage=[ClipDamage(ref, _damage_of_cells(_mean_cells(group, grid)), str(path)) for ref, group in cells.items()]
    )


def _mean_cells(cells: Sequence[tuple[int, int, int, float]], grid: Sequence[int]) -> NDArray[np.float64]:
    """The mean score of each patch over its raters, [T, Y, X]; NaN where nobody scored."""
    sums, counts = np.zeros(grid), np.zeros(grid)
    for frame, row, column, score in cells:
        if not math.isnan(score):
            sums[frame, row, column] += score
            counts[frame, row, column] += 1
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def _damage_of_cells(scores: NDArray[np.float64]) -> DamageOf:
    """Damage of scores [T, Y, X] from 1 to 5."""
    damage = (5 - scores) / 4

    def of(source: VideoFormat) -> Callable[[int], NDArray[np.floating]]:
        edges = [k * source.num_frames // len(damage) for k in range(1, len(damage))]
        return lambda frame: damage[sum(edge <= frame for edge in edges)]

    return of


@dataclass(frozen=True)
class _Box:
    """A rectangle in pixels of the clip, in the frames first to last, and how damaged it is."""

    first: int
    last: float
    top: float
    left: float
    bottom: float
    right: float
    damage: float


def _boxes(path: Path, rows: Sequence[Row]) -> Source:
    """A row for each box: the clip, x0, y0, x1, y1 in pixels, frame or first_frame and last_frame, score from 1 to 5.

    Without a frame a box holds in all of them; without a score it is 1. What no box covers is not damaged.
    """
    boxes: dict[str | int, list[_Box]] = {}
    for number, row in enumerate(rows, 1):
        place = f"{path}: row {number}"
        ref = _row_ref(path, row, place)
        left, top, right, bottom = (_number(row, name, place) for name in ("x0", "y0", "x1", "y1"))
        if not (right > left and bottom > top):
            raise UserError(f"{place}: expected x0 < x1 and y0 < y1, got {left:g}, {top:g}, {right:g}, {bottom:g}")
        one = _whole_number(row, "frame", place)
        first = one if one is not None else _whole_number(row, "first_frame", place) or 0
        last = one if one is not None else _whole_number(row, "last_frame", place)
        score = rescaled_score(row.get("score"), 1, 5, "score", place)
        damage = 1.0 if math.isnan(score) else (5 - score) / 4
        box = _Box(first, math.inf if last is None else last, top, left, bottom, right, damage)
        boxes.setdefault(ref, []).append(box)
    return Source(damage=[ClipDamage(ref, _damage_of_boxes(group), str(path)) for ref, group in boxes.items()])


def _damage_of_boxes(boxes: Sequence[_Box]) -> DamageOf:
    """Damage of boxes; where several cover a pixel, the worst counts."""

    def of(source: VideoFormat) -> Callable[[int], NDArray[np.floating]]:
        def damage(frame: int) -> NDArray[np.floating]:
            picture = np.zeros((source.height, source.width), np.float32)
            for box in boxes:
                if box.first <= frame <= box.last:
                    rows, columns = (
                        _share(box.top, box.bottom, source.height),
                        _share(box.left, box.right, source.width),
                    )
                    np.maximum(picture, box.damage * rows[:, None] * columns, out=picture)
            return picture

        return damage

    return of


def _share(start: float, end: float, length: int) -> NDArray[np.float32]:
    """The share of each of `length` pixels that lies between two places."""
    pixels = np.arange(length)
    return (np.minimum(end, pixels + 1) - np.maximum(start, pixels)).clip(0, 1).astype(np.float32)


def _add_masks(found: Source, path: Path, rows: Sequence[Row]) -> None:
    """The masks or heat maps of a table: npy arrays, pictures, videos or folders of pictures; 1 or white is damage."""
    for number, row in enumerate(rows, 1):
        if is_empty(row.get("mask")):
            continue
        place = f"{path}: row {number}"
        file = path.parent / required_text(row, "mask", place)
        if not exists(file):
            raise UserError(f"{place}: the mask {file} does not exist; put it there or leave it out of the row")
        found.damage.append(ClipDamage(_row_ref(path, row, place), damage_of_file(file), place))


def damage_of_file(file: Path) -> DamageOf:
    """Damage of a mask in a file, one picture for all frames or one for each."""

    def of(source: VideoFormat) -> Callable[[int], NDArray[np.floating]]:
        maps = _read_maps(file)
        if len(maps) not in (1, source.num_frames):
            raise UserError(
                f"{file}: expected one mask, or {source.num_frames} as the clip has frames, got {len(maps)}"
            )
        return lambda frame: maps[min(frame, len(maps) - 1)]

    return of


def _read_maps(file: Path) -> NDArray[np.floating]:
    """Masks [T, Y, X] in [0, 1]."""
    if file.suffix.lower() == ".npy":
        return _read_array(file)
    if file.is_dir():
        pictures = read_frames(file)
    else:
        pictures = read_picture(file, str(file))[None] if file.suffix.lower() in PICTURES else read_clip(file)
    grey = pictures.numpy().max(axis=-1)
    # a mask of 0 and 1 is as good as one of 0 and 255
    return grey.astype(np.float32) / (1 if grey.max(initial=0) <= 1 else 255)


def _read_array(file: Path) -> NDArray[np.floating]:
    maps = load_array(file).astype(np.float32)
    maps = maps[None] if maps.ndim == 2 else maps
    # NaN is unlabelled
    if maps.ndim != 3 or not maps.size or not (np.isnan(maps) | ((maps >= 0) & (maps <= 1))).all():
        raise UserError(f"{file}: expected [H, W] or [F, H, W] in [0, 1], got {list(maps.shape)}")
    return maps


def _from_human(path: Path) -> Source:
    """The published layouts of ratings, marks and preferences."""
    human = read_human(path)
    if not isinstance(human, Ratings):
        return _from_preferences(path, human)
    found = Source()
    for index, (clip, prompt) in enumerate(zip(human.clips, human.prompts, strict=True)):
        place = f"{path}: row {index + 1}"
        ref = _ref(clip) if isinstance(clip, Path) else place
        found.listed.append(ref)
        if not prompt:
            found.left_out.append(LeftOutRow(place, "no prompt"))
            continue
        generator = human.generators[index] if human.generators else ""
        found.clips.append(CaptionedClip(ref, clip, prompt, place, generator))
        raters = max((values.shape[1] for values in human.scores.values()), default=0)
        for rater in range(raters):
            scores = {name: float(values[index, rater]) for name, values in human.scores.items()}
            found.scores.append(ClipScores(ref, scores, place))
        if human.marks is not None:
            found.damage.append(ClipDamage(ref, _constant(human.marks[index]), place))
    return found


def _constant(damage: NDArray[np.float32]) -> DamageOf:
    return lambda source: lambda frame: damage


def _from_preferences(path: Path, preferences: Sequence[Preference]) -> Source:
    """Preferences, and their clips."""
    found = Source()
    for one in preferences:
        place = f"{path}: row {one.row}"
        for ref, clip in zip(preference_refs(place, one), (one.first, one.second), strict=True):
            found.clips.append(CaptionedClip(ref, clip, " ".join(one.prompt.split()), place))
            found.listed.append(ref)
        found.preferences.append((place, one))
    return found


def preference_refs(place: str, preference: Preference) -> list[str]:
    """By which a preference's clips are named."""
    return [
        _ref(clip) if isinstance(clip, Path) else f"{place}, {name} picture"
        for name, clip in (("first", preference.first), ("second", preference.second))
    ]
