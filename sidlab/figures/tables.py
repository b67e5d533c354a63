"""Tables as HTML, where a reader who cannot see a figure finds the same."""

import html


def table(head, rows, escape=True) -> str:
    """An HTML table. Cells are escaped; with `escape=False` those of `rows` are HTML already."""
    written = html.escape if escape else str
    top = "".join(
        f'<th scope="col" style="text-align: left">{html.escape(str(cell))}</th>' for cell in head
    )
    body = "".join(
        "<tr>" + "".join(f"<td>{written(str(cell))}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f'<table cellpadding="4"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>'


def folded(summary: str, content: str) -> str:
    """HTML that shows `summary` and, opened, `content` (both HTML)."""
    return f"<details><summary>{summary}</summary>{content}</details>"
