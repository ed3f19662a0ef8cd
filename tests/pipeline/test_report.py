"""The page of a run: what it holds, what it leaves out, and that a real browser plays its clips."""

import base64
import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from recipe import demo_config

from halo_fast.data.clips import write_clip
from halo_fast.demo import WEIGHTS
from halo_fast.errors import UserError
from halo_fast.files import hash_file, write_csv, write_json, write_parquet
from halo_fast.pipeline.report.chart import Series, line_chart
from halo_fast.pipeline.report.clips import browser_video, severity_strip
from halo_fast.pipeline.run import Run
from halo_fast.pipeline.stages.report import write_report

av = pytest.importorskip("av")
pyarrow = pytest.importorskip("pyarrow")

GRID = (3, 4, 4)
HOSTILE = "a <b>red</b> 7 & \"quoted\" 'prompt' </script><script>alert(1)</script>"
METRICS = {
    "base_defect_rate": 0.58,
    "aligned_defect_rate": 0.07,
    "mitigated": 0.83,
    "mitigated_interval": [0.79, 0.87],
    "patch_spearman": 0.93,
    "fidelity_base": 0.62,
    "fidelity_aligned": 0.71,
    "fidelity_difference": 0.09,
    "fidelity_difference_interval": [-0.02, 0.2],
    "motion_ratio": 0.97,
    "motion_ratio_interval": [0.91, 1.04],
    "meter_clean_reading": 0.013,
    "per_kind": {
        "flicker": {"base_severity": 0.2125, "aligned_severity": 0.0125, "base_rate": 0.31, "aligned_rate": 0.02},
        "smear": {"base_severity": 0.25, "aligned_severity": 0.0, "base_rate": 0.4, "aligned_rate": 0.0},
    },
    "fidelity": {"digit": {"base": 0.74, "aligned": 0.8}, "motion": {"base": 0.97, "aligned": 0.96}},
    "num_prompts": 5,
    "base_severity": 0.41,
    "aligned_severity": 0.08,
    "reward_base": {"video_visual_quality": 2.75, "patch_quality": 3.4},
    "reward_aligned": {"video_visual_quality": 4.5, "patch_quality": 4.6},
}


def clip(number: int, arm: str) -> np.ndarray:
    """Nine frames of a bright square on a dark field that moves; the base's has a torn patch."""
    frames = np.full((9, 32, 32, 3), (18, 24, 46), np.uint8)
    for time_, frame in enumerate(frames):
        left = 3 + 2 * time_
        frame[10:22, left : left + 9] = [(214, 60, 50), (70, 190, 90), (80, 130, 240)][number % 3]
        if arm == "base" and time_ > 3:
            frame[8:16, 16:24] = frame[16:24, 8:16]
    return frames


def make_run(folder, metrics=METRICS, prompts=5, meter="demo") -> Run:
    config = demo_config(output_dir=str(folder / "run"))
    config.evaluate.num_prompts, config.evaluate.bootstrap = prompts, 7
    config.evaluate.meter, config.report.num_clips = meter, 4
    run = Run(config)
    with run.stage("reward", {}, {}) as stage:
        rows = [
            {"phase": phase, "step": step, "loss": 2 / (step + 2), "spearman": 1 - 1 / (step + 1)}
            for phase in ("video", "patch")
            for step in range(40)
        ]
        write_csv(stage.folder / "history.csv", rows)
        stage.finish({"steps": 80})
    with run.stage("train", {"learning_rate": config.train.learning_rate}, {}) as stage:
        noise = np.random.default_rng(0)
        rows = [
            {
                "step": step,
                "loss": 1.386 - 0.01 * step + 0.05 * noise.normal(),
                "rewards/accuracies": 0.5 + 0.004 * step,
                "patch/accuracies": 0.5 + 0.0045 * step,
                "rewards/margins": 0.02 * step,
                "model_mse": 0.3 - 0.0005 * step,
                "ref_mse": 0.3,
            }
            for step in range(100)
        ]
        write_csv(stage.folder / "log.csv", rows)
        rows = [
            {
                "step": step,
                "split": split,
                "label": label,
                "group": group,
                "bucket": "",
                "accuracy": 0.6,
                "margin": step,
            }
            for step in (0, 50, 100)
            for split in ("heldout", "train")
            for label in ("video", "patch")
            for group in ("all", "timestep")
        ]
        write_csv(stage.folder / "diagnostics.csv", rows)
        stage.finish({"steps": 100, "pairs": 96})
    with run.stage("evaluate", {"meter": meter, "num_prompts": prompts, "bootstrap": 7}, {}) as stage:
        generator, rows = np.random.default_rng(1), []
        for number in range(prompts):
            for arm in ("base", "aligned"):
                name = f"videos/{arm}/p{number}.mp4"
                write_clip(stage.folder / name, torch.from_numpy(clip(number, arm)), 8)
                severity = generator.uniform(0, 0.15, GRID)
                if arm == "base":
                    severity[1:, 1, 2] = 0.9, 0.6
                prompt = HOSTILE if number == 0 else f"a green {number} drifts left over a dark field"
                row = {"clip_id": f"p{number}", "arm": arm, "prompt": prompt, "seed": number, "video": name}
                rows.append({**row, "severity": severity.ravel().tolist()})
        write_parquet(stage.folder / "clips.parquet", pyarrow.Table.from_pylist(rows))
        write_json(stage.folder / "metrics.json", metrics)
        stage.finish({"prompts": prompts})
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    run = make_run(tmp_path_factory.mktemp("report"))
    write_report(run.config, run)
    return run


