"""The page of a run: what changed, shown, drawn and tabulated in one HTML file."""

import csv
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from halo_fast.agreement.arms import DEFECTIVE
from halo_fast.data.clips import read_clip
from halo_fast.errors import UserError
from halo_fast.files import progress, versions, write_bytes
from halo_fast.pipeline.config import Config
from halo_fast.pipeline.report.chart import Series, line_chart
from halo_fast.pipeline.report.clips import browser_picture, browser_video, severity_strip
from halo_fast.pipeline.run import Run

__all__ = ["write_report"]

_STAGES = ("generate", "annotate", "reward", "score", "pairs", "cache", "train", "evaluate")

# a chart gets the columns of a log whose name holds one of its words; the first chart that claims a column has it
_TRAINING_CHARTS = (
    ("Loss", ("loss",)),
    ("Share of preferences the model has learned", ("accuracies",)),
    ("Margins", ("margin",)),
    ("Prediction error", ("mse",)),
    ("Gradient norm", ("grad_norm",)),
)
_REWARD_CHARTS = (("loss", ("loss",)), ("agreement", ("acc", "spearman", "correlation")))


def write_report(config: Config, run: Run) -> None:
    """Write `report/report.html`, one self-contained page; reads the stages reward, train and evaluate.

    Args:
        config: settings; `config.report.num_clips` clips are shown.
        run: the run directory.
    """
    inputs: dict[str, Path | str] = {stage: run.require(stage) for stage in ("reward", "train", "evaluate")}
    manifests = _manifests(run)
    if manifests["evaluate"]["settings"].get("meter") == "demo":
        from halo_fast.demo import WEIGHTS

        inputs["meters"] = WEIGHTS / "meters.json"
    # a directory that is moved keeps its report
    settings = {name: value for name, value in asdict(config).items() if name != "output_dir"}
    with run.stage("report", settings, inputs) as stage:
        if not stage.done:
            clips = _clips(run, config.report.num_clips)
            metrics = json.loads((run.path / "evaluate" / "metrics.json").read_text())
            page = _page(
                title=run.path.resolve().name,
                metrics=metrics,
                defective=DEFECTIVE,
                probes=_read_probes(run.path / "evaluate" / "probes.json"),
                meters=json.loads(Path(inputs["meters"]).read_text()) if "meters" in inputs else None,
                clips=clips,
                training=_training_charts(run.path / "train" / "log.csv"),
                diagnostics=_diagnostics_charts(run.path / "train" / "diagnostics.csv"),
                reward=_reward_charts(run.path / "reward" / "history.csv"),
                counts={stage: manifest["counts"] for stage, manifest in manifests.items()},
                settings=_settings(manifests, config),
                versions=versions(),
            )
            write_bytes(stage.folder / "report.html", page.encode())
            stage.finish({"clips": len(clips)})
    print(f"report: {stage.folder / 'report.html'}")


def _page(**content: Any) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters["percent"] = lambda share: f"{round(100 * share)}%"
    return environment.get_template("page.html.j2").render(**content)


def _clips(run: Run, count: int) -> list[dict[str, Any]]:
    """The first `count` evaluated prompts and seeds that both arms have: video, frames with severities, means."""
    import pyarrow.parquet

    folder = run.path / "evaluate"
    rows = pyarrow.parquet.read_table(folder / "clips.parquet").to_pylist()
    aligned = {(row["prompt"], row["seed"]): row for row in rows if row["arm"] == "aligned"}
    pairs = [
        (row, aligned[row["prompt"], row["seed"]])
        for row in rows
        if row["arm"] == "base" and (row["prompt"], row["seed"]) in aligned
    ]
    if not pairs:
        raise UserError(f"{folder / 'clips.parquet'}: no prompt has both a base and an aligned clip; redo evaluate")
    return [
        {"prompt": pair[0]["prompt"], "seed": pair[0]["seed"], "arms": [_arm(run.config, folder, row) for row in pair]}
        for pair in progress(pairs[:count], len(pairs[:count]), "report: encoding clips")
    ]


def _arm(config: Config, folder: Path, row: dict[str, Any]) -> dict[str, Any]:
    frames = read_clip(folder / row["video"]).numpy()
    grid = tuple(config.grid)
    severity = row.get("severity")
    if severity is not None and len(severity) != grid[0] * grid[1] * grid[2]:
        raise UserError(
            f"{folder / 'clips.parquet'}: {row['clip_id']} has {len(severity)} severities, expected one for each patch "
            f"of grid {grid}; redo evaluate"
        )
    return {
        "name": row["arm"],
        "video": browser_video(frames, config.generate.fps),
        "poster": browser_picture(frames[0]),
        "strip": severity_strip(frames, severity, grid) if severity is not None else None,
        "mean": sum(severity) / len(severity) if severity is not None else None,
    }


def _columns(rows: list[dict[str, str]], charts: tuple[tuple[str, tuple[str, ...]], ...]) -> dict[str, list[Series]]:
    """For each chart the curves of the columns it claims, over the column `step`; empty cells are left out."""
    names = [name for name in rows[0] if name not in ("step", "phase")] if rows else []
    found: dict[str, list[Series]] = {}
    for title, words in charts:
        for name in [name for name in names if any(word in name.lower() for word in words)]:
            names.remove(name)
            points = [(float(row["step"]), float(row[name])) for row in rows if row[name]]
            if points:
                found.setdefault(title, []).append(Series(name, points))
    return found


def _training_charts(log: Path) -> Sequence[str]:
    rows = _read_csv(log)
    return [line_chart(title, curves) for title, curves in _columns(rows, _TRAINING_CHARTS).items()]


def _reward_charts(history: Path) -> Sequence[str]:
    rows = _read_csv(history)
    charts = []
    for phase in dict.fromkeys(row["phase"] for row in rows):
        curves_of = _columns([row for row in rows if row["phase"] == phase], _REWARD_CHARTS)
        charts += [line_chart(f"Reward model, {phase} phase: {title}", curves) for title, curves in curves_of.items()]
    return charts


def _read_probes(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text()) if path.exists() else []


def _read_csv(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def _diagnostics_charts(file: Path) -> Sequence[str]:
    """Whether it is learning: accuracy and mean margin over all times, held-out pairs against the training's own."""
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


def _manifests(run: Run) -> dict[str, dict[str, Any]]:
    """The manifests of the stages that the directory holds, in their order."""
    files = {stage: run.path / stage / "manifest.json" for stage in _STAGES}
    return {stage: json.loads(file.read_text()) for stage, file in files.items() if file.exists()}


def _settings(manifests: dict[str, dict[str, Any]], config: Config) -> str:
    """What every stage was made with, as its own manifest says, and what only the report was told, in YAML."""
    import yaml

    names = ("pretrained_model_name_or_path", "prompts", "evaluation_prompts")
    stages = {
        stage: {**manifest["settings"], "sha256 of inputs": manifest["inputs"]} for stage, manifest in manifests.items()
    }
    told = {"run": {name: getattr(config, name) for name in names}, **stages, "report": asdict(config.report)}
    return str(yaml.safe_dump(told, sort_keys=False, width=120))
