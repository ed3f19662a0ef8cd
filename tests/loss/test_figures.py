"""PairFigures compared with plain loops, and batches joined with one batch."""

import cases
import numpy as np
import pytest
import torch

from halo_fast import GranDPO, gran_dpo, patch_error
from halo_fast.loss.figures import PairFigures

SHAPE, GRID = (3, 4, 5, 6), (2, 2, 3)
OBJECTIVE = GranDPO(video_beta=900.0, patch_beta=300.0, patch_delta=0.5)


def batch(samples=8, seed=0, dtype=torch.float64):
    policy, ref, target = cases.latents(SHAPE, samples, dtype, 0.05, seed)
    patch_rewards, video_rewards = cases.rewards(GRID, samples, torch.float64, seed + 1)
    video_rewards[0] = float("nan")
    return policy, target, ref, patch_rewards, video_rewards


def take(data, pairs):
    """The batch of some of the pairs."""
    half = len(data[0]) // 2
    return [value[[*pairs, *(half + pair for pair in pairs)]] for value in data]


@pytest.mark.parametrize("cached", [False, True])
def test_every_value_is_that_of_the_plain_formula(cached):
    policy, target, ref, patch_rewards, video_rewards = batch()
    t = torch.linspace(0.1, 0.4, 4).repeat(2)
    reference = {"reference_error": patch_error(ref, target, GRID)} if cached else {"reference": ref}
    labels = {"patch_rewards": patch_rewards, "video_rewards": video_rewards}
    figures = gran_dpo(policy, target, **reference, **labels, objective=OBJECTIVE).figures(t)
    assert torch.equal(figures.t, t[:4]) and figures.grid == GRID and figures.labels == ("video", "patch")
    for label, grid, beta, rewards, delta in (
        ("video", (1, 1, 1), 900.0, video_rewards[:, None], 0.0),
        ("patch", GRID, 300.0, patch_rewards.flatten(1), 0.5),
    ):
        policy_error, reference_error = (cases.loop_error(x, target, grid).reshape(8, -1) for x in (policy, ref))
        values, weights, errors = figures.values(label), figures.weights(label), figures.errors(label)
        assert errors.shape == (4, *weights.shape)
        for pair, place in np.ndindex(*weights.shape):
            gap = (rewards[pair, place] - rewards[pair + 4, place]).item()
            assert weights[pair, place].item() == float(abs(gap) > delta)
            if not abs(gap) > delta:
                continue
            win, lose = (pair, pair + 4) if gap > 0 else (pair + 4, pair)
            four = [table[sample, place] for sample in (win, lose) for table in (policy_error, reference_error)]
            assert errors[:, pair, place].tolist() == pytest.approx(four, rel=1e-9)
            z = beta / 2 * ((four[1] - four[0]) - (four[3] - four[2]))
            expected = {
                "accuracy": float(z > 0), "margin": z, "winner_policy": four[0], "winner_reference": four[1],
                "loser_policy": four[2], "loser_reference": four[3], "gradient_factor": 1 / (1 + np.exp(z)),
                "saturation": float(abs(z) > 10),
            }  # fmt: skip
            found = {name: table[pair, place].item() for name, table in values.items()}
            assert found == pytest.approx(expected, rel=1e-6, abs=1e-9)
    assert 0 < figures.values("patch")["saturation"].mean() < 1


@pytest.mark.parametrize("objective", [OBJECTIVE, "halo_sft", "dense_dpo", "mapo"], ids=lambda o: str(o)[:9])
def test_batches_joined_are_one_batch(objective):
    data = batch()
    reference = objective != "mapo"
    whole, *parts = (
        gran_dpo(
            *part[:2], part[2] if reference else None, *part[3:], objective=objective,
            kappa=torch.linspace(0.5, 2, 4)[pairs],
        ).figures(torch.linspace(0, 1, 4)[pairs])
        for pairs in ([0, 1, 2, 3], [0, 1], [2, 3])
        for part in [take(data, pairs)]
    )  # fmt: skip
    joined = PairFigures.join(parts)
    assert list(joined.metrics()) == list(whole.metrics())
    torch.testing.assert_close(joined.metrics(), whole.metrics())
    for label in whole.labels:
        torch.testing.assert_close(joined.errors(label), whole.errors(label))
        torch.testing.assert_close(joined.logits(label), whole.logits(label))
    assert torch.equal(joined.t, whole.t)


