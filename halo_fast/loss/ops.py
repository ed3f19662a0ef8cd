"""Every operator that PyTorch sees: custom_op, its fake and its gradient. The only torch.library file.

The operators are opaque: a backend is chosen inside them, so that no choice of backend or of beta (a tensor) breaks a
graph or compiles it again. Outputs are fresh tensors. There is no second derivative.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from halo_fast.loss import backends
from halo_fast.loss.reference import Table, TableNumbers, accumulate_dtype, composed_gran_dpo

__all__ = ["attach_gradient", "gran_dpo", "gran_dpo_table", "patch_error", "patch_error_backward", "patch_log_ratio"]

GranDPOTensors = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("halo_fast::patch_log_ratio", mutates_args=())
def patch_log_ratio(policy: Tensor, reference: Tensor, target: Tensor, grid: Sequence[int]) -> Tensor:
    """-d_p [N, f, h, w] of [N, C, F, H, W] views; differentiable in ``policy``."""
    backend = backends.select(policy.device, policy.dtype)
    ratio: Tensor = backend.patch_log_ratio(policy, reference, target, tuple(grid))
    return ratio


@patch_log_ratio.register_fake
def _(policy: Tensor, reference: Tensor, target: Tensor, grid: Sequence[int]) -> Tensor:
    dtype = accumulate_dtype(policy.dtype, reference.dtype, target.dtype)
    return policy.new_empty((policy.shape[0], *grid), dtype=dtype)


@torch.library.custom_op("halo_fast::patch_error", mutates_args=())
def patch_error(prediction: Tensor, target: Tensor, grid: Sequence[int]) -> Tensor:
    """E_p [N, f, h, w] of [N, C, F, H, W] views; differentiable in ``prediction``."""
    error: Tensor = backends.select(prediction.device, prediction.dtype).patch_error(prediction, target, tuple(grid))
    return error


@patch_error.register_fake
def _(prediction: Tensor, target: Tensor, grid: Sequence[int]) -> Tensor:
    dtype = accumulate_dtype(prediction.dtype, target.dtype)
    return prediction.new_empty((prediction.shape[0], *grid), dtype=dtype)


@torch.library.custom_op("halo_fast::patch_error_backward", mutates_args=())
def patch_error_backward(grad: Tensor, prediction: Tensor, target: Tensor) -> Tensor:
    """2 (o - tau) grad_p / Z_p, allocated as ``torch.empty_like(prediction)``."""
    backend = backends.select(prediction.device, prediction.dtype)
    gradient: Tensor = backend.patch_error_backward(grad, prediction, target)
    return gradient


@patch_error_backward.register_fake
def _(grad: Tensor, prediction: Tensor, target: Tensor) -> Tensor:
    return torch.empty_like(prediction)


def _gradient(factor: Tensor, coefficients: Tensor, prediction: Tensor, target: Tensor) -> Tensor:
    """2 (o - tau) factor coefficients_p / Z_p with a 0-d ``factor``."""
    backend = backends.select(prediction.device, prediction.dtype)
    gradient: Tensor = backend.gran_dpo_backward(factor, coefficients, prediction, target)
    return gradient


gran_dpo_backward = torch.library.custom_op("halo_fast::gran_dpo_backward", _gradient, mutates_args=())


@gran_dpo_backward.register_fake
def _(factor: Tensor, coefficients: Tensor, prediction: Tensor, target: Tensor) -> Tensor:
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
    logit_scale: Tensor | None,
    error: Tensor | None,
    loser_scale: Tensor | None,
    latent_shape: Sequence[int],
    link_name: str,
    numbers: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The Gran-DPO loss and its coefficients: see ``reference.gran_dpo_table``."""
    backend = backends.select(log_ratio.device, log_ratio.dtype)
    table: Table = backend.gran_dpo_table(
        log_ratio, patch_rewards, video_rewards, logit_scale, error, loser_scale, tuple(latent_shape), link_name,
        TableNumbers(*numbers),
    )  # fmt: skip
    return table


@gran_dpo_table.register_fake
def _(log_ratio: Tensor, *others: Any) -> Table:
    return _table_outputs(log_ratio)


