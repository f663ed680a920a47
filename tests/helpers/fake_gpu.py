"""Torch's fake tensors on `cuda:0` for a whole step: shapes, types and devices, and no values to look at.

Whatever asks the device for a value or a shape raises, and so does whatever mixes devices. Our ops run the
host functions of their Triton kernels, which launch nothing, and must give what the ops' fakes say.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.pretended_gpu.driver import torch_cuda
from crossan_fast import HiddenStateCache
from crossan_fast.cache.tiers import Placement
from crossan_fast.kernels import _common
from crossan_fast.ops import _dispatch

GPU = torch.device("cuda", 0)


class Watch(TorchDispatchMode):
    """For a step within `fake_gpu`: runs our ops as they are, and refuses what fake tensors let pass, copies
    between host and device, for which a step would wait."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        devices = {tensor.device for tensor in tensors if tensor.dim()} | {kwargs.get("device") or GPU}
        if tensors and devices != {GPU}:
            raise RuntimeError(f"{function}: expected {GPU} alone, got {sorted(map(str, devices))}")
        if function._schema.name == "aten::_fused_adamw_":
            return None  # it writes in place, and torch has no fake of it
        expected = function(*args, **kwargs)
        if function.namespace != "crossan_fast":
            return expected
        with self:
            found = function._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *args, **kwargs)
        for mine, fake in zip(tree_leaves(found), tree_leaves(expected), strict=True):
            assert (mine.shape, mine.dtype, mine.device) == (fake.shape, fake.dtype, fake.device), function
        return found


@contextmanager
def fake_gpu() -> Iterator[FakeTensorMode]:
    """Within the block every tensor that is made is fake, and Triton serves `cuda`."""
    _dispatch._choose.cache_clear()
    try:
        with (
            mock.patch.object(_common, "INTERPRETED", False),
            mock.patch.object(_common, "_recorder", _common._Recorder(90, only=frozenset())),
            torch_cuda(),
            FakeTensorMode() as mode,
        ):
            yield mode
    finally:
        _dispatch._choose.cache_clear()


def on_fake_gpu(cache: HiddenStateCache, mode: FakeTensorMode, everything: bool) -> HiddenStateCache:
    """`cache`, resident on the fake GPU; what `to` does but for the looks at its values.

    Args:
        everything: no item lacks a modality.
    """

    def move(tensor: Tensor) -> Tensor:
        return torch.empty_like(mode.from_tensor(tensor), device=GPU)

    columns = tuple(range(len(cache.modalities)))
    cache._masks[GPU, columns] = None if everything else move(cache.present), None
    scales = None if cache._scales is None else [move(scale) for scale in cache._scales]
    cache._loaded[GPU] = [move(states) for states in cache._states], scales
    cache._placement = Placement(GPU, "resident", "for a test")
    return cache
