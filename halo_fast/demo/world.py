"""A small world: real handwritten digits (scikit-learn's load_digits) in motion, with captions that name everything.

Every clip is 9 RGB frames of 32 x 32 pixels; its caption names digit, colour, direction, speed and background:
"a green 7 drifts left over a dark field". Handwriting samples and attribute combinations are split into "train" and
"heldout", so that a held-out clip has a handwritten digit and a combination that training never saw. load_digits does
not name the writers, so other digits of one hand may be in both splits.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "Clips",
    "backdrop",
    "caption",
    "clean_clips",
    "combinations",
    "draw",
    "from_uint8",
    "handwriting",
    "heldout_prompts",
    "parse",
    "prompts",
    "render",
    "to_uint8",
    "train_prompts",
]


Split = Literal["train", "heldout"]

NUM_FRAMES = 9
SIZE = 32
DIGIT_SIZE = 24
DIGITS = tuple(str(digit) for digit in range(10))
COLOURS = {
    "red": (0.95, 0.15, 0.15),
    "green": (0.15, 0.85, 0.20),
    "blue": (0.20, 0.35, 1.00),
    "yellow": (0.95, 0.90, 0.15),
    "magenta": (0.95, 0.20, 0.90),
    "cyan": (0.15, 0.90, 0.95),
}
DIRECTIONS = {"left": (0.0, -1.0), "right": (0.0, 1.0), "up": (-1.0, 0.0), "down": (1.0, 0.0)}
SPEEDS = {"drifts": 0.4, "races": 1.0}  # pixels per frame
BACKGROUNDS = ("dark", "grey", "striped")
WORDS = ("a", *COLOURS, *DIGITS, *SPEEDS, *DIRECTIONS, "over", *BACKGROUNDS, "field")

Attributes = tuple[str, str, str, str, str]  # digit, colour, speed, direction, background


def caption(attributes: Attributes) -> str:
    """The caption that names the five attributes."""
    digit, colour, speed, direction, background = attributes
    return f"a {colour} {digit} {speed} {direction} over a {background} field"


def parse(prompt: str) -> Attributes:
    """The attributes that a prompt names.

    Raises:
        ValueError: not a caption of this world.
    """
    words = prompt.split()
    well_formed = len(words) == 9 and (words[0], words[5], words[6], words[8]) == ("a", "over", "a", "field")
    if well_formed:
        attributes: Attributes = (words[2], words[1], words[3], words[4], words[7])
        known = (DIGITS, tuple(COLOURS), tuple(SPEEDS), tuple(DIRECTIONS), BACKGROUNDS)
        if all(word in names for word, names in zip(attributes, known, strict=True)):
            return attributes
    raise ValueError(
        f'prompt: expected "a COLOUR DIGIT SPEED DIRECTION over a BACKGROUND field", got {prompt!r}; '
        f"colours {', '.join(COLOURS)}; speeds {', '.join(SPEEDS)}; backgrounds {', '.join(BACKGROUNDS)}"
    )


@lru_cache
def combinations(split: Split) -> tuple[Attributes, ...]:
    """All attribute combinations of a split; a hash of the caption puts one in five into "heldout"."""
    chosen = []
    for attributes in product(DIGITS, COLOURS, SPEEDS, DIRECTIONS, BACKGROUNDS):
        held_out = hashlib.sha256(caption(attributes).encode()).digest()[0] % 5 == 0
        if held_out == (split == "heldout"):
            chosen.append(attributes)
    return tuple(chosen)


@lru_cache
def handwriting(split: Split) -> tuple[Tensor, ...]:
    """The handwriting of a split: for each digit a tensor [samples, 24, 24] in [0, 1]; every fifth is in "heldout"."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    # the 8 x 8 scans cut strokes at their border; a blank frame lets strokes end softly
    images = F.interpolate(F.pad(images, (1, 1, 1, 1)), size=(DIGIT_SIZE, DIGIT_SIZE), mode="bicubic").clamp(0, 1)[:, 0]
    # a steeper edge than the interpolation's, so that strokes are in focus
    images = torch.sigmoid((images - 0.45) * 9)
    images = (images - images.amin()) / (images.amax() - images.amin())
    labels = torch.tensor(data.target)
    held_out = torch.arange(len(labels)) % 5 == 0
    return tuple(images[(labels == digit) & (held_out == (split == "heldout"))] for digit in range(10))


@dataclass(frozen=True)
class Clips:
    """A batch of clean clips: video and background [N, 9, 3, 32, 32] float32 in [0, 1], and their attributes."""

    video: Tensor
    background: Tensor
    attributes: tuple[Attributes, ...]

    @property
    def prompts(self) -> list[str]:
        return [caption(attributes) for attributes in self.attributes]


def _choose(count: int, choices: int, generator: torch.Generator) -> list[int]:
    return torch.randint(choices, (count,), generator=generator).tolist()


