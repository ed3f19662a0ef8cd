"""Training on the noise that made a clip: that noise for every family's sampler, the batch, cached errors, counts."""

import dataclasses
import json
import logging
import math

import pytest
import torch
from tiny import TINY, run_to_cache, tiny_clips, tiny_config, tiny_wan
from training import ARMS, CONFIG, objective_with, quiet

from halo_fast.data.pairs import Pair
from halo_fast.data.tables import ClipRow
from halo_fast.errors import UserError
from halo_fast.families import family_of
from halo_fast.families.sampling import draws_noise, sample_clips
from halo_fast.pipeline.clips import noise_seeds
from halo_fast.pipeline.stages.train import train
from halo_fast.train import fit
from halo_fast.train.draws import make_batch
from halo_fast.train.job import prepared_job
from halo_fast.train.references import reference_errors

CPU = torch.device("cpu")
SEEDS = (12345, 2**32 - 1)
OWN = dataclasses.replace(
    CONFIG, objective=objective_with(**ARMS["both"]), noise="own", reference_draws=3, max_train_steps=3
)


def noise_of(seed, shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def with_seeds(pairs, known=(True,) * 6):
    """The pairs with seeds 2k and 2k + 1, where they are known."""
    return [
        dataclasses.replace(pair, seeds=(2 * k, 2 * k + 1) if there else None)
        for k, (pair, there) in enumerate(zip(pairs, known, strict=True))
    ]


class Started(Exception):
    """Holds what a sampler starts from."""


@pytest.mark.parametrize("name", TINY)
def test_the_noise_is_the_one_that_sampling_starts_from(name, monkeypatch):
    tiny = TINY[name]
    family = family_of(tiny.build(), tiny.network)
    shape = family.latent_shape(*tiny.size)
    scheduler = family.pipeline.scheduler

    def first_step(self, model_output, timestep, sample, *args, **kwargs):
        raise Started(sample)

    monkeypatch.setattr(type(scheduler), "step", first_step)
    frames, height, width = tiny.size
    settings = tiny_clips(num_frames=frames, height=height, width=width)
    with pytest.raises(Started) as started:
        sample_clips(family, ["a red ball", "a cube"], SEEDS, settings)
    (sample,) = started.value.args
    if sample.ndim == 4:  # frame by frame
        sample = sample.unflatten(0, (2, -1)).transpose(1, 2)
    latents = torch.full((2, *shape), 7.0)
    pair = Pair(latents, family.encode_prompts(["a cube"])[0], torch.rand(2, 1, 1, 1), torch.rand(2), SEEDS)
    batch = make_batch(family, [pair], [(0, 0)], 0, CPU, own=True)
    expected = torch.stack([noise_of(seed, shape) for seed in SEEDS])
    torch.testing.assert_close(family.unpack(sample.float(), family.latent_size(shape)), expected)
    torch.testing.assert_close(batch.noisy, family.add_noise(latents, expected, batch.t))
    torch.testing.assert_close(batch.target, family.target(latents, expected, batch.t))
    assert not draws_noise(family)


def test_a_clip_and_its_noise_are_the_ends_of_the_path(pipeline, pairs):
    known = with_seeds(pairs, (True, False, True, True, True, True))
    family, draws, limit = family_of(pipeline), [(1, 0), (3, 2), (0, 1)], 3
    own = make_batch(family, known, draws, 0, CPU, limit=limit, own=True)
    shared = make_batch(family, known, draws, 0, CPU, limit=limit)
    assert torch.equal(own.t, shared.t) and torch.equal(own.t[:3], own.t[3:])
    for place, (index, _) in enumerate(draws):
        for side in (0, 1):
            row, latents = place + 3 * side, known[index].latents[side].double()
            if known[index].seeds is None:
                assert torch.equal(own.noisy[row], shared.noisy[row]) and torch.equal(
                    own.target[row], shared.target[row]
                )
                continue
            noise, t = noise_of(known[index].seeds[side], latents.shape).double(), own.t[row].double()
            torch.testing.assert_close(own.noisy[row].double(), (1 - t) * latents + t * noise, rtol=0, atol=1e-5)
            torch.testing.assert_close(own.target[row].double(), noise - latents, rtol=0, atol=1e-5)
    again = make_batch(family, known, [(3, 0)], 0, CPU, limit=limit, own=True)
    assert torch.equal(again.target[0], own.target[1]) and again.t[0] != own.t[1]


def test_only_times_tell_draws_apart_and_errors_are_those_of_the_base(pipeline, pairs):
    known, family = with_seeds(pairs), family_of(pipeline)
    with prepared_job(pipeline, known, OWN) as job, torch.no_grad():
        for index, draw in [(0, 0), (4, 2)]:
            batch = make_batch(family, known, [(index, draw)], OWN.seed, CPU, limit=3, own=True)
            noise = torch.stack([noise_of(seed, (4, 3, 4, 4)) for seed in known[index].seeds])
            output = family.predict(pipeline.transformer, batch.noisy, batch.t, batch.conditions)
            expected = ((output - (noise - known[index].latents)) ** 2).mean(1)
            expected = expected.unfold(2, 2, 2).unfold(3, 2, 2).mean((-2, -1))
            torch.testing.assert_close(job.reference_errors[index, draw], expected, rtol=1e-4, atol=1e-6)


def test_files_of_errors_are_those_of_their_noise(pipeline, pairs, tmp_path):
    family = family_of(pipeline)

    def names(pairs, own):
        reference_errors(
            family, pipeline.transformer, pairs, 0, 2, device=CPU, batch_size=4, autocast=torch.no_grad, precision="no",
            folder=tmp_path, progress=quiet, own=own,
        )  # fmt: skip
        return {path.name for path in tmp_path.iterdir()}

    shared = names(pairs, False)
    assert names(with_seeds(pairs), False) == names(pairs, True) == shared, "without own noise seeds say nothing"
    own = names(with_seeds(pairs), True)
    other = names([dataclasses.replace(pair, seeds=(7, 8)) for pair in pairs], True)
    assert len(shared) == 1 and len(own) == 2 and len(other) == 3


def test_training_starts_at_log_2_and_says_what_it_trains_on(pipeline, pairs, caplog):
    caplog.set_level(logging.INFO, "halo_fast")
    known = with_seeds(pairs, (True,) * 4 + (False,) * 2)
    log = fit(pipeline, known, OWN, progress=quiet).log
    assert log[0]["loss"] == pytest.approx(1.25 * math.log(2), rel=1e-6)
    assert "train.noise: 4 of 6 pairs train on the noise that made them, the others share theirs" in caplog.text
    shared = fit(pipeline, known, dataclasses.replace(OWN, noise="shared"), progress=quiet).log
    plain = fit(pipeline, pairs, dataclasses.replace(OWN, noise="shared"), progress=quiet).log
    assert shared == plain and shared[0]["model_mse"] != log[0]["model_mse"]
    with pytest.raises(UserError, match=r"train\.noise: own needs the seeds of clips, got none: they have no seeds"):
        fit(pipeline, pairs, OWN, progress=quiet)


def test_clips_of_unknown_noise_are_counted_by_what_they_are():
    def row(number, seed=1, strategy="independent"):
        return ClipRow(f"c{number}", 0, "a cube", number, seed, "v.mp4", None, strategy=strategy)

    rows = [row(0), row(1, strategy="guided"), row(2, None, ""), row(3, 5, ""), row(4, 9)]
    family = family_of(tiny_wan())
    assert noise_seeds(rows, family) == ({"c0": 1, "c4": 9}, "1 clips are guided, 2 clips are imported")
    family.pipeline.scheduler.register_to_config(stochastic_sampling=True)
    seeds, why = noise_seeds(rows, family)
    assert not seeds and "5 clips because FlowMatchEulerDiscreteScheduler may draw noise" in why


def test_the_stage_trains_on_it(tmp_path, caplog):
    caplog.set_level(logging.INFO, "halo_fast")
    config = tiny_config(tmp_path, max_train_steps=2, heldout_share=0.0, noise="own", checkpointing_steps=100)
    run = run_to_cache(config)
    train(config, run)
    assert "4 of 4 pairs train on the noise that made them" in caplog.text
    manifest = json.loads((run.path / "train/manifest.json").read_text())
    assert manifest["settings"]["noise"] == "own" and manifest["sources"]["clips"] == "generate"
