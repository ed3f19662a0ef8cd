"""Commands whose stages are noted instead of run, and commands that are refused."""

from halo_fast import registry
from halo_fast.pipeline import cli


def replace_stages(monkeypatch, stand_in):
    """Let `stand_in(target)` stand for the function of every stage."""
    load = registry.load
    monkeypatch.setattr(registry, "load", lambda target: stand_in(target) if ".stages." in target else load(target))


NEEDED = {
    "pretrained_model_name_or_path": "model",
    "prompts": "prompts.txt",
    "evaluation_prompts": "heldout.txt",
    "annotate.teacher": "human:anna",
}


def refuse(capsys, *arguments) -> str:
    """The one line with which a command is refused."""
    assert cli.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("halo: error: ") and err.count("\n") == 1
    return err
