"""Training of the weights themselves: against autograd and a second model, resume, export, evaluation's way back."""

import copy
import dataclasses
import math

import pytest
import torch
from tiny import output_hashes, run_to_cache, tiny_clips, tiny_config, tiny_wan
from training import ARMS, CONFIG, Plain, objective_with, quiet, run_model, same, snapshot, softplus

from halo_fast.data import Pair
from halo_fast.errors import UserError
from halo_fast.export.lora import load_trained
from halo_fast.families import family_of
from halo_fast.loss.objectives import build
from halo_fast.pipeline.export import export_run
from halo_fast.pipeline.run import Run
from halo_fast.pipeline.stages import train as stage
from halo_fast.pipeline.stages.train import train
from halo_fast.train import fit
from halo_fast.train.draws import make_batch
from halo_fast.train.job import prepared_job
from halo_fast.train.steps import run_batch, take_step

FULL = dataclasses.replace(CONFIG, rank=0, learning_rate=1e-3)
DRAWS = 3


def start(pipeline, pairs, config):
    return prepared_job(pipeline, pairs, config)


def plain_gradient(family, policy, reference, batch, objective):
    """Gradient of the video's and the patches' preferences by autograd, with a reference of its own."""
    count = len(batch.t) // 2
    with torch.no_grad():
        base = family.predict(reference, batch.noisy, batch.t, batch.conditions)
    output = family.predict(policy, batch.noisy, batch.t, batch.conditions)
    excess = ((output - batch.target) ** 2 - (base - batch.target) ** 2).mean(1)
    # grid (3, 2, 2) on latents (3, 4, 4)
    patches = excess.unfold(2, 2, 2).unfold(3, 2, 2).mean((-2, -1))
    margin, patch_margin = (table[:count] - table[count:] for table in (excess.mean((1, 2, 3)), patches))
    gap, patch_gap = (table[:count] - table[count:] for table in (batch.video_rewards, batch.patch_rewards))
    loss = objective.video_weight * softplus(0.5 * objective.video_beta * gap.sign() * margin).sum()
    wanted = patch_gap.abs() > objective.patch_delta
    terms = softplus(0.5 * objective.patch_beta * patch_gap.sign() * patch_margin) * wanted
    loss = loss + objective.patch_weight * (terms.sum((1, 2, 3)) / wanted.sum((1, 2, 3))).sum()
    return torch.autograd.grad(loss, list(policy.parameters()))


@pytest.mark.parametrize("draws", [None, DRAWS], ids=["in the loop", "cached"])
@pytest.mark.parametrize("schedule", ["batched", "margin_first"])
def test_gradient_is_that_of_autograd_with_a_second_model(pairs, draws, schedule):
    pipeline = tiny_wan()
    second = copy.deepcopy(pipeline.transformer)
    objective = build(objective_with(**ARMS["both"]))
    config = dataclasses.replace(
        FULL, objective=objective_with(**ARMS["both"]), reference_draws=draws, schedule=schedule
    )
    with start(pipeline, pairs, config) as ready:
        assert len(ready.parameters) == len(list(second.parameters()))
        with torch.no_grad():
            for parameter in ready.parameters.values():
                parameter.add_(0.05 * torch.randn(parameter.shape))
        batch = make_batch(
            ready.family, pairs, [(0, 0), (3, 1)], 0, torch.device("cpu"), limit=draws, errors=ready.reference_errors
        )
        run_batch(ready, batch)
        found = [parameter.grad for parameter in ready.parameters.values()]
        expected = plain_gradient(ready.family, pipeline.transformer, second, batch, objective)
        moved = run_model(pipeline)
        with ready.reference_mode():
            assert all(map(torch.equal, pipeline.transformer.parameters(), second.parameters()))
        assert torch.equal(run_model(pipeline), moved)
    norm = torch.cat([value.flatten() for value in expected]).norm()
    assert norm > 1e-2
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other.to(one), rtol=1e-3, atol=1e-5 * float(norm))


@pytest.mark.parametrize("draws", [None, DRAWS], ids=["in the loop", "cached"])
def test_it_starts_at_log_2_moves_and_leaves_the_pipeline_as_it_was(pairs, draws):
    pipeline = tiny_wan()
    before = snapshot(pipeline.transformer)
    config = dataclasses.replace(
        FULL, objective=objective_with(**ARMS["both"]), reference_draws=draws, max_train_steps=12, train_batch_size=6
    )
    result = fit(pipeline, pairs, config, progress=quiet)
    assert result.log[0]["loss"] == pytest.approx(1.25 * math.log(2), rel=1e-6)
    assert result.log[0]["rewards/margins"] == 0 and result.log[0]["model_mse"] == result.log[0]["ref_mse"]
    assert sum(row["loss"] for row in result.log[-3:]) / 3 < 1.2 * math.log(2)
    assert not result.lora and result.weights.keys() == before[0].keys()
    moved = [name for name, value in result.weights.items() if not torch.equal(value, before[0][name])]
    assert len(moved) == sum(1 for _ in pipeline.transformer.parameters())
    assert same(snapshot(pipeline.transformer), before)


def test_the_reference_stays_the_base_while_the_policy_moves(pipeline, pairs):
    base = run_model(pipeline)
    with start(pipeline, pairs, FULL) as ready:
        for step in range(3):
            take_step(ready, step)
        policy = run_model(pipeline)
        with pytest.raises(KeyError), ready.reference_mode():
            assert torch.equal(run_model(pipeline), base)
            raise KeyError
        assert torch.equal(run_model(pipeline), policy) and (policy - base).abs().max() > 1e-3
    assert torch.equal(run_model(pipeline), base)


