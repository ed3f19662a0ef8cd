"""The public calls: checks, layouts and the formulas' documentation. Formulas are written out in docs/dropin.md."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from halo_fast import objectives, ops, reference
from halo_fast.objectives import GranDPO

_LAYOUTS = ("BCFHW", "BFCHW", "BCHW")


@dataclass(frozen=True)
class GranDPOOutput:
    """What ``gran_dpo`` returns; every tensor but ``loss`` is detached.

    loss: 0-d, the mean over the pairs that have at least one group that is not a tie. Averaging this over ranks is
        exact only if all have the same ``num_pairs``; for exact means scale it by num_pairs * world_size / (num_pairs
        summed over ranks) before backward, which DDP's average of gradients then turns into the global mean.
    patch_logits: z_p [B, f, h, w], signed by the patch's own preference: above 0 where the policy agrees.
    video_logits: z_v [B], likewise; form H2, and form pooled with video_weight 0 (dense_dpo), have one logit for all
        labels of a pair, and it stands here.
    log_ratio: -d_p [2B, f, h, w], how much closer to the target the policy is than the reference; None without
        reference.
    active: [B], 1 for each pair that counts in the mean, else 0. Unpaired objectives have N samples in place of B
        pairs.
    """

    loss: Tensor
    patch_logits: Tensor
    video_logits: Tensor
    log_ratio: Tensor | None
    active: Tensor
    _objective: GranDPO
    _patch_rewards: Tensor | None
    _video_rewards: Tensor | None
    _kappa: Tensor | None
    _error: Tensor | None
    _prediction: Tensor
    _target: Tensor

    @property
    def num_pairs(self) -> Tensor:
        """Number of pairs in the mean, 0-d."""
        return self.active.sum()

    def metrics(self) -> dict[str, Tensor]:
        """What to log, as 0-d device tensors: no host sync; docs/dropin.md says what healthy values are.

        loss, num_pairs, model_mse (mean E of the policy), ref_mse (of the reference);
        video labels: rewards/chosen, rewards/rejected, rewards/margins (implicit rewards of winner and loser and their
        gap z_v), rewards/accuracies = implicit_acc (share of z_v > 0, a zero counts one half), win_gap and lose_gap
        (E - E_ref of winner and loser), video/ties; patch labels: patch/margins, patch/accuracies, patch/ties;
        gradient_factor (mean sigma(-z)) and saturation (share of |z| > 10) over all labelled logits.
        Keys of a kind of label that was not given are absent; a mean over nothing is NaN.
        """
        volume = objectives.volume_share(self._prediction.shape[1:], self.patch_logits)
        error = self._error
        if error is None:
            error = ops.patch_error(self._prediction, self._target, self.patch_logits.shape[1:])
        values = {"loss": self.loss.detach(), "num_pairs": self.num_pairs, "model_mse": _video(volume, error).mean()}
        if self.log_ratio is not None:
            values["ref_mse"] = _video(volume, error + self.log_ratio).mean()
        video, patch = objectives.preferences(self._objective, self._patch_rewards, self._video_rewards)
        logits, weights = [], []
        if self._objective.one_logit:
            # one logit for all labels of a pair
            labelled = self.active
        elif video is not None and self._objective.form != "regression":
            labelled = (video != 0).to(error.dtype)
        if self._objective.one_logit or (video is not None and self._objective.form != "regression"):
            logits.append(self.video_logits)
            weights.append(labelled)
            accuracy = _mean(_agreement(self.video_logits), labelled)
            values["rewards/margins"] = _mean(self.video_logits, labelled)
            values["rewards/accuracies"] = values["implicit_acc"] = accuracy
        if video is not None and self._objective.form != "regression":
            values |= self._video_metrics(video, volume)
        if patch is not None and self._objective.form not in ("regression", "mapo"):
            labelled = (patch != 0).to(error.dtype)
            logits.append(self.patch_logits.flatten())
            weights.append(labelled.flatten())
            values["patch/margins"] = _mean(self.patch_logits, labelled)
            values["patch/accuracies"] = _mean(_agreement(self.patch_logits), labelled)
            values["patch/ties"] = 1 - labelled.mean()
        if logits:
            z, weight = torch.cat(logits), torch.cat(weights)
            values["gradient_factor"] = _mean(torch.sigmoid(-z), weight)
            values["saturation"] = _mean((z.abs() > 10).to(z.dtype), weight)
        return values

    def _video_metrics(self, video: Tensor, volume: Tensor) -> dict[str, Tensor]:
        labelled = (video != 0).to(self.video_logits.dtype)
        values = {"video/ties": 1 - labelled.mean()}
        if self.log_ratio is None or not self._objective.paired:
            return values
        gain = _video(volume, self.log_ratio)
        a, b = reference.halves(gain)
        chosen, rejected = torch.where(video > 0, a, b), torch.where(video > 0, b, a)
        scale = 0.5 * self._objective.video_beta * (1.0 if self._kappa is None else self._kappa)
        values["rewards/chosen"] = _mean(scale * chosen, labelled)
        values["rewards/rejected"] = _mean(scale * rejected, labelled)
        values["win_gap"], values["lose_gap"] = _mean(-chosen, labelled), _mean(-rejected, labelled)
        return values


def _video(volume: Tensor, table: Tensor) -> Tensor:
    return (volume * table).flatten(1).sum(1)


def _mean(values: Tensor, weight: Tensor) -> Tensor:
    return (values * weight).sum() / weight.sum()


def _agreement(logits: Tensor) -> Tensor:
    return (logits > 0).to(logits.dtype) + 0.5 * (logits == 0).to(logits.dtype)


def _tensor(name: str, value: object, like: Tensor | None = None) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor; got {type(value).__name__}")
    if type(value) is not Tensor and hasattr(value, "to_local"):
        raise TypeError(f"{name} must be a local tensor; got a DTensor: pass {name}.to_local()")
    if value.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor; got layout {value.layout}: pass {name}.to_dense()")
    if like is not None and value.device != like.device:
        raise ValueError(f"{name} must be on prediction's device {like.device}; got {value.device}: move it there")
    return value


def _constant(name: str, value: Tensor) -> None:
    if value.requires_grad:
        raise ValueError(f"{name} must not require grad, only prediction is differentiated; pass {name}.detach()")


def _view(latent: Tensor, layout: str) -> Tensor:
    """The strided view [N, C, F, H, W]; no layout is copied."""
    if layout == "BFCHW":
        return latent.transpose(1, 2)
    return latent.unsqueeze(2) if layout == "BCHW" else latent


def _latent(name: str, value: object, layout: str, like: Tensor | None = None) -> Tensor:
    """``value`` as a [N, C, F, H, W] view, after every check of a latent-shaped argument."""
    if layout not in _LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(_LAYOUTS)}; got {layout!r}")
    value = _tensor(name, value, like)
    if not value.dtype.is_floating_point or value.dtype.itemsize == 1:
        raise TypeError(f"{name} must be float64, float32, bfloat16 or float16; got {value.dtype}: convert it")
    if value.ndim != len(layout):
        raise ValueError(
            f"{name} must have the {len(layout)} dimensions of layout {layout}; got shape {tuple(value.shape)}"
        )
    if like is not None and value.shape != like.shape:
        raise ValueError(f"{name} must have prediction's shape {tuple(like.shape)}; got {tuple(value.shape)}")
    if 0 in value.shape[1:]:
        raise ValueError(f"{name} must not have an empty side; got shape {tuple(value.shape)}")
    return value


def _grid(grid: Sequence[int], latent: Tensor, name: str) -> tuple[int, ...]:
    if not isinstance(grid, tuple | list | torch.Size) or len(grid) != 3:
        raise ValueError(f"{name} must be three patch counts (frames, rows, columns); got {grid!r}")
    if any(isinstance(count, float | str | bool | Tensor) for count in grid):
        raise TypeError(f"{name} must be three integers (frames, rows, columns); got {grid!r}: convert them with int()")
    for side, count, length in zip(("frames", "rows", "columns"), grid, latent.shape[2:], strict=True):
        if not 1 <= count <= length:
            raise ValueError(
                f"{name} must have between 1 and {length} patches along the latent's {length} {side}; got {count} "
                f"(grid {tuple(grid)}, latent {tuple(latent.shape[2:])}): choose a coarser grid or check layout"
            )
    return tuple(grid)


def _reference(value: object, prediction: Tensor, layout: str) -> Tensor:
    latent = _latent("reference", value, layout, prediction)
    _constant("reference", latent)
    if latent.dtype != prediction.dtype:
        raise TypeError(
            f"reference must have prediction's dtype {prediction.dtype}; got {latent.dtype}: a difference in precision "
            "between the two shifts every margin, run both forwards alike (or cast on purpose)"
        )
    return latent


def _numbers(
    name: str,
    value: object,
    shape: tuple[int, ...],
    prediction: Tensor,
    dtype: torch.dtype,
    missing: str = ", or NaN for 'not labelled'",
) -> Tensor:
    """Rewards or kappa in the dtype of the sums; ``missing`` says what a NaN means, "" if there must be none."""
    value = _tensor(name, value, prediction)
    _constant(name, value)
    if value.dtype == torch.bool or value.is_complex():
        raise TypeError(f"{name} must be real numbers; got {value.dtype}: use 1.0 and 0.0")
    if tuple(value.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}; got {tuple(value.shape)}")
    # Looking at values would make an accelerator wait, and break a graph.
    if value.device.type == "cpu" and not torch.compiler.is_compiling():
        # The sum is finite if all numbers are, and costs a third of looking at each.
        if not math.isfinite(value.sum()) and bool(value.isinf().any()):
            raise ValueError(f"{name} must be finite{missing}; got an infinite value: drop or clip it")
        if not missing and bool(value.isnan().any()):
            raise ValueError(f"{name} must be finite; got NaN: clip it where it diverges, as timestep_weight does")
    return value.to(dtype)


def patch_log_ratio(
    prediction: Tensor, target: Tensor, reference: Tensor, grid: Sequence[int], layout: str = "BCFHW"
) -> Tensor:
    """Patch-wise log-probability ratio of policy and reference, up to beta kappa / 2: -d_p, in its factored form.

    -d_p = E_p(o_ref) - E_p(o) = -(1/Z_p) sum over patch and channels of (o - o_ref)(o + o_ref - 2 tau), exactly 0 where
    the two agree. The isotropic Gaussian step KL is a sum over positions, so it splits by patch.

    prediction, target, reference: [N, C, F, H, W] (layout BCFHW), [N, F, C, H, W] (BFCHW) or [N, C, H, W] (BCHW), any
        strides, read in place; float64, float32, bfloat16 or float16. reference has prediction's dtype.
    grid: (f, h, w) patches along frames, rows, columns; patch k of n along length L covers
        floor(kL/n)..floor((k+1)L/n).
    Returns [N, f, h, w], float32 (float64 for float64). Differentiable in prediction, once; not under torch.func.
    Raises ValueError or TypeError naming the argument.
    """
    prediction = _latent("prediction", prediction, layout)
    target = _latent("target", target, layout, prediction)
    _constant("target", target)
    reference = _view(_reference(reference, prediction, layout), layout)
    policy = _view(prediction, layout)
    ratio: Tensor = ops.patch_log_ratio(policy, reference, _view(target, layout), _grid(grid, policy, "grid"))
    return ratio


def patch_error(prediction: Tensor, target: Tensor, grid: Sequence[int], layout: str = "BCFHW") -> Tensor:
    """Mean squared error of each patch: E_p = (1/Z_p) sum over patch and channels of (o - tau)^2.

    Arguments, dtypes, differentiability and errors as in ``patch_log_ratio``; returns [N, f, h, w]. Of the reference's
    prediction it is what to cache as ``reference_error``.
    """
    prediction = _latent("prediction", prediction, layout)
    target = _latent("target", target, layout, prediction)
    _constant("target", target)
    policy = _view(prediction, layout)
    error: Tensor = ops.patch_error(policy, _view(target, layout), _grid(grid, policy, "grid"))
    return error


def patch_weighted_mse(prediction: Tensor, target: Tensor, coefficients: Tensor, layout: str = "BCFHW") -> Tensor:
    """sum_p c_p E_p over the batch, 0-d: with coefficients of ``gran_dpo_coefficients`` its gradient is Gran-DPO's.

    d/do = 2 (o - tau) c_p / Z_p. The value itself is not the loss: that is ``out.loss``. Samples couple only through
    the coefficients, so one sample at a time may run forward and backward, summing the gradients.

    prediction, target: [N, C, F, H, W] or another ``layout``; coefficients: [N, f, h, w] float, its shape is the grid.
    Differentiable in prediction. Raises ValueError or TypeError naming the argument.
    """
    prediction = _latent("prediction", prediction, layout)
    target = _latent("target", target, layout, prediction)
    _constant("target", target)
    policy, target = _view(prediction, layout), _view(target, layout)
    dtype = reference.accumulate_dtype(policy.dtype, target.dtype)
    coefficients = _table("coefficients", coefficients, policy, dtype)
    with torch.no_grad():
        value = (coefficients * ops.patch_error(policy, target, coefficients.shape[1:])).sum()
    loss: Tensor = ops.attach_gradient(value, coefficients, policy, target)
    return loss


def _table(name: str, value: object, latent: Tensor, dtype: torch.dtype) -> Tensor:
    """A [N, f, h, w] argument that must not be rounded: float32 or float64."""
    value = _tensor(name, value, latent)
    _constant(name, value)
    if value.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name} must be float32 or float64, rounding it shifts every margin; got {value.dtype}")
    if value.ndim != 4 or value.shape[0] != latent.shape[0]:
        raise ValueError(f"{name} must have shape [{latent.shape[0]}, f, h, w]; got {tuple(value.shape)}")
    _grid(value.shape[1:], latent, name)
    return value.to(dtype).contiguous()


def _loser_scale(objective: GranDPO, error: Tensor, prediction: Tensor, target: Tensor, volume: Tensor) -> Tensor:
    """The loser guard's factor [2B, f, h, w] for each sample, should it be the loser (Diffusion-SDPO)."""
    residual = (prediction - target).to(error.dtype)
    inner = reference.patch_mean(torch.mul(*reference.halves(residual)), error.shape[1:]).repeat(2, 1, 1, 1)
    winner = torch.cat(reference.halves(error)[::-1])
    if objective.loser_guard == "video":
        inner = _video(volume, inner)[:, None, None, None].expand_as(error)
        winner = _video(volume, winner)[:, None, None, None].expand_as(error)
    opposed = inner > 0
    ratio = (1 - objective.loser_guard_mu) * winner / torch.where(opposed, inner, 1.0)
    return torch.where(opposed, ratio.clamp(0, 1), 1.0)


