"""The labelling page: its server by HTTP, and the page itself in a headless Chromium, by keyboard alone."""

import http.client
import json
import re
import sqlite3
import threading
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pyarrow.parquet
import pytest
import torch
from browser import PROGRAM, Browser
from disks import fill, small_disk
from moving_shapes import GRID, Clips, make_clips, write_candidates
from PIL import Image

from halo_fast.data.clips import read_clip
from halo_fast.data.tables import LabelRow, read_rows, write_rows
from halo_fast.errors import UserError
from halo_fast.pipeline.clips import run_clips
from halo_fast.pipeline.config import AnnotateConfig, Config
from halo_fast.pipeline.label import LabelServer
from halo_fast.pipeline.label import server as server_module
from halo_fast.pipeline.run import Run
from halo_fast.pipeline.stages.annotate import annotate
from halo_fast.teachers import VIDEO_DIMENSIONS, Label, LabelStore
from halo_fast.teachers import store as store_module

PATCHES = 48
CLIPS = make_clips(4, seed=5)
HOSTILE = "<img src=x onerror=\"document.title='owned'\"> & </script><script>document.title='owned'</script>"


def config_in(folder: Path, teacher: str = "") -> Config:
    return Config(output_dir=str(folder), grid=GRID, annotate=AnnotateConfig(teacher=teacher))


def candidates(folder: Path) -> Path:
    prompts = [HOSTILE, *CLIPS.prompts[1:]]
    clips = Clips(CLIPS.videos, prompts, CLIPS.severity, CLIPS.kind, CLIPS.aligned, CLIPS.moving)
    write_candidates(Run(config_in(folder)), clips)
    return folder


@contextmanager
def serving(folder: Path, name: str = "anna"):
    with LabelServer(config_in(folder), name) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def ask(server: LabelServer, path: str, method: str = "GET", body: object = None, **headers: str):
    """Status, headers and body of an answer; path is relative to the page, or absolute."""
    address = urlsplit(server.url)
    connection = http.client.HTTPConnection("127.0.0.1", address.port, timeout=30)
    sent = body if isinstance(body, str | None) else json.dumps(body)
    connection.request(method, path if path.startswith("/") else address.path + path, sent, headers)
    answer = connection.getresponse()
    found = answer.status, answer.headers, answer.read()
    connection.close()
    return found


def scores(
    video: dict | None = None, patches: dict | None = None, skipped: bool = False, version: str = "1", bases=("",)
) -> dict:
    row = [None] * PATCHES
    for patch, score in (patches or {}).items():
        row[patch] = score
    given = {"video": dict.fromkeys(VIDEO_DIMENSIONS) | (video or {}), "patches": row, "skipped": skipped}
    return given | {"version": version, "bases": list(bases)}


def test_label_page_is_for_those_who_have_its_address(tmp_path):
    with serving(candidates(tmp_path)) as server:
        token = urlsplit(server.url).path
        assert re.fullmatch(r"/[\w-]{32}/", token) and server.server_address[0] == "127.0.0.1"
        status, headers, page = ask(server, "")
        assert status == 200 and b"<title>halo label</title>" in page
        assert "default-src 'none'" in headers["Content-Security-Policy"]
        assert headers["Referrer-Policy"] == "no-referrer"
        for path in ("/", "/overview", "/x" + token[1:], token[:-2] + "/overview", "/../" + token):
            assert ask(server, path)[0] == 404, path
        # a page of another site whose name was made to resolve to this machine
        assert ask(server, "overview", Host="evil.example")[0] == 404
        assert ask(server, "clips/0", "PUT", scores(patches={0: 1}), Host="evil.example")[0] == 404
    with LabelStore(tmp_path / "labels.sqlite") as store:
        assert store.teachers() == []
    with serving(tmp_path) as server:
        assert urlsplit(server.url).path != token


def test_label_page_without_its_final_slash_is_found(tmp_path):
    with serving(candidates(tmp_path)) as server:
        path = urlsplit(server.url).path
        status, headers, _ = ask(server, path[:-1])
        assert status == 308 and headers["Location"] == path
        assert ask(server, path[:-2])[0] == 404


@pytest.mark.parametrize("length", ["\u00b2", "-1", "x", "1_0"])
def test_label_server_refuses_lengths_that_are_no_numbers(tmp_path, capfd, length):
    with serving(candidates(tmp_path)) as server:
        assert ask(server, "overview", **{"Content-Length": length})[0] == 400
    assert "Traceback" not in capfd.readouterr().err


