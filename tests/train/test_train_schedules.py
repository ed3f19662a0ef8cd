"""Two schedules with one gradient, activation memory and the plan."""

import dataclasses

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from tiny import tiny_wan
from torch import nn
from traffic import Traffic
from training import CONFIG, Plain, objective_with, quiet

from halo_fast.data import Pair
from halo_fast.errors import UserError
from halo_fast.families import family_of
from halo_fast.loss.functional import patch_error
from halo_fast.loss.objectives import GranDPO
from halo_fast.train import fit, memory, planner
from halo_fast.train import model as models
from halo_fast.train.adapters import adapters_off, trained_parameters
from halo_fast.train.draws import make_batch
from halo_fast.train.job import prepared_job
from halo_fast.train.schedules import batched, margin_first
from halo_fast.train.steps import run_batch

CPU = torch.device("cpu")
OBJECTIVES = {
    "halo": GranDPO(video_beta=100.0, patch_beta=20.0, patch_sft_weight=0.5),
    "guarded, with ties": GranDPO(video_beta=50.0, loser_guard="patch", patch_delta=1.0, sft_weight=0.3),
}


def gradients(parameters):
    found = torch.cat([parameter.grad.flatten() for parameter in parameters.values()])
    for parameter in parameters.values():
        parameter.grad = None
    return found


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("cached", [True, False])
def test_both_schedules_have_one_gradient(pairs, objective, cached):
    pipeline = tiny_wan()
    pipeline.transformer.double()
    family = family_of(pipeline)
    batch = make_batch(family, pairs, [(0, 0), (3, 0), (5, 1)], 0, CPU)
    batch = dataclasses.replace(batch, noisy=batch.noisy.double(), target=batch.target.double())

    def policy(part):
        return family.predict(pipeline.transformer, part.noisy, part.t, part.conditions)

    def reference(part):
        with adapters_off(pipeline.transformer):
            return policy(part)

    with trained_parameters(family, CONFIG) as parameters:
        torch.manual_seed(1)
        for parameter in parameters.values():
            parameter.data = parameter.data.double() + 0.05 * torch.randn(parameter.shape, dtype=torch.double)
        in_loop = reference
        if cached:
            with torch.no_grad():
                batch = dataclasses.replace(
                    batch, reference_error=patch_error(reference(batch), batch.target, (3, 2, 2))
                )
            in_loop = None
        arguments = in_loop, batch, OBJECTIVES[objective], "BCFHW", torch.Tensor.backward
        one = batched(policy, *arguments)
        expected = gradients(parameters)
        other = margin_first(policy, *arguments)
        found = gradients(parameters)
    assert expected.norm() > 1e-3 and (found - expected).norm() <= 1e-6 * expected.norm()
    torch.testing.assert_close(other.loss, one.loss, rtol=1e-9, atol=0)
    torch.testing.assert_close(other.error, one.error)


def _plain_pairs(family, generator):

    conditions = family.encode_prompts(["one", "three", "x"])
    return [
        Pair(
            torch.randn(2, 3, 2, 4, 4, generator=generator), one, torch.rand(2, 2, 2, 2, generator=generator),
            torch.full((2,), float("nan")),
        )
        for one in conditions
    ]  # fmt: skip


def test_both_schedules_train_alike(pipeline, pairs):
    one, other = (
        fit(pipeline, pairs, dataclasses.replace(CONFIG, schedule=schedule, max_train_steps=2), progress=quiet).log
        for schedule in ("batched", "margin_first")
    )
    for row, same in zip(one, other, strict=True):
        assert row == pytest.approx(same, rel=1e-3, abs=1e-5)


def test_the_loss_of_a_real_step_under_autocast_moves_no_more_than_its_bytes(pairs, monkeypatch):
    """The prediction in bf16, the target and cached errors in float32: read as they are, nothing cast or copied."""

    from halo_fast.train import schedules

    own, seen = schedules.gran_dpo, []

    def counted(**arguments):
        leaf, target = arguments["prediction"].detach().requires_grad_(), arguments["target"]
        with Traffic(leaf.numel()) as traffic:
            torch.autograd.grad(own(**arguments | {"prediction": leaf}).loss, leaf)
        # forward and backward read both, backward writes the gradient
        ideal = 3 * leaf.numel() * leaf.element_size() + 2 * target.numel() * target.element_size()
        seen.append((leaf.dtype, target.dtype, traffic.bytes / ideal))
        return own(**arguments)

    monkeypatch.setattr(schedules, "gran_dpo", counted)
    config = dataclasses.replace(
        CONFIG, mixed_precision="bf16", reference_draws=1, max_train_steps=1, schedule="batched"
    )
    # accelerate keeps the precision of the process's first training
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        fit(tiny_wan(), pairs, config, progress=quiet)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert seen and all(one[:2] == (torch.bfloat16, torch.float32) and 1 <= one[2] <= 1.05 for one in seen), seen


