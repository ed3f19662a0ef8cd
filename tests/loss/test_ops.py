"""The operators as PyTorch sees them: contracts, compilation, checkpointing, several ranks."""

import contextlib
import os
import socket
import subprocess
import sys

import cases
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from traffic import Traffic

from halo_fast import (
    PRESETS,
    AutoBeta,
    GranDPO,
    gran_dpo,
    gran_dpo_coefficients,
    patch_error,
    patch_log_ratio,
    patch_weighted_mse,
)
from halo_fast.loss import ops

SHAPE, GRID = (3, 4, 5, 6), (2, 2, 3)


def batch(samples=4, dtype=torch.float32, seed=0):
    policy, ref, target = cases.latents(SHAPE, samples, dtype, seed=seed)
    return policy.requires_grad_(), target, ref, *cases.rewards(GRID, samples)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_opcheck_of_the_patch_operators(dtype):
    policy, target, ref, patch_rewards, _ = batch(dtype=dtype)
    strided = policy.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    for prediction in (policy, strided):
        torch.library.opcheck(ops.patch_log_ratio, (prediction, ref, target, GRID))
        torch.library.opcheck(ops.patch_error, (prediction, target, GRID))
        torch.library.opcheck(ops.patch_error_backward, (patch_rewards, prediction.detach(), target))
        loss = torch.tensor(1.5)
        torch.library.opcheck(ops.attach_gradient, (loss, patch_rewards, prediction, target))
        factor = torch.tensor(1.5, dtype=patch_rewards.dtype)
        torch.library.opcheck(ops.gran_dpo_backward, (factor, patch_rewards, prediction.detach(), target))


@pytest.mark.parametrize("full", [False, True])
def test_opcheck_of_the_table(full):
    log_ratio, video = cases.rewards(GRID, seed=3)
    patch_rewards, _ = cases.rewards(GRID)
    optional = (torch.ones(2, 2), log_ratio.abs(), torch.ones_like(log_ratio)) if full else (None, None, None)
    numbers = (0.1, 1.0, 2.0, 5.0, 3.0, 0.0, 0.0, 1.0, 0.1, 0.5, 0.5)
    arguments = (log_ratio, patch_rewards, video, *optional, SHAPE, "conservative", numbers)
    torch.library.opcheck(ops.gran_dpo_table, arguments)


NUMBERS = (0.0, 1.0, 2.0, 5.0, 3.0, 0.0, 0.0, 1.0, 0.1)


@pytest.mark.parametrize("supervised", [0.0, 0.5])
def test_opcheck_of_the_whole_loss(supervised):
    policy, target, ref, *labels = batch()
    kappa = torch.ones(2, 2)
    arguments = (policy, ref, target, None, *labels, kappa, GRID, "sigmoid", (*NUMBERS, supervised, supervised))
    torch.library.opcheck(ops.gran_dpo_operator, arguments)


