"""A mutation fuzzer of everything that reads files of users: whatever a file holds, a reader reads it or says why not.

    PYTHONPATH=tests/support python -m fuzz --seconds 300 --seed 0

A case is a valid file, damaged at random: bits, bytes, blocks, numbers, whole cells. A failure is an exception other
than UserError, a case that takes over 20 seconds, or a peak of memory over 1 GiB.
"""

import argparse
import csv
import faulthandler
import io
import json
import random
import resource
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pyarrow
import pyarrow.parquet
from PIL import Image

from halo_fast.data.clips import read_clip, read_picture, stream_clip
from halo_fast.data.fitting import FitPolicy, VideoFormat, fit_clip
from halo_fast.data.importers import read_human
from halo_fast.data.prompts import read_prompts
from halo_fast.data.sources import read_source
from halo_fast.errors import UserError

_LIMIT = 20  # seconds of one case
_MEMORY = 1024  # MiB
_FORMAT = VideoFormat(4, 16, 16, 8)
_VIDEOS = {"mp4": "libx264", "mkv": "libx264", "avi": "mpeg4", "gif": "gif", "ts": "mpeg2video", "mov": "mpeg4"}
_VALUES = [
    "", "nan", "NULL", "-1", "0", "1e400", "1e-400", "inf", "99999999999999999999", "0x10", "3.7", "\0", "\u2028",
    "a" * 3000, "../..", "/", ".", "\ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16"), "[]", "{}",
    "true", '"', "'", ",", ";", "\t", "|", "clip.mp4", "\r\n", "=1+1", "٣", "１",
]  # fmt: skip
_ROWS = {
    "captions": {"video": "clip.mp4", "prompt": "a cube", "seed": 3, "fps": 8.0, "model": "m", "mask": "mask.npy"},
    "scores": {"video": "clip.mp4", "rater": "r", "quality": 4, "beauty": 2.5},
    "plain ratings": {"video": "clip.mp4", "prompt": "a cube", "quality": 4},
    "patches": {"row": 0, "pass": 1, "half": 0, "patch_row": 1, "patch_column": 2, "score": 3},
    "boxes": {"video": "clip.mp4", "frame": 1, "x0": 1.5, "y0": 2, "x1": 9, "y1": 12, "score": 2},
    "video align": {"path_A": "clip.mp4", "path_B": "clip.mp4", "prompt": "a", "VQ": "A", "MQ": "same", "TA": "B"},
    "local dpo": {"pos_video_path": "clip.mp4", "neg_video_path": "clip.mp4", "gen_caption": "a", "mask": "mask.npy"},
    "trl": {"prompt": "a", "chosen": "clip.mp4", "rejected": "clip.mp4"},
    "rich hf": {"filename": "still.png", "prompt": "a", "artifact_score": 0.5, "overall_score": 0.1},
    "eval muse": {"img_path": "still.png", "prompt": "a", "total_score": [5, 4, 3]},
    "video feedback": {
        "id": "clip", "text prompt": "a", "images": ["x"], "visual quality": 2, "temporal consistency": 3,
        "dynamic degree": 1, "text-to-video alignment": 4, "factual consistency": 2,
    },
    "fetv": {"row": 0, "prompt": "a", "model": "m", "static_h0": 2, "temporal_h0": 3, "align_h0": 4, "static_h1": 5},
    "exported": {
        "file_name": "clip.mp4", "prompt": "a", "labeller": "x", "grid": [1, 1, 2], "frame_edges": [0, 4],
        "row_edges": [0, 16], "column_edges": [0, 8, 16], "video_beauty": 2.0, "patch_quality": [1.0, 4.0],
    },
    "pick a pic": {"jpg_0": "x", "jpg_1": "y", "label_0": 0.5, "caption": "a"},
}  # fmt: skip


def _video(suffix: str) -> bytes:
    """Six small frames."""
    file = io.BytesIO()
    kind = {"mkv": "matroska", "ts": "mpegts"}.get(suffix, suffix)
    with av.open(file, "w", format=kind) as container:
        stream = container.add_stream(_VIDEOS[suffix], rate=25 if suffix == "ts" else 8)
        stream.width = stream.height = 32
        stream.pix_fmt = "rgb8" if suffix == "gif" else "yuv420p"
        for index in range(6):
            picture = np.full((32, 32, 3), 40 * index, np.uint8)
            picture[4 + index : 12 + index, 8:16] = 250
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


