"""Small pieces of an accessible, self-contained HTML page. It knows no results.

Every function takes plain text and escapes it; arguments called `*_html` are taken as they are.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

CSS = """
:root { color-scheme: light dark; --bg: #ffffff; --fg: #1c2024; --muted: #5a626b; --grid: #d5dae0;
  --panel: #f4f6f8; --accent: #1f5fa8; --series-1: #1f5fa8; --series-2: #b3500f;
  --series-3: #1a7350; --series-4: #8a3f9b; --series-5: #6b6f76; }
@media (prefers-color-scheme: dark) { :root { --bg: #14171a; --fg: #e6e9ec; --muted: #a2abb4;
  --grid: #3a424a; --panel: #1e2327; --accent: #7db4f0; --series-1: #7db4f0; --series-2: #f0a267;
  --series-3: #69cfa4; --series-4: #d59be4; --series-5: #b0b6bd; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0 auto; padding: 1rem; max-width: 62rem; background: var(--bg); color: var(--fg);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: .5rem 0; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 2.2rem 0 .6rem; padding-top: .6rem;
  border-top: 1px solid var(--grid); }
h3, h4 { font-size: 1.05rem; margin: 1.2rem 0 .4rem; }
h3.part { font-size: 1.15rem; margin-top: 1.8rem; color: var(--accent); }
a { color: var(--accent); }
nav ul { display: flex; flex-wrap: wrap; gap: .2rem 1rem; padding: 0; list-style: none; }
p, li, dd, td, th { overflow-wrap: anywhere; }
.note, figcaption, caption { color: var(--muted); font-size: .9rem; }
.note { border-left: 3px solid var(--grid); padding-left: .7rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding: .2rem 0 .4rem; }
th, td { padding: .35rem .5rem; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--grid); }
tbody th { font-weight: 500; }
thead th { font-size: .88rem; border-bottom: 2px solid var(--grid); }
td.number, th.number { text-align: right; overflow-wrap: normal; }
td.number { white-space: nowrap; }
tr > th:first-child { min-width: 6.5rem; overflow-wrap: break-word; position: sticky; left: 0;
  background: var(--bg); }
tr.ours > *, tr.ours > th:first-child { font-weight: 650; background: var(--panel); }
.why { display: block; font-size: .82rem; font-weight: 400; color: var(--muted); }
.ci { display: block; font-size: .8rem; font-weight: 400; color: var(--muted); }
figure { margin: 1rem 0; max-width: 34rem; }
svg { width: 100%; height: auto; font-family: inherit; }
svg * { stroke-linejoin: round; stroke-linecap: butt; }
dl { display: grid; grid-template-columns: minmax(7rem, 14rem) 1fr; gap: .2rem 1rem; margin: 0; }
dt { color: var(--muted); } dd { margin: 0; }
pre { background: var(--panel); padding: .7rem; overflow-x: auto; font-size: .85rem;
  white-space: pre-wrap; overflow-wrap: anywhere; }
details { margin: .6rem 0; } summary { cursor: pointer; color: var(--accent); }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 19rem), 1fr));
  gap: 0 1.5rem; }
@media (max-width: 30rem) { dl { grid-template-columns: 1fr; gap: 0; }
  dd { margin-bottom: .4rem; } }
@media print { :root { color-scheme: light; --bg: #ffffff; --fg: #000000; --muted: #444444;
  --grid: #bbbbbb; --panel: #f2f2f2; --accent: #000000; --series-1: #1f5fa8; --series-2: #b3500f;
  --series-3: #1a7350; --series-4: #8a3f9b; --series-5: #6b6f76; }
  body { max-width: none; padding: 0; font-size: 10pt; } nav { display: none; }
  figure, tr, dl, .sample { break-inside: avoid; } h2, h3 { break-after: avoid; }
  details::details-content { content-visibility: visible; block-size: auto; }
  .scroll { overflow: visible; } tr > th:first-child { position: static; } }
"""

# Nothing may be fetched, whatever a title holds.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def esc(value: Any) -> str:
    """Return text that is safe in HTML content and in quoted attributes."""
    return html.escape(str(value), quote=True)


def page(title: str, body_html: str) -> str:
    """Return a whole document."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{esc(title)}</title>\n<style>{CSS}</style>\n</head>\n"
        f"<body>\n{body_html}\n</body>\n</html>\n"
    )


