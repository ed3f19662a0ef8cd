"""The comparison of methods: its arms, its figures, and what a registered model says of itself."""

import re

import numpy as np
import pyarrow
import pytest
from recipe import demo_config

from halo_fast import registry
from halo_fast.errors import UserError
from halo_fast.files import write_parquet
from halo_fast.loss.objectives import PRESETS, build
from halo_fast.pipeline import compare
from halo_fast.pipeline.cli import main
from halo_fast.pipeline.compare_tables import arm_slug, build_section, read_arm, render

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


def test_arms_are_read_with_all_their_seeds(tmp_path):
    for seed in (0, 1):
        write_parquet(tmp_path / f"{arm_slug('HALO + x')}_{seed}.parquet", pyarrow.table({"severity": [seed, 0.5]}))
    assert read_arm(tmp_path, "HALO + x")["severity"].tolist() == [[0, 0.5], [1, 0.5]]


def test_arms_are_presets_and_their_parts_with_the_weights_of_the_recipe():
    config = demo_config()
    objectives = {
        arm: build(compare._objective(config, changes)) for arm, changes in compare.ARMS.items() if changes is not None
    }
    shared = {"video_beta": 100.0, "patch_beta": 10.0, "patch_gamma": 0.0, "patch_delta": 0.4}
    for objective in objectives.values():
        assert {name: getattr(objective, name) for name in shared} == shared
    weights = {
        arm: (one.video_weight, one.patch_weight, one.sft_weight, one.patch_sft_weight)
        for arm, one in objectives.items()
    }
    assert weights == {
        "SFT, winning clips": (0.0, 0.0, 1.0, 0.0),
        "SFT, winning patches": (0.0, 0.0, 0.0, 1.0),
        "video DPO": (1.0, 0.0, 0.0, 0.0),
        "patch DPO": (0.0, 1.0, 0.0, 0.0),
        "HALO": (0.05, 1.0, 0.0, 0.0),
        "HALO + patch SFT": (0.05, 1.0, 0.0, 0.5),
    }
    # the two that bear a preset's name differ from one another as the presets do
    assert PRESETS["halo"].patch_sft_weight == 0.0 and PRESETS["halo_sft"].patch_sft_weight == 0.5
    assert objectives["HALO + patch SFT"] == build(config.train.objective)


@pytest.mark.parametrize("name", ["num_seeds", "num_prompts", "max_train_steps", "bootstrap"])
def test_numbers_out_of_bounds_are_refused_before_any_work(name, tmp_path, capsys):
    assert main(["compare", "--output_dir", str(tmp_path / "runs"), f"--{name}", "0"]) == 2
    line = capsys.readouterr().err
    assert line.startswith("halo: error: ") and name in line and "1" in line and line.count("\n") == 1
    with pytest.raises(UserError, match=f"^{name}: expected at least 1, got 0"):
        compare.compare(str(tmp_path / "runs"), **{name: 0})
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
