"""Figures of agreement against scipy, scikit-learn, brute force and what is known of how data were made."""

import itertools

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics

from halo_fast.agreement.baselines import predict_ridge
from halo_fast.agreement.figures import (
    auc,
    bootstrap_interval,
    calibration_error,
    calibration_slope,
    centred,
    kendall,
    pair_accuracy,
    patch_agreement,
    rater_ceiling,
    video_agreement,
)
from halo_fast.errors import UserError


@pytest.mark.parametrize("levels", [3, 1000])
def test_rank_figures_are_those_of_scipy_and_scikit_learn(levels):
    rng = np.random.default_rng(levels)
    x = rng.integers(levels, size=80)
    y = rng.integers(levels, size=80) + x
    assert kendall(x, y) == pytest.approx(scipy.stats.kendalltau(x, y).statistic)
    positive = y > np.median(y)
    assert auc(x, positive) == pytest.approx(sklearn.metrics.roc_auc_score(positive, x))
    slope = scipy.stats.linregress(x, y).slope
    assert calibration_slope(x, y) == pytest.approx(slope)


def test_auc_needs_both_kinds():
    assert np.isnan(auc([1.0, 2.0], [True, True])) and np.isnan(auc([1.0, 2.0], [False, False]))


def brute_force_accuracy(gaps, labels):
    """Every threshold in turn, pair by pair."""
    best = 0.0
    for threshold in [0.0, *np.abs(gaps)]:
        predicted = [0 if abs(gap) <= threshold else np.sign(gap) for gap in gaps]
        best = max(best, np.mean([p == np.sign(label) for p, label in zip(predicted, labels, strict=True)]))
    return best


@pytest.mark.parametrize("seed", range(8))
def test_pair_accuracy_is_the_best_over_all_thresholds(seed):
    rng = np.random.default_rng(seed)
    labels = rng.integers(-2, 3, size=30)
    # rounded, so that equal gaps and gaps of 0 occur
    gaps = np.round(0.5 * labels + rng.normal(size=30), 1 if seed % 2 else 0)
    assert pair_accuracy(gaps, labels) == pytest.approx(brute_force_accuracy(gaps, labels))


def test_pair_accuracy_of_no_information_is_the_share_of_ties_or_a_guess():
    assert pair_accuracy(np.zeros(10), np.array([0] * 4 + [1] * 6)) == pytest.approx(0.4)
    assert pair_accuracy([2.0, -1.0], [1, -1]) == 1
    assert np.isnan(pair_accuracy([], []))


def test_calibration_error_counts_points_of_the_scale():
    scores = np.repeat(np.linspace(1, 5, 10), 10)
    assert calibration_error(scores, scores) == pytest.approx(0)
    assert calibration_error(scores + 0.5, scores) == pytest.approx(0.5)
    noise = np.tile([-1, 1], 50)  # averages out within a bin
    assert calibration_error(scores, scores + noise) == pytest.approx(0, abs=1e-12)


def test_calibration_error_does_not_depend_on_the_order_of_rows():
    rng = np.random.default_rng(3)
    group = rng.integers(4, size=90)
    labels = rng.integers(1, 6, size=90).astype(float)
    means = np.array([labels[group == k].mean() for k in range(4)])[group]
    assert calibration_error(means, labels) == pytest.approx(0, abs=1e-12), "exact means of groups are calibrated"
    coarse = np.round(labels + rng.normal(size=90))
    found = calibration_error(coarse, labels)
    assert found > 0.1
    for seed in range(5):
        order = np.random.default_rng(seed).permutation(90)
        assert calibration_error(coarse[order], labels[order]) == pytest.approx(found, abs=1e-12)
    # without ties, bins of equally many: the first ten rows 1 too high, the others right
    scores = np.arange(100.0)
    assert calibration_error(scores, scores - (scores < 10)) == pytest.approx(0.1)


