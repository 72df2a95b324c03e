"""The whole evaluation, on an ensemble of small models that are really trained."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import math
import re
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import torch
from conftest import WEIGHT_DECAY, blobs_data, seeded, small_net
from scipy import stats
from torch import nn
from torch.utils.data import ConcatDataset, TensorDataset

from fisher_forget import ConfigError, DataError, NumericalError, forget
from fisher_forget.data.split import resolve_split
from fisher_forget.evaluate import klom
from fisher_forget.evaluate.conclusion import conclude
from fisher_forget.evaluate.ensemble import Members, RetrainedEnsemble
from fisher_forget.evaluate.evaluation import CONTROL, Evaluation, evaluate
from fisher_forget.evaluate.metric import Context, Subject
from fisher_forget.evaluate.metrics import METRICS
from fisher_forget.evaluate.scoring import EvaluationRow, permutation_test, score_metric
from fisher_forget.evaluate.verdict import AS_RETRAINED, DIFFERENT, UNDECIDED, holm, round_robin
from fisher_forget.experiments.training import TrainSettings, train
from fisher_forget.likelihood import Bernoulli, Categorical, Gaussian
from fisher_forget.report.pages.evaluation import distance, plot_scores, wide, write_page
from fisher_forget.report.schema import evaluation_schema

DATA = blobs_data(240, seed=1)
TEST = blobs_data(150, seed=2)
IDX = np.flatnonzero(DATA.tensors[1].numpy() == 2)
KEEP = np.setdiff1d(np.arange(240), IDX)
PARTS = {
    "forget": TensorDataset(*(t[IDX] for t in DATA.tensors)),
    "retain": TensorDataset(*(t[KEEP] for t in DATA.tensors)),
    "test": TEST,
}
SETTINGS = TrainSettings(epochs=60, batch_size=60, lr=0.3, weight_decay=WEIGHT_DECAY)


def fit(indices, seed) -> nn.Module:
    return train(
        seeded(small_net, int(seed)),
        DATA,
        SETTINGS,
        seed=int(seed),
        indices=indices,
        progress=False,
    )


def scrubbed_of(model):
    return forget(
        model, DATA, IDX, weight_decay=WEIGHT_DECAY, drift=False, noise=None, progress=False
    )


@pytest.fixture(scope="module")
def ensemble() -> RetrainedEnsemble:
    options = {
        "template": seeded(small_net),
        "seeds": range(100, 109),
        "original_seeds": (0, 1, 2),
        "progress": False,
    }
    return RetrainedEnsemble.fit(fit, DATA, IDX, **options)


@pytest.fixture(scope="module")
def table(ensemble) -> Evaluation:
    scrubbed = [scrubbed_of(m) for m in ensemble.originals.models]
    return evaluate(
        scrubbed, ensemble, PARTS, split=resolve_split(DATA, IDX), teacher=seeded(small_net, 77)
    )


class TestTable:
    def test_every_metric_part_and_method_has_a_row(self, table):
        expected = {
            (method, m.name, part)
            for method in ("original", "scrubbed", CONTROL)
            for m in METRICS.values()
            for part in m.parts or PARTS
            if not m.by_name
        }
        assert {(s.method, s.metric, s.part) for s in table.scores} == expected
        assert table.left_out == {}

    def test_the_original_fails_and_the_control_passes(self, table):
        for metric in ("score", "loss"):
            assert table.get(metric, method="original").label == "not forgotten"
        conclusion = table.conclusion("original")
        assert conclusion.label == "not forgotten"
        assert "kl on forget" in str(conclusion)
        control = table.conclusion(CONTROL)
        assert control.label not in DIFFERENT
        assert not control.different
        # of all rows, each by itself at 5 %, a few may fail: they depend on each other
        rows = [s for s in table.scores if s.method == CONTROL]
        assert sum(s.label in DIFFERENT for s in rows) <= 0.2 * len(rows)

    def test_those_that_decide(self, table):
        rows = table.conclusion("scrubbed").rows
        names = [("kl", "forget"), ("kl", "retain"), ("loss", "forget")]
        assert [(s.metric, s.part) for s in rows] == [*names, ("membership_auc", "forget")]
        assert table.conclusion("scrubbed").p_value == min(holm([s.p_value for s in rows]))
        with pytest.raises(ConfigError, match="scrub'"):
            table.conclusion("scrub")

    def test_without_a_row_that_decides_nothing_is_concluded(self, ensemble):
        table = evaluate(ensemble.retrained.models[0], ensemble, PARTS, metrics=["entropy"])
        found = table.conclusion("scrubbed")
        assert found.label == "undecided"
        assert "none of the rows that decide" in str(found)
        jsonschema.validate(json.loads(json.dumps(table.to_dict())), evaluation_schema())

    def test_ranges_are_possible_and_the_same_for_every_method(self, table):
        for name in {(s.metric, s.part) for s in table.scores}:
            rows = [s for s in table.scores if (s.metric, s.part) == name]
            assert len({(str(s.target_low), str(s.target_high)) for s in rows if s.models}) <= 2
            for s in (s for s in rows if math.isfinite(s.target_low)):
                assert s.target_low <= s.target <= s.target_high
                if METRICS[s.metric].scale != "linear":
                    assert min(s.target_low, s.detectable) >= 0
                if s.unit == "%":
                    assert max(s.target_high, s.detectable) <= 100

    def test_marks_follow_from_the_p_values(self, table):
        for s in table.scores:
            assert (s.label in DIFFERENT) == (s.p_value <= 0.05), s

    def test_a_wrapped_model_has_the_weights_of_the_one_within(self, ensemble):
        model = ensemble.originals.models[0]
        for wrapped in (nn.DataParallel(model), torch.compile(model, backend="eager")):
            table = evaluate(wrapped, ensemble, PARTS, metrics=["weight_distance", "kl"])
            plain = evaluate(model, ensemble, PARTS, metrics=["weight_distance", "kl"])
            assert table.to_markdown() == plain.to_markdown()

    def test_a_wrecked_model_is_farther_than_the_original(self, ensemble):
        wrecked = copy.deepcopy(ensemble.originals.models[0])
        for p in wrecked[-1].parameters():
            p.data.mul_(-30)
        distances = [m.name for m in METRICS.values() if m.far and m.group is None]
        table = evaluate(wrecked, ensemble, PARTS, metrics=distances)
        for name in set(distances) - {"step_cosine", "average_gap", "tug_of_war"}:
            part = METRICS[name].parts[0] if METRICS[name].parts else "retain"
            row = table.get(name, part, "scrubbed")
            assert row.label == "farther than the original", name
            assert "and than the original is" in row.reason
        labels = {row.label for row in table.scores if row.method == "scrubbed"}
        assert "over-forgotten" not in labels
        assert "×" in table.to_markdown()

    def test_kl_against_numpy(self, table, ensemble):
        x = DATA.tensors[0][IDX]
        with torch.no_grad():
            members = [m(x).double().softmax(1).numpy() for m in ensemble.retrained.models[:8]]
            own = ensemble.originals.models
            originals = [m(x).double().softmax(1).numpy() for m in own]
        expected = np.mean(
            [[(p * np.log(p / q)).sum(1).mean() for p in members] for q in originals]
        )
        assert table.get("kl", method="original").value == pytest.approx(expected, rel=1e-5)
        pairs = [(p * np.log(p / q)).sum(1).mean() for q in members for p in members if p is not q]
        assert table.get("kl").target == pytest.approx(np.mean(pairs), rel=1e-5)

    def test_accuracy_in_per_cent(self, table, ensemble):
        x, y = TEST.tensors
        expected = np.mean(
            [(m(x).argmax(1) == y).double().mean().item() for m in ensemble.originals.models]
        )
        assert table.get("score", "test", "original").value == pytest.approx(100 * expected)

    def test_each_scrub_is_held_against_its_own_original(self, table, ensemble):
        alone = [
            evaluate(
                scrubbed_of(m),
                dataclasses.replace(ensemble, originals=one),
                PARTS,
                metrics=["step_cosine"],
            )
            for m, one in (
                (m, dataclasses.replace(ensemble.originals, models=(m,)))
                for m in ensemble.originals.models
            )
        ]
        expected = np.mean([a.get("step_cosine", method="scrubbed").value for a in alone])
        assert table.get("step_cosine", method="scrubbed").value == pytest.approx(expected)

    def test_direction_of_no_step_is_undefined_and_its_target_is_not(self, table, ensemble):
        row = table.get("step_cosine", method="original")
        assert row.label == "undefined"
        start = ensemble.originals.models[0]
        steps = [
            np.concatenate(
                [
                    (p - q).detach().numpy().ravel()
                    for p, q in zip(m.parameters(), start.parameters(), strict=True)
                ]
            )
            for m in ensemble.retrained.models[:8]
        ]
        pairs = [a @ b / np.sqrt((a @ a) * (b @ b)) for a, b in itertools.combinations(steps, 2)]
        assert row.target == pytest.approx(np.mean(pairs), rel=1e-5)
        ours = table.get("step_cosine", method="scrubbed")
        assert (row.target, row.target_low, row.target_high) == (
            ours.target,
            ours.target_low,
            ours.target_high,
        )
        assert math.isfinite(table.get("step_cosine", method="scrubbed").value)

    def test_schema(self, table):
        content = json.loads(json.dumps(table.to_dict(), allow_nan=False))
        jsonschema.validate(content, evaluation_schema())
        content["scores"][0].pop("target")
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(content, evaluation_schema())

    def test_readouts(self, table):
        frame = table.to_pandas()
        assert len(frame) == len(table.scores)
        markdown = table.to_markdown()
        assert len(re.findall(r"\n\| kl, nats( \*)? +\|", markdown)) == 3
        assert "not forgotten" in markdown

    def test_several_methods_keep_one_row_each(self, table, ensemble):
        models = ensemble.originals.models
        options = {"split": resolve_split(DATA, IDX), "teacher": seeded(small_net, 77)}
        both = evaluate(
            {"scrubbed": [scrubbed_of(m) for m in models], "b": models}, ensemble, PARTS, **options
        )
        renamed = [s for s in both.scores if s.method == "b"]
        assert len(both.scores) == len(table.scores) + len(renamed)
        same = zip([s for s in both.scores if s.method != "b"], table.scores, strict=True)
        assert all(str(a) == str(b) for a, b in same)  # NaN is not equal to itself
        assert both.get("kl", method="b").value == both.get("kl", method="original").value

    def test_a_row_that_is_not_there(self, table):
        with pytest.raises(ConfigError):
            table.get("nothing")


class TestCosts:
    def test_relearning_only_where_asked_for(self, ensemble):
        model = ensemble.retrained.models[-1]
        found = evaluate(
            model, ensemble, PARTS, split=resolve_split(DATA, IDX), metrics=["relearn"]
        )
        assert {s.metric for s in found.scores} == {"relearn"}
        assert found.get("relearn", method="original").value == 0

    def test_what_is_missing_is_said(self, ensemble):
        found = evaluate(
            ensemble.retrained.models[0],
            ensemble,
            {"forget": PARTS["forget"]},
            metrics=["zrf", "kl"],
        )
        assert list(found.left_out) == ["zrf"]


class TestEnsemble:
    def test_outputs_are_computed_once(self, tmp_path, monkeypatch):
        calls = []
        from fisher_forget.evaluate import ensemble as module

        real = module.predict
        monkeypatch.setattr(module, "predict", lambda *a: calls.append(1) or real(*a))
        options = {
            "template": seeded(small_net),
            "seeds": (100, 101),
            "folder": tmp_path,
            "progress": False,
        }
        first = RetrainedEnsemble.fit(fit, DATA, IDX, **options).outputs(PARTS)
        count = len(calls)
        monkeypatch.setattr(module, "_member", lambda *a, **k: 1 / 0)  # nothing is trained
        again = RetrainedEnsemble.fit(fit, DATA, IDX, **options).outputs(PARTS)
        assert len(calls) == count == 9
        assert all(
            torch.equal(a[p], b[p]) for a, b in zip(first, again, strict=True) for p in PARTS
        )
        RetrainedEnsemble.fit(fit, DATA, IDX, **options).outputs({"test": DATA})
        assert len(calls) > count

    def test_another_forget_set_is_trained_anew(self, tmp_path):
        options = {
            "template": seeded(small_net),
            "seeds": (100,),
            "folder": tmp_path,
            "progress": False,
        }
        RetrainedEnsemble.fit(fit, DATA, IDX, **options)
        with pytest.warns(match="trained anew"):
            other = RetrainedEnsemble.fit(fit, DATA, IDX[:5], **options)
        assert torch.equal(
            other.retrained.models[0][0].weight,
            fit(np.setdiff1d(range(240), IDX[:5]), 100)[0].weight,
        )

    def test_unknown_backend(self):
        with pytest.raises(ConfigError, match="backend"):
            RetrainedEnsemble.fit(
                fit, DATA, IDX, template=small_net(), backend="carrier pigeon", progress=False
            )


class TestBadInput:
    def test_too_few_models(self, ensemble):
        few = dataclasses.replace(
            ensemble,
            retrained=dataclasses.replace(ensemble.retrained, models=ensemble.retrained.models[:3]),
        )
        with pytest.raises(DataError, match="3 retrained"):
            evaluate(few.retrained.models[0], few, PARTS)

    def test_other_labels(self, ensemble):
        with pytest.raises(DataError, match="outputs of shape"):
            evaluate(nn.Linear(4, 4), ensemble, PARTS)

    def test_nan(self, ensemble):
        broken = seeded(small_net)
        nn.init.constant_(broken[0].weight, math.nan)
        with pytest.raises(NumericalError, match="scrubbed"):
            evaluate(broken, ensemble, PARTS)

    def test_another_forget_set(self, ensemble):
        options = {"drift": False, "noise": None, "progress": False, "weight_decay": WEIGHT_DECAY}
        result = forget(ensemble.originals.models[0], DATA, IDX[:5], **options)
        with pytest.raises(DataError, match="forgot 5"):
            evaluate(result, ensemble, PARTS)

    def test_unknown_metric(self, ensemble):
        with pytest.raises(ConfigError, match="klll"):
            evaluate(seeded(small_net), ensemble, PARTS, metrics=["klll"])


class TestPage:
    def test_page_has_every_row(self, table, tmp_path):
        page = write_page("run", {"all of class 2": table}, tmp_path).read_text()
        for metric, part in {(s.metric, s.part) for s in table.scores}:
            assert f">{metric}" in page
            assert f">{part}</td>" in page
        assert "http://" not in page.replace("http://www.w3.org", "")

    def test_wide_table_and_plot(self, table):
        assert len(wide(table)) == len({(s.metric, s.part) for s in table.scores})
        ax = plot_scores(table)
        assert ax.get_xlabel()
        assert len(ax.collections) >= 3
        rows = sum(s.method == "original" and s.label != "undefined" for s in table.scores)
        assert (
            len(ax.collections[0].get_offsets())
            == rows
            == sum(s.method == "original" for s in table.scores) - 1
        )

    def test_distance(self, table):
        score = dataclasses.replace(table.scores[0], distance=2.0)
        assert distance(score) == 2.0
        assert distance(dataclasses.replace(score, distance=-math.inf)) == -30.0

    def test_the_page_says_what_the_table_says(self, table, tmp_path):
        page = write_page("run", {"all": table}, tmp_path).read_text()
        assert str(table.conclusion("scrubbed")) in page.replace("&#39;", "'")
        rows = [s for s in table.scores if s.method == "original" and s.label != "undefined"]
        kept = sum(s.label not in DIFFERENT for s in rows)
        assert f"original {kept} of {len(rows)}" in page
        assert "The control is one more" in page


class TestGroups:
    """Metrics of several models at once."""

    def test_klom_is_that_of_the_margins_and_its_target_that_of_as_many_retrained_models(
        self, ensemble, table
    ):
        originals, retrained, targets = ensemble.outputs(PARTS)
        own, ones = (klom.margins(x["forget"], targets["forget"]) for x in (originals, retrained))
        expected = float(
            klom.klom(own, ones[:5]).mean()
        )  # five, as for the target: eight less three
        score = table.get("klom_mean", method="original")
        assert score.value == pytest.approx(expected)
        assert len(score.values) == 1
        turned = [np.roll(np.arange(8), -i) for i in range(8)]
        target = np.mean([float(klom.klom(ones[i[:3]], ones[i[3:]]).mean()) for i in turned])
        assert score.target == pytest.approx(target)

    def test_an_attacker_tells_originals_and_not_retrained_models(self, table):
        for metric in ("u_lira", "ruli"):
            score = table.get(metric, method="original")
            assert score.value > 95
            assert 30 < score.target < 70

    def test_a_single_model_has_none(self, table):
        score = table.get("klom_p95", method=CONTROL)
        assert score.label == "undefined"
        assert "it takes 3 models" in score.reason

    def test_left_out_where_no_method_has_enough_models(self, ensemble):
        few = RetrainedEnsemble(
            Members(
                *(
                    x[:2]
                    for x in (
                        ensemble.originals.models,
                        ensemble.originals.seeds,
                        ensemble.originals.seconds,
                    )
                )
            ),
            ensemble.retrained,
            ensemble.forget,
        )
        found = evaluate(ensemble.originals.models[0], few, PARTS, metrics=["kl", "klom_mean"])
        assert "it takes 3 models" in found.left_out["klom_mean"]
        assert {s.metric for s in found.scores} == {"kl"}


class TestRoundRobin:
    """Scores of models that were compared with each other, beside those of a further one."""

    def test_effects_are_those_of_least_squares(self):
        rng = np.random.default_rng(0)
        models = 5
        beside = rng.normal(size=(models, models))
        pairs = [(i, j) for i in range(models) for j in range(models) if i != j]
        design = np.zeros((len(pairs) + 2, 2 * models + 1))
        for at, (i, j) in enumerate(pairs):
            design[at, [i, models + j, -1]] = 1
        # effects sum to 0
        design[-2, :models] = design[-1, models:-1] = 1
        numbers = [beside[i, j] for i, j in pairs]
        effects = np.linalg.lstsq(design, np.array([*numbers, 0.0, 0.0]), rcond=None)[0]
        off = ~np.eye(models, dtype=bool)
        means = [
            np.array([x[k] for x, k in zip(d, off, strict=True)]).mean(1)
            for d in (beside, beside.T)
        ]
        found = round_robin(*means)
        assert found - found.mean() == pytest.approx(effects[:models])
        assert found.mean() == pytest.approx(np.mean(numbers))

    @pytest.mark.parametrize("models", [3, 5, 10])
    def test_false_alarms(self, models):
        """Distances between points: a row's own mean alone gives 9 to 13 % at 3 and 5 models."""
        rng = np.random.default_rng(models)
        worlds, plain, robin = 1500, 0, 0
        for _ in range(worlds):
            points = rng.normal(size=(models + 1, 8))
            d = ((points[:, None] - points[None]) ** 2).sum(-1)
            rows = np.log(d[1:, 1:].sum(1) / (models - 1))
            x = math.log(d[0, 1:].mean())
            for kind, r in (("plain", rows), ("robin", round_robin(rows, rows))):
                t = (x - r.mean()) / (r.std(ddof=1) * math.sqrt(1 + 1 / models))
                alarm = abs(t) > stats.t.ppf(0.975, models - 1)
                plain, robin = (
                    plain + (kind == "plain" and alarm),
                    robin + (kind == "robin" and alarm),
                )
        # approximately at its level: at most 1.4 times, with a false-alarm rate of 1e-5
        assert robin <= stats.binom.ppf(1 - 1e-5, worlds, 0.07)
        assert robin < plain


