"""Losses on latents: ours, eager PyTorch, torch.compile, and what public packages compute on equal tensors.

Three comparisons. "halo" is the whole Gran-DPO call, checks included, with the arithmetic of public Diffusion-DPO loops
taken patch by patch (re-created: no package has it). "diffusion_dpo" is what the preference losses of TRL and Liger
share with ours, -logsigmoid(beta/2 (margin of a - margin of b)): they start from one number a sample, so they get minus
the mean squared errors as log-probabilities. "supervised" is the weighted error of diffusers' training scripts.

"floor" is what the memory needs: two streaming additions over tensors as large as those that forward and backward must
move, the second into a new tensor, as a gradient is. "floor, no new memory" writes both into tensors that exist.
"""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from benchmarks import LATENTS
from benchmarks.harness import Bench, Case, Round, check_errors, device, graph_round, launches, missing, now, num_inputs
from halo_fast import GranDPO, gran_dpo, patch_weighted_mse
from halo_fast.loss import reference

GRID = (4, 3, 3)
VIDEO_BETA, PATCH_BETA = 500.0, 500.0 / 6.0
NUMBERS = (1, 1, 1, 1)  # a latent of one number: preference losses alone
FLOORS = ("floor", "floor, no new memory")
Loss = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def eager(prediction: Tensor, target: Tensor, ref: Tensor, patch_rewards: Tensor, video_rewards: Tensor) -> Tensor:
    """The factored formula in plain differentiable PyTorch, all in float32 (float64 for float64)."""
    o, tau, o_ref = (x.to(reference.accumulate_dtype(x.dtype)) for x in (prediction, target, ref))
    log_ratio = -reference.patch_mean((o - o_ref) * ((o - tau) + (o_ref - tau)), GRID)
    return pair_loss(log_ratio, prediction.shape[1:], patch_rewards, video_rewards)


def pair_loss(log_ratio: Tensor, latent_shape: Any, patch_rewards: Tensor, video_rewards: Tensor) -> Tensor:
    """H1 with the sigmoid link from the log-ratios, differentiable."""
    a, b = log_ratio.chunk(2)
    margin = a - b
    volume = reference.patch_sizes(latent_shape, GRID, margin)
    volume = volume / volume.sum()
    r_a, r_b = patch_rewards.to(margin.dtype).chunk(2)
    weight = (r_a - r_b).abs()
    v_a, v_b = video_rewards.to(margin.dtype).chunk(2)
    video = -logsigmoid(0.5 * VIDEO_BETA * (v_a - v_b).sign() * (volume * margin).flatten(1).sum(1))
    patch = -logsigmoid(0.5 * PATCH_BETA * (r_a - r_b).sign() * margin)
    return (video + (weight * patch).flatten(1).sum(1) / weight.flatten(1).sum(1)).mean()


def training_loop(
    prediction: Tensor, target: Tensor, ref: Tensor, patch_rewards: Tensor, video_rewards: Tensor
) -> Tensor:
    """As published Diffusion-DPO loops do it, by patch: two full error maps in float32, averaged, then subtracted."""
    model_losses = reference.patch_mean((prediction.float() - target.float()).pow(2), GRID)
    with torch.no_grad():
        ref_losses = reference.patch_mean((ref.float() - target.float()).pow(2), GRID)
    return pair_loss(ref_losses - model_losses, prediction.shape[1:], patch_rewards, video_rewards)


def ours(prediction: Tensor, target: Tensor, ref: Tensor, patch_rewards: Tensor, video_rewards: Tensor) -> Tensor:
    """The public call, all checks included."""
    return gran_dpo(prediction, target, ref, patch_rewards, video_rewards).loss


def mean_errors(prediction: Tensor, target: Tensor, ref: Tensor) -> tuple[Tensor, Tensor]:
    """Mean squared errors [2B] of policy and reference, in float32 (float64 for float64)."""
    o, tau, o_ref = (x.to(reference.accumulate_dtype(x.dtype)) for x in (prediction, target, ref))
    with torch.no_grad():
        base = (o_ref - tau).pow(2).flatten(1).mean(1)
    return (o - tau).pow(2).flatten(1).mean(1), base


def eager_preference(prediction: Tensor, target: Tensor, ref: Tensor, *_: Tensor) -> Tensor:
    """Diffusion-DPO, equation 14 of arXiv:2311.12908, in plain PyTorch; samples a win."""
    error, base = mean_errors(prediction, target, ref)
    a, b = (base - error).chunk(2)
    return -logsigmoid(0.5 * VIDEO_BETA * (a - b)).mean()


