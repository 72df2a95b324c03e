"""What is benchmarked: this package's estimators, other libraries', and the loops that people write
by hand.

An estimator is a function of a model that returns `run(data)`; `run` does all the work that is
timed and returns a function that reads off the diagonal, which is not timed. Every diagonal is on
the scale of the mean loss.
"""

from __future__ import annotations

import copy
import itertools
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cases import Data
from fisher_forget import Categorical, estimate_curvature
from fisher_forget.params import Params, logits

CHUNK_BYTES = 256 << 20  # per-sample gradients that the torch.func loop holds at a time
REFERENCE_BACKWARDS = 40  # of the reference loop; its time is then scaled to the whole data

Run = Callable[[Data], Callable[[], Params]]


@dataclass(frozen=True)
class Estimator:
    """One row of the table.

    Attributes:
        title: Its name in the table.
        prepare: Model -> run.
        cases: Where it is measured.
        share: Part of the samples it is timed on (and the plain pass beside it), for the slow ones.
        note: What the table says about it.
        complete: For an estimator whose `run` stops after REFERENCE_BACKWARDS backward passes, and
            whose time is scaled to the whole data: the one that does not stop, for the error.
    """

    title: str
    prepare: Callable[[nn.Module], Run]
    cases: tuple[str, ...] = ("mlp", "all_cnn", "resnet18", "gpt2")
    share: float = 1.0
    note: str = ""
    complete: Callable[[nn.Module], Run] | None = None


def ours(structure: Any, kind: Any) -> Callable[[nn.Module], Run]:
    """estimate_curvature() of this package."""

    def prepare(model: nn.Module) -> Run:
        def run(data: Data) -> Callable[[], Params]:
            # an instance is taken at its word: no time goes into asking for the model's own loss
            return estimate_curvature(
                model, data.loader(), Categorical(), structure=structure, kind=kind, draws=1
            ).diagonal

        return run

    return prepare


def backpack(extension: str, field: str) -> Callable[[nn.Module], Run]:
    """BackPACK; its diagonal of a batch has the scale of the batch's mean loss."""

    def prepare(model: nn.Module) -> Run:
        from backpack import backpack as context
        from backpack import extend, extensions

        twin = copy.deepcopy(model)
        # additions become modules by tracing the graph, which a chain of modules does not need
        twin = extend(
            twin, use_converter=not isinstance(twin, nn.Sequential) or _branches(twin)
        ).eval()
        lossfunc = extend(nn.CrossEntropyLoss())

        def run(data: Data) -> Callable[[], Params]:
            total: Params = {}
            for x, y in data.batches():
                with context(getattr(extensions, extension)()):
                    lossfunc(logits(twin(x)).flatten(0, -2), y.flatten()).backward()
                for name, p in twin.named_parameters():
                    found = getattr(p, field) * (len(x) / len(data))
                    total[name] = total[name].add_(found) if name in total else found
                    delattr(p, field)
                    p.grad = None
            return lambda: total

        return run

    return prepare


def _branches(model: nn.Module) -> bool:
    """Whether a sequential model holds modules of its own kind, with additions in their forward."""
    return any(type(m).__module__.startswith("fisher_forget") for m in model.modules())


def curvlinops(
    operator: str, fisher_type: str, *, convert: bool = False
) -> Callable[[nn.Module], Run]:
    """KFAC and EKFAC of curvlinops, in the same convention as ours: expand, weight and bias
    together.

    Args:
        operator: Name of its class.
        fisher_type: "mc" or "type-2".
        convert: Make a transformer fit: see `_converted`. There is no diagonal then.
    """

    def prepare(model: nn.Module) -> Run:
        import curvlinops as library

        twin, params = _converted(model) if convert else _supported(copy.deepcopy(model))

        def run(data: Data) -> Callable[[], Params]:
            lossfunc = nn.CrossEntropyLoss()
            options = {
                "fisher_type": fisher_type,
                "check_deterministic": False,
                "separate_weight_and_bias": False,
                "num_data": len(data),
                "num_per_example_loss_terms": data.y[0].numel(),
            }
            batches = [(x, y.flatten()) for x, y in data.batches()]
            op = getattr(library, operator)(
                twin, lossfunc, list(params.values()), batches, **options
            )
            op.compute_kronecker_factors()
            if operator == "EKFACLinearOperator":
                op.compute_eigenvalue_correction()
            return lambda: {} if convert else _diagonal(op, list(params))

        return run

    return prepare


