"""Every preset, and objectives of one's own, through `halo train`; what an objective cannot do is refused by name."""

import csv
import dataclasses
import json
import math
from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import load_file
from tiny import TINY, TINY_TRAIN, output_hashes, run_to_cache, tiny_config, tiny_wan
from training import CONFIG, make_pairs, quiet

from halo_fast.errors import UserError
from halo_fast.families import family_of
from halo_fast.loss.objectives import PRESETS, GranDPO, Objective, Table, build
from halo_fast.pipeline.cli import main
from halo_fast.pipeline.config import to_yaml
from halo_fast.train import TrainConfig, fit
from halo_fast.train.draws import draws_of_step, make_batch, weights_at
from halo_fast.train.schedules import loss_arguments
from halo_fast.train.setting_checks import checked_objective


@pytest.fixture(scope="module")
def cached(tmp_path_factory):
    """The file of a run's settings, the run being made up to its cache."""
    folder = tmp_path_factory.mktemp("objectives")
    config = tiny_config(folder, max_train_steps=2, heldout_share=0.3, diagnostics_steps=1)
    run = run_to_cache(config)
    (folder / "config.yaml").write_text(to_yaml(config))
    return folder / "config.yaml", run.path


def log_of(cached, *words):
    file, run = cached
    assert main(["train", str(file), "--force", *words]) == 0
    lora = load_file(run / "train/lora/pytorch_lora_weights.safetensors")
    assert any(value.any() for name, value in lora.items() if "lora_B" in name)
    return list(csv.DictReader((run / "train/log.csv").open()))


@pytest.mark.parametrize("schedule", ["batched", "margin_first"])
@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_trains_two_steps(cached, preset, schedule):
    log = log_of(cached, "--train.objective", f"{{preset: {preset}}}", "--train.schedule", schedule)
    assert [row["step"] for row in log] == ["1", "2"]
    objective = PRESETS[preset]
    assert ("ref_mse" in log[0]) == objective.needs_reference
    assert float(log[0]["num_pairs"]) == (4 if objective.paired else 8)


def test_a_family_each_for_every_preset():
    # one family after another, so that every family meets a preset and every preset a second family
    families = sorted(set(TINY) - {"Wan 2.1"})
    presets = list(PRESETS)
    for place in range(max(len(families), len(presets))):
        name, preset = families[place % len(families)], presets[place % len(presets)]
        tiny = TINY[name]
        family = family_of(tiny.build(), tiny.network)
        pairs = latents_of(family, tiny.size)
        config = dataclasses.replace(CONFIG, objective=preset, max_train_steps=2, train_batch_size=2)
        log = fit(family, pairs, config, progress=quiet).log
        assert len(log) == 2 and all(torch.tensor(row["loss"]).isfinite() for row in log), (name, preset)


def latents_of(family, size):
    shape = family.latent_shape(*size)
    return [
        dataclasses.replace(pair, latents=torch.randn(2, *shape, generator=torch.Generator().manual_seed(index)))
        for index, pair in enumerate(make_pairs(family, count=2, grid=(1, 2, 2)))
    ]


def test_fields_on_the_command_line_change_the_preset(cached):
    _, run = cached
    log_of(cached, "--train.objective.video_beta", "7", "--train.objective.link", "ipo")
    settings = json.loads((run / "train/manifest.json").read_text())["settings"]
    assert settings["objective"] == TINY_TRAIN["objective"] | {"video_beta": 7, "link": "ipo"}


