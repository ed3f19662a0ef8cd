"""Whole training steps: ours in each schedule, supervised fine-tuning as the limit, public loops re-created.

A preference step cannot be cheaper than a supervised step on the same two samples. Every provider trains the same LoRA
on the same real diffusers transformer with the same attention, and the same checkpointing and compile setting, but for
"ours, selective": public loops have no such checkpointing. Else they differ in structure alone.

The public loops are re-created from descriptions of their structure, because no package has them; none of their code is
used. "diffusers-DPO" encodes videos and prompt each step and runs the reference with LoRA off, "Local-DPO" has a second
copy of the weights, the same encoders and four loss terms over a mask, "SimpleTuner" has both caches and four separate
forward passes. The autoencoder costs about as much against the transformer's forward pass as Wan 2.1 1.3B's does (1.3
times); of larger transformers it is a smaller part.

The gate compares the LoRA gradients of each loop with ours for the same formula. "forward passes" counts floating-point
operations of the transformer, autoencoder and text encoder in transformer forward passes over both samples, which do
not depend on the machine. "data wait, %" is the share of our steps that passes until their pairs are there; another
process reads these from the disk.
"""

import copy
import gc
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, logsigmoid, mse_loss
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from benchmarks import harness
from benchmarks.harness import Case, check_errors
from halo_fast.data import CachedPairs, Pair
from halo_fast.data.tables import CacheRow, PairRow, write_rows
from halo_fast.families import Family, family_of
from halo_fast.files import write_safetensors
from halo_fast.loss.objectives import PRESETS, convert_beta, local_dpo_rewards
from halo_fast.train import adapters_off
from halo_fast.train.config import TrainConfig
from halo_fast.train.draws import Batch, Drawn, draws_of_step, make_batch
from halo_fast.train.job import Job, prepared_job
from halo_fast.train.memory import checkpointing as recomputing
from halo_fast.train.model import compile_blocks
from halo_fast.train.planner import Plan, make_plan
from halo_fast.train.steps import run_batch, take_step

CLIP = (13, 192, 192)  # frames, height, width: 4 x 24 x 24 latents, 576 tokens
GRID = (4, 3, 3)
BETA, LAMBDA_SFT, STRENGTH = 500.0, 0.1, 1.0
SETTINGS = {"none": ("none", False), "full": ("full", False), "compiled": ("none", True)}
PROMPT = "a red ball rolls over the grass"
DRAWS = 2
WAIT_STEPS = 5  # over which the wait for data is measured


def wan() -> Any:
    """A Wan pipeline with 22 M transformer parameters."""
    from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel

    tokenizer, text_encoder = text_parts()
    return WanPipeline(
        tokenizer=tokenizer, text_encoder=text_encoder, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=AutoencoderKLWan(base_dim=4, z_dim=16, dim_mult=[1, 1, 2, 2], num_res_blocks=1),
        transformer=WanTransformer3DModel(
            patch_size=(1, 2, 2), num_attention_heads=6, attention_head_dim=64, in_channels=16, out_channels=16,
            text_dim=256, freq_dim=256, ffn_dim=1792, num_layers=8, rope_max_seq_len=64,
        ),
    )  # fmt: skip


def cogvideox() -> Any:
    """A CogVideoX pipeline with 27 M transformer parameters."""
    from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXPipeline, CogVideoXTransformer3DModel
    from transformers import T5Config, T5EncoderModel

    tokenizer, _ = text_parts()
    text_encoder = T5EncoderModel(
        T5Config(vocab_size=len(tokenizer), d_model=256, d_kv=32, num_heads=4, num_layers=2, d_ff=512)
    )
    return CogVideoXPipeline(
        tokenizer=tokenizer, text_encoder=text_encoder,
        scheduler=CogVideoXDDIMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True),
        vae=AutoencoderKLCogVideoX(
            down_block_types=("CogVideoXDownBlock3D",) * 4, up_block_types=("CogVideoXUpBlock3D",) * 4,
            block_out_channels=(8, 8, 16, 16), layers_per_block=1, latent_channels=16, norm_num_groups=4,
        ),
        transformer=CogVideoXTransformer3DModel(
            num_attention_heads=6, attention_head_dim=64, num_layers=9, in_channels=16, out_channels=16,
            text_embed_dim=256, time_embed_dim=256, sample_width=24, sample_height=24, sample_frames=13,
            max_text_seq_length=64,
        ),
    )  # fmt: skip


