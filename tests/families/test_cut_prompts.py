"""Prompts of which an encoder sees only the beginning: the truth is that what follows changes no condition."""

import pytest
import torch
from tiny import TINY, tiny_hunyuan, tiny_hunyuan15, tiny_kandinsky5

from halo_fast.families import family_of

LONG = " ".join(["red"] * 1200)


def same_conditions(family, first, second):
    """Whether the network gets the same from two prompts."""
    one, other = family.encode_prompts([first, second])
    return all(one[name].shape == other[name].shape and torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("name", [name for name in TINY if not name.startswith("HunyuanVideo")])
def test_prompts_are_listed_exactly_where_another_word_changes_nothing(name):
    tiny = TINY[name]
    family = family_of(tiny.build(), tiny.network)
    for count in range(9, 18):
        prompt = " ".join(["ball"] * count)
        # one more word is not seen, so this many words and one more are cut, or the limit is reached exactly
        unseen = same_conditions(family, f"{prompt} red", f"{prompt} left")
        assert family.cut_prompts([f"{prompt} red"]) == ([f"{prompt} red"] if unseen else [])
    assert family.cut_prompts(["a ball", LONG, "", "a cube"]) == [LONG]


def test_each_of_several_encoders_has_a_limit_of_its_own():
    for build in (tiny_hunyuan, tiny_kandinsky5):
        # longer than CLIP takes, not than Llama or Qwen
        family, long = family_of(build()), " ".join(["red"] * 80)
        assert family.cut_prompts([" ".join(["red"] * 74), long]) == [long]
    family = family_of(tiny_hunyuan15())
    # bytes of what stands in quotes count alone
    sign, plain = f'a cube with "{"red " * 70}"', "red " * 70
    assert family.cut_prompts([sign, plain, LONG]) == [sign, LONG]


def test_the_text_of_a_prompt_is_counted_as_the_pipeline_cleans_it():
    family = family_of(TINY["Wan 2.1"].build())
    entities = " ".join(["a", "&amp;" * 1, "ball"] * 4)  # each entity is one token once it is a character
    assert same_conditions(family, entities, entities.replace("&amp;", "&"))
    assert family.cut_prompts([entities]) == []
