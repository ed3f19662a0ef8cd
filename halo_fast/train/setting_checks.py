"""Checks of the settings that need no model: bounds, the objective, what excludes each other, what is installed."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec

import torch

from halo_fast.errors import UserError
from halo_fast.loss.objectives import AutoBeta, Objective, PairObjective, build
from halo_fast.loss.objectives.pooled import PooledDPO
from halo_fast.settings import validate
from halo_fast.train.config import TrainConfig

__all__ = ["build_auto_beta", "check_trackers", "checked_objective"]

logger = logging.getLogger(__name__)

_TRACKERS = ("tensorboard", "wandb")


def checked_objective(config: TrainConfig) -> Objective:
    """The objective of the settings, after all checks that need no model.

    Raises:
        UserError: naming the setting that is out of bounds, or those that exclude each other.
    """
    validate(config, "train")
    try:
        objective = build(config.objective)
    except (TypeError, ValueError) as error:
        text = str(error)
        raise UserError(f"train.{text}" if text.startswith("objective") else f"train.objective: {text}") from error
    spec = config.objective
    if type(objective) is PooledDPO and (isinstance(spec, str) or (isinstance(spec, dict) and "normalize" not in spec)):
        # rewards of patches are scores here, not a mask whose size is known
        objective = replace(objective, normalize=True)
    if objective.anchor_weight and config.reference_draws:
        raise UserError(
            "train.objective.anchor_weight: needs the reference in the loop; set train.reference_draws to null"
        )
    if objective.anchor_weight and config.schedule == "margin_first":
        raise UserError("train.objective.anchor_weight: needs both samples in one batch; set train.schedule to batched")
    if config.lr_warmup_steps > config.max_train_steps:
        logger.warning(
            "train.lr_warmup_steps: %d of %d steps, so the learning rate never reaches %g; lower it",
            config.lr_warmup_steps, config.max_train_steps, config.learning_rate,
        )  # fmt: skip
    build_auto_beta(config, objective, torch.device("cpu"))
    _check_time_weights(config.time_weights, objective)
    return objective


def _check_time_weights(weights: Sequence[float] | None, objective: Objective) -> None:
    """Raise unless the weights are not all 0 and the objective has preferences to weight."""
    if weights is None:
        return
    if not any(weights):
        raise UserError(
            f"train.time_weights: expected a number above 0 among them, got {weights}; null is 1 everywhere"
        )
    if not getattr(objective, "weighs_pairs", False):
        raise UserError(
            "train.time_weights: weights the preferences of pairs with a reference, which "
            f"{type(objective).__name__} does not have; set null"
        )


def build_auto_beta(config: TrainConfig, objective: Objective, device: torch.device) -> AutoBeta | None:
    """What adjusts the betas while training; None for constant ones.

    Raises:
        UserError: the objective has no betas to adjust, or the target is out of bounds.
    """
    if config.auto_beta is None:
        return None
    if not (isinstance(objective, PairObjective) and objective.video_weight):
        raise UserError(
            "train.auto_beta: adjusts the betas by the videos' logits, so it needs pairs, a reference and "
            f"objective.video_weight above 0; got {config.objective}; set null"
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
