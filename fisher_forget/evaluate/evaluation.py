"""evaluate(): every metric of a scrubbed model beside the original's and what retrained models
score themselves."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from fisher_forget._util.markdown import markdown_table
from fisher_forget.data.batches import Unpack
from fisher_forget.data.split import Split, resolve_split
from fisher_forget.errors import ConfigError, DataError, NumericalError
from fisher_forget.evaluate.ensemble import RetrainedEnsemble, predict
from fisher_forget.evaluate.intervals import t_interval
from fisher_forget.evaluate.metrics import LEAST, METRICS, Context, Metric, Subject
from fisher_forget.evaluate.verdict import (
    INDISTINGUISHABLE,
    NOT_FORGOTTEN,
    OVER_FORGOTTEN,
    UNDECIDED,
    verdict,
)
from fisher_forget.likelihood import Likelihood, resolve_likelihood
from fisher_forget.unlearn.result import ForgetResult

OTHERS = 10  # retrained models that a retrained model is compared with at most, for the target of a pair metric
Scrubbed = ForgetResult | nn.Module
FALSE_ALARM = 0.05  # that a retrained model fails any of the rows
UNDEFINED = "undefined"
CONTROL = "control (retrained)"  # retrained models that take no part in the targets
TOO_FEW = (
    f"it takes {LEAST} models of a method and {LEAST} retrained ones beside as many for the target"
)
ENOUGH = {
    "%": 1.0,
    "epochs": 1.0,
}  # a difference that counts where all retrained models score the same


@dataclass(frozen=True)
class EvaluationRow:
    """One metric of one model on one part of the data.

    Attributes:
        method: "original", "control (retrained)", or the name of a method.
        metric: Key of `METRICS`.
        part: Of the data.
        unit: Of the numbers below.
        value: Mean over the method's models.
        models: How many these are.
        low: Lower end of the 95 % confidence interval of `value` over them; NaN for a single one.
        high: Upper end.
        target: Mean over the retrained models of what they score themselves.
        target_low: Lower end of the interval where as many further retrained models would have
            their mean; the intervals of all rows of a method hold together with 95 % (Bonferroni).
        target_high: Upper end.
        label: "not forgotten", "indistinguishable from retrained", "over-forgotten", "undecided"
            (see `verdict`) or "undefined" where a value is not finite.
        reason: Why, and how many models would tell more.
        values: Of every model of the method.
        target_std: Standard deviation over the retrained models.
    """

    method: str
    metric: str
    part: str
    unit: str
    value: float
    models: int
    low: float
    high: float
    target: float
    target_low: float
    target_high: float
    label: str
    reason: str
    values: tuple[float, ...] = ()
    target_std: float = math.nan


@dataclass(frozen=True)
class Evaluation:
    """A tidy table of scores.

    Attributes:
        scores: One row a method, metric and part.
        retrained: Number of retrained models.
        left_out: Metrics that could not be computed, and why.
    """

    scores: tuple[EvaluationRow, ...]
    retrained: int
    left_out: dict[str, str]

    def get(self, metric: str, part: str = "forget", method: str | None = None) -> EvaluationRow:
        """One row.

        Raises:
            ConfigError: If there is no such row.
        """
        for score in self.scores:
            if (score.metric, score.part) == (metric, part) and method in (None, score.method):
                return score
        raise ConfigError(
            f"no score {metric!r} on {part!r} of {method!r}",
            "a row of the table",
            "See to_pandas().",
        )

    def to_pandas(self) -> pd.DataFrame:
        """One row a score, with the columns of `EvaluationRow`."""
        return pd.DataFrame(
            [asdict(s) for s in self.scores], columns=[f.name for f in fields(EvaluationRow)]
        )

    def to_markdown(self) -> str:
        """Metrics down, methods across; the target with its 95 % prediction interval first."""
        methods = list(dict.fromkeys(s.method for s in self.scores))
        rows = []
        for metric, part in dict.fromkeys((s.metric, s.part) for s in self.scores):
            row = {s.method: s for s in self.scores if (s.metric, s.part) == (metric, part)}
            first = next(iter(row.values()))
            unit = f", {first.unit}" if first.unit else ""
            target = f"{first.target:.3g} ({first.target_low:.3g} ... {first.target_high:.3g})"
            cells = [shown(row[m]) if m in row else "" for m in methods]
            rows.append([f"{metric}{unit}", part, target, *cells])
        lines = [
            markdown_table(["metric", "part", "retrained (expected range, 95 %)", *methods], rows),
            "",
            "; ".join(f"{mark or '–'} {label}" for label, mark in MARKS.items())
            + f"; {self.retrained} retrained models.",
        ]
        lines += [f"Left out: {name}, since {why}." for name, why in self.left_out.items()]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a JSON file, see `report/evaluation.schema.json`; NaN is null."""
        rows = [
            {name: _null(value) for name, value in asdict(s).items()}
            | {"values": [_null(x) for x in s.values]}
            for s in self.scores
        ]
        return {"schema": 1, "retrained": self.retrained, "left_out": self.left_out, "scores": rows}