class TestPermutation:
    def test_all_relabellings_by_hand(self):
        ours, others = torch.tensor([[3.0], [5.0], [9.0]]), torch.tensor([[0.0], [1.0], [4.0]])
        found = permutation_test(lambda a, b: float(a.mean() - b.mean()), ours, others, seed=0)
        # 20 ways; {9, 5, 4} beats {9, 5, 3}
        assert (found.p_value, found.relabellings) == (2 / 20, 20)
        assert found.distance < 1
        far = permutation_test(lambda a, b: float(a.mean() - b.mean()), ours + 9, others, seed=0)
        assert far.p_value == 1 / 20
        assert far.distance >= 1

    def test_false_alarms(self):
        """Whatever the statistic and the distribution; false-alarm rate 1e-5."""
        rng, worlds = np.random.default_rng(1), 400
        alarms = 0
        for seed in range(worlds):
            x = torch.from_numpy(rng.standard_cauchy(size=(9, 4)))
            found = permutation_test(lambda a, b: float(a.amax() - b.amax()), x[:3], x[3:], seed)
            alarms += found.p_value <= 0.05
        assert alarms <= stats.binom.ppf(1 - 1e-5, worlds, 0.05)

    def test_what_is_told_perfectly_is_told_by_an_attack_on_pairs(self):
        """Three models far off, of which the attack leaves one out beside each of the others."""
        rng = np.random.default_rng(3)
        ours, others = (
            torch.from_numpy(m + rng.normal(size=(n, 40))) for m, n in ((30, 3), (0, 13))
        )
        for name in ("u_lira", "ruli"):
            found = permutation_test(METRICS[name].group, ours, others, seed=0)
            assert found.p_value <= 0.02, name

    def test_ties_are_no_difference(self):
        same = torch.ones(3, 2)
        found = permutation_test(lambda a, b: float(a.mean() - b.mean()), same, same, seed=0)
        assert (found.p_value, found.distance) == (1.0, 0.0)


