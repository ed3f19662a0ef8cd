"""Networks that something else has wrapped, hooked or prepared, and weights that no gradient can follow."""

import dataclasses

import pytest
import torch
from accelerate import Accelerator, cpu_offload
from accelerate.state import AcceleratorState
from tiny import TINY, tiny_cogvideox, tiny_ltx, tiny_wan
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from training import CONFIG, Plain, make_pairs, quiet, run_model

from halo_fast.errors import UserError
from halo_fast.families import family_of
from halo_fast.train import fit
from halo_fast.train.model_checks import check_layer_names, check_network

SHORT = dataclasses.replace(CONFIG, max_train_steps=2)


def data_parallel(model):
    return torch.nn.DataParallel(model)


def twice(model):
    return torch.compile(torch.nn.DataParallel(model), backend="eager")


@pytest.mark.parametrize("wrap", [data_parallel, twice, lambda model: torch.compile(model, backend="eager")])
def test_wrappers_of_the_whole_network_are_taken_off(pairs, wrap):
    plain, wrapped = tiny_wan(), tiny_wan()
    wrapped.transformer = wrap(wrapped.transformer)
    expected, got = (fit(pipeline, pairs, SHORT, progress=quiet) for pipeline in (plain, wrapped))
    assert got.log == expected.log and got.lora.keys() == expected.lora.keys()
    assert all(torch.equal(value, expected.lora[name]) for name, value in got.lora.items())
    fresh = tiny_wan()
    before = run_model(fresh)
    fresh.load_lora_weights(got.lora)
    assert not torch.equal(run_model(fresh), before)


def test_blocks_compiled_in_place_run_plain_and_are_compiled_again_afterwards(pairs):
    pipeline = tiny_wan()
    pipeline.transformer.blocks[1].attn1.compile(backend="eager")
    compiled = pipeline.transformer.blocks[1].attn1._compiled_call_impl
    assert fit(pipeline, pairs, SHORT, progress=quiet).log == fit(tiny_wan(), pairs, SHORT, progress=quiet).log
    assert pipeline.transformer.blocks[1].attn1._compiled_call_impl is compiled is not None


def compiled_block(model):
    model.blocks[1] = torch.compile(model.blocks[1])


def checkpointed_block(model):
    model.blocks[0] = checkpoint_wrapper(model.blocks[0])


def offloaded(model):
    cpu_offload(model, torch.device("cpu"))


def prepared(model):
    AcceleratorState._reset_state(reset_partial_state=True)
    Accelerator(cpu=True, mixed_precision="bf16").prepare(model)
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (compiled_block, "layer blocks.1 of WanTransformer3DModel is wrapped"),
        (checkpointed_block, "blocks.0._checkpoint_wrapped_module .* is wrapped"),
        (offloaded, "has a hook of accelerate, .* pipeline.remove_all_hooks"),
        (prepared, "WanTransformer3DModel was prepared by accelerate; pass .*unwrap_model"),
        (lambda model: model.blocks[0].half(), "blocks.0.* is float16, .* loss scaling; load .* torch.bfloat16"),
    ],
)  # fmt: skip
def test_what_is_wrapped_hooked_or_half_inside_is_refused_by_name(pairs, change, message):
    pipeline = tiny_wan()
    change(pipeline.transformer)
    with pytest.raises(UserError, match=message):
        fit(pipeline, pairs, SHORT, progress=quiet)


def test_a_denoiser_that_hands_out_a_wrapped_network_is_told():
    family = Plain()
    family.model = torch.compile(family.model)
    with pytest.raises(UserError, match="expected the network itself, got OptimizedModule"):
        check_network(family.transformer)


def test_weights_of_inference_mode_are_refused_and_such_pairs_are_taken(pairs):
    with torch.inference_mode():
        pipeline = tiny_ltx()
    with pytest.raises(UserError, match="made inside torch.inference_mode, .* load the model outside"):
        fit(pipeline, pairs, SHORT, progress=quiet)
    with torch.inference_mode(), pytest.raises(UserError, match="expected to run outside torch.inference_mode"):
        fit(tiny_wan(), pairs, SHORT, progress=quiet)
    family = family_of(tiny_wan())
    with torch.inference_mode():
        frozen = make_pairs(family)
    assert frozen[0].latents.is_inference()
    assert fit(family, frozen, SHORT, progress=quiet).log == fit(tiny_wan(), pairs, SHORT, progress=quiet).log


@pytest.mark.parametrize("name", TINY)
def test_adapted_layers_are_those_of_the_diffusers_class(name):
    tiny = TINY[name]
    family = family_of(tiny.build(), tiny.network)
    layers = [
        layer
        for layer, _ in family.transformer.named_modules()
        if layer.endswith(tuple(f".{end}" for end in family.lora_targets))
    ]
    assert layers
    check_layer_names(family.transformer, layers)


def test_a_layer_that_the_class_does_not_have_gets_no_lora(pairs):
    pipeline = tiny_wan()
    pipeline.transformer.blocks[0].attn1.extra = torch.nn.Linear(4, 4)
    with pytest.raises(UserError, match="blocks.0.attn1.extra is no layer of a plain WanTransformer3DModel"):
        fit(pipeline, pairs, dataclasses.replace(SHORT, target_modules=["to_q", "extra"]), progress=quiet)


def test_other_families_are_unwrapped_too():
    pipeline = tiny_cogvideox()
    network = pipeline.transformer
    pipeline.transformer = torch.compile(network, backend="eager")
    assert family_of(pipeline).transformer is network
