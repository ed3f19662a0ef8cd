"""The names under which the demo registers, and what they stand for; see `halo_fast.registry`."""

__all__ = ["TABLES"]

TABLES: dict[str, dict[str, str]] = {
    "command": {"demo compare": "compare", "demo pretrain": "halo_fast.demo.pretrain:pretrain"},
    "command help": {"demo pretrain": "halo_fast.demo:PRETRAIN_HELP"},
    "comparison": {
        "graded": "halo_fast.demo.comparison:GRADED",
        "patchy": "halo_fast.demo.comparison:PATCHY",
        "gpt-like": "halo_fast.demo.comparison:GPT_LIKE",
    },
    "judge": {"demo": "halo_fast.demo.judge:detectors"},
    "meter": {"demo": "halo_fast.demo.meters:WorldMeter"},
    "model": {"demo:graded": "halo_fast.demo.models:GRADED", "demo:patchy": "halo_fast.demo.models:PATCHY"},
    "prompts": {
        "demo:train": "halo_fast.demo.world:train_prompts",
        "demo:heldout": "halo_fast.demo.world:heldout_prompts",
    },
    "recipe": {"demo": "halo_fast.demo:RECIPE"},
    "reward evaluation": {"demo": "halo_fast.demo.planted:evaluate"},
    "reward examples": {"demo": "halo_fast.demo.examples:examples"},
    "teacher": {"demo": "halo_fast.demo.teacher:load_teacher"},
}
