"""The gradient of a pair at the memory of one sample, for loops that take one clip at a time.

    python examples/one_sample_at_a_time.py pairs.jsonl --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers

Samples couple only through a small table of coefficients: all go forward without a graph, the table is formed, then one
after another goes forward and backward as a weighted mean squared error. The gradient is that of the whole pair.
"""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig
from torch import Tensor

from halo_fast import gran_dpo, gran_dpo_coefficients, patch_weighted_mse
from halo_fast.data import read_clip
from halo_fast.families import family_of
from halo_fast.train import adapters_off

Model = Callable[[Tensor, Tensor], Tensor]


def whole_pair(model: Model, noisy: Tensor, t: Tensor, target: Tensor, reference: Tensor, labels: dict) -> Tensor:
    """Both samples at once; the loss."""
    out = gran_dpo(model(noisy, t), target, reference, **labels)
    out.loss.backward()
    return out.loss.detach()


def one_at_a_time(model: Model, noisy: Tensor, t: Tensor, target: Tensor, reference: Tensor, labels: dict) -> Tensor:
    """The same gradient with the activations of one sample; the same loss."""
    with torch.no_grad():
        predictions = torch.cat([model(x, time) for x, time in zip(noisy.split(1), t.split(1), strict=True)])
        coefficients, out = gran_dpo_coefficients(predictions, target, reference, **labels)
    for x, time, goal, weights in zip(*(part.split(1) for part in (noisy, t, target, coefficients)), strict=True):
        if weights.any():  # a sample whose patches are all ties teaches nothing
            patch_weighted_mse(model(x, time), goal, weights, layout=labels["layout"]).backward()
    return out.loss


def main(
    pairs: Path, model: str = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", rank: int = 32, dtype: str = "bfloat16"
) -> dict[str, float]:
    """Take the first pair both ways and compare losses, gradients and peak memory."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipeline = DiffusionPipeline.from_pretrained(model, torch_dtype=getattr(torch, dtype)).to(device)
    family = family_of(pipeline)
    row = json.loads(pairs.read_text().splitlines()[0])
    clips = torch.stack([read_clip(pairs.parent / row[side]) for side in ("chosen", "rejected")])
    latents, conditions = family.encode(clips), family.encode_prompts([row["prompt"]])
    transformer = pipeline.transformer.requires_grad_(False)
    targets = list(family.lora_targets)
    # random weights instead of zeros: as in the middle of training, policy and reference differ
    transformer.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, init_lora_weights=False))
    trained = [weight for weight in transformer.parameters() if weight.requires_grad]

    def network(noisy: Tensor, t: Tensor) -> Tensor:
        return family.predict(transformer, noisy, t, family.stack(conditions * len(noisy)))

    t = family.timesteps(torch.rand(1, device=device), latents.shape[1:]).repeat(2)
    noise = torch.randn_like(latents[:1]).expand_as(latents)
    noisy, target = family.add_noise(latents, noise, t), family.target(latents, noise, t)
    with torch.no_grad(), adapters_off(transformer):
        reference = network(noisy, t)
    labels = {"video_rewards": torch.tensor([1.0, 0.0], device=device), "layout": family.layout}
    if "chosen_patches" in row:
        scores = [row["chosen_patches"], row["rejected_patches"]]
        labels["patch_rewards"] = torch.tensor(scores, dtype=torch.float32, device=device)
    results = []
    for backward in (whole_pair, one_at_a_time):
        transformer.zero_grad()
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        loss = backward(network, noisy, t, target, reference, labels).item()
        memory = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else float("nan")
        results.append((loss, memory, torch.cat([weight.grad.flatten() for weight in trained])))
        print(f"{backward.__name__}: loss {loss:.6f}, peak {memory:.2f} GiB")
    (loss, _, whole), (other, _, single) = results
    difference = ((whole - single).norm() / whole.norm()).item()
    print(f"gradients differ by {difference:.1e} of their norm")
    return {"loss": loss, "other_loss": other, "difference": difference}


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli(main)
