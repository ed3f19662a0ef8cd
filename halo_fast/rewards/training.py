"""Training of the reward model: whole videos first, then the same weights on patches.

Several processes train one model together, as `halo_fast.rewards.shares` says. Fits in closed form, checkpoints and the
calibration are the first one's.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import get_ema_multi_avg_fn

from halo_fast import processes
from halo_fast.errors import UserError
from halo_fast.files import hash_tensors, laid_out_like, read_checkpoint, write_checkpoint
from halo_fast.rewards.base import RewardConfig, RewardModelConfig
from halo_fast.rewards.clips import MIRRORS, LabelledClips, Mirror, mirror_clips, split_heldout
from halo_fast.rewards.losses import calibrate
from halo_fast.rewards.model import RewardModel, copy_start
from halo_fast.rewards.shares import Share, add_up_gradients
from halo_fast.rewards.terms import Batch, loss_scales, loss_terms
from halo_fast.settings import validate
from halo_fast.train.optimizers import Optimizer, check_optimizer, kept_state, make_optimizer, restore_state

__all__ = ["TrainingInputs", "draw_batch", "frozen_features", "train_reward_model"]

logger = logging.getLogger(__name__)

_WEIGHT_DECAY = 0.05
_MIRROR_SLACK = 0.1  # of a patch, by which patches of unequal size may miss their mirrored place
_EMA_DECAY = 0.98
_MAX_GRAD_NORM = 1.0
_WARMUP_SHARE = 0.1  # of the steps of a phase
_MIRROR_SHARE = 0.45  # below a half, because a mirrored clip has no text_alignment
_FEATURE_BATCH = 16  # clips whose frozen features are computed at once


@dataclass(frozen=True)
class TrainingInputs:
    """The clips that train and what is computed of them once.

    Args:
        clips: labelled clips.
        rows: int64 [N], which of them train; the others are never read.
        frozen: float16 [N, c, f', y, x], or None; see Backbone.frozen_features.
        word_evidence: [N, k], or None; see Backbone.fit_closed_form.
        mirrors: that keep the labels true.
        exchange_words: the backbone's, which gives the word evidence of mirrored clips; None leaves it as it is.
    """

    clips: LabelledClips
    rows: Tensor
    frozen: Tensor | None = None
    word_evidence: Tensor | None = None
    mirrors: Sequence[Mirror] = ()
    exchange_words: Callable[[Tensor, Mapping[str, str]], Tensor] | None = None


@dataclass
class _State:
    """What a training changes, and a checkpoint holds."""

    parameters: list[Tensor]
    average: list[Tensor]
    optimizer: torch.optim.Optimizer
    history: list[dict[str, Any]] = field(default_factory=list)


def train_reward_model(
    model_config: RewardModelConfig,
    data: LabelledClips,
    config: RewardConfig,
    seed: int,
    checkpoint: Path | str | None = None,
    frozen: Tensor | None = None,
    folder: Path | str | None = None,
    rows: Tensor | None = None,
    device: str | None = None,
) -> tuple[RewardModel, list[dict[str, Any]]]:
    """Train a reward model: `video_steps` on video scores, then `patch_steps` on patch scores with the video loss kept.

    Processes that `halo_fast.processes` has joined train it together, each with a share of every batch.

    Args:
        model_config: of the model that is made; without video dimensions patch scores alone are learned.
        data: the labels. A clip may be a still of one frame.
        config: steps, weights, learning rate, losses.
        seed: of weights, held-out prompts and batches.
        checkpoint: file that is written every `checkpointing_steps`, and continued from if it is there.
        frozen: frozen features of all clips, float16, as `frozen_features` gives them; None computes them.
        folder: on whose disk those of the training clips lie; None for that of the checkpoint, without one in memory.
        rows: int64, the clips that there are for training; None for all.
        device: where it is trained, and stays; None for the first GPU, or the CPU where there is none.

    Returns:
        the model with exponentially averaged weights, in eval mode, and one row for each step.

    Raises:
        UserError: a setting out of bounds, processes that were given different labels.
        ValueError: no clips, a held-out share that leaves none to train on.
    """
    checkpoint, folder = (None if place is None else Path(place) for place in (checkpoint, folder))
    validate(config, "reward")
    check_optimizer(config.optimizer, "reward.optimizer")
    _check_alike(model_config, data)
    rows, heldout = _split(data, torch.arange(len(data)) if rows is None else rows, config, seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = RewardModel(model_config)
    if config.start:
        copy_start(model, config.start)
    folder = folder or (checkpoint and checkpoint.parent)
    where = torch.device(device or processes.device())
    if frozen is None:
        frozen = frozen_features(model.to(where), data.videos, rows, folder)
    else:
        known, frozen = frozen, laid_out_like(frozen, len(rows), torch.float16, folder)
        for place, row in enumerate(rows.tolist()):
            frozen[place] = known[row]
    inputs = _prepare_inputs(model.cpu(), data, rows, config, frozen, folder)
    scales = loss_scales(data.video_scores[rows]), loss_scales(data.patch_scores[rows])
    state = _start(model.to(where), config, checkpoint)
    total, begun = config.video_steps + config.patch_steps, len(state.history)
    schedule = LambdaLR(state.optimizer, lambda done: _peak_share(min(begun + done, total - 1), config))
    model.train()
    for step in processes.shown(range(begun, total), "reward"):
        row = {"phase": _phase(step, config)[0], "step": step + 1, "learning_rate": schedule.get_last_lr()[0]}
        # no name holds the batch, so it is gone before the next is drawn
        losses = _take_step(
            model, draw_batch(inputs, config.batch_size, seed, step).to(where), scales, state, config, seed, step
        )
        state.history.append(row | losses)
        schedule.step()
        if checkpoint and processes.is_first() and (step + 1) % config.checkpointing_steps == 0:
            _save(checkpoint, state, config.optimizer)
    with torch.no_grad():
        for parameter, mean in zip(state.parameters, state.average, strict=True):
            parameter.copy_(mean)
    model.eval().requires_grad_(False)
    if len(heldout):
        _calibrate(model, data, heldout, min(config.batch_size, _FEATURE_BATCH))
    return model, state.history


def _check_alike(model_config: RewardModelConfig, data: LabelledClips) -> None:
    """Raise UserError if this process is given another model or other labels than the first one."""
    if processes.count() == 1:
        return
    labels = {"video scores": data.video_scores, "patch scores": data.patch_scores}
    own = hash_tensors(str(model_config), *data.prompts, labels)
    if processes.by_first(lambda: own) != own:
        raise UserError(
            f"reward: process {processes.rank()} has other labels than the first one; all machines must see one "
            "output_dir, and reward.examples must draw from the seed alone"
        )


def _split(data: LabelledClips, rows: Tensor, config: RewardConfig, seed: int) -> tuple[Tensor, Tensor]:
    """Indices of the clips that train and of those that calibrate; ValueError if none are left to train on."""
    if not len(rows):
        raise ValueError("data: expected labelled clips, got none")
    share, prompts = config.held_out_share, [data.prompts[row] for row in rows.tolist()]
    train, heldout = split_heldout(prompts, share, seed)
    if not len(train):
        raise ValueError(f"reward.held_out_share: {share:g} of {len(set(prompts))} prompts leaves no clip to train on")
    return rows[train], rows[heldout]


def _prepare_inputs(
    model: RewardModel,
    clips: LabelledClips,
    rows: Tensor,
    config: RewardConfig,
    frozen: Tensor | None,
    folder: Path | None,
) -> TrainingInputs:
    """Fit what has a closed form, once for all steps; weights and fits of all processes are those of the first."""

    def fit() -> tuple[dict[str, Tensor], None]:
        prompts = [clips.prompts[row] for row in rows.tolist()]
        evidence = model.backbone.fit_closed_form(frozen, prompts, clips.prompt_confidence(rows))
        if hasattr(model.backbone, "fit_scores") and not config.start:
            model.backbone.fit_scores(frozen, clips, rows, folder)
        return model.state_dict() | ({} if evidence is None else {"word evidence": evidence}), None

    fitted, _ = processes.tensors_by_first(fit, into=model.state_dict())
    word_evidence = fitted.get("word evidence")
    chosen = {"none": (), "horizontal": ("horizontal",), "both": ("horizontal", "vertical")}[config.mirror]
    mirrors = [MIRRORS[name] for name in chosen if _has_mirror(model, clips, name)]
    exchange = getattr(model.backbone, "exchange_words", None)
    return TrainingInputs(clips, rows, frozen, word_evidence, mirrors, exchange)


def _has_mirror(model: RewardModel, clips: LabelledClips, name: str) -> bool:
    """Whether each patch has one of nearly its place in a mirrored clip; says so where none has."""
    axis = MIRRORS[name].axis
    length = clips.videos.shape[axis - 1] // model.config.spatial_factor
    count = clips.patch_scores.shape[axis]
    edges = [k * length // count for k in range(count + 1)]
    off = max(abs(length - edge - other) for edge, other in zip(edges, reversed(edges), strict=True))
    fits = off <= _MIRROR_SLACK * length / count
    if not fits:
        logger.warning(
            "reward: no %s mirror: %d patches on %d latent positions are of unequal size; a grid that divides them has",
            name, count, length,
        )  # fmt: skip
    return fits


def frozen_features(model: RewardModel, videos: Tensor, rows: Tensor, folder: Path | None = None) -> Tensor | None:
    """Frozen features of some clips, or None if the backbone has none.

    Args:
        model: whose backbone reads the clips.
        videos: uint8 [N, F, H, W, 3].
        rows: int64 [M], which of them.
        folder: on whose disk the features lie; None keeps them in memory.

    Returns:
        float16 [M, c, f', y, x].
    """
    frozen, starts = None, range(0, len(rows), _FEATURE_BATCH)
    for number, start in enumerate(processes.shown(starts, "reward: frozen features")):
        own = number % processes.count() == processes.rank()
        # the first batch tells every process how features are laid out
        if not own and frozen is not None:
            continue
        part = model.backbone.frozen_features(videos[rows[start : start + _FEATURE_BATCH]].to(model.device))
        if part is None:
            return None
        part = part.cpu()
        if frozen is None:
            frozen = laid_out_like(part, len(rows), torch.float16, folder)
        if own:
            frozen[start : start + len(part)] = part
    if frozen is not None:
        # what another process has computed is 0 on this one
        for part in frozen.split(_FEATURE_BATCH):
            processes.add_up([part])
    return frozen


def _start(model: RewardModel, config: RewardConfig, checkpoint: Path | None) -> _State:
    """The state before the first step, or that of the checkpoint."""
    parameters: list[Tensor] = [parameter for parameter in model.parameters() if parameter.requires_grad]
    average = [parameter.detach().clone() for parameter in parameters]
    optimizer = make_optimizer(parameters, config.optimizer, config.learning_rate, _WEIGHT_DECAY, eps=1e-6)
    state = _State(parameters, average, optimizer)
    if checkpoint:
        none: tuple[dict[str, Tensor], dict[str, Any]] = {}, {}
        # the first process reads, because a network file system may show others an older file
        kept = processes.tensors_by_first(lambda: read_checkpoint(checkpoint) if checkpoint.exists() else none)
        if kept[0]:
            _resume(*kept, state, config.optimizer)
    return state


def _phase(step: int, config: RewardConfig) -> tuple[str, int, int]:
    """Name of the phase, the step's number in it, and its steps."""
    if step < config.video_steps:
        return "video", step, config.video_steps
    return "patch", step - config.video_steps, config.patch_steps


def _peak_share(step: int, config: RewardConfig) -> float:
    """Share of the peak learning rate: a tenth of a phase's steps up, then half a cosine down."""
    _, done, steps = _phase(step, config)
    if not steps:
        return 0.0
    return min(1, (done + 1) / (_WARMUP_SHARE * steps)) * (1 + math.cos(math.pi * done / steps)) / 2


def _take_step(
    model: RewardModel,
    batch: Batch,
    scales: tuple[list[float], list[float]],
    state: _State,
    config: RewardConfig,
    seed: int,
    step: int,
) -> dict[str, float]:
    """One optimiser step; the losses, by name."""
    patch_phase = _phase(step, config)[0] == "patch"
    with torch.random.fork_rng():
        torch.manual_seed(seed * 1_000_003 + step)  # of dropout
        losses = loss_terms(model, batch, scales, patch_phase, config)
    video_weight = config.video_weight if patch_phase else 1.0
    weights = {
        "video": video_weight,
        "swap": config.swap_weight * video_weight,
        "motion": config.motion_weight * video_weight,
        "turn": config.motion_weight * video_weight,
        "patch": config.patch_weight,
    }
    loss = torch.stack([weights[name] * value for name, value in losses.items()]).sum()
    state.optimizer.zero_grad(set_to_none=True)
    if batch.share.counts:
        loss.backward()
    add_up_gradients(state.parameters)
    torch.nn.utils.clip_grad_norm_(state.parameters, _MAX_GRAD_NORM, error_if_nonfinite=True)
    state.optimizer.step()
    with torch.no_grad():
        decay = min(_EMA_DECAY, (step + 1) / (step + 10))  # the first weights count for less and less
        get_ema_multi_avg_fn(decay)(state.average, [*state.parameters], step)
    return {"loss": loss.item()} | {f"{name}_loss": value.item() for name, value in losses.items()}


def draw_batch(inputs: TrainingInputs, size: int, seed: int, step: int) -> Batch:
    """This process's share of the batch of one step, and the labels of all of it.

    Clips are drawn without replacement, and some are mirrored with their labels and prompts.
    """
    generator = torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)
    drawn = torch.randperm(len(inputs.rows), generator=generator)[:size]
    share = Share.of(len(drawn))
    labels, chosen = inputs.clips.without_frames().select(inputs.rows[drawn]), drawn[share.rows]
    clips, frozen = (
        inputs.clips.select(inputs.rows[chosen]),
        None if inputs.frozen is None else inputs.frozen[chosen].float(),
    )
    evidence = None if inputs.word_evidence is None else inputs.word_evidence[chosen]
    for mirror in inputs.mirrors:
        which = torch.rand(len(drawn), generator=generator) < _MIRROR_SHARE
        labels, which = mirror_clips(labels, which, mirror), which[share.rows]
        clips = mirror_clips(clips, which, mirror)
        if frozen is not None:
            frozen = torch.where(which.view(-1, 1, 1, 1, 1), frozen.flip(mirror.axis), frozen)
        if evidence is not None and inputs.exchange_words is not None:
            evidence = torch.where(which[:, None], inputs.exchange_words(evidence, mirror.words), evidence)
    return Batch(clips, labels, share, frozen, evidence)


@torch.no_grad()
def _calibrate(model: RewardModel, data: LabelledClips, heldout: Tensor, size: int) -> None:
    """Fit slope and offset of every dimension to held-out labels, `size` clips at once, and keep them in the config.

    Processes share the batches.
    """
    held = data.without_frames().select(heldout)
    video, patches = torch.zeros_like(held.video_scores), torch.zeros_like(held.patch_scores)

    def logits_of(clips: LabelledClips) -> tuple[Tensor, Tensor]:
        features = model.backbone.encode(clips.videos, model.backbone.frozen_features(clips.videos))
        logits: tuple[Tensor, Tensor] = model.backbone.logits(features, clips.prompts, patches.shape[2:])
        return logits

    for places in torch.arange(len(heldout)).split(size)[processes.rank() :: processes.count()]:
        of_video, of_patches = logits_of(data.select(heldout[places]).to(model.device))
        video[places], patches[places] = of_video.cpu(), of_patches.cpu()
    processes.add_up([video, patches])

    def fits() -> list[list[tuple[float, float]]]:
        pairs = (video, held.video_scores), (patches, held.patch_scores)
        return [[calibrate(*pair) for pair in zip(x.unbind(1), y.unbind(1), strict=True)] for x, y in pairs]

    scales = [tuple((slope, offset) for slope, offset in fit) for fit in processes.by_first(fits)]
    model.config = replace(model.config, video_calibration=scales[0], patch_calibration=scales[1])


def _save(path: Path, state: _State, kind: Optimizer) -> None:
    tensors = {f"model.{index}": value.detach() for index, value in enumerate(state.parameters)}
    tensors |= {f"average.{index}": value for index, value in enumerate(state.average)}
    for index, parameter in enumerate(state.parameters):
        tensors |= {f"{key}.{index}": value for key, value in kept_state(state.optimizer, parameter, kind).items()}
    write_checkpoint(path, tensors, {"history": state.history})


def _resume(tensors: Mapping[str, Tensor], rest: Mapping[str, Any], state: _State, kind: Optimizer) -> None:
    """Load what `_save` wrote into `state`."""
    with torch.no_grad():
        for part, values in (("model", state.parameters), ("average", state.average)):
            for index, value in enumerate(values):
                value.copy_(tensors[f"{part}.{index}"])
    for index, parameter in enumerate(state.parameters):
        restore_state(state.optimizer, parameter, tensors, str(index), kind)
    state.history.extend(rest["history"])
