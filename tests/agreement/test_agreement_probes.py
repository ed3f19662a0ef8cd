"""Probes on models whose faults are known, the patch statistics by hand, and the verbs on tiny data."""

import itertools
import json

import numpy as np
import pyarrow.parquet
import pytest
import torch
from moving_shapes import GRID, SHAPES, draw_clip, make_clips, write_candidates
from torch import nn

from halo_fast.agreement.baselines import frame_statistics, patch_statistics
from halo_fast.agreement.probes import probe_all
from halo_fast.data.imports import ImportConfig
from halo_fast.data.tables import LabelRow, write_rows
from halo_fast.files import hash_file, write_json
from halo_fast.patches import PatchGrid
from halo_fast.pipeline.agreement import _trained_on
from halo_fast.pipeline.cli import main
from halo_fast.pipeline.clips import run_clips
from halo_fast.pipeline.config import Config
from halo_fast.pipeline.run import Run
from halo_fast.pipeline.stages.reward import HELDOUT_FILE
from halo_fast.rewards import RewardModelConfig, Rewards
from halo_fast.teachers import Label, LabelStore, label_key

CLIPS = make_clips(24, seed=9)
NAMES = list(itertools.product(SHAPES, ("red", "green"), ("left", "down")))
PROMPTS = [f"a {colour} {shape} moves {direction}" for shape, colour, direction in NAMES]
SOUND = torch.from_numpy(
    np.stack([draw_clip(np.random.default_rng(k), *name, speed=1.2) for k, name in enumerate(NAMES)])
)
ORDERS = torch.stack((SOUND, SOUND.flip(1), SOUND[:, 4:5].expand_as(SOUND))).float()


class Perfect(nn.Module):
    """Recognises every sound clip, forwards, backwards and frozen, and may have faults."""

    config = RewardModelConfig(("text_alignment", "dynamic_degree"))

    def __init__(self, *faults: str) -> None:
        super().__init__()
        self.faults = faults

    def forward(self, videos, prompts, grid):
        pool = PatchGrid(grid, *videos.shape[1:4]).pool
        scores, patches = [], []
        for video, prompt in zip(videos.float(), prompts, strict=True):
            order, clip = divmod(int((ORDERS - video).abs().mean(dim=(2, 3, 4, 5)).argmin()), len(PROMPTS))
            text = 4.0 if PROMPTS[clip] == prompt else 2.0
            motion = (4.5, 2.0, 1.5)[order]
            # damage is change against the sound clip, apart from a change of light
            quality = 5 - pool((video - ORDERS[order, clip]).std(dim=-1)).clamp(max=40) / 10
            if "ignores the prompt" in self.faults:
                text = 3.0
            if "likes stills" in self.faults and order == 2:
                motion = 5.0
            if "blind to order" in self.faults and order == 1:
                motion = 4.5
            if "misses the place" in self.faults:
                quality = quality.roll(1, dims=2)
            if "likes light" in self.faults:
                quality = quality + video.mean() / 20
            scores.append(torch.tensor([text, motion]))
            patches.append(quality[None])
        return Rewards(torch.stack(scores), torch.stack(patches))


def outcome(*faults: str) -> dict[str, bool | None]:
    return {probe.name: probe.passed for probe in probe_all(Perfect(*faults), SOUND, PROMPTS, GRID)}


def test_probes_pass_on_a_perfect_model():
    assert outcome() == dict.fromkeys(outcome(), True)
    assert list(outcome()) == ["prompt swap", "static copy", "planted damage", "frame order", "brightness"]


def test_probes_do_not_depend_on_the_batch():
    clips, prompts = SOUND[:5], PROMPTS[:5]
    whole, parts = (probe_all(Perfect(), clips, prompts, GRID, batch_size=size) for size in (5, 2))
    assert [probe.as_dict() for probe in whole] == [probe.as_dict() for probe in parts]


@pytest.mark.parametrize(
    ("fault", "failed"),
    [
        ("ignores the prompt", "prompt swap"),
        ("likes stills", "static copy"),
        ("misses the place", "planted damage"),
        ("blind to order", "frame order"),
        ("likes light", "brightness"),
    ],
)
def test_each_probe_finds_its_fault_and_no_other(fault, failed):
    assert {name for name, passed in outcome(fault).items() if not passed} == {failed}


def test_probes_of_what_a_model_does_not_score_are_not_measured():
    model = Perfect()
    model.config = RewardModelConfig(("visual_quality",))
    found = {probe.name: probe for probe in probe_all(model, SOUND, PROMPTS, GRID)}
    assert found["prompt swap"].passed is None and found["static copy"].passed is None
    plain = json.loads(json.dumps(found["prompt swap"].as_dict(), allow_nan=False))
    assert plain["figure"]["value"] is None and plain["passed"] is None


