"""Pairs of several latent shapes and grids in one training: order, gradient, reference errors, figures, resume."""

import csv
import dataclasses
import hashlib
import json
import math
from collections import Counter

import pytest
import torch
from launches import ACCELERATE, ended, launch
from safetensors.torch import load_file
from tiny import CHANNELS, tiny_wan
from training import CONFIG, Plain, at_step, make_pairs, mixed_pairs, objective_with, pairs_of_sizes, quiet

from halo_fast.errors import UserError
from halo_fast.families import family_of
from halo_fast.loss.functional import patch_error
from halo_fast.train import fit
from halo_fast.train.config import TrainConfig
from halo_fast.train.draws import batches_alike, buckets_of, draws_of_step, make_batch
from halo_fast.train.job import prepared_job
from halo_fast.train.observers.diagnostics import heldout_errors, heldout_figures, summarize
from halo_fast.train.parallel import average_gradients, batches_of_process
from halo_fast.train.setting_checks import checked_objective
from halo_fast.train.steps import run_batch

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("batches", "size", "count", "seed", "limit", "expected"),
    [
        (16, 1, 165, 0, 4, "b6a6fe2e531916af"),
        (4, 4, 165, 0, 4, "b6a6fe2e531916af"),
        (2, 3, 7, 3, None, "99eb25ba17ec8184"),
        (3, 8, 5, 1, 2, "4313655c0c68465f"),
    ],
)
def test_one_bucket_has_the_order_that_it_had_before_there_were_buckets(batches, size, count, seed, limit, expected):
    steps = [draws_of_step(step, batches, size, [0] * count, seed, limit) for step in range(40)]
    assert all(len(batch) == size for step in steps for batch in step)
    draws = [draw for step in steps for batch in step for draw in batch]
    # of forty steps of version 0.1's draws
    assert hashlib.sha256(json.dumps(draws).encode()).hexdigest()[:16] == expected


@pytest.mark.parametrize(("size", "world"), [(1, 1), (3, 1), (4, 2)])
def test_every_epoch_takes_every_pair_once_in_batches_of_one_bucket(size, world):
    buckets = [0, 1, 0, 2, 1, 0, 0, 1, 0, 3, 1, 0, 0]
    epoch = sum(math.ceil(count / size) for count in Counter(buckets).values())
    steps = [draws_of_step(step, 2 * world, size, buckets, 5, None) for step in range(epoch)]
    batches = [batch for step in steps for batch in step]
    assert all(len({buckets[index] for index, _ in batch}) == 1 <= len(batch) <= size for batch in batches)
    # so many steps are 2 * world epochs
    for number in range(2 * world):
        taken = [draw for batch in batches[number * epoch : (number + 1) * epoch] for draw in batch]
        assert sorted(taken) == [(index, number) for index in range(len(buckets))]
    # any step by itself, and the same for another division into processes and batches
    assert draws_of_step(epoch - 1, 2 * world, size, buckets, 5, None) == steps[-1]
    shared = [batches_of_process(steps[0], rank, world) for rank in range(world)]
    assert sorted(batch for own in shared for batch in own) == sorted(steps[0])
    one_by_one = [draws_of_step(step, 1, size, buckets, 5, None)[0] for step in range(len(batches))]
    assert one_by_one == batches
    first, second = (batches[number * epoch : (number + 1) * epoch] for number in (0, 1))
    assert [[index for index, _ in batch] for batch in first] != [[index for index, _ in batch] for batch in second]


def test_batches_keep_the_order_and_take_the_place_of_their_first():
    assert batches_alike("aAbBcdCe", 2, str.isupper) == [["a", "b"], ["A", "B"], ["c", "d"], ["C"], ["e"]]
    assert batches_alike(range(5), 2, lambda item: None) == [[0, 1], [2, 3], [4]]


