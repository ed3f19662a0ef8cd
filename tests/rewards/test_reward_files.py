"""Files that hold no sound reward model, and labels that nothing can be learned from, are refused by name."""

import json
import math
import re
from dataclasses import replace

import huggingface_hub
import pytest
import torch
from moving_shapes import GRID
from rewards import reward_model, tiny_model
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

from halo_fast.errors import UserError
from halo_fast.rewards import LabelledClips, RewardConfig, RewardModel, RewardModelConfig, train_reward_model
from halo_fast.rewards.backbones.vlm.published import published_scores

CONFIG = RewardModelConfig(("visual_quality", "text_alignment"), width=8, pretrained=False)
SHORT = RewardConfig(video_steps=1, patch_steps=1, batch_size=2, pretrained=False, held_out_share=0)


def labelled(prompts: list[str], alignment: list[float] | None = None) -> LabelledClips:
    count = len(prompts)
    videos = torch.randint(256, (count, 9, 32, 32, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    scores = torch.tensor([[3.0, score] for score in alignment or [4.0] * count]).reshape(count, 2)
    return LabelledClips(videos, prompts, scores, torch.full((count, 1, *GRID), 3.0), CONFIG.video_dimensions)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused(tmp_path, value):
    RewardModel(CONFIG).save(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["backbone.trunk.stem.bias"][3] = value
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"model\.safetensors: .*stem\.bias is not finite"):
        RewardModel.load(tmp_path)


def test_weights_of_another_version_are_refused_in_one_line(tmp_path):
    RewardModel(CONFIG).save(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    for name in ("backbone.trunk.stem.bias", "backbone.trunk.stem.weight"):
        weights[name] = weights[name][1:].clone()
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(UserError) as error:
        RewardModel.load(tmp_path)
    message = str(error.value)
    assert re.search(r"stem\.(bias|weight) is \[\d+.*\], which this version has as \[\d+", message)
    assert "`halo reward --force`" in message and "\n" not in message


@pytest.mark.parametrize("pair", [[0.0, 1.0], [-1.0, 0.0], [1.0, math.nan], [1.0], None])
def test_a_calibration_that_no_fit_gives_is_refused(tmp_path, pair):
    RewardModel(CONFIG).save(tmp_path)
    path = tmp_path / "config.json"
    pairs = [[1.0, 0.0]] + [pair] * (pair is not None)  # a pair too few, or one that no fit gives
    path.write_text(json.dumps(json.loads(path.read_text()) | {"video_calibration": pairs}))
    with pytest.raises(UserError, match=r"config\.json: .*video_calibration: expected"):
        RewardModel.load(tmp_path)


def test_no_clips_are_no_batch():
    with pytest.raises(ValueError, match="videos: expected at least one, got none"):
        RewardModel(CONFIG)(torch.zeros(0, 9, 32, 32, 3, dtype=torch.uint8), [], GRID)


@pytest.mark.parametrize(
    ("prompts", "share", "complaint"),
    [
        ([], 0.0, "expected labelled clips, got none"),
        (["a disc"] * 4, 1.0, "reward.held_out_share: expected at least 0 and less than 1, got 1"),
        (["a disc"] * 4, 0.6, "reward.held_out_share: 0.6 of 1 prompts leaves no clip to train on"),
    ],
)
def test_what_leaves_nothing_to_train_on_is_named(prompts, share, complaint):
    with pytest.raises((ValueError, UserError), match=complaint):
        train_reward_model(CONFIG, labelled(prompts), replace(SHORT, held_out_share=share), 0)


def test_rows_of_the_clips_train_as_these_clips_alone(tmp_path):
    data, rows = labelled([f"a disc {number}" for number in range(6)], [1.0, 2.0, 3.0, 4.0, 5.0, 1.5]), [4, 0, 5, 2]
    rows = torch.tensor(rows)
    settings = replace(SHORT, held_out_share=0.25)
    alone, history = train_reward_model(CONFIG, data.select(rows), settings, 3)
    among, same = train_reward_model(CONFIG, data, settings, 3, folder=tmp_path, rows=rows)
    assert among.config == alone.config and among.config.video_calibration and same == history
    assert all(torch.equal(value, alone.state_dict()[name]) for name, value in among.state_dict().items())


@pytest.mark.parametrize("pretrained", [False, True])
def test_prompts_without_words_are_learned_from(pretrained):
    config = replace(CONFIG, pretrained=pretrained)
    model, history = train_reward_model(config, labelled(["", "...", ""]), replace(SHORT, pretrained=pretrained), 0)
    assert math.isfinite(history[-1]["loss"])
    assert model(labelled([""]).videos, ["?!"], GRID).video.isfinite().all()


def test_the_prompt_confidence_of_a_clip_without_a_label_is_the_mean_of_the_others():
    assert labelled(["a"] * 3, [5.0, 2.0, math.nan]).prompt_confidence(torch.arange(3)).tolist() == pytest.approx(
        [1, 0.25, 0.625]
    )
    assert labelled(["a"] * 2, [math.nan] * 2).prompt_confidence(torch.arange(2)).tolist() == [1, 1]
    other = replace(labelled(["a"] * 2), video_dimensions=("visual_quality", "beauty"))
    assert other.prompt_confidence(torch.arange(2)).tolist() == [1, 1]


@pytest.mark.parametrize("family", ["qwen2_vl", "idefics2", "smolvlm"])
def test_a_backbone_without_some_of_its_weights_is_refused(tmp_path, family):
    folder = tiny_model(tmp_path, family)
    weights = load_file(folder / "model.safetensors")
    gone = next(name for name in weights if "layers.1.mlp.up_proj" in name)
    save_file({name: value for name, value in weights.items() if name != gone}, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"reward\.backbone: .*1 of its weights are missing.*layers\.1\.mlp\.up_proj"):
        reward_model(folder)
    words = {name: value for name, value in weights.items() if not name.startswith("lm_head")}
    save_file(words, folder / "model.safetensors")
    reward_model(folder)


def test_videorewards_head_without_its_tokens_is_refused(tmp_path):
    folder = tiny_model(tmp_path, "qwen2_vl")
    weights = load_file(folder / "model.safetensors") | {"rm_head.weight": torch.randn(1, 32)}
    save_file(weights, folder / "model.safetensors")
    reward_model(folder, ("visual_quality",))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    state = json.loads((folder / "tokenizer.json").read_text())
    state["added_tokens"] = [token for token in state["added_tokens"] if "reward" not in token["content"]]
    state["model"]["vocab"] = {w: n for w, n in state["model"]["vocab"].items() if "reward" not in w}
    (folder / "tokenizer.json").write_text(json.dumps(state))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    kept = {"tokenizer_class": config["tokenizer_class"], "pad_token": tokenizer.pad_token, "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(kept))
    with pytest.raises(UserError, match=r"tokenizer with VideoReward's <\|VQ_reward\|>"):
        reward_model(folder, ("visual_quality",))


def test_weights_that_cannot_be_fetched_are_an_error_of_one_line(monkeypatch):
    def fail(*_, **__):
        raise huggingface_hub.errors.LocalEntryNotFoundError("no network\nand nothing kept")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(UserError, match=r"reward\.backbone: expected the weights of some/model.*no network") as caught:
        published_scores("some/model", ("visual_quality",), None, torch.zeros(1, 1))
    assert "\n" not in str(caught.value)
