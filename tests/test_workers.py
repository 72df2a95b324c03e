"""Worker processes end with the process that started them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

PROGRAM = """
import sys, time
from pathlib import Path
import torch
from torch import nn
from fisher_forget import SISA

def fit(model, dataset, indices, seed):
    Path(sys.argv[1], f"begun-{seed}").touch()
    time.sleep(2)
    Path(sys.argv[1], f"trained-{seed}").touch()
    return model

if __name__ == "__main__":
    x = torch.randn(40, 3)
    data = torch.utils.data.TensorDataset(x, (x[:, 0] > 0).long())
    SISA(lambda: nn.Linear(3, 2), fit, shards=2, jobs=2, folder=sys.argv[1]).fit(data)
"""


@pytest.mark.skipif(os.name != "posix", reason="no kill on this machine")
def test_a_killed_parent_leaves_no_worker_that_writes(tmp_path):
    program, folder = tmp_path / "program.py", tmp_path / "folder"
    folder.mkdir()
    program.write_text(PROGRAM)
    parent = subprocess.Popen([sys.executable, str(program), str(folder)])
    end = time.monotonic() + 60
    while len(list(folder.glob("begun-*"))) < 2 and time.monotonic() < end:
        time.sleep(0.02)
    assert len(list(folder.glob("begun-*"))) == 2
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    time.sleep(3)
    assert not list(folder.glob("trained-*"))
    assert not list(folder.glob("shard-*"))
