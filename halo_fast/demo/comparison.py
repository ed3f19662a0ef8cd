"""The demo in `halo compare`: its two bases, and what their figures are worth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from halo_fast.demo import BASES, WEIGHTS
from halo_fast.demo.notes import calibration
from halo_fast.files import read_json

__all__ = ["GPT_LIKE", "GRADED", "PATCHY", "DemoComparison"]

_WANTED = {"defect_rate": 0.25, "digit": 0.70, "motion": 0.90}  # what a base was to reach on held-out prompts
_MEASURES = (
    "*Fidelity* is the share of clips that show digit, colour and motion of the prompt, all three, by a classifier "
    "that has never seen a defect; *motion* is its verdict on direction alone."
)


@dataclass(frozen=True)
class DemoComparison:
    """One base of the demo.

    Args:
        base: "graded" or "patchy".
        errors: how the teacher errs: "person" on a fifth of the clips, "gpt-4o" on all.
    """

    base: str
    errors: str = "person"
    recipe: str = "demo"
    measures: str = _MEASURES

    @property
    def changes(self) -> Mapping[str, Any]:
        """What is set otherwise than in the recipe."""
        changed: dict[str, Any] = {"pretrained_model_name_or_path": f"demo:{self.base}"}
        if self.errors != "person":
            changed["annotate.options"] = {"noisy_share": 1.0, "errors": self.errors}
        return changed

    def preface(self) -> Sequence[str]:
        """Lines of Markdown: what the meters read when defects alone go."""
        return _caveats()

    def note(self) -> str:
        """How the shipped base compares with what was wanted of it."""
        measured = (read_json(WEIGHTS / self.base / "recipe.json") or {})["measured"]
        missed = [name for name in _WANTED if measured[name] < _WANTED[name]]
        readings = ", ".join(f"{name} {measured[name]:.3f} (of {least:.2f})" for name, least in _WANTED.items())
        told = f"The base on 256 held-out prompts: {readings}; it misses {' and '.join(missed) or 'none of these'}."
        if self.errors == "person":
            return told
        return f"{told} Every label of the teacher has an error as large as GPT-4o's (docs/teachers.md)."

    def flawless_motion(self, mitigated: float) -> float:
        """Motion ratio on planted defects of which this share was blended out, between the shares that were tried."""
        rows = calibration()[self.base]["removed"]
        worst, clean = rows[0]["severity"], rows[-1]["severity"]
        gone = [1 - (row["severity"] - clean) / (worst - clean) for row in rows]
        return float(np.interp(mitigated, gone, [row["motion_ratio"] for row in rows]))


GRADED, PATCHY = (DemoComparison(base) for base in BASES)
GPT_LIKE = DemoComparison("graded", "gpt-4o")


def _caveats() -> list[str]:
    """What the meters read on planted defects, and which kinds they name unreliably, as lines of Markdown."""
    figures = calibration()
    lines = [
        "The meters are not fully independent of defects: with planted defects blended out of held-out clips and "
        "nothing else changed, motion and fidelity rise. A motion ratio is to be judged against this table, whose "
        "last row is what a flawless removal would read, and so is a gain in fidelity.",
        "",
        "| planted | removed | severity | motion ratio | fidelity |",
        "|---|---|---|---|---|",
    ]
    for base in BASES:
        for row in figures[base]["removed"]:
            readings = f"{row['severity']:.3f} | {row['motion_ratio']:.2f} | {_percent(row['fidelity'])}"
            lines.append(f"| {base} | {_percent(row['share'])} | {readings} |")
    for base in BASES:
        planted, measured = (figures[base][f"{what}_rate_by_kind"] for what in ("planted", "measured"))
        smear = f"{100 * planted['smear']:.1f}% of the patches and is named in {100 * measured['smear']:.1f}%"
        common = (planted["flicker"] + planted["colour"]) / sum(planted.values())
        lines += [
            "",
            f"Planted {base}: flicker and colour make up {_percent(common)}% of the defective patches. The kinds "
            f"that the meter names are unreliable where they are rare: smear is in {smear}.",
        ]
    return lines


def _percent(value: float) -> str:
    return f"{100 * value:.0f}"
