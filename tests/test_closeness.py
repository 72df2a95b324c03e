"""Scores against retrained models: hand-computed values, identities, and refusals."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.special import log_softmax, rel_entr
from torch import nn
from torch.utils.data import TensorDataset

from fisher_forget import Categorical, ConfigError, DataError, NumericalError, Reference, forget, sweep
from fisher_forget.evaluate.closeness import closeness, gap_closed, mean_kl, summarise


def outputs(seed: int, n: int = 6) -> torch.Tensor:
    return torch.randn(n, 4, generator=torch.Generator().manual_seed(seed))


class TestEvaluate:
    def test_equals_scipy_number_by_number(self) -> None:
        y = torch.randint(0, 4, (6,), generator=torch.Generator().manual_seed(9))
        original, scrubbed, members = outputs(0), outputs(1), [outputs(s) for s in (2, 3, 4)]
        found = closeness(
            Categorical(), {"forget": y}, {"forget": original}, {"forget": scrubbed}, [{"forget": m} for m in members]
        ).parts["forget"]

        def kl(a: torch.Tensor, b: torch.Tensor) -> float:
            p, q = (np.exp(log_softmax(t.double().numpy(), axis=1)) for t in (a, b))
            return float(rel_entr(p, q).sum(1).mean())

        to_scrubbed = [kl(m, scrubbed) for m in members]
        floors = [np.mean([kl(a, b) for b in members if b is not a]) for a in members]
        assert found.kl_scrubbed == pytest.approx(np.mean(to_scrubbed))
        assert found.kl_scrubbed_std == pytest.approx(np.std(to_scrubbed, ddof=1))
        assert found.floor == pytest.approx(np.mean(floors))
        assert found.floor_std == pytest.approx(np.std(floors, ddof=1))
        assert found.score_scrubbed == pytest.approx(float((scrubbed.argmax(1) == y).double().mean()))
        assert found.score_retrained == pytest.approx(
            np.mean([float((m.argmax(1) == y).double().mean()) for m in members])
        )

    def test_a_retrained_model_scores_the_floor_and_the_original_zero(self) -> None:
        y = torch.zeros(6, dtype=torch.long)
        members = [outputs(s) for s in range(2, 8)]
        far = outputs(0) * 8
        held_out = closeness(Categorical(), {"a": y}, {"a": far}, {"a": far}, [{"a": m} for m in members]).parts["a"]
        assert held_out.gap_closed == pytest.approx(0.0)
        assert gap_closed(12.0, 0.5, 0.5, 0.1) == pytest.approx(1.0)
        assert gap_closed(12.0, 0.25, 0.5, 0.1) > 1.0

    def test_the_gap_is_undefined_within_the_spread_of_the_floor(self) -> None:
        assert gap_closed(0.55, 0.1, 0.5, 0.1) is None
        assert gap_closed(math.nan, 0.1, 0.5, 0.1) is None
        assert gap_closed(0.61, 0.1, 0.5, 0.1) is not None

    def test_refusals(self) -> None:
        y = torch.zeros(6, dtype=torch.long)
        with pytest.raises(DataError, match="at least 2"):
            closeness(Categorical(), {"a": y}, {"a": outputs(0)}, {"a": outputs(1)}, [{"a": outputs(2)}])
        with pytest.raises(DataError, match="same samples"):
            mean_kl(Categorical(), outputs(0), outputs(1)[:, :3], y)
        with pytest.raises(NumericalError, match="NaN"):
            mean_kl(Categorical(), outputs(0), outputs(1) * math.nan, y)

    def test_summary_leaves_undefined_gaps_out(self) -> None:
        y = torch.zeros(6, dtype=torch.long)
        members = [{"a": outputs(s)} for s in (2, 3, 4)]
        far = closeness(Categorical(), {"a": y}, {"a": outputs(0) * 20}, {"a": outputs(1)}, members)
        near = closeness(Categorical(), {"a": y}, members[0], {"a": outputs(1)}, members)
        assert near.parts["a"].gap_closed is None
        summary = summarise([far, near])["a"]
        assert summary["gap_closed"]["n"] == 1
        assert summary["kl_scrubbed"]["n"] == 2
        assert summary["kl_scrubbed"]["mean"] == pytest.approx(far.parts["a"].kl_scrubbed)


class TestSweep:
    def setting(self) -> tuple[nn.Module, TensorDataset, Reference]:
        g = torch.Generator().manual_seed(0)
        data = TensorDataset(torch.randn(50, 3, generator=g), torch.randint(0, 3, (50,), generator=g))
        models = []
        for seed in range(4):
            torch.manual_seed(seed)
            models.append(nn.Linear(3, 3).eval())
        parts = {"forget": torch.utils.data.Subset(data, [0, 1]), "retain": data, "test": data}
        return models[0], data, Reference(models[0], models[1:], parts)

    def test_rows_and_marks(self) -> None:
        model, data, reference = self.setting()
        result = forget(model, data, [0, 1], drift=True, budget=0.1, noise=None, progress=False)
        table = sweep(result, reference, [0.0, 0.1, 10.0], seeds=range(2), progress=False)
        frame = table.to_pandas()
        assert len(frame) == 6
        quiet = frame[frame.scale == 0]
        assert (quiet.kl_forget == table.marks["newton"]["kl_forget"]).all()
        kl = frame.groupby("scale").kl_retain.mean()
        assert kl[10.0] > kl[0.1]  # more noise, farther away
        assert table.marks["original"]["kl_forget"] == pytest.approx(
            reference.closeness(model).parts["forget"].kl_original
        )
        again = sweep(result, reference, [0.0, 0.1, 10.0], seeds=range(2), progress=False)
        assert again.to_pandas().equals(frame)

    def test_losses_and_information(self) -> None:
        model, data, reference = self.setting()
        result = forget(model, data, [0, 1], drift=True, budget=0.1, noise=None, progress=False)
        x, y = data.tensors
        frame = sweep(result, reference, [0.1, 0.2], seeds=[3], exponents=[0.5, 0.25], progress=False).to_pandas()
        for row in frame.to_dict("records"):
            noisy = result.with_noise(row["scale"], seed=3, exponent=row["exponent"])
            loss = nn.functional.cross_entropy(noisy(x), y)
            assert row["loss_retain"] == row["loss_test"] == pytest.approx(loss.item())
            assert row["loss_forget"] == pytest.approx(nn.functional.cross_entropy(noisy(x[:2]), y[:2]).item())
            assert row["information"] == pytest.approx(result.information(row["scale"], exponent=row["exponent"]))
        once, twice = (
            sweep(result, reference, [0.1, 0.0], seeds=[3], error=error, progress=False) for error in (0.3, 0.6)
        )
        assert twice.rows[0]["information"] == pytest.approx(4 * once.rows[0]["information"])
        assert once.rows[1]["information"] == float("inf")
        members = [float(-r["retain"].double().log_softmax(-1)[range(50), y].mean()) for r in reference.retrained]
        assert once.marks["retrained"]["loss_retain"] == pytest.approx(np.mean(members))
        assert once.marks["retrained_std"]["loss_retain"] == pytest.approx(np.std(members, ddof=1))
        assert once.marks["original"]["loss_retain"] == pytest.approx(nn.functional.cross_entropy(model(x), y).item())
        assert once.marks["newton"]["loss_test"] == pytest.approx(once.rows[1]["loss_test"])

    def test_frontier(self) -> None:
        model, data, reference = self.setting()
        result = forget(model, data, [0, 1], drift=True, budget=0.1, noise=None, progress=False)
        scales, exponents = [0.2, 0.1], [0.5, 0.25]
        table = sweep(result, reference, scales, seeds=range(4), exponents=exponents, progress=False)
        rows, frontier = table.to_pandas(), table.frontier()
        keys = list(zip(frontier["exponent"], frontier["scale"], strict=True))
        assert keys == [(p, s) for p in sorted(exponents) for s in sorted(scales)]
        assert (frontier["draws"] == 4).all()
        measured = [f"{kind}_{part}" for kind in ("kl", "score", "loss") for part in ("forget", "retain", "test")]
        assert {*frontier} == {"exponent", "scale", "draws", "information"} | {
            f"{name}{end}" for name in measured for end in ("", "_low", "_high")
        }
        for entry in frontier.to_dict("records"):
            draws = rows[(rows["exponent"] == entry["exponent"]) & (rows["scale"] == entry["scale"])]
            assert entry["information"] == pytest.approx(draws["information"].iloc[0])
            for name in measured:
                values = draws[name].to_numpy()
                assert entry[name] == pytest.approx(values.mean())
                error = values.std(ddof=1) / 2
                band = stats.t.interval(0.95, 3, values.mean(), error) if error else (values.mean(),) * 2
                assert (entry[f"{name}_low"], entry[f"{name}_high"]) == pytest.approx(band)

    def test_frontier_of_single_draws(self) -> None:
        model, data, reference = self.setting()
        result = forget(model, data, [0, 1], drift=True, budget=0.1, noise=None, progress=False)
        table = sweep(result, reference, [0.0, 0.1], seeds=[5], progress=False)
        frontier = table.frontier()
        assert frontier["kl_forget"].tolist() == table.to_pandas()["kl_forget"].tolist()
        assert frontier[["kl_forget_low", "kl_forget_high"]].isna().all(axis=None)
        assert frontier["information"].tolist() == table.to_pandas()["information"].tolist()

    def test_refusals(self) -> None:
        model, data, reference = self.setting()
        result = forget(model, data, [0, 1], drift=True, budget=0.1, noise=None, progress=False)
        with pytest.raises(ConfigError, match="empty grid"):
            sweep(result, reference, [], progress=False)
        without = Reference(model, [model, model], {"forget": data})
        with pytest.raises(ConfigError, match="retain"):
            sweep(result, without, [0.1], progress=False)
