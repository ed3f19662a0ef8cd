"""The stages of a run, a file each: read tables, call one library function, write tables."""

from typing import NamedTuple

__all__ = ["STAGES", "StageEntry"]


class StageEntry(NamedTuple):
    """A stage's entry for the command line, read before the stage is imported.

    Args:
        target: "module:function", called with Config and Run.
        help: what it does, in one line.
        required: dotted settings without a default that it reads.
    """

    target: str
    help: str
    required: tuple[str, ...] = ()


_MODEL, _PROMPTS, _HELDOUT, _TEACHER = (
    "pretrained_model_name_or_path", "prompts", "evaluation_prompts", "annotate.teacher",
)  # fmt: skip

# in the order of a run
STAGES = {
    "import": StageEntry(f"{__name__}.imports:import_clips", "read clips, pairs and labels of your own"),
    "generate": StageEntry(f"{__name__}.generate:generate", "sample candidates of every prompt", (_MODEL, _PROMPTS)),
    "annotate": StageEntry(f"{__name__}.annotate:annotate", "have a teacher score videos and patches", (_TEACHER,)),
    "reward": StageEntry(f"{__name__}.reward:train_reward", "train the reward model on the teacher's scores"),
    "score": StageEntry(f"{__name__}.score:score", "reward all candidates and their patches"),
    "pairs": StageEntry(f"{__name__}.pairs:build_pairs", "build preference pairs out of the scored candidates"),
    "cache": StageEntry(f"{__name__}.cache:build_cache", "keep latents and text embeddings for training", (_MODEL,)),
    "train": StageEntry(f"{__name__}.train:train", "align the model on the pairs: LoRA and Gran-DPO", (_MODEL,)),
    "evaluate": StageEntry(
        f"{__name__}.evaluate:evaluate", "compare base and aligned model on held-out prompts", (_MODEL, _HELDOUT)
    ),
    "report": StageEntry(f"{__name__}.report:write_report", "write the HTML page of the run"),
}
