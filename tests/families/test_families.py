"""The Wan family compared with diffusers' own pipeline and scheduler."""

import json
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from tiny import CHANNELS, tiny_clips, tiny_cosmos, tiny_wan

from halo_fast.errors import UserError
from halo_fast.families import Denoiser, Family, RegisteredModel, family_of, load, source
from halo_fast.families.sampling import sample_clips
from halo_fast.families.wan import Wan
from halo_fast.registry import known, resolve

PROMPTS = ["a red ball rolls left", "a cube", "", "green ball over the grass slowly"]


@pytest.fixture(scope="module")
def family():
    return family_of(tiny_wan())


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_unknown_pipeline_is_named():
    with pytest.raises(UserError, match="no family for dict; expected one of .*WanPipeline"):
        family_of({})


def test_family_object_is_taken_as_it_is(family):
    assert family_of(family) is family


def test_networks_a_pipeline_does_not_have_are_refused():
    with pytest.raises(UserError, match="transformer_2 is an expert of Wan 2.2 A14B"):
        family_of(tiny_wan(), "transformer_2")
    with pytest.raises(UserError, match="expected one of transformer, transformer_2, got 'unet'"):
        family_of(tiny_wan(), "unet")


def test_folder_that_is_no_pipeline_is_named(tmp_path):
    with pytest.raises(UserError, match="pretrained_model_name_or_path: no diffusers pipeline at") as caught:
        load(str(tmp_path), device="cpu")
    assert "\n" not in str(caught.value)


def test_a_pipeline_without_a_family_is_refused_with_those_that_exist(tmp_path):
    parts = tiny_wan().components
    pipeline = diffusers.WanVideoToVideoPipeline(
        tokenizer=parts["tokenizer"],
        text_encoder=parts["text_encoder"],
        transformer=parts["transformer"],
        vae=parts["vae"],
        scheduler=parts["scheduler"],
    )
    pipeline.save_pretrained(tmp_path)
    for refused in (lambda: family_of(pipeline), lambda: load(str(tmp_path), device="cpu")):
        with pytest.raises(UserError, match="no family for WanVideoToVideoPipeline; expected one of ") as caught:
            refused()
        assert all(name in str(caught.value) for name in known("family")) and "\n" not in str(caught.value)


def test_a_missing_package_is_named(tmp_path):
    pipeline = tiny_cosmos()
    pipeline.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps(index | {"safety_checker": [None, None]}))
    with pytest.raises(UserError, match="needs a package that is missing: .*cosmos_guardrail") as caught:
        load(str(tmp_path), device="cpu")
    assert "\n" not in str(caught.value)


def test_the_guardrail_of_cosmos_looks_at_prompts_and_clips():
    family = family_of(tiny_cosmos())
    with pytest.raises(UserError, match="guardrail finds 'a ball of blood' unsafe; leave it out"):
        family.encode_prompts(["a cube", "a ball of blood"])
    shape = family.latent_shape(9, 32, 32)
    seen = []
    family.pipeline.safety_checker.check_video_safety = lambda frames: seen.append(frames.shape) or frames // 2
    plain = super(type(family), family).decode(randn(2, *shape))
    assert torch.equal(family.decode(randn(2, *shape)), plain // 2) and seen == [(9, 32, 32, 3)] * 2
    family.pipeline.safety_checker.check_video_safety = lambda frames: None
    with pytest.raises(UserError, match="guardrail finds it unsafe"):
        family.decode(randn(1, *shape))


def test_saved_pipeline_loads_with_the_same_weights(family, tmp_path):
    family.pipeline.save_pretrained(tmp_path)
    loaded = load(str(tmp_path), device="cpu").transformer.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in family.transformer.state_dict().items())
    assert source(str(tmp_path)) == tmp_path and source("someone/model") == "someone/model"


@torch.no_grad()
def test_prompts_are_trimmed_and_stack_restores_the_pipelines_embeddings(family):
    conditions = family.encode_prompts(PROMPTS)
    assert [len(condition["prompt_embeds"]) for condition in conditions] == [5, 2, 0, 6]
    length = family.max_length["prompt_embeds"]
    expected = [
        family.pipeline.encode_prompt(prompt, do_classifier_free_guidance=False, max_sequence_length=length)[0]
        for prompt in PROMPTS
    ]
    assert torch.equal(family.stack(conditions)["prompt_embeds"], torch.cat(expected))


