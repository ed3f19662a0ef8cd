"""A preference loss of your own in thirty lines: the kernels, the trainer and its two schedules take it as it is.

    python examples/own_objective.py

An objective turns patch errors into a loss and its derivative with respect to each patch's error. This one is the loss
of IPO on patches, written by hand: mean over the labelled patches of (z_p - 1)^2, z_p = scale s_p (d_p(b) - d_p(a)).
"""

from dataclasses import dataclass

import torch

from halo_fast import gran_dpo
from halo_fast.loss.objectives import Inputs, Objective, Table


@dataclass(frozen=True)
class PatchIPO(Objective):
    """(z_p - 1)^2 of every labelled patch."""

    scale: float = 10.0
    labels = frozenset({"patch"})  # what it needs

    def table(self, inputs: Inputs) -> Table:
        log_ratio = inputs.log_ratio()  # E_p(reference) - E_p(policy), [2B, f, h, w]
        a, b = log_ratio.chunk(2)
        sign = self.preferences(inputs).patch  # [B, f, h, w]: 1 where a wins, -1 where b does, 0 for a tie
        assert sign is not None  # because `labels` asks for patch rewards
        z = self.scale * sign * (a - b)
        labelled = (sign != 0).to(z.dtype)
        active = labelled.flatten(1).any(1).to(z.dtype)
        share = labelled / labelled.flatten(1).sum(1).clamp(min=1)[:, None, None, None] / active.sum().clamp(min=1)
        slope = -2 * share * (z - 1) * self.scale * sign  # d loss / d E_p of a; of b it is the opposite
        return Table(
            (share * (z - 1) ** 2).sum(), torch.cat([slope, -slope]), z.new_zeros(len(z)), z, active, log_ratio
        )


def main(steps: int = 30, learning_rate: float = 0.05) -> list[float]:
    """Pull a prediction towards the better patches; the losses are returned."""
    generator = torch.Generator().manual_seed(0)
    target, reference = (torch.randn(4, 4, 3, 8, 8, generator=generator) for _ in range(2))
    rewards = torch.randint(1, 6, (4, 3, 2, 2), generator=generator).float()
    policy = reference.clone().requires_grad_()
    optimiser = torch.optim.Adam([policy], lr=learning_rate)
    losses = []
    for step in range(steps):
        out = gran_dpo(policy, target, reference, rewards, objective=PatchIPO())
        optimiser.zero_grad()
        out.loss.backward()
        optimiser.step()
        losses.append(out.loss.item())
        if step % 10 == 0:
            print(f"step {step}: loss {losses[-1]:.4f}, accuracy {out.metrics()['patch/accuracies']:.2f}")
    print("in training, from this folder: halo train my.yaml --train.objective.preset own_objective:PatchIPO")
    return losses


if __name__ == "__main__":
    main()
