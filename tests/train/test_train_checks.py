"""What must stop a training before it costs time, or before it goes on from something else than it was."""

import dataclasses
import logging
import math

import pytest
import torch
from diffusers import TextToVideoSDPipeline, UNet3DConditionModel
from tiny import tiny_text_to_video_sd, tiny_wan
from training import CONFIG, objective_with, quiet

from halo_fast.data import Pair
from halo_fast.errors import UserError
from halo_fast.families import family_of
from halo_fast.loss.objectives import AutoBeta, GranDPO
from halo_fast.train import fit
from halo_fast.train.draws import Batch, make_batch
from halo_fast.train.job import prepared_job
from halo_fast.train.launch import check_launch
from halo_fast.train.observers import diagnostics
from halo_fast.train.reference_check import check_start
from halo_fast.train.steps import take_step

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"lr_scheduler": "constant_with_warmup"},
            "train.lr_scheduler: expected one of 'constant', 'linear'",
        ),
        ({"gradient_checkpointing": "on"}, "train.gradient_checkpointing: expected one of 'none', 'full', 'selective'"),
        ({"schedule": None}, "train.schedule: expected one of 'auto', 'batched', 'margin_first', got None"),
        ({"mixed_precision": "fp16"}, "train.mixed_precision: expected one of 'no', 'bf16', got 'fp16'"),
        ({"max_grad_norm": 0.0}, "train.max_grad_norm: expected more than 0, got 0.0"),
        ({"learning_rate": math.nan}, "train.learning_rate: expected more than 0, got nan"),
        ({"train_batch_size": 0}, "train.train_batch_size: expected at least 1, got 0"),
        ({"objective": {"preset": "dense_dpo", "normalize": "no"}}, "train.objective: normalize must be True or False"),
        ({"auto_beta": 0.7}, "train.auto_beta: expected more than 0 and less than 0.5, got 0.7"),
        ({"objective": objective_with(video_beta=-1.0)}, "train.objective: video_beta must be"),
        (
            {"objective": objective_with(loser_guard="all")},
            "train.objective: loser_guard must be one of None, 'video', 'patch'",
        ),
        ({"report_to": ["mlflow"]}, "train.report_to: expected some of tensorboard, wandb, got 'mlflow'"),
        ({"target_modules": ["to_q", "to_queue"]}, "target_modules: no layer of .* has a name ending with 'to_queue'"),
        ({"target_modules": ["norm1"]}, "train.target_modules: .* is not supported"),
    ],
)
def test_settings_without_a_meaning_are_refused_by_name(pipeline, pairs, settings, message):
    with pytest.raises(UserError, match=message):
        fit(pipeline, pairs, dataclasses.replace(CONFIG, **settings), progress=quiet)


def test_numbers_that_python_users_write_as_integers_are_taken(pipeline, pairs):
    objective = objective_with(video_weight=0, patch_weight=1, patch_beta=10, patch_sft_weight=0)
    config = dataclasses.replace(CONFIG, max_train_steps=1, objective=objective)
    assert fit(pipeline, pairs, config, progress=quiet).log[0]["loss"] == pytest.approx(math.log(2), rel=1e-6)


@pytest.mark.parametrize(
    ("name", "value", "cure"),
    [
        ("ACCELERATE_MIXED_PRECISION", "bf16", "train.mixed_precision"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "train.compile"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "8", "train.gradient_accumulation_steps"),
        ("ACCELERATE_USE_DEEPSPEED", "true", "--use_fsdp"),
        ("FSDP_VERSION", "1", "--fsdp_version 2"),
        ("FSDP_OFFLOAD_PARAMS", "true", "--fsdp_offload_params false"),
        ("FSDP_RESHARD_AFTER_FORWARD", "false", "--fsdp_reshard_after_forward true"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "true", "train.gradient_checkpointing"),
        ("FSDP_AUTO_WRAP_POLICY", "SIZE_BASED_WRAP", "TRANSFORMER_BASED_WRAP"),
        ("FSDP_TRANSFORMER_CLS_TO_WRAP", "WanTransformer3DModel", "WanTransformerBlock; leave it out"),
    ],
)
def test_options_of_accelerate_launch_are_followed_or_refused(pipeline, monkeypatch, name, value, cure):
    model = pipeline.transformer
    # what `accelerate launch --use_fsdp --fsdp_version 2` hands on by itself
    usual = {
        "ACCELERATE_USE_FSDP": "true", "ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO",
        "FSDP_VERSION": "2", "FSDP_SHARDING_STRATEGY": "FULL_SHARD", "FSDP_RESHARD_AFTER_FORWARD": "true",
        "FSDP_OFFLOAD_PARAMS": "false", "FSDP_ACTIVATION_CHECKPOINTING": "false",
        "FSDP_TRANSFORMER_CLS_TO_WRAP": "WanTransformerBlock",
    }  # fmt: skip
    for setting, usual_value in usual.items():
        monkeypatch.setenv(setting, usual_value)
    check_launch(CONFIG, model)
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"accelerate launch: {name} is {value}.*{cure}"):
        check_launch(CONFIG, model)
    if name.startswith("FSDP"):
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "false")
        check_launch(CONFIG, model)


