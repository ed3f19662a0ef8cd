"""Memory and work of a training step, predicted from a network's configuration: nothing is loaded or computed.

The real step runs on tensors that have shapes and no values (torch's FakeTensorMode), with few of the network's blocks.
All blocks of a kind are alike, so bytes and operations are linear in their number, and two numbers give the line.
"""

import copy
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from halo_fast.errors import UserError, first_line
from halo_fast.families import Denoiser, Family
from halo_fast.families.base import repeated_blocks
from halo_fast.families.quantization import quantized_bytes, quantized_layers
from halo_fast.loss.backends import using_backend
from halo_fast.loss.functional import patch_weighted_mse
from halo_fast.loss.objectives import Objective
from halo_fast.train.adapters import reference_switch, trained_parameters
from halo_fast.train.block_offload import check_offload, waiting_bytes
from halo_fast.train.config import TrainConfig
from halo_fast.train.devices import Device, fits
from halo_fast.train.draws import Batch
from halo_fast.train.job import Job
from halo_fast.train.memory import offloaded
from halo_fast.train.model import prepared_model
from halo_fast.train.optimizers import moment_bytes
from halo_fast.train.planner import Plan
from halo_fast.train.schedules import uses_reference
from halo_fast.train.setting_checks import checked_objective
from halo_fast.train.steps import run_batch

__all__ = [
    "SUPERVISED",
    "Option",
    "Step",
    "cheapest",
    "predict_autoencoder",
    "predict_forward",
    "predict_options",
    "predict_step",
]

_ATEN = torch.ops.aten
# torch's formulas of operations, and the attention of CPUs, which has none there
_FORMULAS: dict[Any, Callable[..., int]] = flop_registry | {
    _ATEN._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(
        q.shape, k.shape, v.shape
    ),
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: lambda grad, q, k, v, *_, **__: (
        sdpa_backward_flop_count(grad.shape, q.shape, k.shape, v.shape)
    ),
}
# The settings that diffusers' networks give the number of their blocks by.
_DEPTHS = ("num_layers", "num_single_layers", "num_visual_blocks")
SUPERVISED = "supervised"
"""The schedule that stands for fine-tuning: forward and backward of one clip a pair with a squared error."""


@dataclass(frozen=True)
class Step:
    """What a training step needs on the device, in bytes, and its work.

    Args:
        weights: of the network, with what is trained.
        training: gradients and the optimizer's two moments.
        activations: most that else is there at once.
        flops: floating-point operations of matrix products, convolutions and attention for one batch.
        trained: of what is trained alone.
    """

    weights: int
    training: int
    activations: int
    flops: int
    trained: int = 0

    @property
    def peak(self) -> int:
        """Predicted bytes in all."""
        return self.weights + self.training + self.activations


def predict_step(
    family: Denoiser,
    latents: Sequence[int],
    grid: Sequence[int],
    conditions: Mapping[str, Tensor],
    config: TrainConfig,
    dtype: torch.dtype,
    schedule: str,
    *,
    exact: bool = False,
    quantization: str | None = None,
) -> Step:
    """Predict one training step of a schedule; the network's weights may be on the meta device and are not read.

    Kernels are those of the CPU without compilation. Compiled blocks need less.

    Args:
        family: of the network.
        latents: shape of one clip's latents.
        grid: patches [f, h, w] of the labels.
        conditions: of the longest prompt, without the batch's dimension.
        config: the settings; their schedule is not read.
        dtype: in which the weights are loaded.
        schedule: "batched", "margin_first" or `SUPERVISED`.
        exact: run all blocks instead of few; minutes for large networks.
        quantization: of the frozen weights. They count as they are stored, and once more as they are computed with;
            the step is that of the network as it is without.

    Raises:
        UserError: a network that cannot run without values, or settings that do not fit it.
    """
    objective = checked_objective(config)
    check_offload(config, quantization)
    network: Any = family.transformer
    trials = [{}] if exact else _depths(network)
    found = [
        _trial(family, depths, latents, grid, conditions, config, objective, dtype, schedule, quantization)
        for depths in trials
    ]
    whole = {name: network.config[name] for name in trials[0]}
    weights, trained, moments, *peaks, flops = _extrapolated(trials, found, whole)
    static = trained if _gradients_wait(config, schedule) else 0
    # without gradients that wait, those of all blocks are part of what the end of the backward pass holds
    most = max(peaks) + static - trained + _computed_with(network, dtype, quantization, config.gradient_checkpointing)
    if config.offload_blocks:
        waiting, block = _travelling(network, dtype, quantization)
        weights -= waiting - block
    return Step(weights, moments + trained, most, flops, trained)


