"""The comparison of methods: its arms, its figures, and what a registered model says of itself."""

import os
import re
import shutil
import signal
from dataclasses import replace
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pyarrow
import pytest
import torch
from recipe import demo_config

from halo_fast import registry
from halo_fast.demo.notes import calibration
from halo_fast.errors import Diverged, UserError
from halo_fast.files import write_json, write_parquet
from halo_fast.loss.objectives import PRESETS, build
from halo_fast.pipeline import compare
from halo_fast.pipeline.cli import main
from halo_fast.pipeline.compare_arms import ARMS, BEST, Arm, arm_training, told_choice
from halo_fast.pipeline.compare_tables import (
    Tuned,
    arm_slug,
    build_section,
    read_measured,
    render,
    tuning_score,
)
from halo_fast.pipeline.run import Run

RNG = np.random.default_rng(0)
NAMES = ("severity", "defective", "fidelity", "digit", "motion_amount")


def arms(clean=0.0, seeds=3, prompts=40):
    """Severity of the base about 0.8; arm `half` has half of it above the clean reading, arm `none` none."""
    base = clean + RNG.uniform(0.6, 1.0, (1, prompts))
    share = {"base": 1.0, "half": 0.5, "none": 0.0}
    found = {}
    for arm, left in share.items():
        severity = np.repeat(clean + (base - clean) * left, 1 if arm == "base" else seeds, axis=0)
        others = {name: np.full_like(severity, 0.25) for name in NAMES[1:]}
        found[arm] = {"severity": severity, **others}
    return found


def test_what_is_mitigated_is_taken_above_the_clean_reading():
    section = build_section("model", arms(clean=0.1), 0.1, "base", "none", 50)
    rows = {row.arm: row for row in section.rows}
    for arm, wanted in (("base", 0.0), ("half", 0.5), ("none", 1.0)):
        assert rows[arm].statistics["mitigated"] == pytest.approx((wanted,) * 3)
        assert rows[arm].by_seed == pytest.approx([wanted] * (1 if arm == "base" else 3))
    assert rows["half"].ahead["mitigated"] == pytest.approx((0.5,) * 3)
    assert rows["half"].ahead["fidelity"] == pytest.approx((0.0,) * 3)
    assert not rows["base"].ahead and not rows["none"].ahead


def test_intervals_hold_the_figure_and_narrow_with_more_prompts():
    widths = []
    for prompts in (20, 500):
        measured = arms(prompts=prompts)
        measured["half"]["severity"] *= RNG.uniform(0.5, 1.5, measured["half"]["severity"].shape)
        section = build_section("model", measured, 0.0, "base", "none", 300)
        value, low, high = section.rows[1].statistics["mitigated"]
        assert low < value < high
        widths.append(high - low)
    assert widths[1] < widths[0] / 2


def test_page_has_a_row_for_every_arm_and_columns_for_what_was_measured():
    measured = arms()
    page = render(["# Title"], [build_section("model", measured, 0.0, "base", "none", 20)], ["A note."])
    assert page.startswith("# Title\n\n## Base: model\n\nA note.\n")
    assert "| arm | mitigated | by seed | fidelity | digit | motion ratio | defective patches |" in page
    assert "| half | 50 [50, 50] | 50, 50, 50 | 25 [25, 25] | 25 | 1.00 | 25 |" in page
    assert "| half | 50 [50, 50], ahead | 0 [0, 0], not told apart |" in page
    few = {
        arm: {name: values for name, values in found.items() if name in NAMES[:2]} for arm, found in measured.items()
    }
    page = render([], [build_section("model", few, 0.0, "base", "none", 20)], ["A note."])
    assert "| arm | mitigated | by seed | defective patches |" in page and "Motion ratio" not in page


def test_page_judges_motion_by_a_flawless_removal_of_the_same_share_and_lists_what_was_tuned():
    section = build_section("model", arms(), 0.0, "base", "none", 20, lambda mitigated: 1 + mitigated / 2)
    tuned = [Tuned("half", {"learning_rate": 0.5, "lr_scheduler": "cosine"}, [0.25, 1.5, None, 1.0])]
    page = render([], [section], ["A note."], tuned)
    assert "| motion ratio | of a flawless removal | defective patches |" in page
    assert "| half | 50 [50, 50] | 50, 50, 50 | 25 [25, 25] | 25 | 1.00 | 1.25 | 25 |" in page
    assert "| half | learning_rate x 0.5, lr_scheduler cosine | 150 | 150, 100, 25, failed |" in page


