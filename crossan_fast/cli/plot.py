"""`crossan-fast plot RUN`."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `plot`."""
    parser = subparsers.add_parser(
        "plot",
        help="pictures of a run and a report in one HTML file",
        description="Draw a run: its curves, which layers of which encoder it listens to, what each modality "
        "weighs and is worth, and a map of the items; as PNG files, and as one HTML file that needs no "
        "other. "
        "Needs matplotlib: pip install 'crossan-fast[plot]'.",
    )
    parser.add_argument("run", metavar="RUN", type=Path, help="folder of a run")
    parser.add_argument("--out", type=Path, help="folder for the files (default: RUN/plots)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, …")


def run(args: argparse.Namespace) -> int:
    """Draw, and name what was written."""
    for path in plot(args.run, args.out, device=args.device):
        print(path)
    return 0


def plot(run: Path, out: Path | None = None, *, device: str | None = None) -> list[Path]:
    """Write the pictures and the report of a run; gives the files, the report last.

    Raises:
        FileNotFoundError: the folder is no run, or its cache or users are gone.
        ImportError: matplotlib is not installed.
    """
    from crossan_fast._files import write_whole
    from crossan_fast.cli._findings import find
    from crossan_fast.cli._pictures import draw
    from crossan_fast.cli._report import report

    found = find(run, device)
    light, dark = dict(draw(found)), dict(draw(found, dark=True))
    folder = run / "plots" if out is None else out
    files: dict[Path, bytes | str] = {folder / f"{name}.png": image for name, image in light.items()}
    files[folder / "report.html"] = report(found, light, dark)
    for path, content in files.items():
        write_whole(path, content)
    return list(files)
