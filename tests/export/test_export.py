"""Exported adapters against diffusers' own reading of both formats, and against the products B A themselves."""

import dataclasses
import json

import pytest
import torch
from diffusers.loaders import lora_conversion_utils as theirs
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import tiny_wan
from training import CONFIG, make_pairs, run_model

from halo_fast.errors import UserError
from halo_fast.export.comfyui import comfyui
from halo_fast.export.lora import metadata
from halo_fast.families import family_of
from halo_fast.files import write_safetensors
from halo_fast.pipeline.cli import main
from halo_fast.pipeline.export import export_run
from halo_fast.train import fit


def adapter(layers, rank=2, seed=0):
    """Random A and B for layers given as name -> (in, out)."""
    generator = torch.Generator().manual_seed(seed)
    lora = {}
    for name, (inputs, outputs) in layers.items():
        lora[f"{name}.lora_A.weight"] = torch.randn(rank, inputs, generator=generator)
        lora[f"{name}.lora_B.weight"] = torch.randn(outputs, rank, generator=generator)
    return lora


def products(lora):
    modules = {name.removesuffix(".lora_A.weight") for name in lora if name.endswith(".lora_A.weight")}
    return {module: lora[f"{module}.lora_B.weight"] @ lora[f"{module}.lora_A.weight"] for module in modules}


WAN = {
    f"blocks.{block}.{layer}": (8, 6)
    for block in (0, 1)
    for layer in (
        *(f"{attention}.{projection}" for attention in ("attn1", "attn2")
          for projection in ("to_q", "to_k", "to_v", "to_out.0")),
        "ffn.net.0.proj", "ffn.net.2",
    )
}  # fmt: skip
WAN_AROUND = {
    "condition_embedder.time_proj": (8, 6),
    "condition_embedder.time_embedder.linear_1": (8, 6),
    "condition_embedder.time_embedder.linear_2": (8, 6),
    "condition_embedder.text_embedder.linear_1": (8, 6),
    "condition_embedder.text_embedder.linear_2": (8, 6),
    "proj_out": (8, 6),
}


@pytest.mark.parametrize("layers", [WAN, WAN | WAN_AROUND], ids=["blocks", "all"])
def test_diffusers_reads_our_wan_file_back_as_it_was(layers):
    lora = adapter(layers)
    file = comfyui(lora, "WanPipeline")
    assert file["diffusion_model.blocks.1.self_attn.o.alpha"] == 2
    assert "diffusion_model.blocks.0.cross_attn.k.lora_A.weight" in file
    back = theirs._convert_non_diffusers_wan_lora_to_diffusers(dict(file))
    assert back.keys() == {f"transformer.{name}" for name in lora}
    assert all(torch.equal(back[f"transformer.{name}"], value) for name, value in lora.items())


def test_diffusers_reads_our_ltx_file_back_as_it_was():
    lora = adapter({f"transformer_blocks.3.attn{n}.{layer}": (4, 4) for n in (1, 2) for layer in ("to_q", "to_out.0")})
    back = theirs._convert_non_diffusers_ltxv_lora_to_diffusers(comfyui(lora, "LTXPipeline"))
    assert back.keys() == {f"transformer.{name}" for name in lora}
    assert all(torch.equal(back[f"transformer.{name}"], value) for name, value in lora.items())


