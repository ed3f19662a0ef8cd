"""What importers give, and what they share."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from halo_fast.data.clips import read_clip, read_frames, read_picture
from halo_fast.data.records import Row, is_empty
from halo_fast.errors import UserError, first_line

__all__ = [
    "PatchScores",
    "Preference",
    "Ratings",
    "load_array",
    "load_frames",
    "read_array",
    "read_scores",
    "rescaled_score",
]


@dataclass(frozen=True)
class PatchScores:
    """Scores of the patches of clips.

    Args:
        clips: of each clip the file that was judged.
        scores: [N, R, f, h, w] of R raters or passes, 1 to 5; NaN where one gave none. The patches divide clips evenly.
        labeller: who judged, in words.
    """

    clips: Sequence[Path]
    scores: NDArray[np.float64]
    labeller: str


@dataclass(frozen=True)
class Ratings:
    """Clips that people scored, or pictures as clips of one frame.

    Args:
        source: the layout they were read from.
        clips: of each clip its frames, uint8 [F, H, W, 3], or the file or folder of frames that holds them.
        prompts: of each clip; empty where there was none.
        scores: for each dimension [N, R], one column a rater, 1 to 5; NaN where a rater gave none.
        generators: the model that made each clip, if known.
        marks: for each clip the share to which each pixel is marked as damaged, float [H, W] in [0, 1], if known.
        patches: scores of the patches of the same clips, if known.
    """

    source: str
    clips: Sequence[Tensor | Path]
    prompts: list[str]
    scores: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    generators: list[str] | None = None
    marks: list[NDArray[np.float32]] | None = None
    patches: PatchScores | None = None

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
        weight: how much it counts.
        patches: scores of the patches of the first clip and of the second, and their grid, if known.
    """

    row: int
    prompt: str
    first: Path | bytes
    second: Path | bytes
    preferred: dict[str, float]
    mask: Path | None = None
    weight: float = 1.0
    patches: tuple[list[float], list[float], tuple[int, ...]] | None = None


def load_frames(clip: Tensor | Path | bytes, fps: float | None = None) -> Tensor:
    """Frames uint8 [F, H, W, 3] of a clip.

    Args:
        clip: frames, a video file, an encoded picture, or a folder of pictures in the natural order of their names.
        fps: frames a second at which a video is sampled; None for all its frames. Clips without times are not sampled.

    Raises:
        UserError: a file that is missing or cannot be decoded.
    """
    if isinstance(clip, Tensor):
        return clip
    if isinstance(clip, bytes):
        return read_picture(io.BytesIO(clip), "a picture in the table")[None]
    if clip.is_dir():
        return read_frames(clip)
    return read_clip(clip, fps)


def rescaled_score(value: Any, low: float, high: float, column: str, place: str) -> float:
    """A score on the scale from 1 to 5; NaN for an empty cell.

    Args:
        value: of the cell.
        low: of the source's scale.
        high: likewise.
        column: its name, for messages.
        place: of the row, for messages.

    Raises:
        UserError: no number from low to high.
    """
    if is_empty(value):
        return float("nan")
    try:
        number = float("nan") if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = float("nan")
    if not low <= number <= high:
        cure = "; multiply scores from 0 to 1 by 4 and add 1" if 0 <= number < low else ""
        raise UserError(f"{place}: expected {low:g} to {high:g} in {column!r}, got {value!r}{cure}")
    return 1 + 4 * (number - low) / (high - low)


def read_scores(
    path: Path, rows: Sequence[Row], columns: Mapping[str, Sequence[str]], low: float, high: float
) -> dict[str, NDArray[np.float64]]:
    """For each dimension the scores [N, R] of its raters' columns, on the scale from 1 to 5.

    Args:
        path: of the table, for messages.
        rows: of the table.
        columns: of each dimension, one for each rater.
        low: of the source's scale.
        high: likewise.

    Raises:
        UserError: a row without one of the columns; a cell that is neither empty nor a number from low to high.
    """
    for number, row in enumerate(rows, 1):
        missing = [name for names in columns.values() for name in names if name not in row]
        if missing:
            raise UserError(f"{path}: row {number}: expected a column {missing[0]!r}; null where not scored")
    return {
        dimension: np.array(
            [
                [rescaled_score(row[name], low, high, name, f"{path}: row {number}") for name in names]
                for number, row in enumerate(rows, 1)
            ]
        )
        for dimension, names in columns.items()
    }


def load_array(file: Path, name: str = "") -> NDArray[Any]:
    """The array in an npy file, or that of the given name in an npz file.

    Raises:
        UserError: a file that is damaged or holds no such array of numbers.
    """
    what = f"an array {name!r}" if name else "an array of numbers"
    try:
        if not name:
            array = np.load(file, allow_pickle=False)
        else:
            with np.load(file, allow_pickle=False) as arrays:
                array = arrays[name]
    except Exception as error:  # numpy and zipfile raise errors of many kinds on damaged files
        raise UserError(f"{file}: expected {what} ({first_line(error)}); make it again") from error
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "biuf":
        raise UserError(f"{file}: expected {what}, got {getattr(array, 'dtype', type(array).__name__)}")
    return array


def read_array(folder: Path, name: str, dimensions: int) -> NDArray[np.uint8]:
    """The array `name` of the one npz file in a folder.

    Raises:
        UserError: no such file, or no uint8 array of so many dimensions.
    """
    files = sorted(folder.glob("*.npz"))
    if len(files) != 1:
        raise UserError(f"{folder}: expected one npz file with {name!r}, got {len(files)}")
    array = load_array(files[0], name)
    if array.dtype != np.uint8 or array.ndim != dimensions:
        raise UserError(
            f"{files[0]}: expected {name!r} as uint8 of {dimensions} dimensions, got {array.dtype} {array.shape}"
        )
    return array
