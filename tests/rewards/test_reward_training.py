"""Training against planted damage, an independent truth; the stages reward and score; continuation after a kill."""

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet
import pytest
import torch
from moving_shapes import GRID, Clips, PlantedTeacher, damage, draw_clip, make_clips, write_candidates
from recipe import demo_config
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score
from tiny import kill_when, output_hashes

from halo_fast.data.clips import read_clip
from halo_fast.demo import world
from halo_fast.demo.meters import DefectMeter
from halo_fast.errors import UserError
from halo_fast.pipeline.clips import run_clips
from halo_fast.pipeline.config import Config
from halo_fast.pipeline.run import Run
from halo_fast.pipeline.stages import reward as reward_stage
from halo_fast.pipeline.stages.annotate import annotate
from halo_fast.pipeline.stages.generate import generate
from halo_fast.pipeline.stages.reward import read_labels, train_reward
from halo_fast.pipeline.stages.score import score
from halo_fast.rewards import LabelledClips, RewardConfig, RewardModel, RewardModelConfig, train_reward_model, training
from halo_fast.rewards.examples import add_examples
from halo_fast.rewards.shares import Share
from halo_fast.rewards.terms import Batch, frozen_copy_loss
from halo_fast.teachers import VIDEO_DIMENSIONS

HELD_OUT = make_clips(64, seed=2)


def labelled(clips: Clips) -> LabelledClips:
    severity = torch.from_numpy(clips.severity).float()
    video_scores = torch.stack(
        [
            5 - 4 * severity.mean(dim=(1, 2, 3)),
            1 + 4 * torch.from_numpy(clips.aligned).float(),
            1 + 4 * torch.from_numpy(clips.moving).float(),
        ],
        dim=1,
    )
    return LabelledClips(
        torch.from_numpy(clips.videos), clips.prompts, video_scores, (5 - 4 * severity)[:, None], VIDEO_DIMENSIONS
    )


@pytest.fixture(scope="module")
def trained() -> tuple[RewardModel, list[dict]]:
    config = RewardConfig(video_steps=40, patch_steps=160, batch_size=8, learning_rate=5e-3)
    return train_reward_model(
        RewardModelConfig(VIDEO_DIMENSIONS, width=16, pretrained=False),
        labelled(make_clips(240, seed=1)),
        config,
        seed=0,
    )


@pytest.fixture(scope="module")
def rewards(trained):
    return trained[0](torch.from_numpy(HELD_OUT.videos), HELD_OUT.prompts, GRID)


@pytest.mark.slow
def test_patch_scores_follow_planted_damage(rewards):
    quality = rewards.patches[:, 0].numpy().ravel()
    assert spearmanr(quality, -HELD_OUT.severity.ravel()).statistic > 0.8
    assert roc_auc_score(HELD_OUT.severity.ravel() > 0.25, -quality) > 0.95


@pytest.mark.slow
def test_video_quality_follows_what_the_clips_show(rewards):
    assert spearmanr(rewards.video[:, 0], -HELD_OUT.severity.mean(axis=(1, 2, 3))).statistic > 0.6


@pytest.mark.slow
def test_video_motion_follows_what_the_clips_show(rewards):
    motion = rewards.video[:, 2].numpy()
    assert roc_auc_score(HELD_OUT.moving, motion) > 0.9


@pytest.mark.slow
def test_the_patch_phase_starts_from_the_video_phase_and_keeps_its_loss(trained):
    _, history = trained
    assert [row["phase"] for row in history] == ["video"] * 40 + ["patch"] * 160
    assert "patch_loss" not in history[39] and "patch_loss" in history[40]
    video = [row["video_loss"] for row in history]
    # the weights are the same ones: the loss does not jump back to where it began
    assert np.mean(video[40:50]) < np.mean(video[:3])
    assert np.mean(video[-20:]) < np.mean(video[30:40])