class WinnersAlone(Objective):
    """The winning clip's error: an objective of a stranger, without a reference."""

    needs_reference = False

    def table(self, inputs):
        error = inputs.error()
        sign = (inputs.video_rewards > inputs.video_rewards.roll(len(error) // 2)).to(error)[:, None, None, None]
        weight = sign * inputs.volume(error) / (len(error) // 2)
        active = error.new_ones(len(error) // 2)
        logits = error.new_zeros(active.shape), error.new_zeros(len(active), *error.shape[1:])
        return Table((weight * error).sum(), weight.expand_as(error).contiguous(), *logits, active, None, error)


@dataclass(frozen=True)
class Gentle(GranDPO):
    """A subclass with another default."""

    video_beta: float = 3.0


@pytest.mark.parametrize("schedule", ["batched", "margin_first"])
def test_an_objective_from_outside_the_package_trains_by_dotted_name(cached, schedule):
    own = log_of(cached, "--train.objective", f"{__name__}:WinnersAlone", "--train.schedule", schedule)
    sft = "{preset: halo, video_weight: 0, patch_weight: 0, sft_weight: 1}"
    same = log_of(cached, "--train.objective", sft, "--train.schedule", schedule)
    for one, other in zip(own, same, strict=True):
        assert float(one["loss"]) == pytest.approx(float(other["loss"]), rel=1e-5)
        assert float(one["grad_norm"]) == pytest.approx(float(other["grad_norm"]), rel=1e-4)


def test_a_dotted_name_takes_fields_too(cached):
    log_of(cached, "--train.objective", f"{{preset: '{__name__}:Gentle', patch_beta: 2.0}}")
    outputs = output_hashes(cached[1] / "train")
    log_of(cached, "--train.objective", "{preset: halo, video_beta: 3.0, patch_beta: 2.0}")
    file = "lora/pytorch_lora_weights.safetensors"
    again = output_hashes(cached[1] / "train")
    assert outputs["log.csv"] == again["log.csv"] and outputs[file] != again[file]  # the metadata names the objective


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"objective": "halo_fst"}, "train.objective must be one of halo, halo_sft, halo_bounded"),
        ({"objective": {"video_beta": 3.0}}, 'train.objective must name its "preset"'),
        ({"objective": {"preset": "mapo", "patch_beta": 3.0}}, "train.objective has no field 'patch_beta'"),
        ({"objective": "mapo", "auto_beta": 0.3}, "train.auto_beta: .* needs pairs, a reference and"),
        (
            {"objective": {"preset": "halo", "anchor_weight": 1.0}, "reference_draws": 2},
            "train.objective.anchor_weight: needs the reference in the loop; set train.reference_draws to null",
        ),
        (
            {"objective": {"preset": "halo", "anchor_weight": 1.0}, "schedule": "margin_first"},
            "train.objective.anchor_weight: needs both samples in one batch; set train.schedule to batched",
        ),
    ],
)
def test_what_an_objective_cannot_do_is_refused_by_name(pipeline, pairs, settings, message):
    with pytest.raises(UserError, match=message):
        fit(pipeline, pairs, dataclasses.replace(CONFIG, **settings), progress=quiet)


def test_kto_takes_the_better_clip_for_good_and_the_other_for_bad(pipeline, pairs):
    from halo_fast.train.draws import make_batch

    batch = make_batch(family_of(pipeline), pairs, [(0, 0), (3, 0)], 0, torch.device("cpu"))
    given = loss_arguments(batch, batch.target, batch.target, build("diffusion_kto"), "BCFHW")
    gap = batch.video_rewards[:2] - batch.video_rewards[2:]
    torch.testing.assert_close(given["video_rewards"], torch.cat([gap, -gap]) / 2)
    patch_gap = batch.patch_rewards[:2] - batch.patch_rewards[2:]
    torch.testing.assert_close(given["patch_rewards"], torch.cat([patch_gap, -patch_gap]) / 2)
    assert loss_arguments(batch, batch.target, None, build("rwr"), "BCFHW")["video_rewards"] is batch.video_rewards


def test_the_default_objective_is_bounded_and_supervised():
    expected = GranDPO(patch_sft_weight=1.5, video_cap=1.5, patch_cap=1.5)
    assert build(TrainConfig().objective) == PRESETS["halo_bounded"] == expected


@pytest.mark.parametrize("schedule", ["batched", "margin_first"])
def test_bounds_are_settings_of_halo_train(cached, schedule):
    bounds = "{preset: halo_sft, link: poly, poly_alpha: 0.5, video_cap: 2.0, patch_cap: 1.0}"
    words = ("--train.objective", bounds, "--train.time_weights", "[0.5, 2]", "--train.schedule", schedule)
    log = log_of(cached, *words)
    assert [row["step"] for row in log] == ["1", "2"]


