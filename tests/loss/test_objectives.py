"""Presets compared with direct transcriptions of their published formulas, conversions, and the adaptive beta."""

import math

import cases
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import logsigmoid, softplus

from halo_fast import PRESETS, AutoBeta, GranDPO, convert_beta, gran_dpo, timestep_weight
from halo_fast.loss.objectives import local_dpo_rewards, video_dpo_rewards

SHAPE = (4, 5, 6, 8)


def problem(dtype, samples=6, nearness=2e-3, seed=0, spread=0.5):
    policy, ref, target = cases.latents(SHAPE, samples, torch.float64, nearness, seed)
    # Winners and losers in no order, and predictions as near their target as a trained model's.
    policy, ref = target + spread * (policy - target), target + spread * (ref - target)
    video_rewards = cases.rewards((1, 1, 1), samples, torch.float64, seed + 1)[1]
    rounded = [x.to(dtype) for x in (policy, target, ref)]
    return rounded[0].requires_grad_(), rounded[1], rounded[2], video_rewards.to(dtype)


def mean(x):
    return x.flatten(1).mean(1)


def by_winner(values, video_rewards):
    """(winners, losers) of each pair: the two halves of the batch, swapped where b is the better one."""
    a, b = values.chunk(2)
    first = (video_rewards.chunk(2)[0] > video_rewards.chunk(2)[1]).reshape(-1, *[1] * (a.ndim - 1))
    return torch.where(first, a, b), torch.where(first, b, a)


def check(out, policy, formula, dtype):
    """``formula`` maps a float64 prediction to the published loss; the gradients must agree as well."""
    exact = policy.detach().double().requires_grad_()
    expected = formula(exact)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    assert out.loss.item() == pytest.approx(expected.item(), rel=tolerance, abs=tolerance)
    gradient, truth = (torch.autograd.grad(x, y)[0].double() for x, y in ((out.loss, policy), (expected, exact)))
    assert (gradient - truth).norm() < (1e-10 if dtype == torch.float64 else 1e-5) * truth.norm()


both = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


@both
def test_diffusion_dpo(dtype):
    """-log sigma(-beta/2 [(E_w - E_l) - (E_ref,w - E_ref,l)]), Wallace et al., arXiv 2311.12908, and its code."""
    policy, target, ref, video_rewards = problem(dtype)

    def formula(o):
        losses_w, losses_l = by_winner(mean((o - target.double()) ** 2), video_rewards)
        ref_w, ref_l = by_winner(mean((ref.double() - target.double()) ** 2), video_rewards)
        return -logsigmoid(-0.5 * 5000 * ((losses_w - losses_l) - (ref_w - ref_l))).mean()

    check(gran_dpo(policy, target, ref, None, video_rewards, objective="diffusion_dpo"), policy, formula, dtype)


@both
@pytest.mark.parametrize("constant", [True, False])
def test_flow_dpo(dtype, constant):
    """-log sigma(-beta_t/2 [...]) on velocities, beta_t = beta or beta (1-t)^2, Liu et al., arXiv 2501.13918."""
    policy, target, ref, video_rewards = problem(dtype, nearness=1e-2)
    t = torch.tensor([0.1, 0.5, 0.8], dtype=torch.float64)
    beta_t = 500 * (1 if constant else (1 - t) ** 2)

    def formula(o):
        losses_w, losses_l = by_winner(mean((target.double() - o) ** 2), video_rewards)
        ref_w, ref_l = by_winner(mean((target.double() - ref.double()) ** 2), video_rewards)
        return -logsigmoid(-beta_t / 2 * ((losses_w - ref_w) - (losses_l - ref_l))).mean()

    kappa = None if constant else timestep_weight("flow", "epsilon", 1 - t, t).to(dtype)
    out = gran_dpo(policy, target, ref, None, video_rewards, objective="flow_dpo", kappa=kappa)
    check(out, policy, formula, dtype)