def test_centring_leaves_what_neither_group_explains():
    rng = np.random.default_rng(0)
    prompt, generator = np.array(list(itertools.product(range(6), range(4)))).T
    residual = rng.normal(size=24)
    square = residual.reshape(6, 4)
    square = square - square.mean(0) - square.mean(1, keepdims=True) + square.mean()
    values = 3 * prompt - generator**2 + residual
    np.testing.assert_allclose(centred(values, prompt, generator), square.ravel(), atol=1e-10)
    # unbalanced: the residual is orthogonal to every group
    left = centred(values[:-5], prompt[:-5], generator[:-5])
    for group in (prompt[:-5], generator[:-5]):
        for name in set(group):
            assert left[group == name].sum() == pytest.approx(0, abs=1e-9)


def made_clips(rng, own=1.0):
    """Labels made of a prompt's, a generator's and a clip's own part; the parts are returned beside them."""
    prompt, generator = np.array(list(itertools.product(range(40), range(4)))).T
    parts = 2 * rng.normal(size=40)[prompt], 2 * rng.normal(size=4)[generator], own * rng.normal(size=160)
    return [f"prompt {k}" for k in prompt], [f"model {k}" for k in generator], parts


def test_confounds_are_separated_from_agreement():
    prompts, generators, (prompt, generator, own) = made_clips(np.random.default_rng(1))
    labels = prompt + generator + own
    blind = video_agreement(prompt + generator, labels, prompts, generators, resamples=100)
    assert blind["spearman"].value > 0.8, "the confounds are strong"
    assert np.isnan(blind["spearman_centred"].value), "and nothing is left of them"
    noisy = prompt + generator + np.random.default_rng(2).normal(size=160)
    found = video_agreement(noisy, labels, prompts, generators, resamples=200)
    low, high = found["spearman_centred"][1:]
    assert low < 0 < high and found["spearman"].low > 0.5
    seeing = video_agreement(own, labels, prompts, generators, resamples=200)
    assert seeing["spearman_centred"].value == pytest.approx(1) and seeing["spearman"].high < 0.6


def test_pairs_share_a_prompt():
    labels = np.array([1.0, 2.0, 4.0, 5.0])
    scores = np.array([3.0, 4.0, 1.0, 2.0])  # right within prompts, wrong between them
    found = video_agreement(scores, labels, ["a", "a", "b", "b"], resamples=10)
    assert found["pair_accuracy"].value == 1 and found["kendall"].value < 0


def test_unlabelled_clips_do_not_count():
    rng = np.random.default_rng(4)
    labels, scores = rng.normal(size=(2, 60))
    prompts = [f"{k // 3}" for k in range(60)]
    some = labels.copy()
    some[30:] = np.nan
    whole = video_agreement(scores[:30], labels[:30], prompts[:30], resamples=20)
    assert video_agreement(scores, some, prompts, resamples=20) == whole


def test_a_missing_score_is_a_mistake_and_not_an_unlabelled_clip():
    rng = np.random.default_rng(4)
    labels = rng.normal(size=40)
    scores, prompts = labels + rng.normal(size=40), [f"{k // 2}" for k in range(40)]
    worst = np.argsort(np.abs(scores - labels))[-10:]
    silent = scores.copy()
    silent[worst] = np.nan
    with pytest.raises(ValueError, match="scores of labelled clips: expected numbers, got NaN in 10 of 40"):
        video_agreement(silent, labels, prompts, resamples=5)
    labels[worst] = np.nan
    assert np.isfinite(video_agreement(silent, labels, prompts, resamples=5)["spearman"].value)
    with pytest.raises(ValueError, match="scores of labelled patches: expected numbers, got NaN in 1 of 4"):
        patch_agreement([[1.0, np.nan], [2.0, 3.0]], [[0.0, 1.0], [0.0, 1.0]], ["a", "b"], resamples=5)
    with pytest.raises(ValueError, match="score_gaps: expected numbers"):
        pair_accuracy([np.nan, 1.0], [1, 1])


def test_one_prompt_has_no_interval():
    labels = np.random.default_rng(9).normal(size=20)
    found = video_agreement(labels + 1, labels, ["a"] * 20, resamples=5)
    assert found["spearman"].value == pytest.approx(1)
    assert np.isnan([figure[1:] for figure in found.values()]).all()


