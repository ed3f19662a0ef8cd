"""Two ways through a batch, with one gradient: all samples at once, or margins first and then sample by sample.

Samples couple only through the coefficients c_p = dL/dE_p (docs/dropin.md). Margin-first runs all of them forward
without a graph, forms c, and then takes one sample at a time forward and backward through sum_p c_p E_p: it holds the
activations of one sample where the batch holds those of two for each pair, and pays one more forward pass. A pair whose
coefficients are negligible needs no backward pass: it is drawn with a probability below 1 and then weighs that much
more, which leaves the gradient right in the mean.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from halo_fast.loss.functional import GranDPO, GranDPOOutput, gran_dpo, gran_dpo_coefficients, patch_weighted_mse
from halo_fast.train.draws import Batch, take

__all__ = ["Passed", "batched", "margin_first"]

Predict = Callable[[Batch], Tensor]
Backward = Callable[[Tensor], None]


@dataclass(frozen=True)
class Passed:
    """What a pass over a batch leaves beside the gradients.

    Args:
        out: of the loss, without a graph.
        prediction: the policy's, detached.
        skipped: pairs that had no backward pass.
    """

    out: GranDPOOutput
    prediction: Tensor
    skipped: int


def batched(
    policy: Predict, reference: Predict | None, batch: Batch, objective: GranDPO, layout: str, backward: Backward
) -> Passed:
    """Forward and backward of all samples at once; adds the gradient of the loss times its number of pairs.

    Args:
        policy: predictions of a batch, differentiable.
        reference: predictions of the reference; None if the batch has its errors or nothing is compared with it.
        batch: B pairs.
        objective: the loss.
        layout: of the family.
        backward: runs the backward pass of a 0-d tensor.
    """
    base = None
    if reference is not None:
        with torch.no_grad():
            base = reference(batch)
    prediction = policy(batch)
    out = gran_dpo(**_arguments(batch, prediction, base, objective, layout))
    backward(out.loss * out.num_pairs)
    return Passed(out, prediction.detach(), 0)


def margin_first(
    policy: Predict,
    reference: Predict | None,
    batch: Batch,
    objective: GranDPO,
    layout: str,
    backward: Backward,
    *,
    skip_below: float = 0.0,
    lottery: Callable[[int], Tensor] | None = None,
    agree: Callable[[Tensor], Tensor] = lambda kept: kept,
) -> Passed:
    """As `batched`, with the activations of one sample at a time.

    Args:
        skip_below: a pair whose largest coefficient is this share or less of what it was at the start of training is
            drawn with a probability in proportion; 0 takes all, and then nothing waits for the device.
        lottery: uniform numbers in [0, 1) for so many pairs.
        agree: which pairs any process keeps, from those this one keeps, bool [B].
    """
    samples = [take(batch, slice(index, index + 1)) for index in range(len(batch.t))]
    with torch.no_grad():
        prediction = torch.cat([policy(sample) for sample in samples])
        base = torch.cat([reference(sample) for sample in samples]) if reference is not None else None
    coefficients, out = gran_dpo_coefficients(**_arguments(batch, prediction, base, objective, layout))
    kept = [True] * (len(samples) // 2)
    if skip_below and lottery is not None:
        start, _ = gran_dpo_coefficients(
            prediction, batch.target, prediction, batch.patch_rewards, batch.video_rewards,
            objective=objective, layout=layout,
        )  # fmt: skip
        weights = _lottery_weights(coefficients, start, skip_below, lottery(len(kept)))
        kept = agree(weights > 0).tolist()
        coefficients = coefficients * weights.repeat(2).to(coefficients)[:, None, None, None]
    for index, sample in enumerate(samples):
        if kept[index % len(kept)]:
            chosen = coefficients[index : index + 1] * out.num_pairs
            backward(patch_weighted_mse(policy(sample), sample.target, chosen, layout))
    return Passed(out, prediction, kept.count(False))


def _lottery_weights(coefficients: Tensor, start: Tensor, skip_below: float, u: Tensor) -> Tensor:
    """1 / p for the pairs that are drawn and 0 for the others, on the CPU."""
    now, before = (table.abs().flatten(1).amax(1).view(2, -1).amax(0) for table in (coefficients, start))
    # A pair that never had a coefficient is a tie, and has none now.
    share = torch.where(before > 0, now / before, 0.0).cpu()
    probability = (share / skip_below).clamp(max=1)
    return torch.where(u < probability, 1 / probability, 0.0)


def _arguments(
    batch: Batch, prediction: Tensor, base: Tensor | None, objective: GranDPO, layout: str
) -> dict[str, Any]:
    if base is None and batch.reference_error is None:
        # Without a preference term nothing is compared with the reference, so its forward pass is saved.
        base = prediction.detach()
    return {
        "prediction": prediction,
        "target": batch.target,
        "reference": base,
        "patch_rewards": batch.patch_rewards,
        "video_rewards": batch.video_rewards,
        "objective": objective,
        "reference_error": batch.reference_error,
        "layout": layout,
    }
