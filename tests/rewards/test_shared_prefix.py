"""Two partial attentions merged by their log-sum-exp, compared with SDPA under the dense mask."""

import itertools

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from halo_fast.rewards.backbones import shared_prefix
from halo_fast.rewards.backbones.shared_prefix import (
    Blocks,
    _packed,
    attend,
    attend_xformers,
    attention,
    num_scores,
    partial_attention,
    usable,
)
from halo_fast.rewards.backbones.vlm import network
from halo_fast.rewards.backbones.vlm.network import block_mask

BLOCKS = [
    Blocks(prefix=5, known=(5,), lengths=(1, 1, 4, 4)),
    Blocks(prefix=9, known=(9, 6, 7), lengths=(1, 5, 3, 4)),
    Blocks(prefix=30, known=(30, 22), lengths=(1,) + (7,) * 36),
]


def tensors(blocks, dtype, heads=4, groups=2, size=8):
    generator = torch.Generator().manual_seed(0)
    shape = (len(blocks.known), blocks.num_tokens, size)
    sizes = (heads, heads // groups, heads // groups)
    return [torch.randn(shape[0], h, *shape[1:], generator=generator, dtype=torch.float64).to(dtype) for h in sizes]


def dense_mask(blocks):
    """The mask that the reward model gives to SDPA, [N, 1, S, S]."""
    return block_mask(blocks.known_mask(torch.device("cpu")), torch.tensor(blocks.lengths))


def written_out(blocks):
    """bool [N, S, S] by loops."""
    ends = list(itertools.accumulate((blocks.prefix, *blocks.lengths)))
    owner = [next(n for n, end in enumerate(ends) if token < end) for token in range(blocks.num_tokens)]
    mask = torch.zeros(len(blocks.known), blocks.num_tokens, blocks.num_tokens, dtype=torch.bool)
    for n, known in enumerate(blocks.known):
        for i, j in itertools.product(range(blocks.num_tokens), repeat=2):
            padding = known <= j < blocks.prefix
            mask[n, i, j] = i == j or (j < i and owner[j] in (0, owner[i]) and not padding)
    return mask


@pytest.mark.parametrize("blocks", BLOCKS[:2])
def test_the_dense_mask_is_what_is_said_of_it(blocks):
    assert torch.equal(dense_mask(blocks)[:, 0], written_out(blocks))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("blocks", BLOCKS)
def test_equals_the_dense_mask(blocks, dtype):
    query, key, value = tensors(blocks, dtype)
    mask = dense_mask(blocks)
    truth = scaled_dot_product_attention(
        query.double(), key.double(), value.double(), attn_mask=mask, scale=0.3, enable_gqa=True
    )
    found = attend(query, key, value, blocks, 0.3)
    assert (found - truth).abs().max() < (1e-12 if dtype == torch.float64 else 1e-6)


def test_gradients_equal_those_of_the_dense_mask():
    blocks = BLOCKS[1]
    inputs = [x.requires_grad_() for x in tensors(blocks, torch.float64)]
    weight = torch.randn(len(blocks.known), 4, blocks.num_tokens, 8, dtype=torch.float64)
    truth = scaled_dot_product_attention(*inputs, attn_mask=dense_mask(blocks), scale=0.3, enable_gqa=True)
    expected = torch.autograd.grad((truth * weight).sum(), inputs)
    found = torch.autograd.grad((attend(*inputs, blocks, 0.3) * weight).sum(), inputs)
    assert all(torch.allclose(one, other, atol=1e-12) for one, other in zip(found, expected, strict=True))


def test_large_scores_stay_finite():
    blocks = BLOCKS[0]
    query, key, value = (100 * x for x in tensors(blocks, torch.float32))
    assert attend(query, key, value, blocks, 1.0).isfinite().all()


def test_scores_are_counted_by_the_mask():
    for blocks in BLOCKS:
        full = blocks._replace(known=(blocks.prefix,))
        assert num_scores(full) == (full.num_tokens**2, int(written_out(full).sum()))


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl", "idefics3", "llava_onevision"])
def test_a_decoder_reads_the_same_without_a_mask(family, tmp_path):
    from rewards import tiny_model
    from transformers import AutoModelForImageTextToText

    decoder = AutoModelForImageTextToText.from_pretrained(tiny_model(tmp_path, family)).double().eval().get_decoder()
    blocks = BLOCKS[1]
    sequence = torch.randn(3, blocks.num_tokens, decoder.config.hidden_size, dtype=torch.float64)
    with torch.no_grad():
        mask = dense_mask(blocks)
        truth = decoder(inputs_embeds=sequence, attention_mask=mask, use_cache=False).last_hidden_state
        with attention(decoder, blocks, attend):
            found = decoder(inputs_embeds=sequence, use_cache=False).last_hidden_state
        again = decoder(inputs_embeds=sequence, attention_mask=mask, use_cache=False).last_hidden_state
    assert (found - truth).abs().max() < 1e-6
    assert torch.equal(again, truth)  # the context leaves nothing behind


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl", "idefics2", "smolvlm"])
def test_a_reward_model_scores_the_same(family, tmp_path, monkeypatch):
    """The hook in the reward model, with the plain algebra in place of xformers' kernels."""
    from rewards import reward_model, tiny_model

    model = reward_model(tiny_model(tmp_path, family)).double().eval()
    videos = torch.randint(256, (2, 5, 64, 64, 3), dtype=torch.uint8)
    prompts, grid = ["a fox", "a red fox runs through snow"], (2, 2, 2)
    with torch.no_grad():
        features = model.backbone.encode(videos, model.backbone.frozen_features(videos))
        truth = model.backbone.logits(features, prompts, grid)
        monkeypatch.setattr(shared_prefix, "usable", lambda embeddings: True)
        monkeypatch.setattr(shared_prefix, "attend_xformers", attend)
        monkeypatch.setattr(network, "block_mask", lambda *_: pytest.fail("a dense mask was made"))
        found = model.backbone.logits(features, prompts, grid)
    assert all((one - other).abs().max() < 1e-6 for one, other in zip(found, truth, strict=True))


def test_a_cpu_keeps_sdpa():
    assert not usable(torch.zeros(1, dtype=torch.bfloat16))


def test_both_layouts_of_the_log_sum_are_read():
    lengths = [2, 3, 1]
    padded = torch.randn(3, 4, 8)
    packed = torch.cat([padded[n, :, :length] for n, length in enumerate(lengths)], dim=-1)[None]
    assert torch.equal(_packed(padded, lengths), packed)
    assert torch.equal(_packed(torch.nn.functional.pad(packed, (0, 5)), lengths), packed)


@pytest.mark.parametrize("blocks", BLOCKS[1:])
def test_xformers_masks_and_packing(blocks, monkeypatch):
    """xformers' own masks and calls, its kernels (which no CPU has) replaced by partial attention in plain PyTorch."""
    fmha = pytest.importorskip("xformers.ops.fmha", reason="xformers is not installed", exc_type=ImportError)

    def partial(query, key, value, bias, scale):
        shape = (1, query.shape[2], query.shape[1], key.shape[1])
        mask = bias.materialize(shape, dtype=torch.float32) == 0
        output, total = partial_attention(*(x.transpose(1, 2) for x in (query, key, value)), mask, scale)
        return output.transpose(1, 2), total

    def merged(outputs, sums):
        from halo_fast.rewards.backbones.shared_prefix import merge

        parts = [(output.transpose(1, 2), total) for output, total in zip(outputs, sums, strict=True)]
        return merge(*parts).transpose(1, 2), None

    monkeypatch.setattr(fmha, "memory_efficient_attention_partial", partial)
    monkeypatch.setattr(fmha, "memory_efficient_attention", lambda *args, scale: partial(*args, scale)[0])
    monkeypatch.setattr(fmha, "merge_attentions", merged)
    query, key, value = tensors(blocks, torch.float64)
    found, truth = attend_xformers(query, key, value, blocks, 0.3), attend(query, key, value, blocks, 0.3)
    seen = torch.cat((blocks.known_mask(query.device), torch.ones(len(found), sum(blocks.lengths)).bool()), dim=1)
    assert (found - truth).transpose(1, 2)[seen].abs().max() < 1e-12


@pytest.mark.gpu
def test_xformers_kernels():
    fmha = pytest.importorskip("xformers.ops.fmha", reason="xformers is not installed", exc_type=ImportError)
    assert hasattr(fmha, "merge_attentions")
    blocks = BLOCKS[2]
    query, key, value = (x.cuda() for x in tensors(blocks, torch.bfloat16, size=64))
    found = attend_xformers(query, key, value, blocks, 0.125)
    truth = attend(query.double(), key.double(), value.double(), blocks, 0.125)
    seen = torch.cat((blocks.known_mask(query.device), query.new_ones(2, sum(blocks.lengths)).bool()), dim=1)
    assert (found - truth).transpose(1, 2)[seen].abs().max() < 0.05
