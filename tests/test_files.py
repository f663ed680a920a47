"""Files and folders that appear whole or not at all, at whatever moment their writer ends."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from crossan_fast import _files
from crossan_fast._files import is_draft_of, whole_new_folder, write_whole

# Ends with no cleaning up where it would have put the draft in its place.
KILLED = """
import os, sys
from pathlib import Path
sys.path[:0] = sys.argv[2:]
from importlib import import_module
files = import_module("_files")
os.replace = lambda *_: os._exit(9)
path = Path(sys.argv[1])
if path.suffix:
    files.write_whole(path, "new")
else:
    with files.whole_new_folder(path) as draft:
        (draft / "inner").mkdir()
        (draft / "inner" / "file").touch()
"""


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def kill_while_writing(path: Path) -> None:
    package = str(Path(_files.__file__).parent)
    assert subprocess.run([sys.executable, "-I", "-c", KILLED, str(path), package]).returncode == 9


def test_a_file_is_written_whole(tmp_path: Path) -> None:
    path = tmp_path / "made" / "on the way" / "a.txt"
    write_whole(path, "zwölf\n")
    assert path.read_bytes() == "zwölf\n".encode()
    write_whole(path, b"\xff")
    assert path.read_bytes() == b"\xff" and names_in(path.parent) == ["a.txt"]


def test_files_and_folders_are_as_readable_as_any_other(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_whole(tmp_path / "file", "")
        with whole_new_folder(tmp_path / "folder"):
            pass
    finally:
        os.umask(before)
    assert [path.stat().st_mode & 0o777 for path in sorted(tmp_path.iterdir())] == [0o640, 0o750]


def test_a_kill_before_the_rename_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    kill_while_writing(path)
    assert path.read_text() == "old"
    (left,) = [name for name in names_in(tmp_path) if name != "a.txt"]
    assert is_draft_of(["a.txt"], left)
    write_whole(tmp_path / "b.txt", "another's name")
    assert left in names_in(tmp_path)
    write_whole(path, "newer")
    assert path.read_text() == "newer" and names_in(tmp_path) == ["a.txt", "b.txt"]


def test_a_kill_before_the_rename_leaves_no_folder(tmp_path: Path) -> None:
    kill_while_writing(tmp_path / "shop")
    (left,) = names_in(tmp_path)
    assert left != "shop"
    with whole_new_folder(tmp_path / "shop") as draft:
        (draft / "file").touch()
        assert not (tmp_path / "shop").exists()
    assert names_in(tmp_path) == ["shop"] and names_in(tmp_path / "shop") == ["file"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_an_error_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "a.txt").write_text("old")
    monkeypatch.setattr(os, call, full)
    with pytest.raises(OSError, match=r"No space left on device; what was there is unchanged: '.*/a\.txt'$"):
        write_whole(tmp_path / "a.txt", "new")
    assert names_in(tmp_path) == ["a.txt"] and (tmp_path / "a.txt").read_text() == "old"


def test_an_error_in_the_block_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), whole_new_folder(tmp_path / "shop") as draft:
        (draft / "file").touch()
        raise KeyboardInterrupt
    assert names_in(tmp_path) == []
    (tmp_path / "shop").mkdir()
    (tmp_path / "shop" / "precious").touch()
    with pytest.raises(OSError), whole_new_folder(tmp_path / "shop"):
        pass
    assert names_in(tmp_path) == ["shop"] and names_in(tmp_path / "shop") == ["precious"]


def test_writers_of_one_name_do_not_meet(tmp_path: Path) -> None:
    """Each finds the others' drafts, and takes none that is being written for abandoned."""
    contents = [bytes([k]) * 50_000 for k in range(4)]
    errors: list[BaseException] = []

    def write(content: bytes) -> None:
        try:
            for _ in range(25):
                write_whole(tmp_path / "a", content)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and names_in(tmp_path) == ["a"]
    assert (tmp_path / "a").read_bytes() in contents


def test_a_draft_taken_for_abandoned_before_its_lock_is_begun_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_locked, taken = _files.open_locked, []

    def late(path: Path, *, wait: bool = False) -> int:
        if wait and not taken:
            taken.append(path)
            path.unlink()
        return open_locked(path, wait=wait)

    monkeypatch.setattr(_files, "open_locked", late)
    write_whole(tmp_path / "a", "new")
    assert taken and (tmp_path / "a").read_text() == "new" and names_in(tmp_path) == ["a"]


def test_without_locks_drafts_of_others_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing tells whether one is abandoned."""
    monkeypatch.setattr(_files, "fcntl", None)
    other = tmp_path / ".a.01234567.tmp"
    other.touch()
    write_whole(tmp_path / "a", "new")
    assert names_in(tmp_path) == [other.name, "a"] and (tmp_path / "a").read_text() == "new"


def test_drafts_are_told_by_their_names() -> None:
    assert is_draft_of(["meta.json"], ".meta.json.01ab.tmp")
    for name in (
        "meta.json",
        ".meta.json.tmp",
        ".other.json.01ab.tmp",
        ".x.meta.json.01ab.tmp",
        ".meta.json.x.tmp",
    ):
        assert not is_draft_of(["meta.json"], name)
