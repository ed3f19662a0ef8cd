"""Families of text-to-video models: what the stages ask of a model, and which file answers for which pipeline.

A family is one file of this folder with one subclass of `Family`; it is found by the name of its diffusers pipeline
class. A model that is no diffusers pipeline takes part by subclassing `Family` anywhere and passing the object itself
wherever a pipeline is taken.
"""

import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from halo_fast.runs import UserError

__all__ = ["Family", "family_of", "load", "source"]


class Family(ABC):
    """What generation, caching and training ask of a text-to-video model.

    Times t are in [0, 1], 1 being pure noise. Latents are in model space (normalised), float32, [N, *latent_shape].
    The noise process written here is rectified flow, x_t = (1 - t) x_0 + t eps with target eps - x_0
    (Liu et al., arXiv:2209.03003); a family with another one overrides `add_noise` and `target`.

    Args:
        pipeline: the diffusers pipeline, or whatever object holds the model's parts.
    """

    pipelines: ClassVar[tuple[str, ...]] = ()
    layout: ClassVar[str] = "BCFHW"
    lora_targets: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0")
    lora_prefix: ClassVar[str] = "transformer"

    def __init__(self, pipeline: Any) -> None:
        self.pipeline = pipeline

    @property
    def transformer(self) -> nn.Module:
        """The network that is trained."""
        return self.pipeline.transformer

    @property
    def vae(self) -> nn.Module:
        """The autoencoder; cached latents are valid for its weights alone."""
        return self.pipeline.vae

    @property
    def text_parts(self) -> list[Any]:
        """Tokenizers and text encoders; cached conditions are valid for these alone."""
        components = self.pipeline.components
        return [components[name] for name in sorted(components) if name.startswith(("text_encoder", "tokenizer"))]

    @property
    def shift(self) -> float:
        """Timestep shift of the sampler: u -> shift u / (1 + (shift - 1) u)."""
        config = self.pipeline.scheduler.config
        return float(config.get("flow_shift") or config.get("shift") or 1.0)

    @abstractmethod
    def latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, ...]:
        """Shape of one clip's latents; UserError if the model cannot make such a clip."""

    @abstractmethod
    def encode_prompts(self, prompts: Sequence[str]) -> list[dict[str, Tensor]]:
        """Named conditions of each prompt, trimmed to its true length and independent of the other prompts."""

    @abstractmethod
    def stack(self, conditions: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """One batch out of the conditions of several prompts, padded as the model expects."""

    @abstractmethod
    def encode(self, videos: Tensor) -> Tensor:
        """Latents of videos, uint8 [N, F, H, W, 3]."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Videos, uint8 [N, F, H, W, 3], of latents; a clip's pixels do not depend on its batch."""

    @abstractmethod
    def predict(self, model: nn.Module, noisy: Tensor, t: Tensor, conditions: dict[str, Tensor]) -> Tensor:
        """The model's output at times t [N]; `model` is the transformer, wrapped or not. Differentiable."""

    @abstractmethod
    def sample(
        self,
        conditions: Sequence[dict[str, Tensor]],
        noise: Tensor,
        *,
        video_size: tuple[int, int, int],
        num_inference_steps: int,
        guidance_scale: float,
    ) -> Tensor:
        """Latents sampled from the given noise by the pipeline itself; video_size is (frames, height, width)."""

    def timesteps(self, u: Tensor) -> Tensor:
        """Training times t of uniform draws u in [0, 1), with the sampler's shift."""
        return self.shift * u / (1 + (self.shift - 1) * u)

    def add_noise(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t; t is [N]."""
        t = t.view(-1, *[1] * (latents.ndim - 1))
        return (1 - t) * latents + t * noise

    def target(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the model regresses to at x_t."""
        return noise - latents


def family_of(pipeline: Any) -> Family:
    """The family of a loaded pipeline; a `Family` is returned as it is.

    Raises:
        UserError: no file of this folder knows the pipeline's class.
    """
    if isinstance(pipeline, Family):
        return pipeline
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    families = {name: family for family in Family.__subclasses__() for name in family.pipelines}
    name = type(pipeline).__name__
    if name not in families:
        raise UserError(f"model: no family for {name}; expected one of {', '.join(sorted(families))}")
    return families[name](pipeline)


def source(name: str) -> Path | str:
    """What identifies a model as a stage's input: its folder, or the name of one that is not a local folder."""
    import diffusers.utils.logging
    import transformers.utils.logging

    # their bars tell of files, not of work, and would stand between ours
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    if name.startswith("demo:"):
        from halo_fast.demo import WEIGHTS

        return WEIGHTS / name.removeprefix("demo:")
    return Path(name) if Path(name).is_dir() else name


def load(name: str, device: str | None = None) -> Family:
    """A family from "demo:NAME", a diffusers folder or a hub name.

    Args:
        name: config.pretrained_model_name_or_path.
        device: where the pipeline goes; None for the first GPU, or the CPU where there is none.

    Raises:
        UserError: nothing loadable under that name, or no family for it.
    """
    import diffusers.utils.logging
    import transformers.utils.logging

    # their bars tell of files, not of work, and would stand between ours
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    if name.startswith("demo:"):
        from halo_fast.demo import load_pipeline

        pipeline = load_pipeline(name.removeprefix("demo:"))
    else:
        from diffusers import DiffusionPipeline

        try:
            pipeline = DiffusionPipeline.from_pretrained(name)
        except (OSError, ValueError) as error:
            reason = str(error).strip().split("\n")[0]
            raise UserError(
                f"pretrained_model_name_or_path: no diffusers pipeline at {name!r} ({reason}); "
                'give a folder with model_index.json, a hub name, or "demo:graded"'
            ) from error
    family = family_of(pipeline)
    pipeline.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    pipeline.set_progress_bar_config(disable=True)
    return family
