"""Which words a clip shows: a ridge regression from frame features and motion onto the words of the prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from halo_fast.rewards.backbones.compact.motion import SHIFTS, motion_correlation
from halo_fast.rewards.pretrained import TEXT_WIDTH, read_text, words_of

__all__ = ["WordProbe", "fit_word_probe", "summary", "summary_size"]

_SIDE = 6  # positions a side of the summary of a clip's frame features
_MOVING = 40  # channels whose motion is followed: the frame network's finest that are kept
_RIDGE = 0.3
_WORD_RIDGE = 0.01  # of the map from words to their embeddings


class WordProbe(NamedTuple):
    """A linear map from the summary of frame features to the space of words.

    word_evidence = (summary - mean) * scale @ weight; its product with a word's embedding says how clearly the clip
    shows that word.

    Args:
        mean: [K], K = c * 36 + 162.
        scale: [K].
        weight: [K, 384].
    """

    mean: Tensor
    scale: Tensor
    weight: Tensor


def summary_size(channels: int) -> int:
    """Length of the summary of features with so many channels."""
    return channels * _SIDE**2 + 2 * SHIFTS


def summary(frozen: Tensor) -> Tensor:
    """What the probe reads of frame features [N, c, f', y, x]: [N, c * 36 + 162].

    Their average over time and, by area, over 6 x 6 parts says what is there; the motion correlation of the finest says
    where it goes. Both parts have the same weight.
    """
    still = frozen.mean(dim=2)
    still = F.layer_norm(still.movedim(1, -1), (still.shape[1],)).movedim(-1, 1)
    still = F.adaptive_avg_pool2d(still, _SIDE).flatten(1)
    return torch.cat((still, motion_correlation(frozen[:, :_MOVING])), dim=1)


def fit_word_probe(summaries: Tensor, prompts: Sequence[str], weight: Tensor) -> tuple[WordProbe, Tensor]:
    """Fit clips to the words of their prompts: ridge regression in its dual form.

    With K = X X^T + ridge and Y the words of each prompt, the fit is X^T K^-1 Y. The prediction of row i by the fit
    to all other rows is exact: Y_i - (K^-1 Y)_i / (K^-1)_ii.

    Args:
        summaries: [N, K] float32, as `summary` gives them.
        prompts: of each clip.
        weight: [N] in [0, 1], how far each clip shows what its prompt says.

    Returns:
        the probe, and the word evidence [N, 384] of each clip by the fit to all others. Training on that sees no
        better evidence than a new clip will give.
    """
    mean = summaries.mean(dim=0)
    sizes = torch.full_like(mean, len(mean) - 2 * SHIFTS)
    sizes[-2 * SHIFTS :] = 2 * SHIFTS
    scale = 1 / (summaries.std(dim=0, correction=0) + 0.05) / sizes.sqrt()
    rows = (summaries - mean) * scale
    words = [set(words_of(prompt) or [""]) for prompt in prompts]
    known = sorted(set().union(*words))
    named = torch.tensor([[float(word in row) for word in known] for row in words]) * weight[:, None]
    named = named - named.mean(dim=0)
    inverse = torch.linalg.inv(rows @ rows.T + _RIDGE * torch.eye(len(rows)))
    dual = inverse @ named
    left_out = named - dual / inverse.diagonal()[:, None]
    unit = left_out.std(dim=0, correction=0).clamp(min=1e-3)
    embedded = torch.stack([read_text(word) for word in known]) / TEXT_WIDTH**0.5
    gram = embedded @ embedded.T + _WORD_RIDGE * torch.eye(len(known))
    to_text = torch.linalg.solve(gram, embedded) / unit[:, None]
    return WordProbe(mean, scale, rows.T @ (dual @ to_text)), left_out @ to_text
