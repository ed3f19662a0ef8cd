"""Does the idea hold? Ways to align a model, on equal pairs, with equal steps and equal tuning, by several seeds.

Every arm is the same trainer with another objective, and one of them goes on for a second round. Pairs and rewards come
out of the run itself: candidates of the base, labels of the teacher, scores of the trained reward model. Each arm
chooses among as many settings as the others, on training prompts of the first model; all models are then aligned with
what was chosen.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any, Protocol

import torch
from annotated_types import Ge

from halo_fast import registry
from halo_fast.agreement.arms import DEFECTIVE
from halo_fast.agreement.meters import Meter, read_meter
from halo_fast.data.prompts import prompt_source, read_prompts
from halo_fast.errors import Diverged, UserError, first_line
from halo_fast.export.lora import load_all_trained
from halo_fast.families import Family, load, source
from halo_fast.families.quantization import Quantization
from halo_fast.families.sampling import clip_seed, sample_clips
from halo_fast.families.weights import Precision
from halo_fast.files import progress, read_json, replacing, write_json, write_parquet
from halo_fast.pipeline.arguments import load_config
from halo_fast.pipeline.compare_arms import ARMS, BASE, BEST, Arm, Choice, arm_training
from halo_fast.pipeline.compare_tables import (
    Section,
    Tuned,
    arm_slug,
    build_section,
    read_measured,
    render,
    tuning_score,
)
from halo_fast.pipeline.config import Config
from halo_fast.pipeline.run import Run
from halo_fast.pipeline.stages import STAGES
from halo_fast.pipeline.stages.evaluate import evaluation_meter, evaluation_prompts
from halo_fast.pipeline.stages.train import trained_results, training_pairs
from halo_fast.settings import validate_arguments
from halo_fast.train import fit
from halo_fast.train.config import TrainConfig, deciding_settings

__all__ = ["Comparison", "compare"]

logger = logging.getLogger(__name__)

_PREPARATION = ("generate", "annotate", "reward", "score", "pairs", "cache")
_ROUND = ("generate", "reward", "score", "pairs", "cache", "train")
_ROUNDS = "rounds"  # folder of the run directories of arms of several rounds
_TUNING_PROMPTS = 64  # the last of the training prompts, of which candidates took the first
_EVALUATED, _TUNED = -1, -2  # no candidate of a training prompt has these numbers, so their noise was never trained on


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

    def flawless_motion(self, mitigated: float) -> float | None:
        """What its meter would read as the motion ratio of a flawless removal of this share; None if unknown."""


def compare(
    output_dir: str = "runs/compare",
    regimes: tuple[str, ...] | None = None,
    num_seeds: Annotated[int, Ge(1)] = 3,
    num_prompts: Annotated[int, Ge(1)] = 96,
    max_train_steps: Annotated[int, Ge(1)] | None = None,
    bootstrap: Annotated[int, Ge(1)] = 2000,
    table: str | None = None,
    num_workers: Annotated[int, Ge(1)] = 1,
    tuning: str | None = None,
) -> None:
    """Align models by every arm and write the table of results; a killed comparison continues.

    Settings of all arms are chosen with the first model, unless `tuning` has them.

    Args:
        output_dir: one run directory for each model goes here.
        regimes: registered comparisons, or your own as "package.module:attribute"; null for all that are registered.
        num_seeds: trainings of each arm.
        num_prompts: held-out prompts that every model is measured on, with the same noise.
        max_train_steps: optimiser steps of every arm; null for the recipe's.
        bootstrap: resamples of seeds and prompts behind each interval.
        table: Markdown file that the results go to; without it output_dir/results.md.
        num_workers: trainings at a time, each in a process with its share of the cores. A script that calls this needs
            `if __name__ == "__main__":`.
        tuning: tuning/chosen.json of an earlier comparison, whose settings are taken; null to choose anew.

    Raises:
        UserError: an argument out of its bounds, an unknown comparison, a recipe that trains no LoRA, a file that lacks
            the setting of an arm, a base that the meter finds clean, or a process that was killed.
    """
    validate_arguments(compare, locals())
    tuned: list[Tuned] = _read_tuned(Path(tuning)) if tuning else []
    names = regimes or tuple(registry.known("comparison"))
    comparisons: list[Comparison] = [_comparison(name) for name in names]
    changes: dict[str, Any] = {"evaluate.num_prompts": num_prompts}
    if max_train_steps is not None:
        changes["train.max_train_steps"] = max_train_steps
    configs = [
        load_config(one.recipe, {**one.changes, **changes, "output_dir": f"{output_dir}/{name}"})
        for name, one in zip(names, comparisons, strict=True)
    ]
    for name, config in zip(names, configs, strict=True):
        if not config.train.rank:
            raise UserError(f"{name}: expected a recipe that trains a LoRA, got train.rank 0; set a rank")
        evaluation_prompts(config)  # too few of them are found before any work
    sections: list[Section] = []
    for name, comparison, config in zip(names, comparisons, configs, strict=True):
        run = Run(config, force=None)
        for stage in _PREPARATION:
            registry.load(STAGES[stage].target)(config, run)
        tuned = tuned or _choose_settings(config, run, num_workers)
        _measure_arms(config, run, num_seeds, tuned, num_workers)
        files = {arm: sorted((run.path / "arms").glob(f"{arm_slug(arm)}_[0-9]*.parquet")) for arm in (BASE, *ARMS)}
        arms = {arm: read_measured(found) for arm, found in files.items()}
        clean = float((read_json(run.path / "arms" / "clean.json") or {})["severity"])
        sections.append(build_section(name, arms, clean, BASE, BEST, bootstrap, comparison.flawless_motion))
    introduction = _introduction(comparisons, configs[0], names, num_seeds, output_dir, tuning)
    text = render(introduction, sections, [comparison.note() for comparison in comparisons], tuned)
    page = Path(table or f"{output_dir}/results.md")
    # what follows a mark is another command's
    others = page.read_text().partition("\n<!-- ") if page.exists() else ("", "", "")
    with replacing(page) as temporary:
        temporary.write_text(text + "".join(others[1:]))
    print(text)


def _comparison(name: str) -> Comparison:
    found = registry.resolve("comparison", name, "regimes")
    comparison: Comparison = registry.require(
        found, ("recipe", "changes", "measures", "preface", "note", "flawless_motion"), name, "regimes"
    )
    return comparison


def _introduction(
    comparisons: Sequence[Comparison],
    config: Config,
    names: Sequence[str],
    num_seeds: int,
    output_dir: str,
    tuning: str | None = None,
) -> list[str]:
    """How the page was made and what its figures mean, as lines of Markdown; `config` is the first model's."""
    training, num_prompts = config.train, config.evaluate.num_prompts
    trained = "" if config.generate.num_prompts is None else f", from {config.generate.num_prompts} prompts"
    measures = "".join(f"{text} " for text in dict.fromkeys(one.measures for one in comparisons) if text)
    option, origin, count = f"--tuning {tuning} ", "by an earlier comparison", ""
    if not tuning:
        option, origin, count = "", f"on the pairs of {names[0]}", f"{len(_tuning_prompts(config))} "
    lines = [
        "# Does the idea hold?",
        "",
        f"Made by `halo compare --output_dir {output_dir} --regimes '[{', '.join(names)}]' --num_seeds {num_seeds} "
        f"--num_prompts {num_prompts} --max_train_steps {training.max_train_steps} {option}--table docs/results.md`: "
        f"{training.max_train_steps} steps of {training.train_batch_size} pairs for every arm{trained}, {num_seeds} "
        f"seeds, {num_prompts} held-out prompts with the same noise for all. The reference's errors are cached for "
        f"{training.reference_draws} draws of noise and time a pair. Intervals are 95%, bootstrapped over seeds and "
        f"prompts; with only {num_seeds} seeds to draw from they are narrower than they should be.",
        "",
        f"Every arm was tuned alike: {_counted(ARMS)} settings each, trained once {origin}. That one was chosen whose "
        f"share mitigated and fidelity add up to most on {count}training prompts, and it holds in all tables; two "
        "rounds take what one round chose. A step costs every arm the same: winners and losers, forward and backward. "
        "Before training, the reference passes over the pairs once for each draw. Rewards are the trained reward "
        "model's, not the meter's. A second round takes as many steps again, on new candidates of the aligned model; "
        "the reward model stays.",
        "",
        "*Mitigated* is the share of the base's mean severity that is gone, less the meter's reading on clean clips. "
        f"{measures}All figures but the motion ratio are percentages.",
    ]
    for paragraph in dict.fromkeys("\n".join(one.preface()) for one in comparisons):
        lines += ["", paragraph]
    return lines


