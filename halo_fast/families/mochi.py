"""Mochi 1 (Genmo, 2024): rectified flow whose time runs from noise (0) to data (1)."""

from typing import Any

import torch
from torch import Tensor, nn

from halo_fast.families import attention
from halo_fast.families.pipeline import MaskedPrompts

__all__ = ["Mochi"]


def _rotated(part: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Pairs of neighbouring channels turned by angles [tokens, heads, pairs], given by cosine and sine."""
    first, second = part.float().unflatten(-1, (-1, 2)).unbind(-1)
    cosine, sine = angles
    turned = torch.stack([first * cosine - second * sine, first * sine + second * cosine], dim=-1)
    return turned.flatten(-2).to(part.dtype)


class Mochi(MaskedPrompts):
    """diffusers.MochiPipeline; here t = 1 is pure noise, so the model takes 1 - t; it predicts x_0 - eps.

    Its sampler's steps are linear, then quadratic. That is no shift, so training times are uniform.
    """

    def __init__(self, pipeline: Any, network: str | None = None) -> None:
        super().__init__(pipeline, network)
        self.adapt(self.transformer)

    def adapt(self, network: nn.Module) -> None:
        from diffusers.models.attention_processor import MochiAttnProcessor2_0

        attention.install(network, MochiAttnProcessor2_0, _rotated)

    @property
    def compression(self) -> tuple[int, int]:
        return self.pipeline.vae_temporal_scale_factor, self.pipeline.vae_spatial_scale_factor

    @property
    def shift(self) -> float:
        return 1.0

    def target(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return latents - noise

    def sampler_times(self) -> Tensor:
        return 1 - super().sampler_times()

    def clean(self, noisy: Tensor, output: Tensor, t: Tensor) -> Tensor:
        return super().clean(noisy, -output, t)

    def predict(self, model: nn.Module, noisy: Tensor, t: Tensor, conditions: dict[str, Tensor]) -> Tensor:
        dtype = self.transformer.dtype
        return model(
            hidden_states=noisy.to(dtype),
            encoder_hidden_states=conditions["prompt_embeds"].to(noisy.device, dtype),
            timestep=(1 - t.float()) * self.pipeline.scheduler.config.num_train_timesteps,
            encoder_attention_mask=conditions["prompt_attention_mask"].to(noisy.device),
            return_dict=False,
        )[0]
