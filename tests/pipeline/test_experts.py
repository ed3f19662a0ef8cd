"""Both experts of Wan 2.2 trained in one run directory, on the same pairs."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file
from tiny import output_hashes, tiny_clips, tiny_config, tiny_wan, write_scores

from halo_fast.export.lora import load_trained, trained_network
from halo_fast.families import family_of
from halo_fast.pipeline.config import EvaluateConfig
from halo_fast.pipeline.export import export_run
from halo_fast.pipeline.run import Run
from halo_fast.pipeline.stages.cache import build_cache
from halo_fast.pipeline.stages.evaluate import evaluate
from halo_fast.pipeline.stages.generate import generate
from halo_fast.pipeline.stages.pairs import build_pairs
from halo_fast.pipeline.stages.report import write_report
from halo_fast.pipeline.stages.train import train, trainings
from halo_fast.rewards import RewardModel, RewardModelConfig


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
    """Configs of one run directory, for the expert of high noise and for that of low noise, both trained."""
    folder = tmp_path_factory.mktemp("experts")
    tiny_wan(experts=True).save_pretrained(folder / "model")
    (folder / "prompts.txt").write_text("a red ball rolls left\na cube jumps\n")
    config = dataclasses.replace(
        tiny_config(folder, heldout_share=0.0, max_train_steps=2),
        evaluation_prompts=str(folder / "prompts.txt"),
        generate=tiny_clips(num_prompts=2),
        evaluate=EvaluateConfig(bootstrap=20),
    )
    low = dataclasses.replace(config, train=dataclasses.replace(config.train, network="transformer_2"))
    run = Run(config)
    generate(config, run)
    write_scores(run)
    for stage in (build_pairs, build_cache, train):
        stage(config, run)
    first = output_hashes(run.path / "train")
    train(low, Run(low))
    assert output_hashes(run.path / "train") == first
    train(config, run)  # finished before, kept
    assert output_hashes(run.path / "train") == first
    return config, low


def test_each_expert_has_a_place_and_both_are_loaded(configs):
    run = Run(configs[0])
    folders = trainings(run)
    assert [folder.name for folder in folders] == ["train", "train_transformer_2"]
    pipeline = tiny_wan(experts=True)
    networks = {}
    for folder in folders:
        network = trained_network(folder / "lora")
        load_trained(family_of(pipeline, network), folder / "lora")
        adapted = getattr(pipeline, network).state_dict()
        networks[network] = {name for name in adapted if ".lora_" in name}
    assert set(networks) == {"transformer", "transformer_2"} and all(networks.values())


def test_each_expert_is_exported_to_a_place_of_its_own(configs):
    run = Run(configs[0]).path
    files = [export_run(run), export_run(run, network="transformer_2")]
    one, other = (load_file(file) for file in files)
    assert files[0] != files[1] and one.keys() == other.keys()
    # the first network has a name too, and a round a place of its own
    named = export_run(run, network="transformer"), export_run(run, round=1)
    assert len({*files, *named}) == 4
    assert all(torch.equal(load_file(file)[name], one[name]) for file in named for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)
    both = {export_run(run, "comfyui", network=network).name for network in (None, "transformer_2")}
    assert both == {"lora_transformer.safetensors", "lora_transformer_2.safetensors"}


def test_evaluate_and_report_see_both(configs):
    config = configs[1]
    run = Run(config)
    with run.stage("reward", {}, {}) as stage:
        torch.manual_seed(0)
        RewardModel(RewardModelConfig(("visual_quality", "text_alignment"), width=8)).save(stage.folder)
        (stage.folder / "history.csv").write_text("phase,step,loss\nvideo,1,0.5\n")
        stage.finish({})
    evaluate(config, run)
    inputs = json.loads((run.path / "evaluate/manifest.json").read_text())["inputs"]
    assert {"trained", "trained, train"} <= inputs.keys() and inputs["trained"] != inputs["trained, train"]
    write_report(config, run)
    page = (run.path / "report/report.html").read_text()
    assert "train_transformer_2" in json.loads((run.path / "report/manifest.json").read_text())["inputs"] and page
