"""Patch grids compared with brute-force maps from pixels to latent positions."""

import numpy as np
import pytest
import torch

from halo_fast import PatchGrid, guard_band
from halo_fast.patches import LatentFactors

GRIDS = {
    "demo": PatchGrid((3, 4, 4), 9, 32, 32),
    "cogvideox, ragged": PatchGrid((4, 3, 7), 49, 480, 720),
    "hunyuanvideo": PatchGrid((5, 2, 3), 17, 64, 96),
    "ltx": PatchGrid((2, 3, 3), 25, 128, 160, spatial_factor=32, temporal_factor=8),
    "not causal": PatchGrid((2, 2, 2), 16, 32, 48, causal=False),
    "image autoencoder": PatchGrid((4, 2, 2), 5, 24, 40, temporal_factor=1, causal=False),
    "one position per patch": PatchGrid((3, 3, 5), 9, 24, 40),
    "cogvideox 1.5": PatchGrid((7, 3, 3), 81, 48, 72, padding=1),
    "not causal, padded": PatchGrid((2, 2, 2), 16, 32, 48, causal=False, padding=2),
}
every = pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)


def latent_frame(grid, frame):
    """Where a frame goes, by the autoencoder's definition."""
    return grid.padding + (frame + grid.causal * (grid.temporal_factor - 1)) // grid.temporal_factor


