"""Charts of the CSV files that training leaves behind."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

from markupsafe import Markup

from halo_fast.pipeline.report.chart import Series, line_chart

__all__ = ["diagnostics_charts", "reward_charts", "training_charts"]

# title: words; a chart gets the columns whose name holds one of its words, the first chart that claims a column has it
_TRAINING = {
    "Loss": ("loss",),
    "Share of preferences the model has learned": ("accuracies",),
    "Margins": ("margin",),
    "Prediction error": ("mse",),
    "Gradient norm": ("grad_norm",),
}
_REWARD = {"loss": ("loss",), "agreement": ("acc", "spearman", "correlation")}


def training_charts(log: Path, of: str = "") -> list[Markup]:
    """Loss, accuracies, margins, errors and gradient norm over steps, from the trainer's log.csv; titled `of` a run."""
    return [line_chart(f"{of}{title}", curves) for title, curves in _columns(_read_csv(log), _TRAINING).items()]


def diagnostics_charts(file: Path) -> list[Markup]:
    """Accuracy and mean margin over all timesteps, held-out pairs beside training pairs, from diagnostics.csv."""
    rows = [row for row in _read_csv(file) if row["group"] == "all"] if file.exists() else []
    charts = []
    for value, title in (("accuracy", "Share of preferences learned"), ("margin", "Mean margin")):
        curves: dict[str, list[tuple[float, float]]] = {}
        for row in rows:
            points = curves.setdefault(f"{row['label']}, {row['split']}", [])
            points.append((float(row["step"]), float(row[value])))
        if curves:
            charts.append(line_chart(f"{title}, by pairs", [Series(name, curves[name]) for name in sorted(curves)]))
    return charts


def reward_charts(history: Path) -> list[Markup]:
    """Losses and agreement of the reward model over steps, by phase, from its history.csv; none without it.

    A model that was taken from elsewhere may have no history.
    """
    rows = _read_csv(history) if history.exists() else []
    charts = []
    for phase in dict.fromkeys(row["phase"] for row in rows):
        found = _columns([row for row in rows if row["phase"] == phase], _REWARD)
        charts += [line_chart(f"Reward model, {phase} phase: {title}", curves) for title, curves in found.items()]
    return charts


def _columns(rows: Sequence[dict[str, str]], charts: Mapping[str, tuple[str, ...]]) -> dict[str, list[Series]]:
    """For each chart the curves of its columns over the column `step`; empty cells are left out."""
    names = [name for name in rows[0] if name not in ("step", "phase")] if rows else []
    found: dict[str, list[Series]] = {}
    for title, words in charts.items():
        for name in [name for name in names if any(word in name.lower() for word in words)]:
            names.remove(name)
            points = [(float(row["step"]), float(row[name])) for row in rows if row[name]]
            if points:
                found.setdefault(title, []).append(Series(name, points))
    return found


def _read_csv(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))
