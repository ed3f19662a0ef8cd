"""The stage that compares base and aligned model on held-out prompts with the same seeds."""

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from halo_fast.agreement.arms import compare_arms, compare_rewards
from halo_fast.agreement.meters import Meter, MeterRequest, load_meter
from halo_fast.agreement.probes import probe_all
from halo_fast.data.clips import read_clip, write_clip
from halo_fast.data.prompts import prompt_source, read_prompts
from halo_fast.families import family_of, load, source
from halo_fast.families.sampling import clip_seed, sample_clips
from halo_fast.files import progress, write_bytes, write_json, write_parquet
from halo_fast.pipeline.config import Config
from halo_fast.pipeline.judging import check_judges, judge_arms
from halo_fast.pipeline.run import Run
from halo_fast.pipeline.stages.train import training_folder, trainings
from halo_fast.rewards import RewardModel

__all__ = ["evaluate", "evaluation_meter", "evaluation_prompts"]

logger = logging.getLogger(__name__)

_ARMS = ("base", "aligned")
_PROBE_CLIPS = 32  # all of them are in memory at once
# No candidate of a training prompt has this number, so that no evaluation clip starts from noise that was trained on.
_CANDIDATE = -1


@dataclass(frozen=True)
class _ArmClip:
    """A clip of one arm, the first columns of evaluate/clips.parquet; its readings follow."""

    clip_id: str
    arm: str
    prompt_id: int
    prompt: str
    seed: int
    video: str


def evaluate(config: Config, run: Run) -> None:
    """Sample base and aligned model on held-out prompts from the same noise and measure both; a stage.

    Writes evaluate/clips.parquet, videos/{base,aligned}/*.mp4, probes.json (sanity of the reward model) and
    metrics.json, which is copied to the run directory. A killed run is continued at the first unfinished batch.
    Everything is measured on the mp4 files, read back.

    Args:
        config: evaluate holds prompts, meter and resamples.
        run: the run directory.

    Raises:
        UserError: an earlier stage is missing, no such meter, clips that it does not read, an unreadable file.
    """
    settings, model_name = config.evaluate, config.pretrained_model_name_or_path
    check_judges(config)
    own = training_folder(config)
    trained = {own: run.require(f"{own}/{'lora' if config.train.rank else 'model'}")}
    # other networks of the model that were trained in this run, such as Wan 2.2's other expert
    trained |= {path.name: _result(path) for path in trainings(run) if path.name != own}
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
    # judges come after the clips, which they do not change
    keys = {name: value for name, value in asdict(settings).items() if not name.startswith("judge")}
    keys |= {"generate": asdict(config.generate), "grid": config.grid, "seed": config.seed}
    with run.stage("evaluate", keys, inputs) as stage:
        if not stage.done:
            model = RewardModel.load(reward)
            clips = [_arm_clip(arm, index, prompt, config) for arm in _ARMS for index, prompt in enumerate(prompts)]
            _sample(config, clips, list(trained.values()), stage.folder)
            columns = _measure(config, clips, stage.folder, meter, model)
            _write_clips(stage.folder / "clips.parquet", clips, columns)
            metrics = _metrics(config, columns, len(prompts), meter)
            if len(prompts) < 2:
                logger.warning("evaluate: intervals need at least two prompts; raise evaluate.num_prompts")
            write_json(stage.folder / "probes.json", _probes(config, clips, stage.folder, model))
            write_json(stage.folder / "metrics.json", metrics)
            stage.finish({"prompts": len(prompts), "clips": len(clips)})
    write_bytes(run.path / "metrics.json", (stage.folder / "metrics.json").read_bytes())
    judge_arms(config, run)


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


def _arm_clip(arm: str, index: int, prompt: str, config: Config) -> _ArmClip:
    seed = clip_seed(config.seed, index, _CANDIDATE)
    return _ArmClip(f"{arm}_p{index:04d}", arm, index, prompt, seed, f"videos/{arm}/p{index:04d}.mp4")


