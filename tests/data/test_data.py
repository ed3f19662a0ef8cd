"""Clips on disk, pairs and caches."""

import dataclasses
import json

import pyarrow.parquet
import pytest
import torch
from safetensors.torch import load_file
from tiny import finish_again, output_hashes, tiny_config, tiny_wan, write_scores

from halo_fast.data import CachedPairs, read_clip, write_clip
from halo_fast.data.pairs import PairsConfig
from halo_fast.data.tables import ClipRow, ScoreRow, write_rows
from halo_fast.errors import UserError
from halo_fast.families import family_of, load
from halo_fast.families.fingerprint import fingerprint
from halo_fast.families.wan import Wan
from halo_fast.files import write_parquet
from halo_fast.pipeline.run import Run
from halo_fast.pipeline.stages.cache import build_cache
from halo_fast.pipeline.stages.generate import generate
from halo_fast.pipeline.stages.pairs import build_pairs
from halo_fast.train.config import TrainConfig


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    config = tiny_config(tmp_path_factory.mktemp("data"))
    run = Run(config)
    generate(config, run)
    write_scores(run)
    return config, run


def smooth_video(frames=9, side=32):
    ramp = torch.arange(side).float()
    frame = torch.stack(
        [ramp[:, None] * 4 + ramp * 3, ramp * 7 + 5 + 0 * ramp[:, None], ramp[:, None] * 6 + ramp], dim=-1
    )
    return torch.stack([(frame + 3 * k).clamp(0, 255) for k in range(frames)]).to(torch.uint8)


