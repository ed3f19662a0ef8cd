"""What users bring, each layout written by the test: folders with captions, tables, scores, boxes, masks, patches."""

import json
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from sources import table, touch

from halo_fast.data.clips import write_clip
from halo_fast.data.fitting import VideoFormat
from halo_fast.data.imports import ImportConfig, import_sources
from halo_fast.data.sources import read_source
from halo_fast.errors import UserError
from halo_fast.patches import PatchGrid


def test_a_folder_of_clips_with_captions_in_natural_order(tmp_path):
    touch(tmp_path, "clip_10.mp4", "clip_2.webm", "deep/a.mkv", ".hidden.mp4", "Thumbs.db", "alone.mp4", "empty.mov")
    for name in ("clip_10", "clip_2", "deep/a"):
        (tmp_path / f"{name}.txt").write_text(f"  the {name}\n of two lines\n")
    (tmp_path / "empty.txt").write_text(" \n")
    found = read_source(tmp_path)
    assert [clip.prompt for clip in found.clips] == [
        f"the {name} of two lines" for name in ("clip_2", "clip_10", "deep/a")
    ]
    assert [(Path(row.what).name, row.reason) for row in found.left_out] == [
        ("alone.mp4", "no caption: alone.txt: No such file or directory"),
        ("empty.mov", "no caption: empty.txt is empty"),
    ]


def test_a_clip_in_the_runs_format_is_copied_and_any_other_is_encoded(tmp_path):
    video = torch.from_numpy(np.random.default_rng(0).integers(256, size=(9, 32, 48, 3)).astype(np.uint8))
    source = tmp_path / "source"
    for name, frames, fps, crf in [
        ("same.mp4", video, 8, 40),
        ("long.mp4", torch.cat((video, video)), 8, 40),
        ("fast.mp4", video.repeat_interleave(2, dim=0), 16, 40),
        ("lossless.mp4", video, 8, None),
    ]:
        write_clip(source / name, frames, fps, crf)
    # as many frames in as many seconds, but the second one comes late: [0, 0, 1, 3, 4, ...] are shown at a rate of 8
    with av.open(str(source / "uneven.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=8, options={"crf": "40", "bf": "0"})
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 8000)
        for time, picture in zip((0, 2, 2.1, 3, 4, 5, 6, 7, 8), video.numpy(), strict=True):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = round(1000 * time), Fraction(1, 8000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    (source / "another.mkv").write_bytes((source / "lossless.mp4").read_bytes() + b"\0")
    for file in list(source.iterdir()):
        file.with_suffix(".txt").write_text(file.stem)
    patches = PatchGrid((3, 2, 2), 9, 32, 48, 8, 4, True)
    rows = import_sources(
        ImportConfig(sources=[str(source)]), VideoFormat(9, 32, 48, 8), patches, tmp_path, crf=12
    ).clips
    kept = [row for row in rows if (tmp_path / row.video).read_bytes() == Path(row.source).read_bytes()]
    assert [row.prompt for row in kept] == ["same"] and len(rows) == 6
    frames = {row.prompt: row.frames for row in rows}
    assert frames["uneven"] == [0, 0, 1, 3, 4, 5, 6, 7, 8] and frames["same"] == list(range(9))


def test_folders_of_frames_are_clips(tmp_path):
    for name in ("b", "a"):
        (tmp_path / name).mkdir()
        for frame in (10, 2):
            Image.new("RGB", (8, 8), (frame, 0, 0)).save(tmp_path / name / f"frame_{frame}.png")
        (tmp_path / f"{name}.txt").write_text(name)
        (tmp_path / name / ".DS_Store").write_bytes(b"x")
    found = read_source(tmp_path)
    assert [clip.clip for clip in found.clips] == [tmp_path / "a", tmp_path / "b"]


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "json", "parquet"])
@pytest.mark.parametrize("columns", [("file_name", "text"), ("video", "prompt"), ("Path", "Caption")])
def test_captions_in_a_table(tmp_path, suffix, columns):
    touch(tmp_path, "x/1.mp4", "x/2.mp4")
    rows = [{columns[0]: f"x/{k}.mp4", columns[1]: f"a\u2028b {k}", "seed": k, "model": "m", "fps": 12} for k in (1, 2)]
    file = tmp_path / f"metadata.{suffix}"
    if suffix in ("csv", "tsv"):
        names = list(rows[0])
        lines = ["\t".join(names), *("\t".join(str(row[name]) for name in names) for row in rows)]
        file.write_text("\n".join(lines), encoding="utf-8", newline="")
    elif suffix == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    else:
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        file.write_text("\n".join(lines) if suffix == "jsonl" else f"[{','.join(lines)}]", encoding="utf-8")
    for source in (tmp_path, file):
        found = read_source(source)
        assert [(clip.prompt, clip.seed, clip.generator, clip.fps) for clip in found.clips] == [
            (f"a b {k}", k, "m", 12) for k in (1, 2)
        ]
        assert not found.scores and not found.left_out


