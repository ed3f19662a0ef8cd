"""8-bit AdamW: against float32 AdamW, its bytes, a stopped training, errors."""

import dataclasses
import shutil

import pytest
import torch
from tiny import output_hashes, run_to_cache, tiny_config, tiny_wan
from training import CONFIG, make_pairs, quiet

from halo_fast.errors import UserError
from halo_fast.families import family_of
from halo_fast.files import read_checkpoint
from halo_fast.pipeline.run import Run
from halo_fast.pipeline.stages.train import train
from halo_fast.train import fit, loop, optimizers

EIGHT = dataclasses.replace(CONFIG, optimizer="adamw_8bit", max_train_steps=3, train_batch_size=1)


def moved(config, count, steps=20):
    """How far AdamW moves weights on gradients that are the same for every optimizer, and its state."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.zeros(count))
    optimizer = optimizers.make_optimizer([weight], config.optimizer, config.learning_rate)
    drift = torch.randn(count, generator=generator)
    for _ in range(steps):
        weight.grad = drift + torch.randn(count, generator=generator)
        optimizer.step()
    return weight.detach(), optimizer.state[weight]


@pytest.mark.parametrize("count", [1000, 10_000])
def test_eight_bits_move_weights_as_float32_does(count):
    pytest.importorskip("bitsandbytes")
    truth, _ = moved(dataclasses.replace(EIGHT, optimizer="adamw"), count)
    found, state = moved(EIGHT, count)
    small = count < 4096
    assert (found - truth).norm() < (1e-5 if small else 0.05) * truth.norm()
    held = sum(state[key].nbytes for key in ("state1", "state2", "absmax1", "absmax2") if key in state)
    assert held == optimizers.moment_bytes([torch.zeros(count)], "adamw_8bit")
    assert held == (8 * count if small else 2 * count + 8 * -(-count // 256))


def test_a_stopped_training_ends_with_the_same_bits(tmp_path, monkeypatch):
    pytest.importorskip("bitsandbytes")
    tiny_wan(head=32).save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("a red ball rolls left\na cube jumps\ngreen ball over the grass\na cube\n")
    # rank 64: matrices of 4096 weights, which are kept in 8 bits
    config = tiny_config(
        tmp_path, max_train_steps=4, train_batch_size=1, heldout_share=0.0, optimizer="adamw_8bit", rank=64
    )
    run = run_to_cache(config)
    train(config, run)
    undisturbed = output_hashes(run.path / "train")
    tensors, _ = read_checkpoint(run.path / "train/checkpoints/step_000004.safetensors")
    assert {value.dtype for name, value in tensors.items() if name.startswith("state1.")} == {torch.uint8}
    shutil.rmtree(run.path / "train")
    take_step = loop.take_step

    def stopping(job, step):
        if step == 3:
            raise KeyboardInterrupt
        return take_step(job, step)

    monkeypatch.setattr(loop, "take_step", stopping)
    with pytest.raises(KeyboardInterrupt):
        train(config, Run(config))
    monkeypatch.undo()
    train(config, Run(config))
    assert output_hashes(run.path / "train") == undisturbed


def test_a_missing_package_is_one_line(monkeypatch):
    monkeypatch.setattr(optimizers, "find_spec", lambda name: None)
    pipeline = tiny_wan()
    with pytest.raises(UserError, match="adamw_8bit needs bitsandbytes, which is not installed; pip install bitsandb"):
        fit(pipeline, make_pairs(family_of(pipeline), 2), EIGHT, progress=quiet)
