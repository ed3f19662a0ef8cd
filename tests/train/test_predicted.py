"""Predicted memory and work of a step: against closed forms, hand counts, all blocks and torch's own allocator."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from tiny import TINY
from torch import nn

from halo_fast.errors import UserError
from halo_fast.families import Denoiser, family_of
from halo_fast.families.shells import load_shell
from halo_fast.train import TrainConfig, devices
from halo_fast.train.predicted import SUPERVISED, cheapest, predict_forward, predict_options, predict_step

GRID = (2, 2, 2)
FLOAT = torch.float32


class Wide(nn.Module):
    """Two layers on each position, the inner one much wider than the latents."""

    def __init__(self, width):
        super().__init__()
        self.up, self.down = nn.Linear(4, width), nn.Linear(width, 4)

    def forward(self, x):
        return self.down(nn.functional.gelu(self.up(x)))


class Plain(Denoiser):
    """A network of one's own on latents [4, 4, 16, 16]."""

    def __init__(self, width):
        super().__init__(SimpleNamespace(transformer=Wide(width), scheduler=SimpleNamespace(config={})))

    def stack(self, conditions):
        return {}

    def predict(self, model, noisy, t, conditions):
        return model(noisy.movedim(1, -1)).movedim(-1, 1)


def plain(**settings):
    return TrainConfig(rank=0, gradient_checkpointing="none", mixed_precision="no", **settings)


@pytest.mark.parametrize(("schedule", "samples"), [("batched", 4), ("margin_first", 1), (SUPERVISED, 2)])
def test_activations_of_two_layers_are_those_counted_by_hand(schedule, samples):
    width, positions = 2048, 4 * 16 * 16
    step = predict_step(Plain(width), (4, 4, 16, 16), GRID, {}, plain(train_batch_size=2), FLOAT, schedule)
    parameters = 4 * width + width + 4 * width + 4
    assert (step.weights, step.training) == (4 * parameters, 3 * 4 * parameters)
    # what GELU took and gave, and the gradient of the latter
    assert step.activations == pytest.approx(3 * 4 * samples * positions * width, rel=0.03)
    # forward, gradients of weights, and of what goes into the second layer
    passes = 2 * 2 * 4 * width + 2 * 2 * 4 * width + 2 * 4 * width
    once_more = 2 * 2 * 4 * width if schedule == "margin_first" else 0
    each = {"batched": 4, "margin_first": 4, SUPERVISED: 2}[schedule]
    assert step.flops == each * positions * (passes + once_more)


def test_gradients_that_wait_count_before_the_backward_pass():
    wait, first = (
        predict_step(Plain(512), (4, 4, 16, 16), GRID, {}, plain(gradient_accumulation_steps=n), FLOAT, "batched")
        for n in (2, 1)
    )
    assert 0 < wait.peak - first.peak <= 4 * (4 * 512 + 512 + 4 * 512 + 4)


def test_lora_and_weights_have_their_closed_forms():
    family = load_shell("Wan-AI/Wan2.1-T2V-1.3B-Diffusers")
    shape, conditions = family.latent_shape(17, 64, 64), family.blank_conditions()
    config = TrainConfig(rank=8, gradient_checkpointing="full")
    step = predict_step(family, shape, GRID, conditions, config, torch.bfloat16, "batched")
    # four square layers of 1536 in two attentions of 30 blocks
    lora = 30 * 2 * 4 * 8 * (1536 + 1536)
    assert step.training == 3 * 4 * lora
    # 2 bytes each, and 2 more of what diffusers keeps in float32: time embedding, scale and shift, norms
    single = (256 * 1536 + 1536) + (1536 * 1536 + 1536) + 30 * 6 * 1536 + 2 * 1536 + 30 * 2 * 1536
    assert step.weights == 2 * 1_418_996_800 + 2 * single + 4 * lora


def test_operations_of_a_pass_are_those_of_its_products():
    family = load_shell("Wan-AI/Wan2.1-T2V-1.3B-Diffusers")
    shape = family.latent_shape(81, 480, 832)
    _, flops = predict_forward(family, shape, family.blank_conditions(), torch.bfloat16)
    tokens, text, width, inner = 21 * 30 * 52, 512, 1536, 8960
    block = 2 * tokens * (6 * width**2 + 2 * width * inner) + 2 * text * 2 * width**2
    block += 4 * tokens * (tokens + text) * width
    assert flops == pytest.approx(30 * block, rel=0.01)


FEW = [
    ("Wan 2.1", "batched", {"rank": 0, "gradient_accumulation_steps": 1}),
    ("HunyuanVideo", "margin_first", {}),
    ("Wan 2.1", "margin_first", {}),
    ("Wan 2.1", "batched", {}),
    ("HunyuanVideo", "batched", {"gradient_checkpointing": "none"}),
    ("HunyuanVideo 1.5", "batched", {"gradient_checkpointing": "selective"}),
    ("HunyuanVideo 1.5", "margin_first", {"rank": 0}),
    ("Mochi", "batched", {"gradient_checkpointing": "none"}),
    ("CogVideoX 5B", "batched", {}),
    ("LTX-Video", "margin_first", {"gradient_checkpointing": "selective"}),
]


