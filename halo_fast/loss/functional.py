"""The public calls. Formulas are written out in docs/dropin.md."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from halo_fast.loss import ops
from halo_fast.loss.given import by_frame, given_frames, made_frames, patch_means
from halo_fast.loss.inputs import (
    Inputs,
    check_grid,
    check_inputs,
    check_latents,
    check_reference,
    check_table,
    check_tensor,
)
from halo_fast.loss.objectives.base import Objective
from halo_fast.loss.objectives.granular import fused_table
from halo_fast.loss.objectives.presets import Spec, build
from halo_fast.loss.output import GranDPOOutput
from halo_fast.loss.reference import accumulate_dtype

__all__ = [
    "gran_dpo",
    "gran_dpo_coefficients",
    "patch_error",
    "patch_log_ratio",
    "patch_weighted_mse",
    "unpack_tokens",
]


def patch_log_ratio(
    prediction: Tensor, target: Tensor, reference: Tensor, grid: Sequence[int], layout: str = "BCFHW"
) -> Tensor:
    """Patch-wise log-probability ratio -d_p of policy and reference, without the factor beta kappa / 2; factored.

    -d_p = E_p(o_ref) - E_p(o) = -(1/Z_p) sum over patch and channels of (o - o_ref)(o + o_ref - 2 tau), exactly 0 where
    the two agree. The isotropic Gaussian step KL is a sum over positions, so it splits by patch.

    Args:
        prediction: [N, C, F, H, W] (layout BCFHW), [N, F, C, H, W] (BFCHW) or [N, C, H, W] (BCHW), any strides, read in
            place; float64, float32, bfloat16 or float16.
        target: likewise, what the model regresses to.
        reference: likewise, the reference's prediction, in prediction's dtype.
        grid: (f, h, w) patches along frames, rows, columns; patch k of n along length L covers
            floor(kL/n)..floor((k+1)L/n).
        layout: of the three latents; "BC(1+F)HW" is BCFHW with a first frame that is given and counts nowhere.

    Returns:
        [N, f, h, w], float32 (float64 for float64). Differentiable in prediction, once; not under torch.func.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    policy, goal = check_latents(prediction, target, layout)
    base = check_reference(reference, prediction, layout)
    grid, given = check_grid(grid, policy, "grid"), given_frames(layout)
    policy, base, goal = (made_frames(view, given) for view in (policy, base, goal))
    return patch_means(lambda even: ops.patch_log_ratio(policy, base, goal, even), grid, policy.shape[2], given)


def patch_error(prediction: Tensor, target: Tensor, grid: Sequence[int], layout: str = "BCFHW") -> Tensor:
    """Mean squared error of each patch: E_p = (1/Z_p) sum over patch and channels of (o - tau)^2.

    Arguments, dtypes, differentiability and errors are those of ``patch_log_ratio``. Cache this value of the
    reference's prediction as `reference_error`.

    Returns:
        [N, f, h, w], float32 (float64 for float64).
    """
    policy, goal = check_latents(prediction, target, layout)
    grid, given = check_grid(grid, policy, "grid"), given_frames(layout)
    policy, goal = made_frames(policy, given), made_frames(goal, given)
    return patch_means(lambda even: ops.patch_error(policy, goal, even), grid, policy.shape[2], given)


