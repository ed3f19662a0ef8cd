"""Bytes of losses and of training steps: what the graph keeps for backward, and the most that is there at once.

Nothing here depends on how busy the machine is. "predicted bytes" is what the trainer's plan says of a step beyond
weights and moments.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from benchmarks import LATENTS
from benchmarks.cases import loss as losses
from benchmarks.cases import step as steps
from benchmarks.harness import Bench, Case


def peak_bytes(run: Callable[[], object]) -> int:
    """Most bytes that the allocator had handed out at once during a call, beyond those before."""
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(profile_memory=True) as profile:
        run()
    level = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            level += event.nbytes()
            peak = max(peak, level)
    return peak


def saved_bytes(run: Callable[[], object], inputs: tuple[Tensor, ...]) -> int:
    """Bytes of storage that the graph keeps for backward beside the inputs, each storage once."""
    known = {x.untyped_storage().data_ptr() for x in inputs}
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        run()
    return sum(kept.values())


@contextmanager
def loss_opened(latent: str, dtype: torch.dtype) -> Iterator[Bench]:
    """The "halo" losses on one latent."""
    torch.compiler.reset()
    providers, data = losses.available("halo"), losses.inputs(LATENTS[latent], dtype)
    errors = losses.gate(providers, losses.eager, data)

    def run(provider: str) -> None:
        torch.autograd.grad(providers[provider](*data), data[0])

    def count(provider: str) -> dict[str, float]:
        return {
            "saved bytes": saved_bytes(lambda: providers[provider](*data), data),
            "peak bytes": peak_bytes(partial(run, provider)),
        }

    yield Bench({provider: partial(run, provider) for provider in providers}, lambda: errors, count)


@contextmanager
def step_opened(model: str, checkpointing: str) -> Iterator[Bench]:
    """The steps of one model, with what the trainer predicts of its own."""
    with steps.setting(model, checkpointing, compiled=False) as bench:
        errors = steps.gate(bench) if checkpointing == "none" else {}
        runs = steps.steps(checkpointing, compiled=False)
        predicted = steps.predicted_bytes(bench)

        def count(provider: str) -> dict[str, float]:
            counts: dict[str, float] = {"peak bytes": peak_bytes(partial(runs[provider], bench))}
            return counts | ({"predicted bytes": predicted[provider]} if provider in predicted else {})

        def run(provider: str) -> None:
            runs[provider](bench)

        yield Bench({provider: partial(run, provider) for provider in runs}, lambda: errors, count)


CASES = [
    *(
        Case(
            "memory", f"halo {latent} {dtype}", tuple(losses.LOSSES["halo"]),
            partial(loss_opened, latent, getattr(torch, dtype)), slow=latent not in losses.QUICK, timed=False,
        )
        for latent in ("cogvideox", "wan", "wan-720p", "ltx", "videocrafter2")
        for dtype in ("float32", "bfloat16")
    ),
    *(
        Case(
            "memory", f"{model} {checkpointing}", tuple(steps.steps(checkpointing, compiled=False)),
            partial(step_opened, model, checkpointing), slow=(model, checkpointing) != ("wan", "none"), timed=False,
        )
        for model in steps.MODELS
        for checkpointing in ("none", "full")
    ),
]  # fmt: skip
