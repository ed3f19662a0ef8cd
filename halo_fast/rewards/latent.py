"""A patch reward in latent space: scores of noisy latents, read off the frozen network that denoises them.

Nothing is decoded, and a score costs one pass of the network. So clips can be judged while they are sampled. Rewards on
a denoiser's features are known for whole clips; here every patch has one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from halo_fast.errors import UserError, check_finite
from halo_fast.families.base import repeated_blocks
from halo_fast.families.pipeline import PipelineFamily
from halo_fast.files import laid_out_like, progress, write_json, write_safetensors
from halo_fast.patches import PatchGrid
from halo_fast.rewards.losses import score_loss

__all__ = ["LatentReward", "LatentRewardConfig", "train_latent_reward"]

_DEPTHS = 1 / 3, 2 / 3, 1.0  # of the blocks that are read
_WEIGHT_DECAY = 0.05
_DROPOUT = 0.2


@dataclass(frozen=True)
class LatentRewardConfig:
    """What fixes the weights' shapes and meaning.

    Args:
        grid: patches (f, h, w).
        blocks: numbers of the network's blocks whose outputs are read.
        channels: of what is read at a patch.
        dimensions: names of the patch scores.
        hidden: width of the head.
    """

    grid: tuple[int, int, int]
    blocks: tuple[int, ...]
    channels: int
    dimensions: tuple[str, ...] = ("quality",)
    hidden: int = 256


class LatentReward(nn.Module):
    """Patch scores of noisy latents at any time.

    What is read at a patch are the means, over its positions, of x_t, of the clean latents that the network predicts
    there, and of the outputs of some blocks. A small network maps these, their means over the clip, what the other
    latent frames have at the place, and t to a logit; a score is 1 + 4 sigma(logit).

    Args:
        config: shapes and meaning.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, config: LatentRewardConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("mean", torch.zeros(config.channels))
        self.register_buffer("scale", torch.ones(config.channels))
        self.head = nn.Sequential(
            nn.Linear(3 * config.channels + 3, config.hidden), nn.GELU(), nn.Dropout(_DROPOUT),
            nn.Linear(config.hidden, config.hidden // 4), nn.GELU(),
            nn.Linear(config.hidden // 4, len(config.dimensions)),
        )  # fmt: skip

    def logits(self, reading: Tensor, t: Tensor) -> Tensor:
        """Logits [N, Q, f, h, w] of a reading [N, C, f, h, w] at times t [N]; differentiable."""
        x = ((reading.float() - self.mean.view(-1, 1, 1, 1)) / self.scale.view(-1, 1, 1, 1)).movedim(1, -1)
        whole = x.mean(dim=(1, 2, 3), keepdim=True).expand_as(x)
        others = x.mean(dim=1, keepdim=True) - x
        time = torch.stack([t, t.sqrt(), 1 - t], dim=-1).to(x)[:, None, None, None].expand(*x.shape[:-1], 3)
        logits: Tensor = self.head(torch.cat([x, whole, others, time], dim=-1))
        return logits.movedim(-1, 1)

    @torch.no_grad()
    def forward(self, family: PipelineFamily, noisy: Tensor, t: Tensor, conditions: dict[str, Tensor]) -> Tensor:
        """Patch scores float32 [N, Q, f, h, w], 1 to 5, of latents on their way; one pass of the network.

        Args:
            family: whose network it was trained on.
            noisy: x_t, [N, *latent_shape] in model space.
            t: times in [0, 1], 1 being pure noise, [N].
            conditions: a batch from `family.stack`.

        Raises:
            UserError: a network whose readings have other channels than those that it was trained on.
        """
        reading = _read(family, noisy, t, conditions, self.config.grid, self.config.blocks)
        if reading.shape[1] != self.config.channels:
            raise UserError(
                f"family: expected the network that this latent reward was trained on, whose readings have "
                f"{self.config.channels} channels, got {reading.shape[1]}"
            )
        return 1 + 4 * self.logits(reading, t.to(reading)).sigmoid()

    def save(self, folder: Path) -> None:
        """Write model.safetensors and config.json."""
        write_safetensors(folder / "model.safetensors", self.state_dict())
        write_json(folder / "config.json", asdict(self.config))

    @classmethod
    def load(cls, folder: Path) -> LatentReward:
        """Read what `save` wrote; on the CPU, in eval mode, without gradients.

        Raises:
            UserError: files that are missing or are no latent reward's.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = folder / "config.json"
        try:
            read = json.loads(path.read_text())
            lists: dict[str, Any] = {
                name: tuple(value) if isinstance(value, list) else value for name, value in read.items()
            }
            model = cls(LatentRewardConfig(**lists))
            path = folder / "model.safetensors"
            tensors = load_file(path)
            broken = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
            if broken:
                raise ValueError(f"{broken[0]} is not finite")
            model.load_state_dict(tensors)
        except (OSError, ValueError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
            raise UserError(f"{path}: expected a latent reward's ({error}); see train_latent_reward") from error
        return model.eval().requires_grad_(False)


def train_latent_reward(
    family: PipelineFamily,
    latents: Sequence[Tensor],
    conditions: Sequence[dict[str, Tensor]],
    patch_scores: Tensor,
    *,
    dimensions: Sequence[str] = ("quality",),
    draws: int = 4,
    steps: int = 2000,
    batch_size: int = 32,
    learning_rate: float = 2e-3,
    times: tuple[float, float] = (0.0, 1.0),
    seed: int = 0,
    folder: Path | None = None,
) -> tuple[LatentReward, list[dict[str, float]]]:
    """Train a latent reward on clean latents with patch scores: labels, or what a reward model says of the clips.

    Every clip is noised `draws` times, at times drawn evenly, and read once each; the head is trained on these readings
    by AdamW with a cosine. The network stays as it is.

    Args:
        family: the model; its network is read where it is.
        latents: N clips [*latent_shape] in model space.
        conditions: of each clip's prompt, from `family.encode_prompts`.
        patch_scores: [N, Q, f, h, w], 1 to 5; NaN is "not scored".
        dimensions: names of the Q scores.
        draws: noise and times of each clip.
        steps: of the head's training.
        batch_size: readings in a step, and clips in a pass of the network.
        learning_rate: of the first step.
        times: the range of times, from 0 (clean) to 1 (pure noise).
        seed: of noise, times and the head.
        folder: on whose disk the readings lie, float16; None keeps them in memory.

    Returns:
        the latent reward on the CPU in eval mode, and the loss of every hundredth step.

    Raises:
        UserError: a network whose blocks have no token for each position of the latents.
        ValueError: numbers of clips, conditions, scores or dimensions that differ, or times out of order.
    """
    count = len(latents)
    if not count or len(conditions) != count or len(patch_scores) != count or patch_scores.ndim != 5:
        raise ValueError(
            f"expected latents, conditions and patch_scores [N, Q, f, h, w] of as many clips, got {count}, "
            f"{len(conditions)} and {list(patch_scores.shape)}"
        )
    if patch_scores.shape[1] != len(dimensions):
        raise ValueError(f"dimensions: expected {patch_scores.shape[1]} names, one a score, got {list(dimensions)}")
    if not 0 <= times[0] < times[1] <= 1:
        raise ValueError(f"times: expected two times between 0 and 1 in order, got {times}")
    grid: Any = tuple(patch_scores.shape[2:])
    generator = torch.Generator().manual_seed(seed)
    rows = torch.arange(count).repeat(draws)
    t = times[0] + (times[1] - times[0]) * torch.rand(len(rows), generator=generator)
    readings, blocks = _readings(family, latents, conditions, grid, rows, t, batch_size, generator, folder)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LatentReward(LatentRewardConfig(grid, blocks, readings.shape[1], tuple(dimensions)))
        _standardise(model, readings, batch_size)
        history = _fit_head(model, readings, t, patch_scores.float()[rows], steps, batch_size, learning_rate)
    return model.eval().requires_grad_(False), history


def _readings(
    family: PipelineFamily,
    latents: Sequence[Tensor],
    conditions: Sequence[dict[str, Tensor]],
    grid: Any,
    rows: Tensor,
    t: Tensor,
    batch_size: int,
    generator: torch.Generator,
    folder: Path | None,
) -> tuple[Tensor, tuple[int, ...]]:
    """What is read of the noised clips `rows` at times t, float16 [M, C, f, h, w], and the blocks' numbers."""
    device = family.transformer.device
    kept: Tensor | None = None
    blocks: tuple[int, ...] | None = None
    for places in progress(torch.arange(len(rows)).split(batch_size), -(-len(rows) // batch_size), "latent reward"):
        clips = rows[places].tolist()
        clean = torch.stack([latents[clip] for clip in clips]).float()
        noise, time = torch.randn(clean.shape, generator=generator), t[places].to(device)
        noisy = family.add_noise(clean.to(device), noise.to(device), time)
        stacked = family.stack([conditions[clip] for clip in clips])
        if blocks is None:
            blocks = _blocks(family, noisy[:1], time[:1], {name: value[:1] for name, value in stacked.items()})
        found = _read(family, noisy, time, stacked, grid, blocks).half().cpu()
        check_finite(
            found, [f"clip {clip}" for clip in clips], "what the network makes", "load it in another precision"
        )
        if kept is None:
            kept = laid_out_like(found, len(rows), torch.float16, folder)
        kept[places] = found
    assert kept is not None and blocks is not None
    return kept, blocks


def _standardise(model: LatentReward, readings: Tensor, size: int) -> None:
    """Mean and deviation of every channel, some rows at a time."""
    sums = torch.zeros(2, readings.shape[1], dtype=torch.float64)
    for part in readings.split(size):
        values = part.double().movedim(1, -1).flatten(0, -2)
        sums += torch.stack([values.sum(0), values.square().sum(0)])
    mean, square = sums / (readings.numel() / readings.shape[1])
    model.mean.copy_(mean)
    model.scale.copy_((square - mean.square()).clamp(min=0).sqrt().clamp(min=1e-6))


def _fit_head(
    model: LatentReward, readings: Tensor, t: Tensor, scores: Tensor, steps: int, size: int, learning_rate: float
) -> list[dict[str, float]]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=_WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    history = []
    for step in range(steps):
        chosen = torch.randint(len(readings), (size,))
        loss = score_loss(model.logits(readings[chosen], t[chosen]), scores[chosen])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % 100 == 0 or step + 1 == steps:
            history.append({"step": step + 1, "loss": loss.item()})
    return history


def _read(
    family: PipelineFamily, noisy: Tensor, t: Tensor, conditions: dict[str, Tensor], grid: Any, blocks: Sequence[int]
) -> Tensor:
    """Means over patches of the blocks' outputs, of the clean latents predicted and of x_t, [N, C, f, h, w]."""
    outputs: dict[int, list[Tensor]] = {}
    size = family.latent_size(noisy.shape)

    def keep(number: int, tokens: Tensor) -> None:
        # prompts of different lengths may go through the network one by one
        outputs.setdefault(number, []).append(tokens)

    with _watched(family, size, keep):
        predicted = _predict(family, noisy, t, conditions)
    clean = family.clean(noisy.float(), predicted.float(), t)
    inner = [torch.cat(outputs[number]) for number in blocks if number in outputs]
    if len(inner) < len(blocks):
        raise UserError(f"family: expected a network whose blocks {list(blocks)} have tokens, got {sorted(outputs)}")
    outer = [x.transpose(1, 2) if family.layout == "BFCHW" else x for x in (clean, noisy.float())]
    frames, height, width = size
    patches = PatchGrid(tuple(grid), frames, height, width, spatial_factor=1, temporal_factor=1, causal=False)
    return torch.cat([patches.pool(x.float()) for x in (*inner, *outer)], dim=1)


@torch.no_grad()
def _predict(family: PipelineFamily, noisy: Tensor, t: Tensor, conditions: dict[str, Tensor]) -> Tensor:
    placed = {
        name: value if name in family.host_conditions else value.to(noisy.device) for name, value in conditions.items()
    }
    return family.predict(family.transformer, noisy, t, placed)


def _blocks(family: PipelineFamily, noisy: Tensor, t: Tensor, conditions: dict[str, Tensor]) -> tuple[int, ...]:
    """Numbers of the blocks to read: at some depths of those that have a token for each place."""
    fit: list[int] = []
    with _watched(family, family.latent_size(noisy.shape), lambda number, tokens: fit.append(number)):
        _predict(family, noisy, t, conditions)
    if not fit:
        raise UserError(
            f"model: {type(family.transformer).__name__} has no blocks with a token for each place of the latents, so "
            "a latent reward cannot read it; use a reward model of pixels"
        )
    return tuple(dict.fromkeys(fit[max(round(depth * len(fit)) - 1, 0)] for depth in _DEPTHS))


@contextmanager
def _watched(family: PipelineFamily, size: Sequence[int], take: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Give `take` the outputs of blocks that are tokens of the latents, by the blocks' numbers, [N, C, F, H, W]."""
    sides = _patch_sides(family.transformer.config)
    places = [length // side for length, side in zip(size, sides, strict=True)]

    def hook(number: int) -> Callable[..., None]:
        def give(module: nn.Module, inputs: Any, output: Any) -> None:
            for value in output if isinstance(output, tuple) else (output,):
                if (
                    isinstance(value, Tensor)
                    and value.ndim == 3
                    and value.shape[1] == places[0] * places[1] * places[2]
                ):
                    take(number, value.transpose(1, 2).unflatten(2, places))
                    return

        return give

    handles = [
        block.register_forward_hook(hook(number)) for number, block in enumerate(repeated_blocks(family.transformer))
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _patch_sides(config: Mapping[str, Any]) -> tuple[int, int, int]:
    """Latent frames, rows and columns of a token, by the names that diffusers' networks have for them."""
    size = config.get("patch_size") or 1
    if isinstance(size, Sequence):
        return tuple(size)[-3], tuple(size)[-2], tuple(size)[-1]
    return config.get("patch_size_t") or 1, size, size
