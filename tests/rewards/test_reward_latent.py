"""A reward of noisy latents: what it reads, that it learns, its files and its refusals."""

import pytest
import torch
from scipy.stats import spearmanr
from tiny import TINY, tiny_conditions, tiny_wan

from halo_fast.errors import UserError
from halo_fast.families import family_of
from halo_fast.rewards.latent import LatentReward, LatentRewardConfig, _read, train_latent_reward

GRID = (1, 2, 2)
SIZE = (9, 32, 32)


@pytest.fixture(scope="module")
def wan():
    family = family_of(tiny_wan())
    return family, tiny_conditions(family, ["a cube jumps", "a ball"], SIZE)


def clips(family, count, size=SIZE, seed=0):
    return torch.randn(count, *family.latent_shape(*size), generator=torch.Generator().manual_seed(seed))


def patch_means(values, grid=GRID):
    """Means over patches [N, C, f, h, w], by slices."""
    frames, height, width = (length // count for length, count in zip(values.shape[2:], grid, strict=True))
    rows = [
        values[:, :, f * frames : (f + 1) * frames, y * height : (y + 1) * height, x * width : (x + 1) * width]
        for f in range(grid[0])
        for y in range(grid[1])
        for x in range(grid[2])
    ]
    return torch.stack([row.mean(dim=(2, 3, 4)) for row in rows], dim=2).unflatten(2, grid)


@pytest.mark.parametrize("name", ["Wan 2.1", "CogVideoX 2B", "LTX-Video", "HunyuanVideo", "Kandinsky 5"])
def test_a_reading_is_of_the_patch_at_its_place(name):
    """Means of x_t and of the clean latents by their definition; tokens by where a change of x_t shows most."""
    tiny = TINY[name]
    family = family_of(tiny.build(), tiny.network)
    conditions = family.stack(tiny_conditions(family, ["a cube jumps", "a ball"], tiny.size))
    latents = clips(family, 2, tiny.size)
    t = torch.tensor([0.25, 0.75])
    noisy = family.add_noise(latents, clips(family, 2, tiny.size, seed=1), t)
    model, _ = train_latent_reward(
        family, latents, [{key: value[n] for key, value in conditions.items() if key != "lengths"} for n in range(2)],
        torch.full((2, 1, *GRID), 3.0), draws=1, steps=1,
    )  # fmt: skip
    block = model.config.blocks[0]
    reading = _read(family, noisy, t, conditions, GRID, (block,))
    channels = noisy.shape[2 if family.layout == "BFCHW" else 1]
    inner = reading.shape[1] - 2 * channels
    first = noisy.transpose(1, 2) if family.layout == "BFCHW" else noisy
    with torch.no_grad():
        predicted = family.predict(family.transformer, noisy, t, conditions)
    clean = family.clean(noisy, predicted, t)
    clean = clean.transpose(1, 2) if family.layout == "BFCHW" else clean
    torch.testing.assert_close(reading[:, inner + channels :], patch_means(first), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(reading[:, inner : inner + channels], patch_means(clean), rtol=1e-3, atol=1e-4)

    for row in range(2):
        for column in range(2):
            changed = noisy.clone()
            height, width = changed.shape[-2] // 2, changed.shape[-1] // 2
            changed[..., row * height : (row + 1) * height, column * width : (column + 1) * width] += 1.0
            moved = (_read(family, changed, t, conditions, GRID, (block,)) - reading)[:, :inner].norm(dim=1)
            assert moved.flatten(1).argmax(1).tolist() == [2 * row + column] * 2


def test_it_learns_what_patches_hold_and_comes_back_from_its_files(wan, tmp_path):
    family, conditions = wan
    strength = torch.rand(48, 1, *GRID, generator=torch.Generator().manual_seed(2)) * 2
    latents = clips(family, 48) + strength.repeat_interleave(3, 2).repeat_interleave(2, 3).repeat_interleave(2, 4)
    rows = [conditions[n % 2] for n in range(48)]
    before = {key: value.clone() for key, value in family.transformer.state_dict().items()}
    given = latents[:36], rows[:36], 1 + 2 * strength[:36]
    settings = {"draws": 3, "steps": 300, "clips_per_pass": 36, "times": (0.0, 0.4)}
    model, history = train_latent_reward(family, *given, **settings)
    assert history[-1]["loss"] < history[0]["loss"]
    t = torch.full((12,), 0.2)
    noisy, prompts = family.add_noise(latents[36:], clips(family, 12, seed=3), t), family.stack(rows[36:])
    found = model(family, noisy, t, prompts)
    assert found.shape == (12, 1, *GRID) and found.min() >= 1 and found.max() <= 5
    assert spearmanr(found.flatten(), strength[36:].flatten())[0] > 0.7
    assert all(torch.equal(value, before[key]) for key, value in family.transformer.state_dict().items())

    model.save(tmp_path)
    assert torch.equal(LatentReward.load(tmp_path)(family, noisy, t, prompts), found)
    other_family = family_of(TINY["LTX-Video"].build())
    size = TINY["LTX-Video"].size
    prompts = other_family.stack(tiny_conditions(other_family, ["a ball"], size))
    with pytest.raises(UserError, match=r"expected WanTransformer3DModel, .* got LTXVideoTransformer3DModel"):
        model(other_family, clips(other_family, 1, size), torch.tensor([0.5]), prompts)


def test_the_disk_and_training_mode_change_nothing(wan, tmp_path):
    family, conditions = wan
    scores = 1 + 4 * torch.rand(2, 1, *GRID, generator=torch.Generator().manual_seed(5))
    one, _ = train_latent_reward(family, clips(family, 2), conditions, scores, draws=2, steps=5)
    family.transformer.train()
    try:
        other, _ = train_latent_reward(family, clips(family, 2), conditions, scores, draws=2, steps=5, folder=tmp_path)
        assert all(module.training for module in family.transformer.modules())
    finally:
        family.transformer.eval()
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())


def test_scores_that_are_missing_do_not_count(wan):
    family, conditions = wan
    scores = torch.full((2, 1, *GRID), float("nan"))
    scores[0, 0, 0, 0, 0] = 5.0
    model, history = train_latent_reward(family, clips(family, 2), conditions, scores, draws=1, steps=100)
    assert 0 <= history[-1]["loss"] < 0.2
    assert all(value.isfinite().all() for value in model.state_dict().values())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"patch_scores": torch.ones(1, 1, *GRID)}, "as many clips"),
        ({"patch_scores": torch.ones(2, *GRID)}, "as many clips"),
        ({"dimensions": ("quality", "motion")}, "dimensions: expected 1"),
        ({"draws": 0}, "draws: expected at least 1"),
        ({"steps": 0}, "steps: expected at least 1"),
        ({"patch_scores": torch.zeros(2, 1, *GRID)}, "expected 1 to 5"),
        ({"patch_scores": torch.full((2, 1, *GRID), float("nan"))}, "NaN alone"),
        ({"latents": [torch.zeros(4, 3, 4, 4), torch.zeros(4, 2, 4, 4)]}, "for clip 1"),
        ({"times": (0.5, 0.5)}, "times: expected"),
        ({"times": (0.0, 1.5)}, "times: expected"),
    ],
)
def test_what_does_not_fit_is_named(wan, change, words):
    family, conditions = wan
    given = {"latents": clips(family, 2), "conditions": conditions, "patch_scores": torch.ones(2, 1, *GRID)} | change
    with pytest.raises(ValueError, match=words):
        train_latent_reward(family, **given)


