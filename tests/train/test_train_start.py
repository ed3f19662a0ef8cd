"""A training that starts from an earlier one: policy and reference against a second pipeline, both ranks, resume."""

import copy
import dataclasses
import logging
import math

import pytest
import torch
from tiny import tiny_wan
from training import ARMS, CONFIG, at_step, objective_with, quiet, run_model, same, snapshot, softplus

from halo_fast.errors import UserError
from halo_fast.families import family_of
from halo_fast.loss.objectives import build
from halo_fast.train import fit
from halo_fast.train.draws import make_batch
from halo_fast.train.job import prepared_job
from halo_fast.train.steps import run_batch, take_step

DRAWS = 3
CPU = torch.device("cpu")
# alpha / rank is 2, which is folded into the exported matrices
LORA = dataclasses.replace(
    CONFIG, objective=objective_with(**ARMS["both"]), reference_draws=DRAWS, rank=4, lora_alpha=8, max_train_steps=4
)
FULL = dataclasses.replace(LORA, rank=0, learning_rate=1e-3)


@pytest.fixture(scope="module", params=[LORA, FULL], ids=["LoRA", "weights"])
def begun(request, pairs):
    """Settings, a start, and pipelines with and without it, loaded as their users would."""
    config, base = request.param, tiny_wan()
    first = fit(tiny_wan(), pairs, config, progress=quiet)
    other = tiny_wan()
    if config.rank:
        other.load_lora_weights(dict(first.lora))
        return config, first.lora, base, other
    other.transformer.load_state_dict(first.weights)
    return config, first.weights, base, other


def errors(family, model, batch):
    """Patch errors [2B, 3, 2, 2] of a batch, in plain PyTorch."""
    output = family.predict(model, batch.noisy, batch.t, batch.conditions)
    excess = ((output - batch.target) ** 2).mean(1)
    return excess.unfold(2, 2, 2).unfold(3, 2, 2).mean((-2, -1))


def preference_loss(policy, reference, batch, objective):
    """Sum over pairs of the video's and the patches' preferences, from patch errors."""
    excess = policy - reference
    count = len(excess) // 2
    margin = excess.mean((1, 2, 3))
    margin, patch_margin = margin[:count] - margin[count:], excess[:count] - excess[count:]
    gap, patch_gap = (table[:count] - table[count:] for table in (batch.video_rewards, batch.patch_rewards))
    loss = objective.video_weight * softplus(0.5 * objective.video_beta * gap.sign() * margin).sum()
    wanted = patch_gap.abs() > objective.patch_delta
    terms = softplus(0.5 * objective.patch_beta * patch_gap.sign() * patch_margin) * wanted
    return loss + objective.patch_weight * (terms.sum((1, 2, 3)) / wanted.sum((1, 2, 3))).sum()


@pytest.mark.parametrize("draws", [None, DRAWS], ids=["in the loop", "cached"])
@pytest.mark.parametrize("reference", ["base", "start"])
def test_loss_and_gradient_are_those_of_a_second_model(begun, pairs, reference, draws):
    config, weights, base, other = begun
    config = dataclasses.replace(config, reference=reference, reference_draws=draws)
    pipeline, objective = tiny_wan(), build(config.objective)
    before = snapshot(pipeline.transformer)
    policy = copy.deepcopy(other.transformer).requires_grad_(False)
    second = {name: value for name, value in policy.named_parameters() if not config.rank or ".lora_" in name}
    for value in second.values():
        value.requires_grad_()
    with prepared_job(pipeline, pairs, config, start=weights) as job:
        torch.testing.assert_close(run_model(pipeline), run_model(other))
        batch = make_batch(job.family, pairs, [(0, 0), (3, 1)], 0, CPU, limit=draws, errors=job.reference_errors)
        truth = base.transformer if reference == "base" else other.transformer
        with torch.no_grad():
            expected = errors(job.family, truth, batch)
        if draws:
            torch.testing.assert_close(batch.reference_error, expected, rtol=1e-4, atol=1e-6)
        loss = preference_loss(errors(job.family, policy, batch), expected, batch, objective)
        figures = run_batch(job, batch)
        found = [parameter.grad for parameter in job.parameters.values()]
        assert (abs(loss.item() / 2 - 1.25 * math.log(2)) < 1e-5) == (reference == "start")
        assert bool(figures.video_logits.abs().max() > 1e-2) == (reference == "base")
    # the second pipeline's matrices B hold the scale
    scale = {name: 2.0 if ".lora_B." in name else 1.0 for name in second}
    gradients = torch.autograd.grad(loss, list(second.values()))
    norm = float(torch.cat([value.flatten() for value in gradients]).norm())
    for name, one, value in zip(second, found, gradients, strict=True):
        torch.testing.assert_close(one, scale[name] * value.to(one), rtol=2e-3, atol=2e-5 * norm)
    assert same(snapshot(pipeline.transformer), before)


