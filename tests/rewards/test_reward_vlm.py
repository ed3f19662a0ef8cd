"""Vision-language backbones: one sequence gives what a pass a patch gives; published reward models as a start."""

from dataclasses import replace

import pytest
import torch
import transformers
from moving_shapes import GRID
from rewards import FAMILIES, WORDS, reward_model, tiny_model
from safetensors.torch import load_file, save_file

from halo_fast import processes
from halo_fast.errors import UserError
from halo_fast.pipeline.config import Config
from halo_fast.pipeline.preflight import check_required
from halo_fast.rewards import LabelledClips, RewardConfig, RewardModel, RewardModelConfig, train_reward_model
from halo_fast.rewards.backbones.vlm.frames import read_qwen
from halo_fast.rewards.model import chosen_precision
from halo_fast.teachers.rubric import RUBRIC_DIMENSIONS, VIDEO_DIMENSIONS


def clips(count: int = 2, frames: int = 9) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(256, (count, frames, 32, 32, 3), generator=generator, dtype=torch.uint8)


PROMPTS = ["a red disc moves left", "a disc"]


@pytest.mark.parametrize("family", FAMILIES)
def test_one_sequence_gives_what_a_pass_a_patch_gives(tmp_path, family):
    backbone = reward_model(tiny_model(tmp_path, family)).double().backbone
    with torch.no_grad():
        features = backbone.encode(clips(), None)
        video, patches = backbone.logits(features, PROMPTS, GRID)
        torch.testing.assert_close(video, backbone.video_logits(features, PROMPTS), rtol=0, atol=1e-6)
        for index in range(48):
            alone = backbone.patch_logits(features, PROMPTS, GRID, index)
            torch.testing.assert_close(patches.flatten(2)[..., index], alone, rtol=0, atol=1e-6)
        # and it depends on what it should: place, prompt, pixels
        assert patches.flatten(2).std(dim=-1).min() > 1e-6
        other = backbone.logits(features, [PROMPTS[1], PROMPTS[0]], GRID)
        assert (other[0] - video).abs().min() > 1e-9 and (other[1] - patches).abs().mean() > 1e-9
        swapped = backbone.logits(backbone.encode(clips().flip(0), None), PROMPTS, GRID)
        assert (swapped[0] - video).abs().min() > 1e-9


@pytest.mark.parametrize("family", ["qwen2_vl", "idefics2"])
def test_a_clip_is_scored_alike_alone_and_in_a_batch_and_from_its_files(tmp_path, family):
    model = reward_model(tiny_model(tmp_path / "base", family))
    with torch.no_grad():
        together = model(clips(), PROMPTS, (2, 2, 2))
        alone = model(clips()[1:], PROMPTS[1:], (2, 2, 2))
        torch.testing.assert_close(alone.patches[0], together.patches[1], rtol=1e-4, atol=1e-4)
        model.save(tmp_path / "saved")
        (tmp_path / "base").rename(tmp_path / "gone")
        again = RewardModel.load(tmp_path / "saved")(clips(), PROMPTS, (2, 2, 2))
    assert torch.equal(again.video, together.video) and torch.equal(again.patches, together.patches)


