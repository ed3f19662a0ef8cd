"""What stops a training: judged from rows that were read from the device already, so no step waits for it."""

import math
import statistics
from collections.abc import Sequence

from halo_fast.errors import Diverged, UserError
from halo_fast.train.config import TrainConfig
from halo_fast.train.observers.base import Observer
from halo_fast.train.observers.log import Log

__all__ = ["Guards", "check_rows"]

SPIKE_WINDOW, SPIKE_LENGTH = 50, 5
_SMALL = 0.01  # of the first step's loss
_UNSAVED = "nothing was saved since the last checkpoint"


class Guards(Observer):
    """Stops a training whose loss is not finite, spikes, or never had a pair to learn from.

    Args:
        log: whose new rows are checked; it must report first.
        config: the settings.
    """

    name = "guards"

    def __init__(self, log: Log, config: TrainConfig) -> None:
        self._log, self._config = log, config

    def report(self, done: int) -> None:
        check_rows(self._log.rows, self._log.first_new, self._config)


def check_rows(log: Sequence[dict[str, float]], first: int, config: TrainConfig) -> None:
    """Raise if one of the rows `log[first:]` is not finite or a spike, or if no pair of a whole training counted.

    A row is a spike when the mean loss of the last 5 steps exceeds `config.loss_spike_factor` times the median of the
    50 steps before those (of at least 5), and a hundredth of the first step's: below that, pairs are as good as
    separated, and losses vary by orders of magnitude. This depends on the rows before it alone,
    never on how often rows are read, so a resumed training stops where an undisturbed one does.

    Args:
        log: all rows from step 1 on, each with step, loss, grad_norm and num_pairs.
        first: index of the first row not checked yet.
        config: the settings; loss_spike_factor null switches the spike off, nothing the other.

    Raises:
        Diverged: naming step, value and cure.
        UserError: no pair had anything to teach.
    """
    losses = [row["loss"] for row in log]
    for index in range(first, len(log)):
        for name in ("loss", "grad_norm"):
            if not math.isfinite(log[index][name]):
                raise Diverged(
                    f"train: {name} is {log[index][name]} at step {log[index]['step']}, {_UNSAVED}; "
                    "lower learning_rate or the betas"
                )
        if config.loss_spike_factor is not None:
            _check_spike(losses[: index + 1], config.loss_spike_factor)
    if len(log) == config.max_train_steps and not any(row["num_pairs"] for row in log):
        raise UserError(
            "train: no pair had anything to teach in any step, so nothing was learned; lower "
            "train.objective.patch_delta and video_delta, or give weight to the labels that the pairs have"
        )


def _check_spike(losses: Sequence[float], factor: float) -> None:
    """Raise if the last loss is a spike."""
    start = len(losses) - SPIKE_LENGTH
    before = losses[max(0, start - SPIKE_WINDOW) : max(0, start)]
    if len(before) < SPIKE_LENGTH:
        return
    mean, usual = statistics.fmean(losses[start:]), statistics.median(before)
    # A median of 0 comes from steps whose pairs all tied, which say nothing of the usual loss.
    if mean > factor * usual > 0 and mean > _SMALL * abs(losses[0]):
        raise Diverged(
            f"train: loss spikes at step {len(losses)}: {mean:.4g} over {SPIKE_LENGTH} steps after "
            f"{usual:.4g} before, expected at most {factor:g} times that; {_UNSAVED}; lower "
            "learning_rate or the betas, or raise objective.patch_sft_weight (loss_spike_factor: null goes on)"
        )
