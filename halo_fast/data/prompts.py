"""Lists of prompts."""

from pathlib import Path

from halo_fast.errors import UserError

__all__ = ["prompt_source", "read_prompts"]


def prompt_source(prompts: str) -> Path | str:
    """What identifies a list of prompts as a stage's input: the file, or the name of a list of the demo."""
    return prompts if prompts.startswith("demo:") else Path(prompts)


def read_prompts(prompts: str, count: int, seed: int = 0, setting: str = "prompts") -> list[str]:
    """The first `count` prompts of a text file (fewer if it is shorter), or of "demo:train" and "demo:heldout".

    Mistakes are reported under the name `setting`.

    Raises:
        UserError: a missing or unreadable file, an empty line, no prompts.
    """
    if prompts.startswith("demo:"):
        from halo_fast.demo import world

        if prompts not in ("demo:train", "demo:heldout"):
            raise UserError(f'{setting}: expected "demo:train", "demo:heldout" or a text file, got {prompts!r}')
        try:
            return world.prompts("train" if prompts == "demo:train" else "heldout", count, seed)
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
