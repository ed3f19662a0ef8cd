"""Families that go on from a picture, compared with diffusers' own pipelines, and through all stages up to training."""

import dataclasses
import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny import TINY_IMAGE, begun, merged, tiny_clips, tiny_conditions, tiny_config, tiny_images, write_scores
from training import CONFIG, quiet

from halo_fast.data import CachedPairs, Pair
from halo_fast.data.cache import images_cache
from halo_fast.data.clips import write_clip
from halo_fast.data.prompts import prompt_pictures
from halo_fast.data.tables import PairRow
from halo_fast.errors import UserError
from halo_fast.families import family_of, load
from halo_fast.families.sampling import sample_clips
from halo_fast.families.steering import steerable
from halo_fast.pipeline.run import Run
from halo_fast.pipeline.stages.cache import build_cache
from halo_fast.pipeline.stages.generate import generate
from halo_fast.pipeline.stages.pairs import build_pairs
from halo_fast.train import fit
from halo_fast.train.draws import make_batch
from halo_fast.train.job import prepared_job
from halo_fast.train.steps import run_batch

PROMPTS = ["a red ball rolls left", "a cube"]
STEPS = 3


class Case:
    """A tiny pipeline, its family, noise, and pictures of noise."""

    def __init__(self, name):
        self.name, self.tiny = name, TINY_IMAGE[name]
        self.pipeline = self.tiny.build()
        self.family = family_of(self.pipeline)
        shape = self.family.latent_shape(*self.tiny.size)
        self.noise = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
        self.latents = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1))
        self.images = tiny_images(PROMPTS, self.tiny.size)
        self.each = tiny_conditions(self.family, PROMPTS, self.tiny.size)
        self.conditions = self.family.stack(self.each)

    @property
    def is_ltx(self):
        return self.name.startswith("LTX")

    @property
    def in_place(self):
        """Whether the network sees the picture as its clean first frame."""
        return self.is_ltx or "TI2V" in self.name

    def encoded(self, prompt):
        """The picture's latents by the pipeline's own preparation, at the mode where that draws."""
        frames, height, width = self.tiny.size
        image = Image.fromarray(self.images[prompt].numpy())
        pixels = self.pipeline.video_processor.preprocess(image, height=height, width=width)
        vae = self.pipeline.vae
        raw = vae.encode(pixels[:, :, None]).latent_dist.mode()
        return self.pipeline._normalize_latents(raw, vae.latents_mean, vae.latents_std, vae.config.scaling_factor)

    @torch.no_grad()
    def call(self, guidance_scale):
        """The pipeline's own way from prompt, picture and noise to latents, clip by clip."""
        frames, height, width = self.tiny.size
        found = []
        for prompt, noise in zip(PROMPTS, self.noise.split(1), strict=True):
            image = Image.fromarray(self.images[prompt].numpy())
            named = {"image": image, "latents": noise.clone(), "max_sequence_length": self.family.text_limit}
            if self.is_ltx:  # it takes latents that hold the picture already
                first = torch.cat([self.encoded(prompt), noise[:, :, 1:]], dim=2)
                named |= {"image": None, "latents": self.pipeline._pack_latents(first)}
            latents = self.pipeline(
                prompt=prompt, num_frames=frames, height=height, width=width, num_inference_steps=STEPS,
                guidance_scale=guidance_scale, output_type="latent", **named,
            ).frames  # fmt: skip
            size = self.noise.shape[2:]
            found.append(self.pipeline._unpack_latents(latents, *size) if self.is_ltx else latents)
        return torch.cat(found)

    def network(self, t):
        return self.pipeline.transformer_2 if "A14B" in self.name and t < 0.875 else self.pipeline.transformer


@pytest.fixture(scope="module", params=TINY_IMAGE)
def case(request):
    return Case(request.param)


@torch.no_grad()
def test_a_loop_by_hand_over_predict_ends_where_the_pipeline_ends(case):
    expected = case.call(1.0)
    sigmas, x = case.pipeline.scheduler.sigmas, case.noise
    for t, then in zip(sigmas[:-1], sigmas[1:], strict=True):
        output = case.family.predict(case.network(t), x, t.expand(2), case.conditions)
        assert output.shape == x.shape
        x = x + (then - t) * output
    torch.testing.assert_close(x[:, :, 1:], expected[:, :, 1:], rtol=1e-3, atol=1e-3)
    assert (x - case.noise).abs().max() > 0.1
    if case.in_place:
        torch.testing.assert_close(expected[:, :, :1], case.conditions["first_frame"], rtol=1e-4, atol=1e-5)


