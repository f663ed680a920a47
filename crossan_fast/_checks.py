"""Checks of arguments, shared by every layer: a message names the argument, what came, what was expected."""

from __future__ import annotations

import difflib
import operator
import os
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

# What ops compute with; fp8 and int8 are storage alone.
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


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
    if tensor.layout is not torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got {tensor.layout} {describe(tensor)}")
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


def check_integer(name: str, value: object, low: int, high: int | None = None) -> None:
    """Raise unless `value` is an integer from `low` to `high` (None: no bound)."""
    range_ = f"of at least {low}" if high is None else f"from {low} to {high}"
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an integer {range_}, got {describe(value)}")
    if value < low or (high is not None and value > high):
        raise ValueError(f"{name}: expected an integer {range_}, got {value}")


def one_or_several(value: Any) -> tuple[Any, ...]:
    """The values of a list or array; of anything else, text and an array of no dimension too, itself."""
    one = not isinstance(value, Iterable) or isinstance(value, (str, bytes)) or getattr(value, "ndim", 1) == 0
    return (value,) if one else tuple(value)


def cutoffs_of(name: str, k: object) -> tuple[int, ...]:
    """One cut-off or several as integers; raise TypeError for anything else."""
    several = (k,) if isinstance(k, Tensor) else one_or_several(k)
    if wrong := [each for each in several if isinstance(each, bool) or not hasattr(each, "__index__")]:
        raise TypeError(f"{name}: expected an integer or a list of integers, got {wrong[0]!r}")
    try:
        return tuple(map(operator.index, several))
    except TypeError as error:  # an array of several numbers, or of no integer
        raise TypeError(f"{name}: expected an integer or a list of integers, got {k!r}") from error


def check_tensors(name: str, tensors: object, count: int) -> None:
    """Raise unless `tensors` is a list or tuple of `count` tensors."""
    if not isinstance(tensors, (list, tuple)):
        raise TypeError(f"{name}: expected a list of {count} tensors, got {describe(tensors)}")
    if len(tensors) != count:
        raise ValueError(f"{name}: expected {count} tensors, got {len(tensors)}")
    for index, tensor in enumerate(tensors):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}[{index}]: expected a tensor, got {describe(tensor)}")


def check_weights(weights: object, kind: type) -> None:
    """Raise unless an op's `weights` are of their NamedTuple."""
    if not isinstance(weights, kind):
        raise TypeError(f"weights: expected {kind.__name__}, got {describe(weights)}")


def check_range(name: str, numbers: Tensor, low: int, high: int | None = None) -> None:
    """Raise unless all of an integer tensor on the CPU lie from `low` to `high` (None: no bound).

    A GPU would have to be waited for, and a tracer knows no values: nothing is checked there.
    """
    if numbers.device.type != "cpu" or torch.compiler.is_compiling() or not numbers.numel():
        return
    least, most = (int(bound) for bound in numbers.aminmax())
    if least < low or (high is not None and most > high):
        range_ = f"of at least {low}" if high is None else f"from {low} to {high}"
        raise ValueError(f"{name}: expected integers {range_}, got {least if least < low else most}")


def refuse_path(cache: object) -> None:
    """Raise TypeError for where a cache lies, in place of the cache."""
    if isinstance(cache, str | os.PathLike):
        raise TypeError(f"cache: expected a HiddenStateCache, as HiddenStateCache.open gives, got {cache!r}")


def refuse_gradient(name: str, tensor: Tensor) -> None:
    """Raise for a tensor that a gradient is wanted of and that no backend gives one."""
    if tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name}: expected a tensor that needs no gradient, for it gets none (detach it), got "
            f"{describe(tensor)} with requires_grad"
        )


def _shape(shape: Sequence[int | str | None]) -> str:
    return "[" + ", ".join("?" if size is None else str(size) for size in shape) + "]"


# What other libraries call our fields and options, where no letters would tell.
_HABITS = {
    "lr": "learning_rate",
    "wd": "weight_decay",
    "l2": "weight_decay",
    "max_grad_norm": "clip_norm",
    "gradient_clip_val": "clip_norm",
    "ema": "average",
    "hidden_size": "embedding_dim",
    "hidden_dim": "embedding_dim",
    "hidden_units": "embedding_dim",
    "embedding_size": "embedding_dim",
    "num_layers": "blocks",
    "n_layers": "blocks",
    "num_blocks": "blocks",
    "num_heads": "attention_heads",
    "n_heads": "attention_heads",
    "max_len": "window",
    "max_seq_length": "window",
    "max_seq_len": "window",
    "session_max_len": "window",
    "num_train_epochs": "epochs",
    "train_batch_size": "batch_size",
    "early_stopping": "patience",
    "stopping_step": "patience",
    "amp": "precision",
    "output_dir": "run",
    "topk": "k",
    "top_k": "k",
}


def nearest(name: str, known: Iterable[str], cutoff: float = 0.5) -> str:
    """`; did you mean 'text'?`, or nothing where no known name is near.

    Args:
        cutoff: how near, 1 for equal; names that are habit elsewhere are near whatever it is.
    """
    known = list(known)
    habit = _HABITS.get(name.lower())
    matches = [habit] if habit in known else difflib.get_close_matches(name, known, n=1, cutoff=cutoff)
    return f"; did you mean {matches[0]!r}?" if matches else ""
