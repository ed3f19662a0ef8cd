"""The stage that pairs the candidates of every prompt."""

from dataclasses import asdict

from halo_fast.data.pairs import complete_pairs, pair_candidates, pair_statistics
from halo_fast.data.tables import PairRow, ScoreRow, read_rows, write_rows
from halo_fast.pipeline.clips import run_clips
from halo_fast.pipeline.config import Config
from halo_fast.pipeline.run import Run

__all__ = ["build_pairs"]


def build_pairs(config: Config, run: Run) -> None:
    """Build preference pairs with `halo_fast.data.pairs.pair_candidates`; imported pairs come first, as they are.

    Reads the clips of generate and import, score/scores.parquet and import/pairs.parquet, writes pairs/pairs.parquet.
    Imported pairs need no scores. Where there are scores, they fill in the patches that nobody labelled, and candidates
    of prompts without an imported pair are paired too.

    Raises:
        UserError: clips and scores that give no pairs.
    """
    found, given, scored = run_clips(run), run.path / "import/pairs.parquet", run.path / "score/scores.parquet"
    inputs = {"clips": next(iter(found.inputs.values())) / "clips.parquet", **dict(list(found.inputs.items())[1:])}
    imported = bool(config.imports.sources) and given.exists()
    if imported:
        inputs["imported pairs"] = run.require("import/pairs.parquet")
    if scored.exists() or not imported:
        inputs["scores"] = run.require("score/scores.parquet")
    settings = asdict(config.pairs) | {"grid": config.grid}
    with run.stage("pairs", settings, inputs) as stage:
        if stage.done:
            return
        scores = read_rows(inputs["scores"], ScoreRow) if "scores" in inputs else []
        pairs, left_out = complete_pairs(read_rows(given, PairRow) if imported else [], scores, config.pairs)
        paired = {pair.prompt_id for pair in pairs}
        others = [clip for clip in found.rows if clip.prompt_id not in paired] if scores else []
        if others or not pairs:
            more, fewer = pair_candidates(others, scores, config.pairs, config.grid, required=not pairs)
            pairs, left_out = pairs + more, left_out + fewer
        write_rows(stage.folder / "pairs.parquet", pairs, PairRow)
        counts = {"pairs": len(pairs), "left_out": left_out}
        stage.finish(counts | pair_statistics(pairs, config.pairs))
