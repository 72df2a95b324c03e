"""What a sweep found: a tidy table with units, the marks to read it against, and its file."""

from __future__ import annotations

import html
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import t as student

from fisher_forget._util import files
from fisher_forget._util.numbers import MISSING, plus_minus, share
from fisher_forget.errors import StorageError
from fisher_forget.likelihood import Score
from fisher_forget.likelihood.base import SHARE_LOSS

CONFIDENCE = 0.95  # of the intervals of `SweepTable.frontier`
DONE, RUINED, SKIPPED = "done", "ruined", "skipped"
KEPT = ("test_retained_classes", "test")  # where what a method costs shows, the first that there is
GAP = ("gap_closed", "gap_low", "gap_high")
MEASURED = ("kl_", "score_", "loss_")
ATTRIBUTES = "fisher_forget"  # key in the metadata of the file


@dataclass(frozen=True, eq=False)
class SweepTable:
    """A tidy table of scores, one row a cell of the grid, and the marks to read it against.

    Attributes:
        frame: The axes (method, the options of the grid, seed); scale, the noise scale that was
            drawn; status; kl_<part> (nats), score_<part>, loss_<part> (nats); gap_closed, gap_low
            and gap_high (its 95 % interval, see `evaluate.gap`); information (local forgetting
            bound, nats; see `unlearn.noise`); seconds that the cell takes by itself. A row is
            "done"; "ruined" if the retained loss has risen by more than `ruin`; or "skipped",
            without numbers, since a smaller noise had ruined the model already.
        axes: The columns that tell settings apart: all axes but the seed.
        marks: kl_<part>, score_<part>, loss_<part> of "original", "retrained" (whose kl_<part> is
            the floor) and "retrained_std".
        score: What score_<part> is.
        ruin: Nats by which the retained loss may rise above the original's.
    """

    frame: pd.DataFrame
    axes: tuple[str, ...]
    marks: dict[str, dict[str, float]]
    score: Score
    ruin: float | None = None

    @property
    def kept(self) -> str:
        """The part of the data where what forgetting costs shows: test data, of the retained
        classes if it is there."""
        return next(part for part in KEPT if f"score_{part}" in self.marks["retrained"])

    @property
    def units(self) -> dict[str, str]:
        """Column -> unit; "1" for numbers without, "" for words."""
        return {str(name): self._unit(str(name)) for name in self.frame}

    def to_pandas(self) -> pd.DataFrame:
        """One row a cell; `.attrs["units"]` maps columns to units."""
        frame = self.frame.copy()
        frame.attrs = {"units": self.units}
        return frame

    def frontier(self) -> pd.DataFrame:
        r"""What each setting costs and what it hides: one row a setting, means over its draws.

        <column>_low and <column>_high bound the 95 % confidence interval of the mean, mean -+ t std
        / sqrt(draws), t of Student's distribution with draws - 1 degrees of freedom; NaN with a
        single draw. gap_low and gap_high are means of the draws' own ends. `pareto` marks the
        settings that no other beats in both KL on the forgotten data and score on `kept`. Skipped
        settings are left out.
        """
        frame = self.frame[self.frame["status"] != SKIPPED]
        columns = [name for name in frame if str(name).startswith(MEASURED)]
        groups = frame.groupby(list(self.axes), dropna=False, sort=False)
        mean, draws = groups[columns].mean(), groups.size()
        half = groups[columns].sem().mul(student.ppf((1 + CONFIDENCE) / 2, draws - 1), axis=0)
        others = ("scale", "information", *GAP, "seconds")
        settled = [name for name in others if name in frame and name not in self.axes]
        table = pd.DataFrame({"draws": draws}).join(groups[settled].mean())
        table["ruined"] = groups["status"].agg(lambda status: (status == RUINED).mean())
        for name in columns:
            table[name] = mean[name]
            table[f"{name}_low"] = mean[name] - half[name]
            table[f"{name}_high"] = mean[name] + half[name]
        score = self._sign * table[f"score_{self.kept}"].to_numpy()
        table["pareto"] = pareto(table["kl_forget"].to_numpy(), score)
        return table.reset_index()

    def best(self, cost: float = SHARE_LOSS) -> pd.Series[Any]:
        """The row of `frontier` with the smallest KL on the forgotten data, among those that cost
        little.

        A KL below the floor is no better than the floor; of equal ones the better score wins. Where
        every setting costs more, it is the one that costs least. The choice looks at retrained
        models: it says what a method can reach.

        Args:
            cost: How far the score on `kept` may stay behind the retrained models': a share, 0.01
                is one point of accuracy; of errors, a share of the retrained models' error.
        """
        table, score = self.frontier(), f"score_{self.kept}"
        target, floor = (self.marks["retrained"][name] for name in (score, "kl_forget"))
        unit = 1.0 if self._sign > 0 else abs(target)
        behind = self._sign * (target - table[score]) / unit
        kept = table[behind <= cost + 1e-9]  # 1 - 0.99 rounds up
        if kept.empty:
            return table.iloc[int(behind.fillna(math.inf).argmin())]
        kl = kept["kl_forget"].clip(lower=floor)
        return kept.iloc[int(np.lexsort((behind[kept.index], kl))[0])]

    def save(self, path: str | Path, **notes: Any) -> None:
        """Write a Parquet file, whole or not at all, which pandas reads; units, marks and notes are
        in its metadata.

        Raises:
            StorageError: If it cannot be written.
        """
        frame = self.to_pandas()
        about = {"axes": list(self.axes), "marks": self.marks, "ruin": self.ruin}
        frame.attrs[ATTRIBUTES] = about | self.score.stored() | notes
        files.write_file(Path(path), frame.to_parquet)

    @classmethod
    def load(cls, path: str | Path) -> SweepTable:
        """Inverse of `save`.

        Raises:
            StorageError: If the file is missing, damaged or of something else.
        """
        return read(path)[0]

    def __str__(self) -> str:
        return f"{self._headline}\n{self._shown.to_string(index=False)}"

    __repr__ = __str__

    def _repr_html_(self) -> str:
        head = html.escape(self._headline).replace("\n", "<br>")
        return f"<p>{head}</p>{self._shown.to_html(index=False, border=0)}"

    @property
    def _sign(self) -> float:
        return 1.0 if self.score.higher_is_better else -1.0

    @property
    def _headline(self) -> str:
        original, retrained = self.marks["original"], self.marks["retrained"]
        score = f"score_{self.kept}"
        before, target = (self.score.format(mark[score]) for mark in (original, retrained))
        lines = [
            f"Sweep of {len(self.frame)} cells. KL on the forgotten data: original "
            f"{original['kl_forget']:.3g} nats, floor {retrained['kl_forget']:.3g}. "
            f"{self.score.name.capitalize()} on {self.kept.replace('_', ' ')}: original {before}, "
            f"retrained {target}."
        ]
        counts = self.frame["status"].value_counts()
        if ruined := int(counts.get(RUINED, 0)):
            skipped = int(counts.get(SKIPPED, 0))
            more = f"; {skipped} with more noise were skipped" if skipped else ""
            lines.append(
                f"{ruined} raised the retained loss by more than {self.ruin:g} nats: ruined{more}."
            )
        return "\n".join(lines)

    @property
    def _shown(self) -> pd.DataFrame:
        """The frontier in few columns."""
        table = self.frontier()
        score = f"score_{self.kept}"
        changing = [name for name in self.axes if table[name].nunique(dropna=False) > 1]
        shown = table[changing].astype(object).where(table[changing].notna(), MISSING)
        if "noise" in changing and table["noise"].dtype != float:
            shown["scale"] = table["scale"]
        shown["draws"] = table["draws"]
        for column, title, form in (
            ("kl_forget", "KL forget (nats)", plus_minus),
            (score, self.score.title(self.kept), partial(self.score.format, unit=False)),
        ):
            half = table[f"{column}_high"] - table[column]  # NaN for a single draw
            shown[title] = [form(m, h) for m, h in zip(table[column], half, strict=True)]
        shown["gap closed"] = [share(*gap) for gap in table.reindex(columns=GAP).to_numpy()]
        shown["s"] = table["seconds"].map("{:.2g}".format)
        shown["Pareto"] = np.where(table["pareto"], "●", "")
        return shown

    def _unit(self, name: str) -> str:
        if name in self.axes and self.frame[name].dtype.kind not in "if":
            return ""
        score = "1" if self.score.unit == "%" else "squared unit of the targets"
        for prefix, unit in (("kl_", "nats"), ("loss_", "nats"), ("score_", score)):
            if name.startswith(prefix):
                return unit
        units = {"information": "nats", "seconds": "s", "status": "", "damping": "nats"}
        return units.get(name, "1")


