"""Lists of prompts: text files, and registered lists."""

from pathlib import Path

from halo_fast import registry
from halo_fast.errors import UserError

__all__ = ["prompt_source", "read_prompts"]


def prompt_source(prompts: str) -> Path | str:
    """What identifies a list of prompts as a stage's input: the file, or the registered or dotted name."""
    return prompts if registry.is_name("prompts", prompts) else Path(prompts)


def read_prompts(prompts: str, count: int | None, seed: int = 0, setting: str = "prompts") -> list[str]:
    """The first prompts of a list.

    Args:
        prompts: a text file with one prompt a line, a registered name, or "package.module:attribute" of a callable
            that takes a count and a seed and gives prompts; it raises ValueError for a count it cannot serve.
        count: how many; fewer come from a file that is shorter. None for all.
        seed: for registered lists, which may be drawn.
        setting: under which mistakes are reported.

    Raises:
        UserError: a missing or unreadable file, an empty line, no prompts, no list of that name.
    """
    if registry.is_name("prompts", prompts):
        try:
            return registry.resolve("prompts", prompts, setting)(count, seed)
        except ValueError as error:
            raise UserError(f"{setting}: {error}; lower num_prompts") from error
    try:
        lines = Path(prompts).read_text(encoding="utf-8-sig").removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"{setting}: expected a text file with one prompt a line, got {prompts!r} ({reason})"
        ) from error
    if lines == [""]:
        raise UserError(f"{setting}: {prompts} holds no prompts; write one a line")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            raise UserError(f"{setting}: {prompts} line {number} is empty; write a prompt there or remove the line")
    return [line.strip() for line in lines[:count]]
