"""All attacks on one deletion, in one table: what is found, beside exact retraining, in a sentence
each.

Who is asked about is drawn once: deleted samples, as many retained ones of the same classes, and as
many unseen ones. An attack that this model or these data do not allow is named with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypedDict, Unpack

import numpy as np
from scipy import special
from torch import nn
from torch.utils.data import DataLoader, Dataset

from fisher_forget._util.checks import check_names, is_number, is_whole
from fisher_forget._util.isolation import isolated
from fisher_forget._util.progress import bar
from fisher_forget.attack.after_release import (
    FineTuning,
    Relearning,
    StillKnown,
)
from fisher_forget.attack.asked import Asked, Sides
from fisher_forget.attack.findings import Audit, Finding
from fisher_forget.attack.inference import STATISTICS, DeletionInference
from fisher_forget.attack.membership import MembershipInference
from fisher_forget.attack.pairs import Pair, check_different
from fisher_forget.attack.quantisation import Quantisation
from fisher_forget.attack.reconstruct import ChangedAnswers, NewtonInversion
from fisher_forget.attack.release import Model
from fisher_forget.attack.shadow import ShadowInference
from fisher_forget.data.split import Split, resolve_split
from fisher_forget.errors import ConfigError, DataError, FisherForgetError
from fisher_forget.evaluate.groups import Groups, Harm, harm_by_group
from fisher_forget.evaluate.intervals import Interval, interval_of_one_more
from fisher_forget.evaluate.predictions import settled_by
from fisher_forget.ledger.evidence import model_fingerprint
from fisher_forget.likelihood import Likelihood, resolve_likelihood

KNOWN = 10  # deleted samples that someone has who makes a model learn again
BITS = (8, 4)  # of quantised weights
HARM, SHADOW = "harm by group", "shadow inference"


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
        result: Of `forget`, a prepared model or `rewind`; or the model without the samples, such as
            that of a baseline: a module, or a function from inputs to predictions, as for `Pair`.
            Several, one a seed, which deleted the same samples, are judged together: numbers and
            the ends of their intervals are means over them.
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
        >>> import torch
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
    check_different(afters)
    asked = Asked.drawn(who, new, kind, options.get("seed", 0))
    retrained = tuple(options.get("retrained", ()))
    pairs = [
        Pair(before, after, asked.deleted, retrained=retrained)
        for before, after in zip(befores, afters, strict=True)
    ]
    shadows = options.get("shadows", ())
    skipped = {} if shadows else {SHADOW: "It takes shadow models, shadows="}
    findings = []
    attacks = _attacks(asked, kind, shadows)
    for name, attack in bar(attacks.items(), len(attacks), "attacks", progress):
        try:
            findings.append(_together([attack(pair) for pair in pairs]))
        except FisherForgetError as error:
            skipped[name] = f"Got {error.got}, expected {error.expected}"
    harm: tuple[Harm, ...] = ()
    groups, limit = options.get("groups"), options.get("limit")
    try:
        if groups is None:
            finding, harm = _harm(pairs, asked.unseen, asked.classes(who, kind), limit, kind)
        else:  # they name all of the unseen samples, in their own order
            finding, harm = _harm(pairs, unseen, groups, limit, kind)
        findings.append(finding)
    except (DataError, ConfigError) as error:
        if groups is not None or limit is not None:
            raise
        skipped[HARM] = f"Got {error.got}, expected {error.expected}"
    return Audit(tuple(findings), skipped, harm, tuple(map(_mark, afters)))


Attack = Callable[[Pair], Finding]


def _attacks(asked: Asked, kind: Likelihood, shadows: Sequence[Pair]) -> dict[str, Attack]:
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
    found["inversion of the step"] = _beside_all(NewtonInversion(asked.public, likelihood=kind))
    found["changed answers"] = _beside_all(ChangedAnswers(asked.public, likelihood=kind))
    found["still known"] = StillKnown(likelihood=kind).run
    later = (
        Relearning(samples=min(KNOWN, len(asked.deleted) // 2 or 1), likelihood=kind),
        FineTuning(data=asked.public, likelihood=kind),
        *(Quantisation(bits=bits, likelihood=kind) for bits in BITS),
    )
    found |= {f"{change.name}, after release": change.run for change in later}
    return found


def _beside_all(attack: NewtonInversion | ChangedAnswers) -> Attack:
    """The attack beside that on every retrained model: its interval is then that of one retrained
    model more (Student's, of their spread), since what is recovered of samples that were deleted
    together is not independent."""

    def run(pair: Pair) -> Finding:
        found: Finding = attack.run(pair)
        if len(pair.retrained) < 2:
            return found
        each = [replace(pair, after=model, retrained=()) for model in pair.retrained]
        return replace(
            found, retrained=interval_of_one_more([attack.run(x).found.value for x in each])
        )

    return run


def _wider(interval: Interval, looks: int) -> Interval:
    """The interval of the most extreme of so many: Bonferroni's, of normal ends."""
    ratio = float(special.ndtri(1 - 0.025 / looks) / special.ndtri(0.975))
    low, high = (
        interval.value + ratio * (x - interval.value) for x in (interval.low, interval.high)
    )
    return Interval(interval.value, low, high)


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
    pairs: Sequence[Pair],
    unseen: DataLoader[Any] | Dataset[Any] | Split,
    groups: Groups,
    limit: float | None,
    kind: Likelihood,
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
    # the worst of several: as many times as sure; and beside the worst of each retrained model
    found = _wider(drops[worst], len(drops))
    exact = [harm(pairs[0].before, model).worst.drop for model in pairs[0].retrained]
    yard = _wider(exact[0], len(drops)) if exact else None
    if len(exact) > 1:
        yard = interval_of_one_more([drop.value for drop in exact])
    score = ours[0].score
    finding = Finding(
        attack=HARM,
        measure=f"{'fall' if score.higher_is_better else 'rise'} of the {score.name}",
        found=found,
        nothing=0.0,
        retrained=yard,
        samples=next(g.samples for g in ours[0].groups if g.name == worst),
        meaning=f"of {len(drops)} groups of unseen samples {worst!r} lost most:",
        details={f"of {name}": drop.value for name, drop in drops.items()},
        limit=limit,
    )
    return finding, ours


def _check(results: Sequence[Any], befores: Sequence[Any], options: AuditOptions) -> None:
    """Refuse what does not go together.

    Raises:
        ConfigError: With what is wrong.
    """
    if len(results) != len(befores) or not results:
        got = f"{len(results)} results of {len(befores)} models"
        raise ConfigError(got, "a model for each result", "Pass what each was made from.")
    splits = [x for x in (getattr(r, "split", None) for r in results) if isinstance(x, Split)]
    if any(not np.array_equal(x.forget, splits[0].forget) for x in splits[1:]):
        fix = "Audit each deletion by itself."
        raise ConfigError("results of different deletions", "several seeds of one", fix)
    limit, seed = options.get("limit"), options.get("seed", 0)
    if limit is not None and not is_number(limit):
        raise ConfigError(f"limit={limit!r}", "a number of at least 0", "Pass .02, say.")
    if not is_whole(seed, 0):
        raise ConfigError(f"seed={seed!r}", "a whole number of at least 0", "Pass seed=0, say.")