def test_arms_are_read_with_all_their_seeds(tmp_path):
    files = [tmp_path / f"{arm_slug('HALO + x')}_{seed}.parquet" for seed in (0, 1)]
    for seed, file in enumerate(files):
        write_parquet(file, pyarrow.table({"severity": [seed, 0.5]}))
    assert read_measured(files)["severity"].tolist() == [[0, 0.5], [1, 0.5]]


def test_a_setting_is_scored_by_what_it_mitigates_and_keeps():
    base, found = {"severity": np.full((1, 4), 0.5)}, {"severity": np.full((1, 4), 0.2)}
    assert tuning_score(found, base, clean=0.1) == pytest.approx(0.75)
    found["fidelity"] = np.array([[1.0, 1.0, 1.0, 0.0]])
    assert tuning_score(found, base, clean=0.1) == pytest.approx(1.5)
    assert tuning_score({"severity": np.full((1, 4), np.nan)}, base, clean=0.1) is None


def objective_of(name, choice=None):
    return build(arm_training(ARMS[name], demo_config().train, choice or {}, 0).objective)


def test_arms_are_presets_and_their_parts_with_the_numbers_of_the_recipe():
    for name in ARMS:
        objective = objective_of(name)
        assert (objective.video_beta, objective.patch_gamma, objective.patch_delta) == (10.0, 0.0, 0.4)
        assert objective.patch_beta == 10.0
    weights = ("video_weight", "patch_weight", "sft_weight", "patch_sft_weight")
    assert {name: tuple(getattr(objective_of(name), weight) for weight in weights) for name in ARMS} == {
        "SFT, winning clips": (0.0, 0.0, 1.0, 0.0),
        "SFT, winning patches": (0.0, 0.0, 0.0, 1.0),
        "video DPO": (1.0, 0.0, 0.0, 0.0),
        "DenseDPO": (0.0, 1.0, 0.0, 0.0),
        "Local-DPO": (1.0, 1.0, 0.1, 0.1),
        "patch DPO": (0.0, 1.0, 0.0, 0.0),
        "HALO": (1.0, 1.0, 0.0, 0.0),
        "HALO + patch SFT": (1.0, 1.0, 0.0, 0.5),
        "HALO, bounded": (1.0, 1.0, 0.0, 1.5),
        "HALO, bounded, two rounds": (1.0, 1.0, 0.0, 1.5),
    }
    assert {(objective_of(name).video_cap, objective_of(name).patch_cap) for name in ARMS if BEST in name} == {
        (1.5, 1.5)
    }
    # those that bear a preset's name differ from one another as the presets do
    assert PRESETS["halo"].patch_sft_weight == 0.0 and PRESETS["halo_sft"].patch_sft_weight == 0.5
    # what the page recommends is what the demo does
    assert objective_of(BEST) == build(demo_config().train.objective)


def test_all_arms_choose_among_equally_many_different_settings():
    recipe = demo_config().train
    for name, arm in ARMS.items():
        if arm.chosen_as:
            assert not arm.choices and ARMS[arm.chosen_as].choices
            continue
        found = [arm_training(arm, recipe, choice, 3) for choice in arm.choices]
        assert len(found) == 8 and all(one.seed == 3 and one.loss_spike_factor is None for one in found)
        # an own setting each, and more of it than numbers that the arm's loss leaves out
        assert len({(one.learning_rate, one.lr_scheduler, build(one.objective)) for one in found}) == 8, name


def test_a_number_multiplies_what_the_arm_has_and_a_word_replaces_it():
    choice = {"learning_rate": 0.5, "patch_beta": 3, "video_cap": 2, "lr_scheduler": "linear"}
    training = arm_training(ARMS[BEST], demo_config().train, choice, 1)
    objective = build(training.objective)
    assert (training.learning_rate, training.lr_scheduler, training.seed) == (1e-3, "linear", 1)
    assert (objective.patch_beta, objective.video_cap, objective.patch_cap) == (30.0, 3.0, 1.5)
    assert told_choice(choice) == "learning_rate x 0.5, patch_beta x 3, video_cap x 2, lr_scheduler linear"


@pytest.mark.parametrize("name", ["num_seeds", "num_prompts", "max_train_steps", "bootstrap", "num_workers"])
def test_numbers_out_of_bounds_are_refused_before_any_work(name, tmp_path, capsys):
    assert main(["compare", "--output_dir", str(tmp_path / "runs"), f"--{name}", "0"]) == 2
    line = capsys.readouterr().err
    assert line.startswith("halo: error: ") and name in line and "1" in line and line.count("\n") == 1
    with pytest.raises(UserError, match=f"^{name}: expected at least 1, got 0"):
        compare.compare(str(tmp_path / "runs"), **{name: 0})
    assert not (tmp_path / "runs").exists()


