"""Clips sampled from a small Wan: diffusers' own pipeline call beside ours, a clip a call and four.

All get the same noise and prompts, and decode. The gate compares the latents with those of diffusers' pipeline.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import step
from benchmarks.harness import Bench, Case, Round, check_errors
from halo_fast.families import family_of
from halo_fast.families.sampling import GenerateConfig, sample_clips

NUM_CLIPS = 4
SETTINGS = GenerateConfig(num_inference_steps=4, guidance_scale=1.0, num_frames=9, height=96, width=96)
DIFFUSERS, ONE, BATCH = "diffusers' pipeline, a clip a call", "ours, a clip a call", "ours, four clips a call"


def diffusers_clips(pipeline: Any, noise: Tensor, output_type: str = "np") -> Tensor:
    """Clips or latents of diffusers' pipeline, one call for each noise [C, f, h, w]."""
    length = pipeline.tokenizer.model_max_length  # the padding that ours learns from the tokenizer
    sizes = {"num_frames": SETTINGS.num_frames, "height": SETTINGS.height, "width": SETTINGS.width}
    calls = [
        pipeline(
            step.PROMPT, **sizes, num_inference_steps=SETTINGS.num_inference_steps,
            guidance_scale=SETTINGS.guidance_scale, latents=one[None], output_type=output_type,
            max_sequence_length=length,
        ).frames
        for one in noise
    ]  # fmt: skip
    return torch.cat([torch.as_tensor(frames) for frames in calls])


@contextmanager
def opened() -> Iterator[Bench]:
    """The bench: a small Wan of random weights, four clips."""
    torch.manual_seed(0)
    pipeline = step.wan()
    pipeline.set_progress_bar_config(disable=True)
    for part in (pipeline.transformer, pipeline.vae, pipeline.text_encoder):
        part.eval()
    family, seeds = family_of(pipeline), list(range(NUM_CLIPS))
    shape = family.latent_shape(SETTINGS.num_frames, SETTINGS.height, SETTINGS.width)
    noise = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])

    def one_by_one() -> Tensor:
        return torch.cat([sample_clips(family, [step.PROMPT], [seed], SETTINGS)[0] for seed in seeds])

    def batched() -> Tensor:
        return sample_clips(family, [step.PROMPT] * NUM_CLIPS, seeds, SETTINGS)[0]

    truth = diffusers_clips(pipeline, noise, "latent").double()
    ways: dict[str, Callable[[], Tensor]] = {ONE: one_by_one, BATCH: batched}
    errors = {name: ((way() - truth).norm() / truth.norm()).item() for name, way in ways.items()}
    check_errors(errors, 1e-4)
    ways[DIFFUSERS] = partial(diffusers_clips, pipeline, noise)
    rounds: dict[str, Round] = {name: partial(_quiet, way) for name, way in ways.items()}
    yield Bench(rounds, lambda: errors, bases=(DIFFUSERS,))


def _quiet(way: Callable[[], Tensor]) -> None:
    way()


CASES = [Case("generate", "wan 4 clips", (DIFFUSERS, ONE, BATCH), opened)]
