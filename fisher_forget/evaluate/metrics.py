r"""Every metric that `evaluate` reports: name, unit, definition, source, and its computation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fisher_forget._util.isolation import seeded
from fisher_forget.evaluate import divergence, klom, relearn, weights
from fisher_forget.evaluate.composite import average_gap, tug_of_war, zrf
from fisher_forget.evaluate.intervals import Array, Interval
from fisher_forget.evaluate.membership import (
    ShadowAttack,
    attack_features,
    population_attack,
    ruli,
    shadow_attack,
    u_lira,
)
from fisher_forget.evaluate.metric import Context, Group, Metric, Pair, Solo, Subject
from fisher_forget.evaluate.roc import auc, needed_negatives

MEMBERSHIP_SAMPLES = 1000  # of retained and test data each, that a membership attack is fitted on
RELEARN = 100  # epochs at most
STEPS = 1000  # at most
FPR = 0.01  # false positive rate of `u_lira_tpr`


def _kl(a: Subject, b: Subject, part: str, context: Context) -> float:
    return float(
        context.likelihood.kl(b.outputs[part], a.outputs[part], context.targets[part]).mean()
    )


def _mean(fn: Callable[[Tensor, Tensor], Tensor], factor: float = 1.0) -> Pair:
    return lambda a, b, part, context: (
        factor * float(fn(b.outputs[part], a.outputs[part]).double().mean())
    )


def _score(a: Subject, part: str, context: Context) -> float:
    value = float(context.likelihood.scores(a.outputs[part], context.targets[part]).mean())
    return context.likelihood.score.factor * value


def _loss(a: Subject, part: str, context: Context) -> float:
    total, count = context.likelihood.loss_totals([(a.outputs[part], context.targets[part])])
    return total / count


def _entropy(a: Subject, part: str, context: Context) -> float:
    logp = a.outputs[part].double().log_softmax(-1)
    return float(-(logp.exp() * logp).sum(-1).mean())


def _features(a: Subject, context: Context) -> dict[str, dict[str, Array]]:
    """What membership attacks look at, of so many retained and test samples at most."""
    generator = seeded(context.seed)
    features = {}
    for part in ("retain", "test", "forget"):
        outputs, targets = a.outputs[part], context.targets[part]
        if part != "forget":
            sample_idx = torch.randperm(len(targets), generator=generator)[:MEMBERSHIP_SAMPLES]
            outputs, targets = outputs[sample_idx], targets[sample_idx]
        features[part] = attack_features(outputs, targets)
    return features


def _called_members(feature: str) -> Solo:
    def solo(a: Subject, part: str, context: Context) -> float:
        features = _features(a, context)
        attack = population_attack(
            features["retain"], features["test"], features["forget"], feature
        )
        return 100 * attack.called_members

    return solo


def _membership_auc(a: Subject, part: str, context: Context) -> float:
    features = _features(a, context)
    return 100 * float(auc(-features["forget"]["loss"], -features["test"]["loss"]))


def _rates(a: Subject, context: Context) -> list[float]:
    """Accuracies on forgotten, retained and test samples."""
    parts = ("forget", "retain", "test")
    return [_score(a, part, context) / context.likelihood.score.factor for part in parts]


def _tug_of_war(a: Subject, b: Subject, part: str, context: Context) -> float:
    return tug_of_war(_rates(a, context), _rates(b, context))


def _average_gap(a: Subject, b: Subject, part: str, context: Context) -> float:
    attacked = _called_members("confidence")
    unlearned, retrained = ([*_rates(x, context), attacked(x, part, context) / 100] for x in (a, b))
    return average_gap(unlearned, retrained)


def _zrf(a: Subject, part: str, context: Context) -> float:
    assert context.teacher is not None
    return zrf(a.outputs["forget"], context.teacher)


def _efficacy(a: Subject, part: str, context: Context) -> float:
    assert context.split is not None
    return weights.efficacy(a.model, context.split, context.trained)


def _relearn(a: Subject, part: str, context: Context) -> float:
    assert context.split is not None
    models = a.model, context.split, a.original, context.trained
    return float(relearn.relearn_time(*models, max_epochs=RELEARN).epochs)


def _relearn_steps(a: Subject, part: str, context: Context) -> float:
    assert context.split is not None
    models = a.model, context.split, a.original, context.trained
    return float(relearn.relearn_steps(*models, max_steps=STEPS).steps)


def _klom(number: str) -> Group:
    def group(ours: Tensor, retrained: Tensor) -> float:
        return float(getattr(klom.summarise_klom(klom.klom(ours, retrained)), number))

    return group


def _shadow(attack: Callable[..., Any], number: Callable[[ShadowAttack], float]) -> Group:
    def group(ours: Tensor, retrained: Tensor) -> float:
        return 100 * number(shadow_attack(ours, retrained, attack))

    return group


def _tpr(ours: Tensor, retrained: Tensor) -> Interval:
    found = shadow_attack(ours, retrained, partial(u_lira, pooled=True)).tpr_at_fpr(FPR)
    return Interval(*(100 * rate for rate in astuple(found)))


GOLATKAR = "Golatkar et al. 2020, arXiv:1911.04933"
CLASSES = frozenset({"categorical"})
ATTACK = frozenset({"categorical", "membership"})
WEIGHTS = frozenset({"weights"})
SPLIT = frozenset({"split"})
FORGET = ("forget",)
TABLE = (
    Metric(
        "kl", "nats", "how badly the model stands in for a retrained one",
        "mean_n KL(p_retrained(x_n) || p(x_n))", GOLATKAR, pair=_kl, far="high",
        primary=("forget", "retain"),
    ),
    Metric(
        "kl_reverse", "nats", "the same in the other direction",
        "mean_n KL(p(x_n) || p_retrained(x_n))", GOLATKAR,
        pair=lambda a, b, part, context: _kl(b, a, part, context), far="high",
    ),
    Metric(
        "jensen_shannon", "bits", "symmetric divergence between 0 and 1",
        "mean_n JS_2(p(x_n), p_retrained(x_n))", "Lin 1991, doi:10.1109/18.61115",
        pair=_mean(divergence.jensen_shannon), needs=CLASSES, far="high", most=1.0,
    ),
    Metric(
        "total_variation", "%", "largest difference in the probability of any event",
        "mean_n |p(x_n) - p_retrained(x_n)|_1 / 2", "textbook",
        pair=_mean(divergence.total_variation, 100.0), needs=CLASSES, far="high", most=100.0,
    ),
    Metric(
        "agreement", "%", "samples on which both predict the same class",
        "mean_n [argmax p(x_n) = argmax p_retrained(x_n)]", "textbook",
        pair=_mean(divergence.agreement, 100.0), needs=CLASSES, far="low", scale="logit",
    ),
    Metric(
        "activation_distance", "", "distance of the predicted probabilities",
        "mean_n |p(x_n) - p_retrained(x_n)|_1", GOLATKAR,
        pair=_mean(divergence.total_variation, 2.0), needs=CLASSES, far="high", most=2.0,
    ),
    Metric(
        "score", "%", "accuracy, or squared error for regression",
        "mean_n [argmax p(x_n) = y_n]", "textbook", solo=_score,
    ),
    Metric(
        "loss", "nats", "mean loss", "mean_n -log p(y_n | x_n)", "textbook", solo=_loss,
        primary=FORGET,
    ),
    Metric(
        "entropy", "nats", "how unsure the predictions are",
        "mean_n -sum_c p_c(x_n) log p_c(x_n)", "textbook", solo=_entropy, needs=CLASSES,
    ),
    Metric(
        "membership_auc", "%", "how well the loss alone tells forgotten from test samples",
        "AUC of -loss, forgotten against test samples", "Yeom et al. 2018, arXiv:1709.01604",
        solo=_membership_auc, parts=FORGET, needs=ATTACK, scale="logit",
        primary=FORGET,
    ),
    Metric(
        "membership_entropy", "%",
        "forgotten samples that an attack on the entropy takes for training samples",
        "SVC(C=3, rbf) on the entropy, fitted on retained against test samples", GOLATKAR,
        solo=_called_members("svc"), parts=FORGET, needs=ATTACK, scale="logit",
    ),
    Metric(
        "membership_features", "%",
        "the same for an attack on loss, confidence, entropy and modified entropy together",
        "logistic regression on four features", "Song & Mittal 2021, arXiv:2003.10595",
        solo=_called_members("all"), parts=FORGET, needs=ATTACK, scale="logit",
    ),
    Metric(
        "klom_mean", "nats",
        "divergence between the margins of scrubbed and of retrained models, sample by sample",
        "mean_n KL(hist margins of scrubbed || hist margins of retrained)",
        "Georgiev et al. 2024, arXiv:2410.23232",
        group=_klom("mean"), needs=CLASSES, far="high",
    ),
    Metric(
        "klom_p95", "nats", "the same at the samples where it is large",
        "95th percentile over n of it", "Georgiev et al. 2024, arXiv:2410.23232",
        group=_klom("p95"), needs=CLASSES, far="high",
    ),
    Metric(
        "u_lira", "%",
        "how well an attacker with shadow models tells scrubbed from retrained models, per sample",
        "AUC of the likelihood ratio of two Gaussians of the margin",
        "Hayes et al. 2024, arXiv:2403.01218",
        group=_shadow(partial(u_lira, pooled=True), ShadowAttack.auc), parts=FORGET,
        needs=CLASSES, far="high",
    ),
    Metric(
        "ruli", "%", "the same with kernel densities",
        "AUC of p_u / (p_u + p_o) of the margin", "Naderloui et al. 2025, arXiv:2506.13009",
        group=_shadow(ruli, ShadowAttack.auc), parts=FORGET, needs=CLASSES, far="high",
    ),
    Metric(
        "zrf", "", "zero retrain forgetting: likeness to a model that has learned nothing",
        "1 - mean_n JS_2(p(x_n), p_random(x_n))", "Chundawat et al. 2023, arXiv:2205.08096",
        solo=_zrf, parts=FORGET, needs=CLASSES | {"teacher"}, scale="linear", most=1.0,
    ),
    Metric(
        "weight_distance", "", "distance of the weights to a retrained model's",
        "|w - w_retrained|", "textbook",
        pair=lambda a, b, *_: weights.weight_distance(a.model, b.model),
        parts=FORGET, needs=WEIGHTS, far="high",
    ),
    Metric(
        "step_cosine", "", "direction of the step against the retrained model's",
        "cos(w - w_original, w_retrained - w_original)", GOLATKAR,
        pair=lambda a, b, *_: weights.step_cosine(a.original, a.model, [b.model]),
        parts=FORGET, needs=WEIGHTS, far="low", scale="cosine",
    ),
    Metric(
        "efficacy", "squared weight / nats",
        "inverse information that the forget set still exerts on the weights",
        "1 / tr F_empirical(w; D_f)", "Becker & Liebig 2022, arXiv:2208.10836",
        solo=_efficacy, parts=FORGET, needs=SPLIT,
    ),
    Metric(
        "relearn", "epochs",
        "how soon training on all data finds the original loss on the forget set again",
        f"epochs of 500 samples at lr 0.01 until L_f(w) <= L_f(w_original); at most {RELEARN}",
        GOLATKAR, solo=_relearn, parts=FORGET, cap=float(RELEARN), needs=SPLIT, by_name=True,
        scale="count",
    ),
    Metric(
        "relearn_steps", "steps",
        "how soon training on all data finds 95 % of the original accuracy on the forget set",
        f"steps of 128 samples at lr 0.01 until A_f(w) >= 0.95 A_f(w_original); at most {STEPS}",
        "Chundawat et al. 2023, arXiv:2201.05629", solo=_relearn_steps, parts=FORGET,
        cap=float(STEPS), needs=CLASSES | SPLIT, by_name=True, scale="count",
    ),
    Metric(
        "u_lira_tpr", "%", "true positives of u_lira at 1 % false positives",
        "TPR at 1 % FPR of the likelihood ratio of two Gaussians of the margin",
        "Hayes et al. 2024, arXiv:2403.01218",
        group=lambda ours, retrained: _tpr(ours, retrained).value, bounds=_tpr,
        parts=FORGET, needs=CLASSES, by_name=True, far="high", samples=needed_negatives(FPR),
    ),
    Metric(
        "tug_of_war", "", "three accuracies against a retrained model's, in one number",
        "prod_parts (1 - |A(w) - A(w_retrained)|)", "Zhao et al. 2024, arXiv:2406.01257",
        pair=_tug_of_war, parts=FORGET, needs=ATTACK, by_name=True, far="low", scale="linear",
        most=1.0,
    ),
    Metric(
        "average_gap", "%", "the same, with the members that an attack on the confidence calls",
        "mean of |A(w) - A(w_retrained)| over the parts and of |MIA(w) - MIA(w_retrained)|",
        "Fan et al. 2024, arXiv:2310.12508", pair=_average_gap, parts=FORGET, needs=ATTACK,
        by_name=True, far="high", most=100.0,
    ),
)  # fmt: skip
METRICS: dict[str, Metric] = {m.name: m for m in TABLE}
