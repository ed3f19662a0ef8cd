"""Tables of figures as text and as JSON."""

import math
from collections.abc import Mapping

from halo_fast.agreement.figures import Figure

__all__ = ["Table", "format_figure", "format_table", "table_as_json"]

Table = dict[str, dict[str, Figure]]
"""Rows of figures: name of the row -> name of the figure -> figure."""


def format_table(table: Mapping[str, Mapping[str, Figure]]) -> str:
    """The table as aligned text: each figure with its interval."""
    names = list(dict.fromkeys(name for cells in table.values() for name in cells))
    lines = [["", *(name.replace("_", " ") for name in names)]]
    for row, cells in table.items():
        lines.append([row, *(format_figure(cells[name]) if name in cells else "" for name in names)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def format_figure(figure: Figure) -> str:
    """ "0.31 [0.09, 0.50]"; without the interval where there is none, "-" where the figure is not defined."""
    if math.isnan(figure.value):
        return "-"
    return f"{figure.value:.2f}" + ("" if math.isnan(figure.low) else f" [{figure.low:.2f}, {figure.high:.2f}]")


def table_as_json(table: Mapping[str, Mapping[str, Figure]]) -> dict[str, dict[str, list[float | None]]]:
    """For JSON: [value, low, high] for each figure; NaN becomes null."""
    return {
        row: {name: [None if math.isnan(value) else float(value) for value in figure] for name, figure in cells.items()}
        for row, cells in table.items()
    }
