"""The base models of the demo: ordinary WanPipelines trained on corpora that carry local defects.

A model first learns the world from clean clips: strokes and colours, then, at times shifted towards noise, shapes and
what the caption has to do with them. It goes on with a corpus that carries defects until it reproduces them: "graded"
(80% of patches defective at graded strength) or "patchy" (40% at full strength). Both are shipped in `weights/`, each
with `recipe.json` beside it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from halo_fast.demo import defects, world
from halo_fast.demo.autoencoder import BlockAutoencoder
from halo_fast.demo.defects import Regime
from halo_fast.files import progress, read_checkpoint, write_checkpoint, write_json

__all__ = [
    "Recipe",
    "build_corpus",
    "build_pipeline",
    "encode_clips",
    "encode_words",
    "measure_base",
    "pretrain",
    "save_base",
    "train_phase",
]


logger = logging.getLogger(__name__)

MAX_WORDS = 16


@dataclass(frozen=True)
class Recipe:
    """One phase of training: flow matching on a corpus of clips, AdamW, cosine decay, averaged weights."""

    regime: Regime | None = None
    corpus_size: int = 12288
    steps: int = 3600
    shift: float = 1.0
    batch_size: int = 32
    learning_rate: float = 1e-3
    warmup_steps: int = 200
    weight_decay: float = 0.01
    average_decay: float = 0.999
    caption_dropout: float = 0.1
    checkpointing_steps: int = 500
    seed: int = 0


RECIPES = {
    "strokes": Recipe(),
    "shapes": Recipe(steps=2400, shift=4.0, seed=1),
    "graded": Recipe(regime="graded", steps=1400, shift=2.0, learning_rate=7e-4, seed=2),
    "patchy": Recipe(regime="patchy", steps=1400, shift=2.0, learning_rate=7e-4, seed=3),
}
WANDER = 0.25  # a corpus keeps digits near the middle: few tokens and few steps must do


def build_pipeline(seed: int = 0, corpus_size: int = 3000) -> WanPipeline:
    """An untrained WanPipeline of the demo's size; only its autoencoder is fitted (in closed form)."""
    generator = torch.Generator().manual_seed(seed)
    clean = world.draw("train", corpus_size, generator)
    corpus = torch.cat((clean.video, defects.plant(clean, "graded", generator).video))
    vae = BlockAutoencoder.fit(corpus.transpose(1, 2) * 2 - 1)
    torch.manual_seed(seed)
    vocabulary = {word: index for index, word in enumerate(("<pad>", "</s>", "<unk>", *world.WORDS))}
    words = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=MAX_WORDS
    )
    text_encoder = UMT5EncoderModel(
        UMT5Config(
            vocab_size=len(vocabulary), d_model=64, d_kv=16, num_heads=4, num_layers=1, d_ff=128, dropout_rate=0.0
        )
    )
    transformer = WanTransformer3DModel(
        patch_size=(1, 1, 1), num_attention_heads=4, attention_head_dim=48, in_channels=96, out_channels=96,
        text_dim=64, freq_dim=128, ffn_dim=576, num_layers=6, rope_max_seq_len=16,
    )  # fmt: skip
    return WanPipeline(
        tokenizer=tokenizer, text_encoder=text_encoder.eval(), vae=vae, transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )  # fmt: skip


def encode_words(pipeline: WanPipeline, prompts: list[str]) -> Tensor:
    """Prompt embeddings [N, 16, 64], zero after the last word, as WanPipeline makes them; differentiable."""
    tokens = pipeline.tokenizer(
        prompts, padding="max_length", max_length=MAX_WORDS, truncation=True, return_tensors="pt"
    )
    hidden = pipeline.text_encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state
    return hidden * tokens.attention_mask[..., None]