@pytest.mark.slow
def test_damage_lowers_the_damaged_patch_most(trained):
    rng, hits = np.random.default_rng(5), []
    for n in range(24):
        clip = draw_clip(rng, "disc", "green", "left", 1.2)
        place = tuple(int(rng.integers(side)) for side in GRID)
        pair = torch.from_numpy(np.stack([clip, damage(clip, place, n % 4, 0.8)]))
        fall = -trained[0](pair, ["a green disc moves left"] * 2, GRID).patches[:, 0].diff(dim=0)[0]
        hits.append(np.unravel_index(int(fall.argmax()), GRID) == place)
    assert np.mean(hits) > 0.9


class _Displacement:
    """A backbone whose dynamic_degree is how many pixels the light travels."""

    def encode(self, videos, frozen, word_evidence=None):
        light = videos.float().mean(dim=(2, 4))
        centre = (light * torch.arange(videos.shape[3])).sum(-1) / light.sum(-1)
        return centre[:, -1] - centre[:, 0]

    def logits(self, features, prompts, grid):
        return features[:, None], torch.zeros(1)


def test_clips_beat_frozen_copies_of_themselves_in_training():
    """The logistic loss of 4 pixels of travel; clips that stand still, or have no score or score 1, do not count."""
    videos = torch.zeros(5, 5, 8, 8, 3, dtype=torch.uint8)
    for n, travel in enumerate((0, 1, 1, 1, 1)):
        for frame in range(5):
            videos[n, frame, :, frame * travel + 1] = 200
    scores = torch.tensor([5, 5, math.nan, 3, 1.0])[:, None]
    clips = LabelledClips(videos, ["a light"] * 5, scores, torch.full((5, 1, 1, 1, 1), 5.0), ("dynamic_degree",))
    model = SimpleNamespace(backbone=_Displacement())
    own = model.backbone.encode(videos, None)
    assert own.tolist() == [0, 4, 4, 4, 4]
    loss = frozen_copy_loss(model, Batch(clips, clips, Share.of(5)), own, 0)
    assert loss.item() == pytest.approx(math.log1p(math.exp(-4)), rel=1e-5)


@pytest.mark.parametrize("by_frame", [True, False])
def test_features_of_copies_are_their_own_even_if_they_look_at_several_frames(by_frame):
    """A light that moves: a copy of it that stands still has no changes, whatever the clip's own were."""

    class Changes(_Displacement):
        features_by_frame = by_frame
        given = None

        def frozen_features(self, videos):
            light = videos.float().mean(dim=(2, 3, 4))
            following = light if by_frame else torch.cat([light[:, 1:], light[:, -1:]], dim=1)
            return (following - (0 if by_frame else light))[:, None, :, None, None]

        def encode(self, videos, frozen, word_evidence=None):
            self.given = videos, frozen
            return super().encode(videos, frozen)

    videos = torch.zeros(1, 4, 8, 8, 3, dtype=torch.uint8)
    for frame, bright in enumerate((1, 2, 10, 12)):
        videos[0, frame, :, 1 + frame] = 8 * bright
    scores = torch.tensor([[5.0]])
    clips = LabelledClips(videos, ["it moves left"], scores, torch.full((1, 1, 1, 1, 1), 5.0), ("dynamic_degree",))
    backbone = Changes()
    batch = Batch(clips, clips, Share.of(1), backbone.frozen_features(videos))
    frozen_copy_loss(SimpleNamespace(backbone=backbone), batch, torch.zeros(1), 0)
    copies, frozen = backbone.given
    assert (copies == copies[:, :1]).all()
    torch.testing.assert_close(frozen, backbone.frozen_features(copies))


@pytest.mark.slow
def test_a_frozen_copy_does_not_win_on_motion(trained):
    rng = np.random.default_rng(6)
    clips = np.stack([draw_clip(rng, "square", "red", "up", 1.2) for _ in range(8)])
    prompts = ["a red square moves up"] * 8
    moving = trained[0](torch.from_numpy(clips), prompts, GRID).video[:, 2]
    frozen = trained[0](torch.from_numpy(np.repeat(clips[:, 4:5], 9, axis=1)), prompts, GRID).video[:, 2]
    assert (moving > frozen).float().mean() > 0.8


