"""Formulas of the documentation as inline SVG: readable without a network, a script or a font of
the reader's."""

from __future__ import annotations

import html
import re
import warnings
from functools import cache
from typing import Any
from xml.etree import ElementTree

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # of the way it finds its font
    import ziamath

SIZE = 16.0  # pixels a line of text; the page scales it
_FORMULA = re.compile(
    r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>([.,;:)’]*)', re.DOTALL
)


def on_page_content(content: str, **_: Any) -> str:
    """Draw what the Markdown extension has marked as a formula."""
    return _FORMULA.sub(
        lambda found: drawn(html.unescape(found[2]).strip(), found[1] == "div", found[3]), content
    )


@cache
def drawn(tex: str, display: bool, after: str = "") -> str:
    """An SVG element of a formula, on the line where it is inline, named by its TeX source for
    screen readers.

    Args:
        tex: Formula in TeX.
        display: Whether it stands by itself.
        after: Punctuation that must not start the next line.
    """
    formula = ziamath.Latex(tex, size=SIZE, color="currentColor", inline=not display)
    svg = formula.svgxml()
    width, height, drop = (
        float(x) / SIZE for x in (svg.get("width"), svg.get("height"), formula.getyofst())
    )
    svg.set("width", f"{width:.3f}em")
    svg.set("height", f"{height:.3f}em")
    svg.set("role", "img")
    svg.set("aria-label", tex)
    if not display:
        svg.set("style", f"vertical-align: {drop:.3f}em")
    ElementTree.register_namespace("", "http://www.w3.org/2000/svg")
    kind = "div" if display else "span"
    return (
        f'<{kind} class="formula">{ElementTree.tostring(svg, encoding="unicode")}{after}</{kind}>'
    )
