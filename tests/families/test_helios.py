"""Helios: chunks of the pipeline's own making, its history, its schedule, and what has no family."""

import inspect

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, HeliosPyramidPipeline, HeliosScheduler
from tiny import tiny_clips, tiny_helios
from training import CONFIG, quiet

from halo_fast.data import Pair
from halo_fast.errors import UserError
from halo_fast.families import family_of
from halo_fast.families.sampling import sample_clips, sample_variations
from halo_fast.train import fit

PROMPTS = ["a red ball rolls left", "a cube"]
CLIP = {"num_frames": 33, "num_inference_steps": 4}


def made(pipeline, seeds, **arguments):
    """The pipeline's own latents of the prompts, each from noise of its seed."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return pipeline(
        PROMPTS, generator=generators, output_type="latent", height=32, width=48, max_sequence_length=12,
        **{"num_frames": 33, "num_inference_steps": 4, "guidance_scale": 1.0} | arguments,
    ).frames  # fmt: skip


def seen(network):
    """The inputs of the network's calls."""
    calls = []
    network.register_forward_pre_hook(lambda module, args, named: calls.append(named), with_kwargs=True)
    return calls


@pytest.mark.parametrize("kind", ["euler", "unipc"])
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_clips_are_the_pipelines_of_the_same_seeds(kind, guidance):
    pipeline = tiny_helios(scheduler_type=kind)
    settings = tiny_clips(**CLIP, width=48, guidance_scale=guidance)
    latents, videos = sample_clips(family_of(pipeline), PROMPTS, [5, 6], settings)
    expected = made(pipeline, [5, 6], guidance_scale=guidance)
    torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-4)
    assert videos.shape == (2, 33, 32, 48, 3)


def test_what_is_trained_is_the_first_chunk_of_a_longer_clip():
    pipeline = tiny_helios()
    calls = seen(pipeline.transformer)
    longer = made(pipeline, [5, 6], num_frames=66, num_inference_steps=2)
    assert len(calls) == 4 and longer.shape[2] == 18
    torch.testing.assert_close(longer[:, :, :9], made(pipeline, [5, 6], num_inference_steps=2))
    # beside its noise the second chunk has a history, and nothing else of its own
    first, second = ({name: value for name, value in calls[k].items() if torch.is_tensor(value)} for k in (0, 2))
    different = {name for name, value in first.items() if not torch.equal(value, second[name])}
    assert different == {"hidden_states"} | {f"latents_history_{part}" for part in ("short", "mid", "long")}
    family = family_of(pipeline)
    inputs = family.network_inputs(
        first["hidden_states"], first["timestep"] / 1000, family.stack(family.encode_prompts(PROMPTS))
    )
    assert inputs.keys() == first.keys()
    for name, value in inputs.items():
        torch.testing.assert_close(value, first[name], check_dtype=False)


@pytest.mark.parametrize(
    "settings",
    [{}, {"time_shift_type": "linear"}, {"use_dynamic_shifting": False}, {"scheduler_type": "unipc"}],
)
@pytest.mark.parametrize("size", [(33, 32, 32), (33, 64, 48)])
def test_times_have_the_shift_of_the_pipelines_schedule(settings, size):
    family = family_of(tiny_helios(**settings))
    shape, scheduler = family.latent_shape(*size), family.pipeline.scheduler
    family.sample(
        family.encode_prompts(PROMPTS[:1]), torch.randn(1, *shape), video_size=size, num_inference_steps=3,
        guidance_scale=1.0,
    )  # fmt: skip
    u = torch.linspace(0.999, 0, 4, dtype=torch.float64)
    torch.testing.assert_close(family.timesteps(u, shape), scheduler.sigmas, rtol=1e-6, atol=1e-6)
    assert torch.allclose(scheduler.sigmas, u) == ("use_dynamic_shifting" in settings)


@torch.no_grad()
def test_unipc_takes_its_first_step_along_the_same_noise_and_clean_latents():
    family = family_of(tiny_helios(scheduler_type="unipc"))
    scheduler = family.pipeline.scheduler
    clean, noise = (torch.randn(2, *family.latent_shape(33, 32, 32), dtype=torch.float64) for _ in range(2))
    scheduler.set_timesteps(5, sigmas=np.linspace(0.999, 0, 6)[:-1], mu=0.5)
    now, after = (time.expand(2) for time in scheduler.sigmas[:2])
    step = scheduler.step(family.target(clean, noise, now), scheduler.timesteps[0], family.add_noise(clean, noise, now))
    torch.testing.assert_close(step.prev_sample, family.add_noise(clean, noise, after), rtol=1e-9, atol=1e-9)


def test_unipc_is_entered_between_steps():
    family, settings = family_of(tiny_helios(scheduler_type="unipc")), tiny_clips(**CLIP, strength=0.5)
    guides, _ = sample_clips(family, PROMPTS, [1, 2], settings)
    regions = torch.zeros(2, 9, 4, 4, dtype=torch.bool)
    regions[:, 3:] = True
    latents, _ = sample_variations(family, PROMPTS, [3, 4], guides, settings, regions)
    assert torch.equal(latents[:, :, :3], guides[:, :, :3])
    assert 0.01 < (latents - guides)[:, :, 3:].abs().mean() < 3


@pytest.mark.parametrize("num_frames", [1, 9, 32, 66, 132])
def test_clips_of_more_or_less_than_a_chunk_are_refused(num_frames):
    family = family_of(tiny_helios())
    with pytest.raises(UserError, match=f"makes 33 frames .one chunk: .* got num_frames {num_frames}, .* are 33, 32"):
        family.latent_shape(num_frames, 32, 32)
    assert family.closest_format(num_frames, 47, 33) == (33, 32, 32)


@pytest.mark.parametrize(
    ("frames", "message"), [(18, "takes at most 9 latent frames, got 18"), (3, "chunks of 9 latent frames, got 3")]
)
def test_pairs_of_more_or_less_than_a_chunk_are_not_trained(frames, message):
    family = family_of(tiny_helios())
    latents = torch.randn(2, 4, frames, 4, 4)
    pair = Pair(latents, family.encode_prompts(["a cube"])[0], torch.rand(2, 1, 1, 1), torch.rand(2))
    with pytest.raises(UserError, match=message):
        fit(family, [pair], CONFIG, progress=quiet)


def test_schedules_that_are_not_trained_are_refused():
    pipeline = tiny_helios()
    for scheduler, told in [
        (HeliosScheduler(), "HeliosScheduler with stages=3"),
        (FlowMatchEulerDiscreteScheduler(), "FlowMatchEulerDiscreteScheduler with stages=None"),
    ]:
        pipeline.scheduler = scheduler
        with pytest.raises(UserError, match=f"a HeliosScheduler with stages=1, got {told}"):
            family_of(pipeline)
    pyramid = HeliosPyramidPipeline(**tiny_helios().components)
    with pytest.raises(UserError, match="no family for HeliosPyramidPipeline; expected one of .*HeliosPipeline"):
        family_of(pyramid)


def test_the_history_is_that_of_the_pipelines_defaults():
    family = family_of(tiny_helios())
    assert (family.chunk, family.history, family.chunk_frames) == (9, [16, 2, 1], 33)
    assert inspect.signature(family.pipeline.__call__).parameters["keep_first_frame"].default is True