def _evaluate(
    prediction: Tensor,
    target: Tensor,
    reference_prediction: Tensor | None,
    reference_error: Tensor | None,
    patch_rewards: Tensor | None,
    video_rewards: Tensor | None,
    kappa: Tensor | None,
    objective: GranDPO,
    grid: tuple[int, ...],
) -> tuple[Tensor, GranDPOOutput]:
    """Coefficients and output from checked arguments in [N, C, F, H, W]; its loss is differentiable in prediction."""
    log_ratio: Tensor | None
    error: Tensor | None
    if objective.form in ("H1", "H3", "H4") and not objective.loser_guard:
        like = video_rewards if patch_rewards is None else patch_rewards
        assert like is not None
        rewards, scale, numbers = objectives.table_arguments(objective, patch_rewards, video_rewards, kappa, grid, like)
        loss, coefficients, video_logits, patch_logits, active, log_ratio, error = ops.gran_dpo(
            prediction, reference_prediction, target, reference_error, rewards, video_rewards, scale, grid,
            objective.link, numbers,
        )  # fmt: skip
        if reference_prediction is not None and not numbers.supervised:
            error = None
    else:
        with torch.no_grad():
            (loss, coefficients, video_logits, patch_logits, active), log_ratio, error = _composed(
                prediction, target, reference_prediction, reference_error, patch_rewards, video_rewards, kappa,
                objective, grid,
            )  # fmt: skip
        loss = ops.attach_gradient(loss, coefficients, prediction, target)
    out = GranDPOOutput(
        loss, patch_logits, video_logits, log_ratio, active, objective, patch_rewards, video_rewards, kappa, error,
        prediction.detach(), target,
    )  # fmt: skip
    return coefficients, out


