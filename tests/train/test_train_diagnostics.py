"""Diagnostics against plain formulas, trackers, and previews."""

import csv
import dataclasses
import math
import sys
import types
from functools import partial

import pytest
import torch
from tiny import tiny_clips, tiny_wan
from training import CONFIG, make_pairs, objective_with, quiet, run_model, with_random_adapter

from halo_fast.data.clips import read_clip
from halo_fast.data.pairs import heldout_mask
from halo_fast.errors import UserError
from halo_fast.families import family_of
from halo_fast.loss.functional import gran_dpo
from halo_fast.loss.objectives import GranDPO
from halo_fast.train import adapters_off, fit
from halo_fast.train.draws import make_batch
from halo_fast.train.observers.diagnostics import heldout_errors, heldout_figures, summarize
from halo_fast.train.observers.previews import write_previews
from halo_fast.train.observers.trackers import open_trackers
from halo_fast.train.setting_checks import check_trackers

CPU = torch.device("cpu")
OBJECTIVE = GranDPO(video_beta=30.0, patch_beta=8.0, patch_delta=0.4, patch_gamma=0.0)


@pytest.fixture(scope="module")
def family():
    pipeline = tiny_wan()
    with_random_adapter(pipeline.transformer)
    return family_of(pipeline)


def test_a_prompt_stays_on_its_side_whatever_comes_or_goes():
    prompts = [f"prompt {index // 2}" for index in range(2000)]
    kept = heldout_mask(prompts, 0.1)
    assert kept[::2] == kept[1::2] and 0.07 < sum(kept) / len(kept) < 0.13
    assert heldout_mask(prompts[500:900], 0.1) == kept[500:900]
    more = heldout_mask(prompts, 0.3)
    assert all(wide or not narrow for narrow, wide in zip(kept, more, strict=True))
    assert not any(heldout_mask(prompts, 0.0)) and all(heldout_mask(prompts, 1.0))


def plain_rows(family, pairs, draws, objective):
    """(label, patch, t, z, four errors) of every labelled pair and patch, in float64 loops."""
    found = []
    for index, draw in draws:
        batch = make_batch(family, pairs, [(index, draw)], CONFIG.seed, CPU, limit=2)
        errors = []
        for off in (False, True):
            with torch.no_grad():
                if off:
                    with adapters_off(family.transformer):
                        prediction = family.predict(family.transformer, batch.noisy, batch.t, batch.conditions)
                else:
                    prediction = family.predict(family.transformer, batch.noisy, batch.t, batch.conditions)
            errors.append((prediction.double() - batch.target.double()).square().mean(1))
        policy, reference = errors
        boxes = {"": (slice(None),) * 3} | {
            f"{f}.{h}.{w}": (f, slice(2 * h, 2 * h + 2), slice(2 * w, 2 * w + 2))
            for f in range(3) for h in range(2) for w in range(2)
        }  # fmt: skip
        pair = pairs[index]
        for place, box in boxes.items():
            if place:
                at = tuple(map(int, place.split(".")))
                gap, delta = (pair.patch_rewards[0][at] - pair.patch_rewards[1][at]).item(), objective.patch_delta
                beta = objective.patch_beta
            else:
                gap, delta, beta = (pair.video_rewards[0] - pair.video_rewards[1]).item(), 0.0, objective.video_beta
            if not abs(gap) > delta:
                continue
            win, lose = (0, 1) if gap > 0 else (1, 0)
            four = [side[sample][box].mean().item() for sample in (win, lose) for side in (policy, reference)]
            z = beta / 2 * ((four[1] - four[0]) - (four[3] - four[2]))
            found.append(("patch" if place else "video", place, batch.t[0].item(), z, four))
    return found


def evaluate(family, pairs, reference, config, step):
    figures = heldout_figures(family, family.transformer, pairs, reference, config, OBJECTIVE)
    return summarize(figures, step, "heldout")


