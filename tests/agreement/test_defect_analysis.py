"""Defects, wins and consistency against loops, closed forms and scipy; the whole analysis on rows made by hand."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import scipy.stats

from halo_fast.agreement.analysis import Rule, analyse, analysis_as_json, analysis_sections
from halo_fast.agreement.consistency import distance, diversity, quantiles, reward_consistency, worst_overlap
from halo_fast.agreement.defects import clip_defects, defect_rates, defect_sizes, lost_patches
from halo_fast.agreement.figures import bootstrap_interval
from halo_fast.agreement.paired import count_wins, paired_mean, paired_ratio, ratio, sign_test
from halo_fast.data.summary import format_section
from halo_fast.data.tables import EvaluatedRow, read_rows, write_rows
from halo_fast.errors import UserError
from halo_fast.files import read_table, write_parquet

GRID = (4, 3, 5)


def severities(seed: int, clips: int = 12, share: float = 0.4) -> np.ndarray:
    rng = np.random.default_rng(seed)
    values = rng.uniform(0, 1, (clips, *GRID)) * (rng.random((clips, *GRID)) < share)
    values[0] = 0  # a flawless clip
    return values


def flood(layer: np.ndarray) -> int:
    """Regions of true cells that touch side by side."""
    left, regions = {tuple(map(int, cell)) for cell in np.argwhere(layer)}, 0
    while left:
        regions, edge = regions + 1, [left.pop()]
        while edge:
            row, column = edge.pop()
            beside = {(row + 1, column), (row - 1, column), (row, column + 1), (row, column - 1)} & left
            left -= beside
            edge += beside
    return regions


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_defects_of_a_clip_are_those_of_a_loop(seed):
    values = severities(seed)
    found = clip_defects(values)
    for index, clip in enumerate(values):
        bad = clip > 0.25
        assert found.defective[index] == sum(bool(one) for one in bad.ravel())
        assert found.severity[index] == pytest.approx(math.fsum(clip.ravel()), rel=1e-12)
        assert found.deep[index] == pytest.approx(math.fsum(clip[bad]), rel=1e-12)
        assert found.regions[index] == sum(flood(layer) for layer in bad)
        runs = 0
        for row in range(GRID[1]):
            for column in range(GRID[2]):
                words = "".join("x" if one else " " for one in bad[:, row, column])
                runs += len(words.split())
        assert found.runs[index] == runs


def test_sizes_by_hand():
    base = np.zeros((2, 3, 2, 2))
    base[0, :, 0, 0] = 0.5  # one place, all three layers
    base[0, 1, 0, 1] = 1.0  # beside it, one layer
    sizes = defect_sizes(base, np.zeros_like(base), resamples=20)
    assert sizes["defective patches"].base.value == pytest.approx(4 / 24)
    assert sizes["mean severity"].base.value == pytest.approx(2.5 / 24)
    assert sizes["severity of a defect"].base.value == pytest.approx(2.5 / 4)
    assert sizes["area of a defect"].base.value == pytest.approx(4 / 3 / 4)  # 4 patches in 3 regions, frames of 4
    assert sizes["persistence"].base.value == pytest.approx(2.0)  # spells of 3 layers and of 1
    assert sizes["clips with a defect"].base.value == 0.5
    assert sizes["defective patches"].difference.value == pytest.approx(-4 / 24)
    # nothing is known of defects that are not there
    assert math.isnan(sizes["persistence"].aligned.value) and math.isnan(sizes["persistence"].difference.value)


def test_rates_by_time_place_and_kind_are_those_of_a_loop():
    base, aligned = severities(3), severities(4, share=0.2)
    rng = np.random.default_rng(5)
    kinds = tuple({name: rng.random(base.shape) for name in ("smear", "flicker")} for _ in range(2))
    rates = defect_rates(base, aligned, kinds, resamples=10)
    for arm, values, split in (("base", base, kinds[0]), ("aligned", aligned, kinds[1])):
        bad = values > 0.25
        for time in range(GRID[0]):
            figure = getattr(rates["time"][f"layer {time + 1}"], arm)
            assert figure.value == pytest.approx(bad[:, time].mean())
        for row in range(GRID[1]):
            for column in range(GRID[2]):
                figure = getattr(rates["place"][f"row {row + 1}, column {column + 1}"], arm)
                assert figure.value == pytest.approx(bad[:, :, row, column].mean())
        smear = bad & (split["smear"] >= split["flicker"])
        assert getattr(rates["kind"]["smear"], arm).value == pytest.approx(smear.mean())
        both = [getattr(rates["kind"][name], arm).value for name in split]
        assert sum(both) == pytest.approx(bad.mean())
    assert "kind" not in defect_rates(base, aligned, resamples=2)


def test_paired_intervals_are_scipys():
    rng = np.random.default_rng(6)
    above, below = rng.gamma(3, size=(2, 80)), rng.gamma(9, size=(2, 80))
    found = paired_ratio((above[0], below[0]), (above[1], below[1]), resamples=4000)

    def ratio(x, y):
        return x.sum() / y.sum()

    def gap(x, y, z, w):
        return z.sum() / w.sum() - x.sum() / y.sum()

    for figure, data, statistic in (
        (found.base, (above[0], below[0]), ratio),
        (found.aligned, (above[1], below[1]), ratio),
        (found.difference, (above[0], below[0], above[1], below[1]), gap),
    ):
        expected = scipy.stats.bootstrap(
            data, statistic, paired=True, vectorized=False, method="percentile", n_resamples=4000, rng=1
        ).confidence_interval
        assert figure.value == pytest.approx(statistic(*data))
        np.testing.assert_allclose(figure[1:], expected, atol=0.06 * (expected.high - expected.low))


def test_draws_are_those_of_every_other_interval():
    values = np.random.default_rng(1).gamma(2, size=30)
    expected = bootstrap_interval(lambda rows: values[rows].mean(), 30, 200, seed=5)
    assert ratio((values, np.ones(30)), 200, 5)[1:] == pytest.approx(expected)
    assert all(map(math.isnan, ratio((values[:1], np.ones(1)))[1:]))


def test_what_a_prompt_does_to_both_arms_cancels():
    rng = np.random.default_rng(7)
    prompt = rng.normal(0, 10, 60)
    found = paired_mean(prompt + rng.normal(0, 0.1, 60), prompt + 1 + rng.normal(0, 0.1, 60), resamples=500)
    assert found.difference.high - found.difference.low < 0.1 < found.base.high - found.base.low
    assert found.difference.low < 1 < found.difference.high


def test_wins_with_ties():
    wins = count_wins([0.3, -0.2, 0.0, 0.05, -0.05, 0.4], tie=0.05, resamples=50)
    assert (wins.wins, wins.ties, wins.losses) == (2, 3, 1)
    assert wins.rate.value == pytest.approx(3.5 / 6)
    assert wins.p == 1.0
    with pytest.raises(ValueError, match="gaps: expected numbers, got NaN in 1 of 2"):
        count_wins([0.1, float("nan")])


@pytest.mark.parametrize(("wins", "losses"), [(0, 0), (5, 0), (9, 3), (3, 9), (20, 20), (40, 25)])
def test_sign_test_is_the_sum_of_binomial_chances(wins, losses):
    count = wins + losses
    chances = [math.comb(count, k) / 2**count for k in range(count + 1)]
    expected = math.fsum(one for one in chances if one <= chances[wins] * (1 + 1e-9))
    assert sign_test(wins, losses) == pytest.approx(min(1.0, expected), rel=1e-9)


def test_overlap_of_the_worst_is_that_of_sets():
    x = np.array([5, 1, 4, 2, 3, 9, 8, 7, 6, 10.0])
    y = np.array([5, 9, 4, 1, 3, 2, 8, 7, 6, 10.0])
    # of the worst three, x has items 1, 3, 4 and y has 3, 5, 4
    assert worst_overlap(x, y, 0.3) == pytest.approx(2 / 4)
    assert worst_overlap(x, y, 0.1) == 0 and worst_overlap(x, x, 0.1) == 1
    assert math.isnan(worst_overlap(x, np.ones(10)))
    # what chance gives
    rng = np.random.default_rng(8)
    chance = [worst_overlap(rng.random(2000), rng.random(2000), 0.2) for _ in range(40)]
    assert np.mean(chance) == pytest.approx(0.2 / 1.8, abs=0.01)


def test_distances_are_those_of_the_distribution_functions():
    rng = np.random.default_rng(9)
    x, y = rng.normal(size=70), rng.normal(0.5, 2, size=45)
    edges = np.sort(np.concatenate((x, y)))
    gaps = [abs(np.mean(x <= edge) - np.mean(y <= edge)) for edge in edges]
    largest, moved = distance(x, y)
    assert largest == pytest.approx(max(gaps)) == pytest.approx(scipy.stats.ks_2samp(x, y).statistic)
    assert moved == pytest.approx(math.fsum(gap * width for gap, width in zip(gaps, np.diff(edges), strict=False)))
    assert distance(x, x) == (0, 0)


def test_quantiles_have_their_names():
    assert quantiles(np.arange(101)) == {"5%": 5, "25%": 25, "50%": 50, "75%": 75, "95%": 95}


def test_diversity_is_the_mean_of_a_double_loop():
    rng = np.random.default_rng(10)
    base, aligned = rng.normal(size=(2, 9, 6))
    found = diversity(base, aligned, resamples=300)
    for arm, figure in ((base, found.base), (aligned, found.aligned)):
        gaps = [np.sqrt(np.mean((a - b) ** 2)) for i, a in enumerate(arm) for j, b in enumerate(arm) if i != j]
        assert figure.value == pytest.approx(np.mean(gaps))
        assert figure.low < figure.value < figure.high
    assert diversity(base, np.repeat(base[:1], 9, axis=0), resamples=5).aligned.value == 0


def test_consistent_rewards_have_the_figures_of_consistency():
    rng = np.random.default_rng(11)
    patches = rng.normal(size=(40, 8))
    found = reward_consistency(patches.mean(axis=1), patches, resamples=50)
    assert found["spearman"].value == pytest.approx(1)
    assert found["overlap of the worst tenth"].value == 1 and found["KS distance"].value == 0
    other = reward_consistency(rng.normal(size=40), patches, resamples=50)
    assert other["spearman"].low < 0 < other["spearman"].high and other["KS distance"].value > 0


def test_lost_patches_are_those_of_a_loop():
    rng = np.random.default_rng(12)
    videos, patches = rng.normal(size=9), rng.normal(size=(9, *GRID))
    videos[3], patches[5, 0, 0, 0] = 0, np.nan
    found = lost_patches(videos, patches, tie=0.4)
    for index, (video, gaps) in enumerate(zip(videos, patches, strict=True)):
        if video == 0:
            assert all(math.isnan(shares[index]) for shares in found.values())
            continue
        won = lost = tied = 0
        for gap in gaps.ravel():
            if not abs(gap) > 0.4:
                tied += 1
            elif (gap > 0) == (video > 0):
                won += 1
            else:
                lost += 1
        count = gaps.size
        assert found["lost patches"][index] == pytest.approx(lost / count)
        assert found["tied patches"][index] == pytest.approx(tied / count)
        assert found["winners that lose a patch"][index] == (lost > 0)
        assert found["winners that lose most"][index] == (lost > won)


def rows(clips: int = 10) -> list[EvaluatedRow]:
    """Both arms; the aligned clips have half of the base's severity, and rewards that say so."""
    rng = np.random.default_rng(13)
    base = severities(14, clips)
    found = []
    for arm, values in (("base", base), ("aligned", base / 2)):
        for index, clip in enumerate(values):
            flat = clip.ravel()
            found.append(
                EvaluatedRow(
                    f"{arm}_{index}", arm, index, f"prompt {index}", index, f"{arm}/{index}.mp4",
                    severity=flat.tolist(),
                    kinds={"smear": flat.tolist(), "flicker": (flat / 2).tolist()},
                    readings={"fidelity_correct": float(index % 2), "motion_amount": 2.0},
                    video_scores={"visual_quality": 5 - 4 * float(flat.mean()), "dynamic_degree": 3.0},
                    patch_scores={"quality": (5 - 4 * flat).tolist()},
                    change=0.25,
                    look=rng.random(6).tolist(),
                )
            )  # fmt: skip
    return found


