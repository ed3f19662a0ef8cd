"""The stage that builds preference pairs."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from halo_fast.data.pairs import PairsConfig
from halo_fast.errors import UserError
from halo_fast.files import read_table, write_parquet
from halo_fast.pipeline.config import Config
from halo_fast.pipeline.run import Run

__all__ = ["build_pairs"]


def build_pairs(config: Config, run: Run) -> None:
    """Pair the candidates of every prompt: both of two, else the best and the worst by video reward.

    The video reward is the weighted mean of the video dimensions. Pairs in which everything ties teach nothing and are
    left out. Reads generate/clips.parquet and score/scores.parquet, writes pairs/pairs.parquet.

    Raises:
        UserError: a clip without scores, a dimension nobody scored, weights that sum to nothing, or no pair at all.
    """
    import pyarrow

    clips_file, scores_file = run.require("generate/clips.parquet"), run.require("score/scores.parquet")
    settings = asdict(config.pairs) | {"grid": config.grid}
    with run.stage("pairs", settings, {"clips": clips_file, "scores": scores_file}) as stage:
        if stage.done:
            return
        scores = {row["clip_id"]: row for row in read_table(scores_file).to_pylist()}
        candidates: dict[int, list[dict[str, Any]]] = defaultdict(list)
        for clip in read_table(clips_file).to_pylist():
            if clip["clip_id"] not in scores:
                raise UserError(f"{scores_file}: no scores of clip {clip['clip_id']}; run `halo score --force`")
            score = scores[clip["clip_id"]]
            clip["video_reward"] = _video_reward(score, config.pairs)
            clip["patch_rewards"] = score["patch_quality"]
            candidates[clip["prompt_id"]].append(clip)
        chosen = [_best_and_worst(clips) for clips in candidates.values() if len(clips) > 1]
        if not chosen:
            raise UserError("generate.num_videos_per_prompt: pairs need at least 2 candidates of a prompt, got 1")
        rows = [_row(a, b, config) for a, b in chosen]
        kept = [
            row
            for row in rows
            if row["patch_tie_share"] < 1 or not _ties(row["video_margin"], config.pairs.video_delta)
        ]
        if not kept:
            raise UserError(f"pairs: all {len(rows)} pairs tie in the video and in every patch; lower patch_delta")
        write_parquet(stage.folder / "pairs.parquet", pyarrow.Table.from_pylist(kept))
        stage.finish(_counts(rows, kept, config.pairs))


def _video_reward(score: dict[str, Any], config: PairsConfig) -> float:
    missing = [name for name in config.dimensions if f"video_{name}" not in score]
    if missing:
        scored = sorted(name.removeprefix("video_") for name in score if name.startswith("video_"))
        raise UserError(f"pairs.dimensions: {missing[0]} was not scored; expected some of {', '.join(scored)}")
    total = sum(config.dimensions.values())
    if total <= 0:
        raise UserError(f"pairs.dimensions: weights must sum to more than 0, got {total}")
    return sum(weight * score[f"video_{name}"] for name, weight in config.dimensions.items()) / total


def _best_and_worst(clips: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], dict[str, Any]]:
    if len(clips) == 2:
        return clips[0], clips[1]
    ranked = sorted(clips, key=lambda clip: (-clip["video_reward"], clip["candidate"]))
    return ranked[0], ranked[-1]


def _ties(margin: float, delta: float) -> bool:
    # Written so that NaN, which is "not labelled", ties.
    return not abs(margin) > delta


def _row(a: dict[str, Any], b: dict[str, Any], config: Config) -> dict[str, Any]:
    margins = [x - y for x, y in zip(a["patch_rewards"], b["patch_rewards"], strict=True)]
    return {
        "pair_id": f"{a['clip_id']}-{b['clip_id']}",
        "prompt_id": a["prompt_id"],
        "prompt": a["prompt"],
        "clip_a": a["clip_id"],
        "clip_b": b["clip_id"],
        "video_reward_a": a["video_reward"],
        "video_reward_b": b["video_reward"],
        "patch_rewards_a": a["patch_rewards"],
        "patch_rewards_b": b["patch_rewards"],
        "grid": list(config.grid),
        "video_margin": a["video_reward"] - b["video_reward"],
        "patch_tie_share": sum(_ties(margin, config.pairs.patch_delta) for margin in margins) / len(margins),
    }


def _counts(rows: list[dict[str, Any]], kept: list[dict[str, Any]], config: PairsConfig) -> dict[str, int | float]:
    """Shares over the kept pairs; `opposed` is the share of decided patches that disagree with their decided video."""
    decided = opposed = 0
    for row in kept:
        if _ties(row["video_margin"], config.video_delta):
            continue
        margins = [x - y for x, y in zip(row["patch_rewards_a"], row["patch_rewards_b"], strict=True)]
        margins = [margin for margin in margins if not _ties(margin, config.patch_delta)]
        decided += len(margins)
        opposed += sum((margin > 0) != (row["video_margin"] > 0) for margin in margins)
    return {
        "pairs": len(kept),
        "left_out": len(rows) - len(kept),
        "video_tie_share": sum(_ties(row["video_margin"], config.video_delta) for row in kept) / len(kept),
        "patch_tie_share": sum(row["patch_tie_share"] for row in kept) / len(kept),
        "opposed_share": opposed / decided if decided else 0.0,
    }
