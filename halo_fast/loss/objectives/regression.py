"""Errors weighted by rewards, without pairs and without a reference."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from halo_fast.loss.inputs import Inputs
from halo_fast.loss.objectives.base import Objective, Preferences, Table, check_fields, per_patch, used_labels

__all__ = ["WeightedRegression"]


@dataclass(frozen=True)
class WeightedRegression(Objective):
    """One sample has the loss kappa (video_weight r E + patch_weight sum_p (Z_p / sum Z) r_p E_p); NaN is no label.

    Args:
        video_weight: weight of the video's term, at least 0.
        patch_weight: weight of the patches' term, at least 0.

    Source: LiFT, Wang et al. 2024, arXiv 2412.04814; by patch: Huang et al. 2024, arXiv 2412.03177.
    """

    video_weight: float = 1.0
    patch_weight: float = 1.0

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def paired(self) -> bool:
        return False

    @property
    def needs_reference(self) -> bool:
        return False

    @property
    def labels(self) -> frozenset[str]:
        return used_labels(self.video_weight, self.patch_weight)

    def preferences(self, inputs: Inputs) -> Preferences:
        """None: a regression has no logits."""
        return Preferences(None, None)

    def table(self, inputs: Inputs) -> Table:
        """Loss and coefficients of N samples; all logits are 0."""
        error = inputs.error()
        video, patch = inputs.video_rewards, inputs.patch_rewards
        weight, labelled = torch.zeros_like(error), torch.zeros_like(error, dtype=torch.bool)
        if video is not None and self.video_weight:
            weight = weight + self.video_weight * per_patch(video.nan_to_num(nan=0.0))
            labelled = labelled | per_patch(~video.isnan())
        if patch is not None and self.patch_weight:
            weight = weight + self.patch_weight * patch.nan_to_num(nan=0.0)
            labelled = labelled | ~patch.isnan()
        if inputs.kappa is not None:
            weight = weight * per_patch(inputs.kappa)
        active = labelled.flatten(1).any(1).to(error.dtype)
        share = active / active.sum().clamp(min=1)
        coefficients = weight * inputs.volume(error) * per_patch(share)
        loss = (coefficients * error).sum()
        return Table(loss, coefficients, torch.zeros_like(active), torch.zeros_like(error), active, None, error)
