"""One multi-scale reward model: prompt and clip in; scores of the video and of every patch out, from one pass."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from halo_fast.patches import PatchGrid
from halo_fast.runs import UserError, write_json, write_safetensors

__all__ = ["RewardModel", "RewardModelConfig", "Rewards", "word_ids"]

_CHANGE_SCALE = 4.0  # changes between frames are small next to the pixels themselves


class Rewards(NamedTuple):
    """Scores on the rubric's scale (1 to 5, 5 best): video [N, D] and patches [N, Q, f, h, w], float32."""

    video: Tensor
    patches: Tensor


@dataclass(frozen=True)
class RewardModelConfig:
    """What fixes the weights' shapes and meaning.

    Args:
        video_dimensions: names of the video scores, in the order of Rewards.video.
        patch_dimensions: names of the patch scores, in the order of Rewards.patches.
        spatial_factor: pixels a side that one position of the latent stands for, as in PatchGrid.
        temporal_factor: frames that one latent frame stands for.
        causal: whether the first latent frame stands for one frame alone.
        width: channels of the finest stage; the next two have 3/2 and 2 times as many.
        vocabulary: buckets that words are hashed into.
        text_width: channels of a word.
    """

    video_dimensions: tuple[str, ...]
    patch_dimensions: tuple[str, ...] = ("quality",)
    spatial_factor: int = 8
    temporal_factor: int = 4
    causal: bool = True
    width: int = 32
    vocabulary: int = 2048
    text_width: int = 64


def word_ids(prompts: Sequence[str], vocabulary: int) -> Tensor:
    """Hash the words of each prompt: int64 [N, longest], 0 for padding. Any word has an id, known or not."""
    rows = [
        [1 + zlib.crc32(word.encode()) % (vocabulary - 1) for word in re.findall(r"\w+", p.lower())] for p in prompts
    ]
    longest = max(1, max(map(len, rows), default=1))
    return torch.tensor([row + [0] * (longest - len(row)) for row in rows], dtype=torch.int64).reshape(-1, longest)


