"""A frozen base in 8 or 4 bits: what is quantised, the gradient against dequantised weights, stages, memory, errors."""

import dataclasses
import math
import shutil

import pytest
import torch
from quantized import BACKENDS, decoded, largest_error
from safetensors.torch import load_file
from tiny import kill_when, output_hashes, run_to_cache, tiny_config, tiny_ltx, tiny_wan
from training import CONFIG, make_pairs, objective_with, quiet

from halo_fast.errors import UserError
from halo_fast.families import family_of, load, quantization
from halo_fast.families.fingerprint import fingerprint
from halo_fast.files import read_json
from halo_fast.pipeline.config import Config
from halo_fast.pipeline.export import export_run
from halo_fast.pipeline.plan import plan_text, predict
from halo_fast.pipeline.preflight import check_required
from halo_fast.pipeline.run import Run
from halo_fast.pipeline.stages.train import train
from halo_fast.train import fit
from halo_fast.train.devices import find_device
from halo_fast.train.memory import kept_bytes
from halo_fast.train.predicted import SUPERVISED

pytest.importorskip("bitsandbytes")
pytest.importorskip("torchao")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Saved pipelines by the name of their family."""
    folder = tmp_path_factory.mktemp("quantized")
    for name, pipeline in (("wan", tiny_wan(head=32)), ("ltx", tiny_ltx(head=32)), ("narrow", tiny_wan())):
        pipeline.save_pretrained(folder / name)
    return folder


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["wan", "ltx"])
def test_blocks_are_quantised_and_nothing_else_and_gradients_are_those_of_the_rounded_weights(folders, name, backend):
    plain = load(str(folders / name), "cpu")
    family = load(str(folders / name), "cpu", quantization=backend)
    layers = {key: layer for key, layer in plain.transformer.named_modules() if isinstance(layer, torch.nn.Linear)}
    changed = {key for key in layers if quantization.is_quantized(family.transformer.get_submodule(key))}
    assert changed == {key for key in layers if ".attn" in key or ".ff" in key}
    state = family.transformer.state_dict()
    for key, value in plain.transformer.state_dict().items():
        if key.rpartition(".")[0] in changed and key.endswith("weight"):
            truth = decoded(family.transformer.get_submodule(key.rpartition(".")[0]), backend)
            assert ((truth - value).abs() <= 1.02 * largest_error(value, backend)).all()
            value.copy_(truth)
        else:
            assert torch.equal(state[key], value), key
    # 8-bit matrix products of bitsandbytes also round what goes in
    tolerance = 2e-2 if backend == "bnb_int8" else 1e-5
    shape = plain.latent_shape(9, 32, 32)
    noisy = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
    conditions = plain.stack(plain.encode_prompts(["a red ball rolls", "a cube"]))
    found = []
    for each in (plain, family):
        each.transformer.requires_grad_(False)
        with torch.no_grad():  # what bitsandbytes would pack weights for
            each.predict(each.transformer, noisy, torch.tensor([0.3, 0.8]), conditions)
        output = each.predict(each.transformer, noisy, torch.tensor([0.3, 0.8]), conditions)
        found.append((output, *torch.autograd.grad(output.square().sum(), noisy)))
    for truth, value in zip(*found, strict=True):
        assert (value - truth).norm() < tolerance * truth.norm()


@pytest.mark.parametrize("backend", BACKENDS)
def test_fit_holds_its_proofs_learns_and_leaves_the_base_alone(folders, backend):
    family = load(str(folders / "wan"), "cpu", quantization=backend)
    pairs, before = make_pairs(family, 2), fingerprint([family.transformer])
    objective = objective_with(video_weight=0.25, patch_weight=1.0, patch_sft_weight=0.0)
    config = dataclasses.replace(
        CONFIG, max_train_steps=3, train_batch_size=1, gradient_checkpointing="full", objective=objective
    )
    result = fit(family, pairs, config, progress=quiet)
    assert result.log[0]["rewards/margins"] == pytest.approx(0, abs=1e-6)
    # no supervised term, one pair with labels
    assert result.log[0]["loss"] == pytest.approx(1.25 * math.log(2), rel=1e-5)
    assert all(math.isfinite(row["loss"]) for row in result.log)
    assert fingerprint([family.transformer]) == before
    assert all(value.dtype == torch.float32 for value in result.lora.values())
    assert any(value.abs().max() > 0 for key, value in result.lora.items() if "lora_B" in key)


KILLED = """
import dataclasses, time, torch
from pathlib import Path
from tiny import tiny_config
from halo_fast.pipeline.run import Run
from halo_fast.pipeline.stages.train import train
from halo_fast.train import loop
torch.set_num_threads({threads})
take_step = loop.take_step
def stopping(job, step):
    if step == 3:
        Path({marker!r}).touch()
        time.sleep(1000)  # time to be killed in
    return take_step(job, step)
