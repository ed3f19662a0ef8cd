"""Checks of the settings that need no model: bounds, the objective, what excludes each other, what is installed."""

from collections.abc import Sequence
from importlib.util import find_spec

import torch

from halo_fast.errors import UserError
from halo_fast.loss.functional import GranDPO
from halo_fast.loss.objectives import AutoBeta, build
from halo_fast.settings import validate
from halo_fast.train.config import TrainConfig
from halo_fast.train.schedules import uses_reference

__all__ = ["build_auto_beta", "check_trackers", "checked_objective"]

_TRACKERS = ("tensorboard", "wandb")


def checked_objective(config: TrainConfig) -> GranDPO:
    """The objective of the settings, after all checks that need no model.

    Raises:
        UserError: naming the setting that is out of bounds, or those that exclude each other.
    """
    validate(config, "train")
    try:
        objective = build(config.objective)
    except (TypeError, ValueError) as error:
        raise UserError(f"train.objective: {error}") from error
    anchor = getattr(objective, "anchor_weight", 0)
    if anchor and config.reference_draws:
        raise UserError(
            "train.objective.anchor_weight: needs the reference in the loop; set train.reference_draws to null"
        )
    if anchor and config.schedule == "margin_first":
        raise UserError("train.objective.anchor_weight: needs both samples in one batch; set train.schedule to batched")
    build_auto_beta(config, objective, torch.device("cpu"))
    return objective


def build_auto_beta(config: TrainConfig, objective: GranDPO, device: torch.device) -> AutoBeta | None:
    """What adjusts the betas while training; None for constant ones.

    Raises:
        UserError: the objective has no betas to adjust, or the target is out of bounds.
    """
    if config.auto_beta is None:
        return None
    if not (uses_reference(objective) and getattr(objective, "video_weight", 0.0)):
        raise UserError(
            "train.auto_beta: adjusts the betas by the videos' logits, which this objective has not (it needs a "
            "reference and a video_weight above 0); set null"
        )
    try:
        return AutoBeta(float(objective.video_beta), config.auto_beta, device=device)
    except ValueError as error:
        raise UserError(f"train.auto_beta: {error}") from error


def check_trackers(names: Sequence[str]) -> None:
    """Raise unless every tracker of `report_to` is known and installed; accelerate itself leaves out others silently.

    Raises:
        UserError: naming the tracker and what to install.
    """
    for name in names:
        if name not in _TRACKERS:
            raise UserError(
                f"train.report_to: expected some of {', '.join(_TRACKERS)}, got {name!r}; log.csv is always written"
            )
        if find_spec(name) is None:
            raise UserError(f"train.report_to: {name} is not installed; pip install {name}, or leave it out")
