"""Every case and provider under pytest-benchmark; the gate comes before any time."""

import pytest


@pytest.mark.mode("loss")
def test_loss(run_case):
    run_case(rounds=30, warmup_rounds=3)


@pytest.mark.mode("step")
def test_step(run_case):
    run_case(rounds=3)


@pytest.mark.mode("reward")
def test_reward(run_case):
    run_case(rounds=3)


@pytest.mark.mode("generate")
def test_generate(run_case):
    run_case(rounds=3)


@pytest.mark.mode("memory")
def test_memory(run_case):
    run_case(rounds=1, warmup_rounds=0)
