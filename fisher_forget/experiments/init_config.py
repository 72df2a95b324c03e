"""`fisher-forget init`: commented configurations to start from."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from string import Template

from fisher_forget._util.files import write_text
from fisher_forget.errors import StorageError

TEMPLATES = {
    "classifier": "one label a sample",
    "text": "token ids and attention mask by name, as models of transformers take them",
    "regression": "numbers as targets",
    "digits": "built-in data and model, to try it out",
}
BUILT_IN = ("digits",)  # those that name no code


def write_template(path: Path, template: str = "classifier") -> Path:
    """Write a configuration that runs once the functions that it names are there.

    Args:
        path: Of the new file.
        template: A key of `TEMPLATES`.

    Raises:
        StorageError: If there is such a file, or it cannot be written.
    """
    source = files("fisher_forget") / "experiments" / "templates" / f"{template}.yaml"
    text = Template(source.read_text(encoding="utf-8"))
    if path.exists():
        got, fix = f"{path}, which is there", "Name another, or remove it first."
        raise StorageError(got, "a new file", fix)
    write_text(path, text.substitute(path=path))
    return path
