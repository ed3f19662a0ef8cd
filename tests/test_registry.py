"""Registered and dotted names: what is behind them, and one line for each mistake of somebody else's object."""

import logging

import pytest

from halo_fast import registry
from halo_fast.agreement.meters import MeterRequest, load_meter
from halo_fast.data.prompts import read_prompts
from halo_fast.errors import UserError
from halo_fast.families import load
from halo_fast.loss.objectives import build
from halo_fast.pipeline import compare
from halo_fast.rewards import RewardModel, RewardModelConfig
from halo_fast.teachers import LabelStore, TeacherRequest, build_teacher
from halo_fast.train import TrainConfig
from halo_fast.train.setting_checks import checked_objective

GRID, SIZE = (1, 2, 2), (4, 16, 16)
number = 3


class Empty:
    """Nothing that anything needs, whatever it is made with."""

    def __init__(self, *arguments):
        pass


def broken(*arguments):
    raise KeyError("left")


def refused(*arguments):
    raise ValueError("at most 4")


def teacher(name, tmp_path):
    with LabelStore(tmp_path / "labels.sqlite") as store:
        build_teacher(TeacherRequest(name, GRID, store), "annotate.teacher")


def meter(name, tmp_path):
    load_meter(name, MeterRequest(GRID, SIZE, ["a"], 0, lambda: None))


def backbone(name, tmp_path):
    RewardModel(RewardModelConfig(("visual_quality",), backbone=name))


SITES = {
    "pretrained_model_name_or_path": lambda name, tmp_path: load(name),
    "prompts": lambda name, tmp_path: read_prompts(name, 3),
    "annotate.teacher": teacher,
    "evaluate.meter": meter,
    "reward.backbone": backbone,
    "regimes": lambda name, tmp_path: compare.compare(str(tmp_path), regimes=(name,)),
    "train.objective": lambda name, tmp_path: checked_objective(TrainConfig(objective=name)),
}


@pytest.mark.parametrize("what", ["number", "Empty", "broken"])
@pytest.mark.parametrize("setting", SITES)
def test_an_object_of_the_wrong_kind_is_one_line(setting, what, tmp_path):
    with pytest.raises(UserError) as caught:
        SITES[setting](f"{__name__}:{what}", tmp_path)
    line = str(caught.value)
    assert line.startswith(setting) and f"'{__name__}:{what}'" in line, line
    assert line.count(f"{setting}: ") <= 1, line
    if what == "broken" and setting != "regimes":
        assert "failed (KeyError: 'left')" in line


def test_an_objective_of_the_wrong_kind_is_a_plain_error_of_the_call():
    for what in ("number", "broken"):
        with pytest.raises(ValueError, match=f"^objective: .*{what}"):
            build(f"{__name__}:{what}")
    with pytest.raises(TypeError, match="^objective must be an Objective.*Empty without table"):
        build(f"{__name__}:Empty")


def test_prompts_that_cannot_serve_a_count_say_so():
    with pytest.raises(UserError, match="^prompts: at most 4; lower num_prompts"):
        read_prompts(f"{__name__}:refused", 5)


@pytest.mark.parametrize("text", ["1 / 0", "def f(:", "import nowhere_at_all"])
def test_a_module_that_cannot_be_imported_is_named(text, tmp_path, monkeypatch):
    (tmp_path / "broken_module.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"^evaluate\.meter: expected one of .*broken_module:Meter.*cannot be imported"):
        registry.resolve("meter", "broken_module:Meter", "evaluate.meter")


def test_the_traceback_is_in_the_log(caplog):
    with caplog.at_level(logging.DEBUG, "halo_fast.registry"), pytest.raises(UserError):
        registry.create("meter", f"{__name__}:broken", None)
    assert "in broken" in caplog.text


def test_errors_of_the_package_itself_keep_their_traceback():
    with pytest.raises(ZeroDivisionError), registry.user_errors("meter", "reward", "evaluate.meter"):
        1 / 0  # noqa: B018
