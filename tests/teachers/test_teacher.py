"""Teachers: what a label may say, the store that pays once, the demo's teacher, the stage annotate."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import torch
from moving_shapes import GRID, PlantedTeacher, make_clips, write_candidates
from scipy.stats import norm
from tiny import output_hashes

from halo_fast.demo.teacher import ERRORS_FILE, DemoTeacher
from halo_fast.errors import UserError
from halo_fast.pipeline.config import AnnotateConfig, Config
from halo_fast.pipeline.run import Run
from halo_fast.pipeline.stages.annotate import annotate
from halo_fast.teachers import Label, LabelStore, label_key

CLIPS = make_clips(10, seed=3)
SUPPORT = Path(__file__).parents[1] / "support"


def run_in(folder: Path, **settings) -> Run:
    run = Run(Config(output_dir=str(folder), grid=GRID, annotate=AnnotateConfig(**settings)))
    write_candidates(run, CLIPS)
    return run


def labels_of(run: Run) -> list[dict]:
    return pyarrow.parquet.read_table(run.path / "annotate" / "labels.parquet").to_pylist()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"video": {"visual_quality": 5.5}}, "score of visual_quality: expected 1 to 5 or NaN, got 5.5"),
        ({"patches": {"quality": [3.0, 0.0]}}, "score of quality: expected 1 to 5 or NaN, got 0.0"),
        ({"video": {"beauty": 3.0}}, "got 'beauty'"),
        ({"video": {"visual_quality": 3.0}, "status": "refused"}, "only an ok label"),
    ],
)
def test_a_label_keeps_to_the_rubric(arguments, complaint):
    with pytest.raises(ValueError, match=complaint):
        Label(**arguments)


def test_store_gives_back_what_it_was_given_and_keeps_the_first_answer(tmp_path):
    label = Label({"visual_quality": 4.5, "text_alignment": math.nan}, {"quality": [1.0, math.nan, 5.0]})
    with LabelStore(tmp_path / "labels.sqlite") as store:
        store.add({"a": label, "b": Label(status="refused")}, "somebody")
        store.add({"a": Label({"visual_quality": 1.0})}, "somebody")
    with LabelStore(tmp_path / "labels.sqlite") as store:
        found = store.find(["a", "b", "c"])
    assert set(found) == {"a", "b"}
    assert found["b"] == Label(status="refused")
    assert found["a"].video["visual_quality"] == 4.5 and math.isnan(found["a"].video["text_alignment"])
    np.testing.assert_array_equal(found["a"].patches["quality"], [1, math.nan, 5])


def test_key_depends_on_everything_an_answer_depends_on():
    question = ("hash", "a red square", (3, 4, 4), "demo")
    others = [("other", *question[1:]), (*question[:1], "a blue square", *question[2:])]
    others += [(*question[:2], (1, 4, 4), question[3]), (*question[:3], "gpt")]
    assert len({label_key(*asked) for asked in [question, question, *others]}) == 5


def test_a_file_that_is_no_store_is_named(tmp_path):
    (tmp_path / "labels.sqlite").write_bytes(b"not a database, but long enough to be taken for one" * 20)
    with pytest.raises(UserError, match="labels.sqlite: expected a label store"):
        LabelStore(tmp_path / "labels.sqlite")


def demo_teacher(noisy_share: float, seed: int = 0, errors: str = "person") -> DemoTeacher:
    """The demo's teacher over meters whose readings are written in the clip's first pixels."""

    def defects(videos, prompts):
        severity = videos.flatten(1)[:, :48].float().reshape(-1, *GRID) / 255
        return severity, severity[:, None]

    def fidelity(videos, prompts):
        digit, colour, motion, amount = (videos.flatten(1)[:, 48:52].float() / 255).unbind(1)
        return {"digit": digit, "colour": colour, "motion": motion, "motion_amount": amount * 10}

    return DemoTeacher(defects, fidelity, GRID, noisy_share, seed, errors=errors)


def read_off(label: Label) -> np.ndarray:
    return np.array([*label.video.values(), *label.patches["quality"]])


def demo_clips(count: int) -> torch.Tensor:
    return torch.randint(256, (count, 1, 8, 8, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def test_demo_teacher_puts_readings_on_the_rubric():
    video = torch.zeros(1, 1, 8, 8, 3, dtype=torch.uint8)
    flat = video.view(-1)
    flat[:48] = torch.arange(48) * 5
    flat[48:52] = torch.tensor([255, 0, 255, 255])
    (label,) = demo_teacher(0.0).label(video, ["a green 7"])
    severity = np.arange(48) * 5 / 255
    np.testing.assert_allclose(label.patches["quality"], 5 - 4 * severity, rtol=1e-6)
    assert label.video["visual_quality"] == pytest.approx(5 - 4 * severity.mean())
    assert label.video["text_alignment"] == 3  # the digit is there, the colour is not
    assert label.video["dynamic_degree"] == 5
    flat[51] = 0
    assert demo_teacher(0.0).label(video, ["a green 7"])[0].video["dynamic_degree"] == 1  # nothing moves


def test_demo_teacher_errs_on_a_minority_and_as_people_do():
    videos, prompts = demo_clips(400), ["a green 7"] * 400
    exact = np.stack([read_off(label) for label in demo_teacher(0.0).label(videos, prompts)])
    given = np.stack([read_off(label) for label in demo_teacher(0.2).label(videos, prompts)])
    noisy = (given != exact).any(axis=1)
    assert 0.12 < noisy.mean() < 0.28
    assert (given[noisy] * 2 == np.round(given[noisy] * 2)).all()
    error = given[noisy] - exact[noisy]
    assert np.abs(error).max() <= 1.75 + 1e-9  # bias, a slipped grade and rounding
    assert np.abs(error).mean() > 0.15
    # raters differ by a bias of their own, which a whole clip shares
    assert error.mean(axis=1).std() > 3 * error.std() / math.sqrt(error.shape[1])


def test_demo_teacher_errs_as_gpt_4o_does_on_pairs_of_videos():
    videos = torch.full((600, 1, 8, 8, 3), 127, dtype=torch.uint8)
    videos.view(600, -1)[:, 60:63] = torch.randint(256, (600, 3), generator=torch.Generator().manual_seed(0)).byte()
    exact = read_off(demo_teacher(0.0).label(videos[:1], ["a green 7"])[0])
    given = np.stack(
        [read_off(label) for label in demo_teacher(1.0, errors="gpt-4o").label(videos, ["a green 7"] * 600)]
    )
    known = json.loads(ERRORS_FILE.read_text())
    for columns, spread in ((slice(0, 1), "visual_quality"), (slice(3, None), "patch")):
        deviation = known["judge"]["noise"] * known["spread"][spread]
        # the normal distribution in whole grades, its tails in the outermost
        edges = norm.cdf([1.5, 2.5, 3.5, 4.5], exact[columns].mean(), deviation)
        expected = np.diff([0, *edges, 1])
        found = np.bincount(given[:, columns].astype(int).ravel(), minlength=6)[1:] / given[:, columns].size
        np.testing.assert_allclose(found, expected, atol=4 * math.sqrt(0.25 / given[:, columns].size))
    # errors of patches are their own
    assert np.abs(np.corrcoef(given[:, 3:].T) - np.eye(48)).max() < 0.25
    assert demo_teacher(1.0, errors="gpt-4o").name != demo_teacher(1.0).name


def test_demo_teacher_answers_the_same_clip_alike_in_any_batch():
    videos, prompts = demo_clips(40), [f"a green {n % 10}" for n in range(40)]
    together = demo_teacher(0.5).label(videos, prompts)
    alone = [demo_teacher(0.5).label(videos[n : n + 1], prompts[n : n + 1])[0] for n in range(40)]
    assert together == alone
    assert demo_teacher(0.5, seed=1).label(videos, prompts) != together


def test_annotate_writes_labels_of_every_clip(tmp_path):
    run = run_in(tmp_path)
    annotate(run.config, run, PlantedTeacher(CLIPS))
    rows = labels_of(run)
    assert [row["clip_id"] for row in rows] == [f"p{n // 2:04d}_s{n % 2}" for n in range(10)]
    assert all(row["status"] == "ok" and tuple(row["grid"]) == GRID for row in rows)
    patches = np.array([row["patch_quality"] for row in rows])
    np.testing.assert_allclose(patches, 5 - 4 * CLIPS.severity.reshape(10, -1), rtol=1e-6)


def test_annotate_scores_some_clips_only_on_demand(tmp_path):
    run = run_in(tmp_path, num_clips=4)
    annotate(run.config, run, PlantedTeacher(CLIPS, tmp_path / "questions"))
    assert len(labels_of(run)) == len((tmp_path / "questions").read_text().split()) == 4


def test_annotate_continues_after_sigkill_and_never_asks_twice(tmp_path):
    undisturbed = run_in(tmp_path / "undisturbed")
    annotate(undisturbed.config, undisturbed, PlantedTeacher(CLIPS))
    questions = tmp_path / "questions"
    run = run_in(tmp_path / "killed")
    script = f"""
