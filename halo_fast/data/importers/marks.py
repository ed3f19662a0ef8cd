"""Pixels that people marked as damaged, in the layouts they are published in."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from halo_fast.data.importers.base import Ratings, load_array, load_frames, read_array, read_scores
from halo_fast.data.records import Row, exists, read_records, required_text
from halo_fast.errors import UserError

__all__ = ["FOLDERS", "TABLES", "pool_marks"]


def pool_marks(marks: Sequence[NDArray[np.float32]], height: int, width: int) -> NDArray[np.float32]:
    """Marks averaged over a grid of patches by area: the marked share of each patch.

    Args:
        marks: [H, W] each.
        height: of the grid, in patches.
        width: likewise.

    Returns:
        [N, height, width].
    """
    pooled = [
        torch.nn.functional.adaptive_avg_pool2d(torch.from_numpy(np.asarray(mark, np.float32))[None], (height, width))
        for mark in marks
    ]
    return torch.cat(pooled).numpy()


def _local_defects(folder: Path) -> Ratings:
    """Folder with manifest.csv and an npz of grey pictures and packed masks of what people marked."""
    rows = read_records(folder / "manifest.csv")
    images, packed = read_array(folder, "image", 3), read_array(folder, "mask", 3)
    masks = np.unpackbits(packed, axis=-1)[..., : images.shape[-1]]
    if not len(rows) == len(images) == len(masks):
        raise UserError(
            f"{folder}: expected as many rows as pictures and masks, got {len(rows)}, {len(images)} and {len(masks)}"
        )
    clips = list(torch.from_numpy(images)[:, None, :, :, None].expand(-1, -1, -1, -1, 3))
    return Ratings("local defects", clips, [""] * len(rows), marks=list(masks.astype(np.float32)))


def _rich_hf(path: Path, rows: Sequence[Row]) -> Ratings:
    """CSV with filename, prompt and scores from 0 to 1; artifact_map/<name>.npy beside it, float [H, W] (RichHF)."""
    names = {
        "artifact_score": "visual_quality",
        "misalignment_score": "text_alignment",
        "aesthetics_score": "aesthetics",
        "overall_score": "overall",
    }
    scores = read_scores(
        path, rows, {names[column]: [column] for column in names if any(column in row for row in rows)}, 0, 1
    )
    clips, marks = [], []
    for number, row in enumerate(rows, 1):
        clip = path.parent / required_text(row, "filename", f"{path}: row {number}")
        heat = path.parent / "artifact_map" / f"{clip.stem}.npy"
        for file in (clip, heat):
            if not exists(file):
                raise UserError(f"{path}: row {number}: {file} does not exist; put it there or leave the row out")
        clips.append(load_frames(clip.read_bytes()))
        marks.append(_heat_map(heat))
    return Ratings("RichHF", clips, [row.get("prompt") or "" for row in rows], scores, marks=marks)


def _heat_map(file: Path) -> NDArray[np.float32]:
    heat = load_array(file).astype(np.float32)
    # written so that NaN, which compares false, is refused
    if heat.ndim != 2 or not heat.size or not (heat.min() >= 0 and heat.max() <= 1):
        top = f"{heat.max():g}" if heat.size else "nothing"
        raise UserError(f"{file}: expected [H, W] in [0, 1], got {list(heat.shape)} up to {top}")
    return heat


# files of a folder, or columns of a table -> the reader
FOLDERS: dict[tuple[str, ...], Callable[[Path], Ratings]] = {("manifest.csv", "*.npz"): _local_defects}
TABLES: dict[tuple[str, ...], Callable[[Path, Sequence[Row]], Ratings]] = {("filename", "artifact_score"): _rich_hf}