def test_sampling_with_guidance_equals_the_pipelines(case):
    settings = tiny_clips(num_inference_steps=STEPS, guidance_scale=3.0, fps=25)
    sampled = case.family.sample(
        case.each, case.noise, video_size=case.tiny.size, num_inference_steps=STEPS, guidance_scale=3.0
    )
    torch.testing.assert_close(sampled, case.call(3.0).float(), rtol=1e-3, atol=1e-3)
    latents, videos = sample_clips(case.family, PROMPTS, [1, 2], settings, case.images)
    assert latents.shape == case.noise.shape and tuple(videos.shape) == (2, *case.tiny.size, 3)
    with pytest.raises(UserError, match="go on from a picture, got none for 'a cube'"):
        sample_clips(case.family, PROMPTS, [1, 2], settings, {PROMPTS[0]: case.images[PROMPTS[0]]})
    with pytest.raises(UserError, match=r"expected \[32, 32, 3\], the size of the clips, got \[16, 32, 3\]"):
        sample_clips(case.family, PROMPTS[:1], [1], settings, {PROMPTS[0]: case.images[PROMPTS[0]][:16]})


@torch.no_grad()
def test_a_step_of_the_sampler_keeps_the_noise_and_the_clean_latents_of_the_family(case):
    """In float64, on the frames that are made: a step's two states and its output are of one x_0 and one eps."""
    case.call(1.0)
    family, scheduler = case.family, case.pipeline.scheduler
    clean, noise = case.latents.double(), case.noise.double()
    now, after = (time.double().expand(2) for time in scheduler.sigmas[1:3])
    noisy, target = family.add_noise(clean, noise, now), family.target(clean, noise, now)
    output = family.predict(case.network(now[0]), noisy.float(), now.float(), case.conditions).double()
    implied = family.clean(noisy, output, now)
    other = (noisy - family.add_noise(implied, torch.zeros_like(clean), now)) / now[0]
    for given, of_clean, of_noise in [(target, clean, noise), (output, implied, other)]:
        step = noisy + (after[0] - now[0]) * given
        torch.testing.assert_close(family.add_noise(of_clean, of_noise, after), step, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(family.target(of_clean, of_noise, now), given, rtol=1e-9, atol=1e-9)
        scheduler.set_begin_index(1)
        scheduler._step_index = None
        made = given[:, :, 1:].float(), scheduler.timesteps[1], noisy[:, :, 1:].float()
        torch.testing.assert_close(scheduler.step(*made).prev_sample, step[:, :, 1:].float(), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_network_sees_the_picture_and_never_noise_in_its_place(case):
    family, t = case.family, torch.tensor([0.4, 0.9])
    if case.is_ltx:
        for prompt, found in zip(PROMPTS, case.conditions["first_frame"], strict=True):
            torch.testing.assert_close(found[None], case.encoded(prompt), rtol=1e-4, atol=1e-5)
    noisy = case.noise.clone()
    base = family.predict(family.transformer, noisy, t, case.conditions)
    noisy[:, :, 0] += 1
    elsewhere = family.predict(family.transformer, noisy, t, case.conditions)
    # networks with channels for the picture have a noisy first frame too, and its tokens are seen by the others
    assert torch.equal(elsewhere, base) == case.in_place
    for name in family.image_conditions:
        changed = case.conditions | {name: case.conditions[name].flip(0)}
        other = family.predict(family.transformer, case.noise, t, changed)
        assert (other - base)[:, :, 1:].abs().max() > 1e-5, name


def pairs_of(case, count=2, grid=(2, 2, 2)):
    """Pairs of random latents that begin with their picture."""
    draw = torch.Generator().manual_seed(3)
    pairs = []
    for index in range(count):
        conditions = case.each[index % 2]
        latents = begun(torch.randn(2, *case.noise.shape[1:], generator=draw), conditions)
        patch, video = torch.rand(2, *grid, generator=draw) * 4 + 1, torch.rand(2, generator=draw) * 4 + 1
        pairs.append(Pair(latents, conditions, patch, video))
    return pairs


OBJECTIVE = {"preset": "halo_sft", "video_beta": 100.0, "patch_beta": 10.0, "anchor_weight": 0.1}


@pytest.mark.parametrize("schedule", ["batched", "margin_first"])
def test_a_training_step_does_not_know_the_clips_first_frames(case, schedule, monkeypatch):
    """Gradient at the network's first frame 0; another target there: the same gradient to the bit."""
    monkeypatch.setattr("halo_fast.train.draws._SAME_FRAME", float("inf"))
    objective = OBJECTIVE if schedule == "batched" else OBJECTIVE | {"anchor_weight": 0.0}
    config = dataclasses.replace(
        CONFIG, objective=objective, train_batch_size=2, schedule=schedule, reference_draws=None, auto_beta=None
    )
    pairs, outputs = pairs_of(case), []
    predict = type(case.family).predict

    def watched(family, *given):
        output = predict(family, *given)
        if output.requires_grad:
            output.retain_grad()
            outputs.append(output)
        return output

    monkeypatch.setattr(type(case.family), "predict", watched)
    gradients = []
    with prepared_job(case.family, pairs, config) as job:
        for shift in (0.0, 7.0):
            moved = [dataclasses.replace(pair, latents=pair.latents.clone()) for pair in pairs]
            for pair in moved:
                pair.latents[:, :, 0] += shift
            outputs.clear()
            batch = make_batch(case.family, moved, [(0, 0), (1, 0)], 0, torch.device("cpu"))
            if not case.in_place:  # the first frame's noise is seen by the network
                batch.noisy[:, :, 0] = 0
            figures = run_batch(job, batch)
            assert outputs and all(not output.grad[:, :, 0].any() for output in outputs)
            assert any(output.grad[:, :, 1:].any() for output in outputs)
            gradients.append([value.grad.clone() for value in job.parameters.values()] + [figures.loss])
            for value in job.parameters.values():
                value.grad = None
    assert all(torch.equal(one, two) for one, two in zip(*gradients, strict=True))


def test_reference_errors_are_of_the_made_frames(case):
    config = dataclasses.replace(CONFIG, objective="halo_sft", reference_draws=2, max_train_steps=2, train_batch_size=2)
    pairs = pairs_of(case, grid=(3, 1, 2))  # the first row of patches is the given frame
    with prepared_job(case.family, pairs, config) as job:
        assert job.reference_errors.shape == (2, 2, 2, 3, 1, 2)
        assert not job.reference_errors[..., 0, :, :].any() and job.reference_errors[..., 1:, :, :].all()
        (batch,) = job.batches(0)
        assert batch.patch_rewards[:, 0].isnan().all() and not batch.patch_rewards[:, 1:].isnan().any()


def test_stages_training_and_export(case, tmp_path):
    """Generate from a table with pictures, pair, cache, train 3 steps; the LoRA acts as B A on the weights."""
    frames, height, width = case.tiny.size
    case.pipeline.save_pretrained(tmp_path / "model")
    for index, prompt in enumerate(PROMPTS):  # the clips show the middle of a larger picture
        larger = torch.nn.functional.pad(case.images[prompt], (0, 0, 6, 6), value=9)
        Image.fromarray(larger.numpy()).save(tmp_path / f"{index}.png")
    rows = [{"prompt": prompt, "image": f"{index}.png"} for index, prompt in enumerate(PROMPTS)]
    (tmp_path / "table.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = tiny_config(tmp_path, max_train_steps=3, train_batch_size=2, learning_rate=1e-2, lr_warmup_steps=0)
    config = dataclasses.replace(
        config, grid=(2, 2, 2), prompts=str(tmp_path / "table.jsonl"),
        generate=tiny_clips(num_inference_steps=2, num_frames=frames, height=height, width=width),
    )  # fmt: skip
    run = Run(config)
    generate(config, run)
    write_scores(run)
    build_pairs(config, run)
    build_cache(config, run)
    kept = torch.as_tensor(list(Image.open(run.path / "generate/images/p0001_s0.png").getdata()))
    assert torch.equal(kept.view(height, width, 3), case.images[PROMPTS[1]].long())
    pairs = CachedPairs(run.require("pairs/pairs.parquet"), run.require("cache"))
    for name in case.family.image_conditions:
        for prompt, expected in zip(PROMPTS, case.each, strict=True):
            (pair,) = [pairs[index] for index, one in enumerate(pairs.prompts) if one == prompt]
            torch.testing.assert_close(pair.conditions[name], expected[name], rtol=1e-4, atol=1e-5)
    family = load(config.pretrained_model_name_or_path, device="cpu")
    result = fit(family, pairs, config.train, progress=quiet)
    assert result.log[0]["rewards/margins"] == 0 != result.log[-1]["rewards/margins"]
    fresh, by_hand = family_of(case.tiny.build()), merged(case.tiny, result.lora)
    t = torch.tensor([0.3, 0.8])
    with torch.no_grad():
        base = fresh.predict(fresh.transformer, case.noise, t, case.conditions)
        fresh.load_lora(result.lora)
        loaded = fresh.predict(fresh.transformer, case.noise, t, case.conditions)
        expected = by_hand.predict(by_hand.transformer, case.noise, t, case.conditions)
        fresh.unload_lora()
        assert torch.equal(fresh.predict(fresh.transformer, case.noise, t, case.conditions), base)
    torch.testing.assert_close(loaded, expected, rtol=1e-4, atol=1e-5)
    assert (loaded - base).abs().max() > 1e-4
    # another picture is another input
    Image.fromarray(case.images[PROMPTS[0]].numpy()).save(tmp_path / "1.png")
    with pytest.raises(UserError, match="pictures of prompts"):
        generate(config, Run(config))


def test_pairs_of_different_pictures_are_refused(tmp_path):
    case = Case("LTX-Video, from an image")
    first, second = pairs_of(case)
    with pytest.raises(UserError, match="conditions of the first pair have no first_frame"):
        fit(case.family, [dataclasses.replace(first, conditions=case.family.encode_prompts(["a"])[0])], CONFIG)
    mixed = dataclasses.replace(first, latents=torch.stack([first.latents[0], second.latents[1]]))
    with pytest.raises(UserError, match=r"first latent frame of clip b of pair 0 is \d+% off the given one"):
        make_batch(case.family, [mixed], [(0, 0)], 0, torch.device("cpu"))


def test_imported_clips_go_on_from_their_own_first_frames(tmp_path):
    case = Case("Wan 2.2 TI2V-5B, from an image")
    smooth = torch.linspace(0, 255, 32).to(torch.uint8)[None, :, None].expand(32, 32, 3)
    videos = {}
    for name, frames in {"a": [smooth] * 9, "b": [smooth] + [smooth.flip(1)] * 8, "c": [smooth.flip(1)] * 9}.items():
        videos[name] = tmp_path / f"{name}.mp4"
        write_clip(videos[name], torch.stack(frames).contiguous(), 8, 12)

    def pair(a, b):
        return PairRow(f"{a}-{b}", 0, "a cube", a, b, 1.0, 2.0, [1.0], [2.0], [1, 1, 1], -1.0, 0.0)

    keep = images_cache(case.family, videos, tmp_path, 9)
    (row,) = keep([pair("a", "b")])
    found = load_file(tmp_path / row.file)["first_frame"]
    (expected,) = case.family.encode_images(smooth[None], 9)
    assert (found - expected["first_frame"]).norm() < 0.1 * expected["first_frame"].norm()
    with pytest.raises(UserError, match=r"clips a and c begin with different frames, \d+ of 255 apart"):
        keep([pair("a", "c")])


def test_tables_of_pictures_are_checked(tmp_path):
    table = tmp_path / "table.csv"
    (tmp_path / "one.png").touch()
    (tmp_path / "two.png").touch()
    table.write_text("prompt,image\na cube,one.png\na  ball,two.png\n")
    assert prompt_pictures(str(table)) == {"a cube": tmp_path / "one.png", "a ball": tmp_path / "two.png"}
    table.write_text("prompt,seed\na cube,1\n")
    assert prompt_pictures(str(table)) == {}
    for rows, message in [
        ("a cube,three.png", "row 1: expected the name of a picture in 'image', got 'three.png'"),
        ("a cube,", "row 1: expected the name of a picture in 'image', got ''"),
        ("a cube,one.png\na cube,two.png", "row 2: expected one picture of a prompt, got two of 'a cube'"),
    ]:
        table.write_text(f"prompt,image\n{rows}\n")
        with pytest.raises(UserError, match=message):
            prompt_pictures(str(table))
    assert prompt_pictures(str(tmp_path / "none.csv")) == {}


def test_other_strategies_and_predictions_are_refused_by_name(case):
    with pytest.raises(UserError, match="goes on from a picture, so it can't be entered between steps"):
        steerable(case.family)
    with pytest.raises(UserError, match="depend on the clip's size"):
        case.family.blank_conditions()
