"""What `halo reward eval` is made of: folds that never share a prompt, preferences, marks, windows, baselines."""

import weakref
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from halo_fast.agreement import people
from halo_fast.agreement.baselines import folds_by_name, group_means
from halo_fast.agreement.people import marks_table, preferences_table, rater_mean
from halo_fast.data.clips import write_clip
from halo_fast.data.importers import Preference, Ratings
from halo_fast.demo.planted import cut_window, shrink_clip
from halo_fast.errors import UserError
from halo_fast.rewards import RewardModelConfig, Rewards


def test_agreement_folds_keep_a_prompt_together():
    prompts = [f"p{k % 13}" for k in range(60)]
    folds = folds_by_name(prompts, 5, seed=0)
    assert all(len(set(folds[[name == other for other in prompts]])) == 1 for name in set(prompts))
    sizes = Counter({name: int(folds[prompts.index(name)]) for name in prompts}.values())
    assert sorted(sizes.values()) == [2, 2, 3, 3, 3]
    assert (folds != folds_by_name(prompts, 5, seed=1)).any()


class Brightness(torch.nn.Module):
    config = RewardModelConfig(("visual_quality",))

    def forward(self, videos, prompts, grid):
        return Rewards(videos.float().mean(dim=(1, 2, 3, 4))[:, None], torch.zeros(len(videos), 1, *grid))


def test_agreement_on_preferences(tmp_path):
    levels = [10, 60, 110, 112]
    files = [tmp_path / f"{level}.mp4" for level in levels]
    for file, level in zip(files, levels, strict=True):
        write_clip(file, torch.full((3, 17, 18, 3), level, dtype=torch.uint8)[:, :16, :18], 8)
    chosen = [(3, 0, 1.0), (0, 2, 0.0), (2, 3, 0.5), (1, 0, 1.0), (1, 2, 1.0)]
    pairs = [
        Preference(k, f"p{k}", files[first], files[second], {"visual_quality": value})
        for k, (first, second, value) in enumerate(chosen, 1)
    ]
    table = preferences_table(pairs, Brightness(), resamples=20)
    # the brighter clip is judged better: right in three of four, and the tie is the closest pair
    assert table["visual_quality: model"]["without_ties"].value == pytest.approx(3 / 4)
    assert table["visual_quality: model"]["pair_accuracy"].value == pytest.approx(4 / 5)
    assert np.isfinite(table["visual_quality: less motion"]["pair_accuracy"].value)
    low, high = table["visual_quality: model"]["pair_accuracy"][1:]
    assert 0 <= low < 0.8 < high <= 1
    # a dimension that the model lacks is judged by another, which the row names
    named = [Preference(p.row, p.prompt, p.first, p.second, {"motion_quality": 1.0, "overall": 0.0}) for p in pairs]
    rows = preferences_table(named, Brightness(), 5)
    assert {"motion_quality: mean of scores", "overall: mean of scores"} < set(rows)
    model = Brightness()
    model.config = RewardModelConfig(("visual_quality", "dynamic_degree"))
    model.forward = lambda videos, *_: Rewards(torch.tensor([[1.0, videos.float().mean()]]), torch.zeros(1, 1, 1, 1, 1))
    table = preferences_table(named, model, 5)
    assert table["motion_quality: model's dynamic_degree"]["without_ties"].value == pytest.approx(2 / 5)


@pytest.mark.parametrize("shape", [(3, 40, 64), (20, 240, 320), (9, 31, 33)])
def test_agreement_windows_fit_the_demo_whatever_the_clip(shape):
    clip = torch.randint(256, (*shape, 3), dtype=torch.uint8)
    window = cut_window(shrink_clip(clip), np.random.default_rng(0))
    assert window.shape == (9, 32, 32, 3) and window.dtype == torch.uint8
    still = cut_window(shrink_clip(torch.full((*shape, 3), 77, dtype=torch.uint8)), np.random.default_rng(0))
    assert (still == 77).all()


def test_agreement_means_of_raters_and_generators():
    ratings = np.array([[1, 3], [np.nan, 4], [np.nan, np.nan]])
    np.testing.assert_array_equal(rater_mean(ratings), [2, 4, np.nan])
    labels = np.array([[1.0], [3.0], [np.nan], [5.0]])
    np.testing.assert_array_equal(group_means(labels, ["a", "a", "a", "b"]), [[2], [2], [2], [5]])


