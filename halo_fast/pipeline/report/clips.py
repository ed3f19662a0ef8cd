"""Clips and frames in the form a browser shows: data: URIs and inline SVG."""

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from halo_fast.agreement.arms import DEFECTIVE
from halo_fast.data.clips import read_clip
from halo_fast.errors import UserError
from halo_fast.files import progress, read_table

__all__ = ["browser_picture", "browser_video", "compared_clips", "severity_strip"]

_SIDE = 160  # pixels: small clips are enlarged to this height


def compared_clips(folder: Path, count: int, grid: tuple[int, ...], fps: int) -> list[dict[str, Any]]:
    """The first evaluated prompts and seeds that have a base and an aligned clip, as the template reads them.

    Args:
        folder: of the stage evaluate.
        count: prompts.
        grid: patches along time, height and width.
        fps: frames a second.

    Raises:
        UserError: an unreadable clip, severities of another grid, or no such prompt.
    """
    rows = read_table(folder / "clips.parquet").to_pylist()
    aligned = {(row["prompt"], row["seed"]): row for row in rows if row["arm"] == "aligned"}
    pairs = [
        (row, aligned[row["prompt"], row["seed"]])
        for row in rows
        if row["arm"] == "base" and (row["prompt"], row["seed"]) in aligned
    ][:count]
    if not pairs:
        raise UserError(f"{folder / 'clips.parquet'}: no prompt has both a base and an aligned clip; redo evaluate")
    return [
        {
            "prompt": base["prompt"],
            "seed": base["seed"],
            "arms": [_arm(folder, row, grid, fps) for row in (base, other)],
        }
        for base, other in progress(pairs, len(pairs), "report: encoding clips")
    ]


def _arm(folder: Path, row: Mapping[str, Any], grid: tuple[int, ...], fps: int) -> dict[str, Any]:
    """One clip as the template reads it: video, first frame, patches shaded by severity, mean severity."""
    frames = read_clip(folder / row["video"]).numpy()
    severity = row.get("severity")
    if severity is not None and len(severity) != grid[0] * grid[1] * grid[2]:
        raise UserError(
            f"{folder / 'clips.parquet'}: {row['clip_id']} has {len(severity)} severities, expected one for each patch "
            f"of grid {tuple(grid)}; redo evaluate"
        )
    return {
        "name": row["arm"],
        "video": browser_video(frames, fps),
        "poster": browser_picture(frames[0]),
        "strip": severity_strip(frames, severity, grid) if severity is not None else None,
        "mean": sum(severity) / len(severity) if severity is not None else None,
    }


def browser_video(frames: np.ndarray[Any, Any], fps: int) -> str:
    """A clip as H.264 in yuv420p, in a data: URI; small clips are enlarged without smoothing.

    Args:
        frames: uint8 [F, H, W, 3].
        fps: frames a second.
    """
    import av

    _, height, width, _ = frames.shape
    scale = max(1, round(_SIDE / height))
    shape = tuple(side * scale - side * scale % 2 for side in (height, width))  # yuv420p needs even sides
    large = frames.repeat(scale, axis=1).repeat(scale, axis=2)[:, : shape[0], : shape[1]]
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        # one thread: the bytes must not depend on the machine; x264's mbtree reads uninitialised memory
        options = {"crf": "18", "preset": "slow", "threads": "1", "mbtree": "0"}
        stream = container.add_stream("libx264", rate=fps, options=options)
        stream.height, stream.width = shape
        stream.pix_fmt = "yuv420p"
        bt709 = 1
        stream.codec_context.color_primaries = stream.codec_context.color_trc = bt709
        stream.codec_context.colorspace = bt709
        for picture in large:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            container.mux(stream.encode(frame.reformat(format="yuv420p", dst_colorspace=bt709)))
        container.mux(stream.encode())
    return _data_uri("video/mp4", file.getvalue())


def severity_strip(frames: np.ndarray[Any, Any], severity: Sequence[float], grid: tuple[int, ...]) -> list[Markup]:
    """Frames of the first, middle and last time patch as SVG, each patch shaded by its severity.

    Args:
        frames: uint8 [F, H, W, 3].
        severity: of every patch, in [0, 1], the order of grid [f, h, w].
        grid: patches along time, height and width.
    """
    _, height, width, _ = frames.shape
    cells = np.asarray(severity, dtype=float).reshape(grid)
    times = sorted({0, (grid[0] - 1) // 2, grid[0] - 1})
    pictures = []
    for time in times:
        frame = round(time * (len(frames) - 1) / max(grid[0] - 1, 1))
        shades = [
            Markup(
                "<rect class='{}' x='{}' y='{}' width='{}' height='{}' fill-opacity='{:.2f}'>"
                "<title>severity {:.2f}</title></rect>"
            ).format("cell defective" if cells[time, row, column] > DEFECTIVE else "cell", x0, y0, x1 - x0, y1 - y0,
                     0.85 * min(max(cells[time, row, column], 0), 1), cells[time, row, column])
            for row in range(grid[1])
            for column in range(grid[2])
            for y0, y1 in [(row * height // grid[1], (row + 1) * height // grid[1])]
            for x0, x1 in [(column * width // grid[2], (column + 1) * width // grid[2])]
        ]  # fmt: skip
        label = (
            f"frame {frame + 1}: {(cells[time] > DEFECTIVE).sum()} of {cells[time].size} patches defective, "
            f"mean severity {cells[time].mean():.2f}"
        )
        pictures.append(
            Markup(
                "<svg viewBox='0 0 {0} {1}' role='img' aria-label='{2}'>"
                "<image href='{3}' width='{0}' height='{1}'/>{4}</svg>"
            ).format(width, height, label, browser_picture(frames[frame]), Markup("").join(shades))
        )
    return pictures


def browser_picture(frame: np.ndarray[Any, Any]) -> str:
    """A frame (uint8 [H, W, 3]) in PNG as a data: URI."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(frame).save(file, "PNG")
    return _data_uri("image/png", file.getvalue())


def _data_uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
