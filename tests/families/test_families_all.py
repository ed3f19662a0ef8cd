"""Every family compared with diffusers' own pipeline and scheduler, and through all stages up to training."""

import contextlib
import dataclasses
import hashlib
import math
import re
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler
from safetensors.torch import load_file
from tiny import TINY, merged, tiny_cogvideox, tiny_config, tiny_ltx, tiny_wan, write_scores

from halo_fast.data import CachedPairs, Pair
from halo_fast.errors import UserError
from halo_fast.families import family_of, load
from halo_fast.patches import PatchGrid
from halo_fast.pipeline.run import Run
from halo_fast.pipeline.stages.cache import build_cache
from halo_fast.pipeline.stages.generate import generate
from halo_fast.pipeline.stages.pairs import build_pairs
from halo_fast.train import fit
from halo_fast.train.draws import make_batch

PROMPTS = ['a red ball rolls "left" over the grass', "a cube"]
STEPS = 4


class Case:
    """One tiny pipeline, its family, noise, and what the pipeline itself made of the prompts."""

    def __init__(self, name):
        self.name, self.tiny = name, TINY[name]
        self.pipeline = self.tiny.build()
        self.family = family_of(self.pipeline, self.tiny.network)
        self.scheduler = self.pipeline.scheduler
        shape = self.family.latent_shape(*self.tiny.size)
        self.noise = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
        self.latents = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1))
        self.conditions = self.family.stack(self.family.encode_prompts(PROMPTS))
        self.flow = hasattr(self.scheduler, "sigmas")

    def pack(self, latents):
        """Latents as the pipeline has them."""
        if "Kandinsky" in self.name:
            return latents.permute(0, 2, 3, 4, 1)
        return self.pipeline._pack_latents(latents) if "LTX" in self.name else latents

    def beginning(self, noise):
        """The pipeline's argument `latents`."""
        packed = self.pack(noise)
        if self.name == "Kandinsky 5":  # followed by a picture to start from and its mask, which it does without
            return torch.cat([packed, torch.zeros_like(packed), torch.zeros_like(packed[..., :1])], dim=-1)
        return packed.clone()

    def frames_first(self, video):
        """The latents as TextToVideoSD's scheduler sees them."""
        return video.transpose(1, 2).flatten(0, 1) if self.name == "TextToVideoSD" else video

    def call(self, guidance_scale, prompts=PROMPTS, **arguments):
        """The pipeline's own way from prompts and noise to a clip."""
        if self.name == "HunyuanVideo 1.5":
            self.pipeline.guider = self.pipeline.guider.new(guidance_scale=guidance_scale)
        else:
            arguments["guidance_scale"] = guidance_scale
        if self.name == "LTX-2" and guidance_scale == 1:
            scales = {"guidance_scale": 1, "stg_scale": 0, "modality_scale": 1, "guidance_rescale": 0}
            arguments |= scales | {f"audio_{name}": scale for name, scale in scales.items()}
        if "prompt_embeds" in self.family.max_length and hasattr(self.family, "max_length") and "1.5" not in self.name:
            arguments["max_sequence_length"] = self.family.max_length["prompt_embeds"]
        elif "CogVideoX" in self.name or self.name == "LTX-2":
            arguments["max_sequence_length"] = 12
        frames, height, width = self.tiny.size
        arguments |= {"num_frames": frames, "height": height, "width": width, "num_inference_steps": STEPS}

        if "SANA" in self.name:
            arguments |= {"frames": arguments.pop("num_frames"), "use_resolution_binning": False}

        def made(prompts, noise):
            if self.name == "LTX-2":  # the video's noise says which sound it is made with
                seeds = [int.from_bytes(hashlib.sha256(clip.numpy().tobytes()).digest()[:4], "big") for clip in noise]
                arguments["generator"] = [torch.Generator().manual_seed(seed) for seed in seeds]
            if self.name == "Helios":  # its pipeline takes no noise, and draws what the case has drawn
                arguments["generator"] = torch.Generator().manual_seed(0)
            frames = self.pipeline(prompt=prompts, latents=self.beginning(noise), **arguments).frames
            if self.name == "LTX-2" and arguments["output_type"] == "latent":
                vae = self.pipeline.vae
                return self.pack(self.pipeline._normalize_latents(frames, vae.latents_mean, vae.latents_std))
            return frames

        if "Kandinsky" in self.name and len(set(prompts)) > 1:
            # its network has no mask: beside a longer prompt it sees the padding, alone it does not
            clips = [made([prompt], noise) for prompt, noise in zip(prompts, self.noise.split(1), strict=True)]
            return torch.cat(clips) if isinstance(clips[0], torch.Tensor) else np.concatenate(clips)
        return made(prompts, self.noise)

    def times(self):
        """The noise levels t that the sampler goes through, the last one 0 for flows; after a call."""
        if not self.flow:
            return self.scheduler.timesteps / self.scheduler.config.num_train_timesteps
        return 1 - self.scheduler.sigmas if self.name == "Mochi" else self.scheduler.sigmas

    def go_to(self, index):
        """Let the scheduler take this step next; HeliosScheduler looks at no begin index."""
        self.scheduler.set_begin_index(index)
        self.scheduler._step_index = index

    def network(self, t):
        if "A14B" in self.name:
            return self.pipeline.transformer if t >= 0.875 else self.pipeline.transformer_2
        return self.family.transformer


