"""Figures as SVG inside a page: text stays text, colours follow the page's light or dark scheme.

    svg = render_svg(figure, "loss", "Loss over the steps of the run")     # inside `picture_style()`

matplotlib's file is made for a page of its own, so what does not belong into another page is taken out: the XML head,
addresses of namespaces, metadata and the fixed size.
"""

from __future__ import annotations

import io
import re
from html import escape

import matplotlib
from matplotlib.figure import Figure

from sdpo_kernels.stepwise.report.drawing import BAND, BLUE, GREEN, GREY, INK, ORANGE, PINK, RULE, SOFT_INK

# the page's style gives each variable a value for light and one for dark
VARIABLES = {
    BLUE: "blue",
    ORANGE: "orange",
    GREEN: "green",
    PINK: "pink",
    GREY: "grey",
    INK: "ink",
    SOFT_INK: "soft",
    RULE: "rule",
    BAND: "band",
    "#ffffff": "paper",
}
_NO_METADATA = dict.fromkeys(["Creator", "Date", "Format", "Type"])


def render_svg(figure: Figure, name: str, alt: str) -> str:
    """`figure` as an <svg> element; `name` starts its ids, which must be unique in the page, `alt` describes it."""
    buffer = io.StringIO()
    # ids are random without a salt, and two reports of one run would differ
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", facecolor="none", metadata=_NO_METADATA)
    text = buffer.getvalue()

    # the style sheet inside would hold for the whole page, which has these two lines itself
    text = text[text.index("<svg") :]
    text = re.sub(r"<style.*?</style>", "", text, count=1, flags=re.DOTALL)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, count=1, flags=re.DOTALL)
    box = re.search(r'viewBox="([^"]*)"', text)
    assert box is not None
    head = f'<svg role="img" aria-label="{escape(alt)}" viewBox="{box[1]}">'
    text = re.sub(r"<svg[^>]*>", lambda _: head, text, count=1)
    text = text.replace("xlink:href", "href")

    # only within tags: a stage may be called 'id="x"' or '#0072b2'
    return re.sub(r"<[^>]*>", lambda tag: _in_page(tag[0], name), text)


def _in_page(tag: str, name: str) -> str:
    """A tag with ids that begin with `name`, and variables in place of colours."""
    if tag.startswith("<svg"):
        return tag
    tag = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", tag)
    return re.sub(r"#[0-9a-fA-F]{6}\b", _variable, tag)


def _variable(color: re.Match[str]) -> str:
    names = {known.lower(): variable for known, variable in VARIABLES.items()}
    variable = names.get(color[0].lower())
    return f"var(--{variable})" if variable else color[0]
