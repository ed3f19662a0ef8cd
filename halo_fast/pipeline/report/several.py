"""`halo report --compare RUN RUN ...`: several runs, or the rounds of one, on one page."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from halo_fast.agreement.analysis import format_interval
from halo_fast.agreement.paired import count_wins, paired_mean
from halo_fast.data.summary import Section
from halo_fast.errors import UserError
from halo_fast.pipeline.report.clips import Card, cards_of
from halo_fast.pipeline.report.curves import training_charts
from halo_fast.pipeline.report.page import write_page
from halo_fast.pipeline.report.runs import RunView, read_run, settings_of, write_data

__all__ = ["compare_runs", "each_run", "round_table", "write_comparison"]

_TIE = 0.01  # mean severities that differ by no more than this
_RESAMPLES = 1000


def compare_runs(paths: Sequence[Path | str], num_clips: int | None = None) -> Path:
    """Write compare/report.html, with clips.csv and report.json beside it, into the last run.

    Args:
        paths: directories of at least two runs; the first is the one that the others are compared with.
        num_clips: prompts whose clips are on the page; None for all.

    Returns:
        the page.

    Raises:
        UserError: fewer than two runs, one that was not evaluated, other grids or meters, or no common prompt and seed.
    """
    if len(paths) < 2:
        raise UserError(f"--compare: expected at least two run directories, got {' '.join(map(str, paths)) or 'none'}")
    views = _named([read_run(Path(path)) for path in paths])
    page = views[-1].path / "compare" / "report.html"
    write_comparison(page, views, num_clips)
    write_data(page.parent, views)
    return page


def write_comparison(page: Path, views: Sequence[RunView], num_clips: int | None = None) -> None:
    """Write the page of several runs.

    Args:
        page: its file.
        views: the runs; the first is the one that the others are compared with.
        num_clips: as for `compare_runs`.

    Raises:
        UserError: other grids or meters, or no common prompt and seed.
    """
    cards = _cards(views, num_clips)
    settings = [settings_of(view.manifests) for view in views]
    write_page(
        page,
        "compare.html.j2",
        cards,
        title=" and ".join(view.name for view in views),
        runs=views,
        tables=[each_run(views), _against_first(views)],
        differences=_differences(views, settings),
        settings=[yaml.safe_dump(one, sort_keys=False, width=120) for one in settings],
        charts=[
            chart
            for view in views
            for log in sorted(view.path.glob("train*/log.csv"))
            for chart in training_charts(log, f"{view.name}: ")
        ],
    )


def _named(views: Sequence[RunView]) -> list[RunView]:
    """The runs under names that tell them apart: of their directories, or their paths below what all have in common."""
    names = [view.name for view in views]
    if len(set(names)) < len(names):
        paths = [view.path.resolve() for view in views]
        common = os.path.commonpath(paths)
        names = [path.relative_to(common).as_posix() for path in paths]
    if len(set(names)) < len(names):
        raise UserError(f"--compare: expected different runs, got {' '.join(str(view.path) for view in views)}")
    return [replace(view, name=name) for view, name in zip(views, names, strict=True)]


def _cards(views: Sequence[RunView], count: int | None) -> list[Card]:
    """The prompts and seeds that all runs have; UserError if what was measured cannot be compared."""
    for view in views[1:]:
        for what, of in (("evaluate.meter", _meter), ("grid", _grid)):
            if of(view) != of(views[0]):
                raise UserError(
                    f"--compare: expected one {what}, got {of(views[0])} in {views[0].path} and {of(view)} in "
                    f"{view.path}; evaluate both with the same"
                )
    tables = []
    for view in views:
        settings = view.manifests["evaluate"]["settings"]
        tables.append((view.name, view.folder, view.rows, _grid(view), int(settings["generate"]["fps"]), view.factors))
    return cards_of(tables, count)


def _meter(view: RunView) -> str:
    return str(view.manifests["evaluate"]["settings"]["meter"])


def _grid(view: RunView) -> tuple[int, ...]:
    return tuple(view.manifests["evaluate"]["settings"]["grid"])


def each_run(views: Sequence[RunView]) -> Section:
    """The headline of every run, base and aligned.

    Args:
        views: the runs.
    """
    rows = []
    for view in views:
        found = view.metrics
        mitigated = "-" if "mitigated" not in found else f"{found['mitigated']:.3f}"
        if "mitigated_interval" in found:
            low, high = found["mitigated_interval"]
            mitigated += f" [{low:.3f}, {high:.3f}]"
        row = [view.name, str(found.get("num_prompts", "-")), _arrow(found, "base_defect_rate", "aligned_defect_rate")]
        row += [_arrow(found, "base_severity", "aligned_severity"), mitigated]
        row += [
            _arrow(found, "fidelity_base", "fidelity_aligned"),
            f"{found['motion_ratio']:.2f}" if "motion_ratio" in found else "-",
        ]
        rows.append(row)
    head = ["run", "prompts", "defective patches", "severity", "mitigated", "prompt fidelity", "motion ratio"]
    return Section("Each run, base and aligned", head, rows)


def round_table(views: Sequence[RunView]) -> Section:
    """What each round of a run was made from, and how far its clips were from the policy that it began with.

    Args:
        views: the rounds.
    """
    columns = {
        "candidates": ("generate", "clips"),
        "labelled": ("annotate", "labelled"),
        "pairs": ("pairs", "pairs"),
        "steps": ("train", "steps"),
        "off-policy gap": ("train", "off_policy_gap"),
    }
    rows = []
    for view in views:
        found = [view.manifests.get(stage, {}).get("counts", {}).get(count, "-") for stage, count in columns.values()]
        rows.append([view.name, *(f"{100 * one:.1f}%" if isinstance(one, float) else str(one) for one in found)])
    return Section("What each round began with", ["round", *columns], rows)


def _arrow(metrics: dict[str, Any], base: str, aligned: str) -> str:
    return f"{metrics[base]:.3f} → {metrics[aligned]:.3f}" if base in metrics and aligned in metrics else "-"


def _against_first(views: Sequence[RunView]) -> Section:
    """The aligned model of every other run against that of the first, on the prompts and seeds of both."""
    means = [
        {(row.prompt, row.seed): float(np.mean(row.severity)) for row in view.rows if row.arm == "aligned"}
        for view in views
    ]
    rows = []
    for view, own in zip(views[1:], means[1:], strict=True):
        shared = [key for key in means[0] if key in own]
        first, other = (np.array([found[key] for key in shared]) for found in (means[0], own))
        pair = paired_mean(first, other, _RESAMPLES)
        wins = count_wins(first - other, _TIE, _RESAMPLES)
        counts = [str(wins.wins), str(wins.ties), str(wins.losses), format_interval(wins.rate), f"{wins.p:.2g}"]
        rows.append([view.name, str(len(shared)), *(format_interval(figure) for figure in pair), *counts])
    head = [
        "aligned model of",
        "pairs",
        f"severity, {views[0].name}",
        "severity",
        "difference",
        "wins",
        "ties",
        "losses",
    ]
    return Section(f"Against {views[0].name}: less severe wins", [*head, "win rate", "p, sign test"], rows)


def _differences(views: Sequence[RunView], settings: Sequence[dict[str, Any]]) -> Section:
    """The settings and hashes that are not the same in all runs; a report follows from the stages before it."""
    flat = [_flatten({name: part for name, part in one.items() if name != "report"}) for one in settings]
    names = list(dict.fromkeys(name for one in flat for name in one))
    rows = [[name, *(one.get(name, "-") for one in flat)] for name in names]
    differing = [row for row in rows if len(set(row[1:])) > 1]
    return Section("Settings and hashes that differ", ["setting", *(view.name for view in views)], differing)


def _flatten(value: Any, name: str = "") -> dict[str, str]:
    """Nested settings as texts under dotted names; hashes are cut to their first 12 digits."""
    if isinstance(value, dict):
        return {key: leaf for part in value for key, leaf in _flatten(value[part], f"{name}.{part}".strip(".")).items()}
    return {name: str(value)[:12] if "sha256" in name else str(value)}
