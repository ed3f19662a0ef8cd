"""The stage that compares base and aligned model on held-out prompts with the same seeds."""

import logging
from collections.abc import Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import torch

from halo_fast import processes
from halo_fast.agreement.analysis import Rule, analyse, analysis_as_json, analysis_sections
from halo_fast.agreement.arms import arm_columns, compare_arms, compare_rewards
from halo_fast.agreement.meters import Meter, MeterRequest, load_meter
from halo_fast.agreement.probes import probe_all
from halo_fast.data.clips import read_clip
from halo_fast.data.prompts import prompt_source, read_prompts
from halo_fast.data.summary import Section, format_section
from halo_fast.data.tables import EvaluatedRow, write_rows
from halo_fast.families import source
from halo_fast.files import read_json, write_bytes, write_json
from halo_fast.pipeline.arms import arm_clips, measure_arms, sample_arms
from halo_fast.pipeline.config import Config
from halo_fast.pipeline.judging import check_judges, judge_arms
from halo_fast.pipeline.pictures import picture_input
from halo_fast.pipeline.run import Run
from halo_fast.pipeline.stages.train import trained_results, training_folder
from halo_fast.rewards import RewardModel

__all__ = ["evaluate", "evaluation_meter", "evaluation_prompts", "printed"]

logger = logging.getLogger(__name__)

_PROBE_CLIPS = 32  # all of them are in memory at once


def evaluate(config: Config, run: Run) -> None:
    """Sample base and aligned model on held-out prompts from the same noise and measure both; a stage.

    Writes evaluate/clips.parquet, videos/{base,aligned}/*.mp4, probes.json (sanity of the reward model), metrics.json,
    which is copied to the run directory, and analysis.json, whose tables are printed. A killed run is continued at the
    first unfinished batch. Everything is measured on the mp4 files, read back.

    Args:
        config: evaluate holds prompts, meter and resamples.
        run: the run directory.

    Raises:
        UserError: an earlier stage is missing, no such meter, clips that it does not read, an unreadable file.
    """
    settings, model_name = config.evaluate, config.pretrained_model_name_or_path
    check_judges(config)
    own, trained = training_folder(config), trained_results(config, run)
    reward = run.require("reward/model.safetensors").parent
    prompts = evaluation_prompts(config)
    meter = evaluation_meter(config, prompts, reward)
    inputs = {
        "evaluation_prompts": prompt_source(config.evaluation_prompts),
        "pretrained_model_name_or_path": source(model_name),
        **{"trained" if name == own else f"trained, {name}": folder for name, folder in trained.items()},
        "reward": reward,
        **meter.sources,
    }
    inputs |= picture_input(config, config.evaluation_prompts, "evaluation_prompts")
    # judges come after the clips, which they do not change
    keys = {name: value for name, value in asdict(settings).items() if not name.startswith("judge")}
    keys |= {"generate": asdict(config.generate), "grid": config.grid, "seed": config.seed}
    keys["pairs"] = asdict(config.pairs)  # how rewards become preferences
    keys |= {"quantization": config.quantization} if config.quantization else {}
    with run.stage("evaluate", keys, inputs) as stage:
        if not stage.done:
            model = RewardModel.load(reward, "cpu")  # on the GPU once the video model is gone
            clips = arm_clips(prompts, config.seed)
            sample_arms(config, clips, list(trained.values()), stage.folder)
            rows = measure_arms(config, clips, stage.folder, meter, model.to(processes.device()))
            if processes.is_first():
                _write_tables(config, rows, stage.folder, meter, model)
                stage.finish({"prompts": len(prompts), "clips": len(clips)})
    processes.by_first(lambda: _conclude(config, run, stage.folder))


def _write_tables(config: Config, rows: Sequence[EvaluatedRow], folder: Path, meter: Meter, model: RewardModel) -> None:
    """Write what was measured, and what follows from it."""
    write_rows(folder / "clips.parquet", rows)
    if len(rows) < 4:
        logger.warning("evaluate: intervals need at least two prompts; raise evaluate.num_prompts")
    write_json(folder / "probes.json", _probes(config, rows, folder, model))
    write_json(folder / "metrics.json", _metrics(config, rows, meter))
    write_json(folder / "analysis.json", _analysis(config, rows))


def _conclude(config: Config, run: Run, folder: Path) -> None:
    """What follows a finished evaluation, each time: its figures in the run directory, its tables, and the judges."""
    write_bytes(run.path / "metrics.json", (folder / "metrics.json").read_bytes())
    print(printed(folder))
    judge_arms(config, run)


def printed(folder: Path) -> str:
    """The tables of a finished evaluation as text.

    Args:
        folder: of the stage.
    """
    found = read_json(folder / "analysis.json") or {"tables": []}
    return "\n\n".join(format_section(Section(**table)) for table in found["tables"])


def evaluation_prompts(config: Config) -> list[str]:
    """The held-out prompts; UserError if there are none."""
    return read_prompts(config.evaluation_prompts, config.evaluate.num_prompts, config.seed, "evaluation_prompts")


def evaluation_meter(config: Config, prompts: Sequence[str], reward: Path) -> Meter:
    """The meter that `evaluate.meter` names.

    Args:
        config: of the run.
        prompts: of the clips that it will measure.
        reward: folder of the run's reward model; it need not exist before the meter reads it.

    Raises:
        UserError: no such meter, or one that cannot read such clips.
    """
    size = config.generate.num_frames, config.generate.height, config.generate.width
    grid = config.grid[0], config.grid[1], config.grid[2]
    request = MeterRequest(grid, size, prompts, config.seed, cache(lambda: RewardModel.load(reward)))
    return load_meter(config.evaluate.meter, request)


def _probes(config: Config, clips: Sequence[EvaluatedRow], folder: Path, model: RewardModel) -> list[dict[str, Any]]:
    """Outcomes of the probes on the aligned model's first clips."""
    aligned = [clip for clip in clips if clip.arm == "aligned"][:_PROBE_CLIPS]
    videos = torch.stack([read_clip(folder / clip.video) for clip in aligned])
    prompts = [clip.prompt for clip in aligned]
    probes = probe_all(model, videos, prompts, config.grid, config.seed, min(config.score.batch_size, _PROBE_CLIPS))
    return [probe.as_dict() for probe in probes]


def _metrics(config: Config, rows: Sequence[EvaluatedRow], meter: Meter) -> dict[str, Any]:
    """The figures of metrics.json."""
    base, aligned = arm_columns(rows, "base"), arm_columns(rows, "aligned")
    metrics = compare_arms(base, aligned, meter.clean, config.evaluate.bootstrap, config.seed)
    # a reward model always agrees with a meter that is the reward model itself
    severity = None if config.evaluate.meter == "reward" else "severity"
    return metrics | {"patch_grid": list(config.grid)} | compare_rewards(base, aligned, severity)


def _analysis(config: Config, rows: Sequence[EvaluatedRow]) -> dict[str, Any]:
    """What is counted of both arms, as figures and as the tables that are printed."""
    rule = Rule(config.pairs.dimensions, config.pairs.patch_delta, config.evaluate.bootstrap, config.seed)
    analysis = analyse(rows, config.grid, rule)
    tables = [asdict(section) for section in analysis_sections(analysis)]
    return {"figures": analysis_as_json(analysis), "tables": tables}
