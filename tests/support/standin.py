"""Makes a wheel of the stand-in for VBench and VBench-2.0, so that pip installs it without a network."""

import zipfile
from pathlib import Path

SOURCE = Path(__file__).with_name("vbench_standin")
INFO = "vbench-0.1.5.dist-info"


def standin_wheel(folder: Path) -> Path:
    """The wheel's file."""
    wheel = folder / "vbench-0.1.5-py3-none-any.whl"
    files = {path.relative_to(SOURCE).as_posix(): path.read_text() for path in SOURCE.rglob("*") if path.is_file()}
    files = {name: text for name, text in files.items() if "__pycache__" not in name}
    files[f"{INFO}/METADATA"] = "Metadata-Version: 2.1\nName: vbench\nVersion: 0.1.5\n"
    files[f"{INFO}/WHEEL"] = "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    files[f"{INFO}/entry_points.txt"] = "[console_scripts]\nvbench = vbench.cli.vbench:main\n"
    files[f"{INFO}/RECORD"] = "".join(f"{name},,\n" for name in [*files, f"{INFO}/RECORD"])
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return wheel
