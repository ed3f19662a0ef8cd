"""Preference pairs: two candidates of one prompt, with the rewards of both for the video and for every patch."""

import hashlib
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Annotated, Any, Literal, NamedTuple

from annotated_types import Ge
from torch import Tensor

from halo_fast.data.tables import ClipRow, PairRow, ScoreRow
from halo_fast.errors import UserError

__all__ = [
    "Pair",
    "PairsConfig",
    "complete_pairs",
    "corrupted_pair",
    "heldout_mask",
    "pair_candidates",
    "pair_statistics",
    "real_pairs",
    "without_duplicates",
]

_BEST, _WORST = 5.0, 1.0  # labels that follow from how clips were made, on the teachers' scale


@dataclass(frozen=True)
class Pair:
    """Two clips of one prompt as the trainer takes them; the rewards say where which of them is better.

    Args:
        latents: [2, *latent_shape] in model space.
        conditions: of the prompt, from `Family.encode_prompts`.
        patch_rewards: [2, f, h, w]; NaN is not labelled.
        video_rewards: [2]; NaN is not labelled.
        seeds: of the noise that the clips were sampled from; None where that of one is not known.
    """

    latents: Tensor
    conditions: dict[str, Tensor]
    patch_rewards: Tensor
    video_rewards: Tensor
    seeds: tuple[int, int] | None = None


@dataclass
class PairsConfig:
    """Preference pairs of the scored candidates.

    Args:
        patch_delta: patches whose rewards differ by no more than this are ties; the loss has its own, train.objective.
        video_delta: videos whose rewards differ by no more than this are ties; a pair of nothing but ties is left out.
        dimensions: weight of each video dimension in the video reward.
        select: which candidates of a prompt are paired. "best_worst": the best with the worst. "margin": all whose
            video rewards differ by more than min_margin. "pareto": all of which one is nowhere worse and somewhere
            better in the weighted dimensions. "patches": the two that differ in most patches.
        min_margin: of the video reward, for select margin.
        real_wins: pair imported clips with generated ones of their prompt, and let them win whatever the scores.
    """

    patch_delta: Annotated[float, Ge(0)] = 0.4
    video_delta: Annotated[float, Ge(0)] = 0.0
    dimensions: dict[str, Annotated[float, Ge(0)]] = field(
        default_factory=lambda: {"visual_quality": 1.0, "text_alignment": 1.0, "dynamic_degree": 1.0}
    )
    select: Literal["best_worst", "margin", "pareto", "patches"] = "best_worst"
    min_margin: Annotated[float, Ge(0)] = 0.0
    real_wins: bool = False


class _Candidate(NamedTuple):
    clip: ClipRow
    video_reward: float
    patch_rewards: list[float]
    dimensions: list[float]


def pair_candidates(
    clips: Sequence[ClipRow],
    scores: Sequence[ScoreRow],
    settings: PairsConfig,
    grid: Sequence[int],
    required: bool = True,
    sizes: Mapping[str, Any] | None = None,
) -> tuple[list[PairRow], int]:
    """Pair the candidates of every prompt, by default the best with the worst by video reward.

    The video reward is the weighted mean of the video dimensions. A pair in which everything ties is left out.
    Candidates of several sizes are paired among those of their size.

    Args:
        clips: the candidates.
        scores: of every candidate.
        settings: ties, weights, and which candidates are paired.
        grid: patches along time, height and width.
        required: whether no pair at all is a mistake.
        sizes: of clips, by clip_id; None if they are alike.

    Returns:
        the pairs, and how many were left out.

    Raises:
        UserError: a clip without scores, a dimension without scores, weights that sum to 0, or no pair at all.
    """
    by_clip = {score.clip_id: score for score in scores}
    candidates: dict[tuple[int, Any], list[_Candidate]] = defaultdict(list)
    for clip in clips:
        if clip.clip_id not in by_clip:
            raise UserError(f"pairs: no scores of clip {clip.clip_id}; score all clips again")
        score = by_clip[clip.clip_id]
        reward = _video_reward(score, settings)
        weighted = [score.video[name] for name, weight in settings.dimensions.items() if weight]
        candidates[clip.prompt_id, sizes and sizes[clip.clip_id]].append(
            _Candidate(clip, reward, _patch_scores(score, math.prod(grid)), weighted)
        )
    groups = [group for group in candidates.values() if len(group) > 1]
    if not groups and required:
        of_size = " and one size (imports.size keep, imports.frames keep)" if sizes else ""
        raise UserError(f"generate.num_videos_per_prompt: pairs need at least 2 candidates of a prompt{of_size}, got 1")
    rows = [_pair_row(a, b, settings.patch_delta, grid) for group in groups for a, b in _select(group, settings)]
    if not rows and required:
        raise UserError(
            f"pairs.select: {settings.select!r} finds no pair among {len(groups)} prompts; lower min_margin, or set it "
            "to best_worst"
        )
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


