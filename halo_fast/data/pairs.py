"""Preference pairs: two candidates of one prompt, with the rewards of both for the video and for every patch."""

import hashlib
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, NamedTuple

from annotated_types import Ge
from torch import Tensor

from halo_fast.data.tables import ClipRow, PairRow, ScoreRow
from halo_fast.errors import UserError

__all__ = ["Pair", "PairsConfig", "complete_pairs", "heldout_mask", "pair_candidates", "pair_statistics"]


@dataclass(frozen=True)
class Pair:
    """Two clips of one prompt as the trainer takes them; the rewards say where which of them is better.

    Args:
        latents: [2, *latent_shape] in model space.
        conditions: of the prompt, from `Family.encode_prompts`.
        patch_rewards: [2, f, h, w]; NaN is not labelled.
        video_rewards: [2]; NaN is not labelled.
    """

    latents: Tensor
    conditions: dict[str, Tensor]
    patch_rewards: Tensor
    video_rewards: Tensor


@dataclass
class PairsConfig:
    """Preference pairs of the scored candidates.

    Args:
        patch_delta: patches whose rewards differ by no more than this are ties; the loss has its own, train.objective.
        video_delta: videos whose rewards differ by no more than this are ties; a pair of nothing but ties is left out.
        dimensions: weight of each video dimension in the video reward.
    """

    patch_delta: Annotated[float, Ge(0)] = 0.4
    video_delta: Annotated[float, Ge(0)] = 0.0
    dimensions: dict[str, Annotated[float, Ge(0)]] = field(
        default_factory=lambda: {"visual_quality": 1.0, "text_alignment": 1.0, "dynamic_degree": 1.0}
    )


class _Candidate(NamedTuple):
    clip: ClipRow
    video_reward: float
    patch_rewards: list[float]


def pair_candidates(
    clips: Sequence[ClipRow],
    scores: Sequence[ScoreRow],
    settings: PairsConfig,
    grid: Sequence[int],
    required: bool = True,
) -> tuple[list[PairRow], int]:
    """Pair the candidates of every prompt: both of two, else the best and the worst by video reward.

    The video reward is the weighted mean of the video dimensions. A pair in which everything ties is left out.

    Args:
        clips: the candidates.
        scores: of every candidate.
        settings: ties and weights.
        grid: patches along time, height and width.
        required: whether no pair at all is a mistake.

    Returns:
        the pairs, and how many were left out.

    Raises:
        UserError: a clip without scores, a dimension without scores, weights that sum to 0, or no pair at all.
    """
    by_clip = {score.clip_id: score for score in scores}
    candidates: dict[int, list[_Candidate]] = defaultdict(list)
    for clip in clips:
        if clip.clip_id not in by_clip:
            raise UserError(f"pairs: no scores of clip {clip.clip_id}; score all clips again")
        score = by_clip[clip.clip_id]
        reward = _video_reward(score, settings)
        candidates[clip.prompt_id].append(_Candidate(clip, reward, _patch_scores(score, math.prod(grid))))
    rows = [
        _pair_row(*_best_and_worst(group), settings.patch_delta, grid)
        for group in candidates.values()
        if len(group) > 1
    ]
    if not rows and required:
        raise UserError("generate.num_videos_per_prompt: pairs need at least 2 candidates of a prompt, got 1")
    kept = _decided(rows, settings)
    if not kept and required:
        raise UserError(f"pairs: all {len(rows)} pairs tie in the video and in every patch; lower patch_delta")
    return kept, len(rows) - len(kept)


def _patch_scores(score: ScoreRow, count: int) -> list[float]:
    """The scores of the patches; NaN from a reward model that scores whole videos only."""
    return score.patches.get("quality", [math.nan] * count)


