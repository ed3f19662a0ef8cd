"""Checked arguments: one record of [N, C, F, H, W] views, and every check of the public calls.

A message names the argument, what was expected, what came and what to do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from halo_fast.loss import ops
from halo_fast.loss.given import GIVEN_FIRST, empty_rows, given_frames, made_frames, patch_means, without_preference
from halo_fast.loss.reference import accumulate_dtype, patch_mean, patch_sizes

__all__ = [
    "Inputs",
    "Requirements",
    "check_choice",
    "check_constant",
    "check_grid",
    "check_inputs",
    "check_latents",
    "check_number",
    "check_table",
    "check_tensor",
    "describe",
]

_DIMENSIONS = {"BCFHW": 5, "BFCHW": 5, "BCHW": 4, GIVEN_FIRST: 5}


class Requirements(Protocol):
    """What an objective needs of its inputs."""

    @property
    def paired(self) -> bool:
        """Whether the batch is samples a and then their partners b; else every sample stands alone."""
        ...

    @property
    def needs_reference(self) -> bool:
        """Whether the loss compares the policy with a reference."""
        ...

    @property
    def labels(self) -> frozenset[str]:
        """Kinds of labels that the loss uses, of "video" and "patch"; at least one of them must be given."""
        ...

    @property
    def anchor_weight(self) -> float:
        """Weight of the squared distance to the reference's prediction."""
        ...


@dataclass(frozen=True)
class Inputs:
    """What an objective computes from, after all checks. Nothing here carries a graph.

    N samples are B pairs, all a and then their partners b, or stand alone where the objective is unpaired. Views have
    any strides and their own dtypes, and are read in place. All else has ``dtype``. Views have the F frames that are
    made; ``given`` more before them are given, and patches are those of all.

    Args:
        prediction: [N, C, F, H, W] view of the policy's prediction.
        target: [N, C, F, H, W] view of what the model regresses to.
        reference: [N, C, F, H, W] view of the reference's prediction; None if its errors are given or none is needed.
        reference_error: [N, f, h, w], cached errors of the reference; None if ``reference`` is given.
        patch_rewards: [N, f, h, w], NaN where not labelled; None without patch labels.
        video_rewards: [N], likewise.
        kappa: [B] timestep weights ([N] unpaired); None for 1.
        grid: (f, h, w) patches.
        pair_weight: [B], what multiplies the preference terms of each pair's loss; None for 1.
        given: latent frames at the beginning that are given and count nowhere.
    """

    prediction: Tensor
    target: Tensor
    reference: Tensor | None
    reference_error: Tensor | None
    patch_rewards: Tensor | None
    video_rewards: Tensor | None
    kappa: Tensor | None
    grid: tuple[int, ...]
    pair_weight: Tensor | None = None
    given: int = 0

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """(C, F, H, W) of one sample, given frames included."""
        channels, made, height, width = self.prediction.shape[1:]
        return channels, self.given + made, height, width

    @property
    def empty_rows(self) -> int:
        """Patch rows, from the first on, that lie wholly inside the given frames."""
        return empty_rows(self.prediction.shape[2], self.grid[0], self.given)

    @property
    def patches(self) -> int:
        """Patches that have elements."""
        frames, rows, columns = self.grid
        return (frames - self.empty_rows) * rows * columns

    @property
    def dtype(self) -> torch.dtype:
        """In which sums are taken: float64 if a view is float64, else float32."""
        return accumulate_dtype(self.prediction.dtype, self.target.dtype)

    def error(self) -> Tensor:
        """E_p [N, f, h, w], mean squared errors of the policy; costs one pass over the latents."""
        return self._means(lambda grid: ops.patch_error(self.prediction, self.target, grid))

    def mean(self, values: Tensor) -> Tensor:
        """Mean over each patch, [..., f, h, w], of values that are shaped like the views."""
        return self._means(lambda grid: patch_mean(values, grid))

    def _means(self, measure: Callable[[tuple[int, ...]], Tensor]) -> Tensor:
        return patch_means(measure, self.grid, self.prediction.shape[2], self.given)

    def log_ratio(self, error: Tensor | None = None) -> Tensor:
        """E_p(reference) - E_p(policy) [N, f, h, w]; costs one pass over the latents.

        Args:
            error: what ``error()`` gave, if it is there; used where the reference's errors are cached.

        Raises:
            ValueError: there is no reference.
        """
        reference = self.reference
        if reference is not None:
            return self._means(lambda grid: ops.patch_log_ratio(self.prediction, reference, self.target, grid))
        if self.reference_error is None:
            raise ValueError("inputs have no reference: the objective must say needs_reference")
        return self.reference_error - (self.error() if error is None else error)

    def volume(self, like: Tensor) -> Tensor:
        """Each patch's share of the latent [f, h, w], Z_p / sum Z, in the dtype of ``like``."""
        sizes = patch_sizes(self.latent_shape, self.grid, like, self.given)
        return sizes / sizes.sum()


