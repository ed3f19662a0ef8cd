"""Objectives: what is done with the [2B, f, h, w] table of patch log-ratios. Small plain PyTorch on a few numbers.

``GranDPO`` holds an objective, ``PRESETS`` the published ones. Every table function returns
(loss 0-d, coefficients dL/dE_p [2B, f, h, w], video_logits [B], patch_logits [B, f, h, w], active [B]).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from halo_fast import ops
from halo_fast.reference import (
    LINKS,
    Table,
    TableNumbers,
    accumulate_dtype,
    halves,
    link,
    patch_sizes,
    reduce_pairs,
    signed_weights,
    winner_share,
)

PAIR_FORMS = ("H1", "H2", "H3", "H4", "pooled")
FORMS = (*PAIR_FORMS, "mapo", "kto", "regression")
# MaPO's constants: the number of training timesteps, and the steepness of its likelihood proxy.
MAPO_STEPS, MAPO_STEEPNESS = 1000.0, 0.5


@dataclass(frozen=True)
class GranDPO:
    """A granular DPO objective: weights, betas, link and form of the loss.

    One pair of form H1 has the loss
        video_weight w_v phi(z_v) + patch_weight sum_p w_p phi(z_p) / sum_p w_p
        + sft_weight E(video winner) + patch_sft_weight mean of E_p over the pair's winning patches
        + anchor_weight (||o_a - o_ref,a||^2 + ||o_b - o_ref,b||^2) / N
    with z = -(beta kappa / 2) s D, s = sign(r_a - r_b), w = |r_a - r_b|^gamma where |r_a - r_b| > delta, else 0.

    video_weight, patch_weight: weights of the two terms, >= 0.
    video_beta, patch_beta: > 0; multiply half a MEAN squared error (``convert_beta`` translates other conventions). A
        0-d tensor may stand for a float: a schedule then compiles once. patch_beta None is video_beta / sqrt(P).
    link: phi, one of sigmoid, conservative, robust, hinge, ipo, kto; label_smoothing in [0, 1/2) is for the 2nd and
        3rd, and refused with the others.
    video_gamma, patch_gamma: exponents of the weights; video_delta, patch_delta: a reward gap up to this is a tie.
    sft_weight, patch_sft_weight, anchor_weight: supervised terms and pull to the reference, 0 unless asked for.
    loser_guard: None, or "video" or "patch": scale the loser's gradient by clip((1 - loser_guard_mu) |g_w|^2 /
        <g_w, g_l>, 0, 1) where <g_w, g_l> > 0, over the video or over each patch (Diffusion-SDPO, arXiv 2511.03317).
    form: H1; H2, one sigmoid over the pooling (1 - patch_share) s Z_p / sum Z + patch_share s_p w_p / sum w, weighted
        by video_weight; H3, every patch takes the video's winner with w_p = 1 + tanh(s (r_pa - r_pb) /
        patch_temperature); H4, as H1 but only patches where the worse reward is below defect_threshold; pooled, one
        sigmoid over all labelled elements beside the video's, with weights w_p Z_p, divided by their sum if
        normalize_pool and else by the video's size (supervised terms then carry kappa and the same pooling);
        mapo, no reference; kto, unpaired samples with signed labels; regression, E weighted by the rewards.
    """

    video_weight: float = 1.0
    patch_weight: float = 1.0
    video_beta: float | Tensor = 500.0
    patch_beta: float | Tensor | None = None
    link: str = "sigmoid"
    label_smoothing: float = 0.0
    patch_gamma: float = 1.0
    patch_delta: float = 0.0
    video_gamma: float = 0.0
    video_delta: float = 0.0
    sft_weight: float = 0.0
    patch_sft_weight: float = 0.0
    anchor_weight: float = 0.0
    loser_guard: str | None = None
    form: str = "H1"
    loser_guard_mu: float = 0.9
    patch_share: float = 0.5
    patch_temperature: float = 1.0
    defect_threshold: float | None = None
    normalize_pool: bool = True

    def __post_init__(self) -> None:
        _check_choice("form", self.form, FORMS)
        _check_choice("link", self.link, LINKS)
        _check_choice("loser_guard", self.loser_guard, (None, "video", "patch"))
        for name in ("video_beta", "patch_beta", "patch_temperature"):
            _check_number(name, getattr(self, name), above=0.0)
        for field in fields(self):
            if isinstance(field.default, float) and field.name not in ("video_beta", "patch_temperature"):
                _check_number(field.name, getattr(self, field.name), least=0.0)
        if self.label_smoothing >= 0.5:
            raise ValueError(
                f"label_smoothing must be below 1/2, the share of wrong labels; got {self.label_smoothing}"
            )
        if self.label_smoothing and self.link not in ("conservative", "robust"):
            raise ValueError(
                f"label_smoothing must be 0 with link {self.link!r}, which has none; got {self.label_smoothing}: "
                'choose link="conservative" (TRL\'s "sigmoid" with label_smoothing) or "robust"'
            )
        for name in ("patch_share", "loser_guard_mu"):
            if getattr(self, name) > 1:
                raise ValueError(f"{name} must be between 0 and 1; got {getattr(self, name)}")
        if self.defect_threshold is not None:
            _check_number("defect_threshold", self.defect_threshold)
        if self.form == "H4" and self.defect_threshold is None:
            raise ValueError('form "H4" needs defect_threshold, the reward under which a patch counts as defective')
        if not self.paired_by_reference and (self.sft_weight or self.patch_sft_weight or self.loser_guard):
            raise ValueError(
                f"sft_weight, patch_sft_weight and loser_guard need pairs with a reference (forms "
                f"{', '.join(PAIR_FORMS)}); form {self.form!r} has none: leave them at 0 and None"
            )

    @property
    def paired(self) -> bool:
        """Whether the batch is samples a and then their partners b; else every sample stands alone."""
        return self.form not in ("kto", "regression")

    @property
    def needs_reference(self) -> bool:
        """Whether the loss compares with a reference."""
        return self.form not in ("mapo", "regression")

    @property
    def one_logit(self) -> bool:
        """Whether all labels of a pair share one logit."""
        return self.form == "H2" or (self.form == "pooled" and not self.video_weight)

    @property
    def paired_by_reference(self) -> bool:
        """Whether this is one of the DPO forms: pairs, with a reference."""
        return self.form in PAIR_FORMS


def _check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}; got {value!r}")


def _check_number(name: str, value: Any, above: float = -math.inf, least: float = -math.inf) -> None:
    if value is None and name == "patch_beta":
        return
    if isinstance(value, Tensor):
        if not name.endswith("_beta") or value.ndim:
            raise TypeError(f"{name} must be a number{' or a 0-d tensor' * name.endswith('_beta')}; got a tensor")
        return
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number; got {type(value).__name__} {value!r}")
    if not (value > above and value >= least and math.isfinite(value)):
        bound = (
            f" and above {above:g}" if above > -math.inf else f" and at least {least:g}" if least > -math.inf else ""
        )
        raise ValueError(f"{name} must be finite{bound}; got {value}")


def _kind(value: object) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else f"{type(value).__name__} {value!r}"


PRESETS: dict[str, GranDPO] = {
    # Own formulation after HALO, arXiv 2502.06812.
    "halo": GranDPO(),
    # Wallace et al. 2023, arXiv 2311.12908: -log sigma(-beta/2 [(E_w - E_ref,w) - (E_l - E_ref,l)]).
    "diffusion_dpo": GranDPO(video_beta=5000.0, patch_weight=0.0),
    # Liu et al. 2025, arXiv 2501.13918: the same on velocities; kappa = (1-t)^2 is the paper's other weighting.
    "flow_dpo": GranDPO(video_beta=500.0, patch_weight=0.0),
    # Liu et al. 2024, arXiv 2412.14167: pairs weighted by ``video_dpo_rewards``.
    "video_dpo": GranDPO(video_beta=5000.0, patch_weight=0.0, video_gamma=1.0),
    # Wu et al. 2025, arXiv 2506.03517: one sigmoid over segment labels, beta 500 without the half.
    "dense_dpo": GranDPO(form="pooled", video_weight=0.0, video_beta=1000.0, patch_beta=1000.0, patch_gamma=0.0),
    # arXiv 2601.04068: the video and a soft mask (``local_dpo_rewards``), plus both as supervision of the winner.
    "local_dpo": GranDPO(
        form="pooled",
        video_beta=5000.0,
        patch_beta=5000.0,
        normalize_pool=False,
        sft_weight=0.1,
        patch_sft_weight=0.1,
    ),
    # arXiv 2511.01450: softplus(beta' D) + r E_w, beta' 1000 without the half, r 1.
    "reg_dpo": GranDPO(video_beta=2000.0, patch_weight=0.0, sft_weight=1.0),
    # arXiv 2511.03317: Diffusion-DPO whose loser's gradient is scaled so that the winner's error does not rise.
    "diffusion_sdpo": GranDPO(video_beta=5000.0, patch_weight=0.0, loser_guard="video"),
    # Li et al. 2024, arXiv 2404.04465: 1 - sigma(s beta (g - KL)), unpaired, beta 1000 without the half.
    "diffusion_kto": GranDPO(form="kto", link="kto", video_beta=2000.0, patch_beta=2000.0, video_gamma=1.0),
    # Hong et al. 2024, arXiv 2406.06424: E_w - beta log sigma(T (f(E_w) - f(E_l))), no reference.
    "mapo": GranDPO(form="mapo", video_beta=0.1, patch_weight=0.0),
    # Reward-weighted regression, e.g. LiFT, Wang et al. 2024, arXiv 2412.04814: score * E.
    "rwr": GranDPO(form="regression", patch_weight=0.0),
    # Huang et al. 2024, arXiv 2412.03177: E_p weighted by 1 - q_p on the real sample and by q_p on the generated one.
    "patch_dpo": GranDPO(form="regression", video_weight=0.0),
}


def resolve(objective: str | GranDPO) -> GranDPO:
    """The GranDPO of a preset's name, or the given one."""
    if isinstance(objective, GranDPO):
        return objective
    if not isinstance(objective, str):
        raise TypeError(f"objective must be a preset's name or a GranDPO; got {type(objective).__name__}")
    if objective not in PRESETS:
        raise ValueError(f"objective must be one of {', '.join(PRESETS)}, or a GranDPO; got {objective!r}")
    return PRESETS[objective]


