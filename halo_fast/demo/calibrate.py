"""Training and validation of the meters on planted defects and clean clips; figures go into weights/meters.json."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from halo_fast.agreement.arms import rates_by_kind
from halo_fast.demo import defects, meters, world
from halo_fast.demo.autoencoder import BlockAutoencoder
from halo_fast.files import progress, write_json, write_safetensors

__all__ = [
    "eight_bit",
    "planted_clips",
    "removal",
    "round_trip",
    "train_defect_meter",
    "train_fidelity_meter",
    "train_meters",
    "validate",
]


REGIMES: tuple[defects.Regime, ...] = ("graded", "patchy")
CORPUS = 6144
STEPS = 1600
BATCH = 32


def round_trip(vae: BlockAutoencoder, video: Tensor) -> Tensor:
    """What the autoencoder leaves of clips [N, 9, 3, 32, 32] in [0, 1]: its blur is not a defect of the generator."""
    return vae.pixels(vae.code(video.transpose(1, 2) * 2 - 1)).transpose(1, 2) / 2 + 0.5


def eight_bit(video: Tensor) -> Tensor:
    """Rounded as a stored clip is."""
    return (video * 255).round().clamp(0, 255) / 255


@torch.no_grad()
def planted_clips(
    vae: BlockAutoencoder, split: world.Split, count: int, seed: int
) -> tuple[Tensor, Tensor, Tensor, list[str]]:
    """A mixture of regimes and of clean clips, half of them through the autoencoder: video, severity, kind, prompts."""
    videos, severities, kinds, prompts = [], [], [], []
    for index, start in enumerate(range(0, count, 64)):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + start)
        clips = world.draw(split, 64, generator)
        regime: defects.Regime = "patchy" if index % 3 == 2 else "graded"
        planted = defects.plant(clips, regime, generator)
        # every fifth clip stays clean, every fifth has defects in half of its patches only
        keep = torch.rand(64, 1, 1, 1, generator=generator)
        spared = (keep < 0.2) | ((keep < 0.4) & (torch.rand(planted.severity.shape, generator=generator) < 0.5))
        video = torch.where(defects.to_pixels(spared.float()) > 0, clips.video, planted.video)
        video = torch.where(torch.arange(64)[:, None, None, None, None] % 2 == 0, video, round_trip(vae, video))
        videos.append(eight_bit(video))
        severities.append(planted.severity.masked_fill(spared, 0))
        kinds.append(planted.kind.masked_fill(spared, -1))
        prompts += clips.prompts
    return torch.cat(videos), torch.cat(severities), torch.cat(kinds), prompts


def _optimise(model: nn.Module, steps: int, loss_of_step: Callable[[torch.Generator], Tensor], label: str) -> None:
    """Train by AdamW with a one-cycle schedule; the model ends with the exponential average of its weights.

    Args:
        model: trained in place, and left in eval mode.
        steps: of the training.
        loss_of_step: 0-d loss of a batch that the step's generator draws.
        label: of the progress line.
    """
    parameters = dict(model.named_parameters())
    average = {name: value.detach().clone() for name, value in parameters.items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    model.train()
    for step in progress(range(steps), steps, label):
        loss = loss_of_step(torch.Generator().manual_seed(step))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            decay = min(0.995, (1 + step) / (10 + step))  # the first weights count for less and less
            get_ema_multi_avg_fn(decay)(list(average.values()), list(parameters.values()), step)
    model.load_state_dict(average)
    model.eval()


def train_defect_meter(vae: BlockAutoencoder) -> meters.DefectMeter:
    """Mean squared error of the severity, total and by kind."""
    torch.manual_seed(0)
    meter = meters.DefectMeter()
    video, severity, kind, prompts = planted_clips(vae, "train", CORPUS, seed=11)
    attributes = [world.parse(prompt) for prompt in prompts]
    by_kind = severity[:, None] * (kind[:, None] == torch.arange(len(defects.KINDS))[:, None, None, None])
    target = torch.cat((severity[:, None], by_kind), dim=1)

    def loss(generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(video), (BATCH,), generator=generator)
        estimate = meter.forward(video[rows], tuple(attributes[row] for row in rows.tolist()))
        return (estimate - target[rows]).square().mean(dim=(0, 2, 3, 4)).sum()

    _optimise(meter, STEPS, loss, "defect meter")
    return meter


def train_fidelity_meter(vae: BlockAutoencoder) -> meters.FidelityMeter:
    """Cross entropy of digit, colour and motion on clean clips, augmented by boxes cut out and changes of light."""
    torch.manual_seed(0)
    meter = meters.FidelityMeter()
    videos, prompts = [], []
    with torch.no_grad():
        for start in range(0, CORPUS, 64):
            clips = world.draw("train", 64, torch.Generator().manual_seed(23 * 1_000_003 + start))
            half = clips.video.clone()
            half[1::2] = round_trip(vae, half[1::2])
            videos.append((half * 255).round().clamp(0, 255).to(torch.uint8))
            prompts += clips.prompts
    video = torch.cat(videos)
    named = meters.targets(tuple(world.parse(prompt) for prompt in prompts))

    def loss(generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(video), (BATCH,), generator=generator)
        batch = video[rows].float() / 255
        light = 1 + 0.2 * torch.randn(BATCH, world.NUM_FRAMES, 1, 1, 1, generator=generator)
        batch = batch * light + 0.05 * torch.randn(batch.shape, generator=generator)
        cut = torch.rand(BATCH, world.NUM_FRAMES, 1, 4, 4, generator=generator) < 0.15
        cut = cut.repeat_interleave(8, -1).repeat_interleave(8, -2)
        filling = torch.rand(BATCH, world.NUM_FRAMES, 3, 1, 1, generator=generator)
        digit, colour, motion, travel = meter.forward(torch.where(cut, filling, batch).clamp(0, 1))
        return (
            F.cross_entropy(digit, named["digit"][rows])
            + 0.3 * F.cross_entropy(colour, named["colour"][rows])
            + F.cross_entropy(motion, named["motion"][rows])
            + 0.05 * (travel - named["travel"][rows]).square().mean()
        )

    _optimise(meter, STEPS, loss, "fidelity meter")
    return meter


def validate(defect: meters.DefectMeter, fidelity: meters.FidelityMeter) -> dict[str, object]:
    """What the meters read on held-out clips: planted defects of each regime, their removal, and clean clips."""
    result: dict[str, object] = {}
    for regime in REGIMES:
        result[regime] = _on_planted(defect, fidelity, regime) | {"removed": removal(defect, fidelity, regime)}
    clean, prompts = world.clean_clips(1024, seed=79)
    severity, _ = defect(clean, prompts)
    readings = fidelity(clean, prompts)
    result["clean"] = {
        "mean_severity": round(float(severity.mean()), 5),
        "defective_share": round(float((severity > defects.DEFECTIVE).float().mean()), 5),
        "fidelity": {n: round(float(readings[f"{n}_correct"].mean()), 4) for n in ("digit", "colour", "motion")},
        "motion_amount": round(float(readings["motion_amount"].mean()), 3),
    }
    return result


def _on_planted(
    defect: meters.DefectMeter, fidelity: meters.FidelityMeter, regime: defects.Regime
) -> dict[str, object]:
    """Readings of planted defects compared with what was planted.

    auc_by_kind: total severity, patches where the kind is visibly defective against sound ones. channel_auc_by_kind:
    the severity of that kind, the same patches against all that have another kind or none.

    Args:
        defect: the defect meter.
        fidelity: the fidelity meter.
        regime: of the planted defects.
    """
    from scipy.stats import spearmanr
    from sklearn.metrics import roc_auc_score

    clips = world.draw("heldout", 512, torch.Generator().manual_seed(77))
    planted = defects.plant(clips, regime, torch.Generator().manual_seed(78))
    severity, by_kind = defect(world.to_uint8(planted.video), clips.prompts)
    readings = fidelity(world.to_uint8(planted.video), clips.prompts)
    visible = planted.severity > defects.DEFECTIVE

    def auc(values: Tensor, bad: Tensor, others: Tensor) -> float:
        truth = np.concatenate((np.ones(int(bad.sum())), np.zeros(int(others.sum()))))
        return round(float(roc_auc_score(truth, torch.cat((values[bad], values[others])).numpy())), 4)

    rates = rates_by_kind(severity.numpy(), by_kind.transpose(0, 1).numpy())
    of_kind = [planted.kind == index for index in range(len(defects.KINDS))]
    return {
        "auc_by_kind": {
            kind: auc(severity, here & visible, planted.severity < 0.02)
            for kind, here in zip(defects.KINDS, of_kind, strict=True)
        },
        "channel_auc_by_kind": {
            kind: auc(by_kind[:, index], of_kind[index] & visible, ~of_kind[index])
            for index, kind in enumerate(defects.KINDS)
        },
        "planted_rate_by_kind": {
            kind: round(float((here & visible).float().mean()), 4)
            for kind, here in zip(defects.KINDS, of_kind, strict=True)
        },
        "measured_rate_by_kind": {kind: round(float(rate), 4) for kind, rate in zip(defects.KINDS, rates, strict=True)},
        "severity_spearman": round(float(spearmanr(severity.flatten(), planted.severity.flatten()).statistic), 4),
        "severity_mean_absolute_error": round(float((severity - planted.severity).abs().mean()), 4),
        "planted_mean_severity": round(float(planted.severity.mean()), 4),
        "measured_mean_severity": round(float(severity.mean()), 4),
        "fidelity_on_defective": {
            n: round(float(readings[f"{n}_correct"].mean()), 4) for n in ("digit", "colour", "motion")
        },
    }


def removal(
    defect: meters.DefectMeter, fidelity: meters.FidelityMeter, regime: defects.Regime, count: int = 256
) -> list[dict[str, float]]:
    """What the meters read while planted defects are blended out and nothing else changes.

    Motion and fidelity would stay the same if the meter of them ignored defects. Clips are held out, and the same for
    every share.

    Returns:
        for each share removed: mean severity, motion_amount over that with all defects, and fidelity.
    """
    clips = world.draw("heldout", count, torch.Generator().manual_seed(80))
    planted = defects.plant(clips, regime, torch.Generator().manual_seed(81))
    rows = []
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        videos = world.to_uint8(torch.lerp(planted.video, clips.video, share))
        readings = fidelity(videos, clips.prompts)
        rows.append(
            {
                "share": share,
                "severity": float(defect(videos, clips.prompts)[0].mean()),
                "motion_ratio": float(readings["motion_amount"].mean()),
                "fidelity": float(readings["fidelity_correct"].mean()),
            }
        )
    before = rows[0]["motion_ratio"]
    return [
        {name: round(value, 4) for name, value in {**row, "motion_ratio": row["motion_ratio"] / before}.items()}
        for row in rows
    ]


def train_meters(vae: BlockAutoencoder, folder: Path) -> None:
    """Train both meters, write them to `folder` in float16 and what they read on held-out clips to meters.json."""
    for train, name in ((train_defect_meter, "defect_meter"), (train_fidelity_meter, "fidelity_meter")):
        weights = {key: value.half().contiguous() for key, value in train(vae).state_dict().items()}
        write_safetensors(folder / f"{name}.safetensors", weights)
    defect = meters.DefectMeter.load(folder)
    write_json(folder / "meters.json", validate(defect, meters.FidelityMeter.load(folder)))
