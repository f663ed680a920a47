"""`crossan-fast recommend --run RUN --history A B C`, or `--histories FILE --out FILE`."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from crossan_fast.cli._forms import ITEMS, USERS, USERS_COLUMNS, add_column_options, columns_of
from crossan_fast.cli._output import add_json, show
from crossan_fast.cli.evaluate import VERIFY

if TYPE_CHECKING:
    from crossan_fast.cli._recommended import Row
    from crossan_fast.data import Interactions
    from crossan_fast.recommend import Recommender

_DESCRIPTION = """\
Rank every item of the cache, those appended after training too, for the history of a user who need not have
been seen: item names, oldest first; or for each user of a file, into CSV, JSON, JSON lines or Parquet.
"""

_EXAMPLE = """
example:
  crossan-fast recommend --run runs/a --history B005FU5HFI B000QZ1LZM --k 5
  crossan-fast recommend --run runs/a --histories users.tsv --unknown skip --deny sold.txt --out best.csv
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `recommend`."""
    parser = subparsers.add_parser(
        "recommend",
        help="the next items for histories of item names",
        description=_DESCRIPTION,
        epilog=f"--histories, as\n{USERS}--items, as\n{ITEMS}{_EXAMPLE}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--run", required=True, help="folder of a run")
    histories = parser.add_mutually_exclusive_group(required=True)
    histories.add_argument(
        "--history", action="extend", nargs="+", metavar="ITEM", help="item names, oldest first"
    )
    histories.add_argument(
        "--histories",
        type=Path,
        help="users file: a history for each of its users; ratings below the run's min_rating are left out",
    )
    add_column_options(parser, USERS_COLUMNS)
    parser.add_argument(
        "--out",
        type=Path,
        help=".csv, .tsv, .json (one array), .jsonl or .parquet; without it a table, or CSV to stdout",
    )
    parser.add_argument("--k", type=int, default=10, help="how many items, up to all candidates (default 10)")
    parser.add_argument("--keep-history", action="store_true", help="the history's items may come back")
    for option, meaning in (("--allow", "the only candidates"), ("--deny", "no candidates")):
        parser.add_argument(
            option,
            action="extend",
            nargs="+",
            type=Path,
            metavar="FILE",
            help=f"files with an item's name a line, or tables with a column of items: {meaning}",
        )
    parser.add_argument(
        "--unknown",
        choices=("error", "skip"),
        default="error",
        help="items that the cache lacks, in histories, --allow or --deny: stop, or pass over and count them",
    )
    parser.add_argument("--cache", help="another cache than the run's, of the same encoders")
    parser.add_argument(
        "--items",
        action="extend",
        nargs="+",
        type=Path,
        help="items files with more titles than the run's, such as of new items",
    )
    parser.add_argument("--batch-size", type=int, help="of --histories, users at once (default 1024)")
    parser.add_argument("--verify", choices=("open", "lazy", "off"), help=VERIFY)
    parser.add_argument("--device", help="cpu, cuda, cuda:1, …")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Print a table, or JSON: rank, name, score and title; or write those of a file's users."""
    from crossan_fast.cache import HiddenStateCache
    from crossan_fast.cli._name_files import names_in
    from crossan_fast.recommend import Recommender
    from crossan_fast.training import RunFolder
    from crossan_fast.training.task import item_titles, resolve_device

    idle = [f"--{role}-column" for role in columns_of(args, USERS_COLUMNS)]
    idle += ["--batch-size"] if args.batch_size is not None else []
    if args.history is not None and idle:
        raise ValueError(f"{', '.join(idle)}: expected --histories beside it, got --history")
    folder = RunFolder(args.run)
    config = folder.read_config()
    device = resolve_device(args.device or config.device)
    model = folder.load_model("best", backend=config.backend).to(device)
    cache = HiddenStateCache.open(args.cache or config.path("cache"), verify=args.verify or config.verify).to(
        device
    )
    held = folder.read_population()
    if held is not None:
        held.require_states(cache, model.config.modality_names)
        if difference := held.appended(cache.catalogue):
            print(f"note: {difference}", file=sys.stderr)
    titles: dict[str, str] = {}
    for file in [*([config.path("items")] if config.items else []), *(args.items or [])]:
        titles |= item_titles(file, config.item_columns)
    if titles and (bare := sum(name not in titles for name in cache.item_names[1:])):
        print(f"note: {bare:,} of the cache's items have no title; --items adds some", file=sys.stderr)
    known = set(cache.item_names[1:])
    recommender = Recommender(
        model,
        cache,
        k=args.k,
        filter_history=not args.keep_history,
        allow=None if args.allow is None else names_in(args.allow, "--allow", known),
        deny=None if args.deny is None else names_in(args.deny, "--deny", known),
        unknown=args.unknown,
    )
    if recommender.skipped:
        print(f"note: {recommender.skipped:,} names of --allow and --deny are unknown", file=sys.stderr)
    if args.history is not None:
        return _one(args, recommender, titles)
    if args.json:
        raise ValueError(
            "--json: expected --history beside it, got --histories; --out FILE.jsonl is for these"
        )
    return _many(args, recommender, titles, config.min_rating)