def _composed(
    prediction: Tensor,
    target: Tensor,
    reference_prediction: Tensor | None,
    reference_error: Tensor | None,
    patch_rewards: Tensor | None,
    video_rewards: Tensor | None,
    kappa: Tensor | None,
    objective: GranDPO,
    grid: tuple[int, ...],
) -> tuple[objectives.Table, Tensor | None, Tensor | None]:
    """Table, log-ratios, errors of what the one operator does not do: other forms and the loser guard."""
    shape = tuple(prediction.shape[1:])
    supervised = bool(objective.sft_weight or objective.patch_sft_weight or objective.loser_guard)
    error = log_ratio = None
    if reference_prediction is None or supervised:
        error = ops.patch_error(prediction, target, grid)
    if reference_prediction is not None:
        log_ratio = ops.patch_log_ratio(prediction, reference_prediction, target, grid)
    elif reference_error is not None and error is not None:
        log_ratio = reference_error - error
    scale = None
    if objective.loser_guard and error is not None:
        scale = _loser_scale(objective, error, prediction, target, objectives.volume_share(shape, error))
    table = objectives.evaluate(
        objective, log_ratio, error if supervised or log_ratio is None else None, scale, patch_rewards, video_rewards,
        kappa, shape,
    )  # fmt: skip
    return table, log_ratio, error