@pytest.fixture(scope="module")
def page(run) -> str:
    return (run.path / "report" / "report.html").read_text()


class Elements(HTMLParser):
    """Every start tag with its attributes, and the visible text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found, self.text, self.hidden = [], "", 0
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        self.hidden += tag in ("script", "style")

    def handle_endtag(self, tag):
        self.hidden -= tag in ("script", "style")
        self.text += " " * (tag in ("td", "th"))

    def handle_data(self, data):
        if not self.hidden:
            self.text += data

    def all(self, tag):
        return [attributes for name, attributes in self.found if name == tag]


def test_page_holds_headline_tables_and_every_setting(run, page):
    text = " ".join(Elements(page).text.split())
    for words in (
        "83% of the local defects mitigated",
        "95% interval 79% to 87%",
        "58% → 7%",
        "62% → 71%",
        "0.97× the base",
        "0.93 patch rewards",
        "difference +9 points, 95% interval -2 to +20",
        "95% interval 0.91 to 1.04",
        "flicker 31.0% 2.0%",
        "flicker 0.2125 0.0125",
        "digit 74.0% 80.0%",
        "video visual quality 2.75 4.50",
        "train 100 steps, 96 pairs",
    ):
        assert words in text
    for setting in (
        f"learning_rate: {run.config.train.learning_rate}",
        "bootstrap: 7",
        "pretrained_model_name_or_path: demo:graded",
        "num_clips: 4",
    ):
        assert setting in text
    # of stages that this directory does not hold nothing is known
    assert "num_inference_steps" not in text


def test_page_says_what_the_meters_are_worth(page):
    text = " ".join(Elements(page).text.split())
    measured = json.loads((WEIGHTS / "meters.json").read_text())
    for kind in measured["graded"]["auc_by_kind"]:
        figures = []
        for of in (measured["graded"], measured["patchy"]):
            planted, named = of["planted_rate_by_kind"][kind], of["measured_rate_by_kind"][kind]
            figures.append(f"{of['auc_by_kind'][kind]:.3f} {of['channel_auc_by_kind'][kind]:.3f}")
            figures.append(f"{100 * planted:.1f}% → {100 * named:.1f}%")
        assert " ".join([kind, *figures]) in text
    assert f"digit right {100 * measured['clean']['fidelity']['digit']:.1f}%" in text
    removed = [measured[base]["removed"][-1] for base in ("graded", "patchy")]
    figures = [f"{row['severity']:.3f} {row['motion_ratio']:.2f} {100 * row['fidelity']:.1f}%" for row in removed]
    assert " ".join(["100%", *figures]) in text


def test_a_meter_without_notes_has_no_section(tmp_path):
    run = make_run(tmp_path, prompts=1, meter="reward")
    write_report(run.config, run)
    elements = Elements((run.path / "report" / "report.html").read_text())
    assert "The meters" not in elements.text and "1 keeps it as it was" in elements.text


def test_diagnostics_are_drawn(page):
    pictures = [picture["aria-label"] for picture in Elements(page).all("svg")]
    (margin,) = [label for label in pictures if label.startswith("Mean margin, by pairs")]
    names = ("patch, heldout", "patch, train", "video, heldout", "video, train")
    assert all(f"{name} from 0 to 100" in margin for name in names)


def test_a_moved_directory_keeps_its_report(tmp_path, caplog):
    caplog.set_level("INFO", "halo_fast")
    run = make_run(tmp_path, prompts=1)
    write_report(run.config, run)
    page = hash_file(run.path / "report" / "report.html")
    moved = run.path.rename(tmp_path / "elsewhere")
    run.config.output_dir = str(moved)
    write_report(run.config, Run(run.config))
    assert "report: finished before, kept" in caplog.text
    assert hash_file(moved / "report" / "report.html") == page


def test_page_is_self_contained_and_accessible(page):
    elements = Elements(page)
    links = [
        value
        for _, attributes in elements.found
        for key, value in attributes.items()
        if key in ("src", "href", "poster")
    ]
    assert links and all(link.startswith("data:") for link in links)
    assert not re.search(r"url\(|@import|=\s*[\"']?https?://", page)
    assert len(elements.all("video")) == 8
    for video in elements.all("video"):
        assert {"muted", "autoplay", "loop", "playsinline"} <= video.keys() and video["aria-label"]
    pictures = elements.all("svg")
    assert pictures and all(picture["role"] == "img" and picture["aria-label"] for picture in pictures)
    assert elements.all("html")[0]["lang"] == "en" and "viewport" in [meta.get("name") for meta in elements.all("meta")]


def test_text_from_users_is_escaped(page):
    elements = Elements(page)
    assert HOSTILE in elements.text
    assert len(elements.all("script")) == 1 and "alert(1)</script>" not in page


def test_a_missing_key_leaves_its_row_out(tmp_path):
    few = {"base_defect_rate": 0.5, "aligned_defect_rate": -0.001}
    run = make_run(tmp_path, few, prompts=1)
    write_report(run.config, run)
    text = " ".join(Elements((run.path / "report" / "report.html").read_text()).text.split())
    assert "50% → 0%" in text
    # what follows speaks of the meters, whatever was measured with them
    text = text.partition("The meters")[0]
    for words in ("mitigated", "Spearman", "what the prompt names", "motion"):
        assert words not in text


def test_report_is_reproducible(run, page, tmp_path):
    before = hash_file(run.path / "report" / "report.html")
    write_report(run.config, Run(run.config, force=True))
    assert hash_file(run.path / "report" / "report.html") == before


def test_embedded_clip_is_h264_for_browsers_and_true_to_its_source():
    frames = clip(0, "base")
    data = base64.b64decode(browser_video(frames, 8).partition("base64,")[2])
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert (stream.height, stream.width, stream.average_rate) == (160, 160, 8)
        decoded = [frame.reformat(format="rgb24", src_colorspace=1).to_ndarray() for frame in container.decode(stream)]
    centres = np.stack(decoded)[:, 2::5, 2::5].astype(int)
    assert centres.shape == frames.shape
    assert np.abs(centres - frames).mean() < 4


def test_embedded_clip_does_not_depend_on_what_memory_held():
    script = """