def test_every_row_is_the_mean_of_the_plain_formula(family):
    pairs = make_pairs(family, count=5)
    pairs[2] = dataclasses.replace(pairs[2], video_rewards=torch.tensor([3.0, math.nan]))
    config = dataclasses.replace(CONFIG, train_batch_size=4, heldout_pairs=4, heldout_draws=2)
    with adapters_off(family.transformer):
        reference = heldout_errors(family, family.transformer, pairs, config, CPU)
    rows = evaluate(family, pairs, reference, config, step=7)
    expected = plain_rows(family, pairs, [(index, draw) for draw in range(2) for index in range(4)], OBJECTIVE)
    seen = set()
    for row in rows:
        low, high = map(float, row["bucket"].split("-")) if row["group"] == "timestep" else (0.0, 2.0)
        place = row["bucket"] if row["group"] == "patch" else None
        chosen = [
            (z, four) for label, patch, t, z, four in expected
            if label == row["label"] and low <= t < high and place in (None, patch)
        ]  # fmt: skip
        assert (row["step"], row["split"], row["count"]) == (7, "heldout", len(chosen))
        seen.add((row["label"], row["group"], row["bucket"]))
        means = [sum(four[k] for _, four in chosen) / len(chosen) for k in range(4)]
        names = ("winner_policy", "winner_reference", "loser_policy", "loser_reference")
        assert [row[name] for name in names] == pytest.approx(means, rel=1e-4)
        logits = [z for z, _ in chosen]
        assert row["margin"] == pytest.approx(sum(logits) / len(logits), rel=1e-3, abs=1e-3)
        assert row["accuracy"] == pytest.approx(sum(z > 0 for z in logits) / len(logits))
        factor = sum(1 / (1 + math.exp(z)) for z in logits) / len(logits)
        assert row["gradient_factor"] == pytest.approx(factor, abs=1e-4)
        assert row["saturation"] == pytest.approx(sum(abs(z) > 10 for z in logits) / len(logits))
    # nothing labelled, no row: all that is labelled has one
    assert {(label, "patch", patch) for label, patch, *_ in expected if patch} <= seen
    assert ("video", "all", "") in seen and not any(row["label"] == "video" and row["group"] == "patch" for row in rows)


def test_held_out_numbers_move_by_learning_alone(family):
    pairs = make_pairs(family)
    config = dataclasses.replace(CONFIG, heldout_draws=4)
    with adapters_off(family.transformer):
        reference = heldout_errors(family, family.transformer, pairs, config, CPU)
    first = evaluate(family, pairs, reference, config, step=0)
    assert first == evaluate(family, pairs, reference, config, step=0)
    with adapters_off(family.transformer):
        start = evaluate(family, pairs, reference, config, step=0)
    for row in start:
        assert (row["accuracy"], row["margin"], row["gradient_factor"], row["saturation"]) == (0.5, 0, 0.5, 0)
        assert row["winner_policy"] == row["winner_reference"] and row["loser_policy"] == row["loser_reference"]
    # with as many strata as draws, every quarter of u has one draw of each pair; Wan's shift moves t upwards
    assert sum(row["count"] for row in start if row["group"] == "timestep" and row["label"] == "video") == 6 * 4


def test_rows_do_not_depend_on_the_batches(family):
    pairs = make_pairs(family)
    rows = []
    for size in (1, 4, 6):
        config = dataclasses.replace(CONFIG, train_batch_size=size, heldout_draws=2)
        with adapters_off(family.transformer):
            reference = heldout_errors(family, family.transformer, pairs, config, CPU)
        rows.append(evaluate(family, pairs, reference, config, step=0))
    for row, *others in zip(*rows, strict=True):
        for other in others:
            assert {k: v for k, v in row.items() if isinstance(v, str | int)} == {
                k: v for k, v in other.items() if isinstance(v, str | int)
            }
            floats = [k for k, v in row.items() if isinstance(v, float)]
            assert [row[k] for k in floats] == pytest.approx([other[k] for k in floats], rel=1e-4, abs=1e-5)


def test_other_layout_and_default_patch_beta_are_read_alike(family):
    pairs = make_pairs(family)
    batch = make_batch(family, pairs, [(0, 0), (1, 0)], 0, CPU, limit=2)
    generator = torch.Generator().manual_seed(3)
    prediction = batch.target + 0.3 * torch.randn(batch.target.shape, generator=generator)
    reference = torch.rand(4, 3, 2, 2, generator=generator) * 0.1
    objective = GranDPO(video_beta=24.0, patch_delta=0.4)

    def rows(batch, prediction, objective, layout="BCFHW"):
        out = gran_dpo(
            prediction, batch.target, None, batch.patch_rewards, batch.video_rewards,
            objective=objective, reference_error=reference, layout=layout,
        )  # fmt: skip
        return summarize([out.figures(batch.t)], 3, "train")

    one = rows(batch, prediction, objective)
    turned = dataclasses.replace(batch, target=batch.target.transpose(1, 2))
    two = rows(turned, prediction.transpose(1, 2), objective, "BFCHW")
    assert one == two
    halves = dataclasses.replace(objective, patch_beta=24.0 / math.sqrt(12))
    given_rows = rows(batch, prediction, halves)
    for default, given in zip(one, given_rows, strict=True):
        assert default["margin"] == pytest.approx(given["margin"], rel=1e-6)


