"""Peak memory of `forget` by its bound, on a ResNet-18 and on a GPT-2 of 25 million parameters.

    python -m benchmarks.memory [--only CASE ...] [--memory MIB ...] [--samples N]

Every call runs in a process of its own. What a call takes in any case, copies of the weights, the
curvature and a few samples, is its peak at the smallest bound; what is above that is bounded.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import warnings
from time import perf_counter

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from benchmarks.measure import peak, reset_peak
from fisher_forget import FisherForgetWarning, ForgetOptions, build_model, forget

CASES = {"resnet18": "ResNet-18, 11.2M, 3 x 32 x 32", "gpt2": "GPT-2, 24.6M, 64 tokens of 50,257"}
BOUNDS = (1, 256, 1024, 2**20)  # MiB; the last is as good as none
MIB = 2**20


def problem(case: str, samples: int) -> tuple[nn.Module, Dataset[object]]:
    """An untrained model and random samples: how much is held does not depend on their values."""
    g = torch.Generator().manual_seed(0)
    if case == "resnet18":
        model = build_model("resnet18", (3, 32, 32), 10, seed=0, width=1)
        x, y = torch.randn(samples, 3, 32, 32, generator=g), torch.arange(samples) % 10
        return model.eval(), TensorDataset(x, y)
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_positions": 64, "n_embd": 384, "n_layer": 3, "n_head": 6}
    ids = torch.randint(50_257, (samples, 65), generator=g)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        gpt2 = GPT2LMHeadModel(GPT2Config(**sizes, use_cache=False, pad_token_id=None))
    return gpt2.eval(), TensorDataset(ids[:, :-1], ids[:, 1:])


def measure(case: str, bound: int, samples: int) -> None:
    """Print the peak above that before the call, MiB, and the seconds, as JSON; see `peak`."""
    model, data = problem(case, samples)
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    options = ForgetOptions(memory=bound * MIB, structure="diagonal", weight_decay=5e-4)
    reset_peak()
    before, begun = peak(), perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FisherForgetWarning)  # never trained
        forget(model, DataLoader(data, batch_size=16), [0, 1], options, progress=False)
    seconds = perf_counter() - begun
    print(json.dumps({"mib": (peak() - before) / MIB, "seconds": seconds}))


def main() -> None:
    """Measure every case at every bound."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=tuple(CASES), default=tuple(CASES))
    parser.add_argument("--memory", nargs="+", type=int, default=BOUNDS, metavar="MIB")
    parser.add_argument("--samples", type=int, default=96)
    parser.add_argument("--one", action="store_true", help="in this process, as JSON")
    args = parser.parse_args()
    if args.one:
        measure(args.only[0], args.memory[0], args.samples)
        return
    for case in args.only:
        print(
            f"{CASES[case]}, {args.samples} samples, 2 forgotten\n  bound MiB  peak MiB   seconds"
        )
        for bound in args.memory:
            given = ["--only", case, "--memory", str(bound), "--samples", str(args.samples)]
            command = [sys.executable, "-m", "benchmarks.memory", "--one", *given]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found = json.loads(done.stdout.splitlines()[-1])
            print(f"{bound:11,d}{found['mib']:10,.0f}{found['seconds']:10.0f}", flush=True)


if __name__ == "__main__":
    main()
