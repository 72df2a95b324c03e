"""The run that a file belongs to: what the file is in it, and whether the run vouches for it."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import yaml

from fisher_forget._util import files
from fisher_forget.errors import ConfigError, StorageError
from fisher_forget.experiments.config import folder_name

Role = Literal["original", "subset", "retrained", "scrubbed", "method", "outputs", "text", "plain"]
CONFIG, LARGEST = "config.yaml", 2**24  # bytes of a text that is read as a recipe
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
    "text": r"config\.yaml|(metrics|evaluation|comparison)\.json|comparison\.md"
    r"|(report|evaluation|comparison)\.html|[^/]+/methods/[^/]+/outcome\.json",
    "plain": r"([^/]+/)?(kl|scores|noise|tradeoff|(evaluation|tradeoff|cost)-\d+)\.(svg|png)"
    r"|[^/]+/sweep\.(parquet|csv)|[^/]+/seed-\d+/result\.txt|[^/]+/(evaluation|comparison)\.md",
}
PATTERNS = {role: re.compile(pattern) for role, pattern in LAYOUT.items()}


@dataclass(frozen=True)
class Run:
    """The folder of a run, a sweep or a comparison.

    Attributes:
        folder: With its config.yaml.
        sets: The forget sets of config.yaml, by name.
        gone: Names of those that are to be gone; none where others were asked for.
    """

    folder: Path
    sets: dict[str, dict[str, Any]]
    gone: frozenset[str]

    def role(self, path: Path) -> Role | None:
        """What a file is in the run, by its place; `None` if it is no file of a run."""
        place = path.relative_to(self.folder).as_posix()
        return next((r for r, pattern in PATTERNS.items() if pattern.fullmatch(place)), None)

    @cached_property
    def indices(self) -> frozenset[int]:
        """Those that are to be gone, as far as the run lists them, now or when it finished."""
        known = [*self.sets.values(), *self._finished_sets.values()]
        return frozenset(i for s in known if s["name"] in self.gone for i in s["indices"])

    def vouches(self, path: Path, notes: Mapping[str, str]) -> bool:
        """Whether the run, when it finished, made this model without all that is to be gone: of
        that one forget set, as config.yaml still has it, and of nothing else."""
        slug = path.relative_to(self.folder).parts[0]
        if {folder_name(name) for name in self.gone} != {slug}:
            return False
        (name,) = self.gone
        if PURGED in notes:  # vouched for, when its fingerprint was taken out
            return True
        case = self._cases.get(name, {})
        if self._finished_sets.get(name) != self.sets[name] or not case:
            return False
        if self.role(path) == "retrained":
            return "fingerprint" in notes and notes["fingerprint"] == case.get("fingerprint")
        place = path.parent.relative_to(self.folder).as_posix()
        every: list[dict[str, Any]] = case.get("runs", [])
        told = next((r for r in every if r.get("folder") == place), {})
        return "weights" in told and told["weights"] == _fingerprint(path) and _moved(told)

    @cached_property
    def _finished(self) -> Any:
        try:
            return files.read_json(self.folder / "metrics.json")
        except StorageError:
            return {}

    @property
    def _finished_sets(self) -> dict[str, dict[str, Any]]:
        try:
            return _by_name(self._finished["config"]["forget_sets"])
        except (LookupError, TypeError, ValueError, OverflowError):
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
            sets = read_sets(folder / CONFIG)
            written = bool(sets) and all(s.keys() >= WRITTEN_OUT for s in sets.values())
            gone = frozenset(sets) & self.named if self.named else frozenset(sets)
            self._known[folder] = Run(folder, sets, gone) if written else None
        return self._known[folder]

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


def read_sets(path: Path) -> dict[str, dict[str, Any]]:
    """The forget sets of a recipe by name, each with its list of indices; none of another file."""
    try:
        if not path.is_file() or path.stat().st_size > LARGEST:
            return {}
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        content: Any = yaml.load(path.read_bytes(), loader)
        return _by_name(content["forget_sets"])
    except (OSError, ValueError, LookupError, TypeError, OverflowError, RecursionError):
        return {}
    except yaml.YAMLError:
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


def _moved(told: Mapping[str, Any]) -> bool:
    """Whether it is another model than the original: a step was taken, or noise added."""
    forget = told.get("forget", {})
    noise = forget.get("noise") or {}
    return bool(forget.get("newton", {}).get("norm") or noise.get("scale"))
