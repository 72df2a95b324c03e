"""Models and data of the user's own, by configuration alone: every file that `init` writes, and the
text example."""

from __future__ import annotations

import copy
import importlib
import json
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import yaml

from fisher_forget._util import files
from fisher_forget.cli import main
from fisher_forget.errors import ConfigError, DataError
from fisher_forget.experiments.config_file import load_config
from fisher_forget.experiments.datasets import load_dataset
from fisher_forget.experiments.init_config import TEMPLATES
from fisher_forget.experiments.models import build_model
from fisher_forget.experiments.training import TrainSettings, train

ROOT = Path(__file__).parent.parent
SMALL = ["--progress", "false", "--jobs", "1", "--retrained", "2"]
pytestmark = pytest.mark.filterwarnings(
    "ignore::fisher_forget.FisherForgetWarning"
)  # trained for a moment only

MODULES = {
    "classifier": """
        import torch
        from torch import nn

        def build(width=16):
            return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 3))

        class Points(torch.utils.data.Dataset):
            def __init__(self, count, shift=0.0):
                self.y = torch.arange(count) % 3
                self.x = torch.randn(count, 4) + 2 * torch.eye(3, 4)[self.y] + shift
            def __len__(self):
                return len(self.y)
            def __getitem__(self, i):
                return self.x[i], self.y[i]

        def load(count=90, shift=0.0):
            return Points(count, shift), Points(30, shift)
    """,
    "text": """
        import torch
        from torch import nn

        class Bag(nn.Module):
            def __init__(self, width):
                super().__init__()
                self.embedding = nn.Embedding(20, width)
                self.head = nn.Linear(width, 3)
            def forward(self, input_ids, attention_mask):
                weight = attention_mask[:, :, None] / attention_mask.sum(1)[:, None, None]
                return self.head((weight * self.embedding(input_ids)).sum(1))

        def build(width=8):
            return Bag(width)

        def part(count):
            labels = torch.arange(count) % 3
            ids = torch.randint(1, 20, (count, 6))
            ids[:, 0] = labels + 1
            kept = torch.arange(6) < torch.randint(2, 7, (count, 1))
            return {"input_ids": ids * kept, "attention_mask": kept.long(), "labels": labels}

        def load(count=90):
            return part(count), part(30)
    """,
    "regression": """
        import torch
        from torch import nn

        build = lambda: nn.Linear(3, 2)

        def part(count):
            x = torch.randn(count, 3)
            truth = x @ torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
            return x, truth + 0.1 * torch.randn(count, 2)

        def load():
            return part(80), part(30)
    """,
}


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """own(code): my_package/my_module.py in a folder that the command is started in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FISHER_FORGET_ALLOW_CODE", "1")
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(ROOT))])
    (tmp_path / "my_package").mkdir()

    def write(code: str) -> Path:
        forget_modules()
        path = tmp_path / "my_package" / "my_module.py"
        path.write_text(textwrap.dedent(code))
        return path

    def forget_modules() -> None:
        for name in [n for n in sys.modules if n.split(".")[0] in ("my_package", "examples")]:
            del sys.modules[name]
        importlib.invalidate_caches()

    yield write
    forget_modules()


class TestStarters:
    @pytest.mark.parametrize("template", TEMPLATES)
    def test_runs_as_it_is_written(self, own, template, tmp_path, capsys):
        if template in MODULES:
            own(MODULES[template])
        assert main(["init", "new.yaml", "--template", template]) == 0
        assert "fisher-forget run new.yaml" in capsys.readouterr().out
        written = Path("new.yaml").read_text()
        name = yaml.safe_load(written)["name"]
        assert main(["run", "new.yaml", "--dry-run"]) == 0
        assert not Path("runs").exists()
        flags = (
            ["--training.epochs", "3", "--data.max_train", "700"] if template == "digits" else []
        )
        assert (
            main(
                [
                    "run",
                    "new.yaml",
                    "--progress",
                    "false",
                    "--jobs",
                    "1",
                    "--retrained",
                    "4",
                    *flags,
                ]
            )
            == 0
        )
        assert (tmp_path / "runs" / name / "report.html").exists()
        assert Path("new.yaml").read_text() == written
        assert main(["evaluate", f"runs/{name}"]) == 0

    def test_never_overwrites(self, own, capsys):
        Path("mine.yaml").write_text("mine")
        assert main(["init", "mine.yaml"]) == 2
        assert "mine.yaml, which is there" in capsys.readouterr().err
        assert Path("mine.yaml").read_text() == "mine"

    def test_every_template_lies_in_the_package(self):
        found = {
            path.stem
            for path in (ROOT / "fisher_forget" / "experiments" / "templates").glob("*.yaml")
        }
        assert found == set(TEMPLATES)


class TestStoredModels:
    """A model is used again if, and only if, what it depends on is the same."""

    @pytest.fixture
    def finished(self, own):
        module = own(MODULES["classifier"])
        assert main(["init", "new.yaml"]) == 0
        assert main(["run", "new.yaml", *SMALL, "--training.epochs", "2"]) == 0
        return own, module.read_text()

    def stored(self, capsys, *flags: str) -> bool:
        capsys.readouterr()
        assert main(["run", "new.yaml", *SMALL, "--training.epochs", "2", "--dry-run", *flags]) == 0
        said = capsys.readouterr().out
        assert ("original: 0 to train, 1 stored" in said) != (
            "original: 1 to train, 0 stored" in said
        )
        return "original: 0 to train, 1 stored" in said

    def test_options(self, finished, capsys):
        assert self.stored(capsys)
        assert self.stored(
            capsys, "--data.options", "{shift: 0.0}"
        )  # another way to say the same data
        assert not self.stored(capsys, "--data.options", "{shift: 1.0}")
        assert not self.stored(capsys, "--model.options", "{width: 9}")
        assert not self.stored(capsys, "--training.lr", "0.06")

    def test_code(self, finished, capsys):
        own, code = finished
        own("# only a comment\n" + code)
        assert self.stored(capsys)
        own(code.replace("ReLU", "Tanh"))
        assert not self.stored(capsys)
        own(
            code.replace("return nn.Sequential", "torch.rand(1); return nn.Sequential")
        )  # other first weights
        assert not self.stored(capsys)
        own(code.replace("2 * torch.eye", "3 * torch.eye"))
        assert not self.stored(capsys)


class TestLoad:
    def test_content_classes_and_subsets(self, own):
        own(MODULES["text"])
        sys.path.insert(0, "")
        whole = load_dataset("my_package.my_module:load", options={"count": 60})
        again = load_dataset(
            "my_package.my_module:load", options={"count": 60}, max_train=30, max_test=9, seed=1
        )
        assert whole.classes == ("0", "1", "2")
        assert (len(whole.train), len(whole.test)) == (60, 30)
        assert again.train.tensors[-1].bincount().tolist() == [10, 10, 10]
        rows = {tuple(x) for x in whole.train[:][0]["input_ids"].tolist()}
        assert {
            tuple(x) for x in again.train[:][0]["input_ids"].tolist()
        } <= rows  # the load itself is seeded

    @pytest.mark.parametrize(
        ("code", "name", "words"),
        [
            ("def load(): return 3", "load", "a pair (train, test)"),
            ("def load(): return [], []", "load", "at least one sample"),
            ("def load(): return ([[1.0]], ['cat']), ([[1.0]], ['dog'])", "load", "numbers"),
            (
                "def load(): raise OSError('no disk')",
                "load",
                "OSError from my_package.my_module:load: no disk",
            ),
            ("def lode(): pass", "load", "Did you mean 'lode'?"),
        ],
    )
    def test_mistakes(self, own, code, name, words):
        own(code)
        sys.path.insert(0, "")
        with pytest.raises((ConfigError, DataError)) as caught:
            load_dataset(f"my_package.my_module:{name}")
        assert words in str(caught.value)

    def test_options_are_for_own_functions(self):
        with pytest.raises(ConfigError, match="none for a built-in data set"):
            load_dataset("digits", options={"count": 3})


class TestBuild:
    def test_seed_alone_decides_the_weights(self, own):
        own(MODULES["classifier"])
        sys.path.insert(0, "")
        state = torch.get_rng_state()
        first, again, other = (
            build_model("my_package.my_module:build", (4,), 3, seed=s, width=5).state_dict()
            for s in (0, 0, 1)
        )
        assert all(torch.equal(x, again[name]) for name, x in first.items())
        assert not any(torch.equal(x, other[name]) for name, x in first.items())
        assert torch.equal(state, torch.get_rng_state())

    def test_a_class_is_a_builder(self):
        model = build_model("torch.nn:Linear", (4,), 3, seed=0, in_features=4, out_features=3)
        assert isinstance(model, torch.nn.Linear)

    def test_something_else_than_a_model(self):
        with pytest.raises(ConfigError, match=r"dict from builtins:dict.*Module"):
            build_model("builtins:dict", (4,), 3, seed=0)


class TestCommandLine:
    def test_a_missing_module(self, own, capsys):
        assert main(["init", "new.yaml"]) == 0
        assert (
            main(
                ["run", "new.yaml", "--model", "absent.thing:build", "--data", "absent.thing:load"]
            )
            == 2
        )
        said = capsys.readouterr().err
        assert said.startswith("fisher-forget: Got 'absent.thing:load', but no module 'absent'")
        assert "Traceback" not in said

    def test_debug_shows_where(self, own):
        own("def load(): return 1 / 0\nbuild = load")
        assert main(["init", "new.yaml"]) == 0
        assert main(["run", "new.yaml"]) == 2
        with pytest.raises(ConfigError) as caught:
            main(["run", "new.yaml", "--debug"])
        assert isinstance(caught.value.__cause__, ZeroDivisionError)


class TestTextExample:
    """DistilBERT of `transformers`, from its docstrings to a report; in small."""

    TINY = (
        *("--data.options", "{per_class: 100, test_per_class: 20, vocabulary: 300, tokens: 12}"),
        *("--model.options", "{width: 32, vocabulary: 300, tokens: 12}"),
        *("--forget_sets", "[{name: all of pandas, kind: class, label: 1}]"),
    )

    @pytest.mark.filterwarnings("ignore:There is a performance drop")  # vmap over attention
    def test_from_training_to_report(self, own, tmp_path, monkeypatch):
        pytest.importorskip("transformers", reason="not installed")
        monkeypatch.chdir(ROOT)
        path = "examples/text_classifier/config.yaml"
        flags = [
            *self.TINY,
            "--training.epochs",
            "20",
            "--training.batch_size",
            "16",
            "--out",
            str(tmp_path),
        ]
        assert main(["run", path, *SMALL, *flags]) == 0
        folder = tmp_path / "text-classifier"
        assert "all of pandas" in (folder / "report.html").read_text()
        parts = json.loads((folder / "metrics.json").read_text())["cases"][0]["runs"][0][
            "evaluation"
        ]["parts"]
        assert {name: part["samples"] for name, part in parts.items()} == {
            "forget": 100,
            "retain": 300,
            "test": 80,
            "test, retained classes": 60,
        }
        assert parts["retain"]["score_original"] > 0.6  # chance is a quarter
        assert parts["forget"]["score_retrained"] == 0.0  # a class never seen is never answered
        config = load_config(folder / "config.yaml")
        data = config.data.load()
        model = build_model(config.model.name, (), 4, seed=0, **config.model.options)
        scrubbed = files.load_model(
            folder / "all-of-pandas" / "seed-0" / "scrubbed.safetensors", model
        )
        inputs, targets = data.train[:]
        ours = scrubbed(**inputs).logits.argmax(1) == targets
        assert float(ours[targets == 1].double().mean()) == pytest.approx(
            parts["forget"]["score_scrubbed"]
        )

    def test_padding_is_masked(self, own, monkeypatch):
        """Training sees the attention mask: what stands under the padding makes no difference."""
        pytest.importorskip("transformers", reason="not installed")
        monkeypatch.chdir(ROOT)
        sys.path.insert(0, "")
        options = {"per_class": 10, "test_per_class": 5, "vocabulary": 300, "tokens": 40}
        data = load_dataset("examples.text_classifier.docstrings:load", options=options).train
        model = build_model(
            "examples.text_classifier.docstrings:build",
            (),
            4,
            seed=0,
            width=8,
            vocabulary=300,
            tokens=40,
        )
        other = copy.deepcopy(data)
        ids, mask, _ = other.tensors
        assert 0 < int(mask.sum()) < mask.numel()
        ids[mask == 0] = 7
        settings = TrainSettings(epochs=2, lr=0.01)
        a, b = (
            train(model, d, settings, seed=0, progress=False).state_dict() for d in (data, other)
        )
        for name, value in a.items():
            if name != "distilbert.embeddings.word_embeddings.weight":
                torch.testing.assert_close(value, b[name])
        assert not torch.equal(model.state_dict()["classifier.weight"], a["classifier.weight"])
