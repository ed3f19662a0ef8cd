"""Vision-language backbones in 8 or 4 bits, and 8-bit AdamW: scores of the rounded weights, files, kills, errors."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from quantized import BACKENDS, decoded
from rewards import FAMILIES, reward_model, tiny_model
from safetensors.torch import load_file, save_file
from tiny import kill_when

from halo_fast.errors import UserError
from halo_fast.families import quantization
from halo_fast.files import hash_tensors, read_checkpoint
from halo_fast.pipeline.config import Config
from halo_fast.pipeline.preflight import check_required
from halo_fast.rewards import LabelledClips, RewardConfig, RewardModel, RewardModelConfig, train_reward_model
from halo_fast.train import optimizers

pytest.importorskip("bitsandbytes")
pytest.importorskip("torchao")

PROMPTS = ["a red disc moves left", "a disc"]
GRID = (2, 2, 2)
SHORT = RewardConfig(video_steps=2, patch_steps=2, batch_size=2, learning_rate=5e-3, held_out_share=0)


def clips(count: int = 2) -> torch.Tensor:
    return torch.randint(256, (count, 9, 32, 32, 3), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def labelled() -> LabelledClips:
    scores = torch.tensor([5.0, 1.0, 4.0, 2.0])
    patches = scores.view(4, 1, 1, 1, 1).expand(4, 1, *GRID).clone()
    return LabelledClips(clips(4), PROMPTS * 2, scores[:, None], patches, ("visual_quality",))


def config_of(folder: Path | str, backend: str | None = "bnb_nf4", rank: int | None = 2) -> RewardModelConfig:
    return RewardModelConfig(("visual_quality",), backbone=str(folder), lora_rank=rank, quantization=backend)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"), "qwen2_vl", wide=True)


def own_layers(network) -> dict[str, torch.nn.Module]:
    """Linear layers by their names in a network without LoRA."""
    layers = {name: layer for name, layer in network.named_modules() if isinstance(layer, torch.nn.Linear)}
    return {name.removesuffix(".base_layer"): layer for name, layer in layers.items() if "lora_" not in name}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rank", [None, 3])
def test_scores_and_gradients_are_those_of_the_rounded_weights(base, backend, rank):
    model, plain = reward_model(base, rank=rank, quantization=backend), reward_model(base, rank=rank)
    layers, others = own_layers(model.backbone.network), own_layers(plain.backbone.network)
    changed = {name for name, layer in layers.items() if quantization.is_quantized(layer)}
    assert (
        changed == {name for name in layers if name.startswith("model.language_model.layers.")} and len(changed) == 21
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name in changed:
            others[name].weight.copy_(decoded(layers[name], backend))
        for name, value in model.named_parameters():
            if "lora_B" in name:  # a fresh LoRA changes nothing
                value.copy_(0.1 * torch.randn(value.shape, generator=generator))
    assert not plain.load_state_dict(model.state_dict(), strict=False).unexpected_keys
    # 8-bit matrix products of bitsandbytes also round what goes in
    tolerance = 3e-2 if backend == "bnb_int8" else 1e-5
    found = []
    for one in (plain.double().backbone, model.backbone):
        trained = {name: value for name, value in one.named_parameters() if value.requires_grad}
        assert all(("lora_" in name) == name.startswith("network.") for name in trained)
        video, patches = one.logits(one.encode(clips(), None), PROMPTS, GRID)
        loss = video.square().sum() + patches.square().mean()
        found.append(
            {"video": video, "patches": patches}
            | dict(zip(trained, torch.autograd.grad(loss, [*trained.values()]), strict=True))
        )
    truth, values = found
    assert {value.dtype for value in values.values()} == {torch.float32}
    assert rank is None or sum("lora_" in name for name in values) == 2 * len(changed)
    for name, value in values.items():
        assert (value - truth[name]).norm() <= tolerance * truth[name].norm(), name


@pytest.mark.parametrize(
    ("family", "backend"), [("qwen2_vl", name) for name in BACKENDS] + [(name, "bnb_nf4") for name in FAMILIES[1:]]
)
def test_a_trained_model_scores_alike_from_its_files(tmp_path, family, backend):
    folder = tiny_model(tmp_path / "base", family, wide=True)
    settings = replace(SHORT, held_out_share=0.4)  # the model is calibrated, and so has scored, before it is saved
    model, history = train_reward_model(config_of(folder, backend), labelled(), settings, 0)
    assert model.config.video_calibration and len(history) == 4
    fresh = RewardModel(config_of(folder, backend))
    hashes = [sorted(hash_tensors({"": x}) for x in one.backbone.frozen_tensors()) for one in (model, fresh)]
    assert hashes[0] == hashes[1]
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, fresh.state_dict()[name])}
    assert any("lora_B" in name for name in moved) and any(name.endswith("queries") for name in moved)
    rewards = model(clips(), PROMPTS, GRID)
    model.save(tmp_path / "saved")
    (tmp_path / "base").rename(tmp_path / "gone")
    for _ in range(2):
        loaded = RewardModel.load(tmp_path / "saved")
        again = loaded(clips(), PROMPTS, GRID)
        assert torch.equal(again.video, rewards.video) and torch.equal(again.patches, rewards.patches)
        loaded.save(tmp_path / "saved")  # over the files that it was read from
    kept = set(load_file(tmp_path / "saved/model.safetensors"))
    assert kept == {name for name in kept if "lora_" in name or ".network." not in name}
    assert not (tmp_path / "saved/backbone/.part").exists()
    alone = loaded(clips()[1:], PROMPTS[1:], GRID)
    torch.testing.assert_close(alone.patches[0], rewards.patches[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", [None, "torchao_int8"])
def test_the_head_alone_is_trained(base, backend):
    model, _ = train_reward_model(config_of(base, backend, None), labelled(), SHORT, 0)
    fresh = RewardModel(config_of(base, backend, None)).backbone.network
    assert all(map(torch.equal, quantization.plain_tensors(model.backbone.network), quantization.plain_tensors(fresh)))
    torch.manual_seed(0)
    before = RewardModel(config_of(base, backend, None)).state_dict()
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    parts = {f"backbone.{name}" for name in ("queries", "head", "offset", "place.weight", "place.bias")}
    assert moved == parts and (backend is None or set(before) == parts)


KILLED = """
import sys
import time
sys.path.insert(0, {place!r})
from pathlib import Path
import torch
from test_reward_quantized import CASES, config_of, labelled
from halo_fast.rewards import train_reward_model, training
torch.set_num_threads({threads})
take_step = training._take_step
def stopping(*arguments):
    if arguments[-1] == 3:
        Path({marker!r}).touch()
        time.sleep(1000)  # time to be killed in
    return take_step(*arguments)
