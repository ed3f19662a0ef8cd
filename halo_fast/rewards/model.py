"""The reward model: prompt and clip in; scores of the video and of every patch out, from one pass."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from halo_fast import processes
from halo_fast.errors import UserError, check_finite, first_line
from halo_fast.families.quantization import check_quantization
from halo_fast.files import write_json, write_safetensors
from halo_fast.patches import LatentFactors
from halo_fast.registry import create, is_name, register, resolve
from halo_fast.rewards.base import Calibration, RewardConfig, RewardModelConfig, Rewards

__all__ = [
    "RewardModel",
    "check_backbone",
    "check_weights",
    "chosen_precision",
    "copy_start",
    "model_folder",
    "start_folder",
]

logger = logging.getLogger(__name__)

register(
    "reward backbone",
    {
        "compact": "halo_fast.rewards.backbones.compact:Compact",
        "frames": "halo_fast.rewards.backbones.frames:FrameStages",
        "kernel": "halo_fast.rewards.backbones.kernel:KernelRidge",
    },
)
# what training and scoring use of a backbone
_BACKBONE = ("parameters", "negatives", "frozen_features", "fit_closed_form", "encode", "logits", "video_logits_for")
_SHIPPED = Path(__file__).parent / "weights"
_BACKBONE_FILES = "backbone"  # folder beside the weights, of backbones that keep files of their own


class RewardModel(nn.Module):
    """A backbone, the rubric's scale and files.

    Every backbone gives logits; a score is 1 + 4 sigma(slope * logit + offset). Slope and offset of each dimension were
    fitted to labels held out from training, so that video and patch scores mean the same.

    Args:
        config: dimensions, geometry and backbone.
        weights: whether a vision-language model's weights are read; without, `load` fills them in.

    Raises:
        UserError: no such backbone or none that can be quantised, or packages or weights that it needs are missing.
    """

    def __init__(self, config: RewardModelConfig, weights: bool = True) -> None:
        super().__init__()
        self.config = config
        self.backbone: Any = _build_backbone(config, weights)

    def forward(
        self, videos: Tensor, prompts: Sequence[str], grid: tuple[int, int, int], frozen: Tensor | None = None
    ) -> Rewards:
        """Scores of videos and of their patches, from one pass over the pixels.

        The model computes where it is; scores are on the videos' device.

        Args:
            videos: uint8 [N, F, H, W, 3].
            prompts: of each.
            grid: patches (f, h, w); see PatchGrid.
            frozen: the videos' frozen features, float32; None computes them.

        Raises:
            ValueError: no videos, or of another dtype or shape, not one prompt each, a grid finer than the latent,
                sides that are not multiples of 8.
            UserError: scores that are not finite; NaN would mean "not labelled" later.
        """
        if videos.dtype != torch.uint8 or videos.ndim != 5 or videos.shape[-1] != 3:
            raise ValueError(f"videos: expected uint8 [N, F, H, W, 3], got {videos.dtype} {list(videos.shape)}")
        if videos.shape[2] % 8 or videos.shape[3] % 8:
            raise ValueError(f"videos: expected sides divisible by 8, got {list(videos.shape[2:4])}; crop them")
        if not len(videos):
            raise ValueError("videos: expected at least one, got none")
        if len(prompts) != len(videos):
            raise ValueError(f"prompts: expected one for each of {len(videos)} videos, got {len(prompts)}")
        given = videos.device
        videos = videos.to(self.device)
        frozen = self.backbone.frozen_features(videos) if frozen is None else frozen.to(self.device)
        features = self.backbone.encode(videos, frozen)
        video, patches = self.backbone.logits(features, prompts, grid)
        clips = [f"clip {index} of {len(prompts)}, {prompt!r}" for index, prompt in enumerate(prompts)]
        for logits in (video, patches):
            check_finite(logits, clips, "scores of the reward model", "score in another precision, or train it again")
        of_video, of_patches = self.config.video_calibration, self.config.patch_calibration
        return Rewards(_scores(video, of_video).to(given), _scores(patches, of_patches).to(given))

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters(), torch.empty(0)).device

    def by_dimension(self, rewards: Rewards) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Scores by the names of their dimensions: of the video [N], and of the patches [N, P], P = f * h * w."""
        return (
            {name: rewards.video[:, index] for index, name in enumerate(self.config.video_dimensions)},
            {name: rewards.patches[:, index].flatten(1) for index, name in enumerate(self.config.patch_dimensions)},
        )

    def save(self, folder: Path | str) -> None:
        """Write model.safetensors and config.json; of a vision-language model also its own config and tokenizer.

        Of a quantised one these are all of the frozen network, as it is stored in memory; model.safetensors then holds
        what was trained.
        """
        folder = Path(folder)
        config = self.config
        if hasattr(self.backbone, "save_pretrained"):
            self.backbone.save_pretrained(folder / _BACKBONE_FILES)
            config = replace(config, backbone=_BACKBONE_FILES)
        write_safetensors(folder / "model.safetensors", _without_aliases(self.state_dict()))
        write_json(folder / "config.json", asdict(config))

    @classmethod
    def load(cls, folder: Path | str, device: str | None = None, factors: LatentFactors | None = None) -> RewardModel:
        """Read what `save` wrote; in eval mode, without gradients.

        Args:
            folder: with the files.
            device: where the model goes; None for the first GPU, or the CPU where there is none.
            factors: how latents lie on the clips that it will score; None for those it was trained on.

        Raises:
            UserError: files that are missing or are no reward model's, weights that are not finite, a calibration that
                does not fit its dimensions or would reverse their order.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        folder = Path(folder)
        config = read_config(folder / "config.json")
        path = folder / "model.safetensors"
        try:
            model = cls(config.scoring(factors) if factors else config, weights=False)
            tensors = load_file(path)
            expected = _without_aliases(model.state_dict())
            if set(tensors) != set(expected):
                raise ValueError(f"other weights than its config names: {sorted(set(tensors) ^ set(expected))[0]}")
            check_weights(tensors, expected)
            model.load_state_dict(tensors, strict=False)
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
            raise _no_model(path, error) from error
        return model.eval().requires_grad_(False).to(device or processes.device())


def check_weights(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raise ValueError if a tensor that was read is not finite, or of another size than a model of today has."""
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{name} is not finite")
        if name in expected and tensor.shape != expected[name].shape:
            raise ValueError(f"{name} is {list(tensor.shape)}, which this version has as {list(expected[name].shape)}")


