"""Pictures of the table: speed beside memory, the floor dashed, the conditions in the picture.

python -m benchmarks.plot                                          # docs/pictures, from the committed table
python -m benchmarks.plot --table bench.json --output pictures     # from a report of pytest-benchmark
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from math import prod
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

from benchmarks import LATENTS, harness  # noqa: E402
from benchmarks.harness import Row  # noqa: E402

PICTURES = Path(__file__).parents[1] / "docs" / "pictures"
LOSS = ("eager", "training loop, re-created", "torch.compile", "ours")
STEP = (
    "Local-DPO loop, re-created", "diffusers-DPO loop, re-created", "SimpleTuner loop, re-created",
    "ours, margin first, cached", "ours, cached reference", "ours, selective, cached",
)  # fmt: skip
LIMIT, FLOOR = "supervised (the limit)", "floor"
OURS, OTHERS, TEXT = "#1b7f5c", "#9aa0a6", "#333333"
NAMES = {"cogvideox": "CogVideoX", "wan": "Wan"}
CHECKPOINTING = {
    "none": "no gradient checkpointing", "full": "full gradient checkpointing", "compiled": "compiled blocks"
}  # fmt: skip
STYLE = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "halo_fast",
         "axes.axisbelow": True, "axes.grid.axis": "x", "axes.grid": True, "grid.color": "#e3e3e3"}  # fmt: skip


def select(rows: Sequence[Row], mode: str, case: str, metric: str, setting: str = "") -> dict[str, list[float]]:
    """20 %, 50 % and 80 % quantiles by provider; missing outer quantiles are the median."""
    chosen = [
        row
        for row in rows
        if (row["mode"], row["case"], row["metric"]) == (mode, case, metric) and setting in row["setting"]
    ]
    return {row["provider"]: [float(row[name] or row["p50"]) for name in ("p20", "p50", "p80")] for row in chosen}


def bars(axes: Axes, values: dict[str, list[float]], providers: Sequence[str], scale: float, form: str) -> None:
    """Horizontal bars of medians with their spread, one row for each provider; ours in colour, the others grey."""
    for place, name in enumerate(reversed(providers)):
        if name not in values:
            axes.annotate("not measured", (0, place), (4, 0), textcoords="offset points", va="center", color=OTHERS)
            continue
        low, middle, high = (scale * value for value in values[name])
        axes.barh(place, middle, color=OURS if name.startswith("ours") else OTHERS, height=0.62)
        if high > low:
            axes.plot([low, high], [place, place], color=TEXT, linewidth=1)
        axes.annotate(
            form.format(middle), (max(middle, high), place), (5, 0), textcoords="offset points", va="center",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1}, zorder=5,
        )  # fmt: skip
    axes.set_yticks(range(len(providers)), list(reversed(providers)))
    axes.set_ylim(-0.6, len(providers) - 0.4)
    axes.margins(x=0.16)


def line(axes: Axes, value: float, label: str) -> None:
    """A dashed line that no provider can go below, named above the bars."""
    axes.axvline(value, color=TEXT, linestyle="--", linewidth=1.2)
    axes.annotate(label, (value, 1), (0, 3), xycoords=("data", "axes fraction"), textcoords="offset points",
                  ha="center", va="bottom", fontsize=9)  # fmt: skip


def condition_line(figure: Figure, rows: Sequence[Row], mode: str, case: str, note: str) -> None:
    """Machine, versions, commit and date of seconds and of bytes, under the picture."""
    lines = [note]
    for label, kind, metric in (("time", mode, "seconds"), ("memory", "memory", "peak bytes")):
        cells = (row["conditions"] for row in rows if (row["mode"], row["case"], row["metric"]) == (kind, case, metric))
        facts = harness.split(next(cells, ""))
        named = [f"{name} {facts[name]}" for name in ("torch", "commit") if name in facts]
        lines.append(f"{label}: " + ", ".join([facts.get("machine", "no figures"), *named, facts.get("date", "")]))
    figure.supxlabel("\n".join(lines), fontsize=8.5, color="#555555")


def plot_loss(rows: Sequence[Row], case: str) -> Figure:
    """One loss call, forward and backward: milliseconds under two kinds of memory, and the peak of memory."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 3.6), layout="constrained", width_ratios=(3, 2))
    settings = sorted({row["setting"] for row in rows if (row["mode"], row["case"]) == ("loss", case)})
    setting = next((one for one in settings if one == "threads=1; memory=fresh"), settings[0])
    seconds = select(rows, "loss", case, "seconds", setting)
    bars(left, seconds, LOSS, 1e3, "{:.1f}")
    if FLOOR in seconds:
        line(left, 1e3 * seconds[FLOOR][1], "two streaming additions")
    left.set_xlabel("ms, forward and backward (median, 20 to 80 %)")
    bars(right, select(rows, "memory", case, "peak bytes"), LOSS, 2**-20, "{:.1f}")
    gradient_bytes = _gradient_bytes(case)
    line(right, gradient_bytes / 2**20, "the gradient alone")
    right.set_xlabel("MiB at the peak, beyond the inputs")
    right.set_yticklabels([])
    _, latent, dtype = case.split(" ")
    figure.suptitle(f"Gran-DPO loss, one pair of {NAMES.get(latent, latent)} latents, {dtype}")
    condition_line(figure, rows, "loss", case, setting.replace("=", " ").replace(";", ","))
    return figure


