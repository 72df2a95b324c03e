"""evaluate(): every metric of a scrubbed model beside the original's and what retrained models
score themselves."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, TypedDict, Unpack

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from fisher_forget._util.checks import check_names
from fisher_forget._util.copies import unwrapped
from fisher_forget._util.isolation import isolated
from fisher_forget._util.markdown import markdown_table
from fisher_forget._util.numbers import MISSING
from fisher_forget.data import batches
from fisher_forget.data.split import Split
from fisher_forget.errors import ConfigError, DataError, NumericalError
from fisher_forget.evaluate.conclusion import BLIND, Conclusion, conclude
from fisher_forget.evaluate.ensemble import RetrainedEnsemble
from fisher_forget.evaluate.metric import LEAST, Context, Metric, Subject
from fisher_forget.evaluate.metrics import METRICS
from fisher_forget.evaluate.predictions import (
    check_scored_parts,
    predict,
    settled_by,
    whole_splits,
)
from fisher_forget.evaluate.scoring import (
    TOO_FEW,
    UNDEFINED,
    EvaluationRow,
    score_metric,
)
from fisher_forget.evaluate.verdict import (
    AS_RETRAINED,
    FARTHER,
    NOT_FORGOTTEN,
    OVER_FORGOTTEN,
    UNDECIDED,
)
from fisher_forget.likelihood import Likelihood
from fisher_forget.unlearn.result import ForgetResult

Scrubbed = ForgetResult | nn.Module
Outputs = list[dict[str, Tensor]]  # of each model: part -> outputs [N, ...]
# retrained models whose spread is the yardstick, at least, and those of the control
REFERENCE, HELD_OUT = 3, 1
CONTROL = "control (retrained)"  # retrained models that take no part in the targets
MARKS = {
    NOT_FORGOTTEN: "−",
    AS_RETRAINED: "=",
    OVER_FORGOTTEN: "+",
    FARTHER: "×",
    UNDECIDED: "≈",
    UNDEFINED: "",
}
MARKS_LEGEND = (
    f"{MARKS[AS_RETRAINED]} as retrained: not told apart, and most of the original's distance "
    f"is gone; {MARKS[UNDECIDED]} undecided: not told apart; "
    f"{MARKS[NOT_FORGOTTEN]} not forgotten; {MARKS[OVER_FORGOTTEN]} over-forgotten (on parts other "
    f"than forget: off on the original's side; off on the other side); "
    f"{MARKS[FARTHER]} farther from retrained than the original"
)
READING = (
    "Rows with * decide, together at 5 % (Holm). Every other row describes: a retrained model is "
    "outside of one in twenty of them."
)


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

    def __str__(self) -> str:
        return self.to_markdown()

    @property
    def methods(self) -> list[str]:
        """The original first, the control last."""
        return list(dict.fromkeys(s.method for s in self.scores))

    def get(self, metric: str, part: str = "forget", method: str | None = None) -> EvaluationRow:
        """One row.

        Raises:
            ConfigError: If there is no such row.
        """
        for score in self.scores:
            if (score.metric, score.part) == (metric, part) and method in (None, score.method):
                return score
        got = f"no score {metric!r} on {part!r} of {method!r}"
        raise ConfigError(got, "a row of the table", "See to_pandas().")

    def conclusion(self, method: str) -> Conclusion:
        """Whether a method's models are as retrained: its primary rows together.

        Raises:
            ConfigError: If there is no such method.
        """
        if method not in self.methods:
            expected = f"one of {self.methods}"
            raise ConfigError(f"the method {method!r}", expected, "Correct the name.")
        rows = [s for s in self.scores if s.primary and s.method == method and s.label != UNDEFINED]
        return conclude(rows, [self.get(row.metric, row.part, "original") for row in rows])

    def conclusions(self) -> list[str]:
        """A sentence for each method, and one where there is nothing to forget that can be seen."""
        found = {method: self.conclusion(method) for method in self.methods}
        lines = [f"{method}: {conclusion.findings}." for method, conclusion in found.items()]
        blind = any(conclusion.blind for conclusion in found.values())
        return [*lines, f"{BLIND}."] if blind else lines

    def counted(self) -> str:
        """How many models each column is of."""
        of = {m: max(s.models for s in self.scores if s.method == m) for m in self.methods}
        means = ", ".join(f"{method} {count}" for method, count in of.items())
        return f"Targets are of {self.retrained} retrained models; values are means over: {means}"

    def omitted(self) -> list[str]:
        """Metrics that could not be computed, a sentence for each reason."""
        names: dict[str, list[str]] = {}
        for name, why in self.left_out.items():
            names.setdefault(why, []).append(name)
        return [f"Left out: {', '.join(group)}, since {why}." for why, group in names.items()]

    def to_pandas(self) -> pd.DataFrame:
        """One row a score, with the columns of `EvaluationRow`."""
        return pd.DataFrame(
            [asdict(s) for s in self.scores], columns=[f.name for f in fields(EvaluationRow)]
        )

    def to_markdown(self) -> str:
        """Metrics down, methods across; the target with the range in which one more retrained model
        lies with 95 % first."""
        methods, rows = self.methods, []
        for metric, part in dict.fromkeys((s.metric, s.part) for s in self.scores):
            row = {s.method: s for s in self.scores if (s.metric, s.part) == (metric, part)}
            # the original's row may be undefined, and says nothing of the retrained models then
            first = min(row.values(), key=lambda s: not math.isfinite(s.target))
            unit = f", {first.unit}" if first.unit else ""
            mean = f"{first.target:.3g}" if math.isfinite(first.target) else MISSING
            target = f"{mean} {expected(first, '({} ... {})')}".strip()
            cells = [shown(row[m]) if m in row else "" for m in methods]
            name = f"{metric}{unit}" + " *" * first.primary
            rows.append([name, part, target, *cells])
        lines = [
            markdown_table(["metric", "part", "retrained (95 % of new ones)", *methods], rows),
            "",
            f"{MARKS_LEGEND}; – undefined. {READING}",
            "",
            f"{self.counted()}. Reasons of each row: the column `reason` of `to_pandas()`.",
            "",
            *(f"- {line}" for line in self.conclusions()),
        ]
        return "\n".join(lines + [""] * bool(self.left_out) + self.omitted())

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a JSON file, see `report/evaluation.schema.json`; NaN is null."""
        rows = [{name: _null(value) for name, value in asdict(s).items()} for s in self.scores]
        conclusions = {m: self.conclusion(m).to_dict() for m in self.methods}
        return {
            "schema": 2,
            "retrained": self.retrained,
            "left_out": self.left_out,
            "conclusions": conclusions,
            "scores": rows,
        }


