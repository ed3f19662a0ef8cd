"""Every operator that PyTorch sees: custom_op, its fake and its gradient. The only torch.library file.

The operators are opaque: a backend is chosen inside them, so that no choice of backend or of beta (a tensor) breaks a
graph or compiles it again. Outputs are fresh tensors. There is no second derivative.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from halo_fast import backends, reference
from halo_fast.reference import accumulate_dtype


@torch.library.custom_op("halo_fast::patch_log_ratio", mutates_args=())
def patch_log_ratio(policy: Tensor, reference: Tensor, target: Tensor, grid: Sequence[int]) -> Tensor:
    """-d_p [N, f, h, w] of [N, C, F, H, W] views; differentiable in ``policy``."""
    backend = backends.select(policy.device, policy.dtype)
    ratio: Tensor = backend.patch_log_ratio(policy, reference, target, tuple(grid))
    return ratio


@patch_log_ratio.register_fake
def _(policy: Tensor, reference: Tensor, target: Tensor, grid: Sequence[int]) -> Tensor:
    return policy.new_empty((policy.shape[0], *grid), dtype=accumulate_dtype(policy.dtype))


@torch.library.custom_op("halo_fast::patch_error", mutates_args=())
def patch_error(prediction: Tensor, target: Tensor, grid: Sequence[int]) -> Tensor:
    """E_p [N, f, h, w] of [N, C, F, H, W] views; differentiable in ``prediction``."""
    error: Tensor = backends.select(prediction.device, prediction.dtype).patch_error(prediction, target, tuple(grid))
    return error


@patch_error.register_fake
def _(prediction: Tensor, target: Tensor, grid: Sequence[int]) -> Tensor:
    return prediction.new_empty((prediction.shape[0], *grid), dtype=accumulate_dtype(prediction.dtype))


@torch.library.custom_op("halo_fast::patch_error_backward", mutates_args=())
def patch_error_backward(grad: Tensor, prediction: Tensor, target: Tensor) -> Tensor:
    """2 (o - tau) grad_p / Z_p, allocated as ``torch.empty_like(prediction)``."""
    backend = backends.select(prediction.device, prediction.dtype)
    gradient: Tensor = backend.patch_error_backward(grad, prediction, target)
    return gradient


@patch_error_backward.register_fake
def _(grad: Tensor, prediction: Tensor, target: Tensor) -> Tensor:
    return torch.empty_like(prediction)


@torch.library.custom_op("halo_fast::attach_gradient", mutates_args=())
def attach_gradient(loss: Tensor, coefficients: Tensor, prediction: Tensor, target: Tensor) -> Tensor:
    """``loss`` itself, with d loss / d prediction = 2 (o - tau) coefficients_p / Z_p."""
    return loss.clone()


@attach_gradient.register_fake
def _(loss: Tensor, coefficients: Tensor, prediction: Tensor, target: Tensor) -> Tensor:
    return torch.empty_like(loss)


@torch.library.custom_op("halo_fast::gran_dpo_table", mutates_args=())
def gran_dpo_table(
    log_ratio: Tensor,
    patch_rewards: Tensor | None,
    video_rewards: Tensor | None,
    kappa: Tensor | None,
    error: Tensor | None,
    loser_scale: Tensor | None,
    latent_shape: Sequence[int],
    link_name: str,
    label_smoothing: float,
    video_weight: float,
    patch_weight: float,
    video_beta: float,
    patch_beta: float,
    video_gamma: float,
    video_delta: float,
    patch_gamma: float,
    patch_delta: float,
    sft_weight: float,
    patch_sft_weight: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The H1 loss and its coefficients: see ``reference.gran_dpo_table``."""
    backend = backends.select(log_ratio.device, log_ratio.dtype)
    table = getattr(backend, "gran_dpo_table", reference.gran_dpo_table)
    result: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] = table(
        log_ratio,
        patch_rewards,
        video_rewards,
        kappa,
        error,
        loser_scale,
        tuple(latent_shape),
        link_name,
        label_smoothing,
        video_weight,
        patch_weight,
        video_beta,
        patch_beta,
        video_gamma,
        video_delta,
        patch_gamma,
        patch_delta,
        sft_weight,
        patch_sft_weight,
    )
    return result


@gran_dpo_table.register_fake
def _(log_ratio: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    samples, *grid = log_ratio.shape
    scalar = log_ratio.new_empty(())
    pairs = log_ratio.new_empty((samples // 2,))
    patches = log_ratio.new_empty((samples // 2, *grid))
    return scalar, torch.empty_like(log_ratio), pairs, patches, torch.empty_like(pairs)


def _save_log_ratio(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    policy, _, target, _ = inputs
    ctx.save_for_backward(policy, target)


def _log_ratio_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return patch_error_backward(-grad, *ctx.saved_tensors), None, None, None


def _save_error(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    prediction, target, _ = inputs
    ctx.save_for_backward(prediction, target)


def _error_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return patch_error_backward(grad.contiguous(), *ctx.saved_tensors), None, None


def _save_attached(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, coefficients, prediction, target = inputs
    ctx.save_for_backward(coefficients, prediction, target)


def _attached_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    coefficients, prediction, target = ctx.saved_tensors
    return None, None, patch_error_backward(grad * coefficients, prediction, target), None


patch_log_ratio.register_autograd(_log_ratio_backward, setup_context=_save_log_ratio)
patch_error.register_autograd(_error_backward, setup_context=_save_error)
attach_gradient.register_autograd(_attached_backward, setup_context=_save_attached)