def trl_preference(prediction: Tensor, target: Tensor, ref: Tensor, *_: Tensor) -> Tensor:
    """TRL's sigmoid loss. CPOTrainer has it as a method of two arguments; on log-ratios it is DPO's."""
    from trl.experimental.cpo.cpo_trainer import CPOTrainer

    error, base = mean_errors(prediction, target, ref)
    a, b = (base - error).chunk(2)
    trainer = SimpleNamespace(
        alpha=0.0, beta=0.5 * VIDEO_BETA, loss_type="sigmoid", label_smoothing=0.0,
        accelerator=SimpleNamespace(device=a.device),
    )  # fmt: skip
    return CPOTrainer.cpo_loss(trainer, a, b)[0].mean()


def liger_preference(prediction: Tensor, target: Tensor, ref: Tensor, *_: Tensor) -> Tensor:
    """Liger's DPO loss on log-probabilities, the part behind its fused linear layer."""
    from liger_kernel.chunked_loss.dpo_loss import LigerFusedLinearDPOFunction

    error, base = mean_errors(prediction, target, ref)
    (a, b), (a_ref, b_ref) = (-error).chunk(2), (-base).chunk(2)
    return LigerFusedLinearDPOFunction.preference_loss_fn(a, b, error, a_ref, b_ref, beta=0.5 * VIDEO_BETA)[0]


def our_preference(prediction: Tensor, target: Tensor, ref: Tensor, _: Tensor, video_rewards: Tensor) -> Tensor:
    """The public call with the video's preference alone."""
    objective = GranDPO(video_beta=VIDEO_BETA, patch_weight=0.0)
    return gran_dpo(prediction, target, ref, None, video_rewards, objective=objective).loss


def eager_supervised(prediction: Tensor, target: Tensor, *_: Tensor) -> Tensor:
    """The mean squared error."""
    o, tau = (x.to(reference.accumulate_dtype(x.dtype)) for x in (prediction, target))
    return (o - tau).pow(2).mean()


def diffusers_supervised(prediction: Tensor, target: Tensor, *_: Tensor) -> Tensor:
    """The loss of diffusers' training scripts, with its own weights."""
    from diffusers.training_utils import compute_loss_weighting_for_sd3

    weight = compute_loss_weighting_for_sd3("none", torch.ones(len(target), 1, 1, 1, 1, device=target.device))
    return (weight.float() * (prediction.float() - target.float()) ** 2).flatten(1).mean(1).mean()


def our_supervised(prediction: Tensor, target: Tensor, ref: Tensor, patch_rewards: Tensor, _: Tensor) -> Tensor:
    """The same mean as a sum of patch errors weighted by the patches' shares of the volume."""
    volume = reference.patch_sizes(prediction.shape[1:], GRID, patch_rewards)
    share = (volume / volume.sum() / len(prediction)).expand_as(patch_rewards)
    return patch_weighted_mse(prediction, target, share)


LOSSES: dict[str, dict[str, Loss]] = {
    "halo": {"eager": eager, "torch.compile": eager, "training loop, re-created": training_loop, "ours": ours},
    "diffusion_dpo": {
        "eager": eager_preference, "torch.compile": eager_preference, "TRL": trl_preference,
        "Liger": liger_preference, "ours": our_preference,
    },
    "supervised": {
        "eager": eager_supervised, "torch.compile": eager_supervised, "diffusers": diffusers_supervised,
        "ours": our_supervised,
    },
}  # fmt: skip


def inputs(shape: tuple[int, ...], dtype: torch.dtype, num_pairs: int = 1, seed: int = 0) -> tuple[Tensor, ...]:
    """Prediction, target, reference near the prediction [2B, *shape], patch and video rewards; samples a win."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(3, 2 * num_pairs, *shape, generator=generator)
    prediction, target = noise[0].to(dtype), noise[1].to(dtype)
    ref = (prediction.float() + 0.02 * noise[2]).to(dtype)
    patch_rewards = torch.rand(2 * num_pairs, *GRID, generator=generator)
    video_rewards = torch.cat([torch.rand(num_pairs, generator=generator) + side for side in (1, 0)])
    data = tuple(x.to(device()) for x in (prediction, target, ref, patch_rewards, video_rewards))
    data[0].requires_grad_()
    return data


def gate(losses: dict[str, Loss], truth: Loss, data: tuple[Tensor, ...]) -> dict[str, float]:
    """Relative L2 error of each provider's gradient, after its loss has been compared too; the truth in float64."""
    prediction = data[0]
    wide = prediction.detach().double().requires_grad_()
    true_loss = truth(wide, data[1].double(), data[2].double(), *data[3:])
    (true_gradient,) = torch.autograd.grad(true_loss, wide)
    errors = {}
    for name, loss in losses.items():
        value = loss(*data)
        check_errors({f"{name}, loss": abs(value.item() - true_loss.item())}, 1e-3)
        (gradient,) = torch.autograd.grad(value, prediction)
        errors[name] = ((gradient.double() - true_gradient).norm() / true_gradient.norm()).item()
    return check_errors(errors, 1e-3 if prediction.dtype == torch.float32 else 2**-7)