WAYS = {
    "plain": {},
    "full": {"gradient_checkpointing": "full"},
    "selective": {"gradient_checkpointing": "selective"},
    "offloaded": {"offload_activations": True},
}


def test_every_way_to_save_memory_has_the_same_gradient_and_really_works(pipeline, pairs):
    found, plans = {}, {}
    for way, settings in WAYS.items():
        config = dataclasses.replace(CONFIG, **settings)
        with prepared_job(pipeline, pairs, config) as job:
            batch = make_batch(job.family, pairs, [(0, 0), (1, 0)], 0, CPU)
            run_batch(job, batch)
            found[way] = gradients(job.parameters)
            plans[way] = job.plan
    for way in WAYS:
        torch.testing.assert_close(found[way], found["plain"], rtol=1e-5, atol=1e-7)
    # two blocks with two attentions each; LoRA makes three linear layers of one
    assert "4 of 4 attentions recomputed" in plans["full"].text
    assert "0 of 4 attentions recomputed" in plans["selective"].text
    assert "recomputed" not in plans["plain"].text and "in the CPU's memory" in plans["offloaded"].text
    assert plans["full"].peak < plans["selective"].peak < plans["plain"].peak


def test_kept_bytes_count_each_storage_once_and_no_weights():
    model = nn.Linear(8, 8)
    x = torch.randn(4, 8)

    def forward():
        hidden = model(x)  # x is saved for the weight's gradient
        return (
            hidden.exp() * hidden.exp()
        ).sum()  # both exp() results, saved twice each: once as output, once as factor

    assert memory.kept_bytes(forward, model, selective=False) == ((1 + 2) * 4 * 8 * 4, 4 * 8 * 4)


def test_selective_spares_the_products_that_sum_over_more_than_they_give(pairs):
    from torch.utils.flop_counter import FlopCounterMode

    pipeline = tiny_wan()
    spared, counts = 0, {}

    def count(layer, inputs, output):
        nonlocal spared
        if layer.in_features > layer.out_features:
            spared += 2 * layer.in_features * output.numel()

    linears = [
        layer for block in pipeline.transformer.blocks for layer in block.modules() if isinstance(layer, nn.Linear)
    ]
    assert any(layer.in_features > layer.out_features for layer in linears)
    for mode in ("full", "selective"):
        config = dataclasses.replace(CONFIG, rank=0, reference_draws=1, gradient_checkpointing=mode)
        with prepared_job(pipeline, pairs, config) as job:
            batch = make_batch(job.family, pairs, [(0, 0)], 0, CPU, limit=1, errors=job.reference_errors)
            with FlopCounterMode(display=False) as counter:
                run_batch(job, batch)
            counts[mode] = counter.get_total_flops()
    hooks = [layer.register_forward_hook(count) for layer in linears]
    with torch.no_grad():
        family_of(pipeline).predict(pipeline.transformer, batch.noisy, batch.t, batch.conditions)
    for hook in hooks:
        hook.remove()
    assert counts["full"] - counts["selective"] == spared > 0


@pytest.mark.parametrize("frames", [3, pytest.param(6, marks=pytest.mark.slow)])
@pytest.mark.parametrize("mode", ["none", "full", "selective"])
def test_predicted_peak_is_the_measured_one(frames, mode):
    from diffusers import WanTransformer3DModel

    from benchmarks.cases.memory import peak_bytes
    from halo_fast.train.steps import take_step

    pipeline = tiny_wan()
    torch.manual_seed(0)
    pipeline.transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=4, attention_head_dim=24, in_channels=4, out_channels=4, text_dim=16,
        freq_dim=32, ffn_dim=384, num_layers=4, rope_max_seq_len=32,
    )  # fmt: skip
    condition = family_of(pipeline).encode_prompts(["a cube"])[0]
    pairs = [
        Pair(torch.randn(2, 4, frames, 16, 16), condition, torch.rand(2, 3, 2, 2), torch.rand(2)) for _ in range(2)
    ]
    config = dataclasses.replace(CONFIG, reference_draws=1, train_batch_size=1, gradient_checkpointing=mode)
    with prepared_job(pipeline, pairs, config) as job:
        trained = sum(value.numel() * value.element_size() for value in job.parameters.values())
        weights = sum(value.numel() * value.element_size() for value in job.model.parameters())
        take_step(job, 0)
        for schedule in ("batched", "margin_first"):
            job.plan = job.plan.scheduled(schedule)
            # weights and moments are there before the step
            predicted = job.plan.peak - weights - 2 * trained
            assert peak_bytes(lambda: take_step(job, 1)) == pytest.approx(predicted, rel=0.2)


