"""Tensors that say they lie on `cuda:0` and compute on the CPU, for what only a CUDA machine would show.

Torch's own fake tensors have no values, so nothing that looks at one (a check, an evaluation) can run on
them, and a torch without CUDA ends the process where one of theirs needs a gradient.

    with PretendedGpu():
        x = torch.zeros(3, device="cuda")     # x.device is cuda:0
        x + torch.zeros(3)                    # RuntimeError, as on a GPU
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

GPU = torch.device("cuda", 0)


class OnGpu(Tensor):
    """Holds a CPU tensor, `held`; torch's C++ takes it for one on the CPU, Python for one on the GPU."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor) -> OnGpu:
        made = Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            requires_grad=False,
        )
        made.held = held
        return made

    device = property(lambda self: GPU)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_cpu = property(lambda self: False)  # type: ignore[assignment]

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"OnGpu({self.held!r})"

    @classmethod
    def __torch_dispatch__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        _refuse_mixtures(function, tree_leaves((args, kwargs)))
        given = {id(t.held): t for t in tree_leaves((args, kwargs)) if isinstance(t, OnGpu)}
        plain_args, plain_kwargs = tree_map_only(OnGpu, lambda t: t.held, (args, kwargs))
        result = function(*plain_args, **plain_kwargs)
        # What an op wrote in place is the tensor it was given.
        return tree_map_only(Tensor, lambda t: given[id(t)] if id(t) in given else OnGpu(t), result)


def _refuse_mixtures(function: Any, leaves: Iterable[Any]) -> None:
    """As CUDA has it: CPU tensors of no dimension go with any, a CPU index reads a tensor on the GPU."""
    name = function._schema.name
    if name in ("aten::index.Tensor", "aten::index", "aten::index_put_", "aten::copy_"):
        return
    for leaf in leaves:
        if isinstance(leaf, Tensor) and not isinstance(leaf, OnGpu) and leaf.dim():
            raise RuntimeError(f"{name}: expected all tensors on cuda:0, got {list(leaf.shape)} on cpu")


class PretendedGpu(TorchFunctionMode):
    """Within the block `device="cuda"` makes, and `.to("cuda")` gives, tensors `OnGpu`."""

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if function in (Tensor.to, Tensor.cuda, Tensor.cpu):
            return _moved(function, args, kwargs)
        if function is Tensor.tolist:
            return args[0].held.tolist() if isinstance(args[0], OnGpu) else args[0].tolist()
        if function is Tensor.backward:
            with self:
                return torch.autograd.backward(args[0], *args[1:], kwargs.get("gradient"))
        device = kwargs.get("device")
        if device is None:
            return function(*args, **kwargs)
        wants_gradient = kwargs.pop("requires_grad", False)
        made = function(*args, **{**kwargs, "device": "cpu"})
        if torch.device(device).type == "cuda" and not isinstance(made, OnGpu):
            made = OnGpu(made)
        return made.requires_grad_() if wants_gradient else made


def _moved(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    tensor, *rest = args
    targets = {Tensor.cuda: GPU, Tensor.cpu: torch.device("cpu")}
    target, options = targets.get(function), []
    for option in (*rest, *kwargs.values()):
        if isinstance(option, Tensor):
            target = option.device
            options.append(option.dtype)
        elif isinstance(option, (str, torch.device)):
            target = torch.device(option)
        elif isinstance(option, torch.dtype):
            options.append(option)
    if target is not None and (target.type == "cuda") != isinstance(tensor, OnGpu):
        assert not (torch.is_grad_enabled() and tensor.requires_grad and not tensor.is_leaf)
        tensor = OnGpu(tensor.detach().clone()) if target.type == "cuda" else tensor.held.clone()
    return tensor.to(options[0]) if options else tensor
