"""Candidates that are made from one another: rows, files, labels, continuation, and stages that follow."""

import dataclasses
import math
import shutil
from functools import cache

import pytest
import torch
from safetensors.torch import load_file
from tiny import output_hashes, tiny_config

from halo_fast.data.clips import motion_amount, read_clip, write_clip
from halo_fast.data.regions import moving_region
from halo_fast.data.tables import CacheRow, ClipRow, PairRow, ScoreRow, read_rows
from halo_fast.errors import UserError
from halo_fast.families.sampling import clip_seed
from halo_fast.patches import LatentFactors
from halo_fast.pipeline.clips import given_pairs, run_all, run_stages
from halo_fast.pipeline.run import Run
from halo_fast.pipeline.stages import STAGES
from halo_fast.pipeline.stages import generate as module
from halo_fast.pipeline.stages.generate import generate
from halo_fast.pipeline.stages.pairs import build_pairs
from halo_fast.pipeline.stages.reward import train_reward
from halo_fast.pipeline.stages.score import score
from halo_fast.rewards import RewardModel, RewardModelConfig
from halo_fast.rewards.model import read_config


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A config on a tiny model, and a folder with a reward model."""
    folder = tmp_path_factory.mktemp("strategies")
    config = tiny_config(folder)
    torch.manual_seed(0)
    dimensions = ("visual_quality", "text_alignment", "dynamic_degree")
    (folder / "reward").mkdir()
    RewardModel(RewardModelConfig(dimensions, ("quality",), pretrained=False)).save(folder / "reward")
    return config, folder


def made(base, tmp_path, **changes):
    """A run in whose directory candidates of two prompts were generated, and their rows."""
    config, folder = base
    settings = {"num_prompts": 2, "batch_size": 1, "num_inference_steps": 2, "strength": 0.5, "share": 0.25} | changes
    generate_settings = dataclasses.replace(config.generate, **settings)
    config = dataclasses.replace(config, output_dir=str(tmp_path / "run"), generate=generate_settings)
    if changes["strategy"] == "repair":
        config.reward_model = str(folder / "reward")
    run = Run(config)
    generate(config, run)
    return run, read_rows(run.path / "generate/clips.parquet", ClipRow)


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory):
    """For each strategy an undisturbed run and its rows, made once."""

    @cache
    def of(strategy):
        return made(base, tmp_path_factory.mktemp(strategy), strategy=strategy)

    return of


def latents(run, row):
    return load_file(run.path / "generate" / row.latents)["latents"]


@pytest.mark.parametrize(
    "strategy",
    [
        "branched",
        "corrupt",
        pytest.param("guided", marks=pytest.mark.slow),
        pytest.param("repair", marks=pytest.mark.slow),
    ],
)
def test_rows_say_how_a_clip_was_made_and_a_killed_stage_ends_the_same(base, whole, tmp_path, strategy, monkeypatch):
    run, rows = whole(strategy)
    first = strategy if strategy == "branched" else "independent"
    assert [row.strategy for row in rows] == [first, strategy] * 2
    assert [row.parent for row in rows] == [None, "p0000_s0", None, "p0001_s0"]
    assert [row.seed for row in rows] == [clip_seed(0, prompt, k) for prompt in (0, 1) for k in range(2)]
    parts = [latents(run, row) for row in rows]
    assert all((parts[i] - parts[j]).abs().max() > 1e-3 for i in range(4) for j in range(i))
    # candidates of a prompt have more in common than clips of noise of their own
    assert (parts[1] - parts[0]).abs().mean() < (parts[2] - parts[0]).abs().mean()
    calls, original = [], module.sample_variations

    def killed(*given):
        calls.append(given)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*given)

    monkeypatch.setattr(module, "sample_variations", killed)
    with pytest.raises(KeyboardInterrupt):
        made(base, tmp_path / "killed", strategy=strategy)
    again, _ = made(base, tmp_path / "killed", strategy=strategy)
    assert output_hashes(again.path / "generate") == output_hashes(run.path / "generate")
    assert len(calls) == 2 + (3 if strategy == "branched" else 1)  # what was finished is not made again


def test_a_corrupted_clip_differs_in_its_region_alone_and_brings_its_labels(whole):
    run, rows = whole("corrupt")
    pairs = {pair.clip_b: pair for pair in read_rows(run.path / "generate/pairs.parquet", PairRow)}
    assert sorted(pairs) == ["p0000_s1", "p0001_s1"]
    for row in (row for row in rows if row.parent):
        whole, pair = latents(run, next(one for one in rows if one.clip_id == row.parent)), pairs[row.clip_id]
        changed = (latents(run, row) - whole).abs().amax(0) > 0
        region = moving_region((3, 4, 4), 0.25, row.seed)
        assert torch.equal(changed, region) and int(region.sum()) in range(10, 15)
        # patches of 3 x 2 x 2 are 1 x 2 x 2 latent positions each
        share = [region[f, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2].float().mean()
                 for f in range(3) for y in range(2) for x in range(2)]  # fmt: skip
        assert pair.clip_a == row.parent and pair.patch_rewards_a == [5.0] * 12
        assert pair.patch_rewards_b == pytest.approx([5 - 4 * float(one) for one in share])
        assert pair.video_reward_a == 5 and pair.video_margin == pytest.approx(4 * float(region.float().mean()))
        assert pair.patch_tie_share == sum(one == 0 for one in share) / 12 and pair.weight == 1


def test_repair_makes_the_patches_again_that_the_reward_model_scores_worst(base, whole):
    run, rows = whole("repair")
    model = RewardModel.load(base[1] / "reward")
    for row in (row for row in rows if row.parent):
        video = read_clip(run.path / "generate/videos" / f"{row.parent}.mp4")
        scores = model(video[None], [row.prompt], (3, 2, 2)).patches[0, 0]
        worst = sorted(range(12), key=lambda patch: float(scores.flatten()[patch]))[:3]
        parent = next(one for one in rows if one.clip_id == row.parent)
        changed = (latents(run, row) - latents(run, parent)).abs().amax(0) > 0
        patches = {(int(f) * 2 + int(y) // 2) * 2 + int(x) // 2 for f, y, x in changed.nonzero()}
        assert patches == set(worst) and int(changed.sum()) == 12


def test_corrupted_pairs_train_without_a_teacher(base, tmp_path, caplog):
    caplog.set_level("INFO")
    config = dataclasses.replace(base[0], output_dir=str(tmp_path / "run"))
    config.generate = dataclasses.replace(
        config.generate, num_prompts=2, strategy="corrupt", share=0.4, num_inference_steps=2
    )
    config.train = dataclasses.replace(config.train, max_train_steps=1, heldout_share=0.0, off_policy_pairs=0)
    assert run_stages(config, list(STAGES)) == ["generate", "pairs", "cache", "train"]
    run = Run(config)
    run_all(config, run, STAGES)
    assert [line for line in caplog.messages if "begins" in line] == [
        "generate: begins (stage 1 of 4)", "pairs: begins (stage 2 of 4)",
        "cache: begins (stage 3 of 4)", "train: begins (stage 4 of 4)",
    ]  # fmt: skip
    assert [pair.pair_id for pair in read_rows(run.path / "pairs/pairs.parquet", PairRow)] == [
        "p0000_s0-p0000_s1", "p0001_s0-p0001_s1",
    ]  # fmt: skip
    assert (run.path / "train/lora/pytorch_lora_weights.safetensors").exists()
    # who has a teacher, or a reward model, has them judge
    config.annotate.teacher = "human:anna"
    assert "annotate" in run_stages(config, list(STAGES)) and not given_pairs(config)
    config = dataclasses.replace(config, reward_model="somewhere")
    config.annotate.teacher = ""
    assert run_stages(config, list(STAGES))[:4] == ["generate", "reward", "score", "pairs"]


def test_a_trained_reward_model_takes_the_place_of_training(whole, tmp_path):
    run, _ = whole("repair")
    config = run.config
    train_reward(config, run)
    score(config, run)
    build_pairs(config, run)
    rows = read_rows(run.path / "score/scores.parquet", ScoreRow)
    video = read_clip(run.path / "generate/videos" / f"{rows[0].clip_id}.mp4")
    frames = video.double().numpy()
    assert rows[0].motion == pytest.approx(abs(frames[1:] - frames[:-1]).mean()) == pytest.approx(motion_amount(video))
    assert len({row.content for row in rows}) == 4 and len(rows[0].content) == 64
    config = dataclasses.replace(config, output_dir=str(tmp_path / "other"), reward_model=str(tmp_path))
    with pytest.raises(UserError, match=r"reward_model: no reward model in .*; give a folder that `halo reward` wrote"):
        train_reward(config, Run(config))


def test_a_reward_model_of_other_latents_scores_the_patches_of_the_runs_own(base, whole, tmp_path):
    """Damage to the frames of one latent patch, as the run's autoencoder divides them, moves that patch most."""
    config, folder = base
    run, _ = whole("independent")
    other = dataclasses.replace(read_config(folder / "reward/config.json"), **LatentFactors(4, 2, False)._asdict())
    torch.manual_seed(1)
    RewardModel(other).save(tmp_path / "trained")
    changed = dataclasses.replace(run.config, reward_model=str(tmp_path / "trained"), output_dir=str(tmp_path / "run"))
    shutil.copytree(run.path / "generate", tmp_path / "run/generate")
    train_reward(changed, Run(changed))
    taken = RewardModel.load(tmp_path / "run/reward", "cpu")
    assert taken.config.factors == (8, 4, True, 0) and taken.config.features_factor == 4
    score(changed, Run(changed))
    own = RewardModel.load(tmp_path / "trained", "cpu", factors=LatentFactors(8, 4, True))
    video = torch.randint(0, 255, (1, 9, 32, 32, 3), dtype=torch.uint8)
    assert torch.equal(own(video, ["a"], (3, 2, 2)).patches, taken(video, ["a"], (3, 2, 2)).patches)
    assert own.config.patches((3, 2, 2), (9, 32, 32)).pixel_edges(0) == [0, 1, 5, 9]


