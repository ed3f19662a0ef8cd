"""What an objective is, and what those share that compare two samples of a pair with a reference."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from halo_fast.loss.inputs import Inputs, Requirements, check_choice, check_number, describe
from halo_fast.loss.reference import LINKS, halves, signed_weights

__all__ = [
    "LABELS",
    "Objective",
    "PairObjective",
    "Preferences",
    "Table",
    "check_fields",
    "half_scales",
    "logit_scale",
    "per_patch",
    "total",
    "used_labels",
]

LABELS = frozenset({"video", "patch"})


class Table(NamedTuple):
    """What an objective computes, as tensors without a graph.

    Args:
        loss: 0-d, the mean over the active pairs.
        coefficients: [N, f, h, w], dL/dE_p; the gradient of the loss is 2 (o - tau) coefficients_p / Z_p.
        video_logits: [B] ([N] unpaired), signed by the preference; zeros if there are none.
        patch_logits: [B, f, h, w] ([N, f, h, w] unpaired), likewise.
        active: [B] ([N] unpaired), 1 for each pair that counts in the mean, else 0.
        log_ratio: [N, f, h, w] of ``Inputs.log_ratio``; None without reference.
        error: [N, f, h, w] of ``Inputs.error`` if it was computed; ``metrics()`` then need not.
    """

    loss: Tensor
    coefficients: Tensor
    video_logits: Tensor
    patch_logits: Tensor
    active: Tensor
    log_ratio: Tensor | None = None
    error: Tensor | None = None


class Preferences(NamedTuple):
    """Signed weights of the labels whose logits ``metrics()`` reports: above 0 where sample a wins, 0 for a tie.

    Args:
        video: [B] ([N] unpaired); None if the video's logits are not reported.
        patch: [B, f, h, w] ([N, f, h, w] unpaired); None if the patches' are not.
    """

    video: Tensor | None
    patch: Tensor | None


class Objective(Requirements, Protocol):
    """A loss on the errors of N samples. Subclass it and write ``table``; everything else has a default.

    ``gran_dpo(objective=...)`` checks its arguments against paired, needs_reference and labels, runs ``table``, and
    attaches the gradient that the coefficients say.
    """

    @property
    def paired(self) -> bool:
        return True

    @property
    def needs_reference(self) -> bool:
        return True

    @property
    def labels(self) -> frozenset[str]:
        return LABELS

    @property
    def anchor_weight(self) -> float:
        return 0.0

    @property
    def video_beta(self) -> float | Tensor:
        """Multiplies half an error gap in rewards/chosen and rewards/rejected."""
        return 1.0

    @property
    def weighs_pairs(self) -> bool:
        """Whether ``table`` multiplies the preference terms of each pair by ``Inputs.pair_weight``."""
        return False

    @property
    def shared_logit(self) -> bool:
        """Whether all labels of a pair share one logit, which stands in video_logits."""
        return False

    def table(self, inputs: Inputs) -> Table:
        """Loss, coefficients and logits of a batch, without a graph."""
        ...

    def preferences(self, inputs: Inputs) -> Preferences:
        """The labels whose logits ``metrics()`` reports; by default the signs of all that are given."""
        rewards = inputs.video_rewards, inputs.patch_rewards
        if self.paired:
            return Preferences(*(None if value is None else signed_weights(value, 0.0, 0.0) for value in rewards))
        return Preferences(*(None if value is None else value.sign().nan_to_num(nan=0.0) for value in rewards))


@dataclass(frozen=True)
class PairObjective(Objective):
    """Fields and preferences of the losses on pairs with a reference. ``GranDPO`` says what each field means."""

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
    loser_guard_mu: float = field(default=0.9, kw_only=True)
    poly_alpha: float = field(default=0.0, kw_only=True)
    video_cap: float | None = field(default=None, kw_only=True)
    patch_cap: float | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        check_choice("link", self.link, LINKS)
        check_choice("loser_guard", self.loser_guard, (None, "video", "patch"))
        check_fields(self)
        if self.label_smoothing >= 0.5:
            raise ValueError(
                f"label_smoothing must be below 1/2, the share of wrong labels; got {self.label_smoothing}"
            )
        if self.label_smoothing and self.link not in ("conservative", "robust"):
            raise ValueError(
                f"label_smoothing must be 0 with link {self.link!r}, which has none; got {self.label_smoothing}: "
                'choose link="conservative" (TRL\'s "sigmoid" with label_smoothing) or "robust"'
            )
        if self.poly_alpha and self.link != "poly":
            raise ValueError(
                f"poly_alpha must be 0 with link {self.link!r}, which has none; got {self.poly_alpha}: "
                'choose link="poly"'
            )
        if self.loser_guard_mu > 1:
            raise ValueError(f"loser_guard_mu must be between 0 and 1; got {self.loser_guard_mu}")

    @property
    def weighs_pairs(self) -> bool:
        return True

    @property
    def labels(self) -> frozenset[str]:
        return used_labels(self.video_weight or self.sft_weight, self.patch_weight or self.patch_sft_weight)

    @property
    def link_parameter(self) -> float:
        """The number of the link: its label smoothing, or alpha of poly."""
        return self.poly_alpha if self.link == "poly" else self.label_smoothing

    @property
    def caps(self) -> tuple[float, float]:
        """The caps on the logits of videos and of patches; infinite without one."""
        video, patch = (math.inf if cap is None else cap for cap in (self.video_cap, self.patch_cap))
        return video, patch

    @property
    def supervised(self) -> bool:
        """Whether the loss has a supervised term, which needs the errors themselves."""
        return bool(self.sft_weight or self.patch_sft_weight)

    def preferences(self, inputs: Inputs) -> Preferences:
        """Signed weights s w of video and patches; 0 is a tie."""
        video = patch = None
        if inputs.video_rewards is not None:
            video = signed_weights(inputs.video_rewards, self.video_gamma, self.video_delta)
        if inputs.patch_rewards is not None:
            patch = signed_weights(inputs.patch_rewards, self.patch_gamma, self.patch_delta)
        return Preferences(video, patch)

    def errors(self, inputs: Inputs) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """What the tables of these losses are computed from.

        Returns:
            The log-ratios; the policy's errors where a cached reference, supervision or the loser guard needs them; the
            loser guard's factors, all [2B, f, h, w].
        """
        error = scale = None
        if inputs.reference is None or self.supervised or self.loser_guard:
            error = inputs.error()
        log_ratio = inputs.log_ratio(error)
        if self.loser_guard and error is not None:
            scale = self._loser_scale(inputs, error)
        return log_ratio, error, scale

    def _loser_scale(self, inputs: Inputs, error: Tensor) -> Tensor:
        """The guard's factor for each sample in the place of the loser: clip((1 - mu) |g_w|^2 / <g_w, g_l>, 0, 1)."""
        residual = (inputs.prediction - inputs.target).to(error.dtype)
        inner = inputs.mean(torch.mul(*halves(residual))).repeat(2, 1, 1, 1)
        winner = torch.cat(halves(error)[::-1])
        if self.loser_guard == "video":
            volume = inputs.volume(error)
            inner, winner = (per_patch(total(volume * table)).expand_as(error) for table in (inner, winner))
        opposed = inner > 0
        ratio = (1 - self.loser_guard_mu) * winner / torch.where(opposed, inner, 1.0)
        return torch.where(opposed, ratio.clamp(0, 1), 1.0)


