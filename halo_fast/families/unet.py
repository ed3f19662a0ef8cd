"""The UNet line: image diffusion inflated in time (Wang et al., arXiv:2308.06571; Guo et al., arXiv:2307.04725)."""

import math
from collections.abc import Mapping

from torch import Tensor, nn

from halo_fast.families.pipeline import VariancePreserving

__all__ = ["AnimateDiff", "TextToVideoSD"]


class TextToVideoSD(VariancePreserving):
    """diffusers.TextToVideoSDPipeline: ModelScope and ZeroScope; the autoencoder takes frames one by one."""

    networks = ("unet",)
    lora_prefix = "unet"

    @property
    def compression(self) -> tuple[int, int]:
        return 1, self.pipeline.vae_scale_factor

    @property
    def side(self) -> int:
        return math.lcm(self.pipeline.vae_scale_factor, 8)

    @property
    def text_limit(self) -> int:
        return int(self.pipeline.tokenizer.model_max_length)

    def encode_prompt(self, prompt: str) -> dict[str, Tensor]:
        embeds, _ = self.pipeline.encode_prompt(prompt, self.text_device, 1, False)
        return {"prompt_embeds": embeds}

    def blank_conditions(self) -> dict[str, Tensor]:
        return self.blank(("prompt_embeds", (self.text_limit, self.pipeline.text_encoder.config.hidden_size)))

    def encode_clip(self, pixels: Tensor) -> Tensor:
        return self.pipeline.vae.encode(pixels[0].transpose(0, 1)).latent_dist.mode().transpose(0, 1)[None]

    def decode_clip(self, latents: Tensor) -> Tensor:
        return self.pipeline.vae.decode(latents[0].transpose(0, 1)).sample.transpose(0, 1)[None]

    def load_lora(self, lora: Mapping[str, Tensor]) -> None:
        if hasattr(self.transformer, "load_lora_adapter"):
            return super().load_lora(lora)
        # diffusers no longer loads LoRAs into the UNet of this pipeline; peft does
        from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict

        weights = {name.removeprefix(f"{self.lora_prefix}."): value for name, value in lora.items()}
        layers = {name.rsplit(".lora_", 1)[0] for name in weights}
        rank = next(len(value) for name, value in weights.items() if ".lora_A." in name)
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=sorted(layers)), self.transformer)
        set_peft_model_state_dict(self.transformer, weights)

    def unload_lora(self) -> None:
        if hasattr(self.transformer, "unload_lora"):
            return super().unload_lora()
        from diffusers.utils import recurse_remove_peft_layers

        recurse_remove_peft_layers(self.transformer)

    def predict(self, model: nn.Module, noisy: Tensor, t: Tensor, conditions: dict[str, Tensor]) -> Tensor:
        dtype = self.transformer.dtype
        return model(
            noisy.to(dtype),
            self.steps(t),
            encoder_hidden_states=self.embeds(conditions, noisy).to(noisy.device, dtype),
            return_dict=False,
        )[0]

    def embeds(self, conditions: dict[str, Tensor], noisy: Tensor) -> Tensor:
        """The prompt embeddings in the network's form."""
        return conditions["prompt_embeds"]


class AnimateDiff(TextToVideoSD):
    """diffusers.AnimateDiffPipeline: Stable Diffusion 1.5 with a motion adapter, which is trained with it."""

    @property
    def largest(self) -> tuple[int | None, int | None, int | None]:
        # the motion modules have a place in time for each frame
        return int(self.transformer.config.motion_max_seq_length), None, None

    def embeds(self, conditions: dict[str, Tensor], noisy: Tensor) -> Tensor:
        return conditions["prompt_embeds"].repeat_interleave(noisy.shape[2], dim=0)