class TestByName:
    def test_metrics_that_are_asked_for(self, ensemble):
        names = [
            name for name, metric in METRICS.items() if metric.by_name and "relearn" not in name
        ]
        models = ensemble.originals.models
        table = evaluate(models, ensemble, PARTS, metrics=names)
        assert {s.metric for s in table.scores} == {*names} - {"u_lira_tpr"}
        scores = {
            part: evaluate(models, ensemble, PARTS, metrics=["score"]).get("score", part)
            for part in PARTS
        }
        # the forgotten class is known to the originals and to no retrained model: both composites
        # say so, and so does an attack on the loss
        gaps = [abs(a - b) for s in scores.values() for a, b in [(s.value, s.target)]]
        assert max(gaps) > 50
        assert table.get("tug_of_war").value < 0.5 < table.get("tug_of_war").target
        assert table.get("average_gap").value > 25 > table.get("average_gap").target

    def test_a_rate_that_too_few_samples_show_is_left_out(self, ensemble):
        models = ensemble.originals.models
        few = evaluate(models, ensemble, PARTS, metrics=["u_lira_tpr"])
        why = f"it takes 100 samples of forget data, and there are {len(IDX)}"
        assert few.left_out == {"u_lira_tpr": why}
        assert why in few.to_markdown()
        twice = {"forget": ConcatDataset([PARTS["forget"]] * 2)}
        row = evaluate(models, ensemble, twice, metrics=["u_lira_tpr"]).get("u_lira_tpr")
        assert row.value > row.target
        assert 0 <= row.low <= row.value <= row.high <= 100

    def test_a_methods_row_does_not_depend_on_the_methods_before_it(self, ensemble):
        first, second = copy.deepcopy(ensemble.originals.models[0]), ensemble.retrained.models[1]
        for p in first.parameters():  # a step to nowhere
            p.data.add_(1.0)
        alone, beside = (
            evaluate(methods, ensemble, PARTS, metrics=["step_cosine"]).get(
                "step_cosine", method="b"
            )
            for methods in ({"b": second}, {"a": first, "b": second})
        )
        assert repr(alone) == repr(beside)  # NaN is not equal to itself

    def test_steps_of_relearning(self, ensemble):
        split = resolve_split(DATA, IDX)
        table = evaluate(
            ensemble.originals.models[0], ensemble, PARTS, split=split, metrics=["relearn_steps"]
        )
        assert table.get("relearn_steps").value == 0  # the original knows them already
        assert table.get("relearn_steps").target > 0


