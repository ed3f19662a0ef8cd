"""How many cached draws of the reference does training need? The demo with K draws a pair and with fresh ones.

    python -m benchmarks.reference_draws runs/demo --seeds 2

takes the pairs of a finished demo run and prints a Markdown table. It measures on prompts of the training split that
have no pairs, never on the held-out ones.
"""

import argparse
import sys
import time
from dataclasses import replace

from halo_fast.agreement.arms import severity_mitigated
from halo_fast.data import CachedPairs
from halo_fast.data.prompts import read_prompts
from halo_fast.demo import world
from halo_fast.demo.meters import DefectMeter, FidelityMeter
from halo_fast.families import Family, load
from halo_fast.families.sampling import clip_seed, sample_clips
from halo_fast.pipeline.arguments import load_config
from halo_fast.pipeline.config import Config
from halo_fast.pipeline.run import Run
from halo_fast.train import fit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", help="a run directory of the demo with pairs, cache")
    parser.add_argument("--draws", type=int, nargs="*", default=[1, 4, 16, 0], help="0 for fresh draws")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--num-prompts", type=int, default=32)
    arguments = parser.parse_args()
    config = load_config("demo", {"output_dir": arguments.run})
    run = Run(config)
    family, pairs = (
        load(config.pretrained_model_name_or_path, device="cpu"),
        CachedPairs(run.require("pairs/pairs.parquet"), run.require("cache")),
    )
    meters = DefectMeter.load(), FidelityMeter.load()
    clean = float(meters[0](*world.clean_clips(64, config.seed, split="train"))[0].mean())
    first = config.generate.num_prompts or 0
    prompts = read_prompts("demo:train", first + arguments.num_prompts, config.seed)[first:]
    base, base_fidelity = _measure(config, family, meters, prompts)
    print("| reference | mitigated, % | fidelity, % | seconds of training |\n|---|---|---|---|", flush=True)
    print(f"| base | 0 | {100 * base_fidelity:.0f} | |", flush=True)
    for draws in arguments.draws:
        mitigated, fidelity, seconds = [], [], []
        for seed in range(arguments.seeds):
            started = time.perf_counter()
            result = fit(family, pairs, replace(config.train, seed=seed, reference_draws=draws or None))
            seconds.append(time.perf_counter() - started)
            family.load_lora(result.lora)
            try:
                severity, correct = _measure(config, family, meters, prompts)
            finally:
                family.unload_lora()
            mitigated.append(severity_mitigated(base, severity, clean))
            fidelity.append(correct)
            print(draws, seed, mitigated[-1], fidelity[-1], seconds[-1], file=sys.stderr, flush=True)
        name = f"K = {draws}" if draws else "fresh draws, in the loop"
        cells = [", ".join(f"{100 * value:.0f}" for value in values) for values in (mitigated, fidelity)]
        print(f"| {name} | {cells[0]} | {cells[1]} | {sum(seconds) / len(seconds):.0f} |", flush=True)


def _measure(
    config: Config, family: Family, meters: tuple[DefectMeter, FidelityMeter], prompts: list[str]
) -> tuple[float, float]:
    """Mean severity and share of clips that show what the prompt says."""
    seeds = [clip_seed(config.seed, index, -1) for index in range(len(prompts))]
    _, videos = sample_clips(family, prompts, seeds, config.generate)
    severity, _ = meters[0](videos, prompts)
    return float(severity.mean()), float(meters[1](videos, prompts)["fidelity_correct"].mean())


if __name__ == "__main__":
    main()