def test_time_weights_multiply_the_preferences_of_their_times(tmp_path):
    """The first loss, where every logit is 0: the mean over pairs of omega(t) times both weights log 2."""
    family = family_of(tiny_wan())
    pairs = make_pairs(family)
    weights = [0.0, 3.0, 0.5]
    objective = {"preset": "halo", "video_weight": 0.25, "patch_weight": 1.0}
    config = dataclasses.replace(CONFIG, objective=objective, max_train_steps=1, time_weights=weights)
    fit(family, pairs, config, folder=tmp_path, progress=quiet)
    (row,) = csv.DictReader((tmp_path / "log.csv").open())
    (draws,) = draws_of_step(0, 1, config.train_batch_size, [0] * len(pairs), config.seed, None)
    batch = make_batch(family, pairs, draws, config.seed, torch.device("cpu"), limit=None)
    times = batch.t[: len(draws)].tolist()
    expected = [weights[0 if t < 1 / 3 else 1 if t < 2 / 3 else 2] * 1.25 * math.log(2) for t in times]
    assert len(set(expected)) > 1
    assert float(row["loss"]) == pytest.approx(sum(expected) / len(expected), rel=1e-5)


def test_weights_that_no_time_of_the_network_has_are_refused():
    """Wan 2.2's expert for high noise is trained at times from 0.875 on."""
    tiny = TINY["Wan 2.2 A14B, high noise"]
    family = family_of(tiny.build(), tiny.network)
    pairs = make_pairs(family)
    with pytest.raises(
        UserError, match=r"train.time_weights: \[1.0, 1.0, 0.0\] are 0 at all times of this network, 0.875 to 1"
    ):
        fit(family, pairs, dataclasses.replace(CONFIG, time_weights=[1.0, 1.0, 0.0]), progress=quiet)
    config = dataclasses.replace(CONFIG, time_weights=[0.0, 0.0, 1.0], max_train_steps=1)
    assert fit(family, pairs, config, progress=quiet).log[0]["grad_norm"] > 0


def test_local_dpos_pool_is_normalised_where_patches_have_scores(pipeline):
    """A mask of 2 of the 12 patches counts whole, whatever its size; `normalize: false` stays what it says."""
    family = family_of(pipeline)
    rewards = torch.full((2, 3, 2, 2), 5.0)
    rewards[1, 0, 0] = 1.0
    pair = dataclasses.replace(make_pairs(family, count=1)[0], patch_rewards=rewards)
    margins = {}
    for name, more in {"preset": {}, "true": {"normalize": True}, "false": {"normalize": False}}.items():
        objective = {"preset": "local_dpo", "video_weight": 0.0, "patch_beta": 3.0, "video_beta": 3.0, **more}
        config = dataclasses.replace(CONFIG, objective=objective, max_train_steps=3, train_batch_size=1)
        margins[name] = [row["loss"] for row in fit(family, [pair], config, progress=quiet).log]
    assert margins["preset"] == margins["true"] != margins["false"]


def test_weights_at_the_ends_of_time():
    t = torch.tensor([0.0, 0.249, 0.25, 0.5, 0.999, 1.0])
    assert weights_at(t, [1.0, 2.0, 3.0, 4.0]).tolist() == [1.0, 1.0, 2.0, 3.0, 4.0, 4.0]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"time_weights": [0.0, 0.0]}, "train.time_weights: expected a number above 0 among them"),
        ({"time_weights": []}, "train.time_weights: expected a number above 0 among them"),
        ({"time_weights": [1.0, -1.0]}, "train.time_weights.1.: expected at least 0"),
        ({"time_weights": [1.0, math.nan]}, "train.time_weights.1.: expected at least 0"),
        ({"time_weights": [1.0], "objective": "diffusion_kto"}, "train.time_weights: .* DiffusionKTO does not have"),
        ({"objective": {"preset": "halo", "patch_cap": -1.0}}, "train.objective: patch_cap must be .* above 0"),
        ({"objective": {"preset": "halo", "poly_alpha": 0.5}}, "train.objective: poly_alpha must be 0 with link"),
    ],
)
def test_bounds_without_a_meaning_are_refused(changes, words):
    with pytest.raises(UserError, match=words):
        checked_objective(dataclasses.replace(CONFIG, **changes))
