"""SHA-256 digests of what the project writes, which whoever reads it compares: bits do flip.

JSON objects carry theirs under `sha256`, YAML files in a comment before all else (a file that was cut short
would lose its end), safetensors among their metadata. A file without one, such as another program's, is read
as it is. A digest finds damage and mixed-up files; it is no signature: whoever changes a file on purpose can
write a new one.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load, save
from torch import Tensor

KEY = "sha256"
DAMAGED = "its content is not what was written; restore it from a copy"

_CHUNK_BYTES = 1 << 20
_COMMENT = re.compile(r"# run (?P<run>\w*), sha256 (?P<digest>[0-9a-f]{64})\n")


def digest_of(value: Any) -> str:
    """Of a JSON value, however it is spaced and ordered."""
    canonical = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(canonical.encode("utf-8", "surrogatepass")).hexdigest()


def sealed(body: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object with its digest."""
    return {**body, KEY: digest_of(dict(body))}


def unsealed(body: Mapping[str, Any], name: str, path: Path) -> dict[str, Any]:
    """The object without its digest, after comparing the two where it has one.

    Raises:
        ValueError: they differ; `name` and `path` are in the message.
    """
    rest = {key: value for key, value in body.items() if key != KEY}
    if KEY in body and body[KEY] != digest_of(rest):
        raise ValueError(
            f"{name}: {path} is damaged or was changed by hand: {DAMAGED}, or remove its entry {KEY!r} to "
            "have it read as it is"
        )
    return rest


def sealed_text(text: str, run: str) -> str:
    """A YAML text with its run and digest in a comment before it."""
    return f"# run {run}, sha256 {digest_of([run, text])}\n{text}"


def check_text(text: str, name: str, path: Path) -> str | None:
    """The run in the comment of a sealed text, None where it has no comment; errors as `unsealed`'s."""
    found = _COMMENT.match(text)
    if found is None:
        return None
    if found["digest"] != digest_of([found["run"], text[found.end() :]]):
        raise ValueError(
            f"{name}: {path} is damaged or was changed by hand: {DAMAGED}, or remove its first line to have "
            "it read as it is"
        )
    return found["run"]


def save_tensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """safetensors with a digest of names, types, shapes, values and metadata; of the same content the same
    bytes.

    Args:
        tensors: contiguous, on the CPU.
    """
    raw = bytearray(save(dict(tensors), metadata={**metadata, KEY: _content_digest(tensors, metadata)}))
    # The library writes metadata in an order that differs from call to call.
    size = int.from_bytes(raw[:8], "little")
    header = json.dumps(json.loads(raw[8 : 8 + size]), sort_keys=True, separators=(",", ":")).encode()
    header = header.ljust(-(-len(header) // 8) * 8)
    raw[: 8 + size] = len(header).to_bytes(8, "little") + header
    return bytes(raw)


def digest_of_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Of the names, types, shapes and values of tensors on the CPU."""
    return _content_digest(tensors, {})


def load_tensors(path: Path, name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and metadata of a safetensors file, compared with the digest where it has one.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no safetensors, or other bytes than were written; `name` and `path` are in the message.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{name}: no file {path}")
    try:
        # Mapped first, so that a header that lies about sizes costs nothing. Then not one by one from there:
        # `get_tensor` of version 0.8.0 loses some 60 bytes a tensor. `load` has another order at each call.
        with safe_open(path, framework="pt") as file:
            metadata, names = dict(file.metadata() or {}), list(file.keys())
        found = load(path.read_bytes())
        tensors = {name: found[name] for name in names}
    except OSError as error:
        raise type(error)(error.errno, error.strerror or str(error), str(path)) from error
    except Exception as error:  # SafetensorError, and others of PyTorch's for types and sizes it has not
        raise ValueError(
            f"{name}: {path} cannot be read, expected safetensors: {' '.join(str(error).split())}; "
            "restore it from a copy, or write it anew"
        ) from error
    rest = {key: value for key, value in metadata.items() if key != KEY}
    if KEY in metadata and metadata[KEY] != _content_digest(tensors, rest):
        raise ValueError(f"{name}: {path} is damaged: {DAMAGED}, or write it anew")
    return tensors, metadata


def hash_range(descriptor: int, start: int, stop: int, path: Path) -> str:
    """SHA-256 of bytes [start, stop) of an open file.

    Raises:
        EOFError: it is shorter.
    """
    digest = hashlib.sha256()
    while start < stop:
        block = os.pread(descriptor, min(stop - start, _CHUNK_BYTES), start)
        if not block:
            raise EOFError(f"{path}: expected {stop} bytes, got {start}")
        digest.update(block)
        start += len(block)
    return digest.hexdigest()


def _content_digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    names = sorted(tensors)
    described = [[name, str(tensors[name].dtype), list(tensors[name].shape)] for name in names]
    digest = hashlib.sha256(digest_of([described, dict(metadata)]).encode())
    for name in names:
        digest.update(tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
