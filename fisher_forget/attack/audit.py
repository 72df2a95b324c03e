"""All attacks on one deletion, in one table: what is found, beside exact retraining, in a sentence
each.

Who is asked about is drawn once: deleted samples, as many retained ones of the same classes, and as
many unseen ones. An attack that this model or these data do not allow is named with the reason.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypedDict, Unpack

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from fisher_forget._util.checks import check_names, is_number, is_whole
from fisher_forget._util.isolation import isolated
from fisher_forget._util.markdown import markdown_table
from fisher_forget._util.progress import bar
from fisher_forget.attack.after_release import FineTuning, Quantisation, Relearning
from fisher_forget.attack.findings import TONES, Finding, decimals, shown
from fisher_forget.attack.inference import STATISTICS, DeletionInference
from fisher_forget.attack.membership import MembershipInference
from fisher_forget.attack.pairs import Pair
from fisher_forget.attack.reconstruct import ChangedAnswers, NewtonInversion
from fisher_forget.attack.release import Model
from fisher_forget.attack.shadow import ShadowInference
from fisher_forget.data.samples import samples, take
from fisher_forget.data.split import Indices, Split, resolve_split, some
from fisher_forget.errors import ConfigError, DataError, FisherForgetError
from fisher_forget.evaluate.groups import Groups, Harm, harm_by_group
from fisher_forget.evaluate.intervals import Interval
from fisher_forget.evaluate.predictions import settled_by
from fisher_forget.ledger import Ledger
from fisher_forget.ledger.evidence import model_fingerprint
from fisher_forget.likelihood import Likelihood, resolve_likelihood

ASKED = 1000  # samples of each kind that are asked about, at most
KNOWN = 10  # deleted samples that someone has who makes a model learn again
BITS = (8, 4)  # of quantised weights
HARM, SHADOW = "harm by group", "shadow inference"
NOTE = (
    "Every interval is a 95 % one by itself: of twenty, one is wrong by chance. An attack that "
    "finds nothing shows that this attack finds nothing."
)


@dataclass(frozen=True, repr=False)
class Audit:
    """What attacks find in one deletion.

    Attributes:
        findings: One an attack.
        skipped: Attack -> why it was not made.
        harm: What became of each group of unseen samples, of each model; empty where there are no
            groups.
        models: Fingerprints of the audited models; empty ones of functions.
    """

    findings: tuple[Finding, ...]
    skipped: Mapping[str, str]
    harm: tuple[Harm, ...]
    models: tuple[str, ...]

    @property
    def wrong(self) -> tuple[Finding, ...]:
        """What exact retraining would not show, or what is beyond a limit."""
        return tuple(f for f in self.findings if TONES[f.verdict] == "poor")

    @property
    def answer(self) -> str:
        """All of it in a sentence."""
        total = len(self.findings)
        if self.wrong:
            names = "; ".join(f"{f.attack}: {f.verdict}" for f in self.wrong)
            return f"{len(self.wrong)} of {total} attacks find too much. {names}."
        if all(f.retrained is None for f in self.findings):
            found = sum(f.verdict == "found" for f in self.findings)
            return (
                f"{found} of {total} attacks find something. Whether exact deletion shows as much "
                "is not known: that takes retrained models."
            )
        unclear = sum(f.verdict == "cannot tell" for f in self.findings)
        text = f"None of {total} attacks finds more than after exact retraining"
        return text + (f"; {unclear} cannot tell: too few samples or models." if unclear else ".")

    def to_pandas(self) -> pd.DataFrame:
        """A row an attack, in numbers."""
        rows = []
        for f in self.findings:
            exact = f.retrained or Interval(np.nan, np.nan, np.nan)
            ends = [(x.value, x.low, x.high) for x in (f.found, exact)]
            rows.append((f.attack, f.verdict, f.measure, *ends[0], f.nothing, *ends[1]))
        heads = ["attack", "verdict", "measure", "found", "found_low", "found_high", "nothing"]
        return pd.DataFrame(
            rows, columns=[*heads, *(f"retrained{x}" for x in ("", "_low", "_high"))]
        )

    def table(self) -> pd.DataFrame:
        """A row an attack, for people: numbers with intervals, and a sentence."""
        return findings_table([f.to_dict() for f in self.findings])

    def to_markdown(self) -> str:
        """The answer, a table, what was not done, and how to read it."""
        table = self.table()
        text = markdown_table(table.columns, table.itertuples(index=False))
        left_out = "\n".join(f"- Not made: {name}. {why}." for name, why in self.skipped.items())
        return "\n\n".join(filter(None, [self.answer, text, left_out, NOTE]))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a JSON file."""
        return {
            "answer": self.answer,
            "models": list(self.models),
            "findings": [f.to_dict() for f in self.findings],
            "skipped": dict(self.skipped),
            "harm": [harm.to_dict() for harm in self.harm],
            "note": NOTE,
        }

    def record(self, ledger: Ledger | str | Path, **details: Any) -> None:
        """Append it to a ledger, as an entry "audited".

        Args:
            ledger: Or its folder.
            **details: What else is to be known, such as the name of the request.

        Raises:
            StorageError: If it cannot be written.
        """
        book = ledger if isinstance(ledger, Ledger) else Ledger(ledger)
        kept = {f.attack: {"verdict": f.verdict, f.measure: f.found.value} for f in self.findings}
        book.record(
            "audited",
            **details,
            answer=self.answer,
            models=list(self.models),
            findings=kept,
            not_made=sorted(self.skipped),
        )

    def __str__(self) -> str:
        told = [(f.attack, f"{f.verdict}. {f.sentence}") for f in self.findings]
        told += [(name, f"not made: {why}.") for name, why in self.skipped.items()]
        lines = [
            textwrap.fill(f"{name}: {says}", 100, initial_indent="- ", subsequent_indent="  ")
            for name, says in told
        ]
        return "\n".join([self.answer, *lines])

    __repr__ = __str__