def test_a_model_of_patches_alone_is_probed_for_brightness():
    class Patches(Perfect):
        config = RewardModelConfig(())

        def forward(self, videos, prompts, grid):
            rewards = super().forward(videos, prompts, grid)
            return Rewards(rewards.video[:, :0], rewards.patches)

    for faults, passed in (((), True), (("likes light",), False)):
        found = {probe.name: probe for probe in probe_all(Patches(*faults), SOUND, PROMPTS, GRID)}
        assert found["brightness"].passed is passed


def test_clips_that_do_not_move_have_no_order():
    still = SOUND.clone()
    still[1] = SOUND[1, 4]  # what a generator made of a prompt that names a direction
    found = {probe.name: probe for probe in probe_all(Perfect(), still, PROMPTS, GRID)}
    assert found["frame order"].passed and found["frame order"].figure.value == 1


@pytest.mark.parametrize("part", ["video", "patches"])
def test_a_model_that_gives_no_numbers_is_not_probed(part):
    class Broken(Perfect):
        def forward(self, videos, prompts, grid):
            rewards = super().forward(videos, prompts, grid)
            getattr(rewards, part)[0] = torch.nan
            return rewards

    with pytest.raises(ValueError, match=r"model: expected numbers, got NaN (video|patch) scores for \d of 16 clips"):
        probe_all(Broken(), SOUND, PROMPTS, GRID)


def test_frame_statistics_are_what_they_say():
    video = torch.zeros(4, 8, 8, 3, dtype=torch.uint8)
    assert not frame_statistics(video).any()
    video[2:] = 255  # one change of everything in three steps
    found = frame_statistics(video)
    assert found[0] == pytest.approx(0.5) and found[-1] == pytest.approx(1 / 3) and found[-2] == pytest.approx(1)
    assert not frame_statistics(video[:1]).any(), "a still does not change"


def test_patch_statistics_of_a_patch_come_from_that_patch():
    videos = torch.zeros(1, 9, 32, 32, 3, dtype=torch.uint8)
    videos[0, :, 8:16, 24:32, 0] = 255
    found = patch_statistics(videos, (1, 4, 4))[0]
    assert found.shape[0] == 16 and found[7, 0] == pytest.approx(1) and found[:7, 0].max() == 0
    # the second half of the columns is the same less the clip's mean
    half = found.shape[1] // 2
    np.testing.assert_allclose(found[:, half:], found[:, :half] - found[:, :half].mean(axis=0), atol=1e-6)


def test_agreement_of_people_and_teachers_in_a_run(tmp_path, capsys):
    config = Config(output_dir=str(tmp_path), grid=GRID)
    run = Run(config)
    write_candidates(run, CLIPS)
    folder = tmp_path / "generate"
    clips = pyarrow.parquet.read_table(folder / "clips.parquet").to_pylist()
    rng = np.random.default_rng(0)
    truth, patches = rng.uniform(1, 5, 24), rng.uniform(1, 5, (24, 48))
    with LabelStore(tmp_path / "labels.sqlite") as store:
        for name, sign in (("human:anna", 1), ("gpt", 1), ("contrary", -1)):
            for index, clip in enumerate(clips[: 24 if name != "gpt" else 12]):
                quality = {"quality": 3 + sign * (patches[index] - 3)}
                label = Label({"visual_quality": 3 + sign * (truth[index] - 3)}, quality)
                key = label_key(hash_file(folder / clip["video"]), clip["prompt"], GRID, name)
                store.add({key: label}, name)
        key = label_key(hash_file(folder / clips[20]["video"]), clips[20]["prompt"], GRID, "gpt")
        store.add({key: Label(status="refused")}, "gpt")
    # the reward model is perfect on the clips that trained it and wrong on the others
    learned = truth[:24] * (np.arange(24) < 14) + (6 - truth) * (np.arange(24) >= 14)
    for name, table in {
        "score/scores.parquet": {
            "clip_id": [clip["clip_id"] for clip in clips],
            "video_visual_quality": learned,
            "patch_quality": list(patches),
        },
        "annotate/labels.parquet": {
            "clip_id": [clip["clip_id"] for clip in clips[:14]],
            "status": ["ok"] * 14,
            **{name: [""] * 14 for name in ("teacher", "reason")},
            "grid": [list(GRID)] * 14,
        },
    }.items():
        with run.stage(name.split("/")[0], {}, {"clips": folder}) as stage:
            pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / name)
            stage.finish({})
    arguments = ["agreement", "--output_dir", str(tmp_path), "--grid", "[3,4,4]", "--resamples", "5"]
    assert main(arguments) == 0
    sections = dict(part.split("\n", 1) for part in capsys.readouterr().out.strip().split("\n\n"))
    fresh, known = "clips that it did not train on", "on its training clips"
    assert set(sections) == {
        "contrary against gpt",
        "contrary against human:anna",
        "gpt against human:anna",
        f"reward model against contrary, {fresh}",
        f"reward model against gpt, {known}",
        f"reward model against human:anna, {fresh}",
    }, "the more trusted one is the truth"
    for title, expected in ((f"human:anna, {fresh}", "-1.00"), (f"gpt, {known}", "1.00")):
        row = sections[f"reward model against {title}"].splitlines()[1]
        assert row.startswith(f"visual_quality  {expected} "), row
    for title, expected in (("gpt against human:anna", "1.00"), ("contrary against human:anna", "-1.00")):
        lines = {line.split("  ")[0]: line for line in sections[title].splitlines()}
        assert set(lines) == {"", "visual_quality", "patch quality"}
        assert all(f" {expected} [" in lines[row] for row in ("visual_quality", "patch quality")), sections[title]
    # scores of clips that have been made again since are not compared with the labels of these
    write_candidates(Run(config, force=True), make_clips(len(CLIPS.prompts), seed=99))
    assert main(arguments) == 2
    assert "score: generate changed since it was made; run `halo score` again" in capsys.readouterr().err


