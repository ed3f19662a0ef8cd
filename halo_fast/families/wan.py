"""Wan 2.1 text-to-video (Wan team, arXiv:2503.20314): rectified flow on latents of a causal video autoencoder."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from halo_fast.families import Family
from halo_fast.runs import UserError

__all__ = ["Wan"]


class Wan(Family):
    """diffusers.WanPipeline with one transformer."""

    pipelines = ("WanPipeline",)

    def __init__(self, pipeline: Any) -> None:
        super().__init__(pipeline)
        if pipeline.transformer_2 is not None or pipeline.config.expand_timesteps:
            raise UserError("model: a Wan pipeline with one transformer is expected, got a Wan 2.2 one; use Wan 2.1")
        # Tokenizers without a limit of their own report 1e30.
        self.max_sequence_length = min(pipeline.tokenizer.model_max_length, 512)

    def latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, ...]:
        time, space = self.pipeline.vae_scale_factor_temporal, self.pipeline.vae_scale_factor_spatial
        step = max(space * self.pipeline.transformer.config.patch_size[1], 16)
        if num_frames % time != 1 or height % step or width % step:
            raise UserError(
                f"generate: this model makes {time}k+1 frames with sides divisible by {step}, "
                f"got num_frames {num_frames}, height {height}, width {width}"
            )
        channels = self.pipeline.transformer.config.in_channels
        return channels, (num_frames - 1) // time + 1, height // space, width // space

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> list[dict[str, Tensor]]:
        conditions = []
        for prompt in prompts:
            embeds = self.pipeline.encode_prompt(
                prompt, do_classifier_free_guidance=False, max_sequence_length=self.max_sequence_length
            )[0][0]
            # The pipeline pads with zeros and the model attends to them, so `stack` restores what is cut here.
            positions = torch.arange(1, len(embeds) + 1, device=embeds.device)
            length = int((embeds.any(dim=1) * positions).max())
            conditions.append({"prompt_embeds": embeds[:length].cpu().clone()})
        return conditions

    def stack(self, conditions: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        embeds = [condition["prompt_embeds"] for condition in conditions]
        return {"prompt_embeds": torch.stack([pad(e, (0, 0, 0, self.max_sequence_length - len(e))) for e in embeds])}

    def _statistics(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        config = self.pipeline.vae.config
        mean, std = latents.new_tensor(config.latents_mean), latents.new_tensor(config.latents_std)
        return mean.view(1, -1, 1, 1, 1), std.view(1, -1, 1, 1, 1)

    @torch.no_grad()
    def encode(self, videos: Tensor) -> Tensor:
        vae = self.pipeline.vae
        pixels = videos.permute(0, 4, 1, 2, 3).to(vae.device, vae.dtype) / 127.5 - 1
        latents = torch.cat([vae.encode(clip).latent_dist.mode() for clip in pixels.split(1)]).float()
        mean, std = self._statistics(latents)
        return (latents - mean) / std

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        vae = self.pipeline.vae
        mean, std = self._statistics(latents)
        latents = (latents * std + mean).to(vae.device, vae.dtype)
        # One clip at a time: bounded memory, and pixels that do not depend on the batch.
        pixels = torch.cat([vae.decode(clip).sample for clip in latents.split(1)]).float()
        return ((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 4, 1).cpu()

    def predict(self, model: nn.Module, noisy: Tensor, t: Tensor, conditions: dict[str, Tensor]) -> Tensor:
        dtype = self.pipeline.transformer.dtype
        # The timestep stays in float32: bfloat16 would round 750 to 752.
        timestep = t.float() * self.pipeline.scheduler.config.num_train_timesteps
        return model(
            hidden_states=noisy.to(dtype),
            timestep=timestep,
            encoder_hidden_states=conditions["prompt_embeds"].to(noisy.device, dtype),
            return_dict=False,
        )[0]

    @torch.no_grad()
    def sample(
        self,
        conditions: Sequence[dict[str, Tensor]],
        noise: Tensor,
        *,
        video_size: tuple[int, int, int],
        num_inference_steps: int,
        guidance_scale: float,
    ) -> Tensor:
        device = self.pipeline.transformer.device
        embeds = self.stack(conditions)["prompt_embeds"].to(device)
        negative = None
        if guidance_scale > 1:
            empty = self.stack(self.encode_prompts([""]))["prompt_embeds"].to(device)
            negative = empty.expand_as(embeds)
        frames, height, width = video_size
        return self.pipeline(
            prompt_embeds=embeds,
            negative_prompt_embeds=negative,
            latents=noise.to(device),
            num_frames=frames,
            height=height,
            width=width,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            output_type="latent",
        ).frames.float()
