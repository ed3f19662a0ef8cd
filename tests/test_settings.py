"""Bounds and choices beside the fields of settings."""

import math
from dataclasses import dataclass, field
from typing import Annotated, Literal

import pytest

annotated_types = pytest.importorskip("annotated_types")

from annotated_types import Ge, Gt, Interval  # noqa: E402

from halo_fast.errors import UserError  # noqa: E402
from halo_fast.settings import validate  # noqa: E402


@dataclass
class Inner:
    count: Annotated[int, Ge(1)] = 3
    limit: Annotated[int, Ge(0)] | None = None
    share: Annotated[float, Interval(ge=0, le=1)] = 0.5
    kind: Literal["a", "b"] = "a"
    mode: Literal["x"] | None = None
    sizes: list[Annotated[int, Gt(0)]] = field(default_factory=list)
    weights: dict[str, Annotated[float, Ge(0)]] = field(default_factory=dict)
    grid: tuple[Annotated[int, Ge(1)], int] = (1, 0)
    name: str = "x"
    flag: bool = False
    rate: Annotated[float, Gt(0)] = 1.0
    free: float = 0.0
    norm: Annotated[float, Interval(gt=0, le=math.inf)] = 1.0
    either: str | dict[str, float] = "name"


@dataclass
class Outer:
    inner: Inner = field(default_factory=Inner)
    seed: Annotated[int, Ge(0)] = 0


@pytest.mark.parametrize(
    "good",
    [
        {}, {"count": 1}, {"limit": 0}, {"share": 0}, {"share": 1.0}, {"mode": "x"}, {"sizes": [1, 2]},
        {"weights": {"a": 0.0}}, {"grid": (1, -5)}, {"either": {"a": -1.0}},
        {"norm": math.inf}, {"free": -3}, {"grid": [1, 2]},
    ],
)  # fmt: skip
def test_what_the_fields_allow_passes(good):
    validate(Outer(Inner(**good)))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"count": 0}, "inner.count: expected at least 1, got 0"),
        ({"count": "3"}, "inner.count: expected a whole number, at least 1; got '3'"),
        ({"count": True}, "inner.count: expected a whole number, at least 1; got True"),
        ({"count": 2.0}, "inner.count: expected a whole number, at least 1; got 2.0"),
        ({"count": None}, "inner.count: expected a whole number, at least 1; got None"),
        ({"kind": None}, "inner.kind: expected one of 'a', 'b', got None"),
        ({"name": None}, "inner.name: expected a text, got None"),
        ({"flag": 1}, "inner.flag: expected true or false, got 1"),
        ({"rate": float("inf")}, "inner.rate: expected a finite number, more than 0; got inf"),
        ({"free": float("nan")}, "inner.free: expected a finite number; got nan"),
        ({"norm": float("nan")}, "inner.norm: expected more than 0, got nan"),
        ({"weights": {"a": float("inf")}}, "inner.weights.a: expected a finite number, at least 0; got inf"),
        ({"weights": None}, "inner.weights: expected names with values, got None"),
        ({"sizes": 3}, "inner.sizes: expected a list, got 3"),
        ({"grid": (1, 2, 3)}, "inner.grid: expected 2 values, got 3: (1, 2, 3)"),
        ({"limit": -1}, "inner.limit: expected at least 0, got -1"),
        ({"share": 1.5}, "inner.share: expected at least 0 and at most 1, got 1.5"),
        ({"share": float("nan")}, "inner.share: expected at least 0 and at most 1, got nan"),
        ({"kind": "c"}, "inner.kind: expected one of 'a', 'b', got 'c'"),
        ({"mode": "y"}, "inner.mode: expected one of 'x', got 'y'"),
        ({"sizes": [1, 0]}, "inner.sizes[1]: expected more than 0, got 0"),
        ({"weights": {"a": -1.0}}, "inner.weights.a: expected at least 0, got -1.0"),
        ({"grid": (0, 1)}, "inner.grid[0]: expected at least 1, got 0"),
    ],
)
def test_what_they_do_not_is_refused_by_name(bad, message):
    with pytest.raises(UserError) as caught:
        validate(Outer(Inner(**bad)))
    assert str(caught.value) == message
    with pytest.raises(UserError) as caught:
        validate(Inner(**bad), "inner")
    assert str(caught.value) == message
