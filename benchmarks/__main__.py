"""`python -m benchmarks list | run | check | report | compare | choose | study`; each takes `--help`."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks import choose, compare, measure, pages, registry, report, results
from benchmarks.study import run as study


def main(arguments: list[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    return int(options.run(options))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")

    listing = commands.add_parser("list", help="names, dtypes and tags of the cases")
    _selection(listing)
    listing.set_defaults(run=_list)

    running = commands.add_parser("run", help="check, time and weigh cases; append rows to the results")
    _selection(running)
    _implementations(running)
    running.add_argument("--seconds", type=float, help="of timing each (default 2 on a CPU, 0.3 on a GPU)")
    running.add_argument("--minimum", type=int, default=20, help="samples each has at least (default 20)")
    running.add_argument("--budget", type=float, help="seconds after which no further case begins")
    running.add_argument("--missing", action="store_true", help="only what has no row of this commit yet")
    running.add_argument("--output", type=Path, help="CSV file (default benchmarks/results/<device>.csv)")
    running.set_defaults(run=_run)

    checking = commands.add_parser("check", help="compare cases with the float64 reference; no times")
    _selection(checking)
    _implementations(checking)
    checking.add_argument("--calls", type=int, default=0, help="further calls, for a profiler (default 0)")
    checking.set_defaults(run=_check)

    reporting = commands.add_parser("report", help="draw plots, and README's and the site's tables")
    reporting.add_argument("--short", type=Path, metavar="CSV", help="only print one file's table")
    reporting.set_defaults(run=_report)

    comparing = commands.add_parser("compare", help="flag what became slower or heavier")
    comparing.add_argument("old", help="a CSV file, or a commit with rows in benchmarks/results/")
    comparing.add_argument("new", help="likewise")
    comparing.set_defaults(run=_compare)

    choosing = commands.add_parser(
        "choose", help="let measured rows say which backend runs each pass on a GPU"
    )
    choosing.add_argument("files", nargs="*", type=Path, help="CSV files (default all of benchmarks/results)")
    choosing.set_defaults(run=_choose)

    study.add_parser(commands)
    return parser


def _selection(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("pattern", nargs="?", help="part of a case's name, or a glob")
    parser.add_argument("--tag", action="append", default=[], help="only cases with this tag; repeatable")
    parser.add_argument("--device", default=None, help="cpu or cuda (default: cuda where there is one)")


def _implementations(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", help="implementations, e.g. eager,cpp")
    parser.add_argument("--dtypes", help="e.g. fp32,bf16")


def _device(options: argparse.Namespace) -> torch.device:
    if options.device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(options.device)


def _list(options: argparse.Namespace) -> int:
    for case in registry.select(options.pattern, options.tag, options.device):
        print(f"{case.importance:3d}  {case.name}  [{', '.join(case.dtypes)}]  {' '.join(sorted(case.tags))}")
    return 0


def _run(options: argparse.Namespace) -> int:
    cases, counted = _selected(options), _count(options)
    device = _device(options)
    outcome = measure.run(
        cases,
        replace(
            _chosen(options),
            path=options.output or results.default_path(device),
            seconds=options.seconds or (0.3 if device.type == "cuda" else 2.0),
            minimum=options.minimum,
            budget=options.budget,
            missing=options.missing,
        ),
    )
    return _told(outcome, counted)


def _check(options: argparse.Namespace) -> int:
    cases, counted = _selected(options), _count(options)
    return _told(measure.check(cases, _chosen(options), options.calls), counted)


def _count(options: argparse.Namespace) -> object:
    """Triton's compilations on a GPU, told at the end: minutes, where they were not carried there."""
    if _device(options).type != "cuda":
        return None
    from benchmarks import triton_cache

    return triton_cache.count()


def _selected(options: argparse.Namespace) -> list[registry.Case]:
    """The cases asked for; ends the command where none fits."""
    device = _device(options)
    cases = registry.select(options.pattern, options.tag, device.type)
    if not cases:
        print(f"no case fits {options.pattern!r} and tags {options.tag} on {device.type}", file=sys.stderr)
        raise SystemExit(2)
    return cases


def _chosen(options: argparse.Namespace) -> measure.Options:
    device = _device(options)
    return measure.Options(
        device=device,
        path=results.default_path(device),
        only=_names(options.only, registry.IMPLEMENTATIONS, "--only"),
        dtypes=_names(options.dtypes, tuple(registry.DTYPES), "--dtypes"),
        say=lambda text: print(text, flush=True),
    )


def _told(outcome: measure.Outcome, counted: object) -> int:
    if counted is not None:
        print(counted)
    for failure in outcome.failures:
        print(f"FAILED {failure}", file=sys.stderr)
    return 1 if outcome.failures else 0


def _report(options: argparse.Namespace) -> int:
    if options.short is not None:
        if not options.short.is_file():
            print(f"{options.short}: no rows, nothing was measured", file=sys.stderr)
            return 2
        print(report.summary(results.read(options.short)))
        return 0
    for path in pages.write():
        print(path)
    return 0


def _compare(options: argparse.Namespace) -> int:
    found = compare.changes(compare.load(options.old), compare.load(options.new))
    for change in found:
        print(change)
    worse = sum(change.slower or change.heavier for change in found)
    print(f"{len(found)} passes in both, {worse} slower or heavier than noise explains")
    if not found:
        print("nothing to compare: no pass is in both", file=sys.stderr)
        return 2
    return 1 if worse else 0


def _choose(options: argparse.Namespace) -> int:
    try:
        said = choose.write(options.files or results.files(results.FOLDER))
    except ValueError as problem:
        print(problem, file=sys.stderr)
        return 2
    print("\n".join(said))
    return 0


def _names(text: str | None, known: tuple[str, ...], option: str) -> tuple[str, ...] | None:
    if text is None:
        return None
    names = tuple(text.split(","))
    if unknown := [name for name in names if name not in known]:
        raise SystemExit(f"{option}: unknown {unknown}, expected some of {list(known)}")
    return names


if __name__ == "__main__":
    raise SystemExit(main())