def test_a_missing_file_is_left_out_and_a_prompt_that_is_none_is_refused(tmp_path):
    touch(tmp_path, "a.mp4")
    found = read_source(table(tmp_path / "t.csv", [{"video": f"{name}.mp4", "prompt": "p"} for name in "ab"]))
    assert len(found.clips) == 1 and "b.mp4 does not exist" in found.left_out[0].reason
    for prompt in (None, 3, " "):
        (tmp_path / "t.jsonl").write_text(json.dumps({"video": "a.mp4", "prompt": prompt}))
        with pytest.raises(UserError, match="row 1: expected text in 'prompt'"):
            read_source(tmp_path / "t.jsonl")


def test_numbers_beside_the_clips_are_scores_unless_told(tmp_path):
    touch(tmp_path, "a.mp4")
    row = {"video": "a.mp4", "prompt": "p", "num_frames": 99, "Beauty": 4, "motion": 0.3, "Unnamed: 0": 7}
    file = table(tmp_path / "t.csv", [row])
    with pytest.raises(UserError, match=r"'motion', got '0.3'; .*name the columns .* imports.scores"):
        read_source(file)
    assert [dict(one.scores) for one in read_source(file, ["Beauty"]).scores] == [{"Beauty": 4}]
    assert read_source(file, []).scores == []
    # of one clip by two raters, one below the other and in a column that only later rows have
    rows = [{"video": "a.mp4", "rater": "r"}, {"video": "./a.mp4", "rater": "s", "q": 3}]
    (tmp_path / "t.json").write_text(json.dumps(rows))
    first, second = read_source(tmp_path / "t.json").scores
    assert first.ref == second.ref and np.isnan(first.scores["q"]) and second.scores["q"] == 3
    (tmp_path / "t.json").write_text(json.dumps([rows[1], rows[1]]))
    with pytest.raises(UserError, match="rows 1 and 2 score one clip twice"):
        read_source(tmp_path / "t.json")


FORMAT = VideoFormat(6, 8, 12, 8)


def damage(found, source=FORMAT):
    (one,) = found.damage
    return one.damage(source)


def test_scores_of_patches(tmp_path):
    rows = [
        {
            "row": 0,
            "rater": rater,
            "patch_frame": f,
            "patch_row": y,
            "patch_column": x,
            "score": 1 + (f + y + rater) % 5,
        }
        for rater in (0, 1)
        for f in range(2)
        for y in range(2)
        for x in range(3)
        if (f, y, x) != (1, 1, 2)
    ]
    found = damage(read_source(table(tmp_path / "p.csv", rows)), VideoFormat(5, 8, 12, 8))
    # floor(5 / 2) frames are the first half's
    for frame, half in ((0, 0), (1, 0), (2, 1), (4, 1)):
        for y in range(2):
            expected = np.mean([(4 - (half + y + rater) % 5) / 4 for rater in (0, 1)])
            np.testing.assert_allclose(found(frame)[y, :2], expected)
    assert np.isnan(found(4)[1, 2])
    with pytest.raises(UserError, match="rows 1 and 2 score one patch twice"):
        read_source(table(tmp_path / "p.csv", [rows[0], rows[0]]))
    with pytest.raises(UserError, match="row 1: expected 1 to 5 in 'score', got '6'"):
        read_source(table(tmp_path / "p.csv", [rows[0] | {"score": 6}]))
    with pytest.raises(UserError, match="row 1: expected a whole number from 0 on in 'patch_row', got '-1'"):
        read_source(table(tmp_path / "p.csv", [rows[0] | {"patch_row": -1}]))


def test_boxes_that_move(tmp_path):
    rows = [
        {"video": "a.mp4", "frame": 0, "x0": 0, "y0": 0, "x1": 4, "y1": 4, "score": ""},
        {"video": "a.mp4", "frame": 1, "x0": 4.5, "y0": 0, "x1": 8, "y1": 4, "score": 3},
        {"video": "a.mp4", "frame": "", "x0": 10, "y0": 6, "x1": 99, "y1": 99, "score": 1},
    ]
    found = damage(read_source(table(tmp_path / "b.csv", rows)))
    expected = np.zeros((2, 8, 12))
    expected[:, 6:, 10:] = 1
    expected[0, :4, :4] = 1
    expected[1, :4, 5:8], expected[1, :4, 4] = 0.5, 0.25
    np.testing.assert_allclose([found(0), found(1)], expected)
    assert found(2).sum() == 4
    with pytest.raises(UserError, match="row 1: expected x0 < x1"):
        read_source(table(tmp_path / "b.csv", [rows[0] | {"x1": 0}]))
    with pytest.raises(UserError, match="row 1: expected a number in 'x0', got 'nan'"):
        read_source(table(tmp_path / "b.csv", [rows[0] | {"x0": "nan"}]))


