"""What a patch reward on the denoiser's features knows at each noise level, what it costs, and what it saves.

    python -m benchmarks.latent_reward runs/demo

takes a finished run of the demo. The latent reward learns from the pixel reward model's scores of the run's candidates;
the meter judges both on clips of held-out prompts. Then one of four clips a prompt is chosen: by chance, by the pixel
model once all are made, or by the latent reward on the way, and only the chosen one is sampled on.
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from scipy.stats import spearmanr
from torch import Tensor

from halo_fast.data.clips import read_clip
from halo_fast.data.prompts import read_prompts
from halo_fast.data.tables import ClipRow, read_rows
from halo_fast.demo.meters import DefectMeter
from halo_fast.families import load
from halo_fast.families.pipeline import PipelineFamily
from halo_fast.families.sampling import clip_noise, clip_seed, sample_clips
from halo_fast.families.steering import sample_part, sampling_times
from halo_fast.pipeline.arguments import load_config
from halo_fast.pipeline.config import Config
from halo_fast.rewards import RewardModel
from halo_fast.rewards.latent import LatentReward, train_latent_reward

TIMES = 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="a finished run of the demo")
    parser.add_argument("--num-prompts", type=int, default=64, help="held-out prompts that are measured")
    parser.add_argument("--draws", type=int, default=8, help="noise and times of each candidate")
    parser.add_argument("--steps", type=int, default=2000, help="of the training")
    parser.add_argument("--begun", type=int, default=4, help="clips of a prompt of which one is chosen")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    config = load_config("demo", {})
    family = load(config.pretrained_model_name_or_path, device="cpu")
    assert isinstance(family, PipelineFamily)
    pixels = RewardModel.load(arguments.run / "reward", "cpu")

    rows = read_rows(arguments.run / "generate" / "clips.parquet", ClipRow)
    prompts = [row.prompt for row in rows]
    videos = torch.stack([torch.as_tensor(read_clip(arguments.run / "generate" / row.video)) for row in rows])
    latents = [load_file(arguments.run / "generate" / str(row.latents))["latents"] for row in rows]
    scores = _pixel_scores(pixels, videos, prompts, config)
    encoded = _encoded(family, prompts)
    begun = time.perf_counter()
    reward, history = train_latent_reward(
        family, latents, [encoded[prompt] for prompt in prompts], scores[:, None], draws=arguments.draws,
        steps=arguments.steps, clips_per_pass=config.generate.batch_size, times=(0.0, 1.0), seed=arguments.seed,
    )  # fmt: skip
    print(f"trained in {time.perf_counter() - begun:.0f} s, loss {history[-1]['loss']:.4f}", flush=True)

    heldout = read_prompts("demo:heldout", arguments.num_prompts, 0)
    print(_by_time(family, reward, pixels, heldout, config))
    print(_choices(family, reward, pixels, heldout, config, arguments.begun))


def _pixel_scores(pixels: RewardModel, videos: Tensor, prompts: Sequence[str], config: Config) -> Tensor:
    """Patch scores [N, f, h, w] by the reward model of pixels."""
    grid, size = (config.grid[0], config.grid[1], config.grid[2]), config.generate.batch_size
    parts = [
        pixels(videos[start : start + size], list(prompts[start : start + size]), grid).patches[:, 0]
        for start in range(0, len(videos), size)
    ]
    return torch.cat(parts)


def _encoded(family: PipelineFamily, prompts: Sequence[str]) -> dict[str, dict[str, Tensor]]:
    distinct = list(dict.fromkeys(prompts))
    return dict(zip(distinct, family.encode_prompts(distinct), strict=True))


def _by_time(
    family: PipelineFamily, reward: LatentReward, pixels: RewardModel, prompts: Sequence[str], config: Config
) -> str:
    """Spearman of all patches with the meter, and seconds a clip, of both rewards."""
    seeds = [clip_seed(0, index, -1) for index in range(len(prompts))]
    latents, videos = _sampled(family, prompts, seeds, config)
    truth = -DefectMeter.load()(videos, list(prompts))[0].flatten()
    encoded = _encoded(family, prompts)
    conditions = family.stack([encoded[prompt] for prompt in prompts])
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1))

    def seconds(call: Any) -> tuple[Tensor, float]:
        found, spent = None, []
        for _ in range(3):
            begun = time.perf_counter()
            found = call()
            spent.append(time.perf_counter() - begun)
        assert found is not None
        return found, statistics.median(spent) / len(prompts)

    scored, cost = seconds(lambda: _pixel_scores(pixels, videos, prompts, config))
    _, decoding = seconds(lambda: family.decode(latents))
    own = float(spearmanr(truth, scored.flatten())[0])
    lines = ["| t | Spearman with the meter | less than of pixels | cost of a score |", "|---|---|---|---|"]
    lines.append(f"| pixels | {own:.3f} | | {1000 * (cost + decoding):.1f} ms, decoding {1000 * decoding:.1f} of it |")
    for level in TIMES:
        t = torch.full((len(prompts),), level)
        noisy = family.add_noise(latents, noise, t)
        found, spent = seconds(lambda noisy=noisy, t=t: reward(family, noisy, t, conditions))
        value = float(spearmanr(truth, found.flatten())[0])
        share = spent / (cost + decoding)
        lines.append(f"| {level} | {value:.3f} | {own - value:.3f} | {1000 * spent:.1f} ms, {share:.2f} of it |")
    return "\n".join(lines)


def _choices(
    family: PipelineFamily,
    reward: LatentReward,
    pixels: RewardModel,
    prompts: Sequence[str],
    config: Config,
    begun: int,
) -> str:
    """Severity by the meter of one of several clips a prompt, and passes of the network a prompt, by who chooses."""
    names = [prompt for prompt in prompts for _ in range(begun)]
    seeds = [clip_seed(2, index, -1) for index in range(len(names))]
    latents, videos = _sampled(family, names, seeds, config)
    severity = DefectMeter.load()(videos, names)[0].flatten(1).mean(1).view(-1, begun)
    steps = config.generate.num_inference_steps
    encoded = _encoded(family, prompts)
    arguments = {
        "video_size": (config.generate.num_frames, config.generate.height, config.generate.width),
        "num_inference_steps": steps, "guidance_scale": config.generate.guidance_scale,
    }  # fmt: skip
    times = sampling_times(family, encoded[prompts[0]], latents.shape[1:], arguments)
    chance, best = float(severity.mean()), float(severity.amin(1).mean())
    lines = ["| chosen by | severity | of what the best would take | passes a prompt |", "|---|---|---|---|"]

    def line(name: str, chosen: Tensor, passes: float) -> None:
        value = float(severity.gather(1, chosen[:, None]).mean())
        lines.append(f"| {name} | {value:.4f} | {(chance - value) / (chance - best):.0%} | {passes:.0f} |")

    lines.append(f"| chance | {chance:.4f} | 0% | {steps} |")
    scored = _pixel_scores(pixels, videos, names, config).flatten(1).mean(1).view(-1, begun)
    line("pixels, all clips made", scored.argmax(1), begun * steps)
    for stop in (steps // 4, steps // 2, 3 * steps // 4):
        found = []
        for start in range(0, len(names), config.generate.batch_size):
            rows = slice(start, start + config.generate.batch_size)
            conditions = [encoded[name] for name in names[rows]]
            noise = torch.stack([clip_noise(latents.shape[1:], seed) for seed in seeds[rows]])
            part, _ = sample_part(family, conditions, noise, arguments, stop=stop)
            t = times[stop].expand(len(part))
            found.append(reward(family, part.float(), t, family.stack(conditions)).flatten(1).mean(1))
        chosen = torch.cat(found).view(-1, begun).argmax(1)
        passes = begun * (stop + 1) + steps - stop
        line(f"latents after {stop} of {steps} steps, t = {times[stop]:.2f}", chosen, passes)
    return "\n".join(lines)


def _sampled(
    family: PipelineFamily, prompts: Sequence[str], seeds: Sequence[int], config: Config
) -> tuple[Tensor, Tensor]:
    """Latents and videos of a clip for each prompt and seed."""
    parts, size = [], config.generate.batch_size
    for start in range(0, len(prompts), size):
        rows = slice(start, start + size)
        parts.append(sample_clips(family, prompts[rows], seeds[rows], config.generate))
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])


if __name__ == "__main__":
    main()