@dataclass(frozen=True)
class _Job:
    """One training and its measurement, or the measurement of the base where there is no training."""

    file: Path
    training: TrainConfig | None
    rounds: int
    prompts: Sequence[str]
    candidate: int


def _choose_settings(config: Config, run: Run, num_workers: int) -> list[Tuned]:
    """What each arm chose, by its clips of training prompts; written to tuning/chosen.json."""
    arms = {name: arm for name, arm in ARMS.items() if arm.choices}
    prompts = _tuning_prompts(config)
    settings = _settings(config) | {"choices": {name: list(arm.choices) for name, arm in arms.items()}}
    with run.stage("tuning", settings, _inputs(config, run) | {"tuning_prompts": "\n".join(prompts)}) as stage:
        if not stage.done:
            base = _Job(stage.folder / f"{BASE}.parquet", None, 1, prompts, _TUNED)
            clean = _measure_base(base, config, run)
            jobs = {(BASE, 0): base}
            for name, arm in arms.items():
                for number, choice in enumerate(arm.choices):
                    training = arm_training(arm, config.train, choice, config.seed)
                    file = stage.folder / f"{arm_slug(name)}_{number}.parquet"
                    jobs[name, number] = _Job(file, training, 1, prompts, _TUNED)
            _run_jobs(list(jobs.values()), config, run, num_workers, "compare: settings")
            read = {key: read_measured([job.file]) for key, job in jobs.items()}
            tuned = []
            for name, arm in arms.items():
                scores = [tuning_score(read[name, number], read[BASE, 0], clean) for number in range(len(arm.choices))]
                trained = [number for number, score in enumerate(scores) if score is not None]
                if not trained:
                    raise UserError(f"compare: no setting of {name} could be trained on {run.path}; see the warnings")
                best = max(trained, key=lambda number: scores[number] or 0.0)
                tuned.append(Tuned(name, dict(arm.choices[best]), scores))
            write_json(stage.folder / "chosen.json", {"arms": [asdict(one) for one in tuned]})
            stage.finish({"trainings": len(jobs) - 1})
    return _read_tuned(run.path / "tuning" / "chosen.json")