@both
def test_video_dpo(dtype):
    """Diffusion-DPO with pair weights (p_max / sqrt(p_w p_l))^alpha, p from a histogram: arXiv 2412.14167, section
    3.3.
    """
    policy, target, ref, _ = problem(dtype)
    scores = torch.tensor([0.10, 0.105, 0.11, 0.31, 0.32, 0.325, 0.5, 0.9, 0.1, 0.3251], dtype=dtype)
    video_rewards = torch.tensor([0.105, 0.5, 0.9, 0.325, 0.11, 0.1], dtype=dtype)
    alpha, width = 0.72, 0.05
    histogram = {}
    for score in scores.tolist():
        place = math.floor((score - scores.min().item()) / width)
        histogram[place] = histogram.get(place, 0) + 1
    p = [histogram[math.floor((r - scores.min().item()) / width)] for r in video_rewards.tolist()]
    weight = torch.tensor(
        [(max(histogram.values()) / math.sqrt(p[i] * p[i + 3])) ** alpha for i in range(3)], dtype=torch.float64
    )

    def formula(o):
        losses_w, losses_l = by_winner(mean((o - target.double()) ** 2), video_rewards)
        ref_w, ref_l = by_winner(mean((ref.double() - target.double()) ** 2), video_rewards)
        return (weight * softplus(0.5 * 5000 * ((losses_w - losses_l) - (ref_w - ref_l)))).mean()

    weighted = video_dpo_rewards(video_rewards.double(), scores.double(), alpha, width)
    assert weighted[:3].abs().tolist() == pytest.approx(weight.tolist())
    assert torch.equal((weighted[:3] - weighted[3:]).sign(), (video_rewards[:3] - video_rewards[3:]).sign().double())
    check(gran_dpo(policy, target, ref, None, weighted, objective="video_dpo"), policy, formula, dtype)