def _checked(
    prediction: Tensor,
    target: Tensor,
    reference_prediction: Tensor | None,
    patch_rewards: Tensor | None,
    video_rewards: Tensor | None,
    objective: str | GranDPO,
    reference_error: Tensor | None,
    layout: str,
    kappa: Tensor | None,
) -> dict[str, Any]:
    """The arguments of ``_evaluate``, after every check of ``gran_dpo``'s."""
    objective = objectives.resolve(objective)
    prediction = _latent("prediction", prediction, layout)
    target = _latent("target", target, layout, prediction)
    _constant("target", target)
    samples = prediction.shape[0]
    if objective.paired and samples % 2:
        raise ValueError(
            f"prediction must hold an even number of samples, all a and then their partners b; got {samples} "
            f"(shape {tuple(prediction.shape)}): concatenate the two halves with torch.cat([a, b])"
        )
    given = (reference_prediction is not None) + (reference_error is not None)
    if objective.needs_reference and given != 1:
        raise ValueError(
            f"exactly one of reference and reference_error must be given; got {'both' if given else 'neither'}: pass "
            "the reference's prediction, or its cached patch_error with reference=None"
        )
    if not objective.needs_reference and given:
        raise ValueError(
            f"objective of form {objective.form!r} uses no reference; leave out reference and reference_error"
        )
    if objective.anchor_weight and reference_prediction is None:
        raise ValueError("anchor_weight needs the reference's prediction; cached errors do not give it: pass reference")
    if reference_prediction is not None:
        reference_prediction = _reference(reference_prediction, prediction, layout)
    policy = _view(prediction, layout)
    if reference_prediction is not None:
        reference_prediction = _view(reference_prediction, layout)
    dtype = reference.accumulate_dtype(prediction.dtype, target.dtype)
    grid: tuple[int, ...] = (1, 1, 1)
    if reference_error is not None:
        reference_error = _table("reference_error", reference_error, policy, dtype)
        grid = tuple(reference_error.shape[1:])
    if patch_rewards is not None:
        patch_rewards = _tensor("patch_rewards", patch_rewards, policy)
        if patch_rewards.ndim != 4:
            raise ValueError(f"patch_rewards must have shape [{samples}, f, h, w]; got {tuple(patch_rewards.shape)}")
        shape = _grid(patch_rewards.shape[1:], policy, "patch_rewards")
        if reference_error is not None and shape != grid:
            raise ValueError(f"reference_error must have the patch grid {shape} of patch_rewards; got {grid}")
        grid = shape
        patch_rewards = _numbers("patch_rewards", patch_rewards, (samples, *grid), policy, dtype)
    if video_rewards is not None:
        video_rewards = _numbers("video_rewards", video_rewards, (samples,), policy, dtype)
    _check_labels(objective, patch_rewards, video_rewards)
    if kappa is not None:
        pairs = samples // 2 if objective.paired else samples
        kappa = _numbers("kappa", kappa, (pairs,), policy, dtype, missing="")
    return {
        "prediction": policy,
        "target": _view(target, layout),
        "reference_prediction": reference_prediction,
        "reference_error": reference_error,
        "patch_rewards": patch_rewards,
        "video_rewards": video_rewards,
        "kappa": kappa,
        "objective": objective,
        "grid": grid,
    }


