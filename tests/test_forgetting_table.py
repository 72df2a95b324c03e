"""The table of `python -m benchmarks.forgetting`: its rows, its numbers, and that a killed run goes
on."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.forgetting import cells, networks, run, table
from benchmarks.forgetting.data import Data, forget_idx, load
from benchmarks.forgetting.rows import ROWS, Row, Setup, Training
from fisher_forget._util.files import read_json
from fisher_forget.errors import ConfigError, NumericalError

SETUP = Setup("wine", "wine", "mlp", {"hidden": (8,)}, Training("adam", 0.03, 0.0, 4, 32))
ROW = Row("wine-20", SETUP, "samples", 1, 20)


def kl(p, q):
    p, q = (torch.log_softmax(z.double(), -1).detach() for z in (p, q))
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_a_cell_holds_what_the_plain_call_comes_to(tmp_path, monkeypatch):
    """Against KLs written out here; nothing is passed to `forget` but model, loader and samples."""
    calls = []

    def recorded(*arguments, **options):
        calls.append((arguments, options, cells_forget(*arguments, **options)))
        return calls[-1][2]

    cells_forget = cells.forget
    monkeypatch.setattr(cells, "forget", recorded)
    found = cells.cell(ROW, 0, tmp_path)
    ((model, loader, idx), options, result) = calls[0]
    assert options == {"progress": False}
    data = load(SETUP)
    assert len(loader.dataset) == len(data.y) == 142
    assert idx == forget_idx(ROW, data).tolist()
    assert (data.y[idx] == 1).all()
    assert len(set(idx)) == 20

    retrained = cells.Networks.of(ROW, 0, tmp_path).retrained
    x = data.x[idx]
    for name, scrubbed in (("noised", result.model), ("plain", result.with_noise(0.0))):
        part = found[name]["parts"]["forget"]
        for key, other in (("original_each", model), ("scrubbed_each", scrubbed)):
            expected = [kl(r(x), other(x)) for r in retrained]
            np.testing.assert_allclose(part[key], expected, rtol=1e-4, atol=1e-7)
        right = (scrubbed(x).argmax(1) == 1).float().mean()
        assert part["score_scrubbed"] == pytest.approx(float(right), rel=1e-5)
    assert found["error"] is None
    assert found["seconds"] > 0
    assert found["retraining"] > 0


def test_retrained_networks_never_saw_the_forgotten_samples(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(cells, "network", lambda *call: asked.append(call))
    found = cells.Networks.of(ROW, 7, tmp_path)
    _, _, rows, seeds, _ = zip(*asked, strict=True)
    assert rows[0].tolist() == list(range(142))
    for each in rows[1:]:
        assert sorted([*each.tolist(), *found.forget.tolist()]) == list(range(142))
    assert seeds[0] == 7
    assert len(set(seeds)) == 1 + cells.MODELS


def test_networks_are_trained_once(tmp_path, monkeypatch):
    first = cells.Networks.of(ROW, 0, tmp_path)
    assert len(list(tmp_path.iterdir())) == 1 + cells.MODELS
    monkeypatch.setattr(networks, "train", lambda *_: pytest.fail("trained again"))
    again = cells.Networks.of(ROW, 0, tmp_path)
    for a, b in zip(first.original.parameters(), again.original.parameters(), strict=True):
        assert torch.equal(a, b)
    monkeypatch.undo()
    # whatever decides a network is in its name
    longer = replace(SETUP, training=replace(SETUP.training, epochs=5))
    for other in (replace(ROW, setup=longer), replace(ROW, setup=replace(SETUP, wrong=3))):
        before = len(list(tmp_path.iterdir()))
        cells.Networks.of(other, 0, tmp_path)
        assert len(list(tmp_path.iterdir())) == before + 1 + cells.MODELS
    assert len({tuple(p.flatten().tolist()) for p in _first_weights(first)}) == 1 + cells.MODELS


def _first_weights(found):
    return [next(m.parameters()) for m in (found.original, *found.retrained)]


def test_a_network_that_learnt_nothing_is_refused(tmp_path):
    still = replace(SETUP, training=replace(SETUP.training, lr=1e-9))
    with pytest.raises(NumericalError, match="after training on 3 classes"):
        cells.Networks.of(replace(ROW, setup=still), 0, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_killed_run_goes_on(tmp_path, monkeypatch):
    """And makes only what is missing, what was of another row, and what is asked for again."""
    stored, made = tmp_path / "numbers.json", []

    def cell(row, seed, folder):
        made.append(seed)
        if len(made) == 3:
            raise KeyboardInterrupt
        return {"key": cells.key(row, seed), "made": len(made)}

    monkeypatch.setattr(run, "cell", cell)
    asked = [(ROW, seed) for seed in range(4)]
    with pytest.raises(KeyboardInterrupt):
        run.fill(stored, "after", asked)
    assert set(read_json(stored)["after"]["wine-20"]) == {"0", "1"}
    run.fill(stored, "after", asked)
    assert made == [0, 1, 2, 2, 3]
    run.fill(stored, "after", asked)
    run.fill(stored, "before", asked[:1])
    assert made == [0, 1, 2, 2, 3, 0]
    run.fill(stored, "after", [(replace(ROW, count=10), 1)])
    run.fill(stored, "after", asked[3:], again=True)
    assert made == [0, 1, 2, 2, 3, 0, 1, 3]
    assert read_json(stored)["after"]["wine-20"]["0"]["made"] == 1


def test_a_call_that_fails_is_a_cell(tmp_path, monkeypatch):
    def fails(*_, **__):
        raise NumericalError("a loss of nan", "a finite loss", "Train less.")

    monkeypatch.setattr(cells, "forget", fails)
    found = cells.cell(ROW, 0, tmp_path)
    assert "a loss of nan" in found["error"]
    text = table.table([ROW], {"after": {"wine-20": {"0": found}}})
    assert "fails" in text.splitlines()[2]


def part(original, scrubbed, floor=0.1, right=0.5):
    """Five retrained models that are `floor` from each other, but for a little."""
    spread = 1 + 0.01 * np.arange(-2, 3)
    named = {"original_each": original, "scrubbed_each": scrubbed, "to_each": floor}
    scores = {"score_original": 1.0, "score_retrained": right, "score_scrubbed": 0.25}
    each = {name: (value * spread).tolist() for name, value in named.items()}
    return each | scores | {"from_each": each["to_each"]}


def cell_of(forget, retain, test, seconds=1.0):
    parts = {"forget": part(*forget), "retain": part(*retain), "test": part(*test)}
    closeness = {"parts": parts}
    return {
        "noised": closeness,
        "plain": closeness,
        "seconds": seconds,
        "retraining": 50.0,
        "error": None,
    }


def test_the_table_says_what_the_numbers_do():
    good = cell_of((1.1, 0.12), (0.1, 0.1), (0.1, 0.1))
    bad = cell_of((1.1, 0.6), (0.1, 0.2), (0.1, 0.1), seconds=5.0)
    report = {"before": {"wine-20": {"3": bad}}, "after": {"wine-20": {"3": good, "4": good}}}
    held_out = replace(ROW, name="other", held_out=True)
    text = table.table([ROW, held_out], report | {"after": report["after"] | {"other": {"0": bad}}})
    first, second = ([c.strip() for c in line.split("|")[1:-1]] for line in text.splitlines()[2:])
    assert first[:2] == ["wine: 20 of class 1", "adam, 4"]
    assert first[2:6] == ["1.10", "0.10", "0.60", "0.12 (0.12)"]
    assert first[6].startswith("50 (")
    assert first[7].startswith("98 (")
    assert first[8] == "0.10 / 0.10 / 0.20 / 0.10"
    assert first[9] == "100 / 50 / 25 / 25"
    assert first[10] == "10.0 / 2.00"
    assert first[11] == "none"
    assert second[0].endswith("*")
    assert second[4] == "–"
    assert second[11] == "gap, retained, retain worse"


def test_without_a_clear_gap_there_is_none_to_close():
    scores = {
        name: table.Score.of([cell_of((0.1, 0.1), (0.1, 0.1), (0.1, 0.1))], "noised", name)
        for name in table.PARTS
    }
    assert scores["forget"].gap.closed is None
    assert table.misses(scores) == "none"
    worse = table.Score.of([cell_of((0.1, 0.3), (0.1, 0.1), (0.1, 0.1))], "noised", "forget")
    assert table.misses(scores | {"forget": worse}) == "forget worse"


def test_rows_cover_what_people_have():
    rows = ROWS.values()
    trained = [row.setup.training.optimizer for row in rows]
    assert set(trained) == {"sgd", "momentum", "adam", "adamw"}
    assert min(map(trained.count, set(trained))) >= 3
    assert len({row.setup.data for row in rows}) >= 6
    assert {row.setup.early for row in rows} == {True, False}
    assert abs(2 * sum(row.held_out for row in rows) - len(rows)) <= 1
    assert [r.held_out for r in run.named(["held-out"])] == [True] * sum(r.held_out for r in rows)
    with pytest.raises(ConfigError, match="wine-21"):
        run.named(["wine-20", "wine-21"])


@pytest.mark.parametrize("name", ["wrong-labels-mlp", "docstrings-module", "digits-cnn-class-adam"])
def test_forget_sets(name):
    row = ROWS[name]
    data = load(row.setup)
    idx = forget_idx(row, data)
    chosen = torch.zeros(len(data.y), dtype=torch.bool)
    chosen[idx] = True
    if row.forget == "wrong":
        right = load(replace(row.setup, wrong=0)).y
        assert torch.equal(data.y != right, chosen)
        assert int(chosen.sum()) == 60
    elif row.forget == "module":
        assert {data.groups[i] for i in idx.tolist()} == {row.of}
        assert list(data.groups).count(str(row.of)) == len(idx) > 50
    else:
        assert torch.equal(data.y == row.of, chosen)


def test_docstrings_are_text_of_five_libraries():
    data: Data = load(ROWS["docstrings-module"].setup)
    assert data.classes == 5
    assert data.x.shape[1:] == (64,)
    assert torch.bincount(data.y).min() > 200
    assert len(torch.unique(data.x, dim=0)) > 0.9 * len(data.x)


def test_the_package_of_another_folder_is_asked(tmp_path):
    """The stand-in says so as soon as it is imported."""
    (tmp_path / "fisher_forget").mkdir()
    (tmp_path / "fisher_forget" / "__init__.py").write_text("raise SystemExit('stand-in')\n")
    command = [sys.executable, "-m", "benchmarks.forgetting", "--list", "--code", str(tmp_path)]
    root = Path(run.__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "stand-in" in done.stderr


def test_the_page_has_the_table_of_the_stored_numbers():
    text = run.PAGE.read_text(encoding="utf-8")
    expected = table.table(list(ROWS.values()), run.read(run.STORED))
    assert text.split(run.BEGIN)[1].split(run.END)[0] == f"\n{expected}\n\n"
