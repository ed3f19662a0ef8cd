"""One multi-scale reward model: prompt and clip in; scores of the video and of every patch out, from one pass."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from halo_fast.errors import UserError
from halo_fast.files import write_json, write_safetensors
from halo_fast.patches import PatchGrid
from halo_fast.rewards.backbones.compact import Compact
from halo_fast.rewards.backbones.frames import FrameStages

__all__ = ["Backbone", "RewardModel", "RewardModelConfig", "Rewards"]

Calibration = tuple[tuple[float, float], ...]

_OWN = ("compact", "frames")


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
        width: channels of the compact backbone's finest stage; the next two have 3/2 and 2 times as many.
        pretrained: whether the compact backbone also has pretrained frame features and a prompt encoder.
        backbone: "compact"; "frames", for stills and few labels; or a vision-language model of transformers: a folder
            or a hub name.
        lora_rank: rank of the LoRA matrices in such a model; 0 trains its whole language model.
        video_calibration: (slope, offset) of each video dimension's logit; empty for none.
        patch_calibration: likewise of each patch dimension's.
    """

    video_dimensions: tuple[str, ...]
    patch_dimensions: tuple[str, ...] = ("quality",)
    spatial_factor: int = 8
    temporal_factor: int = 4
    causal: bool = True
    width: int = 32
    pretrained: bool = True
    backbone: str = "compact"
    lora_rank: int = 0
    video_calibration: Calibration = ()
    patch_calibration: Calibration = ()

    def __post_init__(self) -> None:
        for part in ("video", "patch"):
            pairs, dimensions = getattr(self, f"{part}_calibration"), getattr(self, f"{part}_dimensions")
            if not all(len(pair) == 2 and math.isfinite(sum(pair)) and pair[0] > 0 for pair in pairs):
                raise ValueError(f"{part}_calibration: expected finite (slope above 0, offset), got {pairs}")
            if pairs and len(pairs) != len(dimensions):
                raise ValueError(f"{part}_calibration: expected a pair for each of {dimensions}, got {len(pairs)}")

    def patches(self, grid: Sequence[int], size: tuple[int, int, int]) -> PatchGrid:
        """The patches (f, h, w) of clips of `size` (frames, height, width in pixels)."""
        factors = self.spatial_factor, self.temporal_factor, self.causal
        return PatchGrid((grid[0], grid[1], grid[2]), *size, *factors)


