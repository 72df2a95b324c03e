"""prepare(): deletion requests that cost what they delete.

One pass over all data is made once: the gradient, the output curvature of every sample, the
curvature. A request takes the forget set's part away from each, and then needs the forget set and a
few thousand retained samples only (20,000 where BatchNorm statistics are recomputed).

Every request starts at the original weights with all samples forgotten so far, so that requests
accumulate: forgetting A, then B, is forgetting A and B at once, in any order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

import numpy as np
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from fisher_forget._util import files
from fisher_forget._util.checks import check_model, check_options
from fisher_forget._util.random_state import preserved_rng
from fisher_forget.curvature.arithmetic import without
from fisher_forget.curvature.estimate import ACCUMULATORS, Structure, estimate_curvature
from fisher_forget.curvature.kinds import Kind
from fisher_forget.curvature.operator import Curvature
from fisher_forget.curvature.storage import load_curvature, save_curvature
from fisher_forget.data.batches import Unpack
from fisher_forget.data.split import Indices, Split, resolve_split
from fisher_forget.likelihood import Likelihood, resolve_likelihood
from fisher_forget.unlearn.data_sums import Snapshot, load_snapshot, save_snapshot, take_snapshot
from fisher_forget.unlearn.forget import curvature_samples, scrub
from fisher_forget.unlearn.newton.step import Solver
from fisher_forget.unlearn.noise import EXPONENT, NoiseTarget
from fisher_forget.unlearn.objective import Objective
from fisher_forget.unlearn.result import ForgetResult

SNAPSHOT, CURVATURE = "snapshot.safetensors", "curvature.safetensors"


@dataclass(frozen=True)
class Settings:
    """How curvature and gradient were computed: the options of `prepare`."""

    likelihood: Likelihood
    weight_decay: float
    structure: Structure
    kind: Kind
    draws: int
    max_samples: int | Literal["auto"] | None
    subset: str | tuple[str, ...] | None
    seed: int


@dataclass
class Prepared:
    """A model ready for deletion requests; made by `prepare`.

    Attributes:
        model: The original, untouched.
        split: All data, with what has been forgotten so far.
        curvature: Of `sampled`, undamped, with nothing forgotten.
        sampled: Indices of the samples that the curvature is of.
        snapshot: Gradient and output curvature of all samples.
        settings: Options of `prepare`.
        requests: Every request so far, in order.
    """

    model: nn.Module
    split: Split
    curvature: Curvature
    sampled: Indices
    snapshot: Snapshot
    settings: Settings
    objective: Objective = field(repr=False)
    store: _Store | None = field(default=None, repr=False)
    requests: list[list[int]] = field(default_factory=list)

    @property
    def forgotten(self) -> Indices:
        """Sorted indices of all samples forgotten so far."""
        return self.split.forget

    def forget(
        self,
        forget_idx: Sequence[int] | Indices | Tensor | range,
        *,
        steps: int | Literal["auto"] = "auto",
        damping: float | Literal["auto"] = "auto",
        solver: Solver = "auto",
        drift: bool | Literal["auto"] = "auto",
        budget: float | None = None,
        noise: float | NoiseTarget | Literal["auto"] | None = "auto",
        exponent: float = EXPONENT,
        progress: bool = False,
    ) -> ForgetResult:
        """Forget these samples, and all that were forgotten before.

        The options are those of `forget`. The request is recorded once its result is there: a run
        that was killed has forgotten nothing.

        Raises:
            SplitError: If the indices are out of range, or nothing would be left.
            StorageError: If the request cannot be recorded.
        """
        with preserved_rng():
            options: dict[str, Any] = {
                "steps": steps,
                "damping": damping,
                "solver": solver,
                "drift": drift,
                "budget": budget,
                "noise": noise,
                "exponent": exponent,
                "seed": self.settings.seed,
                "weight_decay": self.settings.weight_decay,
            }
            check_options(draws=self.settings.draws, **options)
            if isinstance(noise, NoiseTarget):
                noise.check(self.settings.likelihood)
            split = self.split.forgetting(forget_idx)
            begun = perf_counter()
            curvature = self._without(split)
            result = scrub(
                self.model,
                self.objective,
                split,
                curvature,
                self.snapshot,
                seconds={"curvature": perf_counter() - begun},
                progress=progress,
                **options,
            )
        requests = [*self.requests, np.setdiff1d(split.forget, self.split.forget).tolist()]
        if self.store is not None:
            self.store.record(requests)
        self.split, self.requests = split, requests
        return result

    def _without(self, split: Split) -> Curvature:
        """The curvature of the samples that are left: by subtraction where it is a sum, else
        estimated again."""
        gone = np.intersect1d(self.sampled, split.forget)
        if not len(gone):
            return self.curvature
        structure = self.settings.structure
        if structure not in ACCUMULATORS:
            return _estimate(self.model, split, np.setdiff1d(self.sampled, gone), self.settings)
        basis = self.curvature if structure == "ekfac" else None
        return without(self.curvature, _estimate(self.model, split, gone, self.settings, basis))


def prepare(
    model: nn.Module,
    train_loader: DataLoader[Any] | Dataset[Any],
    *,
    likelihood: Likelihood | str = "categorical",
    weight_decay: float = 0.0,
    structure: Structure = "ekfac",
    kind: Kind = "auto",
    draws: int = 1,
    max_samples: int | Literal["auto"] | None = "auto",
    subset: str | tuple[str, ...] | None = None,
    unpack: Unpack | None = None,
    folder: str | Path | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Prepared:
    """Do once what does not depend on who is forgotten, so that a deletion costs what it deletes.

    Args:
        model: As for `forget`.
        train_loader: Loader over all training data.
        likelihood: As for `forget`, like all options down to `unpack`.
        weight_decay: wd of the training objective.
        structure: Curvature structure. Diagonal, EKFAC and dense are sums over samples: a part is
            taken away exactly, for EKFAC in the eigenbasis of all data. Others are estimated again
            for each request.
        kind: Curvature kind. The random ones (sketch, sampled) subtract other columns than they
            added.
        draws: Columns a sample of the random kinds.
        max_samples: Samples that the curvature is estimated on; "auto" as for `forget` with
            solver="auto".
        subset: Patterns of the parameters that may move.
        unpack: Function from a batch to (inputs, targets).
        folder: Keep everything here: made at the first call; a later call with the same model, data
            and options reads it, with all requests so far. A call that was killed goes on where it
            was.
        seed: Of every random choice.
        progress: Show progress bars.

    Raises:
        ModelError, DataError, CurvatureError, ConfigError: As for `forget`.
        StorageError: If the folder belongs to another model, other data or other options, or is
            damaged.

    Example:
        >>> import torch
        >>> from fisher_forget import prepare
        >>> x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
        >>> data = torch.utils.data.TensorDataset(x, (x[:, 0] > 0).long())
        >>> prepared = prepare(torch.nn.Linear(3, 2).eval(), data, weight_decay=0.01, progress=False)
        >>> first = prepared.forget([3], drift=True)
        >>> second = prepared.forget([14, 15], drift=True)
        >>> second.split.forget.tolist()
        [3, 14, 15]
    """
    with preserved_rng():
        found = resolve_likelihood(likelihood)
        settings = Settings(found, weight_decay, structure, kind, draws, max_samples, subset, seed)
        check_model(model)
        split = resolve_split(train_loader, [], unpack=unpack, allow_empty=True)
        objective = Objective(model, found, subset)
        sampled = curvature_samples(split, max_samples, structure, "auto", seed)
        store = None
        if folder is not None:
            mark = files.fingerprint(
                asdict(settings), dict(model.state_dict()), split.fingerprint()
            )
            store = _Store(files.ensure_folder(folder), mark)
        requests = [] if store is None else store.requests()
        curvature = None if store is None else store.curvature(model, split)
        if curvature is None:
            curvature = _estimate(model, split, sampled, settings, progress=progress)
            if store is not None and structure != "matrix_free":  # which is its model and data
                save_curvature(store.folder / CURVATURE, curvature, model, split)
        snapshot = None if store is None else store.snapshot(objective)
        if snapshot is None:
            snapshot = take_snapshot(objective, split, progress=progress)
            if store is not None:
                save_snapshot(store.folder / SNAPSHOT, snapshot, store.mark)
    done = split.forgetting([i for request in requests for i in request]) if requests else split
    return Prepared(model, done, curvature, sampled, snapshot, settings, objective, store, requests)


def _estimate(
    model: nn.Module,
    split: Split,
    part: Indices,
    settings: Settings,
    basis: Curvature | None = None,
    *,
    progress: bool = False,
) -> Curvature:
    return estimate_curvature(
        model,
        split,
        settings.likelihood,
        structure=settings.structure,
        kind=settings.kind,
        draws=settings.draws,
        part=part,
        subset=settings.subset,
        seed=settings.seed,
        basis=basis,
        progress=progress,
    )


@dataclass(frozen=True)
class _Store(files.RequestLog):
    """The folder of one prepared model: its requests, and the sums over all data."""

    def snapshot(self, objective: Objective) -> Snapshot | None:
        path = self.folder / SNAPSHOT
        return load_snapshot(path, objective, self.mark) if path.exists() else None

    def curvature(self, model: nn.Module, split: Split) -> Curvature | None:
        path = self.folder / CURVATURE
        return load_curvature(path, model, split) if path.exists() else None
