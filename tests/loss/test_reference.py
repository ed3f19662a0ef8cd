"""The reference formulas compared with loops over patches, finite differences and closed forms."""

import math

import cases
import numpy as np
import pytest
import torch

from halo_fast.loss import reference


@pytest.mark.parametrize(("shape", "grid"), cases.SMALL)
def test_patch_error_and_log_ratio_equal_a_loop_over_patches(shape, grid):
    policy, ref, target = cases.latents(shape)
    error, ref_error = cases.loop_error(policy, target, grid), cases.loop_error(ref, target, grid)
    np.testing.assert_allclose(reference.patch_error(policy, target, grid), error, rtol=1e-12)
    log_ratio = reference.patch_log_ratio(policy, ref, target, grid)
    np.testing.assert_allclose(log_ratio, ref_error - error, atol=1e-13)


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize(("shape", "grid"), cases.SMALL)
def test_backward_equals_a_loop_over_patches(shape, grid, dtype):
    policy, _, target = cases.latents(shape, dtype=dtype)
    grad = cases.rewards(grid)[0]
    gradient = reference.patch_error_backward(grad, policy, target)
    truth = cases.loop_gradient(grad, policy, target)
    assert gradient.dtype == dtype and gradient.shape == policy.shape
    distance = np.linalg.norm(gradient.double().numpy() - truth) / np.linalg.norm(truth)
    assert distance < cases.GRADIENT_TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_inputs_are_accumulated_in_float32(dtype):
    shape, grid = (4, 5, 12, 20), (2, 3, 3)
    policy, ref, target = cases.latents(shape, dtype=dtype, nearness=0.05)
    log_ratio = reference.patch_log_ratio(policy, ref, target, grid)
    truth = cases.loop_error(ref, target, grid) - cases.loop_error(policy, target, grid)
    terms = ((policy.double() - ref.double()) * (policy.double() + ref.double() - 2 * target.double())).abs()
    scale = reference.patch_mean(terms, grid).numpy()
    assert log_ratio.dtype == torch.float32
    assert (np.abs(log_ratio.numpy() - truth) < cases.table_tolerance(dtype, math.prod(shape)) * scale).all()


def test_patch_sizes_count_every_element_once():
    for shape, grid in cases.SMALL:
        sizes = reference.patch_sizes(shape, grid, torch.zeros((), dtype=torch.float64))
        for index, box in cases.boxes(shape, grid):
            assert sizes[index] == np.zeros(shape)[box].size
        assert sizes.sum() == math.prod(shape)


@pytest.mark.parametrize("name", reference.LINKS)
def test_links_match_their_formulas_and_derivatives(name):
    z = torch.linspace(-9.3, 9.1, 41, dtype=torch.float64, requires_grad=True)
    e = 0.1
    sigma = torch.sigmoid
    formula = {
        "sigmoid": -torch.log(sigma(z)),
        "conservative": -(1 - e) * torch.log(sigma(z)) - e * torch.log(sigma(-z)),
        "robust": (-(1 - e) * torch.log(sigma(z)) + e * torch.log(sigma(-z))) / (1 - 2 * e),
        "hinge": torch.clamp(1 - z, min=0),
        "ipo": (z - 0.5) ** 2,
        "kto": 1 - sigma(z),
        "poly": -torch.log(sigma(z)) + e * (1 - sigma(z)),
    }[name]
    value, slope = reference.link(z, name, e)
    torch.testing.assert_close(value, formula, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(slope, torch.autograd.grad(formula.sum(), z)[0], rtol=1e-10, atol=1e-12)
    step = 1e-6
    difference = (reference.link(z + step, name, e)[0] - reference.link(z - step, name, e)[0]) / (2 * step)
    torch.testing.assert_close(slope, difference, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", reference.LINKS)
def test_links_are_finite_for_huge_logits(name):
    z = torch.tensor([-1e6, -1e3, -89.0, 0.0, 89.0, 1e3, 1e6])
    value, slope = reference.link(z, name, 0.1)
    assert value.isfinite().all() and slope.isfinite().all()
    if name in ("sigmoid", "hinge"):
        assert value[0] == pytest.approx(1e6, rel=1e-5) and slope[0] == -1


def test_factored_form_keeps_its_digits_where_policy_is_near_the_reference():
    shape = (16, 4, 16, 64)
    policy, ref, target = cases.latents(shape, samples=1, dtype=torch.float32, nearness=1e-4)
    truth = (cases.loop_error(ref, target, (1, 1, 1)) - cases.loop_error(policy, target, (1, 1, 1))).item()
    ours = reference.patch_log_ratio(policy, ref, target, (1, 1, 1)).item()
    naive = ((ref - target).square().mean() - (policy - target).square().mean()).item()
    assert abs(ours - truth) < 1e-4 * abs(truth)
    assert abs(naive - truth) > 1e-3 * abs(truth)
