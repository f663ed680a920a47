"""The targets as ratios of recorded rows, so that met or missed is computed, not typed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.registry import OURS
from benchmarks.results import Row

Rows = Mapping[tuple[str, str, str, str], Row]

_ENCODER = "item_encoder/N={},M=4,D=768,L=7,r=64"
_STEP = "step/B={},M=4,D=768,loss={}"


@dataclass(frozen=True)
class Target:
    """One line of the table: ours over, or under, another row.

    Attributes:
        what: in words.
        device: `cuda` or `cpu`; `avx512` or `avx2` where the number is for CPUs with just these vectors.
        case, dtype: ours.
        against: (case, dtype, backend) of the row compared with; None: the number stands by itself.
        quantity: `time` or `memory` (other over ours), `floor` (share of it), `seconds` (ours), `slowdown`
            (ours over the other).
        bound: at least, for `time`, `memory` and `floor`; at most for the others.
    """

    what: str
    device: str
    case: str
    dtype: str
    quantity: str
    bound: float
    against: tuple[str, str, str] | None = None

    def measured(self, rows: Rows) -> tuple[float, Row] | None:
        """The number, and our row that gave it: the best of our backends; None where a row is missing.

        Rows of two commits give none, either.
        """
        ours = best(rows, self.case, self.dtype)
        if ours is None:
            return None
        if self.quantity == "seconds":
            return ours.p50_ms / 1e3, ours
        if self.quantity == "floor":
            return None if ours.floor_share is None else (ours.floor_share, ours)
        assert self.against is not None
        case, dtype, backend = self.against
        other = (
            best(rows, case, dtype) if backend == "ours" else rows.get((case, dtype, backend, ours.passes))
        )
        if other is None or other.commit != ours.commit:  # ratios are of one run
            return None
        if self.quantity == "memory":
            light = best(rows, self.case, self.dtype, weighed=True)
            if light is None or not light.peak_bytes or other.peak_bytes is None:
                return None
            return other.peak_bytes / light.peak_bytes, light
        ratio = other.p50_ms / ours.p50_ms
        return (1 / ratio if self.quantity == "slowdown" else ratio), ours

    def met(self, value: float) -> bool:
        return value >= self.bound if self.quantity in ("time", "memory", "floor") else value <= self.bound

    @property
    def asked(self) -> str:
        return {
            "time": f"≥ {self.bound:g}×",
            "memory": f"≤ 1/{self.bound:g}",
            "floor": f"≥ {self.bound:.0%} of the floor",
            "seconds": f"≤ {self.bound:g} s",
            "slowdown": f"≤ {self.bound:g}×",
        }[self.quantity]

    def shown(self, value: float) -> str:
        return {
            "time": f"{value:.1f}×",
            "memory": f"1/{value:.1f}",
            "floor": f"{value:.0%}",
            "seconds": f"{value:.2f} s",
            "slowdown": f"{value:.2f}×",
        }[self.quantity]


def best(rows: Rows, case: str, dtype: str, weighed: bool = False) -> Row | None:
    """Our fastest backend's row of a case, both passes (or the only one); `weighed`: of those with a peak."""
    found = [
        row
        for backend in OURS
        for passes in ("both", "run")
        if (row := rows.get((case, dtype, backend, passes))) is not None
        and not (weighed and row.peak_bytes is None)
    ]
    return min(found, key=lambda row: row.p50_ms, default=None)


def _ratio(
    what: str, device: str, case: str, dtype: str, bound: float, backend: str, other: str | None = None
) -> Target:
    against = (case, other or dtype, backend)
    return Target(f"{what}, against {backend}", device, case, dtype, "time", bound, against)


_PAPER, _WHOLE = _ENCODER.format(704), _ENCODER.format(20_314)
_LOSS = "in_batch_loss/rows=10240,columns=11264,d=64"
_STEP_64, _STEP_1024 = _STEP.format(64, "in_batch"), _STEP.format(1024, "in_batch")
_PAIR_STEP = "step/B=64,M=2,D=768,{}loss=in_batch"
_FULL_STEP = "step/B=256,M=2,D=384,loss=full"
_EPOCH = "epoch/data={},B=64,M=2,D=384"
_EPOCH_4 = "epoch/data=synthetic,B=64,M=4,D=768"
_LOSSES = (
    ("in-batch loss, B = 64", "in_batch_loss/rows=640,columns=704,d=64"),
    ("in-batch loss, B = 1,024", _LOSS),
    ("full softmax, B = 64", "full_loss/rows=640,columns=20314,d=64"),
    ("full softmax, B = 1,024", "full_loss/rows=10240,columns=20314,d=64"),
)
_MAPPED = "step_mapped/items={},B=64,M=2,D=384,pages=memory"

