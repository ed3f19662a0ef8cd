"""The clips of a run: those it generated, those it imported, or both in one table; and the stages that they need."""

import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from halo_fast import processes
from halo_fast.data.clips import latent_factors
from halo_fast.data.fitting import FitPolicy, VideoFormat
from halo_fast.data.imports import ImportedRow, clip_format, keeps_formats
from halo_fast.data.labels import join_labels
from halo_fast.data.tables import ClipRow, PairRow, read_rows
from halo_fast.errors import UserError
from halo_fast.export.datasets import RunData
from halo_fast.families import Denoiser
from halo_fast.families.sampling import draws_noise
from halo_fast.files import read_json
from halo_fast.patches import PIXELS, LatentFactors
from halo_fast.pipeline.config import Config
from halo_fast.pipeline.run import Run
from halo_fast.pipeline.stages import StageEntry, run_stage

__all__ = [
    "FACTORS_FILE",
    "RunClips",
    "clip_sizes",
    "clip_stages",
    "given_pairs",
    "noise_seeds",
    "read_run_data",
    "run_all",
    "run_clips",
    "run_stages",
]

logger = logging.getLogger(__name__)

FACTORS_FILE = "latents.json"  # how the model's latents lie on clips


class RunClips(NamedTuple):
    """The clips that the stages after generate and import read.

    Args:
        rows: of all clips.
        folder: to which the rows' files are relative.
        inputs: folders of the stages that made them, for `Run.stage`.
    """

    rows: list[ClipRow]
    folder: Path
    inputs: dict[str, Path]

    def factors(self) -> LatentFactors | None:
        """How the model's latents lie on the clips, if known."""
        for folder in self.inputs.values():
            known = read_json(folder / FACTORS_FILE)
            if known:
                return LatentFactors(**known)
        return latent_factors(self.folder, self.rows[0])


def clip_stages(config: Config) -> list[str]:
    """The stages whose clips a run works on: import where there are sources, else generate; or both."""
    if not config.imports.sources:
        return ["generate"]
    return ["import", "generate"] if config.imports.generate else ["import"]


def run_clips(run: Run, earlier: bool = False) -> RunClips:
    """The clips of a run; those of two stages are one table, in which equal prompts have one number.

    Args:
        run: or a later round of it.
        earlier: whether the clips of the rounds before it are among them.

    Raises:
        UserError: a stage that makes clips is unfinished or was made with another config.
    """
    made = [(one, name) for one in (run.rounds if earlier else [run]) for name in clip_stages(one.config)]
    found = [one.require(f"{name}/clips.parquet").parent for one, name in made]
    if len(found) == 1:
        (folder,) = found
        return RunClips(read_rows(folder / "clips.parquet", ClipRow), folder, {"clips": folder})
    folders = {folder.relative_to(run.root).as_posix(): folder for folder in found}
    return RunClips(_joined(folders), run.root, {f"clips of {name}": folder for name, folder in folders.items()})


def clip_sizes(config: Config, run: Run, clips: Sequence[ClipRow]) -> dict[str, VideoFormat] | None:
    """The format of each clip, by clip_id; None where all have that of config.generate.

    Args:
        config: of the run.
        run: whose import is looked at.
        clips: of the run.
    """
    if "import" not in clip_stages(config) or not keeps_formats(config.imports):
        return None
    form = config.generate
    wanted = VideoFormat(form.num_frames, form.height, form.width, form.fps)
    rows = read_rows(run.path / "import" / "clips.parquet", ImportedRow)
    own = {row.clip_id: clip_format(row, config.imports, wanted) for row in rows}
    return {clip.clip_id: own.get(clip.clip_id, wanted) for clip in clips}


def noise_seeds(clips: Sequence[ClipRow], family: Denoiser) -> tuple[dict[str, int], str]:
    """The seeds of clips that follow from their noise alone, and what the others are, with counts.

    Args:
        clips: of a run.
        family: the model that sampled them.
    """
    reason = draws_noise(family)
    if reason:
        return {}, f"{len(clips)} clips because {reason}"
    seeds = {clip.clip_id: clip.seed for clip in clips if clip.strategy == "independent" and clip.seed is not None}
    others = Counter(clip.strategy or "imported" for clip in clips if clip.clip_id not in seeds)
    return seeds, ", ".join(f"{count} clips are {name}" for name, count in sorted(others.items()))


def given_pairs(config: Config, run: Run | None = None) -> list[str]:
    """The stages of a run that give pairs with labels: an import of them, and corrupted clips that nobody else judges.

    Args:
        config: of the run.
        run: whose import is looked at; None where nothing is known of it.
    """
    stages = clip_stages(config)
    judged = config.annotate.teacher or config.reward_model
    corrupted = "generate" in stages and config.generate.strategy == "corrupt" and not judged
    imported = "import" in stages and run is not None and (run.path / "import" / "pairs.parquet").exists()
    return ["import"] * imported + ["generate"] * corrupted