@pytest.mark.parametrize("kind", ["npy", "npy of frames", "png", "mp4", "folder"])
def test_masks_and_heat_maps(tmp_path, kind):
    touch(tmp_path, "a.mp4")
    still = np.zeros((8, 12), np.float32)
    still[:4, :6] = 1
    moving = np.stack([np.roll(still, shift, axis=1) for shift in range(6)])
    name = {"npy": "m.npy", "npy of frames": "m.npy", "png": "m.png", "mp4": "m.mkv", "folder": "m"}[kind]
    if name == "m.npy":
        np.save(tmp_path / name, moving if "frames" in kind else still > 0)
    elif kind == "png":
        Image.fromarray((still * 255).astype(np.uint8)).save(tmp_path / name)
    elif kind == "mp4":
        frames = torch.from_numpy(moving * 255).to(torch.uint8)[..., None].repeat(1, 1, 1, 3)
        write_clip(tmp_path / name, frames, 8)
    else:
        (tmp_path / name).mkdir()
        for frame, mask in enumerate(moving):
            Image.fromarray(mask > 0).save(tmp_path / name / f"{frame}.png")
    found = damage(read_source(table(tmp_path / "t.csv", [{"video": "a.mp4", "mask": name}])))
    moves = kind in ("npy of frames", "mp4", "folder")
    for frame in (0, 3, 5):
        np.testing.assert_allclose(found(frame), moving[frame] if moves else still, atol=0.02)
    if moves:
        with pytest.raises(UserError, match="expected one mask, or 7 as the clip has frames, got 6"):
            damage(read_source(tmp_path / "t.csv"), VideoFormat(7, 8, 12, 8))


def test_videos_with_tables_beside_them(tmp_path):
    touch(tmp_path, "videos/a.mp4", "videos/b.mp4")
    for name in "ab":
        (tmp_path / "videos" / f"{name}.txt").write_text(name)
    table(tmp_path / "scores.csv", [{"video": "videos/b.mp4", "q": 2}])
    table(tmp_path / "patches.csv", [{"row": 1, "patch_row": 0, "patch_column": 0, "score": 2}])
    table(tmp_path / "notes.csv", [{"who": "x", "what": "y"}])
    found = read_source(tmp_path)
    assert len(found.clips) == 2
    assert found.scores[0].ref == found.clips[1].ref == found.damage[0].ref
    assert [(Path(row.what).name, row.reason) for row in found.left_out] == [
        ("notes.csv", "a table of no known layout, with columns 'who', 'what'")
    ]


def numbered(folder, scores, captions):
    """A folder of clips of one colour each, perhaps without a caption, and a table of scores by their numbers."""
    for number, name in enumerate(scores):
        video = torch.full((5, 32, 32, 3), 40 * number + len(folder.name), dtype=torch.uint8)
        write_clip(folder / "videos" / f"{name}.mp4", video, 8)
        if name in captions:
            (folder / "videos" / f"{name}.txt").write_text(name)
    table(folder / "scores.csv", [{"row": row, "q": score} for row, score in enumerate(scores.values())])
    return str(folder)


def scores_of(sources, folder):
    config = ImportConfig(sources=sources)
    found = import_sources(config, VideoFormat(5, 32, 32, 8), PatchGrid((1, 2, 2), 5, 32, 32), folder)
    prompts = {clip.clip_id: clip.prompt for clip in found.clips}
    return {prompts[label.clip_id]: label.video["q"] for label in found.labels}, found.left_out


def test_a_number_is_that_of_its_own_listing_also_where_clips_are_left_out(tmp_path):
    first = numbered(tmp_path / "first", {"a": 1, "b": 2, "c": 3}, captions="ac")
    second = numbered(tmp_path / "the second", {"x": 4, "y": 5}, captions="xy")
    scores, left_out = scores_of([first, second], tmp_path / "import")
    assert scores == {"a": 1, "c": 3, "x": 4, "y": 5}
    assert any(row.reason.startswith("its clip") and "b.mp4" in row.reason for row in left_out)
    table(tmp_path / "alone.csv", [{"row": 1, "q": 2}])
    assert scores_of([second, str(tmp_path / "alone.csv")], tmp_path / "again")[0] == {"x": 4, "y": 3.5}
    with pytest.raises(UserError, match=r"alone.csv: row 1: a number in 'row' may mean a clip of .*first or .*second"):
        scores_of([first, second, str(tmp_path / "alone.csv")], tmp_path / "none")
    table(tmp_path / "alone.csv", [{"row": 2, "q": 2}])
    with pytest.raises(UserError, match="alone.csv: row 1: expected a row from 0 to 1, got 2"):
        scores_of([second, str(tmp_path / "alone.csv")], tmp_path / "none")


@pytest.mark.parametrize("text", ["", "a,b\n1,2\n", "video\nx.mp4\n", "video,prompt\n,p\n"])
def test_what_is_no_source_is_named(tmp_path, text):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(UserError, match=r"t\.csv"):
        read_source(tmp_path / "t.csv")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds neither videos nor a table"):
        read_source(tmp_path / "empty")
    with pytest.raises(UserError, match="does not exist; expected a folder of videos"):
        read_source(tmp_path / "nowhere")