def _picture(kind: str) -> bytes:
    file = io.BytesIO()
    pixels = np.arange(16 * 16 * 3, dtype=np.uint8).reshape(16, 16, 3)
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def _array(values: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, values)
    return file.getvalue()


def damaged(data: bytes, draw: random.Random) -> bytes:
    """A few random damages, or none."""
    data = bytearray(data)
    for _ in range(draw.choice([0, 1, 1, 2, 3, 8])):
        if not data:
            break
        start = draw.randrange(len(data)) if draw.random() < 0.6 else draw.randrange(min(len(data), 200))
        length = draw.choice([1, 2, 4, 8, 64, 512])
        kind = draw.randrange(6)
        if kind == 0:
            data[start] ^= 1 << draw.randrange(8)
        elif kind == 1:
            data[start : start + length] = draw.randbytes(length)
        elif kind == 2:
            del data[start : start + length]
        elif kind == 3:
            data[start:start] = data[start : start + length]
        elif kind == 4:
            data[start : start + 4] = draw.choice([b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff", b"\0\0\xff\xff"])
        else:
            del data[start:]
    return bytes(data)


def _fuzz_video(folder: Path, draw: random.Random) -> None:
    suffix = draw.choice(list(_VIDEOS))
    file = folder / f"case.{suffix}"
    file.write_bytes(damaged(_SEEDS[suffix], draw))
    try:
        fit_clip(stream_clip(file), _FORMAT, FitPolicy(fps=draw.choice(["sample", "keep"])))
    finally:
        read_clip(file, draw.choice([None, 8.0, 60.0]))


def _fuzz_picture(folder: Path, draw: random.Random) -> None:
    kind = draw.choice(["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP"])
    file = folder / "case.png"
    file.write_bytes(damaged(_SEEDS[kind], draw))
    read_picture(file, "case")


def _table(rows: list[dict], suffix: str, draw: random.Random) -> bytes:
    """The rows as a file; cells changed at random, then perhaps bytes."""
    rows = [dict(row) for row in rows]
    for _ in range(draw.choice([0, 1, 1, 2, 4])):
        row = draw.choice(rows)
        name = draw.choice(list(row))
        change = draw.randrange(4)
        if change == 0:
            del row[name]
        elif change == 1:
            row[draw.choice([*row, "extra", "", "Prompt", " video "])] = row[name]
        else:
            row[name] = draw.choice([*_VALUES, None, 0, -5, 2.5, 10**30, True, [], [1, "a"], {"a": 1}, float("nan")])
        if not row:
            row["a"] = 1
    text = io.StringIO(newline="")
    if suffix == "parquet":
        file = io.BytesIO()
        try:
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
        except (pyarrow.ArrowException, OverflowError, UnicodeError):
            return b"PAR1"
        data = file.getvalue()
    elif suffix in ("csv", "tsv"):
        names = list(dict.fromkeys(name for row in rows for name in row))
        writer = csv.DictWriter(text, names, delimiter="\t" if suffix == "tsv" else draw.choice(",;|"))
        writer.writeheader()
        writer.writerows(rows)
        data = text.getvalue().encode("utf-8", "surrogatepass")
    else:
        lines = [json.dumps(row, ensure_ascii=draw.random() < 0.5) for row in rows]
        whole = "\n".join(lines) if suffix == "jsonl" else f"[{','.join(lines)}]"
        data = whole.encode("utf-8", "surrogatepass")
    return damaged(data, draw) if draw.random() < 0.3 else data


def _fuzz_table(folder: Path, draw: random.Random) -> None:
    layout = draw.choice(list(_ROWS))
    suffix = draw.choice(["csv", "tsv", "json", "jsonl", "parquet"])
    file = folder / f"case.{suffix}"
    rows = [_ROWS[layout] | ({"rater": str(index), "pass": index} if index else {}) for index in range(3)]
    if draw.random() < 0.1:
        rows = draw.sample([row for one in _ROWS.values() for row in [one]], 3)
    file.write_bytes(_table(rows, suffix, draw))
    readers: list[Callable[[], object]] = [
        lambda: _damage(read_source(file)),
        lambda: read_human(file),
        lambda: read_prompts(str(file), None),
    ]
    refusals = []
    for reader in readers:
        try:
            reader()
        except UserError as error:
            refusals.append(error)
    file.unlink()
    if len(refusals) == len(readers):
        raise refusals[0]


def _damage(source) -> None:
    """Work out the damage that a source describes."""
    for one in source.damage:
        one.damage(VideoFormat(6, 32, 32, 8))(3)


def _fuzz_array(folder: Path, draw: random.Random) -> None:
    kind = draw.choice(["mask", "fetv"])
    if kind == "mask":
        (folder / "mask.npy").write_bytes(damaged(_SEEDS["npy"], draw))
        (folder / "case.csv").write_text("video,prompt,mask\nclip.mp4,a cube,mask.npy\n")
        try:
            _damage(read_source(folder / "case.csv"))
        finally:
            (folder / "mask.npy").write_bytes(_SEEDS["npy"])
            (folder / "case.csv").unlink()
        return
    inner = folder / "fetv"
    inner.mkdir(exist_ok=True)
    row = _ROWS["fetv"]
    (inner / "clips.csv").write_text(",".join(row) + "\n" + ",".join(map(str, row.values())) + "\n")
    (inner / "clips.npz").write_bytes(damaged(_SEEDS["npz"], draw))
    read_human(inner)


TARGETS = {"video": _fuzz_video, "picture": _fuzz_picture, "table": _fuzz_table, "array": _fuzz_array}
_SEEDS: dict[str, bytes] = {}


def _prepare(folder: Path) -> None:
    """Valid files of every kind."""
    _SEEDS.update({suffix: _video(suffix) for suffix in _VIDEOS})
    _SEEDS.update({kind: _picture(kind) for kind in ("PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP")})
    _SEEDS["npy"] = _array(np.eye(8, dtype=np.float32))
    npz = io.BytesIO()
    np.savez_compressed(npz, video=np.zeros((1, 2, 8, 8, 3), np.uint8))
    _SEEDS["npz"] = npz.getvalue()
    (folder / "clip.mp4").write_bytes(_SEEDS["mp4"])
    (folder / "mask.npy").write_bytes(_SEEDS["npy"])
    (folder / "still.png").write_bytes(_SEEDS["PNG"])
    (folder / "artifact_map").mkdir()
    (folder / "artifact_map" / "still.npy").write_bytes(_SEEDS["npy"])
    (folder / "images" / "clip").mkdir(parents=True)
    (folder / "images" / "clip" / "0.png").write_bytes(_SEEDS["PNG"])


def fuzz(seconds: float, seed: int = 0, cases: int | None = None) -> tuple[Counter, list[str]]:
    """Run cases until the time or their number is over.

    Returns:
        how many cases of each kind were read and refused, and a traceback for each failure.
    """
    warnings.simplefilter("ignore")
    av.logging.set_level(None)
    counts: Counter = Counter()
    failures: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _prepare(folder)
        end, number = time.monotonic() + seconds, 0
        while time.monotonic() < end and (cases is None or number < cases):
            number += 1
            draw = random.Random(seed * 1_000_003 + number)
            target = list(TARGETS)[number % len(TARGETS)]
            # a hang in C code is ended too
            faulthandler.dump_traceback_later(_LIMIT, exit=True)
            before = peak_mebibytes()
            try:
                TARGETS[target](folder, draw)
                counts[f"{target}: read"] += 1
            except UserError as error:
                assert str(error), "an empty message"
                counts[f"{target}: refused"] += 1
            except BaseException:
                failures.append(f"case {number} of seed {seed}, {target}\n{traceback.format_exc()}")
                if len(failures) >= 20 or isinstance(sys.exc_info()[1], KeyboardInterrupt):
                    break
            if before <= _MEMORY < peak_mebibytes():
                failures.append(f"case {number} of seed {seed}, {target}: peak {peak_mebibytes():.0f} MiB")
        faulthandler.cancel_dump_traceback_later()
    return counts, failures


def peak_mebibytes() -> float:
    """The most memory that this process ever held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=int)
    given = parser.parse_args()
    counts, failures = fuzz(given.seconds, given.seed, given.cases)
    for failure in failures:
        print(failure)
    for name, count in sorted(counts.items()):
        print(f"{name:<20}{count}")
    print(f"{len(failures)} failures; peak {peak_mebibytes():.0f} MiB")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