def shown(score: EvaluationRow) -> str:
    """The value and the mark of its verdict; a dash where it is undefined."""
    return "–" if score.label == UNDEFINED else f"{score.value:.3g} {MARKS[score.label]}"


MARKS = {
    NOT_FORGOTTEN: "−",
    INDISTINGUISHABLE: "=",
    OVER_FORGOTTEN: "+",
    UNDECIDED: "≈",
    UNDEFINED: "",
}
MEANING = {
    INDISTINGUISHABLE: "shown to be as retrained",
    UNDECIDED: "not told apart from retrained, more models would tell",
    NOT_FORGOTTEN: "not forgotten",
    OVER_FORGOTTEN: "over-forgotten",
}


def evaluate(
    scrubbed: Scrubbed | Sequence[Scrubbed] | Mapping[str, Scrubbed | Sequence[Scrubbed]],
    ensemble: RetrainedEnsemble,
    data: Mapping[str, Dataset[Any]],
    *,
    likelihood: Likelihood | str = "categorical",
    split: Split | None = None,
    teacher: nn.Module | None = None,
    metrics: Iterable[str] | None = None,
    held_out: int = 1,
    unpack: Unpack | None = None,
    seed: int = 0,
) -> Evaluation:
    """How close to retrained, metric by metric, with targets and verdicts.

    The last `held_out` retrained models are scored like scrubbed ones, as a control that must pass,
    and take no part in the targets.

    Args:
        scrubbed: One result or model, or several, one for each of the ensemble's originals; or
            those of several methods by name.
        ensemble: Models trained with and without the forget set.
        data: Data sets by name; "forget", "retain" and "test" are what membership attacks read.
        likelihood: Name or instance.
        split: The training data, for metrics that differentiate or train.
        teacher: A model with random weights, for ZRF.
        metrics: Names; by default all of `METRICS` but those that train.
        held_out: Retrained models left out as a control.
        unpack: As for `forget`.
        seed: Of subsamples.

    Raises:
        ConfigError: Unknown metrics.
        DataError: Fewer than three retrained models in the reference, other shapes, or another
            forget set.
        NumericalError: Outputs that are not finite.
    """
    kind = resolve_likelihood(likelihood)
    chosen = (
        [name for name, metric in METRICS.items() if not metric.by_name]
        if metrics is None
        else list(metrics)
    )
    if unknown := [name for name in chosen if name not in METRICS]:
        raise ConfigError(
            f"the metrics {unknown}", f"some of {list(METRICS)}", "Correct the names."
        )
    given = scrubbed if isinstance(scrubbed, Mapping) else {"scrubbed": scrubbed}
    methods = {name: _models(results, ensemble) for name, results in given.items()}
    reference = len(ensemble.retrained.models) - held_out
    if reference < 3 or held_out < 0:
        raise DataError(
            f"{len(ensemble.retrained.models)} retrained models, {held_out} of them held out",
            "at least 3 in the reference: a spread needs them",
            "Retrain more seeds.",
        )
    originals, retrained, targets = ensemble.outputs(data, unpack=unpack)
    splits = {
        name: resolve_split(part, [], unpack=unpack, allow_empty=True)
        for name, part in data.items()
    }
    outputs = {
        method: [{part: predict(model, splits[part])[0] for part in splits} for model in models]
        for method, models in methods.items()
    }
    _check(list(itertools.chain.from_iterable(outputs.values())), retrained, targets)
    sources = ensemble.originals.models

    def subjects(
        stacked: Mapping[str, Tensor], members: Sequence[nn.Module], made_from: Sequence[nn.Module]
    ) -> list[Subject]:
        pairs = zip(members, made_from, strict=True)
        return [
            Subject({part: x[i] for part, x in stacked.items()}, *pair)
            for i, pair in enumerate(pairs)
        ]

    every = subjects(
        retrained, ensemble.retrained.models, sources[:1] * len(ensemble.retrained.models)
    )
    ones, control = every[:reference], every[reference:]
    groups = {"original": subjects(originals, sources, sources)}
    for method, models in methods.items():
        own = sources if len(sources) == len(models) else sources[:1] * len(models)
        groups[method] = [Subject(*each) for each in zip(outputs[method], models, own, strict=True)]
    if control:
        groups[CONTROL] = control
    blank = (
        None if teacher is None or "forget" not in splits else predict(teacher, splits["forget"])[0]
    )
    context = Context(kind, targets, split, blank, seed)
    left_out = {name: why for name in chosen if (why := METRICS[name].missing(context))}
    rows = [
        (m, part)
        for m in map(METRICS.__getitem__, chosen)
        if m.name not in left_out
        for part in m.parts or targets
    ]
    level = 1 - FALSE_ALARM / max(len(rows), 1)
    few = max(map(len, groups.values())) < LEAST or len(ones) < 2 * LEAST
    left_out |= {m.name: TOO_FEW for m, _ in rows if few and m.group is not None}
    rows = [(m, part) for m, part in rows if m.name not in left_out]
    scores = [
        score
        for metric, part in rows
        for score in _scored(metric, part, groups, ones, context, level)
    ]
    return Evaluation(tuple(scores), reference, left_out)


