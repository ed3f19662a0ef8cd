"""The command line: `halo VERB [CONFIG.yaml or RECIPE] [--section.setting value ...]`."""

import errno
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from halo_fast import processes, registry
from halo_fast.errors import UserError
from halo_fast.files import versions
from halo_fast.pipeline.stages import STAGES, run_stage

__all__ = ["main"]

_SOURCES = "[SOURCE ...] "
_SETTINGS = "[CONFIG.yaml or RECIPE] [--section.setting value ...]"
_USERS_ERRNO = {errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.ENOSPC, errno.EDQUOT, errno.EROFS}


class Verb(NamedTuple):
    """A command: the function that parses its arguments, its target "module:function" and one line of help."""

    read: Callable[[str, "Verb", list[str]], None]
    target: str
    help: str


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: words after `halo`; those of the process by default.

    Returns:
        The exit code: 0, 2 for a user's mistake (one line on stderr), 130 when interrupted.
    """
    _log_to_stderr()
    if "" not in sys.path:
        sys.path.append("")  # the current folder, where modules of one's own are; last, so that they hide nothing
    try:
        processes.join()
        if not processes.is_first():
            _be_quiet()
        _dispatch(list(sys.argv[1:] if arguments is None else arguments))
        processes.leave()
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
        if processes.speaks():
            print("halo: interrupted; the same command continues", file=sys.stderr)
        return 130
    return 0


def _be_quiet() -> None:
    """Leave what is printed, logged and warned of to the first process, which does the same."""
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")


class _Stderr(logging.Handler):
    """Plain messages on whatever sys.stderr is when they come."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr, flush=True)


# they warn while they are imported of what this machine or another version lacks, whether it is used or not
_WARNING_AT_IMPORT = (
    "torchao", "torch.utils._pytree", "bitsandbytes.backends.cpu.ops", "diffusers.quantizers.torchao.torchao_quantizer"
)  # fmt: skip


def _log_to_stderr() -> None:
    for name in _WARNING_AT_IMPORT:
        logging.getLogger(name).setLevel(logging.ERROR)
    logger = logging.getLogger("halo_fast")
    if not any(isinstance(handler, _Stderr) for handler in logger.handlers):
        logger.addHandler(_Stderr())
    logger.setLevel(logging.INFO)


def _refuse(message: str) -> int:
    if processes.speaks():
        print(f"halo: error: {' '.join(message.split())}", file=sys.stderr)
    return 2


