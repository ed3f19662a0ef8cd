"""The table of docs/families.md: what each family does, by its own functions, and a round trip of its LoRA.

python -m benchmarks.families            # writes the table between its marks in docs/families.md
"""

import sys
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor

from halo_fast.data import Pair
from halo_fast.errors import UserError
from halo_fast.families import Family, family_of
from halo_fast.files import write_bytes
from halo_fast.train import fit
from halo_fast.train.config import TrainConfig

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs" / "families.md"
MARKS = "<!-- python -m benchmarks.families -->\n", "<!-- end -->\n"
PROMPTS = ["a red ball rolls left", "a cube"]
HEADER = (
    "model", "diffusers pipeline", "trained", "layout", "target", "time given to the network", "t at u = 0, 1/2, 1",
    "frames", "sides", "LoRA on", "prefix", "parameters", "loss after 3 steps", "LoRA loaded against B A by hand",
)  # fmt: skip


def main() -> None:
    """Write the table."""
    sys.path.insert(0, str(ROOT / "tests" / "support"))
    from tiny import TINY, TINY_IMAGE

    torch.set_num_threads(1)
    lines = ["| " + " | ".join(HEADER) + " |", "|" + "---|" * len(HEADER)]
    for name, tiny in (TINY | TINY_IMAGE).items():
        lines.append("| " + " | ".join(row(name, tiny)) + " |")
        print(lines[-1], flush=True)
    lines.append(f"\nMade with diffusers {diffusers.__version__} and torch {torch.__version__}, on random weights.\n")
    before, _, rest = DOCS.read_text().partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    write_bytes(DOCS, (before + MARKS[0] + "\n".join(lines) + MARKS[1] + after).encode())


def row(name: str, tiny: Any) -> list[str]:
    """One line of the table."""
    from tiny import tiny_conditions

    family = family_of(tiny.build(), tiny.network)
    shape = family.latent_shape(*tiny.size)
    times = family.timesteps(torch.tensor([0.0, 0.5, 1.0]), shape)
    conditions = tiny_conditions(family, PROMPTS, tiny.size)
    loss, difference = round_trip(family, tiny, shape, conditions)
    return [
        name, type(family.pipeline).__name__, f"`{family.network}`", family.layout, target(family, shape),
        given_time(family, shape, family.stack(conditions[:1])),
        ", ".join(f"{value:.3g}" for value in times.tolist()), frames(family, tiny.size),
        f"{sides(family, tiny.size)}", " ".join(f"`{layer}`" for layer in family.lora_targets),
        f"`{family.lora_prefix}`", f"{sum(weight.numel() for weight in family.transformer.parameters()):,}",
        f"{loss:.4f}", f"{difference:.0e}",
    ]  # fmt: skip


def target(family: Family, shape: tuple[int, ...]) -> str:
    """The target's coefficients of eps and x_0 at t = 0.5, in words."""
    t, one, nothing = torch.tensor([0.5]), torch.ones(1, *shape), torch.zeros(1, *shape)
    noise, clean = (family.target(*sides, t).mean().item() for sides in ((nothing, one), (one, nothing)))
    a, s = (family.add_noise(*sides, t).mean().item() for sides in ((one, nothing), (nothing, one)))
    known = {
        "eps - x0": (1, -1),
        "x0 - eps": (-1, 1),
        "eps": (1, 0),
        "x0": (0, 1),
        "v = a eps - s x0": (a, -s),
    }
    return next(
        word for word, (of_noise, of_clean) in known.items() if abs(noise - of_noise) + abs(clean - of_clean) < 1e-5
    )


class _Called(Exception):
    pass


def given_time(family: Family, shape: tuple[int, ...], conditions: dict[str, Tensor]) -> str:
    """The timestep given to the network at t = 0.25, as a formula."""

    def network(*arguments: Tensor, **named: Tensor) -> None:
        raise _Called(named["timestep"] if "timestep" in named else arguments[1])

    try:
        family.predict(network, torch.zeros(1, *shape), torch.tensor([0.25]), conditions)  # type: ignore[arg-type]
    except _Called as called:
        (value,) = called.args
    words = {250.0: "1000 t", 750.0: "1000 (1 - t)", 0.25: "t"}[value.flatten()[-1].item()]
    words += {1: "", 2: " of each token", 5: " of each frame"}[value.ndim]
    words += ", 0 in the first frame" if value.flatten()[0] == 0 else ""
    return words if value.is_floating_point() else f"step {words}"


def _makes(family: Family, size: tuple[int, int, int]) -> bool:
    try:
        family.latent_shape(*size)
    except UserError:
        return False
    return True


def frames(family: Family, size: tuple[int, int, int]) -> str:
    """The frame rule, found by trying."""
    step = next(step for step in range(1, 33) if _makes(family, (1 + step, *size[1:])))
    if not _makes(family, (1, *size[1:])):
        assert [count for count in range(1, 100) if _makes(family, (count, *size[1:]))] == [1 + step]
        return f"{1 + step}"
    most = (family.largest[0] or 40) if step == 1 else 40  # latent frames are frames there
    assert all(_makes(family, (count, *size[1:])) == (count % step == 1 % step) for count in range(1, most))
    return "any" if step == 1 else f"{step}k + 1"


def sides(family: Family, size: tuple[int, int, int]) -> int:
    """What height and width must be divisible by, found by trying."""
    return next(side for side in range(1, 129) if _makes(family, (size[0], side, side)))


def round_trip(
    family: Family, tiny: Any, shape: tuple[int, ...], given: list[dict[str, Tensor]]
) -> tuple[float, float]:
    """Loss of the third training step; largest difference of outputs, LoRA loaded against added to the weights."""
    from tiny import begun

    draw = torch.Generator().manual_seed(0)
    pairs = [
        Pair(
            latents=begun(torch.randn(2, *shape, generator=draw), conditions),
            conditions=conditions,
            patch_rewards=torch.rand(2, 2, 2, 2, generator=draw) * 4 + 1,
            video_rewards=torch.rand(2, generator=draw) * 4 + 1,
        )
        for conditions in given
    ]
    config = TrainConfig(
        objective={"preset": "halo_sft", "video_beta": 100.0, "patch_beta": 10.0}, max_train_steps=3,
        train_batch_size=2, gradient_accumulation_steps=1, rank=4, lora_alpha=4, learning_rate=1e-2, lr_warmup_steps=0,
        gradient_checkpointing="none", mixed_precision="no",
    )  # fmt: skip
    result = fit(family, pairs, config)
    loaded, by_hand = (family_of(tiny.build(), tiny.network) for _ in range(2))
    loaded.load_lora(result.lora)
    weights = by_hand.transformer.state_dict()
    for name, up in result.lora.items():
        if ".lora_B." in name:
            layer = name.removeprefix(f"{family.lora_prefix}.").replace(".lora_B", "")
            weights[layer] += up @ result.lora[name.replace(".lora_B.", ".lora_A.")]
    noisy = torch.randn(2, *shape, generator=draw)
    conditions, t = family.stack(given), torch.tensor([0.3, 0.9])
    with torch.no_grad():
        first, second = (own.predict(own.transformer, noisy, t, conditions) for own in (loaded, by_hand))
    return result.log[-1]["loss"], (first - second).abs().max().item()


if __name__ == "__main__":
    main()
