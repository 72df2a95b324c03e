"""What kills, rivals and damage do to deletion requests: the table of docs/reliability.md.

    python -m benchmarks.reliability [--kills N] [--rounds N] [--seed S] [--table]

Every trial forks a process that asks for deletions one by one and tells each that has returned.
It is killed (SIGKILL) after a random time; what it told must be in the ledger then, the ledger must
be intact, and the next process must go on. --table writes docs/reliability.md.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from fisher_forget import SISA, FisherForgetWarning, StorageError, prepare
from fisher_forget._util.files import TEMPORARY
from fisher_forget.ledger import Ledger, verify
from fisher_forget.ledger.ledger import LEDGER

SAMPLES, REQUESTS, PROCESSES = 1200, 5, 3
PAGE = Path(__file__).parents[1] / "docs" / "reliability.md"
MARK = "<!-- reliability -->"
Asking = Callable[[Path, int, Callable[[int], None]], None]


def data() -> TensorDataset:
    """Made-up samples of three classes."""
    g = torch.Generator().manual_seed(0)
    y = torch.arange(SAMPLES) % 3
    return TensorDataset(torch.randn(SAMPLES, 4, generator=g) + y[:, None], y)


def linear() -> nn.Module:
    """A small model, the same at every call."""
    layer = nn.Linear(4, 3)
    with torch.no_grad():
        layer.weight.copy_(torch.linspace(-1, 1, 12).view(3, 4))
        layer.bias.zero_()
    return layer.eval()


def fit(model: nn.Module, dataset: TensorDataset, indices: np.ndarray, seed: int) -> nn.Module:
    """Two gradient steps: a training that is over soon."""
    del seed
    x, y = (t[torch.from_numpy(indices)] for t in dataset.tensors)
    for _ in range(2):
        grads = torch.autograd.grad(
            nn.functional.cross_entropy(model(x), y), list(model.parameters())
        )
        with torch.no_grad():
            for p, g in zip(model.parameters(), grads, strict=True):
                p -= 0.1 * g
    return model


def prepared_asks(folder: Path, first: int, tell: Callable[[int], None], count: int = 60) -> None:
    """Requests to a prepared model."""
    prepared = prepare(linear(), data(), weight_decay=0.01, folder=folder, progress=False)
    for sample in range(first, first + count):
        prepared.forget([sample], steps=1, damping=1.0)
        tell(sample)


def sisa(folder: Path) -> SISA:
    """The ensemble of a folder."""
    return SISA(linear, fit, shards=4, slices=3, folder=folder)


def sisa_asks(folder: Path, first: int, tell: Callable[[int], None], count: int = 60) -> None:
    """Requests to SISA."""
    ensemble = sisa(folder)
    ensemble.fit(data())
    for sample in range(first, first + count):
        ensemble.forget([sample])
        tell(sample)


def started(asks: Asking, folder: Path, first: int, **options: int) -> tuple[int, int]:
    """A process that asks: its number, and where it tells what has returned."""
    reads, writes = os.pipe()
    child = os.fork()
    if child:
        os.close(writes)
        return child, reads
    try:
        warnings.simplefilter("ignore", FisherForgetWarning)
        asks(folder, first, lambda i: os.write(writes, b"%d\n" % i) and None, **options)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def told(child: int, reads: int) -> tuple[list[int], bool]:
    """What has returned when the process has ended, and whether it ended in an error."""
    with os.fdopen(reads, "rb") as pipe:
        samples = [int(line) for line in pipe.read().split()]
    status = os.waitpid(child, 0)[1]
    return samples, os.WIFEXITED(status) and os.WEXITSTATUS(status) != 0


def recorded(folder: Path) -> set[int]:
    """Samples of all requests that are in the ledger."""
    ledger = Ledger(folder)
    hashes = {h for r in ledger.requests.values() for h in r.samples}
    return {i for i, h in enumerate(ledger.hashed(range(SAMPLES))) if h in hashes}


def kills(asks: Asking, trials: int, rng: random.Random, *, rivals: int = 1) -> dict[str, int]:
    """Kill one of `rivals` processes on one folder after a random time, again and again."""
    found = dict.fromkeys(("kills", "returned", "lost", "damaged", "refused", "left behind"), 0)
    with tempfile.TemporaryDirectory() as place:
        folder, first = Path(place) / "f", 0
        while found["kills"] < trials:
            if first + 70 * rivals > SAMPLES - 100:
                folder, first = Path(place) / f"f{found['kills']}", 0
            count = 60 if rivals == 1 else 15
            children = [started(asks, folder, first + 70 * k, count=count) for k in range(rivals)]
            first += 70 * rivals
            time.sleep(rng.uniform(0.0, 1.2))
            os.kill(children[0][0], signal.SIGKILL)
            found["kills"] += 1
            ends = [told(*child) for child in children]
            returned = {i for samples, _ in ends for i in samples}
            found["refused"] += sum(error for _, error in ends)
            found["returned"] += len(returned)
            if (folder / LEDGER).exists():
                found["damaged"] += bool(verify(folder))
                found["lost"] += len(returned - recorded(folder))
            else:
                found["lost"] += len(returned)
        _, error = told(*started(asks, folder, SAMPLES - 80, count=1))  # sweeps, and goes on
        found["refused"] += error
        found["left behind"] = sum(bool(TEMPORARY.fullmatch(p.name)) for p in folder.iterdir())
    return found


def rivals(asks: Asking, rounds: int) -> tuple[int, int]:
    """Requests that returned in `PROCESSES` processes at once, and those of them in the ledger."""
    asked = kept = 0
    with tempfile.TemporaryDirectory() as place:
        for turn in range(rounds):
            folder = Path(place) / str(turn)
            children = [started(asks, folder, 100 * k, count=REQUESTS) for k in range(PROCESSES)]
            returned = {i for child in children for i in told(*child)[0]}
            asked += PROCESSES * REQUESTS
            kept += len(returned & recorded(folder))
    return asked, kept


def exact(kept: int) -> bool:
    """Whether SISA, killed again and again, ends with the bits of one that was never killed."""
    rng, own = random.Random(kept), data()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "killed"
        for turn in range(kept):
            child, reads = started(sisa_asks, folder, 70 * turn)
            time.sleep(rng.uniform(0.0, 1.0))
            os.kill(child, signal.SIGKILL)
            told(child, reads)
        ensemble = sisa(folder)
        ensemble.fit(own)
        fresh = sisa(Path(place) / "fresh")
        fresh.fit(own)
        if len(ensemble.forgotten):
            fresh.forget(ensemble.forgotten)
        return weights(ensemble) == weights(fresh)


def weights(ensemble: SISA) -> list[bytes]:
    """All members' bits."""
    members: list[Tensor] = [p for m in ensemble.module().members for p in m.parameters()]
    return [p.detach().numpy().tobytes() for p in members]


