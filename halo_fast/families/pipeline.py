"""Families of diffusers pipelines: prompts, autoencoder and sampling, and the noise of DDPM."""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from halo_fast.errors import UserError, check_finite
from halo_fast.families.base import Family
from halo_fast.patches import LatentFactors

__all__ = ["MaskedPrompts", "PipelineFamily", "VariancePreserving", "count_tokens", "replaced"]


_CURE = "load the model in another precision"


def _numbered(clips: Tensor) -> list[str]:
    return [f"clip {index} of {len(clips)}" for index in range(len(clips))]


def count_tokens(tokenizer: Any, text: str) -> int:
    """Tokens of a text, uncut, with the marks that the tokenizer adds."""
    return len(tokenizer(text, truncation=False, verbose=False).input_ids)


@contextmanager
def replaced(part: Any, **methods: Callable[..., Any]) -> Iterator[None]:
    """Let an object have other methods inside the block, as a context manager."""
    before = {name: part.__dict__[name] for name in methods if name in part.__dict__}
    part.__dict__.update(methods)
    try:
        yield
    finally:
        for name in methods:
            part.__dict__.pop(name, None)
        part.__dict__.update(before)


class PipelineFamily(Family):
    """A diffusers pipeline; its conditions have the names of the pipeline's arguments.

    `max_length` is the number of tokens to which the pipeline pads a condition; others are never padded. Beyond a
    prompt's true length a condition must be zero, or hidden from the model by a mask.
    """

    max_length: dict[str, int] = {}
    # what guidance leads away from
    negative_prompt: str = ""
    # whether the latents of a step are all that its sampler goes on from
    enterable: bool = True

    @property
    def transformer(self) -> Any:
        """The network that is trained: a model of diffusers, with a config, a device and a dtype."""
        return super().transformer

    @property
    def compression(self) -> tuple[int, int]:
        """Frames, and pixels to a side, of one latent position."""
        return self.pipeline.vae_scale_factor_temporal, self.pipeline.vae_scale_factor_spatial

    @property
    def frame_step(self) -> int:
        """Clips have a multiple of this many frames, plus one."""
        return self.compression[0]

    @property
    def lengths(self) -> str:
        """The lengths of clips, in words."""
        return f"{self.frame_step}k+1 frames"

    @property
    def side(self) -> int:
        """What the sides of a clip must be divisible by."""
        return 16

    @property
    def channels(self) -> int:
        """Channels of the latents."""
        return int(self.transformer.config.in_channels)

    def latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, ...]:
        time, space = self.compression
        fit = self.closest_format(num_frames, height, width)
        if fit != (num_frames, height, width):
            raise UserError(
                f"generate: this model makes {self.lengths} with sides divisible by {self.side}, "
                f"got num_frames {num_frames}, height {height}, width {width}; "
                f"the next that fit are {fit[0]}, {fit[1]} and {fit[2]}"
            )
        frames = (num_frames - 1) // time + 1
        first = (frames, self.channels) if self.layout == "BFCHW" else (self.channels, frames)
        self.check_size((frames, height // space, width // space))
        return *first, height // space, width // space

    def latent_factors(self, num_frames: int, height: int, width: int) -> LatentFactors:
        time, space = self.compression
        frames = self.latent_size(self.latent_shape(num_frames, height, width))[0]
        return LatentFactors(space, time, True, frames - (num_frames - 1) // time - 1)

    def closest_format(self, num_frames: int, height: int, width: int) -> tuple[int, int, int]:
        frames, side = (num_frames - 1) // self.frame_step * self.frame_step + 1, self.side
        return frames, max(height // side, 1) * side, max(width // side, 1) * side

    @property
    def text_device(self) -> torch.device:
        """The device of the text encoders, which in training is not the pipeline's own."""
        return self.pipeline.text_encoder.device

    @abstractmethod
    def encode_prompt(self, prompt: str) -> dict[str, Tensor]:
        """Conditions of one prompt, [1, ...] each, padded with zeros as the pipeline pads them; on `text_device`."""

    def blank(self, *shapes: tuple[str, tuple[int, ...]]) -> dict[str, Tensor]:
        """Conditions of these shapes in the text encoder's precision, on the meta device."""
        dtype = self.pipeline.text_encoder.dtype
        return {name: torch.empty(shape, dtype=dtype, device="meta") for name, shape in shapes}

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> list[dict[str, Tensor]]:
        encoded = [
            {name: self._trim(name, value[0]).cpu().clone() for name, value in self.encode_prompt(prompt).items()}
            for prompt in prompts
        ]
        for prompt, conditions in zip(prompts, encoded, strict=True):
            for name, value in conditions.items():
                check_finite(value[None], [f"prompt {prompt!r}"], f"{name} of the text encoder", _CURE)
        return encoded

    def cut_prompts(self, prompts: Sequence[str]) -> list[str]:
        return [prompt for prompt in prompts if any(count > limit for count, limit in self.token_counts(prompt))]

    @property
    def text_limit(self) -> int:
        """Most tokens of a prompt that the text encoder sees, marks of beginning and end included."""
        return self.max_length["prompt_embeds"]

    def token_counts(self, prompt: str) -> list[tuple[int, int]]:
        """Tokens of a prompt and the most that are seen, for each text encoder."""
        return [(count_tokens(self.pipeline.tokenizer, prompt), self.text_limit)]

    def _trim(self, name: str, value: Tensor) -> Tensor:
        if name not in self.max_length:
            return value
        positions = torch.arange(1, len(value) + 1, device=value.device)
        return value[: int((value.view(len(value), -1).any(dim=1) * positions).max())]

    def stack(self, conditions: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        return {
            name: torch.stack([self._pad(name, condition[name]) for condition in conditions]) for name in conditions[0]
        }

    def _pad(self, name: str, value: Tensor) -> Tensor:
        missing = self.max_length.get(name, len(value)) - len(value)
        return pad(value, (0, 0) * (value.ndim - 1) + (0, missing))

    def statistics(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and scale of raw latents [N, C, F, H, W], by which model space is (raw - mean) / scale."""
        config = self.pipeline.vae.config
        mean = latents.new_tensor(config.get("latents_mean") or [0.0])
        std = latents.new_tensor(config.get("latents_std") or [1.0]) / config.get("scaling_factor", 1.0)
        return mean.view(1, -1, 1, 1, 1), std.view(1, -1, 1, 1, 1)

    def encode_clip(self, pixels: Tensor) -> Tensor:
        """Raw latents [1, C, F, H, W] of pixels [1, 3, F, H, W] in [-1, 1]."""
        return self.pipeline.vae.encode(pixels).latent_dist.mode()

    def decode_clip(self, latents: Tensor) -> Tensor:
        """Pixels [1, 3, F, H, W] in [-1, 1] of raw latents [1, C, F, H, W]."""
        return self.pipeline.vae.decode(latents).sample

    @torch.no_grad()
    def encode(self, videos: Tensor) -> Tensor:
        # autoencoders drop frames and pixels that do not fit
        self.latent_shape(videos.shape[1], videos.shape[2], videos.shape[3])
        return self.encode_pixels(self.pixels(videos))

    def pixels(self, videos: Tensor) -> Tensor:
        """Videos uint8 [N, F, H, W, 3] as the autoencoder takes them, [N, 3, F, H, W] in [-1, 1]."""
        vae = self.pipeline.vae
        return videos.permute(0, 4, 1, 2, 3).to(vae.device, vae.dtype) / 127.5 - 1

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """Latents in model space of `pixels`."""
        latents = torch.cat([self.encode_clip(clip) for clip in pixels.split(1)]).float()
        check_finite(latents, _numbered(latents), "latents of the autoencoder", _CURE)
        mean, std = self.statistics(latents)
        return self._layout((latents - mean) / std).contiguous()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        vae = self.pipeline.vae
        latents = self._layout(latents)
        mean, std = self.statistics(latents)
        latents = (latents * std + mean).to(vae.device, vae.dtype)
        # one clip at a time: memory is bounded, and pixels do not depend on the batch
        pixels = torch.cat([self.decode_clip(clip) for clip in latents.split(1)]).float()
        check_finite(pixels, _numbered(pixels), "pixels of the autoencoder", _CURE)
        return ((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 4, 1).cpu()

    def _layout(self, latents: Tensor) -> Tensor:
        return latents.transpose(1, 2) if self.layout == "BFCHW" else latents

    def negative_conditions(self) -> dict[str, Tensor]:
        """A batch of one: the conditions of the negative prompt."""
        return self.stack(self.encode_prompts([self.negative_prompt]))

    def pipeline_arguments(self, conditions: dict[str, Tensor], guidance_scale: float) -> dict[str, Any]:
        """The pipeline's arguments for a batch of conditions; guidance is relative to the negative prompt."""
        if guidance_scale <= 1:
            return conditions | {"guidance_scale": guidance_scale}
        negative, count = self.negative_conditions(), len(next(iter(conditions.values())))
        expanded = {f"negative_{name}": value.expand(count, *value.shape[1:]) for name, value in negative.items()}
        return conditions | expanded | {"guidance_scale": guidance_scale}

    def pack(self, latents: Tensor) -> Tensor:
        """Latents in the pipeline's form."""
        return latents

    def unpack(self, latents: Tensor, size: Sequence[int]) -> Tensor:
        """The inverse of `pack` for latents of `size` frames, height and width."""
        return latents

    def beginning(self, noise: Tensor) -> dict[str, Any]:
        """The pipeline's arguments for the noise from which it samples."""
        return {"latents": self.pack(noise)}

    def ending(self, latents: Tensor, size: Sequence[int]) -> Tensor:
        """Latents in model space of those that the pipeline gives."""
        return self.unpack(latents, size)

    def size_arguments(self, frames: int, height: int, width: int) -> dict[str, Any]:
        """The pipeline's arguments for a clip's size."""
        return {"num_frames": frames, "height": height, "width": width}

    def sampler_times(self) -> Tensor:
        """Noise levels t in [0, 1] before each step of the schedule that was last set, and after the last step."""
        return self.pipeline.scheduler.sigmas.float().cpu()

    def clean(self, noisy: Tensor, output: Tensor, t: Tensor) -> Tensor:
        """x_0 of x_t and the network's output at times t [N]; the inverse of `target`."""
        return noisy - t.view(-1, *[1] * (noisy.ndim - 1)) * output

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
        """Latents sampled from the given noise by the diffusers pipeline itself; see `Family.sample`."""
        device = self.transformer.device
        arguments = {
            name: value.to(device) if isinstance(value, Tensor) else value
            for name, value in self.pipeline_arguments(self.stack(conditions), guidance_scale).items()
        }
        latents = self.pipeline(
            **arguments,
            num_inference_steps=num_inference_steps,
            output_type="latent",
            **self.beginning(noise.to(device)),
            **self.size_arguments(*video_size),
        ).frames
        return self.ending(latents.float(), self.latent_size(noise.shape))


class MaskedPrompts(PipelineFamily):
    """A pipeline with one text encoder, which pads to `tokens` tokens; a mask hides the padding from the model."""

    tokens = 256

    def __init__(self, pipeline: Any, network: str | None = None) -> None:
        super().__init__(pipeline, network)
        # tokenizers without a limit report 1e30
        length = min(pipeline.tokenizer.model_max_length, self.tokens)
        self.max_length = {"prompt_embeds": length, "prompt_attention_mask": length}

    def blank_conditions(self) -> dict[str, Tensor]:
        length, config = self.text_limit, self.transformer.config
        width = config.get("caption_channels") or config.text_embed_dim
        return self.blank(("prompt_embeds", (length, width)), ("prompt_attention_mask", (length,)))

    def encode_prompt(self, prompt: str) -> dict[str, Tensor]:
        embeds, mask, *_ = self.pipeline.encode_prompt(
            prompt, do_classifier_free_guidance=False, max_sequence_length=self.max_length["prompt_embeds"],
            device=self.text_device,
        )  # fmt: skip
        return {"prompt_embeds": embeds * mask[..., None], "prompt_attention_mask": mask}


class VariancePreserving(PipelineFamily):
    """The noise of DDPM (Ho et al., arXiv:2006.11239): x_t = a x_0 + s eps, a^2 = abar, s^2 = 1 - abar.

    t = k / T stands for the scheduler's step k of T. The target is eps, a eps - s x_0 ("v", Salimans & Ho,
    arXiv:2202.00512) or x_0, as the scheduler's prediction_type says.
    """

    def steps(self, t: Tensor) -> Tensor:
        """The scheduler's steps of times t, int64."""
        count = self.pipeline.scheduler.config.num_train_timesteps
        return (t.double() * count).round().long().clamp(0, count - 1)

    def timesteps(self, u: Tensor, shape: Sequence[int] | None = None) -> Tensor:
        count = self.pipeline.scheduler.config.num_train_timesteps
        return (u * count).floor() / count

    def pack(self, latents: Tensor) -> Tensor:
        # these pipelines pass the latents to the network unchanged
        return latents.to(self.transformer.dtype)

    def _scales(self, latents: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        kept = self.pipeline.scheduler.alphas_cumprod.to(latents)[self.steps(t)]
        kept = kept.view(-1, *[1] * (latents.ndim - 1))
        return kept.sqrt(), (1 - kept).sqrt()

    def add_noise(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        a, s = self._scales(latents, t)
        return a * latents + s * noise

    def target(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        a, s = self._scales(latents, t)
        kind = self.pipeline.scheduler.config.prediction_type
        return {"epsilon": noise, "v_prediction": a * noise - s * latents, "sample": latents}[kind]

    def sampler_times(self) -> Tensor:
        scheduler = self.pipeline.scheduler
        times = scheduler.timesteps.float().cpu() / scheduler.config.num_train_timesteps
        return torch.cat([times, times.new_zeros(1)])

    def clean(self, noisy: Tensor, output: Tensor, t: Tensor) -> Tensor:
        a, s = self._scales(noisy, t)
        kind = self.pipeline.scheduler.config.prediction_type
        return {"epsilon": (noisy - s * output) / a, "v_prediction": a * noisy - s * output, "sample": output}[kind]
