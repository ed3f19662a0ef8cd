"""The stages of a run, a file each: read tables, call one library function, write tables."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from halo_fast import processes, registry

if TYPE_CHECKING:
    from halo_fast.pipeline.config import Config
    from halo_fast.pipeline.run import Run

__all__ = ["STAGES", "StageEntry", "run_stage"]


class StageEntry(NamedTuple):
    """A stage's entry for the command line, read before the stage is imported.

    Args:
        target: "module:function", called with Config and Run.
        help: what it does, in one line.
        required: dotted settings without a default that it reads.
        shared: whether all processes of a launch run it and share its work. Other stages are the first process's.
    """

    target: str
    help: str
    required: tuple[str, ...] = ()
    shared: bool = False


_MODEL, _PROMPTS, _HELDOUT, _TEACHER = (
    "pretrained_model_name_or_path", "prompts", "evaluation_prompts", "annotate.teacher",
)  # fmt: skip

# in the order of a run
STAGES = {
    "import": StageEntry(f"{__name__}.imports:import_clips", "read clips, pairs and labels of your own"),
    "generate": StageEntry(
        f"{__name__}.generate:generate", "sample candidates of every prompt", (_MODEL, _PROMPTS), shared=True
    ),
    "annotate": StageEntry(f"{__name__}.annotate:annotate", "have a teacher score videos and patches", (_TEACHER,)),
    "reward": StageEntry(
        f"{__name__}.reward:train_reward", "train the reward model on the teacher's scores", shared=True
    ),
    "score": StageEntry(f"{__name__}.score:score", "reward all candidates and their patches", shared=True),
    "pairs": StageEntry(f"{__name__}.pairs:build_pairs", "build preference pairs out of the scored candidates"),
    "cache": StageEntry(
        f"{__name__}.cache:build_cache", "keep latents and text embeddings for training", (_MODEL,), shared=True
    ),
    "train": StageEntry(
        f"{__name__}.train:train", "align the model on the pairs: LoRA and Gran-DPO", (_MODEL,), shared=True
    ),
    "evaluate": StageEntry(
        f"{__name__}.evaluate:evaluate",
        "compare base and aligned model on held-out prompts",
        (_MODEL, _HELDOUT),
        shared=True,
    ),
    "report": StageEntry(f"{__name__}.report:write_report", "write the HTML page of the run"),
}


def run_stage(stage: StageEntry, config: Config, run: Run) -> None:
    """Run a stage, on all processes or on the first alone while the others wait.

    Args:
        stage: of `STAGES`.
        config: of the run.
        run: its directory.
    """
    work = registry.load(stage.target)
    if stage.shared:
        work(config, run)
    else:
        processes.by_first(lambda: work(config, run))
