"""All that others may know of the demo: names and where they lead; see `halo_fast.registry`."""

__all__ = ["TABLES"]

TABLES: dict[str, dict[str, str]] = {
    "teacher": {"demo": "halo_fast.demo.teacher:load_teacher"},
    "recipe": {"demo": "halo_fast.demo:RECIPE"},
}
