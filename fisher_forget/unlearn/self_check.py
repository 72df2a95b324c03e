r"""What a result can say of itself without retrained models.

Nobody knows what the forgotten samples would look like to a model that never saw them, but some of
it follows from who is left:

- A class with no retained sample is predicted by no retrained model, unless the network knew it
  from elsewhere (a pretrained one may).
- Samples of the other classes are unseen ones of their class to a retrained model. Where the
  forgotten samples were chosen by chance within their classes, they are exchangeable with held-out
  samples there: every way to call some of both "forgotten" is as likely. So a permutation test
  within the classes has a false-alarm rate of `LEVEL`, whatever the distribution of the losses. It
  is two-sided: to be predicted better than held-out samples is to be remembered, to be predicted
  worse is to be forgotten too much. Who was *not* chosen by chance (outliers, wrong labels) differs
  from the other training samples in the given model already; the same test shows that, and the
  check says that it does not know. Nor does it where the given model does not tell them from
  held-out samples: then there was nothing to see.
- Retained samples lose as little as before.

No more is claimed. Without held-out samples the second part is unknown: what unseen samples lose
was not to be had from the training data (docs/research.md).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from fisher_forget import params as P
from fisher_forget.data.batches import Batch
from fisher_forget.data.split import Part, Split, some
from fisher_forget.errors import FisherForgetWarning
from fisher_forget.likelihood import Categorical, Likelihood
from fisher_forget.params import Params
from fisher_forget.unlearn.objective import Objective
from fisher_forget.unlearn.problem import Problem

ANSWERS = 1000  # samples of each part, at most, that a result is judged by
# Share of an absent class's targets that are predicted: models that never saw it predict it here
# and there, small ones on up to a quarter of its samples.
RARE, KNOWN = 0.05, 0.3
ROUNDING = 1e-7  # of the length of all weights: a step that float32 does not hold
RISE, RISE_SHARE = 0.01, 0.1  # of the retained loss: nats, or a share of it, that count as none
LEVEL = 0.01  # false-alarm rate of a test, both sides together
RELABELLINGS = 1999  # drawn for a test, beside the observed labels
ERRORS = 2.0  # standard errors by which it must have risen, beyond what is allowed

NONE_KNOWN: Mapping[str, str] = MappingProxyType({})

Verdict = Literal["fine", "wrong", "unknown"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        name: "step", "absent classes", "unseen samples" or "retained samples".
        value: What was found; `says` has its unit.
        expected: What it is held against: of a retrained model, or the most that is allowed.
        verdict: "wrong" where the value is not what is expected, "unknown" where nobody can tell.
        says: The same in a sentence.
    """

    name: str
    value: float
    expected: float
    verdict: Verdict
    says: str


@dataclass(frozen=True)
class SelfCheck:
    """What a result says of itself.

    Attributes:
        findings: In the order in which they are printed.
    """

    findings: tuple[Finding, ...] = ()

    @property
    def wrong(self) -> tuple[Finding, ...]:
        """The findings that a retrained model would not have."""
        return tuple(finding for finding in self.findings if finding.verdict == "wrong")

    def summary(self) -> list[dict[str, Any]]:
        """Plain values for a JSON file."""
        return [asdict(finding) for finding in self.findings]

    def warn(self, stacklevel: int) -> None:
        """One warning with all that is wrong, if anything is."""
        if self.wrong:
            says = " ".join(finding.says for finding in self.wrong)
            warnings.warn(says, FisherForgetWarning, stacklevel=stacklevel + 1)

    def __str__(self) -> str:
        return "\n".join(f"{finding.verdict:8} {finding.says}" for finding in self.findings)


