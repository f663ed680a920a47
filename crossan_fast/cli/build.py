"""`crossan-fast build`: compile the kernels into the user's cache now, not on their first use."""

from __future__ import annotations

import argparse

from crossan_fast import _build
from crossan_fast.cli._output import add_json, show


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `build`."""
    parser = subparsers.add_parser(
        "build",
        help="compile the kernels now, not on their first use",
        description="Compile what the first use of an op would, into CROSSAN_FAST_BUILD_DIR, by default "
        "~/.cache/crossan_fast; says beforehand with what and for about how long. What is built already, or "
        "came with the wheel, is left alone.",
    )
    parser.add_argument(
        "parts", nargs="*", metavar="PART", help="cpu (default; needs g++ or clang), cuda (needs nvcc)"
    )
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Build, then say where."""
    parts = args.parts or ["cpu"]
    if wrong := [part for part in parts if part not in _build.PARTS]:
        raise ValueError(f"PART: expected some of {list(_build.PARTS)}, got {wrong[0]!r}")
    built, lines = {}, []
    for part in parts:
        there = _build.built(part) is not None
        info = _build.load(part)
        built[part] = info.library
        lines.append(f"{part}: {'was built already' if there else 'built'}: {info.library}")
    show(args, built, "\n".join(lines))
    return 0
