"""Every code block and command of README.md, docs/ and the examples: run, or checked by the program that would run it.

Python blocks run, in the order of their page. Commands of `halo` go through its real command line, up to the function
that would do the work; `halo doctor` and --print-config run. Settings in YAML are parsed as settings. Of other programs
the real parser, the file or the target is asked. Tutorials run as a whole; those of minutes in a slow test.
"""

import functools
import importlib.util
import inspect
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import page_names
import pytest
import torch
from servers import OpenAIServer

from halo_fast import PRESETS, registry
from halo_fast.pipeline import cli
from halo_fast.pipeline.arguments import build_parser, parse_config
from halo_fast.pipeline.stages import STAGES
from tools import pages

ROOT = Path(__file__).parents[2]
TUTORIALS = sorted(ROOT.glob("docs/tutorial*.md"))
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "AGENTS.md", "examples/README.md")]
PAGES += [page for page in sorted(ROOT.glob("docs/**/*.md")) if page not in TUTORIALS]
PROGRAMS = (
    "accelerate", "cd", "cmake", "export", "git", "halo", "make", "pip", "pre-commit", "pytest", "python", "torchrun",
    "vllm",
)  # fmt: skip
INLINE = r"(?<!`)`((?:halo|python -m (?:benchmarks|tools)|make|examples/\S+\.sh)[ .][^`\n]*)`"
PLACES = {
    "CONFIG.yaml": "my.yaml", "CONFIG": "my.yaml", "FOLDER_OR_TABLE": "ratings.csv", "NAME": "anna", "OUT": "out.json",
    "RUN": "runs/mine", "RUN/reward": "runs/mine/reward", "VERB": "train",
}  # fmt: skip
ALONE = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
SETTINGS = """
output_dir: runs/mine
pretrained_model_name_or_path: demo:graded
prompts: demo:train
evaluation_prompts: demo:heldout
annotate: {teacher: demo}
"""


class Piece(NamedTuple):
    """Something that a page shows: its file, line and text."""

    file: str
    line: int
    text: str

    @property
    def id(self) -> str:
        return f"{self.file}:{self.line}"


def place(page: Path, text: str, position: int) -> tuple[str, int]:
    return str(page.relative_to(ROOT)), text.count("\n", 0, position) + 1


def indented(text: str) -> Iterator[tuple[int, str]]:
    """Blocks that are shown by four blanks, outside of fences, with the position where each begins."""
    for block in reversed(list(pages.blocks(text))):
        text = text[: block.begin] + re.sub(r"[^\n]", "~", text[block.begin : block.end]) + text[block.end :]
    for found in re.finditer(r"(?:(?<=\n\n)|(?<=^\n))(?: {4}[^\n]*\n(?:\n(?= {4}))?)+", text):
        start = found.start()
        for part in re.split(r"(?<=\n\n)(?= {4}halo )", found[0]):  # a command after settings is a block of its own
            yield start, re.sub(r"^ {4}", "", part, flags=re.M)
            start += len(part)


def is_command(line: str) -> bool:
    word = line.split(" ", 1)[0]
    return word in PROGRAMS or line.startswith(("GPUS=", "examples/"))


def commands_of(block: str) -> list[str]:
    """Command lines of a block, without remarks, which begin with "#"; lines that end in a backslash are joined."""
    lines = re.sub(r"\\\n\s*", "", block).splitlines()
    found = [re.split(r"\s+#", line.strip())[0] for line in lines if is_command(line.strip())]
    return [re.sub(r"\[(--[^\]]*)\]", r"\1", line) for line in found]


def is_yaml(language: str, block: str) -> bool:
    if language:
        return language == "yaml"
    return re.match(r"^[a-z_]+:(\s|$)", block) is not None and block.strip().count("\n") > 0


def is_python(language: str, block: str) -> bool:
    return language == "python" or not language and re.match(r"^(#[^\n]*\n)?(from \w|import \w|@)", block) is not None


