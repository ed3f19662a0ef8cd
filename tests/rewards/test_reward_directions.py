"""Directions of motion in prompts, and the preference for a prompt's own motion over the opposite one."""

import math

import pytest
import torch

from halo_fast.rewards import LabelledClips
from halo_fast.rewards.clips import MIRRORS, mirror_clips, mirrored_prompt, names_direction, turned_prompt
from halo_fast.rewards.terms import turn_loss


@pytest.mark.parametrize(
    ("prompt", "motion"),
    [
        ("a green 7 drifts left over a dark field", True),
        ("The lift goes UP.", True),
        ("smoke moves leftwards", True),
        ("a cup left of a plate", False),
        ("a lamp on the right", False),
        ("an upright piano", False),
        ("a ball rolls to the left", True),
        ("a boat drifts towards the right", True),
        ("a man raises his right hand", False),
        ("a close-up shot of a cat", False),
        ("a close up shot of a cat", False),
        ("a ball bounces up and down", False),
        ("she looks left and goes up", True),
        ("a dog runs left, then right", False),
        ("he left the room", False),
        ("all right, she waves", False),
        ("it starts right away", False),
        ("a sun in the top left corner", False),
        ("a bird on his left", False),
        ("a left-handed guitarist", False),
        ("an up-to-date kitchen", False),
        ("she walks up the stairs", True),
        ("leaves drift downward", True),
        ("a dog sits right next to a tree", False),
        ("a man stands right in front of the camera", False),
        ("the right half of a cake, right at the edge", False),
        ("toys left behind in a garden", False),
        ("an upside down car", False),
        ("a woman in a down jacket gives a thumbs up", False),
        ("children lined up, dressed up, made up", False),
        ("a 3 drifts right over a dark field", True),
        ("a car drives right in heavy rain", True),
        ("a boat drifts left beside a pier", True),
    ],
)
def test_a_direction_of_motion_is_no_place(prompt, motion):
    assert names_direction(prompt) == motion


@pytest.mark.parametrize(
    ("prompt", "turned"),
    [
        ("a green 7 drifts left over a dark field", "a green 7 drifts right over a dark field"),
        ("The lift goes UP.", "The lift goes down."),
        ("smoke moves leftwards, then upward", "smoke moves rightwards, then downward"),
        ("on the left a boat drifts to the left", "on the left a boat drifts to the right"),
        ("a close-up of his right hand", "a close-up of his right hand"),
        ("a cat sleeps", "a cat sleeps"),
        ("she walks up the stairs", "she walks down the stairs"),
        ("right next to a tree a dog runs right", "right next to a tree a dog runs left"),
    ],
)
def test_a_turned_prompt_names_the_opposite_motion_and_the_same_places(prompt, turned):
    assert turned_prompt(prompt) == turned


@pytest.mark.parametrize("ending", ["", "ward", "wards"])
def test_a_mirror_exchanges_every_word_that_names_a_direction(ending):
    """Or the mirrored clip's prompt would name the direction that it no longer shows."""
    clips = LabelledClips(
        torch.zeros(1, 2, 4, 4, 3, dtype=torch.uint8), [f"it goes Left{ending} and then up{ending}"],
        torch.ones(1, 1), torch.full((1, 1, 1, 1, 1), 5.0), ("dynamic_degree",),
    )  # fmt: skip
    assert names_direction(clips.prompts[0])
    for mirror in MIRRORS.values():
        clips = mirror_clips(clips, torch.tensor([True]), mirror)
    assert clips.prompts == [f"it goes Right{ending} and then down{ending}"]


def test_own_motion_is_preferred_by_the_logistic_loss_weighted_by_how_well_it_is_shown():
    """Clips with score 5 and 3 count 1 and 1/2; those without a score or a direction, or with score 1, do not."""
    margin = torch.tensor([2.0, -1.0, 7.0, 7.0, 7.0])
    scores = torch.tensor([5.0, 3.0, 1.0, math.nan, 5.0])[:, None]
    clips = LabelledClips(
        torch.zeros(5, 2, 4, 4, 3, dtype=torch.uint8), ["a prompt"] * 5, scores, torch.full((5, 1, 1, 1, 1), 5.0),
        ("dynamic_degree",),
    )  # fmt: skip
    loss = turn_loss(margin, clips, [True, True, True, True, False], 0)
    assert loss.item() == pytest.approx((math.log1p(math.exp(-2)) + math.log1p(math.e) / 2) / 1.5, rel=1e-6)
    assert turn_loss(margin, clips, [False] * 5, 0) == 0


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("A man has left the house; left of it a dog", "A man has left the house; right of it a dog"),
        ("Left hand raised, LEFT foot down", "Right hand raised, RIGHT foot down"),
        ("right now a car turns right", "right now a car turns left"),
        ("on the left the dog, on the right the cat", "on the right the dog, on the left the cat"),
        ("she left a cup on the left side", "she left a cup on the right side"),
        ("a ball moves leftward", "a ball moves rightward"),
        ("an upright chair", "an upright chair"),
    ],
)
def test_a_mirror_exchanges_places_and_directions_and_no_verbs(prompt, expected):
    assert mirrored_prompt(prompt, MIRRORS["horizontal"].words) == expected
    assert mirrored_prompt(expected, MIRRORS["horizontal"].words) == prompt
