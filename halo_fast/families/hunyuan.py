"""HunyuanVideo (Kong et al., arXiv:2412.03603) and HunyuanVideo 1.5: rectified flow with two text encoders."""

from collections.abc import Mapping
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from halo_fast.families import attention
from halo_fast.families.base import unwrapped
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


def _empty(kind: Any) -> Any:
    """An instance without attributes, which a copy or a pickle then gets."""
    return kind.__new__(kind)


@cache
def _text_to_video() -> Any:
    """The network of HunyuanVideo 1.5, as diffusers has it but for text to video."""
    from diffusers import HunyuanVideo15Transformer3DModel as Original
    from diffusers.models.modeling_outputs import Transformer2DModelOutput

    class TextToVideo(Original):
        """Without tokens of an image it reads no value; with them it is diffusers' own.

        diffusers gives text to video the tokens of an image, all hidden, and reads the masks to put hidden tokens last.
        Here one token stands for the image, so that each weight has a gradient, and nothing is read to find the order.
        """

        def forward(
            self,
            hidden_states: Tensor,
            timestep: Tensor,
            encoder_hidden_states: Tensor,
            encoder_attention_mask: Tensor,
            *args: Any,
            image_embeds: Tensor | None = None,
            encoder_hidden_states_2: Tensor | None = None,
            encoder_attention_mask_2: Tensor | None = None,
            return_dict: bool = True,
            **others: Any,
        ) -> Any:
            """The arguments and outputs of diffusers' forward; what comes by place beyond these is for that one."""
            second, second_mask = encoder_hidden_states_2, encoder_attention_mask_2
            if image_embeds is not None or args or others or second is None or second_mask is None:
                return super().forward(
                    hidden_states, timestep, encoder_hidden_states, encoder_attention_mask, *args,
                    image_embeds=image_embeds, encoder_hidden_states_2=second, encoder_attention_mask_2=second_mask,
                    return_dict=return_dict, **others,
                )  # fmt: skip
            patch = (self.config.patch_size_t, self.config.patch_size, self.config.patch_size)
            grid = [size // side for size, side in zip(hidden_states.shape[2:], patch, strict=True)]
            angles = self.rope(hidden_states)
            time = self.time_embed(timestep)
            video = self.x_embedder(hidden_states)

            words = self.context_embedder(encoder_hidden_states, timestep, encoder_attention_mask)
            glyphs = self.context_embedder_2(second)
            image = self.image_embedder(words.new_zeros(len(words), 1, self.config.image_embed_dim))
            of_words, of_glyphs, of_image = self.cond_type_embed(torch.arange(3, device=words.device))
            prompt = torch.cat([glyphs + of_glyphs, words + of_words, image + of_image], dim=1)
            seen = torch.cat([second_mask, encoder_attention_mask], dim=1).bool()
            seen = pad(seen, (0, 1), value=False)
            prompt = prompt.masked_fill(~seen[..., None], 0)
            order = torch.argsort(seen, dim=1, descending=True, stable=True)
            prompt = prompt.take_along_dim(order[..., None], dim=1)
            seen = seen.take_along_dim(order, dim=1)

            checkpointed = torch.is_grad_enabled() and self.gradient_checkpointing
            for block in self.transformer_blocks:
                run = partial(self._gradient_checkpointing_func, block) if checkpointed else block
                video, prompt = run(video, prompt, time, seen, angles)

            video = self.proj_out(self.norm_out(video, time))
            # [B, f h w, C p_t p_h p_w] -> [B, C, f p_t, h p_h, w p_w]
            video = video.unflatten(2, (-1, *patch)).unflatten(1, grid).permute(0, 4, 1, 5, 2, 6, 3, 7)
            video = video.flatten(6, 7).flatten(4, 5).flatten(2, 3)
            return Transformer2DModelOutput(sample=video) if return_dict else (video,)

        def __reduce_ex__(self, protocol: Any) -> Any:
            # copies and pickles are diffusers' own networks, which a family changes when it is made
            _, _, *state = super().__reduce_ex__(protocol)
            return _empty, (Original,), *state

    TextToVideo.__name__, TextToVideo.__qualname__ = Original.__name__, Original.__qualname__
    TextToVideo.__module__ = Original.__module__
    return TextToVideo


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
        from diffusers import HunyuanVideo15Transformer3DModel
        from diffusers.models.transformers.transformer_hunyuan_video15 import HunyuanVideo15AttnProcessor2_0

        attention.install(network, HunyuanVideo15AttnProcessor2_0, _rotated)
        # a forward that was wrapped already, for offloading say, stays as it is
        if type(network) is HunyuanVideo15Transformer3DModel and "forward" not in vars(network):
            network.__class__ = _text_to_video()

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

    def unload_lora(self) -> None:
        self.transformer.unload_lora()

    def predict(self, model: nn.Module, noisy: Tensor, t: Tensor, conditions: dict[str, Tensor]) -> Tensor:
        dtype, pipeline = self.transformer.dtype, self.pipeline
        given = {name: value.to(noisy.device, dtype) for name, value in conditions.items()}
        image = None
        if not isinstance(unwrapped(model), _text_to_video()):
            tokens = pipeline.vision_num_semantic_tokens
            image = noisy.new_zeros(len(noisy), tokens, pipeline.vision_states_dim, dtype=dtype)
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
