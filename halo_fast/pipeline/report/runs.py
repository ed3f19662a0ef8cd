"""What a page needs of a run directory: metrics, analysis, manifests and measured clips; and files beside the page."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from halo_fast.agreement.arms import DEFECTIVE
from halo_fast.data.summary import Section
from halo_fast.data.tables import EvaluatedRow, read_rows
from halo_fast.errors import UserError
from halo_fast.files import hash_text, read_json, write_csv, write_json
from halo_fast.patches import LatentFactors
from halo_fast.pipeline.judging import JUDGES_FILE
from halo_fast.pipeline.stages import STAGES
from halo_fast.rewards.model import read_config

__all__ = ["RunView", "clip_records", "read_run", "write_data"]


@dataclass(frozen=True)
class RunView:
    """A run with a finished evaluation.

    Args:
        name: of its directory.
        path: the directory.
        metrics: of evaluate.
        tables: what is counted of the defects; none in runs of earlier versions.
        figures: the same as figures for JSON.
        probes: of the reward model.
        judges: what judges say of the clips; None where none was asked.
        manifests: of all finished stages, by name.
        rows: the measured clips.
        factors: how the model's latents lie on the clips.
    """

    name: str
    path: Path
    metrics: dict[str, Any]
    tables: list[Section]
    figures: dict[str, Any]
    probes: list[dict[str, Any]]
    judges: dict[str, Any] | None
    manifests: dict[str, dict[str, Any]]
    rows: list[EvaluatedRow]
    factors: LatentFactors

    @property
    def folder(self) -> Path:
        """Of the stage evaluate."""
        return self.path / "evaluate"


def read_run(path: Path, stages: Sequence[str] = ()) -> RunView:
    """A run as pages show it.

    Args:
        path: the run directory.
        stages: folders beside those of `STAGES`, such as further trainings.

    Raises:
        UserError: evaluate has not finished, or a file of it is damaged.
    """
    folder = path / "evaluate"
    metrics = read_json(folder / "metrics.json")
    if metrics is None or not (folder / "manifest.json").exists():
        raise UserError(f"{folder}: not there or unfinished; expected a run directory; run `halo evaluate` in it first")
    names = dict.fromkeys((*STAGES, *stages))
    analysis = read_json(folder / "analysis.json") or {"tables": [], "figures": {}}
    probes = folder / "probes.json"
    return RunView(
        name=path.resolve().name,
        path=path,
        metrics=metrics,
        tables=[Section(**table) for table in analysis["tables"]],
        figures=analysis["figures"],
        probes=json.loads(probes.read_text()) if probes.exists() else [],
        judges=read_json(path / JUDGES_FILE),
        manifests={name: found for name in names if (found := read_json(path / name / "manifest.json"))},
        rows=read_rows(folder / "clips.parquet", EvaluatedRow),
        factors=read_config(path / "reward" / "config.json").factors,
    )


def settings_of(manifests: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What every stage was made with and what it made: settings, and hashes of inputs and outputs."""
    return {
        name: {
            **manifest["settings"],
            "sha256 of inputs": manifest["inputs"],
            "sha256 of outputs": _hashes(manifest["outputs"]),
        }
        for name, manifest in manifests.items()
    }


def _hashes(outputs: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """The hash of each file directly in a stage's folder, and one of all its files together."""
    hashes = {path: output["sha256"] for path, output in outputs.items()}
    own = {path: digest for path, digest in hashes.items() if "/" not in path}
    return {**own, "all files": hash_text(json.dumps(hashes, sort_keys=True))}


def clip_records(view: RunView) -> list[dict[str, Any]]:
    """A flat record of every measured clip, for CSV and JSON: means and shares, no patches."""
    records = []
    for row in view.rows:
        severity = np.asarray(row.severity)
        record: dict[str, Any] = {"run": view.name, "clip_id": row.clip_id, "arm": row.arm, "prompt": row.prompt}
        record |= {"seed": row.seed, "video": row.video, "severity": float(severity.mean())}
        record["defective_share"] = float((severity > DEFECTIVE).mean())
        record |= {f"severity_{kind}": float(np.mean(values)) for kind, values in row.kinds.items()}
        record |= row.readings
        record |= {f"video_{name}": score for name, score in row.video_scores.items()}
        record |= {f"patch_{name}": float(np.mean(scores)) for name, scores in row.patch_scores.items()}
        records.append({name: None if value != value else value for name, value in record.items()})  # NaN has no JSON
    return records


def write_data(folder: Path, views: Sequence[RunView]) -> None:
    """Write clips.csv and report.json: everything that is on the page, for programs.

    Args:
        folder: of the page.
        views: the runs on it.
    """
    records = {view.name: clip_records(view) for view in views}
    write_csv(folder / "clips.csv", [record for found in records.values() for record in found])
    write_json(
        folder / "report.json",
        {
            view.name: {
                "metrics": view.metrics,
                "analysis": view.figures,
                "tables": [asdict(table) for table in view.tables],
                "probes": view.probes,
                "judges": view.judges,
                "clips": records[view.name],
                "stages": settings_of(view.manifests),
                "versions": {name: manifest["versions"] for name, manifest in view.manifests.items()},
            }
            for view in views
        },
    )
