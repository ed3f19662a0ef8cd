"""Attention of many blocks that share a prefix, without a mask over the whole sequence.

The sequence of the vision-language reward model is [prefix][block 1][block 2]..., where the prefix holds the frames
and the prompt. A token sees the prefix and, up to itself, its own block. A dense mask computes S x S scores, most of
which are masked. Here attention over the prefix and over the own block are two partial attentions (o_1, l_1) and
(o_2, l_2), l being the log-sum-exp of the scores, and

    o = (exp(l_1) o_1 + exp(l_2) o_2) / (exp(l_1) + exp(l_2))

is exact (arXiv:2402.05099). `attend` computes it in plain PyTorch, `attend_xformers` with xformers' kernels, which have
no backward pass: they serve scoring on a GPU, without gradients. Training keeps SDPA and the dense mask.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

__all__ = ["Blocks", "attend", "attend_xformers", "attention", "merge", "num_scores", "partial_attention", "usable"]

NAME = "halo_shared_prefix"


class Blocks(NamedTuple):
    """Where the prefix and the blocks of a batch of sequences are.

    Args:
        prefix: tokens of the prefix, padding of shorter prompts included.
        known: tokens of each sequence's prefix that are no padding, [N] numbers up to `prefix`; padding comes last.
        lengths: tokens of each block, the same in every sequence.
    """

    prefix: int
    known: tuple[int, ...]
    lengths: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        return self.prefix + sum(self.lengths)

    def known_mask(self, device: torch.device) -> Tensor:
        """bool [N, prefix]: which tokens of the prefix are no padding."""
        return torch.arange(self.prefix, device=device) < torch.tensor(self.known, device=device)[:, None]


def num_scores(blocks: Blocks) -> tuple[int, int]:
    """Query-key pairs of one sequence and head: of the dense mask, and of the two partial attentions.

    The dense mask computes all S^2. Partial attention computes the lower triangle of the prefix, the prefix for each
    token of a block, and the lower triangle of each block.
    """
    prefix, rest = blocks.prefix, sum(blocks.lengths)
    triangles = sum(length * (length + 1) // 2 for length in (prefix, *blocks.lengths))
    return blocks.num_tokens**2, triangles + prefix * rest


def partial_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attention over some of the keys.

    Args:
        query: [..., M, d].
        key: [..., K, d].
        value: [..., K, d].
        mask: bool, broadcast over [..., M, K]; every query sees at least one key.
        scale: factor of the scores.

    Returns:
        output [..., M, d] and log-sum-exp [..., M] of the scores.
    """
    scores = (scale * query @ key.transpose(-1, -2)).masked_fill(~mask, -torch.inf)
    total = scores.logsumexp(dim=-1)
    return (scores - total[..., None]).exp() @ value, total


