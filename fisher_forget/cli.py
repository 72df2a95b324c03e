"""The command line: fisher-forget COMMAND; `fisher-forget --help` lists the commands, with
examples."""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import textwrap
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import shtab

from fisher_forget.cli_erasure import (
    Found,
    add_artefacts,
    add_ledger,
    add_purge,
    carry_out_purge,
    show_artefacts,
    show_ledger,
)
from fisher_forget.errors import ConfigError, FisherForgetError
from fisher_forget.experiments.config import CompareConfig, RunConfig, SweepConfig
from fisher_forget.experiments.config_file import load_config, option_names
from fisher_forget.experiments.data_sources import ROOT_VARIABLE
from fisher_forget.experiments.datasets import catalogue
from fisher_forget.experiments.import_path import current_folder_last, is_path
from fisher_forget.experiments.init_config import BUILT_IN, TEMPLATES, write_template

EXIT_ERROR = 2  # something given was wrong; the message says what to do
EXIT_FOUND = 3  # what was looked at is not as it should be
EXIT_INTERRUPTED = 130
SHELLS = ("bash", "zsh", "fish")


@dataclass(frozen=True)
class Command:
    """One command as people see it.

    Attributes:
        group: Heading that it stands under.
        summary: What it does, in a line.
        example: A call.
        more: What else its own help says.
        configured: Takes a configuration and flags over it.
        plans: Takes --dry-run.
    """

    group: str
    summary: str
    example: str
    more: str = ""
    configured: bool = True
    plans: bool = True