def _check_labels(objective: GranDPO, patch_rewards: Tensor | None, video_rewards: Tensor | None) -> None:
    if patch_rewards is None and video_rewards is None:
        raise ValueError("patch_rewards and video_rewards are both None: give at least one of them")
    if video_rewards is None and objective.form in ("H3", "mapo"):
        raise ValueError(f"video_rewards must be given: form {objective.form!r} takes the video's winner")
    if patch_rewards is None and objective.form in ("H3", "H4"):
        raise ValueError(f"patch_rewards must be given: form {objective.form!r} weighs patches by them")
    if objective.form == "H2":
        return
    # An objective of one kind of label only, given the other kind, would be 0 for ever.
    video = bool(objective.video_weight or objective.sft_weight)
    patch = bool(objective.patch_weight or objective.patch_sft_weight)
    if video_rewards is None and video and not patch:
        raise ValueError(
            "video_rewards must be given: the objective's patch_weight is 0, got patch_rewards only; pass "
            "video_rewards or choose an objective with a patch term"
        )
    if patch_rewards is None and patch and not video:
        raise ValueError(
            "patch_rewards must be given: the objective's video_weight is 0, got video_rewards only; pass "
            "patch_rewards or choose an objective with a video term"
        )


def gran_dpo(
    prediction: Tensor,
    target: Tensor,
    reference: Tensor | None = None,
    patch_rewards: Tensor | None = None,
    video_rewards: Tensor | None = None,
    *,
    objective: str | GranDPO = "halo",
    reference_error: Tensor | None = None,
    layout: str = "BCFHW",
    kappa: Tensor | None = None,
) -> GranDPOOutput:
    """Granular DPO loss: the video and every spatio-temporal patch have their own preference.

    With E_p = mean over patch p of (o - tau)^2, d_p = E_p(o) - E_p(o_ref), D_p = d_p(a) - d_p(b), D their mean over the
    video, s = sign(r_a - r_b) and z = -(beta kappa / 2) s D for the video and for each patch, one pair's loss is
        video_weight w_v phi(z_v) + patch_weight sum_p w_p phi(z_p) / sum_p w_p     (form H1; see ``GranDPO``)
    and the result its mean over the pairs that have at least one group that is not a tie (0 if there is none).

    prediction, target, reference: [2B, C, F, H, W], samples a first and then their partners b, which share prompt,
        timestep and noise; what the model regresses to (eps, v, x0 or the flow velocity), in the model's own head.
        Layout "BFCHW" for CogVideoX, "BCHW" for images; strided inputs are read in place. float64 is computed in
        float64, all else is accumulated in float32. reference comes from the frozen model in eval mode, in prediction's
        dtype.
    patch_rewards: [2B, f, h, w], any real scale; its shape is the patch grid, as fine as the latent for masks. NaN is
        "not labelled" and a tie. None: no patch term.
    video_rewards: [2B], likewise. At least one of the two is given.
    objective: a preset's name (``objectives.PRESETS``) or a ``GranDPO``. Unpaired ones (diffusion_kto, rwr, patch_dpo)
        take N samples, each with its own label; mapo, rwr and patch_dpo no reference.
    reference_error: [2B, f, h, w] float32, cached ``patch_error`` of the reference for the same timestep and noise;
        then reference is None.
    kappa: [B] timestep weight of each pair ([N] unpaired), default 1; see ``objectives.timestep_weight``.

    Returns ``GranDPOOutput``; its loss is differentiable in prediction only, once, and the gradient has prediction's
    dtype: dL/do = 2 (o - tau) c_p / Z_p with the coefficients c of ``gran_dpo_coefficients``.
    Raises ValueError or TypeError naming the argument, what was expected, what came and what to do. Infinite rewards
    are refused on the CPU. On an accelerator and inside torch.compile nobody looks, because it would stall or break the
    graph: there an infinite gap of weight |gap|^0 is a preference like any other (the video's default), and with any
    other gamma the loss is not finite.
    Source: own formulation after HALO, arXiv 2502.06812, and Diffusion-DPO, arXiv 2311.12908.
    """
    arguments = _checked(
        prediction, target, reference, patch_rewards, video_rewards, objective, reference_error, layout, kappa
    )
    _, out = _evaluate(**arguments)
    chosen = arguments["objective"]
    if not chosen.anchor_weight:
        return out
    # Twice the mean squared distance of a sample is its share, so that a pair counts both of its samples.
    distance = ops.patch_error(arguments["prediction"], arguments["reference_prediction"], (1, 1, 1)).flatten()
    share = out.active / out.active.sum().clamp(min=1)
    anchor = (distance * (share.repeat(2) if chosen.paired else share)).sum()
    return replace(out, loss=out.loss + chosen.anchor_weight * anchor)