def _models(given: Scrubbed | Sequence[Scrubbed], ensemble: RetrainedEnsemble) -> list[nn.Module]:
    """The models of one method, which must have forgotten what the ensemble was trained without."""
    results = list(given) if isinstance(given, Sequence) else [given]
    for result in results:
        if isinstance(result, ForgetResult) and not np.array_equal(
            result.split.forget, ensemble.forget
        ):
            raise DataError(
                f"a result that forgot {len(result.split.forget)} samples",
                "the forget set of the ensemble",
                "Retrain the ensemble without these samples.",
            )
    return [r.model if isinstance(r, ForgetResult) else r for r in results]


def _scored(
    metric: Metric,
    part: str,
    groups: Mapping[str, Sequence[Subject]],
    ones: Sequence[Subject],
    context: Context,
    level: float,
) -> list[EvaluationRow]:
    """The rows of one metric on one part."""
    rows: list[EvaluationRow] = []
    own = _targets(metric, ones, 1, part, context)
    before: list[float] = []
    for method, group in groups.items():
        if metric.group is not None:
            own = _targets(metric, ones, len(group), part, context)
            # against as many as the groups of the target are: such numbers depend on how many
            # models there are
            found = (
                [metric.group(group, ones[: len(ones) - len(group)], part, context)] if own else []
            )
        else:
            found = [_value(metric, a, ones, part, context) for a in group]
        # where the score is not defined for the original itself, such as the direction of no step,
        # any side is off
        before = before or [v for v in found if math.isfinite(v)]
        unit = metric.unit_in(context)
        rows.append(_score(metric, unit, method, part, found, own, before or found, level))
    return rows


