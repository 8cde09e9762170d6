"""Turn the formulas of the pages into MathML while the site is built.

In its generic mode `pymdownx.arithmatex` leaves LaTeX in the page for a script to typeset in the browser.
Browsers lay out MathML themselves, so converting here spares the reader a download and lets the site work offline.
"""

import html
import re
from typing import Any

from latex2mathml.converter import convert

_FORMULA = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">\\(?P<open>[(\[])(?P<latex>.*?)\\[)\]]</(?P=tag)>', re.DOTALL
)


def on_page_content(content: str, **_: Any) -> str:
    """Replace each formula that arithmatex marked in `content` by MathML."""

    def replace(match: re.Match[str]) -> str:
        inline = match["open"] == "("
        formula = str(convert(html.unescape(match["latex"]).strip(), display="inline" if inline else "block"))
        # A displayed formula does not wrap: on a phone it scrolls in a box of its own, not with the page.
        return formula if inline else f'<div class="formula">{formula}</div>'

    return _FORMULA.sub(replace, content)