def section(key: str, title: str, *parts_html: str) -> str:
    """Return a titled section that the table of contents can point to."""
    body = "\n".join(part for part in parts_html if part)
    return (
        f'<section id="{esc(key)}" aria-labelledby="{esc(key)}-title">\n'
        f'<h2 id="{esc(key)}-title">{esc(title)}</h2>\n{body}\n</section>'
    )


def subsection(key: str, title: str, *parts_html: str) -> str:
    """Return a section within a section; headings inside it go down by one level."""
    body = "\n".join(part for part in parts_html if part)
    for level in (4, 3):
        body = body.replace(f"<h{level}>", f"<h{level + 1}>").replace(
            f"</h{level}>", f"</h{level + 1}>"
        )
    return (
        f'<section id="{esc(key)}" aria-labelledby="{esc(key)}-title">\n'
        f'<h3 id="{esc(key)}-title" class="part">{esc(title)}</h3>\n{body}\n</section>'
    )


def paragraph(text: str, *, note: bool = False) -> str:
    """Return a paragraph, or a quieter note."""
    return f'<p class="note">{esc(text)}</p>' if note else f"<p>{esc(text)}</p>"


def table(
    caption: str,
    columns: Sequence[str],
    rows_html: Sequence[Sequence[str]],
    *,
    ours: Sequence[bool] = (),
) -> str:
    """Return a table whose first column heads its rows and whose other columns are figures.

    Args:
        caption: what the table shows (escaped).
        columns: heads (escaped).
        rows_html: cells as HTML; see `number` and `esc`.
        ours: which rows to set off.
    """
    heads = "".join(
        f'<th scope="col"{_number_class(i)}>{esc(column)}</th>' for i, column in enumerate(columns)
    )
    body = ""
    for i, row in enumerate(rows_html):
        cells = f'<th scope="row">{row[0]}</th>'
        cells += "".join(f'<td class="number">{cell}</td>' for cell in row[1:])
        mark = ' class="ours"' if i < len(ours) and ours[i] else ""
        body += f"<tr{mark}>{cells}</tr>\n"
    return (
        '<div class="scroll" tabindex="0" role="region" '
        f'aria-label="{esc(caption)}"><table>\n<caption>{esc(caption)}</caption>\n'
        f"<thead><tr>{heads}</tr></thead>\n<tbody>\n{body}</tbody>\n</table></div>"
    )


def number(value: Any, ci: Sequence[float] | None = None, *, signed: bool = False) -> str:
    """Return a figure of four digits with its interval beneath; a dash where there is none."""
    if value is None:
        return "–"
    sign = "+" if signed else ""
    text = f"{value:{sign}.4f}" if isinstance(value, float) else f"{value:,}"
    if ci is None:
        return text
    return f'{text}<span class="ci">[{ci[0]:{sign}.4f}, {ci[1]:{sign}.4f}]</span>'


def figure(svg_html: str, alt: str, caption: str) -> str:
    """Return a picture with a text alternative and a caption."""
    return (
        f'<figure>\n<div role="img" aria-label="{esc(alt)}">{svg_html}</div>\n'
        f"<figcaption>{esc(caption)}</figcaption>\n</figure>"
    )


def details(summary: str, body_html: str) -> str:
    """Return a block that opens on demand."""
    return f"<details><summary>{esc(summary)}</summary>\n{body_html}\n</details>"


def definitions(values: Mapping[str, Any]) -> str:
    """Return names and values; nested mappings become "outer, inner" names."""
    items = "".join(
        f"<dt>{esc(key)}</dt><dd>{esc(value)}</dd>\n" for key, value in _flat(values, "")
    )
    return f"<dl>\n{items}</dl>"


def _flat(values: Mapping[str, Any], prefix: str) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    for key, value in values.items():
        name = f"{prefix}, {key}" if prefix else str(key)
        name = name.replace("_", " ")
        if isinstance(value, Mapping):
            found += _flat(value, name)
        elif isinstance(value, list | tuple):
            found.append((name, ", ".join(str(v) for v in value) or "none"))
        else:
            found.append((name, _plain(value)))
    return found


def _plain(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _number_class(column: int) -> str:
    return ' class="number"' if column else ""