def _targets(
    metric: Metric, ones: Sequence[Subject], size: int, part: str, context: Context
) -> list[float]:
    """What retrained models score: each for itself; for a group metric, as many as the method has
    models, by turns."""
    if metric.group is None:
        return [_value(metric, a, _others(ones, i), part, context) for i, a in enumerate(ones)]
    if size < LEAST or len(ones) - size < LEAST:
        return []
    turns = range(min(OTHERS, len(ones)))
    order = [[ones[(i + k) % len(ones)] for k in range(len(ones))] for i in turns]
    return [metric.group(each[:size], each[size:], part, context) for each in order]


def _score(
    metric: Metric,
    unit: str,
    method: str,
    part: str,
    found: Sequence[float],
    own: Sequence[float],
    before: Sequence[float],
    level: float,
) -> EvaluationRow:
    common = method, metric.name, part, unit
    capped = (
        f" Counting ended at {metric.cap:g}."
        if max([*found, *own], default=0) >= metric.cap
        else ""
    )
    if not found or not np.isfinite([*found, *own]).all():
        why = "A value is not finite." if found else TOO_FEW
        return EvaluationRow(
            *common, math.nan, len(found), *(math.nan,) * 5, UNDEFINED, why, tuple(found)
        )
    margin = (
        ENOUGH.get(unit) if np.ptp(own) == 0 else None
    )  # without a spread only a margin can judge
    judged, interval = (
        verdict(found, own, original=before, margin=margin, level=level),
        t_interval(found),
    )
    ends = interval.low, interval.high, float(np.mean(own)), judged.low, judged.high
    spread = float(np.std(own, ddof=1))
    return EvaluationRow(
        *common,
        interval.value,
        len(found),
        *ends,
        judged.label,
        judged.reason + capped,
        tuple(found),
        spread,
    )


def _value(
    metric: Metric, a: Subject, others: Sequence[Subject], part: str, context: Context
) -> float:
    if "weights" in metric.needs and not _alike(a.model, a.original):
        return math.nan
    if metric.solo is not None:
        return metric.solo(a, part, context)
    assert metric.pair is not None
    return float(np.mean([metric.pair(a, b, part, context) for b in others]))


def _null(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _alike(a: nn.Module, b: nn.Module) -> bool:
    shapes = [{name: p.shape for name, p in model.named_parameters()} for model in (a, b)]
    return shapes[0] == shapes[1]


def _others(ones: Sequence[Subject], index: int) -> list[Subject]:
    """The next few members after one, in a ring: every member is compared with, and is compared,
    equally often."""
    count = min(OTHERS, len(ones) - 1)
    return [ones[(index + k) % len(ones)] for k in range(1, count + 1)]


def _check(
    outputs: Sequence[Mapping[str, Tensor]],
    retrained: Mapping[str, Tensor],
    targets: Mapping[str, Tensor],
) -> None:
    for part, members in retrained.items():
        expected = tuple(members.shape[1:])
        for found in outputs:
            if tuple(found[part].shape) != expected or len(found[part]) != len(targets[part]):
                raise DataError(
                    f"outputs of shape {tuple(found[part].shape)} on {part!r}, {expected} of the retrained models",
                    "the same samples and labels",
                    "Keep every class in the retrained models, and predict on the same data.",
                )
        for what, tensor in (
            ("scrubbed", torch.stack([o[part] for o in outputs])),
            ("retrained", members),
        ):
            if not bool(torch.isfinite(tensor).all()):
                raise NumericalError(
                    f"NaN or infinite outputs of a {what} model on {part!r}", "finite", "Check it."
                )
