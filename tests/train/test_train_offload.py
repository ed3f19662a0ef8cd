"""Frozen weights of blocks that wait in the CPU's memory: the same bits, never used there, one block at a time.

On a machine without a GPU the weights travel from the CPU's memory to the CPU's memory: every copy is made and dropped.
"""

import dataclasses

import pytest
import torch
from tiny import tiny_ltx, tiny_wan
from torch.utils._python_dispatch import TorchDispatchMode
from training import CONFIG, make_pairs, quiet, same, snapshot

from halo_fast.data import Pair
from halo_fast.errors import UserError
from halo_fast.families import family_of, load
from halo_fast.train import fit
from halo_fast.train.block_offload import check_offload, waiting_weights
from halo_fast.train.job import prepared_job
from halo_fast.train.predicted import predict_step

OFFLOADED = dataclasses.replace(
    CONFIG, offload_blocks=True, gradient_checkpointing="full", max_train_steps=3, train_batch_size=1, reference_draws=2
)
_ATEN = torch.ops.aten
PRODUCTS = {_ATEN.mm.default, _ATEN.addmm.default, _ATEN.bmm.default, _ATEN.linear.default}


def pairs_of(family):
    """Two pairs of clips of 9 x 32 x 32."""
    shape, generator = family.latent_shape(9, 32, 32), torch.Generator().manual_seed(0)
    conditions = family.encode_prompts(["a red ball rolls", "a cube"])
    return [
        Pair(
            torch.randn(2, *shape, generator=generator), condition, torch.rand(2, 1, 2, 2, generator=generator),
            torch.rand(2, generator=generator),
        )
        for condition in conditions
    ]  # fmt: skip


class Uses(TorchDispatchMode):
    """Counts matrix products, and those that read one of some storages."""

    def __init__(self, storages):
        super().__init__()
        self.storages, self.products, self.found = storages, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in PRODUCTS:
            self.products += 1
            tensors = [value for value in args if isinstance(value, torch.Tensor)]
            self.found += any(value.untyped_storage()._cdata in self.storages for value in tensors)
        return func(*args, **(kwargs or {}))


def storages_of(model):
    """The storages of all matrices inside the model's blocks."""
    frozen = waiting_weights(model.requires_grad_(False))
    return {value.untyped_storage()._cdata for values in frozen.values() for value in values}


@pytest.mark.parametrize("checkpointing", ["full", "selective"])
@pytest.mark.parametrize("schedule", ["batched", "margin_first"])
@pytest.mark.parametrize("make", [tiny_wan, tiny_ltx])
def test_margins_gradients_and_lora_are_equal_to_the_bit(make, schedule, checkpointing):
    pipeline = make()
    pairs, before = pairs_of(family_of(pipeline)), snapshot(pipeline.transformer)
    config = dataclasses.replace(OFFLOADED, schedule=schedule, gradient_checkpointing=checkpointing)
    plain = fit(pipeline, pairs, dataclasses.replace(config, offload_blocks=False), progress=quiet)
    model = family_of(pipeline).transformer
    flags = [parameter.requires_grad for parameter in model.parameters()]
    waiting = storages_of(model)
    for parameter, flag in zip(model.parameters(), flags, strict=True):
        parameter.requires_grad_(flag)
    with Uses(waiting) as uses:
        offloaded = fit(pipeline, pairs, config, progress=quiet)
    assert uses.products > 100 and uses.found == 0
    assert offloaded.log == plain.log and plain.log[-1]["rewards/margins"] != 0
    assert plain.lora.keys() == offloaded.lora.keys()
    assert all(torch.equal(value, offloaded.lora[name]) for name, value in plain.lora.items())
    assert same(snapshot(model), before) and storages_of(model) == waiting


def test_the_counter_sees_weights_that_do_not_wait():
    pipeline = tiny_wan()
    with Uses(storages_of(pipeline.transformer)) as uses:
        fit(
            pipeline,
            pairs_of(family_of(pipeline)),
            dataclasses.replace(OFFLOADED, offload_blocks=False),
            progress=quiet,
        )
    assert uses.found > 100


def test_one_block_at_a_time_has_its_weights():
    pipeline = tiny_wan()
    family, seen = family_of(pipeline), []
    model = family.transformer
    homes = {value: value.data_ptr() for value in model.parameters()}
    with prepared_job(family, pairs_of(family), OFFLOADED, progress=quiet) as job:
        for block in model.blocks:
            block.register_forward_hook(
                lambda block, args, output: seen.append(
                    [any(value.data_ptr() != homes[value] for value in weights) for weights in blocks.values()]
                )
            )
        blocks = waiting_weights(model)
        batch = next(job.batches(0))
        family.predict(model, batch.noisy, batch.t, batch.conditions).square().sum().backward()
    # forward through both blocks; backward runs them again from the last
    assert seen[:2] == [[True, False], [False, True]] and len(seen) >= 2
    assert all(value.data_ptr() == homes[value] for value in homes)


def test_4_bit_weights_wait_too(tmp_path):
    pytest.importorskip("bitsandbytes")
    tiny_wan(head=32).save_pretrained(tmp_path)
    family = load(str(tmp_path), "cpu", quantization="bnb_nf4")
    pairs = pairs_of(family)
    plain = fit(family, pairs, dataclasses.replace(OFFLOADED, offload_blocks=False), progress=quiet)
    offloaded = fit(family, pairs, OFFLOADED, progress=quiet)
    assert offloaded.log == plain.log
    assert all(torch.equal(value, offloaded.lora[name]) for name, value in plain.lora.items())


def test_predicted_weights_are_those_outside_and_one_block():
    pipeline = tiny_wan()
    family = family_of(pipeline)
    sizes = {
        block: sum(4 * value.numel() for value in values)
        for block, values in waiting_weights(family.transformer.requires_grad_(False)).items()
    }
    conditions = family.encode_prompts(["a cube"])[0]
    shape = family.latent_shape(9, 32, 32)
    with_blocks, without = (
        predict_step(family, shape, (1, 2, 2), conditions, config, torch.float32, "batched")
        for config in (OFFLOADED, dataclasses.replace(OFFLOADED, offload_blocks=False))
    )
    assert without.weights - with_blocks.weights == sum(sizes.values()) - max(sizes.values()) > 0
    with prepared_job(family, pairs_of(family), OFFLOADED, progress=quiet) as job:
        assert "those of blocks one block at a time" in job.plan.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 0}, "train.rank 0 trains them"),
        ({"gradient_checkpointing": "none"}, "set train.gradient_checkpointing to full or selective"),
        ({"compile": True}, "set train.compile to false"),
    ],
)
def test_settings_that_exclude_it_are_one_line(change, message):
    pipeline = tiny_wan()
    with pytest.raises(UserError, match=message):
        fit(pipeline, make_pairs(family_of(pipeline), 2), dataclasses.replace(OFFLOADED, **change), progress=quiet)


def test_weights_that_consist_of_several_tensors_are_refused(tmp_path):
    pytest.importorskip("torchao")
    tiny_wan().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="not quantised, or by bnb_nf4, got torchao_int8"):
        check_offload(OFFLOADED, "torchao_int8")
    family = load(str(tmp_path), "cpu", quantization="torchao_int8")
    with pytest.raises(UserError, match="not quantised, or by bnb_nf4, got Int8Tensor"):
        fit(family, make_pairs(family, 2), OFFLOADED, progress=quiet)
