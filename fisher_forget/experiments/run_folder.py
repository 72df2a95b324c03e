"""The folder of a run: nothing that lies in it, and no file that names it, leads out of it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fisher_forget._util import files
from fisher_forget.errors import ConfigError, StorageError
from fisher_forget.experiments.config import RunConfig
from fisher_forget.ledger import Ledger
from fisher_forget.ledger.purged import check_not_purged

WAIT = 5.0  # seconds for somebody else


def run_folder(config: RunConfig, *, trains: bool = True) -> Path:
    """The folder of the results, which need not exist yet.

    Args:
        config: Of the run.
        trains: Models are trained in it.

    Raises:
        StorageError: If a link in it leads out of it: what is written there would end up elsewhere;
            or if models are to be trained where they were purged.
    """
    folder = config.folder
    if trains:
        check_not_purged(folder)
    for place, folders, names in os.walk(folder):
        for name in (*folders, *names):
            if (path := Path(place) / name).is_symlink():
                inside(folder, path)
    return folder


@contextmanager
def opened(config: RunConfig) -> Iterator[Path]:
    """The folder of the results, made if need be, in which nobody else trains or purges within this
    context.

    Raises:
        StorageError: As `run_folder`; if it cannot be written; or if somebody else is at work in
            it, who is named.
    """
    folder = files.ensure_folder(run_folder(config))
    with Ledger(folder, wait=WAIT).owned():
        yield folder


def inside(folder: Path, path: Path) -> Path:
    """The path, if it is in the folder with all links followed.

    Raises:
        StorageError: If it is not.
    """
    try:
        target = path.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a circle of links; a null byte
        raise StorageError(f"the path {path}: {error}", "a path", "Remove it.") from error
    if not target.is_relative_to(folder.resolve()):
        got = f"{path}, which leads to {target}, outside the run's folder {folder}"
        fix = "Put the file itself there, or remove it; is this folder from someone you trust?"
        raise StorageError(got, "everything of a run within its folder", fix)
    return path


def check_out(config: RunConfig, recipe: Path) -> None:
    """Refuse a recipe that says itself to write elsewhere than below the current folder or its own.

    Args:
        config: As the recipe has it.
        recipe: The file.

    Raises:
        ConfigError: If its results would go elsewhere.
    """
    folder = config.folder.resolve()
    if not any(folder.is_relative_to(near.resolve()) for near in (Path.cwd(), recipe.parent)):
        got = f"out: {config.out!r} in {recipe}, so that results go to {folder}"
        expected = "a folder below the current one, or below the recipe's"
        raise ConfigError(got, expected, f"Say so yourself: --out {config.out}")
