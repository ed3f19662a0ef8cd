"""The reward model's pass: shapes on any grid, one pass over the pixels, captions, files; and its loss."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from moving_shapes import COLOURS, DIRECTIONS, GRID, SHAPES, damage, draw_clip
from sklearn.metrics import roc_auc_score
from torch.nn.functional import interpolate as resize

from halo_fast.errors import UserError
from halo_fast.rewards import (
    LabelledClips,
    RewardConfig,
    RewardModel,
    RewardModelConfig,
    calibrate,
    preference_loss,
    score_loss,
)
from halo_fast.rewards.backbones.compact import network
from halo_fast.rewards.backbones.compact.network import _seen
from halo_fast.rewards.backbones.compact.palette import palette_distance
from halo_fast.rewards.clips import MIRRORS
from halo_fast.rewards.pretrained import read_text, words_of
from halo_fast.rewards.training import TrainingInputs, _prepare_inputs, draw_batch, frozen_features

CONFIG = RewardModelConfig(("visual_quality", "text_alignment"), width=8, pretrained=False)
BOTH = pytest.mark.parametrize("pretrained", [False, True])


def random_model(config: RewardModelConfig = CONFIG, seed: int = 0) -> RewardModel:
    """Every weight random, also those that start at zero."""
    torch.manual_seed(seed)
    model = RewardModel(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))
    for buffer in model.buffers():
        buffer.add_(0.05 * torch.randn_like(buffer))
    return model


def videos(count: int, frames: int = 9, height: int = 32, width: int = 32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(256, (count, frames, height, width, 3), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("grid", [(1, 1, 1), (3, 4, 4), (2, 3, 4), (1, 4, 1), (3, 2, 3)])
@BOTH
def test_one_pass_gives_video_and_patches_on_any_grid(grid, pretrained):
    model, passes = random_model(replace(CONFIG, pretrained=pretrained)), []
    model.backbone.trunk.stem.register_forward_hook(lambda *_: passes.append(1))
    rewards = model(videos(2), ["a red square", "a disc"], grid)
    assert passes == [1]
    assert rewards.video.shape == (2, 2) and rewards.patches.shape == (2, 1, *grid)
    for scores in rewards:
        assert scores.dtype == torch.float32 and (scores > 1).all() and (scores < 5).all()
        assert scores.std() > 0


@BOTH
def test_the_same_weights_take_longer_and_larger_clips_and_stills(pretrained):
    model = random_model(replace(CONFIG, pretrained=pretrained))
    assert model(videos(1, 17, 48, 64), ["a red square"], (5, 3, 8)).patches.shape == (1, 1, 5, 3, 8)
    still = model(videos(1, 1, 40, 32), [""], (1, 5, 4))
    assert still.patches.shape == (1, 1, 1, 5, 4) and still.video.isfinite().all()


@pytest.mark.parametrize(
    ("size", "seen"),
    [((81, 480, 832), (17, 256, 440)), ((49, 720, 480), (17, 384, 256)), ((9, 256, 264), (9, 256, 264))],
)
def test_the_trunk_reads_a_part_of_large_clips(size, seen):
    pixels = torch.randint(256, (1, *size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    shrunk = _seen(pixels)
    assert shrunk.shape == (1, *seen, 3)
    if size == seen:
        assert shrunk is pixels
    else:
        chosen = pixels[0, torch.linspace(0, size[0] - 1, 17).round().long()].movedim(-1, 1)
        expected = resize(chosen.float(), list(seen[1:]), antialias=True, mode="bilinear")
        torch.testing.assert_close(shrunk[0].movedim(-1, 1), expected)


def test_large_clips_are_trained_with_what_they_are_scored_by(monkeypatch):
    """The trunk's second forward pass changes no gradient, and patches stay those of the whole clip's latents."""
    monkeypatch.setattr(network, "_LARGEST_SIDE", 24)
    monkeypatch.setattr(network, "_MOST_FRAMES", 5)
    clips, gradients = videos(2, 17, 64, 96), []
    for large in (0, 10**9):
        monkeypatch.setattr(network, "_LARGE", large)
        model = random_model().requires_grad_(True)
        features = model.backbone.encode(clips, None)
        video, patches = model.backbone.logits(features, ["a disc", "a ring"], (5, 2, 3))
        assert features.size == (17, 64, 96) and features.maps[0].shape[2:] == (5, 12, 16)
        assert patches.shape == (2, 1, 5, 2, 3)
        (video.square().sum() + patches.square().sum()).backward()
        gradients.append([parameter.grad for parameter in model.backbone.trunk.parameters()])
    for once, again in zip(*gradients, strict=True):
        torch.testing.assert_close(once, again, rtol=1e-4, atol=1e-6)


def test_patches_of_unequal_size_have_a_mirror_where_it_hardly_shows(caplog):
    scores = torch.full((2, 1, 1, 1, 6), 3.0)

    def mirrors(width):
        data = LabelledClips(
            videos(2, 1, 8, width), ["a", "b"], torch.full((2, 2), 3.0), scores, CONFIG.video_dimensions
        )
        inputs = _prepare_inputs(RewardModel(CONFIG), data, torch.arange(2), RewardConfig(), None, None)
        return len(inputs.mirrors)

    assert mirrors(720) == 1 and mirrors(832) == 1 and not caplog.records  # 15 a patch; 17 or 18
    assert mirrors(8 * 22) == 0 and "no horizontal mirror: 6 patches on 22 latent positions" in caplog.text


@BOTH
def test_a_clip_is_scored_alike_alone_and_in_a_batch(pretrained):
    model = random_model(replace(CONFIG, pretrained=pretrained))
    prompts = ["a red square moves left", "disc", "a green ring stands still over there"]
    together = model(videos(3), prompts, GRID)
    for n in range(3):
        alone = model(videos(3)[n : n + 1], prompts[n : n + 1], GRID)
        torch.testing.assert_close(alone.video[0], together.video[n])
        torch.testing.assert_close(alone.patches[0], together.patches[n])


@BOTH
def test_captions_matter_word_by_word(pretrained):
    model, clip = random_model(replace(CONFIG, pretrained=pretrained)), videos(1)
    rewards = {
        prompt: model(clip, [prompt], GRID) for prompt in ("a red square", "A red, square!", "a blue square", "zxqv")
    }
    torch.testing.assert_close(rewards["a red square"].video, rewards["A red, square!"].video)
    for other in ("a blue square", "zxqv"):
        assert not torch.allclose(rewards["a red square"].video, rewards[other].video)
        assert not torch.allclose(rewards["a red square"].patches, rewards[other].patches)


def test_words_are_what_is_left_without_case_and_punctuation():
    assert words_of("A red Ring, of 7 dots!") == ["a", "red", "ring", "of", "7", "dots"]
    assert words_of("...") == []


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ((videos(1).float(), ["a"], GRID), "expected uint8"),
        ((videos(1)[0], ["a"], GRID), "expected uint8"),
        ((videos(2), ["a"], GRID), "prompts: expected one for each of 2 videos, got 1"),
        ((videos(1), ["a"], (3, 5, 4)), "rows"),
        ((videos(1, height=33), ["a"], GRID), "sides divisible by 8"),
    ],
)
def test_mistakes_are_named(arguments, complaint):
    with pytest.raises(ValueError, match=complaint):
        random_model()(*arguments)


def test_saved_and_loaded_it_scores_the_same(tmp_path):
    model = random_model(replace(CONFIG, patch_dimensions=("quality", "sharpness"), temporal_factor=8))
    model.save(tmp_path)
    loaded = RewardModel.load(tmp_path)
    assert loaded.config == model.config
    before, after = (each(videos(2), ["a", "red disc"], (2, 2, 2)) for each in (model, loaded))
    assert torch.equal(before.video, after.video) and torch.equal(before.patches, after.patches)
    (tmp_path / "model.safetensors").write_bytes(b"cut short")
    with pytest.raises(UserError, match="expected a reward model"):
        RewardModel.load(tmp_path)


def test_score_loss_is_relative_entropy_and_leaves_out_what_is_unknown():
    logits = torch.tensor([0.3, -1.2, 2.0, 0.0], dtype=torch.float64, requires_grad=True)
    scores = torch.tensor([4.2, 1.0, 5.0, math.nan], dtype=torch.float64)
    q, p = 1 / (1 + np.exp(-logits.detach().numpy()[:3])), (scores.numpy()[:3] - 1) / 4
    expected = p[0] * np.log(p[0] / q[0]) + (1 - p[0]) * np.log((1 - p[0]) / (1 - q[0]))
    expected = (expected - np.log(1 - q[1]) - np.log(q[2])) / 3
    loss = score_loss(logits, scores)
    assert loss.item() == pytest.approx(expected)
    loss.backward()
    np.testing.assert_allclose(logits.grad[:3], (q - p) / 3, rtol=1e-6)
    assert logits.grad[3] == 0
    assert score_loss(torch.logit(torch.tensor(0.8)), torch.tensor(4.2)).item() == pytest.approx(0, abs=1e-6)
    assert score_loss(torch.zeros(2), torch.full((2,), math.nan)).item() == 0


def test_mirrored_clips_take_labels_and_captions_with_them():
    """Where a clip differs from its clean self is where its label must say so, and it must move as its caption says."""
    rng, place = np.random.default_rng(0), (1, 0, 3)
    colours = list(COLOURS)
    clean = [draw_clip(rng, "disc", colours[n % 4], ("left", "up")[n % 2], 1.2) for n in range(16)]
    scores = torch.full((16, 1, *GRID), 5.0)
    scores[:, 0, *place] = 1.0
    data = LabelledClips(
        torch.from_numpy(np.stack([damage(clip, place, 1, 1.0) for clip in clean])),
        [f"a {colours[n % 4]} disc moves {('left', 'up')[n % 2]} {n}" for n in range(16)],
        torch.full((16, 2), 4.0),
        scores,
        ("visual_quality", "text_alignment"),
    )
    frozen = data.videos.permute(0, 4, 1, 2, 3).float()
    drawn = draw_batch(TrainingInputs(data, torch.arange(16), frozen, None, list(MIRRORS.values())), 16, seed=0, step=5)
    batch = drawn.clips
    torch.testing.assert_close(drawn.frozen, batch.videos.permute(0, 4, 1, 2, 3).float())
    places = set()
    for video, prompt, labels, video_scores in zip(
        batch.videos.numpy(), batch.prompts, batch.patch_scores[:, 0], batch.video_scores, strict=True
    ):
        original = clean[int(prompt.split()[-1])]
        found = np.unravel_index(int(labels.argmin()), GRID)
        flips = tuple(axis for axis, there in ((1, found[1] != place[0 + 1]), (2, found[2] != place[2])) if there)
        changed = np.abs(video.astype(int) - np.flip(original, flips)).sum(-1)
        rows, columns = 8 * found[1], 8 * found[2]
        assert changed[1:5, rows : rows + 8, columns : columns + 8].sum() == changed.sum() > 0
        named = prompt.split()[-2]
        turned = {(): ("left", "up"), (1,): ("left", "down"), (2,): ("right", "up"), (1, 2): ("right", "down")}
        assert named in turned[flips]
        assert video_scores[0] == 4 and math.isnan(video_scores[1]) == bool(flips)
        places.add(found)
    assert len(places) == 4


def test_preferences_are_bradley_terry_with_or_without_ties():
    """Against the probabilities themselves: P(win) = a / (a + k b), P(tie) = (k^2 - 1) a b / ((a + k b) (k a + b))."""
    logits = torch.tensor([0.7, -0.4], dtype=torch.float64)
    a, b = logits.exp().tolist()
    won, tied = torch.tensor([4.0, 2.0]), torch.tensor([3.0, 3.1])
    assert preference_loss(logits, won, 0.2).item() == pytest.approx(-math.log(a / (a + b)))
    assert preference_loss(logits, won.flip(0), 0.2).item() == pytest.approx(-math.log(b / (a + b)))
    assert preference_loss(logits, tied, 0.2).item() == 0
    k = 5
    assert preference_loss(logits, won, 0.2, ties=True).item() == pytest.approx(-math.log(a / (a + k * b)))
    chance = (k**2 - 1) * a * b / ((a + k * b) * (k * a + b))
    assert preference_loss(logits, tied, 0.2, ties=True).item() == pytest.approx(-math.log(chance))
    assert preference_loss(logits, torch.tensor([3.0, math.nan]), 0.2, ties=True).item() == 0
    with pytest.raises(ValueError, match="tie_margin"):
        preference_loss(logits, won, -1)


def test_preferences_alone_order_the_logits():
    scores, logits = torch.linspace(1, 5, 40)[torch.randperm(40)], torch.zeros(40, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.1)
    for _ in range(150):
        optimizer.zero_grad()
        preference_loss(logits, scores, 0.05).backward()
        optimizer.step()
    pairs = [(i, j) for i in range(40) for j in range(40) if scores[i] - scores[j] > 0.3]
    assert np.mean([(logits[i] > logits[j]).item() for i, j in pairs]) > 0.98


def test_calibration_brings_scores_of_any_scale_onto_the_rubric():
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(4000, generator=generator)
    scores = 1 + 4 * (truth > torch.logit(torch.rand(4000, generator=generator))).float()
    slope, offset = calibrate(50 * truth + 200, scores)
    assert slope == pytest.approx(1 / 50, rel=0.15) and offset == pytest.approx(-4, rel=0.15)
    assert calibrate(-truth, scores)[0] > 0
    assert calibrate(truth[:1], scores[:1]) == (1.0, 0.0)
    same = calibrate(truth, torch.full((4000,), 5.0))
    assert math.isfinite(same[0]) and math.isfinite(same[1])
    model = random_model(replace(CONFIG, video_calibration=((2.0, -1.0), (1.0, 0.0)), patch_calibration=((0.5, 0.25),)))
    plain = random_model()
    raw, calibrated = plain(videos(2), ["a", "b"], GRID), model(videos(2), ["a", "b"], GRID)
    logit = ((raw.video - 1) / 4).logit()
    torch.testing.assert_close(calibrated.video[:, 0], 1 + 4 * (2 * logit[:, 0] - 1).sigmoid(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(calibrated.video[:, 1], raw.video[:, 1])
    expected = 1 + 4 * (0.5 * ((raw.patches - 1) / 4).logit() + 0.25).sigmoid()
    torch.testing.assert_close(calibrated.patches, expected, rtol=1e-4, atol=1e-4)


def test_the_words_of_a_clip_are_predicted_by_the_fit_to_all_other_clips():
    """Clips of a colour are separated from the others, each without its own prompt; and so are new ones."""
    backbone = RewardModel(replace(CONFIG, pretrained=True)).backbone
    rng = np.random.default_rng(0)
    colours = [list(COLOURS)[n % 4] for n in range(40)]
    clips = torch.from_numpy(np.stack([draw_clip(rng, "disc", colour, "left", 1.2) for colour in colours]))
    frozen, prompts = backbone.frozen_features(clips), [f"a {colour} disc" for colour in colours]
    left_out = backbone.fit_closed_form(frozen[:32], prompts[:32], torch.ones(32))
    words = torch.stack([read_text(colour) for colour in COLOURS])
    features = backbone.encode(clips[32:], frozen[32:])
    for evidence in (left_out @ words.T, features.word_evidence @ words.T):
        named = np.arange(len(evidence))[:, None] % 4 == np.arange(4)
        assert np.mean([roc_auc_score(named[:, n], evidence[:, n]) for n in range(4)]) > 0.9


def test_the_direction_of_a_motion_is_among_the_words_that_a_clip_shows():
    """New clips show their own direction more than its opposite, and the other way round in a mirror and backwards."""
    backbone = RewardModel(replace(CONFIG, pretrained=True)).backbone
    rng = np.random.default_rng(0)
    named = [list(DIRECTIONS)[n % 4] for n in range(56)]
    shapes = [(list(COLOURS)[n // 4 % 4], list(SHAPES)[n // 16]) for n in range(56)]
    clips = torch.from_numpy(
        np.stack(
            [draw_clip(rng, shape, colour, name, 1.0) for name, (colour, shape) in zip(named, shapes, strict=True)]
        )
    )
    prompts = [f"a {colour} {shape} moves {name}" for name, (colour, shape) in zip(named, shapes, strict=True)]
    train, new = slice(0, 40), slice(40, None)
    left_out = backbone.fit_closed_form(backbone.frozen_features(clips[train]), prompts[train], torch.ones(40))
    turned = {"left": "right", "right": "left", "up": "down", "down": "up"}
    contrast = torch.stack([read_text(name) - read_text(turned[name]) for name in named])

    def shown(videos):
        return (backbone.encode(videos, backbone.frozen_features(videos)).word_evidence * contrast[new]).sum(1)

    assert ((left_out * contrast[train]).sum(1) > 0).float().mean() > 0.9
    assert (shown(clips[new]) > 0).all() and (shown(clips[new].flip(1)) < 0).all()
    level = torch.tensor([name in ("left", "right") for name in named[new]])
    assert torch.equal(shown(clips[new].flip(3)) < 0, level)
    still = clips[new, 4:5].expand_as(clips[new]).contiguous()
    assert (shown(still) < shown(clips[new])).all()

    # what a mirrored clip shows follows from what it showed: words of its axis change places, others stay
    exchanged = backbone.exchange_words(left_out, MIRRORS["horizontal"].words)
    words = {name: read_text(name) for name in ("left", "right", "red", "up")}
    for name, other in (("left", "right"), ("right", "left")):
        torch.testing.assert_close(exchanged @ words[name], left_out @ words[other], rtol=1e-3, atol=1e-2)
    for name in ("red", "up"):
        assert np.corrcoef(exchanged @ words[name], left_out @ words[name])[0, 1] > 0.9


@pytest.mark.parametrize("on_disk", [False, True])
def test_kept_features_are_those_of_the_backbone_and_lie_as_it_laid_them(tmp_path, on_disk):
    """Sums over channels depend on the layout in their last bit, and a whole training on that."""
    model = RewardModel(replace(CONFIG, pretrained=True))
    rng = np.random.default_rng(0)
    clips = torch.from_numpy(np.stack([draw_clip(rng, "disc", "red", "left", 1.2) for _ in range(20)]))
    rows = torch.tensor([*range(17), 19])
    kept = frozen_features(model, clips, rows, tmp_path if on_disk else None)
    expected = torch.cat([model.backbone.frozen_features(part) for part in clips[rows].split(16)]).half()
    assert kept.stride() == expected.stride() and torch.equal(kept, expected)


def test_palette_distance_is_numpys():
    """Distances of 4 x 4 pixels to each colour of the palette; the soft minimum separates near from far."""
    palette = torch.tensor([[-1.0, -1, -1], [1, 0, 0], [0, 1, 0], [5, 5, 5]])
    generator = torch.Generator().manual_seed(0)
    # clips of two of the named colours and of a foreign one
    colours = torch.cat((palette[:2], torch.tensor([[0.2, -0.7, 1.0]])))[
        torch.randint(3, (2, 3, 2, 4), generator=generator)
    ]
    pixels = colours.movedim(-1, 1).repeat_interleave(4, 3).repeat_interleave(4, 4)
    found = palette_distance(pixels, palette.expand(2, -1, -1))
    expected = np.linalg.norm(colours[..., None, :].numpy() - palette.numpy(), axis=-1)
    np.testing.assert_allclose(found[:, :4].movedim(1, -1), expected, atol=0.02)
    nearest = expected.min(axis=-1)
    assert found[:, 4][torch.from_numpy(nearest == 0)].max() < 0.7 < found[:, 4][torch.from_numpy(nearest > 0)].min()
