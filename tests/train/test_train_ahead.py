"""Pairs that another process reads ahead: the same training to the bit, its end and its errors as without."""

import dataclasses
import multiprocessing
import os
import signal
from collections.abc import Sequence

import pytest
import torch
from training import CONFIG, at_step, make_pairs, quiet

from halo_fast.errors import UserError
from halo_fast.families import family_of
from halo_fast.train import fit
from halo_fast.train.ahead import workers_for

SETTINGS = dataclasses.replace(
    CONFIG, max_train_steps=5, train_batch_size=2, gradient_accumulation_steps=2, checkpointing_steps=2,
    checkpoints_total_limit=None,
)  # fmt: skip
CPU = torch.device("cpu")


class Stored(Sequence):
    """Pairs that are no list, as those on disk are not: another process reads them."""

    def __init__(self, pairs, read=lambda index: None):
        self._pairs, self._read = pairs, read

    def __len__(self):
        return len(self._pairs)

    def __getitem__(self, index):
        self._read(index)
        return self._pairs[index]


def same(one, two):
    assert one.log == two.log
    assert all(torch.equal(value, two.lora[name]) for name, value in one.lora.items())


def workers():
    return multiprocessing.active_children()


@pytest.mark.parametrize("settings", [{"schedule": "batched"}, {"schedule": "margin_first", "reference_draws": None}])
def test_read_ahead_equals_read_in_the_step(pipeline, settings):
    pairs = make_pairs(family_of(pipeline))
    config = dataclasses.replace(SETTINGS, **settings)
    readers, states, fits = [], [], []
    for given in (pairs, Stored(pairs)):
        torch.manual_seed(1)
        fits.append(fit(pipeline, given, config, progress=at_step(3, lambda: readers.append(len(workers())))))
        states.append(torch.get_rng_state())
    same(*fits)
    assert torch.equal(*states)
    assert readers == [0, 1] and not workers()


def test_who_reads_ahead(pipeline):
    pairs = make_pairs(family_of(pipeline))
    assert workers_for(Stored(pairs), CPU) == 1 and workers_for(pairs, CPU) == 0
    assert workers_for(pairs, torch.device("cuda")) == 1  # noise is still drawn on the CPU
    elsewhere = [dataclasses.replace(pair, latents=pair.latents.to("meta")) for pair in pairs]
    assert workers_for(Stored(elsewhere), CPU) == 0


def test_a_reader_that_dies_is_one_line_and_the_same_command_continues(pipeline, tmp_path):
    pairs = make_pairs(family_of(pipeline))
    whole = fit(pipeline, pairs, SETTINGS, folder=tmp_path / "whole", progress=quiet)
    killing = at_step(3, lambda: [os.kill(reader.pid, signal.SIGKILL) or reader.join() for reader in workers()])
    message = r"process that reads pairs ahead has died \(DataLoader worker .*same command"
    with pytest.raises(UserError, match=message) as died:
        fit(pipeline, Stored(pairs), SETTINGS, folder=tmp_path / "cut", progress=killing)
    assert "\n" not in str(died.value) and not workers()
    continued = fit(pipeline, Stored(pairs), SETTINGS, folder=tmp_path / "cut", progress=quiet)
    same(continued, whole)


def test_sigterm_to_all_processes_saves_first(pipeline, tmp_path):
    pairs = make_pairs(family_of(pipeline))

    def end_all():
        for process in (*(reader.pid for reader in workers()), os.getpid()):
            os.kill(process, signal.SIGTERM)

    with pytest.raises(SystemExit):
        fit(pipeline, Stored(pairs), SETTINGS, folder=tmp_path, progress=at_step(2, end_all))
    assert (tmp_path / "checkpoints/step_000003.safetensors").exists() and not workers()
    same(fit(pipeline, Stored(pairs), SETTINGS, folder=tmp_path, progress=quiet), fit(pipeline, pairs, SETTINGS))


def test_a_mistake_in_a_pair_is_reported_at_its_step(pipeline, tmp_path):
    pairs = make_pairs(family_of(pipeline), 40)
    config = dataclasses.replace(SETTINGS, reference_draws=None, off_policy_pairs=0)
    order = torch.randperm(40, generator=_order_generator(config.seed)).tolist()
    late = order[4 * 4 - 1]  # the last pair of step 3
    pairs[late].latents[1, 0, 0, 0, 0] = torch.nan
    seen = []
    with pytest.raises(UserError, match=f"^pair {late}: latents are not finite; make its clips") as raised:
        fit(pipeline, Stored(pairs), config, progress=lambda steps, *_: (seen.append(step) or step for step in steps))
    assert seen == [0, 1, 2, 3] and "\n" not in str(raised.value)
    assert not workers()


def _order_generator(seed):
    """As docs/training.md says: a hash of the counter seeds the order of an epoch."""
    import hashlib

    digest = hashlib.sha256(f"{seed} order 0".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))
