"""Image-to-video: a clip's first frame is given, and the network makes the others."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from halo_fast.errors import UserError
from halo_fast.families.pipeline import PipelineFamily
from halo_fast.loss.given import GIVEN_FIRST

__all__ = ["ImageToVideo"]


class ImageToVideo(PipelineFamily):
    """A pipeline that goes on from a picture, which is a condition beside the prompt's.

    Here the network sees the picture as the clean first frame of its latents, at time 0. What it gives for that frame
    is in no error (the layout says so). Models that see the picture in another way override this.
    """

    layout = GIVEN_FIRST
    image_conditions: tuple[str, ...] = ("first_frame",)
    enterable = False

    @torch.no_grad()
    def encode_images(self, images: Tensor, num_frames: int) -> list[dict[str, Tensor]]:
        return [{"first_frame": latents} for latents in self.encode(images[:, None]).cpu()]

    def blank_conditions(self) -> dict[str, Tensor]:
        raise UserError(
            f"plan: the conditions of {type(self).__name__} depend on the clip's size, which predictions do not know; "
            "measure with halo train CONFIG --dry-run"
        )

    def begun(self, latents: Tensor, conditions: dict[str, Tensor]) -> Tensor:
        """Latents [N, C, F, H, W] with the given first frame in the place of their own."""
        return torch.cat([conditions["first_frame"].to(latents), latents[:, :, 1:]], dim=2)

    def token_times(self, time: Tensor, size: Sequence[int]) -> Tensor:
        """Times [N] as those of all tokens, [N, S]: 0 for the tokens of the first frame.

        Args:
            time: of the noise.
            size: frames, rows and columns of the tokens.
        """
        frames, rows, columns = size
        first = time.new_zeros(len(time), rows * columns)
        return torch.cat([first, time[:, None].expand(-1, (frames - 1) * rows * columns)], dim=1)

    def parted(self, conditions: Sequence[dict[str, Tensor]]) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """The conditions of prompts, and a batch of those of pictures on the network's device."""
        pictures = [{name: condition[name] for name in self.image_conditions} for condition in conditions]
        texts = [
            {name: value for name, value in condition.items() if name not in self.image_conditions}
            for condition in conditions
        ]
        return texts, {name: value.to(self.transformer.device) for name, value in self.stack(pictures).items()}

    @torch.no_grad()
    def sample(self, conditions: Sequence[dict[str, Tensor]], noise: Tensor, **arguments: Any) -> Tensor:
        texts, picture = self.parted(conditions)
        return super().sample(texts, self.begun(noise.to(self.transformer.device), picture), **arguments)