@dataclass(frozen=True)
class Answers:
    """How a model does on samples.

    Attributes:
        likelihood: Says what the scores are.
        losses: Mean loss of each sample's scored positions, nats: [N].
        positions: How many these are: [N].
        scores: Quality of each: [N].
        labels: Class of each; 0 where it has several targets, or none of a few: [N].
    """

    likelihood: Likelihood
    losses: Tensor
    positions: Tensor
    scores: Tensor
    labels: Tensor

    @classmethod
    def of(cls, objective: Objective, split: Split, part: Part, at: Params, seed: int) -> Answers:
        """Those on a part, at most `ANSWERS` samples, at some weights and buffers: a forward pass.

        Raises:
            NumericalError: If outputs are not finite.
        """
        likelihood = objective.likelihood
        rows = [torch.zeros(4, 0, dtype=torch.float64)]
        for f, y in objective.forward(split.batches(some(split.indices(part), ANSWERS, seed)), at):
            counts = likelihood.counts(y).double()
            losses = likelihood.losses(f, y).double() / counts.where(counts > 0, 1.0)
            rows.append(
                torch.stack(
                    [losses, counts, likelihood.scores(f, y).double(), _labels(likelihood, f, y)]
                ).cpu()
            )
        return cls(likelihood, *torch.cat(rows, 1))

    @property
    def loss(self) -> float:
        """Mean over all scored positions, nats; NaN without any."""
        return float((self.losses * self.positions).sum() / self.positions.sum())

    @property
    def score(self) -> float:
        """Mean over the samples that have a scored position."""
        return float(self.scores[self.positions > 0].mean())

    def where(self, keep: Tensor) -> Answers:
        """Those of some of the samples."""
        columns = (self.losses, self.positions, self.scores, self.labels)
        return Answers(self.likelihood, *(column[keep] for column in columns))


def _labels(likelihood: Likelihood, outputs: Tensor, targets: Tensor) -> Tensor:
    """Class of each sample [B], float64; 0 where it has several targets, or no class."""
    labels = likelihood.aligned(outputs, targets)[1]
    if isinstance(likelihood, Categorical) and labels.is_floating_point():
        labels = labels.argmax(-1)
    labels = labels.reshape(len(labels), -1)
    if labels.shape[1] > 1 or likelihood.score.unit != "%":
        return torch.zeros(len(labels), dtype=torch.float64, device=outputs.device)
    return labels[:, 0].double().round()


def still_recognised(
    objective: Objective, batches: Iterable[Batch], at: Params, classes: Iterable[int]
) -> float:
    """Share of the targets of some classes that the model predicts at some weights.

    Args:
        objective: The model.
        batches: Of forgotten samples.
        at: Weights (and buffers).
        classes: Those without a retained sample: 0 is expected of a model that never saw them.

    Returns:
        NaN where the samples have no target of these classes.
    """
    wanted, hits, targets = torch.tensor(list(classes)), 0, 0
    for f, y in objective.forward(batches, at):
        rows, labels = objective.likelihood.aligned(f, y)
        truth = labels.argmax(-1) if labels.is_floating_point() else labels
        of_these = torch.isin(truth, wanted.to(truth))
        hits += int((of_these & (rows.argmax(-1) == truth)).sum())
        targets += int(of_these.sum())
    return hits / targets if targets else math.nan


