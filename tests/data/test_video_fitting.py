"""Clips brought to a format: rates as a player shows them, sizes against Pillow, maps against a sum over pixels."""

import numpy as np
import pytest
import torch
from PIL import Image

from halo_fast.data.clips import Frame, sample_frames, stream_clip, write_clip
from halo_fast.data.fitting import Fit, FitPolicy, VideoFormat, fit_clip, pool_damage
from halo_fast.errors import UserError
from halo_fast.patches import PatchGrid


def film(count: int, fps: float, height: int = 32, width: int = 48) -> list[Frame]:
    """Frames whose brightness is their number."""
    return [
        Frame(k, k / fps, (k + 1) / fps, torch.full((height, width, 3), k % 256, dtype=torch.uint8))
        for k in range(count)
    ]


@pytest.mark.parametrize(("rate", "wanted"), [(24, 8), (8, 24), (30, 16), (29.97, 30), (10, 10), (25, 7)])
def test_sampling_shows_what_a_player_shows(rate, wanted):
    frames = film(20, rate)
    shown = [frame.number for frame in sample_frames(iter(frames), wanted)]
    times = np.arange(round(20 / rate * wanted + 1)) / wanted
    expected = [int(np.floor(time * rate + 1e-3 * rate / wanted)) for time in times if time < 20 / rate - 1e-3 / wanted]
    assert shown == expected