import hashlib, numpy as np
from halo_fast.pipeline.report.clips import browser_video
noise = np.random.default_rng(0).integers(0, 256, (32, 41, 3), dtype=np.uint8)
frames = np.stack([noise[:, shift : shift + 32] for shift in range(9)])
print(hashlib.sha256(browser_video(frames, 8).encode()).hexdigest())
"""
    hashes = set()
    for byte in ("1", "170"):
        environment = os.environ | {"MALLOC_PERTURB_": byte}  # glibc fills every allocation with this byte
        hashes.add(subprocess.check_output([sys.executable, "-c", script], env=environment))
    assert len(hashes) == 1


def test_odd_clip_sides_are_made_even():
    frames = np.zeros((2, 33, 201, 3), np.uint8)
    data = base64.b64decode(browser_video(frames, 8).partition("base64,")[2])
    with av.open(io.BytesIO(data)) as container:
        assert container.streams.video[0].height % 2 == container.streams.video[0].width % 2 == 0


def test_unreadable_clip_is_named(tmp_path):
    run = make_run(tmp_path, prompts=1)
    (run.path / "evaluate" / "videos" / "base" / "p0.mp4").write_bytes(b"not a video")
    with pytest.raises(UserError, match=r"videos/base/p0\.mp4"):
        write_report(run.config, run)


def test_severity_strip_places_every_patch():
    severity = np.zeros(GRID)
    severity[2, 3, 1] = 0.8
    first, _, last = severity_strip(np.zeros((9, 32, 32, 3), np.uint8), severity.ravel(), GRID)
    assert first.count("<rect") == last.count("<rect") == 16
    assert "0 of 16 patches defective" in first and "1 of 16 patches defective" in last
    (worst,) = re.findall(r"<rect class='cell defective' x='(\d+)' y='(\d+)' width='(\d+)' height='(\d+)'", last)
    assert worst == ("8", "24", "8", "8")


def test_ragged_patches_cover_the_frame():
    (picture,) = severity_strip(np.zeros((4, 7, 11, 3), np.uint8), [0.5] * 6, (1, 2, 3))
    boxes = [tuple(map(int, box)) for box in re.findall(r"x='(\d+)' y='(\d+)' width='(\d+)' height='(\d+)'", picture)]
    covered = np.zeros((7, 11), int)
    for x, y, width, height in boxes:
        covered[y : y + height, x : x + width] += 1
    assert (covered == 1).all()


def test_wrong_number_of_severities_is_refused(tmp_path):
    run = make_run(tmp_path, prompts=1, meter="reward")
    run.config.grid = (3, 2, 2)
    with pytest.raises(UserError, match="48 severities"):
        write_report(run.config, run)
    assert not (run.path / "report" / "report.html").exists()


def test_report_asks_for_the_stages_before_it(tmp_path):
    config = demo_config(output_dir=str(tmp_path))
    with pytest.raises(UserError, match="run `halo reward`"):
        write_report(config, Run(config))


def test_chart_scales_its_points_and_breaks_at_nan():
    chart = line_chart("Loss", [Series("loss", [(0, 1.0), (10, float("nan")), (20, 3.0), (30, 2.0)])])
    (path,) = re.findall(r"d='([^']*)'", chart)
    assert [word[0] for word in re.findall(r"[ML][\d.]+ [\d.]+", path)] == ["M", "M", "L"]
    points = np.array(re.findall(r"[ML]([\d.]+) ([\d.]+)", path), float)
    steps = np.array([0, 20, 30])
    assert np.allclose(np.diff(points[:, 0]) / np.diff(steps), (points[-1, 0] - points[0, 0]) / 30, atol=0.01)
    assert points[1, 1] < points[2, 1] < points[0, 1]  # larger values lie higher


@pytest.mark.parametrize("values", [[0.5], [0.0, 0.0], [1e-9, 3e-9], [-5.0, 1e6]])
def test_chart_axis_spans_its_values(values):
    chart = line_chart("x", [Series("y", list(enumerate(values)))])
    labels = [float(label) for label in re.findall(r"class='axis end'[^>]*>([^<]*)<", chart)]
    assert labels == sorted(labels) and labels[0] <= min(values) and max(values) <= labels[-1] and len(labels) <= 8


class Browser:
    """A headless Chromium, driven by the WebDriver protocol."""

    def __init__(self, profile) -> None:
        self.process = subprocess.Popen(["chromedriver", "--port=0"], stdout=subprocess.PIPE, text=True)
        line = next(line for line in self.process.stdout if "started successfully on port" in line)
        self.address = "http://127.0.0.1:{}/session".format(re.search(r"port (\d+)", line)[1])
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync"]
        flags += [
            "--disable-component-update",
            "--no-first-run",
            "--window-size=1200,900",
            f"--user-data-dir={profile}",
        ]
        self.session = self.send("", {"capabilities": {"alwaysMatch": {"goog:chromeOptions": {"args": flags}}}})
        self.address += "/" + self.session["sessionId"]

    def send(self, path, body):
        request = urllib.request.Request(
            self.address + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def run(self, script):
        return self.send("/execute/sync", {"script": script, "args": []})

    def close(self):
        urllib.request.urlopen(urllib.request.Request(self.address, method="DELETE"), timeout=60).close()
        self.process.terminate()
        self.process.wait()


@pytest.mark.skipif(not shutil.which("chromedriver"), reason="needs chromium and chromedriver")
def test_clips_play_in_a_browser(run, tmp_path):
    browser = Browser(tmp_path / "profile")
    try:
        browser.send("/url", {"url": (run.path / "report" / "report.html").resolve().as_uri()})
        times = "return [...document.querySelectorAll('video')].map((v) => v.currentTime)"
        deadline, seen = time.monotonic() + 20, [browser.run(times)]
        while time.monotonic() < deadline and not all(len(set(clock)) > 2 for clock in zip(*seen, strict=True)):
            time.sleep(0.1)
            seen.append(browser.run(times))
        assert all(len(set(clock)) > 2 for clock in zip(*seen, strict=True))
        states = browser.run(
            "return [...document.querySelectorAll('video')].map((v) => [v.videoWidth, v.paused, v.error === null])"
        )
        assert states == [[160, False, True]] * 8
        assert browser.run("return document.documentElement.scrollWidth <= innerWidth")
        browser.run("document.querySelector('button').click()")
        assert browser.run("return [...document.querySelectorAll('video')].every((v) => v.paused)")
    finally:
        browser.close()
