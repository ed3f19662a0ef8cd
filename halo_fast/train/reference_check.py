"""The check at the start of a training that one model serves as policy and as reference."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from halo_fast.errors import UserError
from halo_fast.loss.functional import gran_dpo
from halo_fast.loss.objectives import GranDPO, Objective, PairObjective
from halo_fast.train.adapters import ReferenceMode
from halo_fast.train.draws import Batch
from halo_fast.train.schedules import loss_arguments, uses_reference

__all__ = ["check_start"]

Predict = Callable[[Batch], Tensor]

_ADVICE = "this model cannot serve as its own reference; use it uncompiled and unquantised"


@torch.no_grad()
def check_start(
    predict: Predict,
    reference_mode: ReferenceMode,
    parameters: Mapping[str, Tensor],
    layout: str,
    batch: Batch,
    base: Tensor,
    objective: Objective,
    rounding: float,
    *,
    begins_apart: bool = False,
) -> None:
    """Raise unless policy and reference agree, moved weights change the policy alone, and the loss starts right.

    Two predictions count as equal if they differ by rounding alone: torch may choose kernels that add in another order.
    The norm of a difference may be at most `rounding` times the prediction's norm. It may also be at most 1% of the
    change that moved weights make; this is the tighter bound where `rounding` is coarse.

    Args:
        predict: of a batch, by the model as it is.
        reference_mode: the context in which the model is the reference.
        parameters: what is trained, as training finds it: a fresh adapter, or the base's own weights.
        layout: of the family.
        batch: one pair.
        base: the reference's prediction, before what is trained was added to the model.
        objective: the loss.
        rounding: largest rounding, as a share of the prediction's norm.
        begins_apart: whether the policy starts from an earlier training, and the reference does not.

    Raises:
        UserError: naming what is wrong.
    """
    if not base.isfinite().all():
        raise UserError("train: the base model's prediction on the first pair is not finite; check latents and dtype")
    start = predict(batch)
    # A fresh adapter adds nothing, so a switch without effect would go unnoticed: the weights are moved for the check.
    fresh = [parameter.clone() for parameter in parameters.values()]
    for parameter in parameters.values():
        parameter.add_(0.01)
    moved = predict(batch)
    with reference_mode():
        off = predict(batch)
    for parameter, value in zip(parameters.values(), fresh, strict=True):
        parameter.copy_(value)
    if torch.equal(moved, base):
        raise UserError(f"model: with its weights moved, expected another output than the base's; {_ADVICE}")
    base_norm, effect = base.float().norm(), (moved - base).float().norm()
    allowed = torch.minimum(0.01 * effect, rounding * base_norm)
    for state, output in (("switched to the reference", off), ("before the first step", start)):
        if begins_apart and output is start:
            continue
        if not torch.equal(output, base) and not (output - base).float().norm() <= allowed:
            raise UserError(f"model: {state}, expected the base, got {(output - base).abs().max()} off; {_ADVICE}")
    if isinstance(objective, PairObjective) and uses_reference(objective):
        _check_first_loss(layout, batch, base, objective)


def _check_first_loss(layout: str, batch: Batch, base: Tensor, objective: PairObjective) -> None:
    """Raise unless every logit is 0 where policy and reference agree, and Gran-DPO's loss log 2 per unit weight."""
    objective = replace(objective, sft_weight=0.0, patch_sft_weight=0.0, anchor_weight=0.0)
    out = gran_dpo(**loss_arguments(replace(batch, reference_error=None), base, base, objective, layout))
    largest = torch.cat([out.video_logits.flatten(), out.patch_logits.flatten()]).abs().max().item()
    if largest != 0:
        raise UserError(f"model: expected logits of 0 before the first step, got up to {largest}; {_ADVICE}")
    if not isinstance(objective, GranDPO) or objective.link != "sigmoid":
        return
    # A comparison with NaN, which is "not labelled", is False: a tie.
    gap = batch.video_rewards.diff().abs()
    video = torch.where(gap > objective.video_delta, gap**objective.video_gamma, 0.0).sum().item()
    patches = bool((batch.patch_rewards.diff(dim=0).abs() > objective.patch_delta).any())
    weight = objective.video_weight * video + objective.patch_weight * patches
    if not math.isclose(out.loss.item(), weight * math.log(2), rel_tol=1e-6, abs_tol=1e-12):
        raise UserError(f"model: expected a first loss of {weight:g} x log 2, got {out.loss.item()}; {_ADVICE}")
