"""LTX-Video (HaCohen et al., arXiv:2501.00103): rectified flow on few, wide tokens; the loss sees them as a video."""

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from halo_fast.errors import UserError
from halo_fast.families.base import shift_times
from halo_fast.families.pipeline import MaskedPrompts

__all__ = ["LTX"]


class LTX(MaskedPrompts):
    """diffusers.LTXPipeline; the model takes the frame rate as an input, by default the pipeline's."""

    tokens = 128
    frame_rate: float = 25

    def __init__(self, pipeline: Any, network: str | None = None) -> None:
        super().__init__(pipeline, network)
        if (pipeline.transformer.config.patch_size, pipeline.transformer.config.patch_size_t) != (1, 1):
            raise UserError("model: expected an LTX transformer with one latent position a token, as all checkpoints")

    def set_conditions(self, guidance_scale: float, frame_rate: float) -> None:
        self.frame_rate = frame_rate

    def pipeline_arguments(self, conditions: dict[str, Tensor], guidance_scale: float) -> dict[str, Any]:
        return super().pipeline_arguments(conditions, guidance_scale) | {"frame_rate": self.frame_rate}

    @property
    def compression(self) -> tuple[int, int]:
        return self.pipeline.vae_temporal_compression_ratio, self.pipeline.vae_spatial_compression_ratio

    @property
    def side(self) -> int:
        return 32

    def statistics(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        vae = self.pipeline.vae
        mean, std = (value.to(latents).view(1, -1, 1, 1, 1) for value in (vae.latents_mean, vae.latents_std))
        return mean, std / vae.config.scaling_factor

    def decode_clip(self, latents: Tensor) -> Tensor:
        vae = self.pipeline.vae
        # some decoders denoise at a time of their own; at time 0, the pipeline's default, they only decode
        clean = latents.new_zeros(1) if vae.config.timestep_conditioning else None
        return vae.decode(latents, clean).sample

    def timesteps(self, u: Tensor, shape: Sequence[int] | None = None) -> Tensor:
        config = self.pipeline.scheduler.config
        if not config.use_dynamic_shifting:
            return super().timesteps(u)
        # the logarithm of the shift is linear in the number of tokens
        tokens = math.prod(self.latent_size(shape)) if shape is not None else config.base_image_seq_len
        slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
        shift = math.exp(config.base_shift + slope * (tokens - config.base_image_seq_len))
        return shift_times(u, shift)

    def pack(self, latents: Tensor) -> Tensor:
        return latents.flatten(2).transpose(1, 2)

    def unpack(self, latents: Tensor, size: Sequence[int]) -> Tensor:
        return latents.transpose(1, 2).unflatten(2, tuple(size))

    def predict(self, model: nn.Module, noisy: Tensor, t: Tensor, conditions: dict[str, Tensor]) -> Tensor:
        dtype = self.transformer.dtype
        size = frames, height, width = self.latent_size(noisy.shape)
        time, space = self.compression
        tokens = model(
            hidden_states=self.pack(noisy.to(dtype)),
            encoder_hidden_states=conditions["prompt_embeds"].to(noisy.device, dtype),
            timestep=t.float() * self.pipeline.scheduler.config.num_train_timesteps,
            encoder_attention_mask=conditions["prompt_attention_mask"].to(noisy.device),
            num_frames=frames,
            height=height,
            width=width,
            rope_interpolation_scale=(time / self.frame_rate, space, space),
            return_dict=False,
        )[0]
        return self.unpack(tokens, size)
