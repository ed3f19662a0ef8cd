"""A Python environment of its own for packages whose pins must not touch ours."""

from __future__ import annotations

import logging
import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from halo_fast.errors import UserError
from halo_fast.files import hash_text, write_bytes

__all__ = ["build_environment", "last_line", "run_python"]

logger = logging.getLogger(__name__)

_READY = "packages.txt"  # what pip installed; written last
# what would let our packages, or a secret of ours, into the other environment
_HIDDEN = ("PYTHONPATH", "PYTHONHOME", "PYTHONSTARTUP", "VIRTUAL_ENV", "OPENAI_API_KEY")
_INTERPRETER = "Scripts/python.exe" if os.name == "nt" else "bin/python"


def build_environment(packages: Sequence[str], python: str, place: Path | None, setting: str) -> Path:
    """The interpreter of an environment that holds the packages, made if it is not there.

    A build that was killed is made again. One process builds at a time; others wait.

    Args:
        packages: what pip installs, such as "vbench==0.1.5"; also paths and options of pip. Empty takes the environment
            at `place` as it is.
        python: interpreter of the version that they need, by path or by name such as "python3.10".
        place: folder of the environment; None for one in the user's cache, named after packages and interpreter.
        setting: place of the settings in messages, such as "evaluate.judge_options.vbench".

    Raises:
        UserError: no such interpreter, or packages that cannot be installed; pip's log is kept and named.
    """
    import filelock

    if not packages:
        return _existing(place, setting)
    base = shutil.which(python)
    if base is None:
        raise UserError(f"{setting}.python: expected an interpreter, got {python!r}, which is not found; install it")
    folder = (place or _cache() / hash_text("\n".join((base, *packages)))[:12]).resolve()
    interpreter = folder / _INTERPRETER
    folder.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(folder.with_name(f".{folder.name}.lock")):
        if not (folder / _READY).exists():
            if place is not None and folder.exists() and any(folder.iterdir()) and not (folder / "pyvenv.cfg").exists():
                raise UserError(f"{setting}.environment: {folder} holds files of others; give an empty folder")
            _build(folder, interpreter, base, packages, setting)
    return interpreter


def run_python(
    interpreter: Path, arguments: Sequence[str], cwd: Path, log: Path, variables: Mapping[str, str] | None = None
) -> int:
    """Run the interpreter of another environment and return its exit status.

    Nothing of this environment reaches it: no path of packages, no key of a paid server.

    Args:
        interpreter: as `build_environment` gives it.
        arguments: of the interpreter.
        cwd: folder in which it runs.
        log: file that gets what it prints.
        variables: further environment variables.
    """
    environment = {name: value for name, value in os.environ.items() if name not in _HIDDEN}
    paths = [str(interpreter.parent), environment.get("PATH", "")]
    environment |= {"PATH": os.pathsep.join(paths), "PYTHONNOUSERSITE": "1"} | dict(variables or {})
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        command = [str(interpreter), *arguments]
        return subprocess.run(command, cwd=cwd, env=environment, stdout=output, stderr=subprocess.STDOUT).returncode


def last_line(log: Path) -> str:
    """The line of a log that tells most, for messages: the last error with words, or else the last line with words."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()] if log.exists() else []
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception|ERROR): \S", line)]
    words = [line for line in lines if re.search(r"\w", line)]
    return (errors or words or ["nothing was printed"])[-1]


def _existing(place: Path | None, setting: str) -> Path:
    interpreter = place / _INTERPRETER if place else None
    if interpreter is None or not interpreter.exists():
        raise UserError(f"{setting}.environment: expected a folder with {_INTERPRETER}, got {str(place or '')!r}")
    return interpreter.absolute()


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "halo_fast" / "environments"


def _build(folder: Path, interpreter: Path, base: str, packages: Sequence[str], setting: str) -> None:
    """Make the environment anew and write what was installed."""
    log = folder.with_name(f"{folder.name}.log")
    log.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    logger.warning("%s: building an environment in %s, which may take a while (%s)", setting, folder, log)
    steps = [
        (Path(base), ["-m", "venv", str(folder)]),
        (interpreter, ["-m", "pip", "install", "--disable-pip-version-check", *packages]),
    ]
    for python, arguments in steps:
        if run_python(python, arguments, folder.parent, log):
            raise UserError(
                f"{setting}.packages: {' '.join(packages)} cannot be installed for {base} ({last_line(log)}); "
                f"see {log}, and set packages or python"
            )
    freeze = subprocess.run([str(interpreter), "-m", "pip", "freeze"], capture_output=True, check=True)
    write_bytes(folder / _READY, freeze.stdout)
