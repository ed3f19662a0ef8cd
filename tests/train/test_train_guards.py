"""What stops and warns a training: loss spikes, values that are not finite, rising winner errors, foreign clips."""

import dataclasses
import logging
import math
from types import SimpleNamespace

import pytest
import torch
from tiny import tiny_clips, tiny_wan
from training import CONFIG, make_pairs, quiet

from halo_fast.errors import UserError
from halo_fast.families import family_of
from halo_fast.loss.objectives import build
from halo_fast.train import fit
from halo_fast.train.config import TrainConfig
from halo_fast.train.draws import make_batch
from halo_fast.train.observers.diagnostics import Diagnostics, displacement_warning, margin_warning, winner_warning
from halo_fast.train.observers.guards import check_rows
from halo_fast.train.off_policy import OffPolicy, fresh_pairs, off_policy_gap


def rows(losses, **more):
    return [{"step": step, "loss": loss, "grad_norm": 1.0, **more} for step, loss in enumerate(losses, start=1)]


@pytest.mark.parametrize("name", ["loss", "grad_norm"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_stop_even_without_spike_guard(name, value):
    log = rows([0.7] * 8)
    log[6][name] = value
    config = TrainConfig(loss_spike_factor=None)
    check_rows(log[:6], 0, config)
    with pytest.raises(UserError, match=f"train: {name} is {value} at step 7, nothing was saved"):
        check_rows(log, 6, config)


def test_noise_and_a_single_high_loss_are_no_spike():
    generator = torch.Generator().manual_seed(0)
    noisy = (0.7 + 0.3 * torch.randn(400, generator=generator)).clamp(min=0.05).tolist()
    noisy[200] = 8.0
    check_rows(rows(noisy), 0, TrainConfig())
    # losses of separated pairs vary by orders of magnitude, and a median of ever smaller ones says nothing
    separated = [0.7, 0.5, *[5e-6] * 30, *[7e-5] * 5]
    check_rows(rows(separated), 0, TrainConfig())
    with pytest.raises(UserError, match="loss spikes at step 39"):
        check_rows(rows([*separated, 0.02, 0.02]), 0, TrainConfig())
    # the first steps have nothing to be compared with
    check_rows(rows([100.0, 0.7, 0.7, 0.7, 0.7, 0.7, 0.7]), 0, TrainConfig())


def test_divergence_stops_at_the_same_step_however_often_rows_are_read():
    log = rows([0.7] * 60 + [1.5, 3.0, 6.0, 9.0, 12.0, 20.0])
    stopped = set()
    for every in (1, 3, 7, 66):
        with pytest.raises(UserError) as error:
            for end in range(every, len(log) + every, every):
                check_rows(log[:end], end - every, TrainConfig())
        stopped.add(str(error.value))
    (message,) = stopped
    # mean of 0.7, 1.5, 3, 6, 9 is 4.04 > 5 x 0.7; one step before it is 2.38
    assert "loss spikes at step 64: 4.04 over 5 steps after 0.7 before" in message
    check_rows(log, 0, TrainConfig(loss_spike_factor=None))
    check_rows(log, 0, TrainConfig(loss_spike_factor=50.0))


def test_a_spike_stops_training_before_anything_is_saved(family, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    # a factor below 1 takes an ordinary loss for a spike at the first step that has ten losses to judge by
    config = dataclasses.replace(
        CONFIG, max_train_steps=12, checkpointing_steps=10, loss_spike_factor=0.1, diagnostics_steps=5
    )
    with pytest.raises(UserError, match="train: loss spikes at step 10"):
        fit(family, make_pairs(family), config, folder=tmp_path, progress=quiet)
    assert not list(tmp_path.glob("checkpoints/*"))
    assert "error of the base on winners" in caplog.text


def test_a_warning_comes_when_the_winners_error_rises():
    def row(rise, label="patch", split="heldout", group="all"):
        return {
            "step": 40, "label": label, "split": split, "group": group,
            "winner_policy": 0.4 * (1 + rise), "winner_reference": 0.4,
        }  # fmt: skip

    assert winner_warning([], "patch", 0.5) is None
    assert winner_warning([row(-0.1), row(0.45, "video")], "patch", 0.5) is None
    assert "error on winning patches is 60% above the reference's at step 40" in winner_warning(
        [row(0.6)], "patch", 0.5
    )
    # held-out pairs go before the training's own, and the whole before its parts
    assert winner_warning([row(0.6, split="train"), row(0.1), row(0.9, group="timestep")], "patch", 0.5) is None
    assert "60%" in winner_warning([row(0.6, split="train")], "patch", 0.5)
    # a winning video has losing patches, so it is judged only where videos are all there is
    assert winner_warning([row(0.1), row(0.7, "video")], "patch", 0.5) is None
    assert "error on winning videos is 70%" in winner_warning([row(0.1), row(0.7, "video")], "video", 0.5)
    assert winner_warning([row(0.9)], "patch", None) is None


def test_the_limit_of_the_warning_is_the_square_of_how_far_the_policy_has_moved():
    generator = torch.Generator().manual_seed(0)
    target, miss, change = torch.randn(3, 400_000, generator=generator)
    reference = target + 0.6 * miss
    for moved, warned in ((0.70, False), (0.72, True)):
        policy = reference + moved * 0.6 * change
        row = {
            "step": 1, "label": "patch", "split": "heldout", "group": "all",
            "winner_policy": (policy - target).square().mean().item(),
            "winner_reference": (reference - target).square().mean().item(),
        }  # fmt: skip
        assert (winner_warning([row], "patch", 0.5) is not None) == warned


@pytest.fixture(scope="module")
def family():
    return family_of(tiny_wan())


@pytest.fixture
def one_thread():
    """On a busy machine two threads of a tiny model wait for each other, many times as long as one computes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def warnings_of(caplog, folder, family, pairs, objective, **changes):
    """What a training of the tiny model logs about its diagnostics."""
    caplog.clear()
    config = dataclasses.replace(
        CONFIG, objective={"preset": "diffusion_dpo", "video_beta": 500.0} | objective, winner_alarm=None,
        loss_spike_factor=None, checkpointing_steps=100, off_policy_pairs=0, **changes,
    )  # fmt: skip
    fit(family, pairs, config, folder=folder, progress=quiet)
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def test_winners_and_losers_that_rise_together_are_named(family, caplog, tmp_path, one_thread):
    """Two clips that are nearly one: what moves the loser away moves the winner too."""
    pairs = []
    for pair in make_pairs(family):
        latents = torch.stack([pair.latents[0], pair.latents[0] + 0.1 * pair.latents[1]])
        pairs.append(dataclasses.replace(pair, latents=latents, video_rewards=torch.tensor([3.1, 3.0])))
    steps = {"learning_rate": 2e-2, "max_train_steps": 20, "diagnostics_steps": 20}
    (said,) = warnings_of(caplog, tmp_path / "near", family, pairs, {}, **steps)
    assert said.startswith("train: likelihood displacement at step 20: the errors on winning and losing videos rise")
    assert "raise objective.video_delta" in said and "sft_weight" in said
    # the advice helps: with a supervised term the errors do not rise
    assert not warnings_of(caplog, tmp_path / "supervised", family, pairs, {"sft_weight": 2000.0}, **steps)


def test_a_margin_that_is_pushed_on_is_named_and_a_cap_ends_it(family, caplog, tmp_path, one_thread):
    pairs = make_pairs(family)
    steps = {"learning_rate": 4e-3, "max_train_steps": 40, "diagnostics_steps": 40}
    (said,) = warnings_of(caplog, tmp_path / "free", family, pairs, {}, **steps)
    assert said.startswith("train: over-maximised margin at step 40: the mean logit of videos is ")
    assert "expected at most 5" in said and "set objective.video_cap" in said
    assert not warnings_of(caplog, tmp_path / "capped", family, pairs, {"video_cap": 0.3}, **steps)


def test_rows_that_warn_of_displacement_and_of_margins():
    def row(winner, loser, margin=0.0, label="patch", split="heldout", group="all"):
        return {
            "step": 40, "label": label, "split": split, "group": group, "margin": margin,
            "winner_policy": 0.4 * (1 + winner), "winner_reference": 0.4,
            "loser_policy": 0.5 * (1 + loser), "loser_reference": 0.5,
        }  # fmt: skip

    # both must rise: a loser alone is what a preference asks for, a winner alone is the other warning's
    for winner, loser in ((-0.1, 0.9), (0.09, 0.9), (0.9, 0.05), (0.9, -0.2)):
        assert displacement_warning([row(winner, loser)], "patch", 0.1) is None
    said = displacement_warning([row(0.2, 0.3)], "patch", 0.1)
    assert "patches rise together, 20% and 30% above the reference's, expected at most 10% of both" in said
    assert "objective.patch_delta" in said
    # held-out pairs go before the training's own, and the whole before its parts
    hidden = [row(0.2, 0.3, 9.0, split="train"), row(0.0, 0.3), row(0.9, 0.9, 9.0, group="timestep")]
    assert displacement_warning(hidden, "patch", 0.1) is None and margin_warning(hidden, "patch", 5.0) is None
    assert displacement_warning([], "video", 0.1) is None and margin_warning([], "video", 5.0) is None
    assert margin_warning([row(0, 0, 5.0)], "patch", 5.0) is None
    assert displacement_warning([row(0.2, 0.3)], "patch", None) is None
    assert "mean logit of patches is 5.1" in margin_warning([row(0, 0, 5.1)], "patch", 5.0)
    assert margin_warning([row(0, 0, 5.1)], "patch", None) is None


def batches(family, pairs):
    draws = [(index, 0) for index in range(len(pairs))]
    return [make_batch(family, pairs, part, 0, torch.device("cpu")) for part in (draws[:4], draws[4:])]


def test_errors_of_winners_and_losers_are_those_of_the_formula(family):
    pairs = make_pairs(family)
    pairs[1] = dataclasses.replace(pairs[1], video_rewards=torch.tensor([2.0, 2.0]))
    found = off_policy_gap(family, family.transformer, batches(family, pairs))
    winner = loser = 0.0
    for index, pair in enumerate(pairs):
        batch = make_batch(family, pairs, [(index, 0)], 0, torch.device("cpu"))
        with torch.no_grad():
            prediction = family.predict(family.transformer, batch.noisy, batch.t, batch.conditions)
        error = (prediction - batch.target).square().double().flatten(1).mean(1).tolist()
        better = 0 if pair.video_rewards[0] > pair.video_rewards[1] else 1
        share = 0.5 if index == 1 else 1.0
        winner += share * error[better] + (1 - share) * error[1 - better]
        loser += share * error[1 - better] + (1 - share) * error[better]
    assert found.winner == pytest.approx(winner / len(pairs), rel=1e-5)
    assert found.loser == pytest.approx(loser / len(pairs), rel=1e-5)
    assert found.fresh is None


def test_clips_of_another_model_stand_out(family):
    settings = tiny_clips(num_inference_steps=2)
    own = fresh_pairs(family, make_pairs(family), settings, seed=1)
    again = fresh_pairs(family, own, settings, seed=2)
    assert not torch.equal(own[0].latents[0], own[0].latents[1]) and not torch.equal(own[0].latents, again[0].latents)
    alike = off_policy_gap(family, family.transformer, batches(family, own), batches(family, again))
    assert alike.gap < 0.25 and "apart" not in alike.report()
    foreign = []
    for pair in own:
        better = int(pair.video_rewards[1] > pair.video_rewards[0])
        latents = pair.latents.clone()
        latents[better] = latents[better] * 3 + 2
        foreign.append(dataclasses.replace(pair, latents=latents))
    apart = off_policy_gap(family, family.transformer, batches(family, foreign), batches(family, again))
    assert apart.winner > 1.5 * apart.loser and apart.fresh == pytest.approx(alike.fresh)
    # times differ from pair to pair, so the three are compared on the pairs that have fresh clips
    some = off_policy_gap(family, family.transformer, batches(family, own), batches(family, again)[:1])
    first = off_policy_gap(family, family.transformer, batches(family, own)[:1])
    assert (some.winner, some.loser) == (first.winner, first.loser)
    assert "these clips are not the model's own" in apart.report()


def test_gap_is_a_share_of_the_smallest_error():
    assert OffPolicy(0.2, 0.2, None).gap == 0
    assert OffPolicy(0.2, 0.25, 0.3).gap == pytest.approx(0.5)
    assert "winners 0.2, losers 0.25, fresh samples 0.3: 50% apart" in OffPolicy(0.2, 0.25, 0.3).report()


def rows_of(label, margin=2.0):
    errors = {"winner_policy": 2.0, "winner_reference": 1.0, "loser_policy": 3.0, "loser_reference": 1.0}
    return [{"step": 40, "split": "heldout", "label": label, "group": "all", "margin": margin, **errors}]


@pytest.mark.parametrize(
    ("objective", "label", "margin", "expected"),
    [
        # pairs of which only videos are labelled are judged by these, whatever weight patches would have
        ("halo_bounded", "video", 2.0, ["winning videos", "likelihood displacement"]),
        ("halo_bounded", "patch", 2.0, ["winning patches", "likelihood displacement"]),
        # a capped preference pushes no further
        ("halo_bounded", "video", 14.0, ["winning videos", "likelihood displacement"]),
        ("halo", "video", 14.0, ["winning videos", "likelihood displacement", "over-maximised"]),
        # one logit over the video
        ("dense_dpo", "video", 50.0, ["winning videos", "likelihood displacement", "over-maximised"]),
    ],
)
def test_warnings_are_of_what_is_labelled_and_pushes(objective, label, margin, expected):
    job = SimpleNamespace(objective=build(objective), config=TrainConfig())
    diagnostics = Diagnostics.__new__(Diagnostics)
    diagnostics._job = job
    found = diagnostics._warnings(rows_of(label, margin))
    assert len(found) == len(expected) and all(words in line for words, line in zip(expected, found, strict=True))