def test_label_page_asks_for_nothing_from_elsewhere():
    page = (Path(__file__).parents[2] / "halo_fast" / "pipeline" / "label" / "page.html").read_text()
    assert not re.findall(r"https?:|//[a-z]", page)
    assert "innerHTML" not in page and "document.write" not in page


def test_label_server_gives_clips_as_they_are(tmp_path):
    with serving(candidates(tmp_path)) as server:
        order = np.random.default_rng(0).permutation(4)
        for index, clip in enumerate(order):
            found = json.loads(ask(server, f"clips/{index}")[2])
            assert found["prompt"] == ([HOSTILE, *CLIPS.prompts[1:]])[clip]
            assert found["edges"] == [[0, 1, 5, 9], [0, 8, 16, 24, 32], [0, 8, 16, 24, 32]]
            assert found["patches"] == [None] * PATCHES and found["state"] == "open"
        status, headers, png = ask(server, "clips/2/frames/7")
        (tmp_path / "frame.png").write_bytes(png)
        frame = np.array(Image.open(tmp_path / "frame.png"))
        rows = pyarrow.parquet.read_table(tmp_path / "generate" / "clips.parquet").to_pylist()
        video = read_clip(tmp_path / "generate" / rows[order[2]]["video"])
        assert headers["Content-Type"] == "image/png" and torch.equal(torch.from_numpy(frame), video[7])
        for path in ("clips/4", "clips/-1", "clips/0/frames/9", "clips/x", "clips/0/frames/x"):
            assert ask(server, path)[0] == 400, path
        assert ask(server, "clips/0/frames")[0] == 404


@pytest.mark.parametrize(
    "body",
    [
        "not json",
        "[" * 100_000,
        "[]",
        scores(video={"visual_quality": 6}),
        scores(video={"visual_quality": "5"}),
        scores(video={"visual_quality": True}),
        scores(patches={3: 0}),
        scores() | {"patches": [1.0]},
        scores() | {"more": 1},
        {"video": {}, "patches": [None] * PATCHES, "skipped": False},
        '{"video": {"visual_quality": NaN}}',
    ],
)
def test_label_server_stores_scores_alone(tmp_path, body):
    with serving(candidates(tmp_path)) as server:
        status, _, message = ask(server, "clips/0", "PUT", body)
        assert status == 400 and message
    with LabelStore(tmp_path / "labels.sqlite") as store:
        assert store.teachers() == []


def test_label_states_and_continuation(tmp_path):
    with serving(candidates(tmp_path)) as server:
        whole = scores(dict.fromkeys(VIDEO_DIMENSIONS, 4), dict.fromkeys(range(PATCHES), 5))
        for index, (sent, state) in enumerate(
            [(whole, "done"), (scores(patches={7: 2}), "part"), (scores(skipped=True), "skipped"), (scores(), "open")]
        ):
            assert json.loads(ask(server, f"clips/{index}", "PUT", sent)[2]) == {"state": state}
    with serving(tmp_path) as server:
        assert json.loads(ask(server, "overview")[2])["states"] == ["done", "part", "skipped", "open"]
        kept = json.loads(ask(server, "clips/1")[2])
        assert kept["patches"][7] == 2 and kept["patches"].count(None) == PATCHES - 1
        # scores that are taken back are gone
        assert json.loads(ask(server, "clips/1", "PUT", scores(version="2", bases=["0", "1"]))[2]) == {"state": "open"}
    with serving(tmp_path, "bert") as server:
        assert json.loads(ask(server, "overview")[2])["states"] == ["open"] * 4, "labels are each person's own"


def test_labels_of_people_go_through_annotate_like_any_teachers(tmp_path):
    with serving(candidates(tmp_path)) as server:
        sent = scores({"visual_quality": 2, "text_alignment": 3}, {0: 1, 47: 5})
        ask(server, "clips/1", "PUT", sent)
        ask(server, "clips/2", "PUT", scores(skipped=True))
    config = config_in(tmp_path, "human:anna")
    annotate(config, Run(config))
    rows = pyarrow.parquet.read_table(tmp_path / "annotate" / "labels.parquet").to_pylist()
    chosen = np.random.default_rng(0).permutation(4)
    by_status = {rows[chosen[index]]["status"]: rows[chosen[index]] for index in (1, 2, 0)}
    assert set(by_status) == {"ok", "skipped", "unlabelled"}
    found = by_status["ok"]
    assert found["teacher"] == "human:anna" and found["video_visual_quality"] == 2
    assert np.isnan(found["video_dynamic_degree"]) and np.isnan(found["patch_quality"][1])
    assert (found["patch_quality"][0], found["patch_quality"][47]) == (1, 5)
    # what was not scored when it was exported can still be scored
    with serving(tmp_path) as server:
        assert json.loads(ask(server, "overview")[2])["states"][0] == "open"
        assert json.loads(ask(server, "clips/0", "PUT", sent)[2]) == {"state": "part"}


