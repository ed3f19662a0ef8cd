"""Caps on the logits, the link poly and pair weights: autograd through a loop over groups is the truth, in float64."""

import itertools
import math

import cases
import numpy as np
import pytest
import torch

from halo_fast import GranDPO, gran_dpo, gran_dpo_coefficients, patch_error, using_backend
from halo_fast.loss import backends, reference
from halo_fast.loss.objectives import PooledDPO

SHAPE, GRID = (2, 3, 5, 7), (1, 2, 3)
NAN = float("nan")
CPU = torch.device("cpu")


@pytest.fixture(params=("reference", "cpp", "triton"))
def backend(request):
    if reason := backends.unavailable(request.param, CPU):
        pytest.skip(reason)
    return request.param


def batch(samples=6, dtype=torch.float64, seed=3):
    """Latents in ``dtype``, labels in float64 with one of each kind missing and one tied."""
    policy, ref, target = cases.latents(SHAPE, samples, dtype, 0.3, seed)
    patch, video = cases.rewards(GRID, samples, torch.float64, seed + 1)
    patch[0, 0, 0, 0], patch[0, 0, 1, 1], video[1] = NAN, patch[samples // 2, 0, 1, 1], NAN
    return policy.requires_grad_(), target, ref, patch, video


def phi(z, objective, cap):
    """phi of one logit by its published form; beyond the cap a number without a graph."""
    if cap is not None and z.item() > cap:
        z = torch.tensor(cap, dtype=torch.float64)
    a, sigma = objective.poly_alpha, 1 / (1 + torch.exp(-z))
    return {
        "sigmoid": -torch.log(sigma),
        "hinge": torch.clamp(1 - z, min=0),
        "ipo": (z - 0.5) ** 2,
        "kto": 1 - sigma,
        "poly": -torch.log(sigma) + a * (1 - sigma),
    }[objective.link]


def preference(rewards, a, b, gamma, delta):
    """Winner, loser and weight of a pair of labels; None for a tie."""
    gap = (rewards[a] - rewards[b]).item()
    if not abs(gap) > delta:
        return None
    return (a, b, gap**gamma) if gap > 0 else (b, a, (-gap) ** gamma)


def loop_loss(policy, target, ref, patch, video, objective, kappa, omega):
    """The mean loss, differentiable in ``policy``, and every logit by kind, from the definition of each group."""
    boxes = dict(cases.boxes(SHAPE, GRID))
    o, tau, o_ref = (x if x.dtype == torch.float64 else x.double() for x in (policy, target, ref))
    losses, logits = [], {"video": [], "patch": []}

    def error(sample, box=...):
        return ((o[sample] - tau[sample])[box] ** 2).mean()

    def gain(sample, box=...):
        return ((o_ref[sample] - tau[sample])[box] ** 2).mean() - error(sample, box)

    for a in range(len(o) // 2):
        b, terms, supervised, weighted = a + len(o) // 2, [], [], []
        beta_v, beta_p = (kappa[a] * beta / 2 for beta in (objective.video_beta, objective.patch_beta))
        if (found := preference(video, a, b, objective.video_gamma, objective.video_delta)) is not None:
            w, lost, weight = found
            z = beta_v * (gain(w) - gain(lost))
            logits["video"].append(z.item())
            terms.append(objective.video_weight * weight * phi(z, objective, objective.video_cap))
            supervised.append(objective.sft_weight * error(w))
        winners = []
        for index, box in boxes.items():
            labels = patch[(slice(None), *index)]
            if (found := preference(labels, a, b, objective.patch_gamma, objective.patch_delta)) is None:
                continue
            w, lost, weight = found
            z = beta_p * (gain(w, box) - gain(lost, box))
            logits["patch"].append(z.item())
            weighted.append((weight, phi(z, objective, objective.patch_cap)))
            winners.append(error(w, box))
        if weighted:
            total = sum(weight for weight, _ in weighted)
            terms.append(objective.patch_weight * sum(weight * value for weight, value in weighted) / total)
            supervised.append(objective.patch_sft_weight * sum(winners) / len(winners))
        if terms:
            losses.append(omega[a] * sum(terms) + sum(supervised))
    return sum(losses) / len(losses), logits


BETAS = {"video_beta": 6.0, "patch_beta": 4.0}
BOUNDED = {
    "both caps": GranDPO(**BETAS, video_cap=0.2, patch_cap=0.4),
    "video's cap": GranDPO(**BETAS, video_cap=0.1),
    "patches' cap": GranDPO(**BETAS, patch_cap=0.3, sft_weight=0.2, patch_sft_weight=0.3),
    "hinge": GranDPO(**BETAS, link="hinge", video_cap=0.2, patch_cap=0.4),
    "ipo": GranDPO(**BETAS, link="ipo", video_cap=0.1, patch_cap=0.4),
    "poly": GranDPO(**BETAS, link="poly", poly_alpha=1.7),
    "poly below 0": GranDPO(**BETAS, link="poly", poly_alpha=-1.0, patch_delta=0.4),
    "poly with caps": GranDPO(**BETAS, link="poly", poly_alpha=0.5, video_cap=0.2, patch_cap=0.4, sft_weight=0.2),
}
WEIGHTS = torch.tensor([0.6, 1.0, 1.4], dtype=torch.float64), torch.tensor([1.5, 0.25, 0.0], dtype=torch.float64)


def slow_here(backend, name, dtype):
    """Whether a case is left out: the interpreter takes a second a call, so it does all dtypes of one objective."""
    return backend == "triton" and name != "poly with caps" and (name, dtype) != ("patches' cap", torch.float32)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("name", BOUNDED)
def test_loss_and_gradient_equal_autograd_through_a_loop(backend, name, dtype):
    if slow_here(backend, name, dtype):
        pytest.skip("covered by the other backends")
    policy, target, ref, *labels = batch(dtype=dtype)
    objective = BOUNDED[name]
    exact = policy.detach().double().requires_grad_()
    for kappa, omega in (WEIGHTS,) if backend == "triton" else ((None, None), WEIGHTS):
        ones = torch.ones(3, dtype=torch.float64)
        expected, logits = loop_loss(
            exact, target, ref, *labels, objective, *(ones if one is None else one for one in (kappa, omega))
        )
        truth = torch.autograd.grad(expected, exact)[0]
        with using_backend(backend):
            out = gran_dpo(policy, target, ref, *labels, objective=objective, kappa=kappa, pair_weight=omega)
            found = torch.autograd.grad(out.loss, policy)[0]
        assert out.loss.item() == pytest.approx(expected.item(), rel=1e-11 if dtype == torch.float64 else 3e-6)
        assert found.dtype == dtype
        assert (found.double() - truth).norm() < 2 * cases.GRADIENT_TOLERANCE[dtype] * truth.norm()
        # the case says something: groups on both sides of each cap, and the logits themselves are not capped
        for kind, cap in (("video", objective.video_cap), ("patch", objective.patch_cap)):
            assert getattr(out, f"{kind}_logits").max().item() == pytest.approx(max(logits[kind]), rel=1e-4)
            if cap is not None:
                assert min(logits[kind]) < cap < max(logits[kind])
                assert min(abs(z - cap) for z in logits[kind]) > 1e-4
        assert out.num_pairs == 3


@pytest.mark.parametrize("name", BOUNDED)
def test_gradcheck(backend, name):
    if slow_here(backend, name, torch.float64):
        pytest.skip("covered by the other backends")
    policy, ref, target = cases.latents((1, 1, 3, 3), 4, nearness=0.3, seed=3)
    labels = cases.rewards((1, 2, 2), 4, torch.float64, seed=4)
    kappa, omega = (one[:2] for one in WEIGHTS)

    def loss(prediction):
        return gran_dpo(
            prediction, target, ref, *labels, objective=BOUNDED[name], kappa=kappa, pair_weight=omega
        ).loss  # fmt: skip

    with using_backend(backend):
        assert torch.autograd.gradcheck(loss, policy.requires_grad_(), atol=1e-6, fast_mode=backend == "triton")


def at_logit(z, dtype):
    """Log-ratios of one pair with one patch whose logits are exactly z at betas of 2, and its labels."""
    log_ratio = torch.tensor([z, 0.0], dtype=dtype).view(2, 1, 1, 1)
    rewards = torch.tensor([1.0, 0.0], dtype=dtype)
    return log_ratio, rewards.view(2, 1, 1, 1), rewards


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
@pytest.mark.parametrize("group", ("video", "patch"))
def test_at_the_cap_a_group_still_has_its_gradient_and_one_step_beyond_it_has_none(backend, group, dtype):
    kernels = backends.select(CPU, dtype, backend)
    cap = 0.75
    beyond = torch.nextafter(torch.tensor(cap, dtype=dtype), torch.tensor(1.0, dtype=dtype)).item()
    weights = {f"{one}_weight": float(one == group) for one in ("video", "patch")}
    zero = dict.fromkeys(reference.TableNumbers._fields, 0.0) | {"video_beta": 2.0, "patch_beta": 2.0} | weights
    for link in ("sigmoid", "poly") if backend == "triton" else reference.LINKS:
        caps = {f"{one}_cap": cap if one == group else math.inf for one in ("video", "patch")}
        numbers = reference.TableNumbers(**zero | caps)
        free = numbers._replace(video_cap=math.inf, patch_cap=math.inf)

        def table(z, numbers, link=link):
            log_ratio, patch, video = at_logit(z, dtype)
            found = kernels.gran_dpo_table(log_ratio, patch, video, None, None, None, (1, 1, 1, 1), link, numbers)
            return found[0].item(), found[1].flatten().tolist(), (found[2] if group == "video" else found[3]).item()

        # at the cap and below: as if there were none, to the last bit
        for z in (cap, 0.5, 0.0, -3.0):
            assert table(z, numbers) == table(z, free)
        at, over, far = table(cap, numbers), table(beyond, numbers), table(1e6, numbers)
        assert over[1] == far[1] == [0.0, 0.0]
        assert over[0] == far[0] == at[0] and (over[2], far[2]) == (pytest.approx(beyond), pytest.approx(1e6))
        # the other group has no cap
        other = numbers._replace(video_cap=numbers.patch_cap, patch_cap=numbers.video_cap)
        assert table(1.0, other) == table(1.0, free)
        # what is not a number stays visible
        loss, coefficients, _ = table(NAN, numbers)
        assert math.isnan(loss) and (link == "hinge" or all(map(math.isnan, coefficients)))


def test_a_pair_beyond_both_caps_has_no_gradient_but_counts_in_the_mean(backend):
    policy, target, ref, patch, video = batch()
    policy = policy.detach()
    # in pair 0 the policy is right about all labels and far beyond the cap: at a's target, far from b's
    video[0], video[3], patch[0], patch[3] = 1.0, 0.0, 1.0, 0.0
    policy[0], policy[3] = target[0], target[3] + 5.0
    policy.requires_grad_()
    objective = GranDPO(**BETAS, video_cap=1.0, patch_cap=1.0)
    with using_backend(backend):
        out = gran_dpo(policy, target, ref, patch, video, objective=objective)
        gradient = torch.autograd.grad(out.loss, policy)[0]
        coefficients, _ = gran_dpo_coefficients(policy, target, ref, patch, video, objective=objective)
    assert out.active.tolist() == [1.0, 1.0, 1.0]
    assert not gradient[[0, 3]].any() and gradient[[1, 4]].any()
    # margin first: a sample whose coefficients are all 0 needs no backward pass
    assert not coefficients[[0, 3]].any() and coefficients[[1, 4]].any()
    rest = [1, 2, 4, 5]
    others = gran_dpo(*(x.detach()[rest] for x in (policy, target, ref, patch, video)), objective=objective)
    capped = 2 * math.log1p(math.exp(-1.0))
    assert out.loss.item() == pytest.approx((capped + 2 * others.loss.item()) / 3, rel=1e-12)


def test_ties_and_missing_labels_are_at_0_below_every_cap(backend):
    policy, target, ref, patch, video = batch()
    objective = GranDPO(**BETAS, video_cap=1e-9, patch_cap=1e-9, patch_sft_weight=0.1)
    with using_backend(backend):
        out = gran_dpo(policy, target, ref, patch, video, objective=objective)
        gradient = torch.autograd.grad(out.loss, policy)[0]
        assert out.patch_logits[0, 0, 0, 0] == out.patch_logits[0, 0, 1, 1] == out.video_logits[1] == 0
        # the tie's patch is untouched by preference and supervision alike
        boxes = dict(cases.boxes(SHAPE, GRID))
        only = gran_dpo(policy, target, ref, patch, None, objective=objective)
        only_gradient = torch.autograd.grad(only.loss, policy)[0]
        for index in ((0, 0, 0), (0, 1, 1)):
            assert not only_gradient[(0, *boxes[index])].any() and not only_gradient[(3, *boxes[index])].any()
        assert gradient.isfinite().all()


def test_cached_errors_of_the_reference_give_the_same_loss_and_the_same_zeros(backend):
    policy, target, ref, *labels = batch()
    objective, omega = BOUNDED["both caps"], WEIGHTS[1]
    results = []
    with using_backend(backend):
        for given in ({"reference": ref}, {"reference_error": patch_error(ref, target, GRID)}):
            arguments = (policy, target, given.get("reference"), *labels)
            out = gran_dpo(*arguments, objective=objective, reference_error=given.get("reference_error"),
                           pair_weight=omega)  # fmt: skip
            results.append((out.loss, torch.autograd.grad(out.loss, policy)[0]))
    (loss, gradient), (cached_loss, cached) = results
    torch.testing.assert_close(cached_loss, loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(cached, gradient, rtol=1e-9, atol=1e-12)
    assert torch.equal(cached == 0, gradient == 0) and (gradient == 0).any()


@pytest.mark.parametrize("backend", ("reference", "cpp"))
def test_no_cap_weights_of_one_and_alpha_0_change_no_bit(backend):
    """A cap above every logit is the same loss too, and so is what is given by default."""
    policy, target, ref, *labels = batch(dtype=torch.float32)
    plain = GranDPO(**BETAS)
    same = {
        "caps": (GranDPO(**BETAS, video_cap=1e6, patch_cap=1e6), None),
        "poly": (GranDPO(**BETAS, link="poly"), None),
        "weights": (plain, torch.ones(3)),
    }
    with using_backend(backend):
        # kappa of 1 in both, so that betas are multiplied alike
        one = torch.ones(3)
        truth = gran_dpo(policy, target, ref, *labels, objective=plain, kappa=one)
        gradient = torch.autograd.grad(truth.loss, policy)[0]
        for objective, omega in same.values():
            out = gran_dpo(policy, target, ref, *labels, objective=objective, kappa=one, pair_weight=omega)
            assert torch.equal(out.loss, truth.loss)
            assert torch.equal(torch.autograd.grad(out.loss, policy)[0], gradient)


def test_poly_always_pulls_towards_the_winner_from_alpha_minus_1_on():
    z = torch.linspace(-30, 30, 2001, dtype=torch.float64)
    for alpha in (-1.0, -0.5, 0.0, 3.0):
        assert (reference.link(z, "poly", alpha)[1] < 0).all()
    assert (reference.link(z, "poly", -1.1)[1] > 0).any()


def test_a_large_table_of_several_programs_is_bounded_too():
    """Triton takes two launches there, and C++ several blocks."""
    grid = (3, 40, 41)
    log_ratio, _ = cases.rewards(grid, 4, torch.float64, seed=3)
    patch, video = cases.rewards(grid, 4, torch.float64)
    scale = torch.rand(3, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    numbers = reference.TableNumbers(0.4, 0.7, 2.0, 5.0, 3.0, 0.5, 0.1, 1.5, 0.2, 0.0, 0.0, 1e-3, 0.8)
    found = [
        backends.select(CPU, torch.float64, name).gran_dpo_table(
            log_ratio, patch, video, scale, None, None, (4, 3, 40, 41), "poly", numbers
        )
        for name in ("reference", "cpp", "triton")
        if backends.unavailable(name, CPU) is None
    ]
    for tables in found[1:]:
        for one, truth in zip(tables, found[0], strict=True):
            torch.testing.assert_close(one, truth, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("normalize", (True, False))
def test_pooled_objectives_cap_their_two_logits(normalize):
    policy, target, ref, patch, video = batch()
    omega, kappa = WEIGHTS[1], WEIGHTS[0]
    objective = PooledDPO(
        video_beta=6.0, patch_beta=20.0, video_cap=0.2, patch_cap=0.1, normalize=normalize, link="poly", poly_alpha=0.6
    )
    losses, caught = [], []
    for a, b in ((0, 3), (1, 4), (2, 5)):
        gain = {s: (ref[s] - target[s]) ** 2 - (policy[s] - target[s]) ** 2 for s in (a, b)}
        pool = torch.zeros(SHAPE, dtype=torch.float64)
        for index, box in cases.boxes(SHAPE, GRID):
            gap = (patch[(a, *index)] - patch[(b, *index)]).item()
            pool[box] = 0.0 if math.isnan(gap) else gap
        pool = pool / (pool.abs().sum() if normalize else pool.numel())
        pooled = objective.patch_beta * kappa[a] / 2 * (pool * (gain[a] - gain[b])).sum()
        groups = [(pooled, objective.patch_cap)]
        if (gap := (video[a] - video[b]).item()) and not math.isnan(gap):
            whole = objective.video_beta * kappa[a] / 2 * math.copysign(1, gap) * (gain[a] - gain[b]).mean()
            groups.append((whole, objective.video_cap))
        caught += [z.item() > cap for z, cap in groups]
        losses.append(omega[a] * sum(phi(z, objective, cap) for z, cap in groups))
    expected = sum(losses) / 3
    out = gran_dpo(policy, target, ref, patch, video, objective=objective, kappa=kappa, pair_weight=omega)
    torch.testing.assert_close(out.loss, expected, rtol=1e-11, atol=0)
    truth = torch.autograd.grad(expected, policy)[0]
    torch.testing.assert_close(torch.autograd.grad(out.loss, policy)[0], truth, rtol=1e-9, atol=1e-13)
    assert any(caught) and not all(caught)


def test_caps_and_weights_compile_into_one_graph():
    torch.compiler.reset()
    policy, target, ref, *labels = batch(dtype=torch.float32)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def loss(prediction, omega):
        objective = BOUNDED["poly with caps"]
        return gran_dpo(prediction, target, ref, *labels, objective=objective, pair_weight=omega).loss

    for omega in (WEIGHTS[1], WEIGHTS[0]):
        compiled = loss(policy, omega)
        out = gran_dpo(policy, target, ref, *labels, objective=BOUNDED["poly with caps"], pair_weight=omega)
        torch.testing.assert_close(compiled, out.loss)
        gradients = (torch.autograd.grad(one, policy)[0] for one in (compiled, out.loss))
        torch.testing.assert_close(*gradients)


WRONG = {
    "cap of 0": ({"video_cap": 0.0}, ValueError, "video_cap must be finite and above 0; got 0.0"),
    "negative cap": ({"patch_cap": -1.0}, ValueError, "patch_cap must be finite and above 0"),
    "infinite cap": ({"patch_cap": math.inf}, ValueError, "patch_cap must be finite"),
    "cap of text": ({"video_cap": "1.5"}, TypeError, "video_cap must be a number; got str"),
    "alpha": ({"link": "poly", "poly_alpha": -1.5}, ValueError, "poly_alpha must be finite and at least -1; got -1.5"),
    "alpha without poly": ({"poly_alpha": 0.5}, ValueError, "poly_alpha must be 0 with link 'sigmoid'.*poly"),
    "smoothing of poly": ({"link": "poly", "label_smoothing": 0.1}, ValueError, "label_smoothing must be 0"),
}


@pytest.mark.parametrize("case", WRONG)
def test_bad_bounds_are_named(case):
    changed, error, message = WRONG[case]
    for objective in (GranDPO, PooledDPO):
        with pytest.raises(error, match=message):
            objective(**changed)


def test_bad_pair_weights_are_named():
    policy, target, ref, patch, video = batch()
    for weight, words in (
        (torch.ones(6), r"pair_weight must have shape \(3,\)"),
        (torch.tensor([1.0, NAN, 1.0]), "pair_weight must be finite"),
        (torch.tensor([1.0, -0.5, 1.0]), "pair_weight must be at least 0; got -0.5"),
    ):
        with pytest.raises(ValueError, match=words):
            gran_dpo(policy, target, ref, patch, video, pair_weight=weight)
    for objective, reference_given in (("diffusion_kto", ref), ("mapo", None), ("rwr", None)):
        with pytest.raises(ValueError, match="pair_weight must be left out"):
            gran_dpo(
                policy, target, reference_given, None, video, objective=objective, pair_weight=torch.ones(3)
            )  # fmt: skip
    # products of everything that a pair weight meets
    for guard, cap in itertools.product((None, "video"), (None, 0.5)):
        objective = GranDPO(loser_guard=guard, patch_cap=cap)
        out = gran_dpo(policy, target, ref, patch, video, objective=objective, pair_weight=torch.zeros(3))
        assert out.loss == 0 and out.num_pairs == 3
        assert not np.any(torch.autograd.grad(out.loss, policy)[0].numpy())