@pytest.fixture(scope="module", params=TINY)
def case(request):
    return Case(request.param)


@contextlib.contextmanager
def video_alone(case):
    """LTX-2 without its sound, as it is trained: the pipeline's network is told to keep the two apart."""

    def apart(module, args, named):
        return args, named | {"isolate_modalities": True}

    is_ltx2 = case.name == "LTX-2"
    hook = case.pipeline.transformer.register_forward_pre_hook(apart, with_kwargs=True) if is_ltx2 else None
    yield
    if hook:
        hook.remove()


def flow_step(case, x, output, t, then):
    """x_t = (1 - t) x_0 + t eps moves by dx/dt = eps - x_0, which is minus what Mochi gives."""
    return x + (then - t) * (-output if case.name == "Mochi" else output)


def ddim_step(case, x, output, index):
    """Song et al. (arXiv:2010.02502), eq. 12 without noise, from the scheduler's table of abar."""
    scheduler = case.scheduler
    step = int(scheduler.timesteps[index])
    before = step - scheduler.config.num_train_timesteps // STEPS
    abar = scheduler.alphas_cumprod[step].to(x)
    then = (scheduler.alphas_cumprod[before] if before >= 0 else scheduler.final_alpha_cumprod).to(x)
    if scheduler.config.prediction_type == "v_prediction":
        clean, noise = abar.sqrt() * x - (1 - abar).sqrt() * output, abar.sqrt() * output + (1 - abar).sqrt() * x
    else:
        clean, noise = (x - (1 - abar).sqrt() * output) / abar.sqrt(), output
    return then.sqrt() * clean + (1 - then).sqrt() * noise


@torch.no_grad()
def test_a_loop_by_hand_over_predict_ends_where_the_pipeline_ends(case):
    guidance = 6.0 if case.name == "HunyuanVideo" else 1.0  # HunyuanVideo's scale is an input of the network
    with video_alone(case):
        expected = case.call(guidance, output_type="latent")
    times, x = case.times(), case.noise
    for index in range(STEPS):
        t = times[index]
        output = case.family.predict(case.network(t), x, t.expand(2), case.conditions)
        assert output.shape == x.shape
        x = flow_step(case, x, output, t, times[index + 1]) if case.flow else ddim_step(case, x, output, index)
    assert (x - case.noise).abs().max() > 0.1
    torch.testing.assert_close(case.pack(x), expected.float(), rtol=1e-3, atol=1e-3)
    # The network sees prompt and time.
    t = times[1].expand(2)
    swapped = {name: value.flip(0) for name, value in case.conditions.items()}
    there, other = (case.family.predict(case.family.transformer, x, t, c) for c in (case.conditions, swapped))
    later = case.family.predict(case.family.transformer, x, t * 0.5, case.conditions)
    assert (there - other).abs().max() > 1e-5 and (there - later).abs().max() > 1e-5