def _sample_weights(labels: Tensor, gamma: float, delta: float) -> Tensor:
    return torch.where(labels.abs() > delta, labels.sign() * labels.abs() ** gamma, 0.0)


def preferences(
    objective: GranDPO, patch_rewards: Tensor | None, video_rewards: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Signed weights s w of the video [B] and of the patches [B, f, h, w]; 0 is a tie, None an absent term."""
    weights = signed_weights if objective.paired else _sample_weights
    video = patch = None
    if video_rewards is not None:
        video = weights(video_rewards, objective.video_gamma, objective.video_delta)
    if patch_rewards is None:
        return video, None
    if objective.form == "H3":
        assert video is not None
        sign = video.sign()[:, None, None, None]
        a, b = halves(patch_rewards)
        patch = sign * (1 + torch.tanh(sign * (a - b) / objective.patch_temperature)).nan_to_num(nan=0.0)
    else:
        patch = weights(patch_rewards, objective.patch_gamma, objective.patch_delta)
    if objective.form == "H4":
        assert objective.defect_threshold is not None
        patch = torch.where(torch.minimum(*halves(patch_rewards)) < objective.defect_threshold, patch, 0.0)
    return video, patch


def _betas(
    objective: GranDPO, kappa: Tensor | None, grid: tuple[int, ...], like: Tensor, groups: int
) -> tuple[float, float, Tensor | None]:
    """Constant betas, or 1 and the logit scale [2, groups], beta * kappa, when a beta is a tensor or kappa is there."""
    video_beta, patch_beta = objective.video_beta, objective.patch_beta
    if patch_beta is None:
        patch_beta = video_beta / math.sqrt(math.prod(grid))
    if kappa is None and not isinstance(video_beta, Tensor) and not isinstance(patch_beta, Tensor):
        return video_beta, patch_beta, None
    dtype = accumulate_dtype(like.dtype)
    if kappa is None:
        kappa = like.new_ones(groups, dtype=dtype)
    return 1.0, 1.0, torch.stack([kappa * video_beta, kappa * patch_beta]).to(dtype)


def table_arguments(
    objective: GranDPO,
    patch_rewards: Tensor | None,
    video_rewards: Tensor | None,
    kappa: Tensor | None,
    grid: tuple[int, ...],
    like: Tensor,
) -> tuple[Tensor | None, Tensor | None, TableNumbers]:
    """Patch rewards, logit scale and numbers that make the operators' H1 of forms H1, H3 and H4.

    ``like`` is any table [2B, ...] of the call.
    """
    patch_gamma, patch_delta = objective.patch_gamma, objective.patch_delta
    if objective.form != "H1" and patch_rewards is not None:
        # H3 and H4 only change the signed weights, which are rewards of a against 0.
        _, patch = preferences(objective, patch_rewards, video_rewards)
        assert patch is not None
        patch_rewards, patch_gamma, patch_delta = torch.cat([patch, torch.zeros_like(patch)]), 1.0, 0.0
    video_beta, patch_beta, scale = _betas(objective, kappa, grid, like, like.shape[0] // 2)
    numbers = TableNumbers(
        label_smoothing=objective.label_smoothing,
        video_weight=objective.video_weight,
        patch_weight=objective.patch_weight,
        video_beta=video_beta,
        patch_beta=patch_beta,
        video_gamma=objective.video_gamma,
        video_delta=objective.video_delta,
        patch_gamma=patch_gamma,
        patch_delta=patch_delta,
        sft_weight=objective.sft_weight,
        patch_sft_weight=objective.patch_sft_weight,
    )
    return patch_rewards, scale, numbers


def evaluate(
    objective: GranDPO,
    log_ratio: Tensor | None,
    error: Tensor | None,
    loser_scale: Tensor | None,
    patch_rewards: Tensor | None,
    video_rewards: Tensor | None,
    kappa: Tensor | None,
    latent_shape: tuple[int, ...],
) -> Table:
    """The loss of ``objective`` and its coefficients from the table of log-ratios, errors or both."""
    if objective.form == "regression":
        assert error is not None
        return _regression(objective, error, patch_rewards, video_rewards, kappa, latent_shape)
    if objective.form == "mapo":
        assert error is not None and video_rewards is not None
        return _mapo(objective, error, video_rewards, kappa, latent_shape)
    assert log_ratio is not None
    if objective.form == "kto":
        return _kto(objective, log_ratio, patch_rewards, video_rewards, kappa, latent_shape)
    if objective.form in ("H2", "pooled"):
        return _pooled(objective, log_ratio, error, loser_scale, patch_rewards, video_rewards, kappa, latent_shape)
    patch_rewards, scale, numbers = table_arguments(
        objective, patch_rewards, video_rewards, kappa, log_ratio.shape[1:], log_ratio
    )
    table: Table = ops.gran_dpo_table(
        log_ratio, patch_rewards, video_rewards, scale, error, loser_scale, latent_shape, objective.link, numbers
    )
    return table


def volume_share(latent_shape: tuple[int, ...], table: Tensor) -> Tensor:
    sizes = patch_sizes(latent_shape, table.shape[1:], table)
    return sizes / sizes.sum()


def _per_patch(values: Tensor) -> Tensor:
    return values[:, None, None, None]


def _total(values: Tensor) -> Tensor:
    return values.flatten(1).sum(1)


def _scales(objective: GranDPO, kappa: Tensor | None, log_ratio: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """beta kappa / 2 of the video and of the patches, each [groups]."""
    video_beta, patch_beta, scale = _betas(objective, kappa, log_ratio.shape[1:], log_ratio, groups)
    if scale is None:
        ones = log_ratio.new_ones(groups)
        scale = torch.stack([ones * video_beta, ones * patch_beta])
    return 0.5 * scale[0], 0.5 * scale[1]


def _pooled(
    objective: GranDPO,
    log_ratio: Tensor,
    error: Tensor | None,
    loser_scale: Tensor | None,
    patch_rewards: Tensor | None,
    video_rewards: Tensor | None,
    kappa: Tensor | None,
    latent_shape: tuple[int, ...],
) -> Table:
    """H2 (one sigmoid over video and patches) and pooled (one for the video, one for all labelled elements)."""
    a, b = halves(log_ratio)
    margin = a - b  # -D_p
    volume = volume_share(latent_shape, log_ratio)
    video_scale, patch_scale = _scales(objective, kappa, log_ratio, margin.shape[0])
    video, patch = preferences(objective, patch_rewards, video_rewards)
    video = margin.new_zeros(margin.shape[0]) if video is None else video
    patch = torch.zeros_like(margin) if patch is None else patch
    labelled = _total(patch != 0)
    patch_logits = _per_patch(patch_scale) * patch.sign() * margin

    if objective.form == "H2":
        total = _total(patch.abs())
        pool = patch / _per_patch(torch.where(total > 0, total, 1.0))
        mixed = (1 - objective.patch_share) * _per_patch(video.sign()) * volume + objective.patch_share * pool
        used = ((video != 0) & (objective.patch_share < 1)) | ((labelled > 0) & (objective.patch_share > 0))
        groups = [(mixed, video_scale, objective.video_weight * used.to(margin.dtype))]
    else:
        pool = patch * volume
        total = _total(pool.abs()) if objective.normalize_pool else torch.ones_like(video)
        pool = pool / _per_patch(torch.where(total > 0, total, 1.0))
        patch_omega = objective.patch_weight * (labelled > 0).to(margin.dtype)
        groups = [
            (_per_patch(video.sign()) * volume, video_scale, objective.video_weight * video.abs()),
            (pool, patch_scale, patch_omega),
        ]
    pair_loss, slope, logits = torch.zeros_like(video), torch.zeros_like(margin), []
    for pooling, scale, omega in groups:
        z = scale * _total(pooling * margin)
        value, derivative = link(z, objective.link, objective.label_smoothing)
        pair_loss = pair_loss + omega * value
        slope = slope - _per_patch(omega * derivative * scale) * pooling
        logits.append(z)

    active = sum(omega for *_, omega in groups) > 0
    active = active | ((video != 0) & (objective.sft_weight > 0)) | ((labelled > 0) & (objective.patch_sft_weight > 0))
    supervision = None
    if error is not None:
        supervision = winner_share(patch, objective.patch_sft_weight * pool.abs())
        supervision = supervision + winner_share(
            _per_patch(video).expand_as(margin), objective.sft_weight * volume.expand_as(margin)
        )
        if kappa is not None:
            supervision = supervision * _per_patch(kappa.repeat(2))
    active = active.to(margin.dtype)
    loss, coefficients = reduce_pairs(pair_loss, slope, active, supervision, error, loser_scale)
    return loss, coefficients, logits[-1 if objective.one_logit else 0], patch_logits, active


def _mapo(
    objective: GranDPO, error: Tensor, video_rewards: Tensor, kappa: Tensor | None, latent_shape: tuple[int, ...]
) -> Table:
    """E_w - beta log sigma(T (f(E_w) - f(E_l))), f(E) = a E / (e^{aE} - 1), over whole videos."""
    volume = volume_share(latent_shape, error)
    weight = kappa.repeat(2) if kappa is not None else error.new_ones(error.shape[0])
    a, b = halves(weight * _total(volume * error))
    video = signed_weights(video_rewards, objective.video_gamma, objective.video_delta)
    sign = video.sign()
    f_a, slope_a = _mapo_likelihood(a)
    f_b, slope_b = _mapo_likelihood(b)
    z = MAPO_STEPS * sign * (f_a - f_b)
    value, derivative = link(z, objective.link, objective.label_smoothing)
    omega = objective.video_weight * video.abs()
    active = (omega > 0).to(error.dtype)
    pair_loss = omega * (torch.where(sign > 0, a, b) + objective.video_beta * value)
    pull = MAPO_STEPS * objective.video_beta * omega * derivative * sign
    per_sample = torch.cat([omega * (sign > 0) + pull * slope_a, omega * (sign < 0) - pull * slope_b])
    share = active / active.sum().clamp(min=1)
    coefficients = _per_patch(per_sample * weight * share.repeat(2)) * volume
    return (pair_loss * share).sum(), coefficients, z, error.new_zeros((a.shape[0], *error.shape[1:])), active


def _mapo_likelihood(error: Tensor) -> tuple[Tensor, Tensor]:
    """f(E) = x / (e^x - 1) at x = a E, and df/dE."""
    x = MAPO_STEEPNESS * error
    small = x < 0.05
    safe = torch.where(small, 1.0, x)
    f = torch.where(small, 1 - x / 2 + x**2 / 12 - x**4 / 720, safe / torch.expm1(safe))
    # f' = (f / x) (1 - x - f) cancels near 0, where its series is used.
    series = -0.5 + x / 6 - x**3 / 180 + x**5 / 5040
    return f, MAPO_STEEPNESS * torch.where(small, series, f / safe * (1 - safe - f))


def _kto(
    objective: GranDPO,
    log_ratio: Tensor,
    patch_rewards: Tensor | None,
    video_rewards: Tensor | None,
    kappa: Tensor | None,
    latent_shape: tuple[int, ...],
) -> Table:
    """Unpaired: z = s (beta kappa / 2 g - KL), g = -d, KL = max(mean over the batch of beta kappa / 2 g, 0)."""
    volume = volume_share(latent_shape, log_ratio)
    video_scale, patch_scale = _scales(objective, kappa, log_ratio, log_ratio.shape[0])
    video, patch = preferences(objective, patch_rewards, video_rewards)
    video = log_ratio.new_zeros(log_ratio.shape[0]) if video is None else video
    patch = torch.zeros_like(log_ratio) if patch is None else patch

    gain = video_scale * _total(volume * log_ratio)
    video_logits = video.sign() * (gain - gain.mean().clamp(min=0))
    value, derivative = link(video_logits, objective.link, objective.label_smoothing)
    loss = objective.video_weight * video.abs() * value
    # coefficients are dL/dE_p, and g = -d falls as E rises
    coefficients = -_per_patch(objective.video_weight * video * derivative * video_scale) * volume

    gain = _per_patch(patch_scale) * log_ratio
    patch_logits = patch.sign() * (gain - gain.mean().clamp(min=0))
    value, derivative = link(patch_logits, objective.link, objective.label_smoothing)
    total = _total(patch.abs())
    share = objective.patch_weight / torch.where(total > 0, total, 1.0)
    loss = loss + share * _total(patch.abs() * value)
    coefficients = coefficients - _per_patch(share * patch_scale) * patch * derivative

    used = ((video != 0) & (objective.video_weight > 0)) | ((total > 0) & (objective.patch_weight > 0))
    active = used.to(log_ratio.dtype)
    mean = active / active.sum().clamp(min=1)
    return (loss * mean).sum(), coefficients * _per_patch(mean), video_logits, patch_logits, active


def _regression(
    objective: GranDPO,
    error: Tensor,
    patch_rewards: Tensor | None,
    video_rewards: Tensor | None,
    kappa: Tensor | None,
    latent_shape: tuple[int, ...],
) -> Table:
    """kappa (video_weight r E + patch_weight sum_p (Z_p / sum Z) r_p E_p) of each sample; NaN is no label."""
    volume = volume_share(latent_shape, error)
    weight, labelled = torch.zeros_like(error), torch.zeros_like(error, dtype=torch.bool)
    if video_rewards is not None and objective.video_weight:
        weight = weight + objective.video_weight * _per_patch(video_rewards.nan_to_num(nan=0.0))
        labelled = labelled | _per_patch(~video_rewards.isnan())
    if patch_rewards is not None and objective.patch_weight:
        weight = weight + objective.patch_weight * patch_rewards.nan_to_num(nan=0.0)
        labelled = labelled | ~patch_rewards.isnan()
    if kappa is not None:
        weight = weight * _per_patch(kappa)
    active = labelled.flatten(1).any(1).to(error.dtype)
    share = active / active.sum().clamp(min=1)
    coefficients = weight * volume * _per_patch(share)
    logits = error.new_zeros(error.shape[0])
    return (coefficients * error).sum(), coefficients, logits, torch.zeros_like(error), active


def video_dpo_rewards(video_rewards: Tensor, scores: Tensor, alpha: float = 1.0, bin_width: float = 0.01) -> Tensor:
    """Rewards [2B] for the "video_dpo" preset, whose gap is VideoDPO's pair weight (p_max / sqrt(p_a p_b))^alpha.

    p is the frequency of a reward in the histogram of ``scores`` (all candidates' rewards, 1-d) with ``bin_width``:
    pairs of rare scores weigh more. Both arguments on any scale, float. Not differentiable. A score outside the
    histogram takes the rarest bin's frequency. Source: VideoDPO, arXiv 2412.14167.
    """
    for name, values in (("video_rewards", video_rewards), ("scores", scores)):
        if not isinstance(values, Tensor) or not values.is_floating_point() or values.ndim != 1:
            raise ValueError(f"{name} must be a 1-d float tensor; got {_kind(values)}")
    if video_rewards.numel() % 2:
        raise ValueError(f"video_rewards must be [2B], all a and then their partners b; got {_kind(video_rewards)}")
    if not scores.numel() or not bool(scores.isfinite().all()):
        raise ValueError(f"scores must be finite and at least one; got {_kind(scores)}: drop what is not finite")
    _check_number("bin_width", bin_width, above=0.0)
    low = scores.min()
    bins = ((scores - low) / bin_width).floor().long()
    counts = torch.bincount(bins)
    rarest = counts[counts > 0].min()
    place = ((video_rewards.nan_to_num(nan=0.0) - low) / bin_width).floor().long()
    inside = (place >= 0) & (place < counts.numel())
    found = torch.where(inside, counts[place.clamp(0, counts.numel() - 1)], 0)
    frequency = torch.where(found > 0, found, rarest).to(video_rewards.dtype)
    a, b = halves(frequency)
    r_a, r_b = halves(video_rewards)
    signed = torch.where((r_a - r_b).abs() > 0, (r_a - r_b).sign(), 0.0) * (counts.max() / (a * b).sqrt()) ** alpha
    return torch.cat([signed, torch.zeros_like(signed)])


def local_dpo_rewards(mask: Tensor, video_rewards: Tensor, strength: Tensor | float = 1.0) -> Tensor:
    """Patch rewards [2B, F, H, W] for the "local_dpo" preset from the soft masks [B, F, H, W] of corrupted positions.

    The gap of a pair is y M |Omega| / sum M, signed by the video's winner; y is the region ``strength``, a number or
    [B]. The sum is taken per sample and an empty mask gives a tie. Source: LocalDPO, arXiv 2601.04068.
    """
    if mask.ndim != 4 or tuple(video_rewards.shape) != (2 * mask.shape[0],):
        raise ValueError(
            f"mask must be [B, F, H, W] and video_rewards [2B]: one mask for a pair; got {_kind(mask)} and "
            f"{_kind(video_rewards)}"
        )
    total = mask.flatten(1).sum(1)
    size = math.prod(mask.shape[1:])
    scale = strength * size / torch.where(total > 0, total, 1.0)
    weight = _per_patch(scale * signed_weights(video_rewards, 0.0, 0.0)) * mask
    return torch.cat([weight, torch.zeros_like(weight)])


_CONVENTIONS = ("half_mean", "mean", "half_sum", "sum")


def convert_beta(beta: float, source: str, target: str = "half_mean", num_elements: int | None = None) -> float:
    """A beta of one convention in another, so that beta times the error gap is the same logit.

    A convention says what beta multiplies: "half_mean" (beta/2 times a mean squared error: here, Diffusion-DPO,
    VideoDPO, LocalDPO), "mean" (DenseDPO, VideoGPA, diffusers' SD script), "half_sum" (SimpleTuner's default), "sum".
    num_elements: elements of one sample's latent, C F H W; needed between a mean and a sum.
    """
    _check_choice("source", source, _CONVENTIONS)
    _check_choice("target", target, _CONVENTIONS)
    _check_number("beta", beta, above=0.0)

    def factor(convention: str) -> float:
        half = 0.5 if convention.startswith("half") else 1.0
        if source.endswith("sum") == target.endswith("sum"):
            return half
        if num_elements is None or num_elements < 1:
            raise ValueError(f"num_elements must be the latent's C*F*H*W between a mean and a sum; got {num_elements}")
        return half * (num_elements if convention.endswith("sum") else 1)

    return beta * factor(source) / factor(target)


def timestep_weight(head: str, space: str, signal: Tensor, noise: Tensor, maximum: float = 100.0) -> Tensor:
    """kappa [B] that turns the squared error of the model's ``head`` into that of ``space``, clipped at ``maximum``.

    With x_t = signal x0 + noise eps: |eps error|^2 = signal^2 |v error|^2 and |x0 error|^2 = noise^2 |v error|^2, for
    the variance-preserving v = signal eps - noise x0 (signal^2 = abar) as for the flow's eps - x0 (signal 1-t, noise
    t).
    head, space: "epsilon", "sample", "v_prediction" or "flow" (the last two are the v error of their own schedule).
    signal, noise: [B] coefficients at each sample's timestep, computed before any cast to bf16.
    """
    names = ("epsilon", "sample", "v_prediction", "flow")
    _check_choice("head", head, names)
    _check_choice("space", space, names)
    for name, value in (("signal", signal), ("noise", noise)):
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise TypeError(f"{name} must be a float tensor, the coefficient at each timestep; got {_kind(value)}")
    if head == space:
        return torch.ones_like(signal)  # at the ends of the schedule the quotient would be 0 / 0
    factor = {"epsilon": signal.square(), "sample": noise.square()}
    one = torch.ones_like(signal)
    return (factor.get(space, one) / factor.get(head, one)).clamp(max=maximum)


class AutoBeta:
    """A beta steered so that the mean gradient factor sigma(-|z|) of the labelled logits is ``target``.

    beta starts at ``initial``; ``update`` multiplies it by exp(rate (mean sigma(-|z|) - target)) within [minimum,
    maximum]. The mean is summed over all ranks when torch.distributed is initialised, so every rank holds the same
    beta, and ``state_dict`` saves it. ``beta`` is a 0-d float32 tensor: GranDPO(video_beta=auto.beta) never compiles
    again, and nothing here waits for the device.
    """

    def __init__(
        self,
        initial: float = 500.0,
        target: float = 0.2,
        rate: float = 0.1,
        minimum: float = 1.0,
        maximum: float = 20000.0,
        device: torch.device | str = "cpu",
    ) -> None:
        for name, value in {"initial": initial, "target": target, "rate": rate, "minimum": minimum}.items():
            _check_number(name, value, above=0.0)
        if not (target < 0.5 and minimum <= initial <= maximum):
            raise ValueError(
                f"target must be below 1/2 and minimum <= initial <= maximum; got target {target}, minimum {minimum}, "
                f"initial {initial}, maximum {maximum}"
            )
        self.target, self.rate, self.minimum, self.maximum = target, rate, minimum, maximum
        self.beta = torch.tensor(float(initial), device=device)

    @torch.no_grad()
    def update(self, logits: Tensor) -> None:
        """Move beta after a step with these logits (``out.video_logits`` or ``out.patch_logits``); exact 0 is a tie.

        At the very start policy equals reference, all logits are 0, and beta stays. NaN logits are left out: one
        broken step, which the loss shows, must not leave beta NaN for ever.
        """
        labelled = (logits != 0) & ~logits.isnan()
        factor = torch.sigmoid(-logits.abs().float())
        sums = torch.stack([torch.where(labelled, factor, 0.0).sum(), labelled.sum().float()])
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(sums)
        mean = sums[0] / sums[1].clamp(min=1)
        step = torch.where(sums[1] > 0, self.rate * (mean - self.target), 0.0).to(self.beta.device)
        self.beta = (self.beta * step.exp()).clamp(self.minimum, self.maximum)

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint must hold: beta."""
        return {"beta": self.beta.detach().clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take up the beta of ``state_dict``."""
        self.beta = state["beta"].to(self.beta)
