"""Training: the start, one step against plain formulas, the adapter switch, resume, export, and what must stop it."""

import csv
import dataclasses
import json
import math

import pytest
import torch
from safetensors.torch import load_file
from tiny import output_hashes, run_to_cache, tiny_config, tiny_wan
from training import (
    ARMS,
    CONFIG,
    Plain,
    objective_with,
    quiet,
    run_model,
    same,
    snapshot,
    softplus,
    with_random_adapter,
)

from halo_fast.data import Pair
from halo_fast.errors import UserError
from halo_fast.families.wan import Wan
from halo_fast.loss.objectives import build
from halo_fast.pipeline.run import Run
from halo_fast.pipeline.stages.train import train
from halo_fast.train import adapters_off, fit


class Spy(Wan):
    """The Wan family, recording what the model was given and gave."""

    def __init__(self, pipeline):
        super().__init__(pipeline)
        self.calls = []

    def predict(self, model, noisy, t, conditions):
        output = super().predict(model, noisy, t, conditions)
        if len(noisy) == 1:  # the planner runs one sample
            return output
        self.calls.append((noisy, t, conditions["prompt_embeds"], output.detach().clone(), torch.is_grad_enabled()))
        return output


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_starts_at_log_2_and_follows_the_plain_formula(pipeline, pairs, arm):
    config = dataclasses.replace(CONFIG, max_train_steps=2, objective=objective_with(**ARMS[arm]))
    objective = build(config.objective)
    spy = Spy(pipeline)
    log = fit(spy, pairs, config, progress=quiet).log
    preference = objective.video_weight + objective.patch_weight
    for row, expected in zip(log, plain_losses(spy, pairs, objective), strict=True):
        assert row["loss"] == pytest.approx(sum(expected), rel=1e-4)
    supervised = plain_losses(spy, pairs, objective)[0][1]
    assert log[0]["loss"] - supervised == pytest.approx(preference * math.log(2), rel=1e-5, abs=1e-6)
    assert log[0]["rewards/margins"] == log[0]["patch/margins"] == 0
    assert log[0]["rewards/accuracies"] == log[0]["implicit_acc"] == log[0]["patch/accuracies"] == 0.5
    assert log[0]["learning_rate"] == CONFIG.learning_rate / 2
    if preference:
        assert log[1]["rewards/margins"] != 0
    else:
        # no preference, no forward pass of the reference: the start's four and one policy pass a step
        assert len(spy.calls) == 4 + 2


def plain_losses(spy, pairs, objective):
    """(preference, supervised) of both steps in float64, straight from the formulas, for the inputs of the model."""
    losses = []
    steps = [index for index, call in enumerate(spy.calls) if call[4]]
    for index in steps:
        noisy, t, _, output, _ = spy.calls[index]
        reference = spy.calls[index - 1][3] if objective.video_weight or objective.patch_weight else output
        count = len(noisy) // 2
        preference = supervised = 0.0
        for place in range(count):
            pair, noise = owner(pairs, noisy[place], noisy[count + place], t[place])
            errors = [
                [
                    ((prediction[side * count + place].double() - (noise - pair.latents[side].double())) ** 2).mean(0)
                    for side in range(2)
                ]
                for prediction in (output, reference)
            ]
            excess = [policy - base for policy, base in zip(*errors, strict=True)]
            margin = excess[0] - excess[1]
            gap = (pair.video_rewards[0] - pair.video_rewards[1]).item()
            z = -objective.video_beta / 2 * math.copysign(1, gap) * margin.mean()
            preference += objective.video_weight * softplus(-z)
            supervised += objective.sft_weight * errors[0][0 if gap > 0 else 1].mean()
            terms, winners = [], []
            for f in range(3):
                for h in range(2):
                    for w in range(2):
                        gap = (pair.patch_rewards[0, f, h, w] - pair.patch_rewards[1, f, h, w]).item()
                        if abs(gap) <= objective.patch_delta:
                            continue
                        box = (f, slice(2 * h, 2 * h + 2), slice(2 * w, 2 * w + 2))
                        z = -objective.patch_beta / 2 * math.copysign(1, gap) * margin[box].mean()
                        terms.append(softplus(-z))
                        winners.append(errors[0][0 if gap > 0 else 1][box].mean())
            preference += objective.patch_weight * sum(terms) / len(terms)
            supervised += objective.patch_sft_weight * sum(winners) / len(winners)
        losses.append((float(preference) / count, float(supervised) / count))
    return losses