def test_encoding_divides_by_the_standard_deviation(family):
    # Multiplying where Wan divides is a mistake that public trainers carry.
    vae = family.pipeline.vae
    videos = torch.randint(0, 256, (2, 9, 32, 32, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    raw = vae.encode(videos[1:].permute(0, 4, 1, 2, 3).float() / 255 * 2 - 1).latent_dist.mean
    mean, std = (
        torch.tensor(values).view(CHANNELS, 1, 1, 1) for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    torch.testing.assert_close(family.encode(videos)[1], ((raw - mean) / std)[0], rtol=1e-4, atol=1e-5)


def test_decoding_equals_the_pipelines(family):
    latents = randn(2, CHANNELS, 3, 4, 4)
    steps = {"num_frames": 9, "height": 32, "width": 32, "num_inference_steps": 3, "guidance_scale": 1.0}
    embeds = family.stack(family.encode_prompts(PROMPTS[:2]))["prompt_embeds"]
    expected = family.pipeline(prompt_embeds=embeds, latents=latents, output_type="np", **steps).frames
    sampled = family.pipeline(prompt_embeds=embeds, latents=latents, output_type="latent", **steps).frames
    videos = family.decode(sampled).numpy()
    assert videos.dtype == np.uint8 and videos.shape == (2, 9, 32, 32, 3)
    assert np.abs(videos - expected * 255).max() <= 0.51


def test_sampling_equals_the_pipelines_with_guidance(family):
    noise = randn(2, CHANNELS, 3, 4, 4)
    steps = {"num_inference_steps": 3, "guidance_scale": 4.0}
    sampled = family.sample(family.encode_prompts(PROMPTS[:2]), noise, video_size=(9, 32, 32), **steps)
    expected = family.pipeline(
        PROMPTS[:2], latents=noise, num_frames=9, height=32, width=32, output_type="latent",
        max_sequence_length=family.max_length["prompt_embeds"], **steps,
    ).frames  # fmt: skip
    torch.testing.assert_close(sampled, expected, rtol=1e-4, atol=1e-4)
    unguided = family.sample(
        family.encode_prompts(PROMPTS[:2]), noise, video_size=(9, 32, 32), num_inference_steps=3, guidance_scale=1.0
    )
    assert (sampled - unguided).abs().max() > 1e-3


def test_times_follow_the_schedulers_shift(family):
    u = torch.linspace(0.95, 0.05, 7)
    scheduler = family.pipeline.scheduler
    scheduler.set_timesteps(sigmas=u.tolist())
    assert scheduler.config.shift == 3
    torch.testing.assert_close(family.timesteps(u), scheduler.sigmas[:-1])


def test_noise_and_target_are_the_schedulers_flow(family):
    latents, noise = randn(3, CHANNELS, 3, 4, 4), randn(3, CHANNELS, 3, 4, 4, seed=1)
    scheduler = family.pipeline.scheduler
    scheduler.set_timesteps(5)
    scheduler.set_begin_index(0)
    t = scheduler.sigmas[1]
    noisy = family.add_noise(latents, noise, t.expand(3))
    torch.testing.assert_close(noisy, (1 - t) * latents + t * noise)
    # One Euler step of the scheduler along the target goes from one noise level to the next.
    scheduler.step(torch.zeros_like(noisy), scheduler.timesteps[0], noisy)
    stepped = scheduler.step(family.target(latents, noise, t.expand(3)), scheduler.timesteps[1], noisy).prev_sample
    expected = family.add_noise(latents, noise, scheduler.sigmas[2].expand(3))
    torch.testing.assert_close(stepped, expected, rtol=1e-5, atol=1e-5)


def test_prediction_is_the_transformers_at_the_schedulers_timesteps(family):
    noisy, t = randn(2, CHANNELS, 3, 4, 4), torch.tensor([0.25, 0.5])
    conditions = family.stack(family.encode_prompts(PROMPTS[:2]))
    with torch.no_grad():
        predicted = family.predict(family.transformer, noisy, t, conditions)
        timestep = torch.tensor([250.0, 500.0])
        expected = family.transformer(noisy, timestep, conditions["prompt_embeds"]).sample
    assert torch.equal(predicted, expected)


@pytest.mark.parametrize("size", [(10, 32, 32), (9, 24, 32), (9, 32, 40)])
def test_clip_size_the_model_cannot_make_is_refused(family, size):
    assert family.latent_shape(13, 32, 48) == (CHANNELS, 4, 4, 6)
    with pytest.raises(UserError, match=r"4k\+1 frames with sides divisible by 16, got num_frames"):
        family.latent_shape(*size)


@pytest.mark.parametrize("size", [(8, 32, 32), (11, 48, 32), (9, 60, 52), (1, 33, 32)])
def test_encoding_drops_no_frames_and_no_pixels(family, size):
    with pytest.raises(UserError, match=r"4k\+1 frames with sides divisible by 16, .* the next that fit are"):
        family.encode(torch.zeros(1, *size, 3, dtype=torch.uint8))


def test_sizes_are_known_without_weights(tmp_path):
    tiny_wan().save_pretrained(tmp_path)
    for weights in tmp_path.rglob("*.safetensors"):
        weights.unlink()
    skeleton = load(str(tmp_path), weights=())
    assert skeleton.latent_shape(9, 48, 32) == (CHANNELS, 3, 6, 4)
    with pytest.raises(UserError, match="got num_frames 10"):
        skeleton.latent_shape(10, 48, 32)
    with pytest.raises(UserError, match="no diffusers pipeline at 'nowhere'"):
        load("nowhere", weights=())


def test_a_clip_depends_on_its_batch_only_through_rounding(family):
    settings = tiny_clips(num_inference_steps=3)
    together, _ = sample_clips(family, PROMPTS[:2] * 2, [1, 2, 3, 4], settings)
    alone, video = sample_clips(family, PROMPTS[1:2], [2], settings)
    torch.testing.assert_close(together[1:2], alone, rtol=1e-4, atol=1e-4)
    assert video.shape == (1, 9, 32, 32, 3)
    assert (together[1] - together[3]).abs().max() > 0.1  # the seed matters


def own_model():
    return family_of(tiny_wan())


OWN = RegisteredModel(tiny_wan, Path(__file__))


def test_models_of_ones_own_are_loaded_by_dotted_name():
    for name in ("own_model", "OWN"):
        assert isinstance(load(f"{__name__}:{name}", device="cpu"), Wan)
    assert source(f"{__name__}:OWN") == Path(__file__)
    assert source(f"{__name__}:own_model") == f"{__name__}:own_model"
    with pytest.raises(UserError, match="pretrained_model_name_or_path: expected one of .*'demo:graded'.*no_such"):
        load(f"{__name__}:no_such")
    with pytest.raises(UserError, match="pretrained_model_name_or_path: expected a model that samples and encodes"):
        load(f"{__name__}:TrainedOnly")


def test_asking_for_a_source_changes_no_global_state(tmp_path):
    import diffusers.utils.logging
    import transformers.utils.logging

    logs = [diffusers.utils.logging, transformers.utils.logging]
    before = [log.is_progress_bar_enabled() for log in logs]
    source("demo:graded")
    with pytest.raises(UserError):
        load(str(tmp_path))
    assert [log.is_progress_bar_enabled() for log in logs] == before


class TrainedOnly(Denoiser):
    """The four things that training needs."""

    shift = 3.0
    transformer = torch.nn.Linear(3, 3)

    def stack(self, conditions):
        return {}

    def predict(self, model, noisy, t, conditions):
        return model(noisy.movedim(1, -1)).movedim(-1, 1)


def test_a_model_that_only_trains_needs_four_things():
    family = TrainedOnly()
    assert family_of(family) is family
    latents, noise = randn(2, 3, 1, 4, 4), randn(2, 3, 1, 4, 4, seed=1)
    t = family.timesteps(torch.tensor([0.0, 0.5]))
    assert t.tolist() == [0, 0.75]
    noisy = family.add_noise(latents, noise, t)
    assert family.predict(family.transformer, noisy, t, family.stack([{}])).shape == latents.shape
    assert torch.equal(family.target(latents, noise, t), noise - latents)
    with pytest.raises(UserError, match="expected a Family, which samples, got TrainedOnly, which only trains"):
        sample_clips(family, ["a"], [0], tiny_clips())


def test_every_registered_family_is_found_by_its_pipelines_class():
    for name in known("family"):
        assert name.endswith("Pipeline") and hasattr(diffusers, name)
        assert issubclass(resolve("family", name), Family)
    with pytest.raises(UserError, match="no family for Linear; expected one of .*WanPipeline"):
        family_of(torch.nn.Linear(1, 1))
