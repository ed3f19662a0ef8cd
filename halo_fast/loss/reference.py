"""The formulas in plain PyTorch: the ground truth that every backend is measured against.

Tensors arrive as [N, C, F, H, W] views of any stride. float64 is computed in float64, every other dtype in float32.
Nothing here is differentiable by itself: ``ops`` attaches the gradients.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

__all__ = [
    "LINKS",
    "Table",
    "TableNumbers",
    "accumulate_dtype",
    "composed_gran_dpo",
    "gran_dpo_backward",
    "gran_dpo_table",
    "halves",
    "link",
    "patch_error",
    "patch_error_backward",
    "patch_log_ratio",
    "patch_mean",
    "patch_sizes",
    "reduce_pairs",
    "signed_weights",
    "table_of_volumes",
    "winner_share",
]


LINKS = ("sigmoid", "conservative", "robust", "hinge", "ipo", "kto", "poly")

# (loss [], coefficients dL/dE_p [2B, f, h, w], video_logits [B], patch_logits [B, f, h, w], active [B])
Table = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


class TableNumbers(NamedTuple):
    """The numbers of the Gran-DPO loss in the order in which every backend takes them; see ``GranDPO``.

    ``link_parameter`` is the label smoothing of the links conservative and robust, and alpha of poly. A cap that is
    infinite is none.
    """

    link_parameter: float
    video_weight: float
    patch_weight: float
    video_beta: float
    patch_beta: float
    video_gamma: float
    video_delta: float
    patch_gamma: float
    patch_delta: float
    sft_weight: float
    patch_sft_weight: float
    video_cap: float = math.inf
    patch_cap: float = math.inf

    @property
    def supervised(self) -> bool:
        """Whether the loss has a supervised term, which needs the errors themselves."""
        return self.sft_weight != 0 or self.patch_sft_weight != 0


def accumulate_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """The dtype in which sums over elements of ``dtypes`` are taken: float64 if any is float64, else float32."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def patch_sizes(latent_shape: Sequence[int], grid: Sequence[int], like: Tensor, given: int = 0) -> Tensor:
    """Z_p [f, h, w]: elements of each patch (channels included) for a latent (C, F, H, W), in the dtype of ``like``.

    The first ``given`` frames do not count.
    """
    channels, *sides = latent_shape
    edges = [
        torch.arange(parts + 1, device=like.device) * length // parts for length, parts in zip(sides, grid, strict=True)
    ]
    if given:
        edges[0] = edges[0].clamp(min=given)
    frames, rows, columns = (torch.diff(edge) for edge in edges)
    return (channels * frames[:, None, None] * rows[:, None] * columns).to(like.dtype)