def check_inputs(
    objective: Requirements,
    name: object,
    prediction: Tensor,
    target: Tensor,
    reference: Tensor | None,
    patch_rewards: Tensor | None,
    video_rewards: Tensor | None,
    reference_error: Tensor | None,
    layout: str,
    kappa: Tensor | None,
    pair_weight: Tensor | None = None,
) -> tuple[Tensor, Inputs]:
    """The prediction as a view that carries its graph, and the record of all inputs; arguments as in ``gran_dpo``.

    Args:
        objective: says what it needs.
        name: the objective as it was given, for messages.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    if not isinstance(name, str):
        name = type(objective).__name__
    policy, target = check_latents(prediction, target, layout)
    samples = policy.shape[0]
    if objective.paired and samples % 2:
        raise ValueError(
            f"prediction must have an even number of samples, all a and then their partners b; got {samples} "
            f"(shape {tuple(prediction.shape)}): concatenate the two halves with torch.cat([a, b])"
        )
    _check_reference_given(objective, name, reference, reference_error)
    if reference is not None:
        reference = check_reference(reference, prediction, layout)
    dtype = accumulate_dtype(policy.dtype, target.dtype)
    if reference_error is not None:
        reference_error = check_table("reference_error", reference_error, policy, dtype)
    grid: tuple[int, ...] = (1, 1, 1) if reference_error is None else tuple(reference_error.shape[1:])
    if patch_rewards is not None:
        patch_rewards, grid = _check_patch_rewards(patch_rewards, reference_error, policy, dtype)
    if video_rewards is not None:
        video_rewards = _check_numbers("video_rewards", video_rewards, (samples,), policy, dtype)
    _check_labels(objective, name, patch_rewards, video_rewards)
    if kappa is not None:
        shape = (samples // 2 if objective.paired else samples,)
        kappa = _check_weights("kappa", kappa, shape, policy, dtype)
    if pair_weight is not None:
        if not getattr(objective, "weighs_pairs", False):
            raise ValueError(
                f"pair_weight must be left out: objective {name} has no preference term of pairs that it could weight"
            )
        pair_weight = _check_weights("pair_weight", pair_weight, (samples // 2,), policy, dtype)
    given = given_frames(layout)
    made = policy.shape[2] - given
    policy, target = made_frames(policy, given), made_frames(target, given)
    if reference is not None:
        reference = made_frames(reference, given)
    if patch_rewards is not None:
        patch_rewards = without_preference(patch_rewards, made, given)
    record = Inputs(
        policy.detach(), target, reference, reference_error, patch_rewards, video_rewards, kappa, grid, pair_weight,
        given,
    )  # fmt: skip
    return policy, record


def check_tensor(name: str, value: object, like: Tensor | None = None) -> Tensor:
    """``value`` if it is a dense local tensor, on the device of ``like``."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor; got {type(value).__name__}")
    if type(value) is not Tensor and hasattr(value, "to_local"):
        raise TypeError(f"{name} must be a local tensor; got a DTensor: pass {name}.to_local()")
    if value.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor; got layout {value.layout}: pass {name}.to_dense()")
    if like is not None and value.device != like.device:
        raise ValueError(f"{name} must be on prediction's device {like.device}; got {value.device}: move it there")
    return value


def check_constant(name: str, value: Tensor) -> None:
    """Raise ValueError if ``value`` requires a gradient."""
    if value.requires_grad:
        raise ValueError(f"{name} must not require grad, only prediction is differentiated; pass {name}.detach()")


