"""HunyuanVideo (Kong et al., arXiv:2412.03603) and HunyuanVideo 1.5: rectified flow with two text encoders."""

from collections.abc import Mapping
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from halo_fast.families import attention
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


def _rotated(part: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    from diffusers.models.embeddings import apply_rotary_emb

    return apply_rotary_emb(part, angles, sequence_dim=1)


def _forward(
    network: Any,
    hidden_states: Tensor,
    timestep: Tensor,
    encoder_hidden_states: Tensor,
    encoder_attention_mask: Tensor,
    *,
    image_embeds: Tensor | None = None,
    return_dict: bool = True,
    **named: Any,
) -> Any:
    """The network of HunyuanVideo 1.5 for text to video; with tokens of an image it is run as diffusers has it.

    diffusers gives text to video the tokens of an image, all hidden, and reads the masks to put hidden tokens last.
    Here one token stands for the image, so that each weight has a gradient, and nothing is read to find the order.
    """
    if image_embeds is not None:
        return type(network).forward(
            network, hidden_states, timestep, encoder_hidden_states, encoder_attention_mask,
            image_embeds=image_embeds, return_dict=return_dict, **named,
        )  # fmt: skip
    patch = (network.config.patch_size_t, network.config.patch_size, network.config.patch_size)
    grid = [size // side for size, side in zip(hidden_states.shape[2:], patch, strict=True)]
    angles = network.rope(hidden_states)
    time = network.time_embed(timestep)

    words = network.context_embedder(encoder_hidden_states, timestep, encoder_attention_mask)
    glyphs = network.context_embedder_2(named["encoder_hidden_states_2"])
    image = network.image_embedder(words.new_zeros(len(words), 1, network.config.image_embed_dim))
    of_words, of_glyphs, of_image = network.cond_type_embed(torch.arange(3, device=words.device))
    prompt = torch.cat([glyphs + of_glyphs, words + of_words, image + of_image], dim=1)
    seen = torch.cat([named["encoder_attention_mask_2"], encoder_attention_mask], dim=1).bool()
    seen = pad(seen, (0, 1), value=False)
    prompt = prompt.masked_fill(~seen[..., None], 0)
    order = torch.argsort(seen, dim=1, descending=True, stable=True)
    prompt = prompt.take_along_dim(order[..., None], dim=1)
    seen = seen.take_along_dim(order, dim=1)

    video = network.x_embedder(hidden_states)
    checkpointed = torch.is_grad_enabled() and network.gradient_checkpointing
    for block in network.transformer_blocks:
        run = partial(network._gradient_checkpointing_func, block) if checkpointed else block
        video, prompt = run(video, prompt, time, seen, angles)

    video = network.proj_out(network.norm_out(video, time))
    # [B, f h w, C p_t p_h p_w] -> [B, C, f p_t, h p_h, w p_w]
    video = video.unflatten(2, (-1, *patch)).unflatten(1, grid).permute(0, 4, 1, 5, 2, 6, 3, 7)
    video = video.flatten(6, 7).flatten(4, 5).flatten(2, 3)
    if not return_dict:
        return (video,)
    from diffusers.models.modeling_outputs import Transformer2DModelOutput

    return Transformer2DModelOutput(sample=video)


class HunyuanVideo15(PipelineFamily):
    """diffusers.HunyuanVideo15Pipeline; latents of the image to start from are appended, all zero for text to video."""

    def __init__(self, pipeline: Any, network: str | None = None) -> None:
        super().__init__(pipeline, network)
        self.adapt(self.transformer)
        first, second = pipeline.tokenizer_max_length, pipeline.tokenizer_2_max_length
        self.max_length = {
            "prompt_embeds": first, "prompt_embeds_mask": first,
            "prompt_embeds_2": second, "prompt_embeds_mask_2": second,
        }  # fmt: skip

    def adapt(self, network: Any) -> None:
        from diffusers.models.transformers.transformer_hunyuan_video15 import HunyuanVideo15AttnProcessor2_0

        attention.install(network, HunyuanVideo15AttnProcessor2_0, _rotated)
        # one that was wrapped already, for offloading say, stays as it is
        if "forward" not in vars(network):
            network.forward = MethodType(_forward, network)
        adapted = getattr(network.forward, "__func__", None) is _forward
        # tokens of an image that the network has to be given, all of them to be hidden
        self.image_tokens = None if adapted else self.pipeline.vision_num_semantic_tokens

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
        image = None
        if self.image_tokens is not None:
            image = noisy.new_zeros(len(noisy), self.image_tokens, pipeline.vision_states_dim, dtype=dtype)
        first_frame = noisy.new_zeros(len(noisy), self.channels + 1, *noisy.shape[2:])
        return model(
            hidden_states=torch.cat([noisy, first_frame], dim=1).to(dtype),
            image_embeds=image,
            # the network takes the time in its own precision only; its pipeline rounds it likewise
            timestep=(t.float() * pipeline.scheduler.config.num_train_timesteps).to(dtype),
            encoder_hidden_states=given["prompt_embeds"],
            encoder_attention_mask=given["prompt_embeds_mask"],
            encoder_hidden_states_2=given["prompt_embeds_2"],
            encoder_attention_mask_2=given["prompt_embeds_mask_2"],
            return_dict=False,
        )[0]
