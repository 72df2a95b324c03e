"""The audit: controls where nothing and everything must be found, scikit-learn's AUC, what is
skipped and why, and the command on a run."""

from __future__ import annotations

import copy
import json
import re

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from torch import nn
from torch.utils.data import Subset, TensorDataset

from fisher_forget import (
    Categorical,
    ConfigError,
    DataError,
    Ledger,
    ModelError,
    audit,
    build_model,
    forget,
    load_dataset,
    resolve_split,
    train,
)
from fisher_forget.attack import Finding, MembershipInference, Pair
from fisher_forget.attack.asked import _matched
from fisher_forget.attack.findings import TONES
from fisher_forget.cli import EXIT_FOUND, main
from fisher_forget.data.samples import take
from fisher_forget.evaluate.intervals import Interval
from fisher_forget.evaluate.roc import share_interval
from fisher_forget.experiments.training import TrainSettings

SETTINGS = TrainSettings(epochs=15, lr=0.05, weight_decay=5e-4)


@pytest.fixture(scope="module")
def world():
    """An original, four retrained models, and who was deleted."""
    digits = load_dataset("digits")
    data, test = digits.train, digits.test
    gone = np.sort(np.random.default_rng(0).permutation(len(data))[:80])
    kept = np.setdiff1d(np.arange(len(data)), gone)

    def trained(seed, rows=None):
        model = build_model("mlp", data.tensors[0].shape[1:], 10, seed=seed, hidden=[32])
        return train(model, data, SETTINGS, seed=seed, indices=rows, progress=False)

    return {
        "data": data,
        "test": test,
        "split": resolve_split(data, gone),
        "model": trained(0),
        "retrained": [trained(10 + i, kept) for i in range(5)],
    }


def audited(world, after, **options):
    given = {"retrained": world["retrained"][:4], "unseen": world["test"], "progress": False}
    return audit(after, world["model"], **({"split": world["split"]} | given | options))


def verdicts(found):
    return {f.attack: f.verdict for f in found.findings}


class TestControls:
    def test_nothing_in_a_retrained_model(self, world):
        """Six attacks, two-sided at 5 % each against four models: the seeds are fixed."""
        found = audited(world, world["retrained"][4])
        assert len(found.findings) == 11
        assert not found.wrong, str(found)
        assert found.answer.startswith("None of 11 attacks finds more")

    def test_everything_in_a_model_that_learned_the_opposite(self, world):
        x, y = world["data"].tensors
        gone = torch.from_numpy(world["split"].forget)
        wrong = TensorDataset(x, y.index_copy(0, gone, (y[gone] + 1) % 10))
        settings = TrainSettings(epochs=80, lr=0.05)
        after = train(world["model"], wrong, settings, seed=0, progress=False)
        says = verdicts(audited(world, after))
        assert says["deletion inference (loss)"] == "more than after retraining"
        assert says["membership inference"] == "the other way round"

    def test_harm_to_others(self, world):
        """Half of the answers are exchanged."""
        x, y = world["data"].tensors
        swapped = TensorDataset(x, torch.where(y < 5, 4 - y, y))
        after = train(world["model"], swapped, SETTINGS, seed=0, progress=False)
        found = audited(world, after)
        assert verdicts(found)["harm by group"] == "more than after retraining"
        worst = found.harm[0].worst.name
        assert worst in "0134"
        assert f"'{worst}' lost most" in str(found)

    def test_who_is_still_known(self, world):
        """Wrong labels are known to whom has learned them by heart alone."""
        x, y = world["data"].tensors
        gone = torch.from_numpy(world["split"].forget)
        wrong = TensorDataset(x, y.index_copy(0, gone, (y[gone] + 1) % 10))
        settings = TrainSettings(epochs=80, lr=0.05)
        after = train(world["model"], wrong, settings, seed=0, progress=False)
        split, (new, labels) = resolve_split(wrong, gone), world["test"].tensors
        unseen = TensorDataset(new, (labels + 1) % 10)
        found = audited(world, after, split=split, unseen=unseen)
        assert verdicts(found)["membership inference"] == "more than after retraining"
        assert "membership inference: more" in found.answer

    def test_a_model_of_all_samples(self, world):
        """Trained on the wrong labels, too, with new weights."""
        x, y = world["data"].tensors
        gone = torch.from_numpy(world["split"].forget)
        wrong = TensorDataset(x, y.index_copy(0, gone, (y[gone] + 1) % 10))
        fresh = build_model("mlp", x.shape[1:], 10, seed=9, hidden=[32])
        settings = TrainSettings(epochs=120, lr=0.05)
        after = train(fresh, wrong, settings, seed=9, progress=False)
        found = audited(world, after, split=resolve_split(wrong, gone))
        assert verdicts(found)["still known"] == "more than after retraining"
        assert found.wrong

    def test_without_a_yardstick_nobody_knows(self, world):
        found = audited(world, world["retrained"][4], retrained=())
        assert set(verdicts(found).values()) <= {"found", "nothing found", "cannot tell"}
        assert "is not known" in found.answer
        later = [name for name in found.skipped if "after release" in name]
        assert len(later) == 4
        assert "retrained" in found.skipped["still known"]
        assert all("retrained" in found.skipped[name] for name in later)


