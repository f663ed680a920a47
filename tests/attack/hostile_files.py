"""Files that were damaged, cut or forged: each is read as it was, or refused by name; nothing in it runs.

A case is drawn from its seed alone. What a file's format cannot tell from a change that its owner made (a
config, a users file) counts as read; the formats with checksums may give nothing else than what was written.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import random
import shutil
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kill_points
import numpy as np
import torch
import yaml
from tally import Tally

from crossan_fast import CrossanConfig, CrossanModel, HiddenStateCache, Modality
from crossan_fast._digests import digest_of
from crossan_fast.data import read_interactions, read_items
from crossan_fast.training import OptimizerConfig, load_config, make_optimizer
from crossan_fast.training.checkpoint import load_checkpoint, load_weights, save_checkpoint
from crossan_fast.training.population import Population

REFUSALS = (ValueError, TypeError, LookupError, OSError, RuntimeError)
CANARY = "canary"

# In the place of a plain value of JSON or YAML.
FORGED: list[Any] = [
    None,
    -1,
    0,
    2**63,
    1e308,
    "30",
    30.9,
    True,
    [],
    {},
    "",
    "../up",
    "/etc/passwd",
    "x" * 9000,
]


class Command:
    """What a pickle would run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder / CANARY),)


# -- what is attacked --------------------------------------------------------------------------------------

Reader = Callable[[Path], Any]


def small_model() -> CrossanModel:
    torch.manual_seed(0)
    config = CrossanConfig((Modality("a", 3, 2),), embedding_dim=4, bottleneck=2, window=3, blocks=1)
    model = CrossanModel(config, backend="eager")
    model.set_popularity(torch.ones(6))
    return model


def _read_cache(folder: Path) -> Any:
    cache = HiddenStateCache.open(folder / "c")
    rows = cache.gather(torch.arange(cache.num_items + 1))
    return [list(cache.item_names), cache.present.tolist(), [r.numpy().tobytes() for r in rows.values()]]


def _make_cache(folder: Path) -> None:
    kill_points.old_basis(folder)
    shutil.rmtree(folder / "out", ignore_errors=True)


def _make_model(folder: Path) -> None:
    small_model().save_pretrained(folder / "m")


def _read_model(folder: Path) -> Any:
    return _weights(CrossanModel.from_pretrained(folder / "m", backend="eager"))


def _weights(model: CrossanModel) -> Any:
    return [model.config, {n: t.numpy().tobytes() for n, t in model.state_dict().items()}]


def _make_checkpoint(folder: Path) -> None:
    model = small_model()
    optimizer = make_optimizer(model, OptimizerConfig())
    model.encode_items({"a": torch.randn(4, 2, 3)}).sum().backward()
    optimizer.step()
    save_checkpoint(folder / "last.safetensors", model, optimizer, {"history": [], "best": {}, "stale": 0})


def _read_checkpoint(folder: Path) -> Any:
    path, model = folder / "last.safetensors", small_model()
    optimizer = make_optimizer(model, OptimizerConfig())
    progress = load_checkpoint(path, model, optimizer)
    states = [v.numpy().tobytes() for state in optimizer.state.values() for v in state.values()]
    return [_weights(model), _weights(load_weights(path, backend="eager")), states, progress]


def _make_config(folder: Path) -> None:
    values = {
        "cache": "c",
        "users": "u",
        "run": "r",
        "model": {"dropout": 0.2},
        "optimizer": {"betas": [0.9, 0.99]},
    }
    values["evaluation"] = {"k": [5, 10]}
    (folder / "config.yaml").write_text(yaml.safe_dump(values))


def _make_population(folder: Path) -> None:
    digest = hashlib.sha256(b"").hexdigest()
    Population(5, digest, 4, 3, digest, {"a": digest}).write(folder / "population.json")


def _make_tables(folder: Path) -> None:
    names = [f"item{i}" for i in range(12)]
    (folder / "items.tsv").write_text("".join(f"{name}\tA title — {name}\n" for name in names))
    rows = "".join(f"{u},{names[(u + j) % 12]},{j}\n" for u in range(4) for j in range(6))
    (folder / "users.csv").write_text("user,item,timestamp\n" + rows)
    lines = [f"u{u}\t" + " ".join(names[(u + j) % 12] for j in range(6)) for u in range(4)]
    (folder / "users.tsv").write_text("\n".join(lines) + "\n")


# By format: what makes it, the files to attack, what reads it, whether it has checksums.
FORMATS: dict[str, tuple[Callable[[Path], None], str, Reader, bool]] = {
    "cache": (_make_cache, "c/*", _read_cache, True),
    "model": (_make_model, "m/*", _read_model, True),
    "checkpoint": (_make_checkpoint, "last.safetensors", _read_checkpoint, True),
    "config": (_make_config, "config.yaml", lambda f: load_config(f / "config.yaml").to_dict(), False),
    "population": (
        _make_population,
        "population.json",
        lambda f: Population.read(f / "population.json"),
        False,
    ),
    "items": (_make_tables, "items.tsv", lambda f: read_items(f / "items.tsv").names, False),
    "users": (_make_tables, "users.*", lambda f: _read_users(f), False),
}