def findings_table(findings: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Findings for people, from what `Finding.to_dict` gives."""
    rows = []
    for f in findings:
        exact = f["retrained"]
        rows.append(
            (
                f["attack"],
                f["verdict"],
                f"{f['measure']} {shown(Interval(**f['found']))}",
                decimals(f["nothing"]),
                "–" if exact is None else shown(Interval(**exact)),
                f["meaning"].removesuffix(" with").removesuffix(":") + ".",
            )
        )
    heads = ["attack", "verdict", "found", "nothing", "after retraining", "what is found"]
    return pd.DataFrame(rows, columns=heads)


class AuditOptions(TypedDict, total=False):
    """Options of an audit.

    Attributes:
        retrained: Models that were trained without the deleted samples: what exact deletion shows.
        groups: Of the unseen samples, as for `harm_by_group`; by default the classes of which
            samples are retained.
        limit: By how much the score of a group may fall at most: .02 are two points of accuracy.
        shadows: Pairs of an attacker's own, as for `ShadowInference`; without them it is left out.
        likelihood: Of the models; by default what the result says.
        seed: Of the choice of samples that are asked about.
    """

    retrained: Sequence[Model]
    groups: Groups | None
    limit: float | None
    shadows: Sequence[Pair]
    likelihood: Likelihood | str
    seed: int


@isolated()
def audit(
    result: Any,
    model: Model | Sequence[Model],
    *,
    unseen: DataLoader[Any] | Dataset[Any] | Split,
    split: Split | None = None,
    progress: bool = True,
    **options: Unpack[AuditOptions],
) -> Audit:
    """Attack a deletion in every way that this package knows.

    Args:
        result: Of `forget`, a prepared model, `rewind` or a baseline; or the model without the
            samples: a module, or a function from inputs to predictions, as for `Pair`. Several, one
            a seed, which deleted the same samples, are judged together: numbers and the ends of
            their intervals are means over them.
        model: What it was made from, or as many as there are results; never touched.
        unseen: Samples of the same kind that no model was trained on. Attackers take them for
            public data, and the harm to each group is that to them.
        split: Who was deleted; by default what the result says.
        progress: Show a progress bar.
        **options: See `AuditOptions`.

    Raises:
        DataError, SplitError: If the deleted samples are not known, or the unseen ones cannot be
            used, or are training samples.
        ModelError: If two of the models are the same, or differ in their architecture.
        ConfigError: If there are not as many results as models, or an option is out of range.

    Example:
        >>> from fisher_forget import forget
        >>> x = torch.randn(120, 3, generator=torch.Generator().manual_seed(0))
        >>> data, new = (
        ...     torch.utils.data.TensorDataset(z, (z[:, 0] > 0).long()) for z in (x[:80], x[80:])
        ... )
        >>> model = torch.nn.Linear(3, 2).eval()
        >>> result = forget(model, data, range(20), weight_decay=0.1, progress=False)
        >>> list(audit(result, model, unseen=new, progress=False).to_pandas().measure)
        ['AUC', 'AUC', 'AUC', 'cosine', 'cosine', 'fall of the accuracy']
    """
    check_names(options, AuditOptions.__annotations__)
    results = list(result) if isinstance(result, (list, tuple)) else [result]
    befores: list[Any] = list(model) if isinstance(model, (list, tuple)) else [model]
    _check(results, befores, options)
    who = getattr(results[0], "split", None) if split is None else split
    if not isinstance(who, Split):
        fix = "Pass split=resolve_split(data, forget_idx)."
        raise DataError("a result that does not tell who was deleted", "its split", fix)
    new = resolve_split(unseen, [], allow_empty=True)
    told = None if isinstance(results[0], nn.Module) else getattr(results[0], "options", None)
    by_result = getattr(told, "likelihood", "categorical")
    kind = resolve_likelihood(options.get("likelihood", by_result))
    if isinstance(befores[0], nn.Module):
        kind = settled_by(befores[0], {"unseen": new}, kind)
    # a module may hold another one by the name of `model`
    afters = [x if isinstance(x, nn.Module) else getattr(x, "model", x) for x in results]
    asked = _Asked.drawn(who, new, options.get("seed", 0))
    retrained = tuple(options.get("retrained", ()))
    pairs = [
        Pair(before, after, asked.deleted, retrained=retrained)
        for before, after in zip(befores, afters, strict=True)
    ]
    shadows = options.get("shadows", ())
    skipped = {} if shadows else {SHADOW: "it takes shadow models, shadows="}
    findings = []
    attacks = _attacks(asked, kind, shadows)
    for name, attack in bar(attacks.items(), len(attacks), "attacks", progress):
        try:
            findings.append(_together([attack(pair) for pair in pairs]))
        except FisherForgetError as error:
            skipped[name] = f"got {error.got}, expected {error.expected}"
    harm: tuple[Harm, ...] = ()
    groups, limit = options.get("groups"), options.get("limit")
    try:
        if groups is None:
            finding, harm = _harm(pairs, asked.unseen, _classes(asked.unseen, who), limit, kind)
        else:  # they name all of the unseen samples
            finding, harm = _harm(pairs, new, groups, limit, kind)
        findings.append(finding)
    except (DataError, ConfigError) as error:
        if groups is not None or limit is not None:
            raise
        skipped[HARM] = f"got {error.got}, expected {error.expected}"
    return Audit(tuple(findings), skipped, harm, tuple(map(_mark, afters)))


Sides = tuple[TensorDataset, TensorDataset]
Attack = Callable[[Pair], Finding]


@dataclass(frozen=True)
class _Asked:
    """Who is asked about.

    Attributes:
        deleted: Deleted samples.
        beside_retained: Deleted and retained samples, as many of each class; where no retained one
            is of their classes, of any.
        beside_unseen: Deleted and unseen samples, as many of each class; `None` where no unseen one
            is of their classes.
        public: Unseen samples.
        unseen: All of them, without those that are training samples, too.
    """

    deleted: TensorDataset
    beside_retained: Sides
    beside_unseen: Sides | None
    public: TensorDataset
    unseen: Split

    @classmethod
    def drawn(cls, split: Split, new: Split, seed: int) -> _Asked:
        """At most `ASKED` samples of each kind.

        Raises:
            DataError: If nobody was deleted, or most unseen samples are training samples.
        """
        if not len(split.forget):
            got, fix = "a split of which nobody was forgotten", "Pass who was deleted."
            raise DataError(got, "at least one deleted sample", fix)
        rng = np.random.default_rng(seed)
        unseen = _apart(new, split)
        few = 10 * ASKED  # to choose from
        deleted = _read(split, some(split.forget, ASKED, rng))
        kept = _read(split, some(split.retain, few, rng))
        others = _read(unseen, some(unseen.retain, few, rng))
        any_other = take(kept, rng.permutation(len(kept))[: len(deleted)])
        return cls(
            deleted,
            _matched(deleted, kept, rng) or (deleted, any_other),
            _matched(deleted, others, rng),
            take(others, rng.permutation(len(others))[:ASKED]),
            unseen,
        )


def _apart(new: Split, split: Split) -> Split:
    """The unseen samples without those that are training samples, too: real data hold some twice.

    Raises:
        DataError: If these are most of them.
    """
    trained = set(map(bytes, split.hashes))
    seen = np.array([bytes(row) in trained for row in new.hashes])
    if 2 * seen.sum() >= len(seen):
        got = f"{seen.sum():,} of {len(seen):,} unseen samples that are training samples"
        fix = "Pass samples that no model was trained on."
        raise DataError(got, "samples that no model was trained on", fix)
    return new.subset(new.retain[~seen])


def _read(split: Split, rows: Indices) -> TensorDataset:
    """Samples in memory.

    Raises:
        DataError: If they differ in shape, or have several inputs without names.
    """
    read = list(split.batches(rows))
    if any(len(batch.args) > 1 or (batch.args and batch.kwargs) for batch in read):
        got = "samples of several inputs without names"
        raise DataError(got, "one input, or inputs by name", "Give them as a dict.")
    try:
        targets = torch.cat([batch.targets for batch in read])
        if read[0].kwargs:
            named = {key: torch.cat([b.kwargs[key] for b in read]) for key in read[0].kwargs}
            return samples(named, targets)
        return samples(torch.cat([batch.args[0] for batch in read]), targets)
    except (RuntimeError, TypeError, KeyError) as error:
        got = f"samples that do not fit into one tensor ({error})"
        raise DataError(got, "samples of one shape", "Pad them to one length.") from error


def _matched(first: TensorDataset, second: TensorDataset, rng: np.random.Generator) -> Sides | None:
    """As many samples of each class from both, drawn at random; `None` where no class is in both.
    Without classes as many of both."""
    targets = [x.tensors[-1] for x in (first, second)]
    if targets[0].is_floating_point() or targets[0].dim() != 1:
        targets = [torch.zeros(len(x), dtype=torch.long) for x in targets]
    rows: tuple[list[Indices], list[Indices]] = ([], [])
    for c in targets[0].unique():
        where = [rng.permutation(np.flatnonzero(x == c)) for x in targets]
        for chosen, found in zip(rows, where, strict=True):
            chosen.append(found[: min(map(len, where))])
    picked = [np.sort(np.concatenate(chosen)) for chosen in rows]
    if not len(picked[0]):
        return None
    return take(first, picked[0]), take(second, picked[1])


def _attacks(asked: _Asked, kind: Likelihood, shadows: Sequence[Pair]) -> dict[str, Attack]:
    """Attack -> what it finds in a pair of models."""

    def on(sides: Sides | None, attack: Any) -> Attack:
        def run(pair: Pair) -> Finding:
            if sides is None:
                got = "no unseen sample of the deleted ones' classes"
                raise DataError(got, "some", "Pass unseen samples of these classes.")
            found: Finding = attack.run(replace(pair, deleted=sides[0], others=sides[1]))
            return found

        return run

    found = {
        f"deletion inference ({name})": on(
            asked.beside_retained, DeletionInference(name, likelihood=kind)
        )
        for name in STATISTICS
    }
    found["membership inference"] = on(asked.beside_unseen, MembershipInference(likelihood=kind))
    if shadows:
        found[SHADOW] = on(asked.beside_unseen, ShadowInference(shadows, likelihood=kind))
    found["inversion of the step"] = NewtonInversion(asked.public, likelihood=kind).run
    found["changed answers"] = ChangedAnswers(asked.public, likelihood=kind).run
    later = (
        Relearning(samples=min(KNOWN, len(asked.deleted) // 2 or 1), likelihood=kind),
        FineTuning(data=asked.public, likelihood=kind),
        *(Quantisation(bits=bits, likelihood=kind) for bits in BITS),
    )
    found |= {f"{change.name}, after release": change.run for change in later}
    return found


def _together(found: Sequence[Finding]) -> Finding:
    """One finding of several models that deleted the same samples. They are not independent: ends
    of intervals are means of theirs."""
    first = found[0]
    exact = [f.retrained for f in found if f.retrained is not None]
    names = first.details
    return replace(
        first,
        found=_mean([f.found for f in found]),
        nothing=float(np.mean([f.nothing for f in found])),
        retrained=_mean(exact) if exact else None,
        details={name: float(np.mean([f.details[name] for f in found])) for name in names},
        warning=next((f.warning for f in found if f.warning), ""),
    )


def _mean(intervals: Sequence[Interval]) -> Interval:
    return Interval(*np.mean([(x.value, x.low, x.high) for x in intervals], axis=0).tolist())


def _mark(model: Model) -> str:
    """Fingerprint of a module; a function has none."""
    return model_fingerprint(model) if isinstance(model, nn.Module) else ""


def _harm(
    pairs: Sequence[Pair], unseen: Split, groups: Groups, limit: float | None, kind: Likelihood
) -> tuple[Finding, tuple[Harm, ...]]:
    """What became of the group that lost most, and the same group in retrained models; and of all
    groups, of each model."""

    def harm(before: Model, after: Model) -> Harm:
        if not (isinstance(before, nn.Module) and isinstance(after, nn.Module)):
            raise DataError("functions", "modules, to score groups by", "Pass modules.")
        return harm_by_group(before, after, unseen, groups, likelihood=kind)

    ours = tuple(harm(pair.before, pair.after) for pair in pairs)
    drops = {
        g.name: _mean([other.drop for h in ours for other in h.groups if other.name == g.name])
        for g in ours[0].groups
    }
    worst = max(drops, key=lambda name: drops[name].value)
    exact = [
        g.drop
        for pair in pairs
        for model in pair.retrained
        for g in harm(pair.before, model).groups
        if g.name == worst
    ]
    score = ours[0].score
    finding = Finding(
        attack=HARM,
        measure=f"{'fall' if score.higher_is_better else 'rise'} of the {score.name}",
        found=drops[worst],
        nothing=0.0,
        retrained=_mean(exact) if exact else None,
        samples=next(g.samples for g in ours[0].groups if g.name == worst),
        meaning=f"of {len(drops)} groups of unseen samples {worst!r} lost most:",
        details={f"of {name}": drop.value for name, drop in drops.items()},
        limit=limit,
    )
    return finding, ours


def _classes(unseen: Split, split: Split) -> dict[str, Indices]:
    """Rows of unseen samples by class, of the classes of which samples are retained.

    Raises:
        DataError: If targets are no classes.
    """
    new, kept = (
        torch.cat([batch.targets for batch in part.batches("retain")]) for part in (unseen, split)
    )
    if new.is_floating_point() or new.dim() != 1:
        raise DataError("targets that are no classes", "groups=", "Name a group for each sample.")
    rows = {str(int(c)): np.flatnonzero(new == c) for c in kept.unique()}
    return {name: found for name, found in rows.items() if len(found) > 1}


def _check(results: Sequence[Any], befores: Sequence[Any], options: AuditOptions) -> None:
    """Refuse what does not go together.

    Raises:
        ConfigError: With what is wrong.
    """
    if len(results) != len(befores) or not results:
        got = f"{len(results)} results of {len(befores)} models"
        raise ConfigError(got, "a model for each result", "Pass what each was made from.")
    limit, seed = options.get("limit"), options.get("seed", 0)
    if limit is not None and not is_number(limit):
        raise ConfigError(f"limit={limit!r}", "a number of at least 0", "Pass .02, say.")
    if not is_whole(seed, 0):
        raise ConfigError(f"seed={seed!r}", "a whole number of at least 0", "Pass seed=0, say.")
