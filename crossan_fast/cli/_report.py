"""The findings of a run as one HTML file that needs no other: pictures for light and dark, and numbers."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping
from html import escape

from crossan_fast.cli._findings import MONITOR, Findings

_STYLE = """
:root { color-scheme: light dark; --ground: #fff; --ink: #1f2328; --soft: #59636e; --line: #d0d7de; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #161b22; --ink: #e6edf3; --soft: #9198a1; --line: #3d444d; }
}
body { font: 16px/1.5 system-ui, sans-serif; background: var(--ground); color: var(--ink);
  max-width: 54rem; margin: 0 auto; padding: 1rem; }
h1 { line-height: 1.2; overflow-wrap: anywhere; }
h2 { margin: 2.5rem 0 .5rem; }
p { margin: .5rem 0; }
.soft { color: var(--soft); }
img { display: block; width: 100%; height: auto; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: .25rem .75rem .25rem 0; border-bottom: 1px solid var(--line); text-align: right; }
th:first-child, td:first-child { text-align: left; }
summary { cursor: pointer; margin: .5rem 0; }
"""

_SECTIONS = {
    "curves": (
        "Training",
        "Validation that still rises at the end asks for more epochs; one that falls while the loss falls, "
        "for more dropout.",
    ),
    "gates": (
        "Which layers it listens to",
        "Left, the gate of each level: 1 takes the layer's state alone, 0 passes it over. Right, what that "
        "comes to: the part of a tower's result that passed from each level, adapters aside.",
    ),
    "cross": (
        "What encoders tell each other",
        "How much of another encoder's state of the same level a tower adds. Training starts at 0.",
    ),
    "experts": (
        "What each modality weighs",
        "The router's weights. A wide spread means that items are told apart by them; a narrow one, that all "
        "are mixed alike.",
    ),
    "without": (
        "What each modality is worth",
        "A modality is taken from every item and the test ranked again, without training again. It says what "
        "this model relies on, not what one trained without it would reach.",
    ),
    "map": (
        "The items",
        "Embeddings on their two principal axes. Items that lie together are recommended together.",
    ),
}


def report(found: Findings, light: Mapping[str, bytes], dark: Mapping[str, bytes]) -> str:
    """The page, of pictures (name → PNG) on a light and on a dark ground."""
    parts = [f"<h1>{escape(found.name)}</h1>", _summary(found)]
    for name in light:
        title, reading = _SECTIONS[name]
        parts.append(f"<h2>{title}</h2>\n<p class=soft>{reading}</p>")
        parts.append(
            f'<picture><source media="(prefers-color-scheme: dark)" srcset="{_inline(dark[name])}">'
            f'<img alt="{title}" src="{_inline(light[name])}"></picture>'
        )
        if name in _NUMBERS:
            parts.append(f"<details><summary>Numbers</summary>{_NUMBERS[name](found)}</details>")
    body = "\n".join(parts)
    return (
        "<!doctype html>\n<html lang=en>\n<head>\n<meta charset=utf-8>\n"
        '<meta name=viewport content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(found.name)}</title>\n<style>{_STYLE}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def _summary(found: Findings) -> str:
    modalities = ", ".join(found.explained["modality"])
    best = f", best epoch {found.history[-1]['best_epoch']} of {len(found.history)}" if found.history else ""
    return (
        f"<p>Test {MONITOR.upper()} <strong>{100 * found.without['']:.2f} %</strong>; "
        f"{len(found.points):,} items by {escape(modalities)}; {found.parameters:,} parameters{best}.</p>\n"
        f"<p class=soft>{escape(found.protocol)}</p>"
    )


def _gates(found: Findings) -> str:
    explained = found.explained
    return _table(explained["tower"], explained["gate"], "μ") + _table(
        explained["modality"], explained["share"], "share"
    )


def _cross(found: Findings) -> str:
    gates = found.explained["cross_gate"]
    return _table([f"{receiver} ← {sender}" for receiver, sender in gates], gates.values(), "tanh(ν)")


def _table(names: Iterable[str], rows: Iterable[Iterable[float]], what: str) -> str:
    lines = [[f"{value:.4f}" for value in row] for row in rows]
    heads = "".join(f"<th>{level}</th>" for level in range(len(lines[0])))
    body = "".join(
        f"<tr><td>{escape(name)}</td>{''.join(f'<td>{value}</td>' for value in line)}</tr>"
        for name, line in zip(names, lines, strict=True)
    )
    return f"<div class=wide><table><tr><th>{what} by level</th>{heads}</tr>{body}</table></div>"


def _inline(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


_NUMBERS = {"gates": _gates, "cross": _cross}