def _measure_base(job: _Job, config: Config, run: Run) -> float:
    """Measure the base, and say what mean severity the meter reads on clean clips.

    Raises:
        UserError: the base's clips have no more.
    """
    _run_jobs([job], config, run, 1, "compare: base")
    clean = evaluation_meter(config, job.prompts, run.require("reward/model.safetensors").parent).clean
    severity = float(read_measured([job.file])["severity"].mean())
    if severity <= clean:
        raise UserError(
            f"compare: expected a base with defects, got {run.path}, whose clips have a mean severity of "
            f"{severity:.3g} where clean ones have {clean:.3g}; compare on another model, or with another meter"
        )
    return clean


def _tuning_prompts(config: Config) -> list[str]:
    """The last of the training prompts."""
    return read_prompts(config.prompts, None, config.seed)[-_TUNING_PROMPTS:]


def _read_tuned(file: Path) -> list[Tuned]:
    """What each arm chose.

    Raises:
        UserError: the file does not have a setting of each arm that chooses.
    """
    try:
        tuned = [Tuned(**one) for one in json.loads(file.read_bytes())["arms"]]
        found = {one.arm: (one.choice, len(one.scores)) for one in tuned}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"tuning: expected the chosen.json of a comparison, got {file}, which is none ({first_line(error)}); leave "
            "it out, and settings are chosen anew"
        ) from None
    for name, arm in ARMS.items():
        choice, count = found.get(name, ("none", len(arm.choices)))
        if arm.choices and (choice not in arm.choices or count != len(arm.choices)):
            raise UserError(
                f"tuning: expected one of the {len(arm.choices)} settings of {name} in {file}, got {choice} of "
                f"{count}; leave it out, and settings are chosen anew"
            )
    return tuned


