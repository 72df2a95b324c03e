r"""Membership inference on the second release alone: was a sample in its training data?

    statistic(e) = -loss(A', e)

For a model that never saw the deleted samples they are unseen ones like any others, so that the AUC
of deleted against unseen samples of the same kind is 1/2. Above it they are still known; below it
they were pushed away, which shows them, too.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from torch.utils.data import TensorDataset

from fisher_forget.attack.findings import Finding
from fisher_forget.attack.inference import check_enough
from fisher_forget.attack.pairs import Pair, as_pairs
from fisher_forget.attack.release import WHOLE, Model, Observer, Release
from fisher_forget.errors import DataError
from fisher_forget.evaluate.intervals import Array
from fisher_forget.evaluate.roc import auc, share_interval
from fisher_forget.likelihood import Likelihood


@dataclass(frozen=True)
class MembershipInference:
    """Tell deleted samples from unseen ones by the second model's loss.

    Threat model: black box. The attacker has the second release's answers, the samples and their
    labels; not the first release.

    Attributes:
        release: What is published of the answers.
        likelihood: What modules were trained with.

    Source: Yeom et al. 2018, arXiv:1709.01604, whose attack compares losses.
    """

    release: Release = WHOLE
    likelihood: Likelihood | str = "categorical"

    def run(self, pairs: Pair | Iterable[Pair]) -> Finding:
        """Attack the second model of one pair, or of several.

        The AUC and its interval are taken as by `DeletionInference.run`.

        Args:
            pairs: With `others`: samples that neither model was trained on, of the same kind (and
                classes) as the deleted ones.

        Raises:
            DataError: If there are no others, or too few samples for a perfect attack to be told
                from guessing.
            ModelError, ConfigError, NumericalError: As for `Pair`.
        """
        listed, observer = as_pairs(pairs), Observer(self.release, self.likelihood)
        shares, yard, sizes = [], [], []
        for pair in listed:
            if pair.others is None:
                fix = "Pass Pair(before, after, deleted, others)."
                raise DataError("a pair without others", "unseen samples", fix)
            shares.append(_share(observer, pair.after, pair))
            yard.append(np.mean([_share(observer, m, pair) for m in pair.retrained] or 0.0))
            sizes.append(min(len(pair.deleted), len(pair.others)))
        total = check_enough(sum(sizes))
        found, exact = (
            share_interval(float(np.average(x, weights=sizes)), total) for x in (shares, yard)
        )
        return Finding(
            attack="membership inference",
            measure="AUC",
            found=found,
            nothing=0.5,
            retrained=exact if listed[0].retrained else None,
            samples=sum(len(pair.deleted) for pair in listed),
            meaning="someone with the second model's answers and the samples' labels tells a "
            "deleted sample from an unseen one with",
        )


def _share(observer: Observer, model: Model, pair: Pair) -> float:
    def scores(samples: TensorDataset) -> Array:
        return -observer.losses(observer.sees(model, samples), samples)

    return float(auc(scores(pair.deleted), scores(pair.others)))
