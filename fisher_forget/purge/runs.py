"""The run that a file belongs to: what the file is in it, and whether the run vouches for it."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import yaml

from fisher_forget._util import files
from fisher_forget.errors import ConfigError, FisherForgetError, StorageError
from fisher_forget.experiments.config import folder_name
from fisher_forget.ledger import Ledger
from fisher_forget.ledger.evidence import OTHERS
from fisher_forget.ledger.ledger import LEDGER
from fisher_forget.purge.lists import recipe_without, without_lists

Role = Literal["original", "subset", "retrained", "scrubbed", "method", "outputs", "text", "plain"]
CONFIG, LARGEST = "config.yaml", 2**24  # bytes of a text that is read as a recipe
HUGE = 2**28  # bytes of the numbers of a run
SAME = ("data", "model", "training", "likelihood")  # what models depend on, beside the set
PURGED = "purged"  # note of a model that was vouched for
WRITTEN_OUT = {"name", "kind", "label", "count", "indices", "seed"}  # by every run, not by people
SEED = r"seed-\d+\.safetensors"
# where a run writes what, below its folder; the folder of a forget set has any name
LAYOUT: dict[Role, str] = {
    "original": rf"([^/]+/)?original/{SEED}",
    "subset": rf"subsets/{SEED}",
    "retrained": rf"[^/]+/retrained/{SEED}",
    "scrubbed": r"[^/]+/seed-\d+/scrubbed\.safetensors",
    "method": rf"[^/]+/methods/[^/]+/{SEED}",
    "outputs": r"[^/]+/outputs\.safetensors",
    "text": r"config\.yaml|(metrics|evaluation|comparison|audit)\.json|comparison\.md"
    r"|(report|evaluation|comparison)\.html|[^/]+/methods/[^/]+/outcome\.json",
    "plain": r"([^/]+/)?(kl|scores|noise|tradeoff|(evaluation|tradeoff|cost)-\d+)\.(svg|png)"
    r"|[^/]+/sweep\.(parquet|csv)|[^/]+/seed-\d+/result\.txt|[^/]+/(evaluation|comparison|audit)\.md",
}
PATTERNS = {role: re.compile(pattern) for role, pattern in LAYOUT.items()}


@dataclass(frozen=True)
class Run:
    """The folder of a run, a sweep or a comparison.

    Attributes:
        folder: With its config.yaml.
        config: Content of that.
        sets: Its forget sets, by name.
        gone: Names of those that are to be gone; none where others were asked for.
    """

    folder: Path
    config: dict[str, Any]
    sets: dict[str, dict[str, Any]]
    gone: frozenset[str]

    @property
    def is_own(self) -> bool:
        """Whether it lies in the folder that it names, or is what a finished run left: a copy of a
        configuration elsewhere is a recipe."""
        name = str(self.config.get("name"))
        if folder_name(name, keep=" _.", distinct=True) == self.folder.name:
            return True
        finished = self._finished or self._compared
        return isinstance(finished, dict) and finished.get("name") == name

    def role(self, path: Path) -> Role | None:
        """What a file is in the run, by its place; `None` if it is no file of a run."""
        place = path.relative_to(self.folder)
        role = next((r for r, p in PATTERNS.items() if p.fullmatch(place.as_posix())), None)
        if len(place.parts) > 1 and place.parts[0] not in ("original", "subsets"):
            return role if self._is_set(place.parts[0]) else None
        return role

    def _is_set(self, name: str) -> bool:
        """Whether a folder is that of a forget set, which config.yaml may name no more."""
        known = {folder_name(s) for s in (*self.sets, *self._finished_sets)}
        inside = ("retrained", "original")
        return name in known or any((self.folder / name / part).is_dir() for part in inside)

    @cached_property
    def pending(self) -> list[str]:
        """Names of its requests that are asked for and not done."""
        if not (self.folder / LEDGER).is_file():
            return []
        try:
            return [request.name for request in Ledger(self.folder).pending()]
        except FisherForgetError:
            return []

    def rewritten(self, path: Path) -> bytes:
        """A text of the run without the indices that are to be gone."""
        if path == self.folder / CONFIG:
            named = {i for s in self.sets.values() for i in s["indices"]}
            found = bool(named & self.indices)
            return recipe_without(self.config, self.indices) if found else path.read_bytes()
        return without_lists(path.read_bytes(), self.indices)

    @cached_property
    def indices(self) -> frozenset[int]:
        """Those that are to be gone, as far as the run lists them, now or when it finished."""
        known = [*self.sets.values(), *self._finished_sets.values()]
        return frozenset(i for s in known if s["name"] in self.gone for i in s["indices"])

    def vouches(self, path: Path, notes: Mapping[str, str]) -> bool:
        """Whether the run, when it finished, made this model without all that is to be gone: of
        that one forget set, of data and settings that config.yaml still has, and of nothing else;
        and of a scrubbed one, that its self-check does not say that they are known still."""
        try:
            return self._vouches(path, notes)
        except (AttributeError, LookupError, TypeError, ValueError):  # of a damaged metrics.json
            return False

    def _vouches(self, path: Path, notes: Mapping[str, str]) -> bool:
        (name,) = self.gone
        if path.relative_to(self.folder).parts[0] != folder_name(name):
            return False
        weights = _fingerprint(path)
        if PURGED in notes:  # vouched for, when its fingerprint was taken out
            return bool(weights)
        case, then = self._cases[name], self._finished["config"]
        alike = all(then[key] == self.config[key] for key in SAME)
        if not (alike and weights and self._finished_sets[name] == self.sets[name]):
            return False
        if self.role(path) == "retrained":
            return bool(notes["fingerprint"] == case["fingerprint"])
        place = path.parent.relative_to(self.folder).as_posix()
        (told,) = (run for run in case["runs"] if run["folder"] == place)
        said = [f for f in told["forget"]["check"] if f["name"] != OTHERS]
        return bool(told["weights"] == weights and all(f["verdict"] != "wrong" for f in said))

    @cached_property
    def _finished(self) -> Any:
        path = self.folder / "metrics.json"
        try:
            ours = path.is_file() and not path.is_symlink() and path.stat().st_size < HUGE
            return files.read_json(path) if ours else {}
        except (StorageError, OSError, RecursionError):
            return {}

    @property
    def _compared(self) -> Any:
        path = self.folder / "comparison.json"
        try:
            return files.read_json(path) if path.is_file() and not path.is_symlink() else {}
        except (StorageError, OSError, RecursionError):
            return {}

    @property
    def _finished_sets(self) -> dict[str, dict[str, Any]]:
        try:
            return _by_name(self._finished["config"]["forget_sets"])
        except (AttributeError, LookupError, TypeError, ValueError, OverflowError):
            return {}

    @property
    def _cases(self) -> dict[str, Any]:
        try:
            return {case["name"]: case for case in self._finished["cases"]}
        except (LookupError, TypeError):
            return {}


class Runs:
    """Finds the run of a file.

    Args:
        sets: Names of the forget sets that are to be gone; none stands for all.
    """

    def __init__(self, sets: Collection[str]) -> None:
        self.named = frozenset(sets)
        self._known: dict[Path, Run | None] = {}

    def of(self, path: Path) -> Run | None:
        """The run whose folder the file lies in, at any depth; `None` where there is none."""
        return next((run for f in path.parents if (run := self._in(f)) is not None), None)

    def _in(self, folder: Path) -> Run | None:
        if folder not in self._known:
            self._known[folder] = self._read(folder)
        return self._known[folder]

    def _read(self, folder: Path) -> Run | None:
        content = read_recipe(folder / CONFIG)
        sets = sets_of(content)
        if not sets or not all(s.keys() >= WRITTEN_OUT for s in sets.values()):
            return None
        run = Run(folder, content, sets, frozenset())
        if not run.is_own:
            return None
        asked = frozenset(name for name, s in sets.items() if s.get("who"))
        gone = frozenset(sets) & self.named if self.named else asked or frozenset(sets)
        return replace(run, gone=gone)

    def check(self) -> None:
        """Refuse names that no run has.

        Raises:
            ConfigError: If there are some.
        """
        runs = [run for run in self._known.values() if run is not None]
        if strange := sorted(self.named - {name for run in runs for name in run.sets}):
            known = sorted({name for run in runs for name in run.sets})[:10]
            expected = f"names such as {known}" if known else "none: no run is there"
            raise ConfigError(f"the forget sets {strange}", expected, "See the run's config.yaml.")


def read_recipe(path: Path) -> dict[str, Any]:
    """The content of a recipe; empty of another file."""
    try:
        if not path.is_file() or path.stat().st_size > LARGEST:
            return {}
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        content: Any = yaml.load(path.read_bytes(), loader)
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}
    return content if isinstance(content, dict) else {}


def sets_of(content: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The forget sets of a recipe by name, each with its list of indices; none of another file."""
    try:
        return _by_name(content["forget_sets"])
    except (AttributeError, LookupError, TypeError, ValueError, OverflowError):
        return {}


def _by_name(entries: Any) -> dict[str, dict[str, Any]]:
    return {
        str(e["name"]): {**e, "indices": [int(i) for i in e.get("indices") or []]} for e in entries
    }


def _fingerprint(path: Path) -> str:
    try:
        return files.fingerprint(files.load_tensors(path)[0])
    except StorageError:
        return ""