def pair_statistics(
    pairs: Sequence[PairRow], settings: PairsConfig, clips: Sequence[ClipRow] = (), scores: Sequence[ScoreRow] = ()
) -> dict[str, float]:
    """Shares of ties, of decided patches that oppose their decided video, and what winners have in common.

    Args:
        pairs: at least one.
        settings: which differences are ties.
        clips: of the pairs: "first_wins_share" is that of decided pairs whose winner has the lower candidate number,
            and "own_share" that of clips that the model itself made.
        scores: of the clips: "still_wins_share" is that of decided pairs whose winner moves less, where known.
    """
    decided = opposed = 0
    for row in pairs:
        if _ties(row.video_margin, settings.video_delta):
            continue
        margins = [a - b for a, b in zip(row.patch_rewards_a, row.patch_rewards_b, strict=True)]
        margins = [margin for margin in margins if not _ties(margin, settings.patch_delta)]
        decided += len(margins)
        opposed += sum((margin > 0) != (row.video_margin > 0) for margin in margins)
    shares = {
        "video_tie_share": sum(_ties(row.video_margin, settings.video_delta) for row in pairs) / len(pairs),
        "patch_tie_share": sum(row.patch_tie_share for row in pairs) / len(pairs),
        "opposed_share": opposed / decided if decided else 0.0,
    }
    known = {clip.clip_id: clip for clip in clips}
    sides = [known[clip] for row in pairs for clip in (row.clip_a, row.clip_b) if clip in known]
    motion = {score.clip_id: score.motion for score in scores}
    wins = {
        "first_wins_share": _lower_wins(pairs, settings, {clip.clip_id: float(clip.candidate) for clip in clips}),
        "still_wins_share": _lower_wins(pairs, settings, motion),
        "own_share": sum(bool(clip.strategy) for clip in sides) / len(sides) if sides else math.nan,
    }
    return shares | {name: share for name, share in wins.items() if not math.isnan(share)}


def _lower_wins(pairs: Sequence[PairRow], settings: PairsConfig, values: Mapping[str, float]) -> float:
    """Share of the decided pairs whose winner has the lower value; NaN if there is none with two values."""
    wins = []
    for row in pairs:
        gap = values.get(row.clip_a, math.nan) - values.get(row.clip_b, math.nan)
        if not _ties(row.video_margin, settings.video_delta) and gap == gap and gap:
            wins.append((gap < 0) == (row.video_margin > 0))
    return sum(wins) / len(wins) if wins else math.nan


def _video_reward(score: ScoreRow, settings: PairsConfig) -> float:
    weights = {name: weight for name, weight in settings.dimensions.items() if weight}
    missing = [name for name in weights if name not in score.video]
    if missing:
        raise UserError(
            f"pairs.dimensions: {missing[0]} was not scored; expected some of {', '.join(sorted(score.video))}"
        )
    total = sum(settings.dimensions.values())
    if total <= 0:
        raise UserError(f"pairs.dimensions: weights must sum to more than 0, got {total}")
    return sum(weight * score.video[name] for name, weight in weights.items()) / total


