"""The command line: fisher-forget run | sweep | plot | evaluate CONFIG [--key value ...]."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from fisher_forget.config import RunConfig, SweepConfig, load_config
from fisher_forget.errors import FisherForgetError

COMMANDS = {
    "run": "train, forget, retrain, compare, and write a report",
    "sweep": "the same with a sweep over noise scales",
    "plot": "draw the plots of a finished run again",
    "evaluate": "every metric of a finished run beside its retrained models",
}
EXIT_ERROR = 2  # something given was wrong; the message says what to do
EXIT_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of `fisher-forget`.

    Returns:
        0 on success, 2 for a mistake in what was given, 130 when interrupted.
    """
    parser = argparse.ArgumentParser(
        prog="fisher-forget",
        description="A trained model forgets training samples; the result is compared with retrained models.",
        epilog="Any key of the configuration can be overridden: --training.epochs 5 --seeds '[0, 1]'. "
        "Exit codes: 0 done, 2 mistake in what was given, 130 interrupted (start again to go on).",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, help_text in COMMANDS.items():
        command = commands.add_parser(name, help=help_text, description=help_text)
        command.add_argument("config", help="YAML file, such as configs/digits.yaml, or the folder of a run")
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    chosen, overrides = parser.parse_known_args(arguments)
    try:
        _dispatch(chosen.command, chosen.config, overrides)
    except FisherForgetError as error:
        if chosen.debug:
            raise
        print(f"fisher-forget: {error}", file=sys.stderr)
        return EXIT_ERROR
    except KeyboardInterrupt:
        print("fisher-forget: interrupted; start it again to go on where it was", file=sys.stderr)
        return EXIT_INTERRUPTED
    return 0


def _dispatch(command: str, path: str, overrides: list[str]) -> None:
    kind = RunConfig if command == "run" else SweepConfig  # which reads both kinds of file
    if Path(path).is_dir():
        path, overrides = str(Path(path) / "config.yaml"), [*_place(Path(path)), *overrides]
    config = load_config(path, overrides, kind)
    from fisher_forget import recipe  # imports matplotlib: --help and the messages about mistakes stay quick

    if command == "plot":
        for drawn in recipe.redraw(config):
            print(drawn)
        return
    if command == "evaluate":
        from fisher_forget import assess

        print(f"Evaluation: {assess.assess(config)}")
        return
    print(f"Report: {recipe.run(config)}")


def _place(folder: Path) -> list[str]:
    """Flags that say where a run's folder is now, wherever it was made."""
    return ["--out", str(folder.resolve().parent), "--name", folder.resolve().name]


if __name__ == "__main__":
    sys.exit(main())
