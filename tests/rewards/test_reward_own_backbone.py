"""A reward backbone from outside the package, by its dotted name."""

import csv

import torch
from moving_shapes import GRID, PlantedTeacher, make_clips, write_candidates
from torch import nn

from halo_fast.pipeline.cli import main
from halo_fast.pipeline.config import Config
from halo_fast.pipeline.run import Run
from halo_fast.pipeline.stages.annotate import annotate
from halo_fast.rewards import RewardModel, RewardModelConfig


class PatchPixels(nn.Module):
    """Mean and root mean square of each patch's colours, and a linear layer on them."""

    negatives = 1

    def __init__(self, config: RewardModelConfig) -> None:
        super().__init__()
        self.config = config
        self.patch = nn.Linear(6, len(config.patch_dimensions))
        self.video = nn.Linear(6, len(config.video_dimensions))

    def frozen_features(self, videos):
        return None

    def fit_closed_form(self, frozen, prompts, weight):
        return None

    def encode(self, videos, frozen, word_evidence=None):
        return videos.permute(0, 4, 1, 2, 3).float() / 255

    def logits(self, features, prompts, grid):
        pool = self.config.patches(grid, tuple(features.shape[2:])).pool
        statistics = torch.cat((pool(features), (pool(features.square()) + 1e-4).sqrt()), dim=1)
        return self.video(statistics.mean(dim=(2, 3, 4))), self.patch(statistics.movedim(1, -1)).movedim(-1, 1)

    def video_logits_for(self, features, prompts, others):
        return self.logits(features, prompts, (1, 1, 1))[0][:, None].expand(-1, others.shape[1], -1)


def test_a_backbone_of_ones_own_trains_through_halo_reward(tmp_path):
    run = Run(Config(output_dir=str(tmp_path), grid=GRID))
    clips = make_clips(24, seed=4)
    write_candidates(run, clips)
    annotate(run.config, run, PlantedTeacher(clips))
    settings = {"backbone": f"{__name__}:PatchPixels", "video_steps": 20, "patch_steps": 60, "learning_rate": 0.05}
    arguments = ["reward", "--output_dir", str(tmp_path), "--grid", "[3,4,4]"]
    for name, value in settings.items():
        arguments += [f"--reward.{name}", str(value)]
    assert main(arguments) == 0
    model = RewardModel.load(run.path / "reward")
    assert isinstance(model.backbone, PatchPixels)
    with open(run.path / "reward" / "history.csv") as file:
        losses = [float(row["patch_loss"]) for row in csv.DictReader(file) if row["patch_loss"]]
    assert losses[-1] < 0.95 * losses[0]
    rewards = model(torch.from_numpy(clips.videos), clips.prompts, GRID)
    assert rewards.patches.shape == (24, 1, *GRID) and rewards.video.isfinite().all()


def test_a_backbone_that_does_not_exist_is_named(tmp_path, capsys):
    run = Run(Config(output_dir=str(tmp_path), grid=GRID))
    clips = make_clips(6, seed=4)
    write_candidates(run, clips)
    annotate(run.config, run, PlantedTeacher(clips))
    arguments = ["reward", "--output_dir", str(tmp_path), "--grid", "[3,4,4]"]
    assert main([*arguments, "--reward.backbone", f"{__name__}:Absent"]) == 2
    assert "reward.backbone: expected one of 'compact', 'frames'" in capsys.readouterr().err
