"""The cache on disk: what each file of a folder holds, and the one small file that makes the others count.

    meta.json            format, dtype, items, modalities; of each other file committed bytes and checksums
    items.txt            UTF-8, one item name a line; line k names row k (row 0, the padding, has none)
    present.bin          uint8 [I + 1, M], 1 where row i has modality m
    <name>.states.bin    [I + 1, L, D] in the storage dtype, little-endian, row 0 all zeros; rows of absent
                         modalities are zeros too
    <name>.basis.bin     float32 [k, D], orthonormal rows, of a modality that is stored as coordinates in them
                         alone: its states file is [I + 1, L, k], and coordinates · basis are the states that
                         the encoder gave, as far as these rows hold them
    <name>.centre.bin    float32 [L, D + 1], of a modality that is stored centred alone: each level's mean
                         over the items, and the number that what is left of a state was multiplied with
    <name>.scales.bin    float32 [I + 1, L], for int8 and fp8 alone: value = stored · scale
    digests.bin          uint8 [I + 1, M, 32], what row i of modality m was made from, or was to be and could
                         not (see `crossan_fast.cache.build.digests`), zeros where that is not known; only
                         of a built cache
    report.tsv           which items lack a modality, or keep an older state of it, and why; for people, not
                         checksummed
    building.json        only while a build is under way (see `crossan_fast.cache.build`)

`meta.json`, replaced in one rename, says which files count, and how many bytes of each. New rows are written
behind those bytes; to change old rows a file is written anew beside the old one, with a number in its name
(`<name>.states.1.bin`; meta.json has the numbers under `versions`), and the old one is removed after the
rename. So a crash or a full disk leaves the old cache as it was, and who has it open keeps its bytes. No file
is a pickle.

Version 2 of the format, or 3 where a modality is stored centred; version 1 had no digests and no numbers, and
is read as well.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from crossan_fast._checks import nearest
from crossan_fast._digests import digest_of
from crossan_fast._untrusted import is_whole, read_json
from crossan_fast.config import Modality

FORMAT = "crossan_fast.hidden_states"
VERSION = 3
_READ = (1, 2, VERSION)

META = "meta.json"
NAMES = "items.txt"
PRESENT = "present.bin"
DIGESTS = "digests.bin"
REPORT = "report.tsv"
BUILDING = "building.json"

# Of one input in digests.bin.
RECORD_BYTES = 32

# What to do about damage.
REMEDY = "`crossan-fast cache verify` lists all damage; restore the folder from a copy, or make it anew"

Records = npt.NDArray[np.uint8]

# What a row's first use reads and compares: as small as meta.json has room for, which has some thousand
# segments of a file. Of files from 64 GB on there are more (1 TB: 16k).
SEGMENT_BYTES, _MAX_SEGMENT_BYTES = 1 << 20, 64 << 20
_SEGMENTS = 1024

# What no cache comes near to. A model of hundreds of levels would be one with width and levels swapped.
MAX_ITEMS, MAX_WIDTH, MAX_LEVELS, MAX_MODALITIES = 1 << 40, 1 << 20, 256, 1024
MAX_META_BYTES = 64 << 20
_MAX_JOURNAL_BYTES = 256 << 20

_DTYPES: dict[str, torch.dtype] = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp8": torch.float8_e4m3fn,
    "int8": torch.int8,
}
_ALIASES = {
    "float32": "fp32",
    "float16": "fp16",
    "bfloat16": "bf16",
    "float8_e4m3fn": "fp8",
    "e4m3": "fp8",
}


class CacheError(ValueError):
    """A folder that is no usable cache; the message says what is wrong and what to do."""


class IncompleteCacheError(CacheError):
    """A build was stopped before its end."""


class CorruptCacheError(CacheError):
    """Bytes are missing or differ from what was written."""


def storage_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """The storage dtype of a name (`fp32`, `fp16`, `bf16`, `fp8` (e4m3), `int8`, or torch's own) or dtype."""
    if isinstance(dtype, torch.dtype):
        if dtype in _DTYPES.values():
            return dtype
        raise TypeError(f"dtype: expected one of {', '.join(_DTYPES)}, got {dtype}")
    known = _ALIASES.get(dtype, dtype)
    if known not in _DTYPES:
        raise ValueError(
            f"dtype: expected one of {', '.join(_DTYPES)}, got {dtype!r}{nearest(known, _DTYPES)}"
        )
    return _DTYPES[known]


def dtype_name(dtype: torch.dtype) -> str:
    """`bf16` of `torch.bfloat16`: the name used in meta.json and on the command line."""
    return next(name for name, known in _DTYPES.items() if known == dtype)


def is_quantized(dtype: torch.dtype) -> bool:
    """Whether rows of this storage dtype carry scales."""
    return dtype in (torch.float8_e4m3fn, torch.int8)


def states_file(modality: Modality) -> str:
    return f"{modality.name}.states.bin"


def scales_file(modality: Modality) -> str:
    return f"{modality.name}.scales.bin"


def basis_file(modality: Modality) -> str:
    return f"{modality.name}.basis.bin"


def centre_file(modality: Modality) -> str:
    return f"{modality.name}.centre.bin"


def row_bytes(modality: Modality, dtype: torch.dtype) -> int:
    """Bytes of one row of `<name>.states.bin`."""
    return modality.levels * modality.width * dtype.itemsize


@dataclass(frozen=True)
class Segment:
    """A run of bytes of a file and their SHA-256; a file is the concatenation of its segments."""

    size: int
    sha256: str


@dataclass(frozen=True)
class CacheMeta:
    """What meta.json says.

    Attributes:
        dtype: of the states on disk.
        num_items: I, without the padding row.
        modalities: in the order of `present`'s columns.
        sources: by modality name, how its states were made (encoder, pooling, layers, …); JSON values.
        segments: by file name, the committed bytes.
        written_by: library versions, for people.
        versions: by file name, the number in the name that it has on disk; 0, none, where it is not listed.
        digests: whether the cache says what its rows were encoded from.
        full_widths: of modalities that are stored in a basis `[k, D]`, D by name; k is the modality's width.
        centred: names of modalities whose states are centred.
    """

    dtype: torch.dtype
    num_items: int
    modalities: tuple[Modality, ...]
    sources: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    segments: Mapping[str, tuple[Segment, ...]] = field(default_factory=dict)
    written_by: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, int] = field(default_factory=dict)
    digests: bool = False
    full_widths: Mapping[str, int] = field(default_factory=dict)
    centred: frozenset[str] = frozenset()

    def file(self, name: str) -> str:
        """The name on disk of file `name`."""
        version = self.versions.get(name, 0)
        return f"{name.removesuffix('.bin')}.{version}.bin" if version else name

    def expected_bytes(self) -> dict[str, int | None]:
        """Bytes of every data file; None where the content decides (item names)."""
        rows = self.num_items + 1
        sizes: dict[str, int | None] = {NAMES: None, PRESENT: rows * len(self.modalities)}
        for modality in self.modalities:
            sizes[states_file(modality)] = rows * row_bytes(modality, self.dtype)
            if is_quantized(self.dtype):
                sizes[scales_file(modality)] = rows * modality.levels * 4
            if modality.name in self.full_widths:
                sizes[basis_file(modality)] = modality.width * self.full_widths[modality.name] * 4
            if modality.name in self.centred:
                full = self.full_widths.get(modality.name, modality.width)
                sizes[centre_file(modality)] = modality.levels * (full + 1) * 4
        if self.digests:
            sizes[DIGESTS] = rows * len(self.modalities) * RECORD_BYTES
        return sizes

    def committed(self, name: str) -> int:
        """Bytes of file `name` that count."""
        return sum(segment.size for segment in self.segments.get(name, ()))

    def to_json(self) -> str:
        """Canonical JSON, with a checksum of itself."""
        body: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION if self.centred else 2,  # what reads no centred states refuses them
            "dtype": dtype_name(self.dtype),
            "num_items": self.num_items,
            "modalities": [
                {
                    "name": m.name,
                    "width": m.width,
                    "levels": m.levels,
                    **({"full_width": self.full_widths[m.name]} if m.name in self.full_widths else {}),
                    **({"centred": True} if m.name in self.centred else {}),
                    "source": dict(self.sources.get(m.name, {})),
                }
                for m in self.modalities
            ],
            "files": {
                name: [[segment.size, segment.sha256] for segment in segments]
                for name, segments in self.segments.items()
            },
            "versions": {name: version for name, version in self.versions.items() if version},
            "written_by": dict(self.written_by),
        }
        body["sha256"] = digest_of(body)
        return json.dumps(body, indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def parse(cls, body: Any, where: Path) -> CacheMeta:
        """Of what `to_json` gave, read as JSON; its types, ranges and file names are checked.

        Args:
            where: the file, for messages.
        """
        try:
            if body["format"] != FORMAT:
                raise CacheError(f"{where}: expected format {FORMAT!r}, got {body['format']!r}")
            if type(body["version"]) is not int or body["version"] not in _READ:
                raise CacheError(
                    f"{where}: expected format version {VERSION} or before, got {body['version']!r}; "
                    "this cache was written by another version of crossan_fast"
                )
            if body.pop("sha256") != digest_of(body):
                raise CorruptCacheError(
                    f"{where}: its checksum does not fit its content; it was changed or damaged"
                )
            meta = cls(
                dtype=storage_dtype(str(body["dtype"])),
                num_items=body["num_items"],
                modalities=tuple(Modality(m["name"], m["width"], m["levels"]) for m in body["modalities"]),
                sources={m["name"]: dict(m["source"]) for m in body["modalities"]},
                segments={
                    name: tuple(Segment(size, sha256) for size, sha256 in segments)
                    for name, segments in body["files"].items()
                },
                written_by=dict(body["written_by"]),
                versions=dict(body.get("versions", {})),
                digests=DIGESTS in body["files"],
                full_widths={m["name"]: m["full_width"] for m in body["modalities"] if "full_width" in m},
                centred=frozenset(m["name"] for m in body["modalities"] if _flag(m, "centred")),
            )
            meta.check()
            return meta
        except CacheError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CorruptCacheError(
                f"{where}: not a cache's meta.json ({type(error).__name__}: {error})"
            ) from error

    def check(self) -> None:
        """Raise ValueError unless every number is one that a cache can have and every file one of a cache's.

        Who writes a cache asks for this first; so does who reads one, whose numbers may be anybody's.
        """
        names = [m.name for m in self.modalities]
        if not is_whole(len(names), 1, MAX_MODALITIES) or len(set(names)) < len(names):
            raise ValueError(
                f"modalities: expected 1 to {MAX_MODALITIES} of different names, got {names[:8]}"
            )
        _check_whole("num_items", self.num_items, 0, MAX_ITEMS)
        for modality in self.modalities:
            name, layers = modality.name, self.sources.get(modality.name, {}).get("layers")
            _check_whole(f"{name}: width", modality.width, 1, MAX_WIDTH)
            _check_whole(f"{name}: levels", modality.levels, 1, MAX_LEVELS)
            if isinstance(layers, list) and len(layers) != modality.levels:
                raise ValueError(f"{name}: levels: expected {len(layers)}, of layers {layers}")
            if name in self.full_widths:
                _check_whole(f"{name}: full_width", self.full_widths[name], modality.width, MAX_WIDTH)
        for name, version in self.versions.items():
            _check_whole(f"versions: {name}", version, 0, 1 << 31)
        expected = self.expected_bytes().keys()
        for name, segments in self.segments.items():
            if name not in expected:
                raise ValueError(f"files: expected some of {sorted(expected)}, got {name!r}")
            for segment in segments:
                _check_whole(f"files: {name}: size", segment.size, 0, 1 << 62)
                if not isinstance(segment.sha256, str):
                    raise ValueError(f"files: {name}: expected a SHA-256 as text, got {segment.sha256!r}")


def read_meta(folder: Path) -> CacheMeta:
    """The validated meta.json of `folder`, after checking that every file holds the bytes it promises.

    Raises:
        FileNotFoundError: no such folder.
        IncompleteCacheError: a build was stopped; the message says how to go on.
        CorruptCacheError: a file is missing, short, or meta.json is damaged.
        CacheError: not a cache, or one of another version.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"folder: no such cache folder: {folder}")
    path = folder / META
    if not path.is_file():
        if (folder / BUILDING).exists():
            raise IncompleteCacheError(
                f"folder: {folder} holds a half-built cache ({_progress(folder)}); run the same "
                "`crossan-fast cache build` command again to go on where it stopped"
            )
        raise CacheError(f"folder: {folder} is not a cache: it has no {META}")
    try:
        body = read_json(path, "folder", MAX_META_BYTES)
    except ValueError as error:
        raise CorruptCacheError(f"{path}: not a cache's meta.json ({error})") from error
    meta = CacheMeta.parse(body, path)
    for name, size in meta.expected_bytes().items():
        committed = meta.committed(name)
        if size is not None and size != committed:
            raise CorruptCacheError(
                f"{path}: expected {size} bytes of {name} for {meta.num_items} items, got {committed}"
            )
        file = folder / meta.file(name)
        have = file.stat().st_size if file.is_file() else -1
        if have < committed:
            found = "no such file" if have < 0 else f"{have} bytes"
            raise CorruptCacheError(f"{file}: expected {committed} bytes, got {found}")
    return meta


def segment_ranges(start: int, stop: int) -> Iterator[tuple[int, int]]:
    """[start, stop) cut into the runs that get a checksum each."""
    wanted = 1 << max(0, (stop - start - 1) // _SEGMENTS).bit_length()
    size = min(max(wanted, SEGMENT_BYTES), _MAX_SEGMENT_BYTES)
    for first in range(start, stop, size):
        yield first, min(first + size, stop)


def check_item_names(names: Sequence[str], known: Mapping[str, int] | None = None) -> None:
    """Raise unless every name is a non-empty single line and none occurs twice, here or in `known`."""
    seen: dict[str, int] = {}
    for index, name in enumerate(names):
        if not isinstance(name, str) or not name or any(c in name for c in "\t\n\r"):
            raise ValueError(
                f"item_names[{index}]: expected a non-empty string without tabs or line breaks, got {name!r}"
            )
        if name in seen or (known is not None and name in known):
            raise ValueError(f"item_names[{index}]: item {name!r} occurs more than once")
        seen[name] = index


def read_journal(folder: Path) -> Any:
    """The JSON of building.json; ValueError where it is none, or larger than any."""
    return read_json(folder / BUILDING, "folder", _MAX_JOURNAL_BYTES)


def _check_whole(what: str, value: object, low: int, high: int) -> None:
    if not is_whole(value, low, high):
        raise ValueError(f"{what}: expected a whole number from {low} to {high}, got {value!r}")


def _flag(held: Mapping[str, Any], name: str) -> bool:
    value = held.get(name, False)
    if not isinstance(value, bool):
        raise ValueError(f"{name}: expected true or false, got {value!r}")
    return value


def _progress(folder: Path) -> str:
    try:
        journal = read_journal(folder)
        return f"{journal['encoded']} of {journal['to_encode']} encodings done"
    except (OSError, ValueError, KeyError, TypeError):
        return "its journal cannot be read"