@pytest.mark.parametrize("supervised", [0.0, 0.5])
def test_the_direct_way_to_the_loss_is_the_operator(supervised):
    """Same bits, and only where the registered operator is not needed."""

    class Look(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    policy, target, ref, *labels = batch()
    seen = []
    objective = GranDPO(sft_weight=supervised, patch_sft_weight=supervised)
    results = []
    for mode in (contextlib.nullcontext(), Look()):
        with mode:
            out = gran_dpo(policy, target, ref, *labels, objective=objective)
            (gradient,) = torch.autograd.grad(3 * out.loss, policy, retain_graph=True)
            assert torch.equal(torch.autograd.grad(3 * out.loss, policy)[0], gradient)
        results.append((out.loss, gradient, out.log_ratio, out.patch_logits, out.video_logits, out.active))
        assert not any(x.requires_grad for x in results[-1][1:])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
    assert [name for name in seen if "halo_fast" in name] == [
        "halo_fast.gran_dpo.default",
        *["halo_fast.gran_dpo_backward.default"] * 2,
    ]


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_compiles_without_a_graph_break(name):
    torch.compiler.reset()
    policy, target, ref, patch_rewards, video_rewards = batch()
    ref = ref if PRESETS[name].needs_reference else None

    def step(policy, kappa):
        out = gran_dpo(policy, target, ref, patch_rewards, video_rewards, objective=name, kappa=kappa)
        return out.loss, out.metrics(), out

    kappa = torch.rand(2 if PRESETS[name].paired else 4)
    eager, metrics, _ = step(policy, kappa)
    compiled, same, out = torch.compile(step, fullgraph=True, backend="aot_eager")(policy, kappa)
    torch.testing.assert_close(compiled, eager)
    torch.testing.assert_close(same, metrics, equal_nan=True)
    torch.testing.assert_close(out.metrics(), metrics, equal_nan=True)
    torch.testing.assert_close(torch.autograd.grad(compiled, policy), torch.autograd.grad(eager, policy))


def test_inductor_compiles_the_call():
    torch.compiler.reset()
    policy, target, ref, *labels = batch()
    compiled = torch.compile(lambda o: gran_dpo(o, target, ref, *labels).loss, fullgraph=True)
    loss = gran_dpo(policy, target, ref, *labels).loss
    torch.testing.assert_close(compiled(policy), loss)
    torch.testing.assert_close(torch.autograd.grad(compiled(policy), policy), torch.autograd.grad(loss, policy))


def test_a_scheduled_beta_and_kappa_compile_once():
    torch.compiler.reset()
    policy, target, ref, *labels = batch()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(policy, beta, kappa):
        objective = GranDPO(video_beta=beta, patch_beta=0.5 * beta, patch_sft_weight=0.1)
        return gran_dpo(policy, target, ref, *labels, objective=objective, kappa=kappa).loss

    step(policy, torch.tensor(100.0), torch.ones(2))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for beta in (200.0, 500.0, 5000.0):
            kappa = torch.rand(2)
            objective = GranDPO(video_beta=beta, patch_beta=0.5 * beta, patch_sft_weight=0.1)
            expected = gran_dpo(policy, target, ref, *labels, objective=objective, kappa=kappa).loss
            torch.testing.assert_close(step(policy, torch.tensor(beta), kappa), expected)


def test_the_two_pass_form_compiles():
    torch.compiler.reset()
    policy, target, ref, *labels = batch()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def two_passes(policy):
        coefficients, _ = gran_dpo_coefficients(policy, target, ref, *labels)
        return patch_weighted_mse(policy, target, coefficients)

    expected = torch.autograd.grad(gran_dpo(policy, target, ref, *labels).loss, policy)
    torch.testing.assert_close(torch.autograd.grad(two_passes(policy), policy), expected)


def test_activation_checkpointing_recomputes_the_same_gradient():
    policy, target, ref, *labels = batch()
    expected = torch.autograd.grad(gran_dpo(policy, target, ref, *labels).loss, policy)
    loss = checkpoint(lambda o: gran_dpo(o, target, ref, *labels).loss, policy, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(loss, policy)[0], expected[0])


@pytest.mark.parametrize("guard", [None, "video"])
def test_there_is_no_second_derivative_and_it_says_so(guard):
    policy, target, ref, *labels = batch()
    loss = gran_dpo(policy, target, ref, *labels, objective=GranDPO(loser_guard=guard)).loss
    (gradient,) = torch.autograd.grad(loss, policy, create_graph=True)
    # beside a term that has one: it must not be taken for 0
    with pytest.raises(RuntimeError):
        torch.autograd.grad((gradient + policy.square()).sum(), policy)


def test_only_the_prediction_gets_a_gradient_and_the_table_is_all_that_is_kept():
    policy, target, ref, *labels = batch()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        loss = gran_dpo(policy, target, ref, *labels).loss
    inputs = {x.untyped_storage().data_ptr() for x in (policy, target, ref)}
    extra = {x.untyped_storage().data_ptr(): x.numel() for x in kept if x.untyped_storage().data_ptr() not in inputs}
    assert sum(extra.values()) == labels[0].numel()
    loss.backward()
    assert policy.grad is not None and target.grad is None and ref.grad is None


def test_autocast_changes_nothing():
    policy, target, ref, *labels = batch()
    plain = gran_dpo(policy, target, ref, *labels).loss
    with torch.autocast("cpu", torch.bfloat16):
        cast = gran_dpo(policy, target, ref, *labels).loss
    assert torch.equal(plain, cast)


def test_inference_mode_gives_the_value():
    policy, target, ref, *labels = batch()
    plain = gran_dpo(policy, target, ref, *labels)
    with torch.inference_mode():
        out = gran_dpo(policy, target, ref, *labels)
        assert torch.equal(out.loss, plain.loss) and not out.loss.requires_grad
        assert torch.equal(patch_log_ratio(policy, target, ref, GRID), plain.log_ratio)


@pytest.mark.parametrize("cached", [False, True])
def test_a_step_under_autocast_moves_no_more_than_its_bytes(cached):
    """The prediction in bf16 beside a float32 target, as a model under autocast gives: no cast, no copy."""
    noisy, ref, target = cases.latents((4, 4, 8, 8), 4, torch.float32)
    labels = cases.rewards(GRID, 4)
    model = nn.Conv3d(4, 4, 1)
    with torch.autocast("cpu", torch.bfloat16):
        prediction, reference = model(noisy), model(ref).detach()
    leaf = prediction.detach().requires_grad_()
    options = {"reference_error": patch_error(reference, target, GRID)} if cached else {}
    with Traffic(leaf.numel()) as traffic:
        loss = gran_dpo(leaf, target, None if cached else reference, *labels, **options).loss
        (gradient,) = torch.autograd.grad(loss, leaf)
    assert leaf.dtype == gradient.dtype == torch.bfloat16
    forward = 2 + 4 if cached else 2 + 2 + 4
    assert traffic.bytes <= 1.05 * leaf.numel() * (forward + 2 + 4 + 2)


def test_shapes_are_known_without_data():
    with torch.device("meta"):
        policy = torch.empty(4, 16, 13, 60, 90, dtype=torch.bfloat16)
        labels = torch.empty(4, 4, 3, 3), torch.empty(4)
        out = gran_dpo(policy, policy, policy, *labels)
        assert patch_log_ratio(policy, policy, policy, (4, 3, 3)).shape == (4, 4, 3, 3)
    assert out.patch_logits.shape == (2, 4, 3, 3) and out.video_logits.shape == (2,) and out.loss.shape == ()


def tiny_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv3d(3, 8, 3, padding=1), nn.SiLU(), nn.Conv3d(8, 3, 1)).double()


