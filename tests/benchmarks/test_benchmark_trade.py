"""The settings of the trade are those of the table in docs/results.md, whatever the demo's recipe is today."""

from dataclasses import replace

import pytest

from benchmarks.candidates import ARMS, UNBOUNDED
from benchmarks.trade import (
    _PAIRS,
    SETTINGS,
    Setting,
    conditions,
    demo_config,
    parse_arguments,
    read_training,
    training,
)
from halo_fast import GranDPO
from halo_fast.files import write_json
from halo_fast.loss.objectives import build
from halo_fast.pipeline.arguments import load_config
from halo_fast.pipeline.stages import STAGES
from halo_fast.train.config import TrainConfig

SFT = {"video_weight": 0.05, "video_beta": 100.0, "patch_beta": 10.0, "patch_gamma": 0.0, "patch_delta": 0.4}
CAPS = {"video_cap": 1.5, "patch_cap": 1.5}
VIDEO = {**SFT, **CAPS, "video_weight": 1.0, "video_beta": 10.0}
TABLE = {
    "unbounded": GranDPO(**SFT, patch_sft_weight=0.5),
    "cosine": GranDPO(**SFT, patch_sft_weight=0.5),
    "caps 1.5, cosine": GranDPO(**SFT, **CAPS, patch_sft_weight=0.5),
    "caps 1.5, supervised 1, cosine": GranDPO(**SFT, **CAPS, patch_sft_weight=1.0),
    "loser guard, cosine": GranDPO(**SFT, patch_sft_weight=0.5, loser_guard="patch"),
    "bounded, video weight 1, video beta 10": GranDPO(**VIDEO, patch_sft_weight=1.0),
    "bounded, video weight 1, video beta 10, supervised 2": GranDPO(**VIDEO, patch_sft_weight=2.0),
}


@pytest.mark.parametrize("recipe", [{"preset": "reg_dpo"}, {"preset": "halo_bounded", "sft_weight": 0.3}])
@pytest.mark.parametrize("name", TABLE)
def test_a_setting_says_its_whole_objective(name, recipe):
    made = training(SETTINGS[name], TrainConfig(objective=recipe, lr_scheduler="linear"), 5)
    assert build(made.objective) == TABLE[name]
    assert (made.lr_scheduler, made.seed) == ("constant" if name == "unbounded" else "cosine", 5)


def test_the_first_settings_are_the_recipe():
    recipe = load_config("demo").train
    assert [training(one, recipe, recipe.seed) for one in list(SETTINGS.values())[:2]] == [recipe, recipe]
    assert [one.rounds for one in list(SETTINGS.values())[:2]] == [1, 2]


def test_readings_of_the_same_setting_are_kept_and_those_of_another_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["trade", "run", str(tmp_path), "--steps", "9", "--every", "3"])
    base = demo_config(parse_arguments("", SETTINGS), diagnostics_steps=3)
    monkeypatch.setattr("benchmarks.trade.run_stages", lambda *_: pytest.fail("it trains"))
    known = {"made": conditions(SETTINGS["unbounded"], 0, base), "readings": [{"step": 3}]}
    (tmp_path / "unbounded_0").mkdir()
    write_json(tmp_path / "unbounded_0" / "readings.json", known)
    assert read_training("unbounded", SETTINGS["unbounded"], 0, base, tmp_path) == [{"step": 3}]
    longer = replace(base, train=replace(base.train, max_train_steps=10))
    other = Setting({**UNBOUNDED, "patch_beta": 11.0}, {"lr_scheduler": "constant"})
    for setting, config in [(SETTINGS["unbounded"], longer), (other, base)]:
        with pytest.raises(SystemExit, match=r"unbounded_0: was read with other settings \(train\)"):
            read_training("unbounded", setting, 0, config, tmp_path)


@pytest.mark.parametrize("stages", [_PAIRS, *(arm.stages for arm in ARMS.values())])
def test_stages_are_run_in_the_order_of_a_run(stages):
    """A reward model that is taken scores the patches of the run's clips, which must be there before it."""
    order = list(STAGES)
    assert list(stages) == sorted(stages, key=order.index)
