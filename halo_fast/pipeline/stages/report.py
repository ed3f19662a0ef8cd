"""The stage that writes the page of a run."""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from halo_fast.files import versions
from halo_fast.pipeline.config import Config
from halo_fast.pipeline.hashes import MANIFEST
from halo_fast.pipeline.judging import JUDGES_FILE
from halo_fast.pipeline.report.clips import cards_of
from halo_fast.pipeline.report.curves import diagnostics_charts, reward_charts, training_charts
from halo_fast.pipeline.report.page import settings_text, write_page
from halo_fast.pipeline.report.runs import RunView, read_run, write_data
from halo_fast.pipeline.report.several import each_run, round_table, write_comparison
from halo_fast.pipeline.run import Run
from halo_fast.pipeline.stages.evaluate import evaluation_meter
from halo_fast.pipeline.stages.train import training_folder, trainings
from halo_fast.train.config import deciding_settings

__all__ = ["write_report"]


def write_report(config: Config, run: Run) -> None:
    """Write report/report.html, one self-contained page, with clips.csv and report.json beside it; a stage.

    Reads the folders of reward, train and evaluate. In a later round the page also has the rounds side by side, and
    report/rounds.html their clips.

    Raises:
        UserError: one of these stages has not finished, a clip is unreadable, or no prompt has clips of both models.
    """
    inputs: dict[str, Path | str] = {
        name: run.require(name) for name in ("reward", training_folder(config), "evaluate")
    }
    inputs |= {path.name: path for path in trainings(run)}
    evaluated = [one for one in run.rounds if one is run or (one.path / "evaluate" / MANIFEST).exists()]
    inputs |= {f"evaluate, round {one.number}": one.require("evaluate") for one in evaluated if one is not run}
    if (run.path / JUDGES_FILE).exists():
        inputs["judges"] = run.path / JUDGES_FILE
    notes = evaluation_meter(config, [], run.path / "reward").notes
    if notes:
        inputs["notes on the meter"] = json.dumps(notes, sort_keys=True)
    # a directory that is moved, or gets further rounds, keeps its report
    whole = asdict(run.rounds[0].config) | {"train": deciding_settings(config.train, run.number > 1)}
    settings = {name: value for name, value in whole.items() if name not in ("output_dir", "rounds")}
    with run.stage("report", settings, inputs, derived=True) as stage:
        if not stage.done:
            views = _views(run, evaluated)
            view = views[-1]
            table = ("", view.folder, view.rows, tuple(config.grid), config.generate.fps, view.factors)
            cards = cards_of([table], config.report.num_clips)
            charts = [
                chart
                for path in trainings(run)
                for chart in training_charts(path / "log.csv") + diagnostics_charts(path / "diagnostics.csv")
            ]
            write_page(
                stage.folder / "report.html",
                "page.html.j2",
                cards,
                title=view.name if run.number == 1 else f"{run.root.resolve().name}, {view.name}",
                run=view,
                rounds=[each_run(views), round_table(views)] if len(views) > 1 else [],
                notes=notes,
                judges=view.judges,
                charts=charts + reward_charts(run.path / "reward" / "history.csv"),
                counts={name: manifest["counts"] for name, manifest in view.manifests.items()},
                settings=settings_text(view.manifests, config),
                versions=versions(),
            )
            if len(views) > 1:
                write_comparison(stage.folder / "rounds.html", views, config.report.num_clips)
            write_data(stage.folder, [view])
            stage.finish({"clips": len(cards)})
    print(f"report: {stage.folder / 'report.html'}")


def _views(run: Run, evaluated: Sequence[Run]) -> list[RunView]:
    """The evaluated rounds as pages show them; a first one without others has the name of its directory."""
    found = [(one, read_run(one.path, [path.name for path in trainings(one)])) for one in evaluated]
    return [replace(view, name=f"round {one.number}") if run.number > 1 else view for one, view in found]
