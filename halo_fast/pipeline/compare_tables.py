"""Figures of a comparison with their intervals, and the page that holds them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from halo_fast.agreement.arms import severity_mitigated
from halo_fast.files import read_table
from halo_fast.pipeline.compare_arms import told_choice

__all__ = ["Row", "Section", "Tuned", "arm_slug", "build_section", "read_measured", "render", "tuning_score"]

Interval = tuple[float, float, float]
"""A figure and the ends of its 95% interval."""
Measured = Mapping[str, NDArray[np.float64]]
"""Everything measured of an arm, by name: [seeds, prompts]."""
Arms = Mapping[str, Measured]
Statistic = Callable[[str, NDArray[np.int64], NDArray[np.int64]], float]
"""A figure of an arm over these seeds and prompts."""
_INTERVAL = (0.025, 0.975)
_MOTION = "motion_amount"
_PLAIN = ("severity", "defective", "fidelity", _MOTION)  # the other columns are verdicts on the prompt


@dataclass(frozen=True)
class Row:
    """One arm: statistics with intervals, the share mitigated by each seed, and the mean of everything measured.

    `ahead` holds the best arm's statistics less this arm's; empty for the best arm and the base.
    """

    arm: str
    statistics: dict[str, Interval]
    by_seed: list[float]
    means: dict[str, float]
    ahead: dict[str, Interval]


@dataclass(frozen=True)
class Section:
    """All arms of one model.

    Args:
        name: of the model.
        best: the arm that the others are compared with.
        rows: of the arms, the base first.
        flawless: the motion ratio if the same share of defects as in each arm had been removed without a flaw; empty
            where it is not known.
    """

    name: str
    best: str
    rows: list[Row]
    flawless: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Tuned:
    """What an arm chose: the setting, and the scores of all that it could choose from; None could not be trained."""

    arm: str
    choice: dict[str, float | str]
    scores: list[float | None]


def arm_slug(arm: str) -> str:
    """The arm's name in file names."""
    return "".join(letter if letter.isalnum() else "_" for letter in arm.lower())


def read_measured(files: Sequence[Path]) -> Measured:
    """Everything measured of an arm, from a file a seed; NaN where a training failed, whose file has severity alone."""
    tables = [read_table(file) for file in files]
    names = max((table.column_names for table in tables), key=len)
    missing = np.full(tables[0].num_rows, np.nan)
    return {
        name: np.stack([table[name].to_numpy() if name in table.column_names else missing for table in tables])
        for name in names
    }


def tuning_score(measured: Measured, base: Measured, clean: float) -> float | None:
    """What a setting is chosen by: the share mitigated and, if it was measured, the share of clips that are faithful.

    Args:
        measured: of the setting.
        base: of the model itself, on the same prompts.
        clean: mean severity that the meter reads on clean clips.

    Returns:
        the sum; None of a setting that could not be trained.
    """
    if np.isnan(measured["severity"]).any():
        return None
    mitigated = severity_mitigated(float(base["severity"].mean()), float(measured["severity"].mean()), clean)
    return mitigated + (float(measured["fidelity"].mean()) if "fidelity" in measured else 0.0)


def build_section(
    name: str,
    arms: Arms,
    clean: float,
    base: str,
    best: str,
    bootstrap: int,
    flawless: Callable[[float], float | None] = lambda mitigated: None,
) -> Section:
    """Figures of every arm, with intervals bootstrapped over seeds and prompts.

    Args:
        name: of the model.
        arms: what was measured; NaN of a training that failed, and so of its arm.
        clean: mean severity that the meter reads on clean clips.
        base: the arm that is the model itself.
        best: the arm that the others are compared with.
        bootstrap: resamples.
        flawless: the motion ratio of a flawless removal of a share of the severity, if that is known.
    """
    arms = {
        arm: {name: found.get(name, np.full_like(found["severity"], np.nan)) for name in arms[base]}
        for arm, found in arms.items()
    }
    statistics = _statistics(arms, clean, base)
    draws = _bootstrap(arms, statistics, base, bootstrap)
    count = arms[base]["severity"].shape[1]
    everything = np.arange(count, dtype=np.int64)
    points: dict[str, dict[str, float]] = {}
    rows = []
    for arm, measured in arms.items():
        seeds = np.arange(len(measured["severity"]), dtype=np.int64)
        points[arm] = {key: statistic(arm, seeds, everything) for key, statistic in statistics.items()}
        rows.append(
            Row(
                arm=arm,
                statistics={key: (points[arm][key], *_quantiles(draws[arm][key])) for key in statistics},
                by_seed=[statistics["mitigated"](arm, np.array([seed]), everything) for seed in seeds],
                means={key: float(values.mean()) for key, values in measured.items()},
                ahead={},
            )
        )
    for row in rows:
        if row.arm not in (base, best):
            for key in statistics:
                gap = points[best][key] - points[row.arm][key]
                row.ahead[key] = (gap, *_quantiles(draws[best][key] - draws[row.arm][key]))
    ratios = {row.arm: flawless(row.statistics["mitigated"][0]) for row in rows}
    return Section(name, best, rows, {arm: ratio for arm, ratio in ratios.items() if ratio is not None})


