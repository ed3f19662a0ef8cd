"""VBench and VBench-2.0 as judges: driven in an environment of their own, a dimension at a time."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge
from torch import Tensor

from halo_fast.data.clips import write_clip
from halo_fast.errors import UserError
from halo_fast.files import hash_text, progress, read_json, write_json
from halo_fast.judges.base import JudgeTable, Totals, Video, hash_video
from halo_fast.judges.environment import build_environment, last_line, run_python
from halo_fast.judges.suites import VBENCH2_PARTS, VBENCH_DIMENSIONS, vbench2_totals, vbench_totals

__all__ = ["read_results", "suite_prompts", "vbench", "vbench2"]

logger = logging.getLogger(__name__)

Mode = Literal["custom_input", "vbench_standard"]
_SETTING = "evaluate.judge_options"


@dataclass(frozen=True)
class _Suite:
    """What differs between the two benchmarks.

    Args:
        name: of the judge and of the package.
        dimensions: all that it has.
        custom: those that it scores on prompts other than its own.
        prompts: the file of its prompts, in its package.
        cache: variable that names the folder of its weights.
        longest: characters of a prompt in a clip's name; None for all.
        packages: that pip installs.
        totals: of the scores.
    """

    name: str
    dimensions: tuple[str, ...]
    custom: tuple[str, ...]
    prompts: str
    cache: str
    longest: int | None
    packages: tuple[str, ...]
    totals: Totals


_VBENCH = _Suite(
    "vbench", tuple(VBENCH_DIMENSIONS),
    ("subject_consistency", "background_consistency", "temporal_flickering", "motion_smoothness", "dynamic_degree",
     "aesthetic_quality", "imaging_quality", "temporal_style", "overall_consistency"),
    "VBench_full_info.json", "VBENCH_CACHE_DIR", None,
    ("torch==2.5.1", "torchvision==0.20.1", "setuptools<81", "vbench==0.1.5"), vbench_totals,
)  # fmt: skip
_VBENCH2 = _Suite(
    "vbench2", tuple(name for names in VBENCH2_PARTS.values() for name in names),
    ("Human_Anatomy", "Human_Identity", "Human_Clothes", "Multi-View_Consistency"),
    "VBench2_full_info.json", "VBENCH2_CACHE_DIR", 180,
    ("torch==2.5.1", "torchvision==0.20.1", "vbench2==0.1.1"), vbench2_totals,
)  # fmt: skip

# VBench-2.0's own command scores its own prompts alone, and its release imports VBench's class: its class is called.
_CALL = """
import sys
from vbench2 import VBench2
folder, output, dimension, mode, local, prompts, device = sys.argv[1:]
VBench2(device, prompts, output).evaluate(
    videos_path=folder, name="results", dimension_list=[dimension], local=local == "True", mode=mode)
