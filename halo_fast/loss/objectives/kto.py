"""Diffusion-KTO: samples that are good or bad by themselves, without pairs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from halo_fast.loss.inputs import Inputs
from halo_fast.loss.objectives.base import (
    Objective,
    Preferences,
    Table,
    check_fields,
    half_scales,
    per_patch,
    total,
    used_labels,
)
from halo_fast.loss.reference import link

__all__ = ["DiffusionKTO"]


@dataclass(frozen=True)
class DiffusionKTO(Objective):
    """Each of N samples, and each of its patches, is good (reward > 0) or bad (< 0).

    One sample has the loss
        video_weight w_v (1 - sigma(z_v)) + patch_weight sum_p w_p (1 - sigma(z_p)) / sum_p w_p
    with z = s (beta kappa / 2 g - KL), g = E(reference) - E(policy), s = sign(r), w = |r|^gamma where |r| > delta, else
    0. KL = max(mean over the batch of beta kappa / 2 g, 0) is a constant of the gradient.

    Args:
        video_weight: weight of the video's term, at least 0.
        patch_weight: weight of the patches' term, at least 0.
        video_beta: above 0, multiplies half a mean squared error; the paper's 1000 multiplies a whole one.
        patch_beta: likewise; None is video_beta / sqrt(P).
        patch_gamma: exponent of a patch's weight.
        patch_delta: a patch reward up to this size is no label.
        video_gamma: exponent of a video's weight.
        video_delta: a video reward up to this size is no label.
        anchor_weight: weight of the squared distance to the reference's predictions.

    Source: Li et al. 2024, arXiv 2404.04465.
    """

    video_weight: float = 1.0
    patch_weight: float = 1.0
    video_beta: float | Tensor = 2000.0
    patch_beta: float | Tensor | None = 2000.0
    patch_gamma: float = 1.0
    patch_delta: float = 0.0
    video_gamma: float = 1.0
    video_delta: float = 0.0
    anchor_weight: float = 0.0

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def paired(self) -> bool:
        return False

    @property
    def labels(self) -> frozenset[str]:
        return used_labels(self.video_weight, self.patch_weight)

    def preferences(self, inputs: Inputs) -> Preferences:
        """Signed weights s w of videos [N] and patches [N, f, h, w]; 0 is no label."""
        video = patch = None
        if inputs.video_rewards is not None:
            video = _signed(inputs.video_rewards, self.video_gamma, self.video_delta)
        if inputs.patch_rewards is not None:
            patch = _signed(inputs.patch_rewards, self.patch_gamma, self.patch_delta)
        return Preferences(video, patch)

    def table(self, inputs: Inputs) -> Table:
        """Loss, coefficients and logits of N samples."""
        error = inputs.error() if inputs.reference is None else None
        log_ratio = inputs.log_ratio(error)
        samples = log_ratio.shape[0]
        volume = inputs.volume(log_ratio)
        video_scale, patch_scale = half_scales(self, inputs, samples)
        video, patch = self.preferences(inputs)
        video = log_ratio.new_zeros(samples) if video is None else video
        patch = torch.zeros_like(log_ratio) if patch is None else patch

        gain = video_scale * total(volume * log_ratio)
        video_logits = video.sign() * (gain - gain.mean().clamp(min=0))
        value, derivative = link(video_logits, "kto", 0.0)
        loss = self.video_weight * video.abs() * value
        # coefficients are dL/dE_p, and g falls as E rises
        coefficients = -per_patch(self.video_weight * video * derivative * video_scale) * volume

        gain = per_patch(patch_scale) * log_ratio
        patch_logits = patch.sign() * (gain - gain[:, inputs.empty_rows :].mean().clamp(min=0))
        value, derivative = link(patch_logits, "kto", 0.0)
        weight = total(patch.abs())
        share = self.patch_weight / torch.where(weight > 0, weight, 1.0)
        loss = loss + share * total(patch.abs() * value)
        coefficients = coefficients - per_patch(share * patch_scale) * patch * derivative

        used = ((video != 0) & (self.video_weight > 0)) | ((weight > 0) & (self.patch_weight > 0))
        active = used.to(log_ratio.dtype)
        mean = active / active.sum().clamp(min=1)
        coefficients = coefficients * per_patch(mean)
        return Table((loss * mean).sum(), coefficients, video_logits, patch_logits, active, log_ratio, error)


def _signed(labels: Tensor, gamma: float, delta: float) -> Tensor:
    """sign(r) |r|^gamma, 0 up to ``delta`` and for NaN."""
    return torch.where(labels.abs() > delta, labels.sign() * labels.abs() ** gamma, 0.0)
