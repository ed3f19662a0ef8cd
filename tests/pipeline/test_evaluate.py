"""The figures against closed forms and scipy, and the stage on a tiny pipeline with a LoRA."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import scipy.stats
import torch
from diffusers import WanPipeline
from peft import LoraConfig, get_peft_model_state_dict
from tiny import kill_when, output_hashes, tiny_config, tiny_wan

from halo_fast.agreement.arms import compare_arms, compare_rewards, rates_by_kind, severity_mitigated
from halo_fast.agreement.figures import bootstrap_interval, spearman
from halo_fast.agreement.meters import read_meter
from halo_fast.agreement.paired import count_wins
from halo_fast.data.clips import read_clip
from halo_fast.data.tables import EvaluatedRow, read_rows
from halo_fast.errors import UserError
from halo_fast.families import load
from halo_fast.families.sampling import clip_seed, sample_clips
from halo_fast.files import hash_file
from halo_fast.patches import PatchGrid
from halo_fast.pipeline.config import EvaluateConfig
from halo_fast.pipeline.run import Run
from halo_fast.pipeline.stages.evaluate import evaluate
from halo_fast.rewards import RewardModel, RewardModelConfig


@pytest.mark.parametrize(
    ("base", "aligned", "clean", "expected"),
    [(0.4, 0.4, 0.0, 0.0), (0.4, 0.1, 0.0, 0.75), (0.5, 0.1, 0.1, 1.0), (0.3, 0.5, 0.1, -1.0), (0.5, 0.3, 0.1, 0.5)],
)
def test_severity_mitigated(base, aligned, clean, expected):
    assert severity_mitigated(base, aligned, clean) == pytest.approx(expected)


def test_severity_mitigated_of_a_clean_base_is_not_a_number():
    assert np.isnan(severity_mitigated(0.05, 0.01, 0.05))


@pytest.mark.parametrize("levels", [1000, 4])
def test_spearman_is_scipys(levels):
    rng = np.random.default_rng(levels)
    x, y = rng.integers(levels, size=(2, 20, 15))
    y = y + x
    assert spearman(x, y) == pytest.approx(scipy.stats.spearmanr(x.ravel(), y.ravel()).statistic)
    assert spearman(x, -np.exp(x / levels)) == pytest.approx(-1)
    assert np.isnan(spearman(x, np.zeros_like(x)))


def test_bootstrap_interval_is_scipys_and_repeats():
    values = np.random.default_rng(0).gamma(2, size=200)
    interval = bootstrap_interval(lambda rows: values[rows].mean(), 200, 4000, seed=1)
    expected = scipy.stats.bootstrap((values,), np.mean, method="percentile", n_resamples=4000, rng=2)
    width = expected.confidence_interval.high - expected.confidence_interval.low
    np.testing.assert_allclose(interval, expected.confidence_interval, atol=0.06 * width)
    assert interval == bootstrap_interval(lambda rows: values[rows].mean(), 200, 4000, seed=1)
    assert bootstrap_interval(lambda rows: values[rows].mean(), 200, 100, seed=1, level=0.5)[0] > interval[0]


def test_bootstrap_covers_the_truth_as_often_as_it_says():
    rng, covered = np.random.default_rng(3), 0
    for trial in range(200):
        values = rng.normal(size=60)
        low, high = bootstrap_interval(lambda rows, values=values: values[rows].mean(), 60, 200, seed=trial)
        covered += low < 0 < high
    assert 0.88 < covered / 200 < 0.985


def arm(severity: float, correct: list[float], motion: float) -> dict[str, np.ndarray]:
    """Four clips of three patches, whose severities are the given one, its half and nothing."""
    patches = np.tile([severity, severity / 2, 0.0], (4, 1))
    columns = {"severity": patches, "severity_smear": patches / 2, "motion_amount": np.full(4, motion)}
    return columns | {f"{name}_correct": np.array(correct) for name in ("digit", "colour", "motion", "fidelity")}


def test_compare_arms_by_hand():
    metrics = compare_arms(arm(0.8, [1, 1, 0, 0], 8.0), arm(0.4, [1, 1, 1, 0], 6.0), 0.1, resamples=50, seed=0)
    assert metrics["num_prompts"] == 4
    assert metrics["base_severity"] == pytest.approx(0.4) and metrics["aligned_severity"] == pytest.approx(0.2)
    assert metrics["base_defect_rate"] == pytest.approx(2 / 3)
    assert metrics["aligned_defect_rate"] == pytest.approx(1 / 3)
    assert metrics["per_kind"] == {
        "smear": {
            "base_severity": pytest.approx(0.2),
            "aligned_severity": pytest.approx(0.1),
            "base_rate": pytest.approx(2 / 3),
            "aligned_rate": pytest.approx(1 / 3),
        }
    }
    assert metrics["mitigated"] == pytest.approx(2 / 3)
    # every clip is alike, so every resample is
    np.testing.assert_allclose(metrics["mitigated_interval"], 2 / 3)
    assert (metrics["fidelity_base"], metrics["fidelity_aligned"]) == (0.5, 0.75)
    assert metrics["fidelity"]["colour"] == {"base": 0.5, "aligned": 0.75}
    assert metrics["fidelity_difference"] == 0.25
    assert metrics["motion_ratio"] == 0.75 and metrics["motion_ratio_interval"] == [0.75, 0.75]


def test_intervals_of_fidelity_and_motion_are_scipys():
    rng = np.random.default_rng(5)
    base, aligned = (arm(0.5, [1.0] * 4, 1.0) for _ in range(2))
    for columns, share in ((base, 0.6), (aligned, 0.8)):
        columns |= {f"{name}_correct": rng.random(150) < share for name in ("digit", "colour", "motion", "fidelity")}
        columns |= {"motion_amount": rng.gamma(4, size=150), "severity": rng.random((150, 3))}
        columns["severity_smear"] = columns["severity"]
    metrics = compare_arms(base, aligned, 0.0, resamples=4000, seed=0)
    for figure, name, statistic in (
        ("fidelity_difference", "fidelity_correct", lambda x, y: y.mean() - x.mean()),
        ("motion_ratio", "motion_amount", lambda x, y: y.mean() / x.mean()),
    ):
        data = base[name].astype(float), aligned[name].astype(float)
        expected = scipy.stats.bootstrap(
            data, statistic, paired=True, vectorized=False, method="percentile", n_resamples=4000, rng=1
        ).confidence_interval
        width = expected.high - expected.low
        np.testing.assert_allclose(metrics[f"{figure}_interval"], expected, atol=0.06 * width)
        assert metrics[figure] == pytest.approx(statistic(*data))


def test_what_a_meter_reads_of_some_clips_or_not_at_all():
    base, aligned = arm(0.8, [1, 1, 0, 0], 8.0), arm(0.4, [1, 1, 1, 0], 6.0)
    base["fidelity_correct"] = np.array([1, np.nan, 0, 0])
    aligned["fidelity_correct"] = np.array([1, 1, 1, np.nan])
    metrics = compare_arms(base, aligned, 0.1, resamples=50, seed=0)
    assert (metrics["fidelity_base"], metrics["fidelity_aligned"]) == (0.5, 1.0)  # of the first and the third
    assert metrics["fidelity_difference"] == 0.5 and metrics["motion_ratio"] == 0.75
    for name in ("fidelity_correct", "motion_amount"):
        base[name] = np.full(4, np.nan)
    json.dumps(metrics := compare_arms(base, aligned, 0.1, resamples=50, seed=0), allow_nan=False)
    assert not {"fidelity_base", "motion_ratio"} & metrics.keys() and metrics["mitigated"] == pytest.approx(2 / 3)
    del base["motion_amount"], aligned["motion_amount"]
    assert "motion_ratio" not in compare_arms(base, aligned, 0.1, resamples=50, seed=0)
    whole = {"video_quality": [4.0], "severity": [[0.1]]}
    assert compare_rewards(whole, whole, "severity").keys() == {"reward_base", "reward_aligned"}
    wins = count_wins([])
    assert (wins.wins, wins.ties, wins.losses, wins.p) == (0, 0, 0, 1.0) and np.isnan(wins.rate.value)


def test_rates_by_kind_add_up():
    severity = np.array([[0.9, 0.3], [0.2, 0.6]])
    # the second kind is never above the threshold by itself
    by_kind = np.array([[[0.8, 0.1], [0.2, 0.35]], [[0.1, 0.2], [0.0, 0.2]], [[0.0, 0.0], [0.0, 0.0]]])
    np.testing.assert_allclose(rates_by_kind(severity, by_kind), [0.5, 0.25, 0.0])
    assert rates_by_kind(severity, by_kind).sum() == pytest.approx((severity > 0.25).mean())


def test_a_figure_that_is_not_defined_is_left_out():
    metrics = compare_arms(arm(0.2, [1] * 4, 0.0), arm(0.1, [1] * 4, 0.0), 0.11, resamples=50, seed=0)
    assert not {"mitigated", "mitigated_interval", "motion_ratio"} & metrics.keys()
    json.dumps(metrics, allow_nan=False)
    single = [{name: values[:1] for name, values in arm(level, [1] * 4, 1.0).items()} for level in (0.4, 0.2)]
    metrics = compare_arms(*single, 0.0, resamples=50, seed=0)
    assert metrics["mitigated"] == pytest.approx(0.5) and metrics["motion_ratio"] == 1
    assert not [name for name in metrics if name.endswith("interval")]


def test_a_rank_correlation_with_a_meter_that_reads_the_same_everywhere_is_left_out():
    quality = np.arange(8.0).reshape(2, 4)
    base = {"patch_quality": quality, "severity": -quality / 8}
    aligned = {"patch_quality": quality, "severity": np.zeros((2, 4))}  # a flawless model, by that meter
    metrics = compare_rewards(base, aligned, "severity")
    assert metrics["patch_spearman"] == 1 and "patch_spearman_aligned" not in metrics
    assert metrics["reward_base"]["patch_quality"] == 3.5


def aligned_run(folder: Path, scale: float = 2.0) -> Run:
    """A run directory as it is before evaluate: a random LoRA and a random reward model."""
    config = tiny_config(folder)
    config.evaluation_prompts = config.prompts
    config.generate.crf = None  # what is measured on the files is compared with what was sampled
    config.evaluate = EvaluateConfig(num_prompts=3, meter="reward", bootstrap=20)
    run = Run(config)
    with run.stage("train", {}, {}) as stage:
        if not stage.done:
            transformer = tiny_wan().transformer
            torch.manual_seed(1)
            transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False))
            lora = {name: scale * value for name, value in get_peft_model_state_dict(transformer).items()}
            WanPipeline.save_lora_weights(stage.folder / "lora", transformer_lora_layers=lora)
            stage.finish({})
    with run.stage("reward", {}, {}) as stage:
        if not stage.done:
            torch.manual_seed(2)
            model = RewardModel(RewardModelConfig(("visual_quality", "text_alignment"), width=8))
            model.save(stage.folder)
            stage.finish({})
    return run


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory) -> Run:
    run = aligned_run(tmp_path_factory.mktemp("evaluated"))
    evaluate(run.config, run)
    return run


def clips_of(run: Run) -> list[dict]:
    return pyarrow.parquet.read_table(run.path / "evaluate" / "clips.parquet").to_pylist()


def test_both_models_are_sampled_from_the_same_noise(evaluated):
    rows = clips_of(evaluated)
    base, aligned = ([row for row in rows if row["arm"] == arm] for arm in ("base", "aligned"))
    assert [(row["prompt"], row["seed"]) for row in base] == [(row["prompt"], row["seed"]) for row in aligned]
    assert len(base) == 3 and len({row["seed"] for row in base}) == 3
    trained_on = {clip_seed(evaluated.config.seed, prompt, candidate) for prompt in range(4) for candidate in range(2)}
    assert not trained_on & {row["seed"] for row in base}
    family = load(evaluated.config.pretrained_model_name_or_path, device="cpu")
    for row, other in zip(base, aligned, strict=True):
        _, videos = sample_clips(family, [row["prompt"]], [row["seed"]], evaluated.config.generate)
        base_clip, aligned_clip = (
            read_clip(evaluated.path / "evaluate" / each["video"]).int() for each in (row, other)
        )
        # an mp4 rounds by up to 2 levels, and a batch rounds otherwise than a clip alone
        assert (base_clip - videos[0].int()).abs().max() <= 3
        assert (base_clip - aligned_clip).abs().max() > 8


def test_metrics_are_those_of_the_clips(evaluated):
    metrics = json.loads((evaluated.path / "metrics.json").read_text())
    assert metrics == json.loads((evaluated.path / "evaluate" / "metrics.json").read_text())
    rows = clips_of(evaluated)
    model = RewardModel.load(evaluated.path / "reward")
    severity = {"base": [], "aligned": []}
    for row in rows:
        video = read_clip(evaluated.path / "evaluate" / row["video"])[None]
        quality = model(video, [row["prompt"]], evaluated.config.grid).patches[0, 0]
        np.testing.assert_allclose(row["severity"], (5 - quality.flatten()) / 4, atol=1e-5)
        severity[row["arm"]].append((5 - quality.double()) / 4)
    means = {name: torch.stack(values).mean().item() for name, values in severity.items()}
    assert metrics["base_severity"] == pytest.approx(means["base"], abs=1e-6)
    assert metrics["aligned_severity"] == pytest.approx(means["aligned"], abs=1e-6)
    assert metrics["mitigated"] == pytest.approx(1 - means["aligned"] / means["base"], abs=1e-5)
    assert metrics["num_prompts"] == 3 and metrics["patch_grid"] == [3, 2, 2]
    expected = np.mean([row["video_text_alignment"] for row in rows if row["arm"] == "aligned"])
    assert metrics["reward_aligned"]["video_text_alignment"] == pytest.approx(expected)
    assert "patch_spearman" not in metrics


def test_what_is_counted_is_printed_and_kept_as_figures(evaluated, capsys):
    evaluate(evaluated.config, evaluated)
    printed = capsys.readouterr().out
    for words in (
        "two-stage",
        "end-to-end",
        "persistence",
        "win rate",
        "what a video preference cannot see",
        "diversity",
    ):
        assert words in printed
    figures = json.loads((evaluated.path / "evaluate" / "analysis.json").read_text())["figures"]
    metrics = json.loads((evaluated.path / "metrics.json").read_text())
    for arm in ("base", "aligned"):
        assert figures["two_stage"]["severity"][arm]["value"] == pytest.approx(metrics[f"{arm}_severity"])
        assert figures["sizes"]["defective patches"][arm]["value"] == pytest.approx(metrics[f"{arm}_defect_rate"])
    rows = read_rows(evaluated.path / "evaluate" / "clips.parquet", EvaluatedRow)
    for row in rows:
        video = read_clip(evaluated.path / "evaluate" / row.video).double() / 255
        assert row.change == pytest.approx((video[1:] - video[:-1]).abs().mean().item(), abs=1e-6)
        # the first box in colour red: the first half of the frames, the upper left 64th of the picture
        frames, side = -(-video.shape[0] // 2), [-(-length // 8) for length in video.shape[1:3]]
        assert row.look[0] == pytest.approx(video[:frames, : side[0], : side[1], 0].mean().item(), abs=1e-5)


def test_a_lora_of_nothing_changes_nothing(tmp_path):
    run = aligned_run(tmp_path, scale=0.0)
    evaluate(run.config, run)
    files = output_hashes(run.path / "evaluate")
    for file in [file for file in files if file.startswith("videos/base")]:
        assert files[file] == files[file.replace("base", "aligned")]
    metrics = json.loads((run.path / "metrics.json").read_text())
    assert metrics["mitigated"] == 0 and metrics["mitigated_interval"] == [0, 0]


def test_evaluation_killed_among_the_aligned_clips_ends_the_same(tmp_path, evaluated):
    run = aligned_run(tmp_path)
    script = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
import torch
torch.set_num_threads({torch.get_num_threads()})
from test_evaluate import aligned_run, evaluate
run = aligned_run(Path({str(tmp_path)!r}))
evaluate(run.config, run)
"""
    kill_when(script, lambda: any((run.path / "evaluate" / "videos" / "aligned").glob("p*.mp4")))
    evaluate(run.config, run)
    assert output_hashes(run.path / "evaluate") == output_hashes(evaluated.path / "evaluate")


