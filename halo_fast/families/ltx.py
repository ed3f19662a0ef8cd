"""LTX-Video and LTX-2 (HaCohen et al., arXiv:2501.00103, arXiv:2601.03233): rectified flow on few, wide tokens.

The loss sees the tokens as a video.
"""

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from halo_fast.errors import UserError
from halo_fast.families.base import shift_logarithm, shift_times
from halo_fast.families.image import ImageToVideo
from halo_fast.families.pipeline import MaskedPrompts, replaced

__all__ = ["LTX", "LTX2", "LTXImageToVideo"]


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
        tokens = math.prod(self.latent_size(shape)) if shape is not None else None
        return shift_times(u, math.exp(shift_logarithm(tokens, config)))

    def pack(self, latents: Tensor) -> Tensor:
        return latents.flatten(2).transpose(1, 2)

    def unpack(self, latents: Tensor, size: Sequence[int]) -> Tensor:
        return latents.transpose(1, 2).unflatten(2, tuple(size))

    def network_inputs(self, noisy: Tensor, t: Tensor, conditions: dict[str, Tensor]) -> dict[str, Any]:
        """The network's arguments."""
        dtype = self.transformer.dtype
        frames, height, width = self.latent_size(noisy.shape)
        time, space = self.compression
        return {
            "hidden_states": self.pack(noisy.to(dtype)),
            "encoder_hidden_states": conditions["prompt_embeds"].to(noisy.device, dtype),
            "timestep": t.float() * self.pipeline.scheduler.config.num_train_timesteps,
            "encoder_attention_mask": conditions["prompt_attention_mask"].to(noisy.device),
            "num_frames": frames,
            "height": height,
            "width": width,
            "rope_interpolation_scale": (time / self.frame_rate, space, space),
        }

    def predict(self, model: nn.Module, noisy: Tensor, t: Tensor, conditions: dict[str, Tensor]) -> Tensor:
        tokens = model(**self.network_inputs(noisy, t, conditions), return_dict=False)[0]
        return self.unpack(tokens, self.latent_size(noisy.shape))


class LTXImageToVideo(ImageToVideo, LTX):
    """diffusers.LTXImageToVideoPipeline: the first frame's tokens are clean, and their time is 0."""

    def network_inputs(self, noisy: Tensor, t: Tensor, conditions: dict[str, Tensor]) -> dict[str, Any]:
        inputs = super().network_inputs(self.begun(noisy, conditions), t, conditions)
        return inputs | {"timestep": self.token_times(inputs["timestep"], self.latent_size(noisy.shape))}


