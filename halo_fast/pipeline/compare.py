"""Does the idea hold? Six ways to align a model and the model itself: equal pairs, equal steps, several seeds.

Every arm is the same trainer with another objective. Pairs and rewards come out of the run itself: candidates of the
base, labels of the teacher, scores of the trained reward model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, Protocol

import torch
from annotated_types import Ge

from halo_fast import registry
from halo_fast.agreement.arms import DEFECTIVE
from halo_fast.agreement.meters import Meter, read_meter
from halo_fast.data import CachedPairs
from halo_fast.data.prompts import prompt_source
from halo_fast.families import Family, load, source
from halo_fast.families.sampling import clip_seed, sample_clips
from halo_fast.files import progress, read_json, replacing, write_json, write_parquet
from halo_fast.pipeline.arguments import load_config
from halo_fast.pipeline.compare_tables import arm_slug, build_section, read_arm, render
from halo_fast.pipeline.config import Config
from halo_fast.pipeline.run import Run
from halo_fast.pipeline.stages import STAGES
from halo_fast.pipeline.stages.evaluate import evaluation_meter, evaluation_prompts
from halo_fast.settings import validate_arguments
from halo_fast.train import fit
from halo_fast.train.config import deciding_settings

__all__ = ["ARMS", "Comparison", "compare"]

# what each arm changes in the recipe's objective; None trains nothing
ARMS: dict[str, dict[str, Any] | None] = {
    "base": None,
    "SFT, winning clips": {"video_weight": 0.0, "patch_weight": 0.0, "sft_weight": 1.0, "patch_sft_weight": 0.0},
    "SFT, winning patches": {"video_weight": 0.0, "patch_weight": 0.0, "patch_sft_weight": 1.0},
    "video DPO": {"video_weight": 1.0, "patch_weight": 0.0, "patch_sft_weight": 0.0},
    "patch DPO": {"video_weight": 0.0, "patch_weight": 1.0, "patch_sft_weight": 0.0},
    "HALO": {"preset": "halo"},
    "HALO + patch SFT": {"preset": "halo_sft"},
}
BASE, BEST = "base", "HALO + patch SFT"
_PREPARATION = ("generate", "annotate", "reward", "score", "pairs", "cache")
_CANDIDATE = -1  # no candidate of a training prompt has this number, so evaluation noise was never trained on


class Comparison(Protocol):
    """One model to compare the arms on, registered under the kind "comparison"."""

    @property
    def recipe(self) -> str:
        """A registered recipe or a YAML file."""

    @property
    def changes(self) -> Mapping[str, Any]:
        """Dotted settings that differ from the recipe's."""

    @property
    def measures(self) -> str:
        """A sentence on what its meter measures besides severity; may be empty."""

    def preface(self) -> Sequence[str]:
        """Lines of Markdown to read before the results."""

    def note(self) -> str:
        """A sentence on this very model."""


def compare(
    output_dir: str = "runs/compare",
    regimes: tuple[str, ...] | None = None,
    num_seeds: Annotated[int, Ge(1)] = 3,
    num_prompts: Annotated[int, Ge(1)] = 96,
    max_train_steps: Annotated[int, Ge(1)] | None = None,
    bootstrap: Annotated[int, Ge(1)] = 2000,
    table: str | None = None,
) -> None:
    """Align models by every arm and write the table of results; a killed comparison continues.

    Args:
        output_dir: one run directory for each model goes here.
        regimes: registered comparisons, or your own as "package.module:attribute"; null for all that are registered.
        num_seeds: trainings of each arm.
        num_prompts: held-out prompts that every model is measured on, with the same noise.
        max_train_steps: optimiser steps of every arm; null for the recipe's.
        bootstrap: resamples of seeds and prompts behind each interval.
        table: Markdown file that the results go to; without it output_dir/results.md.

    Raises:
        UserError: an argument out of its bounds, or an unknown comparison.
    """
    validate_arguments(compare, locals())
    names = regimes or tuple(registry.known("comparison"))
    comparisons: list[Comparison] = [_comparison(name) for name in names]
    sections = []
    for name, comparison in zip(names, comparisons, strict=True):
        changes = {"output_dir": f"{output_dir}/{name}", "evaluate.num_prompts": num_prompts}
        if max_train_steps is not None:
            changes["train.max_train_steps"] = max_train_steps
        config = load_config(comparison.recipe, {**comparison.changes, **changes})
        run = Run(config)
        for stage in _PREPARATION:
            registry.load(STAGES[stage].target)(config, run)
        _measure_arms(config, run, num_seeds)
        arms = {arm: read_arm(run.path / "arms", arm) for arm in ARMS}
        clean = float((read_json(run.path / "arms" / "clean.json") or {})["severity"])
        sections.append(build_section(name, arms, clean, BASE, BEST, bootstrap))
    introduction = _introduction(comparisons, config, names, num_seeds, output_dir)
    text = render(introduction, sections, [comparison.note() for comparison in comparisons])
    page = Path(table or f"{output_dir}/results.md")
    # what follows a mark is another command's
    others = page.read_text().partition("\n<!-- ") if page.exists() else ("", "", "")
    with replacing(page) as temporary:
        temporary.write_text(text + "".join(others[1:]))
    print(text)