def loss_of(model, noisy, target, ref, patch_rewards, video_rewards):
    prediction = checkpoint(model, noisy, use_reentrant=False)
    return gran_dpo(prediction, target, ref, patch_rewards, video_rewards)


def rank_main(rank, world):
    """One rank's share of six pairs, one of them unlabelled: gradients and the adaptive beta equal the single
    process's.
    """
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    dist.init_process_group("gloo", rank=rank, world_size=world)
    noisy, ref, target = cases.latents(SHAPE, 12, nearness=0.3)
    patch_rewards, video_rewards = cases.rewards(GRID, 12, torch.float64)
    patch_rewards[[1, 7]], video_rewards[[1, 7]] = 0.0, 0.0
    data = (noisy, target, ref, patch_rewards, video_rewards)
    model = tiny_model()
    whole = loss_of(model, *data)
    whole.loss.backward()
    expected = [parameter.grad for parameter in model.parameters()]

    pairs = torch.arange(6).chunk(world)[rank]
    mine = [x[torch.cat([pairs, pairs + 6])] for x in data]
    sharded = tiny_model()
    fully_shard(sharded, mesh=dist.device_mesh.init_device_mesh("cpu", (world,)))
    for parallel in (DistributedDataParallel(tiny_model()), sharded):
        out = loss_of(parallel, *mine)
        total = out.num_pairs.clone()
        dist.all_reduce(total)
        (out.loss * out.num_pairs * world / total).backward()
        for parameter, truth in zip(parallel.parameters(), expected, strict=True):
            gradient = parameter.grad
            gradient = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
            torch.testing.assert_close(gradient, truth, rtol=1e-9, atol=1e-12)

    shared, alone = AutoBeta(), AutoBeta()
    shared.update(out.video_logits)
    betas = [torch.zeros(()) for _ in range(world)]
    dist.all_gather(betas, shared.beta)
    assert all(torch.equal(beta, betas[0]) for beta in betas)
    factor = torch.sigmoid(-whole.video_logits[whole.video_logits != 0].abs().float()).mean()
    torch.testing.assert_close(shared.beta, alone.beta * torch.exp(0.1 * (factor - 0.2)))
    dist.barrier()
    dist.destroy_process_group()


def test_two_ranks_with_ddp_and_fsdp2_equal_one_process():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen([sys.executable, __file__, str(rank), "2"], env=shared, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    errors = [rank.communicate()[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(errors)


def test_importing_is_light():
    """No triton, no shared library of ours, no CUDA context, none of the training dependencies."""
    program = (
        "import sys, halo_fast, torch\n"
        "heavy = {'triton', 'diffusers', 'transformers', 'accelerate', 'peft', 'pyarrow', 'halo_fast.kernels'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "assert not torch.cuda.is_initialized()\n"
        "assert 'kernels/_cpu' not in open('/proc/self/maps').read() if sys.platform == 'linux' else True\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


if __name__ == "__main__":
    rank_main(int(sys.argv[1]), int(sys.argv[2]))
    # a failed assertion has raised by now; what is left is the end of torch's own threads, which at times aborts
    os._exit(0)