def expected(score: EvaluationRow, pattern: str) -> str:
    """The range of one more retrained model; empty where there is none."""
    ends = score.target_low, score.target_high
    return pattern.format(*(f"{x:.3g}" for x in ends)) if math.isfinite(sum(ends)) else ""


def shown(score: EvaluationRow) -> str:
    """The value and the mark of its verdict; a dash where it is undefined."""
    return "–" if score.label == UNDEFINED else f"{score.value:.3g} {MARKS[score.label]}"


class EvaluateOptions(TypedDict, total=False):
    """Rarer options of `evaluate`.

    Attributes:
        held_out: Retrained models that make the control, 1 by default.
        unpack: As for `forget`.
        seed: Of subsamples, 0 by default.
    """

    held_out: int
    unpack: batches.Unpack | None
    seed: int


@isolated()
def evaluate(
    scrubbed: Scrubbed | Sequence[Scrubbed] | Mapping[str, Scrubbed | Sequence[Scrubbed]],
    ensemble: RetrainedEnsemble,
    data: Mapping[str, Dataset[Any]],
    *,
    likelihood: Likelihood | str | None = None,
    split: Split | None = None,
    teacher: nn.Module | None = None,
    metrics: Iterable[str] | None = None,
    **options: Unpack[EvaluateOptions],
) -> Evaluation:
    """How close to retrained, metric by metric, with targets and verdicts.

    The last `held_out` retrained models are scored like scrubbed ones, as a control that must pass,
    and take no part in the targets.

    Args:
        scrubbed: One result or model, or several, one for each of the ensemble's originals; or
            those of several methods by name.
        ensemble: Models trained with and without the forget set.
        data: Data sets by name; "forget", "retain" and "test" are what membership attacks read.
        likelihood: Name or instance; by default that of the results, or "categorical" for models.
            A name gives way to the loss that a model which takes `labels` has itself.
        split: The training data, for metrics that differentiate or train.
        teacher: A model with random weights, for ZRF.
        metrics: Names; by default all of `METRICS` but those that are computed by name only.
        **options: `held_out`, retrained models that make the control (1); `unpack`, as for
            `forget`; `seed` of subsamples (0).

    Raises:
        ConfigError: Unknown metrics.
        DataError: Fewer than three retrained models in the reference, other shapes, or another
            forget set.
        NumericalError: Outputs that are not finite.
    """
    check_names(options, EvaluateOptions.__annotations__)
    names = _names(metrics)
    given = scrubbed if isinstance(scrubbed, Mapping) else {"scrubbed": scrubbed}
    methods = {name: _models(results, ensemble) for name, results in given.items()}
    count = _reference_size(ensemble, options.get("held_out", HELD_OUT))
    unpack = options.get("unpack")
    splits = whole_splits(data, unpack)
    originals, retrained, targets = ensemble.outputs(data, unpack=unpack)
    outputs = {
        method: [{part: predict(model, splits[part])[0] for part in splits} for model in models]
        for method, models in methods.items()
    }
    _check(list(itertools.chain.from_iterable(outputs.values())), retrained, targets)
    if likelihood is None:
        results = [x for group in given.values() for x in _listed(group)]
        settled = (x.options.likelihood for x in results if isinstance(x, ForgetResult))
        likelihood = next(settled, "categorical")
    kind = settled_by(ensemble.originals.models[0], splits, likelihood)
    check_scored_parts(kind, targets)

    def aligned(of_models: Outputs) -> Outputs:
        return [
            {part: kind.aligned(x, targets[part])[0] for part, x in model.items()}
            for model in of_models
        ]

    sources, members = ensemble.originals.models, ensemble.retrained.models
    subjects = _subjects(aligned(_unstacked(retrained)), members, sources[:1])
    groups = {"original": _subjects(aligned(_unstacked(originals)), sources, sources)} | {
        method: _subjects(aligned(outputs[method]), models, sources)
        for method, models in methods.items()
    }
    if subjects[count:]:
        groups[CONTROL] = subjects[count:]
    blank = None
    if teacher is not None and "forget" in splits:
        blank = kind.aligned(predict(teacher, splits["forget"])[0], targets["forget"])[0]
    labels = {part: kind.aligned(retrained[part][0], y)[1] for part, y in targets.items()}
    context = Context(kind.of_aligned, kind, labels, split, blank, options.get("seed", 0))
    return _table(names, groups, subjects[:count], context)


