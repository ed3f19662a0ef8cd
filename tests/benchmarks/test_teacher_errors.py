"""The judge that is fitted to votes, against one whose numbers are known and whose verdicts are drawn one by one."""

import numpy as np
import pytest

from benchmarks.teacher_errors import (
    Judgement,
    _both,
    _said,
    computed,
    count_table,
    fit,
    probabilities,
    read_votes,
    rows,
    tie_of_share,
)

JUDGE = Judgement(noise=1.2, bias=-0.3, tie=0.4, people_tie=0.5)


@pytest.fixture(scope="module")
def drawn():
    """True differences, people's votes and the errors of two questions, of 400,000 pairs."""
    rng = np.random.default_rng(0)
    truth = rng.standard_normal(400_000)
    return truth, verdict(truth, JUDGE.people_tie), rng.standard_normal((2, len(truth)))


def verdict(difference, tie):
    return np.where(difference > tie, 2, np.where(difference < -tie, 0, 1))


def test_the_fit_finds_the_judge_and_its_table_is_that_of_the_draws(drawn):
    truth, people, errors = drawn
    said = verdict(truth + JUDGE.bias + JUDGE.noise * errors[0], JUDGE.tie)
    table = count_table(people, said)
    assert table.sum() == len(truth)
    np.testing.assert_allclose(probabilities(JUDGE), table / table.sum(), atol=0.003)
    found = fit(table)
    for name in ("noise", "bias", "tie", "people_tie"):
        assert getattr(found, name) == pytest.approx(getattr(JUDGE, name), abs=0.02), name


@pytest.mark.parametrize("same", [False, True])
def test_what_both_orders_agree_on_is_what_two_questions_give(drawn, same):
    truth, people, errors = drawn
    first = verdict(truth + JUDGE.bias + JUDGE.noise * errors[0], JUDGE.tie)
    # the second order: its bias counts for the clip that is shown second now
    second = verdict(truth - JUDGE.bias + JUDGE.noise * errors[0 if same else 1], JUDGE.tie)
    said = np.where(first == second, first, 1)
    decided = (said != 1) & (people != 1)
    kept, right = computed(JUDGE, _both(JUDGE, same))
    assert kept == pytest.approx((said != 1).mean(), abs=0.003)
    assert right == pytest.approx((said == people)[decided].mean(), abs=0.003)


def test_a_tie_band_gives_the_share_of_ties_that_is_asked_for(drawn):
    truth, _, errors = drawn
    wide = tie_of_share(JUDGE, 0.35)
    said = verdict(truth + wide.bias + wide.noise * errors[0], wide.tie)
    assert (said == 1).mean() == pytest.approx(0.35, abs=0.003)
    assert computed(wide, _said(wide))[1] > computed(JUDGE, _said(JUDGE))[1]


def test_votes_are_read_and_counted(tmp_path):
    (tmp_path / "pairs.csv").write_text(
        "idx,prompt,people,gpt4o,gemini\n0,a,leftvote,[[A>B]],[[B>A]]\n1,b,bothbad_vote,[[A=B=Good]],[[A=B=Bad]]\n"
        "2,c,rightvote,[[A>B]],[[A>B]]\n3,d,tievote,[[B>A]],[[B>A]]\n"
    )
    votes = read_votes(tmp_path / "pairs.csv")
    assert votes.tolist() == [[0, 0, 2], [1, 1, 1], [2, 0, 0], [1, 2, 2]]
    # of three verdicts people decided on two, and GPT-4o is right in one; where both models agree it is wrong
    one, _, agreed = rows(votes, JUDGE)[2:5]
    assert "| 75% | 50% |" in one
    assert "| 50% | 0% |" in agreed
