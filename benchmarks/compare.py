"""`compare OLD NEW`: which passes became slower, or heavier, than noise explains."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from benchmarks import results
from benchmarks.results import Row

# A regression is past these ratios, and in time past the spread of both runs too.
SLOWER, HEAVIER = 1.10, 1.10
_MEGABYTE = 1 << 20  # what the resident memory of a process is counted to, see `memory`


@dataclass(frozen=True)
class Change:
    """One pass in both runs.

    Attributes:
        time, memory: new over old; memory is None where either is not known.
        slower, heavier, faster: whether the change is past the noise.
    """

    old: Row
    new: Row

    @property
    def time(self) -> float:
        return self.new.p50_ms / self.old.p50_ms

    @property
    def memory(self) -> float | None:
        if self.old.peak_bytes is None or self.new.peak_bytes is None:
            return None
        return (self.new.peak_bytes + _MEGABYTE) / (self.old.peak_bytes + _MEGABYTE)

    @property
    def slower(self) -> bool:
        return self.time > SLOWER and self.new.p20_ms > self.old.p80_ms

    @property
    def faster(self) -> bool:
        return self.time < 1 / SLOWER and self.new.p80_ms < self.old.p20_ms

    @property
    def heavier(self) -> bool:
        return self.memory is not None and self.memory > HEAVIER

    def __str__(self) -> str:
        verdicts = {"SLOWER": self.slower, "HEAVIER": self.heavier, "faster": self.faster}
        words = [word for word, holds in verdicts.items() if holds]
        memory = "" if self.memory is None else f", memory × {self.memory:.2f}"
        case, dtype, backend, passes = self.new.key
        return (
            f"{' '.join(words) or 'same':<8} {case} {dtype} {backend} {passes}: "
            f"{self.old.p50_ms:.3f} → {self.new.p50_ms:.3f} ms (× {self.time:.2f}{memory})"
        )


def load(source: str, folder: Path = results.FOLDER) -> list[Row]:
    """Rows of a CSV file, or of a commit (its first letters) in all files of `folder`.

    Raises:
        ValueError: neither a file nor a commit that has rows.
    """
    if Path(source).is_file():
        return results.read(Path(source))
    rows = [
        row for path in results.files(folder) for row in results.read(path) if row.commit.startswith(source)
    ]
    if not rows:
        raise ValueError(f"{source}: neither a CSV file nor a commit with rows in {folder}")
    return rows


def changes(old: list[Row], new: list[Row]) -> list[Change]:
    """The passes that both hold, on the same device with as many threads; the last row of each counts."""

    def keyed(rows: list[Row]) -> dict[tuple[str | int, ...], Row]:
        return {(row.device, row.threads, *row.key): row for row in rows}

    before, after = keyed(old), keyed(new)
    return [Change(before[key], row) for key, row in after.items() if key in before]
