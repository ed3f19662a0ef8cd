"""CogVideoX (Yang et al., arXiv:2408.06072): DDPM with v-prediction on latents with frames before channels."""

from typing import Any

import torch
from torch import Tensor, nn

from halo_fast.families.pipeline import VariancePreserving

__all__ = ["CogVideoX"]


class CogVideoX(VariancePreserving):
    """diffusers.CogVideoXPipeline, 1.0 and 1.5; the noise schedule of each checkpoint is in its scheduler.

    The v error is the x_0 error weighted by 1 / (1 - abar), as in the model's own training.
    """

    layout = "BFCHW"

    @property
    def side(self) -> int:
        return self.pipeline.vae_scale_factor_spatial * self.transformer.config.patch_size

    @property
    def frame_step(self) -> int:
        # the autoencoder decodes two latent frames at a time; only odd counts give whole clips
        return 2 * self.compression[0]

    def _padding(self, frames: int) -> int:
        # CogVideoX 1.5 has two latent frames in a token; the pipeline adds a missing one in front
        return -frames % (self.transformer.config.patch_size_t or 1)

    @property
    def largest(self) -> tuple[int | None, int | None, int | None]:
        config = self.transformer.config
        # the rotary embeddings of CogVideoX 1.5 are a part of those of its largest picture
        return (None, config.sample_height, config.sample_width) if config.patch_size_t else (None, None, None)

    def latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, ...]:
        frames, *rest = super().latent_shape(num_frames, height, width)
        return frames + self._padding(frames), *rest

    def encode(self, videos: Tensor) -> Tensor:
        latents = super().encode(videos)
        first = latents[:, :1].expand(-1, self._padding(latents.shape[1]), -1, -1, -1)
        return torch.cat([first, latents], dim=1)

    def decode(self, latents: Tensor) -> Tensor:
        return super().decode(latents[:, self._padding(latents.shape[1] - 1) :])

    @property
    def text_limit(self) -> int:
        return int(self.transformer.config.max_text_seq_length)

    def encode_prompt(self, prompt: str) -> dict[str, Tensor]:
        # the model attends to the embeddings of padding, which are not zero, so nothing can be trimmed
        embeds, _ = self.pipeline.encode_prompt(
            prompt,
            do_classifier_free_guidance=False,
            max_sequence_length=self.text_limit,
            device=self.text_device,
        )
        return {"prompt_embeds": embeds}

    def blank_conditions(self) -> dict[str, Tensor]:
        return self.blank(("prompt_embeds", (self.text_limit, self.transformer.config.text_embed_dim)))

    def _rotary(self, noisy: Tensor) -> tuple[Tensor, Tensor] | None:
        if not self.transformer.config.use_rotary_positional_embeddings:
            return None
        frames, height, width = self.latent_size(noisy.shape)
        space = self.compression[1]
        pipeline: Any = self.pipeline
        return pipeline._prepare_rotary_positional_embeddings(height * space, width * space, frames, noisy.device)

    def predict(self, model: nn.Module, noisy: Tensor, t: Tensor, conditions: dict[str, Tensor]) -> Tensor:
        dtype = self.transformer.dtype
        return model(
            hidden_states=noisy.to(dtype),
            encoder_hidden_states=conditions["prompt_embeds"].to(noisy.device, dtype),
            timestep=self.steps(t),
            image_rotary_emb=self._rotary(noisy),
            return_dict=False,
        )[0]
