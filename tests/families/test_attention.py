"""Attention with a prompt whose padding is hidden: diffusers' own outputs, without a reading of the mask."""

import copy
import pickle

import pytest
import torch
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from tiny import TINY, tiny_conditions
from torch.nn.functional import scaled_dot_product_attention

from halo_fast.families import attention, family_of
from halo_fast.families.base import repeated_blocks

# tokens of two prompts that are no padding, of each mask
WORDS = {"prompt_attention_mask": (5, 11), "prompt_embeds_mask": (45, 7), "prompt_embeds_mask_2": (3, 9)}


def by_samples(query, key, value, seen):
    """Attention of each sample's visible tokens alone, the others 0."""
    output = torch.zeros_like(query)
    for index, count in enumerate(seen.sum(dim=1).tolist()):
        parts = (part[index, :count].transpose(0, 1) for part in (query, key, value))
        output[index, :count] = scaled_dot_product_attention(*parts).transpose(0, 1)
    return output


def tokens(dtype, device="cpu", counts=(7, 10, 4), length=10):
    """Query, key and value of three samples, and which of their tokens are seen."""
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(len(counts), length, 2, 16, dtype=torch.float64, generator=generator) for _ in range(3)]
    seen = torch.arange(length) < torch.tensor(counts)[:, None]
    return [part.to(device, dtype).requires_grad_() for part in parts], seen.to(device)