def _counted(arms: Mapping[str, Arm]) -> str:
    return " or ".join(map(str, sorted({len(arm.choices) for arm in arms.values() if arm.choices})))


def _measure_arms(config: Config, run: Run, num_seeds: int, tuned: Sequence[Tuned], num_workers: int) -> None:
    """Write arms/<arm>_<seed>.parquet for each training, with a row a prompt; keep what is there."""
    choices: dict[str, Choice] = {one.arm: one.choice for one in tuned}
    prompts = evaluation_prompts(config)
    trainings = {
        (name, seed): arm_training(arm, config.train, choices[arm.chosen_as or name], seed)
        for name, arm in ARMS.items()
        for seed in range(num_seeds)
    }
    settings = _settings(config) | {
        "arms": {name: deciding_settings(trainings[name, 0], started=False) for name in ARMS},
        "rounds": {name: arm.rounds for name, arm in ARMS.items()},
        "num_seeds": num_seeds,
        "num_prompts": len(prompts),
    }
    inputs = _inputs(config, run) | {"evaluation_prompts": prompt_source(config.evaluation_prompts)}
    with run.stage("arms", settings, inputs) as stage:
        if stage.done:
            return
        if not any(stage.folder.glob("*.parquet")):
            shutil.rmtree(run.path / _ROUNDS, ignore_errors=True)  # of other candidates
        jobs = [_Job(stage.folder / f"{BASE}_0.parquet", None, 1, prompts, _EVALUATED)]
        for (name, seed), training in trainings.items():
            file = stage.folder / f"{arm_slug(name)}_{seed}.parquet"
            jobs.append(_Job(file, training, ARMS[name].rounds, prompts, _EVALUATED))
        _run_jobs(jobs, config, run, num_workers, f"compare {config.pretrained_model_name_or_path}")
        meter = evaluation_meter(config, prompts, run.require("reward/model.safetensors").parent)
        write_json(stage.folder / "clean.json", {"severity": meter.clean})
        stage.finish({"trainings": len(trainings)})


def _settings(config: Config) -> dict[str, Any]:
    """What every training and every measurement depends on."""
    settings = {section: asdict(getattr(config, section)) for section in ("evaluate", "generate")}
    del settings["evaluate"]["num_prompts"]  # each stage has its own
    return settings | {"train": deciding_settings(config.train, started=False), "seed": config.seed}


def _inputs(config: Config, run: Run) -> dict[str, Path | str]:
    return {
        "pairs": run.require("pairs"),
        "cache": run.require("cache"),
        "pretrained_model_name_or_path": source(config.pretrained_model_name_or_path),
    }


