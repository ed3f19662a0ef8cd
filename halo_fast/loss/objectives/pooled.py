"""One preference for all labelled elements of a pair, beside the video's: DenseDPO, LocalDPO."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from halo_fast.loss.inputs import Inputs
from halo_fast.loss.objectives.base import PairObjective, Table, half_scales, per_patch, total
from halo_fast.loss.reference import halves, link, reduce_pairs, winner_share

__all__ = ["PooledDPO"]


@dataclass(frozen=True)
class PooledDPO(PairObjective):
    """Two logits a pair: the video's, and one over all labelled elements.

    One pair has the loss
        video_weight w_v phi(z_v) + patch_weight phi(z_m),   z_m = -(patch_beta kappa / 2) sum_p s_p m_p D_p
        + kappa sft_weight E(video winner) + kappa patch_sft_weight sum_p m_p E_p(patch's winner)
    with the pool m_p = w_p Z_p / sum_q w_q Z_q, or w_p Z_p / sum_q Z_q without ``normalize``. Fields, s, w, z_v and D_p
    are those of ``GranDPO``. With video_weight 0 there is one logit, which stands in video_logits.

    Args:
        normalize: divide the pool by the sum of its weights; else by the size of the video.

    Source: DenseDPO, arXiv 2506.03517, eq. 7; LocalDPO, arXiv 2601.04068.
    """

    normalize: bool = True

    @property
    def shared_logit(self) -> bool:
        return not self.video_weight

    def table(self, inputs: Inputs) -> Table:
        """Loss, coefficients and logits of B pairs."""
        log_ratio, error, loser_scale = self.errors(inputs)
        a, b = halves(log_ratio)
        margin = a - b  # -D_p
        volume = inputs.volume(log_ratio)
        video_scale, patch_scale = half_scales(self, inputs, margin.shape[0])
        video, patch = self.preferences(inputs)
        video = margin.new_zeros(margin.shape[0]) if video is None else video
        patch = torch.zeros_like(margin) if patch is None else patch
        pool = self._pool(patch, volume)
        labelled = (total(patch != 0) > 0).to(margin.dtype)

        groups = [
            (per_patch(video.sign()) * volume, video_scale, self.video_weight * video.abs(), self.caps[0]),
            (pool, patch_scale, self.patch_weight * labelled, self.caps[1]),
        ]
        pair_loss, slope, logits = torch.zeros_like(video), torch.zeros_like(margin), []
        for pooling, scale, weight, cap in groups:
            z = scale * total(pooling * margin)
            value, derivative = link(z, self.link, self.link_parameter, cap)
            if inputs.pair_weight is not None:
                weight = weight * inputs.pair_weight
            pair_loss = pair_loss + weight * value
            slope = slope - per_patch(weight * derivative * scale) * pooling
            logits.append(z)

        active = sum(weight for _, _, weight, _ in groups) > 0
        active = active | ((video != 0) & (self.sft_weight > 0)) | ((labelled > 0) & (self.patch_sft_weight > 0))
        active = active.to(margin.dtype)
        needed = self.supervised or self.loser_guard
        supervision = self._supervision(inputs, video, patch, pool, volume) if needed else None
        loss, coefficients = reduce_pairs(pair_loss, slope, active, supervision, error, loser_scale)
        patch_logits = per_patch(patch_scale) * patch.sign() * margin
        return Table(loss, coefficients, logits[1 if self.shared_logit else 0], patch_logits, active, log_ratio, error)

    def _pool(self, patch: Tensor, volume: Tensor) -> Tensor:
        """s_p m_p [B, f, h, w]."""
        pool = patch * volume
        if not self.normalize:
            return pool
        weight = total(pool.abs())
        return pool / per_patch(torch.where(weight > 0, weight, 1.0))

    def _supervision(self, inputs: Inputs, video: Tensor, patch: Tensor, pool: Tensor, volume: Tensor) -> Tensor:
        """Weights [2B, f, h, w] of the errors in the supervised terms."""
        weights = winner_share(patch, self.patch_sft_weight * pool.abs())
        whole = self.sft_weight * volume.expand_as(patch)
        weights = weights + winner_share(per_patch(video).expand_as(patch), whole)
        return weights if inputs.kappa is None else weights * per_patch(inputs.kappa.repeat(2))