def pair_loss(pair, policy, base, target, video_beta):
    """The loss of a pair with video and patch weight 1, link sigmoid and gammas 0, written as loops, float64."""
    _, _, *sides = target.shape
    errors = torch.stack([(policy - target).square(), (base - target).square()]).mean(2)  # [2, samples, F, H, W]
    grid = pair.patch_rewards.shape[1:]
    beta = video_beta / math.sqrt(math.prod(grid))

    def preference(gap, box, beta):
        policy_error, base_error = errors[(slice(None), slice(None), *box)].flatten(2).mean(2)
        change = policy_error - base_error
        z = -beta / 2 * math.copysign(1, gap) * (change[0] - change[1])
        return torch.nn.functional.softplus(-z)

    patches = []
    for place in torch.cartesian_prod(*map(torch.arange, grid)).tolist():
        edges = [(k * side // n, (k + 1) * side // n) for k, side, n in zip(place, sides, grid, strict=True)]
        gap = (pair.patch_rewards[0] - pair.patch_rewards[1])[tuple(place)].item()
        patches.append(preference(gap, [slice(*edge) for edge in edges], beta))
    gap = (pair.video_rewards[0] - pair.video_rewards[1]).item()
    return preference(gap, [slice(None)] * 3, video_beta) + torch.stack(patches).mean()


@pytest.mark.parametrize(("schedule", "draws"), [("batched", 2), ("margin_first", None)])
def test_a_step_over_two_buckets_has_the_gradient_of_the_mean_over_its_pairs(schedule, draws):
    family = Plain()
    conditions = [{"length": torch.tensor(float(number))} for number in (3, 5)]
    pairs = pairs_of_sizes(conditions, 3, [((2, 4, 4), (2, 2, 2), 3), ((3, 6, 4), (2, 3, 2), 2)])
    objective = {"preset": "halo", "video_beta": 3.0, "video_weight": 1.0, "patch_gamma": 0.0}
    # an epoch is three batches of 2, 1 and 2 pairs
    config = TrainConfig(
        objective=objective, rank=0, train_batch_size=2, gradient_accumulation_steps=3, reference_draws=draws,
        gradient_checkpointing="none", mixed_precision="no", schedule=schedule,
    )  # fmt: skip
    with prepared_job(family, pairs, config) as job:
        base = {name: value.detach().double() for name, value in job.parameters.items()}
        with torch.no_grad():
            for value in job.parameters.values():
                value.add_(0.3 * torch.randn(value.shape, generator=torch.Generator().manual_seed(1)))
        moved = {name: value.detach().double().requires_grad_() for name, value in job.parameters.items()}
        taken = [draw for batch in job.draws(0) for draw in batch]
        assert sorted(taken) == [(index, 0) for index in range(5)]
        figures = [run_batch(job, batch) for batch in job.batches(0)]
        assert sorted(len(one.active) for one in figures) == [1, 2, 2]
        average_gradients(list(job.parameters.values()), sum(one.num_pairs for one in figures), False)
        found = {name: value.grad.double() for name, value in job.parameters.items()}

    def predicted(weights, batch):
        moved = (batch.noisy + batch.t.view(-1, 1, 1, 1, 1)).double()
        moved = moved + batch.conditions["length"].view(-1, 1, 1, 1, 1)
        return (moved.movedim(1, -1) @ weights["mix.weight"].T + weights["mix.bias"]).movedim(-1, 1)

    losses = []
    for index, draw in taken:
        batch = make_batch(family, pairs, [(index, draw)], config.seed, CPU, limit=draws)
        policy, reference = predicted(moved, batch), predicted(base, batch)
        losses.append(pair_loss(pairs[index], policy, reference, batch.target.double(), 3.0))
    expected = torch.autograd.grad(torch.stack(losses).mean(), list(moved.values()))
    for name, gradient in zip(moved, expected, strict=True):
        torch.testing.assert_close(found[name], gradient, rtol=2e-5, atol=1e-6)
    together = sum(one.loss * one.num_pairs for one in figures) / 5
    assert together.item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)


@pytest.fixture(scope="module")
def mixed(pipeline):
    return mixed_pairs(family_of(pipeline))


def test_reference_errors_of_two_grids_are_those_of_each_pair(pipeline, mixed, tmp_path):
    config = dataclasses.replace(CONFIG, reference_draws=2)
    with prepared_job(pipeline, mixed, config, references=tmp_path) as job, torch.no_grad():
        assert [error.shape[1:] for error in job.reference_errors] == [
            (2, *pair.patch_rewards.shape[1:]) for pair in mixed
        ]
        with job.reference_mode():
            for index, draw in [(0, 1), (2, 0), (3, 1)]:
                batch = make_batch(job.family, mixed, [(index, draw)], 0, CPU, limit=2, errors=job.reference_errors)
                prediction = job.family.predict(job.model, batch.noisy, batch.t, batch.conditions)
                expected = patch_error(prediction, batch.target, mixed[index].patch_rewards.shape[1:])
                torch.testing.assert_close(batch.reference_error, expected, rtol=1e-5, atol=1e-6)
        text = job.buckets.lines()
        assert text[0].startswith("buckets: 2") and "3 x 2 x 2 patches: 3 pairs" in "".join(text)
    files = {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    assert len(files) == 2
    with prepared_job(pipeline, mixed, config, references=tmp_path) as job:
        assert {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()} == files


MIXED = dataclasses.replace(
    CONFIG, max_train_steps=7, train_batch_size=2, gradient_accumulation_steps=2, reference_draws=2, logging_steps=3,
    diagnostics_steps=5, checkpointing_steps=3, checkpoints_total_limit=1, auto_beta=0.3, off_policy_pairs=4,
    heldout_draws=2, objective=objective_with(),
)  # fmt: skip


def test_a_training_on_two_sizes_that_was_cut_in_an_epoch_ends_as_an_undisturbed_one(pipeline, mixed, tmp_path):
    whole = fit(pipeline, mixed, MIXED, folder=tmp_path / "whole", heldout=mixed[:2], progress=quiet)

    class Killed(Exception):
        pass

    def kill():
        raise Killed

    # an epoch is three batches: the checkpoint after step 3 lies after two epochs, diagnostics wait for step 5
    with pytest.raises(Killed):
        fit(pipeline, mixed, MIXED, folder=tmp_path / "cut", heldout=mixed[:2], progress=at_step(4, kill))
    resumed = fit(pipeline, mixed, MIXED, folder=tmp_path / "cut", heldout=mixed[:2], progress=quiet)
    assert resumed.log == whole.log and [row["num_pairs"] for row in whole.log[:3]] != [4, 4, 4]
    assert all(torch.equal(value, whole.lora[name]) for name, value in resumed.lora.items())
    names = ["log.csv", "diagnostics.csv", "checkpoints/step_000006.safetensors"]
    assert all((tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes() for name in names)
    places = {line.split(",")[4] for line in (tmp_path / "whole" / "diagnostics.csv").read_text().splitlines()}
    assert {"0.1.1 of 3.2.2", "1.2.0 of 2.3.2"} <= places and "0.1.1" not in places


IN_PROCESSES = """
import sys
from pathlib import Path
from tiny import tiny_wan
from training import mixed_pairs
from halo_fast.families import family_of
from halo_fast.files import write_safetensors
from halo_fast.train import TrainConfig, fit
folder = Path(sys.argv[1])
pipeline = tiny_wan()
result = fit(pipeline, mixed_pairs(family_of(pipeline)), TrainConfig(**{settings!r}), folder=folder)
if (folder / "log.csv").exists():
    write_safetensors(folder / "lora.safetensors", result.lora)
"""


@pytest.mark.slow
@pytest.mark.parametrize("words", [("--multi_gpu",), ("--use_fsdp", "--fsdp_version", "2")], ids=["replicas", "fsdp2"])
def test_two_processes_on_two_sizes_equal_one(pipeline, mixed, tmp_path, words):
    settings = dataclasses.asdict(dataclasses.replace(MIXED, gradient_accumulation_steps=1))
    (tmp_path / "script.py").write_text(IN_PROCESSES.format(settings=settings))
    done = ended(launch((*ACCELERATE, *words), tmp_path / "script.py", tmp_path / "two"))
    assert done.returncode == 0, done.stderr[-4000:]
    alone = fit(pipeline, mixed, MIXED, folder=tmp_path / "one", progress=quiet)
    found = load_file(tmp_path / "two" / "lora.safetensors")
    for name, value in alone.lora.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5)
    logs = [list(csv.DictReader((tmp_path / name / "log.csv").open())) for name in ("one", "two")]
    for one, two in zip(*logs, strict=True):
        expected = {name: float(value) for name, value in one.items()}
        assert {name: float(value) for name, value in two.items()} == pytest.approx(
            expected, rel=1e-5, abs=1e-5, nan_ok=True
        )


def test_rows_over_two_buckets_are_the_means_of_their_own(pipeline, mixed):
    family = family_of(pipeline)
    config = dataclasses.replace(MIXED, heldout_pairs=5)

    def rows(pairs, grids):
        errors = [error * 1.2 for error in heldout_errors(family, family.transformer, pairs, config, CPU)]
        figures = heldout_figures(family, family.transformer, pairs, errors, config, checked_objective(config))
        return {(row["label"], row["group"], row["bucket"]): row for row in summarize(figures, 1, "heldout", grids)}

    together = rows(mixed, True)
    # each pair's draws are seeded by its number, so the others are put in its place with no label
    nothing = {"patch_rewards": math.nan, "video_rewards": math.nan}
    parts = [
        rows([pair if pair.latents.shape == shape else _unlabelled(pair, nothing) for pair in mixed], True)
        for shape in (mixed[0].latents.shape, mixed[1].latents.shape)
    ]
    for key, row in together.items():
        own = [part[key] for part in parts if key in part]
        assert row["count"] == sum(one["count"] for one in own)
        for name in ("accuracy", "margin", "winner_policy", "loser_reference"):
            mean = sum(one["count"] * one[name] for one in own) / row["count"]
            assert row[name] == pytest.approx(mean, rel=1e-5, abs=1e-6)
    assert {bucket.partition(" of ")[2] for _, group, bucket in together if group == "patch"} == {"3.2.2", "2.3.2"}


def _unlabelled(pair, values):
    return dataclasses.replace(
        pair, **{name: torch.full_like(getattr(pair, name), nan) for name, nan in values.items()}
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch_rewards": torch.rand(2, 3, 5, 2)}, r"pair 2: grid: at most \(3, 4, 4\) patches on these latents"),
        ({"latents": torch.randn(2, CHANNELS + 1, 3, 4, 4)}, r"does not take pair 2, latents \[2, 5, 3, 4, 4\]"),
        (
            {"latents": torch.randn(2, CHANNELS, 1025, 4, 4)},
            "pair 2: model: .* takes at most 32 latent frames",
        ),
    ],
)
def test_a_pair_of_a_size_that_does_not_fit_is_named(pipeline, mixed, change, message):
    wrong = [*mixed[:2], dataclasses.replace(mixed[2], **change), *mixed[3:]]
    with pytest.raises(UserError, match=message):
        fit(pipeline, wrong, MIXED, progress=quiet)


def test_buckets_are_numbered_by_their_first_pairs_and_the_largest_comes_last(mixed):
    family = family_of(tiny_wan())
    buckets = buckets_of([*mixed, *make_pairs(family, 1), *pairs_of_sizes([{}], CHANNELS, [((4, 8, 8), (2, 2, 2), 1)])])
    assert buckets.of == (0, 1, 1, 0, 1, 1, 2)
    assert buckets.sizes[1] == ((CHANNELS, 3, 4, 4), (3, 2, 2))
    assert buckets.firsts()[-1] == 6
