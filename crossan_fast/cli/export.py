"""`crossan-fast export RUN --onnx DIR --embeddings ITEMS [USERS]`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from crossan_fast.cli._forms import USERS, USERS_COLUMNS, add_column_options, columns_of
from crossan_fast.cli.evaluate import VERIFY

_DESCRIPTION = """\
A run's best model for programs without this library: its item and user encoder as ONNX, and the embeddings of
all items of the cache, and of users, with their names. Scores are inner products of the two.
"""

_EXAMPLE = """
example:
  crossan-fast export runs/a --onnx onnx
  crossan-fast export runs/a --embeddings items.parquet users.parquet
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `export`."""
    parser = subparsers.add_parser(
        "export",
        help="a run's encoders as ONNX, its items' and users' embeddings as files",
        description=_DESCRIPTION,
        epilog=f"--users, as\n{USERS}{_EXAMPLE}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", help="folder of a run")
    parser.add_argument("--onnx", type=Path, metavar="DIR", help="folder for item_encoder and user_encoder")
    parser.add_argument(
        "--embeddings",
        action="extend",
        nargs="+",
        metavar="FILE",
        help="file for the items' embeddings, and one for the users': .npy, with the names in .names.json "
        "beside it, or .parquet",
    )
    parser.add_argument("--users", type=Path, help="another users file than the run's")
    add_column_options(parser, USERS_COLUMNS)
    parser.add_argument("--cache", help="another cache than the run's, of the same encoders")
    parser.add_argument("--verify", choices=("open", "lazy", "off"), help=VERIFY)


def run(args: argparse.Namespace) -> int:
    """Write what was asked for."""
    from crossan_fast.cache import HiddenStateCache
    from crossan_fast.data import read_interactions
    from crossan_fast.export import check_suffix, user_embeddings, write_embeddings, write_onnx
    from crossan_fast.training import RunFolder
    from crossan_fast.training.task import users_files

    paths = [check_suffix(path) for path in args.embeddings or ()]
    _check_options(args, paths)
    folder = RunFolder(args.run)
    config = folder.read_config()
    model = folder.load_model("best", backend=config.backend)
    if args.onnx:
        write_onnx(model, args.onnx)
        print(f"{args.onnx}: item_encoder.onnx, user_encoder.onnx")
    if not paths:
        return 0
    cache = HiddenStateCache.open(args.cache or config.path("cache"), verify=args.verify or config.verify)
    held = folder.read_population()
    if held is not None:
        held.require_states(cache, model.config.modality_names)
    items = model.encode_catalogue(cache)
    write_embeddings(paths[0], cache.item_names[1:], items[1:])
    print(f"{paths[0]}: {cache.num_items:,} items of {items.shape[1]} numbers")
    if len(paths) == 2:
        read = read_interactions(
            args.users or users_files(config, config.path("users")),
            cache.item_names,
            min_items=1,
            columns={**({} if args.users else config.columns), **columns_of(args, USERS_COLUMNS)},
            min_rating=config.min_rating,
            labels=False,
        )
        write_embeddings(paths[1], read.user_names, user_embeddings(model, items, read.ids, read.offsets))
        print(f"{paths[1]}: {read.num_users:,} users after their whole histories; left out: {read.dropped}")
    return 0


def _check_options(args: argparse.Namespace, paths: Sequence[Path]) -> None:
    if not (args.onnx or paths):
        raise ValueError("--onnx, --embeddings: expected one of the two, got neither")
    if len(paths) > 2:
        raise ValueError(f"--embeddings: expected a file for items and one for users, got {len(paths)}")
    if len(paths) == 2 and paths[0].resolve() == paths[1].resolve():
        raise ValueError(
            f"--embeddings: expected different files for items and for users, got {paths[0]} and {paths[1]}"
        )
    idle = [f"--{role}-column" for role in columns_of(args, USERS_COLUMNS)]
    if args.users is not None:
        idle.insert(0, "--users")
    if idle and len(paths) < 2:
        raise ValueError(
            f"{', '.join(idle)}: expected with a second file of --embeddings, for the users', got "
            f"{len(paths)} of its files"
        )
