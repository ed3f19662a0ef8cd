"""Labels and preferences of people, in the layouts they are published in; which one it is, the content tells.

Scores come out on the rubric's scale from 1 to 5, whatever the source's own.
"""

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from halo_fast.data.clips import read_clip
from halo_fast.errors import UserError

__all__ = ["Preference", "Ratings", "load_frames", "pool_marks", "read_human", "read_preferences", "read_ratings"]

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Ratings:
    """Clips, or pictures as clips of one frame, as people scored them.

    Args:
        source: the layout they were read from.
        clips: of each clip its frames, uint8 [F, H, W, 3], or the file or folder of frames that holds them.
        prompts: of each clip; empty where there was none.
        scores: for each dimension [N, R], one column a rater, 1 to 5; NaN where a rater gave none.
        generators: the model that made each clip, if known.
        marks: for each clip the share to which each pixel is marked as damaged, float [H, W] in [0, 1], if known.
    """

    source: str
    clips: Sequence[Tensor | Path]
    prompts: list[str]
    scores: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    generators: list[str] | None = None
    marks: list[NDArray[np.float32]] | None = None

    def __len__(self) -> int:
        return len(self.prompts)


@dataclass(frozen=True)
class Preference:
    """Two clips of one prompt and which is preferred.

    Args:
        row: in the source, 1 the first.
        prompt: of both.
        first: file of the one clip, or the encoded picture itself.
        second: of the other.
        preferred: for each dimension 1 if the first is preferred, 0 if the second, 0.5 for a tie.
        mask: file of the region that they differ in, if known.
    """

    row: int
    prompt: str
    first: Path | bytes
    second: Path | bytes
    preferred: dict[str, float]
    mask: Path | None = None