def _travelling(network: nn.Module, dtype: torch.dtype, quantization: str | None) -> tuple[int, int]:
    """Bytes of the weights that wait in the CPU's memory, and of the block that has them on the device."""
    base: nn.Module = _on_meta(network, dtype, {}).requires_grad_(False)
    few = {id(base.get_submodule(name).weight) for name in quantized_layers(base)} if quantization else set()
    return waiting_bytes(base, lambda value: -(-value.numel() // 2) if id(value) in few else _size(value))


def _computed_with(network: nn.Module, dtype: torch.dtype, quantization: str | None, checkpointing: str) -> int:
    """Bytes of quantised weights in the precision in which layers compute: most that is there at once.

    bitsandbytes makes them for a layer at a time. torchao keeps them until the backward pass has used them: of a block
    where it is recomputed, of all blocks where it is not.
    """
    if not quantization:
        return 0
    wanted = set(quantized_layers(network))
    sizes: dict[nn.Module, int] = {network.get_submodule(name): 0 for name in wanted}
    for layer in sizes:
        weight: Any = layer.weight
        sizes[layer] = weight.numel() * dtype.itemsize
    if quantization.startswith("bnb"):
        return max(sizes.values(), default=0)
    if checkpointing == "none":
        return sum(sizes.values())
    blocks = repeated_blocks(network)
    return max((sum(sizes.get(layer, 0) for layer in block.modules()) for block in blocks), default=0)


def predict_forward(
    family: Denoiser, latents: Sequence[int], conditions: Mapping[str, Tensor], dtype: torch.dtype, count: int = 1
) -> tuple[int, int]:
    """Bytes beside the weights, and operations, of one forward pass without a graph.

    Args:
        family: of the network.
        latents: shape of one clip's latents.
        conditions: of the longest prompt, without the batch's dimension.
        dtype: of the weights.
        count: clips in the batch.
    """
    network: Any = family.transformer
    trials = _depths(network)

    def trial(depths: Mapping[str, int]) -> tuple[int, int]:
        small = _with_network(family, _on_meta(network, dtype, depths))
        with _without_values(small.transformer):
            batch = _batch(latents, (1, 1, 1), conditions, count).select(slice(0, count))
            known = [*small.transformer.parameters(), *small.transformer.buffers()]
            with torch.no_grad(), _Watch(known) as watch:
                small.predict(small.transformer, batch.noisy, batch.t, batch.conditions)
            return watch.peak, watch.flops

    whole = {name: network.config[name] for name in trials[0]}
    peak, flops = _extrapolated(trials, [trial(depths) for depths in trials], whole)
    return peak, flops


def predict_autoencoder(family: Family, latents: Sequence[int], dtype: torch.dtype) -> int:
    """Bytes beside its weights that the autoencoder needs to decode one clip.

    Args:
        family: whose autoencoder it is.
        latents: shape of the clip's latents.
        dtype: of the weights.
    """
    frames = (latents[1], latents[0]) if family.layout == "BFCHW" else (latents[0], latents[1])
    vae = _on_meta(family.vae, dtype, {})
    other: Any = copy.copy(family)
    other.pipeline = _Pipeline(family.pipeline, "vae", vae)
    with _without_values(vae), torch.no_grad(), _Watch([*vae.parameters(), *vae.buffers()]) as watch:
        other.decode_clip(torch.empty(1, *frames, *latents[2:], dtype=dtype))
    return watch.peak


@dataclass(frozen=True)
class Option:
    """Settings of a training and what a step needs with them.

    Args:
        schedule: "batched", "margin_first" or `SUPERVISED`.
        checkpointing: "none", "selective" or "full".
        offload: whether activations wait in the CPU's memory.
        step: predicted.
    """

    schedule: str
    checkpointing: str
    offload: bool
    step: Step

    @property
    def settings(self) -> str:
        """The settings as the command line takes them."""
        offload = " --train.offload_activations true" if self.offload else ""
        return f"--train.schedule {self.schedule} --train.gradient_checkpointing {self.checkpointing}{offload}"


def predict_options(
    family: Denoiser,
    latents: Sequence[int],
    grid: Sequence[int],
    conditions: Mapping[str, Tensor],
    config: TrainConfig,
    dtype: torch.dtype,
    choices: Sequence[tuple[str, str, bool]] | None = None,
    quantization: str | None = None,
) -> list[Option]:
    """What a training step needs with each schedule and checkpointing mode that this model and objective allow.

    Args:
        family: of the network.
        latents: shape of one clip's latents.
        grid: patches [f, h, w] of the labels.
        conditions: of the longest prompt, without the batch's dimension.
        config: all other settings.
        dtype: of the weights.
        choices: schedule, checkpointing and offload of each option; None for all.
        quantization: of the frozen weights.
    """
    network: Any = family.transformer
    modes = ["none"]
    if hasattr(network, "enable_gradient_checkpointing") and getattr(network, "_supports_gradient_checkpointing", True):
        modes += ["selective", "full"]
    if config.offload_blocks:
        modes.remove("none")
    objective = checked_objective(config)
    if choices is None and objective.anchor_weight:  # its gradient is no function of patch errors
        choices = [(schedule, mode, False) for schedule in ("batched", SUPERVISED) for mode in modes]
        choices.append(("batched", modes[-1], True))
    derived = choices is None
    if choices is None:
        choices = [(schedule, mode, False) for schedule in ("batched", "margin_first") for mode in modes]
        choices.append(("margin_first", modes[-1], True))
    found = []
    for schedule, mode, offload in choices:
        checkpointing: Any = mode
        settings = replace(config, gradient_checkpointing=checkpointing, offload_activations=offload)
        step = predict_step(family, latents, grid, conditions, settings, dtype, schedule, quantization=quantization)
        found.append(Option(schedule, mode, offload, step))
    if derived:
        forward = predict_forward(family, latents, conditions, dtype)[1]
        forward *= 1 if config.reference_draws or not uses_reference(objective) else 2
        found[-1:-1] = [
            _fine_tuning(option, forward, config.train_batch_size)
            for option in found
            if option.schedule == "margin_first" and not option.offload
        ]
    return found


def _fine_tuning(option: Option, forward: int, pairs: int) -> Option:
    """Fine-tuning on one clip a pair, one at a time: a sample's own passes of margin_first, without its margin."""
    sample = option.step.flops // (2 * pairs) - forward
    return Option(SUPERVISED, option.checkpointing, False, replace(option.step, flops=pairs * sample))


def cheapest(options: Sequence[Option], device: Device) -> Option | None:
    """The option of least work that fits onto a device, offloaded ones last; None if none fits."""
    fitting = [
        option
        for option in options
        if option.schedule != SUPERVISED
        and fits(device, option.step.weights, option.step.training + option.step.activations)
    ]
    return min(fitting, key=lambda option: (option.offload, option.step.flops), default=None)


def _depths(network: Any) -> list[dict[str, int]]:
    """The numbers of blocks that are tried, then one more of each kind in turn.

    Of a single kind there are three at first: the last block may keep less than those before, whose outputs are all
    used, and the first one ends the backward pass.
    """
    config = getattr(network, "config", {})
    names = [name for name in _DEPTHS if isinstance(config.get(name), int) and config[name] > 3]
    if not names or not hasattr(network, "from_config"):
        return [{}]
    few = 3 if len(names) == 1 and config[names[0]] > 4 else 2
    base = dict.fromkeys(names, few)
    return [base, *(base | {name: few + 1} for name in names)]


def _extrapolated(
    trials: Sequence[Mapping[str, int]], found: Sequence[Sequence[int]], whole: Mapping[str, int]
) -> list[int]:
    """The figures of the whole network from those of few blocks, each linear in the number of blocks of a kind."""
    first = found[0]
    values = list(first)
    for depths, figures in zip(trials[1:], found[1:], strict=True):
        (name,) = (name for name in depths if depths[name] != trials[0][name])
        more = whole[name] - trials[0][name]
        values = [value + more * (new - old) for value, new, old in zip(values, figures, first, strict=True)]
    return values


def _trial(
    family: Denoiser,
    depths: Mapping[str, int],
    latents: Sequence[int],
    grid: Sequence[int],
    conditions: Mapping[str, Tensor],
    config: TrainConfig,
    objective: Objective,
    dtype: torch.dtype,
    schedule: str,
    quantization: str | None,
) -> tuple[int, ...]:
    """Bytes of weights, of what is trained and its moments, of the rest at three peaks, and operations, of few blocks.

    The peaks are those of the forward passes, of the backward pass until it reaches the first block, and after that.
    Each is linear in the number of blocks, and the largest of them is not: the first grows with the activations of each
    block and, under autocast, with the copies of its weights; the second with its activations, the third with its
    gradients.
    """
    with ExitStack() as stack:
        small = _with_network(family, _on_meta(family.transformer, dtype, depths))
        base = quantized_bytes(small.transformer, quantization) if quantization else None
        prepared = replace(config, compile=False, schedule="auto", attention_backend=None, offload_blocks=False)
        model = stack.enter_context(prepared_model(small.transformer, prepared, torch.device("meta")))
        stack.enter_context(trained_parameters(small, prepared))
        stack.enter_context(_without_values(model))
        parameters: dict[str, Tensor] = {name: value for name, value in model.named_parameters() if value.requires_grad}
        trained = sum(_size(value) for value in parameters.values())
        moments = moment_bytes(parameters.values(), config.optimizer)
        weights = sum(_size(value) for value in model.parameters()) if base is None else base + trained
        reference = stack.enter_context(reference_switch(model, parameters, prepared))
        # one sample follows the other in margin_first, so one pair shows what any number needs
        pairs = config.train_batch_size if schedule != "margin_first" else 1
        batch = _batch(latents, grid, conditions, pairs)
        inputs = sum(_size(value) for value in _tensors(batch)) * config.train_batch_size // pairs
        if _gradients_wait(config, schedule):
            for value in parameters.values():
                value.grad = torch.empty_like(value)
        uses = uses_reference(objective)
        if config.reference_draws and uses:
            batch = replace(batch, reference_error=torch.empty(2 * pairs, *grid))
        cached = bool(config.reference_draws) or not uses
        job = _job(small, model, parameters, reference, prepared, schedule, objective, cached)
        known = [*model.parameters(), *model.buffers(), *_tensors(batch)]
        known += [value.grad for value in parameters.values() if value.grad is not None]
        with _Watch(known) as watch, _watched_block(model, watch):
            job.accelerator.backward = watch.backward
            _RUNS[schedule](job, batch)
        work = watch.flops * (2 * config.train_batch_size if schedule == "margin_first" else 1)
        return weights, trained, moments, *(inputs + peak for peak in watch.peaks), work


def _gradients_wait(config: TrainConfig, schedule: str) -> bool:
    """Whether there are gradients before some of a step's backward passes."""
    return schedule == "margin_first" or config.gradient_accumulation_steps > 1


def _one_sample(job: Job, batch: Batch) -> None:
    """What margin_first does with each sample: its margin, and the reference's, then the sample's own backward pass."""
    sample = batch.select(slice(0, 1))

    def policy() -> Tensor:
        with job.accelerator.autocast(), job.plan.activations():
            return job.family.predict(job.model, sample.noisy, sample.t, sample.conditions)

    with torch.no_grad():
        policy()
        if job.reference_errors is None:
            with job.reference_mode():
                policy()
    coefficients = torch.empty_like(sample.patch_rewards)
    job.accelerator.backward(patch_weighted_mse(policy(), sample.target, coefficients, job.family.layout))


def _supervised(job: Job, batch: Batch) -> None:
    """Forward and backward of the winners' squared error, as fine-tuning does."""
    half = batch.select(slice(0, len(batch.t) // 2))
    with job.accelerator.autocast(), job.plan.activations():
        prediction = job.family.predict(job.model, half.noisy, half.t, half.conditions)
    job.accelerator.backward((prediction.float() - half.target).square().mean())


def _job(
    family: Denoiser,
    model: Any,
    parameters: Mapping[str, Tensor],
    reference: Any,
    config: TrainConfig,
    schedule: str,
    objective: Objective,
    cached: bool,
) -> Job:
    """A job whose steps run, without an optimizer; its accelerator has what a batch uses."""

    def autocast() -> Any:
        return torch.autocast("cpu", torch.bfloat16) if config.mixed_precision == "bf16" else nullcontext()

    accelerator = SimpleNamespace(autocast=autocast, backward=torch.Tensor.backward, device=torch.device("cpu"))
    # the CPU's memory is another device's here, so that what waits there does not count
    context = (lambda: offloaded(model, "meta")) if config.offload_activations else nullcontext
    plan = Plan(schedule, context, {}, "")
    optimizer: Any = None
    return Job(
        family, model, reference, parameters, optimizer, accelerator, config, objective, [],
        torch.empty(0) if cached else None, plan, None, False,
    )  # fmt: skip


def _on_meta(module: nn.Module, dtype: torch.dtype, depths: Mapping[str, int]) -> Any:
    """A copy on the meta device, in the precision in which diffusers loads it; with other numbers of blocks."""
    if depths:
        from accelerate import init_empty_weights

        kind: Any = type(module)
        with init_empty_weights():
            copied = kind.from_config(module.config, **depths)
    else:
        tensors = [*module.parameters(), *module.buffers()]
        copied = copy.deepcopy(module, {id(value): value for value in tensors})
    single = getattr(module, "_keep_in_fp32_modules", None) or ()
    for place, part in copied.named_modules():
        for name, value in part._parameters.items():
            if value is not None:
                kept = any(word in f"{place}.{name}".split(".") for word in single)
                empty = torch.empty(value.shape, dtype=torch.float32 if kept else dtype, device="meta")
                part._parameters[name] = nn.Parameter(empty)
        for name, value in part._buffers.items():
            part._buffers[name] = None if value is None else value.to("meta")
    return copied.eval()


_RUNS: dict[str, Callable[[Job, Batch], object]] = {
    "batched": run_batch, "margin_first": _one_sample, SUPERVISED: _supervised,
}  # fmt: skip


@contextmanager
def _without_values(module: nn.Module) -> Iterator[None]:
    """Inside the block all new tensors have no values, and neither have the module's, on the CPU instead of meta."""
    places: list[tuple[Any, str, Tensor]] = [
        (tensors, name, value)
        for part in module.modules()
        for tensors in (part._parameters, part._buffers)
        for name, value in tensors.items()
        if value is not None
    ]
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), using_backend("reference"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of kernels, none of which runs
            for tensors, name, value in places:
                empty = torch.empty(value.shape, dtype=value.dtype, device="cpu")
                is_parameter = isinstance(value, nn.Parameter)
                tensors[name] = nn.Parameter(empty, value.requires_grad) if is_parameter else empty
            yield
    except (RuntimeError, TypeError, NotImplementedError) as error:
        raise UserError(
            f"plan: {type(module).__name__} cannot be run without values ({first_line(error)}); measure it with "
            "halo train CONFIG --dry-run"
        ) from error
    finally:
        for tensors, name, value in places:
            tensors[name] = value


def _with_network(family: Denoiser, network: nn.Module) -> Denoiser:
    """The family with another network."""
    other = copy.copy(family)
    other.pipeline = _Pipeline(family.pipeline, family.network, network)
    if other.transformer is not network:
        raise UserError(
            f"plan: {type(family).__name__}.transformer is not its pipeline's {family.network}, so it cannot be "
            "predicted; measure it with halo train CONFIG --dry-run"
        )
    other.adapt(network)
    return other


class _Pipeline:
    """A pipeline with another network."""

    def __init__(self, pipeline: Any, name: str, network: nn.Module) -> None:
        self._pipeline = pipeline
        setattr(self, name, network)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pipeline, name)


def _batch(latents: Sequence[int], grid: Sequence[int], conditions: Mapping[str, Tensor], pairs: int) -> Batch:
    count = 2 * pairs
    given = {name: torch.ones(count, *value.shape, dtype=value.dtype) for name, value in conditions.items()}
    return Batch(
        torch.empty(count, *latents), torch.empty(count, *latents), torch.empty(count), given,
        torch.empty(count, *grid), torch.empty(count),
    )  # fmt: skip


def _tensors(batch: Batch) -> list[Tensor]:
    return [value for value in (*vars(batch).values(), *batch.conditions.values()) if isinstance(value, Tensor)]


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


class _Watch(TorchDispatchMode):
    """Counts operations, and the bytes of all storages that are alive on the CPU and were not there before.

    Args:
        known: tensors that were there before.
    """

    def __init__(self, known: Sequence[Tensor]) -> None:
        super().__init__()
        self.level = self.flops = 0
        self.peaks = [0, 0, 0]  # forward passes, backward pass until the first block, after that
        self._phase = 0
        self._prompts = _FullPrompts()
        self._alive: dict[int, Any] = {}
        self._known = [value.untyped_storage() for value in known]  # kept, so that their addresses are not reused
        self._known_addresses = {storage._cdata for storage in self._known}

    @property
    def peak(self) -> int:
        """Bytes at the largest of the peaks."""
        return max(self.peaks)

    def backward(self, loss: Tensor) -> None:
        """Run a backward pass; what follows is counted apart from the forward passes."""
        self._begin(1)
        loss.backward()

    def first_block(self) -> None:
        """The backward pass has reached the first block."""
        self._begin(2)

    def _begin(self, phase: int) -> None:
        self._phase = max(self._phase, phase)
        self.peaks[self._phase] = max(self.peaks[self._phase], self.level)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "prim":
            return func(*args, **(kwargs or {}))
        output = self._prompts.call(func, args, kwargs or {})
        formula = _FORMULAS.get(getattr(func, "_overloadpacket", None))
        if formula is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=output)
        if not isinstance(output, Tensor | tuple | list):
            return output
        aliased = {value.untyped_storage()._cdata for value in _flat((args, kwargs or {}))}
        for value in _flat(output):
            self._count(value, aliased)
        return output

    def _count(self, tensor: Tensor, aliased: set[int]) -> None:
        storage = tensor.untyped_storage()
        address = storage._cdata
        if tensor.device.type != "cpu" or address in self._alive or address in self._known_addresses:
            return
        if address in aliased:  # it was there before
            self._known.append(storage)
            self._known_addresses.add(address)
            return
        size = storage.nbytes()
        self._alive[address] = weakref.ref(storage, lambda _: self._freed(address, size))
        self.level += size
        self.peaks[self._phase] = max(self.peaks[self._phase], self.level)

    def _freed(self, address: int, size: int) -> None:
        self._alive.pop(address, None)
        self.level -= size


def _flat(value: Any) -> Iterator[Tensor]:
    """The tensors inside nested lists, tuples and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _flat(item)
    elif isinstance(value, dict):
        yield from _flat(list(value.values()))


@contextmanager
def _watched_block(model: nn.Module, watch: _Watch) -> Iterator[None]:
    """Tell `watch` when the backward pass reaches the first of the repeated blocks."""
    blocks = repeated_blocks(model)
    lists = [part for part in model.children() if isinstance(part, nn.ModuleList) and any(b in blocks for b in part)]
    if not lists:
        yield
        return

    def forward(module: nn.Module, args: Any, output: Any) -> None:
        for value in _flat(output):
            if value.requires_grad:
                value.register_hook(lambda gradient: watch.first_block())
                return

    hook = lists[0][0].register_forward_hook(forward)
    try:
        yield
    finally:
        hook.remove()


class _FullPrompts:
    """Answers questions about values: all prompts have their full length, no picture came, and nothing is wrong."""

    def __init__(self) -> None:
        # by the id of the result, which is kept alive so that its id stays its own
        self._results: dict[int, tuple[Any, Tensor]] = {}

    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        """What an operator gives, where that depends on values; else its own result."""
        if func is _ATEN._local_scalar_dense.default and args[0].dtype in (torch.bool, torch.float32):
            return args[0].dtype == torch.bool and self._is_result(args[0], _ATEN.all.default)
        if func is _ATEN.nonzero.default:
            return args[0].new_zeros(args[0].numel(), args[0].ndim, dtype=torch.long)
        if func is _ATEN.index.Tensor and any(index is not None and index.dtype == torch.bool for index in args[1]):
            value, (mask,) = args
            count = 0 if self._is_result(mask, _ATEN.bitwise_not.default) else mask.numel()
            return value.flatten(0, mask.ndim - 1)[:count].clone()
        output = func(*args, **kwargs)
        if func in (_ATEN.bitwise_not.default, _ATEN.all.default):
            self._results[id(output)] = func, output
        return output

    def _is_result(self, tensor: Tensor, func: Any) -> bool:
        return self._results.get(id(tensor), (None,))[0] is func
