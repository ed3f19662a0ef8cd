"""What the pages' Python blocks take for granted: real models of tiny size, pairs and labels."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tiny import tiny_cogvideox, tiny_text_to_video_sd, tiny_wan
from training import make_pairs

import halo_fast
from halo_fast.data import write_clip
from halo_fast.families import family_of
from halo_fast.loss.objectives import Objective, Table
from halo_fast.rewards import RewardModel, RewardModelConfig

__all__ = ["before", "shortened"]

# long settings in pages, and those that serve a test
_SHORTER = {
    "max_train_steps=500)": 'max_train_steps=1, gradient_accumulation_steps=1, mixed_precision="no")',
    "RewardConfig(), seed": "RewardConfig(video_steps=1, patch_steps=1, pretrained=False), seed",
    "RewardModelConfig(data.video_dimensions)": "RewardModelConfig(data.video_dimensions, pretrained=False)",
    "gran_dpo(...": "gran_dpo(*arguments",
    "clips_per_pass=4)": "clips_per_pass=4, steps=2)",
    '"budget": 2.0}': '"budget": 2.0, "base_url": server.url}',
}


def shortened(text: str) -> str:
    """A block with settings that take less time, and arguments in place of an ellipsis."""
    for shown, short in _SHORTER.items():
        text = text.replace(shown, short)
    return text


def _labels(grid: tuple[int, ...] = (3, 2, 2)) -> dict[str, Any]:
    return {"patch_rewards": torch.rand(4, *grid) * 4 + 1, "video_rewards": torch.rand(4)}


def _lora(transformer: Any) -> Any:
    return get_peft_model(transformer, LoraConfig(r=2, target_modules=["to_q", "to_v"]))


def _flow() -> dict[str, Any]:
    latents, t = torch.randn(4, 4, 3, 4, 4), torch.rand(2).repeat(2).view(4, 1, 1, 1, 1)
    return {
        "transformer": _lora(tiny_wan().transformer), "latents": latents, "t": t, "timestep": 1000 * t.flatten(),
        "noise": torch.randn(2, 4, 3, 4, 4).repeat(2, 1, 1, 1, 1), "prompt_embeds": torch.randn(4, 12, 16), **_labels(),
    }  # fmt: skip


def _velocity() -> dict[str, Any]:
    pipeline = tiny_cogvideox(rotary=False)
    return {
        "transformer": _lora(pipeline.transformer), "scheduler": pipeline.scheduler,
        "latents": torch.randn(4, 3, 4, 4, 4), "noise": torch.randn(2, 3, 4, 4, 4).repeat(2, 1, 1, 1, 1),
        "t": torch.randint(1000, (2,)).repeat(2), "prompt_embeds": torch.randn(4, 12, 16), **_labels(),
    }  # fmt: skip


def _epsilon() -> dict[str, Any]:
    pipeline = tiny_text_to_video_sd()
    return {
        "unet": pipeline.unet.requires_grad_(), "reference_unet": tiny_text_to_video_sd().unet,
        "scheduler": pipeline.scheduler, "latents": torch.randn(4, 4, 3, 4, 4),
        "noise": torch.randn(2, 4, 3, 4, 4).repeat(2, 1, 1, 1, 1), "t": torch.randint(1000, (2,)).repeat(2),
        "prompt_embeds": torch.randn(4, 12, 16), **_labels(),
    }  # fmt: skip


def _arguments() -> tuple[torch.Tensor, ...]:
    target, labels = torch.randn(4, 4, 3, 4, 4), _labels()
    prediction = torch.randn(4, 4, 3, 4, 4, requires_grad=True)
    return prediction, target, torch.randn(4, 4, 3, 4, 4), labels["patch_rewards"], labels["video_rewards"]


def _trl() -> dict[str, Any]:
    batch = {
        f"{side}_{name}": torch.randn(2, *shape)
        for side in ("chosen", "rejected")
        for name, shape in (("latents", (4, 3, 4, 4)), ("target", (4, 3, 4, 4)), ("patch_scores", (3, 2, 2)))
    }
    return {
        "batch": batch,
        "policy": torch.nn.Conv3d(4, 4, 1),
        "ref": torch.nn.Conv3d(4, 4, 1),
        "log": lambda metrics: None,
    }


def _samples() -> dict[str, Any]:
    _, target, reference, patches, videos = _arguments()
    return {
        "model": torch.nn.Conv3d(4, 4, 1), "noisy": torch.randn(4, 4, 3, 4, 4), "target": target,
        "reference": reference, "patch_rewards": patches, "video_rewards": videos,
    }  # fmt: skip


def _processes() -> dict[str, Any]:
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    return {"world_size": 1, "out": halo_fast.gran_dpo(*_arguments())}


def _public() -> dict[str, Any]:
    names = {name: getattr(halo_fast, name) for name in halo_fast.__all__}
    return names | {"torch": torch, "dataclass": dataclass, "Objective": Objective, "Table": Table, "device": "cpu"}


def _readme() -> dict[str, Any]:
    names = ("prediction", "target", "reference", "patch_rewards", "video_rewards")
    return dict(zip(names, _arguments(), strict=True)) | {"log": lambda metrics: None}


def _reward_files() -> dict[str, Any]:
    folder = Path("runs/mine/reward")
    folder.mkdir(parents=True, exist_ok=True)
    RewardModel(RewardModelConfig(("visual_quality", "text_alignment"), pretrained=False)).save(folder)
    return {
        "videos": torch.randint(0, 256, (4, 9, 32, 32, 3), dtype=torch.uint8), "prompts": ["a cat", "a dog"] * 2,
        "video_scores": torch.rand(4, 2) * 4 + 1, "patch_scores": torch.rand(4, 1, 3, 4, 4) * 4 + 1,
    }  # fmt: skip


def _latents() -> dict[str, Any]:
    pipeline, prompts = tiny_wan(), ["a cat", "a dog"]
    return {
        "pipeline": pipeline, "prompts": prompts, "latents": torch.randn(2, 4, 3, 4, 4),
        "noisy": torch.randn(2, 4, 3, 4, 4), "t": torch.tensor([0.2, 0.8]),
        "patch_scores": torch.rand(2, 1, 3, 4, 4) * 4 + 1,
    }  # fmt: skip


def _pipeline() -> dict[str, Any]:
    pipeline = tiny_wan()
    return {"pipeline": pipeline, "pairs": make_pairs(family_of(pipeline))}


def _clip() -> dict[str, Any]:
    write_clip("cat.mp4", torch.randint(0, 256, (9, 48, 48, 3), dtype=torch.uint8), 8)
    return {}


# a text in a block of a page, and what makes the names that this block needs; the first that is found is taken
_NAMES: dict[str, dict[str, Any]] = {
    "README.md": {"": _readme},
    "docs/dropin.md": {
        "scheduler.get_velocity": _velocity, "reference_unet": _epsilon, "transformer(noisy, timestep": _flow,
        'batch[f"chosen_': _trl, "gran_dpo_coefficients": _samples, "all_reduce": _processes,
        "": lambda: {"arguments": _arguments()},
    },
    "docs/rewards.md": {"train_latent_reward": _latents, "": _reward_files},
    "docs/teachers.md": {"label_clips": _clip},
    "docs/training.md": {"": _pipeline},
}  # fmt: skip


def before(page: str, text: str) -> dict[str, Any]:
    """The names that a block of a page needs and does not make."""
    for shown, make in _NAMES.get(page, {}).items():
        if shown in text:
            return _public() | make() if page == "docs/dropin.md" else make()
    return {}
