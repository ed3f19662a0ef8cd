"""What multiplies an error gap: conventions of beta, weights by timestep, and a beta that adapts."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from halo_fast.loss.inputs import check_choice, check_number, describe

__all__ = ["AutoBeta", "convert_beta", "timestep_weight"]

_CONVENTIONS = ("half_mean", "mean", "half_sum", "sum")


def convert_beta(beta: float, source: str, target: str = "half_mean", num_elements: int | None = None) -> float:
    """A beta of one convention in another, so that beta times the error gap is the same logit.

    A convention says what beta multiplies: "half_mean" (beta/2 times a mean squared error: here, Diffusion-DPO,
    VideoDPO, LocalDPO), "mean" (DenseDPO, VideoGPA, diffusers' SD script), "half_sum" (SimpleTuner's default), "sum".

    Args:
        beta: above 0.
        source: convention of ``beta``.
        target: convention of the result.
        num_elements: elements of one sample's latent, C F H W; needed between a mean and a sum.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    check_choice("source", source, _CONVENTIONS)
    check_choice("target", target, _CONVENTIONS)
    check_number("beta", beta, above=0.0)

    def factor(convention: str) -> float:
        half = 0.5 if convention.startswith("half") else 1.0
        if source.endswith("sum") == target.endswith("sum"):
            return half
        if num_elements is None or num_elements < 1:
            raise ValueError(f"num_elements must be the latent's C*F*H*W between a mean and a sum; got {num_elements}")
        return half * (num_elements if convention.endswith("sum") else 1)

    return beta * factor(source) / factor(target)


def timestep_weight(head: str, space: str, signal: Tensor, noise: Tensor, maximum: float = 100.0) -> Tensor:
    """kappa [B] that turns the squared error of the model's ``head`` into that of ``space``, clipped at ``maximum``.

    With x_t = signal x0 + noise eps: |eps error|^2 = signal^2 |v error|^2 and |x0 error|^2 = noise^2 |v error|^2, for
    the variance-preserving v = signal eps - noise x0 (signal^2 = abar) as for the flow's eps - x0 (signal 1-t, noise
    t).

    Args:
        head: what the model predicts: "epsilon", "sample", "v_prediction" or "flow". The last two are the v error of
            their own schedule.
        space: whose error is wanted, one of the same.
        signal: [B], float, coefficient at each sample's timestep, computed before any cast to bf16.
        noise: [B], likewise.
        maximum: clips weights that diverge at the ends of the schedule.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    names = ("epsilon", "sample", "v_prediction", "flow")
    check_choice("head", head, names)
    check_choice("space", space, names)
    for name, value in (("signal", signal), ("noise", noise)):
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise TypeError(f"{name} must be a float tensor, the coefficient at each timestep; got {describe(value)}")
    if head == space:
        return torch.ones_like(signal)  # at the ends of the schedule the quotient would be 0 / 0
    factor = {"epsilon": signal.square(), "sample": noise.square()}
    one = torch.ones_like(signal)
    return (factor.get(space, one) / factor.get(head, one)).clamp(max=maximum)


class AutoBeta:
    """Adapts beta until the mean gradient factor sigma(-|z|) of the labelled logits is ``target``.

    ``update`` multiplies beta by exp(rate (mean sigma(-|z|) - target)). The mean is taken over all ranks when
    torch.distributed is initialised, so every rank has the same beta. ``beta`` is a 0-d float32 tensor:
    GranDPO(video_beta=auto.beta) never compiles again, and nothing here waits for the device.

    Args:
        initial: first beta.
        target: mean gradient factor, between 0 and 1/2.
        rate: step size.
        minimum: lower bound of beta.
        maximum: upper bound of beta.
        device: of beta.

    Raises:
        TypeError, ValueError: naming the argument.
    """

    def __init__(
        self,
        initial: float = 500.0,
        target: float = 0.2,
        rate: float = 0.1,
        minimum: float = 1.0,
        maximum: float = 20000.0,
        device: torch.device | str = "cpu",
    ) -> None:
        for name, value in {"initial": initial, "target": target, "rate": rate, "minimum": minimum}.items():
            check_number(name, value, above=0.0)
        if not (target < 0.5 and minimum <= initial <= maximum):
            raise ValueError(
                f"target must be below 1/2 and minimum <= initial <= maximum; got target {target}, minimum {minimum}, "
                f"initial {initial}, maximum {maximum}"
            )
        self.target, self.rate, self.minimum, self.maximum = target, rate, minimum, maximum
        self.beta = torch.tensor(float(initial), device=device)

    @torch.no_grad()
    def update(self, logits: Tensor, labelled: Tensor | None = None) -> None:
        """Move beta after a step with these logits (``out.video_logits`` or ``out.patch_logits``).

        NaN logits are left out: the loss shows a broken step, and beta must survive it.

        Args:
            logits: any shape.
            labelled: of the same shape, not 0 where there is a preference and 0 for a tie. None takes logits of exactly
                0 for ties, which is right for ``out.video_logits`` after the first step.
        """
        labelled = ((logits if labelled is None else labelled) != 0) & ~logits.isnan()
        factor = torch.sigmoid(-logits.abs().float())
        sums = torch.stack([torch.where(labelled, factor, 0.0).sum(), labelled.sum().float()])
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(sums)
        mean = sums[0] / sums[1].clamp(min=1)
        step = torch.where(sums[1] > 0, self.rate * (mean - self.target), 0.0).to(self.beta.device)
        self.beta = (self.beta * step.exp()).clamp(self.minimum, self.maximum)

    def state_dict(self) -> dict[str, Tensor]:
        """Beta, for a checkpoint."""
        return {"beta": self.beta.detach().clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore beta from ``state_dict``."""
        self.beta = state["beta"].to(self.beta)