def test_hidden_tokens_neither_act_nor_receive():
    parts, seen = tokens(torch.float64)
    output, wanted = attention.attend(*parts, seen), by_samples(*parts, seen)
    torch.testing.assert_close(output, wanted, rtol=0, atol=1e-12)
    weight = torch.randn(output.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    grads, wanted_grads = (torch.autograd.grad((result * weight).sum(), parts) for result in (output, wanted))
    torch.testing.assert_close(grads, wanted_grads, rtol=0, atol=1e-12)


def test_bounds_part_what_is_seen_from_what_is_hidden():
    parts, seen = tokens(torch.float64)
    begins = attention.bounds(seen)
    assert begins.dtype == torch.int32 and begins.tolist() == [0, 7, 10, 20, 20, 24, 30]
    flat = [part.detach().flatten(0, 1) for part in parts]
    output = torch.cat([
        scaled_dot_product_attention(*(part[start:end].transpose(0, 1) for part in flat)).transpose(0, 1)
        for start, end in zip(begins[:-1], begins[1:], strict=True)
    ]).view_as(parts[0])  # fmt: skip
    torch.testing.assert_close(output[seen], by_samples(*parts, seen)[seen].detach(), rtol=0, atol=1e-12)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_flash_attention_gets_the_sequences(dtype):
    parts, seen = tokens(dtype, "cuda")
    output, wanted = attention.attend(*parts, seen), by_samples(*(part.double() for part in parts), seen)
    torch.testing.assert_close(output.double(), wanted, rtol=0, atol=2e-2)
    grads, wanted_grads = (torch.autograd.grad(result.square().sum(), parts) for result in (output, wanted))
    torch.testing.assert_close(grads, wanted_grads, rtol=0, atol=8e-2)


@pytest.mark.parametrize("name", ["Mochi", "HunyuanVideo 1.5"])
def test_networks_that_read_masks_in_diffusers_give_what_they_gave(name):
    tiny = TINY[name]
    pipeline = tiny.build()
    # copied before a family changes it
    original = copy.deepcopy(pipeline.transformer).double()
    family = family_of(pipeline, tiny.network)
    changed = pipeline.transformer.double()
    generator = torch.Generator().manual_seed(0)
    batch = family.stack(tiny_conditions(family, ["a cube jumps", "a ball rolls"], tiny.size))
    for condition, value in batch.items():
        if condition in WORDS:
            seen = torch.arange(value.shape[1]) < torch.tensor(WORDS[condition])[:, None]
            batch[condition] = seen.to(value.dtype)
        else:
            batch[condition] = torch.randn(value.shape, dtype=torch.float64, generator=generator)
    noisy = torch.randn(2, *family.latent_shape(*tiny.size), dtype=torch.float64, generator=generator)
    t = torch.tensor([0.3, 0.8], dtype=torch.float64)

    def output(network):
        pipeline.transformer = network
        made = family.predict(network, noisy, t, batch)
        return made, torch.autograd.grad(made.square().sum(), list(network.parameters()), allow_unused=True)

    made, grads = output(changed)
    wanted, wanted_grads = output(original)
    assert wanted.abs().max() > 0.1
    torch.testing.assert_close(made, wanted, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(grads, wanted_grads, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["Mochi", "HunyuanVideo 1.5"])
def test_the_compiler_takes_a_block_as_one_graph(name):
    tiny = TINY[name]
    pipeline = tiny.build()
    family = family_of(pipeline, tiny.network)
    noisy = torch.randn(1, *family.latent_shape(*tiny.size))
    conditions = family.stack(tiny_conditions(family, ["a cube jumps"], tiny.size))
    wanted = family.predict(family.transformer, noisy, torch.tensor([0.5]), conditions)
    for block in repeated_blocks(family.transformer):
        block.compile(fullgraph=True, backend="eager")
    torch.testing.assert_close(family.predict(family.transformer, noisy, torch.tensor([0.5]), conditions), wanted)


def test_only_processors_of_that_type_are_replaced():
    network = TINY["Mochi"].build().transformer
    kept, other = network.transformer_blocks[0].attn1, network.transformer_blocks[1].attn1
    own = kept.processor = type("Own", (type(other.processor),), {})()
    replaces = type(other.processor)
    other.processor._attention_backend = "native"
    attention.install(network, replaces, lambda part, angles: part)
    assert kept.processor is own
    assert isinstance(other.processor, attention.JointAttention) and other.processor._attention_backend == "native"


def test_a_backend_of_diffusers_can_be_chosen(monkeypatch):
    family = family_of(TINY["Mochi"].build())
    # it is also the backend of every processor without one of its own
    monkeypatch.setattr(_AttentionBackendRegistry, "_active_backend", _AttentionBackendRegistry._active_backend)
    family.transformer.set_attention_backend("_native_math")
    backends = {
        module.processor._attention_backend for module in family.transformer.modules() if hasattr(module, "processor")
    }
    assert [backend.value for backend in backends] == ["_native_math"]


def test_copies_and_pickles_are_networks_of_diffusers_and_can_be_adapted_again():
    pipeline = TINY["HunyuanVideo 1.5"].build()
    original = type(pipeline.transformer)
    family = family_of(pipeline)
    network = family.transformer
    assert type(network) is not original and type(network).__name__ == original.__name__
    conditions = family.stack(tiny_conditions(family, ["a cube jumps"], TINY["HunyuanVideo 1.5"].size))
    noisy = torch.randn(1, *family.latent_shape(*TINY["HunyuanVideo 1.5"].size))
    wanted = family.predict(network, noisy, torch.tensor([0.5]), conditions)
    for other in (copy.copy(network), copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert type(other) is original
        torch.testing.assert_close(family.predict(other, noisy, torch.tensor([0.5]), conditions), wanted)
        family.adapt(other)
        assert type(other) is type(network)
        torch.testing.assert_close(family.predict(other, noisy, torch.tensor([0.5]), conditions), wanted)


def test_tokens_of_an_image_reach_the_network_as_in_diffusers():
    """A network may be shared with a pipeline that goes on from an image."""
    pipeline = TINY["HunyuanVideo 1.5"].build()
    original = copy.deepcopy(pipeline.transformer)
    family = family_of(pipeline)
    inputs = []
    family.transformer.register_forward_pre_hook(lambda module, args, named: inputs.append(named), with_kwargs=True)
    conditions = family.stack(tiny_conditions(family, ["a cube jumps"], TINY["HunyuanVideo 1.5"].size))
    noisy = torch.randn(1, *family.latent_shape(*TINY["HunyuanVideo 1.5"].size))
    family.predict(family.transformer, noisy, torch.tensor([0.5]), conditions)
    given = inputs[0] | {"image_embeds": torch.randn(1, 4, pipeline.vision_states_dim)}
    outputs = [network(**given)[0] for network in (family.transformer, original)]
    torch.testing.assert_close(*outputs)
    with pytest.raises(TypeError, match="bogus"):
        family.transformer(**inputs[0], bogus=3)


def test_a_forward_that_was_wrapped_before_stays_and_gets_its_image_tokens():
    pipeline = TINY["HunyuanVideo 1.5"].build()
    network, seen = pipeline.transformer, []
    forward = network.forward

    def wrapped(*args, **named):
        seen.append(named["image_embeds"].shape[1])
        return forward(*args, **named)

    network.forward = wrapped
    family = family_of(pipeline)
    assert network.forward is wrapped
    size = TINY["HunyuanVideo 1.5"].size
    noisy = torch.randn(1, *family.latent_shape(*size))
    conditions = family.stack(tiny_conditions(family, ["a cube jumps"], size))
    family.predict(network, noisy, torch.tensor([0.5]), conditions)
    assert seen == [pipeline.vision_num_semantic_tokens]