RULE = Rule({"visual_quality": 1.0, "unknown": 3.0}, patch_tie=0.4, resamples=40)


def test_analysis_of_clips_whose_severity_is_halved():
    table = rows()
    analysis = analyse(table, GRID, RULE)
    means = [np.mean([row.severity for row in table if row.arm == arm]) for arm in ("base", "aligned")]
    assert analysis.two_stage["severity"].base.value == pytest.approx(means[0])
    assert analysis.two_stage["severity"].aligned.value == pytest.approx(means[0] / 2)
    assert analysis.two_stage["severity, flicker"].base.value == pytest.approx(means[0] / 2)
    assert analysis.two_stage["fidelity right"].base.value == 0.5
    # a flawless clip stays as it was
    assert (analysis.wins["severity"].wins, analysis.wins["severity"].ties) == (9, 1)
    assert analysis.wins["severity"].p == pytest.approx(2 / 2**9)
    assert analysis.wins["prompt fidelity"].ties == 10
    quality = analysis.end_to_end["visual quality"]
    assert quality.difference.value == pytest.approx(2 * means[0], rel=1e-6)
    assert analysis.lost["by the meter"]["lost patches"].value == 0
    assert analysis.consistency["base"]["spearman"].value == pytest.approx(1)
    assert analysis.kept["motion, by the meter"].difference.value == 0
    assert analysis.kept["change from frame to frame"].base.value == 0.25
    assert set(analysis.quantiles) == {
        f"{one} reward, {arm}" for one in ("video", "patch") for arm in ("base", "aligned")
    }
    assert analysis.shift["severity"]["Wasserstein distance"] == pytest.approx(means[0] / 2)


