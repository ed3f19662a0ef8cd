"""The terms of a reward model's loss on one batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from halo_fast.rewards.base import RewardConfig
from halo_fast.rewards.clips import PROMPT_DIMENSION, LabelledClips, names_direction, turned_prompt
from halo_fast.rewards.losses import preference_loss, score_loss
from halo_fast.rewards.model import RewardModel
from halo_fast.rewards.shares import Share

__all__ = ["Batch", "frozen_copy_loss", "loss_scales", "loss_terms", "swap_loss", "turn_loss"]

_LEAST_SCALE = 1e-3  # labels that hardly differ are not blown up
_MOTION_DIMENSION = "dynamic_degree"
_COPY_SHARE = 0.25  # of a batch that is compared with frozen copies


@dataclass(frozen=True)
class Batch:
    """The clips of a step that this process computes, and the labels of all.

    Args:
        clips: n labelled clips.
        labels: all N clips of the step, with or without frames.
        share: which of them `clips` are.
        frozen: frozen features of `clips`, float32 [n, c, f', y, x], or None.
        word_evidence: [n, k], or None.
    """

    clips: LabelledClips
    labels: LabelledClips
    share: Share
    frozen: Tensor | None = None
    word_evidence: Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device; `share` stays on the CPU."""
        frozen, evidence = (None if x is None else x.to(device) for x in (self.frozen, self.word_evidence))
        return Batch(self.clips.to(device), self.labels.to(device), self.share, frozen, evidence)


def loss_scales(scores: Tensor) -> list[float]:
    """The loss of the best constant for each dimension of scores [N, D, ...]; 1 of it is "nothing learned"."""
    scales = []
    for values in scores.unbind(1):
        constant = ((values.nanmean() - 1) / 4).nan_to_num(0.5).clamp(1e-3, 1 - 1e-3).logit()
        scales.append(max(score_loss(constant.expand_as(values), values).item(), _LEAST_SCALE))
    return scales


def loss_terms(
    model: RewardModel,
    batch: Batch,
    scales: tuple[list[float], list[float]],
    patch_phase: bool,
    config: RewardConfig,
) -> dict[str, Tensor]:
    """The loss terms of a whole batch, 0-d each: video, swap, motion, turn and, in the patch phase, patch.

    Args:
        model: in training mode.
        batch: this process's share of its clips; every process must call.
        scales: `loss_scales` of all training clips, of the video and of the patch dimensions.
        patch_phase: whether patch scores count.
        config: the kind of loss and the tie margin.
    """
    clips, labels, share = batch.clips, batch.labels, batch.share
    dimensions, backbone = model.config.video_dimensions, model.backbone
    with share.dropout():
        features = backbone.encode(clips.videos, batch.frozen, batch.word_evidence)
        video, patches = map(share.join, backbone.logits(features, clips.prompts, clips.patch_scores.shape[2:]))
    losses = {"video": _label_loss(video, labels.video_scores, scales[0], config)}
    if PROMPT_DIMENSION in dimensions and len(labels) > 1:
        column = dimensions.index(PROMPT_DIMENSION)
        count = min(len(labels) - 1, backbone.negatives)
        others = torch.stack([torch.arange(len(labels)).roll(shift) for shift in range(count + 1)], dim=1)
        with share.dropout():
            chosen = others[share.rows].to(video.device)
            logits = backbone.video_logits_for(features, labels.prompts, chosen)[..., column]
        losses["swap"] = swap_loss(share.join(logits[:, :1] - logits[:, 1:]), labels, others[:, 1:], column)
    if _MOTION_DIMENSION in dimensions and config.motion_weight:
        column = dimensions.index(_MOTION_DIMENSION)
        losses["motion"] = frozen_copy_loss(model, batch, video[: math.ceil(_COPY_SHARE * len(labels)), column], column)
        named = [names_direction(prompt) for prompt in labels.prompts]
        # without evidence of words this was not learned, and cost dynamic_degree its ranks
        if any(named) and batch.word_evidence is not None:
            prompts = [*labels.prompts, *map(turned_prompt, labels.prompts)]
            both = torch.arange(len(prompts)).view(2, -1).T
            with share.dropout():
                logits = backbone.video_logits_for(features, prompts, both[share.rows].to(video.device))[..., column]
            losses["turn"] = turn_loss(share.join(logits[:, 0] - logits[:, 1]), labels, named, column)
    if patch_phase:
        losses["patch"] = _label_loss(patches, labels.patch_scores, scales[1], config)
    return losses


def _label_loss(logits: Tensor, scores: Tensor, scales: list[float], config: RewardConfig) -> Tensor:
    """Mean over the dimensions of [N, D, ...]; regression is relative to the loss of a constant."""
    terms = []
    for values, grades, unit in zip(logits.unbind(1), scores.unbind(1), scales, strict=True):
        if config.loss in ("regression", "combined"):
            terms.append(score_loss(values, grades) / unit)
        if config.loss != "regression":
            terms.append(preference_loss(values, grades, config.tie_margin, config.loss == "bradley_terry_ties"))
    return torch.stack(terms).sum() / len(scales) if terms else logits.sum()


def swap_loss(margin: Tensor, clips: LabelledClips, others: Tensor, column: int) -> Tensor:
    """Bradley-Terry: a clip fits its own prompt better than another's, weighted by how well it was judged to fit.

    Args:
        margin: [N, M], logit of the own prompt less that of each other one.
        clips: N clips.
        others: [N, M], whose prompt that was; equal prompts do not count.
        column: of text_alignment among the video scores.
    """
    weight = ((clips.video_scores[:, column] - 1) / 4).nan_to_num(0)[:, None].expand_as(margin)
    same = [
        [clips.prompts[other] == own for other in row] for own, row in zip(clips.prompts, others.tolist(), strict=True)
    ]
    weight = weight.masked_fill(torch.tensor(same, device=weight.device), 0)
    return (F.softplus(-margin) * weight).sum() / weight.sum().clamp(min=1)


def turn_loss(margin: Tensor, clips: LabelledClips, named: Sequence[bool], column: int) -> Tensor:
    """Bradley-Terry: a clip shows its prompt's motion rather than the opposite one, weighted by how well it does.

    Args:
        margin: [N], logit of the own prompt less that of the prompt with the opposite directions.
        clips: N clips.
        named: of each, whether its prompt names a direction; others do not count.
        column: of dynamic_degree among the video scores.
    """
    weight = ((clips.video_scores[:, column] - 1) / 4).nan_to_num(0) * torch.tensor(named, device=margin.device)
    return (F.softplus(-margin) * weight).sum() / weight.sum().clamp(min=1)


def frozen_copy_loss(model: RewardModel, batch: Batch, own: Tensor, column: int) -> Tensor:
    """Bradley-Terry: a clip beats a copy frozen at one of its moments, weighted by how dynamic it was judged.

    Args:
        model: in training mode.
        batch: this process's share; the first len(own) clips of the whole batch are compared.
        own: [M], their logits.
        column: of dynamic_degree among the video scores.
    """
    share, moment = batch.share.of_first(len(own)), torch.rand(()).item()
    count = len(share.rows)
    clips = batch.clips.select(torch.arange(count))

    def freeze(frames: Tensor, axis: int) -> Tensor:
        chosen = frames.select(axis, round(moment * (frames.shape[axis] - 1)))
        return chosen.unsqueeze(axis).expand_as(frames).contiguous()

    stills, frozen = freeze(clips.videos, 1), None
    if batch.frozen is not None:
        by_frame = getattr(model.backbone, "features_by_frame", False)
        frozen = freeze(batch.frozen[:count], 2) if by_frame else model.backbone.frozen_features(stills)
    # the clip's own: a fit read anew would know this clip, and tell copies by that
    evidence = None if batch.word_evidence is None else batch.word_evidence[:count]
    with share.dropout():
        features = model.backbone.encode(stills, frozen, evidence)
        logits = model.backbone.logits(features, clips.prompts, clips.patch_scores.shape[2:])[0][:, column]
    margin, moves = own - share.join(logits), share.join((stills != clips.videos).flatten(1).any(dim=1).float())
    weight = ((batch.labels.video_scores[: len(own), column] - 1) / 4).nan_to_num(0) * moves
    return (F.softplus(-margin) * weight).sum() / weight.sum().clamp(min=1)
