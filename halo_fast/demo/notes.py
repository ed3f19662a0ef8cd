"""What the demo's meters are worth, as measured on planted defects; for the report and the comparison."""

from typing import Any

from halo_fast.demo import BASES, WEIGHTS
from halo_fast.files import read_json

__all__ = ["calibration", "meter_notes"]


def calibration() -> dict[str, Any]:
    """The figures of weights/meters.json, written when the meters were trained."""
    figures = read_json(WEIGHTS / "meters.json")
    assert figures, "weights/meters.json is part of the package"
    return figures


def meter_notes() -> dict[str, Any]:
    """A title, and paragraphs and tables in their order, as the report prints them."""
    figures = calibration()
    return {
        "title": "The meters",
        "parts": [
            "Both were validated on held-out clips with planted defects, where the truth is known. For severity, AUC "
            "is the chance that a patch where the kind is visible (planted severity above 0.25) reads higher on total "
            "severity than a sound patch. For the kind, it is the same chance for the severity reported of that very "
            "kind, compared with all patches of another kind or none. Rates by kind are shares of patches, planted "
            "and as the meter names them: rare kinds are often called another.",
            _auc_table(figures),
            _clean_table(figures["clean"]),
            "The readings of motion and fidelity are not fully independent of defects: where planted defects are "
            "blended out of held-out clips and nothing else changes, both rise. Compare a motion ratio and a gain in "
            "fidelity with these, not with 1 and 0.",
            _removed_table(figures),
        ],
    }


def _auc_table(figures: dict[str, Any]) -> dict[str, Any]:
    rows = []
    for kind in figures[BASES[0]]["auc_by_kind"]:
        row = [kind]
        for of in (figures[base] for base in BASES):
            planted, named = of["planted_rate_by_kind"][kind], of["measured_rate_by_kind"][kind]
            row += [f"{of['auc_by_kind'][kind]:.3f}", f"{of['channel_auc_by_kind'][kind]:.3f}"]
            row += [f"{100 * planted:.1f}% → {100 * named:.1f}%"]
        rows.append(row)
    head = [f"{name}, {base}" for base in BASES for name in ("severity", "kind", "planted → named")]
    return {"caption": "AUC by kind of defect, on planted held-out clips", "head": ["defect", *head], "rows": rows}


def _clean_table(clean: dict[str, Any]) -> dict[str, Any]:
    rows = [
        ["defect meter, mean severity", f"{clean['mean_severity']:.4f}"],
        ["defect meter, share of patches called defective", f"{100 * clean['defective_share']:.2f}%"],
    ]
    for name, share in clean["fidelity"].items():
        what = "direction of motion" if name == "motion" else name
        rows.append([f"fidelity classifier, {what} right", f"{100 * share:.1f}%"])
    return {"caption": "On clean held-out clips", "head": ["reading", "value"], "rows": rows}


def _removed_table(figures: dict[str, Any]) -> dict[str, Any]:
    rows = []
    for readings in zip(*(figures[base]["removed"] for base in BASES), strict=True):
        row = [f"{round(100 * readings[0]['share'])}%"]
        for reading in readings:
            row += [f"{reading['severity']:.3f}", f"{reading['motion_ratio']:.2f}", f"{100 * reading['fidelity']:.1f}%"]
        rows.append(row)
    head = [f"{name}, {base}" for base in BASES for name in ("severity", "motion ratio", "fidelity")]
    return {"caption": "Planted defects blended out, nothing else changed", "head": ["removed", *head], "rows": rows}
