"""Teachers by name: registered ones, one's own, the demo's; and labels through the library alone."""

import sqlite3
import subprocess
import sys

import numpy as np
import pyarrow.parquet
import pytest
import torch
from moving_shapes import GRID, PlantedTeacher, make_clips, write_candidates
from own_teacher import brightness

from halo_fast.data.clips import read_clip, write_clip
from halo_fast.demo import world
from halo_fast.errors import UserError
from halo_fast.pipeline.config import AnnotateConfig, Config, to_yaml
from halo_fast.pipeline.run import Run
from halo_fast.pipeline.stages.annotate import annotate
from halo_fast.teachers import Clip, Label, LabelStore, TeacherRequest, build_teacher
from halo_fast.teachers.labelling import candidate_pairs, draw_clips, judge_pairs, label_clips, open_clip
from halo_fast.teachers.rubric import RUBRIC_DIMENSIONS

CLIPS = make_clips(6, seed=5)


@pytest.fixture
def store(tmp_path):
    with LabelStore(tmp_path / "labels.sqlite") as store:
        yield store


def test_a_teacher_of_ones_own_labels_by_its_dotted_name_on_the_command_line(tmp_path):
    settings = AnnotateConfig(teacher="own_teacher:brightness", options={"bias": 0.25})
    run = Run(Config(output_dir=str(tmp_path / "run"), grid=GRID, annotate=settings))
    write_candidates(run, CLIPS)
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(run.config))
    done = subprocess.run([sys.executable, "-m", "halo_fast", "annotate", str(file)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = pyarrow.parquet.read_table(run.path / "annotate" / "labels.parquet").to_pylist()
    assert len(rows) == 6
    for row in rows:
        video = read_clip(run.path / "generate" / "videos" / f"{row['clip_id']}.mp4")
        expected = 1.25 + 4 * video.numpy().mean() / 255
        assert row["teacher"] == "brightness bias=0.25" and row["status"] == "ok"
        assert row["video_visual_quality"] == pytest.approx(expected, rel=1e-6)
        assert row["patch_quality"] == pytest.approx([expected] * 48, rel=1e-6)
    changed = ["--annotate.options.bias", "0.5"]
    again = subprocess.run(
        [sys.executable, "-m", "halo_fast", "annotate", str(file), *changed], capture_output=True, text=True
    )
    assert again.returncode and "was made with" in again.stderr and "bias" in again.stderr


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("", "annotate.teacher: expected one of 'demo', 'human', 'openai', or your own .*set it"),
        ("gpt", "annotate.teacher: expected one of 'demo', 'human', 'openai', or your own .*got 'gpt'"),
        (
            "no_such_module:teacher",
            "annotate.teacher: expected one of .*got 'no_such_module:teacher', which cannot be imported",
        ),
        (
            "own_teacher:darkness",
            "annotate.teacher: expected one of .*got 'own_teacher:darkness', which cannot be imported",
        ),
        ("human:../x", "annotate.teacher: expected letters"),
    ],
)
def test_names_that_lead_nowhere_are_reported_with_those_that_do(store, name, complaint):
    with pytest.raises(UserError, match=complaint):
        build_teacher(TeacherRequest(name, GRID, store), "annotate.teacher")


@pytest.mark.parametrize(
    ("name", "options", "complaint"),
    [
        ("openai", {"modell": "x"}, "annotate.openai: expected some of model, .*got 'modell'"),
        ("openai", {"max_frames": 0}, "annotate.openai.max_frames: expected at least 1, got 0"),
        ("demo", {"noise": 0.2}, "annotate.options: expected some of noisy_share, errors, got 'noise'"),
        ("demo", {"noisy_share": 1.5}, "annotate.options.noisy_share: expected .*at most 1, got 1.5"),
    ],
)
def test_options_are_checked_by_the_teacher_that_has_them(store, name, options, complaint):
    with pytest.raises(UserError, match=complaint):
        build_teacher(TeacherRequest(name, GRID, store, options))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"grid": (1, 4, 4)}, r"grid: .* \(3, 4, 4\), got \(1, 4, 4\)"),
        ({"video_size": (9, 64, 32)}, r"generate: .*\(9, 32, 32\), got \(9, 64, 32\)"),
        ({"prompts": ["a dog on a beach"]}, "prompts: .*use another teacher"),
    ],
)
def test_the_demos_teacher_refuses_clips_of_another_world(store, changes, complaint):
    request = {"name": "demo", "grid": GRID, "store": store, "video_size": (9, 32, 32)} | changes
    with pytest.raises(UserError, match=complaint):
        build_teacher(TeacherRequest(**request))


