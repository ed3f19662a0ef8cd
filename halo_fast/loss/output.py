"""What the public call returns."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from halo_fast.loss.figures import PairFigures
from halo_fast.loss.inputs import Inputs
from halo_fast.loss.objectives.base import Objective

__all__ = ["GranDPOOutput"]


@dataclass(frozen=True)
class GranDPOOutput:
    """What ``gran_dpo`` returns; every tensor but ``loss`` is detached.

    Unpaired objectives have N samples in place of B pairs.

    Args:
        loss: 0-d, the mean over the pairs that have at least one group that is not a tie. Averaging this over ranks is
            exact only if all have the same ``num_pairs``. For exact means scale it by num_pairs * world_size /
            (num_pairs summed over ranks) before backward, which DDP's average of gradients then turns into the global
            mean.
        patch_logits: z_p [B, f, h, w], signed by the patch's own preference: above 0 where the policy agrees.
        video_logits: z_v [B], likewise. Objectives with one logit for all labels of a pair (dense_dpo) have it here.
        log_ratio: -d_p [2B, f, h, w], how much closer to the target the policy is than the reference; None without
            reference.
        active: [B], 1 for each pair that counts in the mean, else 0.
    """

    loss: Tensor
    patch_logits: Tensor
    video_logits: Tensor
    log_ratio: Tensor | None
    active: Tensor
    _objective: Objective = field(repr=False)
    _inputs: Inputs = field(repr=False)
    _error: Tensor | None = field(repr=False)

    @property
    def num_pairs(self) -> Tensor:
        """Number of pairs in the mean, 0-d."""
        return self.active.sum()

    def metrics(self) -> dict[str, Tensor]:
        """What to log, as 0-d device tensors: no host sync; docs/dropin.md says what healthy values are.

        Returns:
            loss, num_pairs, model_mse (mean E of the policy), ref_mse (of the reference).
            Of video labels: rewards/chosen, rewards/rejected, rewards/margins (implicit rewards of winner and loser and
            their gap z_v), rewards/accuracies = implicit_acc (share of z_v > 0, a zero counts one half), win_gap and
            lose_gap (E - E_ref of winner and loser), video/ties.
            Of patch labels: patch/margins, patch/accuracies, patch/ties.
            Over all labelled logits: gradient_factor (mean sigma(-z)), saturation (share of |z| > 10).
            Keys of a kind of label that was not given are absent; a mean over nothing is NaN.
        """
        return self.figures().metrics()

    def figures(self, t: Tensor | None = None) -> PairFigures:
        """The numbers behind ``metrics()`` for each pair and patch, to be kept, joined and averaged by groups.

        Costs one pass over the latents unless the loss needed the errors already.

        Args:
            t: times of the samples, [2B] as in the batch or [B]; the two samples of a pair share theirs.
        """
        inputs, error = self._inputs, self._error
        if error is None:
            error = inputs.error()
        video, patch = self._objective.preferences(inputs)
        scale = torch.as_tensor(0.5 * self._objective.video_beta, dtype=error.dtype, device=error.device)
        scale = scale.expand_as(self.active)
        return PairFigures(
            loss=self.loss.detach(),
            active=self.active,
            error=error,
            log_ratio=self.log_ratio,
            video_logits=self.video_logits,
            patch_logits=self.patch_logits,
            video=video,
            patch=patch,
            scale=scale if inputs.kappa is None else scale * inputs.kappa,
            volume=inputs.volume(error),
            t=None if t is None else t[: len(self.active)],
            paired=self._objective.paired,
            shared_logit=self._objective.shared_logit,
        )
