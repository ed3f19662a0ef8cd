"""The C++ kernels and the Triton kernels (interpreted where there is no GPU) against loops over patches."""

import itertools
import math

import cases
import numpy as np
import pytest
import torch
from torch import Tensor

from halo_fast import GranDPO, gran_dpo, patch_log_ratio, using_backend
from halo_fast.loss import backends, reference

DEVICES = {"cpp": "cpu", "triton": "cuda" if torch.cuda.is_available() else "cpu"}


@pytest.fixture(params=DEVICES)
def backend(request):
    reason = backends.unavailable(request.param, DEVICES[request.param])
    if reason:
        pytest.skip(reason)
    return request.param


def module(name: str):
    return backends.select(torch.device(DEVICES[name]), torch.float32, name)


def frames_first(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last_3d)


def odd_offset(x: Tensor) -> Tensor:
    """The same values one element off any alignment, with a gap after every row."""
    room = x.new_full((x.numel() // x.shape[-1] * (x.shape[-1] + 3) + 1,), float("nan"))
    view = room[1:].view(*x.shape[:-1], x.shape[-1] + 3)[..., : x.shape[-1]]
    return view.copy_(x)


LAYOUTS = {"BCFHW": Tensor.contiguous, "BFCHW": frames_first, "channels_last": channels_last, "odd": odd_offset}


def loop_log_ratio(policy: Tensor, ref: Tensor, target: Tensor, grid) -> np.ndarray:
    """E_p(reference) - E_p(policy) as it is defined, in 80 bits: the difference would cost float64 its last digits."""
    o, o_ref, tau = (x.double().numpy().astype(np.longdouble) for x in (policy, ref, target))
    gain = (o_ref - tau) ** 2 - (o - tau) ** 2
    table = np.empty((len(o), *grid))
    for index, box in cases.boxes(o.shape[1:], grid):
        table[(slice(None), *index)] = gain[(slice(None), *box)].mean((1, 2, 3, 4))
    return table


def assert_table(found: Tensor, truth: np.ndarray, terms: Tensor, grid, dtype) -> None:
    """Errors as a share of the mean magnitude of each patch's terms, which may cancel."""
    scale = cases.loop_error(terms.abs().double().sqrt(), torch.zeros_like(terms), grid)
    elements = terms[0].numel() / math.prod(grid)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    wrong = np.abs(found.double().cpu().numpy() - truth)
    assert np.all(wrong <= cases.table_tolerance(dtype, math.ceil(elements)) * scale)


def assert_gradient(found: Tensor, truth: np.ndarray) -> None:
    """As a vector: relative L2 distance, direction, and no drift to one side."""
    tolerance = cases.GRADIENT_TOLERANCE[found.dtype]
    found = found.double().cpu().numpy()
    norm = np.linalg.norm(truth)
    assert np.linalg.norm(found - truth) < tolerance * norm
    assert 1 - np.vdot(found, truth) / (np.linalg.norm(found) * norm) < tolerance**2 + 1e-14
    # rounding to nearest has no side; the interpreter cuts bf16 off, which is half a last place towards 0 at most
    assert abs(np.sum(found - truth)) < tolerance * np.sum(np.abs(truth))


def combinations() -> list[tuple]:
    """Every shape in every dtype and layout; of interpreted Triton's two slowest shapes each dtype and layout once."""
    found = itertools.product(DEVICES, enumerate(cases.SMALL), enumerate(cases.DTYPES), enumerate(LAYOUTS))
    return [
        (backend, *sizes, dtype, layout)
        for backend, (shape, sizes), (kind, dtype), (place, layout) in found
        if backend != "triton" or DEVICES[backend] != "cpu" or shape > 1 or kind == place
    ]


@pytest.mark.parametrize(("backend", "shape", "grid", "dtype", "layout"), combinations(), indirect=["backend"], ids=str)
def test_parity_with_a_loop_over_patches(backend, shape, grid, dtype, layout):
    kernels, device = module(backend), DEVICES[backend]
    policy, ref, target = cases.latents(shape, samples=2, dtype=dtype)
    # the target keeps its own layout: every tensor has its own strides
    views = LAYOUTS[layout](policy).to(device), LAYOUTS[layout](ref).to(device), target.to(device)
    error, log_ratio = cases.loop_error(policy, target, grid), loop_log_ratio(policy, ref, target, grid)
    residual = policy.double() - target.double()
    found = kernels.patch_error(views[0], views[2], grid)
    assert_table(found, error, residual.square(), grid, dtype)
    terms = (policy.double() - ref.double()) * (residual + ref.double() - target.double())
    assert_table(kernels.patch_log_ratio(*views, grid), log_ratio, terms, grid, dtype)
    grad = cases.rewards(grid, 2, found.dtype)[0]
    gradient = kernels.patch_error_backward(grad.to(device), views[0], views[2])
    assert gradient.dtype == dtype and gradient.stride() == torch.empty_like(views[0]).stride()
    assert_gradient(gradient, cases.loop_gradient(grad, policy, target))


MIXED = [three for three in itertools.product(cases.DTYPES, repeat=3) if three[1] in (three[0], three[2])]
MIXED += [(torch.bfloat16, torch.float32, torch.float16), (torch.float32, torch.float16, torch.float64)]


@pytest.mark.parametrize("dtypes", MIXED, ids=lambda three: "-".join(str(x)[6:] for x in three))
def test_parity_where_every_view_has_its_own_dtype(backend, dtypes):
    """Each is read as it is and widened: float64 sums if any is float64, the gradient in the prediction's dtype."""
    shape, grid, device = (3, 4, 5, 8), (2, 2, 3), DEVICES[backend]
    kernels = module(backend)
    views = [x.to(dtype) for x, dtype in zip(cases.latents(shape, 2, nearness=0.3), dtypes, strict=True)]
    policy, ref, target = views
    on_device = [x.to(device) for x in views]
    residual = policy.double() - target.double()
    terms = (policy.double() - ref.double()) * (residual + ref.double() - target.double())
    sums = torch.float64 if torch.float64 in dtypes else torch.float32
    assert_table(
        kernels.patch_log_ratio(*on_device, grid), loop_log_ratio(policy, ref, target, grid), terms, grid, sums
    )
    pair_sums = torch.float64 if torch.float64 in (dtypes[0], dtypes[2]) else torch.float32
    found = kernels.patch_error(on_device[0], on_device[2], grid)
    assert_table(found, cases.loop_error(policy, target, grid), residual.square(), grid, pair_sums)
    grad = cases.rewards(grid, 2, pair_sums)[0]
    gradient = kernels.patch_error_backward(grad.to(device), on_device[0], on_device[2])
    assert gradient.dtype == dtypes[0] and gradient.stride() == policy.stride()
    assert_gradient(gradient, cases.loop_gradient(grad, policy, target))


def test_parity_of_the_whole_call_with_a_wider_target(backend):
    """What a training step under autocast gives: predictions in bf16 beside a float32 target."""
    shape, grid, device = (3, 5, 7, 9), (2, 3, 4), DEVICES[backend]
    policy, ref, target = cases.latents(shape, nearness=0.1)
    policy, ref, target = policy.bfloat16().to(device), ref.bfloat16().to(device), target.float().to(device)
    labels = [x.to(device) for x in cases.rewards(grid)]
    cached = reference.patch_error(ref, target, grid)

    def run(name, *latents, **options):
        prediction = latents[0].clone().requires_grad_()
        with using_backend(name):
            out = gran_dpo(prediction, *latents[1:], *labels, **options)
            out.loss.backward()
        return out, prediction.grad

    truth, gradient = run("reference", policy.double(), target.double(), ref.double())
    for options in ({}, {"reference_error": cached}):
        out, found = run(backend, policy, target, None if options else ref, **options)
        assert found.dtype == torch.bfloat16 and out.loss.dtype == torch.float32
        torch.testing.assert_close(out.loss.double(), truth.loss, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(out.patch_logits.double(), truth.patch_logits, rtol=1e-3, atol=1e-3)
        assert (found.double() - gradient).norm() < cases.GRADIENT_TOLERANCE[torch.bfloat16] * gradient.norm()


def test_parity_of_expanded_inputs(backend):
    shape, grid, device = (3, 4, 5, 6), (2, 2, 3), DEVICES[backend]
    policy, ref, target = cases.latents(shape, samples=2, dtype=torch.float32)
    ref, target = ref[:1, :, :1].expand_as(ref), target[:, :, :, :1].expand_as(target)
    found = module(backend).patch_log_ratio(policy.to(device), ref.to(device), target.to(device), grid)
    truth = loop_log_ratio(policy, ref, target, grid)
    np.testing.assert_allclose(found.cpu(), truth, atol=3e-5)
    grad = cases.rewards(grid, 2)[0]
    gradient = module(backend).patch_error_backward(grad.to(device), ref.to(device), policy.to(device))
    assert_gradient(gradient, cases.loop_gradient(grad, ref, policy))


@pytest.mark.parametrize(
    ("shape", "grid"), [((3, 3, 40, 90), (2, 3, 4)), ((70, 2, 3, 6), (2, 1, 2)), ((2, 2, 30, 45), (1, 30, 45))]
)
def test_parity_where_a_patch_is_shared_by_several_programs(backend, shape, grid):
    policy, ref, target = cases.latents(shape, samples=2, dtype=torch.bfloat16, nearness=0.05)
    device = DEVICES[backend]
    found = module(backend).patch_log_ratio(policy.to(device), ref.to(device), target.to(device), grid)
    truth = loop_log_ratio(policy, ref, target, grid)
    terms = (policy.double() - ref.double()) * (policy.double() + ref.double() - 2 * target.double())
    assert_table(found, truth, terms, grid, torch.bfloat16)
    grad = cases.rewards(grid, 2)[0]
    gradient = module(backend).patch_error_backward(grad.to(device), policy.to(device), target.to(device))
    assert_gradient(gradient, cases.loop_gradient(grad, policy, target))
    factor = torch.tensor(-0.37, device=device)
    gradient = module(backend).gran_dpo_backward(factor, grad.to(device), policy.to(device), target.to(device))
    assert_gradient(gradient, cases.loop_gradient(-0.37 * grad, policy, target))


def test_equal_policy_and_reference_give_exact_zero(backend):
    policy, _, target = cases.latents((3, 5, 7, 9), samples=2, dtype=torch.bfloat16)
    policy, target = policy.to(DEVICES[backend]), target.to(DEVICES[backend])
    assert not module(backend).patch_log_ratio(policy, policy.clone(), target, (2, 3, 4)).any()


NUMBERS = (0.1, 1.0, 2.0, 5.0, 3.0, 0.0, 0.1, 1.0, 0.2, 0.0, 0.0, math.inf, math.inf)


def table_inputs(pairs: int, grid, dtype=torch.float64):
    log_ratio, video = cases.rewards(grid, 2 * pairs, dtype, seed=3)
    patch, _ = cases.rewards(grid, 2 * pairs, dtype)
    if pairs > 1:
        patch[0, 0, 0, 0] = video[-1] = float("nan")
    generator = torch.Generator().manual_seed(5)
    kappa = torch.rand(2, pairs, generator=generator, dtype=dtype)
    error, loser = torch.rand(2, *log_ratio.shape, generator=generator, dtype=dtype)
    return log_ratio, patch, video, kappa, error, loser


def assert_same_table(backend, inputs, *rest, tolerance=1e-12):
    """Against the reference in float64; `tolerance` is what the dtype of the inputs allows."""
    device = DEVICES[backend]
    found = module(backend).gran_dpo_table(*(None if x is None else x.to(device) for x in inputs), *rest)
    truth = reference.gran_dpo_table(*(None if x is None else x.double() for x in inputs), *rest)
    for one, other in zip(found, truth, strict=True):
        torch.testing.assert_close(one.cpu().double(), other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("link", reference.LINKS)
def test_parity_of_the_table_for_every_link(backend, link):
    inputs = table_inputs(3, (2, 3, 2))
    assert_same_table(backend, (*inputs[:3], None, None, None), (4, 5, 7, 5), link, NUMBERS)


@pytest.mark.parametrize(
    ("pairs", "grid"), [(1, (1, 1, 1)), (2, (2, 3, 4)), (40, (1, 2, 2)), (2, (5, 30, 31)), (3, (5, 15, 31))]
)
def test_parity_of_the_table_with_everything_in_use(backend, pairs, grid):
    numbers = (0.1, 0.7, 2.0, 5.0, 3.0, 0.5, 0.1, 1.5, 0.2, 0.3, 0.4, math.inf, math.inf)
    assert_same_table(backend, table_inputs(pairs, grid), (4, 5, 31, 33), "conservative", numbers)
    single = tuple(x.float() for x in table_inputs(pairs, grid))
    assert_same_table(backend, single, (4, 5, 31, 33), "conservative", numbers, tolerance=2e-5)
    # caps that some logits are beyond, and a weight for each pair
    log_ratio, patch, video, scale, error, loser = table_inputs(pairs, grid)
    weighted = torch.cat([scale, 2 * scale[:1]])
    bounded = log_ratio, patch, video, weighted, error, loser
    assert_same_table(backend, bounded, (4, 5, 31, 33), "poly", (*numbers[:-2], 0.05, 0.4))


def test_parity_of_the_table_without_labels_or_at_extremes(backend):
    log_ratio, patch, video, *_ = table_inputs(2, (2, 2, 2))
    rest = (None, None, None, (4, 5, 7, 5), "sigmoid")
    assert_same_table(backend, (log_ratio, None, video, *rest[:3]), *rest[3:], NUMBERS)
    assert_same_table(backend, (log_ratio, patch, None, *rest[:3]), *rest[3:], NUMBERS)
    ties = torch.zeros_like(patch), torch.full_like(video, float("nan"))
    assert_same_table(backend, (log_ratio, *ties, *rest[:3]), *rest[3:], NUMBERS)
    far = (log_ratio.float() * 1e6, patch.float(), video.float(), *rest[:3])
    found = module(backend).gran_dpo_table(
        *(x if x is None else x.to(DEVICES[backend]) for x in far), *rest[3:], NUMBERS
    )
    assert all(table.isfinite().all() for table in found)
    nothing = tuple(x[:0] for x in (log_ratio, patch, video))
    assert_same_table(backend, (*nothing, *rest[:3]), *rest[3:], NUMBERS)


@pytest.mark.parametrize(
    "objective", [GranDPO(), GranDPO(link="ipo", sft_weight=0.3, loser_guard="patch")], ids=("halo", "all")
)
def test_parity_of_the_whole_call(backend, objective):
    shape, grid, device = (3, 5, 7, 9), (2, 3, 4), DEVICES[backend]
    policy, ref, target = (x.to(device) for x in cases.latents(shape))
    labels = [x.to(device) for x in cases.rewards(grid, dtype=torch.float64)]

    def run(name):
        prediction = policy.clone().requires_grad_()
        with using_backend(name):
            out = gran_dpo(prediction, target, ref, *labels, objective=objective)
            out.loss.backward()
        return out.loss, out.patch_logits, out.video_logits, prediction.grad

    for found, truth in zip(run(backend), run("reference"), strict=True):
        torch.testing.assert_close(found, truth, rtol=1e-10, atol=1e-12)


def test_kernels_are_what_the_public_call_runs(backend, monkeypatch):
    kernels, calls = module(backend), []
    original = kernels.patch_log_ratio
    monkeypatch.setattr(kernels, "patch_log_ratio", lambda *args: calls.append(1) or original(*args))
    policy, ref, target = (x.to(DEVICES[backend]) for x in cases.latents((2, 2, 4, 4)))
    with using_backend(backend):
        patch_log_ratio(policy, target, ref, (1, 2, 2))
    assert calls
