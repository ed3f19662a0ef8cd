"""Heads of published video reward models as a start: VideoScore (arXiv:2406.15252), VideoReward (arXiv:2501.13918)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from halo_fast.errors import UserError, first_line

__all__ = ["VIDEO_REWARD", "VIDEO_SCORE", "PublishedScore", "published_scores", "read_heads"]

logger = logging.getLogger(__name__)

VIDEO_SCORE = ("visual_quality", "temporal_consistency", "dynamic_degree", "text_alignment", "factual_consistency")
_VIDEO_SCORE_MIDDLE = 2.5  # of its scale from 1 to 4
# short name, mean and deviation of VideoReward's rewards, as published with it
VIDEO_REWARD = {
    "visual_quality": ("VQ", 3.6757, 2.2476),
    "dynamic_degree": ("MQ", 1.1646, 1.3811),
    "text_alignment": ("TA", 2.8105, 2.5121),
}
_HEADS = ("score.weight", "score.bias", "rm_head.weight")
_WRAPPER = "base_model.model."  # VideoReward was saved inside PEFT's wrapper


class PublishedScore(NamedTuple):
    """One score of a published model as a logit: head @ state + offset.

    Args:
        head: [hidden].
        offset: a number, or a tensor [].
        query: [hidden], embedding of the token whose state is read; None where any will do.
    """

    head: Tensor
    offset: float | Tensor
    query: Tensor | None


def published_scores(
    name: str, dimensions: Sequence[str], tokenizer: Any, embeddings: Tensor
) -> dict[str, PublishedScore]:
    """The scores of a published reward model, by dimension; empty if the folder holds an ordinary model.

    VideoScore's score less 2.5 is the logit, and VideoReward's reward less its mean over its deviation, so that their
    order is kept.

    Args:
        name: folder or hub name.
        dimensions: video scores that are wanted; one that the model lacks is logged and left out.
        tokenizer: of the model; VideoReward needs its reward tokens.
        embeddings: [vocabulary, hidden], of the tokens.

    Raises:
        UserError: weights that cannot be fetched, another head than the two, a tokenizer without the reward tokens.
    """
    folder = _weights_folder(name)
    heads = read_heads(folder)
    if not heads:
        return {}
    if len(heads.get("score.weight", ())) == len(VIDEO_SCORE):
        published: Sequence[str] = VIDEO_SCORE
    elif "rm_head.weight" in heads:
        published = tuple(VIDEO_REWARD)
    else:
        raise UserError(f"{folder}: expected VideoScore's head of 5 scores or VideoReward's, got {sorted(heads)}")
    found = {}
    for dimension in dimensions:
        if dimension not in published:
            logger.warning("reward.backbone: %s does not score %s, it starts at random", folder, dimension)
        elif published is VIDEO_SCORE:
            row = VIDEO_SCORE.index(dimension)
            bias = heads["score.bias"][row] if "score.bias" in heads else 0
            found[dimension] = PublishedScore(heads["score.weight"][row], bias - _VIDEO_SCORE_MIDDLE, None)
        else:
            word, mean, deviation = VIDEO_REWARD[dimension]
            query = embeddings[_reward_token(folder, tokenizer, word)]
            found[dimension] = PublishedScore(heads["rm_head.weight"][0] / deviation, -mean / deviation, query)
    return found


def _weights_folder(name: str) -> Path:
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    try:
        # the weights were fetched a moment ago and come out of the cache
        return Path(snapshot_download(name, allow_patterns="*.safetensors"))
    except (OSError, ValueError) as error:
        raise UserError(f"reward.backbone: expected the weights of {name}, got none ({first_line(error)})") from error


def read_heads(folder: Path) -> dict[str, Tensor]:
    from safetensors import safe_open

    heads: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            names = {key: key.removeprefix(_WRAPPER) for key in tensors.keys()}  # noqa: SIM118
            heads |= {name: tensors.get_tensor(key).float() for key, name in names.items() if name in _HEADS}
    return heads


def _reward_token(folder: Path, tokenizer: Any, word: str) -> int:
    token = tokenizer.convert_tokens_to_ids(f"<|{word}_reward|>")
    if token in (None, tokenizer.unk_token_id):
        raise UserError(
            f"{folder}: expected a tokenizer with VideoReward's <|{word}_reward|>, got one without; save "
            "the published tokenizer beside the weights"
        )
    return token
