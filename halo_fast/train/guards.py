"""What stops or warns a training: judged from rows already read from the device, so no step waits for it."""

import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from halo_fast.data import Pair
from halo_fast.errors import UserError
from halo_fast.families import Family
from halo_fast.families.sampling import GenerateConfig
from halo_fast.loss.functional import patch_error
from halo_fast.train.config import TrainConfig
from halo_fast.train.draws import Batch, generator

__all__ = ["OffPolicy", "check_rows", "fresh_pairs", "off_policy_gap", "warn", "winner_alarm"]

SPIKE_WINDOW, SPIKE_LENGTH = 50, 5
# Errors of winners, losers and fresh samples of one model agree within this share on pairs of its own.
OFF_POLICY_LIMIT = 0.25
_KEPT = "nothing was saved since the last checkpoint"


def check_rows(log: Sequence[dict[str, float]], first: int, config: TrainConfig) -> None:
    """Hold that the rows `log[first:]` are finite and no spike; to be called before they or a checkpoint are written.

    A row is a spike when the mean loss of the last 5 steps exceeds `config.loss_spike_factor` times the median of the
    50 steps before those (of at least 5). What a row is depends on the rows before it alone, never on how often rows
    are read, so a resumed training stops where an undisturbed one does.

    Args:
        log: all rows from step 1 on, each with step, loss and grad_norm.
        first: index of the first row not checked yet.
        config: the settings; loss_spike_factor null switches the spike off, nothing the other.

    Raises:
        UserError: naming step, value and cure.
    """
    losses = [row["loss"] for row in log]
    for index in range(first, len(log)):
        for name in ("loss", "grad_norm"):
            if not math.isfinite(log[index][name]):
                raise UserError(
                    f"train: {name} is {log[index][name]} at step {log[index]['step']}, {_KEPT}; "
                    "lower learning_rate or the betas"
                )
        start = index + 1 - SPIKE_LENGTH
        before = losses[max(0, start - SPIKE_WINDOW) : max(0, start)]
        if config.loss_spike_factor is None or len(before) < SPIKE_LENGTH:
            continue
        mean, usual = statistics.fmean(losses[start : index + 1]), statistics.median(before)
        # A median of 0 comes from steps whose pairs all tied, which say nothing of the usual loss.
        if mean > config.loss_spike_factor * usual > 0:
            raise UserError(
                f"train: loss spikes at step {log[index]['step']}: {mean:.4g} over {SPIKE_LENGTH} steps after "
                f"{usual:.4g} before, expected at most {config.loss_spike_factor:g} times that; {_KEPT}; lower "
                "learning_rate or the betas, or raise objective.patch_sft_weight (loss_spike_factor: null goes on)"
            )
    if len(log) == config.max_train_steps and not any(row["num_pairs"] for row in log):
        raise UserError(
            "train: no pair had anything to teach in any step, so nothing was learned; lower "
            "train.objective.patch_delta and video_delta, or give weight to the labels that the pairs have"
        )


def winner_alarm(rows: Sequence[Mapping[str, float | str]], config: TrainConfig) -> str | None:
    """One line if the policy has become much worse at the winners than the reference is, else None.

    The limit is a share a of the reference's error power. With E - E_ref = (|o - o_ref|^2 + 2 <o - o_ref, o_ref - tau>)
    / N, the second term vanishes in the mean where the policy's change has nothing to do with what the reference got
    wrong. Then E = (1 + a) E_ref says that the policy has moved sqrt(a) times as far from the reference as the
    reference is from the truth: 71% of it for 0.5, all of it for 1. A change that helps makes the second term negative.

    Preference training can lower its loss by spoiling losers more than winners. Winners are those of the patches, or
    of the videos where the objective has no patch preference: a video that wins as a whole has patches that lose, whose
    error is meant to rise.

    Args:
        rows: new ones of diagnostics.csv; held-out pairs are judged where there are some, else the training's own.
        config: the settings; winner_alarm is a.
    """
    label = "patch" if config.objective.patch_weight else "video"
    whole = {row["split"]: row for row in rows if row["group"] == "all" and row["label"] == label}
    row = whole.get("heldout", whole.get("train"))
    if config.winner_alarm is None or row is None:
        return None
    rise = float(row["winner_policy"]) / float(row["winner_reference"]) - 1
    if rise <= config.winner_alarm:
        return None
    return (
        f"train: error on winning {'patches' if label == 'patch' else 'videos'} is {100 * rise:.0f}% "
        f"above the reference's at step {row['step']}, expected at most {100 * config.winner_alarm:.0f}%: the loss "
        "falls by spoiling losers; raise objective.patch_sft_weight or sft_weight, set objective.loser_guard, or lower "
        "the betas"
    )


