"""All that others may know of the demo: names and where they lead; see `halo_fast.registry`."""

__all__ = ["TABLES"]

TABLES: dict[str, dict[str, str]] = {
    "recipe": {"demo": "halo_fast.demo:RECIPE"},
    "model": {"demo:graded": "halo_fast.demo.models:GRADED", "demo:patchy": "halo_fast.demo.models:PATCHY"},
    "prompts": {
        "demo:train": "halo_fast.demo.world:train_prompts",
        "demo:heldout": "halo_fast.demo.world:heldout_prompts",
    },
}
