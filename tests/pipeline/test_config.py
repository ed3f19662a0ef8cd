"""Settings from YAML and dotted overrides."""

import dataclasses

import pytest

from halo_fast.families.sampling import GenerateConfig
from halo_fast.pipeline.config import Config, to_yaml

yaml = pytest.importorskip("yaml")


def test_yaml_holds_every_setting():
    assert yaml.safe_load(to_yaml(Config())) == {**dataclasses.asdict(Config()), "grid": [3, 4, 4]}


@pytest.mark.parametrize("grid", [(0, 4, 4), (10, 4, 4), (3, 33, 4), (3, 4, -1)])
def test_grid_must_fit_the_clip(grid):
    with pytest.raises(ValueError, match=r"grid: expected 1 to \(9, 32, 32\)"):
        Config(grid=grid)


def test_grid_may_be_as_fine_as_the_clip():
    assert Config(grid=(9, 16, 8), generate=GenerateConfig(height=16, width=8)).grid == (9, 16, 8)


def test_every_setting_is_described():
    def check(cls):
        text = cls.__doc__ or ""
        for field in dataclasses.fields(cls):
            assert f"    {field.name}: " in text, f"{cls.__name__}.{field.name} has no line in the docstring"
            if field.default_factory is not dataclasses.MISSING and dataclasses.is_dataclass(field.default_factory):
                check(field.default_factory)

    check(Config)
