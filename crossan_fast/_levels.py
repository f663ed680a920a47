"""The levels of x86-64 that a wheel's libraries are compiled for, and what a CPU must have for each.

After the x86-64 psABI, in the names of /proc/cpuinfo (`abm` there holds LZCNT).
"""

from __future__ import annotations

_V3 = ("avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "xsave")

LEVELS: dict[str, tuple[str, ...]] = {
    "x86-64-v3": _V3,
    "x86-64-v4": (*_V3, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"),
}


def needed(march: str) -> str | None:
    """What a library compiled for a level needs, machine first: `x86_64 avx …`; None of another."""
    return " ".join(["x86_64", *LEVELS[march]]) if march in LEVELS else None