def test_sampling_with_guidance_equals_the_pipelines(case):
    expected = case.call(3.0, output_type="latent")
    sampled = case.family.sample(
        case.family.encode_prompts(PROMPTS), case.noise, video_size=case.tiny.size, num_inference_steps=STEPS,
        guidance_scale=3.0,
    )  # fmt: skip
    assert sampled.shape == case.noise.shape and sampled.dtype == torch.float32
    torch.testing.assert_close(case.pack(sampled), expected.float(), rtol=1e-3, atol=1e-3)


def test_a_perfect_prediction_leads_the_scheduler_back_to_the_clean_latents(case):
    case.call(1.0, output_type="latent")
    scheduler, family = case.scheduler, case.family
    if case.flow:
        case.go_to(STEPS - 1)
        t = case.times()[STEPS - 1]
        assert 0 < t < 1 and case.times()[STEPS] == 0
    else:
        t = case.times()[1]
    noisy = family.add_noise(case.latents, case.noise, t.expand(2))
    target = family.target(case.latents, case.noise, t.expand(2))
    if case.flow:
        clean = scheduler.step(target, scheduler.timesteps[STEPS - 1], noisy).prev_sample
    else:
        step = scheduler.timesteps[1]
        torch.testing.assert_close(noisy, scheduler.add_noise(case.latents, case.noise, step.expand(2)))
        clean = scheduler.step(target, step, noisy).pred_original_sample
    torch.testing.assert_close(clean, case.latents, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_a_step_of_the_sampler_keeps_the_noise_and_the_clean_latents_of_the_family(case):
    """In float64: a step's two states and its output are of one x_0 and one eps; for the target, of the pair's."""
    case.call(1.0, output_type="latent")
    family, scheduler = case.family, case.scheduler
    clean, noise = case.latents.double(), case.noise.double()
    now, after = (time.double().expand(2) for time in case.times()[1:3])
    noisy, target = family.add_noise(clean, noise, now), family.target(clean, noise, now)
    output = family.predict(case.network(now[0]), noisy.float(), now.float(), case.conditions).double()
    assert noisy.dtype == target.dtype == torch.float64
    # the pair's own latents, and those that the prediction stands for
    scale = family.add_noise(torch.zeros_like(clean), torch.ones_like(clean), now)
    implied = family.clean(noisy, output, now)
    other = (noisy - family.add_noise(implied, torch.zeros_like(clean), now)) / scale
    for given, of_clean, of_noise in [(target, clean, noise), (output, implied, other)]:
        step = flow_step(case, noisy, given, now[0], after[0]) if case.flow else ddim_step(case, noisy, given, 1)
        torch.testing.assert_close(family.add_noise(of_clean, of_noise, after), step, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(family.target(of_clean, of_noise, now), given, rtol=1e-9, atol=1e-9)
        if case.flow:
            case.go_to(1)
        sampled = scheduler.step(given.float(), scheduler.timesteps[1], noisy.float()).prev_sample
        torch.testing.assert_close(sampled, step.float(), rtol=1e-4, atol=1e-5)


SOLVERS = {
    "Wan 2.1": UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    "SkyReels-V2": UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=8.0),
    "SANA-Video 480p": DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=8.0
    ),
    "Cosmos-Predict 2.5": UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, use_karras_sigmas=True, sigma_min=0.01, sigma_max=200.0
    ),
}


@pytest.mark.parametrize("name", SOLVERS)
def test_the_solvers_that_checkpoints_come_with_go_the_same_way(name):
    """The first step of a solver of higher order; and training times are spread as its own."""
    pipeline, scheduler = TINY[name].build(), SOLVERS[name]
    pipeline.scheduler = scheduler
    family = family_of(pipeline)
    latents, noise = (torch.randn(2, *family.latent_shape(*TINY[name].size), dtype=torch.float64) for _ in range(2))
    scheduler.set_timesteps(5)
    scheduler.set_begin_index(1)
    now, after = (time.double().expand(2) for time in scheduler.sigmas[1:3])
    noisy, target = family.add_noise(latents, noise, now), family.target(latents, noise, now)
    step = scheduler.step(target, scheduler.timesteps[1], noisy).prev_sample
    torch.testing.assert_close(step, family.add_noise(latents, noise, after), rtol=1e-5, atol=1e-6)
    # the network is given whole thousandths by these schedulers, and the time itself in training
    assert (scheduler.timesteps - scheduler.sigmas[:-1] * 1000).abs().max() < 1
    # the uniform draws whose times are the sampler's lie at equal distances from 1 to 0
    scheduler.set_timesteps(500)
    fine = torch.linspace(0, 1, 100_001, dtype=torch.float64)
    u = np.interp(scheduler.sigmas[:-1], family.timesteps(fine), fine)
    assert u[0] > 0.995 and u[-1] < 0.005 and np.ptp(np.diff(u)) < 2e-5