@pytest.mark.parametrize(
    ("setting", "axes"),
    [({}, [-1]), ({"mirror": "both"}, [-1, -2]), ({"mirror": "horizontal"}, [-1]), ({"mirror": "none"}, [])],
)
def test_clips_are_mirrored_only_where_that_keeps_labels_true(monkeypatch, tmp_path, setting, axes):
    """Things fall, so clips are turned upside down only where someone asks for it."""
    run = small_run(tmp_path)
    run.config.reward = replace(run.config.reward, **setting, video_steps=0, patch_steps=1)
    inputs, draw = [], training.draw_batch
    monkeypatch.setattr(training, "draw_batch", lambda *given: inputs.append(given[0]) or draw(*given))
    train_reward(run.config, run)
    assert [mirror.axis for mirror in inputs[0].mirrors] == axes
    assert demo_config().reward.mirror == "both"


def small_run(folder: Path) -> Run:
    reward = RewardConfig(video_steps=4, patch_steps=8, batch_size=3, checkpointing_steps=3, pretrained=False)
    run = Run(Config(output_dir=str(folder), grid=GRID, reward=reward))
    clips = make_clips(6, seed=4)
    write_candidates(run, clips)
    annotate(run.config, run, PlantedTeacher(clips))
    return run


def test_examples_join_the_demos_labels(monkeypatch, tmp_path):
    """Judged by the demo's defect meter; neither their prompts nor their handwriting are held out."""
    config = demo_config(
        output_dir=str(tmp_path),
        generate={"num_prompts": 2, "num_inference_steps": 1},
        reward={"num_examples": 100, "video_steps": 0, "patch_steps": 1, "pretrained": False},
    )
    run = Run(config)
    for stage in (generate, annotate):
        stage(config, run)
    trained, splits, handwriting = [], [], world.handwriting

    def train(kind, data, *rest):
        trained.append(data)
        return train_reward_model(kind, data, *rest)

    monkeypatch.setattr(reward_stage, "train_reward_model", train)
    monkeypatch.setattr(world, "handwriting", lambda split: splits.append(split) or handwriting(split))
    train_reward(config, run)
    (data,) = trained
    assert set(splits) == {"train"}
    _, own = read_labels([run.path / "annotate" / "labels.parquet"], run_clips(run))
    assert len(data) == len(data.videos) == len(data.video_scores) == len(data.patch_scores) == 4 + 100
    for name in ("videos", "video_scores", "patch_scores"):
        assert torch.equal(getattr(data, name)[:4], getattr(own, name))
    videos, prompts, quality = data.videos[4:], data.prompts[4:], data.patch_scores[4:, 0]
    assert not {world.caption(attributes) for attributes in world.combinations("heldout")} & set(prompts)
    severity, _ = DefectMeter.load()(videos, prompts)
    assert spearmanr(severity.flatten(), -quality.flatten()).statistic > 0.9
    assert quality.min() < 1.5 and quality.max() == 5
    scores = dict(zip(data.video_dimensions, data.video_scores[4:].T, strict=True))
    torch.testing.assert_close(scores.pop("visual_quality"), quality.flatten(1).mean(1))
    assert len(scores) == 2 and all(values.isnan().all() for values in scores.values())