def _names(metrics: Iterable[str] | None) -> list[str]:
    if metrics is None:
        return [name for name, metric in METRICS.items() if not metric.by_name]
    names = list(metrics)
    if unknown := [name for name in names if name not in METRICS]:
        got = f"the metrics {unknown}"
        raise ConfigError(got, f"some of {list(METRICS)}", "Correct the names.")
    return names


def _reference_size(ensemble: RetrainedEnsemble, held_out: int) -> int:
    models = len(ensemble.retrained.models)
    if models - held_out < REFERENCE or held_out < 0:
        got = f"{models} retrained models, {held_out} of them held out"
        expected = f"at least {REFERENCE} in the reference: a spread needs them"
        raise DataError(got, expected, "Retrain more seeds.")
    return models - held_out


def _unstacked(outputs: Mapping[str, Tensor]) -> Outputs:
    """Part -> outputs [M, N, ...], model by model."""
    count = len(next(iter(outputs.values())))
    return [{part: x[i] for part, x in outputs.items()} for i in range(count)]


def _subjects(
    outputs: Outputs, models: Sequence[nn.Module], originals: Sequence[nn.Module]
) -> list[Subject]:
    """Models as the metrics see them, each beside its own original where there are as many."""
    alike = len(originals) == len(models)
    sources = originals if alike else [originals[0]] * len(models)
    return [Subject(*parts) for parts in zip(outputs, models, sources, strict=True)]


