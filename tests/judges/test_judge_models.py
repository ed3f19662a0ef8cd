"""VideoScore, VideoReward and VideoScore2 against transcriptions of their published processing, on tiny random weights.

The transcriptions are written after the published code: TIGER-AI-Lab/VideoScore examples/run_videoscore.py (MIT),
KlingAIResearch/VideoAlign inference.py, trainer.py, vision_process.py (MIT), TIGER-AI-Lab/VideoScore2 vs2_inference.py.
"""

import hashlib
import json
import math
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import transformers
from PIL import Image
from rewards import tiny_config
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers.models.idefics2.image_processing_pil_idefics2 import Idefics2ImageProcessorPil

import halo_fast.judges
from halo_fast.errors import UserError
from halo_fast.judges.qwen import frame_count, frame_indices, frame_size, video_inputs
from halo_fast.judges.videoreward import VideoReward, videoreward
from halo_fast.judges.videoscore import VideoScore, videoscore
from halo_fast.judges.videoscore2 import VideoScore2, soft_scores, videoscore2

PROMPT = "a red ball"
QUESTIONS = Path(halo_fast.judges.__file__).parent
PIECES = (
    "a",
    " red",
    " ball",
    "\n",
    ":",
    ";",
    ",",
    "-",
    "/",
    " ",
    *"012345",
    "visual",
    " quality",
    "text",
    "to",
    "video",
)
PIECES += (
    " alignment",
    "physical",
    "common",
    "sense",
    " consistency",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
)
PIECES += ("<|vision_end|>", "<|video_pad|>", "<|VQ_reward|>", "<|MQ_reward|>", "<|TA_reward|>")
# tokens of an answer, with the digits between them; no digit is in two places, so each token tells the next
HEADINGS = ("visual quality: ", "; \ntext-to-video alignment: ", ", \nphysical/common-sense consistency: ")
DIGITS = ({"4": 2.0, "1": 1.9}, {"3": 2.0, "2": 1.85}, {"5": 2.0})
# Qwen2-VL's, for one turn of a user
CHAT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% for c in m.content %}{% if c.type == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %}{{ c.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def video(frames: int, height: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(frames)
    return torch.randint(256, (frames, height, width, 3), generator=generator, dtype=torch.uint8)


def pieces() -> transformers.PreTrainedTokenizerFast:
    """A tokenizer of PIECES that gives back what it was given; all else is unknown."""
    vocabulary = {piece: n for n, piece in enumerate(("<pad>", "<s>", "</s>", "<unk>", *PIECES))}
    tokenizer = Tokenizer(WordLevel(vocabulary, "<unk>"))
    tokenizer.pre_tokenizer = Split(Regex(r" ?[a-z]+|[^a-z]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_tokens(list(HEADINGS))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token="</s>", chat_template=CHAT,
        additional_special_tokens=[piece for piece in PIECES if piece.startswith("<|")],
    )  # fmt: skip


def qwen_config(family: str):
    """A tiny config whose patches have the published size, so that frames have."""
    config = tiny_config(family)
    config.vision_config.patch_size = 14
    if family == "qwen2_5_vl":
        config.vision_config.window_size = 56
    config.text_config.vocab_size = 64
    config.video_token_id = pieces().convert_tokens_to_ids("<|video_pad|>")
    config.image_token_id = 60  # never made
    config.text_config.eos_token_id = 2
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = False
    return config


def conversation(tokens: int, question: str) -> str:
    return (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
        + tokens * "<|video_pad|>"
        + f"<|vision_end|>{question}<|im_end|>\n<|im_start|>assistant\n"
    )


def packed(frames: np.ndarray) -> tuple[torch.Tensor, list[int]]:
    """Qwen's order of patches by loops: frames [F, H, W, 3], F even -> rows of a patch's tube, and the grid."""
    mean, std = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
    x = ((frames / 255 - mean) / std).transpose(0, 3, 1, 2)
    grid = [len(x) // 2, x.shape[2] // 14, x.shape[3] // 14]
    rows = []
    for t in range(grid[0]):
        for block_y in range(grid[1] // 2):
            for block_x in range(grid[2] // 2):
                for y in (2 * block_y, 2 * block_y + 1):
                    for z in (2 * block_x, 2 * block_x + 1):
                        tube = x[2 * t : 2 * t + 2, :, 14 * y : 14 * y + 14, 14 * z : 14 * z + 14]
                        rows.append(tube.transpose(1, 0, 2, 3).ravel())
    return torch.tensor(np.stack(rows), dtype=torch.float32), grid


# --- VideoScore


@pytest.mark.parametrize(
    ("name", "digest"),
    [
        # examples/run_videoscore.py at github.com/TIGER-AI-Lab/VideoScore
        ("videoscore", "49b386d9ea3003760c983cc258cf4211faf858d58191f95fcfacdf68a8fed2c0"),
        # prompt_template.py of VideoAlign, "detailed_special", and VideoScore2's model card, each blank as there
        ("videoreward", "fdb6309bac618dd0c8b1b589d3a0970a974f7856eecbb355a190b2dce54af700"),
        ("videoscore2", "5884319ab7023043916f135fbfb0547f1ea846a356b01470bc06fa76a6ad20df"),
    ],
)
def test_questions_are_the_published_ones(name, digest):
    assert hashlib.sha256((QUESTIONS / f"{name}.txt").read_bytes()).hexdigest() == digest


@pytest.fixture(scope="module")
def idefics(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("videoscore")
    tokenizer = pieces()
    pictures = Idefics2ImageProcessorPil(size={"shortest_edge": 16, "longest_edge": 32}, do_image_splitting=False)
    processor = transformers.Idefics2Processor(pictures, tokenizer, image_seq_len=3)
    processor.save_pretrained(folder)
    config = tiny_config("idefics2")
    config.text_config.vocab_size = 64
    config.image_token_id = processor.image_token_id
    torch.manual_seed(0)
    transformers.AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    weights = {name: value for name, value in weights.items() if not name.startswith("lm_head")}
    save_file(weights | {"score.weight": torch.randn(5, 32)}, folder / "model.safetensors", {"format": "pt"})
    return folder


def published_videoscore(folder: Path, frames: np.ndarray, most: int) -> list[float]:
    """Frames, question, <image> marks, Idefics2's states, the head at the last token."""
    total = len(frames)
    indices = np.arange(0, total, total / most).astype(int) if total > most else np.arange(total)
    question = (QUESTIONS / "videoscore.txt").read_text().format(text_prompt=PROMPT)
    image = "<fake_token_around_image>" + "<image>" * 3 + "<fake_token_around_image>"
    text = question + (image + " ") * len(indices)
    ids = transformers.AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt").input_ids
    pixels = torch.tensor((frames[indices] / 255 - 0.5) / 0.5, dtype=torch.float32).permute(0, 3, 1, 2)[None]
    weights = load_file(folder / "model.safetensors")
    config = transformers.AutoConfig.from_pretrained(folder)
    network = transformers.Idefics2Model(config).eval()
    network.load_state_dict({name[6:]: value for name, value in weights.items() if name.startswith("model.")})
    mask = torch.ones(1, len(indices), *pixels.shape[-2:], dtype=torch.bool)
    with torch.no_grad():
        state = network(ids, torch.ones_like(ids), pixel_values=pixels, pixel_attention_mask=mask).last_hidden_state
    return (weights["score.weight"] @ state[0, -1]).tolist()


@pytest.mark.parametrize(("frames", "most"), [(5, 48), (7, 3)])
def test_videoscore_is_its_published_processing(idefics, frames, most):
    clip = video(frames, 16, 24)
    found = VideoScore(idefics, "cpu").score(clip, PROMPT, most)
    np.testing.assert_allclose(list(found.values()), published_videoscore(idefics, clip.numpy(), most), atol=1e-5)
    assert list(found) == [
        "visual_quality", "temporal_consistency", "dynamic_degree", "text_alignment", "factual_consistency"
    ]  # fmt: skip


def test_videoscore_as_a_judge(idefics):
    clips = [video(4, 16, 24), video(5, 16, 24)]
    table = videoscore(clips, [PROMPT, PROMPT], 8, "cpu", model=str(idefics))
    assert table.scores[0] == VideoScore(idefics, "cpu").score(clips[0], PROMPT, 48)
    assert table.scores[0] != table.scores[1] and not table.optimised


def test_videoscore_needs_its_head(idefics, tmp_path):
    for file in idefics.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    save_file(weights | {"score.weight": torch.randn(3, 32)}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"videoscore.model: expected a head of 5 scores"):
        VideoScore(tmp_path, "cpu")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="videoscore.model: expected VideoScore in .*empty"):
        VideoScore(tmp_path / "empty", "cpu")


# --- frames of Qwen's models


def smart_nframes(total: int, rate: float, fps: float, floor: bool) -> int:
    """vision_process.py: 4 to 768 frames, a multiple of 2; later versions of qwen-vl-utils round down."""
    count = min(max(total / rate * fps, 4), math.floor(min(768, total) / 2) * 2)
    count = math.floor(min(count, total) / 2) * 2 if floor else round(count / 2) * 2
    return min(count, total)


def smart_resize(height: int, width: int, least: int, most: int) -> tuple[int, int]:
    """vision_process.py, factor 28."""
    h, w = max(28, round(height / 28) * 28), max(28, round(width / 28) * 28)
    if h * w > most:
        beta = math.sqrt((height * width) / most)
        h, w = math.floor(height / beta / 28) * 28, math.floor(width / beta / 28) * 28
    elif h * w < least:
        beta = math.sqrt(least / (height * width))
        h, w = math.ceil(height * beta / 28) * 28, math.ceil(width * beta / 28) * 28
    return h, w


@pytest.mark.parametrize("total", [2, 3, 4, 5, 16, 49, 81, 2000])
@pytest.mark.parametrize("rate", [8, 16, 24.5])
def test_frames_are_counted_as_published(total, rate):
    for fps in (2.0, 8.0):
        assert frame_count(total, rate, fps) == smart_nframes(total, rate, fps, False)
        assert frame_count(total, rate, fps, math.floor) == smart_nframes(total, rate, fps, True)
    count = frame_count(total, rate, 2.0)
    assert frame_indices(total, count) == np.round(np.linspace(0, total - 1, count)).astype(int).tolist()
    with pytest.raises(UserError, match="at least 2 frames, got 1"):
        frame_count(1, rate, 2.0)


@pytest.mark.parametrize("size", [(32, 32), (480, 832), (720, 1280), (1088, 1920), (336, 308), (64, 900)])
def test_frames_are_sized_as_published(size):
    for bounds in ((100352, 200704), (100352, 602112)):
        assert frame_size(*size, *bounds) == smart_resize(*size, *bounds)


def test_frames_are_resized_as_pillow_resizes_them():
    config, (y, x) = qwen_config("qwen2_vl"), np.mgrid[:60, :90]
    # no extremes: Pillow cuts overshoots off after each of its two passes
    waves = 128 + 60 * np.sin(y / 3 + np.arange(6).reshape(2, 3, 1, 1)) * np.cos(x / 4)
    clip = waves.transpose(0, 2, 3, 1).astype(np.uint8)
    inputs = video_inputs(torch.from_numpy(clip), (56, 84), "a", pieces(), config)
    resized = [Image.fromarray(frame).resize((84, 56), Image.Resampling.BICUBIC) for frame in clip]
    expected, grid = packed(np.stack([np.asarray(picture) for picture in resized]).astype(np.float64))
    assert inputs["video_grid_thw"].tolist() == [grid]
    # Pillow computes with 8 bits
    assert (inputs["pixel_values_videos"] - expected).abs().max() < 1.5 / 255 / 0.26


# --- VideoReward


@pytest.fixture(scope="module")
def reward_folders(tmp_path_factory):
    """A tiny VideoReward as published, its base model, and the network with PEFT's own LoRA."""
    folder, base = tmp_path_factory.mktemp("videoreward"), tmp_path_factory.mktemp("base")
    config = qwen_config("qwen2_vl")
    config.save_pretrained(base)
    pieces().save_pretrained(base)
    torch.manual_seed(0)
    network = transformers.Qwen2VLForConditionalGeneration._from_config(config)
    lora = peft.LoraConfig(r=4, lora_alpha=12, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    wrapped = peft.get_peft_model(network, lora).eval()
    head = torch.randn(1, 32)
    old = {}
    for name, value in wrapped.state_dict().items():
        old_name = name.replace("model.model.visual.", "model.visual.").replace("model.language_model.", "model.")
        old[old_name] = value.clone()
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight" in old
    assert "base_model.model.visual.blocks.0.attn.qkv.weight" in old
    (folder / "checkpoint-7").mkdir()
    torch.save(old | {"base_model.model.rm_head.weight": head}, folder / "checkpoint-7" / "model.pth")
    norm = {"VQ_mean": 0.3, "VQ_std": 2.0, "MQ_mean": -0.2, "MQ_std": 1.5, "TA_mean": 0.1, "TA_std": 0.7}
    settings = {
        "data_config": {"fps": 2.0, "max_frame_pixels": 448 * 448, "num_frames": None, "sample_type": "uniform",
                        "prompt_template_type": "detailed_special", "eval_dim": ["VQ", "MQ", "TA"]},
        "model_config": {"model_name_or_path": str(base), "output_dim": 1, "reward_token": "special"},
        "peft_lora_config": {"lora_enable": True, "lora_r": 4, "lora_alpha": 12, "use_rslora": False},
        "inference_config": norm,
    }  # fmt: skip
    (folder / "model_config.json").write_text(json.dumps(settings))
    return folder, wrapped, head, norm


def published_videoreward(network, head: torch.Tensor, norm: dict, frames: np.ndarray) -> list[float]:
    """The embeddings with the clip's in their places, the language model without positions, the head at 3 tokens."""
    pixels, grid = packed(frames.astype(np.float64))
    question = (QUESTIONS / "videoreward.txt").read_text().format(text_prompt=PROMPT)
    tokenizer = pieces()
    ids = tokenizer(conversation(math.prod(grid) // 4, question), return_tensors="pt").input_ids
    model = network.base_model.model.model
    with torch.no_grad():
        embeddings = model.language_model.embed_tokens(ids)
        clip = model.visual(pixels, grid_thw=torch.tensor([grid]))
        clip = clip if isinstance(clip, torch.Tensor) else clip.pooler_output
        place = (ids == tokenizer.convert_tokens_to_ids("<|video_pad|>")).unsqueeze(-1).expand_as(embeddings)
        embeddings = embeddings.masked_scatter(place, clip)
        states = model.language_model(inputs_embeds=embeddings, attention_mask=torch.ones_like(ids)).last_hidden_state
    tokens = [tokenizer.convert_tokens_to_ids(f"<|{name}_reward|>") for name in ("VQ", "MQ", "TA")]
    places = [ids[0].tolist().index(token) for token in tokens]
    rewards = [float(head[0] @ states[0, place]) for place in places]
    named = zip(("VQ", "MQ", "TA"), rewards, strict=True)
    scores = [(reward - norm[f"{name}_mean"]) / norm[f"{name}_std"] for name, reward in named]
    return [*scores, sum(scores)]


def test_videoreward_is_its_published_processing(reward_folders):
    folder, network, head, norm = reward_folders
    clip = video(21, 308, 336)  # at 8 frames a second: six at equal steps, of a size that stays
    chosen = clip[[0, 4, 8, 12, 16, 20]].numpy()
    found = VideoReward(folder, None, "cpu").score(clip, PROMPT, 8)
    assert list(found) == ["visual_quality", "motion_quality", "text_alignment", "overall"]
    np.testing.assert_allclose(list(found.values()), published_videoreward(network, head, norm, chosen), atol=1e-5)


def test_videoreward_out_of_a_folder_of_transformers(reward_folders, tmp_path):
    folder, _, head, _ = reward_folders
    judge = VideoReward(folder, None, "cpu")
    config = judge._network.config
    config.save_pretrained(tmp_path)
    pieces().save_pretrained(tmp_path)
    weights = {f"model.{name}": value.clone() for name, value in judge._network.state_dict().items()}
    save_file(weights | {"rm_head.weight": head}, tmp_path / "model.safetensors", {"format": "pt"})
    clip = video(4, 308, 336)
    plain = videoreward([clip], [PROMPT], 8, "cpu", model=str(tmp_path)).scores[0]
    # without model_config.json, the published means and deviations
    raw = judge.score(clip, PROMPT, 8)
    for name, (mean, deviation), (own_mean, own_deviation) in (
        ("visual_quality", (3.6757, 2.2476), (0.3, 2.0)),
        ("motion_quality", (1.1646, 1.3811), (-0.2, 1.5)),
        ("text_alignment", (2.8105, 2.5121), (0.1, 0.7)),
    ):
        assert plain[name] == pytest.approx((raw[name] * own_deviation + own_mean - mean) / deviation, abs=1e-5)


def test_videoreward_mistakes_are_named(reward_folders, tmp_path):
    folder = reward_folders[0]
    with pytest.raises(UserError, match="expected checkpoint-.*model.pth or .*safetensors"):
        VideoReward(tmp_path, None, "cpu")
    with pytest.raises(UserError, match=r"prompt .*: expected none of <\|VQ_reward\|>"):
        VideoReward(folder, None, "cpu").score(video(4, 308, 336), "a <|VQ_reward|>", 8)
    with pytest.raises(UserError, match="videoreward: expected VideoReward on .*nowhere"):
        VideoReward(folder, str(tmp_path / "nowhere"), "cpu")
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="expected VideoReward's rm_head.weight"):
        VideoReward(tmp_path, None, "cpu")


# --- VideoScore2


def answer_inputs(frames: np.ndarray, config) -> dict[str, torch.Tensor]:
    pixels, grid = packed(frames.astype(np.float64))
    question = (QUESTIONS / "videoscore2.txt").read_text().format(text_prompt=PROMPT)
    ids = pieces()(conversation(math.prod(grid) // 4, question), return_tensors="pt").input_ids
    return {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values_videos": pixels,
        "video_grid_thw": torch.tensor([grid]), "second_per_grid_ts": torch.tensor([1.0]),
        "mm_token_type_ids": torch.where(ids == config.video_token_id, 2, 0).int(),
    }  # fmt: skip


@pytest.fixture(scope="module")
def writer(tmp_path_factory) -> Path:
    """A tiny Qwen2.5-VL, random but for its words: it answers in the right form, with digits that it is unsure of."""
    folder = tmp_path_factory.mktemp("videoscore2")
    config = qwen_config("qwen2_5_vl")
    torch.manual_seed(0)
    network = transformers.Qwen2_5_VLForConditionalGeneration._from_config(config)
    tokenizer = pieces()
    with torch.no_grad():
        for layer in network.model.language_model.layers:  # so that the clip and the prompt count
            for part in (*layer.self_attn.children(), *layer.mlp.children()):
                if isinstance(part, torch.nn.Linear):
                    part.weight *= 3
        chain = [
            {"\n": 2.0},
            {HEADINGS[0]: 2.0},
            DIGITS[0],
            {HEADINGS[1]: 2.0},
            DIGITS[1],
            {HEADINGS[2]: 2.0},
            DIGITS[2],
        ]
        embeddings, words = network.get_input_embeddings().weight, network.lm_head.weight
        place = 0
        for current, following in zip(chain, [*chain[1:], {"</s>": 2.0}], strict=True):
            for token in current:
                embeddings[tokenizer.convert_tokens_to_ids(token)] = torch.eye(32)[place]
                for other, strength in following.items():
                    words[tokenizer.convert_tokens_to_ids(other), place] = strength
                place += 1
    network.generation_config.eos_token_id, network.generation_config.pad_token_id = 2, 0
    network.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def published_videoscore2(folder: Path, frames: np.ndarray, seed: int) -> tuple[str, list[float]]:
    """Sampled answer; each score the likeliest of five digits times its share of their probability."""
    network = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    inputs = answer_inputs(frames, network.config)
    torch.manual_seed(seed)
    made = network.generate(
        **inputs, max_new_tokens=1024, output_scores=True, return_dict_in_generate=True, do_sample=True, temperature=0.7
    )
    answer = made.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    text, scores = tokenizer.decode(answer), []
    for heading in ("visual quality:", "text-to-video alignment:", "physical/common-sense consistency:"):
        end = text.index(heading) + len(heading)
        while not text[end].isdigit():
            end += 1
        step = next(n for n in range(len(answer)) if tokenizer.decode(answer[: n + 1]) == text[: end + 1])
        chances = [
            math.exp(torch.log_softmax(made.scores[step][0], dim=-1)[tokenizer.convert_tokens_to_ids(digit)])
            for digit in "12345"
        ]
        scores.append((1 + chances.index(max(chances))) * max(chances) / sum(chances))
    return text, scores


def test_videoscore2_is_its_published_processing(writer):
    clip = video(4, 308, 336)
    text, expected = published_videoscore2(writer, clip.numpy(), seed=3)
    assert text.startswith("visual quality: ")
    judge = VideoScore2(writer, "cpu")
    found = judge.score(clip, PROMPT, 8, 3)
    np.testing.assert_allclose(list(found.values()), expected, atol=1e-5)
    assert list(found) == ["visual_quality", "text_alignment", "physical_consistency"]
    others = judge.score(video(5, 308, 336)[:4], PROMPT, 8, 3), judge.score(clip, "a ball", 8, 3)
    assert min(abs(other["visual_quality"] - found["visual_quality"]) for other in others) > 1e-4
    table = videoscore2([clip], [PROMPT], 8, "cpu", model=str(writer), seed=3)
    assert table.scores[0] == found
    # what is drawn elsewhere is not moved
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    judge.score(clip, PROMPT, 8, 3)
    assert torch.equal(torch.rand(1), expected)


def test_videoscore2s_answers_are_read_with_words_after_their_headings():
    tokenizer = pieces()

    def read(text: str) -> list[float]:
        answer = tokenizer(text, return_tensors="pt").input_ids[0]
        logits = [torch.full((1, 64), -30.0).index_fill(1, number.view(1), 0.0) for number in answer]
        return soft_scores(answer, logits, tokenizer)

    released = "visual quality -a: 4\ntext-to-video alignment a red: 3,physical/common-sense consistency: 2"
    assert read(released) == pytest.approx([4, 3, 2], abs=1e-6)
    assert all(math.isnan(score) for score in read("visual quality: 4; text-to-video alignment: 3"))
    assert all(math.isnan(score) for score in read(""))