def check_latents(prediction: object, target: object, layout: str) -> tuple[Tensor, Tensor]:
    """Prediction and target as [N, C, F, H, W] views, each in its own dtype.

    A float32 target beside a bf16 prediction is the normal case under autocast; nothing is rounded or copied.
    """
    policy = _check_latent("prediction", prediction, layout)
    goal = _check_latent("target", target, layout, policy)
    check_constant("target", goal)
    return _view(policy, layout), _view(goal, layout)


def check_reference(value: object, prediction: Tensor, layout: str) -> Tensor:
    """The reference's prediction as a [N, C, F, H, W] view; it must have prediction's dtype."""
    latent = _check_latent("reference", value, layout, prediction)
    check_constant("reference", latent)
    if latent.dtype != prediction.dtype:
        raise TypeError(
            f"reference must have prediction's dtype {prediction.dtype}; got {latent.dtype}: a difference in precision "
            "between the two shifts every margin, run both forwards alike (or cast on purpose)"
        )
    return _view(latent, layout)


def check_grid(grid: Sequence[int], latent: Tensor, name: str) -> tuple[int, ...]:
    """``grid`` as a tuple, if it is three patch counts that the [N, C, F, H, W] ``latent`` can have."""
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


def check_table(name: str, value: object, latent: Tensor, dtype: torch.dtype) -> Tensor:
    """A [N, f, h, w] argument that must not be rounded, float32 or float64, converted to ``dtype``."""
    value = check_tensor(name, value, latent)
    check_constant(name, value)
    if value.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name} must be float32 or float64, rounding it shifts every margin; got {value.dtype}")
    if value.ndim != 4 or value.shape[0] != latent.shape[0]:
        raise ValueError(f"{name} must have shape [{latent.shape[0]}, f, h, w]; got {tuple(value.shape)}")
    check_grid(value.shape[1:], latent, name)
    return value.to(dtype).contiguous()


def check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    """Raise ValueError unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}; got {value!r}")


def check_number(name: str, value: Any, above: float = -math.inf, least: float = -math.inf) -> None:
    """Raise TypeError or ValueError unless ``value`` is a finite number above one bound and at least the other.

    Where ``name`` ends in "_beta" a 0-d tensor passes as well; its value is not read.
    """
    if isinstance(value, Tensor):
        beta = name.endswith("_beta")
        if not beta or value.ndim:
            raise TypeError(f"{name} must be a number{' or a 0-d tensor' * beta}; got a tensor")
        return
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number; got {type(value).__name__} {value!r}")
    if not (value > above and value >= least and math.isfinite(value)):
        bound = (
            f" and above {above:g}" if above > -math.inf else f" and at least {least:g}" if least > -math.inf else ""
        )
        raise ValueError(f"{name} must be finite{bound}; got {value}")


def describe(value: object) -> str:
    """Dtype and shape of a tensor, class and value of anything else; for messages."""
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else f"{type(value).__name__} {value!r}"


def _view(latent: Tensor, layout: str) -> Tensor:
    """The strided view [N, C, F, H, W]; no layout is copied."""
    if layout == "BFCHW":
        return latent.transpose(1, 2)
    return latent.unsqueeze(2) if layout == "BCHW" else latent


def _check_latent(name: str, value: object, layout: str, like: Tensor | None = None) -> Tensor:
    """``value`` in its own layout, after every check of a latent-shaped argument."""
    if layout not in _DIMENSIONS:
        raise ValueError(f"layout must be one of {', '.join(_DIMENSIONS)}; got {layout!r}")
    value = check_tensor(name, value, like)
    if not value.dtype.is_floating_point or value.dtype.itemsize == 1:
        raise TypeError(f"{name} must be float64, float32, bfloat16 or float16; got {value.dtype}: convert it")
    if value.ndim != _DIMENSIONS[layout]:
        raise ValueError(
            f"{name} must have the {_DIMENSIONS[layout]} dimensions of layout {layout}; got shape {tuple(value.shape)}"
        )
    if like is not None and value.shape != like.shape:
        raise ValueError(f"{name} must have prediction's shape {tuple(like.shape)}; got {tuple(value.shape)}")
    if 0 in value.shape[1:]:
        raise ValueError(f"{name} must not have an empty side; got shape {tuple(value.shape)}")
    if layout == GIVEN_FIRST and value.shape[2] == 1:
        raise ValueError(
            f"{name} must have frames beside the first, which layout {layout} says is given; got shape "
            f"{tuple(value.shape)}: give longer clips"
        )
    return value


def _check_reference_given(
    objective: Requirements, name: object, reference: Tensor | None, reference_error: Tensor | None
) -> None:
    """Raise ValueError unless the reference, or its errors, are given exactly where the objective needs them."""
    given = (reference is not None) + (reference_error is not None)
    if objective.needs_reference and given != 1:
        raise ValueError(
            f"exactly one of reference and reference_error must be given; got {'both' if given else 'neither'}: pass "
            "the reference's prediction, or its cached patch_error with reference=None"
        )
    if not objective.needs_reference and given:
        raise ValueError(f"objective {name} uses no reference; leave out reference and reference_error")
    if objective.anchor_weight and reference is None:
        raise ValueError("anchor_weight needs the reference's prediction; cached errors do not give it: pass reference")


def _check_patch_rewards(
    value: object, reference_error: Tensor | None, policy: Tensor, dtype: torch.dtype
) -> tuple[Tensor, tuple[int, ...]]:
    """The patch rewards in ``dtype`` and their grid, which must be that of the reference's errors if they are given."""
    rewards = check_tensor("patch_rewards", value, policy)
    samples = policy.shape[0]
    if rewards.ndim != 4:
        raise ValueError(f"patch_rewards must have shape [{samples}, f, h, w]; got {tuple(rewards.shape)}")
    grid = check_grid(rewards.shape[1:], policy, "patch_rewards")
    if reference_error is not None and reference_error.shape[1:] != grid:
        raise ValueError(
            f"reference_error must have the patch grid {grid} of patch_rewards; got {tuple(reference_error.shape[1:])}"
        )
    return _check_numbers("patch_rewards", rewards, (samples, *grid), policy, dtype), grid