@pytest.mark.parametrize(
    ("likelihood", "unit"), [(Categorical(), "%"), (Bernoulli(), "%"), (Gaussian(), "")]
)
def test_the_score_is_in_the_unit_of_its_likelihood(likelihood, unit) -> None:
    outputs = torch.tensor([[2.0, -1.0], [-1.0, 2.0], [2.0, -1.0], [1.0, 2.0]])
    hot = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.0]])
    targets = hot.argmax(1) if isinstance(likelihood, Categorical) else hot
    context = Context(likelihood, likelihood, {"test": targets})
    subject = Subject({"test": outputs}, nn.Identity(), nn.Identity())
    metric = METRICS["score"]
    # 3 of 4 classes are right, 7 of 8 labels; the squared errors are 2, 2, 2 and 4
    expected = {Categorical: 75.0, Bernoulli: 87.5, Gaussian: 2.5}[type(likelihood)]
    assert metric.solo(subject, "test", context) == pytest.approx(expected)
    assert metric.unit_in(context) == unit


class TestDocs:
    def test_every_metric_is_defined(self):
        text = (Path(__file__).parents[1] / "docs" / "metrics.md").read_text()
        for metric in METRICS.values():
            row = next(
                line for line in text.splitlines() if line.startswith(f"| `{metric.name}` |")
            )
            assert metric.definition in row
            assert metric.source in row