def test_qwen_frames_are_packed_as_its_processor_packs_them(tmp_path):
    model = reward_model(tiny_model(tmp_path, "qwen2_vl")).backbone.network
    packed = []
    model.model.visual.register_forward_pre_hook(lambda _, arguments: packed.append(arguments[0]))
    read_qwen(model, clips(1, 1), 224)
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    processor = Qwen2VLImageProcessorPil(
        patch_size=8, merge_size=2, temporal_patch_size=2, size={"shortest_edge": 1, "longest_edge": 10**6}
    )
    expected = processor(clips(1, 1)[0, 0].numpy(), return_tensors="pt").pixel_values
    torch.testing.assert_close(packed[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_qwen_positions_are_the_models_own(tmp_path, family):
    backbone = reward_model(tiny_model(tmp_path, family)).backbone
    features = backbone.encode(clips(1), None)
    steps, rows, columns = features.maps.shape[2:]
    kinds = torch.tensor([[2] * (steps * rows * columns) + [0] * 4])
    own, _ = backbone.network.model.get_rope_index(
        torch.ones_like(kinds), kinds, video_grid_thw=torch.tensor([[steps, 2 * rows, 2 * columns]])
    )
    position, _ = backbone.prefix_positions(features, 4)
    assert position.shape == own.shape
    assert torch.equal(position[1:], own[1:])
    assert torch.equal(position[0, 0].diff().sign(), own[0, 0].diff().sign())


def test_videoscore_starts_from_its_published_head(tmp_path):
    folder = tiny_model(tmp_path, "idefics2")
    weights = load_file(folder / "model.safetensors")
    weights = {name: value for name, value in weights.items() if not name.startswith("lm_head")}
    head = torch.randn(5, 32)
    save_file(weights | {"score.weight": head}, folder / "model.safetensors", {"format": "pt"})
    model = reward_model(folder, RUBRIC_DIMENSIONS)
    published = ["visual quality", "temporal consistency", "dynamic degree", "text alignment", "factual consistency"]
    rows = [published.index(name.replace("_", " ")) for name in RUBRIC_DIMENSIONS]
    torch.testing.assert_close(model.backbone.head[:5].data, head[rows])
    decoder = model.backbone.network.get_decoder().layers[0].self_attn.q_proj.weight
    torch.testing.assert_close(decoder.data, weights["model.text_model.layers.0.self_attn.q_proj.weight"])


def test_videoreward_starts_from_its_reward_tokens_under_its_published_names(tmp_path):
    folder = tiny_model(tmp_path, "qwen2_vl")
    original = transformers.AutoModelForImageTextToText.from_pretrained(folder).state_dict()
    published = {f"base_model.model.{name}": value for name, value in load_file(folder / "model.safetensors").items()}
    assert "base_model.model.visual.blocks.0.attn.qkv.weight" in published
    head = torch.randn(1, 32)
    published |= {"base_model.model.rm_head.weight": head}
    save_file(published, folder / "model.safetensors", {"format": "pt"})
    model = reward_model(folder, ("visual_quality", "dynamic_degree", "text_alignment")).backbone
    for name, value in model.network.state_dict().items():
        torch.testing.assert_close(value, original[name])
    embedded = original["model.language_model.embed_tokens.weight"]
    rows = [model.tokenizer.convert_tokens_to_ids(word) for word in WORDS[6:9]]
    torch.testing.assert_close(model.queries[:3].data, embedded[rows])
    torch.testing.assert_close(model.head[1].data, head[0] / 1.3811)
    other = reward_model(folder, VIDEO_DIMENSIONS).backbone
    torch.testing.assert_close(other.queries[1:3].data, embedded[[rows[2], rows[1]]])


def test_a_score_that_the_published_model_lacks_is_logged(tmp_path, caplog):
    folder = tiny_model(tmp_path, "idefics2")
    weights = load_file(folder / "model.safetensors") | {"score.weight": torch.randn(5, 32)}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    head = reward_model(folder, ("beauty", "text_alignment")).backbone.head
    torch.testing.assert_close(head[1].data, weights["score.weight"][3])
    assert "does not score beauty" in caplog.text
    save_file(weights | {"score.weight": torch.randn(3, 32)}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="head of 5 scores"):
        reward_model(folder, ("text_alignment",))


@pytest.mark.parametrize("rank", [0, 2])
def test_training_moves_the_language_model_or_its_adapter_and_lowers_the_loss(tmp_path, rank):
    folder = tiny_model(tmp_path, "smolvlm")
    scores = torch.tensor([5.0, 1.0, 5.0, 1.0])
    videos = clips(4)
    videos[::2] //= 4  # the dark ones are the good ones
    data = LabelledClips(
        videos,
        PROMPTS * 2,
        scores[:, None],
        scores.view(4, 1, 1, 1, 1).expand(4, 1, 1, 2, 2).clone(),
        ("visual_quality",),
    )
    config = RewardConfig(video_steps=10, patch_steps=20, batch_size=4, learning_rate=5e-3, held_out_share=0)
    model, history = train_reward_model(
        RewardModelConfig(("visual_quality",), backbone=str(folder), lora_rank=rank), data, config, 0
    )
    assert history[-1]["patch_loss"] < 0.5 * history[10]["patch_loss"]
    before = reward_model(folder, ("visual_quality",), rank).backbone.network.state_dict()
    moved = {
        name for name, value in model.backbone.network.state_dict().items() if not torch.equal(value, before[name])
    }
    assert moved and not any("vision" in name or "connector" in name for name in moved)
    assert all(("lora" in name) == bool(rank) for name in moved)


def test_what_is_no_vision_language_model_is_named(tmp_path):
    with pytest.raises(UserError, match=r"reward\.backbone"):
        reward_model(tmp_path)


@pytest.mark.parametrize(("family", "rank"), [(family, 3) for family in FAMILIES] + [("qwen2_vl", None)])
def test_a_frozen_language_model_in_bf16(tmp_path, family, rank):
    folder = tiny_model(tmp_path / "base", family, wide=True)
    model, plain = (reward_model(folder, rank=rank, precision=precision) for precision in ("bf16", "fp32"))
    language, generator = plain.backbone.network.get_decoder(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_B" in name:  # a fresh LoRA changes nothing
                value.copy_(0.1 * torch.randn(value.shape, generator=generator))
        frozen = {id(value) for value in model.backbone.network.get_decoder().parameters() if not value.requires_grad}
        for name, value in model.named_parameters():
            assert value.dtype == (torch.bfloat16 if id(value) in frozen else torch.float32), name
            assert id(value) not in frozen or torch.equal(value, plain.get_parameter(name).bfloat16()), name
        plain.load_state_dict(model.state_dict())
    assert len(frozen) == sum(not value.requires_grad for value in language.parameters()) > 20
    videos = torch.randint(256, (2, 9, 32, 32, 3), generator=generator, dtype=torch.uint8)
    found, computed = [], []

    def draw(shape: torch.Size) -> torch.Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    language_layer = model.backbone.network.get_decoder().layers[1].mlp
    language_layer.register_forward_hook(lambda layer, given, output: computed.append(output.dtype))
    for one in (plain.double().backbone, model.backbone):
        trained = {name: value for name, value in one.named_parameters() if value.requires_grad}
        video, patches = one.logits(one.encode(videos, None), ["a red disc moves left", "a disc"], (2, 2, 2))
        # linear, because a logit of a fresh head is near 1 at most and may be near 0
        loss = (video * draw(video.shape)).sum() + (patches * draw(patches.shape)).sum()
        found.append(
            {"video": video, "patches": patches}
            | dict(zip(trained, torch.autograd.grad(loss, [*trained.values()]), strict=True))
        )
    truth, values = found
    assert set(computed) == {torch.bfloat16} and {value.dtype for value in values.values()} == {torch.float32}
    assert (rank is None) == (not any("lora_" in name for name in values))
    # sixteen roundings to 8 bits; what is left out or misplaced is off by far more
    for name in ("video", "patches"):
        assert (values.pop(name) - truth.pop(name)).abs().max() <= 2**-4, name
    whole, exact = (torch.cat([value.double().flatten() for value in one.values()]) for one in (values, truth))
    assert (whole - exact).norm() <= 2**-4 * exact.norm()
    for name, value in values.items():
        assert torch.cosine_similarity(value.double().flatten(), truth[name].flatten(), dim=0) >= 0.98, name


def test_a_model_in_bf16_scores_alike_from_its_files(tmp_path):
    folder = tiny_model(tmp_path / "base", "qwen2_vl")
    config = RewardModelConfig(("visual_quality",), backbone=str(folder), lora_rank=2, precision="bf16")
    scores = torch.tensor([5.0, 1.0, 4.0, 2.0])
    videos = torch.randint(256, (4, 9, 32, 32, 3), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    patches = scores.view(4, 1, 1, 1, 1).expand(4, 1, 2, 2, 2).clone()
    data = LabelledClips(videos, ["a red disc", "a disc"] * 2, scores[:, None], patches, ("visual_quality",))
    short = RewardConfig(video_steps=2, patch_steps=2, batch_size=2, learning_rate=5e-3, held_out_share=0)
    model, _ = train_reward_model(config, data, short, 0)
    model.save(tmp_path / "saved")
    (tmp_path / "base").rename(tmp_path / "gone")
    loaded = RewardModel.load(tmp_path / "saved")
    assert loaded.config.precision == "bf16"
    for rewards in zip(*(one(videos, data.prompts, (2, 2, 2)) for one in (model, loaded)), strict=True):
        assert torch.equal(*rewards)
    # a start in float32 or bfloat16 may be trained on in the other
    start = RewardConfig(video_steps=0, patch_steps=0, held_out_share=0, start=str(tmp_path / "saved"))
    (tmp_path / "gone").rename(tmp_path / "base")
    plain, _ = train_reward_model(replace(config, precision="fp32"), data, start, 0)
    weight = "backbone.network.model.language_model.layers.0.mlp.up_proj.base_layer.weight"
    assert torch.equal(plain.get_parameter(weight), model.get_parameter(weight).float())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"backbone": "compact"},
            "bf16 is for vision-language models, and reward.backbone 'compact' is none; set fp32",
        ),
        ({"backbone": "some/model"}, "bf16 freezes the language model, and reward.lora_rank 0 trains it; set fp32"),
        (
            {"backbone": "some/model", "lora_rank": 4, "quantization": "torchao_int8"},
            "bf16 and reward.quantization torchao_int8 exclude each other; set fp32",
        ),
    ],
)
def test_bf16_where_it_cannot_be_is_one_line(settings, message):
    with pytest.raises(UserError, match=rf"reward\.precision: {message}"):
        check_required(Config(reward=RewardConfig(precision="bf16", **settings)), ["reward"])
    with pytest.raises(UserError, match=rf"reward\.precision: {message}"):
        RewardModel(RewardModelConfig(("visual_quality",), precision="bf16", **settings))