def test_label_mistakes_are_named(tmp_path):
    with pytest.raises(UserError, match="run `halo generate`"):
        LabelServer(config_in(tmp_path), "anna")
    candidates(tmp_path)
    with pytest.raises(UserError, match=r"name: expected letters.*got '../x'"):
        LabelServer(config_in(tmp_path), "../x")
    with (
        serving(tmp_path) as server,
        pytest.raises(UserError, match=f"port {server.server_address[1]}: .*choose another"),
    ):
        LabelServer(config_in(tmp_path), "anna", server.server_address[1])


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if PROGRAM is None:
        pytest.skip("needs chromium")
    with Browser(tmp_path_factory.mktemp("profile")) as page:
        yield page


SHOWN = "typeof clip !== 'undefined' && clip && images.length && images.every(image => image.naturalWidth)"


def stored(folder: Path, server: LabelServer) -> dict:
    states = json.loads(ask(server, "overview")[2])["states"]
    return {
        index: json.loads(ask(server, f"clips/{index}")[2]) | {"state": state} for index, state in enumerate(states)
    }


def test_label_page_by_keyboard_alone(tmp_path, browser):
    with serving(candidates(tmp_path)) as server:
        browser.open(server.url)
        browser.until(SHOWN)
        assert browser.run("document.activeElement.name") == "visual_quality", "the first score has the focus"
        browser.press("4", "3", "5")
        assert browser.until("document.activeElement.getAttribute('aria-label')") == "row 1, column 1: no score"
        # digits go on by themselves, arrows move over patches, page keys over frames
        browser.press("2", "1", "ArrowDown", "3", "ArrowUp", "ArrowRight", "PageDown", "4")
        browser.until("saving.then(() => true)")
        first = stored(tmp_path, server)[0]
        assert first["video"] == {"visual_quality": 4, "text_alignment": 3, "dynamic_degree": 5}
        given = {patch: score for patch, score in enumerate(first["patches"]) if score is not None}
        # after 2 1 the third patch has the focus: down is 6; 3 moves on to 7; up and right 3; a time step on 16 + 3
        assert given == {0: 2, 1: 1, 6: 3, 19: 4} and first["state"] == "part"
        browser.press("u")
        browser.until("saving.then(() => clip.patches[19] === null)")
        assert stored(tmp_path, server)[0]["patches"][19] is None, "undo reaches the store"
        browser.press("f")
        browser.until("task.states[0] === 'done'")
        assert stored(tmp_path, server)[0]["patches"].count(5) == PATCHES - 3
        browser.press("n")
        browser.until("index === 1 && document.activeElement.name === 'visual_quality'")
        browser.press("s")
        browser.until("index === 2 && task.states[1] === 'skipped'")
        for before in (1, 0):
            browser.press("p")
            browser.until(f"index === {before}")
        browser.press("s")  # to skip a clip that has scores is to go on
        browser.until("index === 1")
        browser.until("saving.then(() => task.states[0] === 'done')")
        assert stored(tmp_path, server)[0]["patches"].count(5) == PATCHES - 3
        browser.press("n")
        browser.until("index === 2 && document.activeElement.name === 'visual_quality'")
        browser.press("5", "0")  # 0 takes back what has the focus, here nothing
        browser.until("saving.then(() => task.states[2] === 'part')")
        assert "1 of 4 done, 1 in part, 1 skipped" in browser.run("$('done').textContent")
        # every control is reached by Tab, with a visible focus and a name
        names = set()
        for _ in range(40):
            browser.press("Tab")
            names.add(
                browser.run(
                    "(e => e.matches(':focus-visible') && (e.getAttribute('aria-label') ?? e.textContent))"
                    "(document.activeElement)"
                )
            )
        wanted = (
            "Help",
            "Pause",
            "Rest intact",
            "Undo",
            "Skip",
            "Previous",
            "Next",
            "row 1, column 1",
            "text alignment",
        )
        assert all(any(name and name.startswith(start) for name in names) for start in wanted), names
    with serving(tmp_path) as server:  # another day: it goes on at the first clip that is not finished
        browser.open(server.url)
        browser.until(SHOWN)
        assert browser.run("index") == 2 and browser.run("clip.video.visual_quality") == 5


