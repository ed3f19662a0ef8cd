"""Bounds and choices of settings, written beside the fields and checked alike for the command line and for Python.

@dataclass
class SampleConfig:
    steps: Annotated[int, Ge(1)] = 50
    dropout: Annotated[float, Interval(ge=0, le=1)] = 0.1
    sampler: Literal["euler", "heun"] = "euler"

validate(SampleConfig(steps=0), "sample")   # UserError: sample.steps: expected at least 1, got 0
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from numbers import Integral, Real
from os import PathLike
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from annotated_types import Ge, GroupedMetadata, Gt, Le, Lt

from halo_fast.errors import UserError

__all__ = ["validate", "validate_arguments"]

# bound: its attribute, its words, whether a value is inside
_BOUNDS: dict[type, tuple[str, str, Callable[[Any, Any], bool]]] = {
    Ge: ("ge", "at least", operator.ge),
    Gt: ("gt", "more than", operator.gt),
    Le: ("le", "at most", operator.le),
    Lt: ("lt", "less than", operator.lt),
}

# what stands for a type beside itself
_ACCEPTED: dict[type, Any] = {dict: Mapping, list: (list, tuple), tuple: (list, tuple), str: (str, PathLike)}


def validate(settings: Any, place: str = "") -> None:
    """Check every field of a settings dataclass, and of those nested in it.

    Fields say what they allow by `Annotated` with the bounds of annotated_types (Ge, Gt, Le, Lt, Interval) and by
    `Literal`. A union with None allows None. Lists, tuples and values of dicts are checked one by one. Floats are
    finite, unless a bound is itself infinite: Interval(gt=0, le=math.inf).

    Args:
        settings: a dataclass instance.
        place: dotted name of `settings` for messages; empty for the whole.

    Raises:
        UserError: a value of another type, out of its bounds or no allowed choice; it names the dotted setting.
    """
    hints = get_type_hints(type(settings), include_extras=True)
    for field in fields(settings):
        _check(getattr(settings, field.name), hints[field.name], f"{place}.{field.name}" if place else field.name)


def validate_arguments(function: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
    """Check the arguments of a call as `validate` checks fields.

    Args:
        function: whose parameters are annotated.
        arguments: by name.

    Raises:
        UserError: names the argument.
    """
    hints = get_type_hints(function, include_extras=True)
    for name, value in arguments.items():
        _check(value, hints[name], name)


def _check(value: Any, hint: Any, place: str) -> None:
    """Check one value by its annotation, and whatever is nested in it."""
    origin, arguments = get_origin(hint), get_args(hint)
    if is_dataclass(value) and not isinstance(value, type):
        validate(value, place)
    elif origin is Annotated:
        _check_annotated(value, arguments[0], hint.__metadata__, place)
    elif origin in (Union, UnionType):
        others = [argument for argument in arguments if argument is not NoneType]
        # a union of several types beside None is not checked further
        if len(others) == 1 and not (value is None and NoneType in arguments):
            _check(value, others[0], place)
    elif origin is Literal:
        if value not in arguments:
            raise UserError(f"{place}: expected one of {', '.join(map(repr, arguments))}, got {value!r}")
    elif hint in (int, float):
        _check_number(value, hint, (), place)
    elif hint in (str, bool) or origin in (dict, list, tuple):
        _check_type(value, origin or hint, place)
        _check_items(value, arguments, place)
    elif is_dataclass(hint):
        raise UserError(f"{place}: expected the settings of this section, got {value!r}")


def _check_annotated(value: Any, hint: Any, metadata: tuple[Any, ...], place: str) -> None:
    if hint in (int, float):
        parts = [part for group in metadata for part in (group if isinstance(group, GroupedMetadata) else (group,))]
        _check_number(value, hint, parts, place)
    else:
        _check(value, hint, place)


def _check_type(value: Any, kind: type, place: str) -> None:
    words = {str: "a text", bool: "true or false", dict: "names with values", list: "a list", tuple: "a list"}
    if not isinstance(value, _ACCEPTED.get(kind, kind)):
        raise UserError(f"{place}: expected {words[kind]}, got {value!r}")


def _check_items(value: Any, arguments: tuple[Any, ...], place: str) -> None:
    """Check the items of a list, tuple or dict, one by one."""
    if not arguments:
        return
    if isinstance(value, Mapping):
        for key, item in value.items():
            _check(item, arguments[1], f"{place}.{key}")
        return
    fixed = arguments[1:] and arguments[-1] is not ...
    if fixed and len(value) != len(arguments):
        raise UserError(f"{place}: expected {len(arguments)} values, got {len(value)}: {value!r}")
    for index, item in enumerate(value):
        _check(item, arguments[index if fixed else 0], f"{place}[{index}]")


def _check_number(value: Any, kind: type, metadata: Sequence[Any], place: str) -> None:
    """Check a number by its type and the bounds beside it; it is finite unless a bound is infinite."""
    bounds = [(*_BOUNDS[type(part)], part) for part in metadata if type(part) in _BOUNDS]
    limits = [(words, inside, getattr(part, name)) for name, words, inside, part in bounds]
    wanted = " and ".join(f"{words} {limit:g}" for words, _, limit in limits if math.isfinite(limit))
    if isinstance(value, bool) or not isinstance(value, Integral if kind is int else Real):
        what = "a whole number" if kind is int else "a number"
        raise UserError(f"{place}: expected {what}{', ' if wanted else ''}{wanted}; got {value!r}")
    # NaN compares false with everything, so it is in no bounds
    if not all(inside(value, limit) for _, inside, limit in limits):
        raise UserError(f"{place}: expected {wanted}, got {value}")
    if not math.isfinite(value) and not any(math.isinf(limit) for _, _, limit in limits):
        raise UserError(f"{place}: expected a finite number{', ' if wanted else ''}{wanted}; got {value}")