def _gradient_bytes(case: str) -> int:
    """Bytes of the gradient of one pair."""
    _, latent, dtype = case.split(" ")
    return 2 * prod(LATENTS[latent]) * (4 if dtype == "float32" else 2)


def plot_step(rows: Sequence[Row], case: str) -> Figure:
    """One training step: seconds beside the peak of memory, and the supervised step as the limit."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 4.1), layout="constrained", width_ratios=(3, 2))
    seconds, peak = select(rows, "step", case, "seconds"), select(rows, "memory", case, "peak bytes")
    measured = [name for name in STEP if name in seconds or name in peak]
    bars(left, seconds, measured, 1, "{:.2f}")
    line(left, seconds[LIMIT][1], "supervised step, same samples")
    left.set_xlabel("s of one step (median, 20 to 80 %)")
    bars(right, peak, measured, 2**-20, "{:.0f}")
    line(right, peak[LIMIT][1] / 2**20, "supervised step")
    right.set_xlabel("MiB at the peak, beyond weights")
    right.set_yticklabels([])
    model, setting = case.split(" ")
    figure.suptitle(f"Training step on one pair, small {NAMES.get(model, model)}, {CHECKPOINTING[setting]}")
    note = "LoRA of rank 16, float32, one thread; the public loops are re-created from descriptions"
    condition_line(figure, rows, "step", case, note)
    return figure


# picture -> what draws it, and the cases to draw, the first that was measured
PLOTS: dict[str, tuple[Callable[[Sequence[Row], str], Figure], str, tuple[str, ...]]] = {
    "loss": (plot_loss, "loss", ("halo cogvideox bfloat16", "halo wan bfloat16")),
    "step": (plot_step, "step", ("wan full", "wan none")),
}


def figures(rows: Sequence[Row]) -> Iterator[tuple[str, Figure]]:
    """The pictures whose cases are in the table."""
    measured = {(row["mode"], row["case"]) for row in rows}
    for name, (draw, mode, wanted) in PLOTS.items():
        case = next((case for case in wanted if (mode, case) in measured), None)
        if case:
            with plt.rc_context(STYLE):
                yield name, draw(rows, case)


def save(figure: Figure, path: Path) -> None:
    """Write a picture that is the same for the same figures."""
    keep: dict[str, Any] = {"metadata": {"Date": None}} if path.suffix == ".svg" else {}
    figure.savefig(path, dpi=150, facecolor="white", **keep)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--table", type=Path, default=harness.TABLE, help="CSV of the table, or pytest-benchmark's JSON"
    )
    parser.add_argument("--output", type=Path, default=PICTURES)
    parser.add_argument("--format", choices=("svg", "png"), default="svg")
    choice = parser.parse_args(arguments)
    rows = harness.read_rows(choice.table)
    choice.output.mkdir(parents=True, exist_ok=True)
    for name, figure in figures(rows):
        with plt.rc_context(STYLE):
            save(figure, choice.output / f"{name}.{choice.format}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