def owner(pairs, noisy_a, noisy_b, t):
    """The pair behind two noisy samples and the noise they share; fails if they share none."""
    for pair in pairs:
        a, b = (
            (noisy.double() - (1 - t.double()) * x) / t.double()
            for noisy, x in zip((noisy_a, noisy_b), pair.latents, strict=True)
        )
        if (a - b).abs().max() * t < 1e-4:
            return pair, a
    raise AssertionError("the two samples of a pair do not share their noise and time")


def test_both_samples_share_noise_time_and_prompt(pipeline, pairs):
    spy = Spy(pipeline)
    fit(spy, pairs, dataclasses.replace(CONFIG, max_train_steps=3), progress=quiet)
    for noisy, t, embeds, _, _ in spy.calls:
        count = len(noisy) // 2
        assert torch.equal(t[:count], t[count:]) and torch.equal(embeds[:count], embeds[count:])
        for place in range(count):
            pair, _ = owner(pairs, noisy[place], noisy[count + place], t[place])
            assert torch.equal(embeds[place, : len(pair.conditions["prompt_embeds"])], pair.conditions["prompt_embeds"])


def test_noise_of_a_visit_does_not_depend_on_the_batch(pipeline, pairs):
    seen = []
    for steps, size in ((6, 2), (3, 4)):
        spy = Spy(pipeline)
        config = dataclasses.replace(CONFIG, max_train_steps=steps, train_batch_size=size)
        fit(spy, pairs, config, progress=quiet)
        seen.append(torch.cat([noisy[: len(noisy) // 2] for noisy, *_, grad in spy.calls if grad]))
    assert torch.equal(*seen)
    # two epochs of six pairs: all noisy samples differ, so the second epoch had noise of its own
    assert len(seen[0].flatten(1).unique(dim=0)) == 12


def test_adapter_off_is_the_base_and_everything_is_as_before_even_after_an_exception():
    pipeline = tiny_wan()
    base = run_model(pipeline)
    with_random_adapter(pipeline.transformer)
    on = run_model(pipeline)
    assert not torch.equal(on, base)
    frozen = [p for name, p in pipeline.transformer.named_parameters() if "blocks.0" in name and "lora" in name]
    for parameter in frozen:
        parameter.requires_grad_(False)
    flags = {name: p.requires_grad for name, p in pipeline.transformer.named_parameters()}
    with pytest.raises(KeyError), adapters_off(pipeline.transformer):
        assert torch.equal(run_model(pipeline), base)
        with adapters_off(pipeline.transformer):
            pass
        assert torch.equal(run_model(pipeline), base)
        raise KeyError
    assert torch.equal(run_model(pipeline), on)
    assert {name: p.requires_grad for name, p in pipeline.transformer.named_parameters()} == flags
    assert any(flags.values()) and not all(flags[name] for name in flags if "lora" in name)


def test_pipeline_is_left_as_it_was_whatever_happens(pairs):
    pipeline = tiny_wan()
    pipeline.transformer.blocks[0].train()
    before = snapshot(pipeline.transformer)
    fit(pipeline, pairs, dataclasses.replace(CONFIG, gradient_checkpointing="full"), progress=quiet)
    assert same(snapshot(pipeline.transformer), before)
    assert not pipeline.transformer.is_gradient_checkpointing

    def broken(iterable, total, label):
        yield 0
        raise KeyError

    with pytest.raises(KeyError):
        fit(pipeline, pairs, CONFIG, progress=broken)
    assert same(snapshot(pipeline.transformer), before)


def test_dropout_tells_policy_and_reference_not_apart(pairs):
    pipeline = tiny_wan()
    pipeline.transformer.blocks[0].attn1.to_out[1].p = 0.5
    pipeline.transformer.train()
    log = fit(pipeline, pairs, CONFIG, progress=quiet).log
    assert log[0]["model_mse"] == log[0]["ref_mse"] and log[0]["rewards/margins"] == 0
    assert all(module.training for module in pipeline.transformer.modules())


def test_model_whose_adapter_switch_does_nothing_is_refused(pipeline, pairs, monkeypatch):
    from peft.tuners.tuners_utils import BaseTunerLayer

    monkeypatch.setattr(BaseTunerLayer, "enable_adapters", lambda self, enabled: None)
    with pytest.raises(UserError, match="switched to the reference, expected the base"):
        fit(pipeline, pairs, CONFIG, progress=quiet)


def test_model_with_an_adapter_already_is_refused(pairs):
    pipeline = tiny_wan()
    with_random_adapter(pipeline.transformer)
    with pytest.raises(UserError, match="expected one without adapters"):
        fit(pipeline, pairs, CONFIG, progress=quiet)


def test_preferences_are_learned(pipeline, pairs):
    config = dataclasses.replace(
        CONFIG, max_train_steps=40, learning_rate=1e-2, objective=objective_with(**ARMS["both"])
    )
    log = fit(pipeline, pairs[:4], config, progress=quiet).log
    last = log[-8:]
    assert sum(row["loss"] for row in last) / 8 < 0.8 * 1.25 * math.log(2)
    assert sum(row["rewards/accuracies"] for row in last) / 8 >= 0.9
    assert sum(row["patch/accuracies"] for row in last) / 8 >= 0.6


@pytest.mark.parametrize("alpha", [4, 8, 6])
def test_exported_lora_loads_and_gives_the_trained_output(pairs, tmp_path, alpha):
    pipeline = tiny_wan()
    trained = []

    def at_the_end(iterable, total, label):
        yield from iterable
        trained.append(run_model(pipeline))

    result = fit(pipeline, pairs, dataclasses.replace(CONFIG, lora_alpha=alpha), progress=at_the_end)
    pipeline.save_lora_weights(
        tmp_path,
        transformer_lora_layers={name.removeprefix("transformer."): value for name, value in result.lora.items()},
    )
    saved = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    assert saved.keys() == result.lora.keys()
    fresh = tiny_wan()
    base = run_model(fresh)
    fresh.load_lora_weights(str(tmp_path))
    assert (trained[0] - base).abs().max() > 1e-3
    if alpha == 6:  # alpha / rank is no power of two, so folding it in rounds
        torch.testing.assert_close(run_model(fresh), trained[0], rtol=1e-5, atol=1e-6)
    else:
        assert torch.equal(run_model(fresh), trained[0])


def test_ffn_can_be_trained_too(pipeline, pairs):
    config = dataclasses.replace(CONFIG, max_train_steps=1, target_modules=["to_q", "net.0.proj", "net.2"])
    names = {name.split("blocks.1.")[1] for name in fit(pipeline, pairs, config).lora if "blocks.1." in name}
    layers = ("attn1.to_q", "attn2.to_q", "ffn.net.0.proj", "ffn.net.2")
    assert names == {f"{layer}.lora_{side}.weight" for layer in layers for side in "AB"}


class Stop(Exception):
    pass


def stop_before(step):
    def cut(iterable, total, label):
        for item in iterable:
            if item == step:
                raise Stop
            yield item

    return cut


def test_resumed_at_any_step_equals_undisturbed(pipeline, pairs, tmp_path):
    whole = fit(pipeline, pairs, CONFIG, folder=tmp_path / "whole", progress=quiet)
    for step in (1, 3, 5):
        folder = tmp_path / str(step)
        with pytest.raises(Stop):
            fit(pipeline, pairs, CONFIG, folder=folder, progress=stop_before(step))
        # what a kill in the middle of a checkpoint leaves: a temporary file
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        (folder / "checkpoints/.step_000099.safetensors.1.tmp").write_bytes(b"cut off")
        resumed = fit(pipeline, pairs, CONFIG, folder=folder, progress=quiet)
        assert resumed.log == whole.log
        assert all(torch.equal(value, whole.lora[name]) for name, value in resumed.lora.items())
        assert (folder / "log.csv").read_bytes() == (tmp_path / "whole/log.csv").read_bytes()
    rows = list(csv.DictReader((tmp_path / "whole/log.csv").open()))
    assert [row["step"] for row in rows] == [str(step) for step in range(1, 7)]
    assert {"loss", "grad_norm", "learning_rate", "rewards/margins", "rewards/accuracies"} <= rows[0].keys()
    in_memory = fit(pipeline, pairs, CONFIG, progress=quiet)
    assert in_memory.log == whole.log


def test_checkpoints_of_other_settings_are_refused(pipeline, pairs, tmp_path):
    fit(pipeline, pairs, CONFIG, folder=tmp_path, progress=quiet)
    with pytest.raises(UserError, match="made with learning_rate 0.005, now it is 0.001"):
        fit(pipeline, pairs, dataclasses.replace(CONFIG, learning_rate=1e-3), folder=tmp_path, progress=quiet)
    with pytest.raises(UserError, match="made with pairs 6, now it is 5"):
        fit(pipeline, pairs[:5], CONFIG, folder=tmp_path, progress=quiet)


def test_loss_that_is_not_finite_stops_before_anything_is_saved(pipeline, pairs, tmp_path):
    config = dataclasses.replace(CONFIG, checkpointing_steps=3, logging_steps=3)
    # finite latents whose squared errors overflow, and latents that are not finite themselves
    for scale, message in ((1e30, r"train: loss is (nan|inf) at step [12]"), (float("nan"), "pair 5: latents are not")):
        spoilt = dataclasses.replace(pairs[5], latents=pairs[5].latents * scale)
        with pytest.raises(UserError, match=message):
            fit(pipeline, [*pairs[:5], spoilt], config, folder=tmp_path, progress=quiet)
    assert not list(tmp_path.glob("checkpoints/*")) and not (tmp_path / "log.csv").exists()


def test_unlabelled_patches_and_videos_count_as_ties(pipeline, pairs):
    nan = float("nan")
    unlabelled = [
        dataclasses.replace(pair, video_rewards=pair.video_rewards * nan, patch_rewards=pair.patch_rewards.clone())
        for pair in pairs
    ]
    for pair in unlabelled:
        pair.patch_rewards[1, 0] = nan
    log = fit(
        pipeline, unlabelled, dataclasses.replace(CONFIG, objective=objective_with(**ARMS["both"])), progress=quiet
    ).log
    assert log[0]["loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert log[0]["video/ties"] == 1 and log[0]["patch/ties"] >= 1 / 3
    assert all(math.isfinite(row["loss"]) for row in log)


def test_grid_finer_than_the_latents_and_no_pairs_are_refused(pipeline, pairs):
    fine = dataclasses.replace(pairs[0], patch_rewards=torch.rand(2, 3, 8, 8))
    with pytest.raises(UserError, match=r"grid: at most \(3, 4, 4\) patches on these latents, got \(3, 8, 8\)"):
        fit(pipeline, [fine], CONFIG, progress=quiet)
    with pytest.raises(UserError, match="pairs: training needs at least one"):
        fit(pipeline, [], CONFIG, progress=quiet)


def test_bf16_base_trains_float32_adapters(pairs):
    pipeline = tiny_wan()
    pipeline.transformer.to(torch.bfloat16)
    result = fit(pipeline, pairs, dataclasses.replace(CONFIG, objective=objective_with(**ARMS["both"])), progress=quiet)
    assert {value.dtype for value in result.lora.values()} == {torch.float32}
    # kernels may differ with and without a graph, so in bfloat16 policy and reference agree up to rounding only
    assert result.log[0]["loss"] == pytest.approx(1.25 * math.log(2), rel=1e-3)


def test_mixed_precision_computes_in_bf16_and_leaves_the_model_in_float32(pairs):
    from accelerate.state import AcceleratorState

    pipeline = tiny_wan()
    before, exact = run_model(pipeline), fit(pipeline, pairs, CONFIG, progress=quiet)
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        mixed = fit(pipeline, pairs, dataclasses.replace(CONFIG, mixed_precision="bf16"), progress=quiet)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert mixed.log[0]["model_mse"] != exact.log[0]["model_mse"]
    assert mixed.log[0]["model_mse"] == pytest.approx(exact.log[0]["model_mse"], rel=2e-2)
    assert {value.dtype for value in mixed.lora.values()} == {torch.float32}
    assert torch.equal(run_model(pipeline), before)


def test_model_outside_diffusers_trains_through_the_same_interface():
    family = Plain()
    conditions = family.encode_prompts(["one", "three"])
    pairs = [Pair(torch.randn(2, 3, 2, 4, 4), c, torch.rand(2, 2, 2, 2), torch.rand(2)) for c in conditions]
    objective = objective_with(patch_delta=0.0)
    result = fit(family, pairs, dataclasses.replace(CONFIG, objective=objective, rank=2), progress=quiet)
    assert result.lora.keys() == {"transformer.mix.lora_A.weight", "transformer.mix.lora_B.weight"}
    assert result.log[0]["rewards/margins"] == 0 != result.log[-1]["rewards/margins"]


@pytest.fixture(scope="module")
def cached(tmp_path_factory):
    """A run directory up to its cache."""
    folder = tmp_path_factory.mktemp("train")
    config = tiny_config(folder, max_train_steps=6)
    run = run_to_cache(config)
    return folder, config, run


def test_stage_trains_exports_and_refuses_other_settings(cached):
    folder, config, run = cached
    train(config, run)
    outputs = output_hashes(run.path / "train")
    assert {"lora/pytorch_lora_weights.safetensors", "log.csv"} <= outputs.keys()
    pipeline = tiny_wan()
    base = run_model(pipeline)
    pipeline.load_lora_weights(str(run.path / "train/lora"))
    assert (run_model(pipeline) - base).abs().max() > 1e-4
    manifest = json.loads((run.path / "train/manifest.json").read_text())
    assert manifest["counts"]["steps"] == 6
    other = dataclasses.replace(config, train=dataclasses.replace(config.train, rank=2))
    with pytest.raises(UserError, match="rank"):
        train(other, Run(other))
    assert output_hashes(run.path / "train") == outputs
