"""The error that a user's mistake raises, and the check of values where they are made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Diverged", "UserError", "check_finite", "first_line"]


class UserError(Exception):
    """A mistake of the user in one line: the argument or file, what was expected, what came and what to do."""


class Diverged(UserError):
    """Values that are not finite, or a loss that spikes: the settings are to blame, or the data."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, for messages that quote it; the error's class where it has none."""
    return str(error).strip().split("\n")[0] or type(error).__name__


def check_finite(values: Tensor, names: Sequence[str], what: str, cure: str) -> None:
    """Raise if a row of a tensor holds NaN or infinity.

    Args:
        values: [N, ...].
        names: of the N rows, such as clips or pairs.
        what: the values are, for the message.
        cure: what to do, for the message.

    Raises:
        Diverged: naming the first such row, and how many there are.
    """
    finite = values.isfinite().flatten(1).all(1) if values.ndim > 1 else values.isfinite()
    if bool(finite.all()):
        return
    broken = [name for name, good in zip(names, finite.tolist(), strict=True) if not good]
    more = f", and those of {len(broken) - 1} more of {len(names)}" if len(broken) > 1 else ""
    raise Diverged(f"{broken[0]}: {what} are not finite{more}; {cure}")
