"""The command line: `halo VERB [CONFIG.yaml] [--section.setting value ...]`."""

import errno
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halo_fast.errors import UserError
from halo_fast.files import versions
from halo_fast.pipeline.config import Config, to_yaml
from halo_fast.pipeline.run import Run

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

__all__ = ["main"]

# verb: module, function, what it does; in the order of a run
_ROOT = "halo_fast.pipeline.stages"
_STAGES = {
    "generate": (f"{_ROOT}.generate", "generate", "sample candidates of every prompt"),
    "annotate": (f"{_ROOT}.annotate", "annotate", "have a teacher score videos and patches"),
    "reward": (f"{_ROOT}.reward", "train_reward", "train the reward model on the teacher's scores"),
    "score": (f"{_ROOT}.score", "score", "reward all candidates and their patches"),
    "pairs": (f"{_ROOT}.pairs", "build_pairs", "build preference pairs out of the scored candidates"),
    "cache": (f"{_ROOT}.cache", "build_cache", "keep latents and text embeddings for training"),
    "train": (f"{_ROOT}.train", "train", "align the model on the pairs: LoRA and Gran-DPO"),
    "evaluate": (
        f"{_ROOT}.evaluate",
        "evaluate",
        "compare base and aligned model on held-out prompts",
    ),
    "report": ("halo_fast.pipeline.report", "write_report", "write the HTML page of the run"),
}
_DEMO = {
    "pretrain": ("halo_fast.demo.pretrain", "pretrain", "train the demo's base model anew"),
    "compare": ("halo_fast.pipeline.compare", "compare", "align by every method and tabulate the results"),
}
# verbs about a run that are no stages of it; they take its settings and their own
_ASIDES = {
    "label": ("halo_fast.pipeline.label", "label", "serve a page on which people score the candidates"),
    "agreement": ("halo_fast.pipeline.agreement", "agreement", "compare teachers, people and the reward model"),
}
_REWARD_EVAL = (
    "halo_fast.pipeline.agreement",
    "reward_eval",
    "agreement of a reward model with people's labels, beside baselines",
)
_EXPORT = ("halo_fast.pipeline.export", "export_run", "write a run's LoRA for diffusers or ComfyUI")
_USERS_ERRNO = {errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.ENOSPC, errno.EDQUOT, errno.EROFS}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 2 for a user's mistake (one line on stderr), 130 when interrupted.

    Args:
        arguments: words after `halo`; those of the process by default.
    """
    try:
        _dispatch(list(sys.argv[1:] if arguments is None else arguments))
    except UserError as error:
        return _refuse(str(error))
    except OSError as error:
        if error.errno not in _USERS_ERRNO:
            raise
        return _refuse(f"{error.filename}: {error.strerror}")
    except ModuleNotFoundError as error:
        if (error.name or "halo_fast").split(".")[0] == "halo_fast":
            raise
        return _refuse(f"{error.name} is not installed; pip install 'halo_fast[all]'")
    except KeyboardInterrupt:
        print("halo: interrupted; the same command continues", file=sys.stderr)
        return 130
    return 0


def _refuse(message: str) -> int:
    print(f"halo: error: {' '.join(message.split())}", file=sys.stderr)
    return 2


def _dispatch(arguments: list[str]) -> None:
    verb, *rest = arguments or ["--help"]
    if verb in ("-h", "--help"):
        print(_overview())
    elif verb == "--version":
        print(versions()["halo_fast"])
    elif verb == "doctor":
        _doctor(rest)
    elif verb == "demo":
        _demo(rest)
    elif verb == "export":
        print(_call("halo export", *_EXPORT, rest))
    elif verb == "run":
        _stages(verb, list(_STAGES), "run all stages, one after another", rest)
    elif (verb, *rest[:1]) == ("reward", "eval"):
        _call("halo reward eval", *_REWARD_EVAL, rest[1:])
    elif verb in _ASIDES:
        _aside(verb, rest)
    elif verb in _STAGES:
        _stages(verb, [verb], _STAGES[verb][2], rest)
    else:
        known = [*_STAGES, "run", *_ASIDES, "export", "doctor", "demo"]
        raise UserError(f"unknown verb {verb!r}; expected one of {', '.join(known)}")


def _overview() -> str:
    stages = "\n".join(f"  {verb:<16}{text}" for verb, (_, _, text) in _STAGES.items())
    asides = "\n".join(f"  {verb:<16}{text}" for verb, (_, _, text) in _ASIDES.items())
    demos = "\n".join(f"  {'demo ' + verb:<16}{text}" for verb, (_, _, text) in _DEMO.items())
    return (
        "usage: halo VERB [CONFIG.yaml] [--section.setting value ...] [--print-config] [--force]\n\n"
        f"stages of a run, prompts in, LoRA and report out:\n{stages}\n\n  {'run':<16}all stages, one after another\n\n"
        f"others:\n  {'reward eval':<16}{_REWARD_EVAL[2]}\n{asides}\n  {'export RUN':<16}{_EXPORT[2]}\n"
        f"  {'doctor':<16}versions and compute backends of this machine\n{demos}\n\n"
        "Finished stages are kept, unfinished ones continue. `halo VERB --help` lists the settings."
    )


def _load(module: str, function: str) -> Callable[..., Any]:
    return getattr(import_module(module), function)


def _stages(verb: str, names: Sequence[str], description: str, arguments: list[str]) -> None:
    parser = _parser(f"halo {verb}", description)
    parser.usage = f"halo {verb} [CONFIG.yaml] [--section.setting value ...] [--print-config] [--force]"
    parser.add_argument("--force", action="store_true", help="Redo what was finished before.")
    parser.add_argument("--print-config", action="store_true", help="Print all settings as YAML and stop.")
    if verb == "train":
        parser.add_argument("--dry-run", action="store_true", help="Print plan, memory and time of a step and stop.")
    config, settings = _settings(parser, arguments)
    if settings.print_config:
        print(to_yaml(config), end="")
        return
    run = Run(config, force=settings.force)
    if verb == "train" and settings.dry_run:
        _load(f"{_ROOT}.train", "dry_run")(config, run)
        return
    if verb == "run":
        _check(config, run)
    for name in names:
        module, function, _ = _STAGES[name]
        _load(module, function)(config, run)


def _aside(verb: str, arguments: list[str]) -> None:
    module, name, description = _ASIDES[verb]
    function, parser = _load(module, name), _parser(f"halo {verb}", description)
    parser.usage = f"halo {verb} [CONFIG.yaml] [--section.setting value ...]"
    own = parser.add_function_arguments(function, skip={"config"})
    config, settings = _settings(parser, arguments)
    function(config, **{key: settings[key] for key in own})


def _settings(parser: "ArgumentParser", arguments: list[str]) -> tuple[Config, "Namespace"]:
    """The settings of a run, and beside them the parser's other arguments."""
    parser.add_class_arguments(Config)
    if arguments and not arguments[0].startswith("-"):
        arguments = ["--config", *arguments]
    settings = _parse(parser, arguments)
    try:
        settings = parser.instantiate(settings)
        return Config(**{field.name: settings[field.name] for field in fields(Config)}), settings
    except ValueError as error:
        raise UserError(str(error)) from None


