"""A training that is ready to run: model, what is trained, reference errors and plan, with all checks of the start."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from halo_fast import processes
from halo_fast.data import Pair
from halo_fast.errors import UserError, first_line
from halo_fast.export.lora import trained_values
from halo_fast.families import Denoiser, family_of
from halo_fast.files import hash_tensors
from halo_fast.loss.objectives import AutoBeta, Objective, PairObjective
from halo_fast.train.adapters import (
    ReferenceMode,
    check_adapted,
    reference_switch,
    started_at,
    trained_parameters,
)
from halo_fast.train.ahead import drawn_ahead, workers_for
from halo_fast.train.block_offload import check_offload
from halo_fast.train.config import TrainConfig
from halo_fast.train.draws import (
    Batch,
    Buckets,
    Draw,
    Drawn,
    Errors,
    check_pairs,
    draw_batch,
    draws_of_step,
    make_batch,
    place_batch,
    tell_noise,
    weights_at,
)
from halo_fast.train.launch import check_launch, own_accelerator, uses_fsdp
from halo_fast.train.model import prepared_model
from halo_fast.train.model_checks import check_network
from halo_fast.train.optimizers import check_optimizer, make_optimizer
from halo_fast.train.parallel import batches_of_process, broadcast_first, shard
from halo_fast.train.planner import Plan, make_plan
from halo_fast.train.reference_check import check_start
from halo_fast.train.references import check_reference_errors, reference_errors
from halo_fast.train.schedules import uses_reference
from halo_fast.train.setting_checks import build_auto_beta, check_trackers, checked_objective

__all__ = ["Job", "Progress", "prepared_job"]

Progress = Callable[[Iterable[int], int, str], Iterable[int]]


@dataclass
class Job:
    """A training that is ready to run: what every step uses.

    Args:
        family: of the model.
        model: the policy; inside `with reference_mode()`, the reference.
        reference_mode: the context in which the model is the reference.
        parameters: what is trained, by name.
        optimizer: of the parameters.
        accelerator: accelerate's, of this process.
        config: the settings.
        objective: the loss, with the betas of the settings.
        pairs: to train on.
        reference_errors: by pair and draw; None where the reference runs in the loop or is not used.
        plan: how steps are taken.
        auto_beta: adjusts the betas; None for constant ones.
        sharded: whether FSDP2 shards the model.
        start: hash of what the policy starts from; empty for the base.
        buckets: of the pairs.
        ahead: the batches of the steps to come, inside `reading_ahead`; None where each is made when it is needed.
    """

    family: Denoiser
    model: nn.Module
    reference_mode: ReferenceMode
    parameters: Mapping[str, Tensor]
    optimizer: torch.optim.Optimizer
    accelerator: Any
    config: TrainConfig
    objective: Objective
    pairs: Sequence[Pair]
    reference_errors: Errors | None
    plan: Plan
    auto_beta: AutoBeta | None
    sharded: bool
    start: str = ""
    buckets: Buckets = Buckets()
    ahead: Iterator[Drawn] | None = None

    @property
    def begins_apart(self) -> bool:
        """Whether the policy begins elsewhere than at its reference."""
        return bool(self.start) and self.config.reference == "base"

    @property
    def one_bucket(self) -> bool:
        """Whether all pairs have one latent shape and one grid."""
        return len(self.buckets.sizes) == 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files."""
        return bool(self.accelerator.is_main_process)

    def draws(self, step: int) -> Sequence[list[Draw]]:
        """The draws of each of this process's batches of a step."""
        config, world = self.config, self.accelerator.num_processes
        draws = draws_of_step(
            step, config.gradient_accumulation_steps * world, config.train_batch_size, self.buckets.of, config.seed,
            config.reference_draws or None,
        )  # fmt: skip
        return batches_of_process(draws, self.accelerator.process_index, world)

    def batches(self, step: int) -> Iterator[Batch]:
        """This process's batches of a step, on the device."""
        count = self.config.gradient_accumulation_steps
        for number in range(step * count, (step + 1) * count):
            drawn = self._draw(number) if self.ahead is None else next(self.ahead)
            yield place_batch(self.family, drawn, self.accelerator.device)

    @contextmanager
    def reading_ahead(self, steps: range) -> Iterator[None]:
        """Inside, `batches` must be asked for these steps in order; another process reads and draws them ahead.

        Raises:
            UserError: it has died.
        """
        count, device = self.config.gradient_accumulation_steps, self.accelerator.device
        numbers = range(steps.start * count, steps.stop * count)
        with drawn_ahead(self._draw, numbers, workers_for(self.pairs, device), device) as self.ahead:
            try:
                yield
            finally:
                self.ahead = None

    def _draw(self, number: int) -> Drawn:
        """This process's batch of a number, counted over all steps."""
        config = self.config
        step, place = divmod(number, config.gradient_accumulation_steps)
        return draw_batch(
            self.family, self.pairs, self.draws(step)[place], config.seed, limit=config.reference_draws or None,
            errors=self.reference_errors, own=config.noise == "own",
        )  # fmt: skip

    def current_objective(self) -> Objective:
        """The objective with the betas that are in use."""
        if self.auto_beta is None or not isinstance(self.objective, PairObjective):
            return self.objective
        ratio = self.auto_beta.beta / self.objective.video_beta
        patch_beta = None if self.objective.patch_beta is None else self.objective.patch_beta * ratio
        return replace(self.objective, video_beta=self.auto_beta.beta, patch_beta=patch_beta)


