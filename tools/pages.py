"""Pages whose code blocks are programs: run them, write what they print below them, make notebooks of the same text.

python -m tools.pages docs/tutorial.md ...         # run the pages' blocks in an empty folder; put in outputs, pictures
python -m tools.pages --notebooks build/notebooks  # a notebook of every page that has outputs

A fenced block of bash or python is run; a fenced block of text right after it is its output.
"""

import contextlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["Block", "blocks", "notebook", "run_block", "run_page"]

ROOT = Path(__file__).parents[1]
_FENCE = re.compile(r"^(?P<indent> *)```(?P<language>[\w-]*)[^\n]*\n(?P<body>.*?)^(?P=indent)```$", re.M | re.S)


class Block(NamedTuple):
    """A fenced block: its language, its text, and where it is in the page (begin and end, fences included)."""

    language: str
    body: str
    begin: int
    end: int


def blocks(text: str) -> Iterator[Block]:
    """The fenced blocks of a page, in order."""
    for found in _FENCE.finditer(text):
        body = re.sub(rf"^{found['indent']}", "", found["body"], flags=re.M)
        yield Block(found["language"], body, found.start(), found.end())


def run_block(block: Block, folder: Path, names: dict[str, Any]) -> str:
    """What a block prints.

    Args:
        block: of bash, or of python.
        folder: where it runs.
        names: variables of the python blocks before it; those of this one are added.

    Raises:
        RuntimeError: a command that fails, with what it printed.
    """
    if block.language == "bash":
        environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "COLUMNS": "120"}
        command = ["bash", "-euo", "pipefail", "-c", block.body]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        output = done.stderr + done.stdout
        if done.returncode:
            raise RuntimeError(f"{block.body}\nended with {done.returncode}:\n{output}")
    else:
        printed = io.StringIO()
        with contextlib.chdir(folder), contextlib.redirect_stdout(printed):
            exec(compile(block.body, "<page>", "exec"), names)
        output = printed.getvalue()
    return _tidy(output, folder)


def _tidy(output: str, folder: Path) -> str:
    """Without progress lines, this machine's folders and blanks at line ends."""
    lines = output.replace(f"{folder}/", "").replace(str(folder), ".").splitlines()
    progress = re.compile(r"^\w[\w: ]*: \d+/\d+, \d+ s left$|^\S+: \d+%\|")
    return "\n".join(line.rstrip() for line in lines if not progress.match(line)).strip("\n")


def run_page(text: str, folder: Path) -> str:
    """The page with the outputs of its blocks, each in place of the block of text that follows it."""
    names: dict[str, Any] = {"__name__": "page"}
    written, end, found = [], 0, list(blocks(text))
    for block, after in zip(found, [*found[1:], None], strict=True):
        if block.language not in ("bash", "python"):
            continue
        output = run_block(block, folder, names)
        if after and after.language == "text" and not text[block.end : after.begin].strip():
            written += [text[end : after.begin], f"```text\n{output}\n```"]
            end = after.end
    return "".join(written) + text[end:]


def notebook(text: str) -> dict[str, Any]:
    """A page as a notebook, format 4.5: its text, its blocks as cells, and the outputs that stand in the page."""
    cells: list[dict[str, Any]] = []

    def add(kind: str, source: str, **more: Any) -> None:
        if source.strip():
            cells.append(
                {"id": f"cell-{len(cells)}", "cell_type": kind, "metadata": {}, "source": source.strip("\n"), **more}
            )

    end = 0
    for block in blocks(text):
        add("markdown", text[end : block.begin])
        if block.language in ("bash", "python"):
            magic = "%%bash\n" if block.language == "bash" else ""
            add("code", magic + block.body, execution_count=None, outputs=[])
        elif block.language == "text" and cells and cells[-1]["cell_type"] == "code":
            cells[-1]["outputs"] = [{"output_type": "stream", "name": "stdout", "text": block.body}]
        else:
            add("markdown", text[block.begin : block.end])
        end = block.end
    add("markdown", text[end:])
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}


def main(arguments: list[str]) -> None:
    """See the top of this file."""
    if arguments[:1] == ["--notebooks"]:
        folder = Path(arguments[1])
        folder.mkdir(parents=True, exist_ok=True)
        for page in sorted(ROOT.glob("docs/tutorial*.md")):
            (folder / f"{page.stem}.ipynb").write_text(json.dumps(notebook(page.read_text()), indent=1) + "\n")
        return
    for name in arguments:
        page = Path(name).resolve()
        with tempfile.TemporaryDirectory() as scratch:
            page.write_text(run_page(page.read_text(), Path(scratch)))
            for picture in Path(scratch).glob("*.png"):
                (page.parent / "pictures" / picture.name).write_bytes(picture.read_bytes())


if __name__ == "__main__":
    main(sys.argv[1:])