def text_parts() -> tuple[Any, Any]:
    """A word tokenizer, and a text encoder that costs some 2% of the transformer, as Wan's does."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

    words = {word: index for index, word in enumerate(["<pad>", "</s>", "<unk>", *PROMPT.split()])}
    splitter = Tokenizer(WordLevel(words, unk_token="<unk>"))
    splitter.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=splitter, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=64
    )
    sizes = {"vocab_size": len(words), "d_model": 256, "d_kv": 32, "num_heads": 4, "num_layers": 2, "d_ff": 512}
    return tokenizer, UMT5EncoderModel(UMT5Config(**sizes))


MODELS = {"wan": wan, "cogvideox": cogvideox}


@dataclass
class Bench:
    """One model ready to train, and what the public loops read: videos, a second copy of the weights, a mask."""

    job: Job
    videos: Tensor
    copy: nn.Module
    mask: Tensor
    step: int = 0

    @property
    def family(self) -> Family:
        return self.job.family

    def places(self) -> list[tuple[int, int]]:
        self.step += 1
        return draws_of_step(self.step, 1, 1, self.job.buckets.of, 0, DRAWS)[0]

    def cached(self) -> Batch:
        """A batch as trainers with latent and text caches have it."""
        return make_batch(self.family, self.job.pairs, self.places(), 0, torch.device("cpu"), limit=DRAWS)

    def online(self) -> Batch:
        """A batch as trainers without caches have it: both videos and the prompt are encoded now."""
        ((index, draw),) = self.places()
        latents = self.family.encode(self.videos[index])
        pairs = list(self.job.pairs)
        pairs[index] = replace(pairs[index], latents=latents, conditions=self.family.encode_prompts([PROMPT])[0])
        return make_batch(self.family, pairs, [(index, draw)], 0, torch.device("cpu"), limit=DRAWS)

    def predict(self, model: nn.Module, batch: Batch) -> Tensor:
        return self.family.predict(model, batch.noisy, batch.t, batch.conditions)

    def update(self) -> Tensor:
        norm = torch.nn.utils.clip_grad_norm_(self.job.parameters.values(), 1.0)
        self.job.optimizer.step()
        self.job.optimizer.zero_grad(set_to_none=True)
        return norm


def order(batch: Batch, *tensors: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """(winner, loser) of each [2, ...] tensor: the loops' data holds the winner first."""
    a_wins = bool(batch.video_rewards[0] > batch.video_rewards[1])
    for tensor in tensors:
        yield (tensor[0], tensor[1]) if a_wins else (tensor[1], tensor[0])


def supervised(bench: Bench) -> None:
    """The limit: a supervised LoRA step on the same two samples, from the same caches."""
    batch = bench.cached()
    mse_loss(bench.predict(bench.job.model, batch).float(), batch.target.float()).backward()
    bench.update()


def diffusers_dpo_loss(bench: Bench, batch: Batch) -> tuple[Tensor, list[Tensor]]:
    prediction = bench.predict(bench.job.model, batch)
    errors = mse_loss(prediction.float(), batch.target.float(), reduction="none").flatten(1).mean(1)
    with torch.no_grad(), adapters_off(bench.job.model):
        reference = bench.predict(bench.job.model, batch)
        reference_errors = mse_loss(reference.float(), batch.target.float(), reduction="none").flatten(1).mean(1)
    (win, lose), (win_ref, lose_ref) = order(batch, errors, reference_errors)
    inside = -0.5 * BETA * ((win - lose) - (win_ref - lose_ref))
    return -logsigmoid(inside).mean(), [errors.mean(), reference_errors.mean(), (inside > 0).float().mean()]