def read(path: str | Path) -> tuple[SweepTable, dict[str, Any]]:
    """(table, notes) of a file of `SweepTable.save`.

    Raises:
        StorageError: If the file is missing, damaged or of something else.
    """
    try:
        frame = pd.read_parquet(path)
        attributes = frame.attrs.pop(ATTRIBUTES)
        score = Score.read(attributes)
        for key in score.stored():
            attributes.pop(key, None)
        axes, marks, ruin = (attributes.pop(key) for key in ("axes", "marks", "ruin"))
    except (OSError, ValueError, KeyError) as error:  # pyarrow's errors are ValueErrors
        got = f"{path}: {error}"
        raise StorageError(got, "the Parquet file of a sweep", files.AGAIN) from error
    frame.attrs = {}
    return SweepTable(frame, tuple(axes), marks, score, ruin), attributes


def pareto(kl: np.ndarray[Any, Any], score: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Which points no other beats: none has a KL as small and a score as large, and one of both
    better; NaN is not.

    Example:
        >>> pareto(np.array([1.0, 2.0, 2.0]), np.array([0.5, 0.9, 0.4])).tolist()
        [True, True, False]
    """
    as_good = (kl[:, None] <= kl) & (score[:, None] >= score)
    better = as_good & ((kl[:, None] < kl) | (score[:, None] > score))
    best: np.ndarray[Any, Any] = ~better.any(0) & np.isfinite(kl) & np.isfinite(score)
    return best
