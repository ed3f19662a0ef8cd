"""The error of the logit in the arithmetic of public training code and in ours; writes docs/numerics.md.

python -m benchmarks.numerics
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from halo_fast import GranDPO, gran_dpo, using_backend

SHAPE = (16, 13, 60, 90)  # CogVideoX, 49 frames of 480 x 720: 1,123,200 elements
ERROR = 0.3  # mean squared error of a trained model's prediction
CHANGE = 1e-3  # relative change of that error between policy and reference, opposite in the two samples
BETAS = (500.0, 2000.0, 5000.0)
DRAWS = 3

TEXT = """# Numerics

What a logit is worth in several arithmetics. Made by `python -m benchmarks.numerics`; do not edit by hand.

Setting: predictions in bfloat16, as a mixed-precision training step has them, on latents of {shape} (CogVideoX). The
mean squared error is about {error}. Policy and reference are near each other: their errors differ by about
{change:.1%}, in opposite directions for the two samples of a pair. There is one pair, the whole video is one group,
and {draws} draws are made. Truth is float64 on the same bfloat16 inputs. Largest absolute error of the logit over the
draws:

{table}

- *all in model dtype*: errors squared and averaged in bfloat16 for policy and reference
  (`(pred - target).pow(2).mean()` on bfloat16 tensors).
- *fp32 policy, bf16 reference*: the mixed-precision wrapper upcasts the policy's prediction; the error of the
  reference, which is not wrapped, is averaged in bfloat16.
- *fp32 mean minus mean*: everything is upcast, then two mean errors are subtracted.
- *ours*: bfloat16 inputs are read as they are, and (o - o_ref)(o + o_ref - 2 tau) is summed in float32.

At policy = reference, where every logit must be exactly 0:

{start}

Why: bfloat16 numbers near 0.3 are 2^-9 apart. A mean error rounded to them moves a logit in steps of beta/2 * 2^-9,
which is 0.5, 2.0 and 4.9 for the three betas, whatever the data say. A mean error in float32 loses digits too, because
two nearly equal numbers cancel.

The rest of the contract:

- Sums are taken in float64 if prediction or target is float64, else in float32.
- Prediction and target may have different dtypes; neither is rounded. The reference must have the prediction's dtype.
- The gradient is rounded once, to the prediction's dtype.
- softplus and sigmoid are evaluated in forms that stay finite for |z| up to 1e6.
- Sums over elements are ordered: the same inputs on the same device give the same bits.
"""


def draw(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """(policy, reference, target), bfloat16 [2, C, F, H, W]: sample a's error falls by CHANGE, sample b's rises."""
    generator = torch.Generator().manual_seed(seed)
    target, residual, step = torch.randn(3, 2, *SHAPE, generator=generator)
    reference = target + ERROR**0.5 * residual
    sign = torch.tensor([-1.0, 1.0])[:, None, None, None, None]
    # half of the change along the residual, plus a change of direction that is not
    policy = target + ERROR**0.5 * (residual * (1 + sign * CHANGE / 2) + 0.01 * step)
    return policy.bfloat16(), reference.bfloat16(), target.bfloat16()


def mean_errors(policy: Tensor, reference: Tensor, target: Tensor) -> Tensor:
    """(E_a - E_b) - (E_ref,a - E_ref,b) as training scripts write it, in the dtypes given."""
    policy_error = (policy - target).pow(2).mean(dim=[1, 2, 3, 4])
    reference_error = (reference - target).pow(2).mean(dim=[1, 2, 3, 4])
    return (policy_error[0] - policy_error[1]) - (reference_error[0] - reference_error[1])


def mixed(policy: Tensor, reference: Tensor, target: Tensor) -> Tensor:
    """The policy's error in float32, the reference's in bfloat16."""
    policy_error = (policy.float() - target.float()).pow(2).mean(dim=[1, 2, 3, 4])
    reference_error = (reference - target).pow(2).mean(dim=[1, 2, 3, 4])
    return (policy_error[0] - policy_error[1]) - (reference_error[0] - reference_error[1])


def ours(policy: Tensor, reference: Tensor, target: Tensor) -> Tensor:
    """The same difference read back from gran_dpo's logit at beta 2, where it is -D."""
    objective = GranDPO(video_beta=2.0)
    return -gran_dpo(policy, target, reference, None, torch.tensor([1.0, 0.0]), objective=objective).video_logits[0]


ARITHMETICS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "all in model dtype (bf16)": mean_errors,
    "fp32 policy, bf16 reference": mixed,
    "fp32 mean minus mean": lambda *tensors: mean_errors(*(x.float() for x in tensors)),
    "ours: bf16 in, factored, fp32 sums": ours,
}


def largest_errors(same: bool) -> tuple[dict[str, list[float]], list[float]]:
    """Largest |logit - truth| of each arithmetic at each beta, and the largest true logits; ``same``: o = o_ref."""
    errors = {name: [0.0] * len(BETAS) for name in ARITHMETICS}
    sizes = [0.0] * len(BETAS)
    for seed in range(DRAWS):
        policy, reference, target = draw(seed)
        policy = reference.clone() if same else policy
        truth = mean_errors(policy.double(), reference.double(), target.double())
        for name, difference in ARITHMETICS.items():
            found = difference(policy, reference, target).double()
            for column, beta in enumerate(BETAS):
                # training code multiplies in the dtype it has; the product itself is not what errs
                errors[name][column] = max(errors[name][column], (0.5 * beta * (found - truth)).abs().item())
                sizes[column] = max(sizes[column], (0.5 * beta * truth).abs().item())
    return errors, sizes


def markdown(errors: dict[str, list[float]], sizes: list[float] | None) -> str:
    """The table of one setting."""
    lines = ["| arithmetic | " + " | ".join(f"beta {beta:g}" for beta in BETAS) + " |", "|---|" + "---:|" * len(BETAS)]
    if sizes:
        lines.append("| (largest true logit) | " + " | ".join(f"({size:.2g})" for size in sizes) + " |")
    for name, row in errors.items():
        lines.append(f"| {name} | " + " | ".join("0" if value == 0 else f"{value:.1e}" for value in row) + " |")
    return "\n".join(lines)


def main() -> None:
    """Compute the tables and write them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "docs" / "numerics.md")
    output: Path = parser.parse_args().output
    with using_backend("reference"):
        errors, sizes = largest_errors(same=False)
        start, _ = largest_errors(same=True)
    if max(errors["ours: bf16 in, factored, fp32 sums"]) >= 1e-3:
        raise SystemExit(f"our logit errs by 1e-3 or more: {errors}")
    shape = " x ".join(map(str, SHAPE))
    page = TEXT.format(
        shape=shape, error=ERROR, change=CHANGE, draws=DRAWS, table=markdown(errors, sizes), start=markdown(start, None)
    )
    output.write_text(page)
    print(page)


if __name__ == "__main__":
    main()
