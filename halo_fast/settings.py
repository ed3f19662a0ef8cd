"""Bounds and choices of settings, written beside the fields and checked alike for the command line and for Python.

@dataclass
class SampleConfig:
    steps: Annotated[int, Ge(1)] = 50
    dropout: Annotated[float, Interval(ge=0, le=1)] = 0.1
    sampler: Literal["euler", "heun"] = "euler"

validate(SampleConfig(steps=0), "sample")   # UserError: sample.steps: expected at least 1, got 0
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from annotated_types import Ge, GroupedMetadata, Gt, Le, Lt

from halo_fast.errors import UserError

__all__ = ["validate"]

# bound: its attribute, its words, whether a value is inside
_BOUNDS: dict[type, tuple[str, str, Callable[[Any, Any], bool]]] = {
    Ge: ("ge", "at least", operator.ge),
    Gt: ("gt", "more than", operator.gt),
    Le: ("le", "at most", operator.le),
    Lt: ("lt", "less than", operator.lt),
}


def validate(settings: Any, place: str = "") -> None:
    """Check every field of a settings dataclass, and of those nested in it.

    Fields say what they allow by `Annotated` with the bounds of annotated_types (Ge, Gt, Le, Lt, Interval) and by
    `Literal`. A union with None allows None. Lists, tuples and values of dicts are checked one by one.

    Args:
        settings: a dataclass instance.
        place: dotted name of `settings` for messages; empty for the whole.

    Raises:
        UserError: a value is out of its bounds or no allowed choice; the message names the dotted setting.
    """
    hints = get_type_hints(type(settings), include_extras=True)
    for field in fields(settings):
        _check(getattr(settings, field.name), hints[field.name], f"{place}.{field.name}" if place else field.name)


def _check(value: Any, hint: Any, place: str) -> None:
    """Check one value by its annotation, and whatever is nested in it."""
    origin, arguments = get_origin(hint), get_args(hint)
    if is_dataclass(value) and not isinstance(value, type):
        validate(value, place)
    elif origin is Annotated:
        _check(value, arguments[0], place)
        if value is not None:
            _check_bounds(value, hint.__metadata__, place)
    elif origin in (Union, UnionType):
        others = [argument for argument in arguments if argument is not NoneType]
        # a union of several types beside None is not checked further
        if len(others) == 1 and not (value is None and NoneType in arguments):
            _check(value, others[0], place)
    elif origin is Literal and value not in arguments:
        raise UserError(f"{place}: expected one of {', '.join(map(repr, arguments))}, got {value!r}")
    elif isinstance(value, Mapping) and len(arguments) == 2:
        for key, item in value.items():
            _check(item, arguments[1], f"{place}.{key}")
    elif isinstance(value, list | tuple) and arguments:
        each = arguments[0] if origin is list or arguments[-1] is ... else None
        for index, item in enumerate(value):
            _check(item, each or arguments[min(index, len(arguments) - 1)], f"{place}[{index}]")


def _check_bounds(value: Any, metadata: tuple[Any, ...], place: str) -> None:
    """Check a number by the bounds in the metadata of its annotation; other metadata is ignored."""
    parts = [part for group in metadata for part in (group if isinstance(group, GroupedMetadata) else (group,))]
    bounds = [(*_BOUNDS[type(part)], part) for part in parts if type(part) in _BOUNDS]
    if not bounds:
        return
    limits = [(words, inside, getattr(part, name)) for name, words, inside, part in bounds]
    wanted = " and ".join(f"{words} {limit:g}" for words, _, limit in limits)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"{place}: expected a number, {wanted}; got {value!r}")
    # NaN compares false with everything, so it is in no bounds
    if not all(inside(value, limit) for _, inside, limit in limits):
        raise UserError(f"{place}: expected {wanted}, got {value}")
