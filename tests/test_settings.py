"""Bounds and choices beside the fields of settings."""

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
    ],
)  # fmt: skip
def test_what_the_fields_allow_passes(good):
    validate(Outer(Inner(**good)))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"count": 0}, "inner.count: expected at least 1, got 0"),
        ({"count": "3"}, "inner.count: expected a number, at least 1; got '3'"),
        ({"count": True}, "inner.count: expected a number, at least 1; got True"),
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
