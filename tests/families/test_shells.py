"""Published models without weights: parameter counts against those that others published."""

import pytest
import torch

from halo_fast.errors import UserError
from halo_fast.families import shells

# As counted by others in the published files; the last two as their cards round them.
NETWORKS = {
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": 1_418_996_800,
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": 14_288_491_584,
    "zai-org/CogVideoX-2b": 1_693_783_872,
    "zai-org/CogVideoX-5b": 5_570_283_072,
    "Lightricks/LTX-Video": 1_923_385_472,
    "Lightricks/LTX-Video-0.9.7-dev": 13_042_569_344,
    "Lightricks/LTX-2": 18_876_174_592,
    "hunyuanvideo-community/HunyuanVideo": 12_821_012_544,
    "hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-480p_t2v": 8_326_608_160,
    "genmo/mochi-1-preview": 10_027_677_744,
}
ROUNDED = {"kandinskylab/Kandinsky-5.0-T2V-Lite-sft-5s-Diffusers": 2e9, "nvidia/Cosmos-Predict2.5-2B": 2e9}
OTHERS = {
    ("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "vae"): 126_892_531,
    ("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "text_encoder"): 5_680_910_336,
    ("zai-org/CogVideoX-2b", "vae"): 215_583_907,
    ("zai-org/CogVideoX-2b", "text_encoder"): 4_762_310_656,
    ("hunyuanvideo-community/HunyuanVideo", "text_encoder"): 7_505_186_816,
    ("hunyuanvideo-community/HunyuanVideo", "text_encoder_2"): 123_060_480,
}


def count(network):
    return sum(value.numel() for value in network.parameters())


@pytest.mark.parametrize("name", shells.PUBLISHED)
def test_networks_have_the_published_number_of_parameters(name):
    network = shells.network_of(shells.PUBLISHED[name])
    assert all(value.is_meta for value in network.parameters())
    if name in NETWORKS:
        assert count(network) == NETWORKS[name]
    else:
        assert count(network) == pytest.approx(ROUNDED[name], rel=0.05)


@pytest.mark.parametrize("name", dict.fromkeys(name for name, _ in OTHERS))
def test_other_parts_have_the_published_number_of_parameters(name):
    family = shells.load_shell(name)
    for (model, part), published in OTHERS.items():
        if model == name:
            assert count(family.pipeline.components[part]) == published


@pytest.mark.parametrize("name", [name for name, shell in shells.PUBLISHED.items() if shell.pipeline])
def test_shells_are_families_that_make_the_usual_clip(name):
    family = shells.load_shell(name)
    shape = family.latent_shape(*shells.PUBLISHED[name].clip)
    conditions = family.blank_conditions()
    assert len(shape) == 4 and all(value.is_meta for value in conditions.values())
    assert {value.dtype for value in conditions.values()} <= {torch.float32, torch.bfloat16}


def test_blank_conditions_have_the_shapes_of_the_longest_prompt():
    from tiny import TINY

    from halo_fast.families import family_of

    for name, tiny in TINY.items():
        family = family_of(tiny.build(), tiny.network)
        # every tokenizer of the tiny pipelines is cut by this
        stacked = family.stack(family.encode_prompts(['a red ball "rolls" left over the grass ' * 40]))
        blank = family.blank_conditions()
        if name.startswith("Kandinsky"):
            # its pipeline cuts characters of what it decodes, so it may keep fewer tokens than fit
            assert 256 < stacked["prompt_embeds_qwen"].shape[1] <= 512 == len(blank["prompt_embeds_qwen"])
            blank["prompt_embeds_qwen"] = stacked["prompt_embeds_qwen"][0]
        assert {key: value.shape[1:] for key, value in stacked.items()} == {
            key: value.shape for key, value in blank.items()
        }, name


def test_former_names_stand_for_the_same_model_and_unknown_ones_are_refused():
    assert shells.find_shell("THUDM/CogVideoX-5b") is shells.find_shell("zai-org/CogVideoX-5b")
    assert shells.find_shell("someone/else") is None
    for name in ("someone/else", "nvidia/Cosmos-Predict2.5-2B"):
        with pytest.raises(UserError, match="nothing is known of .*expected one of Wan-AI"):
            shells.load_shell(name)
