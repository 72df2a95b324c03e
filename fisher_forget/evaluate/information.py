r"""What noisy weights, and the outputs they compute, can still say about the forgotten samples, in
nats.

Noise makes a model a draw from the law N(h, s^2 K) with K = (B + tau I)^-2p. With a second law
N(h', s0^2 K) of the same shape around a model that never saw D_f, h' a retrained one, and r = s^2 /
s0^2,

    KL = 1/2 [ |(B + tau I)^p (h - h')|^2 / s0^2 + d (r - 1 - ln r) ]           weights
    KL = 1/2 [ df^T (J K J^T)^-1 df / s0^2       + c (r - 1 - ln r) ]           outputs of x

since both log-determinants are those of K. J [c, d] is the Jacobian of the c outputs of a query x,
df [c] the difference of their means. Outputs are a function of the weights, so in the linearised
model they say no more than these (data-processing inequality). Golatkar et al. 2020
(arXiv:1911.04933, Prop. 2; arXiv:2003.02960, section 4); their public code leaves the 1/2 out, and
keeps only the diagonal of J K J^T.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, Self

import torch
from torch import Tensor, nn

from fisher_forget import params as P
from fisher_forget._util.copies import private_copy
from fisher_forget._util.isolation import isolated, seeded
from fisher_forget.curvature.double_backward import hidden_from_products, refuse_hidden
from fisher_forget.curvature.operator import Curvature
from fisher_forget.curvature.products import Linearised, twice_differentiable
from fisher_forget.data.batches import Batch
from fisher_forget.errors import ConfigError, DataError, ModelError
from fisher_forget.params import Params
from fisher_forget.unlearn.noise_target import EXPONENT
from fisher_forget.unlearn.result import ForgetResult

Covariance = Literal["full", "diagonal"]


@dataclass(frozen=True)
class NoiseLaw:
    """The law of noisy weights, N(mean, s^2 (B + tau I)^-2p).

    Attributes:
        mean: h, in units of the weights; parameters that it does not name are fixed.
        curvature: Already damped: B + tau I.
        scale: s.
        exponent: p.
    """

    mean: Params
    curvature: Curvature
    scale: float
    exponent: float = EXPONENT

    def __post_init__(self) -> None:
        if not 0 < self.scale < math.inf:
            fix = "Without noise the weights say everything: compare the models themselves."
            raise ConfigError(f"a noise scale of {self.scale}", "a finite number above 0", fix)

    @classmethod
    def of(cls, result: ForgetResult) -> NoiseLaw:
        """The law that the scrubbed weights of a result were drawn from.

        Raises:
            ConfigError: If no noise was added.
            DataError: If the result was loaded from a file, which has no weights before noise.
        """
        z = result.noise
        if z is None:
            got = "a result without noise"
            raise ConfigError(got, "noise that was drawn", "Call forget with noise='auto'.")
        return cls(result.corrected, result.noise_curvature(), z.scale, z.exponent)

    def at(self, mean: nn.Module | Mapping[str, Tensor], scale: float | None = None) -> Self:
        """The law of the same shape around other weights: a retrained model's, say.

        Args:
            mean: A model, or its named parameters.
            scale: s; the same by default.

        Raises:
            ModelError: If names or shapes do not match.
        """
        given = dict(mean.named_parameters()) if isinstance(mean, nn.Module) else mean
        shapes = {name: p.shape for name, p in given.items()}
        if odd := [name for name, p in self.mean.items() if shapes.get(name) != p.shape]:
            got = f"weights that differ in {', '.join(odd[:4])}"
            expected = "parameters of the same names and shapes"
            raise ModelError(got, expected, "Compare models of the same architecture.")
        moved = {name: given[name].detach().to(p, copy=True) for name, p in self.mean.items()}
        return replace(self, mean=moved, scale=self.scale if scale is None else scale)


@isolated()
def gaussian_kl(law: NoiseLaw, reference: NoiseLaw) -> float:
    """KL(law || reference) between laws of one shape, exact for every structure of curvature, nats.

    Args:
        law: N(h, s^2 K), of the scrubbed weights.
        reference: N(h', s0^2 K), made by `law.at(...)`.

    Raises:
        ConfigError: If the laws do not share curvature and exponent.
    """
    _check_shared(law, reference)
    # |(B + tau I)^p (h - h')|^2: both laws have the covariance (B + tau I)^-2p up to their scales,
    # so their log-determinants differ by d ln r alone
    whitened = law.curvature.power(P.add(law.mean, reference.mean, -1.0), law.exponent)
    distance = P.dot(whitened, whitened) / (2 * reference.scale**2)
    return distance + P.size(law.mean) * _spread(law, reference)


@isolated()
def information_in_outputs(
    model: nn.Module,
    law: NoiseLaw,
    reference: NoiseLaw,
    queries: Iterable[Batch],
    *,
    covariance: Covariance = "full",
    linearised: bool = False,
    draws: int | None = None,
    seed: int = 0,
) -> Tensor:
    """KL between the outputs of both laws for each sample queried on its own, nats: [N], float64.

    Outputs are logits or means, all positions of a sequence together, whether scored or not. They
    are taken as Gaussian, with the covariance s^2 J K J^T of the model linearised at the law's
    mean.

    Args:
        model: Gives architecture, buffers and all parameters that the laws do not name; untouched,
            used in eval mode.
        law: Of the scrubbed weights.
        reference: Made by `law.at(...)`.
        queries: Batches of samples, such as `split.batches("forget")`.
        covariance: `"full"`, or `"diagonal"` as published: outputs as if they were independent.
            Several outputs that move together then count several times, even beyond what the
            weights say.
        linearised: Take J (h - h') for the difference of the mean outputs, so that they never say
            more than the weights; by default the true one, f(h) - f(h').
        draws: `None` is exact and takes one gradient and one power of the curvature for every
            output of every sample. A number of draws takes for each one power and about one
            training pass over all samples, and estimates J K J^T from them; the mean difference's
            part is then unbiased, with the relative standard deviation (2 / (draws - c - 3))^1/2
            for c outputs, 1 where the covariance is diagonal.
        seed: Of the draws.

    Returns:
        Infinity where an output that the noise does not move differs.

    Raises:
        ConfigError: If the laws do not share curvature and exponent, or an option is out of range.
        DataError: If there are no samples.
        CurvatureError: If draws or linearised outputs need a second derivative that the model's
            backward pass hides.
    """
    _check_shared(law, reference)
    if covariance not in ("full", "diagonal"):
        got = f"covariance={covariance!r}"
        raise ConfigError(got, "'full' or 'diagonal'", "Pass one of these.")
    first = next(iter(law.mean.values()))
    # outputs have a graph, whatever the laws name
    twin = private_copy(model).to(first.device).requires_grad_()
    batches = [batch.on(twin) for batch in queries]
    if not batches:
        raise DataError("queries without samples", "at least one sample", "Choose another part.")
    if draws is not None or linearised:
        hidden = hidden_from_products(twin, _live(twin, law), batches[0], law.mean)
        refuse_hidden(hidden, "Pass draws=None and linearised=False.")
    shifts = [_shift(twin, law, reference, batch, linearised) for batch in batches]
    if draws is None:
        grams = [_exact(twin, law, batch) for batch in batches]
    else:
        _check_draws(draws, max(shift.shape[1] for shift in shifts) if covariance == "full" else 1)
        grams = _sampled(twin, law, batches, draws, seed)
    tiny = torch.finfo(first.dtype).eps
    values = []
    for shift, gram in zip(shifts, grams, strict=True):
        independent = torch.diag_embed(gram.diagonal(dim1=-2, dim2=-1))
        quadratic, rank = _mahalanobis(shift, gram if covariance == "full" else independent, tiny)
        if draws is not None:
            # the inverse of a Wishart average is biased:
            # E[G_drawn^-1] = draws / (draws - c - 1) G^-1
            quadratic = quadratic * (draws - 1 - (rank if covariance == "full" else 1)) / draws
        values.append(quadratic / (2 * reference.scale**2) + rank * _spread(law, reference))
    return torch.cat(values).cpu()


def _spread(law: NoiseLaw, reference: NoiseLaw) -> float:
    """(r - 1 - ln r) / 2 of one coordinate, nats."""
    # with r - 1 and log1p, as r is close to 1 and the difference would cancel
    excess = (law.scale / reference.scale) ** 2 - 1
    return (excess - math.log1p(excess)) / 2


def _exact(model: nn.Module, law: NoiseLaw, batch: Batch) -> Tensor:
    """J K J^T of each sample [B, c, c], float64, as M M^T with the rows (B + tau I)^-p J_k of M."""
    live, grams = _live(model, law), []
    for sample in batch.chunks(1):
        with torch.enable_grad(), P.attached(model, law.mean):
            outputs = P.call(model, {}, sample.args, sample.kwargs).reshape(-1)
            pulled = [P.pull(output, live) for output in outputs]
        # a parameter that an output does not use has a gradient of zero
        rows = [P.zeros_like(law.mean) | gradient for gradient in pulled]
        powered = [law.curvature.power(row, -law.exponent) for row in rows]
        root = torch.stack([P.flatten(row).double() for row in powered])
        grams.append(root @ root.T)
    return torch.stack(grams)


def _sampled(
    model: nn.Module, law: NoiseLaw, batches: list[Batch], draws: int, seed: int
) -> list[Tensor]:
    """Mean over draws of y y^T with y = J K^1/2 xi, for each batch [B, c, c], float64."""
    generator = seeded(seed)
    totals: list[Tensor] = []
    for _ in range(draws):
        noise = law.curvature.power(P.randn_like(law.mean, generator), -law.exponent)
        moved = [_pushed(model, law, noise, batch) for batch in batches]
        squares = [y[:, :, None] * y[:, None, :] / draws for y in moved]
        totals = [a + b for a, b in zip(totals, squares, strict=True)] if totals else squares
    return totals


def _pushed(model: nn.Module, law: NoiseLaw, direction: Params, batch: Batch) -> Tensor:
    """J v [B, c], float64."""
    with twice_differentiable(model, law.mean):
        outputs = P.call(model, {}, batch.args, batch.kwargs)
        moved = Linearised(outputs, _live(model, law)).push(direction)
    return moved.reshape(len(batch), -1).double()


def _live(model: nn.Module, law: NoiseLaw) -> Params:
    """The parameters that the law names."""
    return {name: p for name, p in model.named_parameters() if name in law.mean}


def _shift(
    model: nn.Module, law: NoiseLaw, reference: NoiseLaw, batch: Batch, linearised: bool
) -> Tensor:
    """Difference of the mean outputs [B, c], float64."""
    if linearised:
        return _pushed(model, law, P.add(law.mean, reference.mean, -1.0), batch)
    with torch.no_grad():
        means = (law.mean, reference.mean)
        ours, others = (_outputs(model, at, batch).double() for at in means)
    return (ours - others).reshape(len(batch), -1)


def _outputs(model: nn.Module, at: Params, batch: Batch) -> Tensor:
    with P.attached(model, at):
        return P.call(model, {}, batch.args, batch.kwargs)


def _mahalanobis(shift: Tensor, gram: Tensor, tiny: float) -> tuple[Tensor, Tensor]:
    """(df^T G^-1 df [B], rank of G [B]); infinite where df leaves the range of G by more than
    rounding."""
    # in the eigenbasis of G, whose null space the noise does not reach: a difference there would
    # tell the laws apart for certain
    values, vectors = torch.linalg.eigh(gram)
    along = (vectors.mT @ shift[..., None]).squeeze(-1)
    seen = values > 10 * shift.shape[1] * tiny * values[:, -1:]
    beyond = along.masked_fill(seen, 0.0).norm(dim=1) > tiny**0.5 * shift.norm(dim=1)
    quadratic = (along.square() / values).masked_fill(~seen, 0.0).sum(1)
    return quadratic.masked_fill(beyond, math.inf), seen.double().sum(1)


def _check_draws(draws: int, outputs: int) -> None:
    if isinstance(draws, bool) or not isinstance(draws, int) or draws < outputs + 2:
        got = f"draws={draws!r} for a covariance of {outputs} outputs"
        expected = f"a whole number of at least {outputs + 2}"
        raise ConfigError(got, expected, "Take more draws, covariance='diagonal', or draws=None.")


def _check_shared(law: NoiseLaw, reference: NoiseLaw) -> None:
    if law.curvature is not reference.curvature or law.exponent != reference.exponent:
        fix = "Make the second from the first: law.at(retrained)."
        raise ConfigError("laws of different curvature or exponent", "two laws of one shape", fix)
