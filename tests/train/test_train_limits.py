"""What a network cannot take is one line with setting, value and limit, never another library's traceback."""

import dataclasses

import pytest
import torch
from tiny import tiny_animatediff, tiny_cogvideox, tiny_ltx, tiny_text_to_video_sd, tiny_wan
from training import CONFIG, quiet

from halo_fast.data import Pair
from halo_fast.errors import UserError
from halo_fast.families import family_of
from halo_fast.train import fit

SHORT = dataclasses.replace(CONFIG, max_train_steps=1)


def pairs_of(family, size):
    """Two pairs of clips of (frames, height, width) latent positions."""
    frames, height, width = size
    channels = family.latent_shape(9, 32, 32)[1 if family.layout == "BFCHW" else 0]
    shape = (frames, channels, height, width) if family.layout == "BFCHW" else (channels, frames, height, width)
    conditions = family.encode_prompts(["a cube jumps"])[0]
    return [Pair(torch.randn(2, *shape), conditions, torch.rand(2, 1, 2, 2), torch.rand(2)) for _ in range(2)]


@pytest.mark.parametrize(
    ("build", "size", "settings", "message"),
    [
        (tiny_animatediff, (20, 4, 4), {}, "takes at most 16 latent frames, got 20; make clips shorter"),
        (tiny_wan, (33, 4, 4), {}, "WanTransformer3DModel takes at most 32 latent frames, got 33"),
        (tiny_wan, (2, 4, 68), {}, "WanTransformer3DModel takes at most 64 latent columns, got 68; make clips smaller"),
        (lambda: tiny_cogvideox(patch_size_t=2), (2, 8, 4), {}, "takes at most 4 latent rows, got 8"),
        (
            tiny_text_to_video_sd, (9, 4, 4), {"gradient_checkpointing": "selective"},
            "train.gradient_checkpointing: UNet3DConditionModel does not support it, got selective; set none",
        ),
        (
            tiny_animatediff, (9, 4, 4), {"target_modules": ["to_q", "proj_out"]},
            r"train.target_modules: UNetMotionModel cannot run with LoRA on \['to_q', 'proj_out'\]",
        ),
        (
            tiny_ltx, (3, 1, 1), {"target_modules": ["attn2"], },
            r"LoRA on transformer_blocks.0.attn2 is not supported, a LTXAttention; .*attn2.to_q inside it can be named",
        ),
        (
            tiny_cogvideox, (2, 4, 4), {"target_modules": ["norm_final"]},
            "LoRA on norm_final is not supported, a LayerNorm; expected a linear layer, leave it out",
        ),
    ],
)  # fmt: skip
def test_limits_are_named_in_one_line(build, size, settings, message):
    family = family_of(build())
    with pytest.raises(UserError, match=message) as caught:
        pairs = [dataclasses.replace(p, patch_rewards=p.patch_rewards[..., :1, :1]) for p in pairs_of(family, size)]
        fit(family, pairs, dataclasses.replace(SHORT, **settings), progress=quiet)
    assert "\n" not in str(caught.value)


def test_a_clip_longer_than_the_network_takes_is_refused_before_it_is_generated():
    for pipeline, frames in ((tiny_animatediff(), 17), (tiny_wan(), 129)):
        with pytest.raises(UserError, match="latent frames, got"):
            family_of(pipeline).latent_shape(frames, 32, 32)


def test_conditions_of_another_model_are_named_with_their_shapes():
    family = family_of(tiny_wan())
    other = [
        dataclasses.replace(p, conditions={"prompt_embeds": torch.randn(3, 7)}) for p in pairs_of(family, (3, 4, 4))
    ]
    with pytest.raises(UserError, match=r"does not take the first pair, .* prompt_embeds \[2, 12, 7\] .*cached with"):
        fit(family, other, SHORT, progress=quiet)