class Backbone(Protocol):
    """What a reward model asks of the network behind it; see Compact for the shapes."""

    negatives: int

    def look(self, videos: Tensor) -> Tensor | None:
        """Features that training does not change and may keep, [N, c, f', y, x]."""

    def prepare(self, looks: Tensor | None, prompts: Sequence[str], weight: Tensor) -> Tensor | None:
        """Fit in closed form before training starts."""

    def encode(self, videos: Tensor, looks: Tensor | None, shown: Tensor | None = None) -> Any:
        """Features of clips, whatever the prompt."""

    def logits(self, features: Any, prompts: Sequence[str], grid: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Logits of video scores [N, D] and of patch scores [N, Q, f, h, w], from one pass."""

    def against(self, features: Any, prompts: Sequence[str], others: Tensor) -> Tensor:
        """Video logits [N, M, D] of clip n with prompts others[n, m]."""


class RewardModel(nn.Module):
    """A backbone, the rubric's scale and files.

    Every backbone gives logits; a score is 1 + 4 sigma(slope * logit + offset), with a slope and an offset for each
    dimension that were fitted to labels held out from training, so that video and patch scores mean the same.
    """

    def __init__(self, config: RewardModelConfig, weights: bool = True) -> None:
        super().__init__()
        self.config = config
        self.backbone: Any
        if config.backbone == "compact":
            self.backbone = Compact(config)
        elif config.backbone == "frames":
            self.backbone = FrameStages(config)
        else:
            from halo_fast.rewards.backbones.vlm import VisionLanguage

            self.backbone = VisionLanguage(config, weights)

    def forward(self, videos: Tensor, prompts: Sequence[str], grid: tuple[int, int, int]) -> Rewards:
        """Scores of videos, uint8 [N, F, H, W, 3], and of their patches, from one pass over the pixels.

        Raises:
            ValueError: no videos, or of another dtype or shape, not one prompt each, a grid finer than
                the latent, sides that are not multiples of 8.
        """
        if videos.dtype != torch.uint8 or videos.ndim != 5 or videos.shape[-1] != 3:
            raise ValueError(f"videos: expected uint8 [N, F, H, W, 3], got {videos.dtype} {list(videos.shape)}")
        if videos.shape[2] % 8 or videos.shape[3] % 8:
            raise ValueError(f"videos: expected sides divisible by 8, got {list(videos.shape[2:4])}; crop them")
        if not len(videos):
            raise ValueError("videos: expected at least one, got none")
        if not len(videos):
            raise ValueError("videos: expected at least one, got none")
        if len(prompts) != len(videos):
            raise ValueError(f"prompts: expected one for each of {len(videos)} videos, got {len(prompts)}")
        features = self.backbone.encode(videos, self.backbone.look(videos))
        video, patches = self.backbone.logits(features, prompts, grid)
        return Rewards(_scores(video, self.config.video_calibration), _scores(patches, self.config.patch_calibration))

    def save(self, folder: Path) -> None:
        """Write model.safetensors and config.json; of a vision-language model also its own config and tokenizer."""
        config = self.config
        if config.backbone not in _OWN:
            for part in (self.backbone.network.config, self.backbone.tokenizer):
                part.save_pretrained(folder / "backbone")
            config = replace(config, backbone="backbone")
        write_safetensors(folder / "model.safetensors", _without_aliases(self.state_dict()))
        write_json(folder / "config.json", asdict(config))

    @classmethod
    def load(cls, folder: Path) -> RewardModel:
        """Read what `save` wrote; in eval mode, without gradients.

        Raises:
            UserError: files that are missing or are no reward model's, weights that are not finite, a calibration that
                does not fit its dimensions or would turn their order round.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = folder / "config.json"
        try:
            values = json.loads(path.read_text())
            values |= {name: tuple(values[name]) for name in ("video_dimensions", "patch_dimensions")}
            values |= {
                f"{part}_calibration": tuple(map(tuple, values[f"{part}_calibration"])) for part in ("video", "patch")
            }
            if values["backbone"] not in _OWN:
                values["backbone"] = str(folder / values["backbone"])
            model = cls(RewardModelConfig(**values), weights=False)
            path = folder / "model.safetensors"
            tensors = load_file(path)
            expected = _without_aliases(model.state_dict())
            if set(tensors) != set(expected):
                raise ValueError(f"other weights than its config names: {sorted(set(tensors) ^ set(expected))[0]}")
            broken = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
            if broken:
                raise ValueError(f"{broken[0]} is not finite")
            model.load_state_dict(tensors, strict=False)
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
            raise UserError(f"{path}: expected a reward model's ({error}); run `halo reward` to train one") from error
        return model.eval().requires_grad_(False)


def _without_aliases(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors less those that share another's memory (tied embeddings), which safetensors does not hold."""
    kept: dict[int, str] = {}
    for name, tensor in tensors.items():
        kept.setdefault(tensor.data_ptr(), name)
    return {name: tensors[name].contiguous() for name in kept.values()}


def _scores(logits: Tensor, calibration: Calibration) -> Tensor:
    """1 + 4 sigma(slope * logit + offset) of logits [N, D, ...], float32."""
    if calibration:
        slope, offset = logits.new_tensor(calibration).unflatten(0, (-1, *[1] * (logits.ndim - 2))).unbind(-1)
        logits = logits * slope + offset
    return 1 + 4 * logits.float().sigmoid()