# a logit of KTO is less the mean of its batch, so its figures are those of the batches
@pytest.mark.parametrize("objective", [OBJECTIVE, "dense_dpo", "mapo"], ids=lambda o: str(o)[:9])
def test_metrics_of_uneven_batches_are_those_of_one_batch(objective):
    data = batch()
    data[3][[2, 6]] = float("nan")
    reference = objective != "mapo"

    def output(pairs):
        half = [*pairs, *(4 + pair for pair in pairs)]
        policy, target, ref, patches, videos = (None if value is None else value[half] for value in data)
        return gran_dpo(policy, target, ref if reference else None, patches, videos, objective=objective)

    # the pair by itself has neither labels of patches nor, being the first, of the video
    whole, *parts = (output(pairs).figures() for pairs in ([0, 1, 2, 3], [1, 3], [2], [0]))
    joined = PairFigures.joined_metrics(parts)
    assert list(joined) == list(whole.metrics())
    torch.testing.assert_close(joined, whole.metrics(), equal_nan=True)
    # two processes with other numbers of pairs
    sums = []
    PairFigures.joined_metrics(parts[1:], lambda own: sums.append(own) or own)
    together = PairFigures.joined_metrics(parts[:1], lambda own: torch.cat([own, *sums]))
    torch.testing.assert_close(together, whole.metrics(), equal_nan=True)


def test_metrics_of_two_grids_are_means_over_all_their_patches():
    one, other = (
        gran_dpo(*batch()[:3], *labels, objective=OBJECTIVE).figures()
        for labels in (batch()[3:], (cases.rewards((1, 4, 2), 8, torch.float64, 9)[0], batch(seed=3)[4]))
    )
    joined, metrics = PairFigures.joined_metrics([one, other]), [part.metrics() for part in (one, other)]
    patches = [part.weights("patch").sum() for part in (one, other)]
    expected = sum(count * part["patch/margins"] for count, part in zip(patches, metrics, strict=True)) / sum(patches)
    torch.testing.assert_close(joined["patch/margins"], expected)
    ties = 1 - sum(patches) / (one.patch.numel() + other.patch.numel())
    torch.testing.assert_close(joined["patch/ties"], ties)
    assert joined["num_pairs"] == sum(part["num_pairs"] for part in metrics)


def test_joining_takes_in_other_processes():
    data = batch()
    one, other = (gran_dpo(*take(data, pairs), objective=OBJECTIVE).figures() for pairs in ([0, 1], [2, 3]))
    rows = iter(
        # what the other process would send, in the order of the fields
        [
            torch.stack([other.loss * other.num_pairs, other.num_pairs])[None],
            other.active, other.video_logits, other.patch_logits, other.video, other.patch, other.scale,
            *(table.unflatten(0, (2, -1)).transpose(0, 1) for table in (other.error, other.log_ratio)),
        ]
    )  # fmt: skip
    together = PairFigures.join([one], lambda tensor: torch.cat([tensor, next(rows)]))
    whole = gran_dpo(*data, objective=OBJECTIVE).figures()
    torch.testing.assert_close(together.metrics(), whole.metrics())
    assert together.t is None


def test_unpaired_samples_have_metrics_but_no_winners():
    policy, target, ref, _, video_rewards = batch(5)
    video_rewards[0] = 1.0
    out = gran_dpo(policy, target, ref, None, video_rewards, objective="diffusion_kto")
    figures = out.figures(torch.rand(5))
    assert figures.labels == () and len(figures.t) == 5
    assert figures.metrics()["rewards/margins"].item() == pytest.approx(out.video_logits.mean().item())
    with pytest.raises(ValueError, match="label must be one of none here; got 'video'"):
        figures.errors("video")
    joined = PairFigures.join([figures, figures])
    assert joined.error.shape == (10, 1, 1, 1)


def test_figures_carry_no_graph():
    policy, target, ref, *labels = batch()
    figures = gran_dpo(policy.requires_grad_(), target, ref, *labels).figures()
    tensors = [value for value in vars(figures).values() if isinstance(value, torch.Tensor)]
    assert len(tensors) == 10 and not any(value.requires_grad for value in tensors)
