"""How long a stage over many registered clips takes to start: tables read, files looked at, nothing computed.

    python -m benchmarks.stage_start --clips 100000

The files are small; what counts is their number. Prints the parts in seconds.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from halo_fast.data.tables import ClipRow, write_rows
from halo_fast.pipeline.clips import run_clips
from halo_fast.pipeline.config import Config
from halo_fast.pipeline.run import Run


def generated(config: Config, clips: int) -> Run:
    """A run directory with a finished stage generate, whose clips and latents are files of a few bytes."""
    run = Run(config)
    with run.stage("generate", {"generate": asdict(config.generate)}, {}) as stage:
        for folder in ("videos", "latents"):
            (stage.folder / folder).mkdir()
        rows = []
        for number in range(clips):
            row = ClipRow(
                f"c{number:06d}", number // 2, f"prompt {number // 2}", number % 2, number,
                f"videos/c{number:06d}.mp4", f"latents/c{number:06d}.safetensors",
            )  # fmt: skip
            (stage.folder / row.video).write_text(row.clip_id)
            (stage.folder / str(row.latents)).write_text(row.clip_id)
            rows.append(row)
        write_rows(stage.folder / "clips.parquet", rows, ClipRow)
        stage.finish({"clips": clips})
    return run


def start(run: Run) -> dict[str, tuple[float, float]]:
    """Wall clock and processor seconds of each part of a stage's start, and of the start again once it is finished."""
    seconds = {}

    def timed(label: str, call: Callable[[], object]) -> None:
        begin, used = time.perf_counter(), time.process_time()
        call()
        seconds[label] = time.perf_counter() - begin, time.process_time() - used

    timed("tables of the earlier stages", lambda: run_clips(run))
    inputs = run_clips(run).inputs

    def enter() -> None:
        with run.stage("score", {}, inputs) as stage:
            if not stage.done:
                stage.finish({})

    timed("a new stage: files of the earlier stage looked at", enter)
    timed("the stage again: finished before, kept", enter)
    return seconds


def main() -> None:
    """Print the seconds of a start."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=100_000)
    clips = parser.parse_args().clips
    with tempfile.TemporaryDirectory() as folder:
        run = generated(Config(output_dir=str(Path(folder) / "run")), clips)
        for label, (wall, used) in start(run).items():
            print(f"{label:<55}{wall:6.2f} s, {used:6.2f} s of processor time, for {clips:,} clips")


if __name__ == "__main__":
    main()
