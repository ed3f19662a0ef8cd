"""HunyuanVideo (Kong et al., arXiv:2412.03603) and HunyuanVideo 1.5: rectified flow with two text encoders."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from halo_fast.families.pipeline import PipelineFamily, count_tokens

__all__ = ["HunyuanVideo", "HunyuanVideo15"]


class HunyuanVideo(PipelineFamily):
    """diffusers.HunyuanVideoPipeline; the model was distilled to take the guidance scale as an input.

    In training it takes `guidance`, by default the pipeline's. It should be the scale at which the clips were sampled,
    because preferences are learned on that distribution.
    """

    guidance = 6.0

    def __init__(self, pipeline: Any, network: str | None = None) -> None:
        super().__init__(pipeline, network)
        self.max_length = {"prompt_embeds": 256, "prompt_attention_mask": 256}

    def encode_prompt(self, prompt: str) -> dict[str, Tensor]:
        embeds, pooled, mask = self.pipeline.encode_prompt(
            prompt, max_sequence_length=self.max_length["prompt_embeds"], device=self.text_device
        )
        return {
            "prompt_embeds": embeds * mask[..., None],
            "prompt_attention_mask": mask,
            "pooled_prompt_embeds": pooled,
        }

    def blank_conditions(self) -> dict[str, Tensor]:
        length, config = self.text_limit, self.transformer.config
        return self.blank(
            ("prompt_embeds", (length, config.text_embed_dim)), ("prompt_attention_mask", (length,)),
            ("pooled_prompt_embeds", (config.pooled_projection_dim,)),
        )  # fmt: skip

    def token_counts(self, prompt: str) -> list[tuple[int, int]]:
        from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE as TEMPLATE

        # the first encoder sees an instruction around the prompt, which has room of its own in front
        first = count_tokens(self.pipeline.tokenizer, TEMPLATE["template"].format(prompt))
        return [
            (first, self.max_length["prompt_embeds"] + TEMPLATE["crop_start"]),
            (count_tokens(self.pipeline.tokenizer_2, prompt), 77),
        ]

    def passes(self, guidance_scale: float) -> int:
        return 1

    def set_conditions(self, guidance_scale: float, frame_rate: float) -> None:
        self.guidance = guidance_scale

    def pipeline_arguments(self, conditions: dict[str, Tensor], guidance_scale: float) -> dict[str, Any]:
        return conditions | {"guidance_scale": guidance_scale}

    def predict(self, model: nn.Module, noisy: Tensor, t: Tensor, conditions: dict[str, Tensor]) -> Tensor:
        dtype = self.transformer.dtype
        count = self.pipeline.scheduler.config.num_train_timesteps
        return model(
            hidden_states=noisy.to(dtype),
            timestep=t.float() * count,
            encoder_hidden_states=conditions["prompt_embeds"].to(noisy.device, dtype),
            encoder_attention_mask=conditions["prompt_attention_mask"].to(noisy.device, dtype),
            pooled_projections=conditions["pooled_prompt_embeds"].to(noisy.device, dtype),
            guidance=torch.full_like(t, self.guidance * count, dtype=dtype),
            return_dict=False,
        )[0]


class HunyuanVideo15(PipelineFamily):
    """diffusers.HunyuanVideo15Pipeline; latents of the image to start from are appended, all zero for text to video."""

    def __init__(self, pipeline: Any, network: str | None = None) -> None:
        super().__init__(pipeline, network)
        first, second = pipeline.tokenizer_max_length, pipeline.tokenizer_2_max_length
        self.max_length = {
            "prompt_embeds": first, "prompt_embeds_mask": first,
            "prompt_embeds_2": second, "prompt_embeds_mask_2": second,
        }  # fmt: skip

    @property
    def channels(self) -> int:
        return self.pipeline.num_channels_latents

    def encode_prompt(self, prompt: str) -> dict[str, Tensor]:
        embeds, mask, glyphs, glyph_mask = self.pipeline.encode_prompt(prompt, device=self.text_device)
        return {
            "prompt_embeds": embeds * mask[..., None], "prompt_embeds_mask": mask,
            "prompt_embeds_2": glyphs * glyph_mask[..., None], "prompt_embeds_mask_2": glyph_mask,
        }  # fmt: skip

    def blank_conditions(self) -> dict[str, Tensor]:
        first, second = self.max_length["prompt_embeds"], self.max_length["prompt_embeds_2"]
        config = self.transformer.config
        return self.blank(
            ("prompt_embeds", (first, config.text_embed_dim)), ("prompt_embeds_mask", (first,)),
            ("prompt_embeds_2", (second, config.text_embed_2_dim)), ("prompt_embeds_mask_2", (second,)),
        )  # fmt: skip

    def token_counts(self, prompt: str) -> list[tuple[int, int]]:
        from diffusers.pipelines.hunyuan_video1_5.pipeline_hunyuan_video1_5 import (
            extract_glyph_texts,
            format_text_input,
        )

        pipeline = self.pipeline
        chat = pipeline.tokenizer.apply_chat_template(
            format_text_input([prompt], pipeline.system_message), add_generation_prompt=True, tokenize=True,
            return_dict=True,
        )["input_ids"][0]  # fmt: skip
        # the second encoder sees what stands in quotes
        glyphs = extract_glyph_texts(prompt)
        return [
            (len(chat), self.max_length["prompt_embeds"] + pipeline.prompt_template_encode_start_idx),
            (count_tokens(pipeline.tokenizer_2, glyphs) if glyphs else 0, self.max_length["prompt_embeds_2"]),
        ]

    def pipeline_arguments(self, conditions: dict[str, Tensor], guidance_scale: float) -> dict[str, Any]:
        # the scale belongs to the pipeline's guider, not to the call
        self.pipeline.guider = self.pipeline.guider.new(guidance_scale=guidance_scale)
        arguments = super().pipeline_arguments(conditions, guidance_scale)
        del arguments["guidance_scale"]
        return arguments

    def load_lora(self, lora: Mapping[str, Tensor]) -> None:
        # the pipeline has no load_lora_weights in diffusers
        self.transformer.load_lora_adapter(dict(lora), prefix=self.lora_prefix)

    def predict(self, model: nn.Module, noisy: Tensor, t: Tensor, conditions: dict[str, Tensor]) -> Tensor:
        dtype, pipeline = self.transformer.dtype, self.pipeline
        given = {name: value.to(noisy.device, dtype) for name, value in conditions.items()}
        image = noisy.new_zeros(len(noisy), pipeline.vision_num_semantic_tokens, pipeline.vision_states_dim)
        first_frame = noisy.new_zeros(len(noisy), self.channels + 1, *noisy.shape[2:])
        return model(
            hidden_states=torch.cat([noisy, first_frame], dim=1).to(dtype),
            image_embeds=image.to(dtype),
            # the network takes the time in its own precision only; its pipeline rounds it likewise
            timestep=(t.float() * pipeline.scheduler.config.num_train_timesteps).to(dtype),
            encoder_hidden_states=given["prompt_embeds"],
            encoder_attention_mask=given["prompt_embeds_mask"],
            encoder_hidden_states_2=given["prompt_embeds_2"],
            encoder_attention_mask_2=given["prompt_embeds_mask_2"],
            return_dict=False,
        )[0]