def prompts(split: Split, count: int | None, seed: int = 0) -> list[str]:
    """Distinct captions of a split, in an order drawn from `seed`.

    Args:
        split: "train" or "heldout".
        count: how many; None for all.
        seed: of the order.

    Raises:
        ValueError: the split has fewer.
    """
    known = combinations(split)
    if count is not None and count > len(known):
        raise ValueError(f"count: the {split} split has {len(known)} distinct prompts, got {count}")
    order = torch.randperm(len(known), generator=torch.Generator().manual_seed(seed)).tolist()
    return [caption(known[index]) for index in order[:count]]


def train_prompts(count: int | None, seed: int) -> list[str]:
    """Captions of the train split, registered as the prompts "demo:train"."""
    return prompts("train", count, seed)


def heldout_prompts(count: int | None, seed: int) -> list[str]:
    """Captions of the heldout split, registered as the prompts "demo:heldout"."""
    return prompts("heldout", count, seed)


def backdrop(background: str) -> Tensor:
    """The static background [3, 32, 32] that a word names."""
    if background == "striped":
        column = torch.arange(SIZE, dtype=torch.float32)
        stripes = 0.22 + 0.12 * torch.sin(column * (2 * torch.pi / 8))
        return stripes.expand(3, SIZE, SIZE).clone()
    return torch.full((3, SIZE, SIZE), {"dark": 0.08, "grey": 0.40}[background])


def render(attributes: list[Attributes], split: Split, generator: torch.Generator, wander: float = 1.0) -> Clips:
    """Draw one clip for each tuple of attributes; sample and start are random, motion is uniform and stays in view.

    Args:
        attributes: of each clip.
        split: of the handwriting.
        generator: of every random choice.
        wander: how far the start may be from the place that centres the path, as a share of the free room, 0 to 1.
    """
    samples_of = handwriting(split)
    glyphs = []
    offsets = torch.empty(len(attributes), NUM_FRAMES, 2)
    frames = torch.arange(NUM_FRAMES, dtype=torch.float32)[:, None]
    room = SIZE - DIGIT_SIZE
    for index, (digit, _, speed, direction, _) in enumerate(attributes):
        samples = samples_of[int(digit)]
        glyphs.append(samples[_choose(1, len(samples), generator)[0]])
        step = torch.tensor(DIRECTIONS[direction]) * SPEEDS[speed]
        travel = step * (NUM_FRAMES - 1)
        slack = room - travel.abs()
        centre = (room - travel) / 2
        start = centre + wander * slack * (torch.rand(2, generator=generator) - 0.5)
        offsets[index] = start + step * frames
    ink = _place(torch.stack(glyphs), offsets)
    background = torch.stack([backdrop(names[4]) for names in attributes])[:, None].expand(-1, NUM_FRAMES, -1, -1, -1)
    colour = torch.tensor([COLOURS[names[1]] for names in attributes])[:, None, :, None, None]
    video = background * (1 - ink) + colour * ink
    return Clips(video, background, tuple(attributes))


def _place(glyphs: Tensor, offsets: Tensor) -> Tensor:
    """Put glyphs [N, 24, 24] at sub-pixel (row, column) offsets [N, 9, 2]: ink [N, 9, 1, 32, 32]."""
    count, frames = offsets.shape[:2]
    pixel = torch.arange(SIZE, dtype=torch.float32)
    rows = (pixel[None, None] - offsets[..., 0:1] + 0.5) * (2 / DIGIT_SIZE) - 1
    columns = (pixel[None, None] - offsets[..., 1:2] + 0.5) * (2 / DIGIT_SIZE) - 1
    grid = torch.stack(
        (columns[:, :, None, :].expand(-1, -1, SIZE, -1), rows[:, :, :, None].expand(-1, -1, -1, SIZE)), dim=-1
    )
    source = glyphs[:, None].expand(-1, frames, -1, -1).reshape(count * frames, 1, DIGIT_SIZE, DIGIT_SIZE)
    placed = F.grid_sample(source, grid.reshape(count * frames, SIZE, SIZE, 2), align_corners=False)
    return placed.reshape(count, frames, 1, SIZE, SIZE)


def draw(split: Split, count: int, generator: torch.Generator, wander: float = 1.0) -> Clips:
    """`count` clean clips with attribute combinations drawn at random from a split; `wander` as in `render`."""
    known = combinations(split)
    return render([known[index] for index in _choose(count, len(known), generator)], split, generator, wander)


def to_uint8(video: Tensor) -> Tensor:
    """[N, F, 3, H, W] float in [0, 1] -> [N, F, H, W, 3] uint8."""
    return (video.permute(0, 1, 3, 4, 2) * 255).round().clamp(0, 255).to(torch.uint8)


def from_uint8(video: Tensor) -> Tensor:
    """[N, F, H, W, 3] uint8 -> [N, F, 3, H, W] float32 in [0, 1]."""
    return video.permute(0, 1, 4, 2, 3).float() / 255


def clean_clips(count: int, seed: int, split: Split = "heldout") -> tuple[Tensor, list[str]]:
    """Clean clips as uint8 [N, 9, 32, 32, 3] with their captions: the zero of the defect meter."""
    clips = draw(split, count, torch.Generator().manual_seed(seed))
    return to_uint8(clips.video), clips.prompts
