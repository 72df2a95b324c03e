"""SVG files as elements of a page: unique ids, a style of their own, nothing loaded or run."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

from markupsafe import Markup

from fisher_forget.errors import StorageError

# points of width, above which a figure is scrolled on a phone instead of made illegible
LARGE = 400.0
_SVG, _XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
_DROPPED = {f"{{{_SVG}}}{tag}" for tag in ("metadata", "script", "foreignObject", "image", "a")}
_REFERENCE = re.compile(r"url\(\s*['\"]?#([^'\")]+)['\"]?\s*\)")


def inline(path: Path, prefix: str, title: str) -> Markup:
    """An SVG file as an element of the page.

    Args:
        path: Of the file.
        prefix: Of all its ids, so that they are unique in the page.
        title: What it shows, for those who cannot see it.

    Raises:
        StorageError: If it is not a readable SVG file.
    """
    root = _read(path)
    for parent in list(root.iter()):
        for child in [c for c in parent if c.tag in _DROPPED]:
            parent.remove(child)
    for element in root.iter():
        if element.tag == f"{{{_SVG}}}style":
            # a style element counts for the whole page
            rules = re.sub(r"@import[^;]*;?", "", element.text or "")
            element.text = re.sub(r"(^|\})\s*([^{}]+)\{", rf"\1#{prefix}svg \2{{", rules)
        _disarm(element, prefix)
    width = str(root.attrib.pop("width", ""))
    root.attrib.pop("height", None)
    root.set("id", f"{prefix}svg")
    root.set("role", "img")
    root.set("aria-label", title)
    points = re.fullmatch(r"([\d.]+)pt", width)
    if points and float(points[1]) > LARGE:
        root.set("class", "large")
    if points:  # hardly larger than it was drawn, or its text would outgrow the page's
        root.set("style", f"max-width: {1.15 * float(points[1]) * 4 / 3:.0f}px")
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", _XLINK)
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def _read(path: Path) -> ElementTree.Element:
    try:
        root = ElementTree.fromstring(path.read_bytes())
    except (OSError, ElementTree.ParseError) as error:
        got = f"{path}: {error}"
        raise StorageError(got, "an SVG file", "Save it with save_figure.") from error
    if root.tag != f"{{{_SVG}}}svg":
        got = f"{path} with the root element {root.tag}"
        raise StorageError(got, "an SVG file", "Save it with save_figure.")
    return root


def _disarm(element: ElementTree.Element, prefix: str) -> None:
    """Rename ids and references to them; drop handlers and what points outside the file."""
    for name, value in list(element.attrib.items()):
        local = name.rpartition("}")[2]
        if local == "id":
            element.set(name, prefix + value)
        elif local == "href" and value.startswith("#"):
            element.set(name, f"#{prefix}{value[1:]}")
        elif local == "href" or local.startswith("on"):
            del element.attrib[name]
        elif "url(" in value:
            inside = _REFERENCE.sub(rf"url(#{prefix}\1)", value)
            element.set(name, re.sub(r"url\((?!#)[^)]*\)", "none", inside))
