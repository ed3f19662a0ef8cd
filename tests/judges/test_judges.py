"""Dimensions without weights, gains against the training reward, and how a judge is found and checked."""

import math

import numpy as np
import pytest
import scipy.stats
import torch

from halo_fast.data.clips import write_clip
from halo_fast.errors import UserError
from halo_fast.judges import JudgeTable, gains, load_judge
from halo_fast.judges.base import hash_video, judge_clips, read_video
from halo_fast.judges.dimensions import consistency, frame_difference, frames, motion_smoothness, temporal_flickering
from halo_fast.judges.hacking import OVERALL, overall
from halo_fast.judges.models import reward_model
from halo_fast.rewards import RewardModel, RewardModelConfig


def video(frames: int = 7, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (frames, 8, 12, 3), generator=generator, dtype=torch.uint8)


def test_temporal_flickering_is_vbenchs():
    # VBench: the mean over pairs of the mean absolute difference, taken from 255 and divided by it
    clip = video().numpy()
    pairs = [np.abs(a.astype(np.float64) - b).mean() for a, b in zip(clip[:-1], clip[1:], strict=True)]
    assert temporal_flickering(video()) == pytest.approx((255 - np.mean(pairs)) / 255, abs=1e-6)
    assert frame_difference(video()) == pytest.approx(np.mean(pairs) / 255, abs=1e-6)
    frozen = video(1).expand(5, -1, -1, -1)
    assert temporal_flickering(frozen) == 1 and frame_difference(frozen) == 0
    assert math.isnan(temporal_flickering(video(1))) and math.isnan(frame_difference(video(1)))


@pytest.mark.parametrize("length", [3, 4, 7])
def test_motion_smoothness_puts_every_second_frame_in_again(length):
    clip = video(length).numpy().astype(np.float64)
    known = clip[::2]
    between = (known[:-1] + known[1:]) / 2
    errors = [np.abs(a - b).mean() for a, b in zip(between, clip[1::2], strict=False)]
    assert motion_smoothness(video(length)) == pytest.approx(1 - np.mean(errors) / 255, abs=1e-6)


def test_motion_smoothness_of_linear_motion_is_one():
    ramp = (10 * torch.arange(6)).view(6, 1, 1, 1).expand(6, 8, 8, 3).to(torch.uint8)
    assert motion_smoothness(ramp) == 1 and math.isnan(motion_smoothness(ramp[:2]))


def test_consistency_is_vbenchs():
    features = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
    unit = features / features.norm(dim=1, keepdim=True)
    terms = [(max(0.0, float(unit[t] @ unit[t - 1])) + max(0.0, float(unit[t] @ unit[0]))) / 2 for t in range(1, 5)]
    assert consistency(features) == pytest.approx(np.mean(terms), abs=1e-6)
    assert consistency(features[:1].expand(3, -1)) == pytest.approx(1)
    assert math.isnan(consistency(features[:1]))


