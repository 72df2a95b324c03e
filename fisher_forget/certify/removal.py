r"""Certified removal from logistic regression.

A model is trained to the end on an objective with a random linear term, for each class against the
others,

    L_b(w; D) = sum_i log(1 + exp(-y_i w^T x_i)) + (lambda n / 2) |w|^2 + b^T w,

with b ~ N(0, sigma^2 I), y_i = 1 for the class and -1 for the others. A sample is removed by a
Newton step on what is left. Had that ended exactly at the minimum for some other b', the model
would be one that training without the sample gives, with b' in the place of b; and b' - b is the
gradient that is left,

    r = grad L_b(w'; D').

So a removal with |r| <= beta is (eps, delta)-indistinguishable from retraining wherever beta <=
sigma mu(eps, delta) (`gaussian`; the K classes together have |r|^2 = sum_k |r_k|^2). Where the
budget is spent the model is trained anew, with a fresh b.

How |r| is accounted for is the user's choice:

- "added": the step is w' = w + H^-1 Delta, Delta = m lambda w + sum of the m removed samples'
  gradients, H the Hessian of what is left. Each step leaves gamma |X'|_2 |s| |X' s| at most (s the
  step, gamma = 1/4), and these bounds add up from one removal to the next, as in the paper.
- "corrected": the step starts from the whole gradient of what is left, so that it mends what the
  steps before it left. Then the bound of the last step is all there is, by the same inequality: it
  bounds the gradient after a Newton step, whatever the gradient was before. One pass over the data
  more.
- "measured": the same step; |r| itself, by one more pass.

All three depend on the data, and the theorem asks for a bound that holds for every b: stopping by
what was found for this one is a decision that depends on the data. The worst-case bound, which
needs no data, is 4 gamma / (lambda^2 (n - 1)) for rows of length one, and useless (`worst_case`).

Source: Guo, Goldstein, Hannun and van der Maaten 2020 (arXiv:1911.03030), theorem 3, corollary 1,
section 3.2; there, with delta by c = sqrt(2 ln(1.5 / delta)) and bounds of the classes added.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fisher_forget._util import files
from fisher_forget._util.checks import is_number
from fisher_forget.certify.gaussian import epsilon_of, mu_of
from fisher_forget.certify.logistic import checked, hessian_factor, pulls, signs_of
from fisher_forget.data.indices import forget_indices
from fisher_forget.errors import ConfigError, DataError, NumericalError, SplitError
from fisher_forget.ledger import Ledger, RequestLog
from fisher_forget.unlearn.noise_draw import check_generator, secret_normals

Accounting = Literal["added", "corrected", "measured"]
GAMMA = 0.25  # Lipschitz constant of the logistic loss's second derivative
STEPS, TOLERANCE = 100, 1e-9  # of the training: Newton steps; |gradient| a sample


@dataclass(frozen=True)
class Removal:
    """What a removal did.

    Attributes:
        samples: Indices of the removed samples.
        bound: Of the gradient that this step leaves, over all classes; 0 after a retraining.
        residual: That gradient itself, where it was measured; NaN where it was not.
        spent: beta, what all removals since the last training leave, by the accounting.
        budget: The most that it may be.
        retrained: Whether the budget was spent, and the model was trained anew.
        seconds: Wall time.
    """

    samples: tuple[int, ...]
    bound: float
    residual: float
    spent: float
    budget: float
    retrained: bool
    seconds: float


class CertifiedLogistic:
    """Logistic regression from which samples are removed with a certificate; see the module.

    The certificate is for this model on these features. Features of an extractor that was trained
    on the same samples still tell of them; those of one that never saw them do not.

    Args:
        regularisation: lambda, a sample; above 0.
        sigma: Standard deviation of b. Larger ones allow more removals, and cost accuracy.
        epsilon: Of the certificate.
        delta: Of the certificate.
        accounting: See the module.
        ledger: Records the requests; those in it are left out at `fit`.
        each: Share of the samples that one requester (`who`) may ask for in all, beyond which a
            removal is refused before it is recorded; it needs a ledger, 1 refuses nothing.
        generator: b is drawn from it, in an experiment that is to be repeated; by default the
            operating system gives it, and nobody knows it.

    Raises:
        ConfigError: If one of them is out of range.

    Example:
        >>> x = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
        >>> y = (x[:, 0] > 0).long()
        >>> model = CertifiedLogistic(0.01, sigma=1.0).fit(x, y)
        >>> removal = model.remove([3, 14])
        >>> removal.retrained, model.epsilon() < 1
        (False, True)
    """

    x: Tensor
    y: Tensor
    classes: Tensor
    signs: Tensor
    kept: Tensor
    b: Tensor
    weights: Tensor
    longest: float

    def __init__(
        self,
        regularisation: float = 1e-3,
        sigma: float = 1.0,
        *,
        epsilon: float = 1.0,
        delta: float = 1e-4,
        accounting: Accounting = "corrected",
        ledger: Ledger | None = None,
        each: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> None:
        if not (regularisation > 0 and sigma > 0 and math.isfinite(regularisation + sigma)):
            got = f"regularisation={regularisation!r}, sigma={sigma!r}"
            raise ConfigError(got, "numbers above 0", "Correct them.")
        if accounting not in ("added", "corrected", "measured"):
            got = f"accounting={accounting!r}"
            raise ConfigError(got, "'added', 'corrected' or 'measured'", "Correct it.")
        if not is_number(each) or not 0 < each <= 1 or (each < 1 and ledger is None):
            got = f"each={each!r}{' without a ledger' * (ledger is None)}"
            raise ConfigError(got, "a share above 0, 1 at most, and a ledger", "Correct it.")
        check_generator(generator)
        self.regularisation, self.sigma = float(regularisation), float(sigma)
        self.epsilon_target, self.delta = float(epsilon), float(delta)
        self.accounting: Accounting = accounting
        self.budget = self.sigma * mu_of(epsilon, delta)
        self.ledger, self.each, self._generator = ledger, each, generator
        self.trainings = 0
        self._spent: Tensor | None = None
        self._log: RequestLog | None = None

    def fit(self, x: Tensor, y: Tensor) -> CertifiedLogistic:
        """Train on features x [N, d] and classes y [N], without whom the ledger says was removed.

        Raises:
            DataError: If they are not such tensors, or a class has no sample.
            NumericalError: If training does not end.
        """
        self.x, self.y, self.classes = checked(x, y)
        self.signs = signs_of(self.y, self.classes)
        self.kept = torch.ones(len(self.x), dtype=torch.bool)
        if self.ledger is not None:
            self._log = RequestLog(self.ledger, len(self.x))
            settings = (self.regularisation, self.sigma, self.epsilon_target, self.delta)
            self._log.claim(files.fingerprint(self.x, self.y, *settings), [])
            for samples in self._log.requests():
                self.kept[samples] = False
            self._train()
            self._log.done(**self._evidence())
        else:
            self._train()
        return self

    @property
    def spent(self) -> float:
        """beta: by the accounting, over all classes."""
        return float(self._fitted().norm())

    def epsilon(self) -> float:
        """The least epsilon that the certificate holds for at this moment, with its delta."""
        return epsilon_of(self.spent / self.sigma, self.delta)

    def worst_case(self) -> float:
        """The bound of a single removal that needs no data, for rows of length one at most.

        Raises:
            DataError: If a row is longer.
        """
        self._fitted()
        longest = float(self.x.norm(dim=1).max())
        if longest > 1 + 1e-9:
            got, fix = f"a row of length {longest:.3g}", "Scale the features."
            raise DataError(got, "at most 1", fix)
        n = int(self.kept.sum())
        return 4 * GAMMA / (self.regularisation**2 * (n - 1)) * math.sqrt(len(self.weights))

    def scores(self, x: Tensor) -> Tensor:
        """w_k^T x for each class [N, K]; of two classes that of the second [N, 1]."""
        self._fitted()
        return x.double() @ self.weights.T

    def predict(self, x: Tensor) -> Tensor:
        """The class of each row [N]."""
        scores = self.scores(x)
        which = scores.argmax(1) if scores.shape[1] > 1 else (scores[:, 0] > 0).long()
        return self.classes[which]

    def module(self) -> nn.Linear:
        """The same model as a layer of torch, float32, with a logit for each class."""
        self._fitted()
        weights = self.weights
        if len(weights) == 1:
            weights = torch.cat([-weights, weights]) / 2
        layer = nn.Linear(weights.shape[1], len(weights), bias=False)
        layer.weight.data = weights.float().clone()
        return layer.eval()

    def remove(
        self, samples: Sequence[int] | NDArray[np.int64] | Tensor | range, *, who: str = ""
    ) -> Removal:
        """Remove samples in one step; where that would leave the budget, train anew without them.

        Args:
            samples: Indices of distinct rows of `fit`; those removed before count no more.
            who: As for `Ledger.ask`.

        Raises:
            SplitError: If they are no such indices, or a class would be left without a sample.
            ConfigError: If a requester asks for more than each may.
        """
        self._fitted()
        begun = time.perf_counter()
        named = torch.from_numpy(forget_indices(samples, len(self.x)))
        gone = named[self.kept[named]]
        left = self.kept.clone()
        left[gone] = False
        if len(self.y[left].unique()) < len(self.classes):
            got, fix = "a removal after which a class has no sample", "Train a model without it."
            raise SplitError(got, "one of each class at least", fix)
        name = ""
        if self._log is not None:
            self._log.check_each(named.tolist(), who, self.each)
            name = self._log.ask(named.tolist(), who)
        try:
            told = self._removed(gone, left)
        except Exception as error:
            if self._log is not None:
                self._log.ledger.fail(name, f"{type(error).__name__}: {error}"[:500])
            raise
        seconds = time.perf_counter() - begun
        removal = Removal(tuple(named.tolist()), **told, budget=self.budget, seconds=seconds)
        if self._log is not None:
            self._log.done(**self._evidence(), retrained=removal.retrained)
        return removal

    def residual(self) -> float:
        """|grad L_b(w; D')| as it is, over all classes: one pass over the data."""
        self._fitted()
        return float(self._gradient(self.weights, self.kept).norm())

    def _removed(self, gone: Tensor, left: Tensor) -> dict[str, Any]:
        spent = self._fitted()
        if not len(gone):
            spends = {"bound": 0.0, "residual": math.nan, "spent": self.spent}
            return spends | {"retrained": False}
        if self.accounting == "added":
            step = self._solve(left, self._delta(gone))
        else:
            step = self._solve(left, -self._gradient(self.weights, left))
        bounds = self._bounds(step, left)
        weights, residual = self.weights + step, math.nan
        if self.accounting == "measured":
            spent = self._gradient(weights, left).norm(dim=1)
            residual = float(spent.norm())
        else:
            spent = spent + bounds if self.accounting == "added" else bounds
        told = {"bound": float(bounds.norm()), "residual": residual, "spent": float(spent.norm())}
        self.kept = left
        if told["spent"] > self.budget:
            self._train()
            return {"bound": 0.0, "residual": residual, "spent": self.spent, "retrained": True}
        self.weights, self._spent = weights, spent
        return told | {"retrained": False}

    def _train(self) -> None:
        """To the end, by Newton steps, with a fresh b."""
        rows = len(self.signs)
        shape = rows, self.x.shape[1]
        self.b = self.sigma * _normal(shape, self._generator)
        self.longest = float(torch.linalg.matrix_norm(self.x[self.kept], 2))  # |X|_2
        self.weights = torch.zeros(shape, dtype=torch.float64)
        tolerance = TOLERANCE * int(self.kept.sum())
        for _ in range(STEPS):
            gradient = self._gradient(self.weights, self.kept)
            if float(gradient.norm()) <= tolerance:
                break
            self._descend(self._solve(self.kept, -gradient), gradient)
        else:
            got = f"a gradient of {float(gradient.norm()):.3g} after {STEPS} Newton steps"
            raise NumericalError(got, f"at most {tolerance:.3g}", "Raise regularisation=.")
        self._spent = gradient.norm(dim=1)  # what training leaves counts as well
        self.trainings += 1

    def _descend(self, step: Tensor, gradient: Tensor) -> None:
        """A Newton step of every class, halved until its objective falls."""
        before, slope = self._objective(self.weights), (gradient * step).sum(1)
        share = torch.ones(len(step), 1, dtype=torch.float64)
        for _ in range(50):
            after = self._objective(self.weights + share * step)
            bad = after > before + 1e-4 * share[:, 0] * slope + 1e-12 * before.abs()
            if not bool(bad.any()):
                break
            share[bad] /= 2
        self.weights = self.weights + share * step

    def _objective(self, weights: Tensor) -> Tensor:
        """L_b of each class [K]."""
        margins = self.signs[:, self.kept] * (weights @ self.x[self.kept].T)
        decay = self.regularisation * int(self.kept.sum()) / 2 * (weights**2).sum(1)
        loss = nn.functional.softplus(-margins).sum(1)
        return loss + decay + (self.b * weights).sum(1)

    def _gradient(self, weights: Tensor, left: Tensor) -> Tensor:
        """grad L_b(w; D') of each class [K, d]."""
        n = int(left.sum())
        return self._losses(weights, left) + self.regularisation * n * weights + self.b

    def _losses(self, weights: Tensor, rows: Tensor) -> Tensor:
        """Sum of the gradients of the rows' losses [K, d]."""
        return pulls(weights, self.x[rows], self.signs[:, rows]) @ self.x[rows]

    def _delta(self, gone: Tensor) -> Tensor:
        decay = len(gone) * self.regularisation * self.weights
        return decay + self._losses(self.weights, gone)

    def _solve(self, left: Tensor, right: Tensor) -> Tensor:
        """H^-1 of each class times its right-hand side [K, d], at the present weights."""
        x, solved = self.x[left], list[Tensor]()
        for w, r in zip(self.weights, right, strict=True):
            factor = hessian_factor(x, w, self.regularisation)
            solved.append(torch.cholesky_solve(r[:, None], factor)[:, 0])
        return torch.stack(solved)

    def _bounds(self, step: Tensor, left: Tensor) -> Tensor:
        """gamma |X|_2 |s| |X' s| of each class [K]; |X|_2 only falls as rows go."""
        moved = (step @ self.x[left].T).norm(dim=1)
        bounds: Tensor = GAMMA * self.longest * step.norm(dim=1) * moved
        return bounds

    def _fitted(self) -> Tensor:
        if self._spent is None:
            raise ConfigError("a model that is not trained", "one that is", "Call fit() first.")
        return self._spent

    def _evidence(self) -> dict[str, Any]:
        """What a ledger keeps of a removal."""
        return {
            "method": "certified-removal",
            "version": version("fisher-forget"),
            "epsilon": self.epsilon(),
            "delta": self.delta,
            "accounting": self.accounting,
            "spent": self.spent,
            "budget": self.budget,
            "retained": int(self.kept.sum()),
            "model_after": files.fingerprint(self.weights),
        }


def _normal(shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
    if generator is None:
        return secret_normals(math.prod(shape)).reshape(shape)
    return torch.randn(shape, generator=generator, dtype=torch.float64)
