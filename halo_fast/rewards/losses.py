"""Losses of the reward model: scores as probabilities, preferences, and the calibration onto one scale."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["calibrate", "preference_loss", "score_loss"]

_TIE_ODDS = 5.0  # k of the ties model; VideoAlign's value
_MOST_PARTNERS = 32
_STEPS = 100
_LEAST_SLOPE = 0.05  # a dimension that predicts nothing keeps its order


def score_loss(logits: Tensor, scores: Tensor) -> Tensor:
    """Cross entropy of scores read as probabilities, (score - 1) / 4 against sigma(logit), above its minimum.

    Unlike a squared error it separates 4.9 from 5 as clearly as whole grades. NaN scores do not count.

    Args:
        logits: any shape; differentiable.
        scores: the same shape, 1 to 5.

    Returns:
        0-d mean over the known scores.
    """
    known = ~scores.isnan()
    target = (torch.where(known, scores, 1) - 1) / 4
    entropy = torch.special.entr(target) + torch.special.entr(1 - target)
    loss = F.binary_cross_entropy_with_logits(logits, target, reduction="none") - entropy
    return (loss * known).sum() / known.sum().clamp(min=1)


def preference_loss(logits: Tensor, scores: Tensor, tie_margin: float, ties: bool = False) -> Tensor:
    """Bradley-Terry over pairs of scores; with ties, the model of Rao and Kupper (1967) with k = 5.

    D is the winner's logit less the loser's. Without ties: softplus(-D). With ties (VideoAlign, arXiv:2501.13918):
    softplus(ln k - D) for a pair with a winner, softplus(ln k - D) + softplus(ln k + D) - ln(k^2 - 1) for a tie.

    Args:
        logits: any shape; differentiable. Each is compared with up to 32 others, spread over all.
        scores: the same shape; NaN is compared with nothing.
        tie_margin: scores that differ by no more are a tie, which does not count without `ties`.
        ties: whether ties have a probability of their own.

    Raises:
        ValueError: a margin below 0.
    """
    if tie_margin < 0:
        raise ValueError(f"tie_margin: expected at least 0, got {tie_margin}")
    values, grades = logits.flatten(), scores.flatten()
    count = len(values)
    partners = min(_MOST_PARTNERS, count // 2)
    if not partners:
        return logits.sum() * 0
    shifts = sorted({1 + index * (count // 2) // partners for index in range(partners)})
    margin = torch.stack([values - values.roll(shift) for shift in shifts])
    better = torch.stack([grades - grades.roll(shift) for shift in shifts])
    won, tied = better.abs() > tie_margin, better.abs() <= tie_margin
    margin = margin * better.sign().nan_to_num(0).masked_fill(tied, 1)
    if not ties:
        return (F.softplus(-margin) * won).sum() / won.sum().clamp(min=1)
    odds = math.log(_TIE_ODDS)
    loss = F.softplus(odds - margin) + tied * (F.softplus(odds + margin) - math.log(_TIE_ODDS**2 - 1))
    counted = won | tied
    return (loss * counted).sum() / counted.sum().clamp(min=1)


@torch.no_grad()
def calibrate(logits: Tensor, scores: Tensor) -> tuple[float, float]:
    """Slope and offset that fit slope * logit + offset to scores by `score_loss`; the slope is above 0.

    Platt scaling (Platt, 1999), with a weak prior on the identity.

    Args:
        logits: any shape, of clips held out from training.
        scores: the same shape, 1 to 5; NaN does not count. With fewer than two known the answer is (1, 0).
    """
    known = ~scores.isnan()
    x, y = logits[known].double(), (scores[known].double() - 1) / 4
    if len(x) < 2:
        return 1.0, 0.0
    solution = torch.tensor([1.0, 0.0], dtype=x.dtype, requires_grad=True)
    optimizer = torch.optim.LBFGS([solution], max_iter=_STEPS, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        # one observation's weight on the identity keeps the fit finite where the scores are all alike
        loss = F.binary_cross_entropy_with_logits(solution[0] * x + solution[1], y, reduction="sum")
        loss = loss + (solution[0] - 1) ** 2 / 2 + solution[1] ** 2 / 2
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    slope, offset = solution.tolist()
    return max(slope, _LEAST_SLOPE / max(1.0, x.std().item())), offset