class _Residual(nn.Module):
    """Pre-activation residual block of two 3x3x3 convolutions; it starts as the identity, so no norm is needed.

    Norms over the clip are avoided on purpose: they would make a patch's score depend on how bad the others are.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv3d(width, width, 3, padding=1)
        self.second = nn.Conv3d(width, width, 3, padding=1)
        with torch.no_grad():
            for parameter in self.second.parameters():
                parameter.zero_()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.gelu(self.first(F.gelu(x))))


class RewardModel(nn.Module):
    """Multi-scale space-time network with a prompt encoder, a video head and a patch head.

    The trunk sees pixels and their change to the previous and the next frame, at half, a quarter and an eighth of the
    resolution. The patch head averages all three over each patch by area (any grid), looks at the neighbouring patches,
    the whole clip and the prompt; the video head looks at the whole clip and the prompt.
    """

    def __init__(self, config: RewardModelConfig) -> None:
        super().__init__()
        self.config = config
        fine, middle, coarse = config.width, config.width * 3 // 2, config.width * 2
        text, hidden = config.text_width, coarse
        self.stem = nn.Conv3d(9 * 4, fine, 3, padding=1)
        self.fine = _Residual(fine)
        self.shrink_fine = nn.Conv3d(fine, middle, (1, 2, 2), stride=(1, 2, 2))
        self.middle = _Residual(middle)
        self.shrink_middle = nn.Conv3d(middle, coarse, (1, 2, 2), stride=(1, 2, 2))
        self.coarse = _Residual(coarse)
        self.words = nn.Embedding(config.vocabulary, text)
        self.text = nn.Sequential(nn.Linear(text, text), nn.GELU(), nn.Linear(text, hidden))
        self.whole = nn.Linear(2 * (fine + middle) + 3 * coarse, hidden)
        self.match = nn.Linear(hidden, hidden)
        self.video_head = nn.Sequential(
            nn.Linear(3 * hidden, hidden), nn.GELU(), nn.Linear(hidden, len(config.video_dimensions))
        )
        self.expect = nn.Linear(hidden, 2 * middle)
        self.compare = _Residual(middle)
        self.local = nn.Linear(fine + middle + coarse, hidden)
        self.neighbours = _Residual(hidden)
        self.modulate = nn.Linear(2 * hidden, 2 * hidden)
        self.patch_head = nn.Sequential(
            nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, len(config.patch_dimensions))
        )
        for film in (self.expect, self.modulate):
            nn.init.zeros_(film.weight)
            nn.init.zeros_(film.bias)

    def forward(self, videos: Tensor, prompts: Sequence[str], grid: tuple[int, int, int]) -> Rewards:
        """Scores of videos, uint8 [N, F, H, W, 3], and of their patches, from one pass over the pixels.

        Raises:
            ValueError: videos of another dtype or shape, not one prompt each, a grid finer than
                the latent, sides that are not multiples of 8.
        """
        if videos.dtype != torch.uint8 or videos.ndim != 5 or videos.shape[-1] != 3:
            raise ValueError(f"videos: expected uint8 [N, F, H, W, 3], got {videos.dtype} {list(videos.shape)}")
        if videos.shape[2] % 8 or videos.shape[3] % 8:
            raise ValueError(f"videos: expected sides divisible by 8, got {list(videos.shape[2:4])}; crop them")
        if len(prompts) != len(videos):
            raise ValueError(f"prompts: expected one for each of {len(videos)} videos, got {len(prompts)}")
        maps, whole = self.encode(videos)
        text = self.encode_text(prompts)
        patches = self.patch_logits(maps, whole, text, videos.shape[1:4], grid)
        return Rewards(1 + 4 * self.video_logits(whole, text).sigmoid(), 1 + 4 * patches.sigmoid())

    def encode(self, videos: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        """Feature maps of uint8 videos, [N, c, F, H/s, W/s] at s = 2, 4, 8, and features of the whole, [N, hidden]."""
        x = videos.permute(0, 4, 1, 2, 3).float() / 127.5 - 1
        change = F.pad(x[:, :, 1:] - x[:, :, :-1], (0, 0, 0, 0, 1, 1))
        x = torch.cat((x, _CHANGE_SCALE * change[:, :, :-1], _CHANGE_SCALE * change[:, :, 1:]), dim=1)
        x = F.pixel_unshuffle(x.transpose(1, 2), 2).transpose(1, 2).contiguous(memory_format=torch.channels_last_3d)
        fine = F.gelu(self.fine(self.stem(x)))
        middle = F.gelu(self.middle(self.shrink_fine(fine)))
        coarse = F.gelu(self.coarse(self.shrink_middle(middle)))
        maps = (fine, middle, coarse)
        # what moves shows in the mean change of features over time, which their mean cannot tell
        changes = [x.diff(dim=2).abs().sum(dim=(2, 3, 4)) / x[0, 0].numel() for x in maps]
        summary = [*(x.mean(dim=(2, 3, 4)) for x in maps), coarse.amax(dim=(2, 3, 4)), *changes]
        return maps, self.whole(torch.cat(summary, dim=1))

    def encode_text(self, prompts: Sequence[str]) -> Tensor:
        """Prompts as [N, hidden]; the order of words does not matter, their number hardly."""
        ids = word_ids(prompts, self.config.vocabulary).to(self.words.weight.device)
        known = (ids > 0).unsqueeze(-1)
        return self.text((self.words(ids) * known).sum(dim=1) / known.sum(dim=1).clamp(min=1).sqrt())

    def video_logits(self, whole: Tensor, text: Tensor) -> Tensor:
        """[N, D] logits of the video scores."""
        return self.video_head(torch.cat((whole, text, whole * self.match(text)), dim=1))

    def patch_logits(
        self, maps: Sequence[Tensor], whole: Tensor, text: Tensor, size: Sequence[int], grid: Sequence[int]
    ) -> Tensor:
        """[N, Q, f, h, w] logits of the patch scores of clips of size (F, H, W)."""
        fine, middle, coarse = maps
        # what the prompt leads to expect is compared before averaging: afterwards a foreign colour is a mere tint
        scale, shift = self.expect(text)[:, :, None, None, None].chunk(2, dim=1)
        middle = F.gelu(self.compare(middle * (1 + scale) + shift))
        patches = PatchGrid(
            (grid[0], grid[1], grid[2]),
            num_frames=size[0],
            height=size[1],
            width=size[2],
            spatial_factor=self.config.spatial_factor,
            temporal_factor=self.config.temporal_factor,
            causal=self.config.causal,
        )
        pooled = torch.cat([patches.pool(x) for x in (fine, middle, coarse)], dim=1)
        local = self.local(pooled.movedim(1, -1))
        local = self.neighbours(local.movedim(-1, 1)).movedim(1, -1)
        scale, shift = self.modulate(torch.cat((whole, text), dim=1))[:, None, None, None].chunk(2, dim=-1)
        return self.patch_head(F.gelu(local * (1 + scale) + shift)).movedim(-1, 1)

    def save(self, folder: Path) -> None:
        """Write model.safetensors and config.json."""
        write_safetensors(folder / "model.safetensors", self.state_dict())
        write_json(folder / "config.json", asdict(self.config))

    @classmethod
    def load(cls, folder: Path) -> RewardModel:
        """Read what `save` wrote; in eval mode, without gradients.

        Raises:
            UserError: files that are missing or are no reward model.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            values = json.loads((folder / "config.json").read_text())
            config = RewardModelConfig(
                **values | {name: tuple(values[name]) for name in ("video_dimensions", "patch_dimensions")}
            )
            model = cls(config)
            model.load_state_dict(load_file(folder / "model.safetensors"))
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
            raise UserError(f"{folder}: expected a reward model ({error}); run `halo reward` to train one") from error
        return model.eval().requires_grad_(False)