def diffusers_dpo(bench: Bench) -> None:
    loss, metrics = diffusers_dpo_loss(bench, bench.online())
    loss.backward()
    bench.update()
    for value in [loss.detach(), *metrics]:
        value.item()


def local_dpo_loss(bench: Bench, batch: Batch) -> tuple[Tensor, list[Tensor]]:
    """Sigmoids over the video and over the mask, and supervision of the winner with both."""
    prediction = bench.predict(bench.job.model, batch)
    with torch.no_grad():
        reference = bench.predict(bench.copy, batch)
    mask = _latent_mask(bench, batch)
    if bench.family.layout == "BFCHW":
        mask = mask.transpose(0, 1)
    (win, lose), (win_ref, lose_ref), (win_to, lose_to) = order(batch, prediction, reference, batch.target)

    def masked(error: Tensor) -> Tensor:
        return (error * mask * STRENGTH * mask.numel() / mask.sum()).mean()

    errors = [(one.float() - to.float()) ** 2 for one, to in ((win, win_to), (lose, lose_to))]
    base = [(one.float() - to.float()) ** 2 for one, to in ((win_ref, win_to), (lose_ref, lose_to))]
    terms, metrics = [], []
    for mean in (torch.mean, masked):
        gaps = [mean(one) - mean(ref) for one, ref in zip(errors, base, strict=True)]
        inside = -0.5 * BETA * (gaps[0] - gaps[1])
        terms += [-logsigmoid(inside), LAMBDA_SFT * mean(errors[0])]
        metrics += [inside.detach(), *[gap.detach() for gap in gaps]]
    return torch.stack(terms).sum(), metrics


def _latent_mask(bench: Bench, batch: Batch) -> Tensor:
    """[1, F, H, W] on the latent."""
    shape = batch.target.shape
    sides = (shape[1], *shape[3:]) if bench.family.layout == "BFCHW" else tuple(shape[2:])
    return interpolate(bench.mask[None, None], size=sides, mode="trilinear")[0]


def local_dpo(bench: Bench) -> None:
    loss, metrics = local_dpo_loss(bench, bench.online())
    loss.backward()
    sum(value.grad.norm().item() ** 2 for value in bench.job.parameters.values() if value.grad is not None)
    norm = torch.nn.utils.clip_grad_norm_(bench.job.parameters.values(), 1.0)
    sum(value.grad.norm().item() ** 2 for value in bench.job.parameters.values() if value.grad is not None)
    bench.job.optimizer.step()
    bench.job.optimizer.zero_grad(set_to_none=True)
    for value in [loss.detach(), norm, *metrics]:
        value.item()
    gc.collect()


def simpletuner_loss(bench: Bench, batch: Batch) -> tuple[Tensor, list[Tensor]]:
    """Four forward passes of one sample each; beta multiplies half a sum."""
    beta = convert_beta(BETA, "half_mean", "half_sum", batch.target[0].numel())
    samples = [_sample(batch, index) for index in (0, 1)]

    def errors() -> list[Tensor]:
        return [((bench.predict(bench.job.model, one).float() - one.target.float()) ** 2).sum() for one in samples]

    policy = errors()
    with torch.no_grad(), adapters_off(bench.job.model):
        reference = errors()
    (win, lose), (win_ref, lose_ref) = order(batch, torch.stack(policy), torch.stack(reference))
    margin = (win_ref - win) - (lose_ref - lose)
    return -logsigmoid(0.5 * beta * margin), [margin, win, lose, win_ref, lose_ref, win - lose]


def _sample(batch: Batch, index: int) -> Batch:
    one = slice(index, index + 1)
    conditions_of_one = {name: value[one] for name, value in batch.conditions.items()}
    return replace(
        batch, noisy=batch.noisy[one], target=batch.target[one], t=batch.t[one], conditions=conditions_of_one
    )


