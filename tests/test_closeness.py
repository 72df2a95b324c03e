"""Scores against retrained models: hand-computed values, identities, and refusals."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, rel_entr
from torch import nn
from torch.utils.data import TensorDataset

from fisher_forget import Categorical, DataError, NumericalError
from fisher_forget.evaluate.closeness import Reference, closeness, mean_kl, summarise
from fisher_forget.evaluate.intervals import Interval


def outputs(seed: int, n: int = 6) -> torch.Tensor:
    return torch.randn(n, 4, generator=torch.Generator().manual_seed(seed))


class TestEvaluate:
    def test_equals_scipy_number_by_number(self) -> None:
        y = torch.randint(0, 4, (6,), generator=torch.Generator().manual_seed(9))
        original, scrubbed, members = outputs(0), outputs(1), [outputs(s) for s in (2, 3, 4)]
        found = closeness(
            Categorical(),
            {"forget": y},
            {"forget": original},
            {"forget": scrubbed},
            [{"forget": m} for m in members],
        ).parts["forget"]

        def kl(a: torch.Tensor, b: torch.Tensor) -> float:
            p, q = (np.exp(log_softmax(t.double().numpy(), axis=1)) for t in (a, b))
            return float(rel_entr(p, q).sum(1).mean())

        to_scrubbed = [kl(m, scrubbed) for m in members]
        floors = [np.mean([kl(b, a) for b in members if b is not a]) for a in members]
        reverse = [np.mean([kl(a, b) for b in members if b is not a]) for a in members]
        assert found.kl_scrubbed == pytest.approx(np.mean(to_scrubbed))
        assert found.kl_scrubbed_std == pytest.approx(np.std(to_scrubbed, ddof=1))
        assert found.floor == pytest.approx(np.mean(floors))
        assert found.floor_std == pytest.approx(np.std(floors, ddof=1))
        assert found.to_each == pytest.approx(floors)
        assert found.from_each == pytest.approx(reverse)
        assert found.scrubbed_each == pytest.approx(to_scrubbed)
        assert found.original_each == pytest.approx([kl(m, original) for m in members])
        assert found.score_scrubbed == pytest.approx(
            float((scrubbed.argmax(1) == y).double().mean())
        )
        assert found.score_retrained == pytest.approx(
            np.mean([float((m.argmax(1) == y).double().mean()) for m in members])
        )

    def test_the_gap_of_standing_still_is_not_closed(self) -> None:
        y = torch.zeros(6, dtype=torch.long)
        members = [{"a": outputs(s)} for s in range(2, 8)]
        far = {"a": outputs(0) * 8}
        gap = closeness(Categorical(), {"a": y}, far, far, members).parts["a"].gap
        assert gap.closed == Interval(0.0, 0.0, 0.0)
        assert gap.p_original == gap.p_scrubbed < 0.05

    def test_it_is_printed_as_a_short_table(self) -> None:
        y = torch.zeros(6, dtype=torch.long)
        members = [{"a": outputs(s)} for s in range(2, 8)]
        far = {"a": outputs(0) * 8}
        found = closeness(Categorical(), {"a": y}, far, far, members)
        kl = f"{found.parts['a'].kl_original:.3g}"
        last = str(found).splitlines()[2]
        assert last.count(kl) == 2
        assert "0 (0 to 0)" in last
        assert len(str(found)) < 400

    def test_the_gap_of_two_retrained_models_is_unknown(self) -> None:
        y = torch.zeros(6, dtype=torch.long)
        members = [{"a": outputs(s)} for s in (2, 3)]
        found = closeness(
            Categorical(), {"a": y}, {"a": outputs(0) * 8}, {"a": outputs(1)}, members
        )
        gap = found.parts["a"].gap
        assert gap.closed is None
        assert math.isnan(gap.p_original)
        assert not gap.scrubbed_told_apart
        assert found.to_pandas()["gap_closed"].isna().all()

    def test_refusals(self) -> None:
        y = torch.zeros(6, dtype=torch.long)
        with pytest.raises(DataError, match="at least 2"):
            closeness(
                Categorical(), {"a": y}, {"a": outputs(0)}, {"a": outputs(1)}, [{"a": outputs(2)}]
            )
        with pytest.raises(DataError, match="same samples"):
            mean_kl(Categorical(), outputs(0), outputs(1)[:, :3], y)
        with pytest.raises(NumericalError, match="NaN"):
            mean_kl(Categorical(), outputs(0), outputs(1) * math.nan, y)

    def test_a_reference_for_another_original_is_the_same_as_a_new_one(self) -> None:
        data = TensorDataset(torch.randn(20, 3), torch.randint(0, 4, (20,)))
        nets = [nn.Linear(3, 4) for _ in range(5)]
        shared = Reference(nets[0], nets[2:4], {"forget": data}).of(nets[1])
        assert shared.closeness(nets[4]) == Reference(
            nets[1], nets[2:4], {"forget": data}
        ).closeness(nets[4])
        y, x = data.tensors[1], data.tensors[0]
        each = [{"forget": net(x).detach()} for net in nets]
        assert shared.closeness(nets[4]) == closeness(
            Categorical(), {"forget": y}, each[1], each[4], each[2:4]
        )

    def test_the_summary_is_of_all_originals_together(self) -> None:
        """Sums over the originals, and not the mean of their ratios."""
        y = torch.zeros(6, dtype=torch.long)
        members = [{"a": outputs(s)} for s in range(2, 8)]
        each = [
            closeness(Categorical(), {"a": y}, {"a": outputs(0) * f}, {"a": outputs(1)}, members)
            for f in (16, 20, 24)
        ]
        parts = [e.parts["a"] for e in each]
        summary = summarise(each)["a"]
        assert summary["kl_scrubbed"]["n"] == 3
        assert summary["kl_original"]["mean"] == pytest.approx(
            np.mean([p.kl_original for p in parts])
        )
        closed = sum(p.kl_original - p.kl_scrubbed for p in parts)
        total = sum(p.kl_original - p.floor for p in parts)
        assert summary["gap"]["closed"]["value"] == pytest.approx(closed / total)
