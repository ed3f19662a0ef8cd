"""What training, caching and generation need of a text-to-video model."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn import DataParallel
from torch.nn.parallel import DistributedDataParallel

from halo_fast.errors import UserError
from halo_fast.patches import LatentFactors

__all__ = ["Denoiser", "Family", "repeated_blocks", "shift_logarithm", "shift_times", "unwrapped"]


class Denoiser(ABC):
    """What training needs of a model: its network, how a batch is formed, and its noise process.

    A subclass gives `transformer`, `shift`, `stack` and `predict`. Times t are in [0, 1], 1 being pure noise. Latents
    are in model space (normalised), float32, [N, *latent_shape]. The noise process written here is rectified flow,
    x_t = (1 - t) x_0 + t eps with target eps - x_0 (Liu et al., arXiv:2209.03003); a model with another one overrides
    `add_noise` and `target`.

    Args:
        pipeline: the diffusers pipeline, or whatever object holds the model's parts.
        network: the part of the pipeline that is trained, one of `networks`; None for the first.

    Raises:
        UserError: the pipeline has no such network to train.
    """

    networks: ClassVar[tuple[str, ...]] = ("transformer",)
    layout: ClassVar[str] = "BCFHW"
    lora_targets: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0")
    lora_prefix: ClassVar[str] = "transformer"
    # names of the conditions that a clip's first frame gives, in image-to-video
    image_conditions: tuple[str, ...] = ()
    # names of the conditions that stay on the CPU, because `predict` reads their values
    host_conditions: ClassVar[tuple[str, ...]] = ()

    def __init__(self, pipeline: Any = None, network: str | None = None) -> None:
        self.pipeline = pipeline
        self.network = network or self.networks[0]
        if self.network not in self.networks:
            raise UserError(f"network: expected one of {', '.join(self.networks)}, got {network!r}")

    @property
    def transformer(self) -> nn.Module:
        """The network that is trained, without the wrappers of torch.compile and data parallelism."""
        return unwrapped(getattr(self.pipeline, self.network))

    def adapt(self, network: nn.Module) -> None:  # noqa: B027  most networks stay as they are
        """Change a network of the family's in place, so that its forward reads no value; outputs stay as they are.

        Families do it when they are made, if their network in diffusers makes the CPU wait for the GPU.
        """

    @property
    def shift(self) -> float:
        """Timestep shift of the sampler: u -> shift u / (1 + (shift - 1) u)."""
        config = self.pipeline.scheduler.config
        return float(config.get("flow_shift") or config.get("shift") or 1.0)

    @abstractmethod
    def stack(self, conditions: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """One batch of the conditions of several prompts, padded as the model expects."""

    @abstractmethod
    def predict(self, model: nn.Module, noisy: Tensor, t: Tensor, conditions: dict[str, Tensor]) -> Tensor:
        """The model's output, differentiable.

        Args:
            model: the transformer, wrapped or not.
            noisy: x_t, [N, *latent_shape].
            t: times [N].
            conditions: a batch from `stack`.
        """

    def timesteps(self, u: Tensor, shape: Sequence[int] | None = None) -> Tensor:
        """Training times t of uniform draws u in [0, 1), with the sampler's shift.

        Args:
            u: any shape.
            shape: of the latents, for models whose shift grows with the number of tokens; None for their smallest.
        """
        return shift_times(u, self.shift)

    def add_noise(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t of latents and noise [N, *latent_shape] at times t [N]."""
        t = t.view(-1, *[1] * (latents.ndim - 1))
        return (1 - t) * latents + t * noise

    def target(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the model regresses to at x_t."""
        return noise - latents

    def latent_size(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Frames, height and width of latents [..., C, F, H, W], or of [..., F, C, H, W] in the layout BFCHW."""
        frames, height, width = shape[-4 if self.layout == "BFCHW" else -3], *shape[-2:]
        return frames, height, width

    @property
    def largest(self) -> tuple[int | None, int | None, int | None]:
        """Most latent frames, rows and columns that the network takes; None for no limit."""
        return None, None, None

    def check_size(self, size: Sequence[int]) -> None:
        """Raise if latents of `size` frames, height and width are larger than the network takes.

        Raises:
            UserError: naming the side and its limit.
        """
        for name, length, limit in zip(("frames", "rows", "columns"), size, self.largest, strict=True):
            if limit is not None and length > limit:
                raise UserError(
                    f"model: {type(self.transformer).__name__} takes at most {limit} latent {name}, got {length}; "
                    f"make clips {'shorter' if name == 'frames' else 'smaller'}"
                )

    def set_conditions(self, guidance_scale: float, frame_rate: float) -> None:
        """Set how clips are sampled, for networks that take it as an input in training too; others ignore it.

        Args:
            guidance_scale: of classifier-free guidance.
            frame_rate: frames a second.
        """
        return None


class Family(Denoiser):
    """A text-to-video model that also encodes prompts and clips, samples and decodes."""

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
    def image_parts(self) -> list[Any]:
        """What encodes first frames; cached conditions of them are valid for these alone."""
        return [self.vae]

    @abstractmethod
    def latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, ...]:
        """Shape of one clip's latents.

        Raises:
            UserError: the model cannot make a clip of this size.
        """

    def latent_factors(self, num_frames: int, height: int, width: int) -> LatentFactors:
        """How the latents lie on a clip of this size; read off their sizes, unless a family knows better.

        Raises:
            UserError: the model cannot make a clip of this size.
        """
        frames, rows, _ = self.latent_size(self.latent_shape(num_frames, height, width))
        try:
            return LatentFactors.of_sizes((num_frames, height), (frames, rows))
        except ValueError as error:
            raise UserError(f"model: {error}; let {type(self).__name__} have latent_factors of its own") from error

    def closest_format(self, num_frames: int, height: int, width: int) -> tuple[int, int, int]:
        """The largest format that the model makes and a clip of this one can be cut to."""
        return num_frames, height, width

    @abstractmethod
    def encode_prompts(self, prompts: Sequence[str]) -> list[dict[str, Tensor]]:
        """Named conditions of each prompt, trimmed to its true length and independent of the other prompts."""

    def encode_images(self, images: Tensor, num_frames: int) -> list[dict[str, Tensor]]:
        """What each first frame adds to the conditions of its prompt: `image_conditions`, nothing in text-to-video.

        Args:
            images: uint8 [N, H, W, 3].
            num_frames: of the clips that begin with them.
        """
        return [{} for _ in images]

    def blank_conditions(self) -> dict[str, Tensor]:
        """Conditions of a prompt of the longest length, without values: shapes and precisions for predictions.

        Raises:
            UserError: this family does not say.
        """
        raise UserError(
            f"plan: {type(self).__name__} gives no blank_conditions, which say how long its prompts can be; add the "
            "method, or measure with halo train CONFIG --dry-run"
        )

    def cut_prompts(self, prompts: Sequence[str]) -> list[str]:
        """The prompts of which a text encoder would see only the beginning; none where there is no limit."""
        return []

    @abstractmethod
    def encode(self, videos: Tensor) -> Tensor:
        """Latents of videos, uint8 [N, F, H, W, 3]; UserError for a size of which the model would drop a part."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Videos, uint8 [N, F, H, W, 3], of latents; a clip's pixels do not depend on its batch."""

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
        """Latents sampled by the pipeline itself.

        Args:
            conditions: of each clip.
            noise: from which each clip starts, [N, *latent_shape].
            video_size: frames, height and width in pixels.
            num_inference_steps: denoising steps.
            guidance_scale: of classifier-free guidance; 1 or less switches it off.
        """

    def passes(self, guidance_scale: float) -> int:
        """Forward passes of a clip in one denoising step of the sampler."""
        return 2 if guidance_scale > 1 else 1

    def load_lora(self, lora: Mapping[str, Tensor]) -> None:
        """Load a trained LoRA into the network, as diffusers does."""
        self.pipeline.load_lora_weights(dict(lora))

    def unload_lora(self) -> None:
        """Take away what `load_lora` has loaded."""
        self.pipeline.unload_lora_weights()


