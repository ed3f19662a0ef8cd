"""Settings: defaults, bounds, YAML, and the recipes that ship with the project."""

import dataclasses
import math
import re
from pathlib import Path

import pytest
from recipe import demo_config

from halo_fast.errors import UserError
from halo_fast.families.sampling import GenerateConfig
from halo_fast.pipeline.arguments import load_config
from halo_fast.pipeline.clips import run_stages
from halo_fast.pipeline.config import Config, PairsConfig, TrainConfig, to_yaml
from halo_fast.pipeline.preflight import check_required
from halo_fast.pipeline.stages import STAGES
from halo_fast.rewards.model import model_folder

yaml = pytest.importorskip("yaml")
pytest.importorskip("jsonargparse")

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
# clips that a family makes: frames are k n + 1, sides are multiples of s (docs/families.md); patches of its latents
# come from the compression in time and space
SIZES = {
    "Wan-AI/": {"frames": 4, "sides": 16, "space": 8},
    "THUDM/": {"frames": 8, "sides": 16, "space": 8},
    "Lightricks/": {"frames": 8, "sides": 32, "space": 32},
    "hunyuanvideo-community/": {"frames": 4, "sides": 16, "space": 8},
}
TIME = {"Wan-AI/": 4, "THUDM/": 4, "Lightricks/": 8, "hunyuanvideo-community/": 4}


def test_yaml_holds_every_setting():
    assert yaml.safe_load(to_yaml(Config())) == {**dataclasses.asdict(Config()), "grid": [7, 4, 6]}


@pytest.mark.parametrize(
    ("grid", "words"),
    [
        ((0, 4, 4), r"grid\[0\]: expected at least 1, got 0"),
        ((3, 4, -1), r"grid\[2\]: expected at least 1, got -1"),
        ((10, 4, 4), r"grid: expected 1 to \(9, 32, 32\)"),
        ((3, 33, 4), r"grid: expected 1 to \(9, 32, 32\)"),
    ],
)
def test_grid_must_fit_the_clip(grid, words):
    with pytest.raises(UserError, match=words):
        Config(grid=grid, generate=GenerateConfig(num_frames=9, height=32, width=32))


def test_grid_may_be_as_fine_as_the_clip():
    assert Config(grid=(9, 16, 8), generate=GenerateConfig(num_frames=9, height=16, width=8)).grid == (9, 16, 8)


def test_every_setting_is_described():
    def check(cls):
        text = cls.__doc__ or ""
        for field in dataclasses.fields(cls):
            assert f"    {field.name}: " in text, f"{cls.__name__}.{field.name} has no line in the docstring"
            if field.default_factory is not dataclasses.MISSING and dataclasses.is_dataclass(field.default_factory):
                check(field.default_factory)

    check(Config)


def test_a_setting_out_of_bounds_is_named():
    with pytest.raises(UserError, match=r"^report\.num_clips: expected at least 1, got 0$"):
        demo_config(report={"num_clips": 0})
    with pytest.raises(UserError, match=r"^seed: expected at least 0, got -1$"):
        Config(seed=-1)


def test_nothing_of_the_demo_is_a_default():
    assert "demo" not in to_yaml(Config())
    assert to_yaml(demo_config()).count("demo") >= 5


def test_the_demo_says_every_setting_that_a_default_could_change():
    """A default that changes for real models must not change the demo."""
    given = yaml.safe_load((Path(__file__).parents[2] / "halo_fast" / "demo" / "recipe.yaml").read_text())
    everything = dataclasses.asdict(Config())
    left_out = {"cache", "annotate.openai", "imports"}
    for section, values in everything.items():
        if isinstance(values, dict):
            missing = set(values) - set(given.get(section, {})) if section not in left_out else set()
            assert {f"{section}.{name}" for name in missing} <= left_out
        else:
            assert section in given


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_recipes_load_and_fit_their_models(file):
    config = load_config(file, {"prompts": "prompts.txt", "evaluation_prompts": "heldout.txt"})
    check_required(config, run_stages(config, list(STAGES)))
    maker = next(maker for maker in SIZES if config.pretrained_model_name_or_path.startswith(maker))
    rules, clip = SIZES[maker], config.generate
    assert clip.num_frames % rules["frames"] == 1
    assert clip.height % rules["sides"] == clip.width % rules["sides"] == 0
    latent = ((clip.num_frames - 1) // TIME[maker] + 1, clip.height // rules["space"], clip.width // rules["space"])
    assert all(patches <= length for patches, length in zip(config.grid, latent, strict=True)), latent
    assert config.train.mixed_precision == "bf16"
    # selective needs 89.7 GiB for the 14B (docs/memory.md)
    assert config.train.gradient_checkpointing == ("full" if file.stem == "wan2.1-14b" else "selective")
    assert 1e-6 <= config.train.learning_rate <= 2e-4
    assert config.annotate.teacher == ("" if config.reward_model else "openai")
    assert config.evaluate.meter == "reward"
    if config.reward_model:
        assert (model_folder(config.reward_model) / "model.safetensors").exists()
    # what a family needs at least is in the documentation, the rest is the file's own choice
    assert config.output_dir == f"runs/{file.stem}"


def test_every_promised_recipe_is_there():
    names = (
        "wan2.1-1.3b",
        "wan2.1-1.3b-no-teacher",
        "wan2.1-14b",
        "cogvideox-2b",
        "cogvideox-5b",
        "ltx-video",
        "hunyuanvideo",
    )
    assert {file.stem for file in RECIPES} == set(names)


@pytest.mark.parametrize(
    ("changes", "setting"),
    [
        ({"grid": (1, 2)}, "grid"),
        ({"grid": None}, "grid"),
        ({"grid": (1.5, 2, 2)}, "grid[0]"),
        ({"seed": None}, "seed"),
        ({"prompts": None}, "prompts"),
        ({"train": None}, "train"),
        ({"pairs": PairsConfig(dimensions={"visual_quality": -1.0})}, "pairs.dimensions.visual_quality"),
        ({"pairs": PairsConfig(dimensions={"visual_quality": math.nan})}, "pairs.dimensions.visual_quality"),
        ({"train": TrainConfig(learning_rate=math.inf)}, "train.learning_rate"),
        ({"generate": GenerateConfig(num_frames=None)}, "generate.num_frames"),
    ],
)
def test_a_value_of_the_wrong_kind_is_named(changes, setting):
    with pytest.raises(UserError, match=f"^{re.escape(setting)}: expected"):
        Config(**changes)


def test_max_grad_norm_may_be_infinite():
    assert Config(train=TrainConfig(max_grad_norm=math.inf)).train.max_grad_norm == math.inf
