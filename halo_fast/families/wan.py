"""Wan (Wan team, arXiv:2503.20314) and SkyReels-V2: rectified flow on latents of a causal video autoencoder."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from halo_fast.errors import UserError
from halo_fast.families.image import ImageToVideo
from halo_fast.families.pipeline import PipelineFamily, replaced

__all__ = ["SkyReelsV2", "Wan", "WanImageToVideo"]


class Wan(PipelineFamily):
    """diffusers.WanPipeline: Wan 2.1, and of Wan 2.2 the A14B (two experts) and the TI2V-5B (a time for every token).

    Of two experts, "transformer" denoises from t = boundary_ratio upwards and "transformer_2" below. One is trained at
    a time, on its own share of the sampler's times. Their LoRAs are two files.
    """

    networks: ClassVar[tuple[str, ...]] = ("transformer", "transformer_2")

    def __init__(self, pipeline: Any, network: str | None = None) -> None:
        super().__init__(pipeline, network)
        if self.network == "transformer_2" and (
            pipeline.transformer_2 is None or pipeline.config.boundary_ratio is None
        ):
            raise UserError("network: transformer_2 is an expert of Wan 2.2 A14B, which this pipeline is not")
        # tokenizers without a limit report 1e30
        self.max_length = {"prompt_embeds": min(pipeline.tokenizer.model_max_length, 512)}

    @property
    def side(self) -> int:
        return max(self.pipeline.vae_scale_factor_spatial * self.transformer.config.patch_size[1], 16)

    @property
    def largest(self) -> tuple[int | None, int | None, int | None]:
        config = self.transformer.config
        frames, height, width = (config.rope_max_seq_len * side for side in config.patch_size)
        return frames, height, width

    def encode_prompt(self, prompt: str) -> dict[str, Tensor]:
        # the model attends to the zeros of the padding, so `stack` restores what is trimmed
        embeds, _ = self.pipeline.encode_prompt(
            prompt, do_classifier_free_guidance=False, max_sequence_length=self.max_length["prompt_embeds"],
            device=self.text_device,
        )  # fmt: skip
        return {"prompt_embeds": embeds}

    def blank_conditions(self) -> dict[str, Tensor]:
        return self.blank(("prompt_embeds", (self.text_limit, self.transformer.config.text_dim)))

    def token_counts(self, prompt: str) -> list[tuple[int, int]]:
        # the pipeline mends broken characters and spaces first
        from diffusers.pipelines.wan.pipeline_wan import prompt_clean

        return super().token_counts(prompt_clean(prompt))

    def load_lora(self, lora: Mapping[str, Tensor]) -> None:
        second = {"load_into_transformer_2": True} if self.network == "transformer_2" else {}
        self.pipeline.load_lora_weights(dict(lora), **second)

    def timesteps(self, u: Tensor, shape: Sequence[int] | None = None) -> Tensor:
        ratio = self.pipeline.config.get("boundary_ratio")
        if ratio is not None and self.pipeline.transformer_2 is not None:
            # the draw at which the shifted time is the boundary
            boundary = ratio / (self.shift - (self.shift - 1) * ratio)
            u = boundary + (1 - boundary) * u if self.network == "transformer" else boundary * u
        return super().timesteps(u)

    @property
    def times_of_tokens(self) -> bool:
        """Whether every token has a time of its own."""
        return bool(self.pipeline.config.get("expand_timesteps"))

    def token_size(self, shape: Sequence[int]) -> tuple[int, int, int]:
        """Frames, rows and columns of the tokens of latents, where tokens have times."""
        frames, height, width = self.latent_size(shape)
        return frames, -(-height // 2), -(-width // 2)

    def token_times(self, time: Tensor, size: Sequence[int]) -> Tensor:
        """Times [N] as those of all tokens, [N, S]; `size` has frames, rows and columns of the tokens."""
        return time[:, None].expand(-1, math.prod(size))

    def network_inputs(self, noisy: Tensor, t: Tensor, conditions: dict[str, Tensor]) -> dict[str, Any]:
        """The network's arguments."""
        dtype = self.transformer.dtype
        # the timestep stays in float32: bfloat16 would round 750 to 752
        timestep = t.float() * self.pipeline.scheduler.config.num_train_timesteps
        if self.times_of_tokens:
            timestep = self.token_times(timestep, self.token_size(noisy.shape))
        return {
            "hidden_states": noisy.to(dtype),
            "timestep": timestep,
            "encoder_hidden_states": conditions["prompt_embeds"].to(noisy.device, dtype),
        }

    def predict(self, model: nn.Module, noisy: Tensor, t: Tensor, conditions: dict[str, Tensor]) -> Tensor:
        output: Tensor = model(**self.network_inputs(noisy, t, conditions), return_dict=False)[0]
        return output


