"""The stage that reads clips, pairs and labels of one's own."""

import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from halo_fast.data.fitting import Closest, VideoFormat
from halo_fast.data.imports import ImportedRow, forget_facts, import_sources, source_key
from halo_fast.data.sources import LeftOutRow
from halo_fast.data.tables import LabelRow, PairRow, write_rows
from halo_fast.errors import UserError
from halo_fast.families import load, source
from halo_fast.families.base import Family
from halo_fast.files import write_json
from halo_fast.patches import LatentFactors, PatchGrid
from halo_fast.pipeline.clips import FACTORS_FILE
from halo_fast.pipeline.config import Config
from halo_fast.pipeline.run import Run
from halo_fast.pipeline.stages.generate import warn_of_prompts

__all__ = ["import_clips"]

logger = logging.getLogger(__name__)

_SHOWN = 10  # lines of what was left out


def import_clips(config: Config, run: Run) -> None:
    """Import clips, labels and pairs; a stage.

    Writes import/clips.parquet and videos/CLIP.mp4; labels.parquet and pairs.parquet if there are any; and
    left_out.parquet. Clips get the format of config.generate, or keep their own. Where a model is named, the format is
    one that it makes, and patches are those of its latents. A killed import continues at the first unfinished clip.

    Raises:
        UserError: no sources, one that cannot be read, no clip at all, or a format that the model does not make.
    """
    settings, form = config.imports, config.generate
    if not settings.sources:
        raise UserError("imports.sources: required; give a folder or table of clips: `halo import SOURCE`")
    inside = [name for name in settings.sources if run.path.resolve().is_relative_to(Path(name).resolve())]
    if inside:
        raise UserError(f"output_dir: {run.path} lies inside the source {inside[0]}; choose another")
    wanted = VideoFormat(form.num_frames, form.height, form.width, form.fps)
    keys = {"imports": asdict(settings), "grid": config.grid}
    keys |= {"generate": {name: getattr(form, name) for name in ("num_frames", "height", "width", "fps", "crf")}}
    inputs: dict[str, Path | str] = {f"source {name}": source_key(Path(name)) for name in settings.sources}
    model = config.pretrained_model_name_or_path
    if model:
        inputs["pretrained_model_name_or_path"] = source(model)
    with run.stage("import", keys, inputs) as stage:
        if stage.done:
            return
        family = load(model, device="cpu", weights=()) if model else None
        patches = _patches(config, family)
        found = import_sources(settings, wanted, patches, stage.folder, form.crf, _closest(family))
        write_rows(stage.folder / "clips.parquet", found.clips, ImportedRow)
        for name, rows, kind in (("labels", found.labels, LabelRow), ("pairs", found.pairs, PairRow)):
            if rows:
                write_rows(stage.folder / f"{name}.parquet", rows, kind)
        write_rows(stage.folder / "left_out.parquet", found.left_out, LeftOutRow)
        write_json(stage.folder / FACTORS_FILE, {name: getattr(patches, name) for name in LatentFactors._fields})
        forget_facts(stage.folder)
        warn_of_prompts([row.prompt for row in found.clips], config)
        _list_left_out(found.left_out, stage.folder / "left_out.parquet")
        changed = sum(bool(row.changes) for row in found.clips)
        prompts = len({row.prompt_id for row in found.clips})
        counts = {"clips": len(found.clips), "prompts": prompts, "changed": changed}
        counts |= {"labelled": len(found.labels), "pairs": len(found.pairs), "left_out": len(found.left_out)}
        stage.finish(counts)


def _patches(config: Config, family: Family | None) -> PatchGrid:
    """The patches of a clip on the model's latents; without a model those of Wan, CogVideoX and HunyuanVideo."""
    form = config.generate
    size = form.num_frames, form.height, form.width
    grid = config.grid[0], config.grid[1], config.grid[2]
    factors = family.latent_factors(*size) if family else LatentFactors(8, 4, True)
    try:
        return PatchGrid(grid, *size, **factors._asdict())
    except ValueError as error:
        raise UserError(f"grid, generate: {error}") from error


def _closest(family: Family | None) -> Closest:
    """What clips are cut to that keep their own format; UserError for one that the model does not make."""

    def closest(num_frames: int, height: int, width: int) -> tuple[int, int, int]:
        if family is None:
            return (num_frames - 1) // 4 * 4 + 1, max(height // 8, 1) * 8, max(width // 8, 1) * 8
        cut = family.closest_format(num_frames, height, width)
        family.latent_shape(*cut)
        return cut

    return closest


def _list_left_out(rows: Sequence[LeftOutRow], file: Path) -> None:
    """Say what was left out, and why."""
    if not rows:
        return
    logger.warning("import: %d left out:", len(rows))
    for row in rows[:_SHOWN]:
        logger.warning("  %s: %s", row.what, row.reason)
    if len(rows) > _SHOWN:
        logger.warning("  and %d more, listed in %s", len(rows) - _SHOWN, file)
