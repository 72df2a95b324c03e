"""Ensembles trained with and without the forget set: what forgetting is compared with.

Members are cached one by one, so a killed run resumes; their outputs are stored, so that no metric
runs a model again.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib import import_module, metadata
from pathlib import Path
from typing import Any, TypedDict, Unpack

import joblib
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from fisher_forget._util import files
from fisher_forget._util.checks import check_names
from fisher_forget._util.code import code_fingerprint
from fisher_forget._util.isolation import isolated
from fisher_forget._util.threads import torch_threads
from fisher_forget._util.workers import Tied
from fisher_forget.data import batches
from fisher_forget.data.split import Indices, Split, resolve_split
from fisher_forget.errors import ConfigError, FisherForgetWarning, StorageError
from fisher_forget.evaluate.predictions import predict, whole_splits
from fisher_forget.ledger.purged import check_not_purged

TrainFn = Callable[[int], nn.Module]
# joblib's backends, and the modules that those of other packages live in
BACKENDS = {"loky": None, "threading": None, "dask": "dask.distributed", "ray": "ray.util.joblib"}


class TrainOptions(TypedDict, total=False):
    """Where members are stored, and who trains them.

    Attributes:
        folder: Where to store the models; `None`, the default, stores nothing.
        fingerprint: Of everything but the seed that the weights depend on; see `files.fingerprint`.
            By default, of `train_fn` and the package's version (`_util.code`).
        jobs: Worker processes, 1 by default. With more than one, each uses one torch thread and
            receives `train_fn`, with what it refers to, by copy. Sums are then added in another
            order than with several threads, so the weights may differ from those of `jobs=1` by
            rounding, which training amplifies; the number of workers alone changes nothing. With
            one job, training runs in this process and torch's threads are left alone.
        backend: Joblib's: "loky" (processes here, the default), "dask" or "ray" (a cluster that you
            have connected to), "threading".
        progress: Show a bar with the time left, as by default.
    """

    folder: str | Path | None
    fingerprint: str
    jobs: int
    backend: str
    progress: bool


@dataclass(frozen=True)
class Members:
    """Models that differ by their seed alone.

    Attributes:
        models: In eval mode, in the order of `seeds`.
        seeds: One per model.
        seconds: Wall-clock time that each training took, when it was trained.
    """

    models: tuple[nn.Module, ...]
    seeds: tuple[int, ...]
    seconds: tuple[float, ...]


@dataclass(frozen=True)
class RetrainedEnsemble:
    """Models trained with and without the forget set, by one training function.

    Attributes:
        originals: Trained on everything; what is to forget is one of them.
        retrained: Trained without the forget set: what the scrubbed models should look like.
        forget: Sorted indices of the forget set.
        folder: Where models and outputs are stored; `None` stores nothing.
        fingerprint: Of data, settings and code that the weights depend on.
    """

    originals: Members
    retrained: Members
    forget: Indices
    folder: Path | None = None
    fingerprint: str = ""

    def __str__(self) -> str:
        kept = "not stored" if self.folder is None else f"in {self.folder}"
        return (
            f"{len(self.retrained.models)} models retrained without {len(self.forget)} samples, "
            f"{len(self.originals.models)} trained on everything, {kept}"
        )

    @classmethod
    def fit(
        cls,
        train_fn: Callable[[Indices, int], nn.Module],
        data: Dataset[Any] | Split,
        forget_idx: Sequence[int] | Indices | Tensor | range = (),
        *,
        template: nn.Module,
        seeds: Sequence[int] = range(1000, 1010),
        original_seeds: Sequence[int] = (0,),
        **options: Unpack[TrainOptions],
    ) -> RetrainedEnsemble:
        """Train, or load where an earlier call has stored them, the members with and without the
        forget set.

        Args:
            train_fn: Takes the indices to train on and a seed, and returns a trained model of the
                template's architecture.
            data: The training data set, or a `Split` of it.
            forget_idx: Distinct indices into it; none where a `Split` is given.
            template: Gives the architecture; untouched.
            seeds: Of the retrained models.
            original_seeds: Of the models trained on everything.
            **options: `folder` to store models and outputs in; `fingerprint` of whatever else the
                weights depend on than `train_fn`, the samples and the package's version, such as
                files that it reads; `jobs`, `backend` and `progress` as for `train_members`.

        A model stored by another function, or other values that it refers to, is trained anew
        (`_util.code`). Where that cannot be told, `fingerprint` must be given, and stands for it.

        Raises:
            ConfigError, SplitError: As `train_members` and `forget` do.
            StorageError: As `train_members`; or if models were purged from the folder.
        """
        check_names(options, TrainOptions.__annotations__)
        split = data if isinstance(data, Split) else resolve_split(data, forget_idx)
        given, named = options.get("folder"), options.get("fingerprint", "")
        folder = None if given is None else files.ensure_folder(Path(given))
        if folder is not None:
            check_not_purged(folder)
        code = "" if folder is None else _code(train_fn, named)
        fingerprint = files.fingerprint(named, split.fingerprint(), code)

        def members(sample_idx: Indices, member_seeds: Sequence[int], name: str) -> Members:
            own: TrainOptions = options | {
                "fingerprint": fingerprint,
                "folder": None if folder is None else folder / name,
            }
            train = partial(train_fn, sample_idx)
            return train_members(train, member_seeds, template=template, description=name, **own)

        originals = members(split.indices("all"), original_seeds, "original")
        retrained = members(split.retain, seeds, "retrained")
        return cls(originals, retrained, split.forget, folder, fingerprint)

    @isolated()
    def outputs(
        self, parts: Mapping[str, Dataset[Any]], *, unpack: batches.Unpack | None = None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
        """(originals' outputs [K, N, ...], retrained models' outputs [M, N, ...], targets [N, ...])
        by data set.

        Computed once and stored.

        Args:
            parts: Data sets by name: "forget", "retain", "test", ...
            unpack: As for `forget`.

        Raises:
            DataError, StorageError: If a data set cannot be read, or the folder not be written.
        """
        splits = whole_splits(parts, unpack)
        prints = [splits[name].fingerprint() for name in splits]
        seeds = self.originals.seeds, self.retrained.seeds
        key = files.fingerprint(self.fingerprint, list(splits), prints, *seeds)
        path = None if self.folder is None else self.folder / "outputs.safetensors"
        if path and path.exists() and files.read_metadata(path).get("fingerprint") == key:
            stored, _ = files.load_tensors(path)
        else:
            stored = self._predict(splits)
            if path is not None:
                files.save_tensors(path, stored, {"fingerprint": key})
        original, retrained, targets = (
            {name: stored[f"{kind}/{name}"] for name in splits}
            for kind in ("original", "retrained", "targets")
        )
        return original, retrained, targets

    def _predict(self, splits: Mapping[str, Split]) -> dict[str, Tensor]:
        """ "original/<part>", "retrained/<part>" and "targets/<part>"."""
        stored = {}
        for name, split in splits.items():
            for kind, members in (("original", self.originals), ("retrained", self.retrained)):
                predictions = [predict(model, split) for model in members.models]
                stored[f"{kind}/{name}"] = torch.stack([outputs for outputs, _ in predictions])
                stored[f"targets/{name}"] = predictions[0][1]
        return stored


@dataclass(frozen=True)
class _Cache:
    """`folder/seed-<s>.safetensors`, one file a member."""

    folder: Path
    fingerprint: str

    def path(self, seed: int) -> Path:
        return self.folder / f"seed-{seed}.safetensors"

    def save(self, seed: int, model: nn.Module, seconds: float) -> None:
        notes = {"seed": str(seed), "seconds": repr(seconds), "version": _version()}
        files.save_model(self.path(seed), model, notes | {"fingerprint": self.fingerprint})

    def load(self, seed: int, template: nn.Module) -> tuple[nn.Module, float]:
        expected = {"fingerprint": self.fingerprint, "seed": str(seed)}
        model = files.load_model(self.path(seed), template, expected)
        return model, float(files.read_metadata(self.path(seed)).get("seconds", "nan"))


def train_members(
    train_fn: TrainFn,
    seeds: Sequence[int],
    *,
    template: nn.Module,
    description: str = "retrain",
    **options: Unpack[TrainOptions],
) -> Members:
    """Train one model per seed, or load it where an earlier run has stored it.

    Each model is stored as soon as it is trained: to resume a killed run, start it again. A stored
    model with another fingerprint, or a damaged file, is trained anew and overwritten, with a
    warning.

    Args:
        train_fn: Takes a seed and returns a trained model of the template's architecture.
        seeds: Distinct.
        template: Gives the architecture; untouched.
        description: Text of the bar.
        **options: `folder`, `fingerprint`, `jobs`, `backend`, `progress`, see `TrainOptions`.

    Raises:
        ConfigError: If `seeds` is empty or repeats one, `jobs` is less than 1, or a folder is given
            without a `fingerprint` for a function that cannot be told from another.
        StorageError: If the folder cannot be written, or `train_fn` returns another architecture
            than the template's.
    """
    check_names(options, TrainOptions.__annotations__)
    seeds, jobs = tuple(int(seed) for seed in seeds), options.get("jobs", 1)
    backend = options.get("backend", "loky")
    if not seeds or len(set(seeds)) < len(seeds):
        raise ConfigError(f"the seeds {seeds}", "at least one seed, each once", "Correct `seeds`.")
    if jobs < 1:
        raise ConfigError(f"jobs={jobs}", "at least 1", "Pass the number of worker processes.")
    if backend not in BACKENDS:
        got = f"backend={backend!r}"
        raise ConfigError(got, f"one of {sorted(BACKENDS)}", "Pass one of these names.")
    folder, cache = options.get("folder"), None
    if folder is not None:
        fingerprint = options.get("fingerprint", "") or _code(train_fn)
        cache = _Cache(files.ensure_folder(Path(folder)), fingerprint)
    members = _stored(cache, seeds, template)
    todo = [seed for seed in seeds if seed not in members]
    hidden = not options.get("progress", True)
    counts: dict[str, Any] = {"total": len(seeds), "initial": len(members), "unit": "model"}
    with tqdm(desc=description, disable=hidden, leave=False, **counts) as bar:
        for seed, state, seconds in _trained(train_fn, todo, cache, jobs, backend):
            members[seed] = files.fill_model(template, state), seconds
            bar.update()
    models, durations = zip(*(members[seed] for seed in seeds), strict=True)
    return Members(models, seeds, durations)


def _code(train_fn: Callable[..., nn.Module], named: str = "") -> str:
    """Fingerprint of a training function; what the user has named stands for one that has none."""
    try:
        return files.fingerprint(code_fingerprint(train_fn), _version())
    except StorageError as error:
        if named:
            return _version()
        got = f"a training function that holds {error.got}"
        expected = "one whose stored models can be told from those of another"
        fix = "Pass fingerprint=, a text that you change with the function, or no folder."
        raise ConfigError(got, expected, fix) from error


def _stored(
    cache: _Cache | None, seeds: Sequence[int], template: nn.Module
) -> dict[int, tuple[nn.Module, float]]:
    members: dict[int, tuple[nn.Module, float]] = {}
    refused: dict[int, Exception] = {}
    for seed in seeds:
        if cache is None or not cache.path(seed).exists():
            continue
        try:
            members[seed] = cache.load(seed, template)
        except (StorageError, ValueError) as error:
            refused[seed] = error
    if cache is not None and refused:
        warnings.warn(
            f"Stored models of the seeds {list(refused)} in {cache.folder} cannot be used and are "
            f"trained anew: {next(iter(refused.values()))}",
            FisherForgetWarning,
            stacklevel=3,
        )
    return members


def stored_seeds(folder: Path, seeds: Sequence[int], fingerprint: str) -> list[int]:
    """The seeds whose models an earlier call of `train_members` has stored, by their files'
    headers."""
    cache, stored = _Cache(folder, fingerprint), []
    for seed in seeds:
        with suppress(StorageError):
            if files.read_metadata(cache.path(seed)).get("fingerprint") == fingerprint:
                stored.append(seed)
    return stored


Member = tuple[int, dict[str, Tensor], float]


def _trained(
    train_fn: TrainFn, seeds: Sequence[int], cache: _Cache | None, jobs: int, backend: str
) -> Iterator[Member]:
    """Members in the order in which they are finished."""
    if jobs == 1 or len(seeds) < 2:
        # a single one left over from a killed run gets one thread too, so that resuming changes
        # nothing
        threads = None if jobs == 1 else 1
        yield from (_member(train_fn, seed, cache, threads) for seed in seeds)
        return
    _register(backend)
    returned = "generator_unordered" if BACKENDS[backend] is None else "list"
    with joblib.parallel_config(backend):  # Parallel itself knows joblib's own backends only
        workers = joblib.Parallel(n_jobs=min(jobs, len(seeds)), return_as=returned)
    yield from workers(
        joblib.delayed(Tied(_member))(train_fn, seed, cache, threads=1) for seed in seeds
    )


def _register(backend: str) -> None:
    """Make joblib know a backend of another package.

    Raises:
        ConfigError: If that package is not installed.
    """
    home = BACKENDS[backend]
    if home is None:
        return
    try:
        module = import_module(home)
    except ImportError as error:
        got, fix = f"backend={backend!r} without {home.split('.')[0]}", "Install it, or use 'loky'."
        raise ConfigError(got, "the package to be installed", fix) from error
    if backend == "ray":
        module.register_ray()


def _member(
    train_fn: TrainFn, seed: int, cache: _Cache | None, threads: int | None = None
) -> Member:
    """Train one member, and store it before anything else can go wrong."""
    with torch_threads(threads):
        start = time.perf_counter()
        model = train_fn(seed)
        seconds = time.perf_counter() - start
    if cache is not None:
        cache.save(seed, model, seconds)
    return seed, {name: value.detach().cpu() for name, value in model.state_dict().items()}, seconds


def _version() -> str:
    try:
        return metadata.version("fisher_forget")
    except metadata.PackageNotFoundError:
        return "not installed"
