"""The error that a user's mistake raises."""

__all__ = ["UserError", "first_line"]


class UserError(Exception):
    """A mistake of the user in one line: the argument or file, what was expected, what came and what to do."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, for messages that quote it; the error's class where it has none."""
    return str(error).strip().split("\n")[0] or type(error).__name__
