"""Tensors that lie on `cuda:0` for torch, its autograd and autocast included, and compute on the CPU.

Torch's own fake tensors have no values, so nothing that looks at one (a check, an evaluation) can run on
them.

    with PretendedGpu():
        x = torch.zeros(3, device="cuda")     # x.device is cuda:0
        x + torch.zeros(3)                    # RuntimeError, as on a GPU

Ops of our own are called with them as they are: on `driver`, Triton's launches take place.

To be imported before a process's first backward, which starts one of autograd's threads for each device.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from benchmarks.pretended_gpu.building import built

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
# In the address of everything on the GPU, so that no address on the host is taken for one; see libcuda.c.
DEVICE_BIT = 1 << 60

# Called with each of torch's ops that ran on the GPU, and whether its result is there, not on the host.
observers: list[Callable[[torch._ops.OpOverload, bool], None]] = []

ctypes.CDLL(str(built("there.cpp", "there.so")))


class OnGpu(Tensor):
    """Holds a CPU tensor, `held`."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, held: Tensor) -> OnGpu:
        made: OnGpu = Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=GPU,
            requires_grad=False,
        )
        made.held = held
        return made

    def data_ptr(self) -> int:
        address = self.held.data_ptr()
        return address | DEVICE_BIT if address else 0

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"OnGpu({self.held!r})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return PretendedGpu().__torch_dispatch__(function, types, args, kwargs)


class PretendedGpu(TorchDispatchMode):
    """Within the block `device="cuda"` makes, and `.to("cuda")` gives, tensors `OnGpu`."""

    def __enter__(self) -> PretendedGpu:
        self._patch = mock.patch.object(torch.cuda, "_lazy_init")
        self._patch.start()
        # `torch.tensor(…, device="cuda")` makes a CPU tensor, then moves it.
        self._lifted = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        torch._C._set_only_lift_cpu_tensors(self._lifted)
        self._patch.stop()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if any(isinstance(t, OnGpu) for t in tree_leaves((args, kwargs))):
            with self:
                if function.namespace == "crossan_fast":
                    return function._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *args, **kwargs)
                # Below autograd, in our own ops, what is made of several ops comes as one.
                if (made := function.decompose(*args, **kwargs)) is not NotImplemented:
                    return made
        return _run(function, args, kwargs)


def _run(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """On the GPU where an argument is there or `device` says so."""
    leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    involved = any(isinstance(t, OnGpu) for t in leaves)
    asked = kwargs.get("device")
    on_gpu = involved if asked is None else asked.type == "cuda"
    if not involved and not on_gpu:
        return function(*args, **kwargs)
    if asked is None:
        _refuse_mixtures(function, leaves)
    else:
        kwargs = {**kwargs, "device": CPU}
    plain_args, plain_kwargs = tree_map_only(OnGpu, lambda t: t.held, (args, kwargs))
    result = function(*plain_args, **plain_kwargs)
    if on_gpu and isinstance(result, Tensor) and "empty" in function._schema.name and _is_index(result):
        result.zero_()  # no kernel will write it, and torch's ops index with it: 0 is in every range
    for observer in observers:
        observer(function, on_gpu)
    if not on_gpu:
        return result
    # What an op wrote in place is the tensor it was given.
    given = {id(t.held if isinstance(t, OnGpu) else t): t for t in leaves}
    return tree_map_only(Tensor, lambda t: given[id(t)] if id(t) in given else OnGpu(t), result)


def _is_index(tensor: Tensor) -> bool:
    return tensor.dtype in (torch.int32, torch.int64)


def _refuse_mixtures(function: Any, leaves: Iterable[Tensor]) -> None:
    """As CUDA has it: CPU tensors of no dimension go with any, a CPU index reads a tensor on the GPU."""
    name = function._schema.name
    if name in ("aten::index.Tensor", "aten::index", "aten::index_put_", "aten::copy_"):
        return
    for leaf in leaves:
        if not isinstance(leaf, OnGpu) and leaf.dim():
            raise RuntimeError(f"{name}: expected all tensors on cuda:0, got {list(leaf.shape)} on cpu")
