"""Published objectives by name, and the objective that a setting describes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

from halo_fast import registry
from halo_fast.errors import UserError, first_line
from halo_fast.loss.objectives.base import Objective
from halo_fast.loss.objectives.granular import GranDPO
from halo_fast.loss.objectives.kto import DiffusionKTO
from halo_fast.loss.objectives.mapo import MaPO
from halo_fast.loss.objectives.pooled import PooledDPO
from halo_fast.loss.objectives.regression import WeightedRegression

__all__ = ["PRESETS", "Spec", "build"]

Spec = str | Mapping[str, Any] | Objective

PRESETS: dict[str, Objective] = {
    # Own formulation after HALO, arXiv 2502.06812.
    "halo": GranDPO(),
    # The same with supervision of the winning patches.
    "halo_sft": GranDPO(patch_sft_weight=0.5),
    # The same with logits capped and more supervision: docs/results.md, "What a bound costs".
    "halo_bounded": GranDPO(patch_sft_weight=1.5, video_cap=1.5, patch_cap=1.5),
    # Wallace et al. 2023, arXiv 2311.12908: -log sigma(-beta/2 [(E_w - E_ref,w) - (E_l - E_ref,l)]).
    "diffusion_dpo": GranDPO(video_beta=5000.0, patch_weight=0.0),
    # Liu et al. 2025, arXiv 2501.13918: the same on velocities; kappa = (1-t)^2 is the paper's other weighting.
    "flow_dpo": GranDPO(video_beta=500.0, patch_weight=0.0),
    # Liu et al. 2024, arXiv 2412.14167: pairs weighted by ``video_dpo_rewards``.
    "video_dpo": GranDPO(video_beta=5000.0, patch_weight=0.0, video_gamma=1.0),
    # Wu et al. 2025, arXiv 2506.03517: one sigmoid over segment labels, beta 500 without the half.
    "dense_dpo": PooledDPO(video_weight=0.0, video_beta=1000.0, patch_beta=1000.0, patch_gamma=0.0),
    # arXiv 2601.04068: the video and a soft mask (``local_dpo_rewards``), plus both as supervision of the winner.
    "local_dpo": PooledDPO(video_beta=5000.0, patch_beta=5000.0, normalize=False, sft_weight=0.1, patch_sft_weight=0.1),
    # arXiv 2511.01450: softplus(beta' D) + r E_w, beta' 1000 without the half, r 1.
    "reg_dpo": GranDPO(video_beta=2000.0, patch_weight=0.0, sft_weight=1.0),
    # arXiv 2511.03317: Diffusion-DPO whose loser's gradient is scaled so that the winner's error does not rise.
    "diffusion_sdpo": GranDPO(video_beta=5000.0, patch_weight=0.0, loser_guard="video"),
    # Li et al. 2024, arXiv 2404.04465: 1 - sigma(s beta (g - KL)), unpaired, beta 1000 without the half.
    "diffusion_kto": DiffusionKTO(),
    # Hong et al. 2024, arXiv 2406.06424: E_w - beta log sigma(T (f(E_w) - f(E_l))), no reference.
    "mapo": MaPO(),
    # Reward-weighted regression, e.g. LiFT, Wang et al. 2024, arXiv 2412.04814: score * E.
    "rwr": WeightedRegression(patch_weight=0.0),
    # Huang et al. 2024, arXiv 2412.03177: E_p weighted by 1 - q_p on the real sample and by q_p on the generated one.
    "patch_dpo": WeightedRegression(video_weight=0.0),
}


_PARTS = ("table", "preferences", "paired", "needs_reference", "labels", "anchor_weight", "video_beta", "shared_logit")


def build(spec: Spec) -> Objective:
    """The objective that a setting describes.

    Args:
        spec: a preset's name (``PRESETS``); a name registered as kind "objective" (`halo_fast.registry`); your own as
            "package.module:attribute"; a mapping {"preset": NAME, field: value, ...}, any of these names with fields
            replaced; or an objective. A registered or dotted name stands for an objective, or for what gives one when
            called without arguments.

    Raises:
        TypeError: spec is nothing of the kind.
        ValueError: an unknown name or field; the message lists the known ones.
    """
    if isinstance(spec, str):
        return PRESETS[spec] if spec in PRESETS else _imported(spec)
    if isinstance(spec, Mapping):
        return _replaced(spec)
    return _checked(spec, "a preset's name, a GranDPO or another Objective")


def _checked(value: Any, expected: str) -> Objective:
    if isinstance(value, type):
        raise TypeError(f"objective must be {expected}; got the class {value.__name__}: call it")
    missing = [part for part in _PARTS if not hasattr(value, part)]
    if missing:
        raise TypeError(
            f"objective must be {expected}; got {type(value).__name__} without {', '.join(missing)}: "
            "subclass halo_fast.loss.objectives.Objective"
        )
    objective: Objective = value
    return objective


def _imported(name: str) -> Objective:
    """The objective behind a registered or dotted name, called without arguments where it is not one itself."""
    try:
        found = registry.resolve("objective", name)
    except UserError as error:
        cause = f", which cannot be imported ({first_line(error.__cause__)})" if error.__cause__ else ""
        raise ValueError(
            f'objective must be one of {_known_names()}, a GranDPO, or your own as "package.module:attribute"; '
            f"got {name!r}{cause}"
        ) from error
    if isinstance(found, type) or not hasattr(found, "table"):
        try:
            found = registry.create("objective", name, "objective")
        except UserError as error:
            raise ValueError(str(error)) from error
    return _checked(found, f"an Objective or give one, unlike {name!r}")


def _known_names() -> str:
    return ", ".join([*PRESETS, *registry.known("objective")])


def _replaced(spec: Mapping[str, Any]) -> Objective:
    values = dict(spec)
    if "preset" not in values:
        raise ValueError(f'objective must name its "preset", one of {_known_names()}; got {values}')
    objective: Any = build(values.pop("preset"))
    known = [field.name for field in fields(objective) if field.init] if is_dataclass(objective) else []
    for name in values:
        if name not in known:
            raise ValueError(f"objective has no field {name!r}; {spec['preset']} has {', '.join(known) or 'none'}")
    changed: Objective = replace(objective, **values) if values else objective
    return changed
