"""The page of a run: what it holds and leaves out, files beside it, several runs, and all of it in a real browser."""

import base64
import csv
import io
import json
import os
import re
import subprocess
import sys
from dataclasses import asdict
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from browser import PROGRAM, Browser
from recipe import demo_config

from halo_fast.agreement.analysis import Rule, analyse, analysis_as_json, analysis_sections
from halo_fast.data.clips import write_clip
from halo_fast.data.tables import EvaluatedRow, write_rows
from halo_fast.demo import WEIGHTS
from halo_fast.errors import UserError
from halo_fast.files import hash_file, write_csv, write_json
from halo_fast.patches import PIXELS, LatentFactors
from halo_fast.pipeline.cli import main
from halo_fast.pipeline.report.chart import Series, line_chart
from halo_fast.pipeline.report.clips import browser_picture, browser_video, cards_of, frame_layers
from halo_fast.pipeline.report.curves import reward_charts
from halo_fast.pipeline.report.several import compare_runs
from halo_fast.pipeline.run import Run
from halo_fast.pipeline.stages.report import write_report
from halo_fast.rewards import RewardModelConfig

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


def make_run(folder, metrics=METRICS, prompts=5, meter="demo", better=0.0) -> Run:
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
        write_json(stage.folder / "config.json", asdict(RewardModelConfig(("visual_quality",))))
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
    settings = {"meter": meter, "num_prompts": prompts, "bootstrap": 7, "grid": GRID}
    with run.stage("evaluate", settings | {"generate": {"fps": 8}}, {}) as stage:
        rows = [measured(number, arm, better) for arm in ("base", "aligned") for number in range(prompts)]
        for number, row in enumerate(rows):
            write_clip(stage.folder / row.video, torch.from_numpy(clip(number % prompts, row.arm)), 8)
        write_rows(stage.folder / "clips.parquet", rows)
        write_json(stage.folder / "metrics.json", metrics)
        analysis = analyse(rows, GRID, Rule({}, 0.4, resamples=10))
        tables = [asdict(section) for section in analysis_sections(analysis)]
        write_json(stage.folder / "analysis.json", {"figures": analysis_as_json(analysis), "tables": tables})
        stage.finish({"prompts": prompts})
    return run


def measured(number: int, arm: str, better: float) -> EvaluatedRow:
    """A clip's row: the base's has a severe flicker in place (1, 2) of the second and third layer."""
    severity = np.random.default_rng([number, arm == "base"]).uniform(0, 0.15, GRID) * (1 - better)
    if arm == "base":
        severity[1:, 1, 2] = 0.9, 0.6
    flat = severity.ravel().tolist()
    prompt = HOSTILE if number == 0 else f"a green {number} drifts left over a dark field"
    return EvaluatedRow(
        f"{arm}_p{number}", arm, number, prompt, number, f"videos/{arm}/p{number}.mp4", flat,
        kinds={"flicker": flat, "smear": [value / 2 for value in flat]},
        readings={"fidelity_correct": 1.0},
        video_scores={"visual_quality": 5 - 4 * float(severity.mean())},
        patch_scores={"quality": (5 - 4 * severity).ravel().tolist()},
        change=0.1, look=[0.1 * number] * 3,
    )  # fmt: skip


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
        "persistence",
        "p, sign test",
    ):
        assert words in text
    for setting in (
        f"learning_rate: {run.config.train.learning_rate}",
        "bootstrap: 7",
        "pretrained_model_name_or_path: demo:graded",
        "num_clips: 4",
        "sha256 of outputs",
    ):
        assert setting in text
    assert hash_file(run.path / "evaluate" / "clips.parquet") in text
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
    assert links and all(link.startswith(("data:", "#")) for link in links)
    places = {attributes["id"] for _, attributes in elements.found if "id" in attributes}
    assert {link[1:] for link in links if link[0] == "#"} <= places
    assert not re.search(r"url\(|@import|=\s*[\"']?https?://", page)
    clips = [image["alt"] for image in elements.all("img")]
    assert len(clips) == 8 and set(clips) == {"base: first frame", "aligned: first frame"}
    pictures = elements.all("svg")
    assert pictures and all(picture["role"] == "img" and picture["aria-label"] for picture in pictures)
    assert elements.all("html")[0]["lang"] == "en" and "viewport" in [meta.get("name") for meta in elements.all("meta")]


