"""Helios (Yuan et al., arXiv:2603.04379): rectified flow on one chunk of a clip at a time."""

import inspect
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from halo_fast.errors import UserError
from halo_fast.families.base import shift_logarithm, shift_times
from halo_fast.families.pipeline import replaced
from halo_fast.families.wan import Wan

__all__ = ["Helios"]


class Helios(Wan):
    """diffusers.HeliosPipeline, for clips of one chunk; around its network everything is Wan's.

    The pipeline makes a clip chunk by chunk. A chunk is noise, which becomes its latents, and the network also sees the
    history: clean latents of the chunks before it, and the clip's first frame. Of one chunk the history is zeros.
    """

    networks = ("transformer",)

    def __init__(self, pipeline: Any, network: str | None = None) -> None:
        super().__init__(pipeline, network)
        scheduler = pipeline.scheduler
        if type(scheduler).__name__ != "HeliosScheduler" or scheduler.config.stages != 1:
            raise UserError(
                "model: Helios is trained on the schedule of Helios-Base, a HeliosScheduler with stages=1, got "
                f"{type(scheduler).__name__} with stages={scheduler.config.get('stages')}; give the pipeline that one"
            )
        defaults = inspect.signature(pipeline.__call__).parameters
        self.chunk = int(defaults["num_latent_frames_per_chunk"].default)
        # latent frames of the history, from the oldest to the newest
        self.history = sorted(map(int, defaults["history_sizes"].default), reverse=True)

    @property
    def chunk_frames(self) -> int:
        """Frames of a chunk, whose first latent frame is one of them."""
        return (self.chunk - 1) * self.compression[0] + 1

    @property
    def lengths(self) -> str:
        return f"{self.chunk_frames} frames (one chunk: those that go on from others are not trained)"

    @property
    def largest(self) -> tuple[int | None, int | None, int | None]:
        return self.chunk, None, None

    def check_size(self, size: Sequence[int]) -> None:
        super().check_size(size)
        if size[0] < self.chunk:
            raise UserError(
                f"model: Helios makes chunks of {self.chunk} latent frames, got {size[0]}; make clips of "
                f"{self.chunk_frames} frames"
            )

    def closest_format(self, num_frames: int, height: int, width: int) -> tuple[int, int, int]:
        return self.chunk_frames, *super().closest_format(num_frames, height, width)[1:]

    def timesteps(self, u: Tensor, shape: Sequence[int] | None = None) -> Tensor:
        config = self.pipeline.scheduler.config
        if not config.use_dynamic_shifting:
            return u  # the pipeline gives the scheduler the times, unshifted
        tokens = None
        if shape is not None:
            tokens = math.prod(self.latent_size(shape)) // math.prod(self.transformer.config.patch_size)
        logarithm = shift_logarithm(tokens, config)
        return shift_times(u, math.exp(logarithm) if config.time_shift_type == "exponential" else logarithm)

    def network_inputs(self, noisy: Tensor, t: Tensor, conditions: dict[str, Tensor]) -> dict[str, Any]:
        inputs = super().network_inputs(noisy, t, conditions)
        latents = inputs["hidden_states"]
        # places in time: the clip's first frame, the history, the chunk
        sizes = [1, *self.history, self.chunk]
        first, long, mid, last, chunk = torch.arange(sum(sizes), device=noisy.device)[None].split(sizes, dim=1)
        inputs["indices_hidden_states"] = chunk
        for name, places in {"long": long, "mid": mid, "short": torch.cat([first, last], dim=1)}.items():
            inputs[f"indices_latents_history_{name}"] = places
            inputs[f"latents_history_{name}"] = latents.new_zeros(
                *latents.shape[:2], places.shape[1], *latents.shape[3:]
            )
        return inputs

    def beginning(self, noise: Tensor) -> dict[str, Any]:
        return {}  # the pipeline would not look at it, see `sample`

    @torch.no_grad()
    def sample(self, conditions: Sequence[dict[str, Tensor]], noise: Tensor, **arguments: Any) -> Tensor:
        given = noise.to(self.transformer.device)
        # the pipeline draws the noise of each chunk by itself, and decodes each one even where latents are asked for
        with (
            replaced(self.pipeline, prepare_latents=lambda *_, **__: given),
            replaced(self.pipeline.vae, decode=lambda latents, **_: (latents,)),
        ):
            return super().sample(conditions, noise, **arguments)