def _comparison(name: str) -> Comparison:
    found = registry.resolve("comparison", name, "regimes")
    comparison: Comparison = registry.require(
        found, ("recipe", "changes", "measures", "preface", "note"), name, "regimes"
    )
    return comparison


def _introduction(
    comparisons: Sequence[Comparison], config: Config, names: Sequence[str], num_seeds: int, output_dir: str
) -> list[str]:
    """How the page was made and what its figures mean, as lines of Markdown; `config` is any of the runs'."""
    training, num_prompts = config.train, config.evaluate.num_prompts
    trained = "" if config.generate.num_prompts is None else f", from {config.generate.num_prompts} prompts"
    measures = "".join(f"{text} " for text in dict.fromkeys(one.measures for one in comparisons) if text)
    lines = [
        "# Does the idea hold?",
        "",
        f"Made by `halo compare --output_dir {output_dir} --regimes '[{', '.join(names)}]' --num_seeds {num_seeds} "
        f"--num_prompts {num_prompts} --max_train_steps {training.max_train_steps} --table docs/results.md`: "
        f"{training.max_train_steps} steps of {training.train_batch_size} pairs for every arm{trained}, {num_seeds} "
        f"seeds, {num_prompts} held-out prompts with the same noise for all. The reference's errors are cached for "
        f"{training.reference_draws} draws of noise and time a pair. Intervals are 95%, bootstrapped over seeds and "
        f"prompts; with only {num_seeds} seeds to draw from they are narrower than they should be.",
        "",
        "*Mitigated* is the share of the base's mean severity that is gone, less the meter's reading on clean clips. "
        f"{measures}All figures but the motion ratio are percentages.",
    ]
    for paragraph in dict.fromkeys("\n".join(one.preface()) for one in comparisons):
        lines += ["", paragraph]
    return lines


def _measure_arms(config: Config, run: Run, num_seeds: int) -> None:
    """Write arms/<arm>_<seed>.parquet for each training, with a row a prompt; keep what is there."""
    import pyarrow

    name = config.pretrained_model_name_or_path
    inputs = {
        "pairs": run.require("pairs"),
        "cache": run.require("cache"),
        "evaluation_prompts": prompt_source(config.evaluation_prompts),
        "pretrained_model_name_or_path": source(name),
    }
    objectives = {arm: _objective(config, changes) for arm, changes in ARMS.items() if changes is not None}
    settings: dict[str, Any] = {"arms": objectives, "num_seeds": num_seeds, "seed": config.seed}
    settings |= {section: asdict(getattr(config, section)) for section in ("evaluate", "generate")}
    settings["train"] = deciding_settings(config.train, started=False)
    with run.stage("arms", settings, inputs) as stage:
        if stage.done:
            return
        jobs = [(arm, seed) for arm in ARMS for seed in range(num_seeds if arm in objectives else 1)]
        prompts = evaluation_prompts(config)
        meter = evaluation_meter(config, prompts, run.require("reward/model.safetensors").parent)
        family, pairs = load(name, device="cpu"), CachedPairs(run.require("pairs/pairs.parquet"), run.require("cache"))
        for arm, seed in progress(jobs, len(jobs), f"compare {name}"):
            file = stage.folder / f"{arm_slug(arm)}_{seed}.parquet"
            if file.exists():
                continue
            if arm in objectives:
                training = replace(config.train, objective=objectives[arm], seed=seed)
                family.load_lora(fit(family, pairs, training, references=run.path / "reference_errors").lora)
            try:
                columns = _sample_and_measure(config, prompts, family, meter)
            finally:
                if arm in objectives:
                    family.pipeline.unload_lora_weights()
            write_parquet(file, pyarrow.table(columns))
        write_json(stage.folder / "clean.json", {"severity": meter.clean})
        stage.finish({"trainings": len(jobs), "pairs": len(pairs)})


def _objective(config: Config, changes: Mapping[str, Any]) -> dict[str, Any]:
    given = config.train.objective
    return {**({"preset": given} if isinstance(given, str) else given), **changes}


def _sample_and_measure(config: Config, prompts: Sequence[str], family: Family, meter: Meter) -> dict[str, list[float]]:
    """What the meter reads of one clip for each prompt, in [0, 1] but for motion_amount."""
    rows: dict[str, list[torch.Tensor]] = {}
    size = config.generate.batch_size
    for start in range(0, len(prompts), size):
        batch = prompts[start : start + size]
        seeds = [clip_seed(config.seed, start + index, _CANDIDATE) for index in range(len(batch))]
        _, videos = sample_clips(family, batch, seeds, config.generate)
        found = read_meter(meter, videos, batch, config.grid)
        severity = found["severity"].flatten(1)
        values = {"severity": severity.mean(1), "defective": (severity > DEFECTIVE).float().mean(1)}
        values |= {name: found[name] for name in found if name.endswith("_correct") or name == "motion_amount"}
        for name, value in values.items():
            rows.setdefault(name.removesuffix("_correct"), []).append(value)
    return {name: torch.cat(parts).tolist() for name, parts in rows.items()}
