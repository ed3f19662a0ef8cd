"""Training of the reward model: whole videos first, then the same weights on patches, from a teacher's labels."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor

from halo_fast.files import progress, write_safetensors
from halo_fast.rewards.base import RewardConfig
from halo_fast.rewards.losses import calibrate, preference_loss, score_loss
from halo_fast.rewards.model import RewardModel, RewardModelConfig

__all__ = [
    "LabelledClips",
    "fit",
]

_WEIGHT_DECAY = 0.05
_EMA_DECAY = 0.98
_MAX_GRAD_NORM = 1.0
_LEAST_SCALE = 1e-3  # labels that hardly differ are not blown up
_PROMPT_DIMENSION = "text_alignment"
_MIRROR_SHARE = 0.45  # a mirrored clip teaches nothing of text_alignment
_LOOK_BATCH = 16
_MOTION_DIMENSION = "dynamic_degree"
_FROZEN_SHARE = 0.25  # of a batch
_PREFERENCES = ("bradley_terry", "bradley_terry_ties", "combined")
# axis of the patch grid, and the words of direction that its mirror exchanges
_MIRRORS: tuple[tuple[int, dict[str, str]], ...] = (
    (-1, {"left": "right", "right": "left", "leftwards": "rightwards", "rightwards": "leftwards"}),
    (-2, {"up": "down", "down": "up", "upwards": "downwards", "downwards": "upwards"}),
)


@dataclass(frozen=True)
class LabelledClips:
    """Clips with a teacher's scores from 1 to 5; NaN is "not scored".

    Args:
        videos: uint8 [N, F, H, W, 3].
        prompts: of each clip.
        video_scores: [N, D].
        patch_scores: [N, Q, f, h, w].
        video_dimensions: names of the D video scores.
        patch_dimensions: names of the Q patch scores.
    """

    videos: Tensor
    prompts: list[str]
    video_scores: Tensor
    patch_scores: Tensor
    video_dimensions: tuple[str, ...]
    patch_dimensions: tuple[str, ...] = ("quality",)

    def __len__(self) -> int:
        return len(self.prompts)


def fit(
    model_config: RewardModelConfig,
    data: LabelledClips,
    config: RewardConfig,
    seed: int,
    checkpoint: Path | None = None,
) -> tuple[RewardModel, list[dict[str, Any]]]:
    """Train a reward model: `video_steps` on video scores, then `patch_steps` on patch scores with the video loss kept.

    The clips of some prompts are held out; the scores' slopes and offsets are fitted to them. Every step draws from a
    seed of its own, so training that was killed goes on from its checkpoint bit for bit.

    Args:
        model_config: of the model that is made; without video dimensions patch scores alone are learned.
        data: the labels. A clip may be a still of one frame.
        config: steps, weights, learning rate, losses.
        seed: of weights, held-out prompts and batches.
        checkpoint: safetensors file that is written every `checkpointing_steps` and read if it is there.

    Returns:
        the model with exponentially averaged weights, in eval mode, and one row for each step.

    Raises:
        ValueError: an unknown loss, no clips, a held-out share that leaves none to train on.
    """
    if config.loss not in ("regression", *_PREFERENCES):
        raise ValueError(f"reward.loss: expected regression, {', '.join(_PREFERENCES)}, got {config.loss!r}")
    if not len(data):
        raise ValueError("data: expected labelled clips, got none")
    share, prompts = config.held_out_share, len(set(data.prompts))
    if not 0 <= share < 1:
        raise ValueError(f"reward.held_out_share: expected at least 0 and below 1, got {share:g}")
    data, held_out = _split(data, share, seed)
    if not len(data):
        raise ValueError(f"reward.held_out_share: {share:g} of {prompts} prompts leaves no clip to train on")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = RewardModel(model_config)
    looks = _look(model, data.videos)
    shown = model.backbone.prepare(looks, data.prompts, _belief(data))
    parameters: list[Tensor] = [parameter for parameter in model.parameters() if parameter.requires_grad]
    average = [parameter.detach().clone() for parameter in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=_WEIGHT_DECAY, eps=1e-6)
    sides = {axis: data.videos.shape[axis - 1] // model_config.spatial_factor for axis, _ in _MIRRORS}
    allowed = {"none": (), "horizontal": _MIRRORS[:1], "both": _MIRRORS}[config.mirror or "horizontal"]
    # patches of unequal size do not map onto each other in a mirror
    mirrors = [mirror for mirror in allowed if sides[mirror[0]] % data.patch_scores.shape[mirror[0]] == 0]
    scales = _scales(data.video_scores), _scales(data.patch_scores)
    history = _resume(checkpoint, parameters, average, optimizer) if checkpoint and checkpoint.exists() else []
    total = config.video_steps + config.patch_steps
    model.train()
    for step in progress(range(len(history), total), total - len(history), "reward"):
        patch_phase = step >= config.video_steps
        phase_step, phase_steps = (
            (step - config.video_steps, config.patch_steps) if patch_phase else (step, config.video_steps)
        )
        learning_rate = config.learning_rate * _one_cycle(phase_step, phase_steps)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        batch = _batch(data, looks, shown, config.batch_size, seed, step, mirrors)
        with torch.random.fork_rng():
            torch.manual_seed(seed * 1_000_003 + step)  # of dropout
            losses = _losses(model, batch, scales, patch_phase, config)
        video_weight = config.video_weight if patch_phase else 1.0
        weights = {
            "video": video_weight,
            "swap": config.swap_weight * video_weight,
            "motion": config.motion_weight * video_weight,
            "patch": config.patch_weight,
        }
        loss = torch.stack([weights[name] * value for name, value in losses.items()]).sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, _MAX_GRAD_NORM, error_if_nonfinite=True)
        optimizer.step()
        with torch.no_grad():
            decay = min(_EMA_DECAY, (step + 1) / (step + 10))
            torch._foreach_lerp_(average, [*parameters], 1 - decay)
        history.append(
            {"phase": "patch" if patch_phase else "video", "step": step + 1, "learning_rate": learning_rate}
            | {"loss": loss.item()}
            | {f"{name}_loss": value.item() for name, value in losses.items()}
        )
        if checkpoint and (step + 1) % config.checkpointing_steps == 0:
            _save(checkpoint, parameters, average, optimizer, history)
    with torch.no_grad():
        for parameter, mean in zip(parameters, average, strict=True):
            parameter.copy_(mean)
    model.eval().requires_grad_(False)
    if len(held_out):
        _calibrate(model, held_out)
    return model, history


def _split(data: LabelledClips, share: float, seed: int) -> tuple[LabelledClips, LabelledClips]:
    """The clips of training and those of a share of the prompts, held out."""
    prompts = sorted(set(data.prompts))
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen = {prompts[index] for index in order[: round(share * len(prompts))]}
    away = torch.tensor([prompt in chosen for prompt in data.prompts], dtype=torch.bool)
    return _take(data, (~away).nonzero()[:, 0]), _take(data, away.nonzero()[:, 0])


def _take(data: LabelledClips, chosen: Tensor) -> LabelledClips:
    return replace(
        data,
        videos=data.videos[chosen],
        prompts=[data.prompts[index] for index in chosen.tolist()],
        video_scores=data.video_scores[chosen],
        patch_scores=data.patch_scores[chosen],
    )


def _look(model: RewardModel, videos: Tensor) -> Tensor | None:
    """What the frozen part of the backbone sees of each clip, once for all steps, kept in half precision."""
    parts = [model.backbone.look(part) for part in videos.split(_LOOK_BATCH)]
    return None if parts[0] is None else torch.cat([part.half() for part in parts])


def _belief(data: LabelledClips) -> Tensor:
    """How far each clip is believed to show what its prompt says, [N] in [0, 1]: its label, else the mean of all."""
    if _PROMPT_DIMENSION not in data.video_dimensions:
        return torch.ones(len(data))
    scores = data.video_scores[:, data.video_dimensions.index(_PROMPT_DIMENSION)]
    belief = (scores - 1) / 4
    return torch.where(belief.isnan(), belief.nanmean().nan_to_num(1.0), belief)


@torch.no_grad()
def _calibrate(model: RewardModel, data: LabelledClips) -> None:
    """Fit slope and offset of every dimension to held-out labels, and keep them in the model's config."""
    grid = tuple(data.patch_scores.shape[2:])
    video, patches = [], []
    for start in range(0, len(data), _LOOK_BATCH):
        clips, prompts = (part[start : start + _LOOK_BATCH] for part in (data.videos, data.prompts))
        logits = model.backbone.logits(model.backbone.encode(clips, model.backbone.look(clips)), prompts, grid)
        video.append(logits[0])
        patches.append(logits[1])
    fits = [
        tuple(calibrate(*pair) for pair in zip(torch.cat(logits).unbind(1), scores.unbind(1), strict=True))
        for logits, scores in ((video, data.video_scores), (patches, data.patch_scores))
    ]
    model.config = replace(model.config, video_calibration=fits[0], patch_calibration=fits[1])