def model_folder(name: str) -> Path:
    """The folder of a shipped reward model, by its name, or the folder that is named."""
    shipped = _SHIPPED / name
    return shipped if re.fullmatch(r"\w+", name) and shipped.is_dir() else Path(name)


def start_folder(name: str) -> Path:
    """The folder of the reward model that `reward.start` names: one of those shipped, or the folder itself.

    Raises:
        UserError: there is none.
    """
    folder = model_folder(name)
    if not (folder / "config.json").exists():
        raise UserError(f"reward.start: expected 'fetv' or a folder that `halo reward` wrote, got {name!r}")
    return folder


@torch.no_grad()
def copy_start(model: RewardModel, name: str) -> None:
    """Give a fresh model the weights of the one that `reward.start` names.

    Heads of other dimensions start anew: whatever has another shape is left as it is.

    Raises:
        UserError: there is no such model, or it has another backbone, or as many dimensions of other names.
    """
    start = RewardModel.load(start_folder(name), "cpu")
    if type(model.backbone) is not type(start.backbone) or model.config.pretrained != start.config.pretrained:
        raise UserError(
            f"reward.start: expected a model with the backbone {model.config.backbone!r}, {name!r} has "
            f"{start.config.backbone!r}; set reward.backbone to that"
        )
    given, own = start.config.quantization, model.config.quantization
    if given != own:
        raise UserError(
            f"reward.start: expected a model with reward.quantization {own}, {name!r} has {given}; set that"
        )
    if own and not _same_base(model.backbone, start.backbone):
        raise UserError(
            f"reward.start: {name!r} was trained on another model than {model.config.backbone!r}; set reward.backbone "
            "to that one"
        )
    for part in ("video_dimensions", "patch_dimensions"):
        names, others = getattr(model.config, part), getattr(start.config, part)
        if names != others and len(names) == len(others):
            raise UserError(f"reward.start: expected a model that scores {names}, {name!r} scores {others}; start anew")
        if names != others:
            logger.info("reward.start: the labels have %s, the start %s; their heads start anew", names, others)
    known = start.state_dict()
    for key, tensor in model.state_dict().items():
        if key in known and known[key].shape == tensor.shape:
            tensor.copy_(known[key])