def test_text_from_users_is_escaped(page):
    elements = Elements(page)
    assert HOSTILE in elements.text
    assert [script.get("type") for script in elements.all("script")] == [None, *["text/plain"] * 8, None]
    assert "alert(1)</script>" not in page


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
    data = base64.b64decode(browser_video(frames, 8))
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
    data = base64.b64decode(browser_video(frames, 8))
    with av.open(io.BytesIO(data)) as container:
        assert container.streams.video[0].height % 2 == container.streams.video[0].width % 2 == 0


def test_unreadable_clip_is_named(tmp_path):
    run = make_run(tmp_path, prompts=1)
    (run.path / "evaluate" / "videos" / "base" / "p0.mp4").write_bytes(b"not a video")
    with pytest.raises(UserError, match=r"videos/base/p0\.mp4"):
        write_report(run.config, run)


def test_large_clips_are_made_smaller():
    frames = np.zeros((2, 720, 1280, 3), np.uint8)
    data = base64.b64decode(browser_video(frames, 8))
    with av.open(io.BytesIO(data)) as container:
        assert (container.streams.video[0].height, container.streams.video[0].width) == (360, 640)
    assert browser_picture(frames[0]).startswith("data:image/jpeg")


@pytest.mark.parametrize(
    ("frames", "layers", "factors", "expected"),
    [
        (9, 3, (8, 4, True), [0] + [1] * 4 + [2] * 4),
        (9, 2, (8, 4, True), [0] + [1] * 8),
        (6, 3, (8, 2, False), [0, 0, 1, 1, 2, 2]),
        (4, 1, (8, 1, True), [0] * 4),
        (2, 2, (8, 1, False), [0, 1]),
        (25, 2, (32, 8, True), [0] * 9 + [1] * 16),  # LTX, where 25 is one more than a multiple of 4 too
        (9, 2, (8, 4, True, 1), [0] + [1] * 8),  # CogVideoX 1.5: latents 0 and 1 are the first frame
        (17, 3, (8, 4, True, 1), [0] + [1] * 8 + [2] * 8),
        (85, 3, (8, 6, True), [0] * 25 + [1] * 30 + [2] * 30),  # Mochi
    ],
)
def test_every_frame_has_the_layer_that_covers_it(frames, layers, factors, expected):
    assert frame_layers(frames, layers, LatentFactors(*factors)) == expected


def test_everything_is_also_there_for_programs(run):
    with open(run.path / "report" / "clips.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 10 and {row["arm"] for row in rows} == {"base", "aligned"}
    assert rows[0]["prompt"] == HOSTILE
    severity = np.array(measured(0, "base", 0.0).severity)
    assert float(rows[0]["severity"]) == pytest.approx(severity.mean())
    assert float(rows[0]["defective_share"]) == pytest.approx(2 / 48)
    (found,) = json.loads((run.path / "report" / "report.json").read_text()).values()
    assert found["metrics"] == METRICS and len(found["clips"]) == 10
    assert found["analysis"]["wins"]["severity"]["wins"] == 5
    assert found["stages"]["evaluate"]["sha256 of outputs"]["metrics.json"] == hash_file(
        run.path / "evaluate" / "metrics.json"
    )


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory):
    first, second = (tmp_path_factory.mktemp(name) for name in ("first", "second"))
    return make_run(first), make_run(second, better=0.5)


