"""Training of the reward model: whole videos first, then the same weights on patches, from a teacher's labels."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor

from halo_fast.config import Config, RewardConfig
from halo_fast.data.clips import read_clip
from halo_fast.rewards.model import RewardModel, RewardModelConfig
from halo_fast.runs import Run, UserError, progress, write_csv, write_safetensors

__all__ = ["LabelledClips", "fit", "read_labels", "score_loss", "train_reward"]

_WEIGHT_DECAY = 0.05
_EMA_DECAY = 0.98
_MAX_GRAD_NORM = 1.0
_LEAST_SCALE = 1e-3  # labels that hardly differ are not blown up
_PROMPT_DIMENSION = "text_alignment"
_MIRROR_SHARE = 0.5
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


def train_reward(config: Config, run: Run) -> None:
    """Train the reward model on annotate/labels.parquet; a stage. Writes model.safetensors, config.json, history.csv.

    Raises:
        UserError: no annotated clips, or one that cannot be read.
    """
    labels = run.require("annotate/labels.parquet")
    clips = run.require("generate/clips.parquet").parent
    settings = asdict(config.reward) | {"seed": config.seed}
    with run.stage("reward", settings, {"labels": labels, "clips": clips}) as stage:
        if stage.done:
            return
        model_config, data = read_labels(labels, clips)
        checkpoint = stage.folder / "checkpoint.safetensors"
        outputs = [stage.folder / name for name in ("model.safetensors", "config.json", "history.csv")]
        if checkpoint.exists() or not all(path.exists() for path in outputs):
            model, history = fit(model_config, data, config.reward, config.seed, checkpoint)
            model.save(stage.folder)
            write_csv(stage.folder / "history.csv", history)
            checkpoint.unlink(missing_ok=True)
        stage.finish({"clips": len(data), "steps": config.reward.video_steps + config.reward.patch_steps})


def read_labels(labels: Path, clips: Path) -> tuple[RewardModelConfig, LabelledClips]:
    """The annotated clips in memory (F * H * W * 3 bytes each), and the model's config that fits them.

    Args:
        labels: a labels.parquet; rows whose status is not "ok" are left out.
        clips: folder of the stage generate.

    Raises:
        UserError: no usable label, a clip that is missing or unreadable, clips of several sizes.
    """
    import pyarrow.parquet

    rows = [row for row in pyarrow.parquet.read_table(labels).to_pylist() if row["status"] == "ok"]
    if not rows:
        raise UserError(f"{labels}: no clip has a label; annotate more clips or use another teacher")
    known = {clip["clip_id"]: clip for clip in pyarrow.parquet.read_table(clips / "clips.parquet").to_pylist()}
    strays = [row["clip_id"] for row in rows if row["clip_id"] not in known]
    if strays:
        raise UserError(f"{labels}: clip {strays[0]} is not in {clips}; run `halo annotate --force`")
    found = [known[row["clip_id"]] for row in rows]
    videos = [read_clip(clips / clip["video"]) for clip in found]
    sizes = {tuple(video.shape) for video in videos}
    if len(sizes) > 1:
        raise UserError(f"{clips}: expected clips of one size, got {sorted(sizes)}; make them alike")
    video_dimensions = tuple(name.removeprefix("video_") for name in rows[0] if name.startswith("video_"))
    patch_dimensions = tuple(name.removeprefix("patch_") for name in rows[0] if name.startswith("patch_"))
    patch_scores = [[row[f"patch_{name}"] for name in patch_dimensions] for row in rows]
    data = LabelledClips(
        torch.stack(videos),
        [clip["prompt"] for clip in found],
        torch.tensor([[row[f"video_{name}"] for name in video_dimensions] for row in rows]),
        torch.tensor(patch_scores).reshape(len(rows), len(patch_dimensions), *rows[0]["grid"]),
        video_dimensions,
        patch_dimensions,
    )
    if not found[0]["latents"]:
        return RewardModelConfig(video_dimensions, patch_dimensions), data
    with safe_open(clips / found[0]["latents"], framework="pt") as file:
        latent_shape = file.get_slice("latents").get_shape()
    factors = _factors(data.videos.shape[1:4], latent_shape[-3:])
    return RewardModelConfig(video_dimensions, patch_dimensions, *factors), data


def _factors(video: Sequence[int], latent: Sequence[int]) -> tuple[int, int, bool]:
    """What the autoencoder compresses space and time by, and whether it is causal, from (frames, height, width)."""
    spatial = video[1] // latent[1]
    if latent[0] > 1 and (video[0] - 1) % (latent[0] - 1) == 0:
        return spatial, (video[0] - 1) // (latent[0] - 1), True
    return spatial, video[0] // latent[0], False


def fit(
    model_config: RewardModelConfig,
    data: LabelledClips,
    config: RewardConfig,
    seed: int,
    checkpoint: Path | None = None,
) -> tuple[RewardModel, list[dict[str, Any]]]:
    """Train a reward model: `video_steps` on video scores, then `patch_steps` on patch scores with the video loss kept.

    Every step draws from a seed of its own, so training that was killed goes on from its checkpoint bit for bit.

    Args:
        model_config: of the model that is made.
        data: the labels.
        config: steps, weights, learning rate.
        seed: of weights and batches.
        checkpoint: safetensors file that is written every `checkpointing_steps` and read if it is there.

    Returns:
        the model with exponentially averaged weights, in eval mode, and one row for each step.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model, average = RewardModel(model_config), RewardModel(model_config)
    average.load_state_dict(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=_WEIGHT_DECAY, eps=1e-6)
    sides = {axis: data.videos.shape[axis - 1] // model_config.spatial_factor for axis, _ in _MIRRORS}
    # patches of unequal size do not map onto each other in a mirror
    mirrors = [mirror for mirror in _MIRRORS if sides[mirror[0]] % data.patch_scores.shape[mirror[0]] == 0]
    scales = _scales(data.video_scores), _scales(data.patch_scores)
    history = _resume(checkpoint, model, average, optimizer) if checkpoint and checkpoint.exists() else []
    total = config.video_steps + config.patch_steps
    for step in progress(range(len(history), total), total - len(history), "reward"):
        patch_phase = step >= config.video_steps
        phase_step, phase_steps = (
            (step - config.video_steps, config.patch_steps) if patch_phase else (step, config.video_steps)
        )
        learning_rate = config.learning_rate * _one_cycle(phase_step, phase_steps)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        losses = _losses(model, _batch(data, config.batch_size, seed, step, mirrors), scales, patch_phase)
        weights = {
            "video": config.video_weight if patch_phase else 1.0,
            "swap": config.swap_weight * (config.video_weight if patch_phase else 1.0),
            "patch": config.patch_weight,
        }
        loss = torch.stack([weights[name] * value for name, value in losses.items()]).sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), _MAX_GRAD_NORM, error_if_nonfinite=True)
        optimizer.step()
        with torch.no_grad():
            decay = min(_EMA_DECAY, (step + 1) / (step + 10))
            torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
        history.append(
            {"phase": "patch" if patch_phase else "video", "step": step + 1, "learning_rate": learning_rate}
            | {"loss": loss.item()}
            | {f"{name}_loss": value.item() for name, value in losses.items()}
        )
        if checkpoint and (step + 1) % config.checkpointing_steps == 0:
            _save(checkpoint, model, average, optimizer, history)
    return average.eval().requires_grad_(False), history