def _supported(model: nn.Module) -> tuple[nn.Module, Params]:
    """The parameters of the layers that curvlinops' KFAC knows, or all of them where those are a
    small part."""
    every: Params = dict(model.named_parameters())
    known = {
        id(p)
        for m in model.modules()
        if isinstance(m, (nn.Linear, nn.Conv2d))
        for p in m.parameters()
    }
    found = {name: p for name, p in every.items() if id(p) in known}
    small = sum(p.numel() for p in found.values()) < 0.9 * sum(p.numel() for p in every.values())
    return model, every if small else found


class _Flat(nn.Module):
    """Logits [N T, C] of a model of sequences: EKFAC refuses more dimensions."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """[N, T] -> [N T, C]."""
        return logits(self.model(x)).flatten(0, 1)


def _converted(model: nn.Module) -> tuple[nn.Module, Params]:
    """A transformer whose Conv1D layers are Linear ones, and the parameters of these: no embedding,
    head or norm."""
    twin = copy.deepcopy(model)
    params: Params = {}
    for name, module in list(twin.named_modules()):
        if type(module).__name__ != "Conv1D":
            continue
        layer = nn.Linear(*module.weight.shape)
        layer.weight.data, layer.bias.data = module.weight.data.T.contiguous(), module.bias.data
        parent, _, last = name.rpartition(".")
        setattr(twin.get_submodule(parent), last, layer)
        params |= {f"{name}.{key}": p for key, p in layer.named_parameters()}
    return _Flat(twin), params


def _diagonal(op: Any, names: list[str]) -> Params:
    """Diagonal of a curvlinops operator from its factors: diag(G) x diag(A), or Q_G^2 Lambda
    Q_A^2^T."""
    out: Params = {}
    for module, places in op._mapping.items():
        if hasattr(op, "_corrected_eigenvalues"):
            lam = op._corrected_eigenvalues[module]
            lam = lam if isinstance(lam, Tensor) else lam[places["weight"]]
            g, a = (
                op._gradient_covariances_eigenvectors[module],
                op._input_covariances_eigenvectors[module],
            )
            matrix = g.square() @ lam @ a.square().T
        else:
            matrix = torch.outer(
                op._gradient_covariances[module].diag(), op._input_covariances[module].diag()
            )
        if "bias" in places:
            out[names[places["bias"]]] = matrix[:, -1]
            matrix = matrix[:, :-1]
        out[names[places["weight"]]] = matrix.reshape(op._params[places["weight"]].shape)
    return out


def per_sample(model: nn.Module) -> Run:
    """torch.func: vmap(grad(loss)), squared and added up, in chunks: the diagonal of the empirical
    Fisher."""
    params: Params = {name: p.detach() for name, p in model.named_parameters()}

    def sample_loss(theta: Params, x: Tensor, y: Tensor) -> Tensor:
        out = logits(torch.func.functional_call(model, theta, (x[None],)))
        return nn.functional.cross_entropy(out.flatten(0, -2), y[None].flatten(), reduction="sum")

    gradient = torch.func.vmap(torch.func.grad(sample_loss), in_dims=(None, 0, 0))
    size = max(1, CHUNK_BYTES // (4 * sum(p.numel() for p in params.values())))

    def run(data: Data) -> Callable[[], Params]:
        total = {name: torch.zeros_like(p) for name, p in params.items()}
        for x, y in data.batches():
            for xs, ys in zip(x.split(size), y.split(size), strict=True):
                for name, g in gradient(params, xs, ys).items():
                    total[name] += g.square_().sum(0)
        return lambda: {name: t / data.y.numel() for name, t in total.items()}

    return run


def reference_loop(limit: int | None) -> Callable[[nn.Module], Run]:
    """The published loop: batch size 1, one backward pass a class (and position), p_y times the
    squared gradient.

    Args:
        limit: Stop after this many backward passes.
    """

    def prepare(model: nn.Module) -> Run:
        params: Params = dict(model.named_parameters())

        def run(data: Data) -> Callable[[], Params]:
            total = {name: torch.zeros_like(p) for name, p in params.items()}
            for score, weight in itertools.islice(_scores(model, data), limit):
                grads = torch.autograd.grad(score, list(params.values()), retain_graph=True)
                for name, g in zip(params, grads, strict=True):
                    total[name] += weight * g.square()
            return lambda: {name: t / data.y.numel() for name, t in total.items()}

        return run

    return prepare


def _scores(model: nn.Module, data: Data) -> Iterator[tuple[Tensor, Tensor]]:
    """-log p(y | f) and p(y | f), for every sample, position and class y in turn."""
    for x in data.x.split(1):
        out = logits(model(x)).flatten(0, -2)
        p = out.detach().softmax(-1)
        for position in range(len(out)):
            for label in range(out.shape[1]):
                target = torch.tensor([label], device=out.device)
                yield (
                    nn.functional.cross_entropy(out[position : position + 1], target),
                    p[position, label],
                )


@contextmanager
def eigendecompositions() -> Iterator[list[float]]:
    """Seconds of every symmetric eigendecomposition inside the block, ours and curvlinops'."""
    seconds: list[float] = []
    original = torch.linalg.eigh

    def timed(*args: Any, **kwargs: Any) -> Any:
        synchronise()
        start = perf_counter()
        out = original(*args, **kwargs)
        synchronise()
        seconds.append(perf_counter() - start)
        return out

    places: list[Any] = [
        m for m in (torch.linalg, sys.modules.get("curvlinops.ekfac")) if m is not None
    ]
    for module in places:
        module.eigh = timed
    try:
        yield seconds
    finally:
        for module in places:
            module.eigh = original


