"""MaPO: preference of whole videos without a reference."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from halo_fast.loss.inputs import Inputs
from halo_fast.loss.objectives.base import Objective, Preferences, Table, check_fields, per_patch, total
from halo_fast.loss.reference import halves, link, signed_weights

__all__ = ["MaPO"]

# Of the paper: the number of training timesteps T, and the steepness a of its likelihood proxy.
_STEPS, _STEEPNESS = 1000.0, 0.5


@dataclass(frozen=True)
class MaPO(Objective):
    """One pair has the loss w (E_w - video_beta log sigma(z)), z = T (f(E_w) - f(E_l)), f(E) = a E / (e^{aE} - 1).

    E_w and E_l are the errors of winner and loser times kappa, w = |r_a - r_b|^gamma where |r_a - r_b| > delta, else 0;
    T = 1000, a = 1/2.

    Args:
        video_beta: above 0, weight of the preference beside the winner's error.
        video_gamma: exponent of a pair's weight.
        video_delta: a gap of video rewards up to this is a tie.

    Source: Hong et al. 2024, arXiv 2406.06424.
    """

    video_beta: float | Tensor = 0.1
    video_gamma: float = 0.0
    video_delta: float = 0.0

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def needs_reference(self) -> bool:
        return False

    @property
    def labels(self) -> frozenset[str]:
        return frozenset({"video"})

    def preferences(self, inputs: Inputs) -> Preferences:
        """Signed weights of the videos alone."""
        assert inputs.video_rewards is not None
        return Preferences(signed_weights(inputs.video_rewards, self.video_gamma, self.video_delta), None)

    def table(self, inputs: Inputs) -> Table:
        """Loss, coefficients and logits of B pairs."""
        error = inputs.error()
        volume = inputs.volume(error)
        weight = inputs.kappa.repeat(2) if inputs.kappa is not None else error.new_ones(error.shape[0])
        a, b = halves(weight * total(volume * error))
        video, _ = self.preferences(inputs)
        assert video is not None
        sign, pair_weight = video.sign(), video.abs()
        f_a, slope_a = _likelihood(a)
        f_b, slope_b = _likelihood(b)
        z = _STEPS * sign * (f_a - f_b)
        value, derivative = link(z, "sigmoid", 0.0)
        active = (pair_weight > 0).to(error.dtype)
        pair_loss = pair_weight * (torch.where(sign > 0, a, b) + self.video_beta * value)
        pull = _STEPS * self.video_beta * pair_weight * derivative * sign
        per_sample = torch.cat([pair_weight * (sign > 0) + pull * slope_a, pair_weight * (sign < 0) - pull * slope_b])
        share = active / active.sum().clamp(min=1)
        coefficients = per_patch(per_sample * weight * share.repeat(2)) * volume
        no_logits = error.new_zeros((a.shape[0], *error.shape[1:]))
        return Table((pair_loss * share).sum(), coefficients, z, no_logits, active, None, error)


def _likelihood(error: Tensor) -> tuple[Tensor, Tensor]:
    """f(E) = x / (e^x - 1) at x = a E, and df/dE."""
    x = _STEEPNESS * error
    small = x < 0.05
    safe = torch.where(small, 1.0, x)
    f = torch.where(small, 1 - x / 2 + x**2 / 12 - x**4 / 720, safe / torch.expm1(safe))
    # f' = (f / x) (1 - x - f) cancels near 0, where its series is used.
    series = -0.5 + x / 6 - x**3 / 180 + x**5 / 5040
    return f, _STEEPNESS * torch.where(small, series, f / safe * (1 - safe - f))
