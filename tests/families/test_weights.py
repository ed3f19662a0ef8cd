"""Parts of a folder that are loaded, and their precision, for every family."""

import os
import subprocess
import sys
from copy import deepcopy

import pytest
import torch
from diffusers import AutoencoderKLWan
from tiny import TINY, TINY_IMAGE, tiny_conditions, tiny_hunyuan, tiny_wan

from halo_fast.families import family_of, load
from halo_fast.families.weights import stored_dtype
from halo_fast.files import write_safetensors

PROMPTS = ["a ball rolls", " ".join(["red"] * 1200)]


def bytes_held(family):
    """Bytes of all weights that are in memory, by part."""
    parts = family.pipeline.components.items()
    return {
        name: sum(value.nbytes for value in part.parameters() if not value.is_meta)
        for name, part in parts
        if isinstance(part, torch.nn.Module)
    }


@pytest.mark.parametrize("name", TINY)
@torch.no_grad()
def test_the_network_alone_predicts_as_the_whole_model_and_tokenizers_alone_count(name, tmp_path):
    tiny = TINY[name]
    pipeline = tiny.build()
    pipeline.save_pretrained(tmp_path)
    whole = family_of(pipeline, tiny.network)
    conditions = whole.stack(whole.encode_prompts(PROMPTS[:1]))
    noisy, t = torch.randn(1, *whole.latent_shape(*tiny.size)), torch.tensor([0.6])
    alone = load(str(tmp_path), "cpu", tiny.network, weights=[whole.network])
    held = bytes_held(alone)
    assert {part for part, size in held.items() if size} == {whole.network}
    assert alone.latent_shape(*tiny.size) == whole.latent_shape(*tiny.size)
    # copies, because weights in a file start anywhere, and the last bit of a product depends on where its factors lie
    outputs = [family.predict(deepcopy(family.transformer), noisy, t, conditions) for family in (whole, alone)]
    assert torch.equal(*outputs)
    words = load(str(tmp_path), "cpu", tiny.network, weights=())
    assert not any(bytes_held(words).values())
    assert words.cut_prompts(PROMPTS) == whole.cut_prompts(PROMPTS) == PROMPTS[1:]


@pytest.mark.parametrize("name", [*TINY, *TINY_IMAGE])
@torch.no_grad()
def test_encoders_alone_encode_as_the_whole_model(name, tmp_path):
    tiny = (TINY | TINY_IMAGE)[name]
    pipeline = tiny.build()
    for part in ("transformer", "transformer_2", "unet"):
        if getattr(pipeline, part, None) is not None:
            getattr(pipeline, part).to(torch.bfloat16)  # some pipelines encode in the network's precision
    pipeline.save_pretrained(tmp_path)
    whole, encoders = (load(str(tmp_path), "cpu", tiny.network, weights=weights) for weights in (None, "encoders"))
    held = bytes_held(encoders)
    assert {part for part, size in held.items() if not size} == {
        part for part in held if part.startswith(("transformer", "unet"))
    }
    assert encoders.transformer.dtype == whole.transformer.dtype
    draw = torch.Generator().manual_seed(0)
    clip = torch.randint(256, (1, *tiny.size, 3), generator=draw, dtype=torch.uint8)
    found = []
    for family in (whole, encoders):
        conditions = (
            tiny_conditions(family, PROMPTS[:1], tiny.size)
            if name in TINY_IMAGE
            else family.encode_prompts(PROMPTS[:1])
        )
        found.append({"latents": family.encode(clip), **conditions[0]})
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(value, found[1][key]) for key, value in found[0].items())


def test_auto_is_the_stored_precision_of_each_part(tmp_path):
    pipeline = tiny_hunyuan()
    pipeline.transformer.to(torch.bfloat16)
    pipeline.text_encoder_2.to(torch.bfloat16)
    pipeline.text_encoder.to(torch.float16)
    pipeline.save_pretrained(tmp_path)
    loaded = load(str(tmp_path), "cpu").pipeline
    found = {name: getattr(loaded, name).dtype for name in ("transformer", "text_encoder", "text_encoder_2", "vae")}
    # float16 is taken by no part: its small gradients vanish
    assert found == {
        "transformer": torch.bfloat16, "text_encoder": torch.float32, "text_encoder_2": torch.bfloat16,
        "vae": torch.float32,
    }  # fmt: skip
    for name, value in loaded.transformer.state_dict().items():
        torch.testing.assert_close(value.float(), pipeline.transformer.state_dict()[name].float(), rtol=0, atol=0)


@pytest.mark.parametrize("shards", ["", "-00001-of-00002"])
def test_a_variant_beside_the_weights_is_not_what_is_stored(tmp_path, shards):
    """Its name sorts first; whole repositories hold both."""
    write_safetensors(tmp_path / f"model.fp16{shards}.safetensors", {"w": torch.zeros(4, dtype=torch.float16)})
    assert stored_dtype(tmp_path) == torch.float16  # where there is nothing else
    write_safetensors(tmp_path / f"model{shards}.safetensors", {"w": torch.zeros(4)})
    assert stored_dtype(tmp_path) == torch.float32


def test_one_precision_for_all_leaves_float32_what_diffusers_keeps(tmp_path):
    tiny_wan().save_pretrained(tmp_path)
    pipeline = load(str(tmp_path), "cpu", precision="bf16").pipeline
    assert isinstance(pipeline.vae, AutoencoderKLWan) and pipeline.vae.dtype == torch.bfloat16
    kept = {name for name, value in pipeline.transformer.named_parameters() if value.dtype == torch.float32}
    assert kept and all(any(part in name for part in pipeline.transformer._keep_in_fp32_modules) for name in kept)
    assert pipeline.transformer.blocks[0].attn1.to_q.weight.dtype == torch.bfloat16


_HUB = """
import sys
from pathlib import Path
from halo_fast.families import load, source
from halo_fast.families.weights import hub_commit
reference, *commits = sys.argv[1:]
for commit in commits:
    Path(reference).write_text(commit)
    print(hub_commit("own/tiny"), source("own/tiny"), hub_commit("own/other"), source("own/other"))
    print(float(load("own/tiny", "cpu").transformer.proj_out.bias[0]))
"""


def test_a_model_of_the_hub_is_known_by_its_commit(tmp_path):
    """A cache as huggingface_hub lays it out, with two commits; `refs/main` names the one that counts."""
    hub = tmp_path / "hub" / "models--own--tiny"
    commits = {"a" * 40: 0.25, "b" * 40: 0.5}
    for commit, mark in commits.items():
        pipeline = tiny_wan()
        torch.nn.init.constant_(pipeline.transformer.proj_out.bias, mark)
        pipeline.save_pretrained(hub / "snapshots" / commit)
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    environment.pop("HF_HUB_CACHE", None)
    (hub / "refs").mkdir()
    script = [sys.executable, "-c", _HUB, hub / "refs" / "main", *commits]
    done = subprocess.run(script, env=environment, capture_output=True, text=True)
    wanted = [[commit, f"own/tiny@{commit}", "None", "own/other", str(mark)] for commit, mark in commits.items()]
    assert done.stdout.split() == [word for words in wanted for word in words], done.stderr