def test_label_page_shows_text_as_text_and_the_clip_as_it_is(tmp_path, browser):
    with serving(candidates(tmp_path)) as server:
        browser.open(server.url)
        browser.until(SHOWN)
        hostile = [json.loads(ask(server, f"clips/{k}")[2])["prompt"] for k in range(4)].index(HOSTILE)
        browser.run(f"show({hostile})")
        browser.until(f"index === {hostile} && {SHOWN}")
        assert browser.run("$('prompt').textContent") == HOSTILE
        assert browser.run("document.title") == "halo label" and browser.run("document.images.length") == 0
        rows = pyarrow.parquet.read_table(tmp_path / "generate" / "clips.parquet").to_pylist()
        video = read_clip(tmp_path / "generate" / rows[0]["video"])
        for frame in (0, 8):
            script = (
                f"(() => {{ playing = false; frame = {frame}; tick(performance.now());"
                " return [...$('canvas').getContext('2d').getImageData(0, 0, 32, 32).data]; })()"
            )
            shown = np.array(browser.run(script)).reshape(32, 32, 4)[..., :3]
            np.testing.assert_array_equal(shown, video[frame].numpy())
        # the overlay's cells lie on the pixels of their patches
        box = browser.run(
            "(() => { const s = $('stage').getBoundingClientRect(), c = document.querySelectorAll('.cell')[6]"
            ".getBoundingClientRect(); return [(c.left - s.left) / s.width, (c.top - s.top) / s.height,"
            " c.width / s.width, c.height / s.height]; })()"
        )
        assert box == pytest.approx([2 / 4, 1 / 4, 1 / 4, 1 / 4], abs=0.01)


def test_label_page_is_readable_to_assistive_technology(tmp_path, browser):
    with serving(candidates(tmp_path)) as server:
        browser.open(server.url)
        browser.until(SHOWN)
        nodes = browser.call("Accessibility.getFullAXTree")["nodes"]
        named = {}
        for node in nodes:
            role, name = node.get("role", {}).get("value"), node.get("name", {}).get("value", "")
            named.setdefault(role, []).append(name)
            if role in ("button", "radio", "checkbox", "gridcell", "grid", "progressbar", "group"):
                assert name or role == "group", node
        assert len(named["gridcell"]) == 16 and len(named["radio"]) == 15
        assert {"visual quality", "text alignment", "dynamic degree", "Patches"} <= set(named["group"])
        errors = [event for event in browser.events if event.get("method") in ("Runtime.exceptionThrown",)]
        errors += [
            event for event in browser.events if event.get("params", {}).get("entry", {}).get("level") == "error"
        ]
        assert not errors, errors


