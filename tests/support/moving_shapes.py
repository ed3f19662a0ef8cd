"""A tiny captioned world with planted local damage, drawn by the tests: their truth is how the clips were made."""

import os
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from halo_fast.data.clips import write_clip
from halo_fast.data.tables import ClipRow, write_rows
from halo_fast.files import write_safetensors
from halo_fast.pipeline.run import Run
from halo_fast.teachers import Clip, Label, label_in_batches

SHAPES = ("square", "disc", "cross", "ring")
COLOURS = {"red": (220, 40, 40), "green": (40, 200, 60), "blue": (60, 80, 230), "yellow": (220, 200, 40)}
DIRECTIONS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}
FRAMES, SIDE, GRID = 9, 32, (3, 4, 4)
TIME_BOUNDS = (0, 1, 5, 9)  # latent frames of a causal autoencoder that compresses time by 4


@dataclass
class Clips:
    """videos uint8 [N, F, H, W, 3], prompts, and what was planted: severity [N, 3, 4, 4], kind [N, 3, 4, 4] (-1 none),
    aligned [N] share of the named shape and colour that is shown, moving [N] whether the shape moves at all."""

    videos: np.ndarray
    prompts: list[str]
    severity: np.ndarray
    kind: np.ndarray
    aligned: np.ndarray
    moving: np.ndarray


def _mask(shape: str, row: float, column: float, radius: float) -> np.ndarray:
    y, x = np.mgrid[:SIDE, :SIDE]
    y, x = np.abs(y - row), np.abs(x - column)
    if shape == "square":
        return np.maximum(x, y) <= radius
    if shape == "disc":
        return np.hypot(x, y) <= radius
    if shape == "cross":
        return (np.minimum(x, y) <= radius / 3) & (np.maximum(x, y) <= radius)
    return (np.hypot(x, y) <= radius) & (np.hypot(x, y) >= radius * 0.6)


