"""`crossan-fast verify RUN`."""

from __future__ import annotations

import argparse
import sys


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `verify`."""
    parser = subparsers.add_parser(
        "verify",
        help="compare a run's files with their digests, and with each other",
        description="Read every file of a run, compare it with its digest, and see that all are of one run. "
        "Exit status 1 where one is damaged. For a cache: `crossan-fast cache verify`.",
    )
    parser.add_argument("run", help="folder of a run")


def run(args: argparse.Namespace) -> int:
    """Print what is damaged; 1 where something is."""
    from crossan_fast.training.verify import verify_run

    report = verify_run(args.run)
    for problem in report.problems:
        print(problem, file=sys.stderr)
    for name in report.unchecked:
        print(f"{args.run}: {name} has no digest, it is of an earlier version")
    if not report.problems:
        print(f"{args.run}: sound: {', '.join(report.sound)}")
    return 1 if report.problems else 0
