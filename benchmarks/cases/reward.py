"""Scores of a video and of all its patches in one pass, against the video alone and against a pass a patch.

    python -m benchmarks.bench_reward              # P = 8, 36, 64; writes benchmarks/results/reward_cpu.csv
    python -m benchmarks.bench_reward --patches 36 --rounds 5

The vision-language model is a Qwen2-VL of random weights whose proportions are those of use: over a thousand tokens of
video before a few of each patch. A pass a patch reuses what the vision tower saw, which flatters it. All ways run in
turn in each round; a ratio is the median over rounds of the quotient within one round, with its 20% and 80% quantiles.
No time is printed before the one pass gave what separate passes give.
"""

import argparse
import csv
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from halo_fast.rewards import RewardModel, RewardModelConfig

RESULTS = Path(__file__).parent / "results" / "reward_cpu.csv"
GRIDS = {8: (2, 2, 2), 36: (4, 3, 3), 64: (4, 4, 4)}
FRAMES, SIDE, TOLERANCE = 16, 336, 1e-4
PROMPT = "a red fox runs through deep snow towards the camera while the sun goes down behind the trees"


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


def measure(ways: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each way in each round; the order rotates."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    names = list(ways)
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            begin = time.perf_counter()
            ways[name]()
            seconds[name].append(time.perf_counter() - begin)
    return seconds


def quantiles(values: list[float]) -> tuple[float, float, float]:
    """Median, 20% and 80%."""
    low, *_, high = statistics.quantiles(values, n=5, method="inclusive")
    return statistics.median(values), low, high


def run(name: str, model: RewardModel, patches: int, rounds: int, side: int) -> dict[str, Any]:
    """One row of the table."""
    backbone, grid = model.backbone, GRIDS[patches]
    generator = torch.Generator().manual_seed(1)
    video = torch.randint(256, (1, FRAMES, side, side, 3), generator=generator, dtype=torch.uint8)
    prompts, own = [PROMPT], torch.zeros(1, 1, dtype=torch.long)

    def alone() -> Any:
        return backbone.against(backbone.encode(video, backbone.look(video)), prompts, own)

    def together() -> Any:
        return backbone.logits(backbone.encode(video, backbone.look(video)), prompts, grid)

    def separate() -> Any:
        features = backbone.encode(video, backbone.look(video))
        if hasattr(backbone, "patch_logits"):
            return torch.stack([backbone.patch_logits(features, prompts, grid, n) for n in range(patches)], dim=-1)
        return torch.stack([together()[1].flatten(2)[..., n] for n in range(patches)], dim=-1)

    error = (separate() - together()[1].flatten(2)).abs().max().item()
    if error > TOLERANCE:
        raise SystemExit(f"{name}: one pass is off separate passes by {error:.1e}, more than {TOLERANCE}")
    seconds = measure({"alone": alone, "together": together, "separate": separate}, rounds)
    overhead = quantiles([a / b for a, b in zip(seconds["together"], seconds["alone"], strict=True)])
    speedup = quantiles([a / b for a, b in zip(seconds["separate"], seconds["together"], strict=True)])
    row: dict[str, Any] = {"model": name, "patches": patches, "error": f"{error:.1e}"}
    for label, values in (("one_pass_over_video_alone", overhead), ("pass_a_patch_over_one_pass", speedup)):
        row |= {f"{label}{part}": round(value, 3) for part, value in zip(("", "_p20", "_p80"), values, strict=True)}
    return row | {f"{way}_s": round(statistics.median(values), 4) for way, values in seconds.items()}


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patches", type=int, nargs="+", default=[8, 36, 64], choices=sorted(GRIDS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        compact = RewardModel(RewardModelConfig(("quality", "alignment"), causal=False)).eval()
        models = {"Qwen2-VL, random": (vision_language_model(Path(folder)), SIDE), "compact": (compact, 96)}
        for name, (model, side) in models.items():
            for patches in options.patches:
                rows.append(run(name, model, patches, options.rounds, side))
                print(rows[-1], flush=True)
    with open(RESULTS, "w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], "machine", "torch"])
        writer.writeheader()
        writer.writerows(
            row | {"machine": platform.processor() or platform.machine(), "torch": torch.__version__} for row in rows
        )


if __name__ == "__main__":
    main()