def read_human(path: Path | str) -> Ratings | list[Preference]:
    """Ratings or preferences, whichever the file or folder holds.

    Raises:
        UserError: neither, naming the layouts that are known; a bad row, naming its number.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: does not exist; expected {_KNOWN}")
    if path.is_dir():
        for wanted, read in _FOLDERS.items():
            if all(any(path.glob(name)) for name in wanted):
                return read(path)
        tables = sorted(file for file in path.iterdir() if file.suffix in (".csv", ".json", ".jsonl", ".parquet"))
        if len(tables) != 1:
            raise UserError(f"{path}: expected {_KNOWN}; got a folder with {len(tables)} tables; name one of them")
        path = tables[0]
    rows = _rows(path)
    if not rows:
        raise UserError(f"{path}: expected at least one row, got none")
    columns = set(rows[0])
    for needed, read_row in _PREFERENCES.items():
        if columns >= set(needed):
            return [_checked(read_row, path, number, row) for number, row in enumerate(rows, 1)]
    for needed, read_table in _RATINGS.items():
        if columns >= set(needed):
            return read_table(path, rows)
    raise UserError(f"{path}: expected {_KNOWN}; got columns {', '.join(map(repr, rows[0]))}")


def read_ratings(path: Path | str) -> Ratings:
    """Ratings of clips; as `read_human`, and a UserError where the file holds preferences."""
    found = read_human(path)
    if not isinstance(found, Ratings):
        raise UserError(f"{path}: expected scores of clips, got preferences between two")
    return found


def read_preferences(path: Path | str) -> list[Preference]:
    """Preferences between clips; as `read_human`, and a UserError where the file holds ratings."""
    found = read_human(path)
    if isinstance(found, Ratings):
        raise UserError(f"{path}: expected preferences between two clips, got scores of single ones")
    return found


def load_frames(clip: Tensor | Path | bytes) -> Tensor:
    """Frames uint8 [F, H, W, 3] of a clip: of a video file, a picture, or a folder of pictures in order of name.

    Raises:
        UserError: a file that is missing or cannot be decoded.
    """
    if isinstance(clip, Tensor):
        return clip
    if isinstance(clip, bytes):
        return _picture(io.BytesIO(clip), "a picture in the table")[None]
    if clip.is_dir():
        pictures = sorted(clip.iterdir())
        if not pictures:
            raise UserError(f"{clip}: expected a folder of frames, got an empty one")
        return torch.stack([_picture(picture, str(picture)) for picture in pictures])
    return read_clip(clip)


def pool_marks(marks: Sequence[NDArray[np.float32]], height: int, width: int) -> NDArray[np.float32]:
    """Marks averaged over a grid of patches by area, [N, height, width]: the marked share of each patch."""
    pooled = [
        torch.nn.functional.adaptive_avg_pool2d(torch.from_numpy(np.asarray(mark, np.float32))[None], (height, width))
        for mark in marks
    ]
    return torch.cat(pooled).numpy()


def _picture(file: io.BytesIO | Path, name: str) -> Tensor:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(file) as picture:
            return torch.from_numpy(np.array(picture.convert("RGB")))
    except (OSError, UnidentifiedImageError) as error:
        raise UserError(f"{name}: expected a picture ({error}); make it again or leave the row out") from error


def _rows(path: Path) -> list[Row]:
    """The rows of a table, whatever it is written as."""
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet

            return pyarrow.parquet.read_table(path).to_pylist()
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".csv":
            return _csv_rows(path, text)
        if path.suffix == ".jsonl":
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
        else:
            rows = json.loads(text)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); expected {_KNOWN}") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path}: expected a list of rows with named columns; expected {_KNOWN}")
    return rows


def _csv_rows(path: Path, text: str) -> list[Row]:
    """The rows of a CSV, each with as many cells as there are columns."""
    reader = csv.DictReader(io.StringIO(text))
    rows: list[Any] = list(reader)
    for number, row in enumerate(rows, 1):
        # the reader keeps surplus cells under None, and gives None for cells that are not there
        if None in row or None in row.values():
            size = sum(value is not None for name, value in row.items() if name is not None) + len(row.get(None) or [])
            raise UserError(f"{path}: row {number}: expected {len(reader.fieldnames or [])} cells, got {size}")
    return rows


def _checked(read_row: Callable[[Path, int, Row], Preference], path: Path, number: int, row: Row) -> Preference:
    preference = read_row(path, number, row)
    for clip in (preference.first, preference.second):
        if isinstance(clip, Path) and not clip.exists():
            raise UserError(f"{path}: row {number}: {clip} does not exist; put the clip there or leave the row out")
    if not preference.prompt:
        raise UserError(f"{path}: row {number}: the prompt is empty; leave the row out")
    return preference


def _text(row: Row, column: str, place: str) -> str:
    value = row.get(column)
    if isinstance(value, list):
        value = value[0] if value else None
    if not isinstance(value, str) or not value:
        raise UserError(f"{place}: expected text in {column!r}, got {value!r}")
    return value


def _score(value: Any, low: float, high: float, column: str, place: str) -> float:
    """A score from low to high, on the scale from 1 to 5; NaN where it is empty."""
    if value is None or value == "":
        return float("nan")
    try:
        number = float("nan") if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = float("nan")
    if not low <= number <= high:
        raise UserError(f"{place}: expected {low:g} to {high:g} in {column!r}, got {value!r}")
    return 1 + 4 * (number - low) / (high - low)


def _columns(
    path: Path, rows: Sequence[Row], columns: Mapping[str, Sequence[str]], low: float, high: float
) -> dict[str, NDArray[np.float64]]:
    """For each dimension the scores [N, R] of the columns of its raters."""
    return {
        dimension: np.array(
            [
                [_score(row[name], low, high, name, f"{path}: row {number}") for name in names]
                for number, row in enumerate(rows, 1)
            ]
        )
        for dimension, names in columns.items()
    }


def _video_align(path: Path, number: int, row: Row) -> Preference:
    """CSV path_A, path_B, prompt, VQ, MQ, TA in {A, B, same} (VideoAlign, VideoGen-RewardBench)."""
    place = f"{path}: row {number}"
    names = {"VQ": "visual_quality", "MQ": "motion_quality", "TA": "text_alignment", "Overall": "overall"}
    preferred = {names[name]: _choice(row[name], name, place) for name in names if row.get(name)}
    first, second = (path.parent / _text(row, f"path_{side}", place) for side in "AB")
    return Preference(number, _text(row, "prompt", place), first, second, preferred)


def _choice(value: str, column: str, place: str) -> float:
    known = {"A": 1.0, "B": 0.0, "same": 0.5}
    if value not in known:
        raise UserError(f"{place}: expected A, B or same in {column!r}, got {value!r}")
    return known[value]


def _local_dpo(path: Path, number: int, row: Row) -> Preference:
    """JSONL pos_video_path, neg_video_path, gen_caption and optionally mask (Local-DPO)."""
    place = f"{path}: row {number}"
    first, second = (path.parent / _text(row, f"{side}_video_path", place) for side in ("pos", "neg"))
    mask = path.parent / row["mask"] if isinstance(row.get("mask"), str) and row["mask"] else None
    if mask is not None and not mask.exists():
        raise UserError(f"{place}: the mask {mask} does not exist; put it there or leave it out of the row")
    return Preference(number, _text(row, "gen_caption", place), first, second, {"overall": 1.0}, mask)


def _chosen_rejected(prompt: str) -> Callable[[Path, int, Row], Preference]:
    """Columns chosen, rejected and a prompt (TRL), or a caption (UnifiedReward's dpo_data.json)."""

    def read(path: Path, number: int, row: Row) -> Preference:
        place = f"{path}: row {number}"
        first, second = (path.parent / _text(row, side, place) for side in ("chosen", "rejected"))
        return Preference(number, _text(row, prompt, place), first, second, {"overall": 1.0})

    return read


def _pickapic(path: Path, number: int, row: Row) -> Preference:
    """Encoded pictures jpg_0, jpg_1, label_0 in {0, 0.5, 1} and caption (Pick-a-Pic)."""
    place = f"{path}: row {number}"
    clips = [row[name] for name in ("jpg_0", "jpg_1")]
    if not all(isinstance(clip, bytes) for clip in clips):
        raise UserError(f"{place}: expected encoded pictures in 'jpg_0' and 'jpg_1', got {type(clips[0]).__name__}")
    if row["label_0"] not in (0, 0.5, 1):
        raise UserError(f"{place}: expected 0, 0.5 or 1 in 'label_0', got {row['label_0']!r}")
    return Preference(number, _text(row, "caption", place), clips[0], clips[1], {"overall": float(row["label_0"])})


def _video_dpo(folder: Path) -> list[Preference]:
    """Folder with metadata.json of clips and pair.json of their indices, video1 the winner (VideoDPO)."""
    clips, pairs = _rows(folder / "metadata.json"), _rows(folder / "pair.json")
    preferences = []
    for number, pair in enumerate(pairs, 1):
        place, files = f"{folder / 'pair.json'}: row {number}", []
        for name in ("video1", "video2"):
            index = pair.get(name)
            if not isinstance(index, int) or not 0 <= index < len(clips):
                raise UserError(f"{place}: expected 0 to {len(clips) - 1} in {name!r}, got {index!r}")
            try:
                files.append(folder / clips[index]["basic"]["clip_path"])
            except (KeyError, TypeError):
                raise UserError(f"{folder / 'metadata.json'}: row {index + 1}: expected basic.clip_path") from None
        preference = Preference(number, _text(pair, "frame_caption", place), files[0], files[1], {"overall": 1.0})
        preferences.append(_checked(lambda *_, found=preference: found, folder / "pair.json", number, pair))
    return preferences


def _fetv(folder: Path) -> Ratings:
    """Folder with clips.csv, row by row three raters' scores, and an npz of the clips (FETV)."""
    path = folder / "clips.csv"
    rows = _rows(path)
    dimensions = {"static_quality": "static", "temporal_quality": "temporal", "text_alignment": "align"}
    columns = {
        name: sorted(c for c in (rows[0] if rows else ()) if c.startswith(f"{short}_h"))
        for name, short in dimensions.items()
    }
    missing = [name for name in ("prompt", "model") if rows and name not in rows[0]]
    if missing or not all(columns.values()):
        raise UserError(f"{path}: expected columns prompt, model, static_h0, temporal_h0, align_h0, ... as FETV has")
    videos = _array(folder, "video", 5)
    if len(videos) != len(rows):
        raise UserError(f"{path}: expected a row for each of {len(videos)} clips, got {len(rows)}")
    return Ratings(
        "FETV",
        list(torch.from_numpy(videos)),
        [row["prompt"] for row in rows],
        _columns(path, rows, columns, 1, 5),
        [row["model"] for row in rows],
    )


def _local_defects(folder: Path) -> Ratings:
    """Folder with manifest.csv and an npz of grey pictures and packed masks of what people marked."""
    rows = _rows(folder / "manifest.csv")
    images, packed = _array(folder, "image", 3), _array(folder, "mask", 3)
    masks = np.unpackbits(packed, axis=-1)[..., : images.shape[-1]]
    if not len(rows) == len(images) == len(masks):
        raise UserError(f"{folder}: expected as many rows as pictures and masks, got {len(rows)}, {len(images)}")
    clips = list(torch.from_numpy(images)[:, None, :, :, None].expand(-1, -1, -1, -1, 3))
    return Ratings("local defects", clips, [""] * len(rows), marks=list(masks.astype(np.float32)))


def _array(folder: Path, name: str, dimensions: int) -> NDArray[np.uint8]:
    files = sorted(folder.glob("*.npz"))
    if len(files) != 1:
        raise UserError(f"{folder}: expected one npz file with {name!r}, got {len(files)}")
    try:
        with np.load(files[0], allow_pickle=False) as arrays:
            array = arrays[name]
    except (OSError, KeyError, ValueError, BadZipFile) as error:
        raise UserError(f"{files[0]}: expected an array {name!r} ({error})") from error
    if array.dtype != np.uint8 or array.ndim != dimensions:
        raise UserError(
            f"{files[0]}: expected {name!r} as uint8 of {dimensions} dimensions, got {array.dtype} {array.shape}"
        )
    return array


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
        there = [file for file in found if file.exists()]
        if not there:
            raise UserError(f"{path}: row {number}: no frames of {row['id']!r}; expected {found[0]} or {found[-1]}")
        clips.append(there[0])
    prompts = [_text(row, "text prompt", f"{path}: row {number}") for number, row in enumerate(rows, 1)]
    return Ratings("VideoFeedback", clips, prompts, _columns(path, rows, columns, 1, 4))


def _rich_hf(path: Path, rows: Sequence[Row]) -> Ratings:
    """CSV with filename, prompt and scores from 0 to 1; artifact_map/<name>.npy beside it, float [H, W] (RichHF)."""
    names = {
        "artifact_score": "visual_quality",
        "misalignment_score": "text_alignment",
        "aesthetics_score": "aesthetics",
        "overall_score": "overall",
    }
    scores = _columns(path, rows, {names[c]: [c] for c in names if c in rows[0]}, 0, 1)
    clips, marks = [], []
    for number, row in enumerate(rows, 1):
        clip = path.parent / _text(row, "filename", f"{path}: row {number}")
        heat = path.parent / "artifact_map" / f"{clip.stem}.npy"
        for file in (clip, heat):
            if not file.exists():
                raise UserError(f"{path}: row {number}: {file} does not exist; put it there or leave the row out")
        try:
            mark = np.load(heat, allow_pickle=False).astype(np.float32)
        except (OSError, ValueError) as error:
            raise UserError(f"{heat}: expected an array of numbers ({error})") from error
        # a comparison with NaN is false: what is not known to lie inside is refused
        if mark.ndim != 2 or not mark.size or not (mark.min() >= 0 and mark.max() <= 1):
            top = f"{mark.max():g}" if mark.size else "nothing"
            raise UserError(f"{heat}: expected [H, W] in [0, 1], got {list(mark.shape)} up to {top}")
        clips.append(load_frames(clip.read_bytes()))
        marks.append(mark)
    return Ratings("RichHF", clips, [row.get("prompt") or "" for row in rows], scores, marks=marks)


def _plain(path: Path, rows: Sequence[Row]) -> Ratings:
    """Table with video, prompt and a column of scores from 1 to 5 for each dimension; generator and rater if known."""
    dimensions = [name for name in rows[0] if name not in ("video", "prompt", "generator", "rater", "row", "id")]
    if not dimensions:
        raise UserError(f"{path}: expected a column of scores from 1 to 5 beside video and prompt, got none")
    for number, row in enumerate(rows, 1):
        missing = [name for name in ("video", "prompt", *dimensions) if name not in row]
        if missing:
            raise UserError(
                f"{path}: row {number}: expected a column {missing[0]!r} as in row 1; null where not scored"
            )
    raters = list(dict.fromkeys(str(row.get("rater", "")) for row in rows))
    names = [_text(row, "video", f"{path}: row {number}") for number, row in enumerate(rows, 1)]
    files = list(dict.fromkeys(names))
    taken: dict[tuple[int, int], int] = {}
    scores = {name: np.full((len(files), len(raters)), np.nan) for name in dimensions}
    first: dict[str, Row] = {}
    for number, (name, row) in enumerate(zip(names, rows, strict=True), 1):
        file = path.parent / name
        if not file.exists():
            raise UserError(f"{path}: row {number}: {file} does not exist; put the clip there or leave the row out")
        if row["prompt"] != first.setdefault(name, row)["prompt"]:
            raise UserError(f"{path}: row {number}: another prompt for {name} than before")
        place = files.index(name), raters.index(str(row.get("rater", "")))
        if taken.setdefault(place, number) != number:
            raise UserError(
                f"{path}: rows {taken[place]} and {number} score {name} twice; keep one, or name the rater of each"
            )
        for column in dimensions:
            scores[column][place] = _score(row[column], 1, 5, column, f"{path}: row {number}")
    generators = [first[file]["generator"] for file in files] if "generator" in rows[0] else None
    return Ratings(
        "table", [path.parent / file for file in files], [first[file]["prompt"] for file in files], scores, generators
    )


_FOLDERS: dict[tuple[str, ...], Callable[[Path], Ratings | list[Preference]]] = {
    ("clips.csv", "*.npz"): _fetv,
    ("manifest.csv", "*.npz"): _local_defects,
    ("pair.json", "metadata.json"): _video_dpo,
}
_PREFERENCES: dict[tuple[str, ...], Callable[[Path, int, Row], Preference]] = {
    ("path_A", "path_B", "prompt"): _video_align,
    ("pos_video_path", "neg_video_path", "gen_caption"): _local_dpo,
    ("jpg_0", "jpg_1", "label_0", "caption"): _pickapic,
    ("prompt", "chosen", "rejected"): _chosen_rejected("prompt"),
    ("caption", "chosen", "rejected"): _chosen_rejected("caption"),
}
_RATINGS: dict[tuple[str, ...], Callable[[Path, Sequence[Row]], Ratings]] = {
    ("id", "text prompt", "visual quality"): _video_feedback,
    ("filename", "artifact_score"): _rich_hf,
    ("video", "prompt"): _plain,
}
_KNOWN = (
    "a folder like FETV's (clips.csv, npz), of local defects (manifest.csv, npz), like VideoDPO's (metadata.json,"
    " pair.json), or a csv, json, jsonl or parquet table with columns video and prompt and scores, id and 'text prompt'"
    " (VideoFeedback), filename and artifact_score (RichHF), path_A and path_B (VideoAlign), pos_video_path"
    " (Local-DPO), chosen and rejected (TRL, UnifiedReward) or jpg_0 and label_0 (Pick-a-Pic)"
)