"""
_PLACE = "import importlib.util as u; print(u.find_spec({package!r}).submodule_search_locations[0])"


def vbench(
    clips: Sequence[Video],
    prompts: Sequence[str],
    fps: float,
    device: str,
    *,
    folder: Path,
    dimensions: list[str] | None = None,
    mode: Mode = "custom_input",
    packages: list[str] | None = None,
    python: str = "python3.10",
    environment: str | None = None,
    weights: str | None = None,
    gpus: Annotated[int, Ge(1)] = 1,
) -> JudgeTable:
    """VBench (Huang et al., arXiv:2311.17982, Apache-2.0) by its command line; it needs a GPU of NVIDIA.

    A dimension that was scored before, of the same clips, is read again. Scores are from 0 to 1.

    Args:
        clips: as in ClipJudge, likewise the next three.
        prompts: of each clip.
        fps: for clips that are no files.
        device: of the computation.
        folder: results of each dimension, logs, and links to the clips.
        dimensions: which are scored; None for subject and background consistency and temporal flickering.
        mode: "vbench_standard" for clips of VBench's own prompts, which every dimension takes; "custom_input" for any.
        packages: that pip installs; None for those that VBench names, empty to take `environment` as it is.
        python: interpreter for them.
        environment: folder of the environment; None for one in the user's cache.
        weights: folder of its weights, so that nothing is downloaded; see its pretrained/README.md. None downloads.
        gpus: on which a dimension runs at once.

    Raises:
        UserError: a dimension that it does not have or does not score on such prompts, an environment that cannot be
            built, a dimension that ends without results.
    """
    chosen = dimensions or list(_VBENCH.custom[:3])
    _check(_VBENCH, chosen, mode)
    install = (
        ["torch==2.5.1", "torchvision==0.20.1", "setuptools<81", "vbench==0.1.5"] if packages is None else packages
    )
    interpreter = build_environment(install, python, _path(environment), f"{_SETTING}.vbench")

    words = [str(interpreter.with_name("vbench")), "evaluate", "--ngpus", str(gpus), "--videos_path", "clips"]
    words += ["--mode", mode] + (["--prompt_file", "prompts.json"] if mode == "custom_input" else [])
    words += ["--load_ckpt_from_local", "True"] if weights else []

    def command(dimension: str, work: Path) -> tuple[list[str], Path]:
        return [*words, "--dimension", dimension, "--output_path", "results"], work

    bench = _Bench(_VBENCH, interpreter, command, _variables(_VBENCH, weights, device), _origin(install, weights))
    return _judge(bench, clips, prompts, fps, folder, chosen, mode)


def vbench2(
    clips: Sequence[Video],
    prompts: Sequence[str],
    fps: float,
    device: str,
    *,
    folder: Path,
    dimensions: list[str] | None = None,
    mode: Mode = "custom_input",
    packages: list[str] | None = None,
    python: str = "python3.10",
    environment: str | None = None,
    weights: str | None = None,
) -> JudgeTable:
    """VBench-2.0 (Zheng et al., arXiv:2503.21755, Apache-2.0) by its Python class; it needs a GPU of NVIDIA.

    As `vbench`, whose arguments it has; without `dimensions` it scores human anatomy and identity. Some of its packages
    are not on the index and must be installed by hand: give that environment's folder, and `packages: []`.
    """
    chosen = dimensions or list(_VBENCH2.custom[:2])
    _check(_VBENCH2, chosen, mode)
    install = list(_VBENCH2.packages) if packages is None else packages
    interpreter = build_environment(install, python, _path(environment), f"{_SETTING}.vbench2")
    package = _package_folder(interpreter, "vbench2", folder)

    def command(dimension: str, work: Path) -> tuple[list[str], Path]:
        places = [str(work / "clips"), str(work / "results"), dimension, mode]
        info = str(package / _VBENCH2.prompts)
        return ["-c", _CALL, *places, str(bool(weights)), info, device.partition(":")[0]], package.parent

    bench = _Bench(_VBENCH2, interpreter, command, _variables(_VBENCH2, weights, device), _origin(install, weights))
    return _judge(bench, clips, prompts, fps, folder, chosen, mode)


def suite_prompts(file: Path, dimensions: Sequence[str] = ()) -> list[str]:
    """The prompts of a benchmark's dimensions, in its order, without repetitions.

    Args:
        file: VBench_full_info.json or VBench2_full_info.json of its package.
        dimensions: whose prompts; empty for all.

    Raises:
        UserError: another file.
    """
    try:
        entries = json.loads(file.read_text())
        found = [e["prompt_en"] for e in entries if not dimensions or set(dimensions) & set(e["dimension"])]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: expected prompts of VBench, got none ({type(error).__name__}: {error})") from error
    return list(dict.fromkeys(found))


def read_results(path: Path, dimension: str) -> tuple[float, dict[str, float]]:
    """A dimension's score, and those of its clips by their file names, from a *_eval_results.json.

    The file holds {dimension: [score, [{"video_path": ..., "video_results": ...}, ...]]}. VBench's imaging quality of
    clips is given from 0 to 100 and is divided by 100, as VBench does with their mean. VBench-2.0 says -1 of clips that
    it cannot score; they are NaN here.

    Raises:
        UserError: a file of another form.
    """
    scale = 100.0 if dimension == "imaging_quality" else 1.0
    try:
        total, clips = json.loads(path.read_text())[dimension]
        scores = {Path(clip["video_path"]).name: float(clip["video_results"]) / scale for clip in clips}
        return float(total), {name: math.nan if score == -1 else score for name, score in scores.items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: expected VBench's results of {dimension}, got another form ({type(error).__name__}: {error})"
        ) from error


@dataclass(frozen=True)
class _Bench:
    """A benchmark that is ready to run.

    Args:
        suite: which one.
        interpreter: of its environment.
        command: dimension and folder of the clips -> arguments of the interpreter and the folder in which it runs. It
            writes into "results" of the folder of the clips.
        variables: of the environment.
        origin: what else scores depend on: packages and weights.
    """

    suite: _Suite
    interpreter: Path
    command: Callable[[str, Path], tuple[list[str], Path]]
    variables: Mapping[str, str]
    origin: Sequence[Any]


def _origin(packages: Sequence[str], weights: str | None) -> list[Any]:
    """The packages, and names, sizes and times of the files of weights."""
    files = sorted(path for path in Path(weights).rglob("*") if path.is_file()) if weights else []
    stamps = [(str(file), file.stat()) for file in files]
    return [list(packages), [[name, status.st_size, status.st_mtime_ns] for name, status in stamps]]


def _check(suite: _Suite, dimensions: Sequence[str], mode: str) -> None:
    allowed = suite.custom if mode == "custom_input" else suite.dimensions
    for dimension in dimensions:
        if dimension not in suite.dimensions:
            raise UserError(
                f"{_SETTING}.{suite.name}.dimensions: expected some of {', '.join(suite.dimensions)}; got {dimension!r}"
            )
        if dimension not in allowed:
            raise UserError(
                f"{_SETTING}.{suite.name}.dimensions: {dimension!r} is scored on the benchmark's own prompts alone; "
                f"set mode to vbench_standard and evaluate on those, or choose among {', '.join(allowed)}"
            )


def _path(environment: str | None) -> Path | None:
    return None if environment is None else Path(environment).expanduser()


def _package_folder(interpreter: Path, package: str, folder: Path) -> Path:
    """Where a package of the other environment is; it is not imported."""
    log = folder / "package.log"
    log.unlink(missing_ok=True)
    if run_python(interpreter, ["-c", _PLACE.format(package=package)], interpreter.parent, log):
        raise UserError(f"{_SETTING}.{package}: expected {package} in {interpreter}, got none; install it there")
    return Path(last_line(log))


def _judge(
    bench: _Bench,
    clips: Sequence[Video],
    prompts: Sequence[str],
    fps: float,
    folder: Path,
    dimensions: Sequence[str],
    mode: str,
) -> JudgeTable:
    """Score all clips; on the benchmark's own prompts the two models apart, since it counts the clips of a prompt."""
    rows: list[dict[str, float]] = [{} for _ in clips]
    parts = (
        {"all": slice(None)} if mode == "custom_input" else {"base": slice(0, None, 2), "aligned": slice(1, None, 2)}
    )
    for part, some in parts.items():
        work = folder.resolve() / part
        names = _lay_out(bench.suite, clips[some], prompts[some], fps, work, mode)
        asked = [mode, names, list(prompts[some]), [hash_video(clip) for clip in clips[some]], bench.origin]
        key = hash_text(json.dumps(asked))
        for dimension in progress(dimensions, len(dimensions), f"judge {bench.suite.name}, {part}"):
            scores = _known(work / f"{dimension}.json", key) or _run(bench, work, dimension, key)
            unscored = sum(math.isnan(scores.get(name, math.nan)) for name in names)
            if unscored == len(names):
                raise UserError(f"{work}: {bench.suite.name} scored no clip for {dimension}; leave that dimension out")
            if unscored:
                logger.warning("%s: no %s of %d of %d clips", bench.suite.name, dimension, unscored, len(names))
            for row, name in zip(rows[some], names, strict=True):
                row[dimension] = scores.get(name, math.nan)
    return JudgeTable(bench.suite.name, rows, totals=bench.suite.totals)


