"""The HTML page, from the template beside it."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from halo_fast.agreement.arms import DEFECTIVE
from halo_fast.pipeline.config import Config

__all__ = ["render_page", "settings_text"]


def render_page(judges: Mapping[str, Any] | None = None, **content: Any) -> str:
    """The page as text.

    Args:
        judges: what judges/judges.json holds; None for no section about it.
        content: what the template names: title, metrics (of evaluate), probes, clips, charts, counts, settings,
            versions; and notes, what the meter says about itself, or None:
            {"title": str, "parts": [a paragraph or {"caption": str, "head": [str, ...], "rows": [[str, ...], ...]}]}.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters["percent"] = lambda share: f"{round(100 * share)}%"
    return environment.get_template("page.html.j2").render(defective=DEFECTIVE, judges=judges, **content)


def settings_text(manifests: Mapping[str, Mapping[str, Any]], config: Config) -> str:
    """What every stage was made with, as YAML.

    Args:
        manifests: of the finished stages, by name.
        config: for what no manifest holds: names of model and prompts, and the report's own settings.
    """
    import yaml

    names = ("pretrained_model_name_or_path", "prompts", "evaluation_prompts")
    stages = {
        name: {**manifest["settings"], "sha256 of inputs": manifest["inputs"]} for name, manifest in manifests.items()
    }
    everything = {"run": {name: getattr(config, name) for name in names}, **stages, "report": asdict(config.report)}
    return str(yaml.safe_dump(everything, sort_keys=False, width=120))