def _one(args: argparse.Namespace, recommender: Recommender, titles: dict[str, str]) -> int:
    import numpy as np

    from crossan_fast.cli._recommended import Row, open_writer

    names = recommender.cache.item_names
    known = [row for name in args.history if (row := recommender.row(name))]
    if not known:
        raise ValueError(f"--history: none of {len(args.history)} items is in the cache")
    if len(known) < len(args.history):
        print(f"note: {len(args.history) - len(known)} unknown items skipped", file=sys.stderr)
    top = recommender.rank(np.array(known), np.array([0, len(known)]))
    found = [
        Row("", rank, names[item], score, titles.get(names[item], ""))
        for rank, (item, score) in enumerate(
            zip(top.ids[0].tolist(), top.scores[0].tolist(), strict=True), start=1
        )
        if item
    ]
    if args.out is not None:
        with open_writer(args.out) as write:
            write(found)
        return 0
    history = [(name, titles.get(name, "")) for name in args.history]
    printed = {
        "history": [{"item": name, "title": title or None} for name, title in history],
        "items": [
            {"rank": row.rank, "item": row.item, "score": row.score, "title": row.title or None}
            for row in found
        ],
    }
    show(args, printed, _table(history, found))
    return 0


def _table(history: Sequence[tuple[str, str]], found: Sequence[Row]) -> str:
    lines = [f"history  {name}  {title}" for name, title in history]
    width = max((len(row.item) for row in found), default=0)
    lines += [f"{row.rank:>3}  {row.item:<{width}}  {row.score:8.4f}  {row.title}" for row in found]
    return "\n".join(line.rstrip() for line in lines)


def _many(
    args: argparse.Namespace, recommender: Recommender, titles: dict[str, str], min_rating: float | None
) -> int:
    import numpy as np

    from crossan_fast.cli._recommended import Row, open_writer

    at_once = 1024 if args.batch_size is None else args.batch_size
    if at_once < 1:
        raise ValueError(f"--batch-size: expected at least 1, got {at_once}")
    read = _read(args, min_rating)
    rows = np.array([0, *map(recommender.row, read.item_names[1:])])
    ids = rows[read.ids]
    known = ids > 0
    offsets = np.concatenate([[0], np.cumsum(known)])[read.offsets]
    names, begun = recommender.cache.item_names, time.perf_counter()
    with open_writer(args.out) as write:
        for users, top in recommender.batches(ids[known], offsets, at_once):
            best = zip(users.tolist(), top.ids.tolist(), top.scores.tolist(), strict=True)
            write(
                [
                    Row(read.user_names[user], rank, names[item], score, titles.get(names[item], ""))
                    for user, items, scores in best
                    for rank, (item, score) in enumerate(zip(items, scores, strict=True), start=1)
                    if item
                ]
            )
    seconds, served = time.perf_counter() - begun, int((np.diff(offsets) > 0).sum())
    low = read.dropped.low_ratings
    print(read.taken_for, file=sys.stderr)
    print(
        f"{served:,} users in {seconds:.1f} s ({served / max(seconds, 1e-9):,.0f} a second); left out: "
        f"{read.num_users - served + read.dropped.short_users:,} users without a known item, "
        f"{int((~known).sum()):,} interactions with {int((rows[1:] == 0).sum()):,} unknown items"
        + (f", {low:,} rated below the run's min_rating {min_rating}" if low else ""),
        file=sys.stderr,
    )
    return 0


def _read(args: argparse.Namespace, min_rating: float | None) -> Interactions:
    """The histories, without what is rated below the run's min_rating; all of those without ratings."""
    from crossan_fast.data import read_interactions

    columns = columns_of(args, USERS_COLUMNS)
    try:
        return read_interactions(
            args.histories, None, min_items=1, columns=columns, min_rating=min_rating, labels=False
        )
    except ValueError as error:
        if not str(error).startswith("min_rating: expected a column of ratings"):
            raise
    print(
        f"note: {args.histories} has no ratings; all its interactions count, the run's own were those rated "
        f"at least {min_rating}",
        file=sys.stderr,
    )
    return read_interactions(args.histories, None, min_items=1, columns=columns, labels=False)
