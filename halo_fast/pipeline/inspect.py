"""`halo inspect`: a summary of a run's clips, labels and pairs, in the terminal and as a page."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from halo_fast.data.imports import ImportedRow
from halo_fast.data.sources import LeftOutRow
from halo_fast.data.summary import Section, format_section, summarise
from halo_fast.data.tables import read_rows
from halo_fast.files import write_bytes
from halo_fast.pipeline.clips import read_run_data
from halo_fast.pipeline.hashes import MANIFEST
from halo_fast.pipeline.run import round_folders

__all__ = ["inspect_run"]


def inspect_run(run: Path, page: Path | None = None) -> str:
    """Summarise the clips, labels and pairs of a run directory, round by round, and write the same as a page.

    Args:
        run: the run directory.
        page: file of the page; None for inspect.html in the run directory.

    Returns:
        The tables as text.

    Raises:
        UserError: no clips.
    """
    run = Path(run)
    sections = _sections(run)
    for folder in round_folders(run)[1:]:
        if (folder / "generate" / MANIFEST).exists():
            name = folder.name.replace("_", " ")
            sections += [replace(section, title=f"{name}: {section.title}") for section in _sections(folder)]
    file = Path(page) if page is not None else run / "inspect.html"
    write_bytes(file, _page(run.resolve().name, sections).encode())
    return "\n\n".join([*map(format_section, sections), f"page: {file}"])


def _sections(run: Path) -> list[Section]:
    """The tables of a round."""
    data = read_run_data(run)
    table, dropped = run / "import" / "clips.parquet", run / "import" / "left_out.parquet"
    imported = read_rows(table, ImportedRow) if table.exists() else []
    left_out = read_rows(dropped, LeftOutRow) if dropped.exists() else []
    return summarise(data.clips, data.labels, data.pairs, imported, left_out)


def _page(title: str, sections: Sequence[Section]) -> str:
    """The HTML of a summary; whatever comes from the user's files is escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return environment.get_template("inspect.html.j2").render(title=title, sections=sections)