def test_runs_are_compared_on_one_page(two_runs, capsys):
    first, second = (run.path for run in two_runs)
    assert main(["report", "--compare", str(first), str(second)]) == 0
    page = second / "compare" / "report.html"
    assert f"report: {page}" in capsys.readouterr().out
    elements = Elements(page.read_text())
    text = " ".join(elements.text.split())
    names = [f"{path.parent.name}/run" for path in (first, second)]
    for words in (", ".join(names), "0.580 → 0.070", "0.830 [0.790, 0.870]", "5 0 0 1.000"):
        assert words in text
    # both bases are the same files, so they are shown once
    assert len([attributes for attributes in elements.all("figure") if "screen" in attributes["class"]]) == 5 * 3
    assert HOSTILE in elements.text
    means = [np.mean([measured(number, "aligned", better).severity for number in range(5)]) for better in (0.0, 0.5)]
    assert f"{means[0]:.3f}" in text and f"{means[1]:.3f}" in text
    with open(second / "compare" / "clips.csv", newline="") as file:
        assert {row["run"] for row in csv.DictReader(file)} == set(names)


def test_runs_that_cannot_be_compared_are_named(two_runs, tmp_path):
    first = two_runs[0].path
    with pytest.raises(UserError, match="--compare: expected at least two run directories, got "):
        compare_runs([first])
    with pytest.raises(UserError, match="--compare: expected different runs"):
        compare_runs([first, first])
    with pytest.raises(UserError, match="expected a run directory; run `halo evaluate` in it first"):
        compare_runs([first, tmp_path])
    other = make_run(tmp_path, prompts=1, meter="reward")
    with pytest.raises(UserError, match=r"--compare: expected one evaluate.meter, got demo in .* and reward in "):
        compare_runs([first, other.path])


def test_wrong_number_of_severities_is_refused(tmp_path):
    rows = [measured(0, arm, 0.0) for arm in ("base", "aligned")]
    with pytest.raises(UserError, match=r"base_p0 has 48 severities, expected one for each patch of grid \(3, 2, 2\)"):
        cards_of([("", tmp_path, rows, (3, 2, 2), 8, PIXELS)], None)
    with pytest.raises(UserError, match="no prompt has both a base and an aligned clip; redo evaluate"):
        cards_of([("", tmp_path, rows[:1], GRID, 8, PIXELS)], None)


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


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if PROGRAM is None:
        pytest.skip("needs chromium")
    with Browser(tmp_path_factory.mktemp("profile")) as page:
        yield page


def trouble(browser) -> list[str]:
    """What the browser logged as errors, uncaught exceptions included."""
    return [
        str(event["params"])
        for event in browser.events
        if event["method"] == "Runtime.exceptionThrown"
        or (event["method"] == "Runtime.consoleAPICalled" and event["params"]["type"] in ("error", "warning"))
        or (event["method"] == "Log.entryAdded" and event["params"]["entry"]["level"] == "error")
    ]


VIDEOS = "[...document.querySelectorAll('video')]"


def open_page(browser, path) -> None:
    browser.events.clear()
    browser.open(path.resolve().as_uri())
    browser.until("document.readyState === 'complete'")
    browser.until(f"{VIDEOS}.length > 0 && {VIDEOS}.every((v) => v.readyState >= 2)")


def test_clips_play_in_step_and_the_slider_moves_both(run, browser):
    open_page(browser, run.path / "report" / "report.html")
    browser.until(f"(window.seen ??= new Set()).add({VIDEOS}[0].currentTime.toFixed(2)).size > 4")
    assert browser.run(f"{VIDEOS}.every((v) => v.videoWidth === 160 && !v.paused && v.error === null)")
    assert browser.run("document.documentElement.scrollWidth <= innerWidth")
    first = "document.querySelector('#c0000 input')"
    browser.run(f"({first}.value = 6, {first}.dispatchEvent(new Event('input')))")
    times = browser.until("((v) => v.every((x) => x.paused && !x.seeking) && v.map((x) => x.currentTime))"
                          "([...document.querySelectorAll('#c0000 video')])")  # fmt: skip
    assert times == pytest.approx([6.5 / 8] * 2)
    spoken = "frame 7 of 9: base 1 patches defective, aligned 0 patches defective"
    assert browser.run(f"{first}.getAttribute('aria-valuetext')") == spoken
    browser.run(f"{first}.focus()")
    browser.press("ArrowLeft")
    browser.until("cards[0].frame === 5 && [...document.querySelectorAll('#c0000 video')].every((v) => !v.seeking)")
    browser.run("document.getElementById('pause').click()")
    assert browser.run(f"{VIDEOS}.every((v) => v.paused)")
    assert not trouble(browser)