def test_accelerate_does_not_accumulate_what_training_does(pipeline, monkeypatch):
    """It would divide the loss of each batch by the number once more."""
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    config = dataclasses.replace(CONFIG, gradient_accumulation_steps=4)
    with pytest.raises(
        UserError, match="ACCELERATE_GRADIENT_ACCUMULATION_STEPS is 4.*train.gradient_accumulation_steps"
    ):
        check_launch(config, pipeline.transformer)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"latents": torch.zeros(3, 4, 3, 4, 4)},
            r"latents of pair 1 are \[3, 4, 3, 4, 4\], expected \[2, 4, 3, 4, 4\]",
        ),
        ({"video_rewards": torch.tensor([math.inf, 1.0])}, "video_rewards of pair 1 are infinite"),
    ],
)
def test_a_pair_that_does_not_fit_is_named(pipeline, pairs, change, message):
    odd = [pairs[0], dataclasses.replace(pairs[1], **change), *pairs[2:]]
    with pytest.raises(UserError, match=message):
        fit(pipeline, odd, CONFIG, progress=quiet)


def test_pairs_that_all_tie_do_not_pass_for_a_training(pipeline, pairs, tmp_path):
    ties = [
        dataclasses.replace(
            pair, patch_rewards=torch.ones_like(pair.patch_rewards), video_rewards=torch.tensor([math.nan, 1.0])
        )
        for pair in pairs
    ]
    with pytest.raises(UserError, match="no pair had anything to teach in any step"):
        fit(pipeline, ties, dataclasses.replace(CONFIG, checkpointing_steps=100), folder=tmp_path, progress=quiet)
    assert not list(tmp_path.glob("checkpoints/*"))
    log = fit(pipeline, [*ties[1:], pairs[0]], CONFIG, progress=quiet).log
    assert {row["num_pairs"] for row in log} == {0, 1}


def unet_of_odd_sizes():
    """A UNet whose layers are so small that torch chooses their kernels by requires_grad, which rounds differently."""
    tiny = tiny_text_to_video_sd()
    torch.manual_seed(0)
    unet = UNet3DConditionModel(
        block_out_channels=(8, 16), layers_per_block=1, sample_size=4, norm_num_groups=2, cross_attention_dim=16,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"), up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        attention_head_dim=8,
    )  # fmt: skip
    return TextToVideoSDPipeline(**{**tiny.components, "unet": unet.eval()})