def test_the_demos_teacher_scores_planted_damage_lower(store):
    clips = world.draw("train", 4, torch.Generator().manual_seed(0))
    video = world.to_uint8(clips.video)
    broken = video.clone()
    broken[:, 5:, 8:16, 8:16] = torch.randint(256, (4, 4, 8, 8, 3), dtype=torch.uint8)
    request = TeacherRequest("demo", GRID, store, {"noisy_share": 0.0}, (9, 32, 32), clips.prompts)
    teacher = build_teacher(request)
    asked = [
        Clip(f"{name} {index}", prompt, lambda frames=frames: frames)
        for name, videos in (("sound", video), ("broken", broken))
        for index, (frames, prompt) in enumerate(zip(videos, clips.prompts, strict=True))
    ]
    labels = label_clips(asked, teacher, store)
    quality = np.array([label.patches["quality"] for label in labels]).reshape(2, 4, *GRID)
    assert (quality[1, :, 2, 1, 1] < quality[0, :, 2, 1, 1] - 1).all()
    assert label_clips(asked, teacher, store) == labels


def test_every_draw_is_a_beginning_of_the_draw_of_all():
    everything = draw_clips(50, None, seed=3)
    assert sorted(everything) == list(range(50)) and everything != list(range(50))
    assert draw_clips(50, 7, seed=3) == everything[:7] and draw_clips(50, 80, seed=3) == everything
    assert draw_clips(50, 7, seed=4) != everything[:7]


def test_annotate_and_the_label_page_take_the_same_clips(tmp_path):
    from halo_fast.pipeline.label import LabelServer

    run = Run(Config(output_dir=str(tmp_path), grid=GRID, seed=2, annotate=AnnotateConfig(num_clips=3)))
    write_candidates(run, CLIPS)
    annotate(run.config, run, PlantedTeacher(CLIPS))
    rows = pyarrow.parquet.read_table(tmp_path / "annotate" / "labels.parquet").to_pylist()
    with LabelServer(run.config, "anna") as server:
        prompts = [server.clip(index)["prompt"] for index in range(server.count)]
    taken = [CLIPS.prompts[int(row["clip_id"][1:5]) * 2 + int(row["clip_id"][-1])] for row in rows]
    assert sorted(prompts) == sorted(taken) and len(prompts) == 3


def test_clips_in_files_are_labelled_without_a_run(tmp_path, store):
    paths = [tmp_path / f"{index}.mp4" for index in range(3)]
    for path, video in zip(paths, CLIPS.videos[[0, 1, 0]], strict=True):
        write_clip(path, torch.from_numpy(video), fps=8)
    prompts = [CLIPS.prompts[index] for index in (0, 1, 0)]
    clips = [open_clip(path, prompt) for path, prompt in zip(paths, prompts, strict=True)]
    teacher = brightness(TeacherRequest("own", GRID, store))
    labels = label_clips(clips, teacher, store)
    expected = [1 + 4 * read_clip(path).numpy().mean() / 255 for path in paths]
    assert [label.video["visual_quality"] for label in labels] == pytest.approx(expected, rel=1e-9)
    with sqlite3.connect(store.path) as connection:
        assert connection.execute("SELECT COUNT(*) FROM labels").fetchone() == (2,)  # equal clips are one question
    with pytest.raises(UserError, match=r"gone\.mp4: the clip is gone"):
        open_clip(tmp_path / "gone.mp4", "a ball")


def test_a_judge_of_ones_own_is_asked_for_each_pair_once(store):
    class Longer(PlantedTeacher):
        name = "longer"
        asked = 0

        def judge(self, pairs):
            for index, (a, b) in reversed(list(enumerate(pairs))):
                self.asked += 1
                winner = "a" if len(a.hash) > len(b.hash) else "b"
                yield index, {"status": "ok", "reason": ""} | dict.fromkeys(RUBRIC_DIMENSIONS, winner)

    clips = [Clip(hash, "p", lambda: torch.zeros(1)) for hash in ("1", "22", "333", "22")]
    pairs = candidate_pairs(clips, [0, 0, 1, 0])
    assert pairs == [(0, 1), (0, 3)]
    teacher = Longer(CLIPS)
    compared = [(clips[a], clips[b]) for a, b in [*pairs, (2, 0)]]
    for _ in range(2):
        verdicts = [judgement["visual_quality"] for judgement in judge_pairs(compared, teacher, store)]
        assert verdicts == ["b", "b", "a"]
    assert teacher.asked == 2  # two of the pairs are equal


def test_what_nobody_answered_is_not_kept(store):
    class Absent(PlantedTeacher):
        name = "absent"

        def label(self, videos, prompts):
            return [Label(status="unavailable", reason="asleep")] * len(prompts)

    clips = [Clip("h", "p", lambda: torch.zeros(1, 2, 2, 3))]
    assert label_clips(clips, Absent(CLIPS), store)[0].status == "unavailable"
    assert store.teachers() == []