def _read_users(folder: Path) -> Any:
    return [read_interactions(folder / name, None).ids.tolist() for name in ("users.tsv", "users.csv")]


# -- what is done to a file --------------------------------------------------------------------------------


def _flip(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 8])):
        if changed:
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def _grow(data: bytes, rng: random.Random) -> bytes:
    return data + rng.randbytes(rng.choice([1, 7, 4096]))


def _drop(data: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(data) + 1)
    return data[:start] + data[start + rng.randrange(1, 9) :]


def _repeat(data: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(data) + 1)
    return data[:start] + data[start : start + rng.randrange(1, 99)] + data[start:]


def _noise(data: bytes, rng: random.Random) -> bytes:
    return rng.choice([b"", b"\0" * len(data), rng.randbytes(len(data)), b"[" * 60_000, b"\xff\xfe" + data])


def _forge(data: bytes, rng: random.Random) -> bytes:
    """A value changed where the text has a structure: JSON, YAML, or the header of safetensors."""
    if len(data) > 8 and data[8:9] == b"{":
        size = struct.unpack("<Q", data[:8])[0]
        header = json.dumps(_forged(json.loads(data[8 : 8 + size]), rng)).encode()
        claimed = rng.choice([len(header)] * 4 + [2**62, len(header) + 1, 0])
        return struct.pack("<Q", claimed) + header + data[8 + size :]
    try:
        values = yaml.safe_load(data)
    except (yaml.YAMLError, UnicodeDecodeError, ValueError):
        return _flip(data, rng)
    if not isinstance(values, dict):
        return _flip(data, rng)
    values = _forged(values, rng)
    if (
        isinstance(values, dict) and "sha256" in values
    ):  # a cache's meta.json, whose digest of itself anyone can make
        del values["sha256"]
        values["sha256"] = digest_of(values)
    return json.dumps(values).encode()


def _forged(values: Any, rng: random.Random) -> Any:
    """A copy with one value, at any depth, in the place of another's."""
    if isinstance(values, dict) and values and rng.random() < 0.9:
        key = rng.choice(list(values))
        if rng.random() < 0.1:
            return {name: value for name, value in values.items() if name != key}
        return {**values, key: _forged(values[key], rng)}
    if isinstance(values, list) and values and rng.random() < 0.9:
        place = rng.randrange(len(values))
        return [*values[:place], _forged(values[place], rng), *values[place + 1 :]]
    if isinstance(values, str) and values[:1] in "{[" and rng.random() < 0.7:  # JSON within the metadata
        try:
            return json.dumps(_forged(json.loads(values), rng))
        except ValueError:
            pass
    if isinstance(values, int) and rng.random() < 0.5:
        return values + rng.choice([-1, 1, 8, 2**40])
    return rng.choice(FORGED)


CHANGES = (_flip, _flip, _cut, _grow, _drop, _repeat, _noise, _forge, _forge)


def changed(data: bytes, folder: Path, rng: random.Random) -> bytes:
    """Another content in the place of a file's."""
    if rng.random() < 0.03:
        run = f"!!python/object/apply:os.mkdir ['{folder / CANARY}']\n".encode()
        return rng.choice([pickle.dumps(Command(folder)), run, _npy_of_objects(folder)])
    return rng.choice(CHANGES)(data, rng)


def _npy_of_objects(folder: Path) -> bytes:
    return b"\x93NUMPY" + np.array([0]).tobytes() + pickle.dumps(Command(folder))


# -- the attack --------------------------------------------------------------------------------------------


def judge(folder: Path, name: str, read: Reader, expected: Any, checked: bool) -> tuple[str | None, str]:
    """How the case was lost, or None; and what came, in words."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = read(folder)
    except REFUSALS as error:
        text = str(error)
        stem = name.split(".")[0]
        if stem in text or folder.name in text or "folder:" in text or ": expected" in text:
            return None, "refused"
        return "unnamed", f"{type(error).__name__}: {text[:160]}"
    except Exception as error:
        return "unnamed", f"{type(error).__name__}: {str(error)[:160]}"
    if (folder / CANARY).exists():
        return "executed", "code in the file ran"
    if checked and found != expected:
        return "changed in silence", "other values than were written"
    return None, "read"


def attack(form: str, work: Path, seed: int, first: int, count: int, every: Callable[[int], None]) -> Tally:
    """`count` cases of a format from case `first` on, in folder `work`; `every` hears of each before it."""
    make, pattern, read, checked = FORMATS[form]
    whole, place = work / "whole", work / "attacked"
    whole.mkdir(parents=True)
    make(whole)
    files = sorted(str(path.relative_to(whole)) for path in whole.glob(pattern) if path.is_file())
    shutil.copytree(whole, place)
    expected = read(place)
    tally = Tally(f"damaged and forged files, {form}")
    for index in range(first, first + count):
        every(index)
        rng = random.Random(f"{form}:{seed}:{index}")
        name = files[index % len(files)]
        (place / name).write_bytes(changed((whole / name).read_bytes(), place, rng))
        how, what = judge(place, Path(name).name, read, expected, checked)
        tally.add(how, f"{form}:{seed}:{index} ({name}): {what}")
        (place / name).write_bytes((whole / name).read_bytes())
        if (place / CANARY).exists():
            (place / CANARY).rmdir()
    return tally
