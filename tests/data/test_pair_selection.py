"""Which candidates are paired, what winners have in common, and how often training takes a pair."""

import dataclasses
import json
import math

import pytest
import torch

from halo_fast.data import CachedPairs
from halo_fast.data.pairs import PairsConfig, pair_candidates, pair_statistics, real_pairs, without_duplicates
from halo_fast.data.tables import CacheRow, ClipRow, PairRow, ScoreRow, read_rows, write_rows
from halo_fast.errors import UserError
from halo_fast.files import write_safetensors
from halo_fast.pipeline.stages.pairs import _warn_of_still_winners

GRID = (1, 1, 2)
# quality, alignment and two patches of five candidates of one prompt
TABLE = {
    "a": (5.0, 1.0, (1.0, 5.0)),
    "b": (4.0, 4.0, (4.0, 4.1)),
    "c": (3.0, 3.0, (4.2, 4.0)),
    "d": (3.0, 3.0, (5.0, 1.0)),
    "e": (2.0, 5.0, (3.0, 3.0)),
}


def rows(table=None, **known):
    table = table or TABLE
    clips = [ClipRow(name, 0, "a cube", index, index, "", None, strategy="x") for index, name in enumerate(table)]
    scores = [
        ScoreRow(name, {"quality": q, "alignment": a}, {"quality": list(p)}, **{k: v[name] for k, v in known.items()})
        for name, (q, a, p) in table.items()
    ]
    return clips, scores


def pairs(**settings):
    config = PairsConfig(**{"dimensions": {"quality": 1.0, "alignment": 1.0}, "patch_delta": 0.4} | settings)
    found, _ = pair_candidates(*rows(), config, GRID)
    return {pair.pair_id for pair in found}


def test_each_way_to_select_pairs():
    # video rewards: a 3, b 4, c 3, d 3, e 3.5
    assert pairs() == {"b-d"}  # of equals the last
    assert pairs(select="margin", min_margin=0.6) == {"a-b", "b-c", "b-d"}
    assert pairs(select="margin", min_margin=0.4) == {"a-b", "b-c", "b-d", "a-e", "b-e", "c-e", "d-e"}
    # b is nowhere worse than c and d; a and e are best in one dimension and worst in the other
    assert pairs(select="pareto") == {"b-c", "b-d"}
    assert pairs(select="best_worst", dimensions={"quality": 1.0, "nobody scored": 0.0})
    assert pairs(select="pareto", dimensions={"quality": 1.0, "alignment": 0.0}) == {
        "a-b", "a-c", "a-d", "a-e", "b-c", "b-d", "b-e", "c-e", "d-e",
    }  # fmt: skip
    # both patches of a and d differ by 4
    assert pairs(select="patches") == {"a-d"}
    assert pairs(select="patches", patch_delta=4.5, min_margin=9.0) == {"a-b"}  # none is decided: the first
    with pytest.raises(UserError, match="pairs.select: 'margin' finds no pair among 1 prompts; lower min_margin"):
        pairs(select="margin", min_margin=4.0)
    with pytest.raises(UserError, match="pairs.select: expected one of 'best_worst', 'margin', .* got 'best'"):
        from halo_fast.settings import validate

        validate(PairsConfig(select="best"), "pairs")  # type: ignore[arg-type]


def pair(a, b, margin, weight=1.0):
    return PairRow(f"{a}-{b}", 0, "a cube", a, b, 3 + margin, 3, [3, 3], [1, 3], [1, 1, 2], margin, 0.5, weight)


def test_pairs_of_the_same_pixels_or_compared_twice_are_left_out():
    content = {"a": "x", "b": "y", "c": "x", "d": "z", "e": ""}
    _, scores = rows(content=content)
    given = [pair("a", "b", 1), pair("a", "c", 1), pair("b", "c", 1), pair("d", "e", 1), pair("e", "d", 1)]
    assert [one.pair_id for one in without_duplicates(given, scores)] == ["a-b", "d-e"]
    assert [one.pair_id for one in without_duplicates(given, [])] == ["a-b", "a-c", "b-c", "d-e"]


def test_what_winners_have_in_common_is_counted(caplog):
    clips, scores = rows(motion={"a": 1.0, "b": 2.0, "c": 3.0, "d": math.nan, "e": 2.0})
    clips[4] = dataclasses.replace(clips[4], strategy="")  # an imported one
    given = [pair("a", "b", 1), pair("c", "a", 2), pair("b", "c", -1), pair("d", "a", 1), pair("b", "e", 1)]
    given.append(pair("a", "e", 0))  # a tie
    found = pair_statistics(given, PairsConfig(), clips, scores)
    # winners a, c, c, d, b: numbers 0 < 1, 2 > 0, 2 > 1, 3 > 0, 1 < 4; they move 1 < 2, 3 > 1, 3 > 2, unknown, equal
    assert found["first_wins_share"] == pytest.approx(2 / 5)
    assert found["still_wins_share"] == pytest.approx(1 / 3)
    assert found["own_share"] == pytest.approx(10 / 12)
    assert "still_wins_share" not in pair_statistics(given, PairsConfig(), clips, [])
    _warn_of_still_winners(0.69, 100)
    assert not caplog.records
    _warn_of_still_winners(0.71, 100)
    assert "in 71% of the pairs the clip that moves less wins" in caplog.text


