"""A patch reward in latent space: scores of noisy latents, read off the frozen network that denoises them.

Nothing is decoded, and a score costs one pass of the network. So clips can be judged while they are sampled. Rewards on
a denoiser's features are known for whole clips; here every patch has one.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from halo_fast.errors import UserError, check_finite, first_line
from halo_fast.families.base import repeated_blocks
from halo_fast.families.pipeline import PipelineFamily
from halo_fast.files import laid_out_like, progress, write_json, write_safetensors
from halo_fast.patches import PatchGrid
from halo_fast.rewards.losses import score_loss
from halo_fast.rewards.model import check_weights

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
        network: class of the network that it was trained on.
        dimensions: names of the patch scores.
        hidden: width of the head.
    """

    grid: tuple[int, int, int]
    blocks: tuple[int, ...]
    channels: int
    network: str
    dimensions: tuple[str, ...] = ("quality",)
    hidden: int = 256


class LatentReward(nn.Module):
    """Patch scores of noisy latents at any time.

    What is read at a patch are the means, over its positions, of x_t, of the clean latents that the network predicts
    there, and of the outputs of some blocks. A small network maps these, their means over time at the same place and
    over the whole clip, and t to a logit; a score is 1 + 4 sigma(logit).

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
        self.own, self.place, self.clip = (nn.Linear(config.channels, config.hidden) for _ in range(3))
        self.time = nn.Linear(3, config.hidden)
        self.head = nn.Sequential(
            nn.GELU(), nn.Dropout(_DROPOUT), nn.Linear(config.hidden, config.hidden // 4), nn.GELU(),
            nn.Linear(config.hidden // 4, len(config.dimensions)),
        )  # fmt: skip

    def logits(self, reading: Tensor, t: Tensor) -> Tensor:
        """Logits [N, Q, f, h, w] of a reading [N, C, f, h, w] at times t [N]; differentiable."""
        x = ((reading.float() - self.mean.view(-1, 1, 1, 1)) / self.scale.view(-1, 1, 1, 1)).movedim(1, -1)
        time = torch.stack([t, t.sqrt(), 1 - t], dim=-1).to(x)[:, None, None, None]
        hidden = self.own(x) + self.place(x.mean(dim=1, keepdim=True))
        hidden = hidden + self.clip(x.mean(dim=(1, 2, 3), keepdim=True)) + self.time(time)
        logits: Tensor = self.head(hidden)
        return logits.movedim(-1, 1)

    @torch.no_grad()
    def forward(self, family: PipelineFamily, noisy: Tensor, t: Tensor, conditions: dict[str, Tensor]) -> Tensor:
        """Patch scores float32 [N, Q, f, h, w], 1 to 5, of latents on their way; one pass of the network.

        The network is read in eval mode, with the adapters that are active.

        Args:
            family: whose network it was trained on.
            noisy: x_t, [N, *latent_shape] in model space, where the network computes.
            t: times in [0, 1], 1 being pure noise, [N].
            conditions: a batch from `family.stack`.

        Raises:
            UserError: another network than the one that it was trained on, or one that is offloaded.
        """
        name = type(family.transformer).__name__
        if name != self.config.network:
            raise UserError(f"family: expected {self.config.network}, which this latent reward reads, got {name}")
        reading = _read(family, noisy, t, conditions, self.config.grid, self.config.blocks).to(self.mean.device)
        if reading.shape[1] != self.config.channels:
            raise UserError(
                f"family: expected the network that this latent reward was trained on, whose readings have "
                f"{self.config.channels} channels, got {reading.shape[1]}"
            )
        return 1 + 4 * self.logits(reading, t.to(reading)).sigmoid()

    def save(self, folder: Path | str) -> None:
        """Write model.safetensors and config.json."""
        folder = Path(folder)
        write_safetensors(folder / "model.safetensors", self.state_dict())
        write_json(folder / "config.json", asdict(self.config))

    @classmethod
    def load(cls, folder: Path | str) -> LatentReward:
        """Read what `save` wrote; on the CPU, in eval mode, without gradients.

        Raises:
            UserError: files that are missing or are no latent reward's.
        """
        folder = Path(folder)
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
            check_weights(tensors, model.state_dict())
            model.load_state_dict(tensors)
        except (OSError, ValueError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
            raise UserError(
                f"{path}: expected a latent reward's ({first_line(error)}); see train_latent_reward"
            ) from error
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
    clips_per_pass: int = 1,
    learning_rate: float = 2e-3,
    times: tuple[float, float] | None = None,
    seed: int = 0,
    folder: Path | str | None = None,
) -> tuple[LatentReward, list[dict[str, float]]]:
    """Train a latent reward on clean latents with patch scores: labels, or what a reward model says of the clips.

    Every clip is noised `draws` times and read once each; the head is trained on these readings by AdamW with a cosine.
    The network is not trained. It is read in eval mode, with the adapters that are active.

    Args:
        family: the model; its network is read where it is.
        latents: N clips [*latent_shape] of one size, in model space.
        conditions: of each clip's prompt, from `family.encode_prompts`.
        patch_scores: [N, Q, f, h, w], 1 to 5; NaN is "not scored".
        dimensions: names of the Q scores.
        draws: noise and times of each clip.
        steps: of the head's training.
        batch_size: readings in a step.
        clips_per_pass: clips that go through the network at once.
        learning_rate: of the first step.
        times: the range from which times are drawn uniformly, from 0 (clean) to 1 (pure noise); None for the times
            that the network is trained at, with the sampler's shift.
        seed: of noise, times and the head.
        folder: on whose disk the readings lie, float32; None keeps them in memory.

    Returns:
        the latent reward on the CPU in eval mode, and the loss of every hundredth step and the last.

    Raises:
        UserError: a network whose blocks have no token for each position of the latents, one that is offloaded, or
            clips of which it makes NaN or infinity.
        ValueError: clips, conditions, scores or numbers that do not fit.
    """
    folder = None if folder is None else Path(folder)
    _check(latents, conditions, patch_scores, dimensions, times)
    for name, value in {
        "draws": draws, "steps": steps, "batch_size": batch_size, "clips_per_pass": clips_per_pass
    }.items():  # fmt: skip
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    grid: Any = tuple(patch_scores.shape[2:])
    generator = torch.Generator().manual_seed(seed)
    rows = torch.arange(len(latents)).repeat(draws)
    u = torch.rand(len(rows), generator=generator)
    shape = latents[0].shape
    t = family.timesteps(u, shape) if times is None else times[0] + (times[1] - times[0]) * u
    readings, blocks = _readings(family, latents, conditions, grid, rows, t, clips_per_pass, generator, folder)

    network = type(family.transformer).__name__
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LatentReward(LatentRewardConfig(grid, blocks, readings.shape[1], network, tuple(dimensions)))
        _standardise(model, readings, batch_size)
        history = _fit_head(model, readings, t, patch_scores.float()[rows], steps, batch_size, learning_rate)
    return model.eval().requires_grad_(False), history


def _check(
    latents: Sequence[Tensor],
    conditions: Sequence[dict[str, Tensor]],
    patch_scores: Tensor,
    dimensions: Sequence[str],
    times: tuple[float, float] | None,
) -> None:
    """Raise ValueError unless clips, conditions and scores fit together."""
    count = len(latents)
    if not count or len(conditions) != count or len(patch_scores) != count or patch_scores.ndim != 5:
        raise ValueError(
            f"expected latents, conditions and patch_scores [N, Q, f, h, w] of as many clips, got {count}, "
            f"{len(conditions)} and {list(patch_scores.shape)}"
        )
    for index, clip in enumerate(latents):
        if clip.shape != latents[0].shape:
            raise ValueError(
                f"latents: expected clips of one size, {list(latents[0].shape)}, got {list(clip.shape)} for clip "
                f"{index}"
            )
    if patch_scores.shape[1] != len(dimensions):
        raise ValueError(f"dimensions: expected {patch_scores.shape[1]} names, one a score, got {list(dimensions)}")
    known = patch_scores[~patch_scores.isnan()]
    if not len(known) or known.min() < 1 or known.max() > 5:
        span = f"{float(known.min())} to {float(known.max())}" if len(known) else "NaN alone"
        raise ValueError(f"patch_scores: expected 1 to 5, or NaN where there is none, got {span}")
    if times is not None and not 0 <= times[0] < times[1] <= 1:
        raise ValueError(f"times: expected two times between 0 and 1 in order, got {times}")


def _readings(
    family: PipelineFamily,
    latents: Sequence[Tensor],
    conditions: Sequence[dict[str, Tensor]],
    grid: Any,
    rows: Tensor,
    t: Tensor,
    size: int,
    generator: torch.Generator,
    folder: Path | None,
) -> tuple[Tensor, tuple[int, ...]]:
    """What is read of the noised clips `rows` at times t, float32 [M, C, f, h, w], and the blocks' numbers."""
    device = family.transformer.device
    kept: Tensor | None = None
    blocks: tuple[int, ...] | None = None
    for places in progress(torch.arange(len(rows)).split(size), -(-len(rows) // size), "latent reward"):
        clips = rows[places].tolist()
        clean = torch.stack([latents[clip] for clip in clips]).float()
        noise, time = torch.randn(clean.shape, generator=generator), t[places].to(device)
        noisy = family.add_noise(clean.to(device), noise.to(device), time)
        stacked = family.stack([conditions[clip] for clip in clips])
        if blocks is None:
            blocks = _blocks(family, noisy[:1], time[:1], family.stack([conditions[clips[0]]]))
        found = _read(family, noisy, time, stacked, grid, blocks).cpu()
        check_finite(
            found, [f"clip {clip}" for clip in clips], "what the network makes", "load it in another precision"
        )
        if kept is None:
            kept = laid_out_like(found, len(rows), torch.float32, folder)
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
    """Means over patches of the blocks' outputs, of the clean latents predicted and of x_t, float32 [N, C, f, h, w]."""
    frames, height, width = family.latent_size(noisy.shape)
    patches = PatchGrid(tuple(grid), frames, height, width, spatial_factor=1, temporal_factor=1, causal=False)
    # prompts of different lengths may go through the network one by one
    outputs: dict[int, list[Tensor]] = {number: [] for number in blocks}

    def keep(number: int, block: nn.Module, tokens: Tensor) -> None:
        outputs[number].append(patches.pool_complete(tokens.float()))

    with _watched(family, (frames, height, width), keep, blocks):
        predicted = _predict(family, noisy, t, conditions)
    missing = [number for number, found in outputs.items() if not found]
    if missing:
        raise UserError(f"family: expected a network whose blocks {missing} have a token for each place of the latents")
    clean = family.clean(noisy.float(), predicted.float(), t)
    outer = [x.transpose(1, 2) if family.layout == "BFCHW" else x for x in (clean, noisy.float())]
    return torch.cat([*(torch.cat(outputs[number]) for number in blocks), *map(patches.pool, outer)], dim=1)


@torch.no_grad()
def _predict(family: PipelineFamily, noisy: Tensor, t: Tensor, conditions: dict[str, Tensor]) -> Tensor:
    """The network's output in eval mode."""
    network = family.transformer
    if network.device != noisy.device:
        raise UserError(
            f"family: expected a network on the device of the latents, {noisy.device}, got {network.device}; a latent "
            "reward reads networks that are not offloaded"
        )
    placed = {
        name: value if name in family.host_conditions else value.to(noisy.device) for name, value in conditions.items()
    }
    training = [module for module in network.modules() if module.training]
    try:
        network.eval()
        return family.predict(network, noisy, t, placed)
    finally:
        for module in training:
            module.training = True


def _blocks(family: PipelineFamily, noisy: Tensor, t: Tensor, conditions: dict[str, Tensor]) -> tuple[int, ...]:
    """Numbers of the blocks to read: at some depths of those that have a token for each place."""
    fit: list[tuple[int, str]] = []
    size = family.latent_size(noisy.shape)
    with _watched(family, size, lambda number, block, _: fit.append((number, type(block).__name__))):
        _predict(family, noisy, t, conditions)
    counts = Counter(kind for _, kind in fit)
    # what is there once beside others, such as an embedding, is no block
    numbers = [number for number, kind in fit if counts[kind] > 1 or max(counts.values()) == 1]
    if not numbers:
        raise UserError(
            f"model: {type(family.transformer).__name__} has no blocks with one token for each place of the latents "
            "and no others, so a latent reward cannot read it; use a reward model of pixels"
        )
    return tuple(dict.fromkeys(numbers[max(round(depth * len(numbers)) - 1, 0)] for depth in _DEPTHS))


@contextmanager
def _watched(
    family: PipelineFamily,
    size: Sequence[int],
    take: Callable[[int, nn.Module, Tensor], None],
    blocks: Sequence[int] | None = None,
) -> Iterator[None]:
    """Give `take` the outputs of blocks that are tokens of the latents, [N, C, F, H, W]; None looks at all blocks."""
    sides = _patch_sides(family.transformer.config)
    places = [length // side for length, side in zip(size, sides, strict=True)]

    def hook(number: int) -> Callable[..., None]:
        def give(module: nn.Module, inputs: Any, output: Any) -> None:
            for value in output if isinstance(output, tuple) else (output,):
                if isinstance(value, Tensor) and value.ndim == 3 and value.shape[1] == math.prod(places):
                    take(number, module, value.transpose(1, 2).unflatten(2, places))
                    return

        return give

    handles = [
        block.register_forward_hook(hook(number))
        for number, block in enumerate(repeated_blocks(family.transformer))
        if blocks is None or number in blocks
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
