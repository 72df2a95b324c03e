"""What a comparison has found out about a method and a forget set, kept on disk."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fisher_forget._util import files
from fisher_forget.errors import StorageError

OUTCOME = "outcome.json"
ALLOWED_DAMAGE = 2.0  # percentage points of accuracy, on what is retained


@dataclass(frozen=True)
class Trial:
    """One setting, judged on validation data.

    Attributes:
        settings: Other than the defaults.
        damage: See `tuning`.
        memory: See `tuning`.
        error: Why it gave no model of an original; empty where it did of all that it was used on.
    """

    settings: dict[str, Any]
    damage: float = math.nan
    memory: float = math.nan
    error: str = ""

    @property
    def rank(self) -> tuple[int, float, float]:
        """What is least for the trial to choose; see `tuning`."""
        if self.error:
            return 2, math.inf, math.inf
        if self.damage > ALLOWED_DAMAGE:
            return 1, self.damage, self.memory
        return 0, self.memory, self.damage

    @property
    def objective(self) -> float:
        """One number in the order of `rank`, but for ties: 0 to 100 of memory, 102 to 200 with
        damage, 300 if it failed."""
        group, first, _ = self.rank
        return 100.0 * group + min(first, 100.0)


@dataclass(frozen=True)
class Outcome:
    """What a method made of every original model of one forget set.

    Attributes:
        method: Its name.
        settings: Those chosen, other than the defaults.
        trials: All that were tried, on the first original.
        seconds: Wall time of each original's scrubbing, at one thread where several methods run at
            once.
        passes: Sample gradients over retained samples; NaN where a method does not know.
        refused: Why there is no model; empty where there are.
    """

    method: str
    settings: dict[str, Any]
    trials: tuple[Trial, ...]
    seconds: tuple[float, ...] = ()
    passes: tuple[float, ...] = ()
    refused: str = ""


def store(folder: Path, mark: str, outcome: Outcome) -> Outcome:
    """Write an outcome, beside the models of its seeds; `mark` says what it depends on."""
    files.write_json(folder / OUTCOME, {"fingerprint": mark, "outcome": asdict(outcome)})
    return outcome


def stored(folder: Path, mark: str, seeds: Sequence[int]) -> Outcome | None:
    """What an earlier comparison has finished with the same settings; `None` if it has not."""
    try:
        content = files.read_json(folder / OUTCOME)
    except StorageError:
        return None
    kept = content["outcome"]
    complete = kept["refused"] or all(model_path(folder, seed).exists() for seed in seeds)
    if content["fingerprint"] != mark or not complete:
        return None
    trials = tuple(
        Trial(t["settings"], _number(t["damage"]), _number(t["memory"]), t["error"])
        for t in kept["trials"]
    )
    seconds, passes = (tuple(map(_number, kept[name])) for name in ("seconds", "passes"))
    return Outcome(kept["method"], kept["settings"], trials, seconds, passes, kept["refused"])


def model_path(folder: Path, seed: int) -> Path:
    """File of the model that was made of the original of one seed."""
    return folder / f"seed-{seed}.safetensors"


def _number(value: float | None) -> float:
    return math.nan if value is None else value
