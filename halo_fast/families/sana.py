"""SANA-Video (Chen et al., arXiv:2509.24695): rectified flow with linear attention."""

import inspect
from typing import Any

from torch import Tensor, nn

from halo_fast.errors import UserError
from halo_fast.families.pipeline import PipelineFamily, count_tokens

__all__ = ["SanaVideo"]


class SanaVideo(PipelineFamily):
    """diffusers.SanaVideoPipeline, with Wan's autoencoder (480p) or LTX-2's (720p).

    The text encoder sees the pipeline's instruction before a prompt, and the negative prompt without it.
    """

    def __init__(self, pipeline: Any, network: str | None = None) -> None:
        super().__init__(pipeline, network)
        self.max_length = {"prompt_embeds": 300, "prompt_attention_mask": 300}
        self.instruction = inspect.signature(pipeline.__call__).parameters["complex_human_instruction"].default
        kind = type(pipeline.vae).__name__
        if kind not in ("AutoencoderKLWan", "AutoencoderKLLTX2Video"):
            raise UserError(
                f"model: SANA-Video's latents are known of AutoencoderKLWan and AutoencoderKLLTX2Video, got {kind}"
            )

    @property
    def side(self) -> int:
        return max(self.compression[1] * self.transformer.config.patch_size[1], 32)

    @property
    def largest(self) -> tuple[int | None, int | None, int | None]:
        config = self.transformer.config
        frames, height, width = (config.rope_max_seq_len * side for side in config.patch_size)
        return frames, height, width

    def statistics(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        if "latents_mean" not in dict(self.pipeline.vae.named_buffers()):
            return super().statistics(latents)
        mean, std = (getattr(self.pipeline.vae, name).to(latents) for name in ("latents_mean", "latents_std"))
        return mean.view(1, -1, 1, 1, 1), std.view(1, -1, 1, 1, 1)

    def encode_prompt(self, prompt: str) -> dict[str, Tensor]:
        return self._encode(prompt, self.instruction)

    def negative_conditions(self) -> dict[str, Tensor]:
        return self._encode(self.negative_prompt, [])

    def _encode(self, prompt: str, instruction: list[str]) -> dict[str, Tensor]:
        embeds, mask, *_ = self.pipeline.encode_prompt(
            prompt, False, device=self.text_device, max_sequence_length=self.text_limit,
            complex_human_instruction=instruction,
        )  # fmt: skip
        return {"prompt_embeds": embeds * mask[..., None], "prompt_attention_mask": mask}

    def blank_conditions(self) -> dict[str, Tensor]:
        width = self.transformer.config.caption_channels
        return self.blank(("prompt_embeds", (self.text_limit, width)), ("prompt_attention_mask", (self.text_limit,)))

    def token_counts(self, prompt: str) -> list[tuple[int, int]]:
        pipeline, instruction = self.pipeline, "\n".join(self.instruction)
        (text,) = pipeline._text_preprocessing(prompt, clean_caption=False)
        # the instruction has room of its own in front, but for two tokens
        room = count_tokens(pipeline.tokenizer, instruction) + self.text_limit - 2
        return [(count_tokens(pipeline.tokenizer, instruction + text), room)]

    def pipeline_arguments(self, conditions: dict[str, Tensor], guidance_scale: float) -> dict[str, Any]:
        # its default is an empty text, beside which no embeddings may be given
        return super().pipeline_arguments(conditions, guidance_scale) | {"negative_prompt": None}

    def size_arguments(self, frames: int, height: int, width: int) -> dict[str, Any]:
        # the pipeline would make a size of its list and then resize the clip
        return {"frames": frames, "height": height, "width": width, "use_resolution_binning": False}

    def predict(self, model: nn.Module, noisy: Tensor, t: Tensor, conditions: dict[str, Tensor]) -> Tensor:
        dtype = self.transformer.dtype
        output = model(
            noisy.to(dtype),
            encoder_hidden_states=conditions["prompt_embeds"].to(noisy.device, dtype),
            timestep=t.float() * self.pipeline.scheduler.config.num_train_timesteps,
            encoder_attention_mask=conditions["prompt_attention_mask"].to(noisy.device),
            return_dict=False,
        )[0]
        return output[:, : self.channels]  # some networks give a variance too
