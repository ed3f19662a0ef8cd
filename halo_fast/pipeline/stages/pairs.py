"""The stage that pairs the candidates of every prompt."""

import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict

from halo_fast.data.fitting import VideoFormat
from halo_fast.data.pairs import complete_pairs, pair_candidates, pair_statistics, real_pairs, without_duplicates
from halo_fast.data.tables import ClipRow, PairRow, ScoreRow, read_rows, write_rows
from halo_fast.errors import UserError
from halo_fast.pipeline.clips import clip_sizes, given_pairs, run_clips
from halo_fast.pipeline.config import Config
from halo_fast.pipeline.run import Run

__all__ = ["build_pairs"]

logger = logging.getLogger(__name__)


def build_pairs(config: Config, run: Run) -> None:
    """Build preference pairs with `halo_fast.data.pairs.pair_candidates`; given pairs come first, as they are.

    Reads the clips of generate and import, score/scores.parquet, import/pairs.parquet and, if there is neither teacher
    nor reward_model, generate/pairs.parquet. Writes pairs/pairs.parquet. Given pairs need no scores. Where there are
    scores, they fill in patches that nobody labelled, and candidates of prompts without a given pair are paired too.

    Raises:
        UserError: clips and scores that give no pairs.
    """
    found, scored = run_clips(run), run.path / "score/scores.parquet"
    inputs = {"clips": next(iter(found.inputs.values())) / "clips.parquet", **dict(list(found.inputs.items())[1:])}
    tables = {f"pairs of {name}": run.require(f"{name}/pairs.parquet") for name in given_pairs(config, run)}
    inputs |= tables
    if scored.exists() or not (tables or config.pairs.real_wins):
        inputs["scores"] = run.require("score/scores.parquet")
    settings = asdict(config.pairs) | {"grid": config.grid}
    with run.stage("pairs", settings, inputs) as stage:
        if stage.done:
            return
        scores = read_rows(inputs["scores"], ScoreRow) if "scores" in inputs else []
        given = [row for table in tables.values() for row in read_rows(table, PairRow)]
        sizes = clip_sizes(config, run, found.rows)
        if config.pairs.real_wins:
            made = [clip for clip in found.rows if clip.strategy]
            given += real_pairs([clip for clip in found.rows if not clip.strategy], made, config.grid, sizes)
        pairs, left_out = complete_pairs(given, scores, config.pairs)
        paired = {pair.prompt_id for pair in pairs}
        others = [clip for clip in found.rows if clip.prompt_id not in paired] if scores else []
        if others or not pairs:
            more, fewer = pair_candidates(others, scores, config.pairs, config.grid, not pairs, sizes)
            if sizes:
                _tell_single(others, sizes)
            pairs, left_out = pairs + more, left_out + fewer
        once = without_duplicates(pairs, scores)
        if not once:
            raise UserError(f"pairs: in all {len(pairs)} pairs both clips have the same pixels; generate other clips")
        write_rows(stage.folder / "pairs.parquet", once, PairRow)
        statistics = pair_statistics(once, config.pairs, found.rows, scores)
        _warn_of_still_winners(statistics.get("still_wins_share", 0), len(once))
        stage.finish({"pairs": len(once), "left_out": left_out, "duplicates": len(pairs) - len(once)} | statistics)


def _tell_single(clips: Sequence[ClipRow], sizes: Mapping[str, VideoFormat]) -> None:
    """Say which clips are in no pair, because no other of their prompt has their size."""
    groups = Counter((clip.prompt_id, sizes[clip.clip_id]) for clip in clips)
    single = [clip for clip in clips if groups[clip.prompt_id, sizes[clip.clip_id]] == 1]
    if single:
        logger.warning(
            "pairs: %d clips are in no pair, because no other of their prompt has their size; the first is %s, of "
            "%d x %d x %d (imports.size crop and imports.frames trim give all clips one size)",
            len(single), single[0].clip_id, *sizes[single[0].clip_id][:3],
        )  # fmt: skip


def _warn_of_still_winners(share: float, pairs: int) -> None:
    """Say if the clip that moves less wins far more often than by chance (4 standard deviations)."""
    if share > 0.5 + 2 / math.sqrt(pairs):
        logger.warning(
            "pairs: in %.0f%% of the pairs the clip that moves less wins, so a model may learn to stand still; give "
            "pairs.dimensions.dynamic_degree more weight",
            100 * share,
        )