def bright_examples(count, seed):
    """Examples of one's own: the brighter, the better."""
    level = torch.randint(256, (count, 1, 1, 1, 1), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    quality = (1 + 4 * level.float() / 255).view(-1, 1, 1, 1).expand(-1, *GRID)
    return level.expand(-1, 9, 32, 32, 3), ["a light"] * count, quality


def test_examples_of_ones_own_have_a_dotted_name(tmp_path):
    clips = labelled(make_clips(6, seed=4))
    data = add_examples(clips, f"{__name__}:bright_examples", 5, 3, tmp_path)
    assert data.prompts == [*clips.prompts, *["a light"] * 5]
    light = 1 + 4 * data.videos[6:].float().mean(dim=(1, 2, 3, 4)) / 255
    torch.testing.assert_close(data.patch_scores[6:].mean(dim=(1, 2, 3, 4)), light)
    torch.testing.assert_close(data.video_scores[6:, 0], light)
    assert data.video_scores[6:, 1:].isnan().all()


def test_examples_that_do_not_fit_are_named():
    clips = labelled(make_clips(6, seed=4))
    with pytest.raises(UserError, match=r"reward\.examples: expected one of 'demo', .* got 'mine'"):
        add_examples(clips, "mine", 5, 0)
    coarse = replace(clips, patch_scores=clips.patch_scores[..., :2])
    with pytest.raises(ValueError, match=r"gives patch scores \[1, 3, 4, 4\], the run has \[1, 3, 4, 2\]"):
        add_examples(coarse, f"{__name__}:bright_examples", 5, 0)


def test_what_nobody_scored_is_not_learned(tmp_path):
    run = small_run(tmp_path)
    labels, table = tmp_path / "labels.parquet", pyarrow.parquet.read_table(run.path / "annotate" / "labels.parquet")
    rows = [row | {"video_text_alignment": math.nan} for row in table.to_pylist()]
    rows[0]["video_visual_quality"] = math.nan
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, table.schema), labels)
    config, data = read_labels([labels], run_clips(run))
    assert "text_alignment" not in config.video_dimensions and "visual_quality" in config.video_dimensions
    assert data.video_scores.shape == (6, len(config.video_dimensions))
    for row in rows:
        row["patch_quality"] = [math.nan] * len(row["patch_quality"])
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, table.schema), labels)
    with pytest.raises(UserError, match="no patch has a score"):
        read_labels([labels], run_clips(run))


def test_training_killed_in_either_phase_ends_in_the_same_weights(tmp_path):
    undisturbed = small_run(tmp_path / "undisturbed")
    train_reward(undisturbed.config, undisturbed)
    run = small_run(tmp_path / "killed")
    script = f"""
import sys, time
sys.path.insert(0, {str(Path(__file__).parent)!r})
import math
from pathlib import Path
import torch
torch.set_num_threads({torch.get_num_threads()})
from halo_fast.pipeline.stages.reward import train_reward
from halo_fast.rewards import training
from test_reward_training import small_run
write = training.write_checkpoint
def write_slowly(*arguments):
    write(*arguments)
    time.sleep(1)
training.write_checkpoint = write_slowly
run = small_run(Path({str(tmp_path / "killed")!r}))
train_reward(run.config, run)
"""
    checkpoint, seen = run.path / "reward" / "checkpoint.safetensors", {0}
    for _ in range(2):
        kill_when(script, lambda: checkpoint.exists() and checkpoint.stat().st_mtime_ns not in seen)
        seen.add(checkpoint.stat().st_mtime_ns)
    train_reward(run.config, run)
    assert output_hashes(run.path / "reward") == output_hashes(undisturbed.path / "reward")
    assert set(output_hashes(run.path / "reward")) == {
        "model.safetensors",
        "config.json",
        "history.csv",
        "heldout.json",
    }


def test_score_gives_every_candidate_its_rewards(tmp_path):
    run = small_run(tmp_path)
    train_reward(run.config, run)
    score(run.config, run)
    rows = pyarrow.parquet.read_table(run.path / "score" / "scores.parquet").to_pylist()
    clips = pyarrow.parquet.read_table(run.path / "generate" / "clips.parquet").to_pylist()
    assert [row["clip_id"] for row in rows] == [clip["clip_id"] for clip in clips]
    model = RewardModel.load(run.path / "reward")
    assert model.config.video_dimensions == VIDEO_DIMENSIONS
    assert (model.config.spatial_factor, model.config.temporal_factor, model.config.causal) == (8, 4, True)
    for row, clip in zip(rows, clips, strict=True):
        video = read_clip(run.path / "generate" / clip["video"])[None]
        rewards = model(video, [clip["prompt"]], GRID)
        np.testing.assert_allclose(row["patch_quality"], rewards.patches.flatten(), rtol=1e-4)
        scores = [row[f"video_{name}"] for name in VIDEO_DIMENSIONS]
        np.testing.assert_allclose(scores, rewards.video[0], rtol=1e-4)


def test_missing_stages_and_clips_are_named(tmp_path):
    run = small_run(tmp_path)
    with pytest.raises(UserError, match="run `halo reward` with this config first"):
        score(run.config, run)
    (run.path / "generate" / "videos" / "p0001_s1.mp4").unlink()
    with pytest.raises(UserError, match=r"p0001_s1\.mp4"):
        train_reward(run.config, run)
