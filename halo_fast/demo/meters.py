"""Two meters that read a clip and its prompt only: how defective each patch is, and whether it still shows the prompt.

DefectMeter regresses the severity of every patch of the grid (3, 4, 4); it was trained on clips with planted defects
and never sees how a clip was made. FidelityMeter is independent of it: a classifier of digit, colour and motion
trained on clean clips alone, which does not see the prompt. Both are small convolutional nets, shipped in weights/.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from halo_fast.agreement.meters import MeterRequest
from halo_fast.demo import WEIGHTS, check_clips, world
from halo_fast.demo.defects import GRID, KINDS
from halo_fast.demo.notes import meter_notes

__all__ = ["DefectMeter", "FidelityMeter", "WorldMeter", "evidence", "targets"]

MOTIONS = tuple((speed, direction) for speed in world.SPEEDS for direction in world.DIRECTIONS)
_BATCH = 64
_CLEAN_CLIPS = 256


class WorldMeter:
    """Both meters of the demo's world as one `halo_fast.agreement.meters.Meter`.

    Raises:
        UserError: another grid or clip size than the world's, or a prompt that it does not have.
    """

    def __init__(self, request: MeterRequest) -> None:
        check_clips("meter", request.grid, request.video_size, request.prompts, "evaluation_prompts")
        self._seed = request.seed
        self._defects, self._fidelity = DefectMeter.load(), FidelityMeter.load()

    @cached_property
    def clean(self) -> float:
        """Mean severity on clean clips of the held-out split."""
        videos, prompts = world.clean_clips(_CLEAN_CLIPS, self._seed, split="heldout")
        return float(self._defects(videos, prompts)[0].mean())

    @property
    def sources(self) -> Mapping[str, Path]:
        """The weights of both."""
        return {name: WEIGHTS / f"{name}.safetensors" for name in ("defect_meter", "fidelity_meter")}

    @property
    def notes(self) -> Mapping[str, Any]:
        """What both read on held-out clips with planted defects and without."""
        return meter_notes()

    def __call__(self, videos: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Severity and severity_<kind> [N, 3, 4, 4]; what FidelityMeter gives [N]."""
        severity, by_kind = self._defects(videos, list(prompts))
        kinds = {f"severity_{kind}": by_kind[:, index] for index, kind in enumerate(KINDS)}
        return {"severity": severity, **kinds, **self._fidelity(videos, list(prompts))}


def _attribute_codes(attributes: tuple[world.Attributes, ...]) -> Tensor:
    """One-hot attributes [N, 25]."""
    names = (world.DIGITS, tuple(world.COLOURS), tuple(world.SPEEDS), tuple(world.DIRECTIONS), world.BACKGROUNDS)
    return torch.tensor(
        [[float(word == name) for word, known in zip(row, names, strict=True) for name in known] for row in attributes]
    )


def _shift(images: Tensor, offsets: Tensor) -> Tensor:
    """Move images [M, 1, H, W] by (row, column) offsets [M, 2] in pixels, bilinear; edges are repeated."""
    size = images.shape[-1]
    pixel = torch.arange(size, dtype=torch.float32)
    rows = ((pixel[None] - offsets[:, 0:1] + 0.5) * (2 / size) - 1)[:, :, None].expand(-1, -1, size)
    columns = ((pixel[None] - offsets[:, 1:2] + 0.5) * (2 / size) - 1)[:, None, :].expand(-1, size, -1)
    return F.grid_sample(images, torch.stack((columns, rows), dim=-1), padding_mode="border", align_corners=False)