def score_loss(logits: Tensor, scores: Tensor) -> Tensor:
    """Cross entropy of scores read as probabilities, (score - 1) / 4 against sigma(logit), above its minimum.

    Unlike a squared error it tells 4.9 from 5 as clearly as it tells grades apart. NaN scores do not count.

    Args:
        logits: any shape; differentiable.
        scores: the same shape, 1 to 5.
    """
    known = ~scores.isnan()
    target = (torch.where(known, scores, 1) - 1) / 4
    entropy = torch.special.entr(target) + torch.special.entr(1 - target)
    loss = F.binary_cross_entropy_with_logits(logits, target, reduction="none") - entropy
    return (loss * known).sum() / known.sum().clamp(min=1)


def _one_cycle(step: int, steps: int) -> float:
    """Share of the peak learning rate: a tenth of the steps up, then half a cosine down."""
    return min(1, (step + 1) / (0.1 * steps)) * (1 + math.cos(math.pi * step / steps)) / 2


def _batch(
    data: LabelledClips, size: int, seed: int, step: int, mirrors: Sequence[tuple[int, dict[str, str]]]
) -> LabelledClips:
    """The batch of one step: clips drawn without replacement, some mirrored, labels and captions with them."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)
    chosen = torch.randperm(len(data), generator=generator)[:size]
    batch = replace(
        data,
        videos=data.videos[chosen],
        prompts=[data.prompts[index] for index in chosen],
        video_scores=data.video_scores[chosen],
        patch_scores=data.patch_scores[chosen],
    )
    for axis, words in mirrors:
        batch = _mirror(batch, torch.rand(len(chosen), generator=generator) < _MIRROR_SHARE, axis, words)
    return batch


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
    model: RewardModel, batch: LabelledClips, scales: tuple[list[float], list[float]], patch_phase: bool
) -> dict[str, Tensor]:
    """The loss terms of a batch, 0-d each, relative to what a constant would lose."""

    def relative(logits: Tensor, scores: Tensor, scale: list[float]) -> Tensor:
        pairs = zip(logits.unbind(1), scores.unbind(1), scale, strict=True)
        return torch.stack([score_loss(*pair) / unit for *pair, unit in pairs]).mean()

    maps, whole = model.encode(batch.videos)
    text = model.encode_text(batch.prompts)
    logits = model.video_logits(whole, text)
    losses = {"video": relative(logits, batch.video_scores, scales[0])}
    if _PROMPT_DIMENSION in model.config.video_dimensions:
        column = model.config.video_dimensions.index(_PROMPT_DIMENSION)
        other = model.video_logits(whole, text.roll(1, 0))[:, column]
        losses["swap"] = _swap_loss(logits[:, column] - other, batch, column)
    if patch_phase:
        patches = model.patch_logits(maps, whole, text, batch.videos.shape[1:4], batch.patch_scores.shape[2:])
        losses["patch"] = relative(patches, batch.patch_scores, scales[1])
    return losses


def _swap_loss(margin: Tensor, batch: LabelledClips, column: int) -> Tensor:
    """Bradley-Terry: a clip fits its own prompt better than its neighbour's, the surer the better it was judged."""
    weight = ((batch.video_scores[:, column] - 1) / 4).nan_to_num(0)
    same = [own == other for own, other in zip(batch.prompts, [batch.prompts[-1], *batch.prompts[:-1]], strict=True)]
    weight = weight.masked_fill(torch.tensor(same), 0)
    return (F.softplus(-margin) * weight).sum() / weight.sum().clamp(min=1)


def _save(
    path: Path,
    model: RewardModel,
    average: RewardModel,
    optimizer: torch.optim.Optimizer,
    history: Sequence[dict[str, Any]],
) -> None:
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    tensors |= {f"average.{name}": value for name, value in average.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": value for name, value in state.items()}
    write_safetensors(path, tensors, {"history": json.dumps(history)})


def _resume(
    path: Path, model: RewardModel, average: RewardModel, optimizer: torch.optim.Optimizer
) -> list[dict[str, Any]]:
    """Load what `_save` wrote; returns the history."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        history = json.loads(file.metadata()["history"])
    for part, module in (("model", model), ("average", average)):
        module.load_state_dict({name: tensors[f"{part}.{name}"] for name in module.state_dict()})
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if key.startswith("optimizer."):
            _, index, name = key.split(".")
            state.setdefault(int(index), {})[name] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return history