TARGETS = (
    _ratio("side network + MOMEF, 704 items", "cuda", _PAPER, "bf16", 15, "eager"),
    _ratio("side network + MOMEF, 704 items", "cuda", _PAPER, "bf16", 3, "compiled"),
    _ratio("side network + MOMEF, 20,314 items", "cuda", _WHOLE, "bf16", 6, "eager"),
    _ratio("side network + MOMEF, 20,314 items", "cuda", _WHOLE, "bf16", 2, "compiled"),
    Target("side network + MOMEF, 20,314 items", "cuda", _WHOLE, "bf16", "floor", 0.5),
    _ratio("training step, B = 64", "cuda", _STEP_64, "bf16", 20, "eager"),
    Target("epoch of the Scientific data's shape, M = 4, D = 768", "cuda", _EPOCH_4, "bf16", "seconds", 0.15),
    Target(
        "epoch of the Scientific data's shape, M = 2, D = 384",
        "cuda",
        _EPOCH.format("synthetic"),
        "bf16",
        "seconds",
        0.15,
    ),
    Target(
        "memory of a step, B = 1,024", "cuda", _STEP_1024, "bf16", "memory", 15, (_STEP_1024, "bf16", "eager")
    ),
    _ratio("in-batch loss, 10,240 × 11,264", "cuda", _LOSS, "bf16", 5, "eager"),
    Target("its memory", "cuda", _LOSS, "bf16", "memory", 20, (_LOSS, "bf16", "eager")),
    Target(
        "full softmax step, B = 64, against in-batch",
        "cuda",
        _STEP.format(64, "full"),
        "bf16",
        "slowdown",
        2,
        (_STEP_64, "bf16", "ours"),
    ),
    _ratio("side network + MOMEF, 704 items, fp32", "avx512", _PAPER, "fp32", 4.5, "eager"),
    _ratio("side network + MOMEF, 704 items, fp32", "avx512", _PAPER, "fp32", 2.3, "compiled"),
    _ratio("side network + MOMEF, 704 items, fp32", "avx2", _PAPER, "fp32", 2.9, "eager"),
    _ratio("side network + MOMEF, 704 items, fp32", "avx2", _PAPER, "fp32", 2, "compiled"),
    Target("its memory", "cpu", _PAPER, "fp32", "memory", 12, (_PAPER, "fp32", "eager")),
    Target(
        "the same in bf16, against ours in fp32", "cpu", _PAPER, "bf16", "time", 1, (_PAPER, "fp32", "ours")
    ),
    _ratio("training step, B = 64, fp32", "avx512", _STEP_64, "fp32", 5.5, "eager"),
    _ratio("training step, B = 64, fp32", "avx2", _STEP_64, "fp32", 4.2, "eager"),
    Target("its memory", "cpu", _STEP_64, "fp32", "memory", 15, (_STEP_64, "fp32", "eager")),
    *(
        Target(
            f"training step, B = 64, M = 2, D = 768, fp32, as {name}, against IISAN's public code",
            "cpu",
            _PAIR_STEP.format(named),
            "fp32",
            "time",
            bound,
            (_PAIR_STEP.format(named), "fp32", "iisan"),
        )
        for name, named, bound in (("IISAN", "architecture=iisan,", 5), ("CROSSAN", "", 6))
    ),
    _ratio("full-softmax step, B = 256, M = 2, D = 384, fp32", "avx512", _FULL_STEP, "fp32", 4.5, "eager"),
    _ratio("full-softmax step, B = 256, M = 2, D = 384, fp32", "avx2", _FULL_STEP, "fp32", 3.5, "eager"),
    *(_ratio(what, "cpu", case, "fp32", 3, "eager") for what, case in _LOSSES),
    _ratio("epoch of the Scientific recipe, fp32", "avx512", _EPOCH.format("scientific"), "fp32", 5, "eager"),
    _ratio("epoch of the Scientific recipe, fp32", "avx2", _EPOCH.format("scientific"), "fp32", 3.6, "eager"),
    Target(
        "catalogue × 10, memory-mapped, pages in memory",
        "cpu",
        _MAPPED.format(100_000),
        "fp32",
        "slowdown",
        1.1,
        (_MAPPED.format(10_000), "fp32", "ours"),
    ),
    Target(
        "full ranking, 12,076 users × 20,314 items",
        "cpu",
        "rank_of_target/users=12076,items=20314,d=64",
        "fp32",
        "seconds",
        0.08,
    ),
)


def kinds(device: str) -> tuple[str, ...]:
    """Which targets' `device` a recorded device's name answers to."""
    if "NVIDIA" in device:
        return ("cuda",)
    return ("cpu", "avx512") if "AVX512" in device else ("cpu", "avx2")
