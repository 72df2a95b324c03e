r"""De-censoring: can what was removed be put back, by someone with data of the same kind?

The attacker has the censored model, an uncensored one of the same task (the one before, or one
trained on data of its own), and samples with the attribute. It learns a map from censored to
uncensored activations, and a probe of uncensored ones; then it maps and probes activations that it
is given. Beside it stand the probe of the censored activations themselves, and that of uncensored
ones, which is the most that a map can bring back. Gains and intervals are as for `Probe`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from sklearn.neural_network import MLPRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from fisher_forget.errors import ModelError
from fisher_forget.evaluate.intervals import Interval, paired_interval
from fisher_forget.overlearn.activations import activations, finite_samples
from fisher_forget.overlearn.attribute import Attribute, codes, sensitive
from fisher_forget.overlearn.probe import Probe, best_guess, compared, halves

HIDDEN = 128  # units of the map


@dataclass(frozen=True)
class Decensored:
    """Gains over guessing, of three probes of one layer.

    Attributes:
        layer: Its name.
        censored: Of censored activations.
        mapped: Of censored activations, mapped to uncensored ones.
        uncensored: Of uncensored activations.
        guess: Accuracy of the guess.
        samples: That were asked.
    """

    layer: str
    censored: Interval
    mapped: Interval
    uncensored: Interval
    guess: float
    samples: int

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Decensoring:
    """Map censored activations to uncensored ones, and probe them; see the module.

    Threat model: the attacker reads the activations of one layer, has both models, and samples of
    the same kind with the attribute: half of those that `run` is given.

    Attributes:
        layer: Name of a layer of both models.
        probe: How a classifier of the attribute is trained.

    Source: Song & Shmatikov 2020, arXiv:1905.11742, section 5.
    """

    layer: str
    probe: Probe = field(default_factory=Probe)

    def run(
        self,
        censored: nn.Module,
        uncensored: nn.Module,
        data: Any,
        attribute: Attribute,
        given: Attribute | None = None,
    ) -> Decensored:
        """Attack a censored model.

        Args:
            censored: In eval mode; untouched.
            uncensored: Another model with this layer; untouched.
            data: Samples that neither has seen.
            attribute: One value a sample [N].
            given: As for `Probe.run`.

        Raises:
            DataError: If the attribute has one value, or a value too few samples, or inputs are
                not finite.
            ModelError: If a layer is not there, or both give the same.
        """
        samples = finite_samples(data)
        values = sensitive(attribute, len(samples))
        labels = codes(np.zeros(len(samples)) if given is None else given, len(samples), "given")
        hidden, plain = (
            activations(model, samples, [self.layer])[self.layer].numpy()
            for model in (censored, uncensored)
        )
        if hidden.shape == plain.shape and np.array_equal(hidden, plain):
            got = f"two models that give the same at {self.layer!r}"
            raise ModelError(got, "a censored one and another", "Pass the model before, say.")
        train, asked = halves(values, self.probe.seed)
        guess = best_guess(values, labels, train)[labels[asked]]
        guessed, _ = compared(guess, values[asked])
        settings: dict[str, Any] = {"early_stopping": True, "random_state": self.probe.seed}
        network = MLPRegressor(hidden_layer_sizes=(HIDDEN,), max_iter=300, **settings)
        scale = StandardScaler().fit(plain[train])
        to_plain = make_pipeline(StandardScaler(), network)
        to_plain.fit(hidden[train], scale.transform(plain[train]))
        mapped = scale.inverse_transform(to_plain.predict(hidden[asked]).reshape(len(asked), -1))
        of_hidden, of_plain = (self.probe.fitted(x[train], values[train]) for x in (hidden, plain))

        def gain(classifier: Any, x: Any) -> Interval:
            right = classifier.predict(x) == values[asked]
            return paired_interval(right.astype(float) - guessed)

        return Decensored(
            layer=self.layer,
            censored=gain(of_hidden, hidden[asked]),
            mapped=gain(of_plain, mapped),
            uncensored=gain(of_plain, plain[asked]),
            guess=float(guessed.mean()),
            samples=len(asked),
        )
