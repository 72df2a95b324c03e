r"""Fisher forgetting as a method to compare: the package's own `forget`, and the two published
forms (Golatkar et al. 2020, arXiv:1911.04933, and its public code).

The work is counted as it happens: a forward pass of a sample is a third of a sample gradient, a
backward pass from its outputs two thirds. A product with the curvature is two backward passes over
a graph that is kept.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import nn
from torch.utils.data import DataLoader, Subset

from fisher_forget import params as P
from fisher_forget._util.checks import check_model
from fisher_forget.baselines.golatkar import ALPHA, TAU, paper_forget, reference_code_forget
from fisher_forget.baselines.protocol import Unlearned
from fisher_forget.data.split import Split
from fisher_forget.likelihood import Likelihood
from fisher_forget.unlearn.forget import forget
from fisher_forget.unlearn.options import ForgetOptions


@dataclass(frozen=True)
class FisherForget(ForgetOptions):
    """`fisher_forget.forget`; every field is its option of that name, with its default."""

    name: ClassVar[str] = "fisher-forget"
    grid: ClassVar[dict[str, tuple[Any, ...]]] = {}  # its defaults need no tuning

    def unlearn(self, model: nn.Module, split: Split) -> Unlearned:
        """Forget `split.forget`; the given model is untouched."""

        def run(twin: nn.Module, loader: DataLoader[Any]) -> nn.Module:
            return forget(
                twin, loader, split.forget, self, unpack=split.unpack, progress=False
            ).model

        return _measured(model, split, run)


@dataclass(frozen=True)
class GolatkarPaper:
    """The paper's Fisher forgetting, noise s (F + tau I)^-1/4 xi alone:
    `fisher_forget.paper_forget`.

    Attributes:
        scale: s. The paper gives it by constants that are not known; choose it from the grid.
        tau: Added to F.
        likelihood: Name or instance.
        seed: Of the draw.
    """

    name: ClassVar[str] = "golatkar-paper"
    grid: ClassVar[dict[str, tuple[Any, ...]]] = {"scale": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)}

    scale: float = 1e-3
    tau: float = TAU
    likelihood: Likelihood | str = "categorical"
    seed: int = 0

    def unlearn(self, model: nn.Module, split: Split) -> Unlearned:
        """Forget `split.forget`; the given model is untouched."""

        def run(twin: nn.Module, loader: DataLoader[Any]) -> nn.Module:
            return paper_forget(
                twin,
                loader,
                split.forget,
                scale=self.scale,
                tau=self.tau,
                likelihood=self.likelihood,
                unpack=split.unpack,
                seed=self.seed,
                progress=False,
            ).model()

        return _measured(model, split, run)


@dataclass(frozen=True)
class GolatkarCode:
    """Fisher forgetting as the public code does it: `fisher_forget.reference_code_forget`; classes
    only.

    Attributes:
        alpha: Scale of the variance.
        forgotten_class: The class whose row is reset; "auto" for one that is forgotten as a whole,
            `None` for no row.
        likelihood: "categorical", or such an instance.
        seed: Of the draw.
    """

    name: ClassVar[str] = "golatkar-code"
    grid: ClassVar[dict[str, tuple[Any, ...]]] = {"alpha": (1e-8, 1e-7, 1e-6, 3e-6, 1e-5)}

    alpha: float = ALPHA
    forgotten_class: int | Literal["auto"] | None = "auto"
    likelihood: Likelihood | str = "categorical"
    seed: int = 0

    def unlearn(self, model: nn.Module, split: Split) -> Unlearned:
        """Forget `split.forget`; the given model is untouched."""

        def run(twin: nn.Module, loader: DataLoader[Any]) -> nn.Module:
            return reference_code_forget(
                twin,
                loader,
                split.forget,
                alpha=self.alpha,
                forgotten_class=self.forgotten_class,
                likelihood=self.likelihood,
                unpack=split.unpack,
                seed=self.seed,
                progress=False,
            ).model()

        return _measured(model, split, run)


def metered(model: nn.Module) -> tuple[nn.Module, list[float]]:
    """A copy of the model that counts its work, and of which every further copy does.

    Args:
        model: Untouched.

    Returns:
        The copy, and a list of one number: sample gradients so far, of which a forward pass is a
        third and a backward pass from the outputs two thirds.
    """
    twin, work = copy.deepcopy(model), [0.0]

    def count(_module: nn.Module, _args: Any, output: Any) -> None:
        outputs = P.logits(output)
        samples, twice = len(outputs), False

        def back(_gradient: torch.Tensor) -> None:
            nonlocal twice
            work[0] += samples * (4 if twice else 2) / 3
            twice = (
                twice or torch.is_grad_enabled()
            )  # a graph of the gradient is made, for products to come

        work[0] += samples / 3
        if outputs.requires_grad:
            outputs.register_hook(back)

    twin.register_forward_hook(count)
    return twin, work


def _measured(
    model: nn.Module, split: Split, run: Callable[[nn.Module, DataLoader[Any]], nn.Module]
) -> Unlearned:
    """What a function makes of a copy of the model and a loader over all samples, in a clean copy,
    with its cost."""
    begun = time.perf_counter()
    check_model(model)
    loader: DataLoader[Any] = DataLoader(
        Subset(split.base, split.indices("all").tolist()),
        batch_size=split.batch_size,
        collate_fn=split.collate,
        num_workers=split.workers,
    )
    twin, work = metered(model)
    scrubbed = run(twin, loader).state_dict()
    seconds = time.perf_counter() - begun
    clean = copy.deepcopy(model)
    clean.load_state_dict(scrubbed)
    clean.zero_grad(set_to_none=True)
    return Unlearned(clean.eval(), seconds, work[0] / len(split.retain))
