"""`halo import` and what follows from it: clips, labels and pairs of one's own through the stages of a run."""

import csv
import json
import os
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import torch
import yaml
from tiny import TINY_TRAIN, kill_when, output_hashes, tiny_wan

from halo_fast.data.clips import read_clip, write_clip
from halo_fast.data.imports import ImportedRow
from halo_fast.data.tables import CacheRow, LabelRow, PairRow, ScoreRow, read_rows
from halo_fast.families import family_of
from halo_fast.pipeline.cli import main
from halo_fast.pipeline.stages.reward import HELDOUT_FILE
from halo_fast.rewards import RewardModel, RewardModelConfig

SHARED = Path(os.environ.get("HALO_DATA", Path(__file__).parents[3] / "shared" / "data"))
SETTINGS = {
    "grid": [3, 2, 2],
    "generate": {
        "num_frames": 9, "height": 32, "width": 32, "fps": 8, "num_inference_steps": 2, "guidance_scale": 1.0,
        "batch_size": 2,
    },
    "reward": {"video_steps": 2, "patch_steps": 2, "batch_size": 4, "pretrained": False},
    "train": TINY_TRAIN | {"max_train_steps": 2},
    "evaluate": {"bootstrap": 20},
    "report": {"num_clips": 1},
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_wan().save_pretrained(folder)
    return folder


def config(folder: Path, model: Path | None, *sources: Path, **changes) -> Path:
    """A YAML file of a run on imported clips."""
    (folder / "held_out.txt").write_text("a cube jumps\na red ball rolls left\n")
    settings = {
        "output_dir": str(folder / "run"),
        "evaluation_prompts": str(folder / "held_out.txt"),
        "imports": {"sources": [str(source) for source in sources]},
        **({"pretrained_model_name_or_path": str(model)} if model else {}),
        **SETTINGS,
    }
    for name, value in changes.items():
        settings[name] = settings.get(name, {}) | value if isinstance(value, dict) else value
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    return folder / "config.yaml"


def table(path: Path, rows: list[dict]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def clips(folder: Path, count: int = 4, **changes) -> Path:
    """Clips of squares that move, 12 x 40 x 56 at 8 frames a second, two of each prompt, with captions."""
    folder.mkdir(parents=True)
    for number in range(count):
        video = torch.full((12, 40, 56, 3), 30 + 20 * number, dtype=torch.uint8)
        for frame in range(12):
            video[frame, 10:20, 8 + 2 * frame : 18 + 2 * frame, number % 3] = 250
        write_clip(folder / f"{number}.mp4", video, 8)
        (folder / f"{number}.txt").write_text(f"a cube number {number // 2}")
    return folder


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason=f"needs the data in {SHARED} or $HALO_DATA")
def test_fetv_from_the_import_to_the_report(tmp_path, model, capsys):
    fetv, run = SHARED / "fetv", tmp_path / "run"
    file = config(
        tmp_path, model, fetv, pairs={"dimensions": {"static_quality": 1, "temporal_quality": 2}, "patch_delta": 0.0}
    )
    assert main(["run", str(file)]) == 0
    assert not (run / "generate").exists() and not (run / "annotate").exists()
    assert "import: finished, 100 clips, 25 prompts, 100 changed, 100 labelled" in capsys.readouterr().err
    rows = read_rows(run / "import" / "clips.parquet", ImportedRow)
    listed = list(csv.DictReader((fetv / "videos" / "metadata.csv").open()))
    assert [(Path(row.source).name, row.prompt, row.generator) for row in rows] == [
        (one["file_name"], " ".join(one["prompt"].split()), one["generator"]) for one in listed
    ]
    assert all("10 frames a second sampled at 8" in row.changes for row in rows)
    _check_fetv_labels(fetv, run)
    assert len(list((run / "cache" / "latents").iterdir())) == 50
    assert len(read_rows(run / "pairs" / "pairs.parquet", PairRow)) == 25
    heldout = json.loads((run / "reward" / HELDOUT_FILE).read_text())["prompts"]
    assert len(heldout) == round(0.05 * 25) and set(heldout) < {row.prompt for row in rows}
    assert (run / "train" / "lora" / "pytorch_lora_weights.safetensors").exists()
    assert '<figure class="screen' in (run / "report" / "report.html").read_text()


def _check_fetv_labels(fetv: Path, run: Path) -> None:
    """Ratings are means over raters; a patch is a mean over its frames, rows and columns of the 2 x 4 x 4 labels."""
    labels = read_rows(run / "import" / "labels.parquet", LabelRow)
    ratings = list(csv.DictReader((fetv / "clips.csv").open()))
    for name, short in (("static_quality", "static"), ("temporal_quality", "temporal"), ("text_alignment", "align")):
        expected = [np.mean([float(row[f"{short}_h{rater}"]) for rater in range(3)]) for row in ratings]
        np.testing.assert_allclose([label.video[name] for label in labels], expected, rtol=1e-6)
    cells: dict[tuple[int, ...], list[float]] = {}
    for row in csv.DictReader((fetv / "patch_labels.csv").open()):
        key = tuple(int(row[name]) for name in ("row", "half", "patch_row", "patch_column"))
        cells.setdefault(key, []).append(float(row["score"]))
    for clip, source in ((0, (33, 240, 240)), (3, (16, 256, 256))):  # square ones: cells 2 x 2 make a patch
        frames = [int(8.0 * 0 + (k / 8) * 10 + 1e-9) for k in range(9)]
        for time, patch_frames in enumerate((frames[:1], frames[1:5], frames[5:])):
            halves = [int(frame >= source[0] // 2) for frame in patch_frames]
            for y in range(2):
                for x in range(2):
                    expected = np.mean(
                        [
                            np.mean(cells[clip, half, 2 * y + dy, 2 * x + dx])
                            for half in halves
                            for dy in (0, 1)
                            for dx in (0, 1)
                        ]
                    )
                    found = labels[clip].patches["quality"][4 * time + 2 * y + x]
                    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_ratings_alone_train_a_reward_of_whole_videos(tmp_path, model, capsys):
    source = clips(tmp_path / "clips")
    table(source / "scores.csv", [{"video": f"{k}.mp4", "beauty": k + 1} for k in range(4)])
    file = config(tmp_path, model, source, pairs={"dimensions": {"beauty": 1}})
    assert main(["run", str(file)]) == 2
    assert "set reward.patch_steps to 0 for a reward of whole videos" in capsys.readouterr().err
    file = config(tmp_path, model, source, pairs={"dimensions": {"beauty": 1}}, reward={"patch_steps": 0})
    assert main(["run", str(file), "--evaluate.num_prompts=2"]) == 0
    pairs = read_rows(tmp_path / "run" / "pairs" / "pairs.parquet", PairRow)
    assert len(pairs) == 2 and np.isnan([pair.patch_rewards_a for pair in pairs]).all()


def test_preferences_train_without_any_reward(tmp_path, model, capsys):
    source = clips(tmp_path / "clips")
    rows = [{"chosen": f"{k}.mp4", "rejected": f"{k + 1}.mp4", "prompt": f"a cube number {k // 2}"} for k in (0, 2)]
    (tmp_path / "clips" / "pairs.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    assert main(["run", str(config(tmp_path, model, source / "pairs.jsonl"))]) == 0
    error = capsys.readouterr().err
    assert all(f"{name}: left out, because" in error for name in ("reward", "score", "evaluate", "report"))
    pairs = read_rows(tmp_path / "run" / "pairs" / "pairs.parquet", PairRow)
    assert [(pair.video_reward_a, pair.video_reward_b) for pair in pairs] == [(5, 1), (5, 1)]
    assert (tmp_path / "run" / "train" / "manifest.json").exists()


def moving(frames: int, height: int, width: int, shade: int) -> torch.Tensor:
    """A square that moves, in shades of its own."""
    video = torch.full((frames, height, width, 3), shade, dtype=torch.uint8)
    for frame in range(frames):
        video[frame, 8:16, 2 * frame : 2 * frame + 10, shade % 3] = 250
    return video


def test_pairs_of_two_sizes_go_through_score_pairs_cache_and_train(tmp_path, model, capsys):
    source = tmp_path / "clips"
    source.mkdir()
    sizes = [(9, 32, 32)] * 4 + [(14, 40, 56)] * 4 + [(5, 32, 32)]  # the last is too short for three patches in time
    for number, size in enumerate(sizes):
        write_clip(source / f"{number}.mp4", moving(*size, 20 + 10 * number), 8)
        (source / f"{number}.txt").write_text(f"a cube number {number // 2 % 2}")
    rows = [
        {"chosen": f"{a}.mp4", "rejected": f"{b}.mp4", "prompt": f"a cube number {a // 2 % 2}"}
        for a, b in [(0, 1), (2, 3), (4, 5), (0, 5), (1, 8)]
    ]
    table(source / "pairs.csv", rows)
    table(source / "boxes.csv", [{"video": "4.mp4", "x0": 4, "y0": 4, "x1": 28, "y1": 36}])
    reward = RewardModel(RewardModelConfig(("visual_quality", "text_alignment", "dynamic_degree"), pretrained=False))
    reward.save(tmp_path / "reward")
    keep = {"sources": [str(source)], "size": "keep", "frames": "keep"}
    train = {"max_train_steps": 4, "train_batch_size": 2, "reference_draws": 2, "heldout_share": 0.0}
    file = str(
        config(
            tmp_path, model, imports=keep, train=train, reward_model=str(tmp_path / "reward"), score={"batch_size": 3}
        )
    )
    run = tmp_path / "run"
    for verb in ("import", "reward", "score", "pairs", "cache"):
        assert main([verb, file]) == 0, verb
    error = capsys.readouterr().err
    assert "8.mp4: a clip of 5 x 32 x 32: grid must have 1 to 2 patches along 2 latent frames; got 3" in error
    assert "its clips are c00000 of 9 x 32 x 32 and c00005 of 13 x 32 x 48, a pair needs one size" in error
    # of the damaged clip 32 x 48 pixels are shown, from (4, 4) on: the box is 32 rows and 24 columns of them
    (label,) = read_rows(run / "import" / "labels.parquet", LabelRow)
    assert label.patches["quality"] == pytest.approx([1, 5 - 4 * 0, 1, 5 - 4 * 0] * 3)
    scores = read_rows(run / "score" / "scores.parquet", ScoreRow)
    assert [row.clip_id for row in scores] == [f"c{number:05d}" for number in range(8)]
    alone = reward.eval()(read_clip(run / "import/videos/c00005.mp4")[None], ["a cube number 0"], (3, 2, 2))
    assert scores[5].patches["quality"] == pytest.approx(alone.patches.flatten().tolist(), rel=1e-5)
    # three given pairs; of the prompts without one there are none
    pairs = read_rows(run / "pairs" / "pairs.parquet", PairRow)
    assert [(pair.clip_a, pair.clip_b) for pair in pairs] == [
        ("c00000", "c00001"),
        ("c00002", "c00003"),
        ("c00004", "c00005"),
    ]
    assert main(["train", file, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert (
        "buckets: 2, each batch is of one" in printed and "latents [4, 4, 4, 6], 3 x 2 x 2 patches: 1 pairs" in printed
    )
    assert main(["train", file]) == 0
    log = list(csv.DictReader((run / "train" / "log.csv").open()))
    assert sorted(row["num_pairs"] for row in log) == ["1.0", "1.0", "2.0", "2.0"]
    assert (run / "train" / "lora" / "pytorch_lora_weights.safetensors").exists()
    # and out again, with their sizes
    assert main(["export", str(run), "--format", "huggingface"]) == 0
    exported = pyarrow.parquet.read_table(run / "export" / "huggingface" / "metadata.parquet").to_pylist()
    assert [(one["num_frames"], one["height"], one["width"]) for one in exported] == [(9, 32, 32)] * 4 + [
        (13, 32, 48)
    ] * 4


def test_clips_that_keep_their_sizes_are_refused_where_one_size_is_needed(tmp_path, model, capsys):
    source = tmp_path / "clips"
    source.mkdir()
    for number, size in enumerate([(9, 32, 32), (9, 32, 48)]):
        write_clip(source / f"{number}.mp4", moving(*size, 30), 8)
        (source / f"{number}.txt").write_text("a cube")
    table(source / "scores.csv", [{"video": f"{number}.mp4", "beauty": 1 + number} for number in range(2)])
    keep = {"sources": [str(source)], "size": "keep"}
    file = str(config(tmp_path, model, imports=keep, pairs={"dimensions": {"beauty": 1}}, reward={"patch_steps": 0}))
    assert main(["run", file, "--imports.generate=true", "--generate.strategy=guided"]) == 2
    assert "the strategy guided needs clips of generate's size, got keep" in capsys.readouterr().err
    assert main(["import", file]) == 0 and main(["reward", file]) == 2
    assert (
        "takes clips of one size, got 9 x 32 x 48 of c00001.mp4 and 9 x 32 x 32 of c00000.mp4"
        in capsys.readouterr().err
    )


def test_latents_are_those_of_the_fitted_clip(tmp_path, model):
    source = clips(tmp_path / "clips")
    rows = [{"chosen": f"{k}.mp4", "rejected": f"{k + 1}.mp4", "prompt": "p"} for k in (0, 2)]
    file = str(config(tmp_path, model, table(source / "pairs.csv", rows)))
    for verb in ("import", "pairs", "cache"):
        assert main([verb, file]) == 0
    run = tmp_path / "run"
    files = {row.id: row.file for row in read_rows(run / "cache" / "index.parquet", CacheRow)}
    from diffusers import WanPipeline
    from safetensors.torch import load_file

    family = family_of(WanPipeline.from_pretrained(model))
    row = read_rows(run / "import" / "clips.parquet", ImportedRow)[0]
    video = read_clip(run / "import" / row.video)
    assert video.shape == (9, 32, 32, 3) and row.changes.startswith("first 9 of 12 frames; middle 40 x 40 of 40 x 56")
    torch.testing.assert_close(load_file(run / "cache" / files[row.clip_id])["latents"], family.encode(video[None])[0])


def test_imported_and_generated_clips_are_one_table(tmp_path, model, capsys):
    source = clips(tmp_path / "clips", 2)
    table(source / "scores.csv", [{"video": f"{k}.mp4", "beauty": k + 1} for k in range(2)])
    table(source / "boxes.csv", [{"video": "0.mp4", "x0": 0, "y0": 0, "x1": 20, "y1": 20}])
    file = str(config(tmp_path, model, source, imports={"generate": True}, pairs={"dimensions": {"beauty": 1}}))
    for verb in ("import", "generate", "reward", "score", "pairs", "cache"):
        assert main([verb, file]) == 0, verb
    run = tmp_path / "run"
    scored = pyarrow.parquet.read_table(run / "score" / "scores.parquet").column("clip_id").to_pylist()
    assert scored == ["c00000", "c00001", "p0000_s0", "p0000_s1"]
    (pair,) = read_rows(run / "pairs" / "pairs.parquet", PairRow)
    assert pair.prompt == "a cube number 0" and {pair.clip_a, pair.clip_b} <= set(scored)
    assert len(list((run / "cache" / "latents").iterdir())) == 2
    assert main(["agreement", file, "--resamples=5"]) == 0
    assert "reward model against imported labels" in capsys.readouterr().out


def test_what_is_left_out_is_listed_with_its_reason(tmp_path, capsys):
    source = clips(tmp_path / "clips")
    (source / "5.mp4").write_bytes((source / "1.mp4").read_bytes())
    (source / "5.txt").write_text("a cube number 0")
    (source / "6.mp4").write_bytes((source / "2.mp4").read_bytes()[:-700])
    (source / "6.txt").write_text("cut")
    write_clip(source / "7.mp4", torch.zeros(3, 32, 32, 3, dtype=torch.uint8), 8)
    (source / "7.txt").write_text("short")
    (source / "3.txt").unlink()
    table(source / "scores.csv", [{"video": f"{k}.mp4", "beauty": 3} for k in (0, 5, 7)])
    # no model: nothing about its sizes is known, and nothing refused
    assert main(["import", str(source), "--output_dir", str(tmp_path / "run"), *changes()]) == 0
    error = capsys.readouterr().err
    reasons = {
        "3.mp4: no caption: 3.txt: No such file or directory",
        f"5.mp4: the same clip and prompt as {source / '1.mp4'}",
        "7.mp4: 3 frames at 8 a second, 9 are wanted (generate.num_frames)",
        "scores.csv: row 3: its clip",
    }
    assert "import: 5 left out:" in error and all(reason in error for reason in reasons), error
    assert "6.mp4: clip" in error and "expected a readable video" in error
    # the label of the copy is the clip's
    labels = read_rows(tmp_path / "run" / "import" / "labels.parquet", LabelRow)
    assert [label.clip_id for label in labels] == ["c00000", "c00001"]


def changes() -> list[str]:
    return [f"--generate.{name}={value}" for name, value in SETTINGS["generate"].items()] + ["--grid=[3,2,2]"]


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ([], "imports.sources: required"),
        (["nowhere"], "imports.sources: nowhere does not exist"),
        (["clips", "--generate.num_frames=11"], "4k+1 frames with sides divisible by 16, got num_frames 11"),
        (["clips", "--grid=[3,5,2]"], "grid must have 1 to 4 patches along 4 latent rows; got 5"),
        (["clips", "--imports.size=refuse"], "all 2 clips are left out; the first is clips/0.mp4: 40 x 56 pixels"),
        (["clips", "--imports.fps=fast"], "imports.fps"),
        (["clips", "--output_dir=clips/deep/run"], "output_dir: clips/deep/run lies inside the source clips"),
    ],
)
def test_mistakes_are_one_line(tmp_path, model, capsys, monkeypatch, words, complaint):
    monkeypatch.chdir(tmp_path)
    clips(tmp_path / "clips", 2)
    given = ["--pretrained_model_name_or_path", str(model), "--output_dir", "run", *changes()]
    sources = [word for word in words if not word.startswith("--")]
    assert main(["import", *sources, *given, *(word for word in words if word.startswith("--"))]) == 2
    assert complaint in capsys.readouterr().err


def test_an_import_is_kept_and_refused_when_its_source_changes(tmp_path, model, capsys):
    source = clips(tmp_path / "clips", 2)
    file = str(config(tmp_path, model, source))
    assert main(["import", file]) == main(["import", file]) == 0
    assert "import: finished before, kept" in capsys.readouterr().err
    (source / "0.txt").write_text("another")
    assert main(["import", file]) == 2
    assert f"was made from other source {source}" in capsys.readouterr().err
    assert main(["import", file, "--force"]) == 0
    # a run without labels, pairs and teacher says what is missing
    assert main(["run", file]) == 2
    assert "annotate.teacher: the import gives neither labels nor pairs" in capsys.readouterr().err


def test_a_killed_import_ends_as_an_undisturbed_one(tmp_path):
    source = clips(tmp_path / "clips", 4)
    words = {name: ["import", str(source), "--output_dir", str(tmp_path / name), *changes()] for name in ("a", "b")}
    assert main(words["a"]) == 0
    slow = (
        "import time; from halo_fast.data import imports; write = imports.write_clip\n"
        "imports.write_clip = lambda *rest: (write(*rest), time.sleep(0.2))\n"
        f"from halo_fast.pipeline.cli import main; main({words['b']!r})"
    )
    kill_when(slow, lambda: (tmp_path / "b" / "import" / "videos" / "c00001.mp4").exists())
    before = (tmp_path / "b" / "import" / "videos" / "c00000.mp4").stat().st_mtime_ns
    assert main(words["b"]) == 0
    assert (tmp_path / "b" / "import" / "videos" / "c00000.mp4").stat().st_mtime_ns == before
    assert output_hashes(tmp_path / "a" / "import") == output_hashes(tmp_path / "b" / "import")


def test_a_teacher_is_asked_only_about_what_people_have_not_scored(tmp_path, model, monkeypatch):
    source = clips(tmp_path / "clips")
    table(source / "scores.csv", [{"video": f"{k}.mp4", "visual_quality": 2} for k in range(2)])
    table(source / "boxes.csv", [{"video": "0.mp4", "x0": 0, "y0": 0, "x1": 28, "y1": 20}])
    file = str(
        config(tmp_path, model, source, annotate={"teacher": f"{__name__}:Fives"}, imports={"sources": [str(source)]})
    )
    for verb in ("import", "annotate", "reward"):
        assert main([verb, file]) == 0
    run = tmp_path / "run"
    asked = [row.clip_id for row in read_rows(run / "annotate" / "labels.parquet", LabelRow)]
    assert asked == ["c00001", "c00002", "c00003"]
    from halo_fast.pipeline.arguments import load_config
    from halo_fast.pipeline.clips import run_clips
    from halo_fast.pipeline.run import Run
    from halo_fast.pipeline.stages.reward import read_labels

    tables = [run / stage / "labels.parquet" for stage in ("import", "annotate")]
    _, data = read_labels(tables, run_clips(Run(load_config(file))))
    column = data.video_dimensions.index("visual_quality")
    assert data.video_scores[:, column].tolist() == [2, 2, 5, 5]
    assert data.patch_scores[0].min() == 1 and data.patch_scores[1:].eq(5).all()


class Fives:
    """A teacher who likes everything."""

    name = "fives"

    def __init__(self, request):
        self.grid = request.grid

    def labels(self, clips, compared=()):
        from halo_fast.teachers import Label

        for index, _ in enumerate(clips):
            video = dict.fromkeys(("visual_quality", "text_alignment", "dynamic_degree"), 5.0)
            yield index, Label(video, {"quality": [5.0] * int(np.prod(self.grid))})
