"""Clips, labels and pairs exported in every layout and read back by the importers; the summary of the same run."""

import json
import math

import numpy as np
import pytest
import torch

from halo_fast.data.clips import read_clip, write_clip
from halo_fast.data.importers import read_preferences
from halo_fast.data.imports import ImportedRow
from halo_fast.data.tables import LabelRow, PairRow, read_rows
from halo_fast.export.datasets import DatasetClip, DatasetPair
from halo_fast.files import hash_file
from halo_fast.pipeline.cli import main
from halo_fast.pipeline.export import export_run
from halo_fast.pipeline.inspect import inspect_run

FORMAT = [f"--generate.{setting}" for setting in ("num_frames=9", "height=32", "width=32", "fps=8", "crf=null")]
PROMPTS = ['a <b>ball</b>, "red"', "two\u2028lines", "a cube"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of six imported clips with scores, scores of patches and three pairs, one of them a tie."""
    folder, run = tmp_path_factory.mktemp("own"), tmp_path_factory.mktemp("run")
    generator = torch.Generator().manual_seed(0)
    for number in range(6):
        video = torch.randint(256, (9, 32, 32, 3), generator=generator).to(torch.uint8)
        write_clip(folder / f"{number}.mp4", video, 8)
        (folder / f"{number}.txt").write_text(PROMPTS[number // 2], encoding="utf-8")
    scores = [{"video": f"{k}.mp4", "beauty": 1 + k / 2} for k in range(4)]
    (folder / "scores.json").write_text(json.dumps(scores))
    rng = np.random.default_rng(0)
    patches = [
        {"row": clip, "patch_frame": f, "patch_row": y, "patch_column": x, "score": rng.uniform(1, 5)}
        for clip in range(4)
        for f in range(3)
        for y in range(3)
        for x in range(2)
    ]
    (folder / "patches.json").write_text(json.dumps(patches))
    pairs = [
        {"path_A": f"{2 * k}.mp4", "path_B": f"{2 * k + 1}.mp4", "prompt": PROMPTS[k], "VQ": choice}
        for k, choice in enumerate(["B", "A", "same"])
    ]
    (folder / "pairs.json").write_text(json.dumps(pairs))
    # patches of 2 latent rows, and of 1 and 1 latent columns
    words = ["import", str(folder), "--output_dir", str(run), *FORMAT, "--grid=[3,3,2]"]
    assert main(words) == 0
    return run


def clips_of(run):
    return {row.clip_id: row for row in read_rows(run / "import" / "clips.parquet", ImportedRow)}


def test_the_schema_of_clips_and_pairs(run, tmp_path):
    folder = export_run(run, "huggingface", tmp_path / "hf")
    rows, own = read_rows(folder / "metadata.parquet", DatasetClip), clips_of(run)
    assert [row.clip_id for row in rows] == list(own)
    labels = {row.clip_id: row for row in read_rows(run / "import" / "labels.parquet", LabelRow)}
    for row in rows:
        assert hash_file(folder / row.file_name) == hash_file(run / "import" / own[row.clip_id].video)
        assert (row.prompt, row.num_frames, row.height, row.width, row.fps) == (own[row.clip_id].prompt, 9, 32, 32, 8)
        if row.clip_id in labels:
            label = labels[row.clip_id]
            np.testing.assert_allclose(row.patches["quality"], label.patches["quality"])
            assert row.video == pytest.approx(dict(label.video))
            # latents of Wan: 3 x 4 x 4; a patch is 1 frame or 4, and 8 or 16 pixels
            assert (row.frame_edges, row.row_edges, row.column_edges) == ([0, 1, 5, 9], [0, 8, 16, 32], [0, 16, 32])
        else:
            assert math.isnan(row.video["beauty"]) and row.labeller == ""
    pairs = read_rows(folder / "pairs.parquet", DatasetPair)
    assert [(pair.chosen_id, pair.rejected_id, pair.tie, pair.margin) for pair in pairs] == [
        ("c00001", "c00000", False, 4), ("c00002", "c00003", False, 4), ("c00004", "c00005", True, 0)
    ]  # fmt: skip


def test_an_export_of_everything_imports_as_it_was(run, tmp_path):
    folder = export_run(run, "huggingface", tmp_path / "hf")
    again = tmp_path / "again"
    assert main(["import", str(folder), "--output_dir", str(again), *FORMAT, "--grid=[3,3,2]"]) == 0
    for before, after in zip(clips_of(run).values(), clips_of(again).values(), strict=True):
        assert (before.prompt, before.clip_id) == (after.prompt, after.clip_id) and after.changes == ""
        # colour conversion of the lossless file rounds by two levels
        first, second = (read_clip(base / "import" / before.video).int() for base in (run, again))
        assert (first - second).abs().max() <= 2
    for name, kind in (("labels", LabelRow), ("pairs", PairRow)):
        first, second = (read_rows(base / "import" / f"{name}.parquet", kind) for base in (run, again))
        if kind is LabelRow:
            for one, other in zip(first, second, strict=True):
                assert one.video == pytest.approx(dict(other.video))
                np.testing.assert_allclose(one.patches["quality"], other.patches["quality"], rtol=1e-6)
        else:
            assert {frozenset(((p.clip_a, p.video_reward_a), (p.clip_b, p.video_reward_b))) for p in first} == {
                frozenset(((p.clip_a, p.video_reward_a), (p.clip_b, p.video_reward_b))) for p in second
            }


@pytest.mark.parametrize("format", ["trl", "videodpo"])
def test_pairs_of_other_programs_read_back(run, tmp_path, format):
    folder = export_run(run, format, tmp_path / format)
    own = clips_of(run)
    found = read_preferences(folder / "pairs.jsonl" if format == "trl" else folder)
    assert [(one.prompt, one.preferred) for one in found] == [
        (" ".join(p.split()), {"overall": 1}) for p in PROMPTS[:2]
    ]
    hashes = [(hash_file(one.first), hash_file(one.second)) for one in found]
    files = {name: hash_file(run / "import" / row.video) for name, row in own.items()}
    assert hashes == [(files["c00001"], files["c00000"]), (files["c00002"], files["c00003"])]
    # the tie has no winner
    assert not (folder / "videos" / "c00004.mp4").exists()


def test_the_better_clips_for_supervised_training(run, tmp_path):
    folder = export_run(run, "diffsynth", tmp_path / "diffsynth")
    assert main(["import", str(folder), "--output_dir", str(tmp_path / "again"), *FORMAT, "--grid=[3,3,2]"]) == 0
    assert [row.prompt for row in clips_of(tmp_path / "again").values()] == [" ".join(p.split()) for p in PROMPTS[:2]]


def test_datasets_reads_the_export(run, tmp_path):
    datasets = pytest.importorskip("datasets")
    folder = export_run(run, "huggingface", tmp_path / "hf")
    table = datasets.load_dataset("parquet", data_files=str(folder / "metadata.parquet"), split="train")
    assert table["prompt"] == [row.prompt for row in clips_of(run).values()]


def test_mistakes_of_an_export_are_one_line(run, tmp_path, capsys):
    assert main(["export", str(tmp_path / "none"), "--format", "trl"]) == 2
    assert "expected a run directory with clips" in capsys.readouterr().err
    assert main(["export", str(run), "--format", "zip"]) == 2
    assert "format: expected one of diffusers, comfyui, huggingface, trl" in capsys.readouterr().err


def test_the_summary_says_what_is_there(run, tmp_path):
    text = inspect_run(run, tmp_path / "page.html")
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert {"clips 6", "prompts 3", "clips with labels 4", "pairs 3", "nothing 6"} <= set(lines)
    assert "beauty 4 1.75 0.56 1.00 2.50" in lines
    assert next(line for line in lines if line.startswith("videos")) == "videos 3 of 3 33% 0.00 2.00 4.00 4.00 4.00"
    labels = read_rows(run / "import" / "labels.parquet", LabelRow)
    means = np.mean([label.patches["quality"] for label in labels], axis=0).reshape(3, 3, 2)
    first = lines.index("mean quality of patches, time 2 of 3") + 2
    np.testing.assert_allclose([float(word) for word in lines[first].split()[1:]], means[1, 0], atol=0.006)
    worst = min(labels, key=lambda label: (label.video["beauty"] + np.mean(label.patches["quality"])) / 2)
    assert lines[lines.index("worst clips") + 2].startswith(worst.clip_id)
    page = (tmp_path / "page.html").read_text()
    assert "a &lt;b&gt;ball&lt;/b&gt;" in page and "<b>" not in page