def test_a_loss_that_some_models_have_below_zero_is_no_logarithm() -> None:
    # the loss of a density has no lower end, and an original's may be negative where none of the
    # retrained models' is
    metric = dataclasses.replace(METRICS["loss"], solo=lambda a, *_: a.model)
    context = Context(Gaussian(), Gaussian(), {"forget": torch.zeros(4, 1)})
    losses = {"original": [-0.3, -0.2, -0.25], "scrubbed": [0.45, 0.5, -0.01]}
    groups = {
        name: [Subject({}, value, None) for value in values] for name, values in losses.items()
    }
    retrained = [0.5, 0.6, 0.4, 0.55, 0.7]
    found = score_metric(
        metric, "forget", groups, [Subject({}, r, None) for r in retrained], context
    )
    for row in found:
        by_hand = stats.ttest_1samp(row.values, 0.0).confidence_interval()
        assert (row.low, row.high) == pytest.approx(tuple(by_hand))
    half = stats.t.ppf(0.975, 4) * np.std(retrained, ddof=1) * math.sqrt(1 + 1 / 5)
    assert found[0].target_high == pytest.approx(0.55 + half)


@pytest.mark.parametrize(
    ("name", "least", "most"),
    [
        ("step_cosine", -1, 1),
        ("jensen_shannon", 0, 1),
        ("total_variation", 0, 100),
        ("activation_distance", 0, 2),
        ("zrf", 0, 1),
        ("tug_of_war", 0, 1),
        ("average_gap", 0, 100),
        ("membership_features", 0, 100),
    ],
)
def test_no_range_holds_what_is_impossible(name: str, least: float, most: float) -> None:
    plain = {"pair": None, "solo": lambda a, *_: a.model, "needs": frozenset()}
    metric = dataclasses.replace(METRICS[name], **plain)
    context = Context(Categorical(), Categorical(), {"forget": torch.zeros(50)})
    scores = [Subject({}, least + share * (most - least), None) for share in (0.05, 0.5, 0.97)]
    row = score_metric(metric, "forget", {"original": scores}, scores, context)[0]
    assert least <= row.target_low < row.target < row.target_high <= most
    assert least <= row.low <= row.high <= most


