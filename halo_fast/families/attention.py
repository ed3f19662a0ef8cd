"""Attention of a clip together with its prompt, whose padding is hidden, without a reading of the mask's values.

A network that looks up which tokens of a prompt are padding makes the CPU wait for the GPU in every block. Here no
shape depends on a value: a mask hides the padding, or flash attention gets the bounds of the sequences as a tensor.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import pad

__all__ = ["JointAttention", "attend", "bounds", "install"]

# rotates queries or keys [B, tokens, heads, dim] by the positions of a clip's tokens
Rotation = Callable[[Tensor, Any], Tensor]


def bounds(seen: Tensor) -> Tensor:
    """Where sequences begin among the tokens of a batch, one after another, int32 [2 B + 1].

    Each row of `seen` is two sequences: the tokens that are seen, which come first, and those that are hidden.

    Args:
        seen: bool [B, tokens].
    """
    rows, tokens = seen.shape
    starts = torch.arange(rows, device=seen.device) * tokens
    both = torch.stack([starts, starts + seen.sum(dim=1)], dim=1).flatten()
    return pad(both, (0, 1), value=rows * tokens).int()


@cache
def _has_flash(device: torch.device) -> bool:
    """Whether torch's flash attention takes sequences of unequal length on this device."""
    found = device.type == "cuda" and torch.version.hip is None and torch.backends.cuda.is_flash_attention_available()
    return found and torch.cuda.get_device_capability(device) >= (8, 0)


def attend(
    query: Tensor, key: Tensor, value: Tensor, seen: Tensor, backend: Any = None, parallel_config: Any = None
) -> Tensor:
    """Attention among the tokens that are seen; the outputs of others are 0.

    Args:
        query, key, value: [B, tokens, heads, dim].
        seen: bool [B, tokens]; in each row the tokens that are seen come first.
        backend: of diffusers, which gets a mask; None: flash attention for half precision on a GPU that has it, unless
            diffusers was told to use another than torch's own.
        parallel_config: of diffusers' context parallelism; None for none.
    """
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry, dispatch_attention_fn

    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else query.dtype
    fits = dtype in (torch.float16, torch.bfloat16) and query.shape[-1] % 8 == 0 and query.shape[-1] <= 256
    native = backend is None and _AttentionBackendRegistry.get_active_backend()[0] == "native"
    if native and parallel_config is None and fits and query.is_cuda and _has_flash(query.device):
        starts, tokens = bounds(seen), seen.shape[1]
        flat = [part.to(dtype).flatten(0, 1) for part in (query, key, value)]
        output: Any = varlen_attn(flat[0], flat[1], flat[2], starts, starts, tokens, tokens)
        output = output.view_as(query)
    else:
        parallel = {} if parallel_config is None else {"parallel_config": parallel_config}
        output = dispatch_attention_fn(query, key, value, attn_mask=seen[:, None, None], backend=backend, **parallel)
    hidden: Tensor = output.masked_fill(~seen[:, :, None, None], 0)
    return hidden


class JointAttention:
    """An attention processor of diffusers: a clip's tokens, rotated by position, beside those of its prompt.

    A prompt's padding must be at its end.
    """

    def __init__(self, rotate: Rotation, replaces: Any = None) -> None:
        self._rotate = rotate
        # diffusers writes both, by `set_attention_backend` and `enable_parallelism`
        self._attention_backend = getattr(replaces, "_attention_backend", None)
        self._parallel_config = getattr(replaces, "_parallel_config", None)

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor,
        image_rotary_emb: Any = None,
    ) -> tuple[Tensor, Tensor]:
        """Outputs of the clip [B, N, C] and of its prompt [B, T, D]; `attention_mask` [B, T] is 0 on padding."""

        def project(states: Tensor, layers: tuple[Any, Any, Any], norms: tuple[Any, Any]) -> list[Tensor]:
            query, key, value = (layer(states).unflatten(2, (attn.heads, -1)) for layer in layers)
            query, key = (part if norm is None else norm(part) for part, norm in zip((query, key), norms, strict=True))
            return [query, key, value]

        clip = project(hidden_states, (attn.to_q, attn.to_k, attn.to_v), (attn.norm_q, attn.norm_k))
        prompt = project(
            encoder_hidden_states, (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj),
            (attn.norm_added_q, attn.norm_added_k),
        )  # fmt: skip
        if image_rotary_emb is not None:
            clip[:2] = [self._rotate(part, image_rotary_emb) for part in clip[:2]]

        tokens = hidden_states.shape[1]
        seen = pad(attention_mask.bool(), (tokens, 0), value=True)
        query, key, value = (torch.cat(parts, dim=1) for parts in zip(clip, prompt, strict=True))
        output = attend(query, key, value, seen, self._attention_backend, self._parallel_config).flatten(2)

        video, words = output[:, :tokens], output[:, tokens:]
        video = attn.to_out[1](attn.to_out[0](video))
        # the last block has no use for the prompt's outputs
        return video, attn.to_add_out(words) if getattr(attn, "to_add_out", None) is not None else words


def install(network: nn.Module, replaces: type, rotate: Rotation) -> None:
    """Let a network of diffusers use `JointAttention` in place of the processors of one type."""
    module: Any
    for module in network.modules():
        processor = getattr(module, "processor", None)
        if type(processor) is replaces:
            module.processor = JointAttention(rotate, processor)