def patch_index(place, length, count):
    """The patch of a latent position, by its definition floor(k L/n) <= i < floor((k+1) L/n)."""
    return next(k for k in range(count) if k * length // count <= place < (k + 1) * length // count)


@every
def test_every_pixel_belongs_to_the_patch_of_its_latent_position(grid):
    latent = grid.latent_shape
    owners = [
        [patch_index(latent_frame(grid, frame), latent[0], grid.grid[0]) for frame in range(grid.num_frames)],
        [patch_index(row // grid.spatial_factor, latent[1], grid.grid[1]) for row in range(grid.height)],
        [patch_index(column // grid.spatial_factor, latent[2], grid.grid[2]) for column in range(grid.width)],
    ]
    for index in np.ndindex(*grid.grid):
        for axis, span in enumerate(grid.pixel_box(index)):
            assert list(range(span.start, span.stop)) == [i for i, k in enumerate(owners[axis]) if k == index[axis]]
    rng = np.random.default_rng(0)
    for _ in range(50):
        place = [rng.integers(len(owner)) for owner in owners]
        assert grid.patch_of(*place) == tuple(owner[i] for owner, i in zip(owners, place, strict=True))


@every
def test_latent_and_pixel_boxes_cover_everything_once(grid):
    latent = np.zeros(grid.latent_shape, int)
    pixels = np.zeros((grid.num_frames, grid.height, grid.width), int)
    for index in np.ndindex(*grid.grid):
        latent[grid.latent_box(index)] += 1
        pixels[grid.pixel_box(index)] += 1
    assert (latent == 1).all() and (pixels == 1).all()


def test_padding_moves_the_edges_and_may_not_be_a_patch_of_its_own():
    assert GRIDS["cogvideox 1.5"].latent_shape == (22, 6, 9)
    assert GRIDS["cogvideox 1.5"].pixel_edges(0) == [0, 5, 17, 29, 41, 53, 65, 81]
    with pytest.raises(ValueError, match="grid must have fewer patches along latent frames; got 4, of which the first"):
        PatchGrid((4, 1, 1), 9, 8, 8, padding=1)


@pytest.mark.parametrize(
    ("clip", "latent", "expected"),
    [
        ((81, 480), (21, 60), (8, 4, True, 0)),
        ((9, 32), (3, 4), (8, 4, True, 0)),  # 9 frames are three threes too
        ((16, 64), (4, 8), (8, 4, False, 0)),  # and 15 three fives
        ((25, 128), (4, 4), (32, 8, True, 0)),
        ((5, 40), (5, 5), (8, 1, True, 0)),
        ((1, 32), (1, 4), (8, 1, False, 0)),
        ((12, 24), (4, 3), (8, 3, False, 0)),
    ],
)
def test_factors_are_read_off_sizes(clip, latent, expected):
    assert LatentFactors.of_sizes(clip, latent) == expected


def test_the_first_latent_frame_is_one_frame_and_the_others_four():
    grid = PatchGrid((13, 1, 1), 49, 480, 720)
    assert grid.latent_shape == (13, 60, 90)
    assert grid.pixel_edges(0) == [0, *range(1, 50, 4)]


@every
def test_pooling_a_heatmap_is_the_mean_over_the_pixel_box(grid):
    generator = torch.Generator().manual_seed(0)
    heatmap = torch.rand(2, grid.num_frames, grid.height, grid.width, generator=generator, dtype=torch.float64)
    for pooled in (grid.pool(heatmap), grid.pool_complete(heatmap)):
        for index in np.ndindex(*grid.grid):
            torch.testing.assert_close(pooled[:, *index], heatmap[:, *grid.pixel_box(index)].mean((1, 2, 3)))


@every
def test_spread_and_pool_are_inverse(grid):
    values = torch.rand(2, *grid.grid, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    pixels = grid.spread(values)
    assert pixels.shape == (2, grid.num_frames, grid.height, grid.width)
    torch.testing.assert_close(grid.pool(pixels), values)


@pytest.mark.parametrize("name", ["demo", "not causal", "image autoencoder", "one position per patch"])
def test_a_heatmap_of_another_resolution_counts_by_overlapping_area(name):
    grid = GRIDS[name]
    cells = (2, 5, 3)
    heatmap = torch.rand(cells, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    # brute force: refine until every border of cells and of patches lies between two samples
    shape = [side * count for side, count in zip((grid.num_frames, grid.height, grid.width), cells, strict=True)]
    fine = heatmap
    for axis, (count, length) in enumerate(zip(cells, shape, strict=True)):
        fine = fine.repeat_interleave(length // count, axis)
    for index in np.ndindex(*grid.grid):
        box = tuple(slice(s.start * n, s.stop * n) for s, n in zip(grid.pixel_box(index), cells, strict=True))
        torch.testing.assert_close(grid.pool(heatmap)[index], fine[box].mean())
        torch.testing.assert_close(grid.pool_complete(heatmap)[index], fine[box].mean())


def test_unlabelled_pixels_are_left_out():
    grid = GRIDS["demo"]
    heatmap = torch.full((9, 32, 32), 2.0)
    heatmap[0, :8, :4] = float("nan")
    heatmap[1:5, 8:16, 8:16] = float("nan")
    pooled = grid.pool(heatmap)
    assert pooled[0, 0, 0] == 2.0 and pooled[1, 1, 1].isnan() and pooled.isnan().sum() == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_heatmaps_of_low_precision_are_pooled_in_float32(dtype):
    grid = GRIDS["cogvideox, ragged"]
    heatmap = torch.rand(49, 240, 360, generator=torch.Generator().manual_seed(0)).to(dtype)
    pooled = grid.pool(heatmap)
    assert pooled.dtype == dtype
    assert torch.equal(grid.pool_complete(heatmap), pooled)
    # one rounding of the result, not of the borders and sums on the way there
    assert torch.equal(pooled, grid.pool(heatmap.float()).to(dtype))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(pooled, grid.pool(heatmap))
    for index in ((0, 0, 0), (3, 2, 6)):
        frames, rows, columns = grid.pixel_box(index)
        box = heatmap.double().repeat_interleave(2, 1).repeat_interleave(2, 2)[frames, rows, columns]
        assert pooled[index].item() == pytest.approx(box.mean().item(), rel=torch.finfo(dtype).eps)


def test_an_unlabelled_patch_spoils_no_gradient():
    grid = GRIDS["demo"]
    heatmap = torch.rand(9, 32, 32, dtype=torch.float64)
    heatmap[1:5, 8:16, 8:16] = float("nan")
    heatmap.requires_grad_()
    grid.pool(heatmap).nansum().backward()
    expected = torch.full((9, 32, 32), 1 / (4 * 64), dtype=torch.float64)
    expected[0] = 1 / 64  # the first latent frame is one frame
    expected[1:5, 8:16, 8:16] = 0.0
    torch.testing.assert_close(heatmap.grad, expected)


def test_the_guard_band_removes_labels_beside_a_border():
    labels = torch.zeros(1, 1, 8)
    labels[..., 4:] = 1.0
    assert guard_band(labels).isnan().flatten().tolist() == [False] * 3 + [True] * 2 + [False] * 3
    assert guard_band(labels, width=2).isnan().sum() == 4
    assert torch.equal(guard_band(labels, width=0), labels)
    assert not guard_band(labels, tolerance=1.0).isnan().any()
    labels[..., 3] = float("nan")
    kept = guard_band(labels)
    assert kept.isnan().flatten().tolist() == [False] * 3 + [True] + [False] * 4
    assert guard_band(torch.rand(2, 3, 4, 5, 6)).shape == (2, 3, 4, 5, 6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((3, 4, 4), 10, 32, 32), "num_frames must be a multiple of 4 plus 1; got 10"),
        (((3, 4, 4), 9, 30, 32), "height must be a multiple of 8; got 30"),
        (((3, 4, 4), 9, 32, 36), "width must be a multiple of 8; got 36"),
        (((4, 4, 4), 9, 32, 32), "grid must have 1 to 3 patches along 3 latent frames; got 4"),
        (((3, 0, 4), 9, 32, 32), "grid must have 1 to 4 patches along 4 latent rows; got 0"),
        (((3, 4), 9, 32, 32), "grid must be"),
        ((4, 9, 32, 32), "grid must be"),
        (((3, 4.0, 4), 9, 32, 32), "grid must be three integers"),
        (((3, 4, 4), 9.0, 32, 32), "num_frames must be an integer; got 9.0"),
        (((3, 4, 4), 0, 32, 32), "num_frames must be at least 1"),
    ],
)
def test_grids_that_do_not_fit_say_so(arguments, message):
    with pytest.raises(ValueError, match=message):
        PatchGrid(*arguments)


def test_wrong_maps_and_places_say_so():
    grid = GRIDS["demo"]
    with pytest.raises(ValueError, match="outside the video"):
        grid.patch_of(9, 0, 0)
    with pytest.raises(ValueError, match="patch must lie"):
        grid.pixel_box((3, 0, 0))
    with pytest.raises(ValueError, match="heatmap must be float"):
        grid.pool(torch.zeros(9, 32, 32, dtype=torch.long))
    with pytest.raises(ValueError, match="heatmap must be float.*no empty side"):
        grid.pool(torch.zeros(0, 32, 32))
    with pytest.raises(ValueError, match=r"^maps must be float \[..., T, Y, X\] with no empty side; got torch.int64"):
        grid.pool_complete(torch.zeros(9, 32, 32, dtype=torch.long))
    with pytest.raises(ValueError, match="labels must be float"):
        guard_band(torch.zeros(1, 1, 1, dtype=torch.long))
    with pytest.raises(ValueError, match="values must end"):
        grid.spread(torch.zeros(3, 4, 5))
    with pytest.raises(ValueError, match="width"):
        guard_band(torch.zeros(1, 1, 1), width=-1)
