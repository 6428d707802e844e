"""One table in three forms: HTML, a terminal's, Markdown. A table is its rows of text, the head first."""

import html
from collections.abc import Sequence

Rows = Sequence[Sequence[str]]


def to_html(rows: Rows) -> str:
    """Escaped. A head breaks between words alone, which are what ordinary spaces part, never at a sign in one."""
    head, *body = ([html.escape(cell) for cell in row] for row in rows)
    heads = (" ".join(f"<span>{word}</span>" for word in cell.split(" ")) for cell in head)
    lines = ["<tr>" + "".join(f"<th>{cell}</th>" for cell in heads) + "</tr>"]
    lines += ["<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in body]
    return '<div class="table"><table>\n' + "\n".join(lines) + "\n</table></div>"


def to_text(rows: Rows) -> str:
    """For a terminal."""
    return "\n".join("  ".join(row).rstrip() for row in _padded(rows))


def to_markdown(rows: Rows) -> str:
    """As GitHub reads it, and aligned for those who read the source."""
    head, *body = _padded(rows)
    rule = "|".join("-" * (len(cell) + 2) for cell in head)
    return "\n".join([f"| {' | '.join(head)} |", f"|{rule}|", *(f"| {' | '.join(row)} |" for row in body)])


def _padded(rows: Rows) -> list[list[str]]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [list(map(str.ljust, row, widths)) for row in rows]