@dataclass(frozen=True)
class OffPolicy:
    """Mean errors of the untrained model at the same noise and times; `report` is what to print.

    Args:
        winner: of the better clip of each pair (by video reward; pairs that tie count half to both).
        loser: of the other.
        fresh: of clips the model has just sampled for the same prompts; None if none were.
    """

    winner: float
    loser: float
    fresh: float | None

    @property
    def gap(self) -> float:
        """Largest difference between two of the errors, as a share of the smallest."""
        errors = [error for error in (self.winner, self.loser, self.fresh) if error is not None]
        return max(errors) / min(errors) - 1

    def report(self) -> str:
        fresh = "" if self.fresh is None else f", fresh samples {self.fresh:.4g}"
        text = f"train: error of the base on winners {self.winner:.4g}, losers {self.loser:.4g}{fresh}"
        if self.gap <= OFF_POLICY_LIMIT:
            return text
        return (
            f"{text}: {100 * self.gap:.0f}% apart, these clips are not the model's own; pairs of its own samples are "
            "more stable (halo generate), else lower the betas and keep a supervised term"
        )


@torch.no_grad()
def off_policy_gap(
    family: Family, model: nn.Module, batches: Sequence[Batch], fresh: Sequence[Batch] = ()
) -> OffPolicy:
    """Errors of the base model on winners, losers and fresh samples, to be printed before training.

    On pairs of the model's own samples the three agree; winners that are real videos, or clips of another model, stand
    out, and preference training on them is known to be unstable or without effect.

    Args:
        family: of the model.
        model: the transformer, its adapter off or fresh (a fresh adapter adds nothing).
        batches: a few pairs each, as `make_batch` gives them.
        fresh: the same draws of the first pairs' `fresh_pairs`; then all errors are of these pairs, so that they differ
            by the clips alone. Empty: not compared.
    """
    errors, wins = [], []
    for batch in batches:
        errors.append(_errors(family, model, batch))
        a, b = batch.video_rewards.chunk(2)
        wins.append(torch.where(a > b, 1.0, torch.where(a < b, 0.0, 0.5)))
    a, b = (torch.cat(side) for side in zip(*(error.chunk(2) for error in errors), strict=True))
    win = torch.cat(wins)
    if fresh:
        count = sum(len(batch.t) // 2 for batch in fresh)
        a, b, win = a[:count], b[:count], win[:count]
    means = [(win * a + (1 - win) * b).mean(), (win * b + (1 - win) * a).mean()]
    if fresh:
        means.append(torch.cat([_errors(family, model, batch) for batch in fresh]).mean())
    winner, loser, *rest = torch.stack(means).tolist()
    return OffPolicy(winner, loser, rest[0] if rest else None)


def _errors(family: Family, model: nn.Module, batch: Batch) -> Tensor:
    prediction = family.predict(model, batch.noisy, batch.t, batch.conditions)
    return patch_error(prediction, batch.target, (1, 1, 1), family.layout).flatten()


def fresh_pairs(family: Family, pairs: Sequence[Pair], generate: GenerateConfig, seed: int) -> list[Pair]:
    """The pairs with both clips replaced by new samples of the model for the same prompt."""
    made = []
    for index, pair in enumerate(pairs):
        noise = torch.randn(pair.latents.shape, generator=generator(seed, "fresh", index))
        latents = family.sample(
            [pair.conditions] * 2, noise, video_size=(generate.num_frames, generate.height, generate.width),
            num_inference_steps=generate.num_inference_steps, guidance_scale=generate.guidance_scale,
        )  # fmt: skip
        made.append(replace(pair, latents=latents.cpu()))
    return made


def warn(line: str | None) -> None:
    """Print a line for the user on stderr, if there is one."""
    if line:
        print(line, file=sys.stderr, flush=True)
