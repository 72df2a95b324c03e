"""Training of SISA's shards: what is left to train, and seeds that repeat it anywhere, any time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import joblib
import numpy as np
from torch import nn
from torch.utils.data import Dataset

from fisher_forget._util import files
from fisher_forget._util.isolation import seeded_rng
from fisher_forget._util.threads import torch_threads
from fisher_forget._util.workers import Tied
from fisher_forget.baselines.retrain import Init, Train
from fisher_forget.baselines.sisa.partition import Shard
from fisher_forget.baselines.sisa.store import Store
from fisher_forget.unlearn.batch_norm import held_statistics, pinned


def slice_seed(seed: int, shard: int, done: int) -> int:
    """Seed of the training after `done - 1` slices of a shard (`done=0`: of its initial weights).

    It depends on nothing else, so that a request does not change the randomness of what it does not
    hit.
    """
    # hashed: seeds of neighbouring shards and slices share no stream
    return int(np.random.SeedSequence([seed, shard, done]).generate_state(1)[0])


def initial_model(build: Init, seed: int, shard: int) -> nn.Module:
    """A shard's model before training, in eval mode."""
    with seeded_rng(slice_seed(seed, shard, 0)):
        return build().eval()


@dataclass(frozen=True)
class Work:
    """What a call has trained.

    Attributes:
        shards: Numbers of the shards that were trained, ascending.
        first_slices: The slice, counted from 0, at which the training of each began.
        calls: Calls of the training function.
        points: Samples handed to it, over all calls; with one slice the paper's retrained points.
        seconds: Wall time.
        share: `points` over those of the training of all shards.
    """

    shards: tuple[int, ...]
    first_slices: tuple[int, ...]
    calls: int
    points: int
    seconds: float
    share: float


@dataclass(frozen=True)
class ShardTask:
    """A shard to be trained.

    Attributes:
        shard: Its number.
        parts: Its retained samples, slice by slice.
        keys: Of the checkpoints after 0 ... R slices.
        contents: Of what each of them has seen; see `Store.contents`.
        kept: After how many slices a checkpoint is kept.
    """

    shard: int
    parts: Shard
    keys: tuple[str, ...]
    contents: tuple[str, ...]
    kept: frozenset[int]

    @property
    def points(self) -> int:
        """Samples that the training of all slices is handed, over all calls."""
        return int(np.cumsum([len(part) for part in self.parts]).sum())

    def check_content(self, store: Store) -> None:
        """Refuse other data than its checkpoints were trained on.

        Raises:
            StorageError: If they are others.
        """
        for done in self.kept:
            store.check_content(self.shard, done, self.keys[done], self.contents[done])

    def start(self, store: Store) -> int:
        """How many slices the last usable checkpoint has seen."""
        return max(
            (done for done in self.kept if store.holds(self.shard, done, self.keys[done])),
            default=0,
        )


@dataclass(frozen=True)
class ShardTrainer:
    """What the training of every shard shares.

    Attributes:
        build: See `SISA`.
        train: See `SISA`.
        dataset: What `train` reads.
        seed: See `SISA`.
        store: Holds the checkpoints.
    """

    build: Init
    train: Train
    dataset: Dataset[Any]
    seed: int
    store: Store

    def run(self, tasks: list[tuple[ShardTask, int]], jobs: int) -> Iterator[tuple[int, int]]:
        """(calls, points) of each (shard, slices done before), in the order of their finish."""
        if jobs == 1 or len(tasks) < 2:
            yield from (self.train_shard(task, start) for task, start in tasks)
            return
        workers = joblib.Parallel(
            n_jobs=min(jobs, len(tasks)), backend="loky", return_as="generator_unordered"
        )
        yield from workers(
            joblib.delayed(Tied(self.train_shard))(task, start) for task, start in tasks
        )

    def train_shard(self, task: ShardTask, start: int) -> tuple[int, int]:
        """Train a shard from its checkpoint to its end; a slice whose samples are all forgotten
        still has its turn."""
        template, store = initial_model(self.build, self.seed, task.shard), self.store
        held = held_statistics(template)
        model = store.load(task.shard, start, template, task.keys[start]) if start else template
        calls = points = 0
        for done in range(start + 1, len(task.parts) + 1):
            seen = np.sort(np.concatenate(task.parts[:done]))
            if len(seen):
                seed = slice_seed(self.seed, task.shard, done)
                begun = files.fill_model(template, model.state_dict())
                # one thread: sums in the same order in every process
                with seeded_rng(seed), torch_threads(1), pinned(begun, held):
                    trained = self.train(begun, self.dataset, seen, seed)
                # into a fresh copy, as if it had been read from a checkpoint: mode and hooks do
                # not carry over
                model = files.fill_model(template, trained.state_dict())
                calls, points = calls + 1, points + len(seen)
            if done in task.kept:
                store.save(task.shard, done, model, task.keys[done], task.contents[done])
        return calls, points
