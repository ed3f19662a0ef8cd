"""`halo reward eval` and `halo agreement`: reward models, teachers and people compared with each other."""

import math
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from halo_fast.agreement.evaluations import EvaluationRequest, run_evaluations
from halo_fast.agreement.patch_labels import patch_labels_table
from halo_fast.agreement.people import marks_table, preferences_table, ratings_tables
from halo_fast.agreement.probes import Probe
from halo_fast.agreement.scorers import Scores, compare_scorers
from halo_fast.agreement.tables import Table, format_figure, format_table, table_as_json
from halo_fast.data.importers import Ratings, read_human
from halo_fast.data.labels import join_labels
from halo_fast.data.tables import ClipRow, LabelRow, ScoreRow, read_rows
from halo_fast.errors import UserError
from halo_fast.files import hash_file, read_json, write_json
from halo_fast.pipeline.clips import run_clips
from halo_fast.pipeline.config import Config, check_round
from halo_fast.pipeline.run import Run
from halo_fast.pipeline.stages.reward import HELDOUT_FILE
from halo_fast.rewards import RewardModel
from halo_fast.rewards.clips import heldout_prompts
from halo_fast.teachers.rubric import PATCH_DIMENSIONS, RUBRIC_DIMENSIONS
from halo_fast.teachers.store import LabelStore, label_key

__all__ = ["agreement", "reward_eval"]

_REWARD, _IMPORTED = "reward model", "imported labels"


def reward_eval(data: str = "", model: str = "", json: str = "", seed: int = 0) -> None:
    """Print how reward models agree with labels, beside baselines, and write the figures as JSON.

    Ratings (FETV's folder, VideoFeedback, a plain table): the compact model, trained with folds by prompt. Marks (local
    defects, RichHF): patch scores, with folds by picture. Scores of patches (FETV's, by a vision-language model): the
    "kernel" model with folds by prompt, and the model given. Preferences: the model given. With a model also the
    probes and whatever else is registered as a "reward evaluation".

    Args:
        data: file or folder that labels are read from; empty for none.
        model: folder of a trained reward model, RUN/reward; empty for none.
        json: file that the figures are written to; empty for none.
        seed: of folds, training and bootstrap.

    Raises:
        UserError: neither data nor model, files that are missing or of no known layout.
    """
    if not (data or model):
        raise UserError("reward eval: expected --data, --model or both, got neither; give one")
    trained = RewardModel.load(Path(model)) if model else None
    tables: dict[str, Table] = {}
    human = read_human(data) if data else None
    if isinstance(human, Ratings):
        if human.marks is not None:
            tables["patches that people marked, folds by picture"] = marks_table(human, seed)
        if human.patches is not None:
            title = f"{human.source}: patches, labelled by {human.patches.labeller}, folds by prompt"
            tables[title] = patch_labels_table(human, seed, trained)
        if human.scores:
            tables |= ratings_tables(human, seed)
    elif human is not None:
        if trained is None:
            raise UserError("model: preferences need a reward model; train one by `halo reward` and give its folder")
        tables["preferences"] = preferences_table(human, trained)
    further = run_evaluations(EvaluationRequest(trained, human if isinstance(human, Ratings) else None, seed))
    tables |= further.tables
    for title, table in tables.items():
        print(f"\n{title}\n{format_table(table)}")
    for probe in further.probes:
        print(_probe_line(probe))
    if json:
        plain = {title: table_as_json(table) for title, table in tables.items()}
        probes = [probe.as_dict() for probe in further.probes]
        write_json(json, {"data": data, "seed": seed, "tables": plain, "probes": probes})


def _probe_line(probe: Probe) -> str:
    outcome = {True: "passes", False: "FAILS", None: "not measured"}[probe.passed]
    bound = f"{'at least' if probe.at_least else 'at most'} {probe.threshold:g}"
    return f"probe {probe.name:<16}{outcome:<14}{format_figure(probe.figure)}  {probe.meaning}; {bound}"