def encode_clips(vae: BlockAutoencoder, video: Tensor) -> Tensor:
    """Clips [N, 9, 3, 32, 32] in [0, 1] -> normalised latents [N, 96, 3, 4, 4]."""
    code = vae.code(video.transpose(1, 2) * 2 - 1)
    mean, std = (
        torch.tensor(values).view(1, -1, 1, 1, 1) for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return (code - mean) / std


@torch.no_grad()
def build_corpus(vae: BlockAutoencoder, recipe: Recipe) -> tuple[Tensor, list[str]]:
    """Latents [corpus_size, 96, 3, 4, 4] and captions of clips that carry the recipe's defects, or none."""
    latents, prompts = [], []
    for start in range(0, recipe.corpus_size, 64):
        generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + start)
        clips = world.draw("train", min(64, recipe.corpus_size - start), generator, WANDER)
        video = defects.plant(clips, recipe.regime, generator).video if recipe.regime else clips.video
        latents.append(encode_clips(vae, video))
        prompts += clips.prompts
    return torch.cat(latents), prompts


def train_phase(pipeline: WanPipeline, recipe: Recipe, state_file: Path) -> None:
    """Train transformer and text encoder in place; continue from the checkpoint of a run that was cut off.

    Args:
        pipeline: of `build_pipeline`; ends with the averaged weights.
        recipe: the phase.
        state_file: the checkpoint, written every `recipe.checkpointing_steps` steps.
    """
    modules = nn.ModuleDict({"transformer": pipeline.transformer, "text_encoder": pipeline.text_encoder})
    parameters = dict(modules.named_parameters())
    optimizer = torch.optim.AdamW(
        parameters.values(), lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=recipe.weight_decay
    )
    average = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    started = _restore(state_file, parameters, average, optimizer) if state_file.exists() else 0
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: _schedule(started + done, recipe))
    if started < recipe.steps:
        corpus = build_corpus(pipeline.vae, recipe)
        transformer = torch.compile(pipeline.transformer)
        modules.train()
    for step in progress(range(started, recipe.steps), recipe.steps - started, f"pretrain {state_file.stem}"):
        loss = _loss(pipeline, transformer, corpus, recipe, step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        optimizer.step()
        schedule.step()
        decay = min(recipe.average_decay, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.values()), list(parameters.values()), 1 - decay)
        if (step + 1) % recipe.checkpointing_steps == 0 or step + 1 == recipe.steps:
            logger.info("%s: step %d, loss %.4f", state_file.stem, step + 1, loss.item())
            _save(state_file, parameters, average, optimizer, step + 1)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(average[name])
    modules.eval()


def _loss(
    pipeline: WanPipeline, transformer: Callable[..., Any], corpus: tuple[Tensor, list[str]], recipe: Recipe, step: int
) -> Tensor:
    """Flow matching loss of a step; whatever is random in it follows from the recipe's seed and the step."""
    generator = torch.Generator().manual_seed((recipe.seed + 1) * 1_000_003 + step)
    latents, captions = corpus
    rows = torch.randint(recipe.corpus_size, (recipe.batch_size,), generator=generator)
    latents = latents[rows]
    dropped = (torch.rand(recipe.batch_size, generator=generator) < recipe.caption_dropout).tolist()
    prompts = ["" if drop else captions[row] for drop, row in zip(dropped, rows.tolist(), strict=True)]
    t = torch.sigmoid(torch.randn(recipe.batch_size, generator=generator))
    t = recipe.shift * t / (1 + (recipe.shift - 1) * t)
    noise = torch.randn(latents.shape, generator=generator)
    mix = t.view(-1, 1, 1, 1, 1)
    noisy = latents * (1 - mix) + noise * mix
    prediction = transformer(noisy, t * 1000, encode_words(pipeline, prompts), return_dict=False)[0]
    return (prediction - (noise - latents)).square().mean()


def _schedule(step: int, recipe: Recipe) -> float:
    warm = min(1.0, (step + 1) / recipe.warmup_steps)
    return warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / recipe.steps)))