def test_the_clips_that_only_calibrated_a_reward_model_are_those_of_its_training(tmp_path):
    """Examples are drawn from too, so the prompts that are held out are kept with the model."""
    write_candidates(Run(Config(output_dir=str(tmp_path), grid=GRID)), CLIPS)
    clips = run_clips(Run(Config(output_dir=str(tmp_path), grid=GRID))).rows
    run = Run(Config(output_dir=str(tmp_path), grid=GRID, imports=ImportConfig(sources=["clips"])))
    missing = {"quality": [3.0] * 48}
    rows = [
        LabelRow(clip.clip_id, "imported", "ok", "", list(GRID), {"visual_quality": 3.0}, missing) for clip in clips
    ]
    write_rows(tmp_path / "import" / "labels.parquet", rows, LabelRow)
    kept = clips[0].prompt
    write_json(tmp_path / "reward" / HELDOUT_FILE, {"prompts": [kept]})
    assert _trained_on(run.config, run, clips) == {clip.clip_id for clip in clips if clip.prompt != kept}
    (tmp_path / "reward" / HELDOUT_FILE).unlink()
    run.config.reward.examples = "demo"  # with which an earlier version held out nobody knows whom
    assert _trained_on(run.config, run, clips) == {clip.clip_id for clip in clips}


def test_agreement_needs_two(tmp_path, capsys):
    write_candidates(Run(Config(output_dir=str(tmp_path), grid=GRID)), CLIPS)
    assert main(["agreement", "--output_dir", str(tmp_path)]) == 2
    assert "at least two of teachers, people and reward model, got none" in capsys.readouterr().err


def test_reward_eval_mistakes_are_one_line(tmp_path, capsys):
    assert main(["reward", "eval"]) == 2
    assert "expected --data, --model or both" in capsys.readouterr().err
    assert main(["reward", "eval", "--data", str(tmp_path / "nothing")]) == 2
    assert "does not exist; expected a folder like FETV's" in capsys.readouterr().err
    (tmp_path / "t.csv").write_text("path_A,path_B,prompt,VQ\na,b,x,A\n")
    (tmp_path / "a").write_bytes(b"")
    (tmp_path / "b").write_bytes(b"")
    assert main(["reward", "eval", "--data", str(tmp_path / "t.csv")]) == 2
    assert "preferences need a reward model; train one by `halo reward`" in capsys.readouterr().err


def test_agreement_refuses_scores_that_are_nan(tmp_path, capsys):
    write_candidates(Run(Config(output_dir=str(tmp_path), grid=GRID)), CLIPS)
    names = pyarrow.parquet.read_table(tmp_path / "generate" / "clips.parquet")["clip_id"]
    table = pyarrow.table({"clip_id": names, "video_visual_quality": [np.nan] * len(names)})
    with Run(Config(output_dir=str(tmp_path), grid=GRID)).stage("score", {}, {"clips": tmp_path / "generate"}) as stage:
        pyarrow.parquet.write_table(table, stage.folder / "scores.parquet")
        stage.finish({})
    assert main(["agreement", "--output_dir", str(tmp_path), "--grid", "[3,4,4]"]) == 2
    assert "expected numbers in visual_quality, got NaN" in capsys.readouterr().err