def test_analysis_as_text_and_as_json():
    analysis = analyse(rows(), GRID, RULE)
    text = "\n\n".join(map(format_section, analysis_sections(analysis)))
    for words in ("two-stage", "end-to-end", "persistence", "p, sign test", "row 3", "layer 4", "smear", "diversity"):
        assert words in text
    found = json.loads(json.dumps(analysis_as_json(analysis), allow_nan=False))
    assert found["wins"]["severity"]["wins"] == 9
    assert found["rates"]["time"]["layer 1"]["base"]["value"] == analysis.rates["time"]["layer 1"].base.value


def test_analysis_of_one_prompt_of_a_meter_that_reads_severity_alone():
    few = [
        replace(row, kinds={}, readings={}, patch_scores={}, look=[], change=math.nan)
        for row in rows()
        if row.seed == 4
    ]
    analysis = analyse(few, GRID, RULE)
    assert not analysis.consistency and not analysis.kept and "kind" not in analysis.rates
    assert math.isnan(analysis.sizes["mean severity"].base.low)
    json.dumps(analysis_as_json(analysis), allow_nan=False)
    assert "nan" not in "".join(map(format_section, analysis_sections(analysis)))


def test_what_a_meter_does_not_read_does_not_count():
    table = rows()
    table[3] = replace(table[3], severity=[math.nan] * len(table[3].severity), readings={"fidelity_correct": math.nan})
    table = [replace(row, readings={"fidelity_correct": row.readings["fidelity_correct"]}) for row in table]
    analysis = analyse(table, GRID, RULE)
    wins = analysis.wins["severity"]
    assert wins.wins + wins.ties + wins.losses == 9 and analysis.wins["prompt fidelity"].ties == 9
    # the figures are those of the nine pairs that were read
    read = [row.readings["fidelity_correct"] for row in table if row.prompt_id != table[3].prompt_id]
    assert analysis.kept["prompt fidelity"].base.value == pytest.approx(np.mean(read[: len(read) // 2]))
    assert analysis.two_stage["fidelity right"].aligned.value == pytest.approx(np.mean(read[len(read) // 2 :]))
    assert analysis.lost["by the patch reward"]["lost patches"].value == 0
    json.dumps(analysis_as_json(analysis), allow_nan=False)
    assert "nan" not in "".join(map(format_section, analysis_sections(analysis)))


def test_arms_of_other_prompts_are_refused():
    table = rows()
    with pytest.raises(ValueError, match="rows: expected the same prompts and seeds in the same order"):
        analyse([*table[:-1], replace(table[-1], seed=99)], GRID, RULE)


def test_rows_come_back_as_they_were_written(tmp_path):
    table = rows()
    write_rows(tmp_path / "clips.parquet", table)
    back = read_rows(tmp_path / "clips.parquet", EvaluatedRow)
    for row, other in zip(table, back, strict=True):
        assert replace(other, look=row.look) == row
        np.testing.assert_allclose(other.look, row.look, rtol=1e-6)


def test_a_column_belongs_to_the_longest_prefix_and_a_missing_one_takes_its_default(tmp_path):
    write_rows(tmp_path / "clips.parquet", rows(2))
    table = read_table(tmp_path / "clips.parquet").drop_columns(["look", "change", "severity"])
    write_parquet(tmp_path / "clips.parquet", table)
    row = read_rows(tmp_path / "clips.parquet", EvaluatedRow)[0]
    assert row.look == [] and row.severity == [] and math.isnan(row.change)
    assert (set(row.kinds), set(row.readings)) == ({"smear", "flicker"}, {"fidelity_correct", "motion_amount"})
    assert (set(row.video_scores), set(row.patch_scores)) == ({"visual_quality", "dynamic_degree"}, {"quality"})
    write_parquet(tmp_path / "clips.parquet", table.drop_columns(["seed"]))
    with pytest.raises(UserError, match="expected a column 'seed'"):
        read_rows(tmp_path / "clips.parquet", EvaluatedRow)
