"""The HTML page of every report: one style, light and dark, from 380 px on; no scripts, nothing that is fetched.

A page is a title and parts; what makes the parts (here and `table.to_html`) escapes all text.
"""

import base64
import html
import string
from collections.abc import Iterable


def page(title: str, parts: Iterable[str]) -> bytes:
    """The whole file."""
    values = {"title": html.escape(title), "parts": "\n".join(parts), "telephone": _TELEPHONE}
    return _PAGE.substitute(values).encode(errors="replace")


def heading(text: str) -> str:
    """Of a section."""
    return f"<h2>{html.escape(text)}</h2>"


def paragraphs(texts: Iterable[str], kind: str = "") -> str:
    """One for each text. `kind`: quiet (small print), alert (a warning), or none."""
    tag = f'<p class="{kind}">' if kind else "<p>"
    return "\n".join(f"{tag}{html.escape(text)}</p>" for text in texts)


def picture(wide: bytes, narrow: bytes, alt: str, caption: str = "") -> str:
    """A PNG, which becomes part of the page, and what it shows in words: for who cannot see it, and below it.

    `narrow` takes its place on a telephone, where the wide one's labels would be too small to read.
    """
    source, small = (f"data:image/png;base64,{base64.b64encode(png).decode()}" for png in (wide, narrow))
    below = f'<figcaption class="quiet">{html.escape(caption)}</figcaption>' if caption else ""
    image = f'<source media="{_TELEPHONE}" srcset="{small}">\n<img alt="{html.escape(alt)}"\nsrc="{source}">'
    return f"<figure><picture>\n{image}</picture>\n{below}</figure>"


_TELEPHONE = "screen and (max-width: 600px)"

_PAGE = string.Template("""\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root { color-scheme: light dark;
  --text: #1c1c1c; --quiet: #5c5c5c; --rule: #d9d9d9; --back: #fff; --alert: #fff1e3; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e8e8e8; --quiet: #a8a8a8; --rule: #444; --back: #17181a; --alert: #4a2c12; }
}
body { font: 16px/1.5 system-ui, sans-serif; color: var(--text); background: var(--back);
       max-width: 68rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
p { max-width: 50rem; margin: .5rem 0; overflow-wrap: anywhere; }
.quiet { color: var(--quiet); font-size: .875rem; }
.alert { background: var(--alert); border-left: 4px solid #d55e00; padding: .5rem .75rem; }
figure { margin: 1.5rem 0; }
figcaption { max-width: 720px; margin-top: .5rem; }
figure img { display: block; width: 720px; max-width: 100%; background: #fff; border-radius: 4px; }
.table { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: .35rem .75rem .35rem 0;
         border-bottom: 1px solid var(--rule); }
th { font-weight: 600; vertical-align: bottom; }
th span { white-space: nowrap; }
td:first-child { overflow-wrap: anywhere; min-width: 5rem; }
@media $telephone {
  figure img { width: 100%; }
  table { font-size: .75rem; }
  th, td { padding-right: .35rem; }
  td:first-child { min-width: 4.25rem; }
  .table:last-of-type td { white-space: nowrap; } /* long words, most of them off the screen, make no tall rows */
}
@media print {
  body { font-size: 10pt; max-width: none; margin: 0; padding: 0; }
  .table { overflow: visible; }
  table { font-size: 7.5pt; }
  th, td { padding-right: .4rem; }
  figure, tr { break-inside: avoid; }
  h2 { break-after: avoid; }
}
</style>
</head>
<body>
<h1>$title</h1>
$parts
</body>
</html>
""")