def evidence(video: Tensor, attributes: tuple[world.Attributes, ...]) -> Tensor:
    """How a clip differs from what its prompt says, six channels a frame: [N, 9 * 6, 32, 32].

    Difference from the named background (3); ink, the share of the named colour (1); what is neither background nor
    that colour (1); ink against the median of all frames moved along the named motion (1).
    """
    count, frames = video.shape[:2]
    background = torch.stack([world.backdrop(names[4]) for names in attributes])[:, None]
    colour = torch.tensor([world.COLOURS[names[1]] for names in attributes])[:, None, :, None, None]
    axis = colour - background
    difference = video - background
    ink = (difference * axis).sum(2, keepdim=True) / axis.square().sum(2, keepdim=True)
    foreign = (difference - ink * axis).square().sum(2, keepdim=True).sqrt()
    step = torch.tensor([world.DIRECTIONS[n[3]] for n in attributes]) * torch.tensor(
        [[world.SPEEDS[n[2]]] for n in attributes]
    )
    travel = (step[:, None] * torch.arange(frames)[None, :, None]).flatten(0, 1)
    steady = _shift(ink.flatten(0, 1), -travel).unflatten(0, (count, frames)).median(dim=1, keepdim=True).values
    expected = _shift(steady.expand_as(ink).flatten(0, 1), travel).unflatten(0, (count, frames))
    return torch.cat((difference, ink, foreign, ink - expected), dim=2).flatten(1, 2)


class _Stage(nn.Module):
    """Two convolutions; the first is conditioned on the attributes that the prompt names."""

    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.mix = nn.Conv2d(inner, outer, 3, stride=stride, padding=1)
        self.refine = nn.Conv2d(outer, outer, 3, padding=1)
        self.prompt = nn.Linear(25, outer)
        self.norm = nn.GroupNorm(8, outer)

    def forward(self, hidden: Tensor, code: Tensor) -> Tensor:
        """Features [N, inner, y, x] and attributes [N, 25] -> [N, outer, y / stride, x / stride]."""
        hidden = F.silu(self.norm(self.mix(hidden) + self.prompt(code)[:, :, None, None]))
        return hidden + F.silu(self.refine(hidden))