def test_checkpointing_that_does_nothing_is_refused(pairs, monkeypatch):
    pipeline = tiny_wan()
    monkeypatch.setattr(type(pipeline.transformer), "enable_gradient_checkpointing", lambda self, function: None)
    with pytest.raises(UserError, match="expected full to recompute layers .* recomputes nothing; set none"):
        fit(pipeline, pairs, dataclasses.replace(CONFIG, gradient_checkpointing="full"), progress=quiet)


ATTENTIONS = {
    "xformers_flash::flash_fwd": "(Tensor query, Tensor key, Tensor value) -> (Tensor, Tensor)",
    "xformers_flash3::flash_fwd": "(Tensor query, Tensor key, Tensor value) -> (Tensor, Tensor)",
    "_diffusers_flash_attn_3::_flash_attn_forward": "(Tensor q, Tensor k, Tensor v) -> (Tensor, Tensor)",
    "flash_attn::_flash_attn_forward": "(Tensor q, Tensor k, Tensor v) -> (Tensor, Tensor)",
}


@pytest.mark.parametrize("name", ATTENTIONS)
def test_selective_keeps_the_attention_of_other_packages(name):
    """Under the names of xformers', flash_attn's and diffusers' operators, whose own kernels need a GPU."""
    space, short = name.split("::")
    library, runs = torch.library.Library(space, "FRAGMENT"), []

    def attend(query, key, value, *others):
        runs.append(1)
        weight = (query @ key.transpose(-1, -2)).softmax(-1)
        return weight @ value, weight.logsumexp(-1)

    if not hasattr(getattr(torch.ops, space), short):
        library.define(short + ATTENTIONS[name])
    library.impl(short, attend, "CPU")
    operator = getattr(getattr(torch.ops, space), short).default

    class Block(nn.Linear):
        def forward(self, x):
            with torch.no_grad():
                hidden, _ = operator(x, x, x)
            return super().forward(hidden)

    counts = {}
    for mode in ("full", "selective"):
        runs.clear()
        memory.checkpointing(mode)(Block(8, 8), torch.randn(2, 4, 8)).sum().backward()
        counts[mode] = len(runs)
    assert counts == {"full": 2, "selective": 1}


@pytest.mark.parametrize("name", ["addmm", "_scaled_dot_product_flash_attention_backward", "_fused_sdp_choice"])
def test_selective_keeps_nothing_for_looking_like_an_attention(name):
    assert not memory.is_attention(getattr(torch.ops.aten, name).default)


def test_selective_without_a_known_attention_is_refused(pipeline, pairs, monkeypatch):
    monkeypatch.setattr(memory, "is_attention", lambda operator: False)
    with pytest.raises(UserError, match="selective keeps no attention output here"):
        fit(pipeline, pairs, dataclasses.replace(CONFIG, gradient_checkpointing="selective"), progress=quiet)


def test_plan_follows_the_free_memory(pipeline, pairs, monkeypatch):
    def schedule(free):
        monkeypatch.setattr(planner, "_free_memory", lambda device: free)
        with prepared_job(pipeline, pairs, CONFIG) as job:
            return job.plan.schedule, job.plan.text

    found = [schedule(2**power) for power in range(30, 9, -4)]
    names = [name for name, _ in found]
    assert names[0] == "batched" and names[-1] == "margin_first" and names == sorted(names)
    assert "may not fit" not in found[0][1]
    assert "may not fit; set train.gradient_checkpointing: selective" in found[-1][1]


def test_compiled_blocks_train_alike_with_few_graphs_and_the_model_is_put_back(pairs, monkeypatch):
    from torch._dynamo.testing import CompileCounter

    pipeline = tiny_wan()
    plain = fit(pipeline, pairs, CONFIG, progress=quiet)
    counts = []
    for steps in (2, 6):
        torch._dynamo.reset()
        counter = CompileCounter()
        monkeypatch.setattr(models, "COMPILER", counter)
        config = dataclasses.replace(CONFIG, compile=True, max_train_steps=steps)
        compiled = fit(pipeline, pairs, config, progress=quiet)
        counts.append(counter.frame_count)
    # base, adapter on and off, with and without a graph; two blocks share them, and more steps need no more
    assert 1 <= counts[0] == counts[1] <= 6
    for one, other in zip(compiled.log, plain.log, strict=True):
        assert one == pytest.approx(other, rel=1e-3, abs=1e-5)
    assert all(block._compiled_call_impl is None for block in pipeline.transformer.blocks)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["full", "selective"])