@contextmanager
def prepared_job(
    pipeline: Any,
    pairs: Sequence[Pair],
    config: TrainConfig,
    *,
    folder: Path | None = None,
    references: Path | None = None,
    progress: Progress = lambda iterable, total, label: iterable,
    start: Mapping[str, Tensor] | None = None,
) -> Iterator[Job]:
    """Check the settings and make everything ready; all is undone after the block.

    Args:
        pipeline: a diffusers pipeline or a `Denoiser`.
        pairs: to train on.
        config: the settings.
        folder: where trackers write; None for nowhere.
        references: where the reference's errors are kept; None keeps them in memory.
        progress: wraps the iterable of reference errors to compute, (iterable, total, label).
        start: the LoRA or weights that the policy starts from, as `Fit` has them; None for the pipeline as it is.

    Raises:
        UserError: a setting without a meaning, pairs or a start that do not fit, or a model that cannot be its own
            reference.
    """
    family = family_of(pipeline, config.network)
    check_network(family.transformer)
    # the pipeline may have got another network since the family was made
    family.adapt(family.transformer)
    buckets = check_pairs(family, pairs)
    if config.noise == "own" and isinstance(pairs, list | tuple):
        tell_noise([pair.seeds is not None for pair in pairs])
    objective = checked_objective(config)
    _check_times(family, config, buckets)
    _check_auto_beta(config, pairs)
    check_trackers(config.report_to)
    check_optimizer(config.optimizer)
    check_offload(config)
    check_launch(config, family.transformer)
    with ExitStack() as stack:
        accelerator = stack.enter_context(own_accelerator(config, folder))
        model: nn.Module = stack.enter_context(prepared_model(family.transformer, config, accelerator.device))

        def predict(batch: Batch) -> Tensor:
            # Autocast keeps copies of weights until its context ends, and the checks change weights between calls.
            with accelerator.autocast(), torch.no_grad():
                return family.predict(model, batch.noisy, batch.t, batch.conditions)

        limit, own = config.reference_draws or None, config.noise == "own"
        with _reference(family, config, start, accelerator.device):
            # one pair of each size shows that the network takes it; the largest is measured and checked
            for index in buckets.firsts():
                first = make_batch(family, pairs, [(index, 0)], config.seed, accelerator.device, limit=limit, own=own)
                base = _first_prediction(predict, first, index)
            errors = None
            if limit and uses_reference(objective):
                errors = _reference_errors(family, model, pairs, buckets, config, accelerator, references, progress)
                first = make_batch(
                    family, pairs, [(index, 0)], config.seed, accelerator.device, limit=limit, errors=errors, own=own
                )
            check_reference_errors(first, base, family.layout)
        parameters = stack.enter_context(_trained(family, config, accelerator.device))
        start = None if start is None else trained_values(family, parameters, start, config)
        if config.target_modules:
            check_adapted(lambda: predict(first), model, config)
        broadcast_first(parameters.values())
        sharded = accelerator.num_processes > 1 and uses_fsdp()
        plan = make_plan(family, model, parameters, first, objective, config, accelerator, sharded=sharded)
        _check_passes(plan, buckets, config, sharded)
        if sharded:
            shard(model, accelerator.device)
            parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
        reference_mode = stack.enter_context(reference_switch(model, parameters, config, start))
        optimizer = make_optimizer(parameters.values(), config.optimizer, config.learning_rate, fused=True)
        job = Job(
            family, model, reference_mode, parameters, optimizer, accelerator, config,
            objective, pairs, errors, plan, build_auto_beta(config, objective, accelerator.device), sharded,
            hash_tensors(dict(sorted(start.items())))[:16] if start else "", buckets,
        )  # fmt: skip
        check_start(
            predict, reference_mode, parameters, family.layout, first, base, objective, _rounding(config, base.dtype),
            begins_apart=job.begins_apart,
        )  # fmt: skip
        yield job


