"""The tables of docs/attacks.md, from stored numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from benchmarks.attacks.after_release import after_release
from benchmarks.attacks.chosen import chosen
from benchmarks.attacks.classical import Report, classical
from benchmarks.attacks.inference import requests, shadow
from benchmarks.attacks.inversion import inversion, mnist
from benchmarks.attacks.slow_down import TRIED, slow_down
from fisher_forget._util.markdown import markdown_table

FOLDER = Path(__file__).parent
STORED, PAGE = FOLDER.with_suffix(".json"), FOLDER.parents[1] / "docs" / "attacks.md"
BOUNDS = (", lower bound", ", upper bound")

PARTS: dict[str, Callable[[], Report]] = {
    "classical": classical,
    "requests": requests,
    "shadow": shadow,
    "inversion": inversion,
    "mnist": mnist,
    "slow-down": slow_down,
    "chosen": chosen,
    "after-release": after_release,
}


def shown(interval: Mapping[str, float] | None) -> str:
    """A number and its interval."""
    if interval is None:
        return "–"
    value, low, high = (f"{interval[k]:z.2f}" for k in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


def tables(part: str, found: Report) -> str:
    """A part's numbers, as Markdown."""
    if part == "classical":
        rows = [
            [case, "{} / {}".format(*row["published"]),
             *(shown(f["found"]) for f in (*row["found"], *row["nothing deleted"]))]
            for case, row in found["cases"].items()
        ]  # fmt: skip
        heads = ["model", "known rates", "example", "instance"]
        kept = ["example, nothing deleted", "instance, nothing deleted"]
        labels = [
            [case, shown(f["found"]), f"{f['nothing']:z.2f}"] for case, f in found["labels"].items()
        ]
        cells = markdown_table(["model", "cosine", "nothing"], labels)
        return f"{markdown_table(heads + kept, rows)}\n\n{_defences(found)}\n\n{cells}"
    if part == "requests":
        rows = [
            [name, *(shown(f["found"]) for f in pair), *(shown(f["retrained"]) for f in pair)]
            for name, pair in found["methods"].items()
        ]
        heads = ["second release", "example", "instance"]
        yard = ["example, retrained", "instance, retrained"]
        return f"{markdown_table(heads + yard, rows)}\n\n{_defences(found)}"
    if part == "shadow":
        heads = [
            "second release and feature",
            "AUC",
            "AUC of the first alone",
            "DegCount",
            "DegRate",
        ]
        names = ("AUC from the first release alone", "DegCount", "DegRate")
        rows = [
            [name, shown(f["found"]), *(f"{f['details'][key]:z.2f}" for key in names)]
            for name, f in found.items()
        ]
        return markdown_table(heads, rows)
    if part == "slow-down":
        return _slowed(found)
    if part == "chosen":
        return _chosen(found)
    if part == "after-release":
        return _come_back(found)
    heads = [
        "second release",
        "cosine",
        "nothing",
        "with the mean",
        "PSNR (dB)",
        "retrained, same seed",
    ]
    names = ("cosine with the mean left in", "PSNR (dB)")
    rows = [
        [name, shown(f["found"]), f"{f['nothing']:z.2f}",
         *(f"{f['details'][key]:z.2f}" for key in names), shown(f["retrained"])]
        for name, f in found.items()
    ]  # fmt: skip
    return markdown_table(heads, rows)


def _slowed(found: Report) -> str:
    def removals(count: int) -> str:
        return f"{count} or more" if count >= TRIED else str(count)

    rows = [
        [name, radius, removals(clean), removals(told["attacked"][name])]
        for radius, told in found.items()
        for name, clean in told["clean"].items()
    ]
    about = [
        [radius, *(f"{100 * x:.1f} %" for x in (*told["accuracy"], *told["refused"]))]
        for radius, told in found.items()
    ]
    heads = ["accounting", "L1 radius", "clean", "attacked"]
    others = ["L1 radius", "accuracy, clean", "poisoned", "attacker refused", "honest refused"]
    return f"{markdown_table(heads, rows)}\n\n{markdown_table(others, about)}"


def _chosen(found: Report) -> str:
    def points(values: list[float]) -> str:
        low, high = (100 * end for end in (min(values), max(values)))
        return f"{100 * sum(values) / len(values):.1f} ({low:.1f} to {high:.1f})"

    rows = []
    for name, told in found.items():
        case, count, aim = name.split("; ")
        seconds, steps, back = (
            sum(told[key]) / len(told[key]) for key in ("seconds", "steps", "rejected")
        )
        falls = (
            "target",
            "target, retrained",
            "worst of the others",
            "worst of the others, retrained",
        )
        refused = f"{sum(told['refused'])} of {len(told['refused'])}"
        rows.append(
            [
                case,
                count,
                aim,
                *(points(told[key]) for key in falls),
                f"{seconds:.1f}",
                f"{steps:.0f} / {back:.0f}",
                refused,
            ]
        )
    falls = ["target falls by", "retrained", "worst other class", "retrained"]
    heads = ["attacker owns", "asks for", "chosen by", *falls, "seconds", "sub-steps", "refused"]
    return markdown_table(heads, rows)


def _come_back(found: Report) -> str:
    def accuracy(finding: Report, when: str = "after") -> str:
        place = f"accuracy on deleted, {when}"
        ours, exact = (100 * finding["details"][f"{x}, {place}"] for x in ("released", "retrained"))
        return f"{ours:.0f} / {exact:.0f} %"

    gaps, accuracies = [], []
    for name, told in found.items():
        plain = told["quantisation to 8 bits"]  # of all deleted samples, none is known
        bounds = [plain["details"][f"gap before{x}"] for x in ("", *BOUNDS)]
        gap = dict(zip(("value", "low", "high"), bounds, strict=True))
        gaps.append([*name.split("; "), *map(shown, (gap, *(f["found"] for f in told.values())))])
        accuracies.append(
            [*name.split("; "), accuracy(plain, "before"), *map(accuracy, told.values())]
        )
    heads = ["forgotten", "released", "before", *next(iter(found.values()))]
    return f"{markdown_table(heads, gaps)}\n\n{markdown_table(heads, accuracies)}"


def _defences(found: Report) -> str:
    rows = [[name, *(shown(f["found"]) for f in pair)] for name, pair in found["defences"].items()]
    return markdown_table(["what is published", "example", "instance"], rows)
