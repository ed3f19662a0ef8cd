"""Every example runs, on tiny pipelines of the real classes that are saved in a folder as a real model is."""

import csv
import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from servers import OpenAIServer
from tiny import tiny_cogvideox, tiny_config, tiny_ltx, tiny_wan, write_scores

from halo_fast import GranDPO, PatchGrid, gran_dpo
from halo_fast.data import read_clip, write_clip
from halo_fast.families import family_of
from halo_fast.pipeline.config import to_yaml
from halo_fast.pipeline.run import Run
from halo_fast.pipeline.stages.cache import build_cache
from halo_fast.pipeline.stages.generate import generate
from halo_fast.pipeline.stages.pairs import build_pairs
from halo_fast.train import TrainConfig, fit

EXAMPLES = Path(__file__).parents[2] / "examples"
PROMPTS = ("a red ball rolls left", "a cube jumps")
GRID = (3, 2, 2)
SIDES = ("chosen", "rejected")


def example(name):
    """The example as a module."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def clips(tmp_path):
    """Four clips with prompts beside them, two of each prompt; the second of a pair is darker."""
    folder, generator = tmp_path / "clips", torch.Generator().manual_seed(0)
    folder.mkdir()
    for number in range(4):
        video = torch.randint(0, 256, (9, 32, 32, 3), dtype=torch.uint8, generator=generator)
        write_clip(folder / f"{number}.mp4", video // (1 + number % 2), 8)
        (folder / f"{number}.txt").write_text(f"{PROMPTS[number // 2]}\n")
    return folder


@pytest.fixture
def pairs(clips):
    """pairs.jsonl of these clips, with patch scores."""
    generator = torch.Generator().manual_seed(1)
    rows = [
        {"prompt": prompt, "chosen": f"{2 * number}.mp4", "rejected": f"{2 * number + 1}.mp4"}
        | {
            f"{side}_patches": (torch.rand(GRID, generator=generator) * 4 + 1).tolist()
            for side in ("chosen", "rejected")
        }
        for number, prompt in enumerate(PROMPTS)
    ]
    (clips / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return clips / "pairs.jsonl"


@pytest.fixture
def saved(tmp_path):
    """Saves a pipeline and gives its folder."""

    def save(pipeline):
        pipeline.save_pretrained(tmp_path / "model")
        return str(tmp_path / "model")

    return save


@pytest.mark.parametrize("name, build", [
    ("diffusers_wan_lora", tiny_wan), ("diffusers_cogvideox_lora", tiny_cogvideox),
    pytest.param("diffusers_cogvideox_lora", lambda: tiny_cogvideox(rotary=False), id="cogvideox-2b"),
])  # fmt: skip
def test_plain_loops_start_at_log_2_and_write_a_lora_that_loads(name, build, pairs, saved, tmp_path):
    model = saved(build())
    torch.manual_seed(0)
    losses = example(name).main(
        pairs, model, tmp_path / "lora", steps=6, learning_rate=1e-2, rank=4, objective="halo", dtype="float32"
    )
    assert losses[0] == pytest.approx(2 * math.log(2), abs=1e-4)
    assert sum(losses[1:]) / 5 < losses[0] and all(math.isfinite(loss) for loss in losses)
    pipeline = DiffusionPipeline.from_pretrained(model)
    before = {key: value.clone() for key, value in pipeline.transformer.state_dict().items()}
    pipeline.load_lora_weights(tmp_path / "lora")
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    after = pipeline.transformer.state_dict()
    assert {key for key in before if not torch.equal(before[key], after[key])} == {
        key for key in before if key.endswith(("to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight"))
    }


def test_the_wan_loop_normalises_latents_as_the_family_does(pairs):
    pipeline = tiny_wan()
    row = json.loads(pairs.read_text().splitlines()[0])
    latents, prompt, patches = example("diffusers_wan_lora").encode(pipeline, row, pairs.parent)
    family = family_of(pipeline)
    videos = torch.stack([read_clip(pairs.parent / row[side]) for side in ("chosen", "rejected")])
    torch.testing.assert_close(latents, family.encode(videos))
    known = family.encode_prompts([row["prompt"]])[0]["prompt_embeds"]
    torch.testing.assert_close(prompt[0, : len(known)], known)
    assert prompt[0, len(known) :].abs().max() == 0 and patches.shape == (2, *GRID)


def test_the_wan_loop_takes_videos_without_patch_scores(pairs, saved, tmp_path):
    rows = [{name: json.loads(line)[name] for name in ("prompt", "chosen", "rejected")} for line in pairs.open()]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    losses = example("diffusers_wan_lora").main(
        pairs, saved(tiny_wan()), tmp_path / "lora", steps=2, rank=4, objective="halo", dtype="float32"
    )
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4)


def test_trl_style(pairs, saved, tmp_path):
    log = example("trl_style").main(
        pairs, saved(tiny_wan()), tmp_path / "out", steps=12, learning_rate=1e-2, rank=4, batch_size=2, dtype="float32"
    )
    first = next(row for row in log if "rewards/margins" in row)
    assert first["rewards/accuracies"] == 0.5 and first["rewards/margins"] == pytest.approx(0, abs=1e-3)
    assert [row for row in log if row.get("step") == 10]
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_one_sample_at_a_time_has_the_gradient_of_the_pair(pairs, saved):
    found = example("one_sample_at_a_time").main(pairs, saved(tiny_ltx()), rank=4, dtype="float32")
    assert found["loss"] == pytest.approx(found["other_loss"], rel=1e-5) and found["loss"] != 2 * math.log(2)
    assert found["difference"] < 1e-4


def test_cached_reference(pairs, saved, tmp_path):
    module, model, file = example("cached_reference"), saved(tiny_cogvideox()), tmp_path / "reference.safetensors"
    settings = {"draws": 2, "steps": 4, "learning_rate": 1e-2, "rank": 4, "dtype": "float32"}
    torch.manual_seed(0)
    first = module.main(pairs, model, file, **settings)
    assert first[0] == pytest.approx(2 * math.log(2), abs=1e-4)
    written = file.stat().st_mtime_ns
    torch.manual_seed(0)
    assert module.main(pairs, model, file, **settings) == first and file.stat().st_mtime_ns == written


def test_reward_from_ratings_then_scores_and_pictures(clips, tmp_path):
    with (clips / "ratings.csv").open("w", newline="") as table:
        writer = csv.writer(table)
        writer.writerow(["video", "prompt", "visual_quality", "text_alignment"])
        writer.writerows([f"{number}.mp4", PROMPTS[number // 2], 5 - 3 * (number % 2), ""] for number in range(4))
    history = example("train_reward_from_ratings").main(
        clips / "ratings.csv", tmp_path / "reward", frames=9, height=32, width=32, grid=GRID, video_steps=3,
        pretrained=False,
    )  # fmt: skip
    assert len(history) == 3
    rows = example("score_my_clips").main(clips, tmp_path / "reward", grid=GRID)
    assert [row["clip"] for row in rows] == ["0.mp4", "1.mp4", "2.mp4", "3.mp4"]
    assert all(1 <= row["visual_quality"] <= 5 and 1 <= row["worst_patch"] <= 5 for row in rows)
    assert list(csv.DictReader((clips / "scores.csv").open()))[0]["clip"] == "0.mp4"
    assert Image.open(clips / "3.png").size == (64, 32)


def test_the_patch_map_is_red_where_the_patch_is_weak():
    scores = torch.full(GRID, 5.0)
    scores[1, 0, 1] = 1.0
    picture = example("score_my_clips").draw_map(
        torch.zeros(9, 32, 32, 3, dtype=torch.uint8), scores, PatchGrid(GRID, 9, 32, 32)
    )
    red = torch.from_numpy(np.array(picture)).float()[..., 0]
    assert red[:16, 48:].min() == red.max() == 154 and red.sum() == 154 * 16 * 16


def test_label_with_gpt4o_pays_once(clips, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-not-a-real-key")
    with OpenAIServer() as server:
        rows = example("label_with_gpt4o").main(clips, grid=GRID, base_url=server.url)
        asked = len(server.requests)
        assert example("label_with_gpt4o").main(clips, grid=GRID, base_url=server.url) == rows
        assert len(server.requests) == asked
    assert [row["status"] for row in rows] == ["ok"] * 4
    assert all(len(row["patches"]["quality"]) == math.prod(GRID) for row in rows)
    assert [json.loads(line)["clip"] for line in (clips / "labels.jsonl").open()] == [row["clip"] for row in rows]


def test_label_with_vllm_gives_pairs_that_a_training_example_reads(clips, saved, tmp_path):
    rows = [{"prompt": prompt, "a": f"{2 * k + 1}.mp4", "b": f"{2 * k}.mp4"} for k, prompt in enumerate(PROMPTS)]
    (clips / "candidates.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with OpenAIServer() as server:
        found = example("label_with_vllm").main(clips / "candidates.jsonl", base_url=server.url)
    # that server likes the brighter clip
    assert [(pair["chosen"], pair["rejected"]) for pair in found] == [("0.mp4", "1.mp4"), ("2.mp4", "3.mp4")]
    losses = example("diffusers_wan_lora").main(
        clips / "pairs.jsonl", saved(tiny_wan()), tmp_path / "lora", steps=1, rank=4, dtype="float32"
    )
    assert math.isfinite(losses[0])


def test_a_judge_that_always_says_first_gives_no_pair(clips):
    row = {"prompt": PROMPTS[0], "a": "0.mp4", "b": "1.mp4"}
    (clips / "candidates.jsonl").write_text(json.dumps(row) + "\n")
    with OpenAIServer(biased=True) as server:
        assert example("label_with_vllm").main(clips / "candidates.jsonl", base_url=server.url) == []


def test_own_model_learns():
    log = example("own_model").main()
    assert log[0]["patch/accuracies"] == 0.5
    assert log[-1]["patch/accuracies"] > 0.6 and log[-1]["loss"] < log[0]["loss"]


def test_own_objective_is_ipo_on_patches_and_trains(monkeypatch):
    module = example("own_objective")
    losses = module.main()
    assert losses[0] == pytest.approx(1.0) and losses[-1] < 0.1
    generator = torch.Generator().manual_seed(3)
    policy, target, reference = (torch.randn(4, 2, 3, 4, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    rewards, gradients = torch.randint(1, 4, (4, 3, 2, 2), generator=generator).double(), []
    # the library's own: 4 (z - 1/2)^2 with z = beta / 2 times the gap
    known = GranDPO(video_weight=0.0, patch_weight=4.0, patch_beta=10.0, patch_gamma=0.0, link="ipo")
    for objective in (module.PatchIPO(scale=10.0), known):
        moved = policy.clone().requires_grad_()
        out = gran_dpo(moved, target, reference, rewards, objective=objective)
        out.loss.backward()
        gradients.append((out.loss.detach(), moved.grad))
    assert gradients[0][0] > 0
    torch.testing.assert_close(gradients[0][1], gradients[1][1])
    monkeypatch.syspath_prepend(EXAMPLES)
    config = TrainConfig(
        max_train_steps=2, train_batch_size=2, gradient_accumulation_steps=1, rank=2, gradient_checkpointing="none",
        mixed_precision="no", objective={"preset": "own_objective:PatchIPO", "scale": 5.0},
    )  # fmt: skip
    own = example("own_model")
    assert fit(own.MyModel(), own.make_pairs(4), config).log[0]["loss"] == pytest.approx(1.0)


@pytest.mark.slow
def test_multi_gpu_with_two_processes(tmp_path):
    config = tiny_config(tmp_path, max_train_steps=2, train_batch_size=1, heldout_share=0.0)
    run = Run(config)
    generate(config, run)
    write_scores(run)
    build_pairs(config, run)
    build_cache(config, run)
    (tmp_path / "mine.yaml").write_text(to_yaml(config))
    program = tmp_path / "bin" / "accelerate"  # as pip installs it, for this very Python
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m accelerate.commands.accelerate_cli "$@"\n')
    program.chmod(0o755)
    environment = os.environ | {
        "GPUS": "2", "STAGE": "train", "FSDP": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1", "PORT": "0", "PATH": f"{program.parent}:{os.environ['PATH']}",
    }  # fmt: skip
    done = subprocess.run(
        [EXAMPLES / "multi_gpu.sh", tmp_path / "mine.yaml"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 x" in done.stderr
    assert (run.path / "train" / "lora" / "pytorch_lora_weights.safetensors").exists()


def test_every_example_has_a_test():
    names = {file.name for file in EXAMPLES.iterdir() if file.suffix in (".py", ".sh")}
    text = Path(__file__).read_text()
    assert {name for name in names if name.split(".")[0] not in text} == set()
    assert {name for name in names if f"({name})" not in (EXAMPLES / "README.md").read_text()} == set()
    assert shutil.which("bash") and subprocess.run(["bash", "-n", EXAMPLES / "multi_gpu.sh"]).returncode == 0
