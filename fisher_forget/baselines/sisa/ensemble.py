"""SISA: exact unlearning that retrains little (sharded, isolated, sliced, aggregated).

S models never see each other's shard. Each is trained slice by slice: w_d = train(w_{d-1}, slices 1
... d), with a checkpoint after every slice. To forget, the shards hit go back to the checkpoint
before the first slice hit and are trained on without the sample. Every seed depends on shard and
slice alone, so that the result is bit for bit what training on the retained samples would have
given with the same cut: the order of requests does not matter, and neither does whether they come
one by one or together.

Source: Bourtoule et al. 2021 (arXiv:1912.03817).
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn
from torch.utils.data import Dataset

from fisher_forget._util import files
from fisher_forget._util.isolation import isolated
from fisher_forget._util.progress import bar
from fisher_forget.baselines.retrain import Init, Train
from fisher_forget.baselines.sisa import partition
from fisher_forget.baselines.sisa.aggregate import Aggregate, Aggregation
from fisher_forget.baselines.sisa.partition import Cut
from fisher_forget.baselines.sisa.shards import ShardTask, ShardTrainer, Work, initial_model
from fisher_forget.baselines.sisa.store import Store, content_hashes
from fisher_forget.data.indices import forget_indices
from fisher_forget.data.split import Indices, Split
from fisher_forget.errors import ConfigError, ModelError, SplitError, StorageError
from fisher_forget.ledger import Ledger, RequestLog, evidence, model_fingerprint
from fisher_forget.ledger.ledger import COPIED
from fisher_forget.ledger.owner import remove_orphans

TEMPORARY = "fisher-forget-sisa-"


@dataclass(eq=False, repr=False)
class SISA:
    """An ensemble that forgets exactly; see the module.

    Checkpoints are written whole or not at all, and one that has seen a sample to be forgotten is
    removed before anything is trained. After a kill, make the same SISA with the same folder and
    call `fit`: requests are recorded before they are served, so it goes on where it was, a request
    included. A second process that uses the folder waits for the first, and goes on with all
    requests so far.

    Attributes:
        build: Returns a new model; called with the global generators seeded shard by shard.
        train: `train(model, dataset, indices, seed)` trains on these samples, sorted, and returns
            the model. It gets a model of its own, in eval mode, and must depend on nothing else: an
            optimizer's momentum starts anew at every slice, and state outside `state_dict` is not
            kept. The global generators are seeded for it. Frozen BatchNorm layers that hold
            statistics in what `build` returns (a pre-trained backbone) stay in eval mode.
        shards: S; more of them forget faster and predict worse.
        slices: R, of every shard; `partition.epochs_per_slice` says how long to train on each.
        labels: Class of every sample, to balance shards and slices; see `partition.balanced`.
        probabilities: Deletion probability of every sample: those likely to go are put together;
            see `partition.by_deletion_probability`. Without either, the cut is uniform.
        folder: Where checkpoints are kept; `None` for a temporary one, gone with this object. A
            `Ledger` of the folder for one that is signed, or whose salt lies elsewhere.
        budget: Most bytes that checkpoints may take. Those of the last slice are needed; as many of
            the others as fit are kept, spread evenly over slices, and training starts again from
            the last one kept. `None` keeps all.
        jobs: Worker processes, one shard each. They receive `build`, `train` and the data set by
            copy. Any number gives the same bits: training uses one torch thread, in this process
            too.
        seed: Of the cut, the initial weights and the training.
        fingerprint: Names data and training function; a folder made under another name is refused.
            Without one every retained sample is read when a folder is opened, and other data than
            its checkpoints were trained on are refused.
        progress: Show a bar over the shards in training.
        requests: Those so far, each the samples that it named.

    Raises:
        ConfigError: If a number is below 1 (seed: 0), or labels and probabilities are both given.

    Example:
        >>> from fisher_forget.experiments.training import TrainSettings, train
        >>> def fit(model, dataset, indices, seed):
        ...     settings = TrainSettings(epochs=2)
        ...     return train(model, dataset, settings, seed=seed, indices=indices, progress=False)
        >>> x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
        >>> data = torch.utils.data.TensorDataset(x, (x[:, 0] > 0).long())
        >>> sisa = SISA(lambda: nn.Linear(3, 2), fit, shards=4, slices=2)
        >>> sisa.fit(data).calls
        8
        >>> sisa.forget([17]).shards
        (1,)
        >>> sisa.module()(x).shape
        torch.Size([40, 2])
    """

    build: Init
    train: Train
    _: KW_ONLY
    shards: int
    slices: int = 1
    labels: ArrayLike | None = None
    probabilities: ArrayLike | None = None
    folder: str | Path | Ledger | None = None
    budget: int | None = None
    jobs: int = 1
    seed: int = 0
    fingerprint: str = ""
    progress: bool = False
    requests: list[list[int]] = field(default_factory=list, init=False)
    _temporary: tempfile.TemporaryDirectory[str] | None = field(default=None, init=False)
    _state: _State | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        partition.check_at_least(1, shards=self.shards, slices=self.slices, jobs=self.jobs)
        partition.check_at_least(0, seed=self.seed)
        if self.labels is not None and self.probabilities is not None:
            got = "both labels and probabilities"
            raise ConfigError(got, "one of them, or neither", "Choose what to shard by.")
        self.shards, self.slices = int(self.shards), int(self.slices)
        self.jobs, self.seed = int(self.jobs), int(self.seed)

    def __reduce_ex__(self, protocol: Any) -> Any:
        if self._state is not None:
            got, expected = "a copy or pickle of a SISA that is fitted", "one owner of the requests"
            fix = "Call copy(), pickle module(), or make the same SISA with its folder and fit it."
            raise StorageError(got, expected, fix)
        return super().__reduce_ex__(protocol)

    @property
    def cut(self) -> Cut:
        """Indices by shard and slice, as they were cut: forgotten samples are still named."""
        return self._fitted().cut

    @property
    def forgotten(self) -> Indices:
        """Sorted indices of all samples forgotten so far."""
        return self._fitted().split.forget

    @property
    def kept(self) -> tuple[frozenset[int], ...]:
        """After how many slices each shard keeps a checkpoint."""
        return self._fitted().kept

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self._fitted().store.folder

    def fit(self, dataset: Dataset[Any]) -> Work:
        """Train what is missing: everything at first, the rest after a kill, then nothing.

        Args:
            dataset: Map-style; requests index its samples, which the training function alone reads.

        Raises:
            SplitError: If the data set has no length, or another one was given before.
            ConfigError: If there are fewer samples than slices, labels or probabilities do not fit,
                or the budget does not hold one checkpoint a shard.
            StorageError: If the folder cannot be written, is of another run, or `train` returns
                another architecture.
        """
        if self._state is not None and self._state.split.base is not dataset:
            got = "another data set than before"
            raise SplitError(got, "the one that was given first", "Make another SISA for it.")
        if not hasattr(dataset, "__len__"):
            got = f"a data set of type {type(dataset).__name__} without length"
            fix = "Read the samples into a list or a TensorDataset first."
            raise SplitError(got, "a map-style data set, whose samples have an index", fix)
        total = len(dataset)
        cut = self._cut(total)
        initial = initial_model(self.build, self.seed, 0)
        ledger = self.folder if isinstance(self.folder, Ledger) else Ledger(self._place())
        name = self.fingerprint or ledger.data
        # what else a checkpoint depends on: a folder of another run is refused
        mark = files.fingerprint(name, self.seed, cut, dict(initial.state_dict()))
        log = RequestLog(ledger, total)
        store = Store(log.ledger.folder, mark)
        log.claim(mark, store.own_files(), data=name)
        split = Split(dataset, np.arange(total), np.zeros(0, dtype=np.int64))
        with log.ledger.owned():
            known = None if self._state is None else self._state.store.hashes
            state = self._caught_up(_State(split, cut, store, log, self._kept(store, initial)))
            if self._temporary is None and not name:
                state = replace(
                    state, store=replace(store, hashes=content_hashes(state.split, known))
                )
            self._state = state
            return self._serve()

    def forget(self, indices: Sequence[int] | Indices | Tensor | range, *, who: str = "") -> Work:
        """Forget these samples, and all that were forgotten before; naming one again is no error.

        The request is recorded first. If training is interrupted, `fit` completes it.

        Args:
            indices: Distinct indices into the data set.
            who: Opaque reference of who asked, for the ledger.

        Raises:
            SplitError: If the indices are out of range, repeated or none, or nothing would be left.
            ModelError: If `fit` has not been called.
            StorageError: If the request cannot be recorded.
        """
        log = self._fitted().log
        with log.ledger.owned():
            state = self._state = self._caught_up(self._fitted())
            split = state.split.forgetting(indices)
            named = forget_indices(indices, len(state.split.base)).tolist()  # type: ignore[arg-type]
            # before anything is removed or trained: a kill after this line is completed by `fit`
            log.ask(named, who, look=self._before)
            self._state, self.requests = replace(state, split=split), [*self.requests, named]
            return self._serve()

    def _serve(self) -> Work:
        """Train what is missing, and record the requests that were not done as done."""
        work, state = self._update(), self._fitted()
        pending = state.log.ledger.pending()
        if pending:
            # whatever came between: the ensemble that the first of them was asked of
            before = [r.evidence["model_before"] for r in pending if "model_before" in r.evidence]
            told = evidence(
                "sisa",
                None,
                self.module(),
                retained=len(state.split.retain),
                forgotten=len(state.split.forget),
                exact=True,
                shards_trained=list(work.shards),
                first_slices=list(work.first_slices),
                share_of_training=work.share,
            )
            state.log.done(**told | {"model_before": before[0] if before else None})
        return work

    def _before(self) -> dict[str, str]:
        """What is kept of the ensemble as it is; nothing where a training was interrupted."""
        try:
            return {"model_before": model_fingerprint(self.module())}
        except ModelError:
            return {}

    def _caught_up(self, state: _State) -> _State:
        """The same with all requests so far, those of other owners of the folder included."""
        self.requests = state.log.requests()
        known = np.array([i for request in self.requests for i in request], dtype=np.int64)
        if len(new := np.setdiff1d(known, state.split.forget)):
            state = replace(state, split=state.split.forgetting(new))
        return state

    def module(self, *, aggregation: Aggregation = "mean", weighted: bool = False) -> Aggregate:
        """The ensemble as it is now, as one module in eval mode; later requests do not reach it.

        Shards that have no sample left take no part.

        Args:
            aggregation: Mean of the predictions, or majority vote; see `Aggregate`.
            weighted: Give each model a weight proportional to the samples it was trained on.

        Raises:
            ModelError: If `fit` has not been called, or was interrupted.
        """
        state = self._fitted()
        members, counts = [], []
        for shard, parts in enumerate(state.parts()):
            samples = sum(map(len, parts))
            if samples:
                key = state.store.keys(shard, parts)[-1]
                if not state.store.holds(shard, self.slices, key):
                    got = f"shard {shard} without its model"
                    raise ModelError(got, "a fit or forget that came to its end", "Call fit again.")
                template = initial_model(self.build, self.seed, shard)
                members.append(state.store.load(shard, self.slices, template, key))
                counts.append(samples if weighted else 1)
        return Aggregate(members, counts, aggregation).eval()

    @isolated()
    @torch.no_grad()
    def predict(
        self,
        inputs: Tensor,
        *,
        aggregation: Aggregation = "mean",
        weighted: bool = False,
        batch_size: int = 1024,
    ) -> Tensor:
        """Most likely class of every input: [N, ...]. It reads all models at every call.

        Raises:
            ModelError: As for `module`.
        """
        module = self.module(aggregation=aggregation, weighted=weighted)
        device = next(module.parameters()).device
        return torch.cat(
            [module(chunk.to(device)).argmax(-1) for chunk in inputs.split(batch_size)]
        )

    def copy(self, folder: str | Path | None = None) -> SISA:
        """The same ensemble with its checkpoints in another folder, and requests of its own.

        Args:
            folder: As for `SISA`.

        Raises:
            ModelError: If `fit` has not been called.
        """
        state = self._fitted()
        name = self.fingerprint or state.log.ledger.data
        twin = replace(self, folder=folder, fingerprint=name)
        place = twin._place()
        if Ledger(place).exists:
            raise StorageError(f"{place}, which has a ledger", "another folder", "Name another.")
        with state.log.ledger.owned():
            for name in (*COPIED, *(p.name for p in state.store.own_files())):
                shutil.copy2(self.checkpoints / name, place / name)
        twin.fit(state.split.base)
        return twin

    def _fitted(self) -> _State:
        if self._state is None:
            raise ModelError(
                "a SISA that is not fitted", "a call of fit before this one", "Call fit(dataset)."
            )
        return self._state

    def _cut(self, total: int) -> Cut:
        for name, values in (("labels", self.labels), ("probabilities", self.probabilities)):
            if values is not None and np.shape(values)[:1] != (total,):
                got = f"{name} of shape {np.shape(values)} for {total} samples"
                raise ConfigError(got, "one a sample", f"Correct `{name}`.")
        pieces = self.shards, self.slices, self.seed
        if self.labels is not None:
            return partition.balanced(self.labels, *pieces)
        if self.probabilities is not None:
            return partition.by_deletion_probability(self.probabilities, *pieces)
        return partition.uniform(total, *pieces)

    def _place(self) -> Path:
        if isinstance(self.folder, Ledger):
            return self.folder.folder
        if self.folder is not None:
            return files.ensure_folder(self.folder)
        if self._temporary is None:
            remove_orphans(Path(tempfile.gettempdir()).glob(f"{TEMPORARY}*"))
            self._temporary = tempfile.TemporaryDirectory(prefix=TEMPORARY)
        return Path(self._temporary.name)

    def _kept(self, store: Store, initial: nn.Module) -> tuple[frozenset[int], ...]:
        """After how many slices each shard keeps a checkpoint."""
        if self.budget is None:
            return (frozenset(range(1, self.slices + 1)),) * self.shards
        size = store.size(initial)
        room = self.budget // size
        if room < self.shards:
            least = f"one checkpoint of {size} bytes for each of {self.shards} shards"
            got, expected = f"budget={self.budget} bytes", f"at least {self.shards * size}: {least}"
            raise ConfigError(got, expected, "Raise the budget, or use fewer shards.")
        share, more = divmod(room, self.shards)  # the first `more` shards keep one more
        return tuple(
            partition.kept_checkpoints(self.slices, share + (shard < more))
            for shard in range(self.shards)
        )

    def _update(self) -> Work:
        """Remove what the requests have made stale, then train what is missing."""
        begun = time.perf_counter()
        state = self._fitted()
        shards = [
            ShardTask(
                number,
                parts,
                state.store.keys(number, parts),
                state.store.contents(parts),
                state.kept[number],
            )
            for number, parts in enumerate(state.parts())
        ]
        for shard in shards:
            shard.check_content(state.store)
        state.store.keep_only(
            {state.store.path(s.shard, done): s.keys[done] for s in shards for done in s.kept}
        )
        started = [(shard, shard.start(state.store)) for shard in shards]
        tasks = [(shard, start) for shard, start in started if start < self.slices]
        store = replace(state.store, term=state.log.ledger.term, hashes=None)
        trainer = ShardTrainer(self.build, self.train, state.split.base, self.seed, store)
        calls = points = 0
        for cost in bar(trainer.run(tasks, self.jobs), len(tasks), "shards", self.progress):
            calls, points = calls + cost[0], points + cost[1]
        trained, starts = tuple(s.shard for s, _ in tasks), tuple(start for _, start in tasks)
        share = points / sum(shard.points for shard in shards)
        return Work(trained, starts, calls, points, time.perf_counter() - begun, share)


@dataclass(frozen=True)
class _State:
    """What `fit` has settled, and who is forgotten."""

    split: Split
    cut: Cut
    store: Store
    log: RequestLog
    kept: tuple[frozenset[int], ...]

    def parts(self) -> Cut:
        return partition.retained(self.cut, self.split.forget)
