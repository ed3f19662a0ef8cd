"""The table of what candidates cost: where a curve crosses the goal, and what counts as a pass."""

import pytest
import torch
from tiny import tiny_clips, tiny_wan

from benchmarks.candidates import Counter, passes_to
from halo_fast.families import family_of
from halo_fast.families.sampling import sample_clips, sample_variations


@pytest.mark.parametrize(
    ("mitigated", "expected"),
    [([0.4, 0.9, 0.7], 280.0), ([0.2, 0.5, 0.79], None), ([0.9, 0.9, 0.9], 100 + 100 * 8 / 9), ([0.5, 0.8, 0.9], 300)],
)
def test_the_goal_is_found_on_the_line_between_two_readings(mitigated, expected):
    curve = {"generation": 100, "passes": [200, 300, 400], "mitigated": mitigated}
    assert passes_to(0.8, curve) == (expected if expected is None else pytest.approx(expected))


def test_a_clip_of_part_of_the_steps_costs_that_part():
    pipeline, counter = tiny_wan(), Counter()
    family, settings = family_of(pipeline), tiny_clips(num_inference_steps=10, strength=0.3)
    with counter.counting():
        guides, _ = sample_clips(family, ["a cube", "a ball"], [0, 1], settings)
        assert counter.passes == 20
        sample_variations(family, ["a cube", "a ball"], [2, 3], guides, settings)
        assert counter.passes == 26
        with counter.pausing():
            sample_clips(family, ["a cube"], [0], settings)
        assert counter.passes == 26
        conditions = family.stack(family.encode_prompts(["a cube"]))
        family.predict(family.transformer, torch.zeros(1, 4, 3, 4, 4), torch.ones(1), conditions)
        assert counter.passes == 28.25
    sample_clips(family, ["a cube"], [0], settings)
    assert counter.passes == 28.25