def test_settings_of_an_earlier_comparison_are_taken(tmp_path, capsys):
    chosen = {name: dict(arm.choices[3]) for name, arm in ARMS.items() if arm.choices}
    file = tmp_path / "chosen.json"
    rows = [{"arm": name, "choice": choice, "scores": [1.0] * 7 + [None]} for name, choice in chosen.items()]
    write_json(file, {"arms": rows})
    assert {one.arm: one.choice for one in compare._read_tuned(file)} == chosen
    comparison = registry.resolve("comparison", "patchy")
    page = "\n".join(compare._introduction([comparison], demo_config(), ["patchy"], 3, "runs/compare", "chosen.json"))
    assert " --tuning chosen.json " in page and "trained once by an earlier comparison." in page

    absent, other, damaged, text = (tmp_path / f"{name}.json" for name in ("absent", "other", "damaged", "text"))
    few, folder = tmp_path / "few.json", tmp_path
    write_json(other, {"arms": [*rows[:1], rows[1] | {"choice": {"learning_rate": 9}}, *rows[2:]]})
    write_json(few, {"arms": [rows[0] | {"scores": []}, *rows[1:]]})
    damaged.write_text('{"arms": [{"arm": "HALO"}]}')
    text.write_text("# Does the idea hold?")
    none = "which is none"
    told = {absent: none, damaged: none, text: none, folder: none}
    told |= {other: f"settings of {rows[1]['arm']} in", few: f"settings of {rows[0]['arm']} in"}
    for wrong, words in told.items():
        assert main(["compare", "--output_dir", str(tmp_path / "runs"), "--tuning", str(wrong)]) == 2
        line = capsys.readouterr().err
        assert line.startswith("halo: error: tuning: expected ") and words in line and str(wrong) in line
        assert line.count("\n") == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", registry.known("comparison"))
def test_a_registered_model_says_what_the_page_needs(name):
    comparison: compare.Comparison = registry.resolve("comparison", name)
    base = {"gpt-like": "graded"}.get(name, name)
    errors = {"annotate.options": {"noisy_share": 1.0, "errors": "gpt-4o"}} if name == "gpt-like" else {}
    assert comparison.changes == {"pretrained_model_name_or_path": f"demo:{base}"} | errors
    assert bool(errors) == ("as large as GPT-4o's" in comparison.note())
    page = "\n".join(compare._introduction([comparison], demo_config(), [name], 3, "runs/compare"))
    assert page.startswith("# Does the idea hold?\n") and "16 pairs for every arm" in page
    # a table of planted damage, most of it to least, whose readings fall
    readings = [float(value) for value in re.findall(rf"\| {base} \| \d+ \| (0\.\d+) \|", page)]
    assert len(readings) == 5 and readings == sorted(readings, reverse=True)
    assert comparison.note().startswith("The base on 256 held-out prompts: defect_rate 0.")


@pytest.mark.parametrize(
    "given",
    [
        "halo_sft",
        "diffusion_dpo",
        "mapo",
        {"preset": "halo_bounded", "patch_beta": 30.0, "video_weight": 0.05},
        {"preset": "local_dpo", "video_weight": 0.0},
        {"preset": "halo_sft", "patch_sft_weight": 1.0, "link": "hinge"},
    ],
)
def test_arms_are_what_they_are_called_whatever_the_recipe_is(given):
    """Betas come from the recipe; kinds of loss, weights of supervision, links and caps do not."""
    recipe, own = replace(demo_config().train, objective=given), build(given)
    for name, arm in ARMS.items():
        objective, demo = build(arm_training(arm, recipe, {}, 0).objective), objective_of(name)
        assert type(objective) is type(demo)
        for part in ("sft_weight", "patch_sft_weight", "link", "video_cap", "patch_cap"):
            assert getattr(objective, part) == getattr(demo, part), (name, part)
        assert (objective.video_weight > 0, objective.patch_weight > 0) == (
            demo.video_weight > 0,
            demo.patch_weight > 0,
        )
        assert objective.video_beta == getattr(own, "video_beta", objective.video_beta)
        if name.startswith("HALO"):
            assert objective.video_weight == getattr(own, "video_weight", 0) or demo.video_weight
        for choice in arm.choices:
            build(arm_training(arm, recipe, choice, 0).objective)