@pytest.mark.parametrize(
    ("name", "schedule", "settings"), [FEW[0], *(pytest.param(*case, marks=pytest.mark.slow) for case in FEW[1:])]
)
def test_few_blocks_tell_of_all(name, schedule, settings):
    from benchmarks.memory import larger

    family = family_of(TINY[name].build())
    family.pipeline.transformer = larger(name)
    config = dataclasses.replace(TrainConfig(gradient_checkpointing="full", rank=8), **settings)
    arguments = (
        family,
        family.latent_shape(*TINY[name].size),
        GRID,
        family.blank_conditions(),
        config,
        FLOAT,
        schedule,
    )
    few, whole = predict_step(*arguments), predict_step(*arguments, exact=True)
    assert (few.weights, few.training, few.flops) == (whole.weights, whole.training, whole.flops)
    assert few.activations == pytest.approx(whole.activations, rel=0.002)


# the other rows take minutes where a CPU has no bfloat16: `python -m benchmarks.memory` measures all ten
@pytest.mark.parametrize("row", [1, *(pytest.param(row, marks=pytest.mark.slow) for row in (0, 2, 3, 6, 9))])
def test_the_prediction_is_what_the_allocator_gives(row):
    from benchmarks.memory import ROWS, measure

    predicted, measured = measure(ROWS[row])
    assert predicted == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize(
    "name",
    [name if name in ("Wan 2.1", "CogVideoX 2B") else pytest.param(name, marks=pytest.mark.slow) for name in TINY],
)
def test_all_families_are_predicted_without_changing_them(name):
    tiny = TINY[name]
    family = family_of(tiny.build(), tiny.network)
    before = {key: value.clone() for key, value in family.transformer.state_dict().items()}
    flags = [value.requires_grad for value in family.transformer.parameters()]
    config = TrainConfig(rank=4, gradient_checkpointing="none")
    shape, choices = family.latent_shape(*tiny.size), [("margin_first", "none", False)]
    (option,) = predict_options(family, shape, GRID, family.blank_conditions(), config, torch.bfloat16, choices)
    assert option.step.activations > 0 and option.step.flops > 0
    assert all(torch.equal(value, before[key]) for key, value in family.transformer.state_dict().items())
    assert flags == [value.requires_grad for value in family.transformer.parameters()]
    assert not hasattr(family.transformer, "peft_config")


@pytest.mark.slow
def test_options_order_as_their_settings_say():
    family = load_shell("Wan-AI/Wan2.1-T2V-1.3B-Diffusers")
    config = TrainConfig(rank=8)
    found = predict_options(
        family, family.latent_shape(33, 240, 416), GRID, family.blank_conditions(), config, torch.bfloat16
    )
    peak = {(one.schedule, one.checkpointing, one.offload): one.step.peak for one in found}
    for schedule in ("batched", "margin_first"):
        modes = [peak[schedule, mode, False] for mode in ("none", "selective", "full")]
        assert modes == sorted(modes, reverse=True)
    for mode in ("none", "selective", "full"):
        assert peak["margin_first", mode, False] < peak["batched", mode, False]
        # one sample at a time costs the memory of fine-tuning
        assert peak["margin_first", mode, False] == pytest.approx(peak[SUPERVISED, mode, False], rel=0.02)
    assert peak["margin_first", "full", True] < peak["margin_first", "full", False]
    large, small = devices.find_device("h100"), devices.find_device("1 GiB")
    assert cheapest(found, large).schedule == "batched" and cheapest(found, small) is None


def test_an_anchored_objective_has_no_margin_first():
    config = plain(objective={"preset": "halo", "anchor_weight": 1.0}, reference_draws=None)
    found = predict_options(Plain(64), (4, 4, 16, 16), GRID, {}, config, FLOAT)
    assert {one.schedule for one in found} == {"batched", SUPERVISED}


def test_a_network_that_asks_for_values_is_named():
    class Asking(Plain):
        def predict(self, model, noisy, t, conditions):
            return super().predict(model, noisy, t, conditions) * int(t.long().sum())

    with pytest.raises(UserError, match="plan: Wide cannot be run without values .*--dry-run"):
        predict_step(Asking(8), (4, 4, 16, 16), GRID, {}, plain(), FLOAT, "batched")


def test_a_network_that_is_not_the_pipelines_is_refused_and_kept():
    class Elsewhere(Plain):
        def __init__(self):
            super().__init__(8)
            self._own = Wide(8)

        @property
        def transformer(self):
            return self._own

    family = Elsewhere()
    with pytest.raises(UserError, match="Elsewhere.transformer is not its pipeline's transformer"):
        predict_step(family, (4, 4, 16, 16), GRID, {}, plain(), FLOAT, "batched")
    assert not any(value.is_meta for value in family.transformer.parameters())


@pytest.mark.parametrize(
    ("text", "memory"),
    [("24 GiB", 24 * 2**30), ("24gb", 24 * 10**9), ("RTX 4090", 24564 * 2**20), ("h100", 81559 * 2**20)],
)
def test_devices_by_name_and_by_size(text, memory):
    assert devices.find_device(text).memory == memory


@pytest.mark.parametrize("text", ["rtx", "24", "0 GiB", "-3 GiB", "24 parsecs", ""])
def test_unknown_devices_are_answered_with_the_names(text):
    with pytest.raises(UserError, match="device: expected one of rtx3090, rtx4090, .*h100.* or a size"):
        devices.find_device(text)


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1024, "1 KiB"), (2**30, "1 GiB"), (1536 * 2**30, "1,536 GiB")]
)
def test_sizes_are_read_in_binary_units(count, text):
    assert devices.size_text(count) == text
