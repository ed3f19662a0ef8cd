"""Reference errors computed once: equal to the reference in the loop, at stratified times, never stale, resumable."""

import dataclasses

import pytest
import torch
from tiny import tiny_wan
from training import ARMS, CONFIG, make_pairs, objective_with, quiet

from halo_fast.errors import UserError
from halo_fast.families import family_of
from halo_fast.families.wan import Wan
from halo_fast.loss.functional import patch_error
from halo_fast.train import adapters_off, fit, references
from halo_fast.train.draws import draws_of_step, make_batch
from halo_fast.train.job import prepared_job

DRAWS = 3
CACHED = dataclasses.replace(CONFIG, reference_draws=DRAWS, max_train_steps=5)


class Counting(Wan):
    """The Wan family, counting samples that ran through the model without a graph."""

    def __init__(self, pipeline):
        super().__init__(pipeline)
        self.samples = 0

    def predict(self, model, noisy, t, conditions):
        self.samples += 0 if torch.is_grad_enabled() else len(noisy)
        return super().predict(model, noisy, t, conditions)


def errors_of(family, pairs, folder, seed=0, precision="no"):
    return references.reference_errors(
        family, family.transformer, pairs, seed, DRAWS, device=torch.device("cpu"), batch_size=4,
        autocast=torch.no_grad, precision=precision, folder=folder, progress=quiet,
    )  # fmt: skip


def test_cached_errors_are_those_of_the_reference_in_the_loop(pipeline, pairs):
    with prepared_job(pipeline, pairs, CACHED) as job, torch.no_grad():
        for parameter in job.parameters.values():
            parameter.add_(0.1)
        for index, draw in [(0, 0), (4, 2), (5, 1)]:
            batch = make_batch(
                job.family, pairs, [(index, draw)], CACHED.seed, torch.device("cpu"), limit=DRAWS,
                errors=job.reference_errors,
            )  # fmt: skip
            with adapters_off(job.model):
                base = job.family.predict(job.model, batch.noisy, batch.t, batch.conditions)
            expected = patch_error(base, batch.target, (3, 2, 2))
            torch.testing.assert_close(batch.reference_error, expected, rtol=1e-5, atol=1e-6)
            policy = job.family.predict(job.model, batch.noisy, batch.t, batch.conditions)
            assert (patch_error(policy, batch.target, (3, 2, 2)) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("arm", ["both and winning patches", "video"])
def test_training_is_that_with_the_reference_in_the_loop_at_the_same_draws(pipeline, pairs, monkeypatch, arm):
    config = dataclasses.replace(CACHED, objective=objective_with(**ARMS[arm]))
    cached = fit(pipeline, pairs, config, progress=quiet)
    monkeypatch.setattr("halo_fast.train.job.reference_errors", lambda *args, **kwargs: None)
    looped = fit(pipeline, pairs, config, progress=quiet)
    for one, other in zip(cached.log, looped.log, strict=True):
        assert one == pytest.approx(other, rel=1e-3, abs=1e-4)
    for name, value in cached.lora.items():
        torch.testing.assert_close(value, looped.lora[name], rtol=1e-3, atol=1e-5)
    fresh = fit(pipeline, pairs, dataclasses.replace(config, reference_draws=None), progress=quiet)
    assert fresh.log[0]["model_mse"] != cached.log[0]["model_mse"]


def test_times_of_a_pairs_draws_are_stratified_and_first_draws_cover_the_times(pipeline):
    family, count = family_of(pipeline), 8
    pairs = make_pairs(family, count=32)
    strata = torch.stack(
        [
            make_batch(family, pairs, [(i, k) for i in range(32)], 0, torch.device("cpu"), limit=count).t[:32]
            for k in range(count)
        ]
    )
    u = strata / (family.shift - (family.shift - 1) * strata)
    assert torch.equal((u * count).floor().sort(0).values, torch.arange(float(count))[:, None].expand(-1, 32))
    assert len((u[0] * count).floor().unique()) >= 6


def test_draws_beyond_the_last_begin_again():
    seen = [draw for step in range(8) for (draw,) in draws_of_step(step, 3, 1, [0] * 6, 0, DRAWS)]
    unlimited = [draw for step in range(8) for (draw,) in draws_of_step(step, 3, 1, [0] * 6, 0, None)]
    assert [(index, draw % DRAWS) for index, draw in unlimited] == seen
    assert {draw for _, draw in seen} == {0, 1, 2} and max(draw for _, draw in unlimited) == 3


def test_files_are_read_again_and_never_stale(pairs, tmp_path, monkeypatch):
    monkeypatch.setattr(references, "_PAIRS_IN_A_FILE", 4)
    family = Counting(tiny_wan())
    errors = errors_of(family, pairs, tmp_path)
    assert errors.shape == (6, DRAWS, 2, 3, 2, 2) and family.samples == 6 * DRAWS * 2
    torch.testing.assert_close(errors_of(family, pairs, None), errors)

    def computed(pairs, **settings):
        family.samples = 0
        found = errors_of(family, pairs, tmp_path, **settings)
        return found, family.samples // (2 * DRAWS)

    again, count = computed(pairs)
    assert count == 0 and torch.equal(again, errors)
    # the second file holds pairs 4 and 5
    changed = dataclasses.replace(pairs[5], latents=pairs[5].latents + 1)
    other, count = computed([*pairs[:5], changed])
    assert count == 2 and torch.equal(other[:5], errors[:5]) and not torch.equal(other[5], errors[5])
    prompted = dataclasses.replace(pairs[0], conditions=pairs[1].conditions)
    assert computed([prompted, *pairs[1:]])[1] == 4
    assert computed(pairs, seed=1)[1] == computed(pairs, precision="bf16")[1] == 6
    family.guidance = 6.0
    assert computed(pairs)[1] == 6
    rewards = [dataclasses.replace(pair, patch_rewards=pair.patch_rewards + 1) for pair in pairs]
    assert computed(rewards)[1] == 0
    family.guidance = 3.5
    assert computed(pairs)[1] == 6
    with torch.no_grad():
        next(family.transformer.parameters()).add_(1e-3)
    assert computed(pairs)[1] == 6


def test_killed_computation_continues(pairs, tmp_path, monkeypatch):
    monkeypatch.setattr(references, "_PAIRS_IN_A_FILE", 2)
    family = Counting(tiny_wan())

    class Killed(Exception):
        pass

    def stop(*args, **kwargs):
        if len(list(tmp_path.glob("*.safetensors"))) == 2:
            raise Killed
        return original(*args, **kwargs)

    original = references.make_batch
    monkeypatch.setattr(references, "make_batch", stop)
    with pytest.raises(Killed):
        errors_of(family, pairs, tmp_path)
    monkeypatch.setattr(references, "make_batch", original)
    family.samples = 0
    continued = errors_of(family, pairs, tmp_path)
    assert family.samples == 2 * DRAWS * 2
    assert torch.equal(continued, errors_of(family, pairs, None))


def test_errors_of_another_model_are_noticed(pipeline, pairs, monkeypatch):
    original = references.reference_errors
    monkeypatch.setattr("halo_fast.train.job.reference_errors", lambda *args, **kwargs: original(*args, **kwargs) * 1.1)
    with pytest.raises(UserError, match="reference_draws: expected the base's errors"):
        fit(pipeline, pairs, CACHED, progress=quiet)


def test_anchor_needs_the_reference_itself(pipeline, pairs):
    config = dataclasses.replace(CACHED, objective=objective_with(anchor_weight=0.1))
    with pytest.raises(UserError, match="anchor_weight: needs the reference in the loop"):
        fit(pipeline, pairs, config, progress=quiet)