training._take_step = stopping
settings, backend, rank = CASES[{case!r}]
train_reward_model(config_of({base!r}, backend, rank), labelled(), settings, 0, Path({checkpoint!r}))
"""
STEADY = replace(SHORT, patch_steps=4, checkpointing_steps=2)
CASES = {
    # matrices of 64 x 64 are kept in 8 bits
    "4 bits, moments in 8": (replace(STEADY, optimizer="adamw_8bit"), "bnb_nf4", 64),
    "8 bits, the head alone": (STEADY, "torchao_int8", None),
    "moments in 8": (replace(STEADY, optimizer="adamw_8bit"), None, 0),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_killed_training_ends_with_the_same_bits(base, tmp_path, case):
    settings, backend, rank = CASES[case]
    model, history = train_reward_model(config_of(base, backend, rank), labelled(), settings, 0)
    checkpoint, marker = tmp_path / "checkpoint.safetensors", tmp_path / "marker"
    code = KILLED.format(
        place=str(Path(__file__).parent),
        threads=torch.get_num_threads(),
        marker=str(marker),
        case=case,
        base=str(base),
        checkpoint=str(checkpoint),
    )
    kill_when(code, marker.exists)
    tensors, rest = read_checkpoint(checkpoint)
    assert len(rest["history"]) == 2
    stored = {value.dtype for name, value in tensors.items() if name.startswith("state1.")}
    assert stored == ({torch.uint8, torch.float32} if settings.optimizer == "adamw_8bit" else set())
    continued, rows = train_reward_model(config_of(base, backend, rank), labelled(), settings, 0, checkpoint)
    assert rows == history
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in continued.state_dict().items())
    scores = [one(clips(), PROMPTS, GRID).patches for one in (model, continued)]
    assert torch.equal(*scores)


def test_a_quantised_model_is_trained_on_from_its_folder(base, tmp_path):
    model, _ = train_reward_model(config_of(base), labelled(), SHORT, 0)
    model.save(tmp_path / "first")
    none = replace(SHORT, video_steps=0, patch_steps=0, start=str(tmp_path / "first"))
    again, _ = train_reward_model(config_of(base), labelled(), none, 1)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in again.state_dict().items())
    # a LoRA of another rank starts anew, the head goes on
    wider, _ = train_reward_model(config_of(base, rank=3), labelled(), none, 1)
    assert torch.equal(wider.backbone.head, model.backbone.head)
    for backend, message in (
        (None, "quantization None, .* has bnb_nf4"),
        ("bnb_int8", "quantization bnb_int8, .* has bnb_nf4"),
    ):
        with pytest.raises(UserError, match=rf"reward\.start: expected a model with reward\.{message}"):
            train_reward_model(config_of(base, backend), labelled(), none, 1)
    other = tiny_model(tmp_path / "other", "qwen2_vl", wide=True)
    weights = load_file(other / "model.safetensors")
    name = next(name for name in weights if "layers.1.mlp.up_proj" in name)
    save_file(weights | {name: -weights[name]}, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"reward\.start: .* was trained on another model than .*other"):
        train_reward_model(config_of(other), labelled(), none, 1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"backbone": "compact"}, "is for vision-language models, and reward.backbone 'compact' is none; set null"),
        ({"backbone": "frames"}, "reward.backbone 'frames' is none"),
        ({"backbone": "some/model"}, "bnb_nf4 freezes the language model, and reward.lora_rank 0 trains it"),
    ],
)
def test_settings_that_exclude_each_other_are_one_line(settings, message):
    config = Config(reward=RewardConfig(quantization="bnb_nf4", **settings))
    with pytest.raises(UserError, match=rf"reward\.quantization: .*{message}"):
        check_required(config, ["reward"])
    with pytest.raises(UserError, match=rf"reward\.quantization: .*{message}"):
        RewardModel(RewardModelConfig(("visual_quality",), quantization="bnb_nf4", **settings))
    check_required(replace(config, reward_model="fetv"), ["reward"])


def test_mistakes_are_one_line(base, tmp_path, monkeypatch):
    narrow = tiny_model(tmp_path / "narrow", "qwen2_vl")
    with pytest.raises(
        UserError, match=r"reward\.quantization: bnb_nf4 takes layers with a multiple of 64 inputs, .*32"
    ):
        RewardModel(config_of(narrow))
    RewardModel(config_of(narrow, "torchao_int8"))
    model = RewardModel(config_of(base))
    model.save(tmp_path / "saved")
    for backend, rank in (("bnb_nf4", 2), (None, 0)):
        with pytest.raises(
            UserError, match=r"reward\.backbone: expected a model that is not stored quantised, got .*saved"
        ):
            RewardModel(config_of(tmp_path / "saved/backbone", backend, rank))
    file = tmp_path / "saved/backbone/model.safetensors"
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(UserError, match="saved/backbone"):
        RewardModel.load(tmp_path / "saved")
    file.unlink()
    with pytest.raises(UserError, match="saved/backbone"):
        RewardModel.load(tmp_path / "saved")
    settings = json.loads((tmp_path / "saved/config.json").read_text())
    assert settings["quantization"] == "bnb_nf4" and settings["backbone"] == "backbone"
    with pytest.raises(UserError, match="quantization"):
        Config(reward=RewardConfig(quantization="nf5"))
    monkeypatch.setattr(quantization, "find_spec", lambda name: None)
    monkeypatch.setattr(optimizers, "find_spec", lambda name: None)
    missing = {
        "quantization: torchao_int8 needs torchao, which is not installed; pip install torchao": RewardConfig(
            backbone="some/model", quantization="torchao_int8", lora_rank=None
        ),
        "optimizer: adamw_8bit needs bitsandbytes, which is not installed; pip install bitsandbytes": RewardConfig(
            optimizer="adamw_8bit"
        ),
    }
    for line, reward in missing.items():
        with pytest.raises(UserError) as caught:
            check_required(Config(reward=reward), ["reward"])
        assert str(caught.value) == f"reward.{line}"
    with pytest.raises(UserError, match=r"reward\.optimizer: adamw_8bit needs"):
        train_reward_model(config_of(base), labelled(), replace(SHORT, optimizer="adamw_8bit"), 0)