class Darkness:
    """A meter of one's own: the darker, the more defective."""

    clean, notes = 0.25, None

    def __init__(self, request):
        self.request, self.sources = request, {"darkness": Path(__file__)}

    def __call__(self, videos, prompts):
        pool = PatchGrid(self.request.grid, *self.request.video_size).pool
        return {"severity": 1 - pool(videos.float().mean(dim=-1) / 255)}


def test_a_meter_of_ones_own_has_a_dotted_name(tmp_path):
    run = aligned_run(tmp_path)
    run.config.evaluate.meter = f"{__name__}:Darkness"
    evaluate(run.config, run)
    metrics = json.loads((run.path / "metrics.json").read_text())
    for row in clips_of(run):
        first = read_clip(run.path / "evaluate" / row["video"])[0].float() / 255
        assert np.mean(row["severity"][:4]) == pytest.approx(1 - first.mean().item(), abs=1e-5)
    assert metrics["meter_clean_reading"] == 0.25 and "patch_spearman" in metrics
    manifest = json.loads((run.path / "evaluate" / "manifest.json").read_text())
    assert manifest["inputs"]["darkness"] == hash_file(__file__)


class Heat(Darkness):
    """A meter that gives a number of every patch under a name that stands for one of the clip."""

    def __call__(self, videos, prompts):
        found = super().__call__(videos, prompts)
        return found | {"heat": found["severity"]}


