"""Human labels and preferences, each layout written by the test and read back; mistakes are named with their row."""

import csv
import io
import json
import os
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from sources import table, touch

from halo_fast.data.clips import write_clip
from halo_fast.data.importers import Ratings, load_frames, pool_marks, read_human, read_preferences, read_ratings
from halo_fast.data.sources import read_source
from halo_fast.errors import UserError

SHARED = Path(os.environ.get("HALO_DATA", Path(__file__).parents[3] / "shared" / "data"))
RNG = np.random.default_rng(0)


def fetv(folder: Path, rows: list[dict] | None = None) -> Path:
    rows = rows or [
        {"prompt": f"p{k // 2}", "model": "ab"[k % 2]}
        | {f"{name}_h{rater}": (k + rater) % 5 + 1 for name in ("static", "temporal", "align") for rater in range(3)}
        for k in range(4)
    ]
    table(folder / "clips.csv", rows)
    np.savez(folder / "clips.npz", video=RNG.integers(256, size=(4, 3, 16, 16, 3)).astype(np.uint8))
    return folder


def test_fetv_folder(tmp_path):
    found = read_ratings(fetv(tmp_path))
    assert found.source == "FETV" and found.generators == ["a", "b", "a", "b"]
    assert found.prompts == ["p0", "p0", "p1", "p1"]
    np.testing.assert_array_equal(found.scores["static_quality"], [[1, 2, 3], [2, 3, 4], [3, 4, 5], [4, 5, 1]])
    assert load_frames(found.clips[0]).shape == (3, 16, 16, 3)


def test_local_defects_folder(tmp_path):
    masks = RNG.random((2, 24, 24)) < 0.2
    table(tmp_path / "manifest.csv", [{"row": 0, "class": "a"}, {"row": 1, "class": "b"}])
    images = RNG.integers(256, size=(2, 24, 24)).astype(np.uint8)
    np.savez(tmp_path / "x.npz", image=images, mask=np.packbits(masks, axis=-1))
    found = read_ratings(tmp_path)
    np.testing.assert_array_equal(np.stack(found.marks), masks)
    assert torch.equal(load_frames(found.clips[1])[0, :, :, 2], torch.from_numpy(images[1]))
    pooled = pool_marks(found.marks, 3, 4)
    np.testing.assert_allclose(pooled[0, 1, 2], masks[0, 8:16, 12:18].mean(), rtol=1e-6)


@pytest.mark.parametrize("suffix", ["parquet", "json"])
def test_video_feedback(tmp_path, suffix):
    rows = [
        {
            "id": str(k),
            "text prompt": f"p{k}",
            "images": ["x"],
            "visual quality": k + 1,
            "temporal consistency": 4,
            "dynamic degree": 1,
            "text-to-video alignment": 2,
            "factual consistency": 3,
        }
        for k in range(4)
    ]
    for k in range(4):
        for frame in range(2):
            (tmp_path / "images" / str(k)).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (k, frame, 0)).save(tmp_path / "images" / str(k) / f"{frame:02}.png")
    if suffix == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "train.parquet")
    else:
        (tmp_path / "train.json").write_text(json.dumps(rows))
    found = read_ratings(tmp_path)
    # 1 to 4 becomes 1 to 5
    np.testing.assert_allclose(found.scores["visual_quality"][:, 0], [1, 7 / 3, 11 / 3, 5])
    frames = load_frames(found.clips[2])
    assert frames.shape == (2, 8, 8, 3) and frames[1, 0, 0].tolist() == [2, 1, 0]
    short = [{name: value for name, value in row.items() if name != "dynamic degree"} for row in rows]
    (tmp_path / "short").mkdir()
    (tmp_path / "short" / "train.json").write_text(json.dumps(short))
    with pytest.raises(UserError, match="row 1: expected VideoFeedback's five scores, got no dynamic degree"):
        read_ratings(tmp_path / "short")
    (tmp_path / "images" / "3").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"row 4: no frames of '3'"):
        read_ratings(tmp_path)