def test_label_page_says_when_nothing_is_saved(tmp_path, browser):
    with serving(candidates(tmp_path)) as server:
        browser.open(server.url)
        browser.until(SHOWN)
        network = {"latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
        browser.call("Network.emulateNetworkConditions", network | {"offline": True})
        browser.press("4")
        message = browser.until("$('status').classList.contains('bad') && $('status').textContent")
        browser.call("Network.emulateNetworkConditions", network | {"offline": False})
        assert "not saved" in message
        browser.press("5")  # the next score takes the lost one along
        browser.until("saving.then(() => task.states[0] === 'part')")
        assert stored(tmp_path, server)[0]["video"] == {
            "visual_quality": 4,
            "text_alignment": 5,
            "dynamic_degree": None,
        }


def test_a_version_that_is_not_the_last_one_is_refused(tmp_path):
    with serving(candidates(tmp_path)) as server:
        assert ask(server, "clips/0", "PUT", scores(patches={0: 4}, version="a"))[0] == 200
        # the answer to "b" was lost: "c" builds on either
        assert ask(server, "clips/0", "PUT", scores(patches={0: 3}, version="b", bases=["a"]))[0] == 200
        assert ask(server, "clips/0", "PUT", scores(patches={0: 2}, version="c", bases=["a", "b"]))[0] == 200
        for stale in (scores(skipped=True), scores(version="d", bases=["a", "b"]), scores(bases=[])):
            status, _, message = ask(server, "clips/0", "PUT", stale)
            assert status == 409 and b"another tab" in message
        assert json.loads(ask(server, "clips/0")[2])["patches"][0] == 2
        # a clip whose scores were taken back is not as it was before either
        assert ask(server, "clips/0", "PUT", scores(version="e", bases=["c"]))[0] == 200
        assert ask(server, "clips/0", "PUT", scores(version="f"))[0] == 409


def test_scores_under_another_grid_or_rubric_are_told_and_usable(tmp_path, monkeypatch):
    folder = candidates(tmp_path)
    whole = scores(dict.fromkeys(VIDEO_DIMENSIONS, 4), dict.fromkeys(range(PATCHES), 5))
    with serving(folder) as server:
        ask(server, "clips/0", "PUT", whole)
        ask(server, "clips/1", "PUT", scores(patches={3: 2}))
        ask(server, "clips/2", "PUT", scores({"text_alignment": 1}))
    # as an earlier version stored it: without a note of its grid
    with sqlite3.connect(folder / "labels.sqlite") as connection:
        connection.execute("DELETE FROM edits WHERE key = (SELECT key FROM labels ORDER BY rowid LIMIT 1)")
    other = Config(output_dir=str(folder), grid=(1, 2, 2), annotate=AnnotateConfig())
    with LabelServer(other, "anna") as server:
        overview = server.overview()
        assert overview["states"] == ["open"] * 4 and overview["earlier"] == [True, False, True, False]
        assert overview["strangers"] == 1, "scores of patches alone mean nothing under another grid"
        first = server.clip(0)["earlier"]
        assert first == {"why": "the grid (3, 4, 4)", "video": dict.fromkeys(VIDEO_DIMENSIONS, 4.0), "patches": None}
    changed = store_module.RUBRIC + " "
    monkeypatch.setattr(store_module, "RUBRIC", changed)
    monkeypatch.setattr(server_module, "RUBRIC", changed)
    with LabelServer(config_in(folder), "anna") as server:
        overview = server.overview()
        # of the first, nobody knows the rubric
        assert overview["earlier"] == [False, True, True, False] and overview["strangers"] == 1
        second = server.clip(1)["earlier"]
        assert second["why"] == "another version of the rubric" and second["patches"][3] == 2
    with LabelServer(config_in(folder), "bert") as server:
        assert server.overview()["earlier"] == [False] * 4


def test_label_page_takes_over_earlier_scores(tmp_path, browser):
    folder = candidates(tmp_path)
    with LabelServer(Config(output_dir=str(folder), grid=(3, 2, 2)), "anna") as server:
        row = {"video": dict.fromkeys(VIDEO_DIMENSIONS, 3), "patches": [2] * 12, "skipped": False}
        server.save(0, row | {"version": "a", "bases": [""]})
    with serving(folder) as server:
        browser.open(server.url)
        browser.until(SHOWN)
        assert "you scored it under the grid" in browser.run("$('status').textContent")
        browser.press("5", "e")
        browser.until("saving.then(() => !clip.earlier && task.states[0] === 'part')")
        found = stored(folder, server)[0]
        assert found["video"] == dict.fromkeys(VIDEO_DIMENSIONS, 3) | {"visual_quality": 5}
        assert found["patches"] == [None] * PATCHES


def test_two_tabs_lose_nothing(tmp_path, browser):
    with serving(candidates(tmp_path)) as server:
        browser.open(server.url)
        browser.until(SHOWN)
        first = browser.tab
        second = browser.new_tab()
        browser.open(server.url)
        browser.until(SHOWN)
        browser.press("4", "3", "5", "f")
        browser.until("saving.then(() => task.states[0] === 'done')")
        browser.tab = first  # it still shows the clip without a score
        for key in ("s", "2"):
            browser.press(key)
            browser.until("saving.then(() => conflict && !$('conflict').hidden)")
            browser.press("n")
            browser.run("saving.then(() => true)")
            assert browser.run("index") == 0 and "another tab" in browser.run("$('status').textContent")
            assert stored(tmp_path, server)[0]["patches"].count(5) == PATCHES
        browser.press("r")
        browser.until("!conflict && clip.patches.every(score => score === 5) && clip.video.visual_quality === 4")
        browser.press("1")
        browser.until("saving.then(() => $('status').textContent.startsWith('saved'))")
        browser.tab = second
        browser.press("v", "5")
        browser.until("saving.then(() => conflict)")
        browser.press("k")
        browser.until("saving.then(() => !conflict && !unsaved)")
        assert stored(tmp_path, server)[0]["video"] == {
            "visual_quality": 5, "text_alignment": 3, "dynamic_degree": 5
        }  # fmt: skip
        browser.tab = first


def test_a_killed_browser_loses_nothing_that_was_saved(tmp_path):
    if PROGRAM is None:
        pytest.skip("needs chromium")
    with serving(candidates(tmp_path)) as server:
        page = Browser(tmp_path / "profile")
        page.open(server.url)
        page.until(SHOWN)
        page.press("4", "2", "3", "1", "5")
        page.until("saving.then(() => $('status').textContent.startsWith('saved'))")
        page.kill()
        found = stored(tmp_path, server)[0]
        assert found["video"] == {"visual_quality": 4, "text_alignment": 2, "dynamic_degree": 3}
        assert found["patches"][:2] == [1, 5] and found["state"] == "part"
        with Browser(tmp_path / "profile2") as again:
            again.open(server.url)
            again.until(SHOWN)
            assert again.run("index") == 0 and again.run("clip.patches[1]") == 5


def leaves_only_when_saved(browser, tmp_path, server, complaint: str, spoil) -> None:
    """A score that cannot be stored keeps its clip on the page, is named, and is stored with N once it can be."""
    browser.open(server.url)
    browser.until(SHOWN)
    mend = spoil()
    browser.press("4")
    browser.until("saving.then(() => unsaved && $('status').classList.contains('bad'))")
    browser.press("n")
    browser.run("new Promise(done => setTimeout(done, 300)).then(() => saving).then(() => true)")
    assert browser.run("index") == 0 and complaint in browser.run("$('status').textContent")
    mend()
    browser.press("n")
    browser.until(f"index === 1 && {SHOWN}")
    assert stored(tmp_path, server)[0]["video"]["visual_quality"] == 4


def test_a_full_disk_keeps_scores_on_the_page(tmp_path, browser):
    with small_disk(tmp_path / "disk") as folder, serving(candidates(folder)) as server:
        leaves_only_when_saved(browser, folder, server, "the disk is full", lambda: fill(folder).unlink)


def test_a_locked_store_keeps_scores_on_the_page(tmp_path, browser, monkeypatch):
    monkeypatch.setattr(store_module, "_PATIENCE", 0.05)
    with serving(candidates(tmp_path)) as server:
        ask(server, "clips/3", "PUT", scores(skipped=True))
        other = sqlite3.connect(tmp_path / "labels.sqlite", isolation_level=None)

        def lock():
            other.execute("BEGIN IMMEDIATE")
            return lambda: other.execute("ROLLBACK")

        leaves_only_when_saved(browser, tmp_path, server, "another process has it locked", lock)
        other.close()


def test_the_page_asks_for_the_clips_that_annotate_asks_for(tmp_path):
    """Also where imported labels leave clips out, and a number is drawn."""
    candidates(tmp_path)
    run = Run(config_in(tmp_path))
    clips = [row.clip_id for row in run_clips(run).rows]
    scores = {"visual_quality": 4.0}
    rows = [
        LabelRow(name, "imported", "ok", "", list(GRID), scores, {"quality": [3.0] * PATCHES}) for name in clips[::3]
    ]
    write_rows(tmp_path / "generate" / "labels.parquet", rows, LabelRow)
    config = config_in(tmp_path)
    config.annotate = AnnotateConfig(teacher="", num_clips=2)
    with LabelServer(config, "anna") as server:
        shown = [row.clip_id for row in server._rows]

    class Teacher:
        name, grid = "counting", GRID

        def labels(self, clips, compared=()):
            for number in range(len(clips)):
                yield number, Label(dict.fromkeys(VIDEO_DIMENSIONS, 3.0), {"quality": (3.0,) * PATCHES})

    annotate(config, Run(config), Teacher())
    labelled = [row.clip_id for row in read_rows(tmp_path / "annotate" / "labels.parquet", LabelRow)]
    assert sorted(shown) == sorted(labelled) and len(shown) == 2 and not set(shown) & set(clips[::3])
