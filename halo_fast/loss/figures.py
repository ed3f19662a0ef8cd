"""The figures of a batch as small tensors: the one place where accuracy, margin and saturation are computed.

Formulas are written out in docs/dropin.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

__all__ = ["SATURATED", "PairFigures"]

# A logit beyond this has a gradient factor below 5e-5: its gradient is negligible.
SATURATED = 10


@dataclass(frozen=True)
class PairFigures:
    """The figures of B pairs, on the device and without a graph; nothing here waits for the device.

    ``GranDPOOutput.figures`` makes one, ``join`` concatenates several. Unpaired objectives have N samples in place
    of B pairs, and S = N in place of S = 2B samples.

    Args:
        loss: 0-d, mean over the active pairs.
        active: [B], 1 for each pair that counts in the mean, else 0.
        error: [S, f, h, w], mean squared errors E_p of the policy, all samples a and then their partners b.
        log_ratio: [S, f, h, w], E_p(reference) - E_p(policy); None without reference.
        video_logits: [B], z_v, or the one logit of all labels of a pair (``shared_logit``).
        patch_logits: [B, f, h, w], z_p.
        video: [B], signed preference weight, above 0 where sample a wins and 0 for a tie; None if not reported.
        patch: [B, f, h, w], likewise.
        scale: [B], beta kappa / 2 of the video, which turns an error gap into an implicit reward.
        volume: [f, h, w], each patch's share of the latent; sums to 1.
        t: [B], times; None if they were not given.
        paired: whether samples come in pairs.
        shared_logit: whether video_logits holds one logit for all labels of a pair.
    """

    loss: Tensor
    active: Tensor
    error: Tensor
    log_ratio: Tensor | None
    video_logits: Tensor
    patch_logits: Tensor
    video: Tensor | None
    patch: Tensor | None
    scale: Tensor
    volume: Tensor
    t: Tensor | None = None
    paired: bool = True
    shared_logit: bool = False

    @property
    def num_pairs(self) -> Tensor:
        """Number of pairs in the mean, 0-d."""
        return self.active.sum()

    @property
    def grid(self) -> tuple[int, ...]:
        """(f, h, w) of the patches."""
        return tuple(self.patch_logits.shape[1:])

    @property
    def labels(self) -> tuple[str, ...]:
        """Which of "video" and "patch" have winners and losers here."""
        given = {"video": self.video, "patch": self.patch}
        return tuple(label for label, weights in given.items() if self.paired and weights is not None)

    @staticmethod
    def join(parts: Sequence[PairFigures], gather: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> PairFigures:
        """The figures of all pairs of several batches, and of several processes.

        Args:
            parts: at least one, all of one objective and one grid; either all with t or none.
            gather: gives a tensor's rows of all processes, one process after another; the default is this process.

        Returns:
            Figures whose loss is the mean over all active pairs.
        """
        count = torch.stack([part.num_pairs for part in parts])
        loss = torch.stack([part.loss for part in parts])
        sums = gather(torch.stack([(loss * count).sum(), count.sum()])[None]).sum(0)
        joined: dict[str, Any] = {}
        for name in ("active", "video_logits", "patch_logits", "video", "patch", "scale", "t"):
            joined[name] = _concatenated([getattr(part, name) for part in parts], gather)
        for name in ("error", "log_ratio"):
            tables = [getattr(part, name) for part in parts]
            joined[name] = (_concatenated_pairs if parts[0].paired else _concatenated)(tables, gather)
        return replace(parts[0], loss=sums[0] / sums[1].clamp(min=1), **joined)

    def metrics(self) -> dict[str, Tensor]:
        """What to log, as 0-d tensors; ``GranDPOOutput.metrics`` says what each is."""
        means = {name: value for name, (value, _) in self._means().items()}
        return {"loss": self.loss, "num_pairs": self.num_pairs, **means}

    @staticmethod
    def joined_metrics(
        parts: Sequence[PairFigures], gather: Callable[[Tensor], Tensor] = lambda tensor: tensor
    ) -> dict[str, Tensor]:
        """``metrics`` of all pairs of several batches, whose grids and numbers of pairs may differ.

        Args:
            parts: at least one, all of one objective.
            gather: as for ``join``.
        """
        tables = [{"loss": (part.loss, part.num_pairs), **part._means()} for part in parts]
        sums = torch.stack(
            [
                torch.stack([torch.stack([torch.where(n > 0, mean * n, 0.0), n]) for mean, n in table.values()])
                for table in tables
            ]
        ).sum(0)
        sums = gather(sums[None]).sum(0)
        (loss, pairs), *rest = sums
        means = {name: total / n for name, (total, n) in zip(list(tables[0])[1:], rest, strict=True)}
        return {"loss": loss / pairs.clamp(min=1), "num_pairs": pairs, **means}

    def _means(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Means over the batch, and how many numbers each is over."""
        samples = self.error.new_full((), len(self.error))
        values = {"model_mse": (self._whole(self.error).mean(), samples)}
        if self.log_ratio is not None:
            values["ref_mse"] = self._whole(self.error + self.log_ratio).mean(), samples
        logits, weights = [], []
        if self.shared_logit or self.video is not None:
            labelled = self.video_weights()
            logits.append(self.video_logits)
            weights.append(labelled)
            accuracy = _mean(_agreement(self.video_logits), labelled), labelled.sum()
            values["rewards/margins"] = _mean(self.video_logits, labelled), labelled.sum()
            values["rewards/accuracies"] = values["implicit_acc"] = accuracy
        if self.video is not None:
            values |= self._video_means(self.video)
        if self.patch is not None:
            labelled = (self.patch != 0).to(self.error.dtype)
            logits.append(self.patch_logits.flatten())
            weights.append(labelled.flatten())
            values["patch/margins"] = _mean(self.patch_logits, labelled), labelled.sum()
            values["patch/accuracies"] = _mean(_agreement(self.patch_logits), labelled), labelled.sum()
            values["patch/ties"] = 1 - labelled.mean(), labelled.new_full((), labelled.numel())
        if logits:
            z, weight = torch.cat(logits), torch.cat(weights)
            values["gradient_factor"] = _mean(torch.sigmoid(-z), weight), weight.sum()
            values["saturation"] = _mean(_saturated(z), weight), weight.sum()
        return values

    def weights(self, label: str) -> Tensor:
        """1 where there is a preference and 0 for a tie: [B, 1] of the video, [B, P] of the patches.

        Args:
            label: one of ``labels``.
        """
        return (self._signed(label) != 0).to(self.error.dtype)

    def logits(self, label: str) -> Tensor:
        """z, signed by the preference: [B, 1] of the video, [B, P] of the patches.

        Args:
            label: one of ``labels``.
        """
        return (self.video_logits[:, None] if label == "video" else self.patch_logits).flatten(1)

    def errors(self, label: str) -> Tensor:
        """Mean squared errors by outcome: [4, B, 1] of the video, [4, B, P] of the patches.

        Args:
            label: one of ``labels``; its preference says which sample wins, for each patch its own.

        Returns:
            Policy on the winner, reference on the winner, policy on the loser, reference on the loser. Without a
            reference its errors are the policy's.
        """
        reference = self.error if self.log_ratio is None else self.error + self.log_ratio
        tables = torch.stack([self.error, reference])
        rows = (self.volume * tables).flatten(2).sum(2, keepdim=True) if label == "video" else tables.flatten(2)
        a, b = rows.chunk(2, dim=1)
        first = self._signed(label) > 0
        return torch.cat([torch.where(first, a, b), torch.where(first, b, a)])

    def values(self, label: str) -> dict[str, Tensor]:
        """Figures of each video or patch, [B, 1] or [B, P], to be averaged with ``weights``.

        Args:
            label: one of ``labels``.

        Returns:
            accuracy (1 where z > 0, one half where it is 0), margin (z), winner_policy, winner_reference, loser_policy,
            loser_reference (errors E), gradient_factor (sigma(-z)), saturation (1 where |z| > 10).
        """
        z = self.logits(label)
        names = ("winner_policy", "winner_reference", "loser_policy", "loser_reference")
        return {
            "accuracy": _agreement(z),
            "margin": z,
            **dict(zip(names, self.errors(label), strict=True)),
            "gradient_factor": torch.sigmoid(-z),
            "saturation": _saturated(z),
        }

    def _signed(self, label: str) -> Tensor:
        signed = self.video if label == "video" else self.patch
        if label not in self.labels or signed is None:
            raise ValueError(f"label must be one of {', '.join(self.labels) or 'none'} here; got {label!r}")
        return signed.reshape(len(signed), -1)

    def video_weights(self) -> Tensor:
        """1 where the logit of ``video_logits`` has a label and 0 for a tie, [B]."""
        if self.shared_logit or self.video is None:
            return self.active
        return (self.video != 0).to(self.error.dtype)

    def _whole(self, table: Tensor) -> Tensor:
        """Means over the video [S] of a table [S, f, h, w] of means over patches."""
        return (self.volume * table).flatten(1).sum(1)

    def _video_means(self, video: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        labelled = (video != 0).to(self.video_logits.dtype)
        values = {"video/ties": (1 - labelled.mean(), labelled.new_full((), len(labelled)))}
        if self.log_ratio is None or not self.paired:
            return values
        a, b = self._whole(self.log_ratio).chunk(2)
        chosen, rejected = torch.where(video > 0, a, b), torch.where(video > 0, b, a)
        tables = {
            "rewards/chosen": self.scale * chosen, "rewards/rejected": self.scale * rejected, "win_gap": -chosen,
            "lose_gap": -rejected,
        }  # fmt: skip
        return values | {name: (_mean(table, labelled), labelled.sum()) for name, table in tables.items()}


def _mean(values: Tensor, weight: Tensor) -> Tensor:
    return (values * weight).sum() / weight.sum()


def _agreement(logits: Tensor) -> Tensor:
    """1 where the policy agrees with the preference, one half at 0."""
    return (logits > 0).to(logits.dtype) + 0.5 * (logits == 0).to(logits.dtype)


def _saturated(logits: Tensor) -> Tensor:
    return (logits.abs() > SATURATED).to(logits.dtype)


def _concatenated(tables: Sequence[Tensor | None], gather: Callable[[Tensor], Tensor]) -> Tensor | None:
    """Rows of all batches and processes one after another; None if there are none."""
    present = [table for table in tables if table is not None]
    return gather(torch.cat(present)) if present else None


def _concatenated_pairs(tables: Sequence[Tensor | None], gather: Callable[[Tensor], Tensor]) -> Tensor | None:
    """As ``_concatenated`` for tables of samples [2B, ...]: all samples a of the result, then their partners b."""
    pairs = [None if table is None else table.unflatten(0, (2, -1)).transpose(0, 1) for table in tables]
    joined = _concatenated(pairs, gather)
    return None if joined is None else joined.transpose(0, 1).flatten(0, 1)