@pytest.mark.parametrize("suffix", ["parquet", "json"])
def test_eval_muse(tmp_path, suffix):
    """As published: img_path below images/, one whole number a rater; of raters there may be fewer for one picture."""
    names = ["sd/0.png", "sd/1.png"]
    for index, name in enumerate(names):
        (tmp_path / "images" / "sd").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 8), (index, 90, 200)).save(tmp_path / "images" / name)
    scores = [[5, 4, 3], [1, 2]]
    rows = [
        {"prompt_id": "7", "prompt": f"p{k}", "type": "synth", "img_path": names[k], "total_score": scores[k],
         "element_score": "{}", "fidelity_label": ["a", "b"]}
        for k in range(2)
    ]  # fmt: skip
    path = tmp_path / f"train_list.{suffix}"
    if suffix == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text(json.dumps(rows))
    found = read_ratings(path)
    np.testing.assert_array_equal(found.scores["text_alignment"], [[5, 4, 3], [1, 2, np.nan]])
    assert found.source == "EvalMuse" and found.prompts == ["p0", "p1"]
    assert load_frames(found.clips[1]).tolist() == [[[[1, 90, 200]] * 16] * 8]
    source = read_source(path)
    assert [clip.prompt for clip in source.clips] == ["p0", "p1"] and len(source.scores) == 6
    (tmp_path / "images" / names[1]).unlink()
    with pytest.raises(UserError, match=r"row 2: no picture 'sd/1.png'; expected .*images.*"):
        read_ratings(path)
    rows[0]["total_score"] = [5, 9]
    (tmp_path / "t.json").write_text(json.dumps(rows))
    with pytest.raises(UserError, match="row 1: expected 1 to 5 in 'total_score', got 9"):
        read_ratings(tmp_path / "t.json")


def test_rich_hf(tmp_path):
    heat = RNG.random((4, 4)).astype(np.float32)
    (tmp_path / "artifact_map").mkdir()
    np.save(tmp_path / "artifact_map" / "a.npy", heat)
    Image.new("RGB", (8, 8), (9, 8, 7)).save(tmp_path / "a.png")
    file = table(tmp_path / "labels.csv", [{"filename": "a.png", "prompt": "x", "artifact_score": 0.5}])
    found = read_ratings(file)
    assert found.scores["visual_quality"].tolist() == [[3.0]]
    np.testing.assert_array_equal(found.marks[0], heat)
    np.save(tmp_path / "artifact_map" / "a.npy", heat * 255)
    with pytest.raises(UserError, match=r"a.npy: expected \[H, W\] in \[0, 1\]"):
        read_ratings(file)
    heat[1, 2] = np.nan
    np.save(tmp_path / "artifact_map" / "a.npy", heat)
    with pytest.raises(UserError, match=r"a.npy: expected .* up to nan"):
        read_ratings(file)


def test_plain_table(tmp_path):
    for name in ("a.mp4", "b.mp4"):
        write_clip(tmp_path / name, torch.zeros(3, 16, 16, 3, dtype=torch.uint8), 8)
    rows = [
        {"video": "a.mp4", "prompt": "x", "generator": "m", "rater": "r1", "visual_quality": 4, "beauty": 1},
        {"video": "b.mp4", "prompt": "y", "generator": "n", "rater": "r1", "visual_quality": 2.5, "beauty": ""},
        {"video": "a.mp4", "prompt": "x", "generator": "m", "rater": "r2", "visual_quality": 5, "beauty": 2},
    ]
    found = read_ratings(table(tmp_path / "t.csv", rows))
    assert found.prompts == ["x", "y"] and found.generators == ["m", "n"]
    np.testing.assert_array_equal(found.scores["visual_quality"], [[4, 5], [2.5, np.nan]])
    np.testing.assert_array_equal(found.scores["beauty"], [[1, 2], [np.nan, np.nan]])
    assert load_frames(found.clips[0]).shape == (3, 16, 16, 3)
    table(tmp_path / "t.csv", [*rows, rows[0] | {"prompt": "z"}])
    with pytest.raises(UserError, match=r"t.csv: row 4: another prompt for a.mp4"):
        read_ratings(tmp_path / "t.csv")
    table(tmp_path / "t.csv", [rows[0], rows[1] | {"visual_quality": 6}])
    with pytest.raises(UserError, match=r"t.csv: row 2: expected 1 to 5 in 'visual_quality', got '6'"):
        read_ratings(tmp_path / "t.csv")
    table(tmp_path / "t.csv", [rows[0] | {"video": "c.mp4"}])
    with pytest.raises(UserError, match=r"row 1: .*c.mp4 does not exist"):
        read_ratings(tmp_path / "t.csv")


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [
        ("t.csv", "video,prompt,q\na,x,1\na,x,5\n", "rows 1 and 2 score a twice"),
        ("t.csv", "video,prompt,q,rater\na,x,1,r\na,x,2,s\na,x,5,r\n", "rows 1 and 3 score a twice"),
        ("t.csv", "video,prompt,q\na,x,1\na,x\n", "row 2: expected 3 cells, got 2"),
        ("t.csv", "video,prompt,q\na,x,1,7\n", "row 1: expected 3 cells, got 4"),
        ("t.jsonl", '{"video": "a", "prompt": "x", "q": true}', "row 1: expected 1 to 5 in 'q', got True"),
        ("t.jsonl", '{"video": "a", "prompt": "x", "q": 1}\n{"prompt": "x", "q": 1}', "row 2: .*column 'video'"),
        ("t.jsonl", '{"video": "a", "prompt": "x", "q": 1}\n{"video": "a", "q": 1}', "row 2: .*column 'prompt'"),
        ("t.jsonl", '{"video": "a", "prompt": "x", "q": 1}\n{"video": "a", "prompt": "x"}', "row 2: .*column 'q'"),
        ("t.jsonl", '{"video": ["a"], "prompt": "x", "q": 1}\n{"video": 3, "prompt": "x", "q": 1}', "row 2: .*got 3"),
    ],
)
def test_rows_that_cannot_be_meant_are_named(tmp_path, name, text, complaint):
    touch(tmp_path, "a")
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=complaint):
        read_human(tmp_path / name)