def _run_jobs(jobs: Sequence[_Job], config: Config, run: Run, num_workers: int, label: str) -> None:
    """Do what has no file yet, some at a time in processes of their own."""
    todo = [job for job in jobs if not job.file.exists()]
    if num_workers == 1:
        for job in progress(todo, len(todo), label):
            _run_job(job, config, run)
        return
    threads = max(1, torch.get_num_threads() // num_workers)
    with ProcessPoolExecutor(num_workers, get_context("spawn"), torch.set_num_threads, (threads,)) as pool:
        try:
            waiting = [pool.submit(_run_job, job, config, run) for job in todo]
            for done in progress(as_completed(waiting), len(waiting), label):
                done.result()
        except BrokenProcessPool:
            raise UserError(
                f"num_workers: one of {num_workers} processes was killed, which happens where memory is short, or in a "
                'script without `if __name__ == "__main__":`; what is finished is kept: call again, with fewer'
            ) from None
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _run_job(job: _Job, config: Config, run: Run) -> None:
    """Train, sample and measure, and write the job's file: a row a prompt; severity is NaN where training diverged."""
    import pyarrow

    family = _loaded(config.pretrained_model_name_or_path, config.train.network, config.precision, config.quantization)
    meter = evaluation_meter(config, job.prompts, run.require("reward/model.safetensors").parent)
    try:
        if job.training is not None and job.rounds == 1:
            pairs = training_pairs(replace(config, train=job.training), run, family)
            family.load_lora(fit(family, pairs, job.training, references=run.path / "reference_errors").lora)
        elif job.training is not None:
            load_all_trained(family, _train_rounds(job, job.training, config, run))
        columns = _sample_and_measure(config, job, family, meter)
    except Diverged as error:
        if job.training is None:
            raise
        logger.warning("compare: %s cannot be trained: %s", job.file.stem, error)
        columns = {"severity": [math.nan] * len(job.prompts)}
    finally:
        if job.training is not None:
            family.unload_lora()
    write_parquet(job.file, pyarrow.table(columns))


@cache
def _loaded(name: str, network: str | None, precision: Precision, quantization: Quantization | None) -> Family:
    """The model, once for each process."""
    return load(name, "cpu", network, precision, quantization=quantization)


def _train_rounds(job: _Job, training: TrainConfig, config: Config, run: Run) -> list[Path]:
    """Train, make new candidates with what was trained, and train on; the folders of what each round trained.

    The reward model stays. The rounds are in a run directory of their own, which is left out of the results.
    """
    place = run.path / _ROUNDS / job.file.stem
    if not (place / "generate").exists():
        copied = place.with_name(f"{place.name}.part")
        shutil.rmtree(copied, ignore_errors=True)
        shutil.copytree(run.path / "generate", copied / "generate", copy_function=_linked)
        copied.rename(place)
    own = replace(
        config, output_dir=str(place), rounds=job.rounds, reward_model=str(run.path / "reward"),
        train=replace(training, heldout_share=0.0, diagnostics_steps=0),
    )  # fmt: skip
    for number in range(1, job.rounds + 1):
        for stage in _ROUND:
            run = Run(own, None, number)
            registry.load(STAGES[stage].target)(run.config, run)
    return list(trained_results(own, run).values())


def _linked(source: str, target: str) -> None:
    """The same file in another place, without its bytes where the disk can do that."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _sample_and_measure(config: Config, job: _Job, family: Family, meter: Meter) -> dict[str, list[float]]:
    """What the meter reads of one clip for each prompt, in [0, 1] but for motion_amount."""
    rows: dict[str, list[torch.Tensor]] = {}
    size = config.generate.batch_size
    for start in range(0, len(job.prompts), size):
        batch = job.prompts[start : start + size]
        seeds = [clip_seed(config.seed, start + index, job.candidate) for index in range(len(batch))]
        _, videos = sample_clips(family, batch, seeds, config.generate)
        found = read_meter(meter, videos, batch, config.grid)
        severity = found["severity"].flatten(1)
        values = {"severity": severity.mean(1), "defective": (severity > DEFECTIVE).float().mean(1)}
        values |= {name: found[name] for name in found if name.endswith("_correct") or name == "motion_amount"}
        for name, value in values.items():
            rows.setdefault(name.removesuffix("_correct"), []).append(value)
    return {name: torch.cat(parts).tolist() for name, parts in rows.items()}