class DefectMeter(nn.Module):
    """Severity of each patch, in [0, 1], and its split by kind of defect, from pixels and prompt."""

    grid = GRID
    kinds = KINDS

    def __init__(self) -> None:
        super().__init__()
        widths = (6 * world.NUM_FRAMES, 48, 64, 96, 128)
        self.stages = nn.ModuleList(
            _Stage(inner, outer, stride=1 if index == 0 else 2)
            for index, (inner, outer) in enumerate(zip(widths[:-1], widths[1:], strict=True))
        )
        self.head = nn.Conv2d(widths[-1], GRID[0] * (1 + len(KINDS)), 3, padding=1)

    @classmethod
    @lru_cache
    def load(cls, folder: Path = WEIGHTS) -> DefectMeter:
        """The shipped meter, or one that halo demo pretrain wrote to `folder`."""
        return _load(cls(), folder / "defect_meter.safetensors")

    def forward(self, video: Tensor, attributes: tuple[world.Attributes, ...]) -> Tensor:
        """Video [N, 9, 3, 32, 32] in [0, 1] -> raw estimates [N, 1 + K, 3, 4, 4]: total severity, then by kind."""
        hidden, code = evidence(video, attributes), _attribute_codes(attributes)
        for stage in self.stages:
            hidden = stage(hidden, code)
        return self.head(hidden).unflatten(1, (1 + len(KINDS), GRID[0]))

    @torch.no_grad()
    def __call__(self, videos: Tensor, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Videos uint8 [N, 9, 32, 32, 3] -> severity [N, 3, 4, 4] and severity by kind [N, K, 3, 4, 4], in [0, 1]."""
        rows = []
        for chunk, words in _batches(videos, prompts):
            rows.append(self.forward(world.from_uint8(chunk), words))
        estimate = torch.cat(rows).clamp(0, 1)
        return estimate[:, 0], estimate[:, 1:]


class FidelityMeter(nn.Module):
    """Does a clip show the digit, colour and motion that its prompt names? A classifier that never saw a defect."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 32, 64, 96)
        self.frame = nn.Sequential(
            *(
                layer
                for inner, outer in zip(widths[:-1], widths[1:], strict=True)
                for layer in (
                    nn.Conv2d(inner, outer, 3, padding=1),
                    nn.GroupNorm(8, outer),
                    nn.SiLU(),
                    nn.Conv2d(outer, outer, 3, padding=1),
                    nn.SiLU(),
                    nn.MaxPool2d(2),
                )
            ),
            nn.Flatten(),
            nn.Linear(widths[-1] * 16, 128),
            nn.SiLU(),
            nn.Dropout(0.2),
        )
        self.digit = nn.Linear(128, len(world.DIGITS))
        self.colour = nn.Linear(128, len(world.COLOURS))
        self.motion = nn.Sequential(nn.Linear(world.NUM_FRAMES * 128, 128), nn.SiLU(), nn.Linear(128, len(MOTIONS) + 2))

    @classmethod
    @lru_cache
    def load(cls, folder: Path = WEIGHTS) -> FidelityMeter:
        """The shipped meter, or one that halo demo pretrain wrote to `folder`."""
        return _load(cls(), folder / "fidelity_meter.safetensors")

    def forward(self, video: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Video [N, 9, 3, 32, 32] -> logits: digit [N, 10], colour [N, 6], motion [N, 8]; travel [N, 2] in pixels."""
        features = self.frame(video.flatten(0, 1)).unflatten(0, video.shape[:2])
        motion = self.motion(features.flatten(1))
        digit, colour = self.digit(features).mean(dim=1), self.colour(features).mean(dim=1)
        return digit, colour, motion[:, :-2], motion[:, -2:]

    @torch.no_grad()
    def __call__(self, videos: Tensor, prompts: list[str]) -> dict[str, Tensor]:
        """Videos uint8 [N, 9, 32, 32, 3] -> probabilities, verdicts [N] of digit, colour, direction; travel."""
        rows: dict[str, list[Tensor]] = {}
        for chunk, attributes in _batches(videos, prompts):
            digit, colour, motion, travel = self.forward(world.from_uint8(chunk))
            # the travel says how fast; the verdict on motion is about the direction alone
            direction = motion.softmax(-1).unflatten(1, (len(world.SPEEDS), -1)).sum(1)
            named = targets(attributes)
            named["motion"] %= len(world.DIRECTIONS)
            for name, chances in (("digit", digit.softmax(-1)), ("colour", colour.softmax(-1)), ("motion", direction)):
                rows.setdefault(name, []).append(chances.gather(1, named[name][:, None])[:, 0])
                rows.setdefault(f"{name}_correct", []).append((chances.argmax(-1) == named[name]).float())
            rows.setdefault("motion_amount", []).append(travel.norm(dim=-1))
        result = {name: torch.cat(values) for name, values in rows.items()}
        result["fidelity_correct"] = result["digit_correct"] * result["colour_correct"] * result["motion_correct"]
        return result


def targets(attributes: tuple[world.Attributes, ...]) -> dict[str, Tensor]:
    """Class indices [N] of digit, colour and motion, and travel [N, 2] in pixels, that attributes name."""
    colours = tuple(world.COLOURS)
    steps = [[component * world.SPEEDS[row[2]] for component in world.DIRECTIONS[row[3]]] for row in attributes]
    return {
        "digit": torch.tensor([int(row[0]) for row in attributes]),
        "colour": torch.tensor([colours.index(row[1]) for row in attributes]),
        "motion": torch.tensor([MOTIONS.index((row[2], row[3])) for row in attributes]),
        "travel": torch.tensor(steps) * (world.NUM_FRAMES - 1),
    }


def _batches(videos: Tensor, prompts: list[str]) -> Iterator[tuple[Tensor, tuple[world.Attributes, ...]]]:
    expected = (world.NUM_FRAMES, world.SIZE, world.SIZE, 3)
    if videos.dtype != torch.uint8 or tuple(videos.shape[1:]) != expected:
        raise ValueError(f"videos: expected uint8 [N, 9, 32, 32, 3], got {videos.dtype} {list(videos.shape)}")
    if len(videos) != len(prompts):
        raise ValueError(f"prompts: expected one for each of {len(videos)} videos, got {len(prompts)}")
    for start in range(0, len(videos), _BATCH):
        yield (
            videos[start : start + _BATCH],
            tuple(world.parse(prompt) for prompt in prompts[start : start + _BATCH]),
        )


def _load(meter: Any, file: Path) -> Any:
    meter.load_state_dict({key: value.float() for key, value in load_file(file).items()})
    return meter.eval()