def draw_clip(rng: np.random.Generator, shape: str, colour: str, direction: str, speed: float) -> np.ndarray:
    """One clean clip, uint8 [F, H, W, 3]: a shape over a striped field, moving by `speed` pixels a frame."""
    stripes = 60 + 25 * np.sin(np.arange(SIDE) * rng.uniform(0.5, 0.9) + rng.uniform(0, 6))
    field = np.repeat((stripes[:, None] * np.ones(SIDE))[..., None], 3, axis=2) * rng.uniform(0.7, 1.1, 3)
    start, step = rng.uniform(12, 20, 2), np.array(DIRECTIONS[direction]) * speed
    clip = np.empty((FRAMES, SIDE, SIDE, 3))
    radius = rng.uniform(6, 9)
    for frame in range(FRAMES):
        row, column = start + step * (frame - FRAMES // 2)
        clip[frame] = np.where(_mask(shape, row, column, radius)[..., None], COLOURS[colour], field)
    return clip.clip(0, 255).astype(np.uint8)


def damage(clip: np.ndarray, place: tuple[int, int, int], kind: int, strength: float) -> np.ndarray:
    """The clip with one patch blended towards a damaged self: wrong colour, darkness, stripes or displacement."""
    f, h, w = place
    box = (slice(TIME_BOUNDS[f], TIME_BOUNDS[f + 1]), slice(8 * h, 8 * h + 8), slice(8 * w, 8 * w + 8))
    old = clip[box].astype(np.float64)
    column = np.arange(8)[None, None, :, None]
    broken = (
        old[..., [2, 0, 1]] + [90, -20, 50],
        old * 0.2,
        old + 80 * (-1.0) ** column,
        np.roll(old, 4, axis=(1, 2)) + 40,
    )
    out = clip.copy()
    out[box] = ((1 - strength) * old + strength * broken[kind]).clip(0, 255).round().astype(np.uint8)
    return out


def make_clips(count: int, seed: int, damaged_share: float = 0.5) -> Clips:
    """`count` captioned clips; a third of the captions are wrong, a sixth of the clips stand still."""
    rng = np.random.default_rng(seed)
    videos, prompts, aligned, moving = [], [], np.ones(count), np.ones(count, dtype=bool)
    severity, kinds = np.zeros((count, *GRID)), np.full((count, *GRID), -1)
    for n in range(count):
        shape, colour, direction = rng.choice(SHAPES), rng.choice(list(COLOURS)), rng.choice(list(DIRECTIONS))
        moving[n] = rng.random() > 1 / 6
        clip = draw_clip(rng, shape, colour, direction, 1.2 * moving[n])
        for place in np.ndindex(*GRID):
            if rng.random() < damaged_share:
                strength, kind = rng.random(), int(rng.integers(4))
                clip = damage(clip, place, kind, strength)
                severity[n][place], kinds[n][place] = strength, kind
        named_shape = rng.choice([s for s in SHAPES if s != shape]) if rng.random() < 1 / 6 else shape
        named_colour = rng.choice([c for c in COLOURS if c != colour]) if rng.random() < 1 / 6 else colour
        aligned[n] = ((named_shape == shape) + (named_colour == colour)) / 2
        videos.append(clip)
        prompts.append(f"a {named_colour} {named_shape} moves {direction}")
    return Clips(np.stack(videos), prompts, severity, kinds, aligned, moving)


def write_candidates(run: Run, clips: Clips) -> None:
    """The clips in the place and form of the stage `generate`, as two candidates of each prompt."""
    with run.stage("generate", {}, {}) as stage:
        if stage.done:
            return
        rows = []
        for index, prompt in enumerate(clips.prompts):
            clip_id = f"p{index // 2:04d}_s{index % 2}"
            video, latents = f"videos/{clip_id}.mp4", f"latents/{clip_id}.safetensors"
            write_clip(stage.folder / video, torch.from_numpy(clips.videos[index]), fps=8)
            write_safetensors(stage.folder / latents, {"latents": torch.zeros(4, *GRID)})
            rows.append(ClipRow(clip_id, index // 2, prompt, index % 2, index, video, latents))
        write_rows(stage.folder / "clips.parquet", rows)
        stage.finish({"clips": len(rows)})


class PlantedTeacher:
    """A teacher that answers with what was planted; it writes every question into a file before it answers."""

    grid = GRID
    name = "planted"

    def __init__(
        self, clips: Clips, questions: Path | None = None, patience: int | None = None, batch_size: int = 32
    ) -> None:
        self.clips, self.questions, self.patience, self.batch_size = clips, questions, patience, batch_size

    def labels(self, clips: Sequence[Clip], compared: Sequence[tuple[Clip, Clip]] = ()) -> Iterator[tuple[int, Label]]:
        """Labels of batches; `compared` is nothing to this teacher."""
        return label_in_batches(self.label, clips, self.batch_size)

    def label(self, videos: torch.Tensor, prompts: Sequence[str]) -> list[Label]:
        """The planted truth; after `patience` answers the process is killed before the next one."""
        if self.patience is not None:
            if not self.patience:
                os.kill(os.getpid(), signal.SIGKILL)
            self.patience -= 1
        labels = []
        for video in videos.numpy():
            # an mp4 rounds pixels by up to 2 levels: the clip is the nearest one
            gaps = np.abs(self.clips.videos.astype(np.int16) - video).mean(axis=(1, 2, 3, 4))
            index = int(gaps.argmin())
            assert gaps[index] < 2
            severity = self.clips.severity[index]
            video_scores = {
                "visual_quality": 5 - 4 * severity.mean(),
                "text_alignment": 1 + 4 * self.clips.aligned[index],
                "dynamic_degree": 5.0 if self.clips.moving[index] else 1.0,
            }
            labels.append(Label(video_scores, {"quality": (5 - 4 * severity).ravel().tolist()}))
            if self.questions is not None:
                with open(self.questions, "a") as file:
                    file.write(f"{index}\n")
        return labels
