"""Judges in `halo evaluate`: the table, the check for reward hacking, what is kept and what is asked again."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import torch
from diffusers import WanPipeline
from peft import LoraConfig, get_peft_model_state_dict
from tiny import output_hashes, tiny_config, tiny_wan

from halo_fast.errors import UserError
from halo_fast.judges import JudgeTable
from halo_fast.judges.base import read_video
from halo_fast.judges.dimensions import temporal_flickering
from halo_fast.pipeline.arguments import build_parser, parse_config
from halo_fast.pipeline.config import Config, EvaluateConfig
from halo_fast.pipeline.judging import JUDGES_FILE, _trained_on, check_judges, judge_arms
from halo_fast.pipeline.report.clips import cards_of
from halo_fast.pipeline.report.page import write_page
from halo_fast.pipeline.report.runs import read_run
from halo_fast.pipeline.run import Run
from halo_fast.pipeline.stages.evaluate import evaluate
from halo_fast.rewards import RewardModel, RewardModelConfig
from halo_fast.rewards.model import read_config

CALLS: list[float] = []


def level(clips, prompts, fps, device, *, gain: float = 0.0, folder: Path | None = None) -> JudgeTable:
    """A judge that gives aligned clips `gain` more than the base's, and a little more from prompt to prompt."""
    CALLS.append(gain)
    assert [Path(clip).parent.name for clip in clips] == ["base", "aligned"] * (len(clips) // 2)
    scores = [
        {"level": n // 2 * 0.01 + gain * (n % 2), "half": math.nan if n % 4 > 1 else 1.0} for n in range(len(clips))
    ]
    return JudgeTable("level", scores, totals=lambda means: {"double": 2 * means["level"]})


LEVEL = f"{__name__}:level"


def aligned_run(folder: Path) -> Run:
    """A run directory as it is before evaluate."""
    config = tiny_config(folder)
    config.evaluation_prompts = config.prompts
    config.evaluate = EvaluateConfig(num_prompts=3, bootstrap=50)
    run = Run(config)
    with run.stage("train", {}, {}) as stage:
        transformer = tiny_wan().transformer
        torch.manual_seed(1)
        transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
        lora = get_peft_model_state_dict(transformer)
        WanPipeline.save_lora_weights(stage.folder / "lora", transformer_lora_layers=lora)
        stage.finish({})
    with run.stage("reward", {}, {}) as stage:
        torch.manual_seed(2)
        RewardModel(RewardModelConfig(("visual_quality", "text_alignment"), width=8, pretrained=False)).save(
            stage.folder
        )
        stage.finish({})
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    run = aligned_run(tmp_path_factory.mktemp("judged"))
    run.config.evaluate.judges = ["frames", LEVEL]
    run.config.evaluate.judge_options = {LEVEL: {"gain": 0.5}}
    evaluate(run.config, run)
    return run


def judges_of(run: Run) -> dict:
    return json.loads((run.path / JUDGES_FILE).read_text())


def table_of(run: Run) -> list[dict]:
    return pyarrow.parquet.read_table(run.path / "judges" / "judges.parquet").to_pylist()


def test_every_judge_scores_both_models(run):
    clips = pyarrow.parquet.read_table(run.path / "evaluate" / "clips.parquet").to_pylist()
    rows = table_of(run)
    assert {row["judge"] for row in rows} == {"training reward", "frames", LEVEL}
    flicker = {row["clip_id"]: row for row in rows if row["dimension"] == "temporal_flickering"}
    reward = {row["clip_id"]: row for row in rows if row["dimension"] == "text_alignment"}
    assert len(flicker) == len(reward) == len(clips) == 6
    for clip in clips:
        frames = read_video(run.path / "evaluate" / clip["video"])
        assert flicker[clip["clip_id"]]["score"] == pytest.approx(temporal_flickering(frames))
        assert reward[clip["clip_id"]]["score"] == pytest.approx(clip["video_text_alignment"])
        for name in ("prompt_id", "prompt", "arm"):
            assert flicker[clip["clip_id"]][name] == clip[name]
    assert {row["optimised"] for row in rows if row["judge"] == "training reward"} == {True}
    assert {row["optimised"] for row in rows if row["judge"] == "frames"} == {False}


def test_gains_are_against_the_training_reward(run):
    found = {judge["name"]: judge for judge in judges_of(run)["judges"]}
    gain = next(one for one in found[LEVEL]["gains"] if one["dimension"] == "level")
    assert gain["gain"] == pytest.approx(0.5) and gain["verdict"] == "rises" and gain["prompts"] == 3
    assert gain["wins"] == 1 and gain["hacked"] == 0
    assert found[LEVEL]["totals"] == {
        "base": {"double": pytest.approx(0.02)},
        "aligned": {"double": pytest.approx(1.02)},
    }
    half = next(one for one in found[LEVEL]["gains"] if one["dimension"] == "half")
    assert half["prompts"] == 2 and half["gain"] == 0
    rows = [row for row in table_of(run) if row["judge"] == "training reward"]
    means = {arm: np.mean([row["score"] for row in rows if row["arm"] == arm]) for arm in ("base", "aligned")}
    reward = found["training reward"]["gains"]
    # both dimensions weigh alike in pairs.dimensions
    assert reward[0]["gain"] == pytest.approx(means["aligned"] - means["base"])
    assert np.mean([one["gain"] for one in reward[1:]]) == pytest.approx(reward[0]["gain"])


def test_a_judge_is_asked_again_only_where_something_changed(run):
    before, videos = len(CALLS), output_hashes(run.path / "evaluate")
    evaluate(run.config, run)
    assert len(CALLS) == before
    run.config.evaluate.judge_options = {LEVEL: {"gain": -0.5}}
    evaluate(run.config, run)
    assert CALLS[before:] == [-0.5] and output_hashes(run.path / "evaluate") == videos
    # amounts are not added up
    frames = next(judge for judge in judges_of(run)["judges"] if judge["name"] == "frames")
    assert frames["amounts"] and frames["gains"][0]["dimension"] == "temporal_flickering"
    falls = [judge["gains"][0]["verdict"] for judge in judges_of(run)["judges"] if judge["name"] == LEVEL]
    assert falls == ["falls"]
    judge_arms(run.config, Run(run.config, force=True))
    assert CALLS[before:] == [-0.5, -0.5]


def test_a_reward_that_rises_while_a_judge_falls_is_warned_of(run, caplog, capsys, monkeypatch):
    rows = pyarrow.parquet.read_table(run.path / "evaluate" / "clips.parquet")
    scores = [float(arm == "aligned") for arm in rows["arm"].to_pylist()]
    names = [name for name in rows.column_names if name.startswith("video_")]
    better = rows.drop_columns(names).append_column("video_quality", pyarrow.array(scores))
    monkeypatch.setattr("halo_fast.pipeline.judging.read_table", lambda path: better)
    run.config.evaluate.judge_options = {LEVEL: {"gain": -0.5}}
    judge_arms(run.config, run)
    assert (
        f"{LEVEL} falls while the training reward rises: likely reward hacking (on 100% of the prompts)" in caplog.text
    )
    printed = capsys.readouterr().out
    assert "training reward (optimised)" in printed and "temporal_flickering" in printed and "-0.500" in printed


def test_without_an_independent_judge_there_is_a_warning(run, caplog, tmp_path):
    # amounts are no judge either
    config = Config(**vars(run.config) | {"evaluate": EvaluateConfig(num_prompts=3, bootstrap=5, judges=["frames"])})
    judge_arms(config, run)
    assert "names no judge that training did not optimise" in caplog.text
    # the reward model itself is no independent judge, whatever its name
    config.evaluate.judges = ["reward_model"]
    config.evaluate.judge_options = {"reward_model": {"model": str(run.path / "reward")}}
    judge_arms(config, run)
    assert len(judges_of(run)["warnings"]) == 1
    own = next(judge for judge in judges_of(run)["judges"] if judge["name"] == "reward_model")
    assert own["optimised"]
    # another model in the same folder gives other scores
    RewardModel.load(run.path / "reward").save(tmp_path / "model")
    config.evaluate.judge_options = {"reward_model": {"model": str(tmp_path / "model")}}
    scores = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        RewardModel(read_config(run.path / "reward/config.json")).save(tmp_path / "model")
        judge_arms(config, run)
        scores.append(json.loads((run.path / "judges/reward_model/scores.json").read_text())["scores"])
    assert scores[0] != scores[1]
    config.evaluate.judge_options = {"reward_model": {"model": str(run.path / "reward")}}
    judge_arms(config, run)
    page = page_of(run, tmp_path / "report.html")
    assert "<strong>Warning.</strong> evaluate.judges names no judge" in page and "reward_model (optimised)" in page


@pytest.mark.parametrize(
    ("backbone", "options", "optimised"),
    [
        ("TIGER-Lab/VideoScore-v1.1", {}, True),  # the judge's own default
        ("TIGER-Lab/VideoScore-v1.1", {"model": "TIGER-Lab/VideoScore"}, False),
        ("compact", {}, False),
    ],
)
def test_a_judge_is_not_independent_of_a_reward_model_that_began_as_it(run, backbone, options, optimised):
    config = Config(**vars(run.config) | {"reward": dataclasses.replace(run.config.reward, backbone=backbone)})
    assert _trained_on(config, run, "videoscore", options) == optimised


def page_of(run: Run, path: Path) -> str:
    view = read_run(run.path)
    cards = cards_of([("", view.folder, view.rows, tuple(run.config.grid), run.config.generate.fps, view.factors)], 1)
    write_page(
        path, "page.html.j2", cards, title="t", run=view, judges=view.judges, notes=None, charts=[], counts={},
        settings="", versions={}, rounds=[],
    )  # fmt: skip
    return path.read_text()


@pytest.mark.parametrize(
    ("judges", "options", "match"),
    [
        (["eye"], {}, "evaluate.judges: expected one of .*'frames'"),
        (["frames"], {"vbench": {}}, "evaluate.judge_options.vbench: expected a judge of evaluate.judges"),
        (["frames", "frames"], {}, "expected each judge once"),
        (["frames"], {"frames": {"depth": 3}}, "judge_options.frames: expected some of features, got 'depth'"),
        (["frames"], {"frames": {"features": 1}}, "judge_options.frames.features: expected true or false, got 1"),
        (["vbench"], {"vbench": {"mode": "fast"}}, "judge_options.vbench.mode: expected one of 'custom_input'"),
        (["reward_model"], {}, "judge_options.reward_model.model: required"),
        (["openai"], {"openai": {"colour": 1}}, "judge_options.openai: expected some of model"),
    ],
)
def test_mistakes_are_known_before_any_clip_is_made(judges, options, match):
    config = Config(evaluate=EvaluateConfig(judges=judges, judge_options=options))
    with pytest.raises(UserError, match=match):
        check_judges(config)


def test_judges_are_set_on_the_command_line(tmp_path):
    (tmp_path / "c.yaml").write_text("evaluate:\n  judges: [frames]\n  judge_options: {frames: {features: true}}\n")
    parser = build_parser("halo evaluate", "judges")
    config = parse_config(parser, [str(tmp_path / "c.yaml"), "--evaluate.judges", "[frames, vbench]"])[0]
    assert config.evaluate.judges == ["frames", "vbench"]
    assert config.evaluate.judge_options == {"frames": {"features": True}}
