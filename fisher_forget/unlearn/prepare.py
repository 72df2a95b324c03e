"""prepare(): deletion requests that cost what they delete.

One pass over all data is made once: the gradient, the output curvature of every sample, the
curvature. A request takes the forget set's part away from each, and then needs the forget set and a
few thousand retained samples only (20,000 where BatchNorm statistics are recomputed).

Every request starts at the original weights with all samples forgotten so far, so that requests
accumulate: forgetting A, then B, is forgetting A and B at once, in any order.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator, Sequence, Sized
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from time import perf_counter
from typing import Any, Unpack, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from fisher_forget._util import files
from fisher_forget._util.checks import check_model
from fisher_forget._util.isolation import isolated
from fisher_forget.curvature.arithmetic import without
from fisher_forget.curvature.kinds import Kind
from fisher_forget.curvature.operator import Curvature
from fisher_forget.data import batches
from fisher_forget.data.fingerprint import KnownSamples
from fisher_forget.data.indices import forget_indices
from fisher_forget.data.own_loss import LossFn
from fisher_forget.data.split import Indices, Split, check_scored, resolve_split
from fisher_forget.errors import (
    ConfigError,
    FisherForgetWarning,
    SplitError,
    StorageError,
)
from fisher_forget.ledger import Ledger, RequestLog, model_fingerprint
from fisher_forget.unlearn import snapshot
from fisher_forget.unlearn.forget import held_out_split, scrub
from fisher_forget.unlearn.limits import Limits
from fisher_forget.unlearn.noise_draw import check_generator
from fisher_forget.unlearn.objective import Objective
from fisher_forget.unlearn.options import ForgetKeywords, ForgetOptions, merged
from fisher_forget.unlearn.problem import Problem, curvature_of, objective_of, with_solver
from fisher_forget.unlearn.result import ForgetResult
from fisher_forget.unlearn.snapshot import Snapshot
from fisher_forget.unlearn.weight_decay import by_name


@dataclass(frozen=True)
class _Asked:
    """A request: for which samples, by whom, and when it came in."""

    samples: Indices
    who: str
    received: datetime | None


@dataclass(repr=False)
class Prepared:
    """A model ready for deletion requests; made by `prepare`.

    Attributes:
        model: The original, untouched.
        split: All data, with what has been forgotten so far.
        made: Curvature and sums, with nothing forgotten.
        options: Of `prepare`; those of a request are given with it.
        objective: Losses of a private copy of the model.
        rows: Tells whether forgotten samples are what they were.
        limits: How much may be forgotten in all.
        log: The ledger of the folder; `None` without one.
        requests: Every request so far, in order.
        erased: Number of samples that were forgotten before the last rebase.
    """

    model: nn.Module
    split: Split
    made: Snapshot
    options: ForgetOptions
    objective: Objective = field(repr=False)
    rows: KnownSamples = field(repr=False)
    limits: Limits
    log: RequestLog | None = field(default=None, repr=False)
    requests: list[list[int]] = field(default_factory=list)
    erased: int = 0
    _lock: Any = field(default_factory=threading.RLock, init=False, repr=False)
    _rebased: bool = field(default=False, init=False, repr=False)
    _last: str = field(default="", init=False, repr=False)

    def __post_init__(self) -> None:
        self._generation = 0 if self.log is None else self.log.generation

    def __reduce_ex__(self, protocol: Any) -> Any:
        got, expected = (
            "a copy or pickle of a Prepared",
            "one owner of the requests, and of the data",
        )
        fix = "Call prepare() with a folder=, which a later call reads with all requests so far."
        raise StorageError(got, expected, fix)

    @property
    def forgotten(self) -> Indices:
        """Sorted indices of all samples forgotten so far."""
        return self.split.forget

    def __repr__(self) -> str:
        return f"Prepared({self.split}, requests: {len(self.requests)})"

    def forget(
        self,
        forget_idx: Sequence[int] | Indices | Tensor | range,
        *,
        who: str = "",
        received: datetime | None = None,
        generator: torch.Generator | None = None,
        held_out: DataLoader[Any] | Dataset[Any] | Split | None = None,
        progress: bool = False,
        **changes: Unpack[ForgetKeywords],
    ) -> ForgetResult:
        """Forget these samples, and all that were forgotten before, by whichever owner of the
        folder.

        Where there is a folder, the request is in its ledger before anything is computed. One that
        ends in an exception or is killed is left pending and due: its samples are forgotten with
        the next, or by `redeliver`; or withdraw it (`Ledger.withdraw`).

        Args:
            forget_idx: Distinct indices into the training data set.
            who: Opaque reference of who asked, for the ledger.
            received: When the request came in, by default now; it is due a month later.
            generator: As for `forget`: without one, every request has a noise of its own.
            held_out: As for `forget`, read as the training data are.
            progress: Show progress bars.
            **changes: Options of this request: `steps`, `damping`, `solver`, `drift`, `budget`,
                `noise`, `exponent`, `batch_norm` and `memory` of `ForgetOptions`.

        Raises:
            SplitError: If the indices are out of range, or nothing would be left.
            ConfigError: An option that was fixed by `prepare`; or a requester with more samples
                than each may ask for.
            StorageError: If the request cannot be recorded.
        """
        with self._alone():
            named, inside = self._inside(forget_idx, who)
            if self.log is not None:
                self.log.check_each(named.tolist(), who, self.limits.each)
            split, asked = self.split.forgetting(inside), _Asked(named, who, received)
            return self._carry_out(split, asked, generator, held_out, progress, changes)

    def redeliver(
        self,
        *,
        generator: torch.Generator | None = None,
        held_out: DataLoader[Any] | Dataset[Any] | Split | None = None,
        progress: bool = False,
        **changes: Unpack[ForgetKeywords],
    ) -> ForgetResult:
        """The result without all samples that were asked for so far: after a kill, or where a
        result was lost. All requests that are not served are done then, by this model. See
        `forget`.

        The noise is drawn anew: of two results with the same samples publish one only, since the
        mean of both has less of it.

        Raises:
            SplitError: If nothing has been asked for.
        """
        with self._alone():
            if not len(self.split.forget):
                got, fix = "no request so far", "Call forget() first."
                raise SplitError(got, "requests to be delivered again", fix)
            return self._carry_out(self.split, None, generator, held_out, progress, changes)

    def rebase(self, result: ForgetResult | nn.Module, *, progress: bool = True) -> Prepared:
        """Make the model of a result the new start, whose sums hold nothing of who was forgotten.

        Curvature and sums are made anew from the retained samples: a pass over them, as by
        `prepare`. After it no forgotten sample is read again, so that it can be erased from the
        data: overwrite it in its place, since the indices of the others stay; or pass a loader over
        a `Subset` of the others. In the folder the old files are removed; the model is kept there
        as a file of safetensors, and is the one to pass to `prepare` from then on.

        Later requests end a little farther from retrained models than without: the model that they
        start from is an estimate, with noise (docs/how-to/deletion-requests.md).

        Args:
            result: The last one, without all samples that were forgotten so far; or, after a
                restart, its model, which the ledger knows.
            progress: Show progress bars.

        Returns:
            What takes the next requests; this object takes none any more.

        Raises:
            ConfigError: If the result is not the last one.
            StorageError: If the folder cannot be written.
        """
        with self._alone(), isolated():
            model = result if isinstance(result, nn.Module) else result.model
            self._check_last(model, result)
            options = self.options
            split = replace(self.split, forget=self.split.forget[:0])
            likelihood = self.objective.likelihood
            objective = Objective(model, likelihood, options.subset, memory=options.memory)
            made = snapshot.take(objective, split, options, progress=progress)
            if self.log is not None:
                snapshot.save(self.log, made, model, split, options, objective)
            self._rebased = True
            rows = _rows(split, self.log)
            own = (model, split, made, options, objective, rows, self.limits, self.log)
            return Prepared(*own, [], self.erased + len(self.split.forget))

    def _check_last(self, model: nn.Module, result: ForgetResult | nn.Module) -> None:
        """Refuse what is not the last result, or its model, without all that was asked for."""
        last = self._last or ("" if self.log is None else self.log.model)
        given = None if isinstance(result, nn.Module) else result.split.forget
        all_of_them = given is None or np.array_equal(given, self.split.forget)
        if last != model_fingerprint(model) or not all_of_them or self.pending:
            got = "a model" if given is None else f"a result without {len(given)} samples"
            if self.pending:
                got = f"{got}, while {self.pending} are pending"
            expected = f"the last one, without all {len(self.split.forget)} forgotten so far"
            fix = "Pass what forget() or redeliver() returned last, or its model."
            raise ConfigError(got, expected, fix)

    @property
    def pending(self) -> list[str]:
        """Names of requests that were asked for and are not done: a kill came between."""
        return [] if self.log is None else [r.name for r in self.log.ledger.pending()]

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """No other thread or process forgets from this, and what others forgot is known."""
        with self._lock, ExitStack() as stack:
            if self.log is not None:
                stack.enter_context(self.log.ledger.owned())
            if self._rebased or (self.log is not None and self.log.generation != self._generation):
                got, expected = "a Prepared from before a rebase", "what rebase() returned"
                raise ConfigError(got, expected, "Use that, or call prepare() with its model.")
            if self.log is not None:
                self.requests = self.log.requests()
                asked = _asked(self.requests, self.split)
                if not np.array_equal(asked, self.split.forget):  # by others, or withdrawn
                    whole = self.split.indices("all")
                    retain = np.setdiff1d(whole, asked)
                    self.split = replace(self.split, retain=retain, forget=asked)
            yield

    def _carry_out(
        self,
        split: Split,
        asked: _Asked | None,
        generator: torch.Generator | None,
        held_out: DataLoader[Any] | Dataset[Any] | Split | None,
        progress: bool,
        changes: ForgetKeywords,
    ) -> ForgetResult:
        """The result for a split, and its entries in the ledger."""
        if fixed := [name for name in changes if name in snapshot.FIXED]:
            got = f"the options {fixed} of a request"
            fix = "Leave them out, or prepare the model anew."
            raise ConfigError(got, "those of prepare(), which the stored sums were made with", fix)
        check_generator(generator)
        with isolated():
            options = merged(self.options, changes)
            self.objective.memory = options.memory
            check_scored(split, self.objective.likelihood)
            unseen = held_out_split(held_out, split.reader.unpack)
            name = ""
            if self.log is not None and asked is not None:
                name = self.log.ask(asked.samples.tolist(), asked.who, asked.received)
            try:
                gone = self.erased + len(split.forget)
                self.limits.check(gone, gone + len(split.retain), stacklevel=4)
                # its part of the sums is taken away by reading them again
                self.rows.check(split.forget)
                begun = perf_counter()
                curvature = self._without(split)
                problem = Problem(
                    self.objective,
                    split,
                    curvature,
                    self.made.sums,
                    options.known_decay,
                    options.training_time,
                    {"curvature": perf_counter() - begun},
                )
                result = scrub(
                    self.model,
                    problem,
                    options,
                    generator=generator,
                    held_out=unseen,
                    progress=progress,
                )
                self.limits.judge(result.losses, result.check)
            except Exception as error:
                if name and self.log is not None:
                    self.log.ledger.fail(name, f"{type(error).__name__}: {error}"[:500])
                raise
        if self.log is not None:
            self.log.done(again=asked is None, **result.evidence(self.model))
        self.split, self._last = split, model_fingerprint(result.model)
        if asked is not None:
            self.requests = [*self.requests, asked.samples.tolist()]
        result.check.warn(stacklevel=3)
        return result

    def _inside(
        self, forget_idx: Sequence[int] | Indices | Tensor | range, who: str
    ) -> tuple[Indices, Indices]:
        """The samples named, and those of them that the sums are of; naming one that was erased is
        no error.

        Raises:
            SplitError: If some are none of the training samples, or all were erased, which is
                recorded.
        """
        named = forget_indices(forget_idx, len(cast("Sized", self.split.base)))
        outside = np.setdiff1d(named, self.split.indices("all"))
        erased = [] if self.log is None else self.log.erased()
        if len(strange := np.setdiff1d(outside, erased)):
            got = f"samples that the model was not prepared with, such as {strange[:5].tolist()}"
            fix = "Name samples of the loader that prepare() was given, that are not erased yet."
            raise SplitError(got, "training samples", fix)
        if len(outside) == len(named):
            assert self.log is not None
            self.log.ledger.done(self.log.ask(named.tolist(), who), note="erased before")
            got = f"samples that were erased before: {named[:5].tolist()}"
            fix = "Nothing is left to be done: the request is in the ledger, as done."
            raise SplitError(got, "some that are still there", fix)
        return named, np.setdiff1d(named, outside)

    def _without(self, split: Split) -> Curvature:
        """The curvature of who is left: by subtraction where it is a sum and most of its samples
        are left, else estimated again."""
        curvature, sampled = self.made.curvature, self.made.sampled
        gone = np.intersect1d(sampled, split.forget)
        if not len(gone):
            return curvature
        assert curvature.info is not None
        kind, objective = cast(Kind, curvature.info.kind), self.objective
        spec = self.options.spec
        if spec is None or not spec.additive or 2 * len(gone) > len(sampled):
            left, kind = self.options.curvature_plan(split)
            return curvature_of(objective, split, self.options, left, kind)
        basis = curvature if spec.takes_basis else None
        part = curvature_of(objective, split, self.options, gone, kind, basis=basis)
        return without(curvature, part)


def prepare(
    model: nn.Module,
    train_loader: DataLoader[Any] | Dataset[Any],
    options: ForgetOptions | None = None,
    *,
    unpack: batches.Unpack | None = None,
    loss_fn: LossFn | None = None,
    folder: str | Path | Ledger | None = None,
    limits: Limits | None = None,
    progress: bool = True,
    **changes: Unpack[ForgetKeywords],
) -> Prepared:
    """Do once what does not depend on who is forgotten, so that a deletion costs what it deletes.

    Curvatures that are sums over samples (diagonal, EKFAC, dense) have a part taken away exactly,
    EKFAC in the eigenbasis of all data. Other structures are estimated again for each request.

    Args:
        model: As for `forget`.
        train_loader: Loader over all training data.
        options: As for `forget`; `steps`, `damping`, `solver`, `drift`, `budget`, `noise`,
            `exponent`, `batch_norm` and `memory` are the defaults of the requests.
        unpack: Function from a batch to (inputs, targets).
        loss_fn: What the model was trained with, as for `forget`.
        folder: Keep everything here: made at the first call; a later call with the same model, data
            and options reads it, with all requests so far. A call that was killed goes on where it
            was. Pass a `Ledger` of the folder for one that is signed, or whose salt lies elsewhere.
        limits: How much may be forgotten in all before a request warns, or is refused; and how much
            a result may cost.
        progress: Show progress bars.
        **changes: Fields of `ForgetOptions` by name.

    Raises:
        ModelError, DataError, CurvatureError, ConfigError: As for `forget`.
        StorageError: If the folder is damaged, or of another model, other data or other options.

    Example:
        >>> import torch
        >>> from fisher_forget import prepare
        >>> x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
        >>> data = torch.utils.data.TensorDataset(x, (x[:, 0] > 0).long())
        >>> model = torch.nn.Linear(3, 2).eval()
        >>> prepared = prepare(model, data, weight_decay=0.01, progress=False)
        >>> first = prepared.forget([3], drift=True)
        >>> second = prepared.forget([14, 15], drift=True)
        >>> second.split.forget.tolist()
        [3, 14, 15]
    """
    limits = limits or Limits()
    if limits.each < 1 and folder is None:
        fix = "Pass folder=, whose ledger knows who asked."
        raise ConfigError(f"a limit for each={limits.each:g} without a folder", "a folder", fix)
    with isolated():
        options = merged(options, changes)
        check_model(model)
        split = resolve_split(train_loader, [], unpack=unpack, allow_empty=True)
        log = None
        if folder is not None:
            ledger = folder if isinstance(folder, Ledger) else Ledger(folder)
            log = RequestLog(ledger, len(cast("Sized", split.base)))
            erased = np.array(log.erased(len(split.retain)), dtype=np.int64)
            retain = np.setdiff1d(split.retain, erased)  # who was erased is not read
            split = replace(split, retain=retain, known_as=ledger.data)
        objective = objective_of(model, split, options, loss_fn)
        options = options.with_loss(objective.likelihood, loss_fn)
        check_scored(split, objective.likelihood)
        if options.known_decay != "auto":  # refuses wrong patterns
            by_name(options.known_decay, objective.model, list(objective.start))
        options = with_solver(options, objective, split, warn=True)
        if log is not None:
            parts = snapshot.marks(model, split, options, objective)
            named: Any = {"data": split.known_as, "looked_at": len(split.looked_at)}
            mark, kept = files.fingerprint(parts), snapshot.artefacts(log)
            log.claim(mark, kept, parts=parts, **named)
        requests = [] if log is None else log.requests()
        made = snapshot.read_or_take(model, objective, split, options, log, progress=progress)
        rows = _rows(split, log)
    asked = _asked(requests, split)
    split = split.forgetting(asked) if len(asked) else split
    own = (model, split, made, options, objective, rows, limits, log)
    prepared = Prepared(*own, requests, 0 if log is None else log.count_erased())
    if prepared.pending:
        warnings.warn(
            f"Requests asked for and not done: {len(prepared.pending)} "
            f"({', '.join(prepared.pending[:5])}). A run was killed. Call redeliver(), which gives "
            "the model without their samples.",
            FisherForgetWarning,
            stacklevel=2,
        )
    return prepared


def _asked(requests: Sequence[Sequence[int]], split: Split) -> Indices:
    """Who is asked to be forgotten, of those that are not erased yet; whoever asked how often."""
    named = np.array([i for request in requests for i in request], dtype=np.int64)
    return np.intersect1d(named, split.indices("all"))


def _rows(split: Split, log: RequestLog | None) -> KnownSamples:
    """With the hashes of all samples where there is a folder that knows its data by them."""
    hashes = None if log is None or split.known_as else split.hashes
    # made at its first use
    return KnownSamples(lambda samples: split.hasher(samples), split.indices("all"), hashes)
