"""What README and the site's pages draw from the recorded rows.

It stands between `<!-- NAME:begin -->` and `<!-- NAME:end -->`, NAME being one of `DRAWINGS`.
`python -m benchmarks report` writes it into the files, and a build of the site draws it anew.
"""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Callable
from pathlib import Path

from benchmarks import report, results
from benchmarks.study import table
from benchmarks.targets import Rows, kinds
from crossan_fast._files import write_whole

_BLOCK = re.compile(r"(<!-- ([a-z]+):begin -->\n)(.*?)(<!-- \2:end -->)", re.DOTALL)
_BEGIN = re.compile(r"<!-- [a-z]+:begin -->")
# The compiled kernels that the site shows: the paper's size, where a step spends its time.
_SHOWN = (
    ("side_network n=20314 D=768 r=64", "bf16"),
    ("fusion n=20314 d=64", "bf16"),
    ("in_batch_loss rows=10240 columns=11264 d=64", "bf16"),
)


def write(root: Path = results.ROOT, folder: Path = results.FOLDER) -> list[Path]:
    """Draw every device's plots beside its file, then README's and the pages' blocks; gives the files."""
    written = []
    for path in results.files(folder):
        written += report.draw(results.latest(results.read(path)), path)
    for page in [root / "README.md", *sorted((root / "docs").glob("*.md"))]:
        old = page.read_text(encoding="utf-8")
        if _BEGIN.search(old):
            write_whole(page, fill(old, page, folder))
            written.append(page)
    return written


def fill(text: str, page: Path, folder: Path = results.FOLDER) -> str:
    """`text` of `page` with each of its blocks drawn; links go from the page's own folder.

    Raises:
        ValueError: a block of an unknown name, or one that begins and does not end.
    """

    def drawn(block: re.Match[str]) -> str:
        if block[2] not in DRAWINGS:
            raise ValueError(f"{page}: expected a block of {', '.join(DRAWINGS)}, got {block[2]!r}")
        return f"{block[1]}{DRAWINGS[block[2]](folder, page.parent)}\n{block[4]}"

    if len(_BLOCK.findall(text)) != len(_BEGIN.findall(text)):
        raise ValueError(f"{page}: expected an end mark after every begin mark")
    return _BLOCK.sub(drawn, text)


def _measured(folder: Path) -> list[tuple[Path, Rows]]:
    found = [(path, results.latest(results.read(path))) for path in results.files(folder)]
    return [(path, rows) for path, rows in found if rows]


def _results(folder: Path, here: Path) -> str:
    blocks = [report.block(rows, report.plots_of(path), here) for path, rows in _measured(folder)]
    return "\n\n".join(blocks)


def _speed(folder: Path, here: Path) -> str:
    return report.speed([rows for _, rows in _measured(folder) if "cpu" in kinds(_device(rows))])


def _targets(folder: Path, here: Path) -> str:
    """Of GPUs; a CPU's are on the page of results."""
    gpus = [rows for _, rows in _measured(folder) if "cuda" in kinds(_device(rows))]
    return "\n\n".join("\n".join(report.targets(rows)) for rows in gpus) or "No GPU was measured yet."


def _device(rows: Rows) -> str:
    return next(iter(rows.values())).device


def _aot(folder: Path, here: Path) -> str:
    rows = _read(folder / "aot.csv")
    heads = ("kernel", "GPU", "warps", "registers", "spilled bytes", "shared kB", "HGMMA", "HMMA")
    lines = []
    for case, dtype in _SHOWN:
        shown = [row for row in rows if (row["case"], row["dtype"]) == (case, dtype)]
        lines += [f"### {case}, {dtype}", "", f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
        for row in sorted(shown, key=lambda row: (row["kernel"], row["arch"], int(row["registers"]))):
            name = row["kernel"].removesuffix("_kernel")
            cells = [name, *(row[key] for key in ("arch", "warps", "registers", "spill_bytes"))]
            cells += [f"{int(row['shared_bytes']) / 1e3:.1f}", row["hgmma"], row["hmma"]]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    spilling = sum(int(row["spill_bytes"]) > 0 for row in rows)
    versions = ", ".join(sorted({row["triton"] for row in rows}))
    lines.append(f"Of all {len(rows)} kernels compiled, by Triton {versions}, {spilling} spill.")
    return "\n".join(lines)


def _reliability(folder: Path, here: Path) -> str:
    path = folder / "reliability.csv"
    if not path.is_file():
        return "Nothing is recorded yet."
    rows = _read(path)
    if not rows:
        return "Nothing is recorded yet."
    heads = list(rows[0])
    lines = [f"| {' | '.join(head.replace('_', ' ') for head in heads)} |", "| --- " * len(heads) + "|"]
    lines += [f"| {' | '.join(row[head].replace('|', '/') for head in heads)} |" for row in rows]
    return "\n".join(lines)


def _table_of(name: str) -> Callable[[Path, Path], str]:
    """A recipe's page, as `benchmarks.recipes.tabulate` drew it, below a heading of ours."""

    def drawn(folder: Path, here: Path) -> str:
        text = (folder / f"{name}.md").read_text(encoding="utf-8")
        text = re.sub(r"^#", "###", text, flags=re.MULTILINE)
        return re.sub(r"\]\((?=[\w.-]+\.png\))", f"]({os.path.relpath(folder, here)}/", text).rstrip()

    return drawn


def _study(folder: Path, here: Path) -> str:
    """The table of each size that was measured; `tiny` is there for tests alone."""
    sizes = [size for size in ("minilm", "paper") if (folder / f"study-{size}.md").is_file()]
    return (
        "\n\n".join(_table_of(f"study-{size}")(folder, here) for size in sizes) or "Nothing is recorded yet."
    )


def _methods(folder: Path, here: Path) -> str:
    path = folder / "study-minilm.csv"
    return table.short(_read(path)) if path.is_file() else "Nothing is recorded yet."


def _read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


DRAWINGS: dict[str, Callable[[Path, Path], str]] = {
    "results": _results,
    "methods": _methods,
    "speed": _speed,
    "targets": _targets,
    "aot": _aot,
    "reliability": _reliability,
    "recipes": _table_of("scientific"),
    "basis": _table_of("basis"),
    "ablations": _table_of("ablations"),
    "encoders": _table_of("encoders"),
    "study": _study,
}
