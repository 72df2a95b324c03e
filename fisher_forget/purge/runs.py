"""The run that a file belongs to: its forget sets, and which of them are to be gone."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fisher_forget.errors import ConfigError
from fisher_forget.experiments.config import folder_name

CONFIG = "config.yaml"
RESULTS = ("original", "metrics.json", "comparison.json")


@dataclass(frozen=True)
class Run:
    """The folder of a run, a sweep or a comparison.

    Attributes:
        folder: With its config.yaml.
        sets: Indices that each forget set lists, by the set's name; none where it is named by a
            class or drawn at random.
        gone: Names of those that are to be gone; none where others were asked for.
    """

    folder: Path
    sets: dict[str, list[int]]
    gone: frozenset[str]

    @property
    def lists(self) -> dict[str, list[int]]:
        """Indices of those that are to be gone, where they are listed."""
        return {name: self.sets[name] for name in sorted(self.gone) if self.sets[name]}

    def clean(self, path: Path) -> bool:
        """Whether a model that was retrained without a forget set, or made to forget it, holds
        nothing of all that is to be gone: nothing but that set is."""
        place = path.relative_to(self.folder).parts[0]
        return {folder_name(name) for name in self.gone} == {place}


class Runs:
    """Finds the run of a file.

    Args:
        sets: Names of the forget sets that are to be gone; none stands for all.
    """

    def __init__(self, sets: Collection[str]) -> None:
        self._sets, self._known = frozenset(sets), dict[Path, Run | None]()
        self.found: set[str] = set()  # names of sets that were asked for, and are there

    def of(self, path: Path) -> Run | None:
        """The run whose folder the file lies in, at any depth; `None` where there is none."""
        for folder in path.parents:
            if (run := self._in(folder)) is not None:
                return run
        return None

    def _in(self, folder: Path) -> Run | None:
        if folder not in self._known:
            # a recipe is no run: what it made lies beside its copy
            made = any((folder / name).exists() for name in RESULTS)
            sets = read_sets(folder / CONFIG) if made else {}
            gone = frozenset(sets) & self._sets if self._sets else frozenset(sets)
            self.found |= gone
            self._known[folder] = Run(folder, sets, gone) if sets else None
        return self._known[folder]

    def check(self) -> None:
        """Refuse names that no run has.

        Raises:
            ConfigError: If there are some.
        """
        if strange := sorted(self._sets - self.found):
            known = sorted({name for run in self._known.values() if run for name in run.sets})
            got, expected = f"the forget sets {strange}", f"names such as {known[:10]}"
            raise ConfigError(got, expected, "Use the names in the run's config.yaml.")


def read_sets(path: Path) -> dict[str, list[int]]:
    """The forget sets of a configuration, and the indices that they list; none of another file."""
    try:
        content: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
        entries = content["forget_sets"]
        return {str(e["name"]): [int(i) for i in e.get("indices") or []] for e in entries}
    except (OSError, UnicodeDecodeError, yaml.YAMLError, LookupError, TypeError, ValueError):
        return {}
