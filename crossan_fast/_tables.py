"""Tables as plain text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def text_table(rows: Sequence[Mapping[str, str]]) -> str:
    """Rows with the same headings, under them; numbers stand to the right, words to the left."""
    heads = list(rows[0]) if rows else []
    lines = [dict(zip(heads, heads, strict=True)), *rows]
    widths = {head: max(len(line[head]) for line in lines) for head in heads}
    right = {head: is_numeric([row[head] for row in rows]) for head in heads}
    text = (
        "  ".join(
            line[head].rjust(widths[head]) if right[head] else line[head].ljust(widths[head])
            for head in heads
        )
        for line in lines
    )
    return "\n".join(line.rstrip() for line in text)


def is_numeric(cells: Sequence[str]) -> bool:
    """Whether a column's cells are numbers, as far as they are filled."""
    return all(cell.replace(",", "").replace(".", "").removeprefix("-").isdigit() for cell in cells if cell)
