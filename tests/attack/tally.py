"""What an attack tried, and what became of it."""

from __future__ import annotations

import csv
import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

HEADER = ("what", "tried", "survived", "lost", "how they were lost")


@dataclass
class Tally:
    """Attributes:
    what: the attack, in words.
    tried: cases.
    lost: how a case was lost (`crashed`, `unnamed`, …), with the number of cases.
    examples: a case each, to be looked at.
    """

    what: str
    tried: int = 0
    lost: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)

    @property
    def survived(self) -> int:
        return self.tried - self.lost.total()

    def add(self, how: str | None, example: str = "") -> None:
        """One case more, lost in this way, or survived."""
        self.tried += 1
        if how is not None:
            self.lost[how] += 1
            self.examples.setdefault(how, example)

    def merge(self, other: Tally) -> None:
        self.tried += other.tried
        self.lost += other.lost
        self.examples = {**other.examples, **self.examples}

    def to_json(self) -> str:
        return json.dumps([self.what, self.tried, self.lost, self.examples])

    @classmethod
    def from_json(cls, text: str) -> Tally:
        what, tried, lost, examples = json.loads(text)
        return cls(what, tried, Counter(lost), examples)

    def __str__(self) -> str:
        lines = [f"{self.what}: {self.survived} of {self.tried} survived"]
        lines += [f"  {count} {how}, such as {self.examples[how]}" for how, count in self.lost.items()]
        return "\n".join(lines)


def write(path: Path, tallies: list[Tally]) -> None:
    """The table that the docs are drawn from; rows of other attacks that it has are kept."""
    rows = {}
    if path.exists():
        with open(path, newline="") as file:
            rows = {row[0]: row for row in list(csv.reader(file))[1:]}
    for tally in tallies:
        how = "; ".join(f"{count} {name}" for name, count in sorted(tally.lost.items()))
        rows[tally.what] = [tally.what, str(tally.tried), str(tally.survived), str(tally.lost.total()), how]
    with open(path, "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([HEADER, *rows.values()])