def _one_cycle(step: int, steps: int) -> float:
    """Share of the peak learning rate: a tenth of the steps up, then half a cosine down."""
    return min(1, (step + 1) / (0.1 * steps)) * (1 + math.cos(math.pi * step / steps)) / 2


@dataclass(frozen=True)
class _Batch:
    clips: LabelledClips
    looks: Tensor | None
    shown: Tensor | None


def _batch(
    data: LabelledClips,
    looks: Tensor | None,
    shown: Tensor | None,
    size: int,
    seed: int,
    step: int,
    mirrors: Sequence[tuple[int, dict[str, str]]],
) -> _Batch:
    """The batch of one step: clips drawn without replacement, some mirrored, labels and captions with them."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)
    chosen = torch.randperm(len(data), generator=generator)[:size]
    clips, looks = _take(data, chosen), None if looks is None else looks[chosen].float()
    for axis, words in mirrors:
        which = torch.rand(len(chosen), generator=generator) < _MIRROR_SHARE
        clips = _mirror(clips, which, axis, words)
        if looks is not None:
            looks = torch.where(which.view(-1, 1, 1, 1, 1), looks.flip(axis), looks)
    return _Batch(clips, looks, None if shown is None else shown[chosen])


def _mirror(batch: LabelledClips, which: Tensor, axis: int, words: Mapping[str, str]) -> LabelledClips:
    """Mirror the clips `which` [N] along an axis of the patch grid.

    Their captions swap the words of direction. What a caption names may not look the same in a mirror (a digit), so
    text_alignment is unknown then; damage and motion stay what they are.
    """
    video_scores = batch.video_scores.clone()
    if _PROMPT_DIMENSION in batch.video_dimensions:
        video_scores[which, batch.video_dimensions.index(_PROMPT_DIMENSION)] = math.nan
    return replace(
        batch,
        videos=torch.where(which.view(-1, 1, 1, 1, 1), batch.videos.flip(axis - 1), batch.videos),
        patch_scores=torch.where(which.view(-1, 1, 1, 1, 1), batch.patch_scores.flip(axis), batch.patch_scores),
        prompts=[
            re.sub(r"\w+", lambda match: words.get(match[0].lower(), match[0]), prompt) if flipped else prompt
            for prompt, flipped in zip(batch.prompts, which.tolist(), strict=True)
        ],
        video_scores=video_scores,
    )


def _scales(scores: Tensor) -> list[float]:
    """For each dimension [N, D, ...] the loss of the best constant: relative to it, 1 is "nothing learned"."""
    scales = []
    for values in scores.unbind(1):
        constant = ((values.nanmean() - 1) / 4).nan_to_num(0.5).clamp(1e-3, 1 - 1e-3).logit()
        scales.append(max(score_loss(constant.expand_as(values), values).item(), _LEAST_SCALE))
    return scales


def _losses(
    model: RewardModel,
    batch: _Batch,
    scales: tuple[list[float], list[float]],
    patch_phase: bool,
    config: RewardConfig,
) -> dict[str, Tensor]:
    """The loss terms of a batch, 0-d each; regression relative to what a constant would lose."""
    clips = batch.clips

    def score(logits: Tensor, scores: Tensor, scale: list[float]) -> Tensor:
        terms = []
        for values, grades, unit in zip(logits.unbind(1), scores.unbind(1), scale, strict=True):
            if config.loss in ("regression", "combined"):
                terms.append(score_loss(values, grades) / unit)
            if config.loss in _PREFERENCES:
                terms.append(preference_loss(values, grades, config.tie_margin, config.loss == "bradley_terry_ties"))
        return torch.stack(terms).sum() / len(scale) if terms else logits.sum()

    features = model.backbone.encode(clips.videos, batch.looks, batch.shown)
    video, patches = model.backbone.logits(features, clips.prompts, clips.patch_scores.shape[2:])
    losses = {"video": score(video, clips.video_scores, scales[0])}
    if _PROMPT_DIMENSION in model.config.video_dimensions and len(clips) > 1:
        column = model.config.video_dimensions.index(_PROMPT_DIMENSION)
        count = min(len(clips) - 1, model.backbone.negatives)
        others = torch.stack([torch.arange(len(clips)).roll(shift) for shift in range(count + 1)], dim=1)
        told = model.backbone.against(features, clips.prompts, others)[..., column]
        losses["swap"] = _swap_loss(told[:, :1] - told[:, 1:], clips, others[:, 1:], column)
    if _MOTION_DIMENSION in model.config.video_dimensions and config.motion_weight:
        column = model.config.video_dimensions.index(_MOTION_DIMENSION)
        losses["motion"] = _frozen_loss(model, batch, video[: math.ceil(_FROZEN_SHARE * len(clips)), column], column)
    if patch_phase:
        losses["patch"] = score(patches, clips.patch_scores, scales[1])
    return losses


def _swap_loss(margin: Tensor, clips: LabelledClips, others: Tensor, column: int) -> Tensor:
    """Bradley-Terry [N, M]: a clip fits its own prompt better than another's, the surer the better it was judged."""
    weight = ((clips.video_scores[:, column] - 1) / 4).nan_to_num(0)[:, None].expand_as(margin)
    same = [
        [clips.prompts[other] == own for other in row] for own, row in zip(clips.prompts, others.tolist(), strict=True)
    ]
    weight = weight.masked_fill(torch.tensor(same), 0)
    return (F.softplus(-margin) * weight).sum() / weight.sum().clamp(min=1)