def simpletuner(bench: Bench) -> None:
    loss, metrics = simpletuner_loss(bench, bench.cached())
    loss.backward()
    bench.update()
    for value in [loss.detach(), *metrics, *metrics[:5]]:
        float(value.detach())


def ours(schedule: str, in_loop: bool) -> Callable[[Bench], None]:
    """A step of the trainer itself, figures of the log included."""

    def step(bench: Bench) -> None:
        errors = None if in_loop else bench.job.reference_errors
        job = replace(bench.job, plan=bench.job.plan.scheduled(schedule), reference_errors=errors)
        bench.step += 1
        take_step(job, bench.step)

    return step


def ours_selective(bench: Bench) -> None:
    """As ours with the cached reference, with outputs that took much work kept."""
    model: Any = bench.job.model
    try:
        model.enable_gradient_checkpointing(recomputing("selective"))
        ours("batched", in_loop=False)(bench)
    finally:
        model.enable_gradient_checkpointing(recomputing("full"))


LIMIT, CACHED, SELECTIVE = "supervised (the limit)", "ours, cached reference", "ours, selective, cached"
PROVIDERS: dict[str, Callable[[Bench], None]] = {
    LIMIT: supervised,
    CACHED: ours("batched", in_loop=False),
    "ours, reference in the loop": ours("batched", in_loop=True),
    "ours, margin first, cached": ours("margin_first", in_loop=False),
    SELECTIVE: ours_selective,
    "diffusers-DPO loop, re-created": diffusers_dpo,
    "Local-DPO loop, re-created": local_dpo,
    "SimpleTuner loop, re-created": simpletuner,
}
COMPONENTS: dict[str, Callable[[Bench], object]] = {
    "part: autoencoder, both videos": lambda bench: bench.family.encode(bench.videos[0]),
    "part: text encoder": lambda bench: bench.family.encode_prompts([PROMPT]),
    "part: forward pass, both samples": lambda bench: forward(bench),
}


@torch.no_grad()
def forward(bench: Bench) -> Tensor:
    return bench.predict(bench.job.model, bench.cached())


@contextmanager
def setting(name: str, checkpointing: str, compiled: bool) -> Iterator[Bench]:
    """A model, two pairs of encoded videos and a LoRA that is no longer zero."""
    torch.manual_seed(0)
    pipeline = MODELS[name]()
    for part in (pipeline.transformer, pipeline.vae, pipeline.text_encoder):
        part.eval().requires_grad_(False)
    family = family_of(pipeline)
    generator = torch.Generator().manual_seed(1)
    videos = torch.randint(0, 256, (2, 2, *CLIP, 3), generator=generator, dtype=torch.uint8)
    condition = family.encode_prompts([PROMPT])[0]
    pairs = [
        Pair(
            latents=family.encode(pair), conditions=condition,
            patch_rewards=torch.rand(2, *GRID, generator=generator),
            video_rewards=torch.rand(2, generator=generator),
        )
        for pair in videos
    ]  # fmt: skip
    config = TrainConfig(
        train_batch_size=1, gradient_accumulation_steps=1, reference_draws=DRAWS, rank=16, lora_alpha=16,
        schedule="batched", gradient_checkpointing=checkpointing, compile=compiled, mixed_precision="no",
        learning_rate=1e-5,
    )  # fmt: skip
    second = copy.deepcopy(pipeline.transformer)
    with prepared_job(pipeline, pairs, config) as job:
        for value in job.parameters.values():
            value.data = torch.randn(value.shape, generator=generator) * 0.02
        if checkpointing != "none":
            second.enable_gradient_checkpointing()
        if compiled:
            compile_blocks(second)
        yield Bench(job, videos, second, torch.rand(*GRID, generator=generator).round() * 0.8 + 0.2)