@pytest.mark.parametrize("rank", [4, 0])
def test_rounding_of_another_kernel_stops_no_training(rank):
    pipeline = unet_of_odd_sizes()
    family = family_of(pipeline)
    latents = torch.randn(2, 4, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    rewards = torch.tensor([1.0, 5.0])
    patch_rewards = rewards.view(2, 1, 1, 1).expand(2, 3, 2, 2)
    pair = Pair(latents, family.encode_prompts(["a cube"])[0], patch_rewards, rewards)
    batch = make_batch(family, [pair], [(0, 0)], 0, CPU)
    flags = []
    with torch.no_grad():
        for flag in (True, False):
            pipeline.unet.requires_grad_(flag)
            flags.append(family.predict(pipeline.unet, batch.noisy, batch.t, batch.conditions))
    pipeline.unet.requires_grad_(True)
    torch.testing.assert_close(*flags, rtol=1e-4, atol=1e-5)
    config = dataclasses.replace(CONFIG, rank=rank, max_train_steps=1, objective=objective_with(patch_sft_weight=0.0))
    log = fit(family, [pair], config, progress=quiet).log
    assert log[0]["loss"] == pytest.approx(1.05 * math.log(2), rel=1e-4)
    assert all(parameter.requires_grad for parameter in pipeline.unet.parameters())


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_rounding_passes_and_a_share_of_a_switch_does_not(precision):
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(2, 4, 3, 4, 4, generator=generator).to(precision)
    effect = 0.1 * torch.randn(base.shape, generator=generator)
    noise = torch.randn(base.shape, generator=generator)
    weight = torch.zeros(1)
    rewards = torch.tensor([1.0, 5.0])
    batch = Batch(base, torch.zeros_like(base), rewards, {}, rewards.view(2, 1, 1, 1), rewards)

    def check(off=0.0, start=0.0):
        """A model of one weight whose reference_switch-off and untouched outputs are so far from the base."""
        state = {"off": False}

        class Switch:
            def __enter__(self):
                state["off"] = True

            def __exit__(self, *_):
                state["off"] = False

        def predict(batch):
            if state["off"]:
                return (base.float() + off * noise).to(precision)
            moved = 100 * weight * effect if weight.any() else start * noise
            return (base.float() + moved).to(precision)

        rounding = 32 * torch.finfo(precision).eps
        check_start(predict, Switch, {"w": weight}, "BCFHW", batch, base, GranDPO(), rounding)

    check()
    assert weight == 0
    few_ulps = 4 * torch.finfo(torch.float32).eps
    check(off=few_ulps, start=few_ulps)
    # bfloat16 rounds so coarsely that a share of the effect, here 0.1 of the norm, is all that can be seen
    much = 1e-5 if precision == torch.float32 else 2e-2
    with pytest.raises(UserError, match="switched to the reference, expected the base, got"):
        check(off=much)
    with pytest.raises(UserError, match="before the first step, expected the base, got"):
        check(start=much)
    effect.zero_()
    with pytest.raises(UserError, match="with its weights moved, expected another output"):
        check()


def stopped(pipeline, pairs, folder):
    """A training that was stopped after its fifth step, with checkpoints of the second and fourth."""

    def cut(iterable, total, label):
        for step in iterable:
            if step == 5:
                raise KeyboardInterrupt
            yield step

    with pytest.raises(KeyboardInterrupt):
        fit(pipeline, pairs, CONFIG, folder=folder, progress=cut)


def test_damaged_checkpoints_and_logs_are_named_and_the_one_before_serves(pipeline, pairs, tmp_path):
    whole = fit(pipeline, pairs, CONFIG, folder=tmp_path / "whole", progress=quiet)
    folder = tmp_path / "cut"
    stopped(pipeline, pairs, folder)
    newest, log = folder / "checkpoints/step_000004.safetensors", folder / "log.csv"
    kept = log.read_text()
    log.write_text("\n".join(kept.splitlines()[:3]) + "\n")
    with pytest.raises(
        UserError, match=r"log.csv: expected a row for each of the steps 1 to 4 .*, got 2; put the file"
    ):
        fit(pipeline, pairs, CONFIG, folder=folder, progress=quiet)
    log.write_text(kept)
    newest.write_bytes(newest.read_bytes()[:-50])
    with pytest.raises(UserError, match="step_000004.safetensors: missing or damaged checkpoint .*; remove it"):
        fit(pipeline, pairs, CONFIG, folder=folder, progress=quiet)
    newest.unlink()
    resumed = fit(pipeline, pairs, CONFIG, folder=folder, progress=quiet)
    assert resumed.log == whole.log
    files = [sorted(path.relative_to(place) for path in place.rglob("*")) for place in (folder, tmp_path / "whole")]
    assert files[0] == files[1]


def test_remains_of_a_kill_are_gone_at_the_end(pipeline, pairs, tmp_path):
    cut_off = tmp_path / "checkpoints/.step_000003.safetensors.1.tmp"
    cut_off.parent.mkdir(parents=True)
    cut_off.write_bytes(b"cut off")
    fit(pipeline, pairs, CONFIG, folder=tmp_path, progress=quiet)
    assert sorted(path.stem for path in (tmp_path / "checkpoints").iterdir()) == [f"step_00000{k}" for k in (2, 4, 6)]


def test_settings_that_decide_no_weight_may_change_when_a_training_goes_on(pipeline, pairs, tmp_path):
    def cut(steps, total, label):
        for step in steps:
            if label == "train" and step == 5:
                raise KeyboardInterrupt
            yield step

    strict = dataclasses.replace(CONFIG, loss_spike_factor=1.5, max_train_steps=8)
    with pytest.raises(KeyboardInterrupt):
        fit(pipeline, pairs, strict, folder=tmp_path, progress=cut)
    settings = {"loss_spike_factor": None, "logging_steps": 3, "winner_alarm": None, "checkpoints_total_limit": 1}
    on = dataclasses.replace(strict, **settings)
    found = fit(pipeline, pairs, on, folder=tmp_path, progress=quiet)
    whole = fit(pipeline, pairs, dataclasses.replace(on, logging_steps=1), progress=quiet)
    assert all(torch.equal(found.lora[name], whole.lora[name]) for name in whole.lora)
    with pytest.raises(UserError, match="made with learning_rate"):
        fit(pipeline, pairs, dataclasses.replace(on, learning_rate=1e-3), folder=tmp_path, progress=quiet)


def test_an_objective_that_no_checkpoint_can_hold_is_refused_before_the_first_step(pipeline, pairs, tmp_path):
    config = dataclasses.replace(CONFIG, objective=objective_with(video_beta=torch.tensor(3.0)))
    with pytest.raises(UserError, match="train.objective: expected numbers and words, which a checkpoint can hold"):
        fit(pipeline, pairs, config, folder=tmp_path, progress=quiet)
    assert not (tmp_path / "log.csv").exists()


def test_a_network_that_floors_a_size_is_noticed_before_the_first_step(pipeline, pairs):
    odd = dataclasses.replace(pairs[0], latents=torch.randn(2, pairs[0].latents.shape[1], 3, 3, 5))
    config = dataclasses.replace(CONFIG, reference_draws=None, train_batch_size=1)
    with pytest.raises(UserError, match=r"the network does not take .*, latents .* \(its prediction is"):
        fit(pipeline, [*pairs, odd], config, progress=quiet)


def test_beta_is_not_adjusted_by_videos_without_labels(pipeline, pairs):
    config = dataclasses.replace(CONFIG, auto_beta=0.3, max_train_steps=1, objective=objective_with(video_weight=1.0))
    fit(pipeline, pairs, config, progress=quiet)
    blind = [dataclasses.replace(pair, video_rewards=pair.video_rewards * math.nan) for pair in pairs]
    with pytest.raises(UserError, match="train.auto_beta: .* no pair has video rewards that differ"):
        fit(pipeline, blind, config, progress=quiet)


def test_the_off_policy_gap_goes_by_patches_where_videos_have_no_label(pipeline, pairs, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    odd = []
    for pair in pairs:
        rewards = torch.stack(
            [torch.full_like(pair.patch_rewards[0], 4.0), torch.full_like(pair.patch_rewards[0], 2.0)]
        )
        latents = torch.stack([pair.latents[0], 5 * pair.latents[1]])
        nothing = pair.video_rewards * math.nan
        odd.append(dataclasses.replace(pair, latents=latents, patch_rewards=rewards, video_rewards=nothing))
    config = dataclasses.replace(CONFIG, max_train_steps=1, off_policy_pairs=6)
    fit(pipeline, odd, config, folder=tmp_path, progress=quiet)
    assert any("apart, these clips are not the model's own" in line for line in caplog.messages)


@pytest.mark.parametrize("warm_up", [7, 6])
def test_a_warm_up_beyond_the_training_is_said(pipeline, pairs, caplog, warm_up):
    fit(pipeline, pairs, dataclasses.replace(CONFIG, lr_warmup_steps=warm_up), progress=quiet)
    said = [line for line in caplog.messages if "the learning rate never reaches" in line]
    assert len(said) == (warm_up > CONFIG.max_train_steps)


def test_other_pairs_do_not_go_on_from_a_checkpoint(pipeline, pairs, tmp_path):
    fit(pipeline, pairs, CONFIG, folder=tmp_path, progress=quiet)
    others = [*pairs[:5], dataclasses.replace(pairs[5], video_rewards=pairs[5].video_rewards.flip(0))]
    with pytest.raises(UserError, match="made with last pair [0-9a-f]+, now it is"):
        fit(pipeline, others, CONFIG, folder=tmp_path, progress=quiet)


def test_diagnostics_judge_by_the_beta_in_use(pairs, monkeypatch):
    config = dataclasses.replace(CONFIG, auto_beta=0.3)
    with prepared_job(tiny_wan(), pairs, config) as job:
        assert isinstance(job.auto_beta, AutoBeta)
        job.auto_beta.beta = torch.tensor(25.0)
        assert (job.current_objective().video_beta, job.current_objective().patch_beta) == (25.0, 2.5)
        figures, norm = take_step(job, 0)
        torch.testing.assert_close(figures[0].scale, torch.full((4,), 12.5))
        job.auto_beta.beta = torch.tensor(30.0)
        used, original = [], diagnostics.heldout_figures
        monkeypatch.setattr(
            diagnostics, "heldout_figures", lambda *given: used.append(given[-1].video_beta) or original(*given)
        )
        watching = diagnostics.Diagnostics(job, pairs)
        watching.after_step(0, figures, norm)
        watching.report(config.max_train_steps)
    assert used == [30.0] and {row["split"] for row in watching.rows} == {"train", "heldout"}


def test_accumulated_batches_are_one_batch_whatever_ties(pipeline, pairs):
    unlabelled = dataclasses.replace(
        pairs[1], patch_rewards=pairs[1].patch_rewards * math.nan, video_rewards=pairs[1].video_rewards * math.nan
    )
    odd = [pairs[0], unlabelled, *pairs[2:]]
    whole, parts = (
        fit(
            pipeline, odd,
            dataclasses.replace(CONFIG, train_batch_size=size, gradient_accumulation_steps=4 // size, auto_beta=0.3),
            progress=quiet,
        )
        for size in (4, 1)
    )  # fmt: skip
    # the pair without labels counts in no mean, in whichever batch it comes
    assert {row["num_pairs"] for row in whole.log} == {3, 4}
    for one, other in zip(whole.log, parts.log, strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-5, nan_ok=True)
    for name, value in whole.lora.items():
        torch.testing.assert_close(value, parts.lora[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("limit", [1e-2, math.inf])
def test_the_optimizer_sees_gradients_of_at_most_the_norm_that_is_set(pipeline, pairs, limit):
    config = dataclasses.replace(CONFIG, max_grad_norm=limit)
    with prepared_job(pipeline, pairs, config) as job:
        seen = []

        def step():
            gradients = [parameter.grad.flatten().double() for parameter in job.parameters.values()]
            seen.append(torch.cat(gradients).norm().item())

        job.optimizer.step = step
        _, norm = take_step(job, 0)
    assert norm.item() > 2e-2
    assert seen == [pytest.approx(min(limit, norm.item()), rel=1e-3)]


def test_the_off_policy_gap_is_of_as_many_pairs_as_are_set(pipeline, pairs, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    said = []
    for count in (0, 2, 100):
        config = dataclasses.replace(CONFIG, max_train_steps=1, off_policy_pairs=count)
        fit(pipeline, pairs, config, folder=tmp_path / str(count), progress=quiet)
        said.append([line for line in caplog.messages if "error of the base" in line])
        caplog.clear()
    assert said[0] == [] and len(said[1]) == len(said[2]) == 1 and said[1] != said[2]


def test_one_layer_whose_switch_fails_is_noticed(pairs, monkeypatch):
    from peft.tuners.tuners_utils import BaseTunerLayer

    pipeline = tiny_wan()
    switch = BaseTunerLayer.enable_adapters

    def stuck(layer, enabled):
        if layer.base_layer is not pipeline.transformer.blocks[1].attn2.to_k.base_layer:
            switch(layer, enabled)

    monkeypatch.setattr(BaseTunerLayer, "enable_adapters", stuck)
    with pytest.raises(UserError, match="switched to the reference, expected the base, got"):
        fit(pipeline, pairs, CONFIG, progress=quiet)


@pytest.mark.parametrize("batch", [1, 4])
def test_the_first_step_says_one_half_and_moves_beta_alike_with_and_without_cached_errors(pairs, batch):
    betas = []
    for draws in (None, 2):
        config = dataclasses.replace(
            CONFIG, auto_beta=0.3, reference_draws=draws, max_train_steps=1, train_batch_size=batch,
            gradient_accumulation_steps=4 // batch,
        )  # fmt: skip
        (row,) = fit(tiny_wan(), pairs, config, progress=quiet).log
        assert row["rewards/accuracies"] == row["patch/accuracies"] == row["implicit_acc"] == 0.5
        betas.append(row["beta"])
    # every label has a factor of one half
    assert betas == [pytest.approx(100 * math.exp(0.1 * (0.5 - 0.3)), rel=1e-6)] * 2