def _table_outputs(log_ratio: Tensor) -> Table:
    """What ``gran_dpo_table`` returns, without values."""
    samples, *grid = log_ratio.shape
    scalar = log_ratio.new_empty(())
    pairs = log_ratio.new_empty((samples // 2,))
    patches = log_ratio.new_empty((samples // 2, *grid))
    return scalar, torch.empty_like(log_ratio), pairs, patches, torch.empty_like(pairs)


def _gran_dpo(
    policy: Tensor,
    reference: Tensor | None,
    target: Tensor,
    reference_error: Tensor | None,
    patch_rewards: Tensor | None,
    video_rewards: Tensor | None,
    logit_scale: Tensor | None,
    grid: Sequence[int],
    link_name: str,
    numbers: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``gran_dpo`` by the selected backend's own fused function, or composed of its single operations."""
    backend = backends.select(policy.device, policy.dtype)
    run = getattr(backend, "gran_dpo", None) or partial(composed_gran_dpo, backend)
    *outputs, error = run(
        policy, reference, target, reference_error, patch_rewards, video_rewards, logit_scale, tuple(grid), link_name,
        TableNumbers(*numbers),
    )  # fmt: skip
    # an operator has a tensor in every place
    return *outputs, outputs[-1].new_empty(0) if error is None else error


gran_dpo_operator = torch.library.custom_op("halo_fast::gran_dpo", _gran_dpo, mutates_args=())


@gran_dpo_operator.register_fake
def _(policy: Tensor, *others: Any) -> GranDPOTensors:
    reference, target, *_, grid, _, numbers = others
    dtype = accumulate_dtype(*(view.dtype for view in (policy, reference, target) if view is not None))
    log_ratio = policy.new_empty((policy.shape[0], *grid), dtype=dtype)
    with_error = reference is None or TableNumbers(*numbers).supervised
    return *_table_outputs(log_ratio), log_ratio, torch.empty_like(log_ratio) if with_error else log_ratio.new_empty(0)


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
    return None, None, gran_dpo_backward(grad, coefficients, prediction, target), None


def _save_gran_dpo(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    policy, _, target, *_ = inputs
    coefficients = output[1]
    ctx.save_for_backward(coefficients, policy, target)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _gran_dpo_backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    coefficients, policy, target = ctx.saved_tensors
    gradient = None if grad is None else gran_dpo_backward(grad, coefficients, policy, target)
    return gradient, *[None] * 9


def _needs_operator(latent: Tensor) -> bool:
    """Whether the registered operator must be called: compile, dispatch mode, meta tensor or tensor subclass."""
    return (
        torch.compiler.is_compiling()
        or type(latent) not in (Tensor, torch.nn.Parameter)
        or latent.is_meta
        or torch._C._len_torch_dispatch_stack() > 0
    )


class _EagerGranDPO(torch.autograd.Function):
    """``gran_dpo_operator`` without the dispatcher.

    For small latents the dispatcher costs more than the computation.
    """

    @staticmethod
    def forward(ctx: Any, policy: Tensor, arguments: tuple[Any, ...], others: list[Tensor]) -> Tensor:
        loss, coefficients, *rest = _gran_dpo(policy, *arguments)
        # Appended to a list, so that autograd does not track them as outputs.
        others += coefficients, *rest
        ctx.save_for_backward(coefficients, policy, arguments[1])
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        coefficients, policy, target = ctx.saved_tensors
        # Outside the operator a second derivative would silently be 0.
        run = gran_dpo_backward if torch.is_grad_enabled() or _needs_operator(policy) else _gradient
        return run(grad, coefficients, policy, target), None, None


def gran_dpo(
    policy: Tensor,
    reference: Tensor | None,
    target: Tensor,
    reference_error: Tensor | None,
    patch_rewards: Tensor | None,
    video_rewards: Tensor | None,
    logit_scale: Tensor | None,
    grid: Sequence[int],
    link_name: str,
    numbers: Sequence[float],
) -> GranDPOTensors:
    """The Gran-DPO loss in one operator: (loss, coefficients, video_logits, patch_logits, active, log_ratio, error).

    Either ``reference`` or its cached ``reference_error`` is given. ``error`` is the policy's where the cached one or
    an sft weight needs it, else empty. The loss is differentiable in ``policy``, and nothing else of it.
    """
    arguments = (
        reference, target, reference_error, patch_rewards, video_rewards, logit_scale, grid, link_name, numbers,
    )  # fmt: skip
    if _needs_operator(policy):
        output: GranDPOTensors = gran_dpo_operator(policy, *arguments)
        return output
    others: list[Tensor] = []
    return _EagerGranDPO.apply(policy, arguments, others), *others


patch_log_ratio.register_autograd(_log_ratio_backward, setup_context=_save_log_ratio)
patch_error.register_autograd(_error_backward, setup_context=_save_error)
attach_gradient.register_autograd(_attached_backward, setup_context=_save_attached)
gran_dpo_operator.register_autograd(_gran_dpo_backward, setup_context=_save_gran_dpo)