@both
@pytest.mark.parametrize("segments", [5, 3])
def test_dense_dpo(dtype, segments):
    """-log sigma(-beta mean over labelled latent frames of l_f (s0_f - s1_f)), Wu et al., arXiv 2506.03517, eq. 7."""
    policy, target, ref, _ = problem(dtype, nearness=1e-2)
    labels = torch.tensor([[1, -1, 0, 1, 1], [0, -1, 1, 1, 0], [-1, -1, 0, 0, -1]])[:, :segments]
    edges = [k * 5 // segments for k in range(segments + 1)]
    per_frame = labels.repeat_interleave(torch.tensor(edges).diff(), 1).double()

    def formula(o):
        s = ((target.double() - o) ** 2 - (target.double() - ref.double()) ** 2).mean((1, 3, 4))
        s0, s1 = s.chunk(2)
        return -logsigmoid(-500 * (per_frame * (s0 - s1)).sum(1) / per_frame.abs().sum(1)).mean()

    patch_rewards = torch.cat([labels, torch.zeros_like(labels)])[:, :, None, None]
    check(gran_dpo(policy, target, ref, patch_rewards, None, objective="dense_dpo"), policy, formula, dtype)


@both
def test_local_dpo(dtype):
    """Two sigmoids, over the video and over the mask times the strength, and both errors of the winner: arXiv
    2601.04068.
    """
    policy, target, ref, video_rewards = problem(dtype, samples=2)
    mask = torch.rand(1, *SHAPE[1:], generator=torch.Generator().manual_seed(3)).double().to(dtype)
    mask[mask < 0.6] = 0
    strength, weights = 1 + (0.82 - 0.75) / 0.15, 1.7

    def formula(o):
        def errors(x):
            losses = (x - target.double()) ** 2
            masked = losses * mask.double() * strength * mask.numel() / mask.double().sum()
            return by_winner(mean(losses), video_rewards), by_winner(mean(masked), video_rewards)

        ((whole_w, whole_l), (mask_w, mask_l)), ((ref_w, ref_l), (ref_mask_w, ref_mask_l)) = (
            errors(o),
            errors(ref.double()),
        )
        scale = -0.5 * 5000 * weights
        dpo = -logsigmoid(scale * ((whole_w - whole_l) - (ref_w - ref_l)))
        masked = -logsigmoid(scale * ((mask_w - mask_l) - (ref_mask_w - ref_mask_l)))
        return (dpo + masked + 0.1 * weights * whole_w + 0.1 * weights * mask_w).mean()

    patch_rewards = local_dpo_rewards(mask.double(), video_rewards.double(), strength)
    kappa = torch.tensor([weights], dtype=dtype)
    out = gran_dpo(policy, target, ref, patch_rewards, video_rewards, objective="local_dpo", kappa=kappa)
    check(out, policy, formula, dtype)


@both
def test_reg_dpo(dtype):
    """softplus(beta' (d_w - d_l)) + r E_w with beta' 1000, r 1: arXiv 2511.01450."""
    policy, target, ref, video_rewards = problem(dtype)

    def formula(o):
        losses_w, losses_l = by_winner(mean((o - target.double()) ** 2), video_rewards)
        ref_w, ref_l = by_winner(mean((ref.double() - target.double()) ** 2), video_rewards)
        return (softplus(1000 * ((losses_w - ref_w) - (losses_l - ref_l))) + losses_w).mean()

    check(gran_dpo(policy, target, ref, None, video_rewards, objective="reg_dpo"), policy, formula, dtype)


@both
@pytest.mark.parametrize("mu", [0.9, 0.3])
def test_diffusion_sdpo(dtype, mu):
    """Diffusion-DPO, the loser's error sg(E_l) + lambda (E_l - sg E_l): arXiv 2511.03317, lambda for each pair."""
    policy, target, ref, video_rewards = problem(dtype)
    # one pair whose gradients agree, one whose oppose: both branches of lambda
    with torch.no_grad():
        policy[3] = target[3] + 0.4 * (policy[0] - target[0])
        policy[4] = target[4] - 0.4 * (policy[1] - target[1])

    def formula(o):
        residual_w, residual_l = by_winner(o - target.double(), video_rewards)
        losses_w, losses_l = mean(residual_w**2), mean(residual_l**2)
        ref_w, ref_l = by_winner(mean((ref.double() - target.double()) ** 2), video_rewards)
        g_w, g_l = (2 * residual.detach().flatten(1) / math.prod(SHAPE) for residual in (residual_w, residual_l))
        inner = (g_w * g_l).sum(1)
        scale = torch.where(inner > 0, ((1 - mu) * (g_w**2).sum(1) / inner).clamp(0, 1), 1.0)
        losses_l = losses_l.detach() + scale * (losses_l - losses_l.detach())
        return -logsigmoid(-0.5 * 5000 * ((losses_w - losses_l) - (ref_w - ref_l))).mean()

    objective = GranDPO(video_beta=5000.0, patch_weight=0.0, loser_guard="video", loser_guard_mu=mu)
    assert PRESETS["diffusion_sdpo"] == GranDPO(video_beta=5000.0, patch_weight=0.0, loser_guard="video")
    check(gran_dpo(policy, target, ref, None, video_rewards, objective=objective), policy, formula, dtype)


@both
def test_diffusion_kto(dtype):
    """w_y (1 - sigma(s beta (g - max(mean g, 0)))), g = E_ref - E, Li et al., arXiv 2404.04465 and its code."""
    for seed in (0, 5):  # a positive and a clamped KL estimate
        policy, target, ref, _ = problem(dtype, samples=5, seed=seed)
        desired = torch.tensor([1, 0, 0, 1, 1])
        weight = torch.where(desired == 1, 1.0, 1.33).double()

        def formula(o, target=target, ref=ref, desired=desired, weight=weight):
            g = mean((ref.double() - target.double()) ** 2) - mean((o - target.double()) ** 2)
            kl = g.mean().clamp(min=0).detach()
            return (weight * (1 - torch.sigmoid((2 * desired - 1) * 1000 * (g - kl)))).mean()

        labels = weight * (2 * desired - 1)
        check(gran_dpo(policy, target, ref, None, labels, objective="diffusion_kto"), policy, formula, dtype)


@both
def test_mapo(dtype):
    """E_w - beta log sigma(T (f(E_w) - f(E_l))), f(E) = aE / (e^{aE} - 1): arXiv 2406.06424 and its code."""
    policy, target, _, video_rewards = problem(dtype, nearness=0)
    with torch.no_grad():
        policy[3:] = target[3:] + 1.002 * (policy[:3] - target[:3])

    def formula(o):
        losses_w, losses_l = by_winner(mean((o - target.double()) ** 2), video_rewards)
        log_odds = 0.5 * losses_w / torch.expm1(0.5 * losses_w) - 0.5 * losses_l / torch.expm1(0.5 * losses_l)
        return losses_w.mean() - (0.1 * logsigmoid(log_odds * 1000)).mean()

    check(gran_dpo(policy, target, None, None, video_rewards, objective="mapo"), policy, formula, dtype)


@both
def test_rwr(dtype):
    """mean of score * weight * E, weight 1/(1-abar) on the x0 error: LiFT, Wang et al., arXiv 2412.04814."""
    policy, target, _, _ = problem(dtype, samples=3)
    score, abar = torch.tensor([1.0, 0.2, 0.7]).double(), torch.tensor([0.5, 0.9, 0.98]).double()

    def formula(o):
        return (score / (1 - abar) * mean((o - target.double()) ** 2)).mean()

    kappa = timestep_weight("sample", "v_prediction", abar.sqrt(), (1 - abar).sqrt())
    check(gran_dpo(policy, target, None, None, score, objective="rwr", kappa=kappa), policy, formula, dtype)


@both
def test_patch_dpo(dtype):
    """(1 - q_p) on the real sample's error and q_p on the generated one's, over positions: arXiv 2412.03177."""
    policy, target, _, _ = problem(dtype, samples=2)
    q = torch.rand(1, 2, 3, 4, generator=torch.Generator().manual_seed(1)).double()
    # 5 frames in 2 segments: 2 and 3
    fine = q.repeat_interleave(torch.tensor([2, 3]), 1).repeat_interleave(2, 2).repeat_interleave(2, 3)[:, None]

    def formula(o):
        real, generated = ((o - target.double()) ** 2).chunk(2)
        return (((1 - fine) * real).mean() + (fine * generated).mean()) / 2

    weights = torch.cat([1 - q, q])
    check(gran_dpo(policy, target, None, weights, None, objective="patch_dpo"), policy, formula, dtype)


def test_the_patch_term_bounds_the_video_term_from_above_when_all_signs_agree():
    policy, target, ref, video_rewards = problem(torch.float64, nearness=0.1)
    same = video_rewards[:, None, None, None].expand(-1, 5, 3, 4)
    objective = GranDPO(patch_beta=500.0)
    patch = gran_dpo(policy, target, ref, same, None, objective=objective).loss
    assert patch > gran_dpo(policy, target, ref, None, video_rewards, objective=objective).loss


@pytest.mark.parametrize("guard", ["video", "patch"])
def test_the_guard_keeps_the_winners_error_from_rising_to_first_order(guard):
    """A step -g in output space, shared by both samples, must not raise the winner's error; unguarded it does."""
    _, target, ref, _ = problem(torch.float64, samples=2)
    residual = target[0] - ref[0]
    target = torch.stack([ref[0] + residual, ref[1] + 3 * residual])  # the loser's error dwarfs the winner's
    video_rewards, patch_rewards = (
        torch.tensor([1.0, 0.0]),
        torch.tensor([1.0, 0.0])[:, None, None, None].expand(2, 5, 3, 4),
    )
    labels = (patch_rewards, None) if guard == "patch" else (None, video_rewards)

    def slope(objective):
        policy = ref.clone().requires_grad_()
        gradient = torch.autograd.grad(gran_dpo(policy, target, ref, *labels, objective=objective).loss, policy)[0]
        winner = 2 * (policy[0] - target[0]).detach()
        return -(gradient.sum(0) * winner).sum()

    assert slope(GranDPO()) > 0
    assert slope(GranDPO(loser_guard=guard)) <= 0


def test_head_conversions_agree():
    """The same model error seen in eps, x0 and v, for a variance-preserving and a flow schedule."""
    generator = torch.Generator().manual_seed(0)
    x0, eps, wrong = torch.randn(3, 4, *SHAPE, generator=generator, dtype=torch.float64)
    for signal, noise in ((0.6, 0.8), (0.7, 0.3)):
        flow = signal + noise == 1
        noisy = signal * x0 + noise * eps
        v = eps - x0 if flow else signal * eps - noise * x0
        guess = v + 0.1 * wrong
        # solve x_t = signal x0 + noise eps and the definition of v for the x0 and eps that the guess implies
        guess_x0 = noisy - noise * guess if flow else signal * noisy - noise * guess
        guess_eps = noisy + signal * guess if flow else noise * noisy + signal * guess
        head = "flow" if flow else "v_prediction"
        error = {
            head: mean((guess - v) ** 2),
            "sample": mean((guess_x0 - x0) ** 2),
            "epsilon": mean((guess_eps - eps) ** 2),
        }
        a, s = torch.full((4,), signal, dtype=torch.float64), torch.full((4,), noise, dtype=torch.float64)
        for source in error:
            for space in error:
                weight = timestep_weight(source, space, a, s)
                torch.testing.assert_close(weight * error[source], error[space], rtol=1e-10, atol=0)
    one, zero = torch.ones(1), torch.zeros(1)
    assert timestep_weight("sample", "v_prediction", one, zero).item() == 100.0
    # the model's own head weighs 1, at the ends of the schedule as well
    assert timestep_weight("sample", "sample", one, zero) == timestep_weight("epsilon", "epsilon", zero, one) == 1


@pytest.mark.parametrize("source", ["half_mean", "mean", "half_sum", "sum"])
def test_converted_betas_give_the_same_logit(source):
    policy, target, ref, video_rewards = problem(torch.float64)
    count = math.prod(SHAPE)
    squares = ((policy - target) ** 2 - (ref - target) ** 2).detach().flatten(1)
    reduced = squares.mean(1) if source.endswith("mean") else squares.sum(1)
    w, loser = by_winner(reduced, video_rewards)
    logit = -0.37 * (0.5 if source.startswith("half") else 1.0) * (w - loser)
    objective = GranDPO(video_beta=convert_beta(0.37, source, num_elements=count))
    torch.testing.assert_close(
        gran_dpo(policy, target, ref, None, video_rewards, objective=objective).video_logits, logit
    )
    there = convert_beta(convert_beta(0.37, source, num_elements=count), "half_mean", source, num_elements=count)
    assert there == pytest.approx(0.37)


def test_beta_between_mean_and_sum_needs_the_number_of_elements():
    assert convert_beta(500.0, "mean") == 1000.0
    with pytest.raises(ValueError, match="num_elements"):
        convert_beta(1.0, "half_sum")


def test_auto_beta_reaches_its_gradient_factor_and_continues_from_its_state():
    generator = torch.Generator().manual_seed(0)
    margins = 1e-3 * torch.randn(400, 256, generator=generator)
    auto = AutoBeta(initial=100.0, target=0.3, rate=1.0)
    for step, margin in enumerate(margins):
        if step == 200:
            state = auto.state_dict()
            auto = AutoBeta(initial=7.0, target=0.3, rate=1.0)
            auto.load_state_dict(state)
            saved = state["beta"].item()
            assert auto.beta.item() == saved
        auto.update(0.5 * auto.beta * margin)
    factor = torch.sigmoid(-(0.5 * auto.beta * margins).abs()).mean()
    assert factor.item() == pytest.approx(0.3, abs=0.01)
    assert GranDPO(video_beta=auto.beta).video_beta is auto.beta


def test_auto_beta_stays_where_nothing_is_labelled_and_within_its_bounds():
    auto = AutoBeta(initial=100.0, maximum=110.0, rate=1.0)
    auto.update(torch.zeros(8))
    auto.update(torch.full((8,), float("nan")))
    assert auto.beta == 100.0
    for _ in range(9):
        auto.update(torch.full((8,), 1e-3))
    assert auto.beta == 110.0
    with pytest.raises(ValueError, match="target"):
        AutoBeta(target=0.7)


def test_auto_beta_counts_by_labels_whatever_rounding_leaves_of_a_logit():
    # a label whose logit is 0 has a factor of one half; a tie counts nowhere, whatever its logit is
    logits, labelled = torch.tensor([0.0, 1e-9, -1e-9, 2.0, 5.0]), torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0])
    auto = AutoBeta(initial=100.0, target=0.2, rate=0.1)
    auto.update(logits, labelled)
    mean = (0.5 + 0.5 + 1 / (1 + math.exp(2))) / 3
    assert auto.beta.item() == pytest.approx(100 * math.exp(0.1 * (mean - 0.2)), rel=1e-5)
    again = AutoBeta(initial=100.0, target=0.2, rate=0.1)
    again.update(torch.where(logits.abs() < 1e-8, 0.0, logits), labelled)
    assert again.beta.item() == pytest.approx(auto.beta.item(), rel=1e-6)


