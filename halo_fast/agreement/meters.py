"""Meters: what measures how defective the clips of a base and an aligned model are."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from halo_fast.errors import UserError
from halo_fast.registry import create, register
from halo_fast.rewards import RewardModel

__all__ = ["Meter", "MeterRequest", "RewardMeter", "load_meter", "read_meter"]

register("meter", {"reward": "halo_fast.agreement.meters:RewardMeter"})


class Meter(Protocol):
    """Measures clips. Registered, or named by "package.module:attribute", as a callable(MeterRequest) -> Meter."""

    @property
    def clean(self) -> float:
        """Mean severity that the meter reads on clips without defects."""

    @property
    def sources(self) -> Mapping[str, Path]:
        """Files that the readings depend on, by name; a run that was measured with others is measured again."""

    @property
    def notes(self) -> Mapping[str, Any] | None:
        """What the report says of the meter's own accuracy, for JSON; None for nothing.

        A title, and parts in their order: paragraphs, and tables with caption, head and rows.
        """

    def __call__(self, videos: Tensor, prompts: Sequence[str]) -> Mapping[str, Tensor]:
        """Readings of videos uint8 [N, F, H, W, 3] with their prompts.

        Returns:
            severity [N, P] or [N, f, h, w] in [0, 1]; if measured also severity_<kind> of the same shape, and of each
            clip [N] fidelity_correct, digit_correct, colour_correct, motion_correct and motion_amount.
        """


@dataclass(frozen=True)
class MeterRequest:
    """What a meter is made for.

    Args:
        grid: patches (f, h, w).
        video_size: frames, height and width of the clips.
        prompts: of the clips.
        seed: of whatever the meter draws at random.
        reward_model: loads the run's reward model; only a meter that reads it pays for that.
    """

    grid: tuple[int, int, int]
    video_size: tuple[int, int, int]
    prompts: Sequence[str]
    seed: int
    reward_model: Callable[[], RewardModel]


def load_meter(name: str, request: MeterRequest) -> Meter:
    """The meter of a registered or dotted name.

    Raises:
        UserError: no such meter, or one that cannot read such clips.
    """
    requires = ("clean", "sources", "notes", "__call__")
    meter: Meter = create("meter", name, "evaluate.meter", request, requires=requires)
    return meter


def read_meter(meter: Meter, videos: Tensor, prompts: Sequence[str], grid: tuple[int, int, int]) -> dict[str, Tensor]:
    """Readings of a meter, after a check that they are what `Meter` says.

    Raises:
        UserError: no severity, another number of clips or patches, or severities outside [0, 1].
    """
    readings = dict(meter(videos, prompts))
    if "severity" not in readings:
        raise UserError(f"evaluate.meter: expected readings with 'severity', got {sorted(readings)}")
    for name, values in readings.items():
        if name == "severity" or name.startswith("severity_"):
            shapes = (len(videos), math.prod(grid)), (len(videos), *grid)
            if tuple(values.shape) not in shapes:
                raise UserError(
                    f"evaluate.meter: expected {name} of shape {shapes[0]} or {shapes[1]}, clips and their patches; "
                    f"got {tuple(values.shape)}"
                )
            # scores of a reward model may leave the scale from 1 to 5
            if not isinstance(meter, RewardMeter) and not ((values >= 0) & (values <= 1)).all():
                low, high = values.min().item(), values.max().item()
                raise UserError(
                    f"evaluate.meter: expected {name} from 0, no defect, to 1; got values from {low:.3g} to "
                    f"{high:.3g}; rescale what the meter returns"
                )
        elif len(values) != len(videos):
            raise UserError(f"evaluate.meter: expected {name} of {len(videos)} clips, got {len(values)}")
    return readings


class RewardMeter:
    """Severity off the reward model's first patch dimension: (5 - score) / 4.

    For models that no meter is made for. The model was aligned to these very scores, so a gain is no independent proof.
    """

    clean = 0.0
    sources: Mapping[str, Path] = {}
    notes = None

    def __init__(self, request: MeterRequest) -> None:
        self._grid, self._load = request.grid, request.reward_model

    @torch.no_grad()
    def __call__(self, videos: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Severity [N, f, h, w]; a model that scores whole videos only gives each patch that of its video."""
        rewards = self._load()(videos, prompts, self._grid)
        video = rewards.video.mean(dim=1).view(-1, 1, 1, 1).expand(-1, *self._grid)
        return {"severity": (5 - (rewards.patches[:, 0] if rewards.patches.shape[1] else video)) / 4}
