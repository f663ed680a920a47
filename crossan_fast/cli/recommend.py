"""`crossan-fast recommend --run RUN --history A B C`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from crossan_fast.cli.evaluate import VERIFY


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `recommend`."""
    parser = subparsers.add_parser(
        "recommend",
        help="the next items for a history of item names",
        description="Rank every item of the cache, those appended after training too, for a history of item "
        "names (oldest first) of a user who need not have been seen.",
    )
    parser.add_argument("--run", required=True, help="folder of a run")
    parser.add_argument(
        "--history", required=True, nargs="+", metavar="ITEM", help="item names, oldest first"
    )
    parser.add_argument("--k", type=int, default=10, help="how many items (default 10)")
    parser.add_argument("--keep-history", action="store_true", help="the history's items may come back")
    parser.add_argument("--cache", help="another cache than the run's, of the same encoders")
    parser.add_argument("--items", help="another items file than the run's, for titles")
    parser.add_argument("--verify", choices=("open", "lazy", "off"), help=VERIFY)
    parser.add_argument("--device", help="cpu, cuda, cuda:1, …")


def run(args: argparse.Namespace) -> int:
    """Print a table: rank, name, score, title."""
    from crossan_fast.cache import HiddenStateCache
    from crossan_fast.training import RunFolder
    from crossan_fast.training.task import item_titles, resolve_device

    folder = RunFolder(args.run)
    config = folder.read_config()
    device = resolve_device(args.device or config.device)
    model = folder.load_model("best", backend=config.backend).to(device)
    cache = HiddenStateCache.open(args.cache or config.path("cache"), verify=args.verify or config.verify).to(
        device
    )
    held = folder.read_population()
    if held is not None:
        held.require_bases(cache, model.config.modality_names)
        if difference := held.appended(cache.catalogue):
            print(f"note: {difference}", file=sys.stderr)
    titles: dict[str, str] = {}
    if args.items or config.items:
        titles = item_titles(Path(args.items) if args.items else config.path("items"), config.item_columns)
    (found,) = model.recommend([args.history], cache, k=args.k, filter_history=not args.keep_history)
    for name in args.history:
        print(f"history  {name}  {titles.get(name, '')}".rstrip())
    width = max((len(best.name) for best in found), default=0)
    for rank, best in enumerate(found, start=1):
        line = f"{rank:>3}  {best.name:<{width}}  {best.score:8.4f}  {titles.get(best.name, '')}"
        print(line.rstrip())
    return 0
