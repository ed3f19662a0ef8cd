"""Rounds: their folders, what each takes from the one before, and changes that reach the next."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import finish_again, run_to_cache, tiny_config, tiny_wan, write_scores
from verbs import NEEDED, refuse

from halo_fast.data.tables import ClipRow, LabelRow, PairRow, read_rows, write_rows
from halo_fast.errors import UserError
from halo_fast.families import family_of
from halo_fast.families.sampling import sample_clips
from halo_fast.files import write_bytes
from halo_fast.pipeline import cli
from halo_fast.pipeline.clips import run_clips
from halo_fast.pipeline.config import Config, ImportConfig, round_config
from halo_fast.pipeline.export import export_run
from halo_fast.pipeline.hashes import verify
from halo_fast.pipeline.inspect import inspect_run
from halo_fast.pipeline.report.several import round_table
from halo_fast.pipeline.run import Run, round_folders
from halo_fast.pipeline.stages.cache import build_cache
from halo_fast.pipeline.stages.generate import generate
from halo_fast.pipeline.stages.pairs import build_pairs
from halo_fast.pipeline.stages.reward import _tables, read_labels
from halo_fast.pipeline.stages.train import train, trained_results, trainings

SCORES = ("visual_quality", "text_alignment", "dynamic_degree")


def label_clips(run: Run, score: float) -> None:
    """The stage annotate: every clip of the round has one score."""
    clips = run_clips(run)
    with run.stage("annotate", {}, clips.inputs) as stage:
        rows = [
            LabelRow(
                clip.clip_id, "someone", "ok", "", [3, 2, 2], dict.fromkeys(SCORES, score), {"quality": [score] * 12}
            )
            for clip in clips.rows
        ]
        write_rows(stage.folder / "labels.parquet", rows)
        stage.finish({"clips": len(rows), "labelled": len(rows)})


@pytest.fixture(scope="module")
def rounds(tmp_path_factory) -> list[Run]:
    """Two rounds of a tiny model up to their LoRAs."""
    config = dataclasses.replace(
        tiny_config(tmp_path_factory.mktemp("rounds"), max_train_steps=2, heldout_share=0.0), rounds=2
    )
    first = run_to_cache(config)
    train(config, first)
    second = Run(config, number=2)
    generate(second.config, second)
    write_scores(second)
    for stage in (build_pairs, build_cache, train):
        stage(second.config, second)
    for run, score in ((first, 2.0), (second, 4.0)):
        label_clips(run, score)
    return [first, second]


def test_candidates_are_the_aligned_models_from_new_noise(rounds):
    first, second = (read_rows(run.path / "generate/clips.parquet", ClipRow) for run in rounds)
    assert [row.prompt for row in first] == [row.prompt for row in second]
    assert {row.candidate for row in first} == {0, 1} and {row.candidate for row in second} == {2, 3}
    assert len({row.seed for row in (*first, *second)}) == len({row.clip_id for row in (*first, *second)}) == 16
    pipeline = tiny_wan()
    pipeline.load_lora_weights(load_file(rounds[0].path / "train/lora/pytorch_lora_weights.safetensors"))
    settings, some = rounds[1].config.generate, second[:2]
    prompts, seeds = [row.prompt for row in some], [row.seed for row in some]
    aligned, _ = sample_clips(family_of(pipeline), prompts, seeds, settings)
    base, _ = sample_clips(family_of(tiny_wan()), prompts, seeds, settings)
    for row, expected, other in zip(some, aligned, base, strict=True):
        found = load_file(rounds[1].path / "generate" / row.latents)["latents"]
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        assert (found - other).abs().max() > 1e-3


def test_a_later_round_pairs_its_own_clips_and_goes_on_from_the_lora(rounds):
    first, second = rounds
    own = {row.clip_id for row in read_rows(second.path / "generate/clips.parquet", ClipRow)}
    pairs = read_rows(second.path / "pairs/pairs.parquet", PairRow)
    assert pairs and {name for pair in pairs for name in (pair.clip_a, pair.clip_b)} <= own
    manifest = json.loads((second.path / "train/manifest.json").read_text())
    assert manifest["sources"]["start"] == "train/lora" and "off_policy_gap" in manifest["counts"]
    # Adam's steps are as large as the learning rate at most, so the start can be told from a fresh LoRA
    before, after = (load_file(run.path / "train/lora/pytorch_lora_weights.safetensors") for run in rounds)
    config = second.config.train
    reach = 1.01 * config.max_train_steps * config.learning_rate * config.lora_alpha / config.rank
    assert max(float((after[name] - before[name]).abs().max()) for name in after) < reach
    assert any(not torch.equal(after[name], before[name]) for name in after)


def test_trainings_are_the_last_ones(rounds):
    first, second = rounds
    assert trainings(first) == [first.path / "train"] and trainings(second) == [second.path / "train"]
    assert trained_results(second.config, second) == {"train": second.path / "train/lora"}
    expert = {"network": "transformer_2"}  # which the second round does not train
    with first.stage("train_transformer_2", expert, {}) as stage:
        write_bytes(stage.folder / "lora/pytorch_lora_weights.safetensors", b"")
        stage.finish({})
    for copy in ("train_1e-5", "train.old", "train_transformer_3"):
        shutil.copytree(second.path / "train", second.path / copy)
    assert trainings(second) == [second.path / "train", first.path / "train_transformer_2"]


def test_the_reward_model_learns_from_the_labels_of_all_rounds(rounds):
    clips = run_clips(rounds[1], earlier=True)
    tables = [table for run in rounds for table in _tables(run).values()]
    _, data = read_labels(tables, clips)
    assert data.video_scores[:, 0].tolist() == [2.0] * 8 + [4.0] * 8
    for row, video in zip(clips.rows, data.videos, strict=True):
        assert (clips.folder / row.video).exists() and video.shape == (9, 32, 32, 3)
    assert list(clips.inputs) == ["clips of generate", "clips of round_2/generate"]
    assert run_clips(rounds[0], earlier=True) == run_clips(rounds[0])


def test_verify_inspect_and_export_know_rounds(rounds, tmp_path):
    first, second = rounds
    assert round_folders(first.path) == [first.path, second.path]
    assert "round_2/train " in verify(first.path)
    text = inspect_run(first.path, tmp_path / "page.html")
    assert "\nround 2: counts" in text and "round 2: counts" in (tmp_path / "page.html").read_text()
    for number, run in ((None, second), (1, first), (2, second)):
        file = export_run(first.path, output=tmp_path / str(number), round=number)
        assert file.read_bytes() == (run.path / "train/lora" / file.name).read_bytes()
    with pytest.raises(UserError, match="round: expected one of 1 to 2, got 3"):
        export_run(first.path, round=3)
    table = export_run(first.path, "trl", tmp_path / "data")
    assert "p0000_s2" in "".join(path.name for path in Path(table).rglob("*"))


def test_what_a_round_began_with_is_a_table(rounds):
    @dataclasses.dataclass
    class View:
        name: str
        manifests: dict

    stages = ("generate", "annotate", "pairs", "train")
    views = [
        View(
            f"round {run.number}",
            {name: json.loads((run.path / name / "manifest.json").read_text()) for name in stages},
        )
        for run in rounds
    ]
    rows = round_table(views).rows
    assert [row[:3] for row in rows] == [["round 1", "8", "8"], ["round 2", "8", "8"]]
    assert all(row[-1].endswith("%") for row in rows)


def test_damage_and_changes_in_an_earlier_round_are_seen(rounds, tmp_path):
    config = dataclasses.replace(rounds[0].config, output_dir=str(tmp_path / "run"))

    def work(number: int, name: str, text: str = "x", force: bool = False, **inputs: Path) -> bool:
        run = Run(config, force, number)
        with run.stage(name, {"size": 2}, inputs) as stage:
            if stage.done:
                return False
            write_bytes(stage.folder / "out.txt", text.encode())
            stage.finish({})
        return True

    root = tmp_path / "run"
    assert (
        work(1, "pairs")
        and work(2, "cache", earlier=root / "pairs")
        and work(3, "cache", earlier=root / "round_2/cache")
    )
    assert Run(config, number=3).require("cache") == root / "round_3/cache"
    assert not work(3, "cache", earlier=root / "round_2/cache")
    assert work(1, "pairs", text="y", force=True)
    with pytest.raises(UserError, match=r"round_2/cache: pairs changed since it was made; run `halo cache --round 2`"):
        Run(config, number=3).require("cache")
    assert work(2, "cache", earlier=root / "pairs"), "what an earlier round changed is made again"
    file = root / "round_2/cache/out.txt"
    file.write_bytes(b"z")
    finish_again(root / "round_3/cache")
    with pytest.raises(UserError, match=r"round_2/cache/out\.txt: damaged .* run `halo cache --round 2`"):
        work(3, "cache", earlier=root / "round_2/cache", force=True)
    with pytest.raises(UserError, match="run `halo score --round 2` with this config first"):
        Run(config, number=2).require("score")


def test_a_later_round_imports_nothing_and_takes_a_reward_model_where_nobody_teaches():
    config = Config(imports=ImportConfig(sources=["clips"]), output_dir="runs/mine", rounds=3)
    assert round_config(config, 1) is config
    later = round_config(config, 3)
    assert later.imports.sources == [] and later.reward_model == "runs/mine/reward"
    config.annotate.teacher = "human:anna"
    assert round_config(config, 2).reward_model == ""
    config.reward_model = "fetv"
    assert round_config(config, 2).reward_model == "fetv"


def test_run_goes_through_all_rounds(calls, monkeypatch):  # noqa: F811
    monkeypatch.setattr("halo_fast.pipeline.preflight.check_run", lambda config, run: None)
    assert cli.main(["run", "--rounds", "2", "--output_dir", "runs/two", "--annotate.teacher", "human:anna"]) == 0
    assert len(calls) == 18
    assert [str(run.path) for _, _, run in calls] == ["runs/two"] * 9 + ["runs/two/round_2"] * 9
    assert [name for name, *_ in calls[:9]] == [name for name, *_ in calls[9:]]
    assert all(run.config is config for _, config, run in calls)


def test_a_stage_of_a_round_by_its_number(calls, capsys):  # noqa: F811
    assert cli.main(["score", "--rounds", "2", "--round", "2"]) == 0
    assert calls[0][2].path.name == "round_2"
    assert "--round: expected 1 to 2 (rounds), got 3" in refuse(capsys, "score", "--rounds", "2", "--round", "3")


def test_rounds_without_prompts_or_rewards_are_refused_before_anything_is_made(calls, capsys):  # noqa: F811
    needed = {f"--{name}={value}" for name, value in NEEDED.items()}
    given = [*needed - {"--prompts=prompts.txt"}, "--rounds=2", '--imports.sources=["clips"]']
    assert "prompts: required by rounds 2" in refuse(capsys, "run", *given)
    given = [*needed - {"--annotate.teacher=human:anna"}, "--rounds=2", "--pairs.real_wins=true"]
    assert "rounds: later ones need rewards" in refuse(capsys, "run", *given)
    assert not calls
