"""Training goes on from a checkpoint as if the forgotten samples had never come."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from fisher_forget import (
    CheckpointKeeper,
    ConfigError,
    NumericalError,
    StorageError,
    TrainSettings,
    build_model,
    resolve_split,
    rewind,
    train,
)
from fisher_forget.experiments.training import resume

FORGET = list(range(30))
SETTINGS = TrainSettings(epochs=8, batch_size=32, lr=0.1, schedule="onecycle")


@pytest.fixture(scope="module")
def blobs() -> TensorDataset:
    """Three overlapping classes; the first samples carry wrong labels."""
    generator = torch.Generator().manual_seed(0)
    targets = torch.arange(240) % 3
    inputs = torch.randn(240, 4, generator=generator)
    inputs[torch.arange(240), targets] += 2
    targets[:30] = (targets[:30] + 1) % 3
    return TensorDataset(inputs, targets)


@pytest.fixture(scope="module")
def trained(blobs, tmp_path_factory):
    """(untrained model, trained model, folder with its checkpoints)."""
    folder = tmp_path_factory.mktemp("kept")
    start = build_model("mlp", (4,), 3, seed=0, hidden=[16])
    keeper = CheckpointKeeper(folder, SETTINGS.total_steps(len(blobs)))
    model = train(start, blobs, SETTINGS, seed=0, progress=False, after_step=keeper.step)
    return start, model, folder


def distance(a: nn.Module, b: nn.Module) -> float:
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return float(sum((p - q).detach().square().sum() for p, q in pairs)) ** 0.5


class TestResume:
    @pytest.mark.parametrize("point", [0.25, 0.5, 0.9])
    def test_ends_where_an_uninterrupted_training_does(self, blobs, point):
        settings = TrainSettings(epochs=5, batch_size=50, momentum=0, schedule="onecycle")
        total, kept, done = settings.total_steps(len(blobs)), {}, iter(range(1, 1000))

        def keep(model):
            kept[next(done)] = {name: x.clone() for name, x in model.state_dict().items()}

        start = build_model("mlp", (4,), 3, seed=1, hidden=[8])
        whole = train(start, blobs, settings, seed=3, progress=False, after_step=keep)
        begun = build_model("mlp", (4,), 3, seed=2, hidden=[8])
        begun.load_state_dict(kept[round(point * total)])
        ended = resume(begun, blobs, settings, point, seed=3, progress=False)
        assert distance(whole, ended) == 0
        assert len(kept) == total

    def test_all_and_nothing(self, blobs):
        start = build_model("mlp", (4,), 3, seed=1, hidden=[8])
        whole = train(start, blobs, SETTINGS, seed=3, progress=False)
        from_zero = resume(start, blobs, SETTINGS, 0, seed=3, progress=False)
        assert distance(whole, from_zero) == 0
        assert distance(resume(start, blobs, SETTINGS, 1, seed=3, progress=False), start) == 0

    @pytest.mark.parametrize("point", [-0.1, 1.1, float("nan"), "half", True])
    def test_points(self, blobs, point):
        with pytest.raises(ConfigError, match="point"):
            resume(build_model("mlp", (4,), 3, seed=1), blobs, SETTINGS, point, seed=0)


class TestRewinding:
    def test_to_the_very_start_is_retraining(self, blobs, trained):
        start, model, _ = trained
        result = rewind(
            model,
            blobs,
            FORGET,
            checkpoints={0: start.state_dict()},
            rest=SETTINGS,
            share=1,
            seed=4,
            progress=False,
        )
        retain = np.arange(30, 240)
        retrained = train(start, blobs, SETTINGS, seed=4, indices=retain, progress=False)
        assert distance(result.model, retrained) == 0
        assert result.newton is None

    def test_the_longer_the_closer(self, blobs):
        """Gradient descent on all samples at once, on a convex loss: w(p) of D and of D_r are the
        farther apart the larger p, and the rest of the training contracts what is between them."""
        settings = TrainSettings(epochs=40, batch_size=1000, momentum=0, schedule="cosine")
        kept, done = {}, iter(range(1, 1000))

        def keep(model):
            kept[next(done) / 40] = {name: x.clone() for name, x in model.state_dict().items()}

        start = build_model("linear", (4,), 3, seed=0)
        model = train(start, blobs, settings, seed=0, progress=False, after_step=keep)
        retain = np.arange(30, 240)
        goal = train(start, blobs, settings, seed=0, indices=retain, progress=False)
        points = {p: kept[p] for p in (0.25, 0.5, 0.75, 0.9)}
        far = [
            distance(
                goal,
                rewind(
                    model,
                    blobs,
                    FORGET,
                    checkpoints=points,
                    rest=settings,
                    share=share,
                    progress=False,
                ).model,
            )
            for share in (0.75, 0.5, 0.25, 0.1)
        ]
        assert sorted(far) == far
        assert far[-1] < distance(goal, model)

    def test_newton_at_the_checkpoint_on_a_quadratic_loss(self):
        """Ridge regression at its minimum: the corrected checkpoint is the retrained one."""
        x = torch.randn(60, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        y = x @ torch.ones(4, 1, dtype=torch.float64) + 0.1 * x[:, :1] ** 2
        wd, n = 0.1, 60

        def ridge(rows):
            a = 2 * x[rows].T @ x[rows] / len(rows) + wd * torch.eye(4, dtype=torch.float64)
            return torch.linalg.solve(a, 2 * x[rows].T @ y[rows] / len(rows)).T

        model = nn.Linear(4, 1, bias=False).double().eval()
        model.load_state_dict({"weight": ridge(list(range(n)))})
        goal = ridge(list(range(10, n)))
        result = rewind(
            model,
            TensorDataset(x, y),
            list(range(10)),
            checkpoints={0.9: model.state_dict()},
            rest=lambda model, retained, point: None,
            likelihood="mse",
            newton=True,
            weight_decay=wd,
            steps=1,
            damping=0.0,
            drift=False,
            progress=False,
        )
        assert (result.model.weight - goal).norm() < 1e-6 * (model.weight - goal).norm()

    def test_closer_than_the_original(self, blobs, trained):
        """KL to retrained models on the forgotten samples."""
        start, model, folder = trained
        retain = np.arange(30, 240)
        goals = [
            train(start, blobs, SETTINGS, seed=s, indices=retain, progress=False) for s in (7, 8)
        ]
        x = blobs.tensors[0][FORGET]

        def far(ended):
            with torch.no_grad():
                q = ended(x).log_softmax(-1)
                logs = [goal(x).log_softmax(-1) for goal in goals]
            return np.mean([float((p.exp() * (p - q)).sum(-1).mean()) for p in logs])

        kl = [
            far(
                rewind(
                    model,
                    blobs,
                    FORGET,
                    checkpoints=folder,
                    rest=SETTINGS,
                    share=share,
                    progress=False,
                ).model
            )
            for share in (0.1, 0.25, 0.5)
        ]
        assert kl[2] < kl[1] < far(model)
        assert kl[2] < 0.3 * far(model)

    def test_nothing_given_changes(self, blobs, trained):
        _, model, folder = trained
        before = {name: x.clone() for name, x in model.state_dict().items()}
        state = torch.get_rng_state()
        rewind(
            model,
            DataLoader(blobs, batch_size=16),
            FORGET,
            checkpoints=folder,
            rest=SETTINGS,
            share=0.1,
            progress=False,
        )
        assert torch.equal(state, torch.get_rng_state())
        assert not model.training
        assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
        assert all(p.grad is None for p in model.parameters())


class TestOwnLoop:
    def test_what_it_is_given(self, blobs, trained):
        _, model, folder = trained
        seen = {}

        def rest(begun, retained, point):
            seen.update(
                training=begun.training, size=len(retained), point=point, draw=torch.rand(1)
            )
            assert isinstance(retained, Dataset)
            with torch.no_grad():
                begun.get_parameter("1.bias").fill_(5.0)

        def result():
            return rewind(
                model,
                blobs,
                FORGET,
                checkpoints=folder,
                rest=rest,
                share=0.3,
                progress=False,
            )

        first, draw = result(), None
        assert seen["training"]
        assert seen["size"] == 210
        assert seen["point"] == 0.75
        assert torch.equal(first.model.get_parameter("1.bias"), torch.full((16,), 5.0))
        assert not first.model.training
        draw = seen["draw"]
        result()
        assert torch.equal(draw, seen["draw"])  # `seed` decides

    @pytest.mark.parametrize("rest", [3, "sgd", None, lambda *_: 3])
    def test_what_it_may_not_be(self, blobs, trained, rest):
        _, model, folder = trained
        with pytest.raises(ConfigError, match="rest"):
            rewind(
                model,
                blobs,
                FORGET,
                checkpoints=folder,
                rest=rest,
                progress=False,
            )

    @pytest.mark.parametrize("change", [copy.deepcopy, torch.compile])
    def test_it_may_return_another_model(self, change):
        """BatchNorm among it, whose mode its training must not fix for good."""
        model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)).eval()
        data = TensorDataset(torch.randn(50, 4), torch.arange(50) % 3)
        result = rewind(
            model,
            data,
            [0],
            checkpoints={0.9: model.state_dict()},
            rest=lambda begun, *_: change(begun),
            progress=False,
        )
        assert not any(m.training for m in result.model.modules())
        assert all(m.training for m in result.model.train().modules())
        assert distance(result.model, model) == 0

    def test_weights_that_are_no_numbers(self, blobs, trained):
        def rest(begun, *_):
            nn.init.constant_(begun.get_parameter("1.bias"), float("nan"))

        _, model, folder = trained
        with pytest.raises(NumericalError, match="from rest"):
            rewind(model, blobs, FORGET, checkpoints=folder, rest=rest, progress=False)


class TestChoice:
    @pytest.mark.parametrize(("share", "rest"), [(0.1, 0.1), (0.2, 0.1), (0.25, 0.25), (1, 0.5)])
    def test_as_much_as_is_paid_for(self, blobs, trained, share, rest):
        _, model, folder = trained
        result = rewind(
            model,
            blobs,
            FORGET,
            checkpoints=folder,
            rest=lambda *_: None,
            share=share,
            progress=False,
        )
        assert result.share == pytest.approx(rest, abs=0.01)
        assert len(result.holding) == 3

    @pytest.mark.parametrize(("share", "said"), [(0.01, "0.5, 0.25, 0.0938"), (0, "share=0")])
    def test_too_little(self, blobs, trained, share, said):
        _, model, folder = trained
        with pytest.raises(ConfigError, match=said):
            rewind(model, blobs, FORGET, checkpoints=folder, rest=SETTINGS, share=share)

    def test_print_says_what_is_still_held(self, blobs, trained):
        _, model, folder = trained
        result = rewind(
            model,
            resolve_split(blobs, FORGET),
            FORGET,
            checkpoints=folder,
            rest=SETTINGS,
            newton=True,
            progress=False,
        )
        text = str(result)
        assert "to 75 % of the training" in text
        assert "3 checkpoints still hold what was forgotten" in text
        assert str(folder) in text
        assert "sub-steps" in text
        assert result.summary()["point"] == 0.75
        assert len(result.summary()["holding"]) == 3

    def test_a_stored_result_holds_nothing_forgotten(self, blobs, trained):
        start, model, _ = trained
        kept = {0.5: {name: torch.full_like(x, 0.123) for name, x in start.state_dict().items()}}

        def rest(begun, *_):
            begun.load_state_dict(start.state_dict())

        result = rewind(
            model, blobs, FORGET, checkpoints=kept, rest=rest, share=0.5, progress=False
        )
        stored = pickle.dumps(result)
        assert kept[0.5]["1.bias"].numpy().tobytes() not in stored
        assert blobs.tensors[0][:4].numpy().tobytes() not in stored
        assert str(pickle.loads(stored)) == str(result)
        assert distance(pickle.loads(stored).model, start) == 0

    def test_checkpoints_of_another_model(self, blobs, trained):
        _, _, folder = trained
        other = build_model("mlp", (4,), 3, seed=0, hidden=[8]).eval()
        with pytest.raises(StorageError, match="differ"):
            rewind(other, blobs, FORGET, checkpoints=folder, rest=SETTINGS, progress=False)

    def test_options_of_noise_are_refused(self, blobs, trained):
        _, model, folder = trained
        with pytest.raises(ConfigError, match="adds no noise"):
            rewind(model, blobs, FORGET, checkpoints=folder, rest=SETTINGS, noise=0.1)
