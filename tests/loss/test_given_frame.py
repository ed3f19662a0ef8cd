"""The layout of image-to-video: the first latent frame is given, and neither it nor patches of it count anywhere."""

import math

import cases
import pytest
import torch
from torch.nn.functional import logsigmoid

from halo_fast import (
    GranDPO,
    gran_dpo,
    gran_dpo_coefficients,
    patch_error,
    patch_log_ratio,
    patch_weighted_mse,
    using_backend,
)
from halo_fast.loss.backends import unavailable
from halo_fast.loss.objectives import PRESETS, build

LAYOUT = "BC(1+F)HW"
# frames in all and patch rows: rows of 1..4 made frames, of even numbers, and a first one that has none
UNEVEN = [(7, 3), (9, 4), (6, 4), (5, 5), (2, 1), (13, 5)]
BACKENDS = [name for name in ("reference", "cpp") if not unavailable(name, "cpu")]


def batch(frames, rows, dtype=torch.float64, seed=0):
    policy, reference, target = cases.latents((3, frames, 5, 6), 4, dtype, 0.1, seed)
    patch, video = cases.rewards((rows, 2, 3), 4, torch.float64, seed + 1)
    return policy.requires_grad_(), target, reference, patch, video


def oracle_error(prediction, target, grid):
    """E_p and the number of its elements, patch by patch: the means over a box without the frame 0."""
    errors, sizes = [], []
    for _, (channels, frames, *box) in cases.boxes(prediction.shape[1:], grid):
        inside = channels, slice(max(frames.start, 1), frames.stop), *box
        parts = [
            (o[inside] - tau[inside]).square() for o, tau in zip(prediction.double(), target.double(), strict=True)
        ]
        errors.append(torch.stack([part.mean() if part.numel() else part.sum() for part in parts]))
        sizes.append(parts[0].numel())
    return torch.stack(errors, dim=1), torch.tensor(sizes, dtype=torch.float64)


def oracle_loss(policy, target, reference, patch, video, settings):
    """Gran-DPO's formula with the sigmoid link over the elements that count, in float64 through autograd."""
    grid = tuple(patch.shape[1:])
    error, sizes = oracle_error(policy, target, grid)
    excess = error - oracle_error(reference, target, grid)[0]
    share, counts = sizes / sizes.sum(), sizes > 0
    patch, pairs = patch.flatten(1), len(policy) // 2
    patch_beta = settings.patch_beta or settings.video_beta / math.sqrt(int(counts.sum()))
    losses = []
    for a in range(pairs):
        b = a + pairs
        sign = (video[a] - video[b]).sign()
        loss = -settings.video_weight * logsigmoid(
            -settings.video_beta / 2 * sign * ((share * excess[a]).sum() - (share * excess[b]).sum())
        )
        loss = loss + settings.sft_weight * (share * error[a if sign > 0 else b]).sum()
        gap = (patch[a] - patch[b])[counts]
        z = -patch_beta / 2 * gap.sign() * (excess[a] - excess[b])[counts]
        weight = gap.abs() ** settings.patch_gamma
        loss = loss - settings.patch_weight * (weight * logsigmoid(z)).sum() / weight.sum()
        winner = torch.where(gap > 0, error[a][counts], error[b][counts])
        loss = loss + settings.patch_sft_weight * winner.mean()
        made = [(policy[one] - reference[one])[:, 1:].square().mean() for one in (a, b)]
        losses.append(loss + settings.anchor_weight * sum(made))
    return torch.stack(losses).mean()


SETTINGS = {
    "plain": GranDPO(video_beta=80.0, patch_beta=33.0),
    "all terms": GranDPO(
        video_weight=0.3, video_beta=60.0, patch_gamma=2.0, sft_weight=0.2, patch_sft_weight=0.7, anchor_weight=0.4
    ),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize(("frames", "rows"), UNEVEN)
def test_loss_and_gradient_are_those_of_the_formula_over_the_elements_that_count(frames, rows, name, backend):
    policy, target, reference, patch, video = batch(frames, rows)
    expected = oracle_loss(policy, target, reference, patch, video, SETTINGS[name])
    (wanted,) = torch.autograd.grad(expected, policy)
    with using_backend(backend):
        out = gran_dpo(policy, target, reference, patch, video, objective=SETTINGS[name], layout=LAYOUT)
        (found,) = torch.autograd.grad(out.loss, policy)
    torch.testing.assert_close(out.loss, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-15)
    assert torch.equal(found[:, :, 0], torch.zeros_like(found[:, :, 0])) and found[:, :, 1:].abs().min() > 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("frames", "rows"), UNEVEN)
def test_patch_errors_are_means_over_the_elements_that_count(frames, rows, dtype):
    policy, target, reference, *_ = batch(frames, rows, dtype)
    grid = (rows, 2, 3)
    error, sizes = oracle_error(policy.detach(), target, grid)
    other, _ = oracle_error(reference, target, grid)
    tolerance = cases.table_tolerance(dtype, int(sizes.max()))
    found = patch_error(policy, target, grid, LAYOUT)
    torch.testing.assert_close(found.double().flatten(1), error, rtol=tolerance, atol=0)
    ratio = patch_log_ratio(policy, target, reference, grid, LAYOUT).double().flatten(1)
    assert ((ratio - (other - error)).abs() <= tolerance * (error + other)).all()
    assert (found.flatten(1)[:, sizes == 0] == 0).all() and bool((sizes == 0).any()) == (rows > frames / 2)


