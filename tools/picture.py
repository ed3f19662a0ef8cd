"""The README's picture of a finished run: the first held-out clips of base and aligned, and where they are defective.

python -m tools.picture runs/demo            # writes docs/pictures/demo.webp
"""

import sys
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from halo_fast import PatchGrid
from halo_fast.data import read_clip
from halo_fast.files import read_table

ROOT = Path(__file__).parents[1]
GRID = (3, 4, 4)
COUNT, SCALE, GAP, MARGIN = 6, 4, 6, 84  # clips; a pixel's size; between clips; for the names of the rows
PAPER, INK, RED = (250, 250, 250), (40, 40, 40), (225, 40, 40)
FRAME_SECONDS = 0.16


def shaded(video: NDArray[np.uint8], severity: list[float]) -> NDArray[np.uint8]:
    """Frames in grey [F, H, W, 3], each patch red by its severity from 0 to 1."""
    frames, height, width = video.shape[:3]
    patches = PatchGrid(GRID, frames, height, width)
    share = patches.spread(torch.tensor(severity).view(GRID)).numpy()[..., None]
    grey = 60 + 0.6 * video.mean(-1, keepdims=True).repeat(3, -1)
    return (grey + share * (np.array(RED) - grey)).round().astype(np.uint8)


def rows_of(run: Path) -> tuple[dict[str, list[NDArray[np.uint8]]], dict[str, float]]:
    """The clips of each row of the picture, and the mean severity of either model over all held-out clips."""
    table = read_table(run / "evaluate" / "clips.parquet").to_pylist()
    rows: dict[str, list[NDArray[np.uint8]]] = {"base": [], "defective": [], "aligned": []}
    for arm in ("base", "aligned"):
        for row in [row for row in table if row["arm"] == arm][:COUNT]:
            video = read_clip(run / "evaluate" / row["video"]).numpy()
            rows[arm].append(video)
            if arm == "base":
                rows["defective"].append(shaded(video, row["severity"]))
    means = {
        arm: float(np.mean([row["severity"] for row in table if row["arm"] == arm])) for arm in ("base", "aligned")
    }
    return rows, means


def draw(run: Path, output: Path) -> None:
    """Write the animated picture."""
    rows, means = rows_of(run)
    frames, side = rows["base"][0].shape[0], rows["base"][0].shape[1] * SCALE
    size = MARGIN + COUNT * (side + GAP), len(rows) * (side + GAP) + GAP
    font, small = ImageFont.load_default(15), ImageFont.load_default(12)
    notes = {name: f"severity {value:.2f}" for name, value in means.items()} | {"defective": "in red"}
    pictures = []
    for frame in range(frames):
        picture = Image.new("RGB", size, PAPER)
        pen = ImageDraw.Draw(picture)
        for line, (name, clips) in enumerate(rows.items()):
            top = GAP + line * (side + GAP)
            pen.text((8, top + side // 2 - 18), name, INK, font)
            pen.text((8, top + side // 2 + 2), notes[name], INK, small)
            for column, clip in enumerate(clips):
                enlarged = Image.fromarray(clip[frame]).resize((side, side), Image.Resampling.NEAREST)
                picture.paste(enlarged, (MARGIN + column * (side + GAP), top))
        # few colours, which a lossless picture holds in little
        pictures.append(picture.quantize(128, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).convert("RGB"))
    pause = round(1000 * FRAME_SECONDS)
    pictures[0].save(output, save_all=True, append_images=pictures[1:], duration=pause, loop=0, lossless=True, method=6)
    print(f"{output}: {output.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    draw(Path(sys.argv[1]), ROOT / "docs" / "pictures" / "demo.webp")
