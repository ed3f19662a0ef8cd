"""Wan (Wan team, arXiv:2503.20314) and SkyReels-V2: rectified flow on latents of a causal video autoencoder."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from halo_fast.errors import UserError
from halo_fast.families.pipeline import PipelineFamily

__all__ = ["SkyReelsV2", "Wan"]


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
        self.pipeline.load_lora_weights(dict(lora), load_into_transformer_2=self.network == "transformer_2")

    def timesteps(self, u: Tensor, shape: Sequence[int] | None = None) -> Tensor:
        ratio = self.pipeline.config.get("boundary_ratio")
        if ratio is not None and self.pipeline.transformer_2 is not None:
            # the draw at which the shifted time is the boundary
            boundary = ratio / (self.shift - (self.shift - 1) * ratio)
            u = boundary + (1 - boundary) * u if self.network == "transformer" else boundary * u
        return super().timesteps(u)

    def predict(self, model: nn.Module, noisy: Tensor, t: Tensor, conditions: dict[str, Tensor]) -> Tensor:
        dtype = self.transformer.dtype
        # the timestep stays in float32: bfloat16 would round 750 to 752
        timestep = t.float() * self.pipeline.scheduler.config.num_train_timesteps
        if self.pipeline.config.get("expand_timesteps"):
            frames, height, width = self.latent_size(noisy.shape)
            timestep = timestep[:, None].expand(-1, frames * -(-height // 2) * -(-width // 2))
        return model(
            hidden_states=noisy.to(dtype),
            timestep=timestep,
            encoder_hidden_states=conditions["prompt_embeds"].to(noisy.device, dtype),
            return_dict=False,
        )[0]


class SkyReelsV2(Wan):
    """diffusers.SkyReelsV2Pipeline (Chen et al., arXiv:2504.13074): one network of Wan's kind, all frames at one time.

    The pipelines of diffusion forcing, whose frames have times of their own, are others.
    """

    networks = ("transformer",)

    def load_lora(self, lora: Mapping[str, Tensor]) -> None:
        self.pipeline.load_lora_weights(dict(lora))