def picture() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (1, 2, 3)).save(file, "png")
    return file.getvalue()


def video_align(folder: Path) -> Path:
    rows = [{"path_A": "a.mp4", "path_B": "b.mp4", "prompt": "x", "VQ": "A", "MQ": "same", "TA": "B", "fps_A": 8}]
    return table(folder / "pairs.csv", rows)


def local_dpo(folder: Path) -> Path:
    row = {"pos_video_path": "a.mp4", "neg_video_path": "b.mp4", "gen_caption": "x", "mask": "m.npy", "yita": 0.8}
    (folder / "pairs.jsonl").write_text(json.dumps(row) + "\n\n")
    return folder / "pairs.jsonl"


def unified_reward(folder: Path) -> Path:
    row = {"chosen": "a.mp4", "rejected": "b.mp4", "caption": "x", "score": 3}
    (folder / "dpo_data.json").write_text(json.dumps([row]))
    return folder / "dpo_data.json"


def trl(folder: Path) -> Path:
    return table(folder / "pairs.csv", [{"prompt": "x", "chosen": "a.mp4", "rejected": "b.mp4"}])


def pickapic(folder: Path) -> Path:
    row = {"jpg_0": picture(), "jpg_1": picture(), "label_0": 0.5, "caption": "x"}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), folder / "pairs.parquet")
    return folder / "pairs.parquet"


def video_dpo(folder: Path) -> Path:
    clips = [{"basic": {"clip_path": name}, "misc": {"frame_caption": ["x"]}} for name in ("b.mp4", "a.mp4")]
    (folder / "metadata.json").write_text(json.dumps(clips))
    (folder / "pair.json").write_text(json.dumps([{"video1": 1, "video2": 0, "frame_caption": ["x"]}]))
    return folder


@pytest.mark.parametrize(
    ("write", "preferred"),
    [
        (video_align, {"visual_quality": 1, "motion_quality": 0.5, "text_alignment": 0}),
        (local_dpo, {"overall": 1}),
        (unified_reward, {"overall": 1}),
        (trl, {"overall": 1}),
        (video_dpo, {"overall": 1}),
        (pickapic, {"overall": 0.5}),
    ],
)
def test_preferences(tmp_path, write, preferred):
    touch(tmp_path, "a.mp4", "b.mp4", "m.npy")
    (found,) = read_preferences(write(tmp_path))
    assert (found.row, found.prompt, found.preferred) == (1, "x", preferred)
    if write is pickapic:
        assert load_frames(found.first).tolist() == [[[[1, 2, 3]] * 8] * 8]
    else:
        assert (found.first, found.second) == (tmp_path / "a.mp4", tmp_path / "b.mp4")
    assert found.mask == (tmp_path / "m.npy" if write is local_dpo else None)
    with pytest.raises(UserError, match="expected scores of clips, got preferences"):
        read_ratings(write(tmp_path))
    if write is local_dpo:
        (tmp_path / "m.npy").unlink()
        with pytest.raises(UserError, match=r"row 1: the mask .*m.npy does not exist"):
            read_preferences(write(tmp_path))
        touch(tmp_path, "m.npy")
    if write is not pickapic:
        (tmp_path / "b.mp4").unlink()
        with pytest.raises(UserError, match=r"row 1: .*b.mp4 does not exist"):
            read_preferences(write(tmp_path))


