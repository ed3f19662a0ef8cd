"""Score a folder of clips with a trained reward model: a table of scores, and a picture of each clip's patch map.

    python examples/score_my_clips.py clips/ runs/mine/reward --grid "[7, 4, 6]"

The folder holds x.mp4 with its prompt in x.txt. Beside each clip x.png is written, the worst moment of it with weak
patches tinted red, and scores.csv with a row for each clip. Scores are 1 to 5, 5 best.
"""

import csv
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from halo_fast import PatchGrid
from halo_fast.data import read_clip
from halo_fast.rewards import RewardModel


def draw_map(video: Tensor, scores: Tensor, patches: PatchGrid) -> Image.Image:
    """The frame in the middle of the worst moment, and beside it the same frame with its patch scores in red."""
    moment = int(scores.flatten(1).mean(1).argmin())
    first, last = patches.pixel_edges(0)[moment : moment + 2]
    frame = (first + last) // 2
    severity = (5 - patches.spread(scores)[frame].clamp(1, 5)) / 4
    picture = video[frame].float()
    red = torch.tensor([220.0, 30.0, 30.0])
    tinted = picture + 0.7 * severity[..., None] * (red - picture)
    return Image.fromarray(torch.cat([picture, tinted], dim=1).round().to(torch.uint8).numpy())


@torch.no_grad()
def main(clips: Path, reward: Path, grid: tuple[int, int, int] = (7, 4, 6)) -> list[dict]:
    """Write scores.csv and the pictures; the rows are returned."""
    model = RewardModel.load(reward)
    rows = []
    for file in sorted(clips.glob("*.mp4")):
        video, prompt = read_clip(file), file.with_suffix(".txt").read_text().strip()
        video_scores, patch_scores = model.by_dimension(model(video[None], [prompt], grid))
        quality = patch_scores["quality"].view(grid)
        frames, height, width, _ = video.shape
        patches = model.config.patches(grid, (frames, height, width))
        draw_map(video, quality, patches).save(file.with_suffix(".png"))
        row = {"clip": file.name} | {name: round(value.item(), 3) for name, value in video_scores.items()}
        rows.append(row | {"worst_patch": round(quality.min().item(), 3)})
        print(*rows[-1].values(), sep="\t")
    with (clips / "scores.csv").open("w", newline="") as table:
        writer = csv.DictWriter(table, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return rows


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli(main)