def test_the_prompts_are_drawn_not_the_clips():
    rng = np.random.default_rng(5)
    x, y = rng.normal(size=(2, 12))
    labels, scores = np.repeat(x, 20), np.repeat(y, 20)
    copies = [f"{k}" for k in np.repeat(np.arange(12), 20)]
    by_prompt = video_agreement(scores, labels, copies, resamples=300)["spearman"]
    alone = video_agreement(y, x, [f"{k}" for k in range(12)], resamples=300)["spearman"]
    assert by_prompt.value == pytest.approx(alone.value)
    # twenty copies of a clip are no more evidence than one
    assert by_prompt.high - by_prompt.low == pytest.approx(alone.high - alone.low, rel=0.25)


def test_undefined_draws_are_left_out():
    values = np.array([1.0, np.nan, 3.0])
    low, high = bootstrap_interval(lambda rows: values[rows].mean(), 3, 500, seed=0)
    assert 1 <= low <= high <= 3
    assert np.isnan(bootstrap_interval(lambda rows: np.nan, 3, 10, seed=0)).all()


def test_patches_within_clips_are_blind_to_which_clip_is_worse():
    rng = np.random.default_rng(6)
    clip = rng.permutation(30)[:, None] / 30
    patch = rng.uniform(size=(30, 20))
    severity = clip + 0.2 * patch
    names = [str(k) for k in range(30)]
    knows_clip = patch_agreement(-np.broadcast_to(clip, (30, 20)), severity, names, 0.6, resamples=20)
    assert knows_clip["spearman"].value > 0.9 and np.isnan(knows_clip["spearman_within"].value)
    knows_patch = patch_agreement(-patch, severity, names, 0.6, resamples=20)
    assert knows_patch["spearman_within"].value == pytest.approx(1)
    assert knows_patch["auc_within"].value == pytest.approx(1)
    assert knows_patch["spearman"].value < 0.4
    hole = severity.copy()
    hole[:, :10] = np.nan
    found = patch_agreement(-patch[:, 10:], severity[:, 10:], names, 0.6, resamples=20)
    assert patch_agreement(-patch, hole, names, 0.6, resamples=20) == found


def test_ceiling_of_raters():
    rng = np.random.default_rng(7)
    truth = rng.normal(size=400)
    ratings = truth[:, None] + rng.normal(size=(400, 3))
    names = [str(k) for k in range(400)]
    # one rater against the mean of two others: correlation 1 / sqrt(2 * 1.5), in ranks a little less
    expected = 6 / np.pi * np.arcsin(1 / np.sqrt(3) / 2)
    ceiling = rater_ceiling(ratings, names, resamples=100)
    assert ceiling.low < expected < ceiling.high and ceiling.value == pytest.approx(expected, abs=0.06)
    ratings[::2, 0] = np.nan
    assert rater_ceiling(ratings, names, resamples=20).value == pytest.approx(expected, abs=0.08)


def test_ridge_never_uses_the_fold_it_predicts():
    rng = np.random.default_rng(8)
    features = rng.normal(size=(60, 5))
    labels = features @ rng.normal(size=(5, 2)) + 0.01 * rng.normal(size=(60, 2))
    folds = np.arange(60) % 6
    found = predict_ridge(features, labels, folds, penalties=(1e-6, 1e6))
    np.testing.assert_allclose(found, labels, atol=0.1)
    poisoned = labels.copy()
    poisoned[folds == 2] = 1e3
    again = predict_ridge(features, poisoned, folds, penalties=(1e-6,))
    np.testing.assert_allclose(again[folds == 2], found[folds == 2], atol=0.1)
    # noise is not learned: the strong penalty wins and the mean is predicted
    with pytest.raises(UserError, match="expected labelled clips of at least three prompts"):
        predict_ridge(features, labels, np.minimum(folds, 1))
    noise = predict_ridge(rng.normal(size=(60, 40)), labels, folds, penalties=(1e-6, 1e9))
    assert np.abs(noise - labels.mean(axis=0)).max() < 0.8