def _check_times(family: Denoiser, config: TrainConfig, buckets: Buckets) -> None:
    """Raise if `time_weights` are 0 at every time that this network is trained at."""
    if config.time_weights is None:
        return
    u = torch.linspace(0, 1 - 1e-6, 257)
    times = torch.cat([family.timesteps(u, shape) for shape, _ in buckets.sizes])
    if not weights_at(times, config.time_weights).any():
        raise UserError(
            f"train.time_weights: {config.time_weights} are 0 at all times of this network, {times.min():.3g} to "
            f"{times.max():.3g}; give one of these a weight above 0"
        )


def _check_auto_beta(config: TrainConfig, pairs: Sequence[Pair]) -> None:
    """Raise if there is no video preference whose logit could adjust beta."""
    if config.auto_beta is None:
        return
    rewards = (pairs[index].video_rewards for index in range(len(pairs)))
    if not any(bool((one[0] - one[1]).abs() > 0) for one in rewards):
        raise UserError(
            "train.auto_beta: adjusts the betas by the videos' logits, and no pair has video rewards that differ; set "
            "null"
        )


def _check_passes(plan: Plan, buckets: Buckets, config: TrainConfig, sharded: bool) -> None:
    """Raise if shards would make different numbers of passes through the network, in each of which they wait.

    Raises:
        UserError: it is so, for a short batch of margin_first makes fewer passes than a full one.
    """
    if sharded and plan.schedule == "margin_first" and config.train_batch_size > 1 and len(buckets.sizes) > 1:
        raise UserError(
            f"train.train_batch_size: FSDP2 and margin_first on pairs of {len(buckets.sizes)} sizes expect 1, got "
            f"{config.train_batch_size}; set 1, or schedule batched"
        )


@contextmanager
def _trained(family: Denoiser, config: TrainConfig, device: torch.device) -> Iterator[dict[str, Tensor]]:
    """What is trained, by name, on the device."""
    with trained_parameters(family, config) as parameters:
        for value in parameters.values():  # a LoRA is made where its layer's weight waits
            value.data = value.data.to(device)
        yield dict(parameters)


@contextmanager
def _reference(
    family: Denoiser, config: TrainConfig, start: Mapping[str, Tensor] | None, device: torch.device
) -> Iterator[None]:
    """Inside, the model is the reference: as it is, or with what the policy starts from."""
    if start is None or config.reference == "base":
        yield
        return
    with (
        _trained(family, config, device) as parameters,
        started_at(parameters, trained_values(family, parameters, start, config)),
    ):
        yield


def _first_prediction(predict: Callable[[Batch], Tensor], batch: Batch, index: int) -> Tensor:
    """The base's prediction of a pair; one line if the network does not take a batch of these shapes."""
    try:
        prediction = predict(batch)
        if prediction.shape != batch.target.shape:
            raise ValueError(f"its prediction is {list(prediction.shape[1:])}")
        return prediction
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, ValueError) as error:
        given = {"latents": batch.noisy, **batch.conditions}
        shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in given.items())
        pair = f"pair {index}" if index else "the first pair"
        raise UserError(
            f"pairs: the network does not take {pair}, {shapes} ({first_line(error)}); were its latents and prompts "
            "cached with this model?"
        ) from error


def _reference_errors(
    family: Denoiser,
    model: nn.Module,
    pairs: Sequence[Pair],
    buckets: Buckets,
    config: TrainConfig,
    accelerator: Any,
    folder: Path | None,
    progress: Progress,
) -> Errors:
    """The reference's errors at the settings' draws, computed by all processes together."""

    def wait() -> None:
        processes.wait()  # as long as a file takes, which may be more than accelerate's own time-out
        accelerator.wait_for_everyone()

    return reference_errors(
        family, model, pairs, config.seed, config.reference_draws or 0, device=accelerator.device,
        batch_size=config.train_batch_size, autocast=accelerator.autocast,
        precision=f"{config.mixed_precision} {next(model.parameters()).dtype}", folder=folder,
        progress=progress if accelerator.is_main_process else _silent,
        share=(accelerator.process_index, accelerator.num_processes), wait=wait, own=config.noise == "own",
        buckets=buckets.of,
    )  # fmt: skip


def _silent(iterable: Iterable[int], total: int, label: str) -> Iterable[int]:
    return iterable


def _rounding(config: TrainConfig, dtype: torch.dtype) -> float:
    """Largest rounding of a prediction, as a share of its norm; compiled blocks are another graph for each state."""
    precision = torch.bfloat16 if config.mixed_precision == "bf16" else dtype
    return (1000 if config.compile else 32) * torch.finfo(precision).eps