def complete_pairs(
    pairs: Sequence[PairRow], scores: Sequence[ScoreRow], settings: PairsConfig
) -> tuple[list[PairRow], int]:
    """Given pairs, whose unlabelled patches get the scores of their clips; a pair of nothing but ties is left out.

    Args:
        pairs: whose videos are labelled; NaN patches are unlabelled.
        scores: of clips; a clip may have none.
        settings: which differences are ties.

    Returns:
        the pairs, and how many were left out.
    """
    by_clip = {score.clip_id: score.patches["quality"] for score in scores if score.patches}
    rows = []
    for pair in pairs:
        a, b = pair.patch_rewards_a, pair.patch_rewards_b
        if all(map(math.isnan, (*a, *b))) and pair.clip_a in by_clip and pair.clip_b in by_clip:
            a, b = by_clip[pair.clip_a], by_clip[pair.clip_b]
        ties = sum(_ties(x - y, settings.patch_delta) for x, y in zip(a, b, strict=True)) / len(a)
        rows.append(replace(pair, patch_rewards_a=a, patch_rewards_b=b, patch_tie_share=ties))
    kept = _decided(rows, settings)
    return kept, len(rows) - len(kept)


def _decided(rows: Sequence[PairRow], settings: PairsConfig) -> list[PairRow]:
    """The pairs in which not everything ties."""
    return [row for row in rows if row.patch_tie_share < 1 or not _ties(row.video_margin, settings.video_delta)]


def pair_statistics(pairs: Sequence[PairRow], settings: PairsConfig) -> dict[str, float]:
    """Shares of ties, and the share of decided patches that oppose their decided video.

    Args:
        pairs: at least one.
        settings: which differences are ties.
    """
    decided = opposed = 0
    for row in pairs:
        if _ties(row.video_margin, settings.video_delta):
            continue
        margins = [a - b for a, b in zip(row.patch_rewards_a, row.patch_rewards_b, strict=True)]
        margins = [margin for margin in margins if not _ties(margin, settings.patch_delta)]
        decided += len(margins)
        opposed += sum((margin > 0) != (row.video_margin > 0) for margin in margins)
    return {
        "video_tie_share": sum(_ties(row.video_margin, settings.video_delta) for row in pairs) / len(pairs),
        "patch_tie_share": sum(row.patch_tie_share for row in pairs) / len(pairs),
        "opposed_share": opposed / decided if decided else 0.0,
    }


def _video_reward(score: ScoreRow, settings: PairsConfig) -> float:
    missing = [name for name in settings.dimensions if name not in score.video]
    if missing:
        raise UserError(
            f"pairs.dimensions: {missing[0]} was not scored; expected some of {', '.join(sorted(score.video))}"
        )
    total = sum(settings.dimensions.values())
    if total <= 0:
        raise UserError(f"pairs.dimensions: weights must sum to more than 0, got {total}")
    return sum(weight * score.video[name] for name, weight in settings.dimensions.items()) / total


def _best_and_worst(candidates: Sequence[_Candidate]) -> tuple[_Candidate, _Candidate]:
    if len(candidates) == 2:
        return candidates[0], candidates[1]
    ranked = sorted(candidates, key=lambda one: (-one.video_reward, one.clip.candidate))
    return ranked[0], ranked[-1]


def _ties(margin: float, delta: float) -> bool:
    # NaN, which is "not labelled", ties: it compares false
    return not abs(margin) > delta


def _pair_row(a: _Candidate, b: _Candidate, patch_delta: float, grid: Sequence[int]) -> PairRow:
    """The row of two candidates; `patch_delta` is the largest difference of patches that tie."""
    margins = [x - y for x, y in zip(a.patch_rewards, b.patch_rewards, strict=True)]
    return PairRow(
        pair_id=f"{a.clip.clip_id}-{b.clip.clip_id}",
        prompt_id=a.clip.prompt_id,
        prompt=a.clip.prompt,
        clip_a=a.clip.clip_id,
        clip_b=b.clip.clip_id,
        video_reward_a=a.video_reward,
        video_reward_b=b.video_reward,
        patch_rewards_a=a.patch_rewards,
        patch_rewards_b=b.patch_rewards,
        grid=list(grid),
        video_margin=a.video_reward - b.video_reward,
        patch_tie_share=sum(_ties(margin, patch_delta) for margin in margins) / len(margins),
    )


def heldout_mask(prompts: Sequence[str], share: float) -> list[bool]:
    """Which pairs are kept out of training: those whose prompt's hash falls into the lowest `share` of all hashes.

    All pairs of a prompt fall on one side, and a prompt stays on its side when others come or go.

    Args:
        prompts: of each pair.
        share: from 0 to 1.
    """
    hashes = {prompt: int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:8], "big") for prompt in set(prompts)}
    return [hashes[prompt] < share * 2**64 for prompt in prompts]