def test_a_setting_that_cannot_be_trained_is_chosen_by_nobody(tmp_path, monkeypatch, caplog):
    error = Diverged("loss: spiked at step 3")

    def fails(*given, **named):
        raise error

    monkeypatch.setattr(compare, "fit", fails)
    monkeypatch.setattr(compare, "training_pairs", lambda *given: None)
    monkeypatch.setattr(Run, "require", lambda run, path: tmp_path / path)
    config = demo_config(output_dir=str(tmp_path))
    prompts = ["a green 7 drifts left over a dark field"] * 2
    job = compare._Job(tmp_path / "arm_0.parquet", config.train, 1, prompts, -2)
    compare._run_job(job, config, Run(config))
    assert "arm_0 cannot be trained: loss: spiked at step 3" in caplog.text
    assert tuning_score(read_measured([job.file]), {"severity": np.full((1, 2), 0.5)}, 0.0) is None
    # what is no fault of the setting ends the comparison, and leaves nothing that stands for a result
    error = UserError("train: the process that reads pairs ahead has died")
    with pytest.raises(UserError, match="has died"):
        compare._run_job(replace(job, file=tmp_path / "other.parquet"), config, Run(config))
    assert not (tmp_path / "other.parquet").exists()


def test_a_training_that_failed_is_told_and_leaves_the_others_figures_alone(tmp_path):
    measured = arms()
    whole = build_section("model", measured, 0.0, "base", "none", 20)
    for arm, failed in (("some", slice(1, 2)), ("all", slice(0, 3))):
        files = [tmp_path / f"{arm}_{seed}.parquet" for seed in range(3)]
        for seed, file in enumerate(files):
            columns = {name: values[seed] for name, values in measured["half"].items()}
            if seed in range(3)[failed]:
                columns = {"severity": np.full(40, np.nan)}
            write_parquet(file, pyarrow.table(columns))
        measured[arm] = read_measured(files)
    section = build_section("model", measured, 0.0, "base", "none", 20, lambda mitigated: 1 + mitigated)
    page = render([], [section], ["A note."])
    assert "| some | failed | 50, failed, 50 | failed | failed | failed | failed | failed |" in page
    assert "| all | failed | failed, failed, failed | failed | failed | failed | failed | failed |" in page
    assert "| some | failed | failed |" in page and "| half | 50 [50, 50], ahead | 0 [0, 0], not told apart |" in page
    for row, alone in zip(section.rows, whole.rows, strict=False):
        assert row.by_seed == alone.by_seed


def test_a_base_without_defects_and_a_recipe_without_lora_are_refused_before_training(tmp_path, monkeypatch, capsys):
    config = demo_config(output_dir=str(tmp_path))
    job = compare._Job(tmp_path / "base.parquet", None, 1, ["a"] * 2, -2)
    write_parquet(job.file, pyarrow.table({"severity": [0.1, 0.2]}))
    monkeypatch.setattr(Run, "require", lambda run, path: tmp_path / path)
    for clean in (0.1, 0.2):
        monkeypatch.setattr(compare, "evaluation_meter", lambda *given, clean=clean: SimpleNamespace(clean=clean))
        if clean == 0.1:
            assert compare._measure_base(job, config, Run(config)) == clean
            continue
        with pytest.raises(UserError, match=r"mean severity of 0\.15 where clean ones have 0\.2; compare on another"):
            compare._measure_base(job, config, Run(config))
    arguments = ["compare", "--output_dir", str(tmp_path / "runs")]
    assert main([*arguments, "--num_prompts", "5000"]) == 2
    assert "distinct prompts, got 5000" in capsys.readouterr().err
    assert main([*arguments, "--regimes", "[test_compare:WHOLE]"]) == 2
    assert "test_compare:WHOLE: expected a recipe that trains a LoRA, got train.rank 0" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_patch_beta_that_is_the_videos_is_multiplied_too():
    recipe = replace(demo_config().train, objective={"preset": "halo", "video_beta": 40.0})
    spec = arm_training(ARMS["HALO + patch SFT"], recipe, {"patch_beta": 3}, 0).objective
    assert build(spec).patch_beta == 120.0 and build(spec).video_beta == 40.0


@pytest.mark.parametrize("name", ARMS)
def test_one_logit_over_the_video_has_the_videos_beta(name):
    recipe = replace(demo_config().train, objective={"preset": "halo", "video_beta": 40.0, "patch_beta": 7.0})
    objective = build(arm_training(ARMS[name], recipe, {}, 0).objective)
    assert objective.video_beta == 40.0
    assert objective.patch_beta == (40.0 if name in ("DenseDPO", "Local-DPO") else 7.0)