loop.take_step = stopping
config = dataclasses.replace(tiny_config(Path({folder!r}), **{settings!r}), **{more!r})
train(config, Run(config))
"""
SETTINGS = {"max_train_steps": 4, "train_batch_size": 1, "heldout_share": 0.3, "gradient_checkpointing": "full"}


@pytest.fixture(scope="module")
def cached(folders, tmp_path_factory):
    """A run directory up to its cache, of a base that is not quantised, and its folder."""
    folder = tmp_path_factory.mktemp("stages")
    shutil.copytree(folders / "wan", folder / "model")
    (folder / "prompts.txt").write_text("a red ball rolls left\na cube jumps\ngreen ball over the grass\na cube\n")
    config = tiny_config(folder, **SETTINGS)
    run_to_cache(config)
    return folder


def killed_and_continued(folder, settings, more):
    """Outputs of a training that was killed after three steps and went on, and of one that was not; and its run."""
    config = dataclasses.replace(tiny_config(folder, **settings), **more)
    run, marker = Run(config, force=True), folder / f"marker_{sorted((settings | more).items())}"[:200]
    code = KILLED.format(
        threads=torch.get_num_threads(), marker=str(marker), folder=str(folder), settings=settings, more=more
    )
    shutil.rmtree(run.path / "train", ignore_errors=True)
    kill_when(code, marker.exists)
    train(config, Run(config))
    continued = output_hashes(run.path / "train")
    train(config, run)
    return continued, output_hashes(run.path / "train"), Run(config)


@pytest.mark.parametrize("backend", ["bnb_nf4", "torchao_int8"])
def test_a_killed_training_ends_with_the_same_bits_and_exports(cached, backend):
    # at rank 64 the moments of matrices are in 8 bits
    less = {"optimizer": "adamw_8bit", "offload_blocks": True, "rank": 64} if backend == "bnb_nf4" else {}
    continued, undisturbed, run = killed_and_continued(cached, SETTINGS | less, {"quantization": backend})
    assert continued == undisturbed
    assert read_json(run.path / "train/manifest.json")["settings"]["quantization"] == backend
    file = export_run(run.path, "comfyui")
    assert file.exists()
    lora = load_file(run.path / "train/lora/pytorch_lora_weights.safetensors")
    for quantized in (backend, None):
        family = load(run.config.pretrained_model_name_or_path, "cpu", quantization=quantized)
        noisy, t = torch.randn(1, *family.latent_shape(9, 32, 32)), torch.tensor([0.6])
        conditions = family.stack(family.encode_prompts(["a cube"]))
        with torch.no_grad():
            base = family.predict(family.transformer, noisy, t, conditions)
            family.load_lora(lora)
            assert not torch.equal(family.predict(family.transformer, noisy, t, conditions), base)
    other = dataclasses.replace(run.config, quantization=None)
    with pytest.raises(UserError, match=f"was made with quantization = {backend}, now it is None"):
        Run(other).require("train/lora")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_bytes_are_predicted_and_counted(folders, backend, precision):
    plain = load(str(folders / "wan"), "cpu", precision=precision).transformer
    found = load(str(folders / "wan"), "cpu", precision=precision, quantization=backend).transformer
    assert quantization.quantized_bytes(plain, backend) == quantization.stored_bytes(found)
    held = sum(p.numel() * p.element_size() for p in plain.parameters())
    assert quantization.stored_bytes(plain) == held > quantization.stored_bytes(found)
    # what autograd keeps for the backward pass does not count a quantised weight as an activation
    family = family_of(load(str(folders / "wan"), "cpu", precision=precision, quantization=backend))
    noisy = torch.randn(2, *family.latent_shape(9, 32, 32))
    conditions = family.stack(family.encode_prompts(["a cube", "a red ball"]))
    noisy.requires_grad_()

    def kept(network):
        network.requires_grad_(False)
        return kept_bytes(
            lambda: family.predict(network, noisy, torch.tensor([0.3, 0.8]), conditions), network, selective=False
        )[0]

    keep = [kept(network) for network in (plain, found)]
    # torchao keeps the weights that it computed with, but for keys and values of the text, which has no gradient
    names = [name for name in quantization.quantized_layers(plain) if not name.endswith(("attn2.to_k", "attn2.to_v"))]
    weights = sum(plain.get_submodule(name).weight.nbytes for name in names)
    assert keep[1] - keep[0] == pytest.approx(weights if backend.startswith("torchao") else 0, abs=0.05 * keep[0])


def test_plan_counts_quantised_weights():
    config = Config(pretrained_model_name_or_path="Wan-AI/Wan2.1-T2V-14B-Diffusers", precision="bf16")
    config.grid = (5, 4, 6)
    config.generate.num_frames, config.generate.height, config.generate.width = 17, 480, 832
    choices = [("margin_first", "full", True), (SUPERVISED, "full", False)]
    steps = []
    for backend in (None, "bnb_nf4"):
        found = predict(dataclasses.replace(config, quantization=backend), choices)
        steps.append((found.options[0].step, found.sampling[0]))
    (plain, sampled), (quantized, smaller) = steps
    # 40 blocks of ten layers: eight of 5120 x 5120, two of 5120 x 13824; 2 bytes become 4.5 bits
    saved = 40 * (8 * 5120**2 + 2 * 5120 * 13824) * (2 - 4.5 / 8) - 400 * 64
    assert plain.weights - quantized.weights == pytest.approx(saved, rel=1e-9)
    assert sampled - smaller == pytest.approx(saved, rel=1e-9)
    assert quantized.activations - plain.activations == 5120 * 13824 * 2
    text = plan_text(dataclasses.replace(config, quantization="bnb_nf4"), found, find_device("24 GiB"))
    assert "bfloat16, bnb_nf4" in text


def test_mistakes_are_one_line(folders, monkeypatch, tmp_path):
    with pytest.raises(UserError, match="multiple of 64 inputs, blocks.0.attn1.to_q of WanTransformer3DModel has 24"):
        load(str(folders / "narrow"), "cpu", quantization="bnb_nf4")
    with pytest.raises(UserError, match="'tiny:tiny_wan' loads what it likes"):
        load("tiny:tiny_wan", "cpu", quantization="bnb_nf4")
    with pytest.raises(UserError, match="bnb_nf4 freezes the base, and train.rank 0 trains it"):
        Config(quantization="bnb_nf4", train=dataclasses.replace(CONFIG, rank=0))
    with pytest.raises(UserError, match="quantization"):
        Config(quantization="nf5")
    family = load(str(folders / "wan"), "cpu", quantization="torchao_int8")
    with pytest.raises(UserError, match="0 trains the weights themselves, and blocks.0.attn1.to_q is quantised"):
        fit(family, make_pairs(family, 2), dataclasses.replace(CONFIG, rank=0, target_modules=["to_q"]), progress=quiet)
    family = load(str(folders / "wan"), "cpu", quantization="bnb_nf4")
    layer = family.transformer.blocks[0].attn1.to_q
    layer.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(UserError, match="has packed blocks.0.attn1.to_q for inference"):
        fit(family, make_pairs(family, 2), CONFIG, progress=quiet)
    assert all(
        not part.support_avx512bf16_for_cpu for part in family.transformer.modules() if hasattr(part, "quant_state")
    )
    monkeypatch.setattr(quantization, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="torchao_int8 needs torchao, which is not installed; pip install torchao"):
        load(str(folders / "wan"), "cpu", quantization="torchao_int8")
    with pytest.raises(UserError, match="pip install bitsandbytes"):
        check_required(tiny_config_with(tmp_path, "bnb_nf4"), ["train"])


def tiny_config_with(folder, backend):
    return dataclasses.replace(tiny_config(folder), quantization=backend)
