"""Align a network of your own: no diffusers pipeline, no registration, one small class with four members.

    python examples/own_model.py

The network here is a toy that moves noise to a coloured square. Put yours in its place.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from halo_fast.data import Pair
from halo_fast.families import Denoiser
from halo_fast.train import TrainConfig, fit


class Network(nn.Module):
    """Noisy latents [N, C, F, H, W], times [N] and prompt vectors [N, D] in, velocity [N, C, F, H, W] out."""

    def __init__(self, channels: int = 4, prompt: int = 8, width: int = 32) -> None:
        super().__init__()
        self.first = nn.Linear(channels + prompt + 1, width)
        self.last = nn.Linear(width, channels)

    def forward(self, noisy: Tensor, t: Tensor, prompt: Tensor) -> Tensor:
        pixels = noisy.movedim(1, -1)
        extra = torch.cat([t[:, None], prompt], dim=1)[:, None, None, None].expand(*pixels.shape[:-1], -1)
        return self.last(torch.relu(self.first(torch.cat([pixels, extra], dim=-1)))).movedim(-1, 1)


class MyModel(Denoiser):
    """What training needs of a model. The noise process is rectified flow; override add_noise and target for others."""

    lora_targets = ("first", "last")  # layers that get a LoRA, by the end of their names

    def __init__(self) -> None:
        super().__init__()
        self.network_itself = Network()

    @property
    def transformer(self) -> nn.Module:
        return self.network_itself

    @property
    def shift(self) -> float:
        return 1.0  # the timestep shift of your sampler

    def stack(self, conditions: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        return {"prompt": torch.stack([condition["prompt"] for condition in conditions])}

    def predict(self, model: nn.Module, noisy: Tensor, t: Tensor, conditions: dict[str, Tensor]) -> Tensor:
        return model(noisy, t, conditions["prompt"])


def make_pairs(count: int = 32) -> list[Pair]:
    """Two clips of each prompt with rewards of both: whatever you have, in this form."""
    generator = torch.Generator().manual_seed(0)
    pairs = []
    for _ in range(count):
        latents = torch.randn(2, 4, 3, 8, 8, generator=generator)
        brightness = latents[:, :, :, :4].mean(dim=(1, 2, 3, 4))
        patches = nn.functional.adaptive_avg_pool3d(latents.mean(1), (3, 2, 2))  # brighter patches are better
        pairs.append(Pair(latents, {"prompt": torch.randn(8, generator=generator)}, patches, brightness))
    return pairs


def main(steps: int = 60, learning_rate: float = 1e-2) -> list[dict[str, float]]:
    """Train a LoRA on the pairs; the log is returned."""
    config = TrainConfig(
        max_train_steps=steps, learning_rate=learning_rate, train_batch_size=8, gradient_accumulation_steps=1, rank=8,
        lora_alpha=8, gradient_checkpointing="none", mixed_precision="no",
    )  # fmt: skip
    result = fit(MyModel(), make_pairs(), config)
    for row in result.log[:: max(steps // 5, 1)]:
        print(f"step {row['step']:.0f}: loss {row['loss']:.4f}, patch accuracy {row['patch/accuracies']:.2f}")
    print("LoRA:", ", ".join(sorted(result.lora)))
    return result.log


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli(main)
