"""The one error type that a user's mistake raises."""

__all__ = ["UserError"]


class UserError(Exception):
    """A mistake of the user in one line: the argument or file, what was expected, what came and what to do."""