class TestNumbers:
    def test_membership_is_the_auc_of_losses(self, world):
        deleted, unseen = take(world["data"], world["split"].forget), world["test"]
        after = world["retrained"][0]
        pair = Pair(world["model"], after, deleted, unseen)
        losses = [
            nn.functional.cross_entropy(after(x.tensors[0]), x.tensors[1], reduction="none")
            for x in (deleted, unseen)
        ]
        truth = np.repeat([1, 0], [len(deleted), len(unseen)])
        expected = roc_auc_score(truth, -torch.cat(losses).detach().numpy())
        assert MembershipInference().run(pair).found.value == pytest.approx(expected, abs=1e-6)

    def test_sides_have_as_many_of_each_class(self):
        g = torch.Generator().manual_seed(0)
        sets = [
            TensorDataset(torch.randn(n, 2, generator=g), torch.randint(0, c, (n,), generator=g))
            for n, c in ((200, 3), (90, 6))
        ]
        kind = Categorical()
        sides = _matched(*sets, kind, np.random.default_rng(0))
        counts = [np.bincount(side.tensors[1], minlength=3) for side in sides]
        both = [np.bincount(x.tensors[1], minlength=6)[:3] for x in sets]
        assert counts[0].tolist() == counts[1].tolist() == np.minimum(*both).tolist()
        away = TensorDataset(sets[0].tensors[0], sets[0].tensors[1] + 10)
        assert _matched(away, sets[1], kind, np.random.default_rng(0)) is None

    def test_several_seeds_are_means(self, world):
        afters, model = world["retrained"][3:], world["model"]
        options = {"unseen": world["test"], "split": world["split"], "progress": False}
        both = audit(afters, [model, model], **options)
        one, two = (audit(after, model, **options) for after in afters)
        for joint, a, b in zip(both.findings, one.findings, two.findings, strict=True):
            if joint.attack == "harm by group":  # the worst group may be another
                continue
            for end in ("value", "low", "high"):
                mean = (getattr(a.found, end) + getattr(b.found, end)) / 2
                assert getattr(joint.found, end) == pytest.approx(mean)

    def test_the_same_twice(self, world):
        first, second = (audited(world, world["retrained"][4]).to_dict() for _ in range(2))
        assert json.dumps(first) == json.dumps(second)

    def test_given_models_stay(self, world):
        before = {k: v.clone() for k, v in world["model"].state_dict().items()}
        audited(world, world["retrained"][4])
        assert all(torch.equal(v, before[k]) for k, v in world["model"].state_dict().items())

    def test_harm_is_told_from_the_worst_of_many_classes(self, world):
        """A model trained on the same samples with another seed harms nobody: of 30 pairs of halves
        of the unseen samples, at most four are called more than nothing (5 % each, 1 in 1,000)."""
        x, y = world["test"].tensors
        rng, found = np.random.default_rng(0), 0
        for _ in range(30):
            rows = rng.permutation(len(x))[:180]
            part = TensorDataset(x[rows], y[rows])
            says = audited(world, world["retrained"][4], unseen=part, retrained=())
            found += verdicts(says)["harm by group"] == "found"
        assert found <= 4

    def test_binary_targets_are_classes(self):
        """Floats of 0 and 1, as of BCE: deleted samples and their partners are of one class."""
        g = torch.Generator().manual_seed(0)
        x = torch.randn(300, 4, generator=g)
        y = (x[:, :1] > 0).float()
        data, new = TensorDataset(x[:200], y[:200]), TensorDataset(x[200:], y[200:])
        gone = np.flatnonzero(y[:200, 0] == 1)[:40]
        first, second = (nn.Linear(4, 1).eval() for _ in range(2))
        with torch.no_grad():
            second.weight.copy_(first.weight)
            second.bias.copy_(first.bias - 0.3)  # moves one class only
        found = audit(
            second,
            first,
            unseen=new,
            split=resolve_split(data, gone),
            likelihood="bernoulli",
            progress=False,
        )
        says = verdicts(found)
        assert says["deletion inference (loss)"] in ("nothing found", "cannot tell")
        assert len(found.harm[0].groups) == 2


