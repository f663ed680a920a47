"""`crossan-fast cache build|import|info|verify|convert`: hidden-state caches from the command line."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import fmean
from typing import TypeVar

import torch
from tqdm.auto import tqdm

from crossan_fast._files import passing_folder
from crossan_fast.cache.basis import ENERGY
from crossan_fast.cache.build import BuildReport, build_cache, import_features
from crossan_fast.cache.build.changes import ALL
from crossan_fast.cache.build.plan import existing_cache, specs_for
from crossan_fast.cache.convert import convert_cache, expand_cache
from crossan_fast.cache.folders import reclaim
from crossan_fast.cache.format import REPORT, dtype_name
from crossan_fast.cache.frame import Frame
from crossan_fast.cache.hidden_state_cache import HiddenStateCache
from crossan_fast.cache.verify import total_bytes, verify_cache
from crossan_fast.cli._forms import ITEMS, ITEMS_COLUMNS, add_column_options, columns_of
from crossan_fast.cli._in_common import in_common, say_what_is_in_common
from crossan_fast.cli._output import table
from crossan_fast.data.items import ItemTable, read_items

Number = TypeVar("Number", int, float)

DTYPES = ("fp32", "fp16", "bf16", "fp8", "int8")

_BUILD = """\
Run frozen encoders over raw items once and keep the states of chosen layers, pooled.

Each --modality is NAME=SOURCE[:option=value]...: SOURCE is a folder or hub name of a transformers text,
image, video or audio encoder. Options:
  pool=mean|cls            mean over all tokens (default), or the class token
  levels=7                 how many evenly spaced layers to keep, first and last included (default 7)
  levels=0,2,4             or which ones; 0 is the embedding output
  column=NAME              column of the items file (default title, image_path, video_path or audio_path)
  kind=text|image|...      which half of a model that reads two kinds (CLIP)
  max_length=N, lowercase  of texts, instead of --max-length and --lowercase
  precomputed              SOURCE holds states [L, D] or [D] an item, in the order of the items file or by
                           name: see `crossan-fast cache import --help`
  ids=FILE                 with precomputed: which item each row of SOURCE is

Modalities that read the same column with the same encoder share one pass. A build that is stopped goes on
where it was when the same command is given again; with more items in the items file, the new ones are
appended, and items whose text or file is another by now are encoded again (their rows change all at once,
when all is done).
"""

_IMPORT = """\
Make a cache of states that exist already. Each SOURCE is a .npy, .safetensors or .pt of floats [I, D] or
[I, L, D], or holds a tensor [D] or [L, D] an item by its name (.safetensors, .pt, or a folder of .pt or .npy
files, one an item); .pt files are read as tensors alone. Run again with more items, it appends.

ids: which item each row is: MMRec's i_id_mapping.csv (a column of names, one of row numbers), an items file
  in the order of the rows, or a name a line; of two columns that could both be row numbers the one called
  row counts, else the one that counts the lines; without --ids rows are in the order of --items
  without --items the cache gets all items that are named, or rows called 0, 1, ... as in MMRec's .inter
"""

_CONVERT = """\
Rewrite a cache: centred, as coordinates in a basis, in another storage dtype, or several of these.

