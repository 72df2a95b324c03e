r"""Membership inference: can one tell from a model's outputs that it was trained on the forgotten
samples?

*Population attacks* know one model. A rule is fitted to tell retained samples (members) from test
samples (non-members) and then asked about the forgotten ones (Golatkar et al. 2020,
arXiv:1911.04933; Song & Mittal 2021, arXiv:2003.10595). They average over samples, and a sample
that gives itself away is easily lost among the others.

*Shadow attacks* know many models and ask sample by sample: does its margin look like that of models
that had learned and forgotten it ("unlearned"), or of models that never saw it ("out")? U-LiRA
(Hayes et al. 2024, arXiv:2403.01218) fits Gaussians, RULI (Naderloui et al. 2025, arXiv:2506.13009)
kernel densities.

Scores are oriented so that higher means "member" (shadow attacks: "unlearned"). The target of every
number of a population attack is its value at retrained models, which is rarely 0 or 1/2: a
forgotten class is not test data. For shadow attacks the two hypotheses coincide at retrained
models, so the target of their AUC is 1/2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy import special, stats
from torch import Tensor

from fisher_forget.errors import ConfigError, DataError, NumericalError
from fisher_forget.evaluate.intervals import Array, Interval, Values, as_array
from fisher_forget.evaluate.roc import auc, tpr_at_fpr

Features = Mapping[str, Array]

# times the feature: "member"
SIGNS = {"loss": -1.0, "confidence": 1.0, "entropy": -1.0, "modified_entropy": -1.0}
ATTACKS = (*SIGNS, "all", "svc")
LIMIT = 2000  # samples a side that a rule is fitted on: a kernel machine costs their square


@dataclass(frozen=True)
class PopulationAttack:
    """What one population attack says about one model; the target of each number is that of
    retrained models.

    Attributes:
        attack: Its name.
        cutoff: Scores from here on are called members.
        member: Scores of members that the rule was not fitted on.
        nonmember: Scores of such non-members.
        queried: Scores of the queried (forgotten) samples.
    """

    attack: str
    cutoff: float
    member: Array
    nonmember: Array
    queried: Array

    @property
    def called_members(self) -> float:
        """Fraction of the queried samples that are called members."""
        return float(np.mean(self.queried >= self.cutoff))


@dataclass(frozen=True)
class ShadowAttack:
    """A shadow attack on K models of each side, left out of the fit that scored them in K pairs.

    Attributes:
        unlearned: Scores of the unlearned models [K, N].
        out: Scores of the models that never saw the samples [K, N].
    """

    unlearned: Array
    out: Array

    def auc(self) -> float:
        """Mean over the pairs of the AUC over the N samples; the target is 1/2."""
        return float(auc(self.unlearned, self.out).mean())

    def tpr_at_fpr(self, fpr: float) -> Interval:
        """Mean over the pairs of the largest true positive rate at so many false positives, and its
        95 % interval; the target is `fpr`.

        Raises:
            ConfigError, DataError: As for `roc.tpr_at_fpr`; N must be at least 1 / fpr.
        """
        return tpr_at_fpr(self.unlearned, self.out, fpr)


def attack_features(logits: Tensor, targets: Tensor) -> dict[str, Array]:
    r"""What population attacks look at, per sample.

        loss             = -ln p_y                                                  [nats]
        confidence       = p_y
        entropy          = -sum_c p_c ln p_c                                        [nats]
        modified_entropy = -(1 - p_y) ln p_y - sum_{c != y} p_c ln(1 - p_c)         [nats]

    The last (Song & Mittal 2021, arXiv:2003.10595, eq. 8) is 0 for a certain and correct prediction
    and grows without bound for a certain and wrong one.

    Args:
        logits: [N, C] of one model or [M, N, C] of several; C >= 2.
        targets: Classes [N].

    Returns:
        Name -> [N] or [M, N], float64.

    Raises:
        DataError: If the shapes do not fit, or a target is no class.
        NumericalError: If logits are not finite.
    """
    _check_logits(logits, targets)
    log_p = torch.log_softmax(logits.detach().double(), -1)
    p = log_p.exp()
    # ln(1 - p_c) is exact as log1p where p_c <= 1/2; only the most probable class may lie above,
    # and there the sum of the other classes keeps what 1 - p_c would cancel.
    top = log_p.argmax(-1, keepdim=True)
    others = log_p.scatter(-1, top, -torch.inf).logsumexp(-1, keepdim=True)
    log_rest = torch.log1p(-p.scatter(-1, top, 0.0)).scatter(-1, top, others)
    y = targets.long().expand(logits.shape[:-1]).unsqueeze(-1)
    loss, rest = -log_p.gather(-1, y).squeeze(-1), log_rest.gather(-1, y).squeeze(-1).exp()
    modified = rest * loss - (p * log_rest).scatter(-1, y, 0.0).sum(-1)
    features = (loss, (-loss).exp(), -(p * log_p).sum(-1), modified)
    return {name: as_array(value) for name, value in zip(SIGNS, features, strict=True)}


def population_attack(
    member: Features,
    nonmember: Features,
    queried: Features,
    attack: str = "loss",
    *,
    published: bool = False,
    seed: int = 0,
) -> PopulationAttack:
    """Fit a rule to members and non-members, and ask it about other samples of the same model.

    A feature's rule is the threshold of largest balanced accuracy. "all" is a logistic regression
    on the four standardised features, "svc" the kernel machine of Golatkar et al. 2020 on the
    entropy (C = 3, RBF, gamma = 1). Members and non-members weigh the same, however many there are;
    half of each side (at most 2000) is fitted on, the rest is scored.

    Args:
        member: `attack_features` of retained samples.
        nonmember: Of samples that were never trained on, distributed like the members.
        queried: Of the forgotten samples.
        attack: A feature's name, "all" or "svc".
        published: As in the public code of Golatkar et al.: fit and score on all samples,
            unweighted. With many more members than non-members it calls everything a member.
        seed: Of the halving. The same one for all models, so that they are compared on the same
            samples.

    Raises:
        ConfigError: If the attack is unknown.
        DataError: If features are missing or not [n], or there are fewer than 4 members or
            non-members, or no queried.
        NumericalError: If a feature is NaN.
    """
    if attack not in ATTACKS:
        raise ConfigError(f"attack={attack!r}", f"one of {list(ATTACKS)}", "Correct `attack`.")
    inside, outside, asked = _table(member, 4), _table(nonmember, 4), _table(queried, 1)
    rng = np.random.default_rng(seed)
    halves = [(rows, rows) if published else _halves(rows, rng) for rows in (inside, outside)]
    (inside_fit, inside_scored), (outside_fit, outside_scored) = halves
    score, cutoff = _fitted(attack, inside_fit, outside_fit, None if published else "balanced")
    scores = score(inside_scored), score(outside_scored), score(asked)
    return PopulationAttack(attack, cutoff, *scores)


def u_lira(
    unlearned: Values, out: Values, observed: Values, *, pooled: bool = False, floor: float = 1e-3
) -> Array:
    r"""Log-likelihood ratio of U-LiRA: ln N(x; mu_u, s_u^2) - ln N(x; mu_o, s_o^2), sample by
    sample, in nats.

    Means and variances (with M - 1) are those of the shadow models' margins ln(p_y / (1 - p_y)) on
    the sample.

    Args:
        unlearned: Margins of M >= 2 models that learned the samples and unlearned them [M, N].
        out: Margins of M' >= 2 models that never saw them [M', N].
        observed: Margins of the model in question [N], or of several [K, N].
        pooled: One variance a side, the mean over samples, as is advisable with few shadow models.
        floor: Least standard deviation, in units of the margin.

    Returns:
        [N] or [K, N]; positive speaks for "unlearned". Target: no difference between unlearned
        models and others.

    Raises:
        ConfigError: If the floor is not positive.
        DataError: If a side has fewer than two models, or samples differ.
        NumericalError: If a margin is not finite.

    Source: Hayes et al. 2024, arXiv:2403.01218; pooling after Carlini et al. 2022,
    arXiv:2112.03570.
    """
    if not floor > 0:
        got = f"floor={floor}"
        raise ConfigError(got, "a positive standard deviation", "Pass a small one, such as 1e-3.")
    u, o, x = _margins(unlearned, out, observed)

    def log_density(shadow: Array) -> Array:
        # with few shadow models a sample's own variance is mostly chance
        variance = shadow.var(0, ddof=1)
        variance = np.maximum(variance.mean() if pooled else variance, floor**2)
        return as_array(stats.norm.logpdf(x, shadow.mean(0), np.sqrt(variance)))

    return log_density(u) - log_density(o)


def ruli(unlearned: Values, out: Values, observed: Values, *, bandwidth: float = 1.0) -> Array:
    r"""Score of RULI: p_u / (p_u + p_o) with Gaussian kernel densities p(x) = mean_m N(x; shadow_m,
    bandwidth^2).

    Args:
        unlearned: Margins [M, N] as for `u_lira`.
        out: Margins [M', N].
        observed: Margins [N] or [K, N].
        bandwidth: Standard deviation of the kernel, in units of the margin.

    Returns:
        [N] or [K, N] in [0, 1]; above 1/2 speaks for "unlearned".

    Raises:
        ConfigError: If the bandwidth is not positive.
        DataError: If a side has fewer than two models, or samples differ.
        NumericalError: If a margin is not finite.

    Source: Naderloui et al. 2025, arXiv:2506.13009.
    """
    if not bandwidth > 0:
        got = f"bandwidth={bandwidth}"
        raise ConfigError(got, "a positive width", "The published value is 1.0.")
    u, o, x = _margins(unlearned, out, observed)

    def log_density(shadow: Array) -> Array:  # up to the kernel's constant, which cancels
        kernels = [-0.5 * ((x - center) / bandwidth) ** 2 for center in shadow]
        return as_array(special.logsumexp(kernels, axis=0) - np.log(len(shadow)))

    return as_array(special.expit(log_density(u) - log_density(o)))


def shadow_attack(
    unlearned: Values, out: Values, attack: Callable[[Array, Array, Array], Array] = u_lira
) -> ShadowAttack:
    """Attack every shadow model with a fit to the others, so that no model is scored by a fit it
    took part in.

    One model of each side is left out at a time. Where unlearned models are distributed like the
    others the two are exchangeable, so the expected AUC is exactly 1/2 (leaving out one of them
    alone would bias it).

    Args:
        unlearned: Margins [M, N], M >= 3, of independently trained and unlearned models.
        out: Margins [M', N], M' >= 3, of models that never saw the samples.
        attack: `u_lira`, `ruli`, or any function of the same three arguments.

    Returns:
        Scores of K = min(M, M') pairs.

    Raises:
        DataError: If a side has fewer than three models, or samples differ.
    """
    u, o, _ = _margins(unlearned, out, out, least=3)
    scores = [
        attack(np.delete(u, k, 0), np.delete(o, k, 0), np.stack([u[k], o[k]]))
        for k in range(min(len(u), len(o)))
    ]
    return ShadowAttack(*np.stack(scores, 1))


def _fitted(
    attack: str, inside: Array, outside: Array, weight: str | None
) -> tuple[Callable[[Array], Array], float]:
    """Score [n] of feature rows [n, 4] and the cutoff from which on it says "member"."""
    column = ATTACKS.index("entropy" if attack == "svc" else attack)
    if attack in SIGNS:
        sign = SIGNS[attack]
        cutoff = _threshold(sign * inside[:, column], sign * outside[:, column])
        return lambda x: as_array(sign * x[:, column]), cutoff
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import SVC

    columns = slice(column, column + 1) if attack == "svc" else slice(None)
    model: Any = SVC(C=3, kernel="rbf", gamma="auto", class_weight=weight)
    if attack == "all":
        regression = LogisticRegression(class_weight=weight, max_iter=1000)
        model = make_pipeline(StandardScaler(), regression)
    labels = np.repeat([1, 0], [len(inside), len(outside)])
    model.fit(np.concatenate([inside, outside])[:, columns], labels)
    return lambda x: as_array(model.decision_function(x[:, columns])), 0.0


def _threshold(positive: Array, negative: Array) -> float:
    """The cutoff of largest balanced accuracy; "member" from it on."""
    # every score is a possible cutoff; balanced accuracy is 1/2 (1 - missed + spared)
    candidates = np.unique(np.concatenate([positive, negative]))
    missed = np.searchsorted(np.sort(positive), candidates) / len(positive)
    spared = np.searchsorted(np.sort(negative), candidates) / len(negative)
    return float(candidates[np.argmax(spared - missed)])


def _halves(rows: Array, rng: np.random.Generator) -> tuple[Array, Array]:
    """A random half to fit on, of at most LIMIT rows, and the rest."""
    order, cut = rng.permutation(len(rows)), min(len(rows) // 2, LIMIT)
    return rows[order[:cut]], rows[order[cut:]]


def _table(features: Features, least: int) -> Array:
    """Features as columns [n, 4]."""
    if missing := [name for name in SIGNS if name not in features]:
        got = f"features without {missing}"
        raise DataError(got, f"{list(SIGNS)}", "Pass what `attack_features` returns.")
    columns = [as_array(features[name]) for name in SIGNS]
    if columns[0].ndim != 1 or len(columns[0]) < least or len({c.shape for c in columns}) > 1:
        got = f"features of shapes {[c.shape for c in columns]}"
        expected = f"[n] of one model with n of at least {least}"
        raise DataError(got, expected, "Attack one model, with more samples.")
    if not np.isfinite(table := np.stack(columns, 1)).all():
        got = "features that are NaN or infinite"
        raise NumericalError(got, "finite features", "Check the model's outputs.")
    return table


def _margins(
    unlearned: Values, out: Values, observed: Values, least: int = 2
) -> tuple[Array, Array, Array]:
    u, o, x = as_array(unlearned), as_array(out), as_array(observed)
    stacked = u.ndim == o.ndim == 2 and x.ndim in (1, 2)
    if not stacked or len({a.shape[-1] for a in (u, o, x)}) > 1:
        got = f"margins of shapes {u.shape}, {o.shape} and {x.shape}"
        expected = "[M, N], [M', N] and [N] or [K, N], of the same samples"
        raise DataError(got, expected, "Stack one row a model.")
    if min(len(u), len(o)) < least:
        got = f"{len(u)} unlearned and {len(o)} other shadow models"
        expected = f"at least {least} a side, for a spread without the model scored"
        raise DataError(got, expected, "Train more of them.")
    if not all(np.isfinite(a).all() for a in (u, o, x)):
        got = "margins that are NaN or infinite"
        raise NumericalError(got, "finite margins", "Check the models' outputs.")
    return u, o, x


def _check_logits(logits: Tensor, targets: Tensor) -> None:
    if logits.dim() not in (2, 3) or logits.shape[-1] < 2 or targets.shape != logits.shape[-2:-1]:
        got = f"logits {tuple(logits.shape)} and targets {tuple(targets.shape)}"
        expected = "[N, C] or [M, N, C] with C of at least 2, and [N]"
        raise DataError(got, expected, "Stack models in the first dimension.")
    classes = logits.shape[-1]
    inside = not len(targets) or 0 <= int(targets.min()) <= int(targets.max()) < classes
    if targets.is_floating_point() or not inside:
        got = "targets that are no classes"
        raise DataError(got, f"integers from 0 to {classes - 1}", "Pass class indices.")
    if not bool(torch.isfinite(logits).all()):
        got = "logits that are NaN or infinite"
        raise NumericalError(got, "finite logits", "Check the model that made them.")