class LTX2(LTX):
    """diffusers.LTX2Pipeline, whose network makes sound beside the video; the video alone is trained.

    The sound reaches the video through one cross-attention of each block. Training switches that off, as the model's
    own trainer does for videos without sound, and the LoRA is on layers of the video alone. Sampling is the pipeline's
    with sound, which begins as noise that the video's noise determines; the sound is not kept.

    A condition is what the connectors make of a text, for the video and then for the sound: the text encoder's states
    are fifty times as large.
    """

    lora_targets = tuple(f"{name}.{layer}" for name in ("attn1", "attn2") for layer in LTX.lora_targets)
    frame_rate = 24
    enterable = False

    def __init__(self, pipeline: Any, network: str | None = None) -> None:
        super().__init__(pipeline, network)
        # learned registers stand in the place of padding, so nothing can be trimmed
        self.max_length = {}

    @property
    def text_limit(self) -> int:
        return min(int(self.pipeline.tokenizer_max_length), 1024)

    @property
    def text_parts(self) -> list[Any]:
        return [*super().text_parts, self.pipeline.connectors]

    @property
    def _widths(self) -> tuple[int, int]:
        """Width of a text's states for the video and for the sound."""
        config = self.pipeline.connectors.config
        video, sound = (
            config[f"{name}_connector_num_attention_heads"] * config[f"{name}_connector_attention_head_dim"]
            for name in ("video", "audio")
        )
        return video, sound

    def encode_prompt(self, prompt: str) -> dict[str, Tensor]:
        pipeline = self.pipeline
        embeds, mask, *_ = pipeline.encode_prompt(
            prompt, do_classifier_free_guidance=False, max_sequence_length=self.text_limit, device=self.text_device
        )
        *embeds, mask = pipeline.connectors(embeds, mask, padding_side=pipeline.tokenizer.padding_side)
        return {"prompt_embeds": torch.cat(embeds, dim=-1), "prompt_attention_mask": mask}

    def blank_conditions(self) -> dict[str, Tensor]:
        length = self.text_limit
        return self.blank(("prompt_embeds", (length, sum(self._widths))), ("prompt_attention_mask", (length,)))

    def token_counts(self, prompt: str) -> list[tuple[int, int]]:
        return super().token_counts(prompt.strip())

    def passes(self, guidance_scale: float) -> int:
        # without prompt, with self-attention skipped in some blocks, and without the other stream
        return 4 if guidance_scale > 1 else 1

    def pipeline_arguments(self, conditions: dict[str, Tensor], guidance_scale: float) -> dict[str, Any]:
        given = super().pipeline_arguments(conditions, guidance_scale)
        if guidance_scale <= 1:
            scales = {"guidance_scale": 1.0, "stg_scale": 0.0, "modality_scale": 1.0, "guidance_rescale": 0.0}
            given |= scales | {f"audio_{name}": scale for name, scale in scales.items()}
        return given

    def beginning(self, noise: Tensor) -> dict[str, Any]:
        seeds = [hashlib.sha256(clip.cpu().contiguous().numpy().tobytes()).digest()[:4] for clip in noise]
        generators = [torch.Generator().manual_seed(int.from_bytes(seed, "big")) for seed in seeds]
        return super().beginning(noise) | {"generator": generators}

    def ending(self, latents: Tensor, size: Sequence[int]) -> Tensor:
        mean, std = self.statistics(latents)
        return (latents - mean) / std

    @torch.no_grad()
    def sample(self, conditions: Sequence[dict[str, Tensor]], noise: Tensor, **arguments: Any) -> Tensor:
        connect = self.pipeline.connectors.forward

        def split(embeds: Tensor, mask: Tensor, **others: Any) -> tuple[Tensor, ...]:
            if embeds.shape[-1] != sum(self._widths):  # the negative prompt, which is encoded meanwhile
                connected: tuple[Tensor, ...] = connect(embeds, mask, **others)
                return connected
            return *embeds.to(self.transformer.dtype).split(self._widths, dim=-1), mask

        # the conditions are the connectors' already
        with replaced(self.pipeline.connectors, forward=split):
            return super().sample(conditions, noise, **arguments)

    def predict(self, model: nn.Module, noisy: Tensor, t: Tensor, conditions: dict[str, Tensor]) -> Tensor:
        dtype, device = self.transformer.dtype, noisy.device
        size = frames, height, width = self.latent_size(noisy.shape)
        text, of_sound = conditions["prompt_embeds"].to(device, dtype).split(self._widths, dim=-1)
        mask = conditions["prompt_attention_mask"].to(device)
        time = t.float() * self.pipeline.scheduler.config.num_train_timesteps
        tokens = model(
            hidden_states=self.pack(noisy.to(dtype)),
            encoder_hidden_states=text,
            encoder_attention_mask=mask,
            timestep=time,
            sigma=time,
            num_frames=frames,
            height=height,
            width=width,
            fps=self.frame_rate,
            # the network takes no video alone: one token of silence, which the video does not see
            isolate_modalities=True,
            audio_hidden_states=noisy.new_zeros(len(noisy), 1, self.transformer.config.audio_in_channels, dtype=dtype),
            audio_encoder_hidden_states=of_sound[:, :1],
            audio_encoder_attention_mask=mask[:, :1],
            audio_num_frames=1,
            return_dict=False,
        )[0]
        return self.unpack(tokens, size)