def _dispatch(arguments: list[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_overview())
    elif arguments[0] == "--version":
        print(versions()["halo_fast"])
    else:
        name, verb, rest = _find_verb(arguments)
        if processes.count() > 1 and verb.read is not _run_stages:
            raise UserError(f"halo {name}: runs in one process, got {processes.count()}; start it without a launcher")
        verb.read(name, verb, rest)


def _find_verb(arguments: list[str]) -> tuple[str, Verb, list[str]]:
    """The longest command that the arguments begin with, and the arguments after it."""
    verbs = VERBS | {name: _command(registry.target("command", name)) for name in registry.known("command")}
    for count in (2, 1):
        name = " ".join(arguments[:count])
        if len(arguments) >= count and name in verbs:
            return name, verbs[name], arguments[count:]
    first = arguments[0]
    seconds = [name.split()[1] for name in verbs if name.startswith(f"{first} ")]
    if seconds:
        what = repr(arguments[1]) if arguments[1:] else "nothing"
        raise UserError(f"halo {first}: expected one of {', '.join(seconds)}, got {what}")
    raise UserError(f"unknown verb {first!r}; expected one of {', '.join(dict.fromkeys(n.split()[0] for n in verbs))}")


def _command(target: str) -> Verb:
    """A registered command: "module:function", or another name for a verb."""
    return VERBS[target] if target in VERBS else Verb(_call, target, "")


def _command_help(name: str) -> str:
    """The line of a registered command in `halo --help`: a registered text, or that of the verb it stands for."""
    if name in registry.known("command help"):
        return str(registry.resolve("command help", name))
    return _command(registry.target("command", name)).help


def _overview() -> str:
    """The text of `halo --help`: every verb with its line, registered commands and recipes."""

    def lines(names: Iterable[str]) -> str:
        return "\n".join(f"  {name:<16}{VERBS[name].help}" for name in names)

    others = lines(name for name in VERBS if name not in STAGES and name != "run")
    commands = "\n".join(f"  {name:<16}{_command_help(name)}".rstrip() for name in registry.known("command"))
    return (
        f"usage: halo VERB {_SETTINGS} [--print-config] [--force]\n\n"
        f"stages of a run, prompts in, LoRA and report out:\n{lines(STAGES)}\n\n{lines(['run'])}\n\n"
        f"others:\n{others}\n{commands}\n\n"
        f"recipes: {', '.join(registry.known('recipe'))}\n\n"
        "Finished stages are kept, unfinished ones continue. `halo VERB --help` lists the settings."
    )


def _run_stages(name: str, verb: Verb, arguments: list[str]) -> None:
    """Run one stage, or all of them for `halo run`."""
    from halo_fast.pipeline.arguments import build_parser, parse_config
    from halo_fast.pipeline.clips import run_all
    from halo_fast.pipeline.config import check_round, to_yaml
    from halo_fast.pipeline.preflight import check_required, check_run
    from halo_fast.pipeline.run import Run

    parser = build_parser(f"halo {name}", verb.help)
    parser.usage = f"halo {name} {_SOURCES if name == 'import' else ''}{_SETTINGS} [--print-config] [--force]"
    parser.add_argument("--force", action="store_true", help="Redo what was finished before.")
    parser.add_argument("--print-config", action="store_true", help="Print all settings as YAML and stop.")
    if name not in ("run", "import"):
        parser.add_argument("--round", type=int, default=1, help="Round of the run, from 1 to rounds.")
    if name == "train":
        parser.add_argument("--dry-run", action="store_true", help="Print plan, memory and time of a step and stop.")
    if name == "report":
        parser.add_argument("--compare", nargs="+", metavar="RUN", help="Compare these run directories on one page.")
    config, settings = parse_config(parser, _sources_as_setting(arguments) if name == "import" else arguments)
    if settings.print_config:
        print(to_yaml(config), end="")
        return
    if name == "report" and settings.compare:
        pages = registry.load("halo_fast.pipeline.report.several:compare_runs")
        page = processes.by_first(lambda: str(pages(settings.compare, config.report.num_clips)))
        print(f"report: {page}")
        return
    run = Run(config, settings.force, check_round(config, settings.get("round", 1)))
    if name == "run":
        processes.by_first(lambda: check_run(config, run))
        run_all(config, run, STAGES)
        return
    config = run.config
    check_required(config, [name])
    stage = STAGES[name]
    if name == "train" and settings.dry_run:
        stage = stage._replace(target=stage.target.replace(":train", ":dry_run"))
    run_stage(stage, config, run)


def _sources_as_setting(arguments: list[str]) -> list[str]:
    """`SOURCE ... [CONFIG]` as a config and the setting imports.sources."""
    count = next((index for index, word in enumerate(arguments) if word.startswith("-")), len(arguments))
    words, rest = arguments[:count], arguments[count:]
    is_config = bool(words) and (words[-1].endswith((".yaml", ".yml")) or words[-1] in registry.known("recipe"))
    config, sources = (words[-1:], words[:-1]) if is_config else ([], words)
    return [*config, *([f"--imports.sources={json.dumps(sources)}"] if sources else []), *rest]


def _call_with_config(name: str, verb: Verb, arguments: list[str]) -> None:
    """Call a function with the settings of a run and arguments of its own."""
    from halo_fast.pipeline.arguments import build_parser, parse_config

    function, parser = registry.load(verb.target), build_parser(f"halo {name}", verb.help)
    parser.usage = f"halo {name} {_SETTINGS}"
    own = parser.add_function_arguments(function, skip={"config"})
    config, settings = parse_config(parser, arguments)
    function(config, **{key: settings[key] for key in own})


def _call(name: str, verb: Verb, arguments: list[str]) -> None:
    """Call a function with arguments of its own, and print what it returns."""
    from halo_fast.pipeline.arguments import build_parser, parse

    function, parser = registry.load(verb.target), build_parser(f"halo {name}", verb.help)
    parser.add_function_arguments(function, as_positional=True)
    settings = parse(parser, arguments)
    settings.pop("config")
    result = function(**settings.as_dict())
    if result is not None:
        print(result)


def _doctor(name: str, verb: Verb, arguments: list[str]) -> None:
    """Print versions and compute backends, with torch and numpy alone; --write FILE writes a config that fits."""
    if arguments and not arguments[0].startswith("-"):
        raise UserError(
            f"halo {name} takes no arguments but --write FILE and --device NAME, got {' '.join(arguments)!r}"
        )
    if arguments:
        from halo_fast.pipeline.arguments import build_parser, parse

        parser = build_parser(f"halo {name}", verb.help)
        parser.add_argument("--write", default="", help="Write a config that fits this machine to a new YAML file.")
        parser.add_argument(
            "--device", default="", help='With --write: a card such as rtx4090, or "24 GiB", in place of this machine.'
        )
        settings = parse(parser, arguments)
        if not settings.write:
            raise UserError(f"halo {name}: expected --write FILE beside --device, got none; name a new YAML file")
        print(registry.load("halo_fast.pipeline.plan:write_recipe")(settings.write, settings.device))
        return
    for package, found in versions().items():
        print(f"{package:<14}{found}")
    print(f"\n{registry.load(verb.target)()}")


VERBS = {name: Verb(_run_stages, stage.target, stage.help) for name, stage in STAGES.items()} | {
    "run": Verb(_run_stages, "", "all stages, one after another"),
    "plan": Verb(
        _call_with_config, "halo_fast.pipeline.plan:plan", "memory, time, disk space and cost of a run, predicted"
    ),
    "reward eval": Verb(
        _call,
        "halo_fast.pipeline.agreement:reward_eval",
        "agreement of a reward model with people's labels, beside baselines",
    ),
    "label": Verb(
        _call_with_config, "halo_fast.pipeline.label:label", "serve a page on which people score the candidates"
    ),
    "agreement": Verb(
        _call_with_config, "halo_fast.pipeline.agreement:agreement", "compare teachers, people and the reward model"
    ),
    "compare": Verb(_call, "halo_fast.pipeline.compare:compare", "align by every method and tabulate the results"),
    "inspect": Verb(_call, "halo_fast.pipeline.inspect:inspect_run", "summarise the clips, labels and pairs of a run"),
    "verify": Verb(_call, "halo_fast.pipeline.hashes:verify", "read all files of a run and compare their hashes"),
    "export": Verb(
        _call, "halo_fast.pipeline.export:export_run", "write a run's LoRA, or its data, for other programs"
    ),
    "doctor": Verb(_doctor, "halo_fast.loss.backends:report", "versions and compute backends of this machine"),
}