MAKE, LOOK, START = "Forget and compare", "Look at a finished run", "Get started"
ERASE = "Erase, and show it"
COMMANDS = {
    "run": Command(
        MAKE,
        "train, forget, retrain, compare, and write a report",
        "fisher-forget run configs/digits.yaml --forget.steps 1",
        "What is finished is stored: a killed run goes on where it was when it is started again.",
    ),
    "sweep": Command(
        MAKE,
        "the same with a sweep over noise scales, or any grid of options",
        "fisher-forget sweep configs/digits_sweep.yaml --draws 5",
    ),
    "compare": Command(
        MAKE,
        "published methods beside this one, each tuned by the same budget",
        "fisher-forget compare configs/compare_digits.yaml --methods '[fisher-forget, scrub]'",
    ),
    "evaluate": Command(
        LOOK,
        "every metric of a finished run beside its retrained models",
        "fisher-forget evaluate runs/digits",
    ),
    "audit": Command(
        LOOK,
        "what attacks find in the models of a finished run, beside its retrained models",
        "fisher-forget audit runs/digits --limit 0.05",
        "It adds a section to the report, and an entry to the ledger where the run has one.\n"
        f"Exit code {EXIT_FOUND}: more is found than after exact retraining, or a class lost more\n"
        "than the limit.",
        plans=False,
    ),
    "plot": Command(
        LOOK,
        "draw the plots of a finished run again",
        "fisher-forget plot runs/digits",
        plans=False,
    ),
    "artefacts": Command(
        ERASE,
        "what in a folder still holds forgotten samples; nothing is changed",
        "fisher-forget artefacts runs/digits",
        "A folder of runs, prepared models, SISA, ensembles or checkpoints, or one above several.",
        configured=False,
    ),
    "purge": Command(
        ERASE,
        "remove it, or rewrite it without them, on record",
        "fisher-forget purge runs/digits --yes",
        "It does not look for copies elsewhere: remove those yourself.\n"
        f"Exit code 0: nothing is left, and all files are known; {EXIT_FOUND} otherwise.",
        configured=False,
    ),
    "ledger": Command(
        ERASE,
        "who asked for what to be deleted, what became of it, and whether the record is intact",
        "fisher-forget ledger deletions --public-key officer.pem.pub",
        "Without options it prints the requests. Of a prepared model, of SISA, or of a Ledger.\n"
        f"Exit code {EXIT_FOUND}: the record was altered, or is not signed with that key, or does\n"
        "not know the model.",
        configured=False,
    ),
    "demo": Command(
        START,
        "train a small network, and see what two deletion requests cost beside that",
        "fisher-forget demo --retrain",
        "Needs no data and writes nothing.",
        configured=False,
    ),
    "init": Command(
        START,
        "write a commented configuration for a model and data of your own",
        "fisher-forget init config.yaml --template text",
        "A file that is there is never overwritten.",
        configured=False,
    ),
    "data": Command(
        START,
        "which data sets are found, and how to get the others",
        "fisher-forget data",
        configured=False,
    ),
    "completion": Command(
        START,
        "print a script that completes commands and keys in your shell",
        'eval "$(fisher-forget completion bash)"',
        "bash, zsh: put the example's line into ~/.bashrc or ~/.zshrc.\n"
        "fish: fisher-forget completion fish > ~/.config/fish/completions/fisher-forget.fish",
        configured=False,
    ),
}
KEYS = (
    "Any key of the configuration can be given as a flag, which wins over the file:\n"
    "  --training.epochs 5  --seeds '[0, 1]'  --forget.noise null  --model.options.width 8"
)
EXIT_CODES = f"""exit codes:
  0    done
  1    an unexpected error: a bug, here or in a model of yours; the traceback says where
  {EXIT_ERROR}    something given was wrong: the message says what, what was expected, what to do
  {EXIT_FOUND}    audit, ledger, purge: what was looked at is not as it should be; it says what
  {EXIT_INTERRUPTED}  interrupted; start the same command again to go on"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of `fisher-forget`.

    Returns:
        Exit code: 0 done, 2 for a mistake in what was given, 3 where what was looked at is not as
        it should be, 130 when interrupted. An unexpected error is raised, and makes Python exit
        with 1.
    """
    given, overrides = _parser().parse_known_args(arguments)
    try:
        _dispatch(given, overrides)
    except FisherForgetError as error:
        if given.debug:
            raise
        print(f"fisher-forget: {error}", file=sys.stderr)
        return EXIT_FOUND if isinstance(error, Found) else EXIT_ERROR
    except KeyboardInterrupt:
        print("fisher-forget: interrupted; start it again to go on where it was", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader of the output, such as `head`, has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _dispatch(given: argparse.Namespace, overrides: list[str]) -> None:
    if not COMMANDS[given.command].configured:
        if overrides:
            _parser().error(f"unrecognized arguments: {' '.join(overrides)}")
        _START[given.command](given)
        return
    config = _config(given, overrides)
    own = any(is_path(name) for _, name in config.named)
    # it stays for the whole command: worker processes look there for the classes of models
    with current_folder_last() if own else nullcontext():
        _carry_out(given, config)


def _carry_out(given: argparse.Namespace, config: RunConfig) -> None:
    # imported here, because matplotlib takes a second: --help and mistakes are answered at once
    if getattr(given, "dry_run", False):
        from fisher_forget.experiments.dry_run import describe

        print(describe(config, given.command))
    elif given.command == "plot":
        from fisher_forget.experiments.run import redraw

        print("\n".join(map(str, redraw(config))))
    elif given.command == "audit":
        _audit(given, config)
    elif given.command == "evaluate":
        from fisher_forget.experiments.evaluate_run import evaluate_run

        print(f"Evaluation: {evaluate_run(config)}")
    elif isinstance(config, CompareConfig):
        from fisher_forget.experiments.compare import compare

        print(f"Comparison: {compare(config)}")
    else:
        from fisher_forget.experiments.run import run

        print(f"Report: {run(config)}")


def _audit(given: argparse.Namespace, config: RunConfig) -> None:
    """Print what attacks find.

    Raises:
        Found: If it is too much.
    """
    from fisher_forget.experiments.audit_run import audit_run

    page, audits = audit_run(config, given.limit)
    for name, found in audits.items():
        print(f"{name}: {found}\n")
    print(f"Report: {page}")
    if wrong := [name for name, found in audits.items() if found.wrong]:
        got = f"attacks that find too much: {', '.join(wrong)}"
        fix = "See docs/attacks.md for what hides it; do not publish these models beside the first."
        raise Found(got, "no more than after exact retraining", fix)


def _config(given: argparse.Namespace, overrides: list[str]) -> RunConfig:
    """The configuration of a command: a file, or a run's folder, wherever it was made."""
    command, path = given.command, Path(given.config)
    # a sweep's schema reads the files of runs, too
    kind = {"run": RunConfig, "compare": CompareConfig}.get(command, SweepConfig)
    if path.is_dir():
        if command != "compare" and (path / "comparison.json").exists():
            fix = f"See {path}/comparison.html, or pass the folder of a run."
            raise ConfigError(f"{path}, the folder of a comparison", "that of a run", fix)
        place = ["--out", str(path.resolve().parent), "--name", path.resolve().name]
        path, overrides = path / "config.yaml", [*place, *overrides]
    return load_config(path, overrides, kind, allow_code=given.allow_code)


def _demo(given: argparse.Namespace) -> None:
    from fisher_forget._util.threads import torch_threads
    from fisher_forget.experiments.demo import Demo

    with torch_threads(1):  # more hardly help a network this small, and wait for each other
        for line in Demo(retrain=given.retrain).run():
            print(line, flush=True)


def _print_data(given: argparse.Namespace) -> None:
    print(catalogue(given.root))


def _print_completion(given: argparse.Namespace) -> None:
    print(shtab.complete(_parser(keys=True), given.shell))


def _write_template(given: argparse.Namespace) -> None:
    path = write_template(Path(given.path), given.template)
    if given.template in BUILT_IN:
        print(f"{path} is written. Try it: fisher-forget run {path} --dry-run")
        return
    print(f"{path} is written. Name your functions in it, then, as they are code of your own:")
    print(f"fisher-forget run {path} --allow-code --dry-run")


_START = {
    "artefacts": show_artefacts,
    "purge": carry_out_purge,
    "ledger": show_ledger,
    "demo": _demo,
    "init": _write_template,
    "data": _print_data,
    "completion": _print_completion,
}


class _Grouped(argparse.RawDescriptionHelpFormatter):
    """Leaves the list of commands to the description, where they stand in groups."""

    def add_argument(self, action: argparse.Action) -> None:
        if not isinstance(action, argparse._SubParsersAction):
            super().add_argument(action)


def _parser(*, keys: bool = False) -> argparse.ArgumentParser:
    """The parser; with every key of the configuration as a flag, for completion."""
    parser = argparse.ArgumentParser(
        prog="fisher-forget",
        usage="%(prog)s COMMAND ...",
        formatter_class=_Grouped,
        description=_overview(),
        epilog=_epilog(),
    )
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="COMMAND", prog=parser.prog
    )
    for name, about in COMMANDS.items():
        texts = [f"example:\n  {about.example}", EXIT_CODES]
        command = commands.add_parser(
            name,
            usage=_usage(name, about),
            help=about.summary,
            description="\n".join(filter(None, [_sentence(about.summary), about.more])),
            epilog="\n\n".join([KEYS, *texts] if about.configured else texts),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        if about.configured:
            _add_config(command, about)
        if about.configured and keys:
            _add_keys(command, name)
        if name in _ARGUMENTS:
            _ARGUMENTS[name](command)
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _add_config(command: argparse.ArgumentParser, about: Command) -> None:
    what = "YAML file, such as configs/digits.yaml, or the folder of a run"
    _file(command.add_argument("config", help=what))
    what = "let names be import paths: runs code of whoever wrote the file"
    command.add_argument("--allow-code", action="store_true", help=what)
    if about.plans:
        what = (
            "check everything, count the models to train, estimate time and memory; write nothing"
        )
        command.add_argument("--dry-run", action="store_true", help=what)


def _add_audit(command: argparse.ArgumentParser) -> None:
    what = "the most that the score of a class may fall by: 0.02 are two points of accuracy"
    command.add_argument("--limit", type=float, help=what)


def _add_demo(command: argparse.ArgumentParser) -> None:
    what = "also retrain twice without the forgotten images, and compare"
    command.add_argument("--retrain", action="store_true", help=what)


def _add_init(command: argparse.ArgumentParser) -> None:
    where = "default %(default)s"
    _file(command.add_argument("path", nargs="?", default="config.yaml", help=where))
    templates = "; ".join(f"{key}: {what}" for key, what in TEMPLATES.items())
    help_text = f"{templates}; default %(default)s"
    command.add_argument("--template", choices=TEMPLATES, default="classifier", help=help_text)


def _add_data(command: argparse.ArgumentParser) -> None:
    what = f"folder to look in; default {ROOT_VARIABLE}, else your data folder"
    command.add_argument("--root", help=what).complete = shtab.DIRECTORY  # type: ignore[attr-defined]


def _add_completion(command: argparse.ArgumentParser) -> None:
    command.add_argument("shell", choices=SHELLS)


_ARGUMENTS = {
    "audit": _add_audit,
    "artefacts": add_artefacts,
    "purge": add_purge,
    "ledger": add_ledger,
    "demo": _add_demo,
    "init": _add_init,
    "data": _add_data,
    "completion": _add_completion,
}


def _add_keys(command: argparse.ArgumentParser, name: str) -> None:
    kind = {"sweep": SweepConfig, "compare": CompareConfig}.get(name, RunConfig)
    for key, choices in option_names(kind).items():
        command.add_argument(f"--{key}", choices=choices or None, help="key of the configuration")


def _file(action: argparse.Action) -> None:
    action.complete = shtab.FILE  # type: ignore[attr-defined]


def _usage(name: str, about: Command) -> str | None:
    """Written by hand where the keys of the configuration are flags, too."""
    dry = " [--dry-run]" if about.plans else ""
    usage = f"fisher-forget {name} CONFIG{dry} [--allow-code] [--debug] [--KEY VALUE ...]"
    return usage if about.configured else None


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def _overview() -> str:
    width = max(map(len, COMMANDS)) + 2
    lines = [
        "A trained model forgets training samples; the result is compared with retrained models."
    ]
    for group, commands in itertools.groupby(COMMANDS.items(), key=lambda item: item[1].group):
        lines += ["", f"{group}:"]
        lines += [f"  {name:{width}}{about.summary}" for name, about in commands]
    return "\n".join(lines)


def _epilog() -> str:
    examples = textwrap.indent("\n".join(about.example for about in COMMANDS.values()), "  ")
    more = "fisher-forget COMMAND --help says more about a command."
    return "\n\n".join([f"examples:\n{examples}", KEYS, EXIT_CODES, more])


if __name__ == "__main__":
    sys.exit(main())