def synchronise() -> None:
    """Wait for the accelerator, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def relative_error(found: Params, truth: Params) -> float:
    """|found - truth| / |truth| over the parameters that were found, as one vector."""
    wrong = math.fsum(
        float((value.double() - truth[name]).square().sum()) for name, value in found.items()
    )
    return math.sqrt(wrong / math.fsum(float(truth[name].square().sum()) for name in found))


IMAGES = ("mlp", "all_cnn", "resnet18")
SMALL = ("mlp", "all_cnn")
CURVLINOPS = "expand, weight and bias joint, Linear and Conv2d only"
CONVERTED = "Conv1D replaced by Linear; without embeddings, head and norms"
ESTIMATORS: dict[str, Estimator] = {
    "sketch": Estimator("fisher_forget diagonal, sketch, 1 draw", ours("diagonal", "sketch")),
    "exact": Estimator("fisher_forget diagonal, exact", ours("diagonal", "exact"), SMALL),
    "ekfac": Estimator("fisher_forget EKFAC, sketch, 1 draw", ours("ekfac", "sketch")),
    "backpack-mc": Estimator("BackPACK DiagGGNMC, 1 sample", backpack("DiagGGNMC", "diag_ggn_mc")),
    "backpack-exact": Estimator(
        "BackPACK DiagGGNExact", backpack("DiagGGNExact", "diag_ggn_exact"), SMALL, share=0.25
    ),
    "curvlinops-kfac": Estimator(
        "curvlinops KFAC, 1 MC label", curvlinops("KFACLinearOperator", "mc"), note=CURVLINOPS
    ),
    "curvlinops-ekfac": Estimator(
        "curvlinops EKFAC, 1 MC label", curvlinops("EKFACLinearOperator", "mc"), note=CURVLINOPS
    ),
    "curvlinops-kfac-exact": Estimator(
        "curvlinops KFAC, exact",
        curvlinops("KFACLinearOperator", "type-2"),
        SMALL,
        share=0.25,
        note=CURVLINOPS,
    ),
    "curvlinops-ekfac-exact": Estimator(
        "curvlinops EKFAC, exact",
        curvlinops("EKFACLinearOperator", "type-2"),
        SMALL,
        share=0.25,
        note=CURVLINOPS,
    ),
    "curvlinops-kfac-converted": Estimator(
        "curvlinops KFAC, 1 MC label",
        curvlinops("KFACLinearOperator", "mc", convert=True),
        ("gpt2",),
        note=CONVERTED,
    ),
    "curvlinops-ekfac-converted": Estimator(
        "curvlinops EKFAC, 1 MC label",
        curvlinops("EKFACLinearOperator", "mc", convert=True),
        ("gpt2",),
        note=CONVERTED,
    ),
    "vmap": Estimator(
        "torch.func vmap(grad) squared", per_sample, note="empirical Fisher", share=0.5
    ),
    "reference": Estimator(
        "reference loop, one backward a class",
        reference_loop(REFERENCE_BACKWARDS),
        note=f"measured on {REFERENCE_BACKWARDS} backward passes, scaled linearly",
        complete=reference_loop(None),
    ),
}
