"""Before training: are the pairs' clips the model's own? Preference training on others is known to be unstable."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from halo_fast.data import Pair
from halo_fast.families import Denoiser, Family
from halo_fast.families.sampling import GenerateConfig
from halo_fast.loss.functional import patch_error
from halo_fast.train.draws import Batch, batches_alike, generator, make_batch
from halo_fast.train.job import Job

__all__ = ["OffPolicy", "fresh_pairs", "measure_off_policy", "off_policy_gap"]

logger = logging.getLogger(__name__)

# Errors of winners, losers and fresh samples of one model agree within this share on pairs of its own.
OFF_POLICY_LIMIT = 0.25


@dataclass(frozen=True)
class OffPolicy:
    """Mean errors of the model before its first step, at the same noise and times.

    Args:
        winner: of the better clip of each pair, by video reward, or by most patches where it has none; pairs that tie
            count half to both.
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

    def report(self, model: str = "the base") -> str:
        """The errors of `model` in one line for the user, with advice where they are far apart."""
        fresh = "" if self.fresh is None else f", fresh samples {self.fresh:.4g}"
        text = f"train: error of {model} on winners {self.winner:.4g}, losers {self.loser:.4g}{fresh}"
        if self.gap <= OFF_POLICY_LIMIT:
            return text
        return (
            f"{text}: {100 * self.gap:.0f}% apart, these clips are not the model's own; pairs of its own samples are "
            "more stable (halo generate), else lower the betas and keep a supervised term"
        )


def measure_off_policy(job: Job, generate: GenerateConfig | None) -> OffPolicy:
    """How far the training's clips are from the model's own, on the first `off_policy_pairs` pairs.

    Args:
        job: before its first step.
        generate: how fresh clips are sampled (`off_policy_fresh`); None compares with none.
    """
    config, family = job.config, job.family
    order = list(range(min(len(job.pairs), config.off_policy_pairs)))
    fresh: list[Batch] = []
    if config.off_policy_fresh and generate is not None and isinstance(family, Family):
        alike = [index for index in order if job.one_bucket or _is_sampled_size(job, family, index, generate)]
        # the errors of fresh clips are compared with those of as many first ones
        order = alike + [index for index in order if index not in alike]
        chosen = alike[: config.off_policy_fresh]
        if not chosen:
            logger.warning(
                "train.off_policy_fresh: none of the first %d pairs has the size of generate, so no fresh clips are "
                "compared", len(order),
            )  # fmt: skip
        made = fresh_pairs(family, [job.pairs[index] for index in chosen], generate, config.seed)
        known = dict(zip(chosen, made, strict=True))
        fresh = _batches(
            job, [known.get(index) or job.pairs[index] for index in range(max(chosen, default=-1) + 1)], chosen
        )
    with job.accelerator.autocast():
        return off_policy_gap(family, job.model, _batches(job, job.pairs, order), fresh)


def _is_sampled_size(job: Job, family: Family, index: int, generate: GenerateConfig) -> bool:
    """Whether a pair's clips have the size that is sampled."""
    shape, _ = job.buckets.sizes[job.buckets.of[index]]
    return shape == tuple(family.latent_shape(generate.num_frames, generate.height, generate.width))


def _batches(job: Job, pairs: Sequence[Pair], indices: Sequence[int]) -> list[Batch]:
    """Some pairs at their first draws."""
    draws = [(index, 0) for index in indices]
    return [
        make_batch(job.family, pairs, batch, job.config.seed, job.accelerator.device)
        for batch in batches_alike(draws, job.config.train_batch_size, lambda draw: job.buckets.of[draw[0]])
    ]


@torch.no_grad()
def off_policy_gap(
    family: Denoiser, model: nn.Module, batches: Sequence[Batch], fresh: Sequence[Batch] = ()
) -> OffPolicy:
    """Errors of the base model on winners, losers and fresh samples.

    On pairs of the model's own samples the three agree. Winners that are real videos, or clips of another model, stand
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
        win = torch.where(a > b, 1.0, torch.where(a < b, 0.0, 0.5))
        better, worse = batch.patch_rewards.flatten(1).chunk(2)
        by_patches = (better - worse).sign().nan_to_num().sum(dim=1).sign() / 2 + 0.5
        wins.append(torch.where((a - b).isnan(), by_patches, win))
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


def _errors(family: Denoiser, model: nn.Module, batch: Batch) -> Tensor:
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
