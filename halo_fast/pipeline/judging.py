"""What judges say of the clips that `halo evaluate` made, and whether a gain on the training reward is real."""

from __future__ import annotations

import inspect
import json
import logging
import math
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from halo_fast import processes, registry
from halo_fast.errors import UserError
from halo_fast.files import hash_file, hash_text, read_json, read_table, write_json, write_parquet
from halo_fast.judges.base import JudgeTable, judge_clips, load_judge
from halo_fast.judges.hacking import OVERALL, Gain, gains
from halo_fast.patches import LatentFactors
from halo_fast.pipeline.config import Config
from halo_fast.pipeline.run import Run
from halo_fast.rewards.model import model_folder, read_config
from halo_fast.teachers.base import read_options
from halo_fast.teachers.openai.config import OpenAIConfig

__all__ = ["JUDGES_FILE", "check_judges", "judge_arms"]

logger = logging.getLogger(__name__)

JUDGES_FILE = "judges/judges.json"
"""In the run directory: gains of each judge, and warnings."""

_OPTIONS = "evaluate.judge_options"
_REWARD = "training reward"
_ARMS = ("base", "aligned")


@dataclass(frozen=True)
class _Judged:
    """Scores of a judge.

    Args:
        name: under which it was named.
        label: what it calls itself.
        optimised: whether training optimised it.
        amounts: whether its scores are amounts, of which more is no better by itself.
        scores: of each clip, base and aligned clips of a prompt next to each other.
        totals: further figures of each model's clips, by its arm.
    """

    name: str
    label: str
    optimised: bool
    amounts: bool
    scores: Sequence[Mapping[str, float]]
    totals: Mapping[str, Mapping[str, float]]


def check_judges(config: Config) -> None:
    """Raise the mistakes in evaluate.judges that can be known before any clip is made.

    Raises:
        UserError: no such judge, an unknown option or value, options of a judge that is not named.
    """
    settings = config.evaluate
    unused = sorted(set(settings.judge_options) - set(settings.judges))
    if unused:
        raise UserError(f"{_OPTIONS}.{unused[0]}: expected a judge of evaluate.judges; add it there, or remove this")
    if len(set(settings.judges)) < len(settings.judges):
        raise UserError(f"evaluate.judges: expected each judge once, got {', '.join(settings.judges)}")
    for name in settings.judges:
        options = settings.judge_options.get(name, {})
        load_judge(name, options, _given(config, Path(), Path()))
        if name == "openai":
            read_options(OpenAIConfig, options, f"{_OPTIONS}.openai")


