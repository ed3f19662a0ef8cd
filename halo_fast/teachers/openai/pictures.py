"""Pictures of a clip for a model: whole frames, and frames cut along the patch grid with numbered boxes."""

import io
import math
from dataclasses import dataclass

import numpy as np

from halo_fast.patches import PatchGrid

__all__ = ["Picture", "choose_patches", "cut_frame", "even_steps", "whole_frame"]

_GAP, _STRIP = 6, 18  # pixels between two columns, and above each row for the numbers


@dataclass(frozen=True)
class Picture:
    """A JPEG file, its size in pixels, and the detail: "high" is in full, "low" shrunk to 512 pixels."""

    data: bytes
    width: int
    height: int
    detail: str


def even_steps(start: int, stop: int, limit: int) -> list[int]:
    """At most `limit` numbers of range(start, stop) at equal steps, both ends included; a single one is the middle."""
    count = min(limit, stop - start)
    if count == 1:
        return [(start + stop - 1) // 2]
    return [start + round(index * (stop - start - 1) / (count - 1)) for index in range(count)]


def whole_frame(frame: np.ndarray) -> Picture:
    """A frame, uint8 [H, W, 3], at about 512 pixels, the size of low detail."""
    height, width = _size(frame.shape[0], frame.shape[1], 512, 512)
    return _encode(_resized(frame, height, width), "low")


def cut_frame(frame: np.ndarray, grid: PatchGrid, span: int) -> Picture:
    """A frame, uint8 [H, W, 3], cut along the grid; no pixel is covered by a line or a number.

    Args:
        frame: lies in the time span `span` of the grid.
        grid: patches; a box's number is its place in f-major order, from 1.
        span: 0 to f - 1.
    """
    from PIL import Image, ImageDraw, ImageFont

    height, width = _size(frame.shape[0], frame.shape[1], 700, 1900)  # with most gaps still within 768 and 2048
    picture = _resized(frame, height, width)
    rows = [round(edge * height / grid.height) for edge in grid.pixel_edges(1)]
    columns = [round(edge * width / grid.width) for edge in grid.pixel_edges(2)]
    _, h, w = grid.grid
    sheet = Image.new("RGB", (width + _GAP * (w + 1), height + _STRIP * h + _GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(_STRIP - 4)
    for row in range(h):
        for column in range(w):
            x, y = columns[column] + _GAP * (column + 1), rows[row] + _STRIP * (row + 1)
            sheet.paste(
                Image.fromarray(picture[rows[row] : rows[row + 1], columns[column] : columns[column + 1]]), (x, y)
            )
            draw.text((x, y - _STRIP), str((span * h + row) * w + column + 1), "black", font)
    return _encode(np.asarray(sheet), "high")


def choose_patches(video: np.ndarray, grid: PatchGrid, limit: int | None, seed: int) -> list[int]:
    """The patches that are asked about, ascending f-major numbers from 0.

    Damage mostly flickers, jumps or morphs, so the first half of a limited choice are the patches whose pixels change
    most from frame to frame. What stands still can be damaged too, and labels of moving patches alone would mislead
    the reward model: the other half is drawn evenly from the rest.

    Args:
        video: uint8 [F, H, W, 3].
        grid: patches of the video.
        limit: patches in all; None for every one.
        seed: of the drawn half.
    """
    total = math.prod(grid.grid)
    if limit is None or limit >= total:
        return list(range(total))
    rows, columns = grid.pixel_edges(1), grid.pixel_edges(2)
    changes = np.zeros(grid.grid)
    for span, (start, stop) in enumerate(zip(grid.pixel_edges(0), grid.pixel_edges(0)[1:], strict=False)):
        for frame in range(start, stop):
            before, after = (max(frame, 1) - 1, max(frame, 1)) if len(video) > 1 else (0, 0)
            change = np.abs(video[after].astype(np.int16) - video[before]).mean(axis=2)
            sums = np.add.reduceat(np.add.reduceat(change, rows[:-1], axis=0), columns[:-1], axis=1)
            changes[span] += sums / np.outer(np.diff(rows), np.diff(columns)) / (stop - start)
    order = np.argsort(-changes.ravel(), kind="stable")
    first, rest = order[: (limit + 1) // 2], order[(limit + 1) // 2 :]
    drawn = np.random.default_rng(seed).permutation(np.sort(rest))[: limit - len(first)]
    return sorted([*first.tolist(), *drawn.tolist()])


def _size(height: int, width: int, short: int, long: int) -> tuple[int, int]:
    """The size that fits a short and a long side; small pictures grow by a whole factor and stay sharp."""
    scale = min(short / min(height, width), long / max(height, width))
    scale = math.floor(scale) if scale >= 1 else scale
    return max(round(height * scale), 1), max(round(width * scale), 1)


def _resized(frame: np.ndarray, height: int, width: int) -> np.ndarray:
    from PIL import Image

    method = Image.Resampling.NEAREST if height >= frame.shape[0] else Image.Resampling.LANCZOS
    return np.asarray(Image.fromarray(frame).resize((width, height), method))


def _encode(frame: np.ndarray, detail: str) -> Picture:
    from PIL import Image

    file = io.BytesIO()
    # colour at full resolution and little loss: compression must not pass for damage
    Image.fromarray(frame).save(file, "JPEG", quality=95, subsampling=0)
    return Picture(file.getvalue(), frame.shape[1], frame.shape[0], detail)
