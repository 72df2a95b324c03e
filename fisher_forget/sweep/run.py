"""sweep(): scores of every cell of a grid, with one curvature estimate and one Newton step for each
distinct need."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import joblib
import pandas as pd
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from fisher_forget._util import files
from fisher_forget._util.isolation import isolated, seeded
from fisher_forget._util.threads import torch_threads
from fisher_forget._util.workers import Tied
from fisher_forget.baselines import METHODS, Unlearner
from fisher_forget.baselines.protocol import settings_of
from fisher_forget.data.batches import Unpack
from fisher_forget.data.split import Indices, Split, resolve_split
from fisher_forget.errors import ConfigError, FisherForgetWarning, StorageError
from fisher_forget.evaluate.closeness import Reference
from fisher_forget.sweep.cells import DRAW, NEWTON, OURS, SHARED, Cell, expand, grouped
from fisher_forget.sweep.scorer import Scorer
from fisher_forget.sweep.table import RUINED, SKIPPED, SweepTable, read
from fisher_forget.unlearn.forget import scrub
from fisher_forget.unlearn.noise import scale_of_noise
from fisher_forget.unlearn.options import ForgetOptions
from fisher_forget.unlearn.problem import Problem
from fisher_forget.unlearn.result import ForgetResult, versions

RUIN = 1.0  # nats of retained loss: a label's typical probability has fallen to a third
Row = dict[str, Any]
KeyedRow = tuple[str, Row]  # a cell's key and row


@dataclass(frozen=True)
class SweepSettings:
    """How a sweep is carried out.

    Attributes:
        ruin: Where every draw of a noise scale raises the retained loss by more than this above the
            original's, in nats, larger scales of that group are not run and marked as skipped.
            `None` runs them all.
        file: Parquet file that the table is written to after every cell (with `jobs` > 1, after
            every curvature estimate's cells); started again, the sweep goes on from there. A file
            of another model, data set or reference is written anew, with a warning.
        jobs: Worker processes, each with one torch thread; cells that share a curvature estimate
            stay together.
        progress: Show a bar with the time left.
    """

    ruin: float | None = RUIN
    file: str | Path | None = None
    jobs: int = 1
    progress: bool = True

    def __post_init__(self) -> None:
        if self.jobs < 1:
            fix = "Pass the number of worker processes."
            raise ConfigError(f"jobs={self.jobs}", "at least 1", fix)


@isolated()
def sweep(
    model: nn.Module,
    data: DataLoader[Any] | Dataset[Any],
    forget_idx: Sequence[int] | Indices | Tensor | range,
    grid: Mapping[str, Iterable[Any]],
    options: ForgetOptions | None = None,
    *,
    reference: Reference,
    unpack: Unpack | None = None,
    **fixed: Any,
) -> SweepTable:
    """Score what every combination of the grid's values makes of a model.

    Any option of `forget` can be an axis: "noise", "exponent", "damping", "steps", "structure",
    "kind", ...; "seed" is that of the noise draw, which is public (no model of a sweep is kept, and
    `forget` draws noise that is not), while curvature and Newton step are shared by all
    cells that differ in noise, exponent and seed only. "method" names methods of
    `fisher_forget.baselines.METHODS`; their own settings can be axes, too, and cross the methods
    that have them.

    Args:
        model: Trained, as for `forget`; untouched.
        data: Loader over the training data set, or the data set.
        forget_idx: Distinct indices into it.
        grid: Option -> values. Where "noise" is in it, the Newton step without noise is scored,
            too.
        options: Of `forget`, in every cell of it; the likelihood is the reference's. Its seed is
            that of the curvature estimate and the Newton step.
        reference: Retrained models to compare with, on the parts "forget", "retain" and "test" at
            least.
        unpack: As for `forget`.
        **fixed: Options of `forget` and of other methods by name, for every cell that has them:
            `weight_decay=5e-4`; and `ruin`, `file`, `jobs`, `progress` of `SweepSettings`.

    Raises:
        ConfigError: An unknown option or method, a value out of range, or a part missing from the
            reference; before any work.
        StorageError: If the file cannot be written.

    Example:
        >>> import torch
        >>> from fisher_forget import Reference, sweep
        >>> x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
        >>> data = torch.utils.data.TensorDataset(x, (x[:, 0] > 0).long())
        >>> original, *retrained = (torch.nn.Linear(3, 2).eval() for _ in range(3))
        >>> parts = {"forget": data, "retain": data, "test": data}
        >>> reference = Reference(original, retrained, parts)
        >>> grid = {"noise": [0.01, 0.1], "structure": ["diagonal", "ekfac"], "seed": range(3)}
        >>> options = {"reference": reference, "drift": True, "progress": False}
        >>> table = sweep(original, data, [0, 5], grid, **options)
        >>> len(table.to_pandas())  # (1 without noise + 2 scales x 3 draws) x 2 structures
        14
    """
    names = {field.name for field in fields(SweepSettings)} & fixed.keys()
    settings = SweepSettings(**{name: fixed.pop(name) for name in names})
    options = options or ForgetOptions()
    cells = expand(grid, options, fixed)
    scorer = Scorer.of(reference, settings.ruin)
    split = resolve_split(data, forget_idx, unpack=unpack)
    seed = fixed.get("seed", options.seed)
    work = _Work(model, split, scorer, seed)
    for cell in cells:
        if cell.method != OURS:
            work.method(cell)  # refuses what is out of range before any work
    axes = tuple(dict.fromkeys(["method", *(name for name in grid if name != "seed")]))
    # what a stored row depends on beside its cell: a changed grid keeps the rows that it shares
    known = split.fingerprint(), reference.targets, reference.retrained, seed, settings.ruin
    mark = files.fingerprint(model, *known, versions()["fisher_forget"])
    file = None if settings.file is None else Path(settings.file)
    rows = {} if file is None else _stored(file, mark)

    def table() -> SweepTable:
        named = [_axes(cell, axes) | rows[cell.key] for cell in cells if cell.key in rows]
        frame = _frame(named, (*axes, "seed"))
        return SweepTable(frame, axes, scorer.marks, scorer.score, settings.ruin)

    groups = grouped(cells, _curvature)
    todo = [group for group in groups if any(cell.key not in rows for cell in group)]
    total, hidden = sum(map(len, todo)), not settings.progress
    with tqdm(total=total, desc="sweep", unit="cell", disable=hidden, leave=False) as bar:
        for scored in _scored(work, todo, rows, settings.jobs):
            for key, row in scored:
                rows[key] = row
                bar.update()
            if file is not None:
                keys = [cell.key for cell in cells if cell.key in rows]
                table().save(file, fingerprint=mark, keys=keys)
    return table()


def _curvature(cell: Cell) -> str:
    """What the curvature of a cell depends on; other methods share nothing."""
    return cell.without((*NEWTON, *DRAW)) if cell.method == OURS else cell.key


@dataclass(frozen=True)
class _Work:
    """What all cells share.

    Attributes:
        model: The original.
        split: Who is retained and forgotten.
        scorer: Scores models.
        seed: Of curvature and Newton step.
    """

    model: nn.Module
    split: Split
    scorer: Scorer
    seed: int

    def method(self, cell: Cell) -> Unlearner:
        """Another method with the cell's options, and the likelihood of all."""
        method = METHODS[cell.method]
        shared = {SHARED: self.scorer.reference.likelihood} if SHARED in settings_of(method) else {}
        return method(**shared, **cell.options)

    def options(self, cell: Cell) -> ForgetOptions:
        """Options of `forget` for the curvature and Newton step of a cell: without its draw."""
        likelihood = self.scorer.reference.likelihood
        draw = {"noise": None, "seed": self.seed}
        return ForgetOptions(**{**cell.options, **draw, SHARED: likelihood})

    def problem(self, cell: Cell) -> Problem:
        """Curvature and gradient of a cell."""
        split, options = self.split, self.options(cell)
        with isolated():
            # the reference has settled what the loss is
            own = self.scorer.reference.likelihood.mean_loss
            return Problem.of(self.model, split, split.forget, options, loss_fn=own)

    def newton(self, cell: Cell, problem: Problem) -> ForgetResult:
        """Newton step of a cell."""
        options = self.options(cell)
        with isolated():
            decay, lasted = options.known_decay, options.training_time
            problem = replace(problem, weight_decay=decay, training_time=lasted)
            return scrub(self.model, problem, options)

    def draw(self, problem: Problem, result: ForgetResult, cell: Cell, unit: float) -> Row:
        """Scores after one noise draw; `unit` is the local forgetting bound of noise of scale 1."""
        noise, exponent, seed = (cell.options[name] for name in DRAW)
        clock = time.perf_counter()
        scale = noise
        if cell.level < 0:  # a target or "auto": the scale is searched for
            damped = result.noise_curvature()
            how = {"noise": noise, "exponent": exponent, "seed": seed}
            scale = scale_of_noise(problem, result.newton, damped, **how).scale
        model = result.with_noise(scale, generator=seeded(seed), exponent=exponent)
        seconds = sum(result.seconds[name] for name in ("curvature", "gradient", "newton"))
        row = {"scale": float(scale), "seconds": seconds + time.perf_counter() - clock}
        row["information"] = unit / scale**2 if scale else math.inf  # the bound falls as 1 / s^2
        return row | self.scores(model)

    def scores(self, model: nn.Module) -> Row:
        """Status and scores of a model."""
        return self.scorer.row(self.scorer.reference.outputs(model))


def _scored(
    work: _Work, groups: list[list[Cell]], rows: Mapping[str, Row], jobs: int
) -> Iterator[Iterable[KeyedRow]]:
    """Rows as they come: one by one in this process, group by group from workers."""
    if jobs == 1 or len(groups) < 2:
        for group in groups:
            yield from ([keyed] for keyed in _rows(work, group, rows))
        return
    known = [{cell.key: rows[cell.key] for cell in group if cell.key in rows} for group in groups]
    workers = joblib.Parallel(n_jobs=min(jobs, len(groups)), return_as="generator_unordered")
    tasks = zip(groups, known, strict=True)
    yield from workers(joblib.delayed(Tied(_all_rows))(work, *task) for task in tasks)


def _all_rows(work: _Work, group: list[Cell], known: Mapping[str, Row]) -> list[KeyedRow]:
    """The rows of a group, in a worker."""
    with torch_threads(1):
        return list(_rows(work, group, known))


def _rows(work: _Work, group: list[Cell], known: Mapping[str, Row]) -> Iterator[KeyedRow]:
    """The rows of a group: one cell of another method, or all cells that share a curvature
    estimate."""
    if group[0].method != OURS:
        done = work.method(group[0]).unlearn(work.model, work.split)
        unscaled = {"scale": math.nan, "seconds": done.seconds, "information": math.nan}
        yield group[0].key, unscaled | work.scores(done.model)
        return
    problem: Problem | None = None
    for step in grouped(group, lambda cell: cell.without(DRAW)):
        result = None
        for ladder in grouped(step, lambda cell: cell.options["exponent"]):
            unit, ruined = math.nan, False
            # from little noise to much, so that what is hopeless is known before it is run
            ladder = sorted(ladder, key=lambda cell: cell.level)
            for draws in grouped(ladder, lambda cell: repr(cell.options["noise"])):
                rows = []
                for cell in draws:
                    row = known.get(cell.key)
                    if row is None and ruined:
                        row = {"status": SKIPPED}
                    elif row is None:
                        problem = problem or work.problem(cell)
                        result = result or work.newton(cell, problem)
                        if math.isnan(unit):
                            unit = result.information(1.0, exponent=cell.options["exponent"])
                        row = work.draw(problem, result, cell, unit)
                    rows.append(row)
                    yield cell.key, row
                all_ruined = all(row["status"] == RUINED for row in rows)
                ruined = ruined or (draws[0].level > 0 and all_ruined)


def _axes(cell: Cell, axes: Iterable[str]) -> Row:
    """The cell's place in the table."""
    return {name: cell.options.get(name) for name in (*axes, "seed")} | {"method": cell.method}


def _frame(rows: list[Row], axes: Sequence[str]) -> pd.DataFrame:
    """Rows as a table that a file can hold: an axis of numbers and words becomes one of words."""
    frame = pd.DataFrame(rows)
    for name in axes:
        values = [row[name] for row in rows]
        if not all(value is None or isinstance(value, (int, float)) for value in values):
            frame[name] = pd.Series(
                [None if value is None else _word(value) for value in values], dtype="str"
            )
    return frame


def _word(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _stored(path: Path, mark: str) -> dict[str, Row]:
    """Rows of an earlier sweep of the same model, data and reference; skipped ones are decided
    again."""
    if not path.exists():
        return {}
    try:
        table, notes = read(path)
        if notes["fingerprint"] != mark:
            got = "a sweep of another model, data set or reference"
            raise StorageError(got, "one of these", "Name another file.")
    except (StorageError, KeyError) as error:
        message = f"{path} cannot be used and is written anew: {error}"
        warnings.warn(message, FisherForgetWarning, stacklevel=3)
        return {}
    measured = table.frame.drop(columns=list({*table.axes, "seed"}))
    rows = zip(notes["keys"], measured.to_dict("records"), strict=True)
    return {
        key: {str(n): v for n, v in row.items()} for key, row in rows if row["status"] != SKIPPED
    }
