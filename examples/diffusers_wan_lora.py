"""A LoRA for Wan by Gran-DPO, in a plain diffusers loop.

    python examples/diffusers_wan_lora.py pairs.jsonl --steps 500

A row of pairs.jsonl: {"prompt": "...", "chosen": "a.mp4", "rejected": "b.mp4", "chosen_patches": [[[4, 2], [5, 5]]],
"rejected_patches": [[[1, 5], [5, 3]]]}. The clips lie beside the file and have 4k+1 frames with sides divisible by 16.
Patch scores are nested lists [f][h][w] on any scale; rows without them train on the video's preference alone.
"""

import json
from pathlib import Path

import torch
from diffusers import WanPipeline
from diffusers.training_utils import cast_training_params
from peft import LoraConfig, get_peft_model_state_dict

from halo_fast import gran_dpo
from halo_fast.data import read_clip
from halo_fast.train import adapters_off


@torch.no_grad()
def encode(pipeline: WanPipeline, row: dict, folder: Path) -> tuple:
    """Both clips' latents [2, C, F, H, W] as the sampler has them, prompt embeddings, and patch scores or None."""
    vae = pipeline.vae
    clips = torch.stack([read_clip(folder / row[side]) for side in ("chosen", "rejected")])
    pixels = clips.permute(0, 4, 1, 2, 3).to(vae.device, vae.dtype) / 127.5 - 1
    latents = torch.cat([vae.encode(clip).latent_dist.mode() for clip in pixels.split(1)]).float()
    mean, std = (latents.new_tensor(vae.config[name]).view(1, -1, 1, 1, 1) for name in ("latents_mean", "latents_std"))
    prompt, _ = pipeline.encode_prompt(row["prompt"], do_classifier_free_guidance=False, max_sequence_length=512)
    scores = [row.get(f"{side}_patches") for side in ("chosen", "rejected")]
    patches = None if None in scores else torch.tensor(scores, dtype=torch.float32, device=latents.device)
    return (latents - mean) / std, prompt.expand(2, -1, -1), patches


def main(
    pairs: Path,
    model: str = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
    output: Path = Path("lora"),
    steps: int = 500,
    learning_rate: float = 1e-4,
    rank: int = 32,
    shift: float = 3.0,
    objective: str = "halo_bounded",
    dtype: str = "bfloat16",
) -> list[float]:
    """Train and save the LoRA; the losses are returned."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipeline = WanPipeline.from_pretrained(model, torch_dtype=getattr(torch, dtype)).to(device)
    data = [encode(pipeline, json.loads(line), pairs.parent) for line in pairs.read_text().splitlines()]
    transformer = pipeline.transformer.requires_grad_(False)
    transformer.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    cast_training_params(transformer)  # LoRA weights in float32
    transformer.enable_gradient_checkpointing()
    trained = [weight for weight in transformer.parameters() if weight.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0)
    video = torch.tensor([1.0, 0.0], device=device)  # the first clip of each pair is the chosen one
    losses = []
    for step in range(steps):
        latents, prompt, patches = data[step % len(data)]
        u = torch.rand((), device=device)
        t = shift * u / (1 + (shift - 1) * u)  # the sampler's shift
        noise = torch.randn_like(latents[:1])  # time and noise are shared by the pair
        noisy, target = (1 - t) * latents + t * noise, noise - latents
        inputs = {"hidden_states": noisy.to(transformer.dtype), "timestep": (1000 * t).expand(2)}
        inputs |= {"encoder_hidden_states": prompt, "return_dict": False}
        with torch.no_grad(), adapters_off(transformer):
            reference = transformer(**inputs)[0]
        out = gran_dpo(transformer(**inputs)[0], target, reference, patches, video, objective=objective)
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        optimiser.zero_grad()
        losses.append(out.loss.item())
        if step % 10 == 0:
            print(step, {name: round(value.item(), 4) for name, value in out.metrics().items()})
    WanPipeline.save_lora_weights(output, transformer_lora_layers=get_peft_model_state_dict(transformer))
    return losses


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli(main)