class Deadly(str):
    """A prompt that kills the process which takes it over."""

    def __reduce__(self):
        return die, ()


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_is_named_and_nothing_hangs(tmp_path):
    jobs = [compare._Job(tmp_path / f"{number}.parquet", None, 1, [Deadly("a prompt")], -1) for number in range(3)]
    with pytest.raises(UserError, match="^num_workers: one of 2 processes was killed, .*: call again, with fewer$"):
        compare._run_jobs(jobs, demo_config(), Run(demo_config(output_dir=str(tmp_path))), 2, "compare")
    assert not list(tmp_path.glob("*.parquet"))


@pytest.mark.parametrize("comparison", [registry.resolve("comparison", name) for name in ("graded", "patchy")])
def test_motion_of_a_flawless_removal_lies_between_what_was_measured(comparison):
    rows = calibration()[comparison.base]["removed"]
    worst, clean = rows[0]["severity"], rows[-1]["severity"]
    for row in rows:
        gone = 1 - (row["severity"] - clean) / (worst - clean)
        assert comparison.flawless_motion(gone) == pytest.approx(row["motion_ratio"])
    half = 1 - ((rows[1]["severity"] + rows[2]["severity"]) / 2 - clean) / (worst - clean)
    middle = (rows[1]["motion_ratio"] + rows[2]["motion_ratio"]) / 2
    assert comparison.flawless_motion(half) == pytest.approx(middle)


class Small:
    """The demo with six prompts and hardly any training."""

    recipe, measures = "demo", ""
    changes: ClassVar = {
        "generate.num_prompts": 6, "reward.video_steps": 1, "reward.patch_steps": 2, "reward.num_examples": 16,
        "pairs.patch_delta": 0.0, "train.objective.patch_delta": 0.0, "train.train_batch_size": 2,
        "train.reference_draws": 1,
    }  # fmt: skip

    def preface(self):
        return ["Before."]

    def note(self):
        return "A note."

    def flawless_motion(self, mitigated):
        return None


SMALL = Small()
WHOLE = Small()
WHOLE.changes = {"train.rank": 0}


@pytest.mark.slow
def test_a_killed_comparison_continues_and_workers_change_nothing(tmp_path, monkeypatch, request):
    rates = [{"learning_rate": factor} for factor in (1, 2)]
    few = {
        BEST: Arm({"preset": "halo_bounded"}, rates),
        f"{BEST}, two rounds": Arm({"preset": "halo_bounded"}, rounds=2, chosen_as=BEST),
    }
    threads = torch.get_num_threads()
    request.addfinalizer(lambda: torch.set_num_threads(threads))
    torch.set_num_threads(1)  # as workers have it: a sum's last digit may depend on their number
    monkeypatch.setattr(compare, "ARMS", few)
    monkeypatch.setattr(compare, "_TUNING_PROMPTS", 4)
    counts = {"num_seeds": 1, "num_prompts": 4, "max_train_steps": 2, "bootstrap": 20}
    given = {"regimes": ("test_compare:SMALL",), **counts}

    compare.compare(str(tmp_path / "one"), **given)
    (folder,) = (tmp_path / "one").glob("*/arms")
    tables = {file.name: file.read_bytes() for file in folder.glob("*.parquet")}
    assert len(tables) == 1 + len(few)

    def killed(label):
        raise KeyboardInterrupt

    # half of the trainings, then the rest in processes of their own
    measured = compare._sample_and_measure
    counts = iter(range(4))
    monkeypatch.setattr(
        compare,
        "_sample_and_measure",
        lambda *given: measured(*given) if next(counts, None) is not None else killed(""),
    )
    made = tmp_path / "one" / folder.parent.name
    ours = shutil.ignore_patterns("tuning", "arms", "rounds", "reference_errors")
    shutil.copytree(made, tmp_path / "two" / made.name, ignore=ours)  # the same pairs
    with pytest.raises(KeyboardInterrupt):
        compare.compare(str(tmp_path / "two"), **given)
    monkeypatch.setattr(compare, "_sample_and_measure", measured)
    compare.compare(str(tmp_path / "two"), **given, num_workers=2)
    (folder,) = (tmp_path / "two").glob("*/arms")
    assert {file.name: file.read_bytes() for file in folder.glob("*.parquet")} == tables
    pages = [(tmp_path / name / "results.md").read_text().replace(f"/{name} ", "/ ") for name in ("one", "two")]
    assert pages[0] == pages[1] and f"| {BEST}, two rounds | " in pages[0] and "## What each arm chose" in pages[0]