def test_clip_round_trip_loses_only_colour_rounding(tmp_path):
    noise = torch.randint(0, 256, (5, 48, 32, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    for name, video in {"noise": noise, "smooth": smooth_video()}.items():
        write_clip(tmp_path / f"{name}.mp4", video, fps=8)
        back = read_clip(tmp_path / f"{name}.mp4")
        assert back.dtype == torch.uint8 and back.shape == video.shape
        assert (back.int() - video.int()).abs().max() <= 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["noise.mp4", "smooth.mp4"]


def test_equal_videos_give_equal_files(tmp_path):
    for name in ("a.mp4", "b.mp4"):
        write_clip(tmp_path / name, smooth_video(), fps=8)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


def test_clip_of_another_dtype_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"video: expected uint8 \[F, H, W, 3\], got torch.float32"):
        write_clip(tmp_path / "a.mp4", smooth_video().float(), fps=8)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", ["missing", "empty", "noise", "cut"])
def test_unreadable_clip_is_named(tmp_path, damage):
    path = tmp_path / "clip.mp4"
    write_clip(path, smooth_video(), fps=8)
    whole = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes({"empty": b"", "noise": bytes(range(256)) * 9, "cut": whole[: len(whole) // 2]}[damage])
    with pytest.raises(UserError, match="clip .*clip.mp4: expected a readable video") as caught:
        read_clip(path)
    assert "\n" not in str(caught.value)


def test_pairs_hold_rewards_margins_and_ties(scored):
    config, run = scored
    build_pairs(config, run)
    scores = {row["clip_id"]: row for row in pyarrow.parquet.read_table(run.path / "score/scores.parquet").to_pylist()}
    rows = pyarrow.parquet.read_table(run.path / "pairs/pairs.parquet").to_pylist()
    assert [(row["clip_a"], row["clip_b"]) for row in rows] == [(f"p{i:04d}_s0", f"p{i:04d}_s1") for i in range(4)]
    for row in rows:
        for side in "ab":
            score = scores[row[f"clip_{side}"]]
            mean = sum(score[f"video_{name}"] for name in config.pairs.dimensions) / 3
            assert row[f"video_reward_{side}"] == pytest.approx(mean)
            assert row[f"patch_rewards_{side}"] == score["patch_quality"]
        gaps = torch.tensor(row["patch_rewards_a"]) - torch.tensor(row["patch_rewards_b"])
        assert row["patch_tie_share"] == pytest.approx((gaps.abs() <= 0.4).float().mean().item())
        assert row["video_margin"] == pytest.approx(row["video_reward_a"] - row["video_reward_b"])
        assert row["grid"] == [3, 2, 2]
    counts = json.loads((run.path / "pairs/manifest.json").read_text())["counts"]
    assert counts["pairs"] == 4 and counts["left_out"] == 0
    assert counts["patch_tie_share"] == pytest.approx(sum(row["patch_tie_share"] for row in rows) / 4)


def scores_of(run, rewards):
    """Replace the scores: {clip_id: (video reward, patch reward)}, the same in every dimension and patch."""
    rows = [
        {"clip_id": clip, "video_visual_quality": float(video), "patch_quality": [float(patch)] * 12}
        for clip, (video, patch) in rewards.items()
    ]
    write_parquet(run.path / "score/scores.parquet", pyarrow.Table.from_pylist(rows))
    finish_again(run.path / "score")


def unscored_run(tmp_path, candidates):
    """A run directory with clips.parquet and scores to fill in, no videos made."""
    config = tiny_config(tmp_path)
    config.pairs = PairsConfig(dimensions={"visual_quality": 1.0})
    run = Run(config)
    clips = [
        ClipRow(f"p{i}_s{k}", i, f"prompt {i}", k, 0, "none.mp4", None) for i in range(2) for k in range(candidates)
    ]
    for name, rows, kind in (("generate/clips", clips, ClipRow), ("score/scores", [], ScoreRow)):
        with run.stage(name.split("/")[0], {}, {}) as stage:
            write_rows(run.path / f"{name}.parquet", rows, kind)
            stage.finish({})
    return config, run


def test_best_and_worst_of_many_candidates_are_paired(tmp_path):
    config, run = unscored_run(tmp_path, candidates=4)
    video = {0: (2, 5, 1, 3), 1: (4, 4, 4, 1)}
    scores_of(run, {f"p{i}_s{k}": (video[i][k], 3) for i in range(2) for k in range(4)})
    build_pairs(config, run)
    rows = pyarrow.parquet.read_table(run.path / "pairs/pairs.parquet").to_pylist()
    assert [(row["clip_a"], row["clip_b"]) for row in rows] == [("p0_s1", "p0_s2"), ("p1_s0", "p1_s3")]


def test_pairs_that_tie_throughout_are_left_out_and_counted(tmp_path):
    config, run = unscored_run(tmp_path, candidates=2)
    # prompt 0: the video ties and all patches are within the delta; prompt 1: patches oppose the video
    scores_of(run, {"p0_s0": (3, 3), "p0_s1": (3, 3.4), "p1_s0": (4, 2), "p1_s1": (3, 3)})
    build_pairs(config, run)
    rows = pyarrow.parquet.read_table(run.path / "pairs/pairs.parquet").to_pylist()
    assert [row["pair_id"] for row in rows] == ["p1_s0-p1_s1"]
    counts = json.loads((run.path / "pairs/manifest.json").read_text())["counts"]
    assert counts == {
        "pairs": 1, "left_out": 1, "duplicates": 0, "video_tie_share": 0, "patch_tie_share": 0, "opposed_share": 1,
        "first_wins_share": 1, "own_share": 0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("dimensions", "clips", "message"),
    [
        (
            {"grace": 1.0},
            ("p0_s0", "p0_s1", "p1_s0", "p1_s1"),
            "pairs.dimensions: grace was not scored; .*visual_quality",
        ),
        ({"visual_quality": 0.0}, ("p0_s0", "p0_s1", "p1_s0", "p1_s1"), "weights must sum to more than 0"),
        ({"visual_quality": 1.0}, ("p0_s0", "p0_s1", "p1_s0"), "no scores of clip p1_s1"),
        ({"visual_quality": 1.0}, ("p0_s0", "p0_s1", "p1_s0", "p1_s1"), "all 2 pairs tie"),
    ],
)
def test_scores_that_do_not_fit_are_named(tmp_path, dimensions, clips, message):
    config, run = unscored_run(tmp_path, candidates=2)
    config.pairs.dimensions = dimensions
    scores_of(run, dict.fromkeys(clips, (3, 3)))
    with pytest.raises(UserError, match=message):
        build_pairs(config, run)


def test_one_candidate_makes_no_pair(tmp_path):
    config, run = unscored_run(tmp_path, candidates=1)
    scores_of(run, {"p0_s0": (3, 3), "p1_s0": (3, 3)})
    with pytest.raises(UserError, match="generate.num_videos_per_prompt"):
        build_pairs(config, run)


def test_cache_gives_what_the_model_would(scored):
    config, run = scored
    build_pairs(config, run)
    build_cache(config, run)
    pairs = CachedPairs(run.require("pairs/pairs.parquet"), run.require("cache"))
    assert len(pairs) == 4 and len(pairs[1:3]) == 2
    assert {pairs.size(index) for index in range(4)} == {((4, 3, 4, 4), (3, 2, 2))}
    rows = pyarrow.parquet.read_table(run.path / "pairs/pairs.parquet").to_pylist()
    family = family_of(tiny_wan())
    for row, pair in zip(rows, pairs, strict=True):
        for side, clip in enumerate((row["clip_a"], row["clip_b"])):
            made = load_file(run.path / f"generate/latents/{clip}.safetensors")["latents"]
            assert torch.equal(pair.latents[side], made)
        embeds = family.encode_prompts([row["prompt"]])[0]["prompt_embeds"]
        assert torch.equal(pair.conditions["prompt_embeds"], embeds)
        assert len(embeds) == len(row["prompt"].split())
        assert pair.patch_rewards.shape == (2, 3, 2, 2)
        assert pair.patch_rewards[1].flatten().tolist() == pytest.approx(row["patch_rewards_b"])
        assert pair.video_rewards.tolist() == pytest.approx([row["video_reward_a"], row["video_reward_b"]])


def test_clips_without_latents_are_encoded_once_for_each_content(scored, tmp_path, monkeypatch):
    config, run = scored
    config = dataclasses.replace(config, output_dir=str(tmp_path / "run"))
    other = Run(config)
    clips = pyarrow.parquet.read_table(run.path / "generate/clips.parquet").to_pylist()
    with other.stage("generate", {}, {}) as stage:
        for clip in clips:
            clip["latents"] = None
            write_clip(stage.folder / clip["video"], read_clip(run.path / "generate/videos/p0000_s0.mp4"), fps=8)
        write_parquet(stage.folder / "clips.parquet", pyarrow.Table.from_pylist(clips))
        stage.finish({})
    write_scores(other)
    build_pairs(config, other)
    build_cache(config, other)
    latents = list((other.path / "cache/latents").iterdir())
    assert len(latents) == 1 and len(list((other.path / "cache/text").iterdir())) == 4
    video = read_clip(other.path / "generate/videos/p0000_s0.mp4")
    assert torch.equal(load_file(latents[0])["latents"], family_of(tiny_wan()).encode(video[None])[0])
    # cut off before its manifest: what is there is kept, and nothing but the content decides a file's name
    before = output_hashes(other.path / "cache")
    (other.path / "cache/manifest.json").rename(other.path / "cache/pending.json")
    monkeypatch.setattr(Wan, "encode", None)
    monkeypatch.setattr(Wan, "encode_prompts", None)
    config = dataclasses.replace(config, train=TrainConfig(rank=2, learning_rate=1e-5))
    build_cache(config, Run(config))
    assert output_hashes(other.path / "cache") == before


def test_unreadable_clip_stops_the_cache_and_is_never_replaced(scored, tmp_path):
    config, run = scored
    config = dataclasses.replace(config, output_dir=str(tmp_path / "run"))
    other = Run(config)
    clips = pyarrow.parquet.read_table(run.path / "generate/clips.parquet").to_pylist()
    with other.stage("generate", {}, {}) as stage:
        for clip in clips:
            clip["latents"] = None
            write_clip(stage.folder / clip["video"], smooth_video(), fps=8)
        (stage.folder / "videos/p0002_s1.mp4").write_bytes(b"not a video")
        write_parquet(stage.folder / "clips.parquet", pyarrow.Table.from_pylist(clips))
        stage.finish({})
    write_scores(other)
    build_pairs(config, other)
    with pytest.raises(UserError, match="p0002_s1.mp4"):
        build_cache(config, other)
    assert not (other.path / "cache/manifest.json").exists()


def test_fingerprint_follows_every_weight_and_word():
    one, same, other = tiny_wan(), tiny_wan(), tiny_wan()
    next(other.vae.parameters()).data.view(-1)[0] += 1e-6
    assert fingerprint([one.vae]) == fingerprint([same.vae]) != fingerprint([other.vae])
    longer = tiny_wan(max_words=13)
    assert fingerprint([one.tokenizer]) == fingerprint([same.tokenizer]) != fingerprint([longer.tokenizer])


def test_fingerprint_follows_settings_that_are_in_no_weight_but_not_the_folder(tmp_path):
    pipeline = tiny_wan()
    vae, text = fingerprint([pipeline.vae]), fingerprint([pipeline.text_encoder])
    pipeline.save_pretrained(tmp_path / "elsewhere")
    loaded = load(str(tmp_path / "elsewhere"), device="cpu")
    assert (fingerprint([loaded.vae]), fingerprint([loaded.pipeline.text_encoder])) == (vae, text)
    # the latents are normalised by these
    pipeline.vae.register_to_config(latents_std=[1.0, 1.0, 1.0, 1.0])
    pipeline.text_encoder.config.num_heads = 4
    assert fingerprint([pipeline.vae]) != vae and fingerprint([pipeline.text_encoder]) != text
