"""Samplers that are entered between steps, left early and held: every family against diffusers' own steps."""

import dataclasses

import pytest
import torch
from diffusers import (
    CogVideoXDPMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from tiny import TINY, tiny_clips, tiny_cogvideox, tiny_ltx2, tiny_text_to_video_sd, tiny_wan

from halo_fast.data.regions import covered_share, moving_region, worst_region
from halo_fast.errors import UserError
from halo_fast.families import family_of, sampling
from halo_fast.families.base import Family
from halo_fast.families.sampling import first_step, sample_clips, sample_trunks, sample_variations
from halo_fast.families.steering import sample_part, sampling_times, steerable

PROMPTS = ["a red ball rolls left", "a cube"]
STEPS = 4


class Case:
    """A tiny model with its own sampler, and every state that one undisturbed call of its pipeline goes through."""

    def __init__(self, name):
        tiny = TINY[name]
        self.family = steerable(family_of(tiny.build(), tiny.network))
        frames, height, width = tiny.size
        self.settings = tiny_clips(num_frames=frames, height=height, width=width, num_inference_steps=STEPS)
        if name == "HunyuanVideo":
            self.settings.guidance_scale = 6.0  # an input of its network
        self.arguments = {
            "video_size": tiny.size, "num_inference_steps": STEPS, "guidance_scale": self.settings.guidance_scale,
        }  # fmt: skip
        self.shape = self.family.latent_shape(*tiny.size)
        self.noise = torch.randn(2, *self.shape, generator=torch.Generator().manual_seed(0))
        self.conditions = self.family.encode_prompts(PROMPTS)
        self.family.set_conditions(self.settings.guidance_scale, self.settings.fps)
        self.states, self.outputs, self.whole = self._states()

    def _states(self):
        """Samples and outputs as the scheduler is given them, in model space, and where it ends."""
        scheduler, states, outputs = self.family.pipeline.scheduler, [], []
        original = scheduler.step

        def model_space(value):
            if value.ndim == 4:
                return value.reshape(2, -1, *value.shape[1:]).transpose(1, 2)
            return self.family.unpack(value, self.family.latent_size(self.shape))

        def step(output, t, sample, *rest, **named):
            states.append(model_space(sample).float().clone())  # some pipelines write into it
            outputs.append(model_space(output).float())
            return original(output, t, sample, *rest, **named)

        scheduler.step = step
        try:
            whole = self.family.sample(self.conditions, self.noise, **self.arguments)
        finally:
            del scheduler.step
        return states, outputs, whole


@pytest.fixture(autouse=True)
def undecoded(monkeypatch):
    """Latents are looked at here; that decoders give their pixels is tested beside `sample_clips`."""
    monkeypatch.setattr(sampling, "_decode", lambda family, latents, clip: torch.zeros(1, 1, 1, 1, 3).byte())


# whose samplers and latents are those of another
_ALIKE = ("Wan 2.2 A14B, high noise", "Wan 2.2 A14B, low noise", "CogVideoX 2B", "LTX-Video 0.9.1")
_ALIKE += ("SANA-Video 720p", "LTX-2")  # the last one's sampler can't be entered


@pytest.fixture(scope="module", params=[name for name in TINY if name not in _ALIKE])
def case(request):
    return Case(request.param)


def test_a_sampler_that_is_entered_late_goes_on_as_if_it_had_begun_at_the_beginning(case):
    assert len(case.states) == STEPS
    latents, _ = sample_part(case.family, case.conditions, case.states[3], case.arguments, start=3)
    torch.testing.assert_close(latents, case.whole, rtol=1e-4, atol=1e-4)
    again = case.family.sample(case.conditions, case.noise, **case.arguments)
    assert torch.equal(again, case.whole)  # nothing of it stays behind


def test_a_sampler_that_is_left_early_stops_where_the_whole_way_passes(case):
    latents, estimate = sample_part(case.family, case.conditions, case.noise, case.arguments, stop=2)
    torch.testing.assert_close(latents, case.states[2], rtol=1e-4, atol=1e-4)
    # state and output of a step are those of x_0 and some noise at its time, and the next state is of the same two
    times = sampling_times(case.family, case.conditions[0], case.shape, case.arguments)
    then, after = (times[index].expand(2) for index in (1, 2))
    a, s = (case.family.add_noise(torch.full_like(estimate, x), torch.full_like(estimate, 1 - x), then) for x in (1, 0))
    noise = (case.states[1] - a * estimate) / s
    torch.testing.assert_close(case.family.target(estimate, noise, then), case.outputs[1], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(case.family.add_noise(estimate, noise, after), case.states[2], rtol=1e-3, atol=1e-3)


def test_what_is_held_stays_and_what_is_not_is_made_again(case):
    guides = case.whole
    regions = torch.stack([moving_region(case.family.latent_size(case.shape), 0.3, seed) for seed in (1, 2)])
    latents, videos = sample_variations(case.family, PROMPTS, [5, 6], guides, case.settings, regions)
    inside = regions.unsqueeze(1 if case.family.layout == "BCFHW" else 2).expand_as(latents)
    assert torch.equal(latents[~inside], guides[~inside])
    assert (latents - guides)[inside].abs().mean() > 0.01
    assert videos.shape[0] == 2 and videos.dtype == torch.uint8


def test_solvers_of_higher_order_and_with_noise_of_their_own_are_entered_too():
    for pipeline, scheduler in [
        (tiny_wan(), UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3)),
        (tiny_cogvideox(), CogVideoXDPMScheduler.from_config(tiny_cogvideox().scheduler.config)),
    ]:
        pipeline.scheduler = scheduler
        family, settings = family_of(pipeline), tiny_clips(num_inference_steps=6, strength=0.5)
        guides, _ = sample_clips(family, PROMPTS, [1, 2], settings)
        regions = torch.zeros(2, 3, 4, 4, dtype=torch.bool)
        regions[:, 1:] = True
        latents, _ = sample_variations(family, PROMPTS, [3, 4], guides, settings, regions)
        kept = latents[:, :, 0] if family.layout == "BCFHW" else latents[:, 0]
        assert torch.equal(kept, guides[:, :, 0] if family.layout == "BCFHW" else guides[:, 0])
        assert latents.isfinite().all() and 0.01 < (latents - guides).abs().mean() < 3
        assert sample_trunks(family, PROMPTS, [1, 2], settings).isfinite().all()


def test_a_sampler_with_more_than_the_video_to_go_on_from_is_refused():
    with pytest.raises(UserError, match="generate.strategy: the sampler of LTX2 makes sound .* independent"):
        steerable(family_of(tiny_ltx2()))


def test_a_clip_of_full_strength_forgets_its_guide_and_a_trunk_of_it_is_nothing():
    family, settings = family_of(tiny_wan()), tiny_clips(strength=1.0)
    expected, _ = sample_clips(family, PROMPTS, [3, 4], settings)
    guides = torch.randn(expected.shape, generator=torch.Generator().manual_seed(9))
    latents, _ = sample_variations(family, PROMPTS, [3, 4], guides, settings)
    torch.testing.assert_close(latents, expected)
    assert not sample_trunks(family, PROMPTS, [3, 4], settings).any()


@pytest.mark.parametrize(("strength", "steps", "first"), [(1, 4, 0), (0.6, 5, 2), (0.6, 16, 7), (0.01, 4, 3)])
def test_strength_is_a_share_of_the_steps(strength, steps, first):
    assert first_step(tiny_clips(strength=strength, num_inference_steps=steps)) == first


def test_samplers_that_cannot_be_entered_are_named():
    pipeline = tiny_text_to_video_sd()
    pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    with pytest.raises(
        UserError, match=r"generate.strategy: EulerDiscreteScheduler scales its latents .* such as DDIM"
    ):
        sample_trunks(family_of(pipeline), PROMPTS[:1], [0], tiny_clips(num_frames=3))

    class Own(Family):
        encode = decode = encode_prompts = latent_shape = predict = sample = stack = None

    with pytest.raises(UserError, match="generate.strategy: Own samples by itself, .* set it to independent"):
        steerable(Own())
    assert steerable(family_of(tiny_wan())).pipeline.scheduler.__class__ is FlowMatchEulerDiscreteScheduler


@pytest.mark.parametrize("size", [(3, 4, 4), (21, 60, 104), (1, 8, 5)])
@pytest.mark.parametrize("share", [0.05, 0.25, 0.9, 1.0])
def test_a_moving_region_covers_its_share(size, share):
    volume = size[0] * size[1] * size[2]
    regions = [moving_region(size, share, seed) for seed in range(20)]
    for region in regions:
        assert region.any() and abs(int(region.sum()) - share * volume) <= size[0] / 2 + 1
    assert torch.equal(regions[0], moving_region(size, share, 0))
    if share < 0.5:
        assert len({tuple(region.flatten().tolist()) for region in regions}) > 5


def test_a_region_moves_and_is_of_one_piece():
    region = moving_region((21, 40, 40), 0.1, 4)
    frames = [frame.nonzero().float() for frame in region if frame.any()]
    centres = torch.stack([frame.mean(0) for frame in frames])
    assert (centres[0] - centres[-1]).norm() > 3
    for frame, centre in zip(frames, centres, strict=True):
        # an ellipse of this area, at most e times as long as wide
        assert (frame - centre).norm(dim=1).max() < (len(frame) / torch.pi) ** 0.5 * 2.72**0.5 + 2


def test_the_worst_patches_are_those_with_the_least_scores():
    scores = torch.full((3, 2, 2), 4.0)
    scores[0, 1, 0], scores[2, 0, 1] = 1.0, 2.0
    region = worst_region(scores, (5, 4, 6), 2 / 12)
    expected = torch.zeros(5, 4, 6, dtype=torch.bool)
    expected[0:1, 2:, :3] = True  # frames floor(k 5 / 3): 0, 1 to 2, 3 to 4
    expected[3:, :2, 3:] = True
    assert torch.equal(region, expected)
    share = covered_share(region, (3, 2, 2))
    assert share.sum() == 2 and share[0, 1, 0] == share[2, 0, 1] == 1
    assert dataclasses.is_dataclass(tiny_clips()) and int(worst_region(scores, (5, 4, 6), 0.001).sum()) == 6