def test_agreement_marks_of_smooth_maps(monkeypatch):
    rng = np.random.default_rng(0)
    pictures = [torch.from_numpy(rng.integers(256, size=(1, 28, 28, 3), dtype=np.uint8)) for _ in range(8)]
    ramp = np.tile(np.linspace(0.01, 0.99, 28, dtype=np.float32), (28, 1))  # nowhere 0; its right half is 0.5 and more
    right = np.tile(np.arange(14) >= 7, 14)
    found = 5 - 4 * np.tile(right.astype(float), (8, 1)).reshape(8, 1, 1, 14, 14)
    monkeypatch.setattr(people, "cross_validate", lambda *_: (None, found))
    table = marks_table(Ratings("RichHF", pictures, [""] * 8, marks=[ramp] * 8))
    assert table["frames model"]["auc"].value == 1
    pictures[3] = pictures[3][:, :20]
    with pytest.raises(UserError, match=r"RichHF: expected pictures of one size, got \(20, 28\), \(28, 28\)"):
        marks_table(Ratings("RichHF", pictures, [""] * 8, marks=[ramp] * 8))


def test_agreement_page_says_what_the_commands_print():
    text = (Path(__file__).parents[2] / "docs" / "agreement.md").read_text()
    from halo_fast.agreement import probes

    for name in ("prompt swap", "static copy", "planted damage", "frame order", "brightness"):
        bound = getattr(probes, name.replace(" ", "_")).__doc__
        row = next(line for line in text.splitlines() if line.startswith(f"| {name}"))
        numbers = {word.strip("|: .;") for word in row.split() if word[0].isdigit() and "." in word}
        assert numbers and all(number in bound for number in numbers), (row, bound)


class Lengths(Brightness):
    """Refuses what latents of 4k+1 frames and 8 x 8 pixels cannot hold, and notes what it gets."""

    config = RewardModelConfig(("visual_quality",), fps=4)

    def forward(self, videos, prompts, grid):
        self.config.patches(grid, tuple(videos.shape[1:4]))
        self.seen = [*getattr(self, "seen", []), tuple(videos.shape[1:4])]
        return super().forward(videos, prompts, grid)


def test_agreement_on_videos_of_any_length_rate_and_size(tmp_path, caplog):
    sizes = [(15, 60, 52, 8), (32, 48, 40, 24), (1, 17, 19, 4), (10, 16, 16, 4)]
    for index, (frames, height, width, fps) in enumerate(sizes):
        video = torch.full((frames, height, width, 3), 20 * index, dtype=torch.uint8)
        # lossless H.264 in yuv444p has odd sides too
        write_clip(tmp_path / f"{index}.mp4", video, fps)
    pairs = [
        Preference(k, f"p{k}", tmp_path / f"{first}.mp4", tmp_path / f"{second}.mp4", {"visual_quality": 1.0})
        for k, (first, second) in enumerate([(1, 0), (3, 2)], 1)
    ]
    model = Lengths()
    with caplog.at_level("INFO"):
        table = preferences_table(pairs, model, 5)
    # sampled at the model's four frames a second, then cut to 4k+1
    assert model.seen == [(5, 48, 40), (5, 56, 48), (9, 16, 16), (1, 16, 16)]
    assert "4 of 4 clips were cut" in caplog.text
    assert table["visual_quality: model"]["without_ties"].value == 1


def test_agreement_keeps_one_video_in_memory(tmp_path, monkeypatch):
    loaded, load = [], people.load_frames

    def watched(*arguments):
        assert not any(clip() is not None for clip in loaded), "an earlier clip is still in memory"
        frames = load(*arguments)
        loaded.append(weakref.ref(frames))
        return frames

    monkeypatch.setattr(people, "load_frames", watched)
    monkeypatch.setattr(people, "_predict_ratings", lambda videos, prompts, labels, *_: labels)
    for index in range(5):
        video = torch.full((12, 32, 48, 3), 40 * index, dtype=torch.uint8)
        write_clip(tmp_path / f"{index}.mp4", video, 24)
    files = [tmp_path / f"{index}.mp4" for index in range(5)]
    scores = {"visual_quality": np.arange(1.0, 6)[:, None]}
    tables = people.ratings_tables(Ratings("table", files, [f"p{k}" for k in range(5)], scores), 0, 5)
    assert len(loaded) == 5 and "compact model" in next(iter(tables.values()))


def test_a_dimension_that_nobody_scored_is_left_out_by_name(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(people, "_predict_ratings", lambda videos, prompts, labels, *_: labels)
    clips = [torch.full((12, 32, 48, 3), 40 * index, dtype=torch.uint8) for index in range(5)]
    nobody, some = np.full((5, 2), np.nan), np.array([[1.0, np.nan], [np.nan, 2], [np.nan, np.nan], [4, 5], [5, 5]])
    scores = {"visual_quality": some, "text_alignment": nobody, "dynamic_degree": nobody}
    prompts = [f"p{k}" for k in range(5)]
    tables = people.ratings_tables(Ratings("table", clips, prompts, scores), 0, 5)
    assert list(tables) == ["table: visual_quality, folds by prompt"]
    assert "table: nobody scored dynamic_degree, text_alignment, which is left out" in caplog.text
    assert people.ratings_tables(Ratings("table", clips, prompts, {"text_alignment": nobody}), 0, 5) == {}
