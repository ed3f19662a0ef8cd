"""The HTML pages, from the templates beside it, written piece by piece: a clip is in memory while it is written."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from halo_fast.agreement.arms import DEFECTIVE
from halo_fast.files import progress, replacing
from halo_fast.pipeline.config import Config
from halo_fast.pipeline.report.clips import Card, media_of
from halo_fast.pipeline.report.runs import settings_of

__all__ = ["settings_text", "write_page"]

_TEMPLATES = Path(__file__).parent


def write_page(path: Path, template: str, cards: Sequence[Card], **content: Any) -> None:
    """Write a page atomically.

    Args:
        path: of the page.
        template: "page.html.j2" of one run or "compare.html.j2" of several.
        cards: the clips.
        content: what else the template names; notes are what the meter says about itself, or None:
            {"title": str, "parts": [a paragraph or {"caption": str, "head": [str, ...], "rows": [[str, ...], ...]}]}.

    Raises:
        UserError: an unreadable clip.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters["percent"] = lambda share: f"{round(100 * share)}%"
    environment.globals |= {
        "defective": DEFECTIVE,
        "media": media_of,
        "style": Markup((_TEMPLATES / "page.css").read_text()),
        "script": Markup((_TEMPLATES / "page.js").read_text()),
    }

    def shown() -> Iterator[Card]:
        return progress(cards, len(cards), "report: encoding clips")

    with replacing(path) as temporary:
        stream = environment.get_template(template).stream(cards=cards, shown=shown, **content)
        stream.enable_buffering(32)
        stream.dump(str(temporary), encoding="utf-8")


def settings_text(manifests: Mapping[str, Mapping[str, Any]], config: Config) -> str:
    """What every stage was made with, as YAML.

    Args:
        manifests: of the finished stages, by name.
        config: for what no manifest holds: names of model and prompts, and the report's own settings.
    """
    import yaml

    names = ("pretrained_model_name_or_path", "prompts", "evaluation_prompts")
    everything = {
        "run": {name: getattr(config, name) for name in names},
        **settings_of(manifests),
        "report": asdict(config.report),
    }
    return str(yaml.safe_dump(everything, sort_keys=False, width=120))