def _frozen_loss(model: RewardModel, batch: _Batch, own: Tensor, column: int) -> Tensor:
    """Bradley-Terry [] on dynamic_degree: a clip beats a frozen copy of it, the surer the better it was judged; of the
    first len(own) clips, whose logits those are."""
    count, moment = len(own), torch.rand(()).item()
    clips = _take(batch.clips, torch.arange(count))

    def frozen(frames: Tensor, axis: int) -> Tensor:
        chosen = frames.select(axis, round(moment * (frames.shape[axis] - 1)))
        return chosen.unsqueeze(axis).expand_as(frames).contiguous()

    stills = frozen(clips.videos, 1)
    looks = None if batch.looks is None else frozen(batch.looks[:count], 2)
    features = model.backbone.encode(stills, looks, None if batch.shown is None else batch.shown[:count])
    margin = own - model.backbone.logits(features, clips.prompts, clips.patch_scores.shape[2:])[0][:, column]
    weight = ((clips.video_scores[:, column] - 1) / 4).nan_to_num(0) * (stills != clips.videos).flatten(1).any(dim=1)
    return (F.softplus(-margin) * weight).sum() / weight.sum().clamp(min=1)


def _save(
    path: Path,
    parameters: Sequence[Tensor],
    average: Sequence[Tensor],
    optimizer: torch.optim.Optimizer,
    history: Sequence[dict[str, Any]],
) -> None:
    tensors = {f"model.{index}": value.detach() for index, value in enumerate(parameters)}
    tensors |= {f"average.{index}": value for index, value in enumerate(average)}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": value for name, value in state.items()}
    write_safetensors(path, tensors, {"history": json.dumps(history)})


def _resume(
    path: Path, parameters: Sequence[Tensor], average: Sequence[Tensor], optimizer: torch.optim.Optimizer
) -> list[dict[str, Any]]:
    """Load what `_save` wrote; returns the history."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        history = json.loads(file.metadata()["history"])
    with torch.no_grad():
        for part, values in (("model", parameters), ("average", average)):
            for index, value in enumerate(values):
                value.copy_(tensors[f"{part}.{index}"])
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if key.startswith("optimizer."):
            _, index, name = key.split(".")
            state.setdefault(int(index), {})[name] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return history