def _table(
    names: Sequence[str],
    groups: Mapping[str, Sequence[Subject]],
    retrained: Sequence[Subject],
    context: Context,
) -> Evaluation:
    """The rows of all metrics that can be computed."""
    left_out = {name: why for name in names if (why := METRICS[name].missing(context))}
    metrics = [METRICS[name] for name in names if name not in left_out]
    pairs: list[tuple[Metric, str]] = [
        (m, part) for m in metrics for part in m.parts or context.targets
    ]
    if max(map(len, groups.values())) < LEAST or len(retrained) < 2 * LEAST:
        left_out |= {metric.name: TOO_FEW for metric in metrics if metric.group is not None}
    rows = [
        row
        for metric, part in pairs
        if metric.name not in left_out
        for row in score_metric(metric, part, groups, retrained, context)
    ]
    return Evaluation(tuple(rows), len(retrained), left_out)


def _models(given: Scrubbed | Sequence[Scrubbed], ensemble: RetrainedEnsemble) -> list[nn.Module]:
    """The models of one method, which must have forgotten what the ensemble was trained without."""
    results = _listed(given)
    for result in results:
        if isinstance(result, ForgetResult) and not np.array_equal(
            result.split.forget, ensemble.forget
        ):
            got = f"a result that forgot {len(result.split.forget)} samples"
            expected = "the forget set of the ensemble"
            raise DataError(got, expected, "Retrain the ensemble without these samples.")
    if len(results) not in (1, originals := len(ensemble.originals.models)):
        got = f"{len(results)} models of a method, made from {originals} original(s)"
        expected = "one, or one of each original: models of one original are not independent"
        raise DataError(got, expected, "Evaluate them one by one, or train as many originals.")
    return [r.model if isinstance(r, ForgetResult) else unwrapped(r) for r in results]


def _listed(given: Scrubbed | Sequence[Scrubbed]) -> list[Scrubbed]:
    return list(given) if isinstance(given, Sequence) else [given]


def _null(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_null(number) for number in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _check(
    outputs: Sequence[Mapping[str, Tensor]],
    retrained: Mapping[str, Tensor],
    targets: Mapping[str, Tensor],
) -> None:
    for part, members in retrained.items():
        expected, scrubbed = tuple(members.shape[1:]), [of_model[part] for of_model in outputs]
        for shape in (tuple(x.shape) for x in scrubbed):
            if shape != expected or shape[0] != len(targets[part]):
                got = f"outputs of shape {shape} on {part!r}, {expected} of the retrained models"
                fix = "Keep every class in the retrained models, and predict on the same data."
                raise DataError(got, "the same samples and labels", fix)
        for what, tensor in (("scrubbed", torch.stack(scrubbed)), ("retrained", members)):
            if not bool((tensor < math.inf).all()):  # -inf masks a class out
                got = f"NaN or infinite outputs of a {what} model on {part!r}"
                raise NumericalError(got, "finite", "Check it.")
