"""Two ways through a batch with the same gradient: all samples at once, or margins first and then sample by sample.

Samples couple only through the coefficients c_p = dL/dE_p (docs/dropin.md). Margin-first runs all samples forward
without a graph and forms c. Then it takes one sample at a time forward and backward through sum_p c_p E_p. It holds the
activations of one sample where the batch holds those of 2B, and pays one more forward pass.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from halo_fast.loss.figures import PairFigures
from halo_fast.loss.functional import gran_dpo, gran_dpo_coefficients, patch_weighted_mse
from halo_fast.loss.objectives import DiffusionKTO, Objective, PairObjective
from halo_fast.train.draws import Batch

__all__ = ["batched", "loss_arguments", "margin_first", "uses_reference"]

Predict = Callable[[Batch], Tensor]
Backward = Callable[[Tensor], None]


def batched(
    policy: Predict, reference: Predict | None, batch: Batch, objective: Objective, layout: str, backward: Backward
) -> PairFigures:
    """Forward and backward of all samples at once; adds the gradient of the loss times its number of pairs.

    Args:
        policy: predictions of a batch, differentiable.
        reference: predictions of the reference; None if the batch has its errors or the objective uses none.
        batch: B pairs.
        objective: the loss.
        layout: of the family.
        backward: runs the backward pass of a 0-d tensor.

    Returns:
        The statistics of the batch, without a graph.
    """
    base = None
    if reference is not None:
        with torch.no_grad():
            base = reference(batch)
    out = gran_dpo(**loss_arguments(batch, policy(batch), base, objective, layout))
    backward(out.loss * out.num_pairs)
    return out.figures(batch.t)


def margin_first(
    policy: Predict, reference: Predict | None, batch: Batch, objective: Objective, layout: str, backward: Backward
) -> PairFigures:
    """As `batched`, with the activations of one sample at a time."""
    samples = [batch.select(slice(index, index + 1)) for index in range(len(batch.t))]
    with torch.no_grad():
        prediction = torch.cat([policy(sample) for sample in samples])
        base = torch.cat([reference(sample) for sample in samples]) if reference is not None else None
    coefficients, out = gran_dpo_coefficients(**loss_arguments(batch, prediction, base, objective, layout))
    for index, sample in enumerate(samples):
        chosen = coefficients[index : index + 1] * out.num_pairs
        backward(patch_weighted_mse(policy(sample), sample.target, chosen, layout))
    return out.figures(batch.t)


def uses_reference(objective: Objective) -> bool:
    """Whether the loss uses the reference. False for a pair objective whose preference and anchor weights are 0."""
    if isinstance(objective, PairObjective):
        return any((objective.video_weight, objective.patch_weight, objective.anchor_weight))
    return objective.needs_reference


def loss_arguments(
    batch: Batch, prediction: Tensor, reference: Tensor | None, objective: Objective, layout: str
) -> dict[str, Any]:
    """Arguments of `gran_dpo` for a batch.

    Diffusion-KTO's labels are signed, so it gets each reward less the mean of its pair: the better clip is good, the
    other one bad. All other objectives get the rewards as they are.

    Args:
        batch: its labels, targets and, if computed, errors of the reference.
        prediction: the policy's, [2B, ...].
        reference: the reference's, of the same shape; None where the batch has its errors or the objective uses none.
        objective: the loss.
        layout: of the family.
    """
    error = batch.reference_error
    patch_rewards, video_rewards = batch.patch_rewards, batch.video_rewards
    if isinstance(objective, DiffusionKTO):
        patch_rewards, video_rewards = _centred(patch_rewards), _centred(video_rewards)
    if not objective.needs_reference:
        reference = error = None
    elif reference is None and error is None:
        # The preference weights are 0, so any reference gives the same loss. The detached policy saves a forward pass.
        reference = prediction.detach()
    return {
        "prediction": prediction,
        "target": batch.target,
        "reference": reference,
        "patch_rewards": patch_rewards,
        "video_rewards": video_rewards,
        "objective": objective,
        "reference_error": error,
        "layout": layout,
        "pair_weight": batch.pair_weight,
    }


def _centred(rewards: Tensor) -> Tensor:
    """Rewards [2B, ...] less the mean of each pair."""
    a, b = rewards.chunk(2)
    return rewards - ((a + b) / 2).repeat(2, *[1] * (rewards.ndim - 1))