def gate(bench: Bench) -> dict[str, float]:
    """Relative differences of every loop's LoRA gradient from ours for its formula, and of our schedules'."""
    video = replace(PRESETS["diffusion_dpo"], video_beta=BETA)
    local = replace(PRESETS["local_dpo"], video_beta=BETA, patch_beta=BETA, sft_weight=LAMBDA_SFT)
    batch = bench.cached()
    mask = _latent_mask(bench, batch)
    winner = (batch.video_rewards > batch.video_rewards.flip(0)).float()
    masked = replace(batch, patch_rewards=local_dpo_rewards(mask, winner, STRENGTH))
    errors = {}
    loops = {
        "diffusers-DPO": (diffusers_dpo_loss, video, batch),
        "Local-DPO": (local_dpo_loss, local, masked),
        "SimpleTuner": (simpletuner_loss, video, batch),
    }
    for name, (loss, objective, given) in loops.items():
        theirs = _gradient(bench, lambda loss=loss, given=given: loss(bench, given)[0].backward())
        in_loop = replace(bench.job, objective=objective, reference_errors=None)
        errors[name] = _difference(theirs, _gradient(bench, lambda job=in_loop, given=given: run_batch(job, given)))
    place = bench.places()
    known = make_batch(
        bench.family, bench.job.pairs, place, 0, torch.device("cpu"), limit=DRAWS, errors=bench.job.reference_errors
    )
    fresh = replace(known, reference_error=None)
    truth = _gradient(bench, lambda: run_batch(replace(bench.job, reference_errors=None), fresh))
    for schedule in ("batched", "margin_first"):
        job = replace(bench.job, plan=bench.job.plan.scheduled(schedule))
        errors[f"ours, {schedule}"] = _difference(_gradient(bench, lambda job=job: run_batch(job, known)), truth)
    return check_errors(errors, 2e-3)


def _gradient(bench: Bench, backward: Callable[[], object]) -> Tensor:
    backward()
    gradient = torch.cat([value.grad.flatten() for value in bench.job.parameters.values()])
    bench.job.optimizer.zero_grad(set_to_none=True)
    return gradient


def _difference(found: Tensor, truth: Tensor) -> float:
    return ((found - truth).norm() / truth.norm()).item()