def _select(group: Sequence[_Candidate], settings: PairsConfig) -> list[tuple[_Candidate, _Candidate]]:
    """The pairs of a prompt's candidates; with two of them the first candidate comes first."""
    if settings.select == "best_worst":
        ranked = sorted(group, key=lambda one: (-one.video_reward, one.clip.candidate))
        return [(group[0], group[1]) if len(group) == 2 else (ranked[0], ranked[-1])]
    pairs = list(combinations(group, 2))
    if settings.select == "margin":
        return [(a, b) for a, b in pairs if abs(a.video_reward - b.video_reward) > settings.min_margin]
    if settings.select == "pareto":
        return [(a, b) for a, b in pairs if _dominates(a.dimensions, b.dimensions)]
    return [max(pairs, key=lambda pair: _patch_difference(pair[0], pair[1], settings.patch_delta))]


def _dominates(a: Sequence[float], b: Sequence[float]) -> bool:
    """Whether one of the two is nowhere worse than the other, and they are not equal."""
    gaps = [x - y for x, y in zip(a, b, strict=True)]
    return any(gaps) and (all(gap >= 0 for gap in gaps) or all(gap <= 0 for gap in gaps))


def _patch_difference(a: _Candidate, b: _Candidate, patch_delta: float) -> tuple[int, float]:
    """How many patches are decided, and by how much in all."""
    gaps = [abs(x - y) for x, y in zip(a.patch_rewards, b.patch_rewards, strict=True)]
    decided = [gap for gap in gaps if not _ties(gap, patch_delta)]
    return len(decided), sum(decided)


def corrupted_pair(clip: ClipRow, corrupted: ClipRow, share: Tensor, grid: Sequence[int]) -> PairRow:
    """A clip and itself with a region made again; labels follow from the region, as from any damage: 5 - 4 share.

    Args:
        clip: the one.
        corrupted: the other.
        share: of each patch that the region covers, [f, h, w].
        grid: patches along time, height and width.
    """
    worse = [_BEST - 4 * one for one in share.flatten().tolist()]
    return _labelled_pair(clip, corrupted, (_BEST, _BEST - 4 * float(share.mean())), worse, grid)


def real_pairs(
    real: Sequence[ClipRow],
    generated: Sequence[ClipRow],
    grid: Sequence[int],
    sizes: Mapping[str, Any] | None = None,
) -> list[PairRow]:
    """Every generated clip against a real one of its prompt and size, which wins; patches are unlabelled.

    Args:
        real: clips whose prompt_id is that of the generated ones; they take turns.
        generated: the model's own.
        grid: patches along time, height and width.
        sizes: as for `pair_candidates`.
    """
    by_prompt: dict[tuple[int, Any], list[ClipRow]] = defaultdict(list)
    for clip in real:
        by_prompt[clip.prompt_id, sizes and sizes[clip.clip_id]].append(clip)
    unlabelled = [math.nan] * math.prod(grid)
    return [
        _labelled_pair(winners[clip.candidate % len(winners)], clip, (_BEST, _WORST), unlabelled, grid)
        for clip in generated
        if (winners := by_prompt.get((clip.prompt_id, sizes and sizes[clip.clip_id])))
    ]


def _labelled_pair(
    a: ClipRow, b: ClipRow, videos: tuple[float, float], patches: list[float], grid: Sequence[int]
) -> PairRow:
    """A pair whose first clip is best everywhere that the second has a label."""
    best = [math.nan if math.isnan(one) else _BEST for one in patches]
    ties = sum(_ties(x - y, 0) for x, y in zip(best, patches, strict=True)) / len(best)
    return PairRow(
        f"{a.clip_id}-{b.clip_id}", a.prompt_id, a.prompt, a.clip_id, b.clip_id, *videos, best, patches, list(grid),
        videos[0] - videos[1], ties,
    )  # fmt: skip


def without_duplicates(pairs: Sequence[PairRow], scores: Sequence[ScoreRow]) -> list[PairRow]:
    """The pairs of clips with different pixels, each once.

    Args:
        pairs: some may be there twice, in either order.
        scores: say which clips are equal, where they are known.
    """
    content = {score.clip_id: score.content for score in scores if score.content}
    found: dict[frozenset[str], PairRow] = {}
    for row in pairs:
        clips = frozenset(content.get(clip, clip) for clip in (row.clip_a, row.clip_b))
        if len(clips) == 2:
            found.setdefault(clips, row)
    return list(found.values())


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