def repeated_blocks(model: Any) -> list[nn.Module]:
    """The blocks that make up most of a diffusers model: what is compiled and sharded, each for itself."""
    names = getattr(model, "_repeated_blocks", None) or getattr(model, "_no_split_modules", None) or ()
    return [module for module in model.modules() if type(module).__name__.removeprefix("FSDP") in names]


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside torch.compile's, DistributedDataParallel's and DataParallel's wrappers, if there are any."""
    while inner := _inside(module):
        module = inner
    return module


def _inside(module: nn.Module) -> nn.Module | None:
    """What a wrapper of a whole network holds; None for any other module."""
    if isinstance(module, DataParallel | DistributedDataParallel):
        return module.module
    # torch.compile's wrapper, recognised without importing the compiler
    return module._modules.get("_orig_mod")


def shift_times(u: Tensor, shift: float) -> Tensor:
    """shift u / (1 + (shift - 1) u), which keeps 0 and 1 (Esser et al., arXiv:2403.03206)."""
    return shift * u / (1 + (shift - 1) * u)


def shift_logarithm(tokens: int | None, config: Mapping[str, Any]) -> float:
    """The logarithm of a shift that grows with the number of tokens, by a scheduler's settings: a line.

    Args:
        tokens: of a clip; None for the least that the settings name.
        config: of the scheduler; settings that it lacks have the values of diffusers' pipelines.
    """
    low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    base, most = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    slope = (most - base) / (high - low)
    return float(base + slope * ((low if tokens is None else tokens) - low))