class TestVerdict:
    @pytest.mark.parametrize(
        ("found", "retrained", "verdict"),
        [
            ((0.5, 0.4, 0.6), None, "nothing found"),
            ((0.5, 0.2, 0.8), None, "cannot tell"),
            ((0.7, 0.6, 0.8), None, "found"),
            ((0.7, 0.6, 0.8), (0.7, 0.6, 0.8), "as after retraining"),
            ((0.7, 0.6, 0.8), (0.9, 0.85, 0.95), "less than after retraining"),
            ((0.9, 0.8, 1.0), (0.6, 0.5, 0.7), "more than after retraining"),
            ((0.2, 0.1, 0.3), (0.5, 0.4, 0.6), "the other way round"),
            ((0.2, 0.1, 0.3), (0.2, 0.1, 0.3), "as after retraining"),
            ((0.2, 0.1, 0.3), (0.0, 0.0, 0.05), "less than after retraining"),
            ((0.3, 0.05, 0.62), None, "cannot tell"),
            ((0.5012, 0.501, 0.502), None, "nothing found"),
        ],
    )
    def test_of_an_auc(self, found, retrained, verdict):
        exact = None if retrained is None else Interval(*retrained)
        finding = Finding("a", "AUC", Interval(*found), 0.5, exact, 10, "someone tells with")
        assert finding.verdict == verdict
        assert verdict in TONES

    def test_a_limit_comes_first(self):
        drop = Interval(0.03, 0.01, 0.2)
        finding = Finding("h", "fall", drop, 0.0, drop, 9, "of", limit=0.02)
        assert finding.verdict == "beyond the limit"
        assert Finding("h", "fall", drop, 0.0, drop, 9, "of", limit=0.03).verdict != finding.verdict
        chance = Interval(0.03, -0.02, 0.08)  # two answers of sixty
        finding = Finding("h", "fall", chance, 0.0, drop, 10, "of", limit=0.02)
        assert finding.verdict == "cannot tell"

    def test_differences_have_their_false_alarm_rate(self):
        """Two numbers of 100 independent pairs each, of the same truth: 5 % at most are told apart
        (two-sided). 2,000 draws: 6.5 % would be seen in one of 1,000 runs."""
        rng = np.random.default_rng(0)
        shares = rng.binomial(100, 0.6, (2000, 2)) / 100
        told = [
            Finding("a", "AUC", share_interval(a, 100), 0.5, share_interval(b, 100), 100, "of")
            for a, b in shares
        ]
        assert np.mean([f.against_retraining != "as much" for f in told]) < 0.065


