"""A LoRA for CogVideoX by Gran-DPO, in a plain diffusers loop: v-prediction, latents with frames before channels.

    python examples/diffusers_cogvideox_lora.py pairs.jsonl --steps 500

pairs.jsonl is that of diffusers_wan_lora.py; clips have 8k+1 frames with sides divisible by 16.
"""

import json
from pathlib import Path

import torch
from diffusers import CogVideoXPipeline
from diffusers.training_utils import cast_training_params
from peft import LoraConfig, get_peft_model_state_dict

from halo_fast import gran_dpo
from halo_fast.data import read_clip
from halo_fast.train import adapters_off


@torch.no_grad()
def encode(pipeline: CogVideoXPipeline, row: dict, folder: Path) -> tuple:
    """Both clips' latents [2, F, C, H, W], prompt embeddings, rotary embeddings or None, patch scores or None."""
    vae, config = pipeline.vae, pipeline.transformer.config
    clips = torch.stack([read_clip(folder / row[side]) for side in ("chosen", "rejected")])
    pixels = clips.permute(0, 4, 1, 2, 3).to(vae.device, vae.dtype) / 127.5 - 1
    latents = torch.cat([vae.encode(clip).latent_dist.mode() for clip in pixels.split(1)]).float()
    latents = latents.transpose(1, 2) * vae.config.scaling_factor
    prompt, _ = pipeline.encode_prompt(
        row["prompt"], do_classifier_free_guidance=False, max_sequence_length=config.max_text_seq_length
    )
    rotary = None
    if config.use_rotary_positional_embeddings:
        height, width = clips.shape[2:4]
        rotary = pipeline._prepare_rotary_positional_embeddings(height, width, latents.shape[1], latents.device)
    scores = [row.get(f"{side}_patches") for side in ("chosen", "rejected")]
    patches = None if None in scores else torch.tensor(scores, dtype=torch.float32, device=latents.device)
    return latents, prompt.expand(2, -1, -1), rotary, patches


def main(
    pairs: Path,
    model: str = "THUDM/CogVideoX-2b",
    output: Path = Path("lora"),
    steps: int = 500,
    learning_rate: float = 1e-4,
    rank: int = 32,
    objective: str = "halo_bounded",
    dtype: str = "bfloat16",
) -> list[float]:
    """Train and save the LoRA; the losses are returned."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipeline = CogVideoXPipeline.from_pretrained(model, torch_dtype=getattr(torch, dtype)).to(device)
    data = [encode(pipeline, json.loads(line), pairs.parent) for line in pairs.read_text().splitlines()]
    transformer, scheduler = pipeline.transformer.requires_grad_(False), pipeline.scheduler
    transformer.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    cast_training_params(transformer)  # LoRA weights in float32
    transformer.enable_gradient_checkpointing()
    trained = [weight for weight in transformer.parameters() if weight.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0)
    video = torch.tensor([1.0, 0.0], device=device)  # the first clip of each pair is the chosen one
    losses = []
    for step in range(steps):
        latents, prompt, rotary, patches = data[step % len(data)]
        t = torch.randint(scheduler.config.num_train_timesteps, (1,), device=device).expand(2)
        noise = torch.randn_like(latents[:1]).expand_as(latents)  # time and noise are shared by the pair
        noisy, target = scheduler.add_noise(latents, noise, t), scheduler.get_velocity(latents, noise, t)
        inputs = {"hidden_states": noisy.to(transformer.dtype), "timestep": t, "encoder_hidden_states": prompt}
        inputs |= {"image_rotary_emb": rotary, "return_dict": False}
        with torch.no_grad(), adapters_off(transformer):
            reference = transformer(**inputs)[0]
        prediction = transformer(**inputs)[0]
        out = gran_dpo(prediction, target, reference, patches, video, objective=objective, layout="BFCHW")
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        optimiser.zero_grad()
        losses.append(out.loss.item())
        if step % 10 == 0:
            print(step, {name: round(value.item(), 4) for name, value in out.metrics().items()})
    CogVideoXPipeline.save_lora_weights(output, transformer_lora_layers=get_peft_model_state_dict(transformer))
    return losses


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli(main)
