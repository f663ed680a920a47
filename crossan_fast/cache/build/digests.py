"""What rows were encoded from: a digest of each input, so that a build can tell which inputs have changed.

A record is 32 bytes: 16 of BLAKE2b over what the encoder is given (the text, or the bytes of the file or of
the frames in order), then 16 over the file's inode, size and times. Where the latter are as they were the
file is not read again. Zeros are a record of nothing known.
"""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

from crossan_fast.cache.build.inputs import frame_files
from crossan_fast.cache.format import RECORD_BYTES

HALF = RECORD_BYTES // 2
# A file that was changed again within its clock's tick has the same times: such new files are read once more.
_TICK_NS = 2_000_000_000
_CHUNK = 1 << 20


def of_bytes(kind: str, content: bytes) -> bytes:
    """The record of an input that is no file."""
    return hashlib.blake2b(kind.encode() + b"\0" + content, digest_size=HALF).digest() + bytes(HALF)


EMPTY = of_bytes("empty", b"")
UNREADABLE = of_bytes("unreadable", b"")


def of_file(path: Path, before: bytes) -> bytes:
    """The record of a file or a folder of frames, whose earlier one is `before`; `UNREADABLE` where it is."""
    try:
        files = frame_files(path) if path.is_dir() else [path]
        stamp = _stamp(files)
        if any(stamp) and stamp == before[HALF:]:
            return before
        digest = hashlib.blake2b(b"files\0", digest_size=HALF)
        for file in files:
            # Its suffix, since that decides how it is read.
            digest.update(f"{file.suffix.lower()}\0{file.stat().st_size}\0".encode())
            with open(file, "rb") as opened:
                while block := opened.read(_CHUNK):
                    digest.update(block)
    except OSError:
        return UNREADABLE
    return digest.digest() + stamp


def _stamp(files: list[Path]) -> bytes:
    digest = hashlib.blake2b(digest_size=HALF)
    now = time.time_ns()
    for file in files:
        seen = os.stat(file)
        if now - max(seen.st_mtime_ns, seen.st_ctime_ns) < _TICK_NS:
            return bytes(HALF)
        digest.update(f"{seen.st_ino} {seen.st_size} {seen.st_mtime_ns} {seen.st_ctime_ns}\n".encode())
    return digest.digest()
