"""The ways of drawing noise that are compared: which clip of a pair has the noise that made it."""

import pytest
import torch

from benchmarks.noise import WAYS, _drawing
from halo_fast.data import Pair
from halo_fast.families.sampling import clip_noise

SHAPE = (2, 3, 4, 4)


def pair(seeds, better):
    rewards = torch.tensor([2.0, 1.0] if better == 0 else [1.0, 2.0])
    return Pair(torch.zeros(2, *SHAPE), {}, torch.ones(2, 1, 1, 1), rewards, seeds)


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("own", [(True, True), (True, True), (False, False)]),
        ("own for half of the pairs", [(True, True), (False, False), (False, False)]),
        ("own for losers", [(False, True), (True, False), (False, False)]),
    ],
)
def test_clips_have_their_own_noise_or_their_pairs(name, own):
    pairs = [pair((4, 7), better=0), pair((5, 8), better=1), pair(None, better=0)]
    shared = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0))
    drawn = _drawing(WAYS[name].own)(pairs, shared)
    for index, (one, flags) in enumerate(zip(pairs, own, strict=True)):
        for clip, expected in enumerate(flags):
            noise = clip_noise(SHAPE, one.seeds[clip]) if expected else shared[index]
            assert torch.equal(drawn[clip * len(pairs) + index], noise)