def self_check(
    problem: Problem,
    answers: tuple[Mapping[Part, Answers], Mapping[Part, Answers]],
    at: Params,
    *,
    moved: float = math.inf,
    allowed: float = 0.0,
    causes: Mapping[str, str] = NONE_KNOWN,
    held_out: Split | None = None,
    seed: int = 0,
) -> SelfCheck:
    """What can be said of a result.

    Args:
        problem: What it was to solve.
        answers: The given model's on "retain" and "forget", and the result's.
        at: The result's weights and buffers.
        moved: Length of the correction.
        allowed: Rise of the retained loss that was asked for, nats, beyond what counts as none.
        causes: What is known to be the reason where something is wrong, a sentence by the name of
            the finding.
        held_out: Samples that the model was not trained on, its retained ones.
        seed: Of the samples and the relabellings.
    """
    before, after = answers
    findings, forget = [], after["forget"]
    if len(forget.losses):
        if moved <= ROUNDING * P.norm({name: w.detach() for name, w in at.items()}):
            says = "No step was taken: the forgotten samples are as well known as before."
            findings.append(Finding("step", moved, math.nan, "wrong", says))
        absent = problem.absent
        if absent:
            batches = problem.split.batches(some(problem.split.forget, ANSWERS, seed))
            share = still_recognised(problem.objective, batches, at, absent)
            findings.append(_absent(absent, share))
        stays = ~torch.isin(forget.labels, torch.tensor(absent).to(forget.labels))
        # a sample of several targets has no class of its own, and may have one that is absent
        if bool(stays.any()) and not (absent and bool((forget.positions > 1).any())):
            unseen = None
            if held_out is not None:
                objective = problem.objective
                unseen = (
                    Answers.of(objective, held_out, "retain", objective.start, seed),
                    Answers.of(objective, held_out, "retain", at, seed),
                )
            findings.append(_unseen(before, forget, unseen, stays, seed))
    seen = len(before["retain"].losses) / len(problem.split.retain)
    findings.append(_retained(before["retain"], after["retain"], seen, allowed))
    return SelfCheck(tuple(_reasoned(finding, causes) for finding in findings))


def _reasoned(finding: Finding, causes: Mapping[str, str]) -> Finding:
    """With what is known to be the reason, where something is wrong."""
    reason = causes.get(finding.name, "") if finding.verdict == "wrong" else ""
    return replace(finding, says=f"{finding.says} {reason}") if reason else finding


def _absent(absent: tuple[int, ...], recognised: float) -> Finding:
    classes = f"class {absent[0]}" if len(absent) == 1 else f"{len(absent)} classes"
    verdict: Verdict = "fine" if recognised <= RARE else "unknown"
    says = "recognised: as by a model that learnt from retained samples alone"
    if recognised > RARE:
        says = "recognised: more than by most models that learnt from retained samples alone"
    if not recognised <= KNOWN:
        verdict, says = "wrong", "still recognised: not forgotten"
    share = f"{100 * recognised:.0f} % of {classes}"
    says = f"{share}, of which no sample is retained, are {says}."
    return Finding("absent classes", recognised, 0.0, verdict, says)


def _unseen(
    before: Mapping[Part, Answers],
    after: Answers,
    held_out: tuple[Answers, Answers] | None,
    stays: Tensor,
    seed: int,
) -> Finding:
    """Forgotten samples of classes that stay, against held-out samples of these classes."""
    then, now = before["forget"].where(stays), after.where(stays)

    def unknown(says: str) -> Finding:
        return Finding("unseen samples", now.loss, math.nan, "unknown", says)

    if held_out is None:
        score = f"{now.likelihood.score.name} {now.likelihood.score.format(now.score)}"
        return unknown(
            f"Forgotten samples have a loss of {now.loss:.3g} nats and {score}; what unseen ones "
            "have is not known: pass held_out= to compare."
        )
    chosen = compared(then, before["retain"], seed)
    known_before, found = (compared(x, y, seed) for x, y in zip((then, now), held_out, strict=True))
    if found is None:
        return unknown("No held-out sample has a class of the forgotten ones.")
    if chosen is not None and chosen.p_value <= LEVEL:
        return unknown(
            "The forgotten samples are no chance selection of their classes (the given model "
            "tells them from retained ones), so held-out samples do not say what to expect."
        )
    wrong = found.p_value <= LEVEL
    if not wrong and (known_before is None or known_before.p_value > LEVEL):
        return unknown(
            f"The forgotten samples are not told from unseen ones, but neither were they by the "
            f"given model, so that this comparison cannot tell: loss {found.ours:.3g} nats, "
            f"held-out samples of the same classes {found.others:.3g} (a difference below "
            f"{found.visible:.2g} does not show)."
        )
    known = "are not told from unseen ones any more"
    if wrong and found.ours < found.others:
        known = "are better known than unseen ones, so not forgotten"
    elif wrong:
        known = "are less known than unseen ones: forgotten too much, or their labels are wrong"
    says = (
        f"The forgotten samples {known}: loss {found.ours:.3g} nats, held-out samples of the same "
        f"classes {found.others:.3g} (p = {found.p_value:.2g}; a difference below "
        f"{found.visible:.2g} does not show)."
    )
    verdict: Verdict = "wrong" if wrong else "fine"
    return Finding("unseen samples", found.ours, found.others, verdict, says)


