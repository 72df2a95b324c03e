"""Requests that are chosen to harm, against exact leave-one-out effects; limits that hold them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.linear_model import LogisticRegression
from torch import nn
from torch.utils.data import TensorDataset

from fisher_forget import ConfigError, Ledger, Limits, SplitError, forget, prepare
from fisher_forget.attack import ChosenRequests
from fisher_forget.certify import CertifiedLogistic

DECAY = 1e-2


def blobs(seed: int, n: int) -> TensorDataset:
    """Three classes in a plane that overlap."""
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 3, (n,), generator=g)
    centres = torch.tensor([[-1.0, -1.0], [2.0, 0.0], [0.0, 2.0]])
    return TensorDataset(centres[y] + 1.2 * torch.randn(n, 2, generator=g), y)


def minimum(data: TensorDataset, rows=None) -> nn.Module:
    """Softmax regression at its minimum, by scikit-learn."""
    x, y = (t.numpy() for t in data.tensors)
    rows = np.arange(len(x)) if rows is None else rows
    solver = LogisticRegression(C=1 / (DECAY * len(rows)), fit_intercept=False, tol=1e-10)
    solver.fit(x[rows], y[rows])
    layer = nn.Linear(2, 3, bias=False)
    layer.weight.data = torch.from_numpy(solver.coef_).float()
    return layer.eval()


@pytest.fixture(scope="module")
def world():
    data, unseen = blobs(0, 200), blobs(1, 600)
    target = TensorDataset(*(t[unseen.tensors[1] == 2] for t in unseen.tensors))
    return data, unseen, target, minimum(data)


def loss(model, data):
    x, y = data.tensors
    return float(nn.functional.cross_entropy(model(x), y))


class TestChoice:
    def test_harm_is_that_of_leaving_one_out(self, world):
        """The chosen ones are those whose absence, trained without them one by one, does most."""
        data, _, target, model = world
        chosen = ChosenRequests("harm", 15).choose(
            model, data, range(60), target, weight_decay=DECAY
        )
        whole = loss(model, target)
        rise = [
            loss(minimum(data, np.delete(np.arange(200), i)), target) - whole for i in range(60)
        ]
        best = np.argsort(rise)[-15:]
        assert len(np.intersect1d(chosen, best)) >= 13
        assert stats.spearmanr(rise, np.isin(np.arange(60), chosen)).statistic > 0.6

    def test_only_what_is_owned(self, world):
        data, _, target, model = world
        owned = np.arange(50, 90)
        for aim in ("harm", "step", "random"):
            chosen = ChosenRequests(aim, 12).choose(model, data, owned, target, weight_decay=DECAY)
            assert len(np.unique(chosen)) == 12
            assert np.isin(chosen, owned).all()
            again = ChosenRequests(aim, 12).choose(model, data, owned, target, weight_decay=DECAY)
            assert (chosen == again).all()

    @pytest.mark.parametrize("change", [{"aim": "most"}, {"count": 0}, {"seed": -1}])
    def test_options(self, change):
        with pytest.raises(ConfigError, match="expected"):
            ChosenRequests(**change)

    def test_bad_input(self, world):
        data, _, _, model = world
        with pytest.raises(SplitError, match="3 samples owned, 5"):
            ChosenRequests("random", 5).choose(model, data, [1, 2, 3])
        with pytest.raises(ConfigError, match="no target"):
            ChosenRequests("harm", 2).choose(model, data, range(9))
        with pytest.raises(SplitError):
            ChosenRequests("random", 1).choose(model, data, [200])


class TestDamage:
    def test_more_than_by_chance_and_as_much_as_by_retraining(self, world):
        """At a minimum the correction does what retraining does, to the attacked class as well."""
        data, unseen, target, model = world

        def run(aim):
            return ChosenRequests(aim, 40, seed=1).run(
                model,
                data,
                range(120),
                unseen,
                target=target,
                forget_fn=lambda m, split: forget(
                    m, split, split.forget, weight_decay=DECAY, noise=None, progress=False
                ),
                retrain_fn=lambda rows: minimum(data, rows),
            )

        def fall(harm):
            return next(g.loss[1] - g.loss[0] for g in harm.groups if g.name == "2")

        chosen, chance = run("harm"), run("random")
        assert fall(chosen.harm) > 3 * abs(fall(chance.harm))
        assert fall(chosen.harm) == pytest.approx(fall(chosen.retrained), rel=0.25)
        assert "'2'" in chosen.refused
        assert "refuses it" in str(chosen)
        assert chosen.to_dict()["chosen"] == chosen.chosen.tolist()


class TestEach:
    """What one requester may ask for in all."""

    def test_of_a_prepared_model(self, world, tmp_path):
        data, _, _, model = world
        options = {"weight_decay": DECAY, "progress": False, "folder": tmp_path}
        prepared = prepare(model, data, limits=Limits(each=0.05), **options)
        prepared.forget(range(6), who="a")
        prepared.forget(range(4, 10), who="a")  # ten of 200 by now
        before = len(Ledger(tmp_path).entries)
        with pytest.raises(ConfigError, match="11 samples asked for by 'a'"):
            prepared.forget([10], who="a")
        assert len(Ledger(tmp_path).entries) == before
        assert 10 not in prepared.forget([11], who="b").split.forget
        with pytest.raises(ConfigError, match="without `who`"):
            prepared.forget([12])
        again = prepare(model, data, limits=Limits(each=0.05), **options)
        with pytest.raises(ConfigError, match="'a'"):  # a restart forgets nothing
            again.forget([13], who="a")
        prepare(model, data, **options).forget([13], who="a")

    def test_of_a_certified_one(self, world, tmp_path):
        data = world[0]
        x, y = data.tensors[0], data.tensors[1]
        model = CertifiedLogistic(0.01, ledger=Ledger(tmp_path), each=0.01).fit(x, y)
        model.remove([0, 1], who="a")
        model.remove([2], who="b")
        with pytest.raises(ConfigError, match="3 samples asked for by 'a'"):
            model.remove([3], who="a")
        assert bool(model.kept[3])

    def test_bad_input(self, world):
        data, _, _, model = world
        for share in (0, 1.5, float("nan")):
            with pytest.raises(ConfigError, match="each"):
                Limits(each=share)
        with pytest.raises(ConfigError, match="folder"):
            prepare(model, data, limits=Limits(each=0.1), progress=False)
        with pytest.raises(ConfigError, match="ledger"):
            CertifiedLogistic(each=0.1)