def test_the_own_reward_model_of_a_run_is_not_taken(whole):
    run, _ = whole("repair")
    train_reward(run.config, run)
    files = {file.name: file.read_bytes() for file in (run.path / "reward").iterdir()}
    config = dataclasses.replace(run.config, reward_model=str(run.path / "reward"))
    with pytest.raises(UserError, match=r"reward_model: .* is this run's own, which is taken anyway; leave it out"):
        train_reward(config, Run(config, force=True))
    assert {file.name: file.read_bytes() for file in (run.path / "reward").iterdir()} == files


def test_repair_without_a_reward_model_says_what_is_missing(base, tmp_path):
    config = dataclasses.replace(base[0], output_dir=str(tmp_path / "run"))
    config.generate = dataclasses.replace(config.generate, strategy="repair")
    with pytest.raises(UserError, match="reward_model: required by the strategy repair; .* runs/first/reward"):
        generate(config, Run(config))
    assert not (tmp_path / "run/generate").exists()


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """A folder of three clips with captions, two of one prompt."""
    folder = tmp_path_factory.mktemp("real")
    for number, prompt in enumerate(["a cube jumps", "a cube jumps", "a red ball"]):
        video = torch.full((9, 32, 32, 3), 40 + 60 * number, dtype=torch.uint8)
        for frame in range(9):
            video[frame, 8:16, frame : frame + 8, number] = 250
        write_clip(folder / f"{number}.mp4", video, 8)
        (folder / f"{number}.txt").write_text(prompt)
    return folder