def _pool(values: Tensor, dim: int, parts: int) -> Tensor:
    length = values.shape[dim]
    if length % parts == 0:
        shape = (*values.shape[:dim], parts, length // parts, *values.shape[dim + 1 :])
        return values.reshape(shape).sum(dim + 1)
    edges = [k * length // parts for k in range(parts + 1)]
    pieces = [values.narrow(dim, start, end - start).sum(dim) for start, end in itertools.pairwise(edges)]
    return torch.stack(pieces, dim)


def _spread(values: Tensor, dim: int, length: int) -> Tensor:
    parts = values.shape[dim]
    patch = ((torch.arange(length, device=values.device) + 1) * parts - 1) // length
    return values.index_select(dim, patch)


def patch_mean(values: Tensor, grid: Sequence[int]) -> Tensor:
    """Mean of ``values`` [N, C, F, H, W] over each patch of ``grid``: [N, f, h, w]."""
    sums = values.sum(1)
    for dim in (3, 2, 1):
        sums = _pool(sums, dim, grid[dim - 1])
    return sums / patch_sizes(values.shape[1:], grid, sums)


def patch_log_ratio(policy: Tensor, reference: Tensor, target: Tensor, grid: Sequence[int]) -> Tensor:
    """-d_p = -mean over the patch of (o - o_ref)(o + o_ref - 2 tau): [N, f, h, w] in the accumulate dtype."""
    accumulate = accumulate_dtype(policy.dtype, reference.dtype, target.dtype)
    policy, reference, target = policy.to(accumulate), reference.to(accumulate), target.to(accumulate)
    # Factored: a difference of two mean errors would lose up to four digits where policy is near reference.
    return -patch_mean((policy - reference) * ((policy - target) + (reference - target)), grid)


def patch_error(prediction: Tensor, target: Tensor, grid: Sequence[int]) -> Tensor:
    """E_p = mean over the patch of (o - tau)^2: [N, f, h, w] in the accumulate dtype."""
    accumulate = accumulate_dtype(prediction.dtype, target.dtype)
    return patch_mean((prediction.to(accumulate) - target.to(accumulate)).square(), grid)


def patch_error_backward(grad: Tensor, prediction: Tensor, target: Tensor) -> Tensor:
    """2 (o - tau) grad_p / Z_p with the prediction's shape, dtype and (``torch.empty_like``) strides."""
    accumulate = accumulate_dtype(prediction.dtype, target.dtype)
    scale = 2 * grad.to(accumulate) / patch_sizes(prediction.shape[1:], grad.shape[1:], grad.to(accumulate))
    for dim in (1, 2, 3):
        scale = _spread(scale, dim, prediction.shape[dim + 1])
    gradient = (prediction.to(accumulate) - target.to(accumulate)) * scale[:, None]
    return torch.empty_like(prediction).copy_(gradient)


def gran_dpo_backward(factor: Tensor, grad: Tensor, prediction: Tensor, target: Tensor) -> Tensor:
    """``patch_error_backward`` of factor * grad with a 0-d ``factor``."""
    return patch_error_backward(factor * grad, prediction, target)


def link(z: Tensor, name: str, parameter: float, cap: float = math.inf) -> tuple[Tensor, Tensor]:
    """phi(min(z, cap)) of a link and its derivative by z, in forms that stay finite for any finite z.

    Beyond the cap the derivative is 0. At the cap itself it is still phi'(cap), the derivative from the left. A NaN
    is beyond no cap. ``parameter`` is e or a of the links that have one:

    sigmoid       softplus(-z)                                              Rafailov et al. 2023
    conservative  (1-e) softplus(-z) + e softplus(z)                        Mitchell 2023
    robust        [(1-e) softplus(-z) - e softplus(z)] / (1-2e), e < 1/2    Chowdhury et al. 2024
    hinge         max(0, 1-z)                                               Zhao et al. 2023
    ipo           (z - 1/2)^2                                               Azar et al. 2023
    kto           1 - sigma(z)                                              Ethayarajh et al. 2024
    poly          softplus(-z) + a (1 - sigma(z)), a >= -1                  Poly-DPO, arXiv 2604.24953
    """
    if cap < math.inf:
        value, slope = link(z.clamp(max=cap), name, parameter)
        return value, torch.where(z > cap, 0.0, slope)
    e = parameter
    if name == "sigmoid":
        return softplus(-z), -torch.sigmoid(-z)
    if name == "conservative":
        return (1 - e) * softplus(-z) + e * softplus(z), -(1 - e) * torch.sigmoid(-z) + e * torch.sigmoid(z)
    if name == "robust":
        value = (1 - e) * softplus(-z) - e * softplus(z)
        slope = -(1 - e) * torch.sigmoid(-z) - e * torch.sigmoid(z)
        return value / (1 - 2 * e), slope / (1 - 2 * e)
    if name == "hinge":
        return torch.relu(1 - z), -(z < 1).to(z.dtype)
    if name == "ipo":
        return (z - 0.5).square(), 2 * (z - 0.5)
    if name == "kto":
        return torch.sigmoid(-z), -torch.sigmoid(z) * torch.sigmoid(-z)
    if name == "poly":
        wrong = torch.sigmoid(-z)
        return softplus(-z) + e * wrong, -wrong - e * torch.sigmoid(z) * wrong
    raise ValueError(f"link must be one of {', '.join(LINKS)}; got {name!r}")


def halves(table: Tensor) -> tuple[Tensor, Tensor]:
    """Samples a and their partners b: the first and the second half of the batch."""
    pairs = table.shape[0] // 2
    return table[:pairs], table[pairs:]


def signed_weights(rewards: Tensor, gamma: float, delta: float) -> Tensor:
    """s w of each pair [B, ...] from rewards [2B, ...]: sign(r_a - r_b) |r_a - r_b|^gamma, 0 on a tie or a NaN."""
    a, b = halves(rewards)
    margin = a - b
    # A comparison with NaN is false, so an unlabelled entry is a tie.
    return torch.where(margin.abs() > delta, margin.sign() * margin.abs() ** gamma, 0.0)


def reduce_pairs(
    pair_loss: Tensor,
    slope: Tensor,
    active: Tensor,
    supervision: Tensor | None,
    error: Tensor | None,
    loser_scale: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Mean over the active pairs: (loss 0-d, coefficients dL/dE_p [2B, f, h, w]); ``active`` is 1 or 0 per pair.

    ``slope`` is dL_pair/dD_p [B, f, h, w]; ``supervision`` the weights rho [2B, f, h, w] of ``error``; ``loser_scale``
    [2B, f, h, w] damps the coefficients that are negative, those of a patch's loser.
    """
    coefficients = torch.cat([slope, -slope])
    if loser_scale is not None:
        coefficients = torch.where(coefficients < 0, coefficients * loser_scale, coefficients)
    if supervision is not None and error is not None:
        coefficients = coefficients + supervision
        pair_loss = pair_loss + sum(halves((supervision * error).flatten(1).sum(1)))
    share = active / active.sum().clamp(min=1)
    return (pair_loss * share).sum(), coefficients * share.repeat(2)[:, None, None, None]


def winner_share(signed: Tensor, weight: Tensor) -> Tensor:
    """``weight`` [B, ...] on the preferred sample of each pair and 0 on the other: [2B, ...]."""
    return torch.cat([torch.where(signed > 0, weight, 0.0), torch.where(signed < 0, weight, 0.0)])


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
) -> Table:
    """The Gran-DPO loss and its coefficients from the [2B, f, h, w] table of log-ratios.

    One pair: omega (video_weight w_v phi(z_v) + patch_weight sum_p w_p phi(z_p) / sum_p w_p)
              + sft_weight E(video winner) + patch_sft_weight mean of E_p over the winning patches,
    z = -(beta kappa / 2) s D, D_p = d_p(a) - d_p(b), D = sum_p (Z_p / sum Z) D_p; phi of min(z, cap) with a cap.

    All floating tensors have the dtype of ``log_ratio``. ``logit_scale`` is [2, B], what multiplies video_beta and
    patch_beta of each pair, or [3, B] with each pair's omega (1 without). ``error`` [2B, f, h, w] is there when an sft
    weight is not 0, ``loser_scale`` [2B, f, h, w] when the loser guard is on; ``latent_shape`` is (C, F, H, W);
    ``numbers`` are those of ``TableNumbers``.
    Returns loss [], coefficients dL/dE_p [2B, f, h, w], video_logits [B], patch_logits [B, f, h, w], active [B]
    (1 for a pair that counts in the mean, else 0).
    """
    sizes = patch_sizes(latent_shape, log_ratio.shape[1:], log_ratio)
    return table_of_volumes(
        log_ratio,
        patch_rewards,
        video_rewards,
        logit_scale,
        error,
        loser_scale,
        sizes / sizes.sum(),
        link_name,
        numbers,
    )


def table_of_volumes(
    log_ratio: Tensor,
    patch_rewards: Tensor | None,
    video_rewards: Tensor | None,
    logit_scale: Tensor | None,
    error: Tensor | None,
    loser_scale: Tensor | None,
    volume: Tensor,
    link_name: str,
    numbers: Sequence[float],
) -> Table:
    """``gran_dpo_table`` for patches of any sizes: ``volume`` [f, h, w], Z_p / sum Z, in place of ``latent_shape``."""
    a, b = halves(log_ratio)
    margin = a - b  # -D_p
    to = TableNumbers(*numbers)
    video_scale, patch_scale, *omega = margin.new_ones(2, margin.shape[0]) if logit_scale is None else logit_scale
    video_scale, patch_scale = 0.5 * to.video_beta * video_scale, 0.5 * to.patch_beta * patch_scale
    video, patch = margin.new_zeros(margin.shape[0]), torch.zeros_like(margin)
    if video_rewards is not None:
        video = signed_weights(video_rewards, to.video_gamma, to.video_delta)
    if patch_rewards is not None:
        patch = signed_weights(patch_rewards, to.patch_gamma, to.patch_delta)

    video_logits, video_loss, video_slope = _video_term(margin, volume, video, video_scale, link_name, to)
    patch_logits, patch_loss, patch_slope = _patch_term(margin, patch, patch_scale, link_name, to)
    pair_loss, slope = video_loss + patch_loss, video_slope + patch_slope
    for weight in omega:
        pair_loss, slope = weight * pair_loss, weight[:, None, None, None] * slope
    active, supervision = _active_pairs(video, patch, to), None
    if error is not None:
        supervision = _supervision(video, patch, volume, to)
    loss, coefficients = reduce_pairs(pair_loss, slope, active, supervision, error, loser_scale)
    return loss, coefficients, video_logits, patch_logits, active


def _video_term(
    margin: Tensor, volume: Tensor, video: Tensor, scale: Tensor, link_name: str, numbers: TableNumbers
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [B] and loss [B] of the videos, and its slope dL/dD_p [B, f, h, w]; ``scale`` [B] is beta kappa / 2."""
    logits = scale * video.sign() * (volume * margin).flatten(1).sum(1)
    value, derivative = link(logits, link_name, numbers.link_parameter, numbers.video_cap)
    slope = -numbers.video_weight * video * derivative * scale
    return logits, numbers.video_weight * video.abs() * value, slope[:, None, None, None] * volume


def _patch_term(
    margin: Tensor, patch: Tensor, scale: Tensor, link_name: str, numbers: TableNumbers
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [B, f, h, w] and loss [B] of the patches, and its slope dL/dD_p [B, f, h, w]."""
    logits = scale[:, None, None, None] * patch.sign() * margin
    value, derivative = link(logits, link_name, numbers.link_parameter, numbers.patch_cap)
    total = patch.abs().flatten(1).sum(1)
    share = numbers.patch_weight / torch.where(total > 0, total, 1.0)
    slope = -(share * scale)[:, None, None, None] * patch * derivative
    return logits, share * (patch.abs() * value).flatten(1).sum(1), slope


def _active_pairs(video: Tensor, patch: Tensor, numbers: TableNumbers) -> Tensor:
    """1 for each pair that counts in the mean, else 0: [B]."""
    # Labels whose weight is 0 do not make a pair active.
    by_video = (video != 0) & (numbers.video_weight != 0 or numbers.sft_weight != 0)
    by_patch = (patch != 0).flatten(1).any(1) & (numbers.patch_weight != 0 or numbers.patch_sft_weight != 0)
    return (by_video | by_patch).to(patch.dtype)


def _supervision(video: Tensor, patch: Tensor, volume: Tensor, numbers: TableNumbers) -> Tensor:
    """Weights [2B, f, h, w] of the errors in the supervised terms."""
    labelled = (patch != 0).flatten(1).sum(1).clamp(min=1).to(patch.dtype)
    patch_share = (numbers.patch_sft_weight / labelled)[:, None, None, None].expand_as(patch)
    video_share = winner_share(video, torch.full_like(video, numbers.sft_weight))[:, None, None, None]
    return winner_share(patch, patch_share) + video_share * volume


def composed_gran_dpo(
    kernels: Any,
    policy: Tensor,
    reference: Tensor | None,
    target: Tensor,
    reference_error: Tensor | None,
    patch_rewards: Tensor | None,
    video_rewards: Tensor | None,
    logit_scale: Tensor | None,
    grid: Sequence[int],
    link_name: str,
    numbers: TableNumbers,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """The Gran-DPO loss from the single operations of ``kernels``: the table, log-ratios, and errors if needed.

    Exactly one of ``reference`` and ``reference_error`` is given.
    """
    error: Tensor | None = None
    if reference is None or numbers.supervised:
        error = kernels.patch_error(policy, target, grid)
    if reference is None:
        assert reference_error is not None and error is not None
        log_ratio = reference_error - error
    else:
        log_ratio = kernels.patch_log_ratio(policy, reference, target, grid)
    table = kernels.gran_dpo_table(
        log_ratio, patch_rewards, video_rewards, logit_scale, error if numbers.supervised else None, None,
        policy.shape[1:], link_name, numbers,
    )  # fmt: skip
    return *table, log_ratio, error
