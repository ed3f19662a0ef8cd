"""Cosmos-Predict 2.5 (NVIDIA, arXiv:2511.00062), text to world: rectified flow on Wan's latents."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from halo_fast.errors import UserError
from halo_fast.families.pipeline import PipelineFamily, replaced

__all__ = ["CosmosPredict25"]


class CosmosPredict25(PipelineFamily):
    """diffusers.Cosmos2_5_PredictBasePipeline; the network takes a time in [0, 1] and a mark for each frame.

    Marked frames are given and the others are to be made; for text to world none is marked. The pipeline's guardrail
    looks at prompts and at decoded clips here too.
    """

    text_limit = 512

    @property
    def negative_prompt(self) -> str:  # type: ignore[override]
        """What the pipeline takes where none is given."""
        from diffusers.pipelines.cosmos.pipeline_cosmos2_5_predict import DEFAULT_NEGATIVE_PROMPT

        return str(DEFAULT_NEGATIVE_PROMPT)

    @property
    def channels(self) -> int:
        # the last one marks the frames that are given
        return int(self.transformer.config.in_channels) - 1

    @property
    def largest(self) -> tuple[int | None, int | None, int | None]:
        frames, height, width = self.transformer.config.max_size
        return frames, height, width

    def encode_prompt(self, prompt: str) -> dict[str, Tensor]:
        if not self.pipeline.safety_checker.check_text_safety(prompt):
            raise UserError(f"prompts: the model's guardrail finds {prompt!r} unsafe; leave it out")
        # the network attends to the padding, whose states are not zero, so nothing can be trimmed
        embeds, _ = self.pipeline.encode_prompt(
            prompt, do_classifier_free_guidance=False, max_sequence_length=self.text_limit, device=self.text_device
        )
        return {"prompt_embeds": embeds}

    def blank_conditions(self) -> dict[str, Tensor]:
        config = self.transformer.config
        width = config.crossattn_proj_in_channels if config.use_crossattn_projection else config.text_embed_dim
        return self.blank(("prompt_embeds", (self.text_limit, width)))

    def token_counts(self, prompt: str) -> list[tuple[int, int]]:
        tokenizer = self.pipeline.tokenizer
        template = tokenizer.apply_chat_template

        def counted(chat: Any, **named: Any) -> Any:
            ids = template(chat, **named | {"truncation": False, "padding": False, "max_length": None})
            raise _Counted(len(ids if isinstance(ids, list) else ids["input_ids"]))

        # only the pipeline knows what it puts around a prompt
        try:
            with replaced(tokenizer, apply_chat_template=counted):
                self.pipeline.encode_prompt(prompt, do_classifier_free_guidance=False, device="cpu")
        except _Counted as count:
            return [(count.args[0], self.text_limit)]
        raise AssertionError("the pipeline asked its tokenizer nothing")

    def decode(self, latents: Tensor) -> Tensor:
        videos = super().decode(latents)
        checked = [self.pipeline.safety_checker.check_video_safety(video.numpy()) for video in videos]
        if any(video is None for video in checked):
            raise UserError("clip: the model's guardrail finds it unsafe; leave its prompt out")
        return torch.stack([torch.as_tensor(video, dtype=torch.uint8) for video in checked])

    def timesteps(self, u: Tensor, shape: Sequence[int] | None = None) -> Tensor:
        scheduler = self.pipeline.scheduler
        if not scheduler.config.get("use_karras_sigmas"):
            return super().timesteps(u)
        # sigma^(1/7) is linear in u (Karras et al., arXiv:2206.00364), and t = sigma / (1 + sigma)
        low, high = (float(scheduler.config[name]) ** (1 / 7) for name in ("sigma_min", "sigma_max"))
        sigma = (low + u * (high - low)) ** 7
        return sigma / (1 + sigma)

    def predict(self, model: nn.Module, noisy: Tensor, t: Tensor, conditions: dict[str, Tensor]) -> Tensor:
        dtype, device = self.transformer.dtype, noisy.device
        frames, height, width = self.latent_size(noisy.shape)
        space = self.compression[1]
        return model(
            hidden_states=noisy.to(dtype),
            condition_mask=noisy.new_zeros(len(noisy), 1, frames, height, width, dtype=dtype),
            timestep=t.float().view(-1, 1, 1, 1, 1).expand(-1, 1, frames, 1, 1),
            encoder_hidden_states=conditions["prompt_embeds"].to(device, dtype),
            padding_mask=noisy.new_zeros(1, 1, height * space, width * space, dtype=dtype),
            return_dict=False,
        )[0]


class _Counted(Exception):
    """Leaves a pipeline once the length of a prompt is known."""
