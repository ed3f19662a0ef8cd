"""Have GPT-4o score a folder of clips and their patches, within a budget that cannot be exceeded.

    export OPENAI_API_KEY=...
    python examples/label_with_gpt4o.py clips/ --budget 2

The folder holds x.mp4 with its prompt in x.txt. labels.jsonl gets a row for each clip. An estimate comes before the
first question. Every answer is kept in labels.sqlite: run again after a kill, nothing is paid for twice.
"""

import json
import logging
from pathlib import Path

from halo_fast.patches import LatentFactors
from halo_fast.teachers import LabelStore, TeacherRequest, build_teacher
from halo_fast.teachers.labelling import label_clips, open_clip


def main(
    clips: Path,
    grid: tuple[int, int, int] = (7, 4, 6),
    budget: float = 2.0,
    model: str = "gpt-4o-2024-11-20",
    base_url: str = "https://api.openai.com/v1",
    factors: tuple[int, int, bool] = (8, 4, True),
) -> list[dict]:
    """Label all clips and return the rows.

    Args:
        clips: folder of x.mp4 and x.txt.
        grid: patches along time, height and width.
        budget: dollars that labels.sqlite may hold in all.
        model: that answers.
        base_url: of its server.
        factors: pixels and frames of a latent position, and whether the autoencoder is causal (8, 4, True for Wan).
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")  # the estimate and what is spent
    files = sorted(clips.glob("*.mp4"))
    options = {"model": model, "base_url": base_url, "budget": budget}
    with LabelStore(clips / "labels.sqlite") as store:
        teacher = build_teacher(TeacherRequest("openai", grid, store, options, factors=LatentFactors(*factors)))
        asked = [open_clip(file, file.with_suffix(".txt").read_text().strip()) for file in files]
        labels = label_clips(asked, teacher, store)
    rows = [
        {"clip": file.name, "status": label.status, "reason": label.reason}
        | {"video": dict(label.video), "patches": {name: list(scores) for name, scores in label.patches.items()}}
        for file, label in zip(files, labels, strict=True)
    ]
    (clips / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(f"{sum(row['status'] == 'ok' for row in rows)} of {len(rows)} clips labelled")
    return rows


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli(main)