def test_real_clips_take_turns_as_winners():
    clips, _ = rows()
    real = [ClipRow(f"r{index}", prompt, "a cube", index, None, "", None) for index, prompt in enumerate((0, 0, 7))]
    found = real_pairs(real, clips, GRID)
    assert [one.pair_id for one in found] == ["r0-a", "r1-b", "r0-c", "r1-d", "r0-e"]
    assert all(one.video_margin == 4 and one.patch_tie_share == 1 for one in found)


def test_a_weight_is_how_often_an_epoch_has_a_pair(tmp_path):
    names = [f"{index:04d}" for index in range(400)]
    weights = {"a-b": 2.0, "a-c": 0.0, "a-d": 1.0} | {f"a-{name}": 1.25 for name in names}
    given = [dataclasses.replace(pair("a", one[2:], 1), pair_id=one, weight=weight) for one, weight in weights.items()]
    write_rows(tmp_path / "pairs.parquet", given, PairRow)
    assert read_rows(tmp_path / "pairs.parquet", PairRow) == given
    write_safetensors(tmp_path / "z.safetensors", {"latents": torch.zeros(1)})
    clips = {clip for one in given for clip in (one.clip_a, one.clip_b)}
    write_rows(tmp_path / "index.parquet", [CacheRow("latents", clip, "z.safetensors", "") for clip in clips], CacheRow)
    cached = CachedPairs(tmp_path / "pairs.parquet", tmp_path)
    counts = {one: [row.pair_id for row in cached._rows].count(one) for one in weights}
    assert (counts["a-b"], counts["a-c"], counts["a-d"]) == (2, 0, 1)
    rest = [counts[f"a-{name}"] for name in names]
    assert set(rest) == {1, 2} and abs(sum(rest) - 500) < 3 * math.sqrt(400 * 0.25 * 0.75)
    assert len(cached) == len(cached.prompts) == 3 + sum(rest)


def test_candidates_of_two_sizes_are_paired_among_their_own():
    clips, scores = rows()
    sizes = dict(zip([clip.clip_id for clip in clips], [9, 9, 9, 5, 9], strict=True))
    settings = PairsConfig(dimensions={"quality": 1.0, "alignment": 1.0}, select="margin")
    found, _ = pair_candidates(clips, scores, settings, GRID, sizes=sizes)
    every, _ = pair_candidates(clips, scores, settings, GRID)
    assert found == [one for one in every if sizes[one.clip_a] == sizes[one.clip_b]] != every
    real = [ClipRow(f"r{size}", 0, "a cube", 0, None, "", None) for size in (5, 9)]
    made = real_pairs(real, clips, GRID, sizes | {"r5": 5, "r9": 9})
    assert [one.pair_id for one in made] == ["r9-a", "r9-b", "r9-c", "r5-d", "r9-e"]
    with pytest.raises(UserError, match="at least 2 candidates of a prompt and one size"):
        pair_candidates(clips, scores, settings, GRID, sizes={clip.clip_id: clip.clip_id for clip in clips})


def test_clips_of_a_pair_that_differ_in_size_are_named(tmp_path):
    write_rows(tmp_path / "pairs.parquet", [pair("a", "b", 1)], PairRow)
    for name, shape in (("a", (4, 3, 4, 4)), ("b", (4, 3, 4, 6))):
        write_safetensors(tmp_path / f"{name}.safetensors", {"latents": torch.zeros(shape)})
    write_rows(
        tmp_path / "index.parquet", [CacheRow("latents", one, f"{one}.safetensors", "") for one in "ab"], CacheRow
    )
    for read in (CachedPairs.size, CachedPairs.__getitem__):
        with pytest.raises(
            UserError, match=r"clips a and b of pair .* latents \[4, 3, 4, 4\] and \[4, 3, 4, 6\], expected"
        ):
            read(CachedPairs(tmp_path / "pairs.parquet", tmp_path), 0)


def test_a_table_of_before_there_were_weights_is_read(tmp_path):
    import pyarrow.parquet

    write_rows(tmp_path / "new.parquet", [pair("a", "b", 1, weight=3.0)], PairRow)
    table = pyarrow.parquet.read_table(tmp_path / "new.parquet")
    pyarrow.parquet.write_table(table.drop_columns(["weight"]), tmp_path / "old.parquet")
    assert read_rows(tmp_path / "old.parquet", PairRow) == [pair("a", "b", 1)]
    pyarrow.parquet.write_table(table.drop_columns(["grid"]), tmp_path / "older.parquet")
    with pytest.raises(UserError, match="expected a column 'grid', got .*; make the table again"):
        read_rows(tmp_path / "older.parquet", PairRow)
    assert json.loads(json.dumps(dataclasses.asdict(pair("a", "b", 1))))["weight"] == 1