def judge_arms(config: Config, run: Run) -> None:
    """Have every judge score the clips of base and aligned model, and compare its gain with the training reward's.

    Writes judges/judges.parquet, a row for each clip, judge and dimension, and judges/judges.json. A judge's result is
    kept and read again as long as clips and options stay; --force asks anew, but no paid question twice.

    Args:
        config: evaluate.judges and their options.
        run: whose evaluate stage is finished.

    Raises:
        UserError: whatever ends a judge's work; what others said is kept.
    """
    folder = run.path / "evaluate"
    rows = _paired(read_table(folder / "clips.parquet").to_pylist())
    judged = [_training_reward(rows)]
    for name in config.evaluate.judges:
        judged.append(_judge(config, run, name, [folder / row["video"] for row in rows], rows))
    means = [_weighted(row, config.pairs.dimensions) for row in judged[0].scores]
    reward = [aligned - base for base, aligned in zip(means[::2], means[1::2], strict=True)]
    found = [_gains(config, one.scores, reward) for one in judged]
    # the reward itself is not in deviations: its scores share a scale, and pairs.dimensions weighs them
    found[0][0] = _gains(config, [{OVERALL: mean} for mean in means], reward)[1]
    # amounts do not add up to anything
    found = [rows_of_judge[one.amounts :] for one, rows_of_judge in zip(judged, found, strict=True)]
    warnings = _warnings(judged, found)
    _write(run.path, rows, judged, found, warnings)
    print(_summary(judged, found, len(rows) // 2))
    for warning in warnings:
        logger.warning("evaluate: %s", warning)


def _paired(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The clips of base and aligned model, those of a prompt next to each other."""
    arms = {arm: sorted((r for r in rows if r["arm"] == arm), key=lambda r: r["prompt_id"]) for arm in _ARMS}
    return [row for pair in zip(*arms.values(), strict=True) for row in pair]


def _training_reward(rows: Sequence[dict[str, Any]]) -> _Judged:
    """The reward model's own scores, which `halo evaluate` has measured: of videos, or else means over patches."""
    names = [name for name in rows[0] if name.startswith("video_")]
    names = names or [name for name in rows[0] if name.startswith("patch_")]
    scores = [{name.removeprefix("video_"): float(np.mean(row[name])) for name in names} for row in rows]
    return _Judged(_REWARD, _REWARD, True, False, scores, {})


def _weighted(scores: Mapping[str, float], weights: Mapping[str, float]) -> float:
    """The reward that pairs were made by, the weighted mean of its dimensions; of all if none of these was scored."""
    known = {name: weight for name, weight in weights.items() if name in scores and weight > 0}
    known = known or dict.fromkeys(scores, 1.0)
    return sum(weight * scores[name] for name, weight in known.items()) / sum(known.values())


def _gains(config: Config, scores: Sequence[Mapping[str, float]], reward: Sequence[float]) -> list[Gain]:
    return gains(scores[::2], scores[1::2], reward, config.evaluate.bootstrap, config.seed)


def _given(config: Config, folder: Path, store: Path, factors: LatentFactors | None = None) -> dict[str, Any]:
    return {"folder": folder, "store": store, "grid": tuple(config.grid), "seed": config.seed, "factors": factors}


def _judge(config: Config, run: Run, name: str, clips: Sequence[Path], rows: Sequence[dict[str, Any]]) -> _Judged:
    """The scores of one judge, read if it gave them for these clips with these options."""
    options = config.evaluate.judge_options.get(name, {})
    folder = run.path / "judges" / re.sub(r"\W+", "_", name)
    if run.force:
        shutil.rmtree(folder, ignore_errors=True)
    prompts, fps = [row["prompt"] for row in rows], config.generate.fps
    asked = [registry.target("judge", name), options, list(config.grid), config.seed, fps, prompts]
    # a model or weights in a folder may change under the same name
    places = {option: Path(str(options[option])) for option in ("model", "weights") if options.get(option)}
    asked += [run.input_hash(f"{name}, {option}", place) for option, place in places.items() if place.exists()]
    key = hash_text(json.dumps([*asked, [hash_file(clip) for clip in clips]], sort_keys=True, default=str))
    kept = read_json(folder / "scores.json")
    if kept is None or kept["key"] != key:
        factors = read_config(run.require("reward/config.json")).factors
        judge = load_judge(name, options, _given(config, folder, run.root / "labels.sqlite", factors))
        table = judge_clips(name, judge, clips, prompts, fps, processes.device())
        kept = {"key": key, "label": table.name, "optimised": table.optimised, "amounts": table.amounts}
        kept["totals"] = _totals(table)
        kept["scores"] = [_without_nan(row) for row in table.scores]
        write_json(folder / "scores.json", kept)
    scores = [{d: math.nan if s is None else s for d, s in row.items()} for row in kept["scores"]]
    optimised = kept["optimised"] or _trained_on(config, run, name, options)
    return _Judged(name, kept["label"], optimised, kept["amounts"], scores, kept["totals"])


def _totals(table: JudgeTable) -> dict[str, dict[str, float]]:
    """A benchmark's totals of each arm, from the means of its clips."""
    if table.totals is None:
        return {}
    found = {}
    for arm, some in zip(_ARMS, (table.scores[::2], table.scores[1::2]), strict=True):
        columns = {name: np.array([row[name] for row in some], dtype=float) for name in some[0]}
        means = {name: float(np.nanmean(values)) for name, values in columns.items() if not np.isnan(values).all()}
        found[arm] = dict(table.totals(means))
    return {arm: totals for arm, totals in found.items() if totals}


def _trained_on(config: Config, run: Run, name: str, options: Mapping[str, Any]) -> bool:
    """Whether a judge is what the aligned model was trained to please, or what its reward model was distilled from."""
    model = options.get("model") or _default_model(name)
    if name == "reward_model" and model:
        known = [one.path / "reward" / "model.safetensors" for one in run.rounds]
        own = hash_file(model_folder(model) / "model.safetensors")
        return own in [hash_file(file) for file in known if file.exists()]
    if name == "openai":
        teacher = OpenAIConfig(**options).model
        return config.annotate.teacher == "openai" and teacher == config.annotate.openai.model
    return bool(model) and model == config.reward.backbone


def _default_model(name: str) -> str | None:
    """The model of a judge that is given none."""
    parameter = inspect.signature(registry.resolve("judge", name, "evaluate.judges")).parameters.get("model")
    return parameter.default if parameter and isinstance(parameter.default, str) else None


def _warnings(judged: Sequence[_Judged], found: Sequence[Sequence[Gain]]) -> list[str]:
    """What a reader must know before believing a gain."""
    independent = [
        (one, rows[0]) for one, rows in zip(judged, found, strict=True) if not (one.optimised or one.amounts)
    ]
    if not independent:
        return [
            "evaluate.judges names no judge that training did not optimise: a gain may be reward hacking; add one, "
            "such as vbench, videoscore or openai"
        ]
    if found[0][0].verdict != "rises":
        return []
    return [
        f"{one.name} falls while the training reward rises: likely reward hacking (on {gain.hacked:.0%} of the prompts)"
        for one, gain in independent
        if gain.verdict == "falls"
    ]


def _write(
    path: Path,
    rows: Sequence[dict[str, Any]],
    judged: Sequence[_Judged],
    found: Sequence[Sequence[Gain]],
    warnings: Sequence[str],
) -> None:
    """Write judges.parquet and judges.json."""
    import pyarrow

    table = [
        {name: row[name] for name in ("clip_id", "prompt_id", "prompt", "arm")}
        | {"judge": one.name, "optimised": one.optimised, "dimension": dimension, "score": score}
        for one in judged
        for row, scores in zip(rows, one.scores, strict=True)
        for dimension, score in scores.items()
    ]
    write_parquet(path / "judges" / "judges.parquet", pyarrow.Table.from_pylist(table))
    judges = [
        {
            "name": one.name, "label": one.label, "optimised": one.optimised, "amounts": one.amounts,
            "totals": one.totals,
            "gains": [_without_nan(asdict(gain) | {"verdict": gain.verdict}) for gain in rows_of_judge],
        }
        for one, rows_of_judge in zip(judged, found, strict=True)
    ]  # fmt: skip
    write_json(path / JUDGES_FILE, {"judges": judges, "warnings": list(warnings)})


def _without_nan(values: Mapping[str, Any]) -> dict[str, Any]:
    return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in values.items()}


def _summary(judged: Sequence[_Judged], found: Sequence[Sequence[Gain]], prompts: int) -> str:
    """The gains as a table for the terminal; those of all dimensions together are in deviations of the scores."""
    lines = [f"judges, {prompts} prompts: gain of the aligned model, 95% interval, wins, reward up and judge down"]
    for one, rows in zip(judged, found, strict=True):
        for gain in rows:
            kind = " (optimised)" if one.optimised else " (amounts)" if one.amounts else ""
            name = one.name + kind if gain is rows[0] else ""
            interval = f"[{gain.low:+.3f}, {gain.high:+.3f}]"
            lines.append(
                f"  {name:<28}{gain.dimension:<26}{gain.gain:+8.3f}  {interval:<18}{gain.wins:>5.0%}{gain.hacked:>6.0%}"
            )
        for arm, totals in one.totals.items():
            lines.append(
                f"  {'':<28}{arm}: " + ", ".join(f"{name} {100 * value:.2f}" for name, value in totals.items())
            )
    return "\n".join(lines)