def check_fields(objective: Any) -> None:
    """Raise TypeError or ValueError unless betas and caps are above 0, alphas at least -1, other numbers 0."""
    for one in fields(objective):
        value = getattr(objective, one.name)
        if one.name.endswith("_beta"):
            if value is not None or one.name == "video_beta":
                check_number(one.name, value, above=0.0)
        elif one.name.endswith("_cap"):
            if value is not None:
                check_number(one.name, value, above=0.0)
        elif one.name == "poly_alpha":
            check_number(one.name, value, least=-1.0)  # phi' < 0 at every z exactly if alpha >= -1
        elif isinstance(one.default, bool):
            if not isinstance(value, bool):
                raise TypeError(f"{one.name} must be True or False; got {describe(value)}")
        elif isinstance(one.default, float):
            check_number(one.name, value, least=0.0)


def used_labels(video: float, patch: float) -> frozenset[str]:
    """The kinds of labels with a weight other than 0; both if all weights are 0."""
    used = {label for label, weight in (("video", video), ("patch", patch)) if weight}
    return frozenset(used) or LABELS


def logit_scale(objective: Any, inputs: Inputs, groups: int) -> tuple[float, float, Tensor | None]:
    """The betas as numbers that are constants of a graph, and what else multiplies the logits.

    Args:
        objective: has video_beta and patch_beta; patch_beta None is video_beta / sqrt(patches).
        inputs: with kappa and grid.
        groups: B pairs, or N unpaired samples.

    Returns:
        Both betas and None; or 1, 1 and [2, groups], beta kappa of video and patches, where a beta is a tensor or kappa
        or a pair weight is given. The pair weight is a third row.
    """
    video_beta, patch_beta = objective.video_beta, objective.patch_beta
    if patch_beta is None:
        patch_beta = video_beta / math.sqrt(inputs.patches)
    kappa, omega = inputs.kappa, inputs.pair_weight
    constant = not isinstance(video_beta, Tensor) and not isinstance(patch_beta, Tensor)
    if kappa is None and omega is None and constant:
        return video_beta, patch_beta, None
    if kappa is None:
        kappa = inputs.prediction.new_ones(groups, dtype=inputs.dtype)
    rows = [kappa * video_beta, kappa * patch_beta]
    return 1.0, 1.0, torch.stack(rows if omega is None else [*rows, omega]).to(inputs.dtype)


def half_scales(objective: Any, inputs: Inputs, groups: int) -> tuple[Tensor, Tensor]:
    """beta kappa / 2 of the video and of the patches, each [groups]; arguments as in ``logit_scale``."""
    video_beta, patch_beta, scale = logit_scale(objective, inputs, groups)
    if scale is None:
        ones = inputs.prediction.new_ones(groups, dtype=inputs.dtype)
        scale = torch.stack([ones * video_beta, ones * patch_beta])
    return 0.5 * scale[0], 0.5 * scale[1]


def per_patch(values: Tensor) -> Tensor:
    """[N] as [N, 1, 1, 1]."""
    return values[:, None, None, None]


def total(values: Tensor) -> Tensor:
    """Sum over everything but the first dimension."""
    return values.flatten(1).sum(1)