def _same_base(one: Any, other: Any) -> bool:
    """Whether two quantised vision-language models have the same frozen weights."""
    own, others = one.frozen_tensors(), other.frozen_tensors()
    return len(own) == len(others) and all(map(torch.equal, own, others))


def check_backbone(config: RewardConfig | RewardModelConfig) -> None:
    """Raise for a backbone that cannot be; no weights are loaded and no hub is reached.

    Args:
        config: names the backbone, and says how it is quantised and what of it is trained.

    Raises:
        UserError: neither a registered nor an importable name, nor a folder, nor of the form of a hub name; or one that
            cannot be quantised, or what is quantised would be trained.
    """
    name, quantization = config.backbone, config.quantization
    # whatever is none of these is resolved as well: its error lists the known names
    if is_name("reward backbone", name) or not ("/" in name or Path(name).is_dir()):
        resolve("reward backbone", name, "reward.backbone")
    bf16 = config.precision == "bf16"
    setting, value, instead = (
        ("reward.quantization", quantization, "null") if quantization else ("reward.precision", "bf16", "fp32")
    )
    if not (quantization or bf16):
        return
    if is_name("reward backbone", name):
        raise UserError(
            f"{setting}: {value} is for vision-language models, and reward.backbone {name!r} is none; set {instead}"
        )
    if config.lora_rank == 0:
        raise UserError(
            f"{setting}: {value} freezes the language model, and reward.lora_rank 0 trains it; set {instead}, or "
            "reward.lora_rank to a rank, or to null for the head alone"
        )
    if quantization and bf16:
        raise UserError(
            f"reward.precision: bf16 and reward.quantization {quantization} exclude each other; set fp32, or "
            "reward.quantization null"
        )
    if not quantization:
        return
    check_quantization(quantization, "reward.quantization")


def chosen_precision(config: RewardConfig) -> Literal["fp32", "bf16"]:
    """`reward.precision` on this machine: "auto" is bf16 for a frozen language model on a GPU that has it."""
    if config.precision != "auto":
        return config.precision
    frozen = config.lora_rank != 0 and not config.quantization and not is_name("reward backbone", config.backbone)
    gpu = torch.device(processes.device()).type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if frozen and gpu else "fp32"


def _build_backbone(config: RewardModelConfig, weights: bool) -> nn.Module:
    name = config.backbone
    check_backbone(config)
    if is_name("reward backbone", name):
        backbone: nn.Module = create("reward backbone", name, "reward.backbone", config, requires=_BACKBONE)
        return backbone
    from halo_fast.rewards.backbones.vlm import VisionLanguage

    return VisionLanguage(config, weights)


def write_factors(path: Path, factors: LatentFactors) -> None:
    """Have a saved model, by its config.json, score clips of a generator whose latents lie otherwise on them."""
    values = json.loads(path.read_text())
    kept = values.get("features_factor") or values["spatial_factor"]
    write_json(path, values | factors._asdict() | {"features_factor": kept})


def read_config(path: Path) -> RewardModelConfig:
    """The config.json of a saved model; UserError if there is none."""
    try:
        values = json.loads(path.read_text())
        for part in ("video", "patch"):
            values[f"{part}_dimensions"] = tuple(values[f"{part}_dimensions"])
            values[f"{part}_calibration"] = tuple(map(tuple, values[f"{part}_calibration"]))
        if values["backbone"] == _BACKBONE_FILES:
            values["backbone"] = str(path.parent / _BACKBONE_FILES)
        return RewardModelConfig(**values)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _no_model(path, error) from error


def _no_model(path: Path, error: Exception) -> UserError:
    return UserError(
        f"{path}: expected a reward model's ({first_line(error)}); train it again, with `halo reward --force`"
    )


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