def test_against_equal_retrained_models_an_original_fails_and_their_equal_passes() -> None:
    targets = torch.arange(40) % 3
    draw = torch.Generator().manual_seed(0)
    retrained, original = (
        Subject(
            {part: torch.randn(40, 3, generator=draw) for part in PARTS}, seeded(small_net), None
        )
        for _ in range(2)
    )
    context = Context(Categorical(), Categorical(), dict.fromkeys(PARTS, targets))
    groups = {"original": [original], "scrubbed": [retrained]}
    found = Evaluation(
        tuple(
            row
            for name in ("kl", "loss")
            for row in score_metric(METRICS[name], "forget", groups, [retrained] * 4, context)
        ),
        retrained=4,
        left_out={},
    )
    assert found.conclusion("original").label in DIFFERENT
    assert found.conclusion("original").p_value == 0
    assert found.conclusion("scrubbed").label == AS_RETRAINED
    assert found.get("kl").target_low == found.get("kl").target_high == 0


def test_several_models_of_one_original_are_refused(ensemble) -> None:
    with pytest.raises(DataError, match="2 models of a method, made from 3 original"):
        evaluate(ensemble.originals.models[:2], ensemble, PARTS)


def test_the_range_in_a_table_is_that_of_a_method_where_the_originals_is_undefined():
    nan = math.nan
    row = EvaluationRow(
        *("original", "step_cosine", "weights", "", nan, 1, nan, nan),
        *(nan, nan, nan, "undefined", "", (nan,), nan),
    )
    known = {"target": 0.5, "target_low": 0.25, "target_high": 0.75}
    ours = dataclasses.replace(row, method="fisher-forget", value=0.4, label="undecided", **known)
    text = Evaluation((row, ours), retrained=4, left_out={}).to_markdown()
    assert "0.5 (0.25 ... 0.75)" in text
    assert "nan" not in text