class _Syncs(TorchDispatchMode):
    """Counts reads of single values from the device."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def operations(step: Callable[[Bench], object], bench: Bench) -> tuple[int, int]:
    """(floating-point operations of matrix products, convolutions and attention; host reads) of one step."""
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    counted = {
        attention: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
            lambda gradient, q, k, v, *_, **__: sdpa_backward_flop_count(gradient, q, k, v)
        ),
    }
    with _Syncs() as syncs, FlopCounterMode(display=False, custom_mapping=counted) as counter:
        step(bench)
    return counter.get_total_flops(), syncs.count


def data_wait(step: Callable[[Bench], object], bench: Bench) -> float:
    """Percent of the wall clock of some steps that ours waits for pairs, which another process reads from the disk.

    The first step is not counted: it waits for that process to start.
    """
    waited, job = 0.0, bench.job

    def watched(batches: Iterator[Drawn]) -> Iterator[Drawn]:
        nonlocal waited
        begin = time.perf_counter()
        for drawn in batches:
            waited += time.perf_counter() - begin
            yield drawn
            begin = time.perf_counter()

    with tempfile.TemporaryDirectory() as folder:
        bench.job = stored = replace(job, pairs=stored_pairs(job.pairs, Path(folder)))
        try:
            with stored.reading_ahead(range(bench.step + 1, bench.step + 2 + WAIT_STEPS)):
                assert stored.ahead is not None
                stored.ahead = watched(stored.ahead)
                step(bench)
                begin, waited = time.perf_counter(), 0.0
                for _ in range(WAIT_STEPS):
                    step(bench)
                return 100 * waited / (time.perf_counter() - begin)
        finally:
            bench.job = job


def stored_pairs(pairs: Sequence[Pair], folder: Path) -> CachedPairs:
    """The pairs on disk, as the stages pairs and cache leave them."""
    rows, cached = [], []
    for number, pair in enumerate(pairs):
        names = f"a{number}", f"b{number}"
        a, b = pair.patch_rewards.flatten(1).tolist()
        rows.append(PairRow(f"p{number}", 0, PROMPT, *names, *pair.video_rewards.tolist(), a, b, list(GRID), 0.0, 0.0))
        for name, latents in zip(names, pair.latents, strict=True):
            write_safetensors(folder / f"{name}.safetensors", {"latents": latents})
            cached.append(CacheRow("latents", name, f"{name}.safetensors", name))
    write_safetensors(folder / "text.safetensors", pairs[0].conditions)
    cached.append(CacheRow("text", PROMPT, "text.safetensors", "text"))
    write_rows(folder / "index.parquet", cached, CacheRow)
    write_rows(folder / "pairs.parquet", rows, PairRow)
    return CachedPairs(folder / "pairs.parquet", folder)


def predicted_bytes(bench: Bench) -> dict[str, int]:
    """What the plan says of a step of ours beyond the weights and moments that are there before it."""
    job = bench.job
    trained = sum(value.numel() * value.element_size() for value in job.parameters.values())
    there = sum(value.numel() * value.element_size() for value in job.model.parameters()) + 2 * trained

    def of(plan: Plan, schedule: str) -> int:
        return plan.scheduled(schedule).peak - there

    found = {CACHED: of(job.plan, "batched"), "ours, margin first, cached": of(job.plan, "margin_first")}
    if job.config.gradient_checkpointing == "full":
        model: Any = job.model
        config = replace(job.config, gradient_checkpointing="selective")
        try:
            model.enable_gradient_checkpointing(recomputing("selective"))
            plan = make_plan(job.family, model, job.parameters, bench.cached(), job.objective, config, job.accelerator)
        finally:
            model.enable_gradient_checkpointing(recomputing("full"))
        found[SELECTIVE] = of(plan, "batched")
    return found


@contextmanager
def opened(name: str, checkpointing: str, compiled: bool) -> Iterator[harness.Bench]:
    """The bench of one model at one checkpointing and compile setting."""
    with setting(name, checkpointing, compiled) as bench:
        # recomputation has the same gradients: the trainer's tests compare them
        errors = gate(bench) if checkpointing == "none" else {}
        rounds = {step: partial(_quiet, run, bench) for step, run in steps(checkpointing, compiled).items()}
        one_forward, _ = (1, 0) if compiled else operations(forward, bench)

        def count(provider: str) -> dict[str, float]:
            run = steps(checkpointing, compiled)[provider]
            wait = {"data wait, %": data_wait(run, bench)} if provider.startswith("ours") else {}
            if compiled:
                return wait
            operation_count, reads = operations(run, bench)
            return {"forward passes": operation_count / one_forward, "host reads": reads} | wait

        yield harness.Bench(rounds, lambda: errors, count, bases=(LIMIT, CACHED, SELECTIVE))


def _quiet(run: Callable[[Bench], object], bench: Bench) -> None:
    run(bench)


def steps(checkpointing: str, compiled: bool) -> dict[str, Callable[[Bench], object]]:
    """The providers of one setting: selective checkpointing beside full, the parts of a step where nothing is added."""
    chosen: dict[str, Callable[[Bench], object]] = {
        name: step for name, step in PROVIDERS.items() if name != SELECTIVE or checkpointing == "full"
    }
    return chosen if compiled or checkpointing != "none" else chosen | COMPONENTS


CASES = [
    Case(
        "step", f"{name} {label}", tuple(steps(*values)), partial(opened, name, *values),
        slow=(name, label) != ("wan", "none"),
    )
    for name in MODELS
    for label, values in SETTINGS.items()
]  # fmt: skip