def gran_dpo_coefficients(
    prediction: Tensor,
    target: Tensor,
    reference: Tensor | None = None,
    patch_rewards: Tensor | None = None,
    video_rewards: Tensor | None = None,
    *,
    objective: str | GranDPO = "halo",
    reference_error: Tensor | None = None,
    layout: str = "BCFHW",
    kappa: Tensor | None = None,
) -> tuple[Tensor, GranDPOOutput]:
    """The first half of ``gran_dpo``, without a graph: c_p = dL/dE_p [2B, f, h, w] and the output (its loss detached).

    Samples couple only through these coefficients: forward all of them without a graph, form c, then forward and
    backward one sample at a time through ``patch_weighted_mse``. The gradients add up to ``gran_dpo``'s exactly; a
    sample whose coefficients are all 0 needs no backward. Arguments and errors as in ``gran_dpo``; anchor_weight must
    be 0, because its gradient is no function of E_p.
    """
    arguments = _checked(
        prediction, target, reference, patch_rewards, video_rewards, objective, reference_error, layout, kappa
    )
    if arguments["objective"].anchor_weight:
        raise ValueError("anchor_weight must be 0 for gran_dpo_coefficients: use gran_dpo, or sft_weight in its place")
    with torch.no_grad():
        return _evaluate(**arguments)


def unpack_tokens(tokens: Tensor, latent_shape: Sequence[int], patch_size: Sequence[int] = (1, 1, 1)) -> Tensor:
    """Packed transformer tokens [N, S, D] as a latent view [N, D, F/pt, H/ph, W/pw], without a copy.

    latent_shape: (F, H, W) of the latent; patch_size: (pt, ph, pw) of the transformer, (1, 1, 1) for LTX, (1, 2, 2) for
    Wan. A token's D features become channels, so patches of the grid are boxes of whole tokens, in whatever order the
    model packs inside a token. Differentiable. Raises ValueError if S is not the number of tokens.
    """
    tokens = _tensor("tokens", tokens)
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
