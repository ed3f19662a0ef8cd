"""Kandinsky 5.0 (Kandinsky Lab, arXiv:2511.14993): rectified flow on latents with channels last, on HunyuanVideo's."""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from halo_fast.families.pipeline import PipelineFamily, count_tokens, replaced

__all__ = ["Kandinsky5"]


class Kandinsky5(PipelineFamily):
    """diffusers.Kandinsky5T2VPipeline; channels for a picture to start from are appended, all zero for text to video.

    The network attends to all of a prompt's tokens and has no mask. So prompts are never padded: those of different
    lengths go through it one by one, as the pipeline takes a single prompt. `stack` then adds their lengths.
    """

    lora_targets = (
        "to_query", "to_key", "to_value", "self_attention.out_layer", "cross_attention.out_layer",
    )  # fmt: skip
    host_conditions = ("lengths",)
    text_limit = 512
    # what the pipeline takes where none is given
    negative_prompt = (
        "Static, 2D cartoon, cartoon, 2d animation, paintings, images, worst quality, low quality, ugly, deformed, "
        "walking backwards"
    )

    @property
    def channels(self) -> int:
        return int(self.transformer.config.in_visual_dim)

    @property
    def side(self) -> int:
        # sparse attention is over squares of eight tokens
        tokens = 8 if self.transformer.config.attention_type == "nabla" else 1
        return self.compression[1] * self.transformer.config.patch_size[1] * tokens

    @property
    def largest(self) -> tuple[int | None, int | None, int | None]:
        sides = self.transformer.config.patch_size
        frames, height, width = (
            count * side for count, side in zip(self.transformer.visual_rope_embeddings.max_pos, sides, strict=True)
        )
        return frames, height, width

    @property
    def text_parts(self) -> list[Any]:
        # the first tokenizer is in a processor of texts and pictures
        return [getattr(part, "tokenizer", part) for part in super().text_parts]

    def encode_prompt(self, prompt: str) -> dict[str, Tensor]:
        embeds, pooled, _ = self.pipeline.encode_prompt(
            prompt, max_sequence_length=self.text_limit, device=self.text_device
        )
        return {"prompt_embeds_qwen": embeds, "prompt_embeds_clip": pooled}

    def blank_conditions(self) -> dict[str, Tensor]:
        config = self.transformer.config
        return self.blank(
            ("prompt_embeds_qwen", (self.text_limit, config.in_text_dim)),
            ("prompt_embeds_clip", (config.in_text_dim2,)),
        )

    def token_counts(self, prompt: str) -> list[tuple[int, int]]:
        from diffusers.pipelines.kandinsky5.pipeline_kandinsky import prompt_clean

        pipeline, prompt = self.pipeline, prompt_clean(prompt)
        tokenizer = getattr(pipeline.tokenizer, "tokenizer", pipeline.tokenizer)
        # the instruction around the prompt has room of its own in front
        first = count_tokens(tokenizer, pipeline.prompt_template.format(prompt))
        return [
            (first, self.text_limit + pipeline.prompt_template_encode_start_idx),
            (count_tokens(pipeline.tokenizer_2, prompt), 77),
        ]

    def stack(self, conditions: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        texts = [condition["prompt_embeds_qwen"] for condition in conditions]
        lengths = [len(text) for text in texts]
        stacked = {
            "prompt_embeds_qwen": torch.stack([pad(text, (0, 0, 0, max(lengths) - len(text))) for text in texts]),
            "prompt_embeds_clip": torch.stack([condition["prompt_embeds_clip"] for condition in conditions]),
        }
        return stacked if len(set(lengths)) == 1 else stacked | {"lengths": torch.tensor(lengths)}

    def pipeline_arguments(self, conditions: dict[str, Tensor], guidance_scale: float) -> dict[str, Any]:
        given = super().pipeline_arguments(conditions, guidance_scale)
        given.pop("lengths", None)
        for sign in ("", "negative_"):
            if f"{sign}prompt_embeds_qwen" in given:
                count, length, _ = given[f"{sign}prompt_embeds_qwen"].shape
                given[f"{sign}prompt_cu_seqlens"] = torch.arange(count + 1, dtype=torch.int32) * length
        return given

    def statistics(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        return latents.new_zeros(1), latents.new_tensor(1 / self.pipeline.vae.config.scaling_factor)

    def pack(self, latents: Tensor) -> Tensor:
        return latents.permute(0, 2, 3, 4, 1)

    def unpack(self, latents: Tensor, size: Sequence[int]) -> Tensor:
        return latents.permute(0, 4, 1, 2, 3)

    def beginning(self, noise: Tensor) -> dict[str, Any]:
        # the pipeline writes into what it is given
        return {"latents": self._with_picture(self.pack(noise)).clone()}

    def _with_picture(self, packed: Tensor) -> Tensor:
        """Packed latents with the channels of a picture to start from and of its mask."""
        return pad(packed, (0, self.channels + 1)) if self.transformer.config.visual_cond else packed

    @torch.no_grad()
    def sample(self, conditions: Sequence[dict[str, Tensor]], noise: Tensor, **arguments: Any) -> Tensor:
        forward = self.transformer.forward

        def each_by_itself(**given: Any) -> Any:
            # `stack` pads with zeros, and no state of the encoder is zero throughout
            lengths = given["encoder_hidden_states"].any(dim=-1).sum(dim=1).tolist()
            if len(set(lengths)) == 1:
                return forward(**given)
            return SimpleNamespace(sample=_by_length(forward, lengths, given | {"return_dict": False}))

        with replaced(self.transformer, forward=each_by_itself):
            return super().sample(conditions, noise, **arguments)

    def predict(self, model: nn.Module, noisy: Tensor, t: Tensor, conditions: dict[str, Tensor]) -> Tensor:
        dtype, device, pipeline = self.transformer.dtype, noisy.device, self.pipeline
        frames, height, width = self.latent_size(noisy.shape)
        text, space = conditions["prompt_embeds_qwen"].to(device, dtype), self.compression[1]
        hidden_states = self._with_picture(self.pack(noisy.to(dtype)))
        given = {
            "hidden_states": hidden_states,
            "encoder_hidden_states": text,
            "pooled_projections": conditions["prompt_embeds_clip"].to(device, dtype),
            # its pipeline rounds the time likewise
            "timestep": (t.float() * pipeline.scheduler.config.num_train_timesteps).to(dtype),
            "visual_rope_pos": [torch.arange(count, device=device) for count in (frames, height // 2, width // 2)],
            "text_rope_pos": torch.arange(text.shape[1], device=device),
            "scale_factor": pipeline._get_scale_factor(height * space, width * space),
            "sparse_params": pipeline.get_sparse_params(hidden_states, device),
            "return_dict": False,
        }
        lengths = conditions.get("lengths")
        output = model(**given) if lengths is None else _by_length(model, lengths.tolist(), given)
        return self.unpack(output, (frames, height, width))


def _by_length(network: Callable[..., Tensor], lengths: Sequence[int], given: dict[str, Any]) -> Tensor:
    """The network's outputs for prompts of these lengths, one after another."""
    of_each = ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep")
    outputs = []
    for index, length in enumerate(lengths):
        one = given | {name: given[name][index : index + 1] for name in of_each}
        one["encoder_hidden_states"] = one["encoder_hidden_states"][:, :length]
        one["text_rope_pos"] = torch.arange(length, device=one["hidden_states"].device)
        outputs.append(network(**one))
    return torch.cat(outputs)
