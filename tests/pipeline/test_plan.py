"""halo plan and halo doctor --write as a new user calls them."""

import re

import pytest
import yaml
from tiny import tiny_wan

from halo_fast.families.sampling import GenerateConfig, sampling_steps
from halo_fast.pipeline import cli
from halo_fast.pipeline.arguments import load_config
from halo_fast.pipeline.plan import SHARE, plan_text, predict
from halo_fast.train.devices import find_device, fits
from halo_fast.train.predicted import SUPERVISED


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model's folder without its weights: configurations and tokenizer alone."""
    path = tmp_path_factory.mktemp("model")
    tiny_wan().save_pretrained(path)
    weights = list(path.rglob("*.safetensors"))
    for file in weights:
        file.unlink()
    assert weights
    return path


SETTINGS = {
    "prompts": "prompts.txt", "evaluation_prompts": "heldout.txt", "grid": [2, 2, 2], "train": {"rank": 4},
    "generate": {"num_frames": 9, "height": 64, "width": 64, "num_inference_steps": 5},
    "annotate": {"teacher": "openai", "openai": {"budget": 9.0}},
}  # fmt: skip


@pytest.fixture
def config(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("".join(f"a cube jumps {index} times\n" for index in range(10)))
    (tmp_path / "heldout.txt").write_text("a ball\na red cube\n")
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(SETTINGS | {"pretrained_model_name_or_path": str(folder)}))
    return "my.yaml"


def numbers(text, line):
    """The words of the line that begins so."""
    (found,) = [row for row in text.splitlines() if row.startswith(line)]
    return found[len(line) :].split()


def test_plan_needs_configurations_alone_and_names_every_part(config, capsys, tmp_path):
    assert cli.main(["plan", config, "--device", "H100"]) == 0
    out = capsys.readouterr().out
    for words in ("transformer", "text_encoder", "vae", "batched, selective", "margin_first, full", "fine-tuning, none",
                  "least work that fits h100: --train.schedule batched --train.gradient_checkpointing none",
                  "sampling (generate, evaluate)", "teacher: 20 clips,"):  # fmt: skip
        assert words in out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["heldout.txt", "my.yaml", "prompts.txt"]
    # 3 x 8 x 8 latents of 4 float32 channels, two clips a prompt; pixels of 3 bytes; two networks, LoRA on 4 x 2 x 2
    assert numbers(out, "latents of the clips") == ["3", "KiB", "60", "KiB"]
    assert numbers(out, "clips, before compression") == ["108", "KiB", "2.11", "MiB"]
    lora = 4 * 2 * 2 * 4 * 4 * (24 + 24)
    assert numbers(out, "LoRA")[:2] == [f"{lora / 1024:.3g}", "KiB"]
    # operations: two passes in each of five steps, for candidates and for two clips of each evaluation prompt
    one = float(re.search(r"a pass ([\d.e+]+)\.", out)[1])
    for name, passes in (("generate", 10 * 2 * 5 * 2), ("evaluate  ", 2 * 2 * 5 * 2), ("train: reference errors", 80)):
        assert float(numbers(out, name)[0]) == pytest.approx(passes * one, rel=0.02)
    assert f"{SHARE:.0%} of 989.4 TFLOP/s" in out


@pytest.mark.parametrize(
    ("strategy", "steps"), [("independent", 40), ("branched", 10 + 3 * 6), ("guided", 28), ("repair", 28)]
)
def test_candidates_cost_what_the_table_of_strategies_says(strategy, steps):
    """K = 4 candidates of N = 10 steps with s = 0.6: K N, or N + (K - 1) s N, which is also (1 - s) N + K s N."""
    settings = GenerateConfig(
        strategy=strategy, strength=0.6, num_inference_steps=10, num_videos_per_prompt=4
    )  # fmt: skip
    assert sampling_steps(settings) == steps


def test_what_is_not_known_and_what_does_not_fit_is_said(config):
    settings = load_config(config)
    found = predict(
        settings, [("batched", "none", False), ("margin_first", "none", False), (SUPERVISED, "none", False)]
    )
    unknown = load_config(config, {"annotate.teacher": "", "evaluation_prompts": "", "evaluate.num_prompts": None})
    text = plan_text(unknown, found, find_device("24 GiB"))
    assert "no rate is known" in text and "teacher: no estimate, annotate.teacher is not set" in text
    assert numbers(text, "generate")[-1] == "-" and numbers(text, "evaluate  ") == ["prompts", "unknown", "-"]
    later = load_config(config, {"prompts": "later.txt"})
    text = plan_text(later, found, find_device("24 GiB"))
    assert "no prompts yet (later.txt)" in text and numbers(text, "latents of the clips")[-1] == "?"
    poor = load_config(config, {"annotate.openai.budget": "0.01"})
    text = plan_text(poor, found, find_device("512.1 MiB"))
    assert "nothing fits 512.1 MiB: the least is" in text
    assert "teacher: annotate.openai.budget: 20 clips" in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["plan", "my.yaml", "--device", "rtx9"], ["device", "rtx3090, rtx4090", "h100", "'rtx9'"]),
        (["plan", "my.yaml", "--pretrained_model_name_or_path", "someone/model"], ["someone/model", "hf download"]),
        (["plan", "my.yaml", "--generate.num_frames", "8"], ["4k+1 frames", "num_frames 8"]),
        (["plan", "--device", "l4"], ["pretrained_model_name_or_path: required"]),
        (["doctor", "--write"], ["--write"]),
        (["doctor", "--device", "l4"], ["write"]),
        (["doctor", "--write", "my.yaml", "--device", "l4"], ["doctor: my.yaml exists and is kept"]),
        (["doctor", "--write", "new.yaml", "--device", "big"], ["device", "rtx4090", "'big'"]),
        (["doctor", "--write", "new.yaml", "--device", "1 GiB"], ["not even Wan-AI/Wan2.1-T2V-1.3B"]),
        (["doctor", "--write", "nowhere/deep/my.yaml/new.yaml", "--device", "1 GiB"], ["not even"]),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(config, arguments, words, capsys, tmp_path):
    before = (tmp_path / "my.yaml").read_text()
    assert cli.main(arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.count("\n") == 1
    assert all(word in shown.err for word in words), shown.err
    assert not (tmp_path / "new.yaml").exists() and (tmp_path / "my.yaml").read_text() == before


@pytest.mark.slow
@pytest.mark.parametrize("card", ["rtx4090", "h100"])
def test_the_config_that_doctor_writes_fits(card, tmp_path, capsys):
    file = tmp_path / "recipe.yaml"
    assert cli.main(["doctor", "--write", str(file), "--device", card]) == 0
    written = load_config(file)
    train = written.train
    choice = (train.schedule, train.gradient_checkpointing, train.offload_activations)
    assert str(file) in capsys.readouterr().out and written.precision == "bf16"
    found = predict(written, [choice])
    step = found.options[0].step
    assert fits(find_device(card), step.weights, step.training + step.activations)
    assert fits(find_device(card), *found.sampling)