def patch_weighted_mse(prediction: Tensor, target: Tensor, coefficients: Tensor, layout: str = "BCFHW") -> Tensor:
    """sum_p c_p E_p over the batch, 0-d: with coefficients of ``gran_dpo_coefficients`` its gradient is Gran-DPO's.

    d/do = 2 (o - tau) c_p / Z_p. The value itself is not the loss: that is ``out.loss``. Samples couple only through
    the coefficients, so one sample at a time may run forward and backward, summing the gradients.

    Args:
        prediction: [N, C, F, H, W] or another ``layout``; the result is differentiable in it.
        target: likewise.
        coefficients: [N, f, h, w], float32 or float64; its shape is the grid.
        layout: of the two latents.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    policy, goal = check_latents(prediction, target, layout)
    dtype = accumulate_dtype(policy.dtype, goal.dtype)
    coefficients, given = check_table("coefficients", coefficients, policy, dtype), given_frames(layout)
    policy, goal = made_frames(policy, given), made_frames(goal, given)
    coefficients = by_frame(coefficients, policy.shape[2], given)
    with torch.no_grad():
        value = (coefficients * ops.patch_error(policy, goal, coefficients.shape[1:])).sum()
    loss: Tensor = ops.attach_gradient(value, coefficients, policy, goal)
    return loss


def gran_dpo(
    prediction: Tensor,
    target: Tensor,
    reference: Tensor | None = None,
    patch_rewards: Tensor | None = None,
    video_rewards: Tensor | None = None,
    *,
    objective: Spec = "halo",
    reference_error: Tensor | None = None,
    layout: str = "BCFHW",
    kappa: Tensor | None = None,
    pair_weight: Tensor | None = None,
) -> GranDPOOutput:
    """Granular DPO loss: the video and every spatio-temporal patch have their own preference.

    With E_p = mean over patch p of (o - tau)^2, d_p = E_p(o) - E_p(o_ref), D_p = d_p(a) - d_p(b), D their mean over the
    video, s = sign(r_a - r_b) and z = -(beta kappa / 2) s D for the video and for each patch, one pair's loss is

        video_weight w_v phi(z_v) + patch_weight sum_p w_p phi(z_p) / sum_p w_p

    (see ``GranDPO``), and the result its mean over the pairs that have at least one group that is not a tie (0 if there
    is none).

    Args:
        prediction: [2B, C, F, H, W], samples a first and then their partners b, which share prompt, timestep and noise.
            float64 is computed in float64, all else is accumulated in float32. Strided inputs are read in place.
        target: likewise, what the model regresses to in its own head: eps, v, x0 or the flow velocity.
        reference: likewise, from the frozen model in eval mode, in prediction's dtype.
        patch_rewards: [2B, f, h, w], any real scale; its shape is the patch grid, as fine as the latent for masks. NaN
            is "not labelled" and a tie. None: no patch term.
        video_rewards: [2B], likewise. At least one of the two is given.
        objective: a preset's name (``PRESETS``), a ``GranDPO``, or whatever else ``halo_fast.loss.objectives.build``
            takes. Unpaired ones (diffusion_kto, rwr, patch_dpo) take N samples, each with its own label; mapo, rwr and
            patch_dpo no reference.
        reference_error: [2B, f, h, w] float32, cached ``patch_error`` of the reference for the same timestep and noise;
            then reference is None.
        layout: "BCFHW"; "BFCHW" for CogVideoX, "BCHW" for images, "BC(1+F)HW" for image-to-video, where the first
            latent frame is given: it is in no mean, has no gradient, and a patch of nothing else has no preference.
        kappa: [B] timestep weight of each pair ([N] unpaired), default 1; see ``timestep_weight``.
        pair_weight: [B] omega, default 1: multiplies the preference terms of each pair's loss, where kappa multiplies
            the logits. Supervised terms and the mean over pairs stay as they are; 0 masks a pair's preferences. For
            the objectives on pairs with a reference (``GranDPO``, ``PooledDPO``).

    Returns:
        ``GranDPOOutput``; its loss is differentiable in prediction only, once, and the gradient has prediction's dtype:
        dL/do = 2 (o - tau) c_p / Z_p with the coefficients c of ``gran_dpo_coefficients``.

    Raises:
        TypeError, ValueError: naming the argument, what was expected, what came and what to do. Infinite rewards are
            refused on the CPU. On an accelerator and inside torch.compile values are not read, because that would stall
            or break the graph. There an infinite gap of weight |gap|^0 (the video's default) is a preference like any
            other, and with any other gamma the loss is not finite.

    Source: own formulation after HALO, arXiv 2502.06812, and Diffusion-DPO, arXiv 2311.12908.
    """
    built = build(objective)
    policy, inputs = check_inputs(
        built, objective, prediction, target, reference, patch_rewards, video_rewards, reference_error, layout, kappa,
        pair_weight,
    )  # fmt: skip
    _, out = _evaluate(built, policy, inputs)
    return _anchored(built, policy, inputs, out) if built.anchor_weight else out


def gran_dpo_coefficients(
    prediction: Tensor,
    target: Tensor,
    reference: Tensor | None = None,
    patch_rewards: Tensor | None = None,
    video_rewards: Tensor | None = None,
    *,
    objective: Spec = "halo",
    reference_error: Tensor | None = None,
    layout: str = "BCFHW",
    kappa: Tensor | None = None,
    pair_weight: Tensor | None = None,
) -> tuple[Tensor, GranDPOOutput]:
    """The first half of ``gran_dpo``, without a graph: c_p = dL/dE_p [2B, f, h, w] and the output (its loss detached).

    Samples couple only through these coefficients: forward all of them without a graph, form c, then forward and
    backward one sample at a time through ``patch_weighted_mse``. The gradients add up to ``gran_dpo``'s exactly; a
    sample whose coefficients are all 0 needs no backward. Arguments and errors are those of ``gran_dpo``; anchor_weight
    must be 0, because its gradient is no function of E_p.
    """
    built = build(objective)
    policy, inputs = check_inputs(
        built, objective, prediction, target, reference, patch_rewards, video_rewards, reference_error, layout, kappa,
        pair_weight,
    )  # fmt: skip
    if built.anchor_weight:
        raise ValueError("anchor_weight must be 0 for gran_dpo_coefficients: use gran_dpo, or sft_weight in its place")
    with torch.no_grad():
        return _evaluate(built, policy, inputs)


def _evaluate(objective: Objective, policy: Tensor, inputs: Inputs) -> tuple[Tensor, GranDPOOutput]:
    """Coefficients and output; the output's loss is differentiable in ``policy``."""
    table = fused_table(objective, policy, inputs)
    if table is not None:
        loss, coefficients = table.loss, table.coefficients
    else:
        table = objective.table(inputs)
        coefficients = _checked_coefficients(objective, table.coefficients, inputs)
        even = by_frame(coefficients, policy.shape[2], inputs.given)
        loss = ops.attach_gradient(table.loss, even, policy, inputs.target)
    out = GranDPOOutput(
        loss, table.patch_logits, table.video_logits, table.log_ratio, table.active, objective, inputs, table.error
    )
    return coefficients, out


def _anchored(objective: Objective, policy: Tensor, inputs: Inputs, out: GranDPOOutput) -> GranDPOOutput:
    """The output with the pull to the reference's predictions, (||o_a - o_ref,a||^2 + ||o_b - o_ref,b||^2) / N."""
    reference = inputs.reference
    if reference is not None and inputs.dtype == torch.float64:
        reference = reference.double()  # so that the distance is summed in float64 too
    distance = ops.patch_error(policy, reference, (1, 1, 1)).flatten()
    share = out.active / out.active.sum().clamp(min=1)
    anchor = (distance * (share.repeat(2) if objective.paired else share)).sum()
    return replace(out, loss=out.loss + objective.anchor_weight * anchor)


def _checked_coefficients(objective: Objective, coefficients: Tensor, inputs: Inputs) -> Tensor:
    """The coefficients in the kernels' dtype and layout. Their shape is checked because users may write objectives."""
    shape = (inputs.prediction.shape[0], *inputs.grid)
    if tuple(coefficients.shape) != shape:
        raise ValueError(
            f"{type(objective).__name__}.table must give coefficients of shape {shape}; got {tuple(coefficients.shape)}"
        )
    return coefficients.to(inputs.dtype).contiguous()


def unpack_tokens(tokens: Tensor, latent_shape: Sequence[int], patch_size: Sequence[int] = (1, 1, 1)) -> Tensor:
    """Packed transformer tokens [N, S, D] as a latent view [N, D, F/pt, H/ph, W/pw], without a copy.

    A token's D features become channels, so patches of the grid are boxes of whole tokens, in whatever order the model
    packs inside a token. Differentiable.

    Args:
        tokens: [N, S, D].
        latent_shape: (F, H, W) of the latent.
        patch_size: (pt, ph, pw) of the transformer, (1, 1, 1) for LTX, (1, 2, 2) for Wan.

    Raises:
        TypeError, ValueError: naming the argument; S must be the number of tokens.
    """
    tokens = check_tensor("tokens", tokens)
    for name, sides in (("latent_shape", latent_shape), ("patch_size", patch_size)):
        if not isinstance(sides, tuple | list | torch.Size) or len(sides) != 3 or any(side < 1 for side in sides):
            raise ValueError(f"{name} must be three positive integers (frames, rows, columns); got {sides!r}")
    sides = [length // patch for length, patch in zip(latent_shape, patch_size, strict=True)]
    if tokens.ndim != 3 or any(length % patch for length, patch in zip(latent_shape, patch_size, strict=True)):
        raise ValueError(
            f"tokens must be [N, S, D] and patch_size {tuple(patch_size)} divide latent_shape {tuple(latent_shape)}; "
            f"got shape {tuple(tokens.shape)}"
        )
    if tokens.shape[1] != sides[0] * sides[1] * sides[2]:
        raise ValueError(f"tokens must have {' * '.join(map(str, sides))} tokens along dim 1; got {tokens.shape[1]}")
    return tokens.view(tokens.shape[0], *sides, tokens.shape[2]).movedim(-1, 1)