def curve(loss_of, dtype):
    """20 AdamW steps of a tiny video model on fixed pairs; ``loss_of(prediction, reference, target, t)``."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv3d(4, 8, 3, padding=1), nn.SiLU(), nn.Conv3d(8, 4, 1)).to(dtype)
    frozen = nn.Sequential(nn.Conv3d(4, 8, 3, padding=1), nn.SiLU(), nn.Conv3d(8, 4, 1)).to(dtype)
    frozen.load_state_dict(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    generator, losses = torch.Generator().manual_seed(1), []
    videos = torch.randn(6, *SHAPE, generator=generator)
    for _ in range(20):
        t = torch.rand(3, generator=generator)
        noise = torch.randn(3, *SHAPE, generator=generator).repeat(2, 1, 1, 1, 1)
        weight = t.repeat(2)[:, None, None, None, None]
        noisy = ((1 - weight) * videos + weight * noise).to(dtype)
        with torch.no_grad():
            reference = frozen(noisy)
        loss = loss_of(model(noisy), reference, (noise - videos).to(dtype), t.to(dtype))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return np.array(losses)


WINNER_FIRST = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, 0.0])


def public_dpo_loop(beta):
    """The loss of the Diffusion-DPO and SD3 Flow-DPO training scripts, winners in the first half."""

    def loss(model_pred, ref_pred, target, t):
        model_losses = (model_pred - target).pow(2).mean(dim=[1, 2, 3, 4])
        model_losses_w, model_losses_l = model_losses.chunk(2)
        ref_losses = (ref_pred - target).pow(2).mean(dim=[1, 2, 3, 4])
        ref_losses_w, ref_losses_l = ref_losses.chunk(2)
        scale = beta * (1 - t) ** 2 if beta == 500 else beta
        inside_term = -0.5 * scale * ((model_losses_w - model_losses_l) - (ref_losses_w - ref_losses_l))
        return -1 * logsigmoid(inside_term).mean()

    return loss


def dense_loop(model_pred, ref_pred, target, t):
    """DenseDPO's loss on segment labels, as one would write it."""
    s = ((target - model_pred) ** 2 - (target - ref_pred) ** 2).mean((1, 3, 4))
    labels = torch.tensor([1.0, -1.0, 0.0, 1.0, 1.0], dtype=s.dtype)
    return -logsigmoid(-500 * (labels * (s[:3] - s[3:])).sum(1) / 4).mean()


