"""The stage that pairs the candidates of every prompt."""

from dataclasses import asdict

from halo_fast.data.pairs import pair_candidates, pair_statistics
from halo_fast.data.tables import ClipRow, PairRow, ScoreRow, read_rows, write_rows
from halo_fast.pipeline.config import Config
from halo_fast.pipeline.run import Run

__all__ = ["build_pairs"]


def build_pairs(config: Config, run: Run) -> None:
    """Build preference pairs with `halo_fast.data.pairs.pair_candidates`.

    Reads generate/clips.parquet and score/scores.parquet, writes pairs/pairs.parquet.

    Raises:
        UserError: clips and scores that give no pairs.
    """
    clips_file, scores_file = run.require("generate/clips.parquet"), run.require("score/scores.parquet")
    settings = asdict(config.pairs) | {"grid": config.grid}
    with run.stage("pairs", settings, {"clips": clips_file, "scores": scores_file}) as stage:
        if stage.done:
            return
        clips, scores = read_rows(clips_file, ClipRow), read_rows(scores_file, ScoreRow)
        pairs, left_out = pair_candidates(clips, scores, config.pairs, config.grid)
        write_rows(stage.folder / "pairs.parquet", pairs, PairRow)
        counts = {"pairs": len(pairs), "left_out": left_out}
        stage.finish(counts | pair_statistics(pairs, config.pairs))
