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


@pytest.fixture(scope="session")
def scientific() -> Path:
    """The Scientific data: $CROSSAN_FAST_DATA/scientific, or under ../shared/data beside the repository."""
    repository = Path(__file__).resolve().parents[2]
    root = Path(os.environ.get("CROSSAN_FAST_DATA", repository.parent / "shared" / "data"))
    folder = root / "scientific"
    if not folder.is_dir():
        pytest.skip(f"no Scientific data at {folder}; CROSSAN_FAST_DATA names the folder above")
    return folder
