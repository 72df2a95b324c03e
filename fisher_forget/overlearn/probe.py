r"""Probes: what can be read of a sensitive attribute from each layer of a model?

The model is frozen. On half of the samples a classifier of the attribute s is trained on a layer's
activations, its strength of regularisation chosen by cross-validation there; the other half is
asked. Two numbers say what is found beyond the best guess without activations:

    gain         accuracy of the probe - accuracy of the guess
    information  mean of ln p(s | activations) - ln p(s | guess), nats (Xu et al. 2020)

The guess is the most frequent value, and the shares of all values; with `given` labels, those among
samples of the same label, so that a model of the task that tells nothing else has 0. Where a label
has few samples, its shares are drawn to those of all (`best_guess`): the guess would otherwise be
worse than none, and any probe would find something. (Below 0 the probe does not even tell the
label.) The interval of the gain is that of Agresti and Min for paired
shares, of the information Student's, over samples like those that are asked, for this probe.

The two may differ: where all values have the same mean in the activations, no linear probe has
information, but it may still have a gain, from the spread around them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaln, softmax
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedKFold, train_test_split
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from fisher_forget._util.checks import is_whole
from fisher_forget._util.isolation import seeded
from fisher_forget._util.markdown import markdown_table
from fisher_forget._util.progress import bar
from fisher_forget.errors import ConfigError, DataError
from fisher_forget.evaluate.intervals import Array, Interval, as_array, paired_interval, t_interval
from fisher_forget.overlearn.activations import INPUT, activations, finite_samples
from fisher_forget.overlearn.attribute import Attribute, Codes, codes, sensitive

KINDS = ("linear", "nonlinear")
HIDDEN = 64
SMALLEST = 1e-12  # a share of which the logarithm is taken
STRENGTHS = 2.0 ** np.arange(-3, 11)  # samples that the shares of all samples count for


@dataclass(frozen=True)
class LayerProbe:
    """What a probe of one layer found.

    Attributes:
        layer: Its name; "input" is what the model is given.
        width: Activations a sample.
        accuracy: Of the probe, on samples that it was not trained on.
        guess: Accuracy without activations.
        gain: Accuracy minus guess, with its 95 % interval.
        information: Nats a sample beyond the guess, with its 95 % interval.
    """

    layer: str
    width: int
    accuracy: float
    guess: float
    gain: Interval
    information: Interval

    @property
    def finds(self) -> bool:
        """Whether the attribute is read: the whole interval is above 0."""
        return self.gain.low > 0


@dataclass(frozen=True, repr=False)
class Probed:
    """What a probe found, layer by layer.

    Attributes:
        layers: In the order of the model.
        samples: That were asked.
    """

    layers: tuple[LayerProbe, ...]
    samples: int

    def __getitem__(self, name: str) -> LayerProbe:
        return {x.layer: x for x in self.layers}[name]

    @property
    def most(self) -> LayerProbe:
        """The layer of the model that tells most."""
        return max((x for x in self.layers if x.layer != INPUT), key=lambda x: x.gain.value)

    def __str__(self) -> str:
        rows = [
            [x.layer, x.width, f"{100 * x.accuracy:.1f} %", f"{100 * x.guess:.1f} %",
             "{:.1f} ({:.1f} to {:.1f})".format(*(100 * v for v in asdict(x.gain).values())),
             "{:.2f} ({:.2f} to {:.2f})".format(*asdict(x.information).values())]
            for x in self.layers
        ]  # fmt: skip
        heads = ["layer", "width", "accuracy", "guess", "gain (points)", "information (nats)"]
        return f"{markdown_table(heads, rows)}\n\n{self.samples:,} samples asked."

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Probe:
    """A classifier of an attribute on each layer's activations; see the module.

    Attributes:
        layers: Names of `model.named_modules()`; by default all without layers of their own.
        kind: "linear", logistic regression; "nonlinear", a network with one hidden layer.
        strengths: Among which cross-validation chooses: C of logistic regression. Of a network,
            1 / (C N) is its weight decay.
        folds: Of the cross-validation.
        max_width: Of wider activations so many random projections are taken.
        seed: Of halves, folds, projections and networks.
        progress: Show a progress bar.

    Raises:
        ConfigError: If a value is out of range.

    Source: Song & Shmatikov 2020, arXiv:1905.11742, section 3.
    """

    layers: str | Sequence[str] | None = None
    kind: Literal["linear", "nonlinear"] = "linear"
    strengths: tuple[float, ...] = (0.001, 0.01, 0.1, 1.0)
    folds: int = 3
    max_width: int = 1024
    seed: int = 0
    progress: bool = False

    def __post_init__(self) -> None:
        good = isinstance(self.strengths, tuple) and all(0 < x < np.inf for x in self.strengths)
        for name, fits, expected in (
            ("layers", self.layers is None or len(self.layers), "at least one name, or None"),
            ("kind", self.kind in KINDS, f"one of {KINDS}"),
            ("strengths", good and len(self.strengths), "a tuple of positive numbers"),
            ("folds", is_whole(self.folds, 2), "a whole number of at least 2"),
            ("max_width", is_whole(self.max_width, 1), "a whole number of at least 1"),
        ):
            if not fits:
                raise ConfigError(f"{name}={getattr(self, name)!r}", expected, f"Correct {name}.")
        seeded(self.seed)

    def run(
        self, model: nn.Module, data: Any, attribute: Attribute, given: Attribute | None = None
    ) -> Probed:
        """Probe the layers of a model.

        Args:
            model: In eval mode; untouched.
            data: Samples that the model, and what was done to it, has not seen: a data set of
                (inputs, target), or a tuple (inputs, targets).
            attribute: One value a sample [N].
            given: Labels that may be told [N], such as the task's own targets; see the module.

        Raises:
            DataError: If the attribute has one value, or a value too few samples, or inputs are not
                finite.
            ConfigError: If a value has fewer samples to train on than there are folds.
            ModelError: If a layer is not there, or its output has no row for each sample.
            NumericalError: If activations are not finite.
        """
        samples = finite_samples(data)
        known = sensitive(attribute, len(samples))
        labels = codes(np.zeros(len(samples)) if given is None else given, len(samples), "given")
        outputs = activations(model, samples, self.layers)
        inputs = samples.tensors[0]
        if self.layers is None and len(samples.tensors) == 2 and inputs.is_floating_point():
            outputs = {INPUT: inputs.flatten(1).float()} | outputs
        train, test = halves(known, self.seed)
        guess = best_guess(known, labels, train)[labels[test]]
        found = []
        for layer, whole in bar(outputs.items(), len(outputs), "layers probed", self.progress):
            x = self._narrow(whole.numpy())
            told = self.fitted(x[train], known[train]).predict_proba(x[test])
            scores = [compared(p, known[test]) for p in (told, guess)]
            (right, sure), (guessed, unsure) = scores
            gain, information = paired_interval(right - guessed), t_interval(sure - unsure)
            shares = float(right.mean()), float(guessed.mean())
            found.append(LayerProbe(layer, whole.shape[1], *shares, gain, information))
        return Probed(tuple(found), len(test))

    def fitted(self, x: NDArray[Any], values: Codes) -> Any:
        """A classifier of scikit-learn, trained on activations [N, width]."""
        settings: dict[str, Any] = {"max_iter": 500}
        if self.kind == "linear":
            key, choices = "logisticregression__C", list(self.strengths)
            head: Any = LogisticRegression(**settings)
        else:
            key = "mlpclassifier__alpha"
            choices = [1 / (c * len(x)) for c in self.strengths]
            settings = {"max_iter": 200, "early_stopping": True, "random_state": self.seed}
            head = MLPClassifier(hidden_layer_sizes=(HIDDEN,), **settings)
        self._check_enough(values, len(choices) > 1)
        pipe = make_pipeline(StandardScaler(), head)
        if len(choices) == 1:
            return pipe.set_params(**{key: choices[0]}).fit(x, values)
        folds = StratifiedKFold(self.folds, shuffle=True, random_state=self.seed)
        search = GridSearchCV(pipe, {key: choices}, cv=folds, scoring="neg_log_loss")
        return search.fit(x, values)

    def _check_enough(self, values: Codes, crossed: bool) -> None:
        rarest, trained = int(np.unique(values, return_counts=True)[1].min()), len(values)
        if crossed:
            trained -= -(-trained // self.folds)  # of the largest fold
            if rarest < self.folds:
                got = f"folds={self.folds}, and {rarest} training samples of a value"
                fix = "Lower folds, or pass more samples."
                raise ConfigError(got, f"at most {rarest} folds", fix)
        if self.kind == "nonlinear" and trained <= 10:
            got = f"{trained} samples to train a network on"
            expected = "more than 10: a tenth says when to stop"
            raise DataError(got, expected, "Pass more samples, or take kind='linear'.")

    def _narrow(self, x: NDArray[Any]) -> NDArray[Any]:
        """At most `max_width` columns, by random projections."""
        if x.shape[1] <= self.max_width:
            return x
        rng = np.random.default_rng(self.seed)
        scale = self.max_width**-0.5
        mix = rng.normal(scale=scale, size=(x.shape[1], self.max_width))
        return np.asarray(x @ mix.astype(x.dtype))


def halves(values: Codes, seed: int) -> tuple[Codes, Codes]:
    """Rows to train on and rows to ask about, with all values in both."""
    rows = np.arange(len(values))
    train, test = train_test_split(rows, test_size=0.5, random_state=seed, stratify=values)
    return np.sort(train), np.sort(test)


def best_guess(values: Codes, labels: Codes, train: Codes) -> Array:
    r"""Shares of the values among trained samples of each label [labels, values], drawn to the
    shares m of all trained samples:

        p(v | l) = sum over a of w_a (n_lv + a m_v) / (n_l + a),
        w_a ~ prod over l of Gamma(a) / Gamma(a + n_l) prod over v of
              Gamma(n_lv + a m_v) / Gamma(a m_v),

    n the numbers of samples, w_a the evidence of the shares of labels being Dirichlet(a m), a from
    `STRENGTHS`. A single label has the shares m.

    Source: Minka 2000, Estimating a Dirichlet distribution; the strength is averaged over here.
    """
    n = np.zeros((labels.max() + 1, values.max() + 1))
    np.add.at(n, (labels[train], values[train]), 1.0)
    shares, seen = n.sum(0) / n.sum(), n.sum(1, keepdims=True)
    priors = [a * shares for a in STRENGTHS]
    evidence = [
        (gammaln(n + prior) - gammaln(prior)).sum() - (gammaln(seen + a) - gammaln(a)).sum()
        for a, prior in zip(STRENGTHS, priors, strict=True)
    ]
    guesses = [(n + prior) / (seen + a) for a, prior in zip(STRENGTHS, priors, strict=True)]
    return as_array(np.tensordot(softmax(evidence), guesses, axes=1))


def compared(shares: Array, values: Codes) -> tuple[Array, Array]:
    """Of predicted shares [n, values]: whether the largest is right [n], and the logarithm of that
    of the true value [n]."""
    of_truth = shares[np.arange(len(values)), values]
    right = as_array(shares.argmax(1) == values)
    return right, as_array(np.log(np.maximum(of_truth, SMALLEST)))
