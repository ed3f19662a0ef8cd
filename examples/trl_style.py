"""Gran-DPO in the Trainer of transformers, as TRL's DPOTrainer does it for text: compute_loss is all that is new.

    python examples/trl_style.py pairs.jsonl --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers

pairs.jsonl has TRL's columns prompt, chosen and rejected (clips beside the file), and patch scores if there are any:
"chosen_patches" and "rejected_patches", nested lists [f][h][w]. Either all rows have them or none.
"""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

from halo_fast import gran_dpo
from halo_fast.data import read_clip
from halo_fast.families import family_of


class GranDPOTrainer(Trainer):
    """A Trainer of a PEFT model whose adapter is the policy; with the adapter off it is the reference."""

    def __init__(self, family: Any, objective: Any = "halo_bounded", **arguments: Any) -> None:
        super().__init__(data_collator=self.collate, **arguments)
        self.family, self.objective = family, objective

    def collate(self, rows: list[dict]) -> dict:
        """One batch: the chosen clips of all rows first, then the rejected ones in the same order."""
        sides = [[row[side] for row in rows] for side in ("chosen", "rejected")]
        batch = {"latents": torch.stack(sides[0] + sides[1])}
        batch |= self.family.stack([row["conditions"] for row in rows * 2])
        if "patches" in rows[0]:
            batch["patches"] = torch.cat(torch.stack([row["patches"] for row in rows]).unbind(1))
        return batch

    def compute_loss(self, model: Any, inputs: dict, return_outputs: bool = False, **_: Any) -> Any:
        family, latents, patches = self.family, inputs.pop("latents"), inputs.pop("patches", None)
        pairs = len(latents) // 2
        t = family.timesteps(torch.rand(pairs, device=latents.device), latents.shape[1:]).repeat(2)
        noise = torch.randn_like(latents[:pairs]).repeat(2, 1, 1, 1, 1)
        noisy, target = family.add_noise(latents, noise, t), family.target(latents, noise, t)
        model.eval()  # dropout would make policy and reference differ by chance
        with torch.no_grad(), self.accelerator.unwrap_model(model).disable_adapter():
            reference = family.predict(model, noisy, t, inputs)
        video = torch.tensor([1.0, 0.0], device=latents.device).repeat_interleave(pairs)
        out = gran_dpo(
            family.predict(model, noisy, t, inputs), target, reference, patches, video,
            objective=self.objective, layout=family.layout,
        )  # fmt: skip
        if self.state.global_step % self.args.logging_steps == 0:
            self.log({name: value.item() for name, value in out.metrics().items()})
        return (out.loss, out) if return_outputs else out.loss


def main(
    pairs: Path,
    model: str = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
    output: Path = Path("trained"),
    steps: int = 500,
    learning_rate: float = 1e-4,
    rank: int = 32,
    batch_size: int = 1,
    dtype: str = "bfloat16",
) -> list[dict]:
    """Train, save the adapter in PEFT's form, and return the log."""
    pipeline = DiffusionPipeline.from_pretrained(model, torch_dtype=getattr(torch, dtype))
    pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
    family = family_of(pipeline)
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    data = []
    for row in rows:
        chosen, rejected = (family.encode(read_clip(pairs.parent / row[side])[None])[0].cpu() for side in SIDES)
        data.append({"chosen": chosen, "rejected": rejected, "conditions": family.encode_prompts([row["prompt"]])[0]})
        if "chosen_patches" in row:
            data[-1]["patches"] = torch.tensor([row[f"{side}_patches"] for side in SIDES], dtype=torch.float32)
    lora = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(family.lora_targets))
    trainer = GranDPOTrainer(
        family,
        model=get_peft_model(pipeline.transformer, lora),
        train_dataset=data,
        args=TrainingArguments(
            output_dir=str(output), max_steps=steps, learning_rate=learning_rate, remove_unused_columns=False,
            per_device_train_batch_size=batch_size, logging_steps=10, report_to=[],
        ),
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    return trainer.state.log_history


SIDES = ("chosen", "rejected")

if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli(main)