def test_inductor_trains_alike_and_compiles_nothing_once_warm(pairs, mode):
    from torch._dynamo.utils import counters

    from halo_fast.train.steps import take_step

    def losses(compile, steps):
        config = dataclasses.replace(CONFIG, compile=compile, gradient_checkpointing=mode)
        with prepared_job(tiny_wan(), pairs, config) as job:
            found, graphs = [], []
            for step in range(steps):
                # the reference runs in the loop: the adapter goes off and on in each step
                figures, norm = take_step(job, step)
                found.append([figures[0].loss.item(), norm.item()])
                graphs.append(counters["stats"]["unique_graphs"])
        return found, graphs

    torch._dynamo.reset()
    counters.clear()
    compiled, graphs = losses(True, 4)
    assert 0 < graphs[0] == graphs[-1] <= 6
    plain, _ = losses(False, 4)
    torch.testing.assert_close(torch.tensor(compiled), torch.tensor(plain), rtol=1e-4, atol=1e-6)


def test_blocks_stay_compiled_in_more_states_than_torch_allows_by_default(pairs, monkeypatch):
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter = CompileCounter()
    monkeypatch.setattr(models, "COMPILER", counter)
    before = torch._dynamo.config.recompile_limit
    config = dataclasses.replace(CONFIG, compile=True)
    with prepared_job(tiny_wan(), pairs, config) as job:

        def all_states():
            for schedule in ("batched", "margin_first"):
                job.plan = job.plan.scheduled(schedule)
                for size in (1, 2, 3):
                    run_batch(job, make_batch(job.family, pairs, [(k, 0) for k in range(size)], 0, CPU))
            return counter.frame_count

        assert before < all_states() == all_states()
    assert torch._dynamo.config.recompile_limit == before


def test_compiled_switch_without_effect_is_refused(pairs, monkeypatch):
    from peft.tuners.tuners_utils import BaseTunerLayer

    torch._dynamo.reset()
    monkeypatch.setattr(models, "COMPILER", "eager")
    monkeypatch.setattr(BaseTunerLayer, "enable_adapters", lambda self, enabled: None)
    with pytest.raises(UserError, match="switched to the reference, expected the base"):
        fit(tiny_wan(), pairs, dataclasses.replace(CONFIG, compile=True), progress=quiet)


def test_attention_backends(pipeline, pairs):
    native = fit(pipeline, pairs, dataclasses.replace(CONFIG, attention_backend="native", max_train_steps=1)).log
    assert native == fit(pipeline, pairs, dataclasses.replace(CONFIG, max_train_steps=1), progress=quiet).log
    for name in ("flash", "nonsense"):
        with pytest.raises(UserError, match=f"attention_backend: {name} cannot be used here .*; set null"):
            fit(pipeline, pairs, dataclasses.replace(CONFIG, attention_backend=name), progress=quiet)


def test_training_leaves_no_attention_backend_behind(pairs):
    """diffusers' own default, which all networks share, and what the user's network had."""
    pipeline = tiny_wan()
    processor = pipeline.transformer.blocks[0].attn1.processor
    processor._attention_backend = AttentionBackendName.NATIVE
    before = _AttentionBackendRegistry.get_active_backend()
    fit(
        pipeline,
        pairs,
        dataclasses.replace(CONFIG, attention_backend="_native_math", max_train_steps=1),
        progress=quiet,
    )
    assert _AttentionBackendRegistry.get_active_backend() == before
    assert processor._attention_backend == AttentionBackendName.NATIVE


def test_models_outside_diffusers_are_refused_what_they_lack():
    family = Plain()
    pairs = _plain_pairs(family, torch.Generator().manual_seed(0))
    objective = objective_with(patch_delta=0.0)
    for settings, setting in [
        ({"gradient_checkpointing": "full"}, "gradient_checkpointing"),
        ({"compile": True}, "compile"),
        ({"attention_backend": "native"}, "attention_backend"),
    ]:
        config = dataclasses.replace(CONFIG, objective=objective, rank=2, **settings)
        with pytest.raises(UserError, match=f"train.{setting}: .*; set "):
            fit(family, pairs, config, progress=quiet)