def on_real_clips(base, real, tmp_path, **changes):
    config = dataclasses.replace(base[0], output_dir=str(tmp_path / "run"), prompts="", **changes)
    config.generate = dataclasses.replace(config.generate, num_inference_steps=2)
    config.imports = dataclasses.replace(config.imports, sources=[str(real)], generate=True)
    config.train = dataclasses.replace(config.train, max_train_steps=1, heldout_share=0.0, off_policy_pairs=0)
    run = Run(config)
    run_all(config, run, STAGES)
    return run, read_rows(run.path / "pairs/pairs.parquet", PairRow)


def test_real_clips_win_over_their_own_corruption(base, real, tmp_path):
    settings = dataclasses.replace(
        base[0].generate, num_prompts=None, strategy="corrupt", num_videos_per_prompt=1, share=0.3
    )
    run, pairs = on_real_clips(base, real, tmp_path, generate=settings)
    rows = {row.clip_id: row for row in read_rows(run.path / "generate/clips.parquet", ClipRow)}
    assert [(row.prompt, row.parent) for row in rows.values()] == [
        ("a cube jumps", "c00000"), ("a cube jumps", "c00001"), ("a red ball", "c00002"),
    ]  # fmt: skip
    assert [(pair.clip_a, pair.clip_b) for pair in pairs] == [
        ("c00000", "p0000_s0"), ("c00001", "p0000_s1"), ("c00002", "p0001_s0"),
    ]  # fmt: skip
    index = {row.id: row.file for row in read_rows(run.path / "cache/index.parquet", CacheRow)}
    for pair in pairs:
        a, b = (load_file(run.path / "cache" / index[clip])["latents"] for clip in (pair.clip_a, pair.clip_b))
        region = moving_region((3, 4, 4), 0.3, rows[pair.clip_b].seed)
        torch.testing.assert_close(a[:, ~region], b[:, ~region])
        assert (a - b)[:, region].abs().mean() > 1e-3 and pair.video_margin > 0


def test_real_clips_win_over_the_models_own(base, real, tmp_path):
    pairs_settings = dataclasses.replace(base[0].pairs, real_wins=True)
    run, pairs = on_real_clips(base, real, tmp_path, pairs=pairs_settings)
    assert [(pair.clip_a, pair.clip_b) for pair in pairs] == [
        ("c00000", "p0000_s0"), ("c00001", "p0000_s1"), ("c00002", "p0001_s0"), ("c00002", "p0001_s1"),
    ]  # fmt: skip
    for pair in pairs:
        assert (pair.video_reward_a, pair.video_reward_b) == (5, 1) and all(map(math.isnan, pair.patch_rewards_b))
