"""The stage that compares base and aligned model on held-out prompts with the same seeds."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from halo_fast.agreement.arms import compare_arms, spearman
from halo_fast.agreement.probes import probe_all
from halo_fast.data.clips import read_clip, write_clip
from halo_fast.data.prompts import prompt_source, read_prompts
from halo_fast.errors import UserError
from halo_fast.families import load, source
from halo_fast.families.sampling import clip_seed, sample_clips
from halo_fast.files import progress, write_bytes, write_json, write_parquet
from halo_fast.pipeline.config import Config
from halo_fast.pipeline.run import Run
from halo_fast.pipeline.stages.score import score_columns
from halo_fast.rewards import RewardModel

__all__ = ["evaluate", "evaluation_prompts", "load_meter"]

Meter = Callable[[Tensor, list[str]], dict[str, Tensor]]
"""Videos uint8 [N, F, H, W, 3] and prompts -> columns: severity [N, P] in [0, 1] and whatever else is measured."""

_CLEAN_CLIPS = 256
_PROBE_CLIPS = 32  # all of them are in memory at once
# No candidate of a training prompt has this number, so that no evaluation clip starts from noise that was trained on.
_CANDIDATE = -1


def evaluate(config: Config, run: Run) -> None:
    """Sample base and aligned model on held-out prompts from the same noise and measure both; a stage.

    Writes evaluate/clips.parquet, videos/{base,aligned}/*.mp4, probes.json (sanity of the reward model) and
    metrics.json, which is copied to the run directory.
    A killed run is continued at the first unfinished batch; everything is measured on the mp4 files, read back.

    Raises:
        UserError: an earlier stage is missing, unknown meter, a grid that the meter does not measure, an unreadable
            file.
    """
    import pyarrow

    settings, model_name = config.evaluate, config.pretrained_model_name_or_path
    trained = run.require("train/lora" if config.train.rank else "train/model")
    reward = run.require("reward/model.safetensors").parent
    prompts = evaluation_prompts(config)
    inputs = {
        "evaluation_prompts": prompt_source(config.evaluation_prompts),
        "pretrained_model_name_or_path": source(model_name),
        "trained": trained,
        "reward": reward,
    }
    if settings.meter == "demo":
        from halo_fast.demo.meters import WEIGHTS

        inputs |= {name: WEIGHTS / f"{name}.safetensors" for name in ("defect_meter", "fidelity_meter")}
    keys = asdict(settings) | {"generate": asdict(config.generate), "grid": config.grid, "seed": config.seed}
    with run.stage("evaluate", keys, inputs) as stage:
        if not stage.done:
            model = RewardModel.load(reward)
            meter, clean = load_meter(config, model)
            rows = [
                _row(arm, index, prompt, config) for arm in ("base", "aligned") for index, prompt in enumerate(prompts)
            ]
            _sample(config, rows, trained, stage.folder)
            columns = _measure(config, rows, stage.folder, meter, model)
            table = {name: [row[name] for row in rows] for name in rows[0]}
            table |= {name: values.tolist() for name, values in columns.items()}
            write_parquet(stage.folder / "clips.parquet", pyarrow.table(table))
            metrics = _metrics(config, columns, len(prompts), clean)
            if len(prompts) < 2:
                print("evaluate: an interval needs more prompts than one; see evaluate.num_prompts", file=sys.stderr)
            write_json(stage.folder / "probes.json", _probes(config, rows, stage.folder, model))
            write_json(stage.folder / "metrics.json", metrics)
            stage.finish({"prompts": len(prompts), "clips": len(rows)})
    write_bytes(run.path / "metrics.json", (stage.folder / "metrics.json").read_bytes())


def evaluation_prompts(config: Config) -> list[str]:
    """The held-out prompts; UserError if there are none, or the meter does not exist or cannot read such clips."""
    settings = config.evaluate
    prompts = read_prompts(config.evaluation_prompts, settings.num_prompts, config.seed, "evaluation_prompts")
    if settings.meter not in ("demo", "reward"):
        raise UserError(f'evaluate.meter: expected "demo" or "reward", got {settings.meter!r}')
    if settings.meter == "demo":
        from halo_fast import demo

        demo.check(config, prompts, "evaluation_prompts")
    return prompts


def load_meter(config: Config, model: RewardModel) -> tuple[Meter, float]:
    """The meter that `config.evaluate.meter` names, and its mean severity on clean clips.

    "demo" is the demo world's defect and fidelity meter. "reward" reads severity off the reward model's patch quality,
    (5 - score) / 4, for models that no meter is made for: mind that the model was aligned to these very scores.

    Both were checked by `evaluation_prompts`.
    """
    if config.evaluate.meter == "reward":
        return lambda videos, prompts: {"severity": (5 - model(videos, prompts, config.grid).patches[:, 0]) / 4}, 0.0
    from halo_fast.demo import world
    from halo_fast.demo.meters import DefectMeter, FidelityMeter

    defects, fidelity = DefectMeter.load(), FidelityMeter.load()

    def meter(videos: Tensor, prompts: list[str]) -> dict[str, Tensor]:
        severity, by_kind = defects(videos, prompts)
        kinds = {f"severity_{kind}": by_kind[:, index] for index, kind in enumerate(defects.kinds)}
        return {"severity": severity, **kinds, **fidelity(videos, prompts)}

    clean_videos, clean_prompts = world.clean_clips(_CLEAN_CLIPS, config.seed, split="heldout")
    return meter, float(defects(clean_videos, clean_prompts)[0].mean())


def _row(arm: str, index: int, prompt: str, config: Config) -> dict[str, Any]:
    return {
        "clip_id": f"{arm}_p{index:04d}",
        "arm": arm,
        "prompt_id": index,
        "prompt": prompt,
        "seed": clip_seed(config.seed, index, _CANDIDATE),
        "video": f"videos/{arm}/p{index:04d}.mp4",
    }


def _batches(rows: Sequence[dict[str, Any]], size: int) -> list[list[dict[str, Any]]]:
    """Batches of one arm each, so that both arms are sampled in the same batches."""
    return [
        [row for row in rows if row["arm"] == arm][start : start + size]
        for arm in ("base", "aligned")
        for start in range(0, len(rows) // 2, size)
    ]


def _sample(config: Config, rows: Sequence[dict[str, Any]], trained: Path, folder: Path) -> None:
    """Write the clips that are not there yet."""
    batches = _batches(rows, config.generate.batch_size)
    missing = [batch for batch in batches if not all((folder / row["video"]).exists() for row in batch)]
    if not missing:
        return
    from halo_fast.export.lora import load_trained

    family = load(config.pretrained_model_name_or_path, network=config.train.network)
    aligned = False
    for batch in progress(missing, len(missing), "evaluate"):
        if batch[0]["arm"] == "aligned" and not aligned:
            load_trained(family, trained)
            aligned = True
        prompts, seeds = [row["prompt"] for row in batch], [row["seed"] for row in batch]
        _, videos = sample_clips(family, prompts, seeds, config.generate)
        for row, video in zip(batch, videos, strict=True):
            write_clip(folder / row["video"], video, config.generate.fps)


@torch.no_grad()
def _measure(
    config: Config, rows: Sequence[dict[str, Any]], folder: Path, meter: Meter, model: RewardModel
) -> dict[str, np.ndarray]:
    """What meter and reward model say of every clip: name -> [2N] or [2N, P], base first."""
    parts: dict[str, list[Tensor]] = {}
    for batch in _batches(rows, config.score.batch_size):
        videos = torch.stack([read_clip(folder / row["video"]) for row in batch])
        prompts = [row["prompt"] for row in batch]
        columns = meter(videos, prompts) | score_columns(model, model(videos, prompts, config.grid))
        for name, values in columns.items():
            parts.setdefault(name, []).append(values.flatten(1) if values.ndim > 1 else values)
    return {name: torch.cat(values).numpy() for name, values in parts.items()}


def _probes(config: Config, rows: Sequence[dict[str, Any]], folder: Path, model: RewardModel) -> list[dict[str, Any]]:
    """What the reward model makes of the aligned model's first clips when they are changed in known ways."""
    aligned = [row for row in rows if row["arm"] == "aligned"][:_PROBE_CLIPS]
    videos = torch.stack([read_clip(folder / row["video"]) for row in aligned])
    probes = probe_all(model, videos, [row["prompt"] for row in aligned], config.grid, config.seed)
    return [probe.as_dict() for probe in probes]


def _metrics(config: Config, columns: dict[str, np.ndarray], count: int, clean: float) -> dict[str, Any]:
    base, aligned = (
        {name: values[part] for name, values in columns.items()} for part in (slice(count), slice(count, None))
    )
    metrics = compare_arms(base, aligned, clean, config.evaluate.bootstrap, config.seed)
    metrics["patch_grid"] = list(config.grid)
    for name, arm in (("reward_base", base), ("reward_aligned", aligned)):
        metrics[name] = {key: float(arm[key].mean()) for key in arm if key.startswith(("video_", "patch_"))}
    # against a meter that is the reward model itself this would say nothing
    if config.evaluate.meter != "reward":
        # the reward model judges candidates of the base; on aligned clips, nearly all sound, ranks are mostly noise
        metrics["patch_spearman"] = spearman(base["patch_quality"], -base["severity"])
        metrics["patch_spearman_aligned"] = spearman(aligned["patch_quality"], -aligned["severity"])
    return metrics