def _check(config: Config, run: Run) -> None:
    """Find before hours of work the mistakes that only a late stage would meet."""
    from halo_fast.data.prompts import read_prompts
    from halo_fast.pipeline.stages.annotate import load_teacher
    from halo_fast.pipeline.stages.evaluate import evaluation_meter, evaluation_prompts
    from halo_fast.teachers import LabelStore

    prompts = read_prompts(config.prompts, config.generate.num_prompts, config.seed)
    evaluation_meter(config, evaluation_prompts(config), run.path / "reward")
    if not (
        run.path / "annotate" / "manifest.json"
    ).exists():  # what is annotated needs no teacher any more, and no key
        with LabelStore(Path(":memory:")) as store:
            load_teacher(config, store, prompts=prompts)


def _demo(arguments: list[str]) -> None:
    verb, *rest = arguments or [""]
    if verb not in _DEMO:
        raise UserError(f"halo demo: unknown verb {verb!r}; expected one of {', '.join(_DEMO)}")
    _call(f"halo demo {verb}", *_DEMO[verb], rest)


def _call(program: str, module: str, name: str, description: str, arguments: list[str]) -> Any:
    """The function's result with its parameters from the command line."""
    function = _load(module, name)
    parser = _parser(program, description)
    parser.add_function_arguments(function, as_positional=True)
    settings = _parse(parser, arguments)
    settings.pop("config")
    return function(**settings.as_dict())


def _doctor(arguments: list[str]) -> None:
    if arguments:
        raise UserError(f"halo doctor takes no arguments, got {' '.join(arguments)!r}")
    from halo_fast.loss import backends

    for package, found in versions().items():
        print(f"{package:<14}{found}")
    print()
    print(backends.report())


def _parser(program: str, description: str) -> "ArgumentParser":
    from jsonargparse import ActionConfigFile, ArgumentParser

    parser = ArgumentParser(
        prog=program, description=description, exit_on_error=False, allow_abbrev=False, print_config=None
    )
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file; the word --config may be left out.")
    return parser


def _parse(parser: "ArgumentParser", arguments: list[str]) -> "Namespace":
    """The parsed settings; jsonargparse's errors become a UserError of one line."""
    from jsonargparse import ArgumentError

    file = arguments[1] if arguments[:1] == ["--config"] and arguments[1:] else ""
    place = f"{file}: " if file else ""
    try:
        if file:
            # alone first, so that its mistakes are told under its name
            parser.parse_args(arguments[:2])
            place = ""
        return parser.parse_args(arguments)
    except (ArgumentError, ValueError) as error:
        message = re.sub(r'Parser key "([\w.]+)"', r"\1", str(error)).removeprefix("config: ")
        message = re.sub(r"<class '(\w+)'>", r"\1", message).replace('in "<unicode string>", ', "")
        raise UserError(f"{place}{message}; `{parser.prog} --help` lists the settings") from None
