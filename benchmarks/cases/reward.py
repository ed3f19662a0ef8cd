"""Scores of a video and of all its patches in one pass, beside the video alone and a pass a patch.

The vision-language model is a Qwen2-VL of random weights whose proportions are those of use: over a thousand tokens of
video before a few of each patch. A pass a patch reuses the output of the vision tower, which flatters it. The gate
compares the one pass with separate passes.
"""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import Bench, Case, Round, check_errors
from halo_fast.rewards import RewardModel, RewardModelConfig

GRIDS = {8: (2, 2, 2), 36: (4, 3, 3), 64: (4, 4, 4)}
FRAMES, SIDE, TOLERANCE = 16, 336, 1e-4
PROMPT = "a red fox runs through deep snow towards the camera while the sun goes down behind the trees"
ALONE, ONE_PASS, SEPARATE = "video alone", "one pass", "a pass a patch"


def vision_language_model(folder: Path) -> RewardModel:
    """A random Qwen2-VL with a byte tokenizer: 1152 tokens of video at 16 frames of 336 pixels."""
    from transformers import AutoModelForImageTextToText, ByT5Tokenizer, Qwen2VLConfig

    text = {
        "vocab_size": 384, "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6,
        "num_attention_heads": 4, "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "mrope_section": [8, 12, 12], "rope_theta": 1e6},
    }  # fmt: skip
    vision = {"embed_dim": 128, "hidden_size": 256, "depth": 4, "num_heads": 4, "mlp_ratio": 4}
    torch.manual_seed(0)
    config = Qwen2VLConfig(text_config=text, vision_config=vision)
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    ByT5Tokenizer().save_pretrained(folder)
    config = RewardModelConfig(("quality", "alignment"), temporal_factor=4, causal=False, backbone=str(folder))
    return RewardModel(config).eval().requires_grad_(False)


def compact_model(folder: Path) -> RewardModel:
    """The compact model of random weights."""
    return RewardModel(RewardModelConfig(("quality", "alignment"), causal=False)).eval()


MODELS: dict[str, tuple[Callable[[Path], RewardModel], int]] = {
    "Qwen2-VL": (vision_language_model, SIDE),
    "compact": (compact_model, 96),
}


def passes(model: RewardModel, side: int, grid: tuple[int, int, int]) -> dict[str, Callable[[], Any]]:
    """Logits of one clip by each way: [N, D] of the video alone, (video, patches) of one pass, [N, Q, P] of many."""
    backbone, patches = model.backbone, grid[0] * grid[1] * grid[2]
    generator = torch.Generator().manual_seed(1)
    video = torch.randint(256, (1, FRAMES, side, side, 3), generator=generator, dtype=torch.uint8)
    prompts, own = [PROMPT], torch.zeros(1, 1, dtype=torch.long)

    def encode() -> Any:
        return backbone.encode(video, backbone.frozen_features(video))

    def alone() -> Any:
        return backbone.video_logits_for(encode(), prompts, own)

    def together() -> Any:
        return backbone.logits(encode(), prompts, grid)

    def separate() -> Any:
        features = encode()
        if hasattr(backbone, "patch_logits"):
            return torch.stack([backbone.patch_logits(features, prompts, grid, n) for n in range(patches)], dim=-1)
        return torch.stack([together()[1].flatten(2)[..., n] for n in range(patches)], dim=-1)

    return {ALONE: alone, ONE_PASS: together, SEPARATE: separate}


@contextmanager
def opened(name: str, patches: int) -> Iterator[Bench]:
    """The bench of one model and number of patches."""
    build, side = MODELS[name]
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        ways = passes(build(Path(folder)), side, GRIDS[patches])
        error = (ways[SEPARATE]() - ways[ONE_PASS]()[1].flatten(2)).abs().max().item()
        errors = check_errors({ONE_PASS: error}, TOLERANCE)
        rounds: dict[str, Round] = {way: partial(_quiet, run) for way, run in ways.items()}
        yield Bench(rounds, lambda: errors, bases=(ALONE, ONE_PASS))


def _quiet(run: Callable[[], Any]) -> None:
    run()


CASES = [
    Case("reward", f"{name} P={patches}", (ALONE, ONE_PASS, SEPARATE), partial(opened, name, patches), patches != 36)
    for name in MODELS
    for patches in GRIDS
]