def made_up(method: str, **judged: tuple[str, float]) -> list[EvaluationRow]:
    """Rows that decide: their metrics on forget, each with its label and p-value."""
    return [
        EvaluationRow(
            *(method, metric, "forget", "", 1.0, 3, 0.0, 2.0, 1.0, 0.0, 2.0, label, ""),
            p_value=p,
            primary=True,
        )
        for metric, (label, p) in judged.items()
    ]


class TestConclusion:
    def test_every_row_is_under_its_own_label(self):
        original = made_up("original", a=("not forgotten", 1e-6), b=("not forgotten", 1e-6))
        found = conclude(
            made_up("m", a=("farther than the original", 1e-5), b=("not forgotten", 1e-4)),
            original,
        )
        assert found.word == "not as retrained"
        text = "farther than the original in a on forget; not forgotten in b on forget"
        assert str(found) == f"{text} (smallest p of a difference 2e-05 after Holm)"
        half = conclude(made_up("m", a=("as retrained", 0.9), b=("undecided", 0.6)), original)
        assert (half.label, half.blind) == (UNDECIDED, False)
        assert str(half).startswith(
            "undecided in b on forget; as retrained in a on forget (no differ"
        )
        both = conclude(made_up("m", a=("as retrained", 0.9), b=("as retrained", 0.6)), original)
        assert (both.label, both.word) == (AS_RETRAINED, AS_RETRAINED)

    def test_where_nothing_to_forget_is_visible_it_says_so(self):
        # told apart by itself, and not together with the other
        original = made_up("original", a=("not forgotten", 0.03), b=("undecided", 0.5))
        rows = original + made_up("m", a=("as retrained", 0.8), b=("undecided", 0.4))
        table = Evaluation(tuple(rows), retrained=5, left_out={})
        for method in table.methods:
            found = table.conclusion(method)
            assert (found.label, found.blind, found.visible) == (UNDECIDED, True, False)
            assert "Nothing to forget is visible" in str(found)
        assert "not forgotten (by itself only) in a on forget" in str(table.conclusion("original"))
        assert table.to_markdown().count("othing to forget is visible here") == 1
        jsonschema.validate(json.loads(json.dumps(table.to_dict())), evaluation_schema())

    def test_metrics_left_out_for_one_reason_are_named_together(self):
        table = Evaluation((), 4, {"a": "it is hard", "b": "it is hard", "c": "it is new"})
        said = ["Left out: a, b, since it is hard.", "Left out: c, since it is new."]
        assert table.omitted() == said


def test_what_is_printed_is_short(ensemble, table):
    assert str(table) == table.to_markdown()
    assert "original 3" in str(table)
    assert len(str(ensemble)) < 200
    assert f"retrained without {len(IDX)} samples" in str(ensemble)
