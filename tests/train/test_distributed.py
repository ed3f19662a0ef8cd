"""Two processes as one, launched as users do: replicas and FSDP2 shards, on the CPU with gloo."""

import csv
import dataclasses
import shutil

import pytest
import torch
from launches import ACCELERATE, ended, launch
from safetensors.torch import load_file
from tiny import output_hashes, run_to_cache, tiny_config, tiny_wan
from training import make_pairs

from halo_fast.families import family_of
from halo_fast.loss.figures import PairFigures
from halo_fast.loss.functional import gran_dpo
from halo_fast.loss.objectives import GranDPO
from halo_fast.pipeline.config import to_yaml
from halo_fast.pipeline.run import Run
from halo_fast.pipeline.stages.train import train
from halo_fast.train.parallel import batches_of_process

STEPS = 5


@pytest.fixture(scope="module", params=[4, 0], ids=["lora", "full"])
def single(request, tmp_path_factory):
    """Settings for two processes, and what one process with the same pairs in a step makes of them."""
    folder = tmp_path_factory.mktemp("distributed")
    config = tiny_config(
        folder, max_train_steps=STEPS, train_batch_size=1, gradient_accumulation_steps=2, checkpointing_steps=2,
        heldout_share=0.0, auto_beta=0.3, learning_rate=5e-3 if request.param else 1e-3, rank=request.param,
    )  # fmt: skip
    run = run_to_cache(config)
    shutil.copytree(run.path, folder / "before")
    (folder / "config.yaml").write_text(to_yaml(config))
    alone = dataclasses.replace(config, train=dataclasses.replace(config.train, gradient_accumulation_steps=4))
    train(alone, Run(alone))
    return folder, run.path


@pytest.mark.parametrize("words", [("--multi_gpu",), ("--use_fsdp", "--fsdp_version", "2")], ids=["replicas", "fsdp2"])
def test_two_processes_equal_one(single, words):
    folder, alone = single
    output = folder / words[0].strip("-")
    shutil.copytree(folder / "before", output)
    halo = ("-m", "halo_fast", "train", folder / "config.yaml", "--output_dir", output)
    done = ended(launch((*ACCELERATE, *words), *halo))
    assert done.returncode == 0, done.stderr[-4000:]
    logs = [list(csv.DictReader((path / "train/log.csv").open())) for path in (alone, output)]
    assert len(logs[1]) == STEPS and float(logs[1][-1]["beta"]) != 100.0
    for one, two in zip(*logs, strict=True):
        assert {name: float(value) for name, value in two.items()} == pytest.approx(
            {name: float(value) for name, value in one.items()}, rel=1e-5, abs=1e-5, nan_ok=True
        )
    files = "train/lora/pytorch_lora_weights.safetensors", "train/model/diffusion_pytorch_model.safetensors"
    weights = [load_file(path / file) for path in (alone, output) for file in files if (path / file).exists()]
    first = tiny_wan().transformer.state_dict()
    moved = [value - first[name] if name in first else value for name, value in weights[0].items()]
    assert max(value.abs().max() for value in moved) > (1e-2 if "lora" in str(weights[0].keys()) else 1e-3)
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-5, atol=1e-5)
    # one process wrote: everything has its manifest entry, and nothing else is there
    written = {str(path.relative_to(output / "train")) for path in (output / "train").rglob("*") if path.is_file()}
    assert written - {"manifest.json"} == output_hashes(output / "train").keys()


def test_each_pair_goes_whole_to_one_process():
    batches = [[0, 1], [2, 3], [4, 5], [6, 7], [8], [9]]
    found = [batches_of_process(batches, rank, 3) for rank in range(3)]
    assert found == [[[0, 1], [6, 7]], [[2, 3], [8]], [[4, 5], [9]]]


def test_joined_batches_have_the_figures_of_one():
    family = family_of(tiny_wan())
    pairs = make_pairs(family, count=5)
    pairs[1].patch_rewards[:] = float("nan")
    pairs[1].video_rewards[:] = float("nan")
    objective = GranDPO(video_beta=20.0, patch_beta=5.0, patch_sft_weight=0.5)

    def output(chosen):
        samples = torch.stack([pairs[index].latents for index in chosen], 1).flatten(0, 1)
        rewards = torch.stack([pairs[index].patch_rewards for index in chosen], 1).flatten(0, 1)
        videos = torch.stack([pairs[index].video_rewards for index in chosen], 1).flatten(0, 1)
        return gran_dpo(samples, 0.3 * samples.cos(), samples.sin(), rewards, videos, objective=objective)

    whole = output([0, 1, 2, 3, 4])
    parts = PairFigures.join([output(chosen).figures() for chosen in ([0, 1], [2, 3, 4])])
    assert parts.num_pairs == whole.num_pairs == 4
    expected = {name: float(value) for name, value in whole.metrics().items()}
    assert {name: float(value) for name, value in parts.metrics().items()} == pytest.approx(
        expected, rel=1e-5, nan_ok=True
    )
    assert float(parts.loss) == pytest.approx(float(whole.loss), rel=1e-5)
