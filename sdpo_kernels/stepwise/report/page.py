"""Self-contained HTML pages: no script, nothing loaded."""

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
:root { color-scheme: light; }
body { margin: 0; background: #f5f7f9; color: #20262e;
  font: 15px/1.5 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; }
main { max-width: 1280px; margin: 0 auto; padding: 32px 24px 64px; }
h1 { font-size: 26px; line-height: 1.2; margin: 0 0 8px; overflow-wrap: anywhere; }
h2 { font-size: 17px; margin: 32px 0 8px; }
.facts { margin: 0; color: #5b6470; overflow-wrap: anywhere; }
.wide { overflow-x: auto; margin: 24px 0; }
.wide, figure, pre { background: #fff; border: 1px solid #e3e6ea; border-radius: 8px; }
table { border-collapse: collapse; width: 100%; font-size: 14px; font-variant-numeric: tabular-nums; }
th, td { padding: 7px 14px; text-align: right; white-space: nowrap; }
th { color: #5b6470; font-weight: 600; border-bottom: 1px solid #e3e6ea; }
tbody tr + tr td { border-top: 1px solid #eef0f3; }
.text { text-align: left; }
td.text { min-width: 140px; max-width: 320px; white-space: normal; overflow-wrap: anywhere; }
.pictures { display: grid; gap: 20px; grid-template-columns: repeat(auto-fit, minmax(min(480px, 100%), 1fr)); }
figure { margin: 0; padding: 14px 14px 10px; }
img { display: block; width: 100%; max-width: 1240px; height: auto; margin: 0 auto; }
figcaption { margin-top: 6px; color: #5b6470; font-size: 13px; }
pre { margin: 0; padding: 16px; overflow-x: auto; font: 13px/1.5 ui-monospace, "DejaVu Sans Mono", monospace; }
"""