def test_resume_is_exact_held_out_figures_and_previews_included(pipeline, pairs, tmp_path):
    config = dataclasses.replace(
        FULL, reference_draws=DRAWS, diagnostics_steps=3, heldout_draws=2, validation_prompts=["a cube"],
        validation_steps=2,
    )  # fmt: skip
    settings = {"heldout": pairs[:2], "generate": tiny_clips(num_inference_steps=2), "progress": quiet}
    whole = fit(pipeline, pairs, config, folder=tmp_path / "whole", **settings)

    class Stop(Exception):
        pass

    def stop(iterable, total, label):
        for item in iterable:
            if item == 5 and label == "train":
                raise Stop
            yield item

    with pytest.raises(Stop):
        fit(pipeline, pairs, config, folder=tmp_path / "cut", **(settings | {"progress": stop}))
    resumed = fit(pipeline, pairs, config, folder=tmp_path / "cut", **settings)
    assert resumed.log == whole.log
    assert all(torch.equal(value, whole.weights[name]) for name, value in resumed.weights.items())
    for name in ("log.csv", "diagnostics.csv", "previews/base/0.mp4", "previews/step_000006/0.mp4"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_chosen_layers_alone_are_trained(pipeline, pairs):
    before = snapshot(pipeline.transformer)[0]
    config = dataclasses.replace(FULL, target_modules=["attn1.to_q", "proj_out"], max_train_steps=1)
    weights = fit(pipeline, pairs, config, progress=quiet).weights
    moved = {name for name, value in weights.items() if not torch.equal(value, before[name])}
    layers = ("blocks.0.attn1.to_q", "blocks.1.attn1.to_q", "proj_out")
    assert moved == {f"{layer}.{part}" for layer in layers for part in ("weight", "bias")}
    with pytest.raises(UserError, match="target_modules: no layer of .* has a name ending with"):
        fit(pipeline, pairs, dataclasses.replace(FULL, target_modules=["to_nothing"]), progress=quiet)


def test_weights_that_are_not_float32_are_refused(pairs):
    pipeline = tiny_wan()
    pipeline.transformer.to(torch.bfloat16)
    with pytest.raises(UserError, match=r"rank: 0 trains the weights themselves, expected float32, got torch.bfloat16"):
        fit(pipeline, pairs, FULL, progress=quiet)


@pytest.mark.parametrize("draws", [None, DRAWS], ids=["in the loop", "cached"])
def test_mixed_precision_keeps_float32_weights_and_starts_at_log_2(pairs, draws):
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    config = dataclasses.replace(
        FULL, mixed_precision="bf16", objective=objective_with(**ARMS["both"]), reference_draws=draws
    )
    try:
        result = fit(tiny_wan(), pairs, config, progress=quiet)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert result.log[0]["loss"] == pytest.approx(1.25 * math.log(2), rel=1e-3)
    assert {value.dtype for value in result.weights.values()} == {torch.float32}


def test_a_switch_that_forgets_the_first_weights_is_refused(pipeline, pairs, monkeypatch):
    from contextlib import contextmanager, nullcontext

    @contextmanager
    def forgetful(*_):
        yield nullcontext

    monkeypatch.setattr("halo_fast.train.job.reference_switch", forgetful)
    with pytest.raises(UserError, match="switched to the reference, expected the base"):
        fit(pipeline, pairs, FULL, progress=quiet)


def test_model_outside_diffusers_is_trained_whole():
    family = Plain()
    pairs = [
        Pair(torch.randn(2, 3, 2, 4, 4), condition, torch.rand(2, 2, 2, 2), torch.rand(2))
        for condition in family.encode_prompts(["one", "three"])
    ]
    config = dataclasses.replace(FULL, objective=objective_with(patch_delta=0.0))
    weights = fit(family, pairs, config, progress=quiet).weights
    assert weights.keys() == {"mix.weight", "mix.bias"}
    assert not torch.equal(weights["mix.weight"], family.model["mix"].weight)


def test_stage_saves_what_diffusers_loads_and_a_second_run_the_same(tmp_path, monkeypatch):
    from diffusers import WanTransformer3DModel

    config = tiny_config(tmp_path, rank=0, learning_rate=1e-3, max_train_steps=3, heldout_share=0.0)
    run = run_to_cache(config)
    results, original = [], stage.fit
    monkeypatch.setattr(stage, "fit", lambda *args, **kwargs: results.append(original(*args, **kwargs)) or results[-1])
    train(config, run)
    outputs = output_hashes(run.path / "train")
    assert "model/diffusion_pytorch_model.safetensors" in outputs and not any("lora" in name for name in outputs)
    loaded = WanTransformer3DModel.from_pretrained(run.path / "train/model")
    state = loaded.state_dict()
    assert state.keys() == results[0].weights.keys()
    assert all(torch.equal(value, results[0].weights[name]) for name, value in state.items())
    # evaluation's way, and export's
    pipeline = tiny_wan()
    base = run_model(pipeline)
    load_trained(family_of(pipeline), run.path / "train/model")
    trained = run_model(pipeline)
    assert (trained - base).abs().max() > 1e-3
    exported = export_run(run.path)
    assert exported == run.path / "export/diffusers/transformer"
    pipeline.transformer = WanTransformer3DModel.from_pretrained(exported)
    assert torch.equal(run_model(pipeline), trained)
    with pytest.raises(UserError, match="trained the whole network"):
        export_run(run.path, "comfyui")
    train(config, Run(config, force=True))
    assert output_hashes(run.path / "train") == outputs