@pytest.mark.parametrize(
    ("rows", "complaint"),
    [
        ([{"path_A": "a", "path_B": "b", "prompt": "x", "VQ": "C"}], "row 1: expected A, B or same in 'VQ', got 'C'"),
        ([{"path_A": "a", "path_B": "", "prompt": "x", "VQ": "A"}], "row 1: expected text in 'path_B', got ''"),
        ([{"one": 1, "two": 2}], "expected a folder like FETV's .* got columns 'one', 'two'"),
        ([{"video": "a", "prompt": "x"}], "expected a column of scores"),
    ],
)
def test_bad_rows_are_named(tmp_path, rows, complaint):
    touch(tmp_path, "a", "b")
    with pytest.raises(UserError, match=complaint):
        read_human(table(tmp_path / "t.csv", rows))


def test_what_is_no_table_is_named(tmp_path):
    for name, text in (("a.json", "{"), ("b.json", '{"x": 1}'), ("c.jsonl", "[1]\n"), ("d.csv", "")):
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match=name):
            read_human(tmp_path / name)
    (tmp_path / "e.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(UserError, match="e.parquet"):
        read_human(tmp_path / "e.parquet")
    with pytest.raises(UserError, match="does not exist"):
        read_human(tmp_path / "f")
    with pytest.raises(UserError, match="a folder with 5 tables"):
        read_human(tmp_path)
    (tmp_path / "pair").mkdir()
    video_dpo(tmp_path / "pair")
    (tmp_path / "pair" / "pair.json").write_text(json.dumps([{"video1": 2, "video2": 0, "frame_caption": ["x"]}]))
    with pytest.raises(UserError, match=r"pair.json: row 1: expected 0 to 1 in 'video1', got 2"):
        read_human(tmp_path / "pair")


def test_a_folder_with_too_few_clips_is_named(tmp_path):
    fetv(tmp_path)
    np.savez(tmp_path / "clips.npz", video=np.zeros((3, 2, 8, 8, 3), np.uint8))
    with pytest.raises(UserError, match="expected a row for each of 3 clips, got 4"):
        read_human(tmp_path)
    np.savez(tmp_path / "clips.npz", other=np.zeros(3))
    with pytest.raises(UserError, match="expected an array 'video'"):
        read_human(tmp_path)
    whole = (tmp_path / "clips.npz").read_bytes()
    (tmp_path / "clips.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"clips\.npz: expected an array 'video'"):
        read_human(tmp_path)


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"needs the data in {SHARED} or $HALO_DATA")
def test_the_real_folders():
    rated = read_human(SHARED / "fetv")
    assert isinstance(rated, Ratings) and len(rated) == 100 and len(set(rated.prompts)) == 25
    assert all(scores.shape == (100, 3) and 1 <= scores.min() <= scores.max() <= 5 for scores in rated.scores.values())
    marked = read_human(SHARED / "local_defects")
    shares = [float(row["mask_fraction"]) for row in csv.DictReader((SHARED / "local_defects" / "manifest.csv").open())]
    # the manifest has the shares at full size, the pictures are smaller
    np.testing.assert_allclose([mark.mean() for mark in marked.marks], shares, atol=0.03)


def scored(folder: Path, text: str, name: str = "t.csv") -> Ratings:
    """Ratings out of a table's text; the clips a and b exist."""
    touch(folder, "a", "b")
    (folder / name).write_text(text, encoding="utf-8", newline="")
    return read_ratings(folder / name)


@pytest.mark.parametrize("delimiter", [",", "\t", ";", "|"])
def test_tables_with_any_separator_and_capitals(tmp_path, delimiter):
    text = 'Video, PROMPT ,Quality\r\na,"x, y; z\t|",1\r\nb,w,5\r\n'.replace(",", "\0").replace("\0 y", ", y")
    found = scored(tmp_path, text.replace("\0", delimiter))
    assert found.prompts == ["x, y; z\t|", "w"]
    assert found.scores["Quality"].tolist() == [[1], [5]]
    assert scored(tmp_path, text.replace("\0", delimiter), "t.TSV").prompts == found.prompts


def test_columns_that_are_no_scores_are_left_out(tmp_path):
    text = ",Unnamed: 0,seed,fps,category,video,prompt,q\n0,3,4,4,4K film,a,x,1\n1,5,2,4,art,b,y,2\n"
    assert list(scored(tmp_path, text).scores) == ["q"]


@pytest.mark.parametrize("empty", ["", "nan", "NaN", "None", "null", " N/A "])
def test_cells_without_a_score(tmp_path, empty):
    found = scored(tmp_path, f"video,prompt,q\na,x,{empty}\nb,y,2\n")
    assert np.isnan(found.scores["q"][0, 0]) and found.scores["q"][1, 0] == 2
    rows = '{"video": "a", "prompt": "x", "q": NaN}\n{"video": "b", "prompt": "y", "q": 2}\n'
    assert np.isnan(scored(tmp_path, rows, "t.jsonl").scores["q"][0, 0])


def test_line_separators_and_long_cells(tmp_path):
    rows = [{"video": "a", "prompt": "x\u2028y\u0085z", "q": 1}, {"video": "b", "prompt": "p" * 300_000, "q": 2}]
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    assert scored(tmp_path, text, "t.jsonl").prompts == [row["prompt"] for row in rows]
    assert scored(tmp_path, text, "t.json").prompts == [row["prompt"] for row in rows]
    limit = csv.field_size_limit()
    table(tmp_path / "t.csv", rows)
    assert read_ratings(tmp_path / "t.csv").prompts == [row["prompt"] for row in rows]
    assert csv.field_size_limit() == limit


def test_one_clip_under_two_names_counts_once(tmp_path):
    (tmp_path / "sub").mkdir()
    text = f"video,prompt,rater,q\na,x,r,1\n./sub/../a,x,s,2\n{tmp_path / 'a'},x,t,3\nb,y,r,4\n"
    found = scored(tmp_path, text)
    np.testing.assert_array_equal(found.scores["q"], [[1, 2, 3], [4, np.nan, np.nan]])
    with pytest.raises(UserError, match="rows 1 and 2 score a twice"):
        scored(tmp_path, "video,prompt,q\na,x,1\n./a,x,2\n")


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [
        ("t.csv", "video,prompt,q\na,x,0.5\n", "row 1: expected 1 to 5 .* got '0.5'; multiply scores from 0 to 1 by 4"),
        ("t.csv", "video,prompt,q,q\na,x,1,2\n", "expected each column once, got 'q' twice"),
        ("t.csv", "video,prompt,q\na,,1\n", "row 1: expected text in 'prompt', got ''"),
        ("t.jsonl", '{"video": "a", "prompt": null, "q": 1}', "row 1: expected text in 'prompt', got None"),
        ("t.jsonl", '{"video": "a", "prompt": "x", "q": 1}\n{"video": "b", "prompt": 7, "q": 1}', "row 2: .*got 7"),
        (
            "t.jsonl",
            '{"video": "a", "prompt": "x", "q": 1}\n{"video": "b", "prompt": "y", "q": 1, "beauty": 2}',
            "row 1: expected a column 'beauty' as in other rows; null where not scored",
        ),
        ("t.csv", "video,prompt,path\na,x,y\n", "expected a column of scores"),
        ("t.jsonl", '{"prompt": "x", "chosen": "a", "rejected": "b"}\n{"prompt": "x", "chosen": "a"}', "'rejected'"),
    ],
)
def test_tables_that_would_mislead_are_refused_with_the_cure(tmp_path, name, text, complaint):
    with pytest.raises(UserError, match=complaint):
        scored(tmp_path, text, name)
        read_human(tmp_path / name)


def test_preferences_in_capitals(tmp_path):
    touch(tmp_path, "a", "b")
    table(tmp_path / "t.csv", [{"PROMPT": "x", "Chosen": "a", "Rejected": "b"}])
    (found,) = read_preferences(tmp_path / "t.csv")
    assert (found.first, found.second) == (tmp_path / "a", tmp_path / "b")