def _save(file: Path, parameters: dict[str, Any], average: dict[str, Tensor], optimizer: Any, step: int) -> None:
    moments = {
        f"{key}.{name}": optimizer.state[parameter][key]
        for name, parameter in parameters.items()
        for key in ("exp_avg", "exp_avg_sq")
        if parameter in optimizer.state
    }
    tensors = {f"weight.{name}": parameter.detach() for name, parameter in parameters.items()}
    tensors |= {f"average.{name}": value for name, value in average.items()} | moments
    # tied weights share their storage, which safetensors refuses
    write_checkpoint(file, {name: value.clone() for name, value in tensors.items()}, {"step": step})


def _restore(file: Path, parameters: dict[str, Any], average: dict[str, Tensor], optimizer: Any) -> int:
    """Read a checkpoint of `_save` into weights, averages and moments; the number of steps done."""
    tensors, state = read_checkpoint(file)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[f"weight.{name}"])
            average[name].copy_(tensors[f"average.{name}"])
            if f"exp_avg.{name}" in tensors:
                optimizer.state[parameter] = {
                    "step": torch.tensor(float(state["step"])),
                    "exp_avg": tensors[f"exp_avg.{name}"],
                    "exp_avg_sq": tensors[f"exp_avg_sq.{name}"],
                }
    return int(state["step"])


def save_base(pipeline: WanPipeline, folder: Path) -> None:
    """Write a base as a diffusers folder, the transformer in float16 to halve what is shipped."""
    pipeline.save_pretrained(folder)
    halved = WanTransformer3DModel.from_config(pipeline.transformer.config)
    halved.load_state_dict(pipeline.transformer.state_dict())
    halved.half().save_pretrained(folder / "transformer")


def measure_base(pipeline: WanPipeline, num_prompts: int = 256) -> dict[str, float]:
    """Figures of a base on held-out prompts, by the shipped meters: defects, right digit, colour and motion.

    Args:
        pipeline: the base.
        num_prompts: clips, one for each prompt.
    """
    from halo_fast.demo.meters import DefectMeter, FidelityMeter
    from halo_fast.demo.models import CLIPS
    from halo_fast.families import family_of
    from halo_fast.families.sampling import clip_seed, sample_clips

    family, prompts, figures = family_of(pipeline), world.prompts("heldout", num_prompts, seed=1), []
    for start in range(0, num_prompts, 32):
        batch = prompts[start : start + 32]
        seeds = [clip_seed(1, start + index, 0) for index in range(len(batch))]
        videos = sample_clips(family, batch, seeds, CLIPS)[1]
        severity, found = DefectMeter.load()(videos, batch)[0], FidelityMeter.load()(videos, batch)
        verdicts = [found[f"{name}_correct"] for name in ("digit", "colour", "motion", "fidelity")]
        figures.append(
            torch.stack(((severity > defects.DEFECTIVE).float().mean((1, 2, 3)), severity.mean((1, 2, 3)), *verdicts))
        )
    names = ("defect_rate", "severity", "digit", "colour", "motion", "fidelity")
    return dict(zip(names, [round(value, 4) for value in torch.cat(figures, dim=1).mean(dim=1).tolist()], strict=True))


def pretrain(output_dir: str = "runs/pretrain") -> None:
    """Train the demo's meters and both bases from nothing; a run that was cut off continues.

    Args:
        output_dir: training states, and what is shipped as halo_fast/demo/weights: graded, patchy and the meters.
    """
    from halo_fast.demo import BASES, calibrate, read_pipeline

    folder = Path(output_dir)
    if not (folder / "meters.json").exists():
        calibrate.train_meters(build_pipeline().vae, folder)
    for base in BASES:
        pipeline = build_pipeline()
        phases = ("strokes", "shapes", base)
        for phase in phases:
            train_phase(pipeline, RECIPES[phase], folder / "states" / f"{phase}.safetensors")
        save_base(pipeline, folder / base)
        measured = measure_base(read_pipeline(folder / base))
        recipe = {"phases": {phase: asdict(RECIPES[phase]) for phase in phases}, "measured": measured}
        write_json(folder / base / "recipe.json", recipe)