def test_the_heat_map_shades_the_right_patch(run, browser):
    open_page(browser, run.path / "report" / "report.html")
    browser.run("document.getElementById('pause').click()")
    browser.run("seek(cards[0], 8)")
    # shade in the middle of each patch of the base's last layer
    shades = browser.run("""(() => {
        const canvas = cards[0].screens[0].canvas, pen = canvas.getContext("2d");
        return Array.from({length: 16}, (_, k) =>
            pen.getImageData((k % 4 + 0.5) * canvas.width / 4, (Math.floor(k / 4) + 0.5) * canvas.height / 4, 1, 1)
                .data[3] / 255);
    })()""")
    severity = np.array(measured(0, "base", 0.0).severity).reshape(GRID)[2].ravel()
    np.testing.assert_allclose(shades, 0.7 * severity, atol=0.012)
    assert np.argmax(shades) == 6
    browser.run("document.getElementById('heat').click()")
    assert browser.run("getComputedStyle(cards[0].screens[0].canvas).display") == "none"


def test_clips_are_found_sorted_and_reached_from_the_table(run, browser):
    open_page(browser, run.path / "report" / "report.html")
    shown = "cards.filter((c) => !c.hidden).sort((a, b) => a.compareDocumentPosition(b) & 4 ? -1 : 1).map((c) => c.id)"

    def choose(name: str, value: str) -> list[str]:
        field = f"document.getElementById('{name}')"
        browser.run(f"({field}.value = {value!r}, {field}.dispatchEvent(new Event('input', {{bubbles: true}})))")
        return browser.run(shown)

    assert choose("find", "GREEN drifts") == ["c0001", "c0002", "c0003"]
    assert browser.run("document.getElementById('count').textContent") == "3 of 4 prompts, 3 shown"
    margins = {f"c{number:04d}": np.mean(measured(number, "base", 0.0).severity)
               - np.mean(measured(number, "aligned", 0.0).severity) for number in range(4)}  # fmt: skip
    choose("find", "")
    assert choose("order", "worst") == sorted(margins, key=margins.get)
    assert browser.run("[...document.querySelectorAll('#rows tbody a')].map((a) => a.hash.slice(1))") == sorted(
        margins, key=margins.get
    )
    assert choose("kind", "flicker") == sorted(margins, key=margins.get)
    assert choose("outcome", "worse") == []
    # a link shows its clip, whatever was chosen
    browser.run("document.querySelector(\"#rows a[href='#c0002']\").click()")
    browser.until("document.activeElement.id === 'c0002' && !document.activeElement.hidden")
    assert not trouble(browser)


def test_players_exist_for_clips_in_view_alone(two_runs, tmp_path, browser):
    run = make_run(tmp_path, prompts=30)
    run.config.report.num_clips = None
    write_report(run.config, run)
    open_page(browser, run.path / "report" / "report.html")
    assert browser.run("cards.filter((c) => !c.hidden).length") == 24
    assert 0 < browser.run(f"{VIDEOS}.length") < 30
    browser.run("document.getElementById('more').click()")
    assert browser.run("cards.filter((c) => !c.hidden).length") == 30
    browser.run("cards[29].scrollIntoView()")
    browser.until("cards[29].videos?.every((v) => v.readyState >= 2) && !cards[0].videos")
    assert browser.run(f"{VIDEOS}.length") < 30
    open_page(browser, compare_runs([run.path for run in two_runs]))
    assert browser.run("cards[0].videos.length") == 3 and not trouble(browser)


def test_a_reward_model_that_was_taken_may_have_no_history(tmp_path):
    assert reward_charts(tmp_path / "history.csv") == []
    rows = [{"phase": "patch", "step": 1, "loss": 0.5}, {"phase": "patch", "step": 2, "loss": 0.25}]
    write_csv(tmp_path / "history.csv", rows)
    assert len(reward_charts(tmp_path / "history.csv")) == 1