class TestOtherModels:
    def test_regression(self):
        g = torch.Generator().manual_seed(0)
        x = torch.randn(300, 4, generator=g)
        y = x @ torch.randn(4, 1, generator=g) + 0.3 * torch.randn(300, 1, generator=g)
        data, new = TensorDataset(x[:200], y[:200]), TensorDataset(x[200:], y[200:])
        net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        settings = TrainSettings(epochs=20, lr=0.05)
        model = train(net, data, settings, seed=0, likelihood="gaussian", progress=False)
        result = forget(
            model, data, range(20), likelihood="gaussian", weight_decay=1e-3, progress=False
        )
        found = audit(result, model, unseen=new, progress=False)
        assert "groups" in found.skipped["harm by group"]
        assert {f.measure for f in found.findings} >= {"AUC", "cosine"}
        halves = audit(
            result, model, unseen=new, groups=["a"] * 50 + ["b"] * 50, limit=9.0, progress=False
        )
        assert len(halves.harm[0].groups) == 2

    def test_inputs_by_name_and_no_linear_layer(self):
        class Bag(nn.Module):
            def __init__(self):
                super().__init__()
                self.table = nn.Embedding(12, 3)

            def forward(self, tokens):
                return self.table(tokens).mean(1)

        g = torch.Generator().manual_seed(0)
        tokens = torch.randint(0, 12, (160, 5), generator=g)
        labels = (tokens.sum(1) % 3).tolist()
        rows = [{"tokens": t, "labels": y} for t, y in zip(tokens, labels, strict=True)]
        trained = [Bag().eval() for _ in range(2)]
        split = resolve_split(rows[:100], range(15))
        found = audit(trained[1], trained[0], split=split, unseen=rows[100:], progress=False)
        assert "Linear" in found.skipped["inversion of the step"]
        assert "membership inference" in verdicts(found)

    def test_a_class_that_nobody_has_left(self, world):
        data, test = world["data"], world["test"]
        split = resolve_split(data, np.flatnonzero(data.tensors[1] == 3))
        others = take(test, np.flatnonzero(test.tensors[1] != 3))
        found = audit(
            world["retrained"][0], world["model"], unseen=others, split=split, progress=False
        )
        assert "unseen" in found.skipped["membership inference"]
        assert len(found.harm[0].groups) == 9

    def test_functions(self, world):
        """Such as predict_proba of scikit-learn: what needs weights is named."""
        x, y = (t.numpy() for t in world["data"].tensors)
        flat, kept = x.reshape(len(x), -1), world["split"].retain
        answers = [
            LogisticRegression(C=0.1, max_iter=500).fit(flat[rows], y[rows])
            for rows in (np.arange(len(x)), kept)
        ]
        before, after = (lambda z, m=m: m.predict_proba(z.reshape(len(z), -1)) for m in answers)
        found = audit(after, before, unseen=world["test"], split=world["split"], progress=False)
        assert verdicts(found)["deletion inference (loss)"] == "found"
        assert "function" in found.skipped["inversion of the step"]
        assert "modules" in found.skipped["harm by group"]

    def test_a_module_that_holds_another_one(self, world):
        class Wrapped(nn.Module):
            def __init__(self, model):
                super().__init__()
                self.model = model

            def forward(self, x):
                return self.model(x)

        before, after = (Wrapped(m) for m in (world["model"], world["retrained"][4]))
        options = {"unseen": world["test"], "split": world["split"], "progress": False}
        plain = audit(world["retrained"][4], world["model"], **options)
        assert audit(after, before, **options).findings[0].found == plain.findings[0].found

    def test_groups_are_of_all_unseen_samples(self, world):
        """Also where some of them are training samples, too."""
        mixed = [*world["test"], *take(world["data"], range(40))]
        names = ["old"] * len(world["test"]) + ["new"] * 40
        order = np.random.default_rng(0).permutation(len(mixed))
        found = audited(world, world["retrained"][4], unseen=mixed, groups=names)
        assert {g.name: g.samples for g in found.harm[0].groups} == {
            "old": len(world["test"]),
            "new": 40,
        }
        part = Subset(mixed, order.tolist())
        again = audited(world, world["retrained"][4], unseen=part, groups=[names[i] for i in order])
        drops = [{g.name: g.drop.value for g in x.harm[0].groups} for x in (found, again)]
        assert drops[0] == pytest.approx(drops[1])


class TestErrors:
    def test_training_samples_as_unseen_ones(self, world):
        with pytest.raises(DataError, match="training samples"):
            audit(world["retrained"][0], world["model"], unseen=world["data"], split=world["split"])

    def test_some_of_them_are_left_out(self, world):
        mixed = [*world["test"], *take(world["data"], range(40))]
        found = audited(world, world["retrained"][4])
        again = audited(world, world["retrained"][4], unseen=mixed)
        assert sum(g.samples for g in again.harm[0].groups) == sum(
            g.samples for g in found.harm[0].groups
        )

    def test_who_was_deleted_must_be_told(self, world):
        with pytest.raises(DataError, match="who was deleted"):
            audit(world["retrained"][0], world["model"], unseen=world["test"])
        nobody = resolve_split(world["data"], [], allow_empty=True)
        with pytest.raises(DataError, match="nobody was forgotten"):
            audited(world, world["retrained"][0], split=nobody)

    def test_a_yardstick_that_is_no_other_model(self, world):
        after = world["retrained"][4]
        for retrained in ([after] * 3, [copy.deepcopy(after), world["retrained"][0]]):
            with pytest.raises(ModelError, match="the same model twice"):
                audited(world, after, retrained=retrained)

    def test_different_deletions(self, world):
        data, model = world["data"], world["model"]
        options = {"weight_decay": 5e-4, "progress": False}
        results = [forget(model, data, rows, **options) for rows in (range(30), range(30, 60))]
        with pytest.raises(ConfigError, match="different deletions"):
            audit(results, [model, model], unseen=world["test"])

    def test_the_same_result_twice(self, world):
        after = world["retrained"][4]
        with pytest.raises(ModelError, match="the same model twice"):
            audit([after, after], [world["model"]] * 2, unseen=world["test"], split=world["split"])

    def test_few_unseen_samples(self, world):
        with pytest.raises(DataError, match="at least 20"):
            audited(world, world["retrained"][4], unseen=take(world["test"], range(10)))

    def test_the_same_model(self, world):
        with pytest.raises(ModelError, match="same model"):
            audited(world, world["model"])

    @pytest.mark.parametrize("options", [{"limit": -1}, {"limit": float("nan")}, {"seed": -1}])
    def test_options(self, world, options):
        with pytest.raises(ConfigError, match="at least 0"):
            audited(world, world["retrained"][4], **options)

    def test_an_unknown_option(self, world):
        with pytest.raises(ConfigError, match="limits"):
            audited(world, world["retrained"][4], limits=1)

    def test_numbers_of_models(self, world):
        with pytest.raises(ConfigError, match="2 results of 1 models"):
            audited(world, world["retrained"][:2])


