"""Run the reference once, beforehand: a few numbers a patch are kept, and training never needs the base model again.

    python examples/cached_reference.py pairs.jsonl --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --draws 4

The reference enters the loss only through its patch errors. So noise and time of each draw come from a seed, the errors
are computed at these draws and written to reference.safetensors, and training looks them up. Other betas, ranks and
learning rates use the same file. Caching pays where a draw is used more than once.
"""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.training_utils import cast_training_params
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from halo_fast import gran_dpo, patch_error
from halo_fast.data import read_clip
from halo_fast.families import family_of


def noisy_pair(family: Any, latents: torch.Tensor, pair: int, draw: int) -> tuple:
    """Time [2], noisy latents and target of a pair at one of its draws: the same whenever it is asked for."""
    generator = torch.Generator().manual_seed(1000 * pair + draw)
    t = family.timesteps(torch.rand(1, generator=generator), latents.shape[1:]).repeat(2).to(latents.device)
    noise = torch.randn(latents[:1].shape, generator=generator).to(latents.device).expand_as(latents)
    return t, family.add_noise(latents, noise, t), family.target(latents, noise, t)


@torch.no_grad()
def cache_reference(family: Any, data: list, draws: int, grid: tuple, file: Path) -> dict[str, torch.Tensor]:
    """Patch errors [2, f, h, w] of the base model at every draw of every pair, as a file."""
    errors = {}
    for pair, (latents, conditions, _) in enumerate(data):
        for draw in range(draws):
            t, noisy, target = noisy_pair(family, latents, pair, draw)
            prediction = family.predict(family.transformer, noisy, t, family.stack(conditions * 2))
            errors[f"{pair}/{draw}"] = patch_error(prediction, target, grid, family.layout).cpu()
    save_file(errors, file)
    return errors


def main(
    pairs: Path,
    model: str = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
    file: Path = Path("reference.safetensors"),
    draws: int = 4,
    steps: int = 500,
    learning_rate: float = 1e-4,
    rank: int = 32,
    dtype: str = "bfloat16",
) -> list[float]:
    """Cache the reference's errors unless the file is there, train, and return the losses."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipeline = DiffusionPipeline.from_pretrained(model, torch_dtype=getattr(torch, dtype)).to(device)
    family, data = family_of(pipeline), []
    for row in map(json.loads, pairs.read_text().splitlines()):
        clips = torch.stack([read_clip(pairs.parent / row[side]) for side in ("chosen", "rejected")])
        scores = torch.tensor([row["chosen_patches"], row["rejected_patches"]], dtype=torch.float32, device=device)
        data.append((family.encode(clips), family.encode_prompts([row["prompt"]]), scores))
    grid = tuple(data[0][2].shape[1:])
    errors = load_file(file) if file.exists() else cache_reference(family, data, draws, grid, file)
    transformer = pipeline.transformer.requires_grad_(False)
    transformer.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=list(family.lora_targets)))
    cast_training_params(transformer)  # LoRA weights in float32
    trained = [weight for weight in transformer.parameters() if weight.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0)
    losses = []
    for step in range(steps):
        pair, draw = step % len(data), step // len(data) % draws
        latents, conditions, patches = data[pair]
        t, noisy, target = noisy_pair(family, latents, pair, draw)
        out = gran_dpo(
            family.predict(transformer, noisy, t, family.stack(conditions * 2)),
            target,
            patch_rewards=patches,
            video_rewards=torch.tensor([1.0, 0.0], device=device),
            reference_error=errors[f"{pair}/{draw}"].to(device),
            layout=family.layout,
        )
        out.loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(out.loss.item())
    return losses


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli(main)
