"""Self-contained HTML pages: no script, nothing loaded, light or dark as the reader's system is."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape

NOTHING = "–"  # the cell of a value that is missing


def html_table(columns: Sequence[tuple[str, bool]], rows: Sequence[Sequence[str]]) -> str:
    """A table; columns are (title, is_text), text is aligned left and numbers right."""
    kinds = [' class="text"' if text else "" for _, text in columns]
    head = "".join(f"<th{kind}>{escape(title)}</th>" for kind, (title, _) in zip(kinds, columns, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td{kind}>{escape(cell)}</td>" for kind, cell in zip(kinds, row, strict=True)) + "</tr>\n"
        for row in rows
    )
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table></div>'


def html_picture(png: bytes, caption: str) -> str:
    """The picture embedded in the page, with its caption, which is also the alt text."""
    text = escape(caption)
    source = "data:image/png;base64," + base64.b64encode(png).decode()
    return f'<figure><img alt="{text}" src="{source}"><figcaption>{text}</figcaption></figure>'


def html_figure(svg: str, caption: str) -> str:
    """An <svg> element of the page with its caption."""
    return f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>"


def html_terms(title: str, terms: Sequence[tuple[str, str]]) -> str:
    """A list of (term, what it means) that opens with a click; "" without terms."""
    items = "".join(f"<dt>{escape(term)}</dt><dd>{escape(text)}</dd>" for term, text in terms)
    return f"<details open><summary>{escape(title)}</summary><dl>{items}</dl></details>" if terms else ""


def html_page(title: str, body: str) -> str:
    """A whole page around `body` (HTML), in the project's style; its policy forbids the browser to load anything."""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{PAGE_STYLE}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""


POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
PAGE_STYLE = """
:root { color-scheme: light dark; --page: #f5f7f9; --paper: #ffffff; --ink: #20262e; --soft: #5b6470; --rule: #e3e6ea;
  --band: #f5f7f9; --grey: #8a9099; --blue: #0072b2; --orange: #d55e00; --green: #009e73; --pink: #cc79a7; }
@media (prefers-color-scheme: dark) {
  :root { --page: #14171b; --paper: #1d2126; --ink: #e4e7eb; --soft: #a3abb6; --rule: #343a42;
    --band: #252a31; --grey: #858d98; --blue: #56b4e9; --orange: #f0883e; --green: #3ccf9f; --pink: #e29ac4; } }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 32px 24px 64px; }
h1 { font-size: 26px; line-height: 1.2; margin: 0 0 8px; overflow-wrap: anywhere; }
h2 { font-size: 17px; margin: 32px 0 8px; }
h3 { font-size: 14px; margin: 16px 0 4px; }
.facts { margin: 0; color: var(--soft); overflow-wrap: anywhere; }
.wide { overflow-x: auto; margin: 24px 0 12px; }
.wide, figure, pre { background: var(--paper); border: 1px solid var(--rule); border-radius: 8px; }
table { border-collapse: collapse; width: 100%; font-size: 14px; font-variant-numeric: tabular-nums; }
th, td { padding: 7px 14px; text-align: right; white-space: nowrap; }
th { white-space: normal; vertical-align: bottom; color: var(--soft); font-weight: 600;
  border-bottom: 1px solid var(--rule); }
tbody tr + tr td { border-top: 1px solid var(--rule); }
.text { text-align: left; }
.text:first-child { position: sticky; left: 0; background: var(--paper); }
td.text { min-width: 110px; max-width: 320px; white-space: normal; overflow-wrap: anywhere; }
details { margin: 0 0 24px; font-size: 13px; color: var(--soft); }
summary { cursor: pointer; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 14px; margin: 6px 0 0; }
dt { color: var(--ink); }
dd { margin: 0; }
.pictures { display: grid; gap: 16px; grid-template-columns: repeat(auto-fit, minmax(min(340px, 100%), 1fr)); }
figure { margin: 0; padding: 10px 10px 8px; min-width: 0; }
figure img { background: #ffffff; }
img, figure svg { display: block; width: 100%; height: auto; margin: 0 auto; }
img { max-width: 1240px; }
figure svg { max-width: 560px; }
svg * { stroke-linejoin: round; stroke-linecap: butt; }
figcaption { margin-top: 6px; color: var(--soft); font-size: 13px; line-height: 1.4; }
pre { margin: 8px 0 0; padding: 16px; overflow-x: auto; font: 13px/1.5 ui-monospace, "DejaVu Sans Mono", monospace; }
.texts { background: var(--paper); border: 1px solid var(--rule); border-radius: 8px; padding: 10px 14px;
  margin: 12px 0; font-size: 13px; }
.texts dt { color: var(--soft); }
.texts dd { white-space: pre-wrap; overflow-wrap: anywhere; font-family: ui-monospace, "DejaVu Sans Mono", monospace; }
@media (max-width: 500px) {
  main { padding: 20px 12px 40px; }
  th, td { padding: 6px 9px; }
  dl { grid-template-columns: 1fr; gap: 0; }
  dd { margin-bottom: 6px; }
}
"""