@pytest.mark.parametrize(
    ("gpu", "bf16", "settings", "expected"),
    [
        (True, True, {"backbone": "some/model", "lora_rank": 4}, "bf16"),
        (True, True, {"backbone": "some/model", "lora_rank": None}, "bf16"),
        (True, True, {"backbone": "some/model", "lora_rank": 0}, "fp32"),
        (True, True, {"backbone": "some/model", "lora_rank": 4, "quantization": "bnb_nf4"}, "fp32"),
        (True, True, {"backbone": "kernel", "lora_rank": 4}, "fp32"),
        (True, False, {"backbone": "some/model", "lora_rank": 4}, "fp32"),
        (False, True, {"backbone": "some/model", "lora_rank": 4}, "fp32"),
        (True, True, {"backbone": "some/model", "lora_rank": 4, "precision": "fp32"}, "fp32"),
        (False, False, {"backbone": "some/model", "lora_rank": 4, "precision": "bf16"}, "bf16"),
    ],
)
def test_auto_is_bf16_for_frozen_weights_on_a_gpu_that_has_it(monkeypatch, gpu, bf16, settings, expected):
    monkeypatch.setattr(processes, "device", lambda: "cuda:0" if gpu else "cpu")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: bf16)
    assert chosen_precision(RewardConfig(**settings)) == expected