class WanImageToVideo(ImageToVideo, Wan):
    """diffusers.WanImageToVideoPipeline: the picture as channels beside the noise, or as a clean first frame.

    Wan 2.1 and the A14B of Wan 2.2 get channels: a mark of the first frame, and the latents of a clip that is grey
    after it. Wan 2.1 also gets the picture by its image encoder. TI2V-5B, which takes a time for every token, gets the
    clean frame.
    """

    @property
    def image_conditions(self) -> tuple[str, ...]:  # type: ignore[override]
        if self.times_of_tokens:
            return ("first_frame",)
        return ("condition", "image_embeds") if self.transformer.config.image_dim else ("condition",)

    @property
    def image_parts(self) -> list[Any]:
        return [self.vae, self.pipeline.image_encoder]

    @property
    def channels(self) -> int:
        return int(self.pipeline.vae.config.z_dim)

    @torch.no_grad()
    def encode_images(self, images: Tensor, num_frames: int) -> list[dict[str, Tensor]]:
        if self.times_of_tokens:
            return super().encode_images(images, num_frames)
        self.latent_shape(num_frames, *images.shape[1:3])
        first = self.pixels(images[:, None])
        grey = first.new_zeros(*first.shape[:2], num_frames - 1, *first.shape[3:])
        found = [{"condition": latents} for latents in self.encode_pixels(torch.cat([first, grey], dim=2)).cpu()]
        if "image_embeds" in self.image_conditions:
            from PIL import Image

            for image, conditions in zip(images, found, strict=True):
                picture = Image.fromarray(image.cpu().numpy())
                conditions["image_embeds"] = self.pipeline.encode_image(picture, self.vae.device)[0].float().cpu()
        return found

    def begun(self, latents: Tensor, conditions: dict[str, Tensor]) -> Tensor:
        return super().begun(latents, conditions) if self.times_of_tokens else latents

    def beside(self, noisy: Tensor, conditions: dict[str, Tensor]) -> Tensor:
        """The channels beside the noise: the mark of the first frame, and the picture's latents."""
        mark = noisy.new_zeros(len(noisy), self.compression[0], *noisy.shape[2:])
        mark[:, :, 0] = 1
        return torch.cat([mark, conditions["condition"].to(noisy)], dim=1)

    def network_inputs(self, noisy: Tensor, t: Tensor, conditions: dict[str, Tensor]) -> dict[str, Any]:
        inputs = super().network_inputs(self.begun(noisy, conditions), t, conditions)
        if self.times_of_tokens:
            return inputs
        noise = inputs["hidden_states"]
        inputs["hidden_states"] = torch.cat([noise, self.beside(noise, conditions)], dim=1)
        if "image_embeds" in self.image_conditions:
            inputs["encoder_hidden_states_image"] = conditions["image_embeds"].to(noise)
        return inputs

    @torch.no_grad()
    def sample(self, conditions: Sequence[dict[str, Tensor]], noise: Tensor, **arguments: Any) -> Tensor:
        # the pipeline takes one picture a call
        clips = zip(conditions, noise.split(1), strict=True)
        return torch.cat([self._sample_one(condition, one, **arguments) for condition, one in clips])

    def _sample_one(self, condition: dict[str, Tensor], noise: Tensor, **arguments: Any) -> Tensor:
        _, picture = self.parted([condition])

        def prepare_latents(*_: Any) -> tuple[Tensor, ...]:
            latents = noise.to(self.transformer.device)
            if not self.times_of_tokens:
                return latents, self.beside(latents, picture)
            mask = torch.ones_like(latents[:, :1])
            mask[:, :, 0] = 0
            return latents, picture["first_frame"], mask

        # what the pipeline would make of a picture is known
        with replaced(
            self.pipeline, prepare_latents=prepare_latents, encode_image=lambda *_: picture.get("image_embeds")
        ):
            return super().sample([condition], noise, **arguments)

    def beginning(self, noise: Tensor) -> dict[str, Any]:
        height, width = (side * self.compression[1] for side in noise.shape[-2:])
        return {"image": noise.new_zeros(1, 3, height, width)}


class SkyReelsV2(Wan):
    """diffusers.SkyReelsV2Pipeline (Chen et al., arXiv:2504.13074): one network of Wan's kind, all frames at one time.

    The pipelines of diffusion forcing, whose frames have times of their own, are others.
    """

    networks = ("transformer",)