def _batches(clips: Sequence[_ArmClip], size: int) -> list[list[_ArmClip]]:
    """Batches of one arm each; both arms are in the same batches, because rounding may depend on them."""
    arms = ([clip for clip in clips if clip.arm == arm] for arm in _ARMS)
    return [arm[start : start + size] for arm in arms for start in range(0, len(arm), size)]


def _result(training: Path) -> Path:
    """Where a training's LoRA or network is."""
    return next(path for name in ("lora", "model") if (path := training / name).exists())


def _sample(config: Config, clips: Sequence[_ArmClip], trained: Sequence[Path], folder: Path) -> None:
    """Write the clips that do not exist yet."""
    batches = _batches(clips, config.generate.batch_size)
    missing = [batch for batch in batches if not all((folder / clip.video).exists() for clip in batch)]
    if not missing:
        return
    from halo_fast.export.lora import load_trained, trained_network

    family = load(config.pretrained_model_name_or_path, network=config.train.network, precision=config.precision)
    arm = _ARMS[0]
    for batch in progress(missing, len(missing), "evaluate"):
        if batch[0].arm != arm:
            arm = batch[0].arm
            # a single result was made for the config's own network
            for result in trained:
                part = family if len(trained) == 1 else family_of(family.pipeline, trained_network(result))
                load_trained(part, result)
        _, videos = sample_clips(
            family, [clip.prompt for clip in batch], [clip.seed for clip in batch], config.generate
        )
        for clip, video in zip(batch, videos, strict=True):
            write_clip(folder / clip.video, video, config.generate.fps, config.generate.crf)


@torch.no_grad()
def _measure(
    config: Config, clips: Sequence[_ArmClip], folder: Path, meter: Meter, model: RewardModel
) -> dict[str, NDArray[Any]]:
    """Readings of the meter and scores of the reward model for every clip: name -> [2N] or [2N, P], base first."""
    parts: dict[str, list[Tensor]] = {}
    for batch in _batches(clips, config.score.batch_size):
        videos = torch.stack([read_clip(folder / clip.video) for clip in batch])
        prompts = [clip.prompt for clip in batch]
        video, patches = model.by_dimension(model(videos, prompts, config.grid))
        columns = dict(meter(videos, prompts))
        columns |= {f"video_{name}": values for name, values in video.items()}
        columns |= {f"patch_{name}": values for name, values in patches.items()}
        for name, values in columns.items():
            parts.setdefault(name, []).append(values.flatten(1) if values.ndim > 1 else values)
    return {name: torch.cat(values).numpy() for name, values in parts.items()}


def _write_clips(path: Path, clips: Sequence[_ArmClip], columns: dict[str, NDArray[Any]]) -> None:
    import pyarrow

    table = {field.name: [getattr(clip, field.name) for clip in clips] for field in fields(_ArmClip)}
    write_parquet(path, pyarrow.table(table | {name: values.tolist() for name, values in columns.items()}))


def _probes(config: Config, clips: Sequence[_ArmClip], folder: Path, model: RewardModel) -> list[dict[str, Any]]:
    """Outcomes of the probes on the aligned model's first clips."""
    aligned = [clip for clip in clips if clip.arm == "aligned"][:_PROBE_CLIPS]
    videos = torch.stack([read_clip(folder / clip.video) for clip in aligned])
    probes = probe_all(model, videos, [clip.prompt for clip in aligned], config.grid, config.seed)
    return [probe.as_dict() for probe in probes]


def _metrics(config: Config, columns: dict[str, NDArray[Any]], count: int, meter: Meter) -> dict[str, Any]:
    """The figures of metrics.json; the first `count` rows of the columns are the base's."""
    base, aligned = (
        {name: values[rows] for name, values in columns.items()} for rows in (slice(count), slice(count, None))
    )
    metrics = compare_arms(base, aligned, meter.clean, config.evaluate.bootstrap, config.seed)
    # a reward model always agrees with a meter that is the reward model itself
    severity = None if config.evaluate.meter == "reward" else "severity"
    return metrics | {"patch_grid": list(config.grid)} | compare_rewards(base, aligned, severity)