def _lay_out(
    suite: _Suite, clips: Sequence[Video], prompts: Sequence[str], fps: float, work: Path, mode: str
) -> list[str]:
    """Link the clips into "clips" of a folder, and write prompts.json; the links' names."""
    place = work / "clips"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    numbers = Counter[str]()
    names = []
    for index, (clip, prompt) in enumerate(zip(clips, prompts, strict=True)):
        standard = f"{prompt[: suite.longest]}-{numbers[prompt]}.mp4"
        numbers[prompt] += 1
        if mode == "vbench_standard" and "/" in standard:
            raise UserError(f"{_SETTING}.{suite.name}.mode: expected the benchmark's own prompts, got {prompt!r}")
        names.append(f"clip{index:05d}.mp4" if mode == "custom_input" else standard)
        if isinstance(clip, Tensor):
            write_clip(place / names[-1], clip, round(fps))
        else:
            (place / names[-1]).symlink_to(clip.resolve())
    write_json(work / "prompts.json", dict(zip(names, prompts, strict=True)))
    return names


def _variables(suite: _Suite, weights: str | None, device: str) -> dict[str, str]:
    """Environment variables: where its weights are, and the device."""
    found: dict[str, str] = {}
    if weights:
        place = Path(weights).expanduser().resolve()
        if not place.is_dir():
            raise UserError(f"{_SETTING}.{suite.name}.weights: expected a folder, got {weights!r}")
        found |= {suite.cache: str(place), "TORCH_HOME": str(place / "torch"), "HF_HUB_OFFLINE": "1"}
    if device.startswith("cuda:") and "CUDA_VISIBLE_DEVICES" not in os.environ:
        found["CUDA_VISIBLE_DEVICES"] = device.removeprefix("cuda:")
    return found


def _known(path: Path, key: str) -> dict[str, float] | None:
    """The scores of a dimension that were kept for these clips; None if there are none."""
    kept = read_json(path)
    if kept is None or kept["key"] != key:
        return None
    return {name: math.nan if score is None else score for name, score in kept["scores"].items()}


def _run(bench: _Bench, work: Path, dimension: str, key: str) -> dict[str, float]:
    """Score one dimension in the other environment and keep it: a score for each clip's name."""
    output, log = work / "results", work / f"{dimension}.log"
    shutil.rmtree(output, ignore_errors=True)
    log.unlink(missing_ok=True)
    arguments, cwd = bench.command(dimension, work)
    status = run_python(bench.interpreter, arguments, cwd, log, bench.variables)
    # VBench's command ends with 0 whatever happens, so that only its results tell
    found = sorted(output.glob("*_eval_results.json"))
    if status or not found:
        raise UserError(
            f"{bench.suite.name}: {dimension} ended with status {status} and {'' if found else 'no '}results "
            f"({last_line(log)}); see {log}"
        )
    scores = read_results(found[-1], dimension)[1]
    kept = {name: None if math.isnan(score) else score for name, score in scores.items()}
    write_json(work / f"{dimension}.json", {"key": key, "scores": kept})
    return scores
