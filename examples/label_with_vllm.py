"""Make preference pairs with a judge on your own server: which of two clips of a prompt is better?

    vllm serve Qwen/Qwen2.5-VL-7B-Instruct --limit-mm-per-prompt '{"image": 24}'
    python examples/label_with_vllm.py candidates.jsonl

A row of candidates.jsonl: {"prompt": "...", "a": "one.mp4", "b": "other.mp4"}, clips beside the file. Each pair is
asked in both orders, because judges lean to a place; a verdict counts only if both orders agree. pairs.jsonl gets the
pairs with a winner, in the form that the training examples read. Any server with OpenAI's protocol will do.
"""

import json
import logging
from collections import Counter
from pathlib import Path

from halo_fast.teachers import Judge, LabelStore, TeacherRequest, build_teacher
from halo_fast.teachers.labelling import judge_pairs, open_clip


def main(
    candidates: Path,
    output: Path | None = None,
    base_url: str = "http://localhost:8000/v1",
    model: str = "Qwen/Qwen2.5-VL-7B-Instruct",
    dimension: str = "visual_quality",
    max_frames: int = 16,
) -> list[dict]:
    """Judge all candidates, write the pairs that have a winner, and return them.

    Args:
        candidates: table of prompts and their two clips.
        output: where pairs.jsonl goes; beside the candidates by default.
        base_url: of the server.
        model: its name there.
        dimension: of the rubric, by which the winner is chosen.
        max_frames: of a clip that are shown; half of them of each clip in a comparison.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    rows = [json.loads(line) for line in candidates.read_text().splitlines()]
    options = {"model": model, "base_url": base_url, "api": "chat", "pairwise": True, "max_frames": max_frames}
    options |= {"input_price": 0.0, "output_price": 0.0}  # your own server costs nothing
    with LabelStore(candidates.with_suffix(".sqlite")) as store:
        judge = build_teacher(TeacherRequest("openai", (1, 1, 1), store, options))
        assert isinstance(judge, Judge)
        a, b = ([open_clip(candidates.parent / row[side], row["prompt"]) for row in rows] for side in "ab")
        clips = list(zip(a, b, strict=True))
        verdicts = [found.get(dimension, found["status"]) for found in judge_pairs(clips, judge, store)]
    print(dict(Counter(verdicts)))
    pairs = []
    for row, verdict in zip(rows, verdicts, strict=True):
        if verdict in ("a", "b"):
            loser = "b" if verdict == "a" else "a"
            pairs.append({"prompt": row["prompt"], "chosen": row[verdict], "rejected": row[loser]})
    output = output or candidates.with_name("pairs.jsonl")
    output.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return pairs


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli(main)
