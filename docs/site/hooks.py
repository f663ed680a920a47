"""The site's pages beside those of docs/: files of the repository that stand where readers of code look.

Links are written for a code host, from file to file. Here they are turned to the site's pages; one to a file
that the site does not hold becomes its text.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import pages, results  # noqa: E402

ADDED = {
    "kernels/README.md": "kernels-triton.md",
    "kernels/fusion_losses_ranking.md": "kernels-others.md",
    "csrc/cuda/README.md": "kernels-cuda.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
PLOTS = {plot.relative_to(ROOT).as_posix(): f"plots/{plot.name}" for plot in results.FOLDER.glob("*.png")}

_LINK = re.compile(r"(?P<image>!?)\[(?P<text>[^\]]*)\]\((?P<target>[^)\s]+)\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages and plots from outside docs/."""
    for source, place in (ADDED | PLOTS).items():
        files.append(File.generated(config, place, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Draw the page's tables, and turn its links."""
    places = {place: source for source, place in ADDED.items()}
    here = ROOT / places.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    markdown = pages.fill(markdown, here)
    parts = re.split(r"(^```.*?^```)", markdown, flags=re.DOTALL | re.MULTILINE)
    parts[::2] = [_LINK.sub(lambda link: _turned(link, here, page.file.src_uri), part) for part in parts[::2]]
    return "".join(parts)


def _turned(link: re.Match[str], here: Path, page: str) -> str:
    target, _, anchor = link["target"].partition("#")
    if not target or not (here.parent / target).exists():  # an address, or `A[m,l](x)` in code
        return link[0]
    source = os.path.relpath(here.parent / target, ROOT)
    place = (ADDED | PLOTS).get(source)
    if place is None and source.startswith("docs/"):
        place = source.removeprefix("docs/")
    if place is None:
        return link["text"]
    turned = os.path.relpath(place, Path(page).parent)
    return f"{link['image']}[{link['text']}]({turned}{'#' + anchor if anchor else ''})"