def _statistics(arms: Arms, clean: float, base: str) -> dict[str, Statistic]:
    """The figures that get intervals: the share of severity mitigated and, if it was measured, fidelity."""
    severity = arms[base]["severity"]

    def mitigated(arm: str, seeds: NDArray[np.int64], prompts: NDArray[np.int64]) -> float:
        aligned = arms[arm]["severity"][seeds][:, prompts].mean()
        return severity_mitigated(severity[:, prompts].mean(), aligned, clean)

    def fidelity(arm: str, seeds: NDArray[np.int64], prompts: NDArray[np.int64]) -> float:
        return float(arms[arm]["fidelity"][seeds][:, prompts].mean())

    statistics: dict[str, Statistic] = {"mitigated": mitigated}
    if "fidelity" in arms[base]:
        statistics["fidelity"] = fidelity
    return statistics


def _bootstrap(
    arms: Arms, statistics: Mapping[str, Statistic], base: str, bootstrap: int
) -> dict[str, dict[str, NDArray[np.float64]]]:
    """For each arm and statistic its values over the resamples.

    Seeds are resampled within each arm, prompts alike in all of them, so that differences are paired by prompt.
    """
    rng = np.random.default_rng(0)
    count = arms[base]["severity"].shape[1]
    values: dict[str, dict[str, list[float]]] = {arm: {key: [] for key in statistics} for arm in arms}
    for _ in range(bootstrap):
        prompts = np.asarray(rng.integers(count, size=count), dtype=np.int64)
        seeds = {arm: rng.integers(len(arms[arm]["severity"]), size=len(arms[arm]["severity"])) for arm in arms}
        for arm in arms:
            for key, statistic in statistics.items():
                values[arm][key].append(statistic(arm, seeds[arm], prompts))
    return {arm: {key: np.array(drawn) for key, drawn in found.items()} for arm, found in values.items()}


def _quantiles(values: NDArray[np.float64]) -> tuple[float, float]:
    low, high = np.quantile(values, _INTERVAL)
    return float(low), float(high)


def render(
    introduction: Sequence[str], sections: Sequence[Section], notes: Sequence[str], tuned: Sequence[Tuned] = ()
) -> str:
    """The page in Markdown.

    Args:
        introduction: its first lines.
        sections: one for each model.
        notes: a sentence on each model.
        tuned: what the arms chose.
    """
    lines = list(introduction)
    for section, note in zip(sections, notes, strict=True):
        lines += ["", f"## Base: {section.name}", "", note, "", *_arm_table(section)]
        lines += ["", f"{section.best} less each other arm, in points (ahead or behind where the interval excludes 0):"]
        lines += ["", *_difference_table(section)]
    if tuned:
        lines += ["", "## What each arm chose", "", *_tuning_table(tuned)]
    return "\n".join(lines) + "\n"


def _tuning_table(tuned: Sequence[Tuned]) -> list[str]:
    """A row for each arm: its setting, and how all that it could choose from scored, in points."""
    lines = [_line(["arm", "chosen", "score", "scores of all settings"]), "|---|---|---|---|"]
    for one in tuned:
        scores = sorted((score for score in one.scores if score is not None), reverse=True)
        told = [*map(_percent, scores), *["failed"] * one.scores.count(None)]
        lines.append(_line([one.arm, told_choice(one.choice), told[0], ", ".join(told)]))
    return lines


def _arm_table(section: Section) -> list[str]:
    """A row for each arm, columns for whatever was measured."""
    means = section.rows[0].means
    verdicts = [name for name in means if name not in _PLAIN]
    head = ["arm", "mitigated", "by seed", *(["fidelity"] if "fidelity" in means else []), *verdicts]
    flawless = _MOTION in means and set(section.flawless) >= {row.arm for row in section.rows}
    head += ["motion ratio"] * (_MOTION in means) + ["of a flawless removal"] * flawless + ["defective patches"]
    lines = [_line(head), "|" + "---|" * len(head)]
    for row in section.rows:
        cells = [row.arm, _with_interval(row.statistics["mitigated"]), ", ".join(map(_percent, row.by_seed))]
        cells += [_with_interval(row.statistics["fidelity"])] if "fidelity" in means else []
        cells += [_percent(row.means[name]) for name in verdicts]
        ratio = _motion_ratio(section, row.arm)
        cells += [] if ratio is None else [_told(ratio, f"{ratio:.2f}")]
        cells += [_told(ratio, f"{section.flawless[row.arm]:.2f}")] if flawless and ratio is not None else []
        lines.append(_line([*cells, _percent(row.means["defective"])]))
    return lines


def _difference_table(section: Section) -> list[str]:
    names = list(section.rows[0].statistics)
    lines = [_line(["arm", *names]), "|" + "---|" * (1 + len(names))]
    return lines + [_line([row.arm, *map(_verdict, row.ahead.values())]) for row in section.rows if row.ahead]


def _motion_ratio(section: Section, arm: str) -> float | None:
    means = {row.arm: row.means for row in section.rows}
    if _MOTION not in means[arm]:
        return None
    return means[arm][_MOTION] / section.rows[0].means[_MOTION]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _told(value: float, text: str) -> str:
    return "failed" if np.isnan(value) else text


def _percent(value: float) -> str:
    return _told(value, f"{100 * value:.0f}")


def _with_interval(figure: Interval) -> str:
    value, low, high = map(_percent, figure)
    return _told(sum(figure), f"{value} [{low}, {high}]")


def _verdict(figure: Interval) -> str:
    _, low, high = figure
    word = "ahead" if low > 0 else "behind" if high < 0 else "not told apart"
    return _told(sum(figure), f"{_with_interval(figure)}, {word}")