class TestRecord:
    def test_into_a_ledger(self, world, tmp_path):
        found = audited(world, world["retrained"][4])
        found.record(tmp_path, request="r-1")
        entry = Ledger(tmp_path).entries[-1]
        assert entry.event == "audited"
        assert entry.details["answer"] == found.answer
        assert entry.details["request"] == "r-1"

    def test_both_versions(self, world):
        """Without noise the result says what must not be published together."""
        gone = world["split"].forget
        options = {"weight_decay": 5e-4, "progress": False}
        bare = forget(world["model"], world["data"], gone, noise=None, **options)
        assert bare.newton.accepted
        assert "publish    not beside the given model" in str(bare)
        assert "publish" not in str(forget(world["model"], world["data"], gone, **options))


class TestCommand:
    RECIPE = """
name: small
data: {name: digits}
model: {name: mlp, options: {hidden: [32]}}
training: {epochs: 4, batch_size: 64, lr: 0.05}
forget_sets: [{name: class 3, kind: class, label: 3, who: ticket 7}]
seeds: [0]
retrained: 3
jobs: 1
progress: false
noise_seed: 0
"""

    @pytest.fixture(scope="class")
    @classmethod
    def place(cls, tmp_path_factory):
        place = tmp_path_factory.mktemp("audited")
        (place / "small.yaml").write_text(cls.RECIPE)
        return place

    def test_on_a_run(self, place, monkeypatch, capsys):
        monkeypatch.chdir(place)
        assert main(["audit", "small.yaml"]) == 2
        assert "finished run" in capsys.readouterr().err
        assert main(["run", "small.yaml"]) == 0
        capsys.readouterr()
        code = main(["audit", "runs/small"])
        out = capsys.readouterr().out
        stored = json.loads((place / "runs/small/audit.json").read_text())["class 3"]
        poor = [f for f in stored["findings"] if TONES[f["verdict"]] == "poor"]
        assert code == (EXIT_FOUND if poor else 0)
        assert stored["answer"] in out
        page = (place / "runs/small/report.html").read_text()
        assert "What attacks find" in page
        assert stored["answer"] in page
        assert Ledger(place / "runs/small").entries[-1].event == "audited"
        assert (place / "runs/small/class-3/audit.md").exists()

    def test_beyond_the_limit(self, place, monkeypatch):
        monkeypatch.chdir(place)
        if not (place / "runs/small/metrics.json").exists():
            main(["run", "small.yaml"])
        code = main(["audit", "runs/small", "--limit", "0"])
        stored = json.loads((place / "runs/small/audit.json").read_text())["class 3"]
        (harm,) = (f for f in stored["findings"] if f["attack"] == "harm by group")
        assert harm["found"]["value"] == max(
            g["drop"]["value"] for g in stored["harm"][0]["groups"]
        )
        beyond = harm["found"]["low"] > 0
        assert (harm["verdict"] == "beyond the limit") == beyond
        assert code == EXIT_FOUND or not beyond

    def test_an_old_audit_is_not_shown(self, place, monkeypatch):
        """Of other models than the run has now."""
        monkeypatch.chdir(place)
        path = place / "runs/small/audit.json"
        main(["audit", "runs/small"])
        path.write_text(re.sub(r'"models": \[[^]]*\]', '"models": ["0000"]', path.read_text()))
        assert main(["run", "small.yaml"]) == 0
        assert "What attacks find" not in (place / "runs/small/report.html").read_text()

    def test_its_files_are_known(self, place, monkeypatch, capsys):
        monkeypatch.chdir(place)
        main(["audit", "runs/small"])
        capsys.readouterr()
        main(["artefacts", "runs/small"])
        assert not re.search(r"/audit\.(json|md)", capsys.readouterr().out)
