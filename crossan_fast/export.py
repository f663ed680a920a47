"""A trained model for programs without this library: `torch.export`, ONNX, and embeddings as files.

What is exported is plain torch, whatever backend the model asks for: while `torch.export` or `torch.onnx`
traces, every op gives way to its reference. Item embeddings and user vectors compare by inner product.
"""

from __future__ import annotations

import contextlib
import json
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from crossan_fast._files import whole_file, write_whole
from crossan_fast._modes import evaluating
from crossan_fast.data._arrow import require_pyarrow
from crossan_fast.data.splits import last_items

if TYPE_CHECKING:
    from crossan_fast.model import CrossanModel

ITEMS, USERS = "item_encoder.onnx", "user_encoder.onnx"
_BATCH = 1024


class ItemEncoder(nn.Module):
    """States of items, by modality `[N, L, D_m]`, and `present` bool `[N, M]`, to embeddings `[N, d]`.

    States of absent modalities may hold anything finite; an item with none has no meaningful embedding.
    """

    def __init__(self, model: CrossanModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, states: dict[str, Tensor], present: Tensor) -> Tensor:
        return self.model.encode_items(states, present)


class UserEncoder(nn.Module):
    """Embeddings of histories `[B, S, d]`, and `mask` bool `[B, S]`, True at real items, which stand at the
    end, to user vectors `[B, d]`."""

    def __init__(self, model: CrossanModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, items: Tensor, mask: Tensor) -> Tensor:
        return self.model.encode_users(items, mask)[:, -1]


def export_items(model: CrossanModel) -> ExportedProgram:
    """`ItemEncoder` in evaluation mode by `torch.export`, for any number of items.

    It knows states, not rows: of a model with `id_embedding` it makes items without their own vectors, as
    those are that training never saw, and warns of it.
    """
    if model.config.id_embedding:
        warnings.warn(
            "export: items are made of their states alone; vectors of their own (model.id_embedding), which "
            "encode_catalogue and recommend add, are not in them",
            stacklevel=2,
        )
    batch, config = Dim("items"), model.config
    like = next(model.parameters())
    states = {m.name: like.new_zeros(2, m.levels, m.width) for m in config.modalities}
    present = torch.ones(2, len(config.modalities), dtype=torch.bool, device=like.device)
    shapes = {"states": {name: {0: batch} for name in states}, "present": {0: batch}}
    return _export(ItemEncoder(model), (states, present), shapes)


def export_users(model: CrossanModel) -> ExportedProgram:
    """`UserEncoder` in evaluation mode by `torch.export`, for any number of users and of items up to the
    window."""
    config, like = model.config, next(model.parameters())
    items = like.new_zeros(2, config.window, config.embedding_dim)
    mask = torch.ones(2, config.window, dtype=torch.bool, device=like.device)
    dynamic = {0: Dim("users")}
    if config.window > 1:
        dynamic[1] = Dim("length", min=1, max=config.window)
    return _export(UserEncoder(model), (items, mask), {"items": dynamic, "mask": dynamic})


def _export(
    encoder: ItemEncoder | UserEncoder, arguments: tuple[Any, ...], shapes: dict[str, Any]
) -> ExportedProgram:
    encoder.training = False  # the wrapper alone: its model goes back to the mode that it was in
    with evaluating(encoder.model), torch.no_grad():
        return torch.export.export(encoder, arguments, dynamic_shapes=shapes)


def write_onnx(model: CrossanModel, folder: str | Path) -> None:
    """Write `item_encoder.onnx` and `user_encoder.onnx`, weights included, each whole or not at all.

    Inputs of the first are the modalities by name and `present`, its output `embeddings`; of the second
    `items` and `mask`, its output `users`. Batch and history length are dynamic.

    Raises:
        ImportError: onnx or onnxscript is not installed.
    """
    try:
        import onnx  # noqa: F401  (torch.onnx writes by both)
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"onnx: expected the packages onnx and onnxscript ({error}); pip install 'crossan-fast[export]'"
        ) from error
    names = list(model.config.modality_names)
    programs = (
        (ITEMS, export_items(model), [*names, "present"], "embeddings"),
        (USERS, export_users(model), ["items", "mask"], "users"),
    )
    for file, exported, inputs, output in programs:
        with _quiet():
            program = torch.onnx.export(
                exported, dynamo=True, input_names=inputs, output_names=[output], verbose=False
            )
        assert program is not None
        with whole_file(Path(folder) / file) as draft:
            program.save(str(draft), external_data=False)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch's exporter says of its own parts, and of torchvision's where that is missing."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def user_embeddings(
    model: CrossanModel,
    items: Tensor,
    ids: npt.NDArray[np.int64],
    offsets: npt.NDArray[np.int64],
) -> Tensor:
    """User vectors `[U, d]` of histories `ids[offsets[u]:offsets[u + 1]]` of rows of `items` `[I + 1, d]`."""
    found = [torch.zeros(0, items.shape[1], device=items.device)]
    with evaluating(model), torch.no_grad():
        for start in range(0, len(offsets) - 1, _BATCH):
            part = offsets[start : start + _BATCH + 1]
            recent = torch.from_numpy(last_items(ids, part[:-1], part[1:], model.config.window))
            recent = recent.to(items.device)
            found.append(model.encode_users(items[recent], recent != 0)[:, -1])
    return torch.cat(found)


def write_embeddings(path: str | Path, names: Sequence[str], embeddings: Tensor) -> None:
    """Write named rows: `.parquet` with columns `name` and `embedding`; or `.npy`, the names in order in a
    JSON list beside it, `<stem>.names.json`. Numbers are float32.

    Raises:
        ValueError: another suffix, or as many names as there are not rows.
        ImportError: Parquet without pyarrow.
    """
    path = check_suffix(path)
    if len(names) != len(embeddings):
        raise ValueError(f"names: expected one for each of {len(embeddings)} rows, got {len(names)}")
    rows = embeddings.detach().float().cpu().contiguous().numpy()
    if path.suffix == ".npy":
        write_whole(path.with_suffix(".names.json"), json.dumps(list(names), ensure_ascii=False) + "\n")
        with whole_file(path) as draft, draft.open("wb") as file:
            np.save(file, rows)
        return
    import pyarrow
    from pyarrow import parquet

    vectors = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(rows.reshape(-1)), rows.shape[1])
    table = pyarrow.table({"name": pyarrow.array(list(names), pyarrow.string()), "embedding": vectors})
    with whole_file(path) as draft:
        parquet.write_table(table, draft)


def check_suffix(path: str | Path) -> Path:
    """The path, if `write_embeddings` can write it."""
    path = Path(path)
    if path.suffix not in (".npy", ".parquet"):
        raise ValueError(f"embeddings: expected a name that ends with .npy or .parquet, got {path}")
    if path.suffix == ".parquet":
        require_pyarrow("embeddings", "a Parquet file")
    return path
