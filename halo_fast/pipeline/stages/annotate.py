"""The stage that has a teacher score the clips of a run."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from halo_fast.data.labels import has_scores
from halo_fast.data.tables import ClipRow, LabelRow, read_rows, write_rows
from halo_fast.errors import UserError
from halo_fast.patches import PIXELS, LatentFactors
from halo_fast.pipeline.clips import RunClips, run_clips
from halo_fast.pipeline.config import Config
from halo_fast.pipeline.run import Run
from halo_fast.teachers import Clip, Judge, LabelStore, Teacher, TeacherRequest, build_teacher
from halo_fast.teachers.labelling import (
    JudgementRow,
    candidate_pairs,
    draw_clips,
    judge_pairs,
    judgement_rows,
    label_clips,
    label_rows,
    open_clip,
)

__all__ = ["annotate", "load_teacher"]


def load_teacher(
    config: Config, store: LabelStore, factors: LatentFactors = PIXELS, prompts: Sequence[str] = ()
) -> Teacher:
    """The teacher that `annotate.teacher` names; its options are the section of its name, and `annotate.options`.

    Args:
        config: of the run.
        store: where a teacher that is paid keeps answers and spending.
        factors: how latents lie on the clips, by which the grid divides them.
        prompts: of the clips.

    Raises:
        UserError: no such teacher, clips that it cannot read, or settings that cannot be.
    """
    name = config.annotate.teacher
    sections = asdict(config.annotate)
    options = (sections[name] if isinstance(sections.get(name), dict) else {}) | config.annotate.options
    size = (config.generate.num_frames, config.generate.height, config.generate.width)
    grid = (config.grid[0], config.grid[1], config.grid[2])
    request = TeacherRequest(name, grid, store, options, size, prompts, config.seed, factors)
    return build_teacher(request, "annotate.teacher")


def annotate(config: Config, run: Run, teacher: Teacher | None = None) -> None:
    """Have a teacher score clips and their patches; a stage.

    Reads the clips of generate and import. Writes annotate/labels.parquet, and annotate/judgements.parquet if the
    teacher compares clips. Answers are kept in labels.sqlite of the run directory as they come: a killed stage goes on
    without asking again, and so does --force. Nothing is asked about clips with imported scores of video and patches.

    Args:
        config: annotate holds the teacher's name and how many clips it scores; they are drawn by config.seed, in later
            rounds others.
        run: the run directory.
        teacher: scores instead of the one that config.annotate.teacher names.

    Raises:
        UserError: unknown teacher, another grid than the teacher's, an unreadable clip, no usable label at all; of a
            teacher that is paid also that the budget is used up or its server refuses.
    """
    clips_of_run = run_clips(run)
    drawn = {row.clip_id for row in clips_to_label(config, run, clips_of_run)}
    folder, rows = clips_of_run.folder, [row for row in clips_of_run.rows if row.clip_id in drawn]
    with LabelStore(run.root / "labels.sqlite") as store:
        factors = clips_of_run.factors() or PIXELS
        teacher = teacher or load_teacher(config, store, factors, [row.prompt for row in rows])
        # The teacher's name covers what its answers depend on. Limits on money and time may change during a run.
        settings = {name: getattr(config.annotate, name) for name in ("teacher", "options", "num_clips")}
        settings |= {"teacher_name": teacher.name, "pairwise": isinstance(teacher, Judge)}
        settings |= {"grid": config.grid, "seed": config.seed}
        with run.stage("annotate", settings, clips_of_run.inputs) as stage:
            if stage.done:
                return
            if tuple(teacher.grid) != tuple(config.grid):
                raise UserError(
                    f"grid: teacher {teacher.name!r} scores {teacher.grid}, got {config.grid}; set it to that"
                )
            clips = [open_clip(folder / row.video, row.prompt) for row in rows]
            counts = _write_tables(stage.folder, rows, clips, teacher, store)
            dollars = store.spent()
            stage.finish(counts | ({"dollars": dollars} if dollars else {}))


def clips_to_label(config: Config, run: Run, clips: RunClips) -> list[ClipRow]:
    """The clips that a teacher scores, in the order in which they were drawn, so that the first ones are a sample.

    Args:
        config: annotate.num_clips says how many; null for all.
        run: the run directory; each round draws others.
        clips: of the run.

    Raises:
        UserError: all clips have imported scores of video and patches.
    """
    rows = _unlabelled(clips)
    return [rows[index] for index in draw_clips(len(rows), config.annotate.num_clips, run.draw)]


def _unlabelled(clips: RunClips) -> list[ClipRow]:
    """The clips without imported scores of video and patches; UserError if there are none."""
    tables = [folder / "labels.parquet" for folder in clips.inputs.values()]
    rows = [row for table in tables if table.exists() for row in read_rows(table, LabelRow)]
    complete = {
        row.clip_id for row in rows if has_scores(list(row.video.values())) and has_scores(row.patches["quality"])
    }
    missing = [row for row in clips.rows if row.clip_id not in complete]
    if not missing:
        raise UserError("annotate: all clips have imported scores of video and patches; leave annotate.teacher empty")
    return missing


def _write_tables(
    folder: Path, rows: Sequence[ClipRow], clips: Sequence[Clip], teacher: Teacher, store: LabelStore
) -> dict[str, int | float]:
    """Write the labels, and judgements if the teacher compares clips; counts of all and of usable ones."""
    pairs = candidate_pairs(clips, [row.prompt_id for row in rows]) if isinstance(teacher, Judge) else []
    compared = [(clips[a], clips[b]) for a, b in pairs]
    labels = label_clips(clips, teacher, store, compared)
    statuses = Counter(label.status for label in labels)
    if not statuses["ok"]:
        reason = f"{labels[0].status} {labels[0].reason}".strip()
        raise UserError(f"annotate: teacher {teacher.name!r} gave no score on {len(labels)} clips ({reason})")
    write_rows(folder / "labels.parquet", label_rows([row.clip_id for row in rows], labels, teacher))
    counts: dict[str, int | float] = {"clips": len(labels), "labelled": statuses.pop("ok")}
    counts |= dict(sorted(statuses.items()))
    if isinstance(teacher, Judge):
        judged = judgement_rows([(rows[a], rows[b]) for a, b in pairs], judge_pairs(compared, teacher, store), teacher)
        write_rows(folder / "judgements.parquet", judged, JudgementRow)
        counts |= {"pairs": len(judged), "judged": sum(row.status == "ok" for row in judged)}
    return counts