def one_round(loss: Loss, data: tuple[Tensor, ...]) -> dict[str, float]:
    start = now()
    value = loss(*data)
    middle = now()
    gradient = torch.autograd.grad(value, data[0])
    end = now()
    del gradient
    return {"forward seconds": middle - start, "backward seconds": end - middle, "seconds": end - start}


def floor_round(data: tuple[Tensor, ...], out: Tensor, gradient: Tensor | None) -> dict[str, float]:
    prediction, target, ref = (x.detach() for x in data[:3])
    start = now()
    torch.add(prediction, ref, out=out)
    middle = now()
    gradient = torch.add(prediction, target, out=gradient)
    end = now()
    del gradient
    return {"forward seconds": middle - start, "backward seconds": end - middle, "seconds": end - start}


def rounds_of(losses: dict[str, Loss], sets: list[tuple[Tensor, ...]], floors: bool) -> dict[str, Round]:
    """A round of every provider: on CPUs one call, on GPUs a graph of one call for each set of inputs."""
    out = torch.empty_like(sets[0][1])
    if out.is_cuda:
        calls: dict[str, list[Callable[[], object]]] = {
            name: [lambda loss=loss, data=data: torch.autograd.grad(loss(*data), data[0]) for data in sets]  # type: ignore[misc]
            for name, loss in losses.items()
        }
        if floors:
            calls["floor, no new memory"] = [partial(floor_calls, data, out) for data in sets]
        return {name: graph_round(each) for name, each in calls.items()}
    rounds: dict[str, Round] = {name: partial(one_round, loss, sets[0]) for name, loss in losses.items()}
    if floors:
        rounds |= {name: partial(floor_round, sets[0], out, end) for name, end in zip(FLOORS, (None, out), strict=True)}
    return rounds


def floor_calls(data: tuple[Tensor, ...], out: Tensor) -> None:
    prediction, target, ref = (x.detach() for x in data[:3])
    torch.add(prediction, ref, out=out)
    torch.add(prediction, target, out=out)


def available(kind: str) -> dict[str, Loss]:
    """The losses of one comparison that can run here, the compiled one compiled."""
    losses = {name: loss for name, loss in LOSSES[kind].items() if not missing(name)}
    return losses | {"torch.compile": torch.compile(LOSSES[kind]["eager"])}


@contextmanager
def opened(kind: str, shape: tuple[int, ...], dtype: torch.dtype, num_pairs: int = 1) -> Iterator[Bench]:
    """The bench of one comparison on latents of one shape and dtype."""
    torch.compiler.reset()
    losses, data = available(kind), inputs(shape, dtype, num_pairs)
    input_bytes = sum(x.nbytes for x in data[:3])
    sets = [data]
    if data[0].is_cuda:
        sets += [inputs(shape, dtype, num_pairs, seed) for seed in range(1, num_inputs(input_bytes))]

    def count(provider: str) -> dict[str, float]:
        # forward reads all latents; backward reads prediction and target, and writes the gradient
        counts: dict[str, float] = {"ideal bytes": input_bytes // 3 * (5 if kind == "supervised" else 6)}
        if data[0].is_cuda and provider in losses:
            counts["launches"] = launches(lambda: torch.autograd.grad(losses[provider](*data), data[0]))
        return counts

    truth = LOSSES[kind]["eager"]
    errors = gate(losses, truth, data)
    yield Bench(rounds_of(losses, sets, kind == "halo"), lambda: errors, count, bases=("ours",))


def case(kind: str, latent: str, dtype: str, num_pairs: int = 1, slow: bool = False) -> Case:
    shape = LATENTS.get(latent, NUMBERS)
    providers = (*LOSSES[kind], *(FLOORS if kind == "halo" else ()))
    name = f"{kind} {latent} {dtype}"
    return Case("loss", name, providers, partial(opened, kind, shape, getattr(torch, dtype), num_pairs), slow)


QUICK = ("cogvideox", "wan")
CASES = [
    *(
        case("halo", latent, dtype, slow=latent not in QUICK)
        for latent, dtype in itertools.product(
            ("cogvideox", "wan", "wan-720p", "ltx", "videocrafter2"), ("float32", "bfloat16")
        )
    ),
    case("diffusion_dpo", "cogvideox", "bfloat16"),
    case("diffusion_dpo", "4096 pairs of one number", "float32", num_pairs=4096),
    case("supervised", "cogvideox", "bfloat16"),
]