def arguments(objective, patch, video, reference):
    """What the objective takes."""
    labels = {"patch_rewards": patch, "video_rewards": video}
    return labels | ({"reference": reference} if objective.needs_reference else {})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize(("frames", "rows"), [(8, 4), (6, 6)])
def test_every_objective_is_that_of_the_made_frames_where_these_divide_alike(frames, rows, name, backend):
    """Of rows of two frames the first has one left; of rows of one it has none, and is left out on the other side."""
    policy, target, reference, patch, video = batch(frames, rows)
    objective, empty = build(name), frames == rows
    with using_backend(backend):
        out = gran_dpo(
            policy, target, objective=objective, layout=LAYOUT, **arguments(objective, patch, video, reference)
        )
        (found,) = torch.autograd.grad(out.loss, policy)
        made = policy.detach()[:, :, 1:].requires_grad_()
        given = arguments(objective, patch[:, int(empty) :], video, reference[:, :, 1:])
        plain = gran_dpo(made, target[:, :, 1:], objective=objective, **given)
        (wanted,) = torch.autograd.grad(plain.loss, made)
    torch.testing.assert_close(out.loss, plain.loss, rtol=1e-11, atol=0)
    torch.testing.assert_close(found[:, :, 1:], wanted, rtol=1e-10, atol=1e-15)
    assert not found[:, :, 0].any()
    metrics, others = out.metrics(), plain.metrics()
    assert metrics.keys() == others.keys()
    for key in metrics.keys() - ({"patch/ties"} if empty else set()):
        torch.testing.assert_close(metrics[key], others[key], rtol=1e-10, atol=1e-13, equal_nan=True, msg=key)


@pytest.mark.parametrize("objective", ["halo_sft", GranDPO(loser_guard="patch"), "dense_dpo", "mapo"])
def test_what_stands_in_the_given_frame_changes_no_bit(objective):
    policy, target, reference, patch, video = batch(9, 4, torch.float32)
    built = build(objective)
    results = []
    for value in (0.0, 1e6):
        o, tau, ref = (tensor.detach().clone() for tensor in (policy, target, reference))
        o[:, :, 0], tau[:, :, 0], ref[:, :, 0] = -value, value, 2 * value
        o.requires_grad_()
        out = gran_dpo(o, tau, objective=built, layout=LAYOUT, **arguments(built, patch, video, ref))
        out.loss.backward()
        results.append((out.loss.detach(), o.grad, *out.metrics().values()))
    assert all(torch.equal(one.nan_to_num(), two.nan_to_num()) for one, two in zip(*results, strict=True))


def test_cached_errors_and_one_sample_at_a_time_give_the_same_gradient():
    policy, target, reference, patch, video = batch(7, 3)
    settings = GranDPO(video_beta=60.0, patch_sft_weight=0.5)
    error = patch_error(reference, target, (3, 2, 3), LAYOUT)
    out = gran_dpo(policy, target, reference, patch, video, objective=settings, layout=LAYOUT)
    (wanted,) = torch.autograd.grad(out.loss, policy)
    cached = {"reference_error": error, "patch_rewards": patch, "video_rewards": video}
    coefficients, other = gran_dpo_coefficients(policy, target, objective=settings, layout=LAYOUT, **cached)
    assert coefficients.shape == patch.shape
    torch.testing.assert_close(other.loss, out.loss.detach(), rtol=1e-10, atol=0)
    for index in range(4):
        one = policy[index : index + 1].detach().requires_grad_()
        loss = patch_weighted_mse(one, target[index : index + 1], coefficients[index : index + 1], LAYOUT)
        (found,) = torch.autograd.grad(loss, one)
        torch.testing.assert_close(found, wanted[index : index + 1], rtol=1e-9, atol=1e-14)
        mine = oracle_error(one.detach(), target[index : index + 1], (3, 2, 3))[0]
        torch.testing.assert_close(loss.detach(), (coefficients[index].flatten() * mine[0]).sum())


def test_a_compiled_call_is_the_same():
    policy, target, reference, patch, video = batch(7, 3, torch.float32)

    def loss(o):
        return gran_dpo(o, target, reference, patch, video, layout=LAYOUT).loss

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)(policy)
    torch.testing.assert_close(compiled, loss(policy))
    torch.testing.assert_close(*(torch.autograd.grad(one, policy)[0] for one in (compiled, loss(policy))))


def test_a_clip_of_the_given_frame_alone_is_refused():
    o = torch.zeros(2, 3, 1, 4, 4)
    with pytest.raises(ValueError, match=r"prediction must have frames beside the first, .* \(2, 3, 1, 4, 4\)"):
        gran_dpo(o, o, o, torch.zeros(2, 1, 1, 1), torch.zeros(2), layout=LAYOUT)
    with pytest.raises(ValueError, match="between 1 and 3 patches along the latent's 3 frames"):
        patch_error(torch.zeros(2, 3, 3, 4, 4), torch.zeros(2, 3, 3, 4, 4), (4, 1, 1), LAYOUT)