def merge(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> Tensor:
    """Attention over two disjoint sets of keys from the partial attentions over each."""
    total = torch.logaddexp(first[1], second[1])
    weights = [(one[1] - total).exp()[..., None] for one in (first, second)]
    return weights[0] * first[0] + weights[1] * second[0]


def attend(query: Tensor, key: Tensor, value: Tensor, blocks: Blocks, scale: float) -> Tensor:
    """Shared-prefix attention in plain PyTorch, differentiable.

    Args:
        query: [N, H, S, d].
        key: [N, H', S, d], H a multiple of H'.
        value: [N, H', S, d].
        blocks: the layout of the S tokens.
        scale: factor of the scores.

    Returns:
        [N, H, S, d].
    """
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    known = blocks.known_mask(query.device)[:, None, None]
    ordered = torch.ones(blocks.prefix, blocks.prefix, dtype=torch.bool, device=query.device).tril()
    itself = torch.eye(blocks.prefix, dtype=torch.bool, device=query.device)
    before = [x[:, :, : blocks.prefix] for x in (query, key, value)]
    after = [x[:, :, blocks.prefix :] for x in (query, key, value)]
    prefix, _ = partial_attention(before[0], before[1], before[2], ordered & known | itself, scale)
    shared = partial_attention(after[0], before[1], before[2], known, scale)
    return torch.cat((prefix, merge(shared, _own_blocks(after, blocks.lengths, scale))), dim=2)


def _own_blocks(tensors: Sequence[Tensor], lengths: Sequence[int], scale: float) -> tuple[Tensor, Tensor]:
    """Partial attention of tokens [N, H, T, d] over their own blocks, which are padded to the longest."""
    longest, device = max(lengths), tensors[0].device
    padded = [
        torch.stack([pad(block, (0, 0, 0, longest - block.shape[2])) for block in x.split(list(lengths), dim=2)], dim=2)
        for x in tensors
    ]
    ordered = torch.ones(longest, longest, dtype=torch.bool, device=device).tril()
    output, total = partial_attention(padded[0], padded[1], padded[2], ordered, scale)
    real = torch.arange(longest, device=device) < torch.tensor(lengths, device=device)[:, None]
    return output[:, :, real], total[:, :, real]


def attend_xformers(query: Tensor, key: Tensor, value: Tensor, blocks: Blocks, scale: float) -> Tensor:
    """As `attend`, by xformers' kernels: on a GPU, float16 or bfloat16, no gradient; outputs of padding are 0."""
    from xformers.ops import fmha
    from xformers.ops.fmha.attn_bias import BlockDiagonalCausalMask, BlockDiagonalMask

    count, device = len(blocks.known), query.device
    rest = sum(blocks.lengths)
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    query, key = query.to(value.dtype), key.to(value.dtype)  # autocast leaves rotated ones in float32
    known = blocks.known_mask(device)
    # all sequences one after the other, [1, tokens, H, d]
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    before = [x[:, : blocks.prefix][known][None] for x in (query, key, value)]
    after = [x[:, blocks.prefix :].flatten(0, 1)[None] for x in (query, key, value)]
    output = torch.zeros_like(query)
    causal = BlockDiagonalCausalMask.from_seqlens(blocks.known, device=device)
    output[:, : blocks.prefix][known] = fmha.memory_efficient_attention(*before, causal, scale=scale)[0]
    across = BlockDiagonalMask.from_seqlens([rest] * count, blocks.known, device=device)
    within = BlockDiagonalCausalMask.from_seqlens(list(blocks.lengths) * count, device=device)
    shared, shared_sum = fmha.memory_efficient_attention_partial(after[0], *before[1:], across, scale=scale)
    own, own_sum = fmha.memory_efficient_attention_partial(*after, within, scale=scale)
    sums = [_packed(shared_sum, [rest] * count), _packed(own_sum, list(blocks.lengths) * count)]
    merged, _ = fmha.merge_attentions([shared, own], sums)
    output[:, blocks.prefix :] = merged[0].unflatten(0, (count, rest))
    return output.transpose(1, 2)


def _packed(log_sum: Tensor, lengths: Sequence[int]) -> Tensor:
    """Log-sum-exp [1, H, tokens]; some of xformers' kernels return [sequences, H, longest or more]."""
    if log_sum.shape[0] == 1:
        return log_sum[..., : sum(lengths)].contiguous()
    return torch.cat([one[:, :length] for one, length in zip(log_sum, lengths, strict=True)], dim=-1)[None]


@functools.cache
def _xformers_found() -> bool:
    try:
        from xformers.ops import fmha
    except (ImportError, OSError, RuntimeError):
        return False
    return hasattr(fmha, "memory_efficient_attention_partial")


def usable(embeddings: Tensor) -> bool:
    """Whether xformers' kernels can serve a pass over embeddings [N, S, hidden].

    They can on a GPU, in float16 or bfloat16 (by the weights or by autocast), without gradients, if xformers is there.
    """
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else embeddings.dtype
    half = dtype in (torch.float16, torch.bfloat16)
    return embeddings.is_cuda and half and not torch.is_grad_enabled() and _xformers_found()


_CURRENT: ContextVar[tuple[Blocks, Any]] = ContextVar("shared prefix")


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """The function that transformers calls for every layer; returns [N, S, H, d] and no weights."""
    blocks, compute = _CURRENT.get()
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return compute(query, key, value, blocks, scale).transpose(1, 2).contiguous(), None


@contextmanager
def attention(decoder: Any, blocks: Blocks, compute: Any = None) -> Iterator[None]:
    """Within it the layers of a transformers decoder attend by `compute`; it is called without a mask.

    Args:
        decoder: a transformers model that takes its attention from AttentionInterface.
        blocks: the layout of the sequences that it will read.
        compute: `attend_xformers`, which None stands for, or `attend`.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, _attention)
    before, token = decoder.config._attn_implementation, _CURRENT.set((blocks, compute or attend_xformers))
    decoder.set_attn_implementation(NAME)
    try:
        yield
    finally:
        decoder.set_attn_implementation(before)
        _CURRENT.reset(token)
