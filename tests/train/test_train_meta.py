"""A step on the meta device, where tensors have no values: reading one raises, and so does one on another device."""

import dataclasses
from contextlib import contextmanager, nullcontext

import pytest
import torch
from tiny import TINY, TINY_IMAGE, begun, tiny_conditions, tiny_wan
from training import CONFIG

from halo_fast.data import Pair
from halo_fast.families import family_of
from halo_fast.train.job import prepared_job
from halo_fast.train.observers.log import Log
from halo_fast.train.steps import take_step

META = torch.device("meta")


def pairs_of(family, size):
    """Three pairs of random latents, whose prompts are of different lengths."""
    shape, generator = family.latent_shape(*size), torch.Generator().manual_seed(0)

    def pair(conditions):
        return Pair(
            begun(torch.randn(2, *shape, generator=generator), conditions), conditions,
            torch.rand(2, 1, 2, 2, generator=generator), torch.rand(2, generator=generator),
        )  # fmt: skip

    prompts = ["a cube jumps", "a ball", "a red cube jumps over a ball"]
    return [pair(conditions) for conditions in tiny_conditions(family, prompts, size)]


class OnMeta:
    """An accelerator whose device is meta."""

    device = META

    def __init__(self, accelerator):
        self._accelerator = accelerator

    def __getattr__(self, name):
        return getattr(self._accelerator, name)


@contextmanager
def job_on_meta(pipeline, network, size, **settings):
    """A training that was made ready on the CPU and then put on the meta device."""
    family = family_of(pipeline, network)
    config = dataclasses.replace(CONFIG, **{"train_batch_size": 2, "auto_beta": 0.3} | settings)
    with prepared_job(family, pairs_of(family, size), config) as job:
        model = job.model
        # some buffers are no part of the state
        home = [value.detach().clone() for value in (*model.parameters(), *model.buffers())]
        try:
            model.to(META)
            if job.auto_beta is not None:
                job.auto_beta.beta = job.auto_beta.beta.to(META)
            parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
            optimizer = torch.optim.AdamW(parameters.values(), lr=1e-3, foreach=False)
            accelerator = OnMeta(job.accelerator)
            yield dataclasses.replace(job, parameters=parameters, optimizer=optimizer, accelerator=accelerator)
        finally:
            model.to_empty(device="cpu")
            with torch.no_grad():
                for value, kept in zip((*model.parameters(), *model.buffers()), home, strict=True):
                    value.copy_(kept)


def step(job):
    """Two steps and their rows of the log, all without a value."""
    log = Log(job)
    for number in range(2):
        figures, norm = take_step(job, number)
        log.after_step(number, figures, norm)
        assert norm.device == META
    rows = [waiting.values(job.one_bucket) for waiting in log._waiting]
    assert rows and all(value.device == META for row in rows for value in row.values())
    assert all(value.device == META for value in job.parameters.values())


@pytest.fixture
def no_autocast(monkeypatch):
    """Let networks ask for autocast of this device, which torch has for none but real ones; Helios does."""
    autocast = torch.autocast

    def on_real_devices(device_type, *args, **named):
        return nullcontext() if device_type == "meta" else autocast(device_type, *args, **named)

    monkeypatch.setattr(torch, "autocast", on_real_devices)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow) if name == "TextToVideoSD" else name for name in [*TINY, *TINY_IMAGE]],
)
def test_a_step_reads_no_value_from_the_device(name, no_autocast):
    tiny = (TINY | TINY_IMAGE)[name]
    pipeline = tiny.build()
    for schedule, draws in (("batched", None), ("margin_first", 2)):
        settings = {"schedule": schedule, "reference_draws": draws, "gradient_checkpointing": "none"}
        with job_on_meta(pipeline, tiny.network, tiny.size, **settings) as job:
            step(job)


@pytest.mark.parametrize(
    "settings",
    [
        {"schedule": "batched", "reference_draws": 2},
        {"schedule": "margin_first", "reference_draws": None},
        {"gradient_checkpointing": "full", "gradient_accumulation_steps": 2},
        {"rank": 0, "reference_draws": 2},
        {"objective": "diffusion_kto", "auto_beta": None},
        {"objective": "mapo", "auto_beta": None},
    ],
)
def test_no_setting_reads_a_value(settings):
    with job_on_meta(tiny_wan(), None, (9, 32, 32), **settings) as job:
        step(job)


def test_the_device_shows_readings_and_tensors_elsewhere():
    with job_on_meta(tiny_wan(), None, (9, 32, 32)) as job:
        predict = job.family.predict

        def reading(model, noisy, t, conditions):
            return predict(model, noisy * float(t.max()), t, conditions)

        def elsewhere(model, noisy, t, conditions):
            return predict(model, noisy + torch.ones(noisy.shape), t, conditions)

        for wrong in (reading, elsewhere):
            job.family.predict = wrong
            with pytest.raises((RuntimeError, NotImplementedError)):
                take_step(job, 0)
