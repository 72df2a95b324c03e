"""The demo, as small as it goes: what it prints, and the images that it makes. Never its times."""

import re

import numpy as np
import pytest
import torch
from scipy.ndimage import affine_transform
from torch.utils.data import TensorDataset

from fisher_forget import cli
from fisher_forget.experiments import demo
from fisher_forget.experiments.demo import Demo, variants

pytestmark = pytest.mark.filterwarnings("ignore::fisher_forget.FisherForgetWarning")
SECONDS = r" +\d+\.\d s"


@pytest.fixture(scope="module")
def printed():
    small = Demo(scans=40, variants=2, epochs=1, request=3, retrain=True, progress=False)
    return "\n".join(small.run())


class TestDemo:
    @pytest.mark.parametrize(
        "line",
        [
            r"40 scans .* in 2 ways: 80 images",
            rf"training a CNN for 1 epochs{SECONDS}",
            rf"prepare\(\), once{SECONDS}",
            rf"first request: 3 scans, 6 images{SECONDS}   1/\d+ of the training",
            rf"second request: 3 scans, 6 images{SECONDS}   1/\d+ of the training",
            r"  forgotten images( +\d+\.\d %){3}",
            r"  test scans( +\d+\.\d %){3}",
            r"  (fine|wrong) +Retained samples .*",
            rf"retraining without them{SECONDS}",
            r"  forgotten images( +\S+){3}",
            r"  test scans( +\S+){3}",
        ],
    )
    def test_says(self, printed, line):
        assert re.search(rf"^{line}$", printed, re.M), printed

    def test_fits_a_terminal(self, printed):
        own = printed.split("what the result says of itself")[0]
        assert max(map(len, own.splitlines())) <= 100

    @pytest.mark.parametrize("flags", [[], ["--retrain"]])
    def test_through_the_command_line(self, flags, monkeypatch, capsys):
        monkeypatch.setattr(
            demo.Demo, "run", lambda self: [f"retrain: {self.retrain}, {torch.get_num_threads()}"]
        )
        threads = torch.get_num_threads()
        assert cli.main(["demo", *flags]) == 0
        assert capsys.readouterr().out == f"retrain: {bool(flags)}, 1\n"
        assert torch.get_num_threads() == threads


class TestVariants:
    def scans(self):
        images = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(1))
        return TensorDataset(images, torch.tensor([4, 5, 6]))

    def test_of_a_scan_stand_together(self):
        images, targets = variants(self.scans(), 5).tensors
        assert images.shape == (15, 1, 8, 8)
        assert targets.tolist() == [4] * 5 + [5] * 5 + [6] * 5
        assert len(torch.unique(images, dim=0)) == 15

    def test_follow_from_the_seed(self):
        one, same, other = (variants(self.scans(), 4, seed).tensors[0] for seed in (7, 7, 8))
        assert torch.equal(one, same)
        assert not torch.equal(one, other)

    def test_nothing_moved_is_the_scan(self, monkeypatch):
        for what in ("TURN", "SIZE", "SHIFT"):
            monkeypatch.setattr(demo, what, 0.0)
        scans = self.scans()
        images = variants(scans, 2).tensors[0]
        torch.testing.assert_close(images, scans.tensors[0].repeat_interleave(2, 0))

    def test_as_scipy_moves_them(self):
        """The affine map about the centre of the image, bilinear, zeros outside."""
        scans, count = self.scans(), 3
        images = variants(scans, count, seed=2).tensors[0]
        drawn = torch.rand(4, 9, generator=torch.Generator().manual_seed(2)).numpy() * 2 - 1
        for row, (turn, size, right, down) in enumerate(drawn.T):
            angle, scale = demo.TURN * turn, 1 + demo.SIZE * size
            cos, sin = scale * np.cos(angle), scale * np.sin(angle)
            matrix = np.array([[cos, sin], [-sin, cos]])  # of (row, column)
            centre = np.full(2, 3.5)
            shift = 4 * demo.SHIFT * np.array([down, right])  # halves of eight pixels
            offset = centre + shift - matrix @ centre
            scan = scans.tensors[0][row // count, 0].numpy()
            # "grid-constant" blends with the zeros at the border, as grid_sample does
            moved = affine_transform(scan, matrix, offset, order=1, mode="grid-constant")
            np.testing.assert_allclose(images[row, 0].numpy(), moved, atol=1e-5)
