"""One-page reports as HTML that needs no network: tables, sections, pictures, the page.

It knows HTML and nothing of studies or slides. Everything that comes from users' files is escaped.
"""

from collections.abc import Iterable, Sequence
from html import escape

_STYLE = """
:root { color-scheme: light; --ink: #1d242b; --soft: #5b6570; --line: #d9dfe4; --accent: #1f5fa8; }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); margin: 0; background: #f5f7f8; }
main { max-width: 1080px; margin: 0 auto; padding: 28px 24px 60px; background: #fff; }
h1 { font-size: 26px; line-height: 1.2; margin: 0 0 4px; } h2 { font-size: 18px; margin: 34px 0 8px; }
p { max-width: 78ch; } .soft { color: var(--soft); } .lead { font-size: 17px; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: 8px 0; }
th, td { padding: 4px 12px 4px 0; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th { font-weight: 600; color: var(--soft); } th:first-child, td:first-child { text-align: left; }
.wide { overflow-x: auto; } .row { display: flex; flex-wrap: wrap; gap: 12px; }
figure { margin: 0; flex: 1 1 310px; max-width: 420px; } figure.full { max-width: 760px; flex-basis: 100%; }
figure svg { width: 100%; height: auto; } figcaption { color: var(--soft); font-size: 13px; }
details { margin: 8px 0; } summary { cursor: pointer; color: var(--accent); }
img { max-width: 100%; } code { font-size: 13px; overflow-wrap: anywhere; }
.tiles { display: flex; flex-wrap: wrap; gap: 8px; } .tiles img { width: 128px; height: 128px; }
"""


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a table; the first column is text, the others figures."""
    cells = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table></div>'


def figure(picture: str, caption: str, full: bool = False) -> str:
    """Return a picture (SVG or img element) with its caption."""
    kind = ' class="full"' if full else ""
    return f"<figure{kind}>{picture}<figcaption>{escape(caption)}</figcaption></figure>"


def section(title: str, *parts: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{''.join(parts)}</section>"


def paragraph(text: str, kind: str = "") -> str:
    return f'<p class="{kind}">{escape(text)}</p>' if kind else f"<p>{escape(text)}</p>"


def folded(summary: str, content: str) -> str:
    """Return content that opens on a click."""
    return f"<details><summary>{escape(summary)}</summary>{content}</details>"


def page(title: str, *parts: str) -> str:
    """Return the whole document."""
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}<title>{escape(title)}</title><style>{_STYLE}</style></head>'
        f"<body><main>{''.join(parts)}</main></body></html>\n"
    )