def pieces() -> dict[str, list[Piece]]:
    """What the pages show, by kind: commands, settings in YAML, and Python; all else is figures and output."""
    found: dict[str, list[Piece]] = {"command": [], "yaml": [], "python": [], "shown": []}
    for page in PAGES:
        text = page.read_text()
        shown = [(block.begin, block.language, block.body) for block in pages.blocks(text)]
        shown += [(position, "", body) for position, body in indented(text)]
        for position, language, body in sorted(shown):
            where = place(page, text, position)
            commands = commands_of(body) if language in ("", "bash") else []
            kind = "python" if is_python(language, body) else "yaml" if is_yaml(language, body) else "shown"
            if kind == "shown" and commands:
                found["command"] += [Piece(*where, command) for command in commands]
            else:
                found[kind].append(Piece(*where, body))
        for inline in re.finditer(INLINE, text):
            if not re.match(r"halo[._]|make\.", inline[1]):
                found["command"].append(Piece(*place(page, text, inline.start()), inline[1]))
    for example in sorted((ROOT / "examples").iterdir()):
        if example.suffix in (".py", ".sh"):
            text = example.read_text()
            head = inspect.cleandoc(text.split('"""')[1]) if example.suffix == ".py" else text.replace("\n#", "\n")
            found["command"] += [
                Piece(f"examples/{example.name}", 1, command)
                for _, block in indented(f"\n\n{head}\n")
                for command in commands_of(block)
            ]
    first = {piece.text: piece for piece in reversed(found["command"])}
    return found | {"command": list(reversed(first.values()))}


FOUND = pieces()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder with what the pages' commands name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-not-a-real-key")
    Path("my.yaml").write_text(SETTINGS)
    for name in ("recipes", "examples", "tests", "benchmarks", "tools", "Makefile", "CMakeLists.txt"):
        Path(name).symlink_to(ROOT / name)
    Path("prompts.txt").write_text("a cat\na dog\n")
    Path("heldout.txt").write_text("a bird\na fish\n")
    return tmp_path


def check_halo(words: list[str], monkeypatch) -> None:
    """Run halo's command line up to the function that would do the work."""
    words = [PLACES.get(word, word) for word in words]
    if cli._find_verb(words)[2] == [] and words != ["doctor"]:
        return  # a verb that is only mentioned, and exists
    work = {stage.target for stage in STAGES.values()} | {verb.target for verb in cli.VERBS.values()}
    work |= {registry.target("command", name) for name in registry.known("command")}
    work |= {"halo_fast.pipeline.stages.train:dry_run", "halo_fast.pipeline.plan:write_recipe"}
    work |= {"halo_fast.pipeline.report.several:compare_runs"}
    work -= {"halo_fast.loss.backends:report"}
    real, called = registry.load, []

    def load(target):
        function = real(target)
        if target not in work:
            return function
        return functools.wraps(function)(lambda *arguments, **named: called.append(target))

    with monkeypatch.context() as patch:
        patch.setattr(registry, "load", load)
        for name in ("check_required", "check_run"):
            patch.setattr(f"halo_fast.pipeline.preflight.{name}", lambda *_: None)
        try:
            code = cli.main(words)
        except SystemExit as end:
            code = end.code
    assert code in (0, None), f"halo {shlex.join(words)}"
    if words[:1] != ["doctor"] and not {"--help", "--version", "--print-config"} & set(words):
        assert called, f"halo {shlex.join(words)} would do nothing"


def check_pip(words: list[str]) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for word in words[1:]:
        found = re.fullmatch(r"\.\[([\w,]+)\]", word)
        assert found is None or set(found[1].split(",")) <= set(extras), word
        if word.startswith("-Ccmake.define."):
            assert word.removeprefix("-Ccmake.define.").split("=")[0] in (ROOT / "CMakeLists.txt").read_text()


def check_python(words: list[str], monkeypatch) -> None:
    """python -m MODULE or python FILE: the module or file exists, and its own parser takes the arguments."""
    if words[0] == "-m":
        assert importlib.util.find_spec(words[1]), words[1]
        source = Path(importlib.util.find_spec(words[1]).origin).read_text()
        if "argparse" in source:
            done = subprocess.run(
                [sys.executable, *words, "--help"], cwd=ROOT, capture_output=True, text=True, env=os.environ
            )
            assert done.returncode == 0, done.stderr
        return
    from jsonargparse import auto_cli, capture_parser

    spec = importlib.util.spec_from_file_location("shown", words[0])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    parser = capture_parser(lambda: auto_cli(module.main, args=[]))
    parser.exit_on_error = False
    parser.parse_args(words[1:])


def check_accelerate(words: list[str], monkeypatch) -> None:
    from accelerate.commands.launch import launch_command_parser

    arguments = launch_command_parser().parse_args(words[1:])
    assert arguments.training_script == "halo_fast" and arguments.module
    check_halo(arguments.training_script_args, monkeypatch)