def replaced(name):
    def loss(prediction, reference, target, t):
        if name == "dense_dpo":
            labels = torch.tensor([1.0, -1.0, 0.0, 1.0, 1.0])[None, :, None, None].expand(3, -1, -1, -1)
            patch_rewards = torch.cat([labels, torch.zeros_like(labels)])
            return gran_dpo(prediction, target, reference, patch_rewards, None, objective=name).loss
        kappa = (1 - t) ** 2 if name == "flow_dpo" else None
        return gran_dpo(prediction, target, reference, None, WINNER_FIRST, objective=name, kappa=kappa).loss

    return loss


@pytest.mark.parametrize(
    ("public", "name"),
    [(public_dpo_loop(5000), "diffusion_dpo"), (public_dpo_loop(500), "flow_dpo"), (dense_loop, "dense_dpo")],
    ids=["diffusion_dpo", "flow_dpo", "dense_dpo"],
)
def test_a_public_loop_with_its_loss_replaced_has_the_same_loss_curve(public, name):
    before, after = curve(public, torch.float64), curve(replaced(name), torch.float64)
    np.testing.assert_allclose(after, before, rtol=1e-9)
    assert before[0] == pytest.approx(math.log(2)) and np.ptp(before) > 0.05
    # in float32 the loop's own rounding of mean minus mean is what remains
    np.testing.assert_allclose(curve(replaced(name), torch.float32), before, rtol=1e-2)