class Step(tuple):
    """What a scheduler's step gives, as a tuple and by name."""

    @property
    def prev_sample(self):
        return self[0]


def test_the_pipeline_undoes_the_normalisation_of_encoding(case, monkeypatch):
    frames, height, width = case.tiny.size
    generator = torch.Generator().manual_seed(2)
    videos = torch.randint(0, 256, (2, frames, height, width, 3), generator=generator, dtype=torch.uint8)
    latents = case.family.encode(videos)
    assert latents.shape == case.noise.shape and latents.is_contiguous()
    # The pipeline is made to end with these latents: it must hand the autoencoder what encoding gave.
    step = Step([case.frames_first(case.pack(latents))])

    def last(scheduler, output, t, sample, **named):
        return step if sample.shape == step[0].shape else Step([sample])  # LTX-2's sound goes its own way

    monkeypatch.setattr(type(case.scheduler), "step", last)
    decode, given = case.pipeline.vae.decode, []

    def recorded(z, *args, **named):
        given.append(z)
        if case.name != "HunyuanVideo 1.5":
            return decode(z, *args, **named)
        # The attention of diffusers' decoder fails on more than one clip.
        return (torch.cat([decode(clip, *args, **named)[0] for clip in z.split(1)]),)

    monkeypatch.setattr(case.pipeline.vae, "decode", recorded)
    pixels = case.call(1.0, ["a cube"] * 2, output_type="np")
    monkeypatch.undo()
    inputs = videos.permute(0, 4, 1, 2, 3).float() / 127.5 - 1
    if given[0].ndim == 4:
        inputs = inputs.transpose(1, 2).flatten(0, 1)
    raw = torch.cat([case.pipeline.vae.encode(clip[None]).latent_dist.mode() for clip in inputs])
    torch.testing.assert_close(torch.cat(given), raw.detach(), rtol=1e-3, atol=1e-4)
    decoded = case.family.decode(latents)
    assert decoded.shape == videos.shape and decoded.dtype == torch.uint8
    assert np.abs(decoded.numpy() - pixels * 255).max() <= 0.6


def test_conditions_are_trimmed_to_the_prompt(case):
    long, short = case.family.encode_prompts(PROMPTS)
    for name, length in case.family.max_length.items():
        assert len(short[name]) <= len(long[name]) <= length and len(case.conditions[name][0]) == length
        assert "embeds_2" in name or "mask_2" in name or 0 < len(short[name]) < len(long[name])
    if "Kandinsky" in case.name:
        assert 0 < len(short["prompt_embeds_qwen"]) < len(long["prompt_embeds_qwen"])
    elif not case.name.startswith(("Wan", "LTX-2", "CogVideoX", "Cosmos")) and case.family.lora_prefix != "unet":
        assert case.family.max_length