def agreement(config: Config, resamples: int = 300, round: int = 1) -> None:
    """Print how teachers, people and the reward model of a run agree with each other on the clips that both scored.

    Of two, the more trusted one is the truth: people before imported labels, these before teachers, and teachers before
    the reward model. The reward model is judged on clips whose labels did not train it, where there are such; else its
    title says so. Of an import these are the clips of reward.held_out_share, which calibrated it.

    Args:
        config: of the run; its labels.sqlite and, if there, score/scores.parquet are read.
        resamples: draws of the bootstrap over prompts.
        round: of the run, whose candidates are compared.

    Raises:
        UserError: no candidates, fewer than two who scored, scores of the reward model that are NaN.
    """
    run = Run(config, number=check_round(config, round))
    config = run.config
    found = run_clips(run)
    folder, clips = found.folder, found.rows
    imported = _imported_scores(config, run, clips)
    scorers = _teachers_scores(config, run, folder, clips) | imported | _model_scores(run, clips)
    if len(scorers) < 2:
        raise UserError(
            f"{run.path}: expected scores of at least two of teachers, people and reward model, got"
            f" {', '.join(scorers) or 'none'}; run `halo annotate`, `halo label` or `halo score`"
        )
    trained_on = _trained_on(config, run, clips)
    unseen = np.array([clip.clip_id not in trained_on for clip in clips])
    prompts = [clip.prompt for clip in clips]
    trusted = sorted(scorers, key=lambda name: (name != _REWARD, name == _IMPORTED, name.startswith("human:"), name))
    for first, second in combinations(trusted, 2):
        table, title = {}, f"{first} against {second}"
        if first == _REWARD and trained_on:
            table = compare_scorers(scorers[first], scorers[second], prompts, unseen, resamples)
            title += ", clips that it did not train on" if table else ", on its training clips"
        table = table or compare_scorers(scorers[first], scorers[second], prompts, np.ones_like(unseen), resamples)
        print(f"\n{title}\n{format_table(table) if table else '  no clip that both scored'}")


def _trained_on(config: Config, run: Run, clips: Sequence[ClipRow]) -> set[str]:
    """The clips whose labels trained the reward model; of an import those that only calibrated it are none."""
    tables = [table for stage in ("import", "annotate") if (table := run.path / stage / "labels.parquet").exists()]
    labelled = {row.clip_id for row in join_labels(tables)}
    if not config.imports.sources:
        return labelled
    prompts = {clip.clip_id: clip.prompt for clip in clips if clip.clip_id in labelled}
    known = read_json(run.path / "reward" / HELDOUT_FILE)
    if known:
        heldout = set(known["prompts"])
    else:  # of an earlier version, whose draw examples would have moved
        share = 0.0 if config.reward.examples else config.reward.held_out_share
        heldout = heldout_prompts(prompts.values(), share, config.seed)
    return {name for name, prompt in prompts.items() if prompt not in heldout}


def _imported_scores(config: Config, run: Run, clips: Sequence[ClipRow]) -> dict[str, Scores]:
    """The imported labels, if the run has any; NaN is not scored."""
    table = run.path / "import" / "labels.parquet"
    if not (config.imports.sources and table.exists()):
        return {}
    rows = {row.clip_id: row for row in join_labels([run.require("import/labels.parquet")])}
    names = {name for row in rows.values() for name in row.video}
    empty = LabelRow("", "", "ok", "", list(config.grid), dict.fromkeys(names, math.nan))
    ordered = [rows.get(clip.clip_id, empty) for clip in clips]
    missing = [math.nan] * math.prod(config.grid)
    scores: dict[str, NDArray[np.float64]] = {name: np.array([row.video[name] for row in ordered]) for name in names}
    patches = [row.patches.get("quality", missing) for row in ordered]
    return {_IMPORTED: scores | {"quality": np.array(patches, dtype=float)}}


def _teachers_scores(config: Config, run: Run, folder: Path, clips: Sequence[ClipRow]) -> dict[str, Scores]:
    """The scores of every teacher and person in the run's label store; NaN is not scored."""
    hashes = [hash_file(folder / clip.video) for clip in clips]
    empty = [math.nan] * math.prod(config.grid)
    scorers: dict[str, Scores] = {}
    with LabelStore(run.root / "labels.sqlite") as store:
        for teacher in store.teachers():
            keys = [label_key(h, clip.prompt, config.grid, teacher) for h, clip in zip(hashes, clips, strict=True)]
            found = store.find(keys)
            video: dict[str, list[float]] = {
                name: [found[key].video.get(name, math.nan) if key in found else math.nan for key in keys]
                for name in RUBRIC_DIMENSIONS
            }
            patches = {
                name: [found[key].patches.get(name, empty) if key in found else empty for key in keys]
                for name in PATCH_DIMENSIONS
            }
            scorers[teacher] = {name: np.array(scores) for name, scores in (video | patches).items()}
    return scorers


def _model_scores(run: Run, clips: Sequence[ClipRow]) -> dict[str, Scores]:
    """The scores of the reward model, if the run has them."""
    scored = run.path / "score" / "scores.parquet"
    if not scored.exists():
        return {}
    rows = {row.clip_id: row for row in read_rows(run.require("score/scores.parquet"), ScoreRow)}
    ordered = [rows[clip.clip_id] for clip in clips]
    scores: dict[str, NDArray[np.float64]] = {
        name: np.array([row.video[name] for row in ordered], dtype=float) for name in ordered[0].video
    } | {name: np.array([row.patches[name] for row in ordered], dtype=float) for name in ordered[0].patches}
    for name, values in scores.items():
        if np.isnan(values).any():
            raise UserError(f"{scored}: expected numbers in {name}, got NaN; run `halo reward` and `halo score` again")
    return {_REWARD: scores}
