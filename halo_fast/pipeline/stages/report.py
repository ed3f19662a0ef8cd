"""The stage that writes the page of a run."""

import json
from dataclasses import asdict
from pathlib import Path

from halo_fast.files import read_json, versions, write_bytes
from halo_fast.pipeline.config import Config
from halo_fast.pipeline.judging import JUDGES_FILE
from halo_fast.pipeline.report.clips import compared_clips
from halo_fast.pipeline.report.curves import diagnostics_charts, reward_charts, training_charts
from halo_fast.pipeline.report.page import render_page, settings_text
from halo_fast.pipeline.run import Run
from halo_fast.pipeline.stages import STAGES
from halo_fast.pipeline.stages.evaluate import evaluation_meter
from halo_fast.pipeline.stages.train import training_folder, trainings

__all__ = ["write_report"]


def write_report(config: Config, run: Run) -> None:
    """Write report/report.html, one self-contained page; a stage. Reads the folders of reward, train and evaluate.

    Raises:
        UserError: one of these stages has not finished, a clip is unreadable, or no prompt has clips of both models.
    """
    inputs: dict[str, Path | str] = {
        name: run.require(name) for name in ("reward", training_folder(config), "evaluate")
    }
    inputs |= {path.name: path for path in trainings(run)}
    if (run.path / JUDGES_FILE).exists():
        inputs["judges"] = run.path / JUDGES_FILE
    notes = evaluation_meter(config, [], run.path / "reward").notes
    if notes:
        inputs["notes on the meter"] = json.dumps(notes, sort_keys=True)
    # a directory that is moved keeps its report
    settings = {name: value for name, value in asdict(config).items() if name != "output_dir"}
    with run.stage("report", settings, inputs) as stage:
        if not stage.done:
            manifests = {name: found for name in STAGES if (found := read_json(run.path / name / "manifest.json"))}
            measured = run.path / "evaluate"
            probes = measured / "probes.json"
            clips = compared_clips(measured, config.report.num_clips, config.grid, config.generate.fps)
            page = render_page(
                title=run.path.resolve().name,
                metrics=read_json(measured / "metrics.json"),
                probes=json.loads(probes.read_text()) if probes.exists() else [],
                notes=notes,
                judges=read_json(run.path / JUDGES_FILE),
                clips=clips,
                charts=[
                    chart
                    for path in trainings(run)
                    for chart in training_charts(path / "log.csv") + diagnostics_charts(path / "diagnostics.csv")
                ]
                + reward_charts(run.path / "reward" / "history.csv"),
                counts={name: manifest["counts"] for name, manifest in manifests.items()},
                settings=settings_text(manifests, config),
                versions=versions(),
            )
            write_bytes(stage.folder / "report.html", page.encode())
            stage.finish({"clips": len(clips)})
    print(f"report: {stage.folder / 'report.html'}")