def test_training_writes_diagnostics_and_previews(tmp_path):
    pipeline = tiny_wan()
    pairs = make_pairs(family_of(pipeline))
    config = dataclasses.replace(
        CONFIG, max_train_steps=5, diagnostics_steps=2, heldout_draws=2, validation_prompts=["a cube"],
        validation_steps=3, off_policy_fresh=1,
    )  # fmt: skip
    fit(
        pipeline, pairs[:4], config, folder=tmp_path, heldout=pairs[4:], progress=quiet,
        generate=tiny_clips(num_inference_steps=2),
    )  # fmt: skip
    with (tmp_path / "diagnostics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    counts = {(row["step"], row["split"]): int(row["count"]) for row in rows if row["group"] == "all"}
    assert counts.keys() == {(step, split) for step in "245" for split in ("train", "heldout")}
    whole = [row for row in rows if row["group"] == "all" and row["label"] == "video"]
    assert [row["count"] for row in whole if row["split"] == "train"] == ["8", "8", "4"]
    assert [row["count"] for row in whole if row["split"] == "heldout"] == ["4"] * 3
    references = {row["winner_reference"] for row in whole if row["split"] == "heldout"}
    assert len(references) == 1  # the same pairs, noise and times every time
    assert sorted(path.name for path in (tmp_path / "previews").glob("step_*")) == ["step_000000", "step_000003"]


def test_trackers_that_are_unknown_or_missing_are_refused(monkeypatch):
    check_trackers([])
    with pytest.raises(UserError, match="report_to: expected some of tensorboard, wandb, got 'mlflow'"):
        check_trackers(["mlflow"])
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr("halo_fast.train.setting_checks.find_spec", lambda name: None)
    with pytest.raises(UserError, match="wandb is not installed; pip install wandb"):
        check_trackers(["wandb"])


class Accelerator:
    """Records the calls that accelerate's own would get, and has one tracker."""

    def __init__(self):
        self.calls = []
        self.trackers = [types.SimpleNamespace(finish=lambda: self.calls.append(("end",)))]

    def init_trackers(self, project, config):
        self.calls.append(("init", project, config))

    def log(self, values, step):
        self.calls.append(("log", values, step))


def test_trackers_get_rows_under_their_step_and_are_closed_whatever_happens(monkeypatch, tmp_path):
    monkeypatch.setattr("halo_fast.train.setting_checks.find_spec", lambda name: types.ModuleType(name))
    config = dataclasses.replace(CONFIG, report_to=["wandb"], objective=objective_with(patch_beta=None))
    accelerator = Accelerator()
    log = types.SimpleNamespace(new_rows=[{"step": 3, "loss": 0.5, "rewards/margins": 0.1, "win_gap": math.nan}])
    with pytest.raises(KeyError), open_trackers(accelerator, config, None, log) as (trackers,):
        trackers.report(3)
        raise KeyError
    (_, project, settings), logged, end = accelerator.calls
    assert project == "halo_fast" and settings["objective.video_beta"] == 100.0
    assert settings["objective.patch_beta"] == "None" and settings["rank"] == 4
    assert logged == ("log", {"train/loss": 0.5, "rewards/margins": 0.1}, 3) and end == ("end",)
    silent = Accelerator()
    with open_trackers(silent, CONFIG, tmp_path, log) as none:
        assert none == []
    assert silent.calls == []
    boards = dataclasses.replace(config, report_to=["tensorboard"])
    with pytest.raises(UserError, match="tensorboard needs a folder"), open_trackers(silent, boards, None, log):
        pass


def test_previews_show_base_and_policy_from_the_same_noise(tmp_path):
    pipeline = tiny_wan()
    family, settings = family_of(pipeline), tiny_clips(num_inference_steps=2, crf=None)
    prompts = ["a cube", "a red ball rolls"]
    start = write_previews(tmp_path, family, partial(adapters_off, pipeline.transformer), prompts, settings, 0, 0)
    assert [path.relative_to(tmp_path).as_posix() for path in start] == [
        "previews/step_000000/0.mp4", "previews/step_000000/1.mp4",
    ]  # fmt: skip
    for path in start:
        both = read_clip(path)
        assert both.shape == (9, 32, 64, 3)
        # without an adapter policy and base are one model, and mp4 rounds the same pixels alike
        assert (both[:, :, :32].int() - both[:, :, 32:].int()).abs().max() <= 4
    assert not torch.equal(read_clip(start[0]), read_clip(start[1]))
    base = run_model(pipeline)
    with_random_adapter(pipeline.transformer)
    assert not torch.equal(run_model(pipeline), base)
    later = write_previews(tmp_path, family, partial(adapters_off, pipeline.transformer), prompts, settings, 0, 50)
    before, after = read_clip(start[0]), read_clip(later[0])
    assert (before[:, :, :32].int() - after[:, :, :32].int()).abs().max() <= 4
    assert (before[:, :, 32:].int() - after[:, :, 32:].int()).abs().max() > 8
    written = later[0].stat().st_mtime_ns
    write_previews(tmp_path, family, partial(adapters_off, pipeline.transformer), prompts, settings, 0, 50)
    assert later[0].stat().st_mtime_ns == written
    assert (tmp_path / "previews/prompts.txt").read_text() == "a cube\na red ball rolls\n"