def check_torchrun(words: list[str], monkeypatch) -> None:
    from torch.distributed.run import get_args_parser

    arguments = get_args_parser().parse_args(words)
    assert arguments.training_script == "halo_fast" and arguments.module
    check_halo(arguments.training_script_args, monkeypatch)


def check_command(command: str, monkeypatch) -> None:
    """One command by the program that would run it."""
    for part in command.split(" && "):
        words = shlex.split(part)
        while words and re.match(r"^[A-Z]+=", words[0]):
            words = words[1:]
        program, rest = words[0], words[1:]
        if program == "halo":
            check_halo(rest, monkeypatch)
        elif program == "accelerate":
            check_accelerate(rest, monkeypatch)
        elif program == "torchrun":
            check_torchrun(rest, monkeypatch)
        elif program == "python":
            check_python(rest, monkeypatch)
        elif program == "make":
            done = subprocess.run(["make", "-n", *rest], cwd=ROOT, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
        elif program == "pip":
            check_pip(rest)
        elif program.startswith("examples/"):
            assert (ROOT / program).stat().st_mode & 0o100, program
            check_halo(["run", *rest], monkeypatch)
        elif program == "pytest":
            assert all((ROOT / word).exists() for word in rest if word.startswith("tests"))
        elif program == "cmake":
            for word in rest:
                if word.startswith("-D"):
                    assert word[2:].split("=")[0] in (ROOT / "CMakeLists.txt").read_text()
        elif program == "cd":
            assert rest == ["halo_fast"]
        elif program == "pre-commit":
            assert (ROOT / ".pre-commit-config.yaml").exists()


@pytest.mark.parametrize("piece", FOUND["command"], ids=lambda piece: f"{piece.id} {piece.text[:50]}")
def test_commands(piece, folder, monkeypatch):
    words = shlex.split(piece.text)
    if words[0] in ("git", "vllm") or words[0] == "export":
        check_command(" && ".join(piece.text.split(" && ")[1:]), monkeypatch) if "&&" in piece.text else None
        pytest.skip(f"{words[0]} is another's program, and needs the network" if words[0] != "export" else "sets a key")
    check_command(piece.text, monkeypatch)


@pytest.mark.parametrize("piece", FOUND["yaml"], ids=lambda piece: piece.id)
def test_settings(piece, folder):
    Path("shown.yaml").write_text(piece.text)
    parse_config(build_parser("halo run", ""), ["shown.yaml"])


@pytest.mark.parametrize("page", sorted({piece.file for piece in FOUND["python"]}))
def test_python(page, folder, monkeypatch):
    """All blocks of a page in one namespace, with the names that the page speaks of but does not make."""
    for name, value in ALONE.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(registry, "_tables", {kind: dict(names) for kind, names in registry._tables.items()})
    torch.manual_seed(0)
    try:
        with OpenAIServer() as server:
            names = {"__name__": "page", "server": server}
            for piece in (piece for piece in FOUND["python"] if piece.file == page):
                names |= page_names.before(page, piece.text)
                exec(compile(page_names.shortened(piece.text), piece.id, "exec"), names)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def test_the_short_tutorial_prints_what_it_says(tmp_path):
    """Numbers to one part in a hundred."""
    text = (ROOT / "docs" / "tutorial-loss.md").read_text()
    shown, made = (
        [block.body for block in pages.blocks(page) if block.language == "text"]
        for page in (text, pages.run_page(text, tmp_path))
    )
    number = re.compile(r"[-+]?\d+\.?\d*(?:e-?\d+)?")
    for one, other in zip(shown, made, strict=True):
        assert number.sub("0", one) == number.sub("0", other)
        assert [float(value) for value in number.findall(one)] == pytest.approx(
            [float(value) for value in number.findall(other)], rel=0.01, abs=0.01
        )


FEWER = {
    "tutorial": {"video_steps: 40, patch_steps: 200": "video_steps: 4, patch_steps: 20", "steps: 120": "steps: 12"},
    "tutorial-pairs": {},
}
"""Steps of training that change figures of a page and nothing that is looked at."""


@pytest.mark.slow
@pytest.mark.parametrize("page", FEWER)
def test_the_long_tutorials_run(page, tmp_path):
    """In a process of its own: its number of threads is not that of the tests."""
    text = (ROOT / "docs" / f"{page}.md").read_text()
    for many, few in FEWER[page].items():
        assert text.count(many) == 1
        text = text.replace(many, few)
    (tmp_path / f"{page}.md").write_text(text)
    (tmp_path / "pictures").mkdir()
    command = [sys.executable, "-m", "tools.pages", tmp_path / f"{page}.md"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    text = (tmp_path / f"{page}.md").read_text()
    outputs = [block.body for block in pages.blocks(text) if block.language == "text"]
    assert len(outputs) > 4 and all(output.strip() for output in outputs)
    pictures = re.findall(r"\(pictures/(.*?)\)", text)
    assert pictures and all((tmp_path / "pictures" / picture).exists() for picture in pictures)


def test_notebooks_hold_the_pages():
    for page in TUTORIALS:
        made = pages.notebook(page.read_text())
        code = ["".join(cell["source"]) for cell in made["cells"] if cell["cell_type"] == "code"]
        blocks = [block for block in pages.blocks(page.read_text()) if block.language in ("bash", "python")]
        assert [source.removeprefix("%%bash\n") for source in code] == [block.body.strip("\n") for block in blocks]
        assert len({cell["id"] for cell in made["cells"]}) == len(made["cells"])


def test_files_that_pages_name_exist():
    named = r"(?<![\w./-])((?:halo_fast|tests|docs|benchmarks|examples|tools|kernels|recipes)/[\w./-]*\w)"
    made = "benchmarks/results/bench", "examples/NAME"  # by `make bench`; any of them
    missing = [
        f"{page.relative_to(ROOT)}: {found}"
        for page in [*PAGES, *TUTORIALS]
        for found in re.findall(named, page.read_text())
        if not (ROOT / found).exists() and not found.startswith(made)
    ]
    assert missing == []


def test_pictures_are_light():
    assert {picture.name for picture in ROOT.glob("docs/pictures/*") if picture.stat().st_size > 300_000} == set()


def test_numbers_of_the_readme_are_those_of_code_and_results():
    readme, results = ((ROOT / name).read_text() for name in ("README.md", "docs/results.md"))
    assert f"{len(PRESETS)} presets" in readme
    scripts = [file for file in (ROOT / "examples").iterdir() if file.suffix in (".py", ".sh")]
    assert len(scripts) == 12 and "Twelve\n[examples]" in readme
    flat = " ".join(readme.split())
    told = {
        "HALO + patch SFT": ("which caps no margin, takes {}%", "{}% after `halo_sft`"),
        "HALO, bounded": ("takes {}% of the defects' severity away", "{}% after the default"),
        "HALO, bounded, two rounds": ("or {}% in two rounds", ""),
        "Local-DPO": ("Local-DPO {}%", "{}% after Local-DPO"),
        "DenseDPO": ("DenseDPO {}%", ""),
        "HALO": ("which has no supervised term, {}%", ""),
        "SFT, winning patches": ("supervision on winning patches alone {}%", ""),
        "video DPO": ("the video's preference alone {}%", ""),
        "base": ("", "show their prompt: {}% of the base's"),
    }
    for arm, words in told.items():
        shares = re.search(rf"^\| {re.escape(arm)} \| (\d+) [^|]*\|[^|]*\| (\d+) ", results, re.M)
        assert shares, arm
        for share, sentence in zip(shares.groups(), words, strict=True):
            assert sentence.format(share) in flat, (arm, sentence)
    patchy = results.partition("## Base: patchy")[2]
    row = r"^\| {} \| (\d+) [^|]*\|[^|]*\| (\d+) "
    local, bounded = (re.search(row.format(arm), patchy, re.M).groups() for arm in ("Local-DPO", "HALO, bounded"))
    assert f"as much as the default ({local[0]}% and {bounded[0]}%)" in flat
    assert f"shows the prompt more often ({local[1]}% and {bounded[1]}%)" in flat


def test_counts(capsys):
    """What the pages hold; a collector that finds nothing would pass everything."""
    counts = {kind: len(found) for kind, found in FOUND.items()}
    counts["tutorials"] = sum(
        block.language in ("bash", "python") for page in TUTORIALS for block in pages.blocks(page.read_text())
    )
    with capsys.disabled():
        print("\nblocks and commands:", ", ".join(f"{count} {kind}" for kind, count in counts.items()), end=" ")
    assert counts["command"] > 60 and counts["python"] > 15 and counts["yaml"] > 1 and counts["tutorials"] > 20
    assert shutil.which("make") and shutil.which("bash")