def _joined(folders: dict[str, Path]) -> list[ClipRow]:
    """The clips of several stages, with files relative to the run directory."""
    prompts: dict[str, int] = {}
    counts: dict[str, int] = {}
    joined = []
    for name, folder in folders.items():
        for row in read_rows(folder / "clips.parquet", ClipRow):
            number = prompts.setdefault(row.prompt, len(prompts))
            candidate = counts[row.prompt] = counts.get(row.prompt, -1) + 1
            latents = row.latents and f"{name}/{row.latents}"
            joined.append(
                replace(row, prompt_id=number, candidate=candidate, video=f"{name}/{row.video}", latents=latents)
            )
    return joined


def run_stages(config: Config, stages: Sequence[str], run: Run | None = None) -> list[str]:
    """The stages, in order, that `halo run` goes through with a config.

    Without sources all but import. With sources generate only if imports.generate. Nothing is annotated with a
    reward_model, nor without a teacher where there are imported labels, or pairs that need none: imported ones,
    corrupted clips, real clips that win. Without any label there is no reward: then the run ends with train.

    Args:
        config: of the run.
        stages: all there are.
        run: whose finished import is looked at; None where nothing is known of it.

    Raises:
        UserError: an import that gives neither labels nor pairs, and no teacher.
    """
    needed = [name for name in stages if name not in ("import", "generate") or name in clip_stages(config)]
    if config.reward_model:
        return [name for name in needed if name != "annotate"]
    known = config.pairs.real_wins or given_pairs(config, run)
    if config.annotate.teacher or not (config.imports.sources or known):
        return needed
    needed.remove("annotate")
    if config.imports.sources and (run is None or (run.path / "import" / "labels.parquet").exists()):
        return needed
    if not known:
        raise UserError(
            "annotate.teacher: the import gives neither labels nor pairs; name a teacher, or import scores too"
        )
    return [name for name in needed if name not in ("reward", "score", "evaluate", "report")]


def run_all(config: Config, run: Run, stages: Mapping[str, StageEntry]) -> None:
    """Go through all stages that a run needs, one after another, round by round.

    Args:
        config: of the run.
        run: its directory.
        stages: all there are, in order.
    """
    _run_round(run, stages)
    for number in range(2, config.rounds + 1):
        logger.info("round %d of %d", number, config.rounds)
        _run_round(Run(config, run.force, number), stages)


def _run_round(run: Run, stages: Mapping[str, StageEntry]) -> None:
    config = run.config
    planned = run_stages(config, list(stages))
    run.planned = planned
    for name in planned:
        if name == "import" or name in processes.by_first(lambda: run_stages(config, list(stages), run)):
            run_stage(stages[name], config, run)
        else:
            logger.info("%s: left out, because there are pairs without labels of clips, and no teacher", name)


def read_run_data(run: Path) -> RunData:
    """Clips, labels and pairs of a run directory, whatever config it was made with.

    Raises:
        UserError: no clips.
    """
    folders = {name: run / name for name in ("import", "generate") if (run / name / "manifest.json").exists()}
    if not folders:
        raise UserError(f"{run}: expected a run directory with clips; run `halo import` or `halo generate` first")
    manifests = {name: read_json(folder / "manifest.json") or {} for name, folder in folders.items()}
    imported = read_rows(run / "import" / "clips.parquet", ImportedRow) if "import" in folders else []
    last = manifests[list(folders)[-1]]
    form = last["settings"].get("generate", last["settings"])
    wanted = VideoFormat(form["num_frames"], form["height"], form["width"], form["fps"])
    policy = FitPolicy(manifests["import"]["settings"]["imports"]["size"]) if imported else FitPolicy()
    labels = [table for name in ("import", "annotate") if (table := run / name / "labels.parquet").exists()]
    pairs = next((table for name in ("pairs", "import") if (table := run / name / "pairs.parquet").exists()), None)
    clips = _joined(folders)
    model = str(manifests.get("generate", {}).get("inputs", {}).get("pretrained_model_name_or_path", ""))
    made = [clip.clip_id for clip in clips if clip.video.startswith("generate/")]
    return RunData(
        clips, run, read_rows(pairs, PairRow) if pairs else [], join_labels(labels),
        wanted,
        {row.clip_id: row.generator for row in imported} | dict.fromkeys(made, model),
        {row.clip_id: row.changes for row in imported},
        dict.fromkeys(made, json.dumps(form)),
        (read_json(run / "pairs" / "manifest.json") or {"settings": {}})["settings"].get("video_delta", 0.0),
        RunClips(clips, run, folders).factors() or PIXELS,
        {row.clip_id: clip_format(row, policy, wanted) for row in imported},
    )  # fmt: skip
