"""The demo's world, defects, autoencoder, meters and shipped bases, against what can be computed without them."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from sklearn.metrics import roc_auc_score

from halo_fast.agreement.meters import MeterRequest, load_meter
from halo_fast.demo import BASES, WEIGHTS, defects, load_pipeline, pretrain, world
from halo_fast.demo.meters import DefectMeter, FidelityMeter
from halo_fast.demo.models import CLIPS
from halo_fast.errors import UserError
from halo_fast.families import family_of
from halo_fast.families.sampling import sample_clips


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_captions_are_parsed_back_and_splits_are_disjoint():
    train, heldout = world.combinations("train"), world.combinations("heldout")
    assert not set(train) & set(heldout)
    assert len(train) + len(heldout) == 10 * 6 * 2 * 4 * 3
    assert 0.15 < len(heldout) / (len(train) + len(heldout)) < 0.25
    assert all(world.parse(world.caption(attributes)) == attributes for attributes in train)
    for ours, theirs in zip(world.handwriting("train"), world.handwriting("heldout"), strict=True):
        assert not (ours[:, None] == theirs[None]).all(dim=(-1, -2)).any()
    with pytest.raises(ValueError, match="purple"):
        world.parse("a purple 7 drifts left over a dark field")


def test_prompts_are_distinct_and_seeded():
    prompts = world.prompts("heldout", 60, seed=3)
    assert len(set(prompts)) == 60
    assert prompts == world.prompts("heldout", 60, seed=3) != world.prompts("heldout", 60, seed=4)
    everything = len(world.combinations("heldout"))
    assert len(set(world.prompts("heldout", everything))) == everything
    with pytest.raises(ValueError, match=f"heldout split has {everything} distinct prompts, got {everything + 1}"):
        world.prompts("heldout", everything + 1)


def test_digit_moves_as_its_caption_says():
    clips = world.draw("train", 64, generator())
    ink = (clips.video - clips.background).abs().sum(dim=2)  # [N, 9, 32, 32]
    pixel = torch.arange(32.0)
    mass = ink.sum(dim=(-1, -2))
    rows, columns = (ink.sum(-1) * pixel).sum(-1) / mass, (ink.sum(-2) * pixel).sum(-1) / mass
    travel = torch.stack((rows[:, -1] - rows[:, 0], columns[:, -1] - columns[:, 0]), dim=-1)
    for moved, (_, _, speed, direction, _) in zip(travel, clips.attributes, strict=True):
        expected = torch.tensor(world.DIRECTIONS[direction]) * world.SPEEDS[speed] * 8
        torch.testing.assert_close(moved, expected, atol=0.35, rtol=0)


def test_defects_stay_in_their_patches_and_severity_is_the_visible_change():
    clips = world.draw("train", 16, generator())
    planted = defects.plant(clips, "graded", generator(1))
    change = (planted.video - clips.video).abs().amax(dim=2)  # [N, 9, 32, 32]
    for sample in range(16):
        for time, (start, stop) in enumerate(defects.FRAME_GROUPS):
            for row in range(4):
                for column in range(4):
                    cell = slice(8 * row, 8 * row + 8), slice(8 * column, 8 * column + 8)
                    difference = (planted.video - clips.video)[sample, start:stop, :, *cell]
                    severity = min(1.0, float(difference.square().mean().sqrt()) / 0.3)
                    assert abs(float(planted.severity[sample, time, row, column]) - severity) < 1e-5
                    if planted.kind[sample, time, row, column] < 0:
                        assert not change[sample, start:stop, *cell].any()
    assert set(planted.kind.unique().tolist()) == set(range(-1, 6))
    assert 0.7 < (planted.kind >= 0).float().mean() < 0.9


def test_autoencoder_is_causal_and_keeps_what_can_be_seen():
    vae = load_pipeline("graded").vae
    video = world.draw("heldout", 8, generator(2)).video.transpose(1, 2) * 2 - 1
    with torch.no_grad():
        code = vae.encode(video).latent_dist.mode()
        assert code.shape == (8, 96, 3, 4, 4)
        restored = vae.decode(code).sample
        later = video.clone()
        later[:, :, 5:] = 0
        torch.testing.assert_close(vae.encode(later).latent_dist.mode()[:, :, :2], code[:, :, :2])
    noise_ratio = -10 * ((restored - video) / 2).square().mean().log10()
    assert noise_ratio > 30


@pytest.mark.parametrize("regime", BASES)
def test_defect_meter_finds_planted_defects_of_every_kind(regime):
    clips = world.draw("heldout", 192, generator(5))
    planted = defects.plant(clips, regime, generator(6))
    severity, by_kind = DefectMeter.load()(world.to_uint8(planted.video), clips.prompts)
    assert by_kind.shape == (192, 6, 3, 4, 4)
    sound = severity[planted.severity < 0.02]
    for kind in range(6):
        bad = severity[(planted.kind == kind) & (planted.severity > defects.DEFECTIVE)]
        truth = torch.cat((torch.ones(len(bad)), torch.zeros(len(sound))))
        assert roc_auc_score(truth, torch.cat((bad, sound))) > 0.95, defects.KINDS[kind]
    assert (severity - planted.severity).abs().mean() < 0.08


def test_meters_on_clean_clips():
    videos, prompts = world.clean_clips(192, seed=9)
    assert DefectMeter.load()(videos, prompts)[0].mean() < 0.02
    readings = FidelityMeter.load()(videos, prompts)
    assert readings["fidelity_correct"].mean() > 0.95
    travel = torch.tensor([world.SPEEDS[world.parse(prompt)[2]] * 8 for prompt in prompts])
    for speed in travel.unique():
        torch.testing.assert_close(readings["motion_amount"][travel == speed].mean(), speed, atol=1.0, rtol=0)
    others = prompts[1:] + prompts[:1]
    digits = torch.tensor([world.parse(a)[0] != world.parse(b)[0] for a, b in zip(prompts, others, strict=True)])
    assert FidelityMeter.load()(videos, others)["digit_correct"][digits].mean() < 0.05


def test_the_registered_meter_gives_the_readings_of_both_meters():
    videos, prompts = world.clean_clips(4, seed=9)
    request = MeterRequest(defects.GRID, (9, 32, 32), prompts, 0, lambda: pytest.fail("it reads no reward model"))
    meter = load_meter("demo", request)
    found = meter(videos, prompts)
    severity, by_kind = DefectMeter.load()(videos, prompts)
    assert torch.equal(found["severity"], severity)
    assert torch.equal(torch.stack([found[f"severity_{kind}"] for kind in defects.KINDS], dim=1), by_kind)
    assert torch.equal(found["fidelity_correct"], FidelityMeter.load()(videos, prompts)["fidelity_correct"])
    clean, words = world.clean_clips(256, seed=0)
    assert meter.clean == DefectMeter.load()(clean, words)[0].mean().item()
    assert set(meter.sources) == {"defect_meter", "fidelity_meter"} and meter.notes["title"] == "The meters"
    for change, complaint in (
        ({"grid": (3, 2, 2)}, "grid: the demo's meter reads patches"),
        ({"video_size": (17, 32, 32)}, "generate: the demo's meter reads num_frames"),
        ({"prompts": ["a cat"]}, "evaluation_prompts: prompt: expected"),
    ):
        with pytest.raises(UserError, match=complaint):
            load_meter("demo", replace(request, **change))


def test_meters_name_what_is_wrong():
    videos, prompts = world.clean_clips(2, seed=0)
    with pytest.raises(ValueError, match=r"videos: expected uint8 \[N, 9, 32, 32, 3\]"):
        DefectMeter.load()(videos[:, :8], prompts)
    with pytest.raises(ValueError, match="prompts: expected one for each of 2 videos, got 1"):
        FidelityMeter.load()(videos, prompts[:1])
    with pytest.raises(UserError, match="demo:graded"):
        load_pipeline("grainy")


@pytest.mark.slow
@pytest.mark.parametrize("base", BASES)
def test_shipped_base_shows_the_prompt_and_the_defects(base):
    recipe = json.loads((WEIGHTS / base / "recipe.json").read_text())
    family = family_of(load_pipeline(base))
    prompts = world.prompts("heldout", 48, seed=11)
    _, videos = sample_clips(family, prompts, range(48), CLIPS)
    severity, _ = DefectMeter.load()(videos, prompts)
    readings = FidelityMeter.load()(videos, prompts)
    assert (severity > defects.DEFECTIVE).float().mean() >= 0.25
    assert readings["colour_correct"].mean() > 0.9
    for name in ("digit", "motion"):
        # four standard errors of 48 clips around what the recipe reports of 256
        measured = recipe["measured"][name]
        spread = 4 * (max(measured * (1 - measured), 0.01) * (1 / 48 + 1 / 256)) ** 0.5
        assert abs(readings[f"{name}_correct"].mean() - measured) <= spread
    files = [file for file in (WEIGHTS / base).rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 16 * 2**20


@pytest.mark.slow
def test_pretraining_cut_off_ends_as_undisturbed(tmp_path: Path, monkeypatch):
    recipe = replace(
        pretrain.RECIPES["shapes"], corpus_size=64, steps=6, batch_size=4, warmup_steps=2, checkpointing_steps=3
    )
    undisturbed, encode_words, calls = pretrain.build_pipeline(corpus_size=64), pretrain.encode_words, []
    pretrain.train_phase(undisturbed, recipe, tmp_path / "undisturbed.safetensors")

    def interrupt(*arguments):
        calls.append(arguments)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return encode_words(*arguments)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(pretrain, "encode_words", interrupt)
        pretrain.train_phase(pretrain.build_pipeline(corpus_size=64), recipe, tmp_path / "cut.safetensors")
    continued = pretrain.build_pipeline(corpus_size=64)
    pretrain.train_phase(continued, recipe, tmp_path / "cut.safetensors")
    for name, value in undisturbed.transformer.state_dict().items():
        torch.testing.assert_close(continued.transformer.state_dict()[name], value, msg=name)


def test_loading_a_base_draws_no_bars(capfd):
    load_pipeline("graded")
    assert "Loading" not in capfd.readouterr().err
