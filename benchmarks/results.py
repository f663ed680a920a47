"""The rows that a run appends to `results/<device>.csv`, and where they are read again."""

from __future__ import annotations

import csv
import datetime
import functools
import importlib.metadata
import os
import platform
import re
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
FOLDER = Path(__file__).resolve().parent / "results"


@dataclass(frozen=True)
class Row:
    """One measured pass of one implementation of one case.

    Attributes:
        commit: of the working tree; `+` at its end where tracked files outside the results differ from it.
        threads: of torch on the host.
        passes: `forward`, `backward`, `both`, or `run`.
        samples: calls behind the percentiles.
        peak_bytes: the most memory the pass added; None where it can't be told.
        floor_ms: the least time by bytes and arithmetic at this run's ceilings; None without a floor.
        floor_share: floor_ms / p50_ms.
        copy_gbps, matmul_tflops: those ceilings.
    """

    commit: str
    date: str
    device: str
    threads: int
    torch: str
    triton: str
    case: str
    backend: str
    dtype: str
    passes: str
    samples: int
    p20_ms: float
    p50_ms: float
    p80_ms: float
    peak_bytes: int | None
    floor_ms: float | None
    floor_share: float | None
    copy_gbps: float
    matmul_tflops: float

    @property
    def key(self) -> tuple[str, str, str, str]:
        return self.case, self.dtype, self.backend, self.passes


_HEADER = ["pass" if f.name == "passes" else f.name for f in fields(Row)]


def append(path: Path, rows: Iterable[Row]) -> None:
    """Append rows, each on disk when this returns; a new file gets the header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists() or path.stat().st_size == 0
    with open(path, "a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if new:
            writer.writerow(_HEADER)
        for row in rows:
            writer.writerow(["" if value is None else _text(value) for value in asdict(row).values()])
            file.flush()
            os.fsync(file.fileno())


def files(folder: Path) -> list[Path]:
    """The files of `folder` that hold rows of this layout; other tables lie beside them."""
    found = []
    for path in sorted(folder.glob("*.csv")):
        with open(path, newline="") as file:
            if next(csv.reader(file), None) == _HEADER:
                found.append(path)
    return found


def read(path: Path) -> list[Row]:
    """All rows of a file. Raises ValueError, with the line, for a file of another layout."""
    with open(path, newline="") as file:
        reader = csv.reader(file)
        header = next(reader, None)
        if header != _HEADER:
            raise ValueError(f"{path}: expected the columns {_HEADER}, got {header}")
        rows = []
        for line, values in enumerate(reader, start=2):
            # A run that was cut off may leave half a line.
            if len(values) != len(_HEADER):
                raise ValueError(f"{path}, line {line}: expected {len(_HEADER)} values, got {len(values)}")
            rows.append(_parse(values))
    return rows


def latest(rows: Iterable[Row]) -> dict[tuple[str, str, str, str], Row]:
    """The last row of each key: files grow at their end."""
    return {row.key: row for row in rows}


def _parse(values: list[str]) -> Row:
    parsed: dict[str, Any] = {}
    for field, value in zip(fields(Row), values, strict=True):
        kind = str(field.type)
        if value == "" and "None" in kind:
            parsed[field.name] = None
        elif kind.startswith("int"):
            parsed[field.name] = int(value)
        elif kind.startswith("float"):
            parsed[field.name] = float(value)
        else:
            parsed[field.name] = value
    return Row(**parsed)


def _text(value: object) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)


@functools.cache
def environment(device: torch.device) -> dict[str, Any]:
    """The columns that are the same for all rows of a run."""
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = ""
    return {
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%MZ"),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": triton,
    }


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    if match := re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE):
        name = match.group(1)
    instructions = torch.backends.cpu.get_cpu_capability()
    if "amx_bf16" in text:
        instructions += " AMX"
    return f"{name.strip()}, {os.cpu_count()} cores, {instructions}"


def default_path(device: torch.device) -> Path:
    """`results/<device>.csv`."""
    return FOLDER / f"{slug(device_name(device))}.csv"


def slug(name: str) -> str:
    name = re.sub(r"\((r|tm)\)|\bprocessor\b|\bcpu\b|@.*?ghz", "", name.lower())
    return re.sub(r"[^a-z0-9]+", "-", name).strip("-")


def commit() -> str:
    """The short commit, `+` at its end where the tree differs; `unknown` outside a git checkout.

    A copy of a checkout without its history is told by CROSSAN_FAST_COMMIT.
    """
    if told := os.environ.get("CROSSAN_FAST_COMMIT"):
        return told
    try:
        short = _git("rev-parse", "--short=10", "HEAD").strip()
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return short + ("+" if changed.strip() else "")


def _git(*arguments: str) -> str:
    return subprocess.run(
        ["git", "-C", str(ROOT), *arguments], check=True, capture_output=True, text=True
    ).stdout