def test_a_reading_of_every_patch_under_another_name_is_refused(tmp_path):
    run = aligned_run(tmp_path)
    run.config.evaluate.meter = f"{__name__}:Heat"
    with pytest.raises(UserError, match=r"evaluate.meter: .*:Heat gives 12 numbers of a clip as 'heat', expected one"):
        evaluate(run.config, run)


@pytest.mark.parametrize(
    ("readings", "complaint"),
    [
        ({"defects": torch.zeros(2, 4)}, r"readings with 'severity', got \['defects'\]"),
        ({"severity": torch.zeros(2, 5)}, r"severity of shape \(2, 4\) or \(2, 1, 2, 2\), .*; got \(2, 5\)"),
        ({"severity": torch.full((2, 4), 7.0)}, "severity from 0, no defect, to 1; got values from 7 to 7; rescale"),
        ({"severity": torch.full((2, 4), torch.nan)}, "severity from 0, no defect, to 1; got values from nan to nan"),
        ({"severity": torch.zeros(2, 4), "motion_amount": torch.zeros(1)}, "motion_amount of 2 clips, got 1"),
    ],
)
def test_readings_of_a_meter_of_ones_own_are_checked(readings, complaint):
    with pytest.raises(UserError, match=f"evaluate.meter: expected {complaint}"):
        read_meter(lambda videos, prompts: readings, torch.zeros(2, 1, 4, 4, 3), ["a", "b"], (1, 2, 2))


def test_mistakes_are_named(tmp_path):
    run = aligned_run(tmp_path)
    run.config.evaluate.meter = "eye"
    with pytest.raises(
        UserError, match=r"evaluate.meter: expected one of 'demo', 'reward', or your own as .*; got 'eye'"
    ):
        evaluate(run.config, run)
    run.config.evaluate.meter = "reward"
    (run.path / "train" / "manifest.json").unlink()
    with pytest.raises(UserError, match="run `halo train` with this config first"):
        evaluate(run.config, run)