def _retained(before: Answers, after: Answers, seen: float, allowed: float) -> Finding:
    """Whether retained samples lose as little as before: the same samples, in pairs, which are a
    given share of all."""
    score = before.likelihood.score
    limit = max(RISE, RISE_SHARE * before.loss) + allowed
    rises = (after.losses - before.losses) * before.positions / before.positions.mean()
    # of a mean over samples drawn without replacement: none where all are seen
    error = float(rises.std()) * math.sqrt((1 - seen) / len(rises)) if seen < 1 else 0.0
    rise = float(rises.mean())
    harmed = not rise - ERRORS * error <= limit  # NaN is harm, too
    verdict: Verdict = "wrong" if harmed else "unknown" if rise > limit else "fine"
    did = {"wrong": "suffered", "unknown": "may have suffered", "fine": "did not suffer"}
    says = (
        f"Retained samples {did[verdict]}: "
        f"loss {before.loss:.3g} -> {after.loss:.3g} nats, {score.name} "
        f"{score.format(before.score)} -> {score.format(after.score)}."
    )
    return Finding("retained samples", rise, limit, verdict, says)


@dataclass(frozen=True)
class Comparison:
    """Mean losses of two groups of samples of the same classes, nats, and a test.

    Attributes:
        ours: Of the first, in classes that the second has, too.
        others: Of the second, each class as often as in the first.
        p_value: Two-sided, of the hypothesis that they are exchangeable within each class.
        visible: The least difference that has a p-value of `LEVEL`, nats: what is smaller does not
            show.
    """

    ours: float
    others: float
    p_value: float
    visible: float


def compared(ours: Answers, others: Answers, seed: int = 0) -> Comparison | None:
    r"""Permutation test of the mean loss, within the classes.

    The statistic is the mean over our samples of loss - mean loss of the others of its class. Under
    the hypothesis it is as likely to have any rank among those of all relabellings within the
    classes, so that p <= alpha has a probability of at most alpha (Phipson and Smyth 2010, eq. 2).

    Args:
        ours: Some samples.
        others: Others.
        seed: Of the relabellings.

    Returns:
        `None` where they have no class in common.
    """
    rng, count = np.random.default_rng(seed), 0
    sums, drawn, expected = 0.0, np.zeros(RELABELLINGS), 0.0
    for label in ours.labels.unique():
        a, b = (x.losses[(x.labels == label) & (x.positions > 0)].numpy() for x in (ours, others))
        if not (len(a) and len(b)):
            continue
        pool, n = np.concatenate([a, b]), len(a)
        means = np.array([rng.permutation(pool)[:n].mean() for _ in range(RELABELLINGS)])
        # as the pool's total is fixed, our mean less theirs is linear in our mean
        scale, shift = n * len(pool) / len(b), n * pool.sum() / len(b)
        drawn += means * scale - shift
        sums, expected, count = sums + a.sum(), expected + n * b.mean(), count + n
    if not count:
        return None
    found = sums - expected
    slack = 1e-9 * (abs(sums) + abs(expected))  # relabellings that are the same but for rounding
    above, below = (int((s * drawn >= s * found - slack).sum()) for s in (1, -1))
    p = min(1.0, 2 * (1 + min(above, below)) / (1 + RELABELLINGS))
    visible = float(np.quantile(np.abs(drawn), 1 - LEVEL)) / count
    return Comparison(sums / count, expected / count, p, visible)
