"""What `prepare` makes once of a model and its data, and keeps in a folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any

from torch import nn

from fisher_forget._util import files
from fisher_forget.curvature.operator import Curvature
from fisher_forget.curvature.storage import load_curvature, save_curvature
from fisher_forget.data.split import Indices, Split
from fisher_forget.ledger import RequestLog, model_fingerprint
from fisher_forget.unlearn.data_sums import DataSums, load_data_sums, save_data_sums, take_data_sums
from fisher_forget.unlearn.objective import Objective
from fisher_forget.unlearn.options import ForgetOptions
from fisher_forget.unlearn.problem import curvature_of

DATA_SUMS, CURVATURE, MODEL = "snapshot.safetensors", "curvature.safetensors", "model.safetensors"
NAMES = (DATA_SUMS, CURVATURE)
# What curvature and gradient depend on: fixed once these are there.
FIXED = (
    "likelihood",
    "weight_decay",
    "structure",
    "kind",
    "draws",
    "max_samples",
    "subset",
    "seed",
)


@dataclass(frozen=True)
class Snapshot:
    """Curvature and sums of a model on its data.

    Attributes:
        curvature: Of `sampled`, undamped.
        sampled: Indices of the samples that the curvature is of.
        sums: Gradient and output curvature of all samples.
    """

    curvature: Curvature
    sampled: Indices
    sums: DataSums


def marks(
    model: nn.Module, split: Split, options: ForgetOptions, objective: Objective
) -> dict[str, str]:
    """Fingerprints of all that a snapshot depends on."""
    return {
        "model": model_fingerprint(model),
        "data": split.fingerprint(),
        "options": files.fingerprint(_fixed(options, objective)),
    }


def artefacts(log: RequestLog) -> list[Path]:
    """The files in a folder that are worthless without its ledger."""
    return [path for name in NAMES for path in log.all_paths(name)]


def take(objective: Objective, split: Split, options: ForgetOptions, *, progress: bool) -> Snapshot:
    """Make all of it: one pass over the data, and what the curvature takes."""
    sampled, kind = options.curvature_plan(split)
    curvature = curvature_of(objective, split, options, sampled, kind, progress=progress)
    sums = take_data_sums(objective, split, seed=options.seed, progress=progress)
    return Snapshot(curvature, sampled, sums)


def read_or_take(
    model: nn.Module,
    objective: Objective,
    split: Split,
    options: ForgetOptions,
    log: RequestLog | None,
    *,
    progress: bool,
) -> Snapshot:
    """From the folder what is there; the rest is made, and kept there."""
    if log is None:
        return take(objective, split, options, progress=progress)
    sampled, kind = options.curvature_plan(split)
    with log.ledger.owned():  # what is missing is made once, by one owner
        log.remove_earlier(NAMES, MODEL)
        path = log.path(CURVATURE)
        if path.exists():
            curvature = load_curvature(path, model, split)
        else:
            curvature = curvature_of(objective, split, options, sampled, kind, progress=progress)
            if curvature.stored_as:
                save_curvature(path, curvature, model, split)
        path = log.path(DATA_SUMS)
        sums = load_data_sums(path, objective, log.mark, split) if path.exists() else None
        if sums is None:
            sums = take_data_sums(objective, split, seed=options.seed, progress=progress)
            save_data_sums(path, sums, log.mark, split)
    return Snapshot(curvature, sampled, sums)


def save(
    log: RequestLog,
    made: Snapshot,
    model: nn.Module,
    split: Split,
    options: ForgetOptions,
    objective: Objective,
) -> None:
    """Write the next generation of a folder, with its model; then it is the present one."""
    parts, number = marks(model, split, options, objective), log.generation + 1
    own = files.fingerprint(parts)
    if made.curvature.stored_as:
        save_curvature(log.path(CURVATURE, number), made.curvature, model, split)
    save_data_sums(log.path(DATA_SUMS, number), made.sums, own, split)
    files.save_model(log.path(MODEL, number), model, {})
    log.rebase(own, parts)
    log.remove_earlier(NAMES, MODEL)


def _fixed(options: ForgetOptions, objective: Objective) -> dict[str, Any]:
    """What the stored sums depend on, of the options."""
    fixed = {name: getattr(options, name) for name in FIXED}
    likelihood: Any = objective.likelihood
    if is_dataclass(likelihood):
        likelihood = asdict(likelihood)  # type: ignore[arg-type]
    fixed |= {"likelihood": likelihood, "weight_decay": options.known_decay}
    if isinstance(options.known_decay, Mapping):  # whose order counts
        fixed["weight_decay"] = list(options.known_decay.items())
    if options.inverts != options.changed({"solver": "auto"}).inverts:
        fixed["solver"] = options.solver  # which samples the curvature is of depends on it
    return fixed