@pytest.mark.parametrize("reference", ["base", "start"])
def test_the_reference_stays_where_it_is_while_the_policy_moves(begun, pairs, reference):
    config, weights, base, other = begun
    pipeline = tiny_wan()
    truth = run_model(base if reference == "base" else other)
    with prepared_job(pipeline, pairs, dataclasses.replace(config, reference=reference), start=weights) as job:
        for step in range(3):
            take_step(job, step)
        policy = run_model(pipeline)
        with job.reference_mode():
            torch.testing.assert_close(run_model(pipeline), truth)
        assert torch.equal(run_model(pipeline), policy)
        assert all((policy - run_model(one)).abs().max() > 1e-3 for one in (base, other))
    assert torch.equal(run_model(pipeline), run_model(base))


def test_the_first_row_says_how_far_policy_and_reference_are_apart(begun, pairs):
    config, weights, *_ = begun
    from_start, from_base = (
        fit(tiny_wan(), pairs, dataclasses.replace(config, reference=reference), start=weights, progress=quiet).log[0]
        for reference in ("start", "base")
    )
    assert from_start["loss"] == pytest.approx(1.25 * math.log(2), rel=1e-6) and from_start["rewards/margins"] == 0
    assert from_base["rewards/margins"] != 0 and from_base["model_mse"] != from_base["ref_mse"]
    assert from_start["model_mse"] == pytest.approx(from_base["model_mse"], rel=1e-5)


def test_steps_one_after_another_are_those_of_a_moved_start(begun, pairs):
    """What a training gives is where the next one begins: no step gives it back."""
    config, weights, *_ = begun
    still = dataclasses.replace(config, learning_rate=1e-30, max_train_steps=1)
    result = fit(tiny_wan(), pairs, still, start=weights, progress=quiet)
    given = result.lora or result.weights
    assert given.keys() == weights.keys()
    assert all(torch.allclose(given[name], weights[name], rtol=1e-6, atol=1e-12) for name in given)


@pytest.mark.parametrize("reference", ["base", "start"])
def test_resume_is_exact_and_another_start_is_refused(begun, pairs, tmp_path, reference):
    config, weights, *_ = begun
    config = dataclasses.replace(config, reference=reference)

    class Stop(Exception):
        pass

    def stop():
        raise Stop

    whole = fit(tiny_wan(), pairs, config, folder=tmp_path / "whole", start=weights, progress=quiet)
    with pytest.raises(Stop):
        fit(tiny_wan(), pairs, config, folder=tmp_path / "cut", start=weights, progress=at_step(3, stop))
    for strange in (None, {name: value + 1 for name, value in weights.items()}):
        with pytest.raises(UserError, match="made with start"):
            fit(tiny_wan(), pairs, config, folder=tmp_path / "cut", start=strange, progress=quiet)
    again = fit(tiny_wan(), pairs, config, folder=tmp_path / "cut", start=weights, progress=quiet)
    one, other = whole.lora or whole.weights, again.lora or again.weights
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert (tmp_path / "whole/log.csv").read_bytes() == (tmp_path / "cut/log.csv").read_bytes()


def test_the_gap_is_that_of_the_policy(begun, pairs, tmp_path, caplog):
    caplog.set_level(logging.INFO, "halo_fast")
    config, weights, base, other = begun
    gaps = [
        fit(tiny_wan(), pairs, dataclasses.replace(config, max_train_steps=1), folder=folder, start=start).gap
        for folder, start in ((tmp_path / "base", None), (tmp_path / "start", weights))
    ]
    assert "error of the base on winners" in caplog.text and "error of the policy on winners" in caplog.text
    family = family_of(tiny_wan())
    for gap, pipeline in zip(gaps, (base, other), strict=True):
        batch = make_batch(family, pairs, [(index, 0) for index in range(6)], config.seed, CPU)
        with torch.no_grad():
            a, b = errors(family, pipeline.transformer, batch).mean((1, 2, 3)).chunk(2)
        wins = batch.video_rewards[:6] > batch.video_rewards[6:]
        means = [torch.where(wins, a, b).mean(), torch.where(wins, b, a).mean()]
        assert gap == pytest.approx(float(max(means) / min(means)) - 1, rel=1e-3)


def test_a_start_that_does_not_fit_is_named(pairs):
    first = fit(tiny_wan(), pairs, dataclasses.replace(LORA, max_train_steps=1), progress=quiet).lora
    name = next(iter(first))
    for strange, words in [
        ({key: value for key, value in first.items() if key != name}, f"a start with {name} of .*, got none"),
        (first | {"transformer.more.lora_A.weight": first[name]}, "more.lora_A.weight of no size"),
        ({}, "got none; start from a training with the same train.rank"),
    ]:
        with pytest.raises(UserError, match=words):
            fit(tiny_wan(), pairs, LORA, start=strange, progress=quiet)
    with pytest.raises(UserError, match=r"of \[2, .*\], got \[4, "):
        fit(tiny_wan(), pairs, dataclasses.replace(LORA, rank=2, lora_alpha=2), start=first, progress=quiet)