import sys
sys.path.insert(0, {str(SUPPORT)!r})
from pathlib import Path
from moving_shapes import GRID, PlantedTeacher, make_clips
from halo_fast.pipeline.config import Config
from halo_fast.pipeline.run import Run
from halo_fast.pipeline.stages.annotate import annotate
run = Run(Config(output_dir={str(run.path)!r}, grid=GRID))
teacher = PlantedTeacher(make_clips(10, seed=3), Path({str(questions)!r}), patience=int(sys.argv[1]), batch_size=3)
annotate(run.config, run, teacher)
"""
    for patience in (1, 2):
        killed = subprocess.run([sys.executable, "-c", script, str(patience)], env=os.environ)
        assert killed.returncode == -signal.SIGKILL
    assert len(questions.read_text().split()) == 9
    annotate(run.config, run, PlantedTeacher(CLIPS, questions, batch_size=3))
    assert sorted(map(int, questions.read_text().split())) == list(range(10))
    assert output_hashes(run.path / "annotate") == output_hashes(undisturbed.path / "annotate")
    # not even a stage that is redone from nothing pays again
    again = Run(run.config, force=True)
    annotate(again.config, again, PlantedTeacher(CLIPS, questions))
    assert len(questions.read_text().split()) == 10


class Refuser(PlantedTeacher):
    name = "refuser"

    def label(self, videos, prompts):
        return [Label(status="refused") for _ in prompts]


def test_refusals_stay_refusals(tmp_path):
    run = run_in(tmp_path)
    with pytest.raises(UserError, match="gave no score on 10 clips.*refused"):
        annotate(run.config, run, Refuser(CLIPS))
    assert not (run.path / "annotate" / "labels.parquet").exists()


def test_some_refusals_are_recorded_without_scores(tmp_path):
    class Picky(PlantedTeacher):
        name = "picky"

        def label(self, videos, prompts):
            labels = super().label(videos, prompts)
            return [Label(status="refused"), *labels[1:]]

    run = run_in(tmp_path)
    annotate(run.config, run, Picky(CLIPS, batch_size=3))
    rows = labels_of(run)
    assert [row["status"] == "refused" for row in rows] == [n % 3 == 0 for n in range(10)]
    for row in rows:
        refused = row["status"] == "refused"
        assert math.isnan(row["video_visual_quality"]) == refused
        assert all(math.isnan(score) == refused for score in row["patch_quality"])


def test_mistakes_are_named(tmp_path):
    run = run_in(tmp_path)
    for name in ("nobody", ""):
        run.config.annotate.teacher = name
        with pytest.raises(
            UserError, match="annotate.teacher: expected one of 'demo', 'human', 'openai', or your own as"
        ):
            annotate(run.config, run)
    run.config.annotate.teacher = "human:"
    with pytest.raises(UserError, match=r'annotate.teacher: expected letters.*as in "human:anna"'):
        annotate(run.config, run)
    run.config.grid = (1, 1, 1)
    with pytest.raises(UserError, match="grid: teacher 'planted' scores"):
        annotate(run.config, Run(run.config, force=True), PlantedTeacher(CLIPS))
    run.config.grid = GRID
    (run.path / "generate" / "videos" / "p0002_s0.mp4").write_bytes(b"no video")
    with pytest.raises(UserError, match=r"p0002_s0\.mp4: damaged since it was made; delete it and run `halo generate`"):
        annotate(run.config, Run(run.config, force=True), PlantedTeacher(CLIPS))
    with pytest.raises(UserError, match="run `halo generate`"):
        empty = Run(Config(output_dir=str(tmp_path / "empty")))
        annotate(empty.config, empty)