def _check_weights(name: str, value: object, shape: tuple[int, ...], policy: Tensor, dtype: torch.dtype) -> Tensor:
    """Kappa or pair weights in ``dtype``: finite numbers from 0 on, for one below 0 would turn its preference round."""
    weights = _check_numbers(name, value, shape, policy, dtype, missing="")
    if weights.device.type == "cpu" and not torch.compiler.is_compiling() and bool((weights < 0).any()):
        raise ValueError(f"{name} must be at least 0; got {float(weights.min()):g}: it would turn a preference round")
    return weights


def _check_numbers(
    name: str,
    value: object,
    shape: tuple[int, ...],
    policy: Tensor,
    dtype: torch.dtype,
    missing: str = ", or NaN for 'not labelled'",
) -> Tensor:
    """Rewards, kappa or pair weights in ``dtype``; ``missing`` says what a NaN means, "" if there must be none."""
    value = check_tensor(name, value, policy)
    check_constant(name, value)
    if value.dtype == torch.bool or value.is_complex():
        raise TypeError(f"{name} must be real numbers; got {value.dtype}: use 1.0 and 0.0")
    if tuple(value.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}; got {tuple(value.shape)}")
    # Reading values would make an accelerator wait, and break a graph.
    if value.device.type == "cpu" and not torch.compiler.is_compiling():
        # The sum is finite if all numbers are, and costs a third of a test of each.
        if not math.isfinite(value.sum()) and bool(value.isinf().any()):
            raise ValueError(f"{name} must be finite{missing}; got an infinite value: drop or clip it")
        if not missing and bool(value.isnan().any()):
            raise ValueError(f"{name} must be finite; got NaN: clip it where it diverges, as timestep_weight does")
    return value.to(dtype)


def _check_labels(
    objective: Requirements, name: object, patch_rewards: Tensor | None, video_rewards: Tensor | None
) -> None:
    """Raise ValueError unless a label that the objective uses is given; without one the loss would be 0 for ever."""
    if patch_rewards is not None and video_rewards is not None:
        return
    if patch_rewards is None and video_rewards is None:
        raise ValueError("patch_rewards and video_rewards are both None: give at least one of them")
    missing, given = ("video", "patch") if video_rewards is None else ("patch", "video")
    if given in objective.labels:
        return
    reason = f" (its {given}_weight is 0)" if getattr(objective, f"{given}_weight", None) == 0 else ""
    raise ValueError(
        f"{missing}_rewards must be given: objective {name} uses no {given}_rewards{reason}, got {given}_rewards only; "
        f"pass {missing}_rewards or choose an objective with a {given} term"
    )
