"""What an evaluation gives: metrics, and the protocol that they were taken with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from crossan_fast._tables import text_table
from crossan_fast.training.train_config import FilterHistory

Part = Literal["validation", "test"]


@dataclass(frozen=True)
class Result:
    """Metrics and the protocol that they were taken with.

    Attributes:
        metrics: `hr@k`, `ndcg@k` for each k, and `mrr`; shares, not percent.
        split: which target was held out.
        filter_history: which items of a user's own history were no candidates.
        users: how many targets were ranked; one a user with leave-one-out.
        candidates: how many items each target was ranked among, itself included.
        note: what else to know, such as items of the cache that took no part; empty where there is nothing.
        held_out: how targets were held out, in words.
        lists: `coverage@k`, `novelty@k` in bits, and `diversity@k` of the lists of the best, see
            `crossan_fast.training.list_metrics`; empty where they were not asked for.
        by_target: likewise, `cold` for the targets that training never saw and `warm` for the others: how
            many (`targets`), and their metrics where there are any.
        tied: how many targets tie with another candidate for every user, as items with one embedding do.
        ties_at_random: `metrics` as they are on average where what ties stands in random order, which is
            about what a sort leaves, and not ahead of the target; empty where nothing does.
    """

    metrics: dict[str, float]
    split: Part
    filter_history: FilterHistory
    users: int
    candidates: int
    note: str = ""
    held_out: str = "leave-one-out"
    lists: dict[str, float] = field(default_factory=dict)
    by_target: dict[str, dict[str, float]] = field(default_factory=dict)
    tied: int = 0
    ties_at_random: dict[str, float] = field(default_factory=dict)

    def noting(self, *notes: str) -> Result:
        """With more to know, behind its own note; empty ones are nothing."""
        return replace(self, note="; ".join(filter(None, (self.note, *notes))))

    @property
    def protocol(self) -> str:
        """The protocol in words; goes wherever the numbers go."""
        targets = f"{self.split} targets of {self.users:,} users"
        if self.held_out != "leave-one-out":
            targets = f"{self.users:,} {self.split} targets ({self.held_out})"
        return (
            f"{targets}, full ranking of {self.candidates:,} items, "
            f"filter_history={self.filter_history}, ties against the target"
            + (f"; {self.note}" if self.note else "")
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; what was not asked for, or is not there, is not in it."""
        values = {**asdict(self), "protocol": self.protocol}
        return {name: value for name, value in values.items() if name not in _ASKED or value}

    def __str__(self) -> str:
        table = text_table(comparison({"": self}))
        return f"{self.protocol}\n{table}\nMRR {100 * self.metrics['mrr']:.2f} %"


_RANDOM = "all, ties in random order"
_ASKED = ("lists", "by_target", "tied", "ties_at_random")


def comparison(results: Mapping[str, Result]) -> list[dict[str, str]]:
    """The rows of a table, by heading: one a recommender, kind of target and cut-off."""
    rows = [row for name, result in results.items() for row in _rows(name, result)]
    heads = list(dict.fromkeys(head for row in rows for head in row))
    used = [head for head in heads if any(row.get(head) for row in rows)]
    return [{head: row.get(head, "") for head in used} for row in rows]


def _rows(name: str, result: Result) -> Iterator[dict[str, str]]:
    cutoffs = [key.removeprefix("hr@") for key in result.metrics if key.startswith("hr@")]
    parts = {"": result.metrics, **{kind: part for kind, part in result.by_target.items() if "mrr" in part}}
    parts |= {_RANDOM: result.ties_at_random} if result.ties_at_random else {}
    for kind, metrics in parts.items():
        counted = "all" if len(parts) > 1 else ""
        if kind:
            counted = f"{kind} ({metrics['targets']:,.0f})" if "targets" in metrics else kind
        for k in cutoffs:
            row = {"recommender": name, "targets": counted, "k": k}
            row["HR@k %"] = f"{100 * metrics[f'hr@{k}']:.2f}"
            row["NDCG@k %"] = f"{100 * metrics[f'ndcg@{k}']:.2f}"
            if name:
                row["MRR %"] = f"{100 * metrics['mrr']:.2f}" if k == cutoffs[0] else ""
            if result.lists and not kind:
                row["coverage %"] = f"{100 * result.lists[f'coverage@{k}']:.2f}"
                row["novelty, bits"] = f"{result.lists[f'novelty@{k}']:.2f}"
                row["diversity"] = f"{result.lists[f'diversity@{k}']:.3f}" if k != "1" else ""
            yield row
