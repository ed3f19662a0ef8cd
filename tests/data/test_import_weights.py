"""Weights and scores of patches in tables of preferences, through the import into the pairs that training reads."""

import json
import math

import pytest
import torch

from halo_fast.data.clips import write_clip
from halo_fast.data.fitting import VideoFormat
from halo_fast.data.importers import read_preferences
from halo_fast.data.imports import ImportConfig, import_sources
from halo_fast.errors import UserError
from halo_fast.patches import PatchGrid

GRID = PatchGrid((1, 1, 2), 5, 16, 16)


def table(folder, **columns):
    for number, name in enumerate(("a", "b")):
        video = torch.full((5, 16, 16, 3), 40 + 100 * number, dtype=torch.uint8)
        write_clip(folder / f"{name}.mp4", video, 8)
    row = {"prompt": "a cube", "chosen": "a.mp4", "rejected": "b.mp4"} | columns
    (folder / "pairs.jsonl").write_text(json.dumps(row) + "\n")
    return folder / "pairs.jsonl"


def imported(path, folder):
    config = ImportConfig(sources=[str(path)])
    return import_sources(config, VideoFormat(5, 16, 16, 8), GRID, folder)


def test_weights_and_patches_become_those_of_the_pair(tmp_path):
    path = table(tmp_path, weight=0.5, grid=[1, 1, 2], chosen_patches=[4, 3.5], rejected_patches=[4, math.nan])
    (pair,) = imported(path, tmp_path / "import").pairs
    assert pair.weight == 0.5 and pair.patch_rewards_a == [4, 3.5] and pair.patch_rewards_b[0] == 4
    assert math.isnan(pair.patch_rewards_b[1]) and pair.patch_tie_share == 1  # equal, and unlabelled
    (plain,) = imported(table(tmp_path), tmp_path / "plain").pairs
    assert plain.weight == 1 and all(map(math.isnan, plain.patch_rewards_a))


@pytest.mark.parametrize("size", [(3, 16, 16), (5, 16, 8)])
def test_scores_of_the_patches_of_whole_clips_are_not_those_of_their_parts(tmp_path, size):
    path = table(tmp_path, grid=[1, 1, 2], chosen_patches=[4, 3.5], rejected_patches=[4, 1])
    config, grid = ImportConfig(sources=[str(path)]), PatchGrid((1, 1, 2), *size, spatial_factor=4, temporal_factor=2)
    found = import_sources(config, VideoFormat(*size, 8), grid, tmp_path / "import")
    (pair,) = found.pairs
    assert all(map(math.isnan, pair.patch_rewards_a + pair.patch_rewards_b)) and pair.video_reward_a == 5
    assert found.left_out[0].reason.startswith("its scores of patches, which are of whole clips: the clip c00000 is")


def test_patches_of_another_grid_are_left_out_with_the_cure(tmp_path):
    path = table(tmp_path, grid=[1, 2, 1], chosen_patches=[4, 3], rejected_patches=[4, 1])
    found = imported(path, tmp_path / "import")
    assert not found.pairs and "set grid to that" in found.left_out[0].reason


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"weight": -1}, "row 1: expected a number of at least 0 in 'weight', got -1"),
        ({"weight": "heavy"}, "row 1: expected a number of at least 0 in 'weight', got 'heavy'"),
        ({"chosen_patches": [1, 2]}, "row 1: expected lists of numbers in chosen_patches, rejected_patches, grid"),
        ({"chosen_patches": [1], "rejected_patches": [1], "grid": [1, 1, 2]}, "as many scores as the grid has patches"),
    ],
)
def test_weights_and_patches_that_cannot_be_are_named(tmp_path, columns, message):
    with pytest.raises(UserError, match=message):
        read_preferences(table(tmp_path, **columns))