def test_latents_that_are_not_finite_are_named(wan):
    family, conditions = wan
    broken = clips(family, 2)
    broken[1, 0, 0, 0, 0] = float("nan")
    with pytest.raises(UserError, match="clip 1"):
        train_latent_reward(family, broken, conditions, torch.ones(2, 1, *GRID), draws=1, steps=1)


def test_a_network_without_tokens_is_refused():
    tiny = TINY["AnimateDiff"]
    family = family_of(tiny.build(), tiny.network)
    conditions = tiny_conditions(family, ["a ball"], tiny.size)
    with pytest.raises(UserError, match="no blocks with one token"):
        train_latent_reward(family, clips(family, 1, tiny.size), conditions, torch.ones(1, 1, *GRID), draws=1, steps=1)


@pytest.mark.parametrize("broken", ["missing", "config", "weights"])
def test_files_that_are_no_latent_rewards_are_named(tmp_path, broken):
    LatentReward(LatentRewardConfig(GRID, (0,), 8, "Any")).save(tmp_path)
    if broken == "missing":
        (tmp_path / "config.json").unlink()
    elif broken == "config":
        (tmp_path / "config.json").write_text('{"grid": [1, 2, 2], "width": 3}')
    else:
        (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match="expected a latent reward's"):
        LatentReward.load(tmp_path)