# diffusers' conversion has HunyuanVideo's own width written into it
WIDTH = 3072
DOUBLE = {
    **{f"transformer_blocks.0.attn.{layer}": (12, WIDTH) for layer in ("to_q", "to_k", "to_v", "add_q_proj")},
    **{f"transformer_blocks.0.attn.{layer}": (12, WIDTH) for layer in ("add_k_proj", "add_v_proj")},
    **{f"transformer_blocks.0.attn.{layer}": (12, 10) for layer in ("to_out.0", "to_add_out")},
    **{f"transformer_blocks.0.{layer}": (12, 10) for layer in ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj")},
    "transformer_blocks.0.ff_context.net.2": (12, 10),
}
SINGLE = {
    **{f"single_transformer_blocks.1.attn.{layer}": (12, WIDTH) for layer in ("to_q", "to_k", "to_v")},
    "single_transformer_blocks.1.proj_mlp": (12, 4 * WIDTH),
    "single_transformer_blocks.1.proj_out": (12, 10),
}


@pytest.mark.parametrize("left_out", [(), ("to_k", "add_v_proj", "proj_mlp"), ("attn.to_q", "attn.to_k", "attn.to_v")])
def test_diffusers_reads_our_hunyuan_file_back_as_the_same_change_of_weights(left_out):
    layers = {name: size for name, size in (DOUBLE | SINGLE).items() if not name.endswith(left_out or ("none",))}
    expected = products(adapter(layers))
    file = comfyui(adapter(layers), "HunyuanVideoPipeline")
    if not left_out:
        assert file["diffusion_model.double_blocks.0.img_attn_qkv.lora_A.weight"].shape == (8, 12)
        assert file["diffusion_model.single_blocks.1.linear1.lora_B.weight"].shape == (7 * WIDTH, 8)
    found = products(
        {k.removeprefix("transformer."): v for k, v in theirs._convert_hunyuan_video_lora_to_diffusers(file).items()}
    )
    assert expected.keys() <= found.keys()
    for module, change in found.items():
        # a layer without an adapter of its own comes back with one that changes nothing
        torch.testing.assert_close(change, expected.get(module, torch.zeros_like(change)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layers", [DOUBLE, {name: DOUBLE[name] for name in list(DOUBLE)[:7]}, SINGLE])
def test_hunyuan_files_have_one_rank(layers):
    # loaders that take one rank, and alpha from it, for the whole file scale other ranks wrongly
    file = comfyui(adapter(layers, rank=3), "HunyuanVideoPipeline")
    ranks = {value.shape[0 if ".lora_A." in name else 1] for name, value in file.items()}
    assert len(ranks) == 1 and all(value.isfinite().all() for value in file.values())


def test_fused_refiner_adapter_is_the_stack_of_its_parts():
    # diffusers' conversion cuts A of this layer in three, which fits no adapter, so the product itself is the truth
    prefix = "context_embedder.token_refiner.refiner_blocks.1.attn"
    lora = adapter({f"{prefix}.{layer}": (6, 5) for layer in ("to_q", "to_k", "to_v", "to_out.0")})
    file, expected = comfyui(lora, "HunyuanVideoPipeline"), products(lora)
    target = "diffusion_model.txt_in.individual_token_refiner.blocks.1.self_attn"
    torch.testing.assert_close(
        products(file)[f"{target}_qkv"], torch.cat([expected[f"{prefix}.to_{name}"] for name in "qkv"])
    )
    assert torch.equal(products(file)[f"{target}_proj"], expected[f"{prefix}.to_out.0"])


def test_unknown_models_and_layers_are_refused():
    with pytest.raises(UserError, match="known for WanPipeline, .*not for CogVideoXPipeline; use --format diffusers"):
        comfyui(adapter({"transformer_blocks.0.attn1.to_q": (4, 4)}), "CogVideoXPipeline")
    with pytest.raises(UserError, match="layer patch_embedding of WanPipeline; leave it out of target_modules"):
        comfyui(adapter({"patch_embedding": (4, 4)}), "WanPipeline")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run directory with a trained LoRA, and what base and trained model give."""
    pipeline = tiny_wan()
    family, outputs = family_of(pipeline), [run_model(pipeline)]

    def at_the_end(iterable, total, label):
        yield from iterable
        outputs.append(run_model(pipeline))

    config = dataclasses.replace(CONFIG, lora_alpha=8, target_modules=["to_q", "to_k", "to_out.0", "net.0.proj"])
    result = fit(pipeline, make_pairs(family), config, progress=at_the_end)
    run = tmp_path_factory.mktemp("run")
    about = metadata(family, "tiny", config, len(result.log))
    write_safetensors(run / "train/lora/pytorch_lora_weights.safetensors", result.lora, about)
    return run, *outputs


@pytest.mark.parametrize("format", ["diffusers", "comfyui"])
def test_exported_files_load_in_a_fresh_pipeline_and_give_the_trained_output(trained, tmp_path, format):
    run, base, expected = trained
    assert main(["export", str(run), "--format", format, "--output", str(tmp_path)]) == 0
    (file,) = tmp_path.glob("*.safetensors")
    fresh = tiny_wan()
    fresh.load_lora_weights(str(tmp_path), weight_name=file.name)
    assert (expected - base).abs().max() > 1e-3
    assert torch.equal(run_model(fresh), expected)
    with safe_open(file, "pt") as opened:
        about = opened.metadata()
    assert about["base_model"] == "tiny" and about["pipeline"] == "WanPipeline"
    assert (about["rank"], about["alpha"], about["steps"]) == ("4", "8", "6")
    assert json.loads(about["objective"]) == CONFIG.objective


def test_default_place_of_an_export_is_the_run_directory(trained):
    run, *_ = trained
    assert export_run(run) == run / "export/diffusers/pytorch_lora_weights.safetensors"
    source = run / "train/lora/pytorch_lora_weights.safetensors"
    assert load_file(export_run(run)).keys() == load_file(source).keys()
    assert export_run(run, "comfyui") == run / "export/comfyui/lora_transformer.safetensors"


def test_file_for_comfyui_is_called_after_the_expert(tmp_path):
    lora = adapter({"transformer.blocks.0.attn1.to_q": (4, 4)})
    about = {"pipeline": "WanPipeline", "network": "transformer_2"}
    write_safetensors(tmp_path / "train/lora/pytorch_lora_weights.safetensors", lora, about)
    file = export_run(tmp_path, "comfyui")
    assert file == tmp_path / "export/comfyui/lora_transformer_2.safetensors"
    down = load_file(file)["diffusion_model.blocks.0.self_attn.q.lora_A.weight"]
    assert torch.equal(down, lora["transformer.blocks.0.attn1.to_q.lora_A.weight"])


def test_mistakes_of_the_command_are_reported_in_one_line(tmp_path, capsys):
    assert main(["export", str(tmp_path)]) == 2
    assert "not there; run `halo train`" in capsys.readouterr().err
    assert main(["export", str(tmp_path), "--format", "onnx"]) == 2
    assert (
        "format: expected one of diffusers, comfyui, huggingface, trl, diffsynth, videodpo, got 'onnx'"
        in capsys.readouterr().err
    )
