"""side_network in Triton: host functions (README.md here has the algebra, the tiling and the costs).

Sources that T projects, or whose width is not their tower's, are made by plain matrix products over a bounded
chunk of items (`derived`: they are dense, and cuBLAS's business); with cross="side" levels depend on every
tower's h, so that their heads can't be folded in (`side_levels`). Everything else, the paper's networks
included, is one run of the kernels for all levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from crossan_fast.kernels._blocks import on_device
from crossan_fast.kernels.side_network import side_levels
from crossan_fast.kernels.side_network.data import Data
from crossan_fast.kernels.side_network.derived import open_towers
from crossan_fast.kernels.side_network.forward_launch import forward_group
from crossan_fast.kernels.side_network.gradient_launch import GroupGradient
from crossan_fast.kernels.side_network.gradients import Gradients
from crossan_fast.kernels.side_network.parameters import Kept, Parameters
from crossan_fast.kernels.side_network.plan import group_towers
from crossan_fast.ops._contracts import SideNetworkStructure
from crossan_fast.ops._dispatch import Request
from crossan_fast.ops._kept import Layout

# Items at a time: what bounds the backward's scratch, and the forward's where it has any.
CHUNK = 8192
# The same where states are copied: gathered, projected, or kept for every level.
DENSE_CHUNK = 1024
# A program holds a block of items' embeddings.
WIDEST_EMBEDDING = 256


def refuses(request: Request) -> str | None:
    """See `crossan_fast.ops._triton`."""
    if "states_grad" in request.features:
        return "gives no gradient to states: the backbones are frozen"
    for feature in request.features:
        if feature.startswith("embedding=") and int(feature.removeprefix("embedding=")) > WIDEST_EMBEDDING:
            return f"serves embeddings of at most {WIDEST_EMBEDDING} numbers, got {feature}"
    return None


def forward(
    states: Sequence[Tensor],
    scales: Sequence[Tensor],
    ids: Tensor | None,
    present: Tensor | None,
    weights: Sequence[Tensor],
    *static: Any,
) -> list[Tensor]:
    """e `[N, T, d]`, for the backward the pre-activations z `[T, N, L, r]`, and what was made of the weights.

    Arguments are those of the op's schema, on one device and checked. e and z are in the compute dtype, zero
    where a tower has no present source.
    """
    *fields, dtype = static
    structure = SideNetworkStructure.from_static(*fields)
    with on_device(states[0]), torch.no_grad():
        own = structure.unflatten(weights)
        layout, towers = Layout.of(structure, own, dtype), len(structure.sources)
        # The interpreter's results are compared whole, gaps included; on a GPU zeros are a launch.
        make = torch.zeros if states[0].device.type == "cpu" else torch.empty
        size = layout.size if layout else 0
        links = make(towers, size, device=states[0].device, dtype=torch.float32)
        p = Parameters(own, structure, dtype, Kept(layout, links.view(-1), filled=False) if layout else None)
        data = Data.of(states, scales or None, ids, present)
        new: dict[str, Any] = {"device": p.device, "dtype": dtype}
        out = torch.empty(data.count, towers, p.embedding, **new)
        saved = torch.empty(towers, data.count, p.levels, p.rank, **new)
        for chunk, first, last in data.chunks(_chunk_size(structure)):
            here, z = out[first:last], saved[:, first:last]
            if structure.cross == "side":
                side_levels.forward(p, chunk, here, z)
            for group in group_towers(open_towers(p, chunk)[0]):
                forward_group(group, p, chunk.items, here, z)
        return [out, saved, links]


def backward(
    grad_embeddings: Tensor,
    saved: Tensor,
    links: Tensor,
    states: Sequence[Tensor],
    scales: Sequence[Tensor],
    ids: Tensor | None,
    present: Tensor | None,
    weights: Sequence[Tensor],
    *static: Any,
) -> list[Tensor]:
    """Gradients of `weights`, in order, each in its weight's dtype; the same bits every run.

    `links` without numbers: the forward was another backend's, and kept nothing of the weights.
    """
    *fields, dtype = static
    structure = SideNetworkStructure.from_static(*fields)
    with on_device(states[0]), torch.no_grad():
        own = structure.unflatten(weights)
        layout = Layout.of(structure, own, dtype) if links.shape[1] else None
        kept = Kept(layout, links.contiguous().view(-1), filled=True) if layout else None
        p = Parameters(own, structure, dtype, kept)
        data = Data.of(states, scales or None, ids, present)
        if data.count == 0:
            return [torch.zeros_like(w, memory_format=torch.contiguous_format) for w in weights]
        grads = Gradients(p)
        g, z = grad_embeddings.to(dtype).contiguous(), saved.contiguous()
        gradients: list[GroupGradient] = []
        for chunk, first, last in data.chunks(_chunk_size(structure)):
            here = (g[first:last], z[:, first:last])
            if structure.cross == "side":
                side_levels.backward(p, chunk, *here, grads)
            towers, derived = open_towers(p, chunk)
            groups = group_towers(towers)
            if not gradients:
                gradients = [GroupGradient.tuned(group, p, chunk.items, *here) for group in groups]
            grad_x = _grad_x(p, chunk) if derived else None
            for gradient, group in zip(gradients, groups, strict=True):
                gradient.add(group, chunk.items, *here, grad_x)
            if grad_x is not None:
                for source in derived:
                    source.backward(chunk, grad_x, p.gates[0], grads)
        for gradient in gradients:
            gradient.finish(grads.weights, grads.biases, grads.gate_sum)
        return grads.flatten()


def _chunk_size(structure: SideNetworkStructure) -> int:
    copies = structure.cross == "side" or structure.projected_pairs or structure.narrowed_towers
    return DENSE_CHUNK if copies else CHUNK


def _grad_x(p: Parameters, chunk: Data) -> list[Tensor]:
    new: dict[str, Any] = {"device": p.device, "dtype": p.dtype}
    return [torch.empty(chunk.count, p.levels, width, **new) for width in p.structure.tower_widths]
