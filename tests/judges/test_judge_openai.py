"""A model behind a server of OpenAI's protocol as a judge: both orders, nothing paid twice."""

import math

import pytest
import torch
from servers import OpenAIServer

from halo_fast.errors import UserError
from halo_fast.judges.base import load_judge
from halo_fast.judges.comparison import openai
from halo_fast.teachers.rubric import RUBRIC_DIMENSIONS


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)


def clip(brightness: int) -> torch.Tensor:
    return torch.full((4, 16, 16, 3), brightness, dtype=torch.uint8)


# base, aligned: the server prefers the brighter one
CLIPS = [clip(50), clip(200), clip(200), clip(50), clip(100), clip(100)]
PROMPTS = ["a ball", "a ball", "a cube", "a cube", "a cat", "a cat"]


def ask(tmp_path, server, **options):
    options = {"base_url": server.url, "api": "chat", "max_frames": 2} | options
    return openai(CLIPS, PROMPTS, 8, "cpu", store=tmp_path / "labels.sqlite", **options)


def test_wins_are_asked_in_both_orders_and_paid_once(tmp_path):
    with OpenAIServer() as server:
        table = ask(tmp_path, server)
        assert [row["visual_quality"] for row in table.scores] == [0, 1, 1, 0, 0.5, 0.5]
        assert list(table.scores[0]) == list(RUBRIC_DIMENSIONS) and "gpt-4o" in table.name
        # two orders of two pairs; equal clips are not asked about
        assert len(server.requests) == 4
        assert ask(tmp_path, server, budget=9.0, timeout=60.0).scores == table.scores
        assert len(server.requests) == 4


def test_a_judge_that_prefers_the_first_clip_says_nothing(tmp_path):
    with OpenAIServer(biased=True) as server:
        assert {value for row in ask(tmp_path, server).scores for value in row.values()} == {0.5}


def test_a_pair_without_an_answer_is_missing(tmp_path):
    with OpenAIServer(misbehave=lambda number, question: "refusal" if number < 2 else "") as server:
        scores = ask(tmp_path, server, max_concurrency=1, max_attempts=1).scores
    missing = [math.isnan(row["visual_quality"]) for row in scores]
    assert missing[0] == missing[1] and sum(missing) in (2, 4) and not any(missing[4:])


def test_mistakes_name_the_judges_settings(tmp_path):
    with OpenAIServer() as server:
        with pytest.raises(UserError, match=r"evaluate.judge_options.openai.budget: .*budget \$0.00"):
            ask(tmp_path, server, budget=0.0)
        assert not server.requests
        with pytest.raises(UserError, match=r"evaluate.judge_options.openai: expected some of model, .* got 'colour'"):
            ask(tmp_path, server, colour=1)
        with pytest.raises(UserError, match="a judge always compares"):
            ask(tmp_path, server, pairwise=False)
    with pytest.raises(ValueError, match="two of each prompt"):
        openai(CLIPS[:3], PROMPTS[:3], 8, "cpu", store=tmp_path / "s.sqlite")
    assert load_judge("openai", {"model": "m"}, {"store": tmp_path / "s.sqlite", "seed": 0})
