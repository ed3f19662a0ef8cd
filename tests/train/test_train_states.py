"""A training leaves the process as it was: accelerate's state, and settings of other trainings."""

import dataclasses
import os

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from tiny import tiny_wan
from training import CONFIG, quiet

from halo_fast.errors import UserError
from halo_fast.train import fit
from halo_fast.train.job import prepared_job

SHORT = dataclasses.replace(CONFIG, max_train_steps=1)
STATES = (AcceleratorState, GradientState, PartialState)


@pytest.fixture
def fresh_accelerate():
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def shared():
    return [dict(state._shared_state) for state in STATES]


def test_trainings_of_several_precisions_follow_each_other_in_one_process(pipeline, pairs, fresh_accelerate):
    before, environment = shared(), dict(os.environ)
    logs = [
        fit(pipeline, pairs, dataclasses.replace(SHORT, mixed_precision=precision), progress=quiet).log
        for precision in ("bf16", "no", "bf16")
    ]
    assert logs[0] == logs[2] != logs[1]
    assert shared() == before == [{}, {}, {}] and dict(os.environ) == environment


def test_an_accelerator_of_the_caller_keeps_its_state(pipeline, pairs, fresh_accelerate):
    own = Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=3)
    before = shared()
    fit(pipeline, pairs, dataclasses.replace(SHORT, mixed_precision="no"), progress=quiet)
    assert shared() == before and own.mixed_precision == "bf16" and own.gradient_accumulation_steps == 3
    with own.autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16


def test_a_training_that_fails_leaves_no_state_either(pairs, fresh_accelerate):
    broken = tiny_wan()
    with torch.no_grad():
        broken.transformer.proj_out.weight.fill_(torch.nan)
    with pytest.raises(UserError, match="not finite"), prepared_job(broken, pairs, SHORT):
        pass
    assert shared() == [{}, {}, {}]