def test_frames_belong_to_the_latents_that_the_factors_name(case):
    """Encoders read backwards in time, so a change of frames changes the latents from theirs on (all, where a group
    norm reads the whole clip, but those before by less)."""
    size = case.tiny.size
    grid = PatchGrid((2, 1, 1), *size, **case.family.latent_factors(*size)._asdict())
    assert grid.latent_shape == tuple(case.family.latent_size(case.family.latent_shape(*size)))
    video = torch.randint(256, (1, *size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    before, pixel = grid.latent_edges(0)[1], grid.pixel_edges(0)[1]

    def change(first):
        other = video.clone()
        other[:, first:] = 255 - other[:, first:]
        with torch.no_grad():
            moved = (case.family.encode(other) - case.family.encode(video))[0].abs()
        return moved.movedim(0 if case.family.layout == "BFCHW" else 1, 0).flatten(1).mean(1)

    moved = change(pixel)
    assert moved[:before].max() < moved[before:].min()
    assert change(pixel - 1)[before - 1] > moved[before - 1]


@pytest.mark.parametrize("offset", [(1, 0, 0), (0, 4, 0), (0, 0, 4)])
def test_videos_the_model_cannot_make_are_refused_and_never_cut(case, offset):
    size = tuple(length + more for length, more in zip(case.tiny.size, offset, strict=True))
    if offset[0] and case.family.compression[0] == 1:
        assert case.family.latent_size(case.family.latent_shape(*size))[0] == size[0]
        return
    with pytest.raises(UserError, match=r"(k\+1|33) frames.* with sides divisible by \d+, got num_frames"):
        case.family.latent_shape(*size)
    with pytest.raises(UserError, match=r"(k\+1|33) frames.* with sides divisible by \d+, got num_frames"):
        case.family.encode(torch.zeros(1, *size, 3, dtype=torch.uint8))


def test_stages_training_and_export(case, tmp_path):
    """Generate, pair, cache, train 3 steps; the LoRA in a fresh pipeline acts as B A on the weights."""
    frames, height, width = case.tiny.size
    case.pipeline.save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("a red ball rolls left\na cube jumps\n")
    config = tiny_config(tmp_path, max_train_steps=3, train_batch_size=2, learning_rate=1e-2, lr_warmup_steps=0)
    grid = (2, 2, 2)
    sampling = dataclasses.replace(
        config.generate, num_prompts=2, batch_size=4, num_inference_steps=2, num_frames=frames, height=height,
        width=width,
    )  # fmt: skip
    config = dataclasses.replace(config, grid=grid, generate=sampling)
    run = Run(config)
    generate(config, run)
    write_scores(run)
    build_pairs(config, run)
    build_cache(config, run)
    clips = pyarrow.parquet.read_table(run.require("generate/clips.parquet")).to_pylist()
    kept = load_file(run.require("generate") / clips[0]["latents"])["latents"]
    pairs = CachedPairs(run.require("pairs/pairs.parquet"), run.require("cache"))
    assert len(pairs) == 2 and any(torch.equal(kept, side) for pair in pairs for side in pair.latents)
    family = load(config.pretrained_model_name_or_path, device="cpu", network=case.tiny.network)
    before = {name: value.clone() for name, value in family.transformer.state_dict().items()}
    result = fit(family, pairs, config.train)
    assert all(torch.equal(value, before[name]) for name, value in family.transformer.state_dict().items())
    assert result.log[0]["rewards/margins"] == 0 != result.log[-1]["rewards/margins"]
    assert {name.split(".")[0] for name in result.lora} == {family.lora_prefix}
    fresh = family_of(case.tiny.build(), case.tiny.network)
    t, u = torch.tensor([0.3, 0.8]), torch.tensor([0.2, 0.7])
    t = fresh.timesteps(u, case.noise.shape[1:])
    with torch.no_grad():
        base = fresh.predict(fresh.transformer, case.noise, t, case.conditions)
        fresh.load_lora(result.lora)
        loaded = fresh.predict(fresh.transformer, case.noise, t, case.conditions)
        by_hand = merged(case.tiny, result.lora)
        expected = by_hand.predict(by_hand.transformer, case.noise, t, case.conditions)
        fresh.unload_lora()
        assert torch.equal(fresh.predict(fresh.transformer, case.noise, t, case.conditions), base)
    torch.testing.assert_close(loaded, expected, rtol=1e-4, atol=1e-5)
    assert (loaded - base).abs().max() > 1e-4


def test_the_two_experts_share_the_times_as_the_sampler_does():
    pipeline = tiny_wan(experts=True)
    u = torch.linspace(0, 1, 1001)[:-1]
    high, low = (family_of(pipeline, network).timesteps(u) for network in ("transformer", "transformer_2"))
    assert high.min() >= 0.875 - 1e-6 and high.max() < 1 and low.min() == 0 and low.max() < 0.875
    # The sampler's own times, split at the boundary, have the same distribution as each expert's.
    single = family_of(tiny_wan()).timesteps(torch.linspace(0, 1, 100_001)[:-1])
    for times, own in ((high, single[single >= 0.875]), (low, single[single < 0.875])):
        at = torch.linspace(0.05, 0.95, 10)
        torch.testing.assert_close(times.quantile(at), own.quantile(at), rtol=2e-3, atol=2e-3)


def test_shift_grows_with_the_number_of_tokens_as_in_the_pipeline():
    pipeline = tiny_ltx()
    family = family_of(pipeline)
    shape = family.latent_shape(9, 32, 32)
    u = torch.linspace(0.95, 0.05, 7)
    mu = 0.95 + (3 * 4 * 4 - 32) * (2.05 - 0.95) / (96 - 32)
    pipeline.scheduler.set_timesteps(sigmas=u.tolist(), mu=mu)
    torch.testing.assert_close(family.timesteps(u, shape), pipeline.scheduler.sigmas[:-1])
    pipeline.scheduler.set_timesteps(sigmas=u.tolist(), mu=0.95)
    torch.testing.assert_close(family.timesteps(u), pipeline.scheduler.sigmas[:-1])


def test_times_of_a_discrete_process_are_its_steps():
    family = family_of(tiny_cogvideox())
    u = torch.rand(5000, generator=torch.Generator().manual_seed(0))
    steps = family.steps(family.timesteps(u))
    assert torch.equal(steps, (u.double() * 1000).floor().long())
    every = torch.arange(1000)
    assert torch.equal(family.steps(family.timesteps((every + 0.5) / 1000)), every)


def test_the_documented_model_outside_diffusers_trains():
    """The code of docs/families.md runs as written."""
    text = (Path(__file__).parents[2] / "docs" / "families.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.S)
    names: dict[str, object] = {}
    exec(code, names)
    assert set(names["result"].lora) and len(names["result"].log) == 3


def test_prompts_are_encoded_where_the_text_encoder_is(case, monkeypatch):
    # While training the network alone is on the accelerator, which is then what a pipeline calls its device.
    def elsewhere(pipeline):
        return torch.device("meta")

    monkeypatch.setattr(type(case.pipeline), "_execution_device", property(elsewhere))
    conditions = case.family.stack(case.family.encode_prompts(PROMPTS))
    assert all(torch.equal(conditions[name], value) for name, value in case.conditions.items())


def test_training_times_have_the_shift_of_the_clip_that_is_trained():
    pipeline = tiny_ltx()
    family = family_of(pipeline)
    pair = Pair(torch.randn(2, 8, 3, 4, 4), family.encode_prompts(["a"])[0], torch.rand(2, 1, 1, 1), torch.rand(2))
    t = make_batch(family, [pair], [(0, draw) for draw in range(200)], 0, torch.device("cpu"), limit=200).t
    # 48 tokens lie a fourth of the way between 32 with the logarithm 0.95 and 96 with 2.05; u = 1/2 has its own shift
    shift = math.exp(0.95 + (48 - 32) / (96 - 32) * (2.05 - 0.95))
    assert t.median().item() == pytest.approx(shift / (1 + shift), abs=0.01)


@torch.no_grad()
def test_training_uses_the_guidance_that_the_clips_were_sampled_with():
    pipeline = TINY["HunyuanVideo"].build()
    family, given = family_of(pipeline), []
    pipeline.transformer.register_forward_pre_hook(
        lambda module, args, named: given.append((named["timestep"][0], named["guidance"][0])), with_kwargs=True
    )
    conditions = family.encode_prompts(["a cube"])
    noise = torch.randn(1, *family.latent_shape(9, 32, 32))
    family.sample(conditions, noise, video_size=(9, 32, 32), num_inference_steps=1, guidance_scale=3.5)
    family.set_conditions(3.5, 8)
    family.predict(family.transformer, noise, torch.ones(1), family.stack(conditions))
    assert given[0] == given[1] == (1000, 3500)


@torch.no_grad()
def test_weights_in_bfloat16_predict_alike(case):
    from benchmarks.memory import as_loaded

    family = family_of(case.tiny.build(), case.tiny.network)
    t = family.timesteps(torch.tensor([0.2, 0.7]), case.noise.shape[1:])
    expected = family.predict(family.transformer, case.noise, t, case.conditions)
    # a network that keeps parts in float32 fails without them; others are told more of by all their weights
    (as_loaded if "Kandinsky" in case.name else torch.nn.Module.to)(family.transformer, torch.bfloat16)
    found = family.predict(family.transformer, case.noise, t, case.conditions)
    assert found.dtype == torch.bfloat16
    assert 0 < (found - expected).norm() < 0.05 * expected.norm()
