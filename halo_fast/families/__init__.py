"""Families of text-to-video models: what the stages ask of a model, and which file answers for which pipeline.

A family is one file of this folder with one subclass of `Family`; it is found by the name of its diffusers pipeline
class. A model that is no diffusers pipeline takes part by subclassing `Family` anywhere and passing the object itself
wherever a pipeline is taken.
"""

import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from halo_fast.errors import UserError

__all__ = ["Family", "family_of", "load", "shifted", "source"]


class Family(ABC):
    """What generation, caching and training ask of a text-to-video model.

    Times t are in [0, 1], 1 being pure noise. Latents are in model space (normalised), float32, [N, *latent_shape].
    The noise process written here is rectified flow, x_t = (1 - t) x_0 + t eps with target eps - x_0
    (Liu et al., arXiv:2209.03003); a family with another one overrides `add_noise` and `target`.

    Args:
        pipeline: the diffusers pipeline, or whatever object holds the model's parts.
        network: the part of the pipeline that is trained, one of `networks`; None for the first.

    Raises:
        UserError: the pipeline has no such network to train.
    """

    pipelines: ClassVar[tuple[str, ...]] = ()
    networks: ClassVar[tuple[str, ...]] = ("transformer",)
    layout: ClassVar[str] = "BCFHW"
    lora_targets: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0")
    lora_prefix: ClassVar[str] = "transformer"

    def __init__(self, pipeline: Any, network: str | None = None) -> None:
        self.pipeline = pipeline
        self.network = network or self.networks[0]
        if self.network not in self.networks:
            raise UserError(f"network: expected one of {', '.join(self.networks)}, got {network!r}")

    @property
    def transformer(self) -> nn.Module:
        """The network that is trained."""
        return getattr(self.pipeline, self.network)

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

    def latent_size(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Frames, height and width of latents [..., C, F, H, W], or of [..., F, C, H, W] in the layout BFCHW."""
        frames, height, width = shape[-4 if self.layout == "BFCHW" else -3], *shape[-2:]
        return frames, height, width

    def guided_by(self, scale: float) -> None:
        """Take the guidance scale at which the clips are sampled, for networks that are told it."""
        return None

    def load_lora(self, lora: Mapping[str, Tensor]) -> None:
        """Put a trained LoRA on the network of this family, as diffusers loads it."""
        self.pipeline.load_lora_weights(dict(lora))

    def timesteps(self, u: Tensor, shape: Sequence[int] | None = None) -> Tensor:
        """Training times t of uniform draws u in [0, 1), with the sampler's shift.

        Args:
            shape: of the latents, for models whose shift grows with the number of tokens; None for their smallest.
        """
        return shifted(u, self.shift)

    def add_noise(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t; t is [N]."""
        t = t.view(-1, *[1] * (latents.ndim - 1))
        return (1 - t) * latents + t * noise

    def target(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the model regresses to at x_t."""
        return noise - latents


def shifted(u: Tensor, shift: float) -> Tensor:
    """shift u / (1 + (shift - 1) u), which keeps 0 and 1 (Esser et al., arXiv:2403.03206)."""
    return shift * u / (1 + (shift - 1) * u)


def family_of(pipeline: Any, network: str | None = None) -> Family:
    """The family of a loaded pipeline; a `Family` is returned as it is.

    Args:
        pipeline: a diffusers pipeline or a `Family`.
        network: the part that is trained where there is a choice, such as Wan 2.2's "transformer_2".

    Raises:
        UserError: no file of this folder knows the pipeline's class, or it has no such network.
    """
    if isinstance(pipeline, Family):
        return pipeline
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    families = {name: family for family in _subclasses(Family) for name in family.pipelines}  # type: ignore[type-abstract]
    name = type(pipeline).__name__
    if name not in families:
        raise UserError(f"model: no family for {name}; expected one of {', '.join(sorted(families))}")
    return families[name](pipeline, network)


def _subclasses(family: type[Family]) -> Iterator[type[Family]]:
    # Only files of this folder answer for pipelines: a user's subclass of one of them is used as an object.
    for subclass in family.__subclasses__():
        if subclass.__module__.startswith(f"{__name__}."):
            yield subclass
        yield from _subclasses(subclass)


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


def load(name: str, device: str | None = None, network: str | None = None) -> Family:
    """A family from "demo:NAME", a diffusers folder or a hub name.

    Args:
        name: config.pretrained_model_name_or_path.
        device: where the pipeline goes; None for the first GPU, or the CPU where there is none.
        network: the part that is trained, as for `family_of`.

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
    family = family_of(pipeline, network)
    pipeline.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    pipeline.set_progress_bar_config(disable=True)
    return family