--centre takes the mean over the items away from states and gives what is left one size, each level by itself:
most of many encoders' states is the same for every item. Train on the new cache; a model of the old one can't
read it. --centre text image does so for these modalities alone.
--basis 128 keeps the 128 dimensions of each modality that hold most of its energy, all levels counting alike;
--energy 0.99 as few as hold that share; with NAME= of that modality alone. A model of the new cache has
towers of that width: k of D dimensions take k / D of the bytes and of the towers' time. Basis and
means stay in the cache, and what `cache build` appends to it, or encodes again, lands there.
"""

_EXAMPLE = """\
example:
  crossan-fast cache build --items items.tsv --out cache --lowercase \\
    --modality text=sentence-transformers/all-MiniLM-L6-v2:pool=mean:levels=7 \\
    --modality image=google/vit-base-patch16-224:pool=cls:column=image_path
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `cache` and its commands."""
    parser = subparsers.add_parser(
        "cache", help="build, import, describe, verify or convert a cache of hidden states"
    )
    commands = parser.add_subparsers(dest="cache_command", required=True, metavar="COMMAND")

    build = commands.add_parser(
        "build",
        help="run encoders over items, or go on with a stopped build, or append new items",
        description=_BUILD,
        epilog=f"{ITEMS}\n{_EXAMPLE}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    build.add_argument("--items", required=True, type=Path, help="items file; its forms stand below")
    add_column_options(build, ITEMS_COLUMNS)
    build.add_argument("--out", required=True, type=Path, help="folder of the cache")
    build.add_argument(
        "--modality",
        action="append",
        metavar="NAME=SOURCE[:...]",
        help="once for each; for appending, none is needed",
    )
    build.add_argument("--dtype", choices=DTYPES, help="storage (default bf16; in appending the cache's own)")
    build.add_argument("--batch-size", type=int, default=64, help="inputs encoded at once (default 64)")
    build.add_argument("--device", default="auto", help="of the encoders (default: cuda where there is one)")
    build.add_argument("--compute-dtype", choices=DTYPES[:3], help="of the encoders (default fp32)")
    build.add_argument(
        "--max-length", type=int, help="tokens kept of a text (default 30; in appending the cache's own)"
    )
    build.add_argument(
        "--lowercase",
        action=argparse.BooleanOptionalAction,
        help="lower-case texts first (default no; in appending the cache's own)",
    )
    build.add_argument("--strict", action="store_true", help="stop at an input that cannot be used")
    build.add_argument("--restart", action="store_true", help="forget what a stopped build did")
    build.add_argument(
        "--re-encode",
        action="extend",
        nargs="+",
        default=[],
        metavar="NAME",
        help="encode these items again whatever their inputs are, or `all`; other weights are refused",
    )
    build.add_argument("--no-progress", action="store_true", help="show no progress bar")

    _add_import(commands)
    info = commands.add_parser("info", help="say what a cache holds")
    info.add_argument("folder", type=Path)

    verify = commands.add_parser("verify", help="compare every byte of a cache with its checksums")
    verify.add_argument("folder", type=Path)
    verify.add_argument("--no-progress", action="store_true", help="show no progress bar")

    _add_convert(commands)


def _add_import(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "import",
        help="make a cache of states that were computed elsewhere",
        description=_IMPORT,
        epilog=ITEMS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("sources", nargs="+", metavar="NAME=SOURCE", help="a modality and its states")
    parser.add_argument("--out", required=True, type=Path, help="folder of the cache")
    parser.add_argument("--ids", type=Path, help="file that says which item each row is")
    parser.add_argument("--items", type=Path, help="items file: whose states to keep, in which order")
    add_column_options(parser, ITEMS_COLUMNS)
    parser.add_argument(
        "--dtype", choices=DTYPES, help="storage (default bf16; in appending the cache's own)"
    )
    parser.add_argument(
        "--strict", action="store_true", help="stop where an item has no row, or a row no item"
    )
    parser.add_argument("--no-progress", action="store_true", help="show no progress bar")


def _add_convert(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    convert = commands.add_parser(
        "convert",
        help="rewrite a cache centred, in a basis of its own, or in another dtype, such as fp8 or int8",
        description=_CONVERT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    convert.add_argument("folder", type=Path)
    convert.add_argument("--out", required=True, type=Path, help="folder of the new cache")
    convert.add_argument("--dtype", choices=DTYPES, help="storage (default: the cache's own)")
    convert.add_argument(
        "--centre",
        "--center",
        action="extend",
        nargs="*",
        metavar="NAME",
        help="modalities to centre (default: all)",
    )
    sizes = convert.add_mutually_exclusive_group()
    sizes.add_argument("--basis", action="extend", nargs="+", metavar="[NAME=]K", help="dimensions to keep")
    sizes.add_argument(
        "--energy", action="extend", nargs="+", metavar="[NAME=]SHARE", help="share of energy to keep"
    )
    convert.add_argument(
        "--run", type=Path, help="folder of a run: print what its model loses in HR@10 by the conversion"
    )
    convert.add_argument("--overwrite", action="store_true", help="replace a cache in --out")
    convert.add_argument("--no-progress", action="store_true", help="show no progress bar")


def run(args: argparse.Namespace) -> int:
    """Carry out a parsed `cache` command; 0, or 1 where `verify` found damage. Bad input raises."""
    commands = {"build": _build, "import": _import, "info": _info, "verify": _verify, "convert": _convert}
    return commands[args.cache_command](args)


def _build(args: argparse.Namespace) -> int:
    items = read_items(args.items, strict=args.strict, columns=columns_of(args, ITEMS_COLUMNS))
    print(items.taken_for)
    try:
        return _build_from(items, args)
    except KeyboardInterrupt:
        print(f"stopped; the same command goes on with {args.out} where it was", file=sys.stderr)
        raise


def _build_from(items: ItemTable, args: argparse.Namespace) -> int:
    for spec in specs_for(args.modality, existing_cache(args.out)):
        if not spec.precomputed and not Path(spec.source).expanduser().exists():
            print(
                f"encoder {spec.source!r} is no folder here: transformers loads it by that name, from its "
                "own cache or from the Hugging Face hub (HF_HUB_OFFLINE=1 keeps it to the first)",
                file=sys.stderr,
            )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        report = build_cache(
            items,
            args.modality,
            args.out,
            dtype=args.dtype,
            batch_size=args.batch_size,
            device=args.device,
            compute_dtype=args.compute_dtype,
            max_length=args.max_length,
            lowercase=args.lowercase,
            strict=args.strict,
            restart=args.restart,
            re_encode=ALL if args.re_encode == [ALL] else args.re_encode,
            progress=not args.no_progress,
        )
    for warning in caught:
        print(f"warning: {warning.message}", file=sys.stderr)
    print(_summary(report))
    if report.unknown:
        print(
            f"of {report.unknown} items it is not known what their rows were made from: changes of their "
            "inputs do not show; to encode them again, add --re-encode NAME... or --re-encode all"
        )
    say_what_is_in_common(args.out)
    return 0


def _import(args: argparse.Namespace) -> int:
    pairs = [source.partition("=") for source in args.sources]
    sources = {name: path for name, equals, path in pairs if name and equals and path}
    if len(sources) < len(pairs):
        raise ValueError(f"sources: expected NAME=SOURCE once for each name, got {' '.join(args.sources)}")
    items = None
    if args.items is not None:
        items = read_items(args.items, strict=args.strict, columns=columns_of(args, ITEMS_COLUMNS))
        print(items.taken_for)
    report = import_features(
        sources,
        args.out,
        items=items,
        ids=args.ids,
        dtype=args.dtype,
        strict=args.strict,
        progress=not args.no_progress,
    )
    print(f"{report}\n{_summary(report.built)}")
    say_what_is_in_common(args.out)
    return 0


def _summary(report: BuildReport) -> str:
    def counted(what: str, counts: Mapping[str, int]) -> list[str]:
        parts = [f"{count} {name}" for name, count in counts.items() if count]
        return [f"{what} {', '.join(parts)}"] if parts else []

    parts = [f"{report.added} items added, {report.unchanged} unchanged"]
    parts += counted("re-encoded:", report.re_encoded)
    parts += counted("no longer there:", report.emptied)
    parts += counted("changed but not usable, so kept as before:", report.kept)
    if report.not_listed:
        parts.append(f"not in the items file, but kept: {report.not_listed}")
    return f"{report.folder}: {'; '.join(parts)}; {report.num_items} items in all, {report.seconds:.1f} s"


def _info(args: argparse.Namespace) -> int:
    reclaim(args.folder)
    cache = HiddenStateCache.open(args.folder)
    size = f"{dtype_name(cache.dtype)}, {cache.nbytes / 1e6:.1f} MB of states"
    print(f"{args.folder}: {cache.num_items} items, {size}")
    rows = list(_described(cache))
    plain = "\n".join(
        f"  {row['modality']}: {row['levels']} levels of width {row['width']}, present for {row['items']}"
        + "".join(f"\n    {line}" for line in row["made of"].splitlines())
        for row in rows
    )
    print(table(rows, plain))
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        placement = cache.placement(device)
        print(f"  on {placement.device} it would be {placement.tier}: {placement.reason}")
    if not cache.present[1:].all() and (args.folder / REPORT).is_file():
        print(f"  what is absent, and why: {args.folder / REPORT}")
    return 0


def _described(cache: HiddenStateCache) -> Iterator[dict[str, str]]:
    """A row a modality."""
    common = in_common(cache)
    for column, modality in enumerate(cache.modalities):
        basis = cache.bases.get(modality.name)
        of = "" if basis is None else f" (coordinates in a basis, of width {basis.shape[1]})"
        if cache.frames.get(modality.name, Frame()).centring is not None:
            of += " (centred)"
        made = [f"{key}: {value}" for key, value in cache.sources.get(modality.name, {}).items()]
        yield {
            "modality": modality.name,
            "levels": str(modality.levels),
            "width": f"{modality.width}{of}",
            "items": f"{int(cache.present[:, column].sum())} of {cache.num_items} items",
            "made of": "\n".join([*made, *common.get(modality.name, "").splitlines()]),
        }


def _verify(args: argparse.Namespace) -> int:
    reclaim(args.folder)
    size = total_bytes(args.folder)
    with tqdm(total=size, unit="B", unit_scale=True, disable=args.no_progress or None) as bar:
        problems = verify_cache(args.folder, bar.update)
    for problem in problems:
        print(f"{args.folder}{os.sep}{problem}", file=sys.stderr)
    if problems:
        return 1
    print(f"{args.folder}: sound, {size / 1e6:.1f} MB compared with their checksums")
    return 0


def _convert(args: argparse.Namespace) -> int:
    reclaim(args.folder)
    before = HiddenStateCache.open(args.folder)
    basis, energy = _sizes("basis", args.basis, int), _sizes("energy", args.energy, float)
    chosen = basis or energy or {}
    centre = False if args.centre is None else args.centre or True
    passes = len(before.modalities) + 2 * sum(
        len(asked) if isinstance(asked, dict | list) else len(before.modalities)
        for asked in (chosen, centre)
        if asked is not False
    )
    with tqdm(total=(before.num_items + 1) * passes, unit="row", disable=args.no_progress or None) as bar:
        errors = convert_cache(
            args.folder,
            args.out,
            args.dtype,
            basis=basis,
            energy=energy,
            centre=centre,
            overwrite=args.overwrite,
            progress=bar.update,
        )
    after = HiddenStateCache.open(args.out)
    sizes = [f"{dtype_name(c.dtype)} {c.nbytes / 1e6:.1f} MB" for c in (before, after)]
    print(f"{args.out}: {' -> '.join(sizes)}")
    for name, error in errors.items():
        centring = after.frames.get(name, Frame()).centring
        if centring is not None and name not in before.frames:
            flat = [str(level) for level, s in enumerate(centring.scale.tolist()) if not s]
            said = f"; the same for every item, and zeros now: level {', '.join(flat)}" if flat else ""
            print(f"  {name}: centred{said}")
        if name in after.bases and name not in before.bases:
            k, width = after.bases[name].shape
            shares = after.sources[name][ENERGY]
            levels = " ".join(f"{share:.1%}" for share in shares)
            print(
                f"  {name}: {k} of {width} dimensions hold {fmean(shares):.2%} of the energy; levels {levels}"
            )
        print(f"  {name}: relative error {error:.2e}")
    if args.run is not None:
        _print_cost(args.run, before, args.out)
    return 0


def _sizes(what: str, given: list[str] | None, kind: type[Number]) -> Number | dict[str, Number] | None:
    """`128`, or `text=128 image=64`, as `convert_cache` takes it."""
    if given is None:
        return None
    wanted = f"{'a whole number' if kind is int else 'a number'}, or NAME=number once for each"
    try:
        if len(given) == 1 and "=" not in given[0]:
            return kind(given[0])
        pairs = [part.rsplit("=", 1) for part in given]
        by_name = {name: kind(number) for name, number in pairs}
    except ValueError:
        by_name = {}
    if len(by_name) < len(given):
        raise ValueError(f"--{what}: expected {wanted}, got {' '.join(given)}")
    return by_name


def _print_cost(run: Path, before: HiddenStateCache, after: Path) -> None:
    """HR@10 of a run's best model on either cache, both splits, in the run's own protocol.

    A model of the states as they were reads what the new cache holds of them, in the old one's frames: it
    loses what a new basis loses.
    """
    assert before.folder is not None
    frames = HiddenStateCache.open(after).frames
    changed = any(frame.without(before.frames.get(name, Frame())) for name, frame in frames.items())
    with passing_folder(after.resolve()) as folder:
        if changed:
            expand_cache(after, folder / "wide", before.frames)
            after = folder / "wide"
        _print_hits(run, before.folder, after)
    if changed:
        print("  (of a model of the states as they were; one trained on the new cache may lose less)")


def _print_hits(run: Path, before: Path, after: Path) -> None:
    from crossan_fast.training import RunFolder, open_task
    from crossan_fast.training.result import Part

    folder = RunFolder(run)
    config = folder.read_config()
    model = folder.load_model("best", backend=config.backend)
    held = folder.read_population()
    found: dict[Part, list[float]] = {"validation": [], "test": []}
    for cache in (before, after):
        task = open_task(
            dataclasses.replace(config, cache=str(cache)), None if held is None else held.catalogue
        )
        if held is not None and cache == before:  # what was made of it may have lost more than a dtype does
            held.require_states(task.cache, model.config.modality_names)
        for split, values in found.items():
            result = task.evaluate(model.to(task.device), split, config.evaluation, k=(10,))
            values.append(result.metrics["hr@10"])
    for split, (old, new) in found.items():
        change = f"{(new - old) / old:+.2%} relative" if old else "nothing was hit before"
        print(f"  {run}, {split}: HR@10 {old:.2%} -> {new:.2%} ({change})")
