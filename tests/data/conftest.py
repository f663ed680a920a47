"""Files for the readers' tests: written on the spot, or the real Scientific data where it is at hand."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """`write(content, name)` puts text (as UTF-8) or bytes into a file and returns its path."""

    def write_file(content: str | bytes, name: str = "items.tsv") -> Path:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write_file


def _real(name: str) -> Path:
    """A folder of $CROSSAN_FAST_DATA, or of ../shared/data beside the repository."""
    repository = Path(__file__).resolve().parents[2]
    folder = Path(os.environ.get("CROSSAN_FAST_DATA", repository.parent / "shared" / "data")) / name
    if not folder.is_dir():
        pytest.skip(f"no {name} data at {folder}; CROSSAN_FAST_DATA names the folder above")
    return folder


@pytest.fixture(scope="session")
def scientific() -> Path:
    """Amazon Scientific, in IISAN's layout."""
    return _real("scientific")


@pytest.fixture(scope="session")
def microlens() -> Path:
    """MicroLens-50k's users with five views or more."""
    return _real("microlens50k")