def test_one_film_at_two_rates_gives_the_same_frames(tmp_path):
    """What is filmed at 24 frames a second, and every third frame of it at 8, are one clip at 4."""
    moving = torch.randint(256, (24, 32, 32, 3), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    write_clip(tmp_path / "fast.mp4", moving, 24)
    write_clip(tmp_path / "slow.mp4", moving[::3], 8)
    wanted = VideoFormat(4, 32, 32, 4)
    fast, slow = (fit_clip(stream_clip(tmp_path / f"{name}.mp4"), wanted, FitPolicy()) for name in ("fast", "slow"))
    assert torch.equal(fast.video, slow.video)
    assert fast.fit.frames == [0, 6, 12, 18] and slow.fit.frames == [0, 2, 4, 6]
    assert "24 frames a second sampled at 4" in fast.fit.changes


def test_variable_rate_is_read_by_its_times(tmp_path):
    """A gif whose frames last 0.1, 0.5 and 0.2 seconds."""
    pictures = [Image.new("RGB", (16, 16), (shade, shade, shade)) for shade in (0, 128, 255)]
    pictures[0].save(tmp_path / "x.gif", save_all=True, append_images=pictures[1:], duration=[100, 500, 200])
    shades = [int(frame.picture[0, 0, 0]) for frame in sample_frames(stream_clip(tmp_path / "x.gif"), 10)]
    assert shades[:8] == [0, 128, 128, 128, 128, 128, 255, 255]


@pytest.mark.parametrize(
    ("policy", "count", "size", "rate", "reason"),
    [
        (FitPolicy(fps="refuse"), 9, (16, 16), 12, "12 frames a second, 8 are wanted"),
        (FitPolicy(size="refuse"), 9, (16, 24), 8, "16 x 24 pixels, 16 x 16 are wanted"),
        (FitPolicy(frames="refuse"), 11, (16, 16), 8, "11 frames, 5 are wanted"),
        (FitPolicy(), 4, (16, 16), 8, "4 frames at 8 a second, 5 are wanted"),
        (FitPolicy(fps="keep"), 4, (16, 16), 99, "4 frames, 5 are wanted"),
    ],
)
def test_what_the_policy_refuses_is_named(policy, count, size, rate, reason):
    with pytest.raises(UserError, match=reason):
        fit_clip(iter(film(count, rate, *size)), VideoFormat(5, 16, 16, 8), policy)


def test_a_size_that_changes_is_named_with_both():
    frames = [*film(3, 8, 16, 16), Frame(3, 3 / 8, 4 / 8, torch.zeros(16, 24, 3, dtype=torch.uint8))]
    with pytest.raises(UserError, match="16 x 16 and, from number 4 on, of 16 x 24"):
        fit_clip(iter(frames), VideoFormat(2, 16, 16, 8), FitPolicy())


def picture(height: int, width: int) -> torch.Tensor:
    """Smooth waves, so that two resampling filters hardly differ."""
    y, x = np.mgrid[:height, :width]
    return torch.from_numpy(np.stack([127 + 100 * np.sin(y / 9), 127 + 100 * np.cos(x / 7), y * 0 + 60], -1)).to(
        torch.uint8
    )


@pytest.mark.parametrize(("height", "width"), [(60, 90), (90, 60), (24, 30), (48, 48)])
@pytest.mark.parametrize("size", ["crop", "resize"])
def test_sizes_against_pillow(height, width, size):
    frame = picture(height, width)
    found = fit_clip(iter([Frame(0, 0, 1, frame)]), VideoFormat(1, 32, 32, 1), FitPolicy(size=size))
    image = Image.fromarray(frame.numpy())
    box = found.fit.box
    inside = (box[1], box[0], box[1] + box[3], box[0] + box[2])
    expected = np.asarray(image.resize((32, 32), Image.Resampling.BICUBIC, box=inside)).astype(int)
    assert np.abs(found.video[0].numpy().astype(int) - expected)[2:-2, 2:-2].max() <= 6
    side = min(height, width)
    assert (round(box[2]), round(box[3])) == ((side, side) if size == "crop" else (height, width))
    assert bool(found.fit.changes) == ((height, width) != (32, 32))


@pytest.mark.parametrize(("count", "wanted"), [(5, 5), (9, 5), (33, 16), (200, 5), (1000, 7)])
def test_spread_frames_are_the_middles_of_equal_parts(count, wanted):
    fitted = fit_clip(iter(film(count, 8, 2, 2)), VideoFormat(wanted, 2, 2, 8), FitPolicy(frames="spread"))
    middles = [(k + 0.5) * count / wanted for k in range(wanted)]
    # of a long film every second, fourth, ... frame may stand for its neighbours, a sixteenth of a part at most
    near = max(1, count / wanted / 8)
    assert all(0 <= middle - frame <= near for middle, frame in zip(middles, fitted.fit.frames, strict=True))
    assert fitted.video[:, 0, 0, 0].tolist() == [frame % 256 for frame in fitted.fit.frames]
    assert (f"{wanted} spread over {count} frames" in fitted.fit.changes) == (count > wanted)


def closest(frames, height, width):
    return (frames - 1) // 4 * 4 + 1, max(height // 16, 1) * 16, max(width // 16, 1) * 16


@pytest.mark.parametrize(
    ("size", "frames", "expected"),
    [("keep", "keep", (9, 32, 48)), ("keep", "trim", (5, 32, 48)), ("crop", "keep", (9, 16, 16))],
)
def test_a_clip_that_keeps_its_own_is_cut_to_what_the_model_makes(size, frames, expected):
    clip = torch.randint(256, (11, 40, 51, 3), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    film = [Frame(k, k / 8, (k + 1) / 8, one) for k, one in enumerate(clip)]
    found = fit_clip(iter(film), VideoFormat(5, 16, 16, 8), FitPolicy(size=size, frames=frames), closest)
    assert found.video.shape == (*expected, 3) and len(found.fit.frames) == expected[0]
    assert f"first {expected[0]} of 11 frames" in found.fit.changes
    if size == "keep":
        assert torch.equal(found.video, clip[: expected[0], 4:36, 1:49]) and found.fit.box == (4, 1, 32, 48)
        assert "middle 32 x 48 of 40 x 51 pixels" in found.fit.changes and "scaled" not in found.fit.changes


def test_a_clip_too_small_to_keep_its_size_is_refused():
    with pytest.raises(UserError, match="5 x 12 x 40 frames and pixels, the model makes no less than 5 x 16 x 32"):
        fit_clip(iter(film(9, 8, 12, 40)), VideoFormat(5, 16, 16, 8), FitPolicy(size="keep"), closest)


def test_an_equal_clip_is_unchanged():
    clip = torch.randint(256, (3, 16, 16, 3), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    frames = [Frame(k, k / 8, (k + 1) / 8, one) for k, one in enumerate(clip)]
    found = fit_clip(iter(frames), VideoFormat(3, 16, 16, 8), FitPolicy("refuse", "refuse", "refuse"))
    assert torch.equal(found.video, clip) and found.fit.changes == ""


@pytest.mark.parametrize("cells", [(2, 3), (20, 30), (7, 5)])
def test_pooled_damage_against_a_sum_over_pixels(cells):
    """Every map is drawn at ten times the source's pixels and averaged by brute force."""
    rng = np.random.default_rng(0)
    maps = rng.random((6, *cells))
    maps[1, 0, 0] = np.nan
    source, patches = VideoFormat(6, 20, 30, 8), PatchGrid((2, 2, 2), 5, 16, 16, 8, 4, True)
    fit = Fit([0, 1, 1, 3, 5], (2.0, 6.0, 16.0, 16.0), source, "")
    found = pool_damage(lambda frame: maps[frame], fit, patches)
    fine = 420  # a multiple of all cells
    large = [np.repeat(np.repeat(one, fine // cells[0], 0), fine // cells[1], 1) for one in maps]
    # rows 2 to 18 of 20 and columns 6 to 22 of 30, of the grid of fine pixels
    shown = [one[fine * 2 // 20 : fine * 18 // 20, fine * 6 // 30 : fine * 22 // 30] for one in large]
    shown = [shown[frame] for frame in fit.frames]
    for time, frames in enumerate((slice(0, 1), slice(1, 5))):
        for row in range(2):
            for column in range(2):
                block = np.stack(shown[frames])
                height, width = block.shape[1] // 2, block.shape[2] // 2
                block = block[:, row * height : (row + 1) * height, column * width : (column + 1) * width]
                np.testing.assert_allclose(found[time, row, column], np.nanmean(block), rtol=1e-6)


def test_a_patch_of_which_nothing_is_labelled_is_nan():
    source, patches = VideoFormat(1, 16, 16, 8), PatchGrid((1, 2, 1), 1, 16, 16, 8, 4, True)
    cells = np.array([[np.nan], [0.25]])
    np.testing.assert_equal(
        pool_damage(lambda frame: cells, Fit([0], (0, 0, 16, 16), source, ""), patches).ravel(), [np.nan, 0.25]
    )