def tampered(seed: int) -> tuple[int, int]:
    """Bytes of a ledger of ten entries that were flipped, and flips that were found."""
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as place:
        ledger = Ledger(Path(place))
        for sample in range(3):
            with ledger.request([sample]):
                pass
        path = Path(place) / LEDGER
        content, found = path.read_bytes(), 0
        for at in range(len(content)):
            flipped = bytearray(content)
            flipped[at] ^= 1 << rng.randrange(8)
            path.write_bytes(flipped)
            found += bool(verify(place))
        path.write_bytes(content[: len(content) // 2])
        try:
            Ledger(place)
        except StorageError:
            return len(content) + 1, found + 1
    return len(content) + 1, found


def table(trials: int, rounds: int, seed: int) -> str:
    """Everything, as Markdown."""
    rng = random.Random(seed)
    lines = [
        "| kills | processes killed | requests returned | of these lost | ledger damaged | "
        "next start refused | temporary files left |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, asks, at_once in (
        ("prepared model", prepared_asks, 1),
        ("prepared model, two processes on one folder, one killed", prepared_asks, 2),
        ("SISA", sisa_asks, 1),
        ("SISA, two processes on one folder, one killed", sisa_asks, 2),
    ):
        found = kills(asks, trials, rng, rivals=at_once)
        lines.append(f"| {name} | " + " | ".join(f"{n:,}" for n in found.values()) + " |")
        print(lines[-1], flush=True)
    lines += ["", "| other trials | tried | right |", "|---|---|---|"]
    for name, asks in (("prepared model", prepared_asks), ("SISA", sisa_asks)):
        asked, kept = rivals(asks, rounds)
        lines.append(
            f"| {PROCESSES} processes x {REQUESTS} requests x {rounds} rounds at once, {name}: "
            f"requests that are in the ledger | {asked} | {kept} |"
        )
    lines.append(
        f"| SISA killed {max(1, trials // 10)} times, then fitted: bits of one that was never "
        f"killed | 1 | {int(exact(max(1, trials // 10)))} |"
    )
    flips, seen = tampered(seed)
    lines.append(
        "| a ledger of ten entries, each byte flipped by one bit, and cut in two: found | "
        f"{flips:,} | {seen:,} |"
    )
    return "\n".join(lines)


def main() -> None:
    """Run all trials."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=100, help="of each kind")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--table", action="store_true", help="write the page")
    options = parser.parse_args()
    torch.set_num_threads(1)
    text = table(options.kills, options.rounds, options.seed)
    print(text)
    if options.table:
        before, _, rest = PAGE.read_text(encoding="utf-8").partition(MARK)
        after = rest.partition(MARK)[2]
        page = f"{before}{MARK}\n\n{text}\n\n{MARK}{after}"
        PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
