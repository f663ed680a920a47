"""Checks of arguments, shared by every layer: a message names the argument, what came, what was expected."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Sequence

import torch
from torch import Tensor


def describe(tensor: object) -> str:
    """`bf16 [704, 7, 768] on cuda:0`, or the type of what is no tensor."""
    if not isinstance(tensor, Tensor):
        return f"{type(tensor).__name__} {tensor!r}"[:120]
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} on {tensor.device}"


def check_tensor(
    name: str,
    tensor: object,
    shape: Sequence[int | str | None],
    *,
    dtypes: Collection[torch.dtype] | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Raise unless `tensor` has `shape` (a string or None: any size), one of `dtypes`, and `device`."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor {_shape(shape)}, got {describe(tensor)}")
    fits = tensor.dim() == len(shape) and all(
        want is None or isinstance(want, str) or have == want
        for have, want in zip(tensor.shape, shape, strict=True)
    )
    if not fits:
        raise ValueError(f"{name}: expected shape {_shape(shape)}, got {describe(tensor)}")
    if dtypes is not None and tensor.dtype not in dtypes:
        names = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{name}: expected dtype {names}, got {describe(tensor)}")
    if device is not None and tensor.device != device:
        raise ValueError(f"{name}: expected device {device}, got {describe(tensor)}")
    return tensor


def _shape(shape: Sequence[int | str | None]) -> str:
    return "[" + ", ".join("?" if size is None else str(size) for size in shape) + "]"


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'text'?`, or nothing where no known name is near."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {matches[0]!r}?" if matches else ""
