"""The stage generate: seeds, files, continuation, and mistakes of the user."""

import dataclasses
import json

import pyarrow.parquet
import pytest
import torch
from safetensors.torch import load_file
from tiny import kill_when, output_hashes, tiny_cogvideox, tiny_config

from halo_fast.data import read_clip, write_clip
from halo_fast.data.prompts import read_prompts
from halo_fast.errors import UserError
from halo_fast.families import load
from halo_fast.families.sampling import clip_seed
from halo_fast.pipeline.run import Run
from halo_fast.pipeline.stages import generate as module
from halo_fast.pipeline.stages.generate import generate

KILLED = """
import time, torch
from pathlib import Path
from tiny import tiny_config
from halo_fast.pipeline.stages import generate as module
from halo_fast.pipeline.run import Run
torch.set_num_threads({threads})
config = tiny_config(Path({folder!r}))
config.output_dir = {output!r}
config.generate.num_inference_steps, config.generate.crf = {steps}, None
original, calls = module.sample_clips, []
def third_waits(*args):
    calls.append(args)
    time.sleep(1000 * (len(calls) == 3))  # time to be killed in
    return original(*args)
module.sample_clips = third_waits
module.generate(config, Run(config))
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    config = tiny_config(tmp_path_factory.mktemp("generate"))
    config.generate.num_inference_steps = 20
    config.generate.crf = None
    run = Run(config)
    generate(config, run)
    return config, run.path / "generate"


@pytest.mark.parametrize("crf", [12, 30])
def test_clips_have_the_quality_that_is_set(tmp_path, crf):
    config = tiny_config(tmp_path)
    config.generate.num_prompts, config.generate.crf = 1, crf
    generate(config, Run(config))
    folder = Run(config).path / "generate"
    family = load(config.pretrained_model_name_or_path, device="cpu")
    row = pyarrow.parquet.read_table(folder / "clips.parquet").to_pylist()[0]
    decoded = family.decode(load_file(folder / row["latents"])["latents"][None])[0]
    write_clip(tmp_path / "again.mp4", decoded, config.generate.fps, crf)
    assert (folder / row["video"]).read_bytes() == (tmp_path / "again.mp4").read_bytes()


def test_every_clip_has_its_seed_video_and_latents(made):
    config, folder = made
    rows = pyarrow.parquet.read_table(folder / "clips.parquet").to_pylist()
    assert [row["clip_id"] for row in rows] == [f"p{i:04d}_s{k}" for i in range(4) for k in range(2)]
    assert len({row["seed"] for row in rows}) == 8
    family = load(config.pretrained_model_name_or_path, device="cpu")
    for row in rows[:2]:
        latents = load_file(folder / row["latents"])["latents"]
        video = read_clip(folder / row["video"])
        assert latents.shape == (4, 3, 4, 4) and latents.dtype == torch.float32
        assert (family.decode(latents[None])[0].int() - video.int()).abs().max() <= 2
    assert json.loads((folder / "manifest.json").read_text())["counts"] == {"prompts": 4, "clips": 8}


def test_a_clip_can_be_made_again_from_its_row(made):
    config, folder = made
    rows = pyarrow.parquet.read_table(folder / "clips.parquet").to_pylist()[2:4]
    family = load(config.pretrained_model_name_or_path, device="cpu")
    noise = torch.stack([torch.randn(4, 3, 4, 4, generator=torch.Generator().manual_seed(row["seed"])) for row in rows])
    latents = family.pipeline(
        [row["prompt"] for row in rows], latents=noise, num_frames=9, height=32, width=32, num_inference_steps=20,
        guidance_scale=1.0, output_type="latent", max_sequence_length=12,
    ).frames  # fmt: skip
    for row, expected in zip(rows, latents, strict=True):
        torch.testing.assert_close(load_file(folder / row["latents"])["latents"], expected, rtol=1e-4, atol=1e-4)


def test_killed_and_continued_equals_undisturbed(made, tmp_path, monkeypatch):
    config, folder = made
    output = tmp_path / "run"
    code = KILLED.format(
        threads=torch.get_num_threads(), folder=str(folder.parent.parent), output=str(output), steps=20
    )
    kill_when(code, lambda: len(list(output.glob("generate/videos/p*.mp4"))) >= 3)
    assert not (output / "generate/manifest.json").exists()
    finished = len(list(output.glob("generate/videos/p*.mp4")))
    batches = []
    original = module.sample_clips
    monkeypatch.setattr(module, "sample_clips", lambda *args: batches.append(args) or original(*args))
    config = dataclasses.replace(config, output_dir=str(output))
    generate(config, Run(config))
    assert len(batches) == 4 - finished // 2
    assert output_hashes(output / "generate") == output_hashes(folder)


def test_another_seed_makes_other_clips(made, tmp_path):
    config, folder = made
    other = dataclasses.replace(config, output_dir=str(tmp_path), seed=1)
    other.generate = dataclasses.replace(config.generate, num_prompts=1)
    generate(other, Run(other))
    assert output_hashes(tmp_path / "generate")["latents/p0000_s0.safetensors"] not in output_hashes(folder).values()


def test_run_directory_of_another_config_is_refused(made):
    config, folder = made
    before = output_hashes(folder)
    other = dataclasses.replace(config, generate=dataclasses.replace(config.generate, guidance_scale=2.0))
    with pytest.raises(UserError, match="guidance_scale"):
        generate(other, Run(other))
    assert output_hashes(folder) == before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a ball\n\na cube\n", "prompts: .*prompts.txt line 2 is empty; write a prompt there or remove the line"),
        ("a ball\n   \n", "line 2 is empty"),
        ("", "holds no prompts"),
        (None, "expected a text file with one prompt a line, or .*, got .*No such file"),
        (b"\xff\xfe\x00", "expected a text file with one prompt a line, or .*, got .*codec"),
    ],
)
def test_prompt_file_that_cannot_serve_is_named(tmp_path, text, message):
    path = tmp_path / "prompts.txt"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=message) as caught:
        read_prompts(str(path), 10)
    assert "\n" not in str(caught.value)


def test_prompts_are_taken_from_the_top(tmp_path):
    (tmp_path / "p.txt").write_text("a ball \nzwei Würfel\nthree\n", encoding="utf-8")
    assert read_prompts(str(tmp_path / "p.txt"), 2) == ["a ball", "zwei Würfel"]
    assert len(read_prompts(str(tmp_path / "p.txt"), 10)) == 3
    with pytest.raises(UserError, match="demo:heldout"):
        read_prompts("demo:test", 2)


def test_grid_finer_than_the_latents_is_refused_before_anything_is_made(made, tmp_path):
    config, _ = made
    config = dataclasses.replace(config, output_dir=str(tmp_path / "run"), grid=(3, 8, 8))
    with pytest.raises(UserError, match=r"grid: at most \(3, 4, 4\) patches .* got \(3, 8, 8\)"):
        generate(config, Run(config))
    assert not list(tmp_path.glob("run/generate/videos/*"))


def test_a_grid_whose_first_patch_is_padding_is_refused_before_anything_is_made(made, tmp_path):
    """CogVideoX 1.5 pads three latent frames to four, of which the first shows nothing."""
    config, _ = made
    tiny_cogvideox(patch_size_t=2).save_pretrained(tmp_path / "model")
    config = dataclasses.replace(
        config, output_dir=str(tmp_path / "run"), grid=(4, 2, 2), pretrained_model_name_or_path=str(tmp_path / "model")
    )
    with pytest.raises(UserError, match="grid: grid must have fewer patches along latent frames; got 4, of which"):
        generate(config, Run(config))
    assert not list(tmp_path.glob("run/generate/videos/*"))


def test_seeds_of_clips_do_not_collide():
    seeds = {clip_seed(seed, prompt, candidate) for seed in range(3) for prompt in range(500) for candidate in range(4)}
    assert len(seeds) >= 5990  # of 6000 draws out of 2**32, fewer than one collision is expected
    assert min(seeds) >= 0 and max(seeds) < 2**32


def test_evaluation_prompts_that_are_trained_on_are_counted(made, tmp_path, caplog):
    config, _ = made
    other = tmp_path / "evaluation.jsonl"
    other.write_text('"A cube  jumps"\n"a new one"\n"a red ball rolls left"\n')
    config = dataclasses.replace(config, evaluation_prompts=str(other))
    generate(config, Run(config))
    (message,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "evaluation_prompts: 2 of 3 are among the prompts that are trained on, such as 'A cube jumps'" in message
    caplog.clear()
    other.write_text('"a new one"\n')
    generate(config, Run(config))
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_prompts_that_the_text_encoder_cuts_are_listed_before_anything_is_made(made, tmp_path, caplog, monkeypatch):
    lines = ["a ball", " ".join(["red ball rolls"] * 9), "a cube", " ".join(["over the grass"] * 8)]
    (tmp_path / "prompts.txt").write_text("\n".join(lines))
    config = dataclasses.replace(
        made[0], output_dir=str(tmp_path / "run"), prompts=str(tmp_path / "prompts.txt"), evaluation_prompts=""
    )

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "sample_clips", stop)
    with pytest.raises(KeyboardInterrupt):
        generate(config, Run(config))
    listed = [message for message in caplog.messages if "text encoder" in message]
    assert len(listed) == 3 and "2 of 4 are cut" in listed[2]
    assert "number 2 is longer" in listed[0] and "'red ball rolls" in listed[0] and "number 4 is" in listed[1]