def test_the_judge_of_frames_reads_files_and_frames_alike(tmp_path):
    clips = [video(5, n) // 32 * 32 for n in range(2)]
    for n, clip in enumerate(clips):
        write_clip(tmp_path / f"{n}.mp4", clip, 8)
    files = [tmp_path / f"{n}.mp4" for n in range(2)]
    from_files = frames(files, ["a", "a"], 8, "cpu")
    from_frames = frames([read_video(file) for file in files], ["a", "a"], 8, "cpu")
    assert from_files == from_frames and not from_files.optimised
    assert list(from_files.scores[0]) == ["temporal_flickering", "motion_smoothness", "frame_difference"]
    assert hash_video(files[0]) != hash_video(files[1]) and hash_video(clips[0]) != hash_video(clips[1])
    with pytest.raises(ValueError, match="expected uint8"):
        frames([clips[0].float()], ["a"], 8, "cpu")


def test_the_judge_of_frames_measures_consistency_on_pretrained_features():
    still = video(1).expand(3, -1, -1, -1)
    cut = torch.cat((still[:2], torch.zeros_like(still[:1])))
    table = frames([still, cut], ["a", "a"], 8, "cpu", features=True)
    assert table.scores[0]["consistency"] == pytest.approx(1, abs=1e-6)
    assert table.scores[1]["consistency"] < 0.999


def rows(values) -> list[dict[str, float]]:
    return [{"x": float(value)} for value in values]


def test_gains_are_paired_and_their_intervals_scipys():
    rng = np.random.default_rng(0)
    base, reward = rng.normal(size=80), rng.normal(0.3, 1, size=80)
    aligned = base + 0.5 * reward - 0.4
    everything, x = gains(rows(base), rows(aligned), reward, 4000, seed=0)
    difference = aligned - base
    assert (everything.dimension, x.dimension) == (OVERALL, "x")
    assert x.gain == pytest.approx(difference.mean()) and x.prompts == 80
    assert x.wins == (difference > 0).mean()
    assert x.hacked == ((reward > 0) & (difference < 0)).mean() > 0
    assert x.agreement == pytest.approx(1)
    expected = scipy.stats.bootstrap((difference,), np.mean, method="percentile", n_resamples=4000, rng=1)
    width = expected.confidence_interval.high - expected.confidence_interval.low
    np.testing.assert_allclose((x.low, x.high), expected.confidence_interval, atol=0.06 * width)
    # together: in deviations of all scores
    deviation = np.concatenate((base, aligned)).std()
    assert everything.gain == pytest.approx(x.gain / deviation)


def test_a_reward_that_rises_while_the_judge_falls_is_seen():
    base, reward = np.linspace(0, 1, 40), np.linspace(0.1, 1, 40)
    falls = gains(rows(base), rows(base - 0.2), reward, 100, 0)[0]
    rises = gains(rows(base), rows(base + 0.2), reward, 100, 0)[0]
    unclear = gains(rows(base), rows(base), reward, 100, 0)[0]
    assert [one.verdict for one in (falls, rises, unclear)] == ["falls", "rises", "unclear"]
    assert (falls.hacked, rises.hacked, unclear.hacked) == (1, 0, 0)
    assert (falls.wins, rises.wins, unclear.wins) == (0, 1, 0.5)
    single = gains(rows([0.0]), rows([1.0]), [1.0], 100, 0)[1]
    assert math.isnan(single.low) and single.verdict == "unclear" and single.gain == 1


def test_missing_scores_are_left_out_of_gains():
    nan = math.nan
    base = [{"x": 1.0, "y": nan}, {"x": nan, "y": nan}, {"x": 3.0, "y": 1.0}]
    aligned = [{"x": 2.0, "y": nan}, {"x": 1.0, "y": nan}, {"x": nan, "y": 2.0}]
    everything, x, y = gains(base, aligned, [1.0, 1.0, 1.0], 50, 0)
    assert (x.prompts, x.gain) == (1, 1) and (y.prompts, y.gain) == (1, 1)
    scores = overall(base, aligned)
    assert np.isnan(scores[0, 1]) and everything.prompts == 2
    nothing = gains([{"x": nan}], [{"x": nan}], [1.0], 50, 0)[1]
    assert nothing.prompts == 0 and math.isnan(nothing.gain)


def test_another_reward_model_is_a_judge(tmp_path):
    torch.manual_seed(0)
    model = RewardModel(RewardModelConfig(("visual_quality", "text_alignment"), width=8, pretrained=False)).eval()
    model.save(tmp_path)
    clips = [torch.randint(256, (9, 16, 16, 3), dtype=torch.uint8) for _ in range(2)]
    table = reward_model(clips, ["a", "b"], 8, "cpu", model=str(tmp_path), grid=(3, 2, 2))
    with torch.no_grad():
        expected = model(torch.stack(clips), ["a", "b"], (3, 2, 2))
    for n, row in enumerate(table.scores):
        assert row["text_alignment"] == pytest.approx(float(expected.video[n, 1]), abs=1e-5)
        assert row["patch_quality"] == pytest.approx(float(expected.patches[n].mean()), abs=1e-5)
    with pytest.raises(UserError, match="expected a reward model's"):
        reward_model(clips, ["a", "b"], 8, "cpu", model=str(tmp_path / "no"), grid=(3, 2, 2))


def own(clips, prompts, fps, device, *, level: float, seed: int = 7, folder=None) -> JudgeTable:
    """A judge of one's own."""
    return JudgeTable(f"own {seed} {folder}", [{"level": np.float32(level)} for _ in clips])


def wrong(clips, prompts, fps, device, *, kind: str) -> JudgeTable:
    """A judge that gives what it must not."""
    given = {
        "few": JudgeTable("w", [{"x": 1.0}]),
        "words": JudgeTable("w", [{"x": "good"}] * len(clips)),
        "infinite": JudgeTable("w", [{"x": math.inf}] * len(clips)),
        "other": JudgeTable("w", [{"x": 1.0}, {"y": 1.0}]),
        "none": JudgeTable("w", [{}] * len(clips)),
        "nothing": None,
    }
    if kind not in given:
        raise ZeroDivisionError("no such kind")
    return given[kind]


NOT_CALLABLE = 3


def only_clips(clips):
    return clips


def test_a_judge_of_ones_own_has_a_dotted_name_and_typed_options():
    name = f"{__name__}:own"
    judge = load_judge(name, {"level": 0.5}, {"seed": 3, "grid": (1, 1, 1)})
    assert judge_clips(name, judge, [1, 2], ["a", "b"], 8, "cpu") == JudgeTable("own 3 None", [{"level": 0.5}] * 2)
    for options, match in (
        ({"level": "high"}, "own.level: expected a number; got 'high'"),
        ({"level": 1.0, "depth": 2}, "own: expected some of level, seed, folder, got 'depth'; remove it"),
        ({}, "own.level: required; set it"),
    ):
        with pytest.raises(UserError, match=match):
            load_judge(name, options, {})
    for attribute, match in (
        ("NOT_CALLABLE", "to be a function, got int"),
        ("only_clips", "it has no prompts"),
        ("absent", "which cannot be imported"),
    ):
        with pytest.raises(UserError, match=match):
            load_judge(f"{__name__}:{attribute}", {}, {})
    with pytest.raises(UserError, match=r"evaluate.judges: expected one of .*'frames', .*'vbench'.*; got 'eye'"):
        load_judge("eye", {}, {})


@pytest.mark.parametrize(
    ("kind", "match"),
    [
        ("few", "expected scores of 2 clips, got 1"),
        ("words", "expected a number or NaN for clip 0, x, got 'good'"),
        ("infinite", "expected a number or NaN for clip 0, x, got inf"),
        ("other", "expected the same dimensions for every clip"),
        ("none", "expected the same dimensions for every clip"),
        ("nothing", "got NoneType without name"),
        ("raises", r"failed \(ZeroDivisionError"),
    ],
)
def test_a_judges_mistakes_are_named(kind, match):
    name = f"{__name__}:wrong"
    with pytest.raises(UserError, match=match):
        judge_clips(name, load_judge(name, {"kind": kind}, {}), [1, 2], ["a", "b"], 8, "cpu")
