"""side_network: every tower's embedding from cached backbone states, heads included, in one op.

With c[m] the states of modality m, μ = sigmoid(θ / τ) and A the side adapter (docs/mathematics.md)
`A(x) = x + W_up · act(W_down x + b_down) + b_up`, a tower of modality m starts at h = 0, walks levels l, and
its head makes d numbers of the last h:

    x = μ[l]·c[m][:, l] + (1 − μ[l])·h + Σ_{n≠m} tanh(ν[n, l])·T_{n→m}(s[n, l]),    h ← A[l](x)
    e = W_head h + b_head

◊ s[n, l] is c[n][:, l] (`cross="backbone"`), the other tower's h of the level before (`"side"`) or absent
(`"none"`); T is the identity where widths agree and a rank-r pair of matrices shared by the levels elsewhere,
or with `cross_projection="low_rank"` everywhere.
A pair tower (IISAN, arXiv 2404.02059) of modalities (a, b) walks x = h + μ·c[a] + (1 − μ)·c[b], the wider of
the two brought to the narrower's width by a Linear of its level.

All but the activations is linear, so that no backend but the reference makes an h: heads are applied before
the up-projections ("Heads folded in", docs/mathematics.md). Where `cross="side"` couples the towers, h is
made, and read by the op alone.

◊ Missing modalities: where `present[i, m]` is false, modality m of item i adds nothing to any sum, and a
tower without a present source gives zeros.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from crossan_fast._checks import (
    FLOATS,
    check_range,
    check_tensor,
    check_tensors,
    check_weights,
    describe,
    refuse_gradient,
)
from crossan_fast.ops import _passes
from crossan_fast.ops._contracts import SideNetworkStructure, SideNetworkWeights
from crossan_fast.ops._dispatch import choose, compute_dtype
from crossan_fast.ops._kept import Layout
from crossan_fast.ops._registration import define, differentiate, on_one_device

SCALED_DTYPES = (torch.int8, torch.float8_e4m3fn)
STATE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, *SCALED_DTYPES)


def side_network_reference(
    states: Sequence[Tensor],
    weights: SideNetworkWeights,
    structure: SideNetworkStructure,
    *,
    ids: Tensor | None = None,
    scales: Sequence[Tensor] | None = None,
    present: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The definition, h and all, in plain torch; the oracle of every other backend, usable in float64.

    Arguments as `side_network_hidden`.

    Returns:
        e `[N, T, d]` in `dtype`.
    """
    dtype = dtype or weights.gate[0].dtype
    hidden = side_network_hidden(
        states, weights, structure, ids=ids, scales=scales, present=present, dtype=dtype
    )
    e = [
        F.linear(h, weight.to(dtype), bias.to(dtype))
        for h, weight, bias in zip(hidden, weights.head_weight, weights.head_bias, strict=True)
    ]
    return torch.stack(
        [_where(_exists(present, source), x) for source, x in zip(structure.sources, e, strict=True)], 1
    )


def side_network_hidden(
    states: Sequence[Tensor],
    weights: SideNetworkWeights,
    structure: SideNetworkStructure,
    *,
    ids: Tensor | None = None,
    scales: Sequence[Tensor] | None = None,
    present: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """Every tower's last h, by the definition in plain torch.

    Args:
        states: per modality `[R, L, D_m]`, any floating type, or int8 / float8_e4m3fn with `scales`.
        weights: see `SideNetworkWeights`.
        structure: see `SideNetworkStructure`.
        ids: rows to read, int64 or int32 `[N]`; None reads all R.
        scales: per modality fp32 `[R, L]`; a state is its stored value times its scale.
        present: bool `[N, M]`, aligned with `ids`; None: all present.
        dtype: the type to compute in; None: the weights'.

    Returns:
        Per tower its last h, `[N, D_t]` in `dtype`.
    """
    dtype = dtype or weights.gate[0].dtype
    walk = _Walk(SideNetworkWeights(*([t.to(dtype) for t in group] for group in weights)), structure)
    modalities, levels = range(len(states)), states[0].shape[1]
    count = states[0].shape[0] if ids is None else ids.shape[0]
    here = [None if present is None else present[:, m, None] for m in modalities]
    exists = [_exists(present, source) for source in structure.sources]
    h = [states[0].new_zeros((count, width), dtype=dtype) for width in structure.tower_widths]
    for level in range(levels):
        c = [
            _where(here[m], _read(states[m], None if scales is None else scales[m], ids, level, dtype))
            for m in modalities
        ]
        before = list(h)
        for t, source in enumerate(structure.sources):
            if len(source) == 1:
                x = walk.mixed(t, level, c, before)
            else:
                x = walk.paired(t, level, c, before, here)
            h[t] = _where(exists[t], walk.adapted(t, level, x))
    return h


def _read(
    states: Tensor, scales: Tensor | None, ids: Tensor | None, level: int, dtype: torch.dtype
) -> Tensor:
    """One modality's states of a level, `[N, D_m]` in `dtype`."""
    rows = slice(None) if ids is None else ids
    state = states[rows, level].to(dtype)
    return state if scales is None else state * scales[rows, level][:, None].to(dtype)


def _exists(present: Tensor | None, source: Sequence[int]) -> Tensor | None:
    """Where a tower has a present source, `[N, 1]`; None: everywhere."""
    return None if present is None else present[:, list(source)].any(dim=1, keepdim=True)


def _where(mask: Tensor | None, value: Tensor) -> Tensor:
    return value if mask is None else torch.where(mask, value, 0)


class _Walk:
    """One level of one tower; the symbols are those of the top of the file."""

    def __init__(self, weights: SideNetworkWeights, structure: SideNetworkStructure) -> None:
        self.weights, self.structure = weights, structure
        self.mu = [torch.sigmoid(theta / structure.temperature) for theta in weights.gate]
        strengths = (torch.tanh(nu) for nu in weights.cross_gate)
        self.crosses = dict(zip(structure.cross_pairs, strengths, strict=True))
        pairs = zip(weights.cross_down, weights.cross_up, strict=True)
        self.projections = dict(zip(structure.projected_pairs, pairs, strict=True))
        narrow = zip(weights.pair_weight, weights.pair_bias, strict=True)
        self.narrowings = dict(zip(structure.narrowed_towers, narrow, strict=True))

    def mixed(self, t: int, level: int, c: Sequence[Tensor], before: Sequence[Tensor]) -> Tensor:
        """x of a modality's tower, `before` being every tower's h of the level before."""
        (m,) = self.structure.sources[t]
        mu = self.mu[t][level]
        x = mu * c[m] + (1 - mu) * before[t]
        for n in range(len(c)):
            if (m, n) in self.crosses:
                s = c[n] if self.structure.cross == "backbone" else before[n]
                if (m, n) in self.projections:
                    down, up = self.projections[m, n]
                    s = (s @ down.T) @ up.T
                x = x + self.crosses[m, n][level] * s
        return x

    def paired(
        self, t: int, level: int, c: Sequence[Tensor], before: Sequence[Tensor], here: Sequence[Tensor | None]
    ) -> Tensor:
        """x of a pair's tower, `here` being where each modality is present."""
        a, b = self.structure.sources[t]
        ca, cb = c[a], c[b]
        if t in self.narrowings:
            weight, bias = (p[level] for p in self.narrowings[t])
            if self.structure.widths[a] > self.structure.widths[b]:
                ca = _where(here[a], F.linear(ca, weight, bias))
            else:
                cb = _where(here[b], F.linear(cb, weight, bias))
        mu = self.mu[t][level]
        return before[t] + mu * ca + (1 - mu) * cb

    def adapted(self, t: int, level: int, x: Tensor) -> Tensor:
        """A(x)."""
        w, act = self.weights, F.gelu if self.structure.activation == "gelu" else F.relu
        bottleneck = act(F.linear(x, w.down_weight[t][level], w.down_bias[t][level]))
        return x + F.linear(bottleneck, w.up_weight[t][level], w.up_bias[t][level])


@on_one_device
def side_network(
    states: Sequence[Tensor],
    weights: SideNetworkWeights,
    structure: SideNetworkStructure,
    *,
    ids: Tensor | None = None,
    scales: Sequence[Tensor] | None = None,
    present: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Every tower's embedding, differentiable in all weights; arguments as `side_network_reference`.

    Under autocast the op computes in, and returns, autocast's type. The fused backends keep only the
    bottlenecks' pre-activations for the backward and give the states no gradient: states that require one
    run eager. Scales get no gradient.

    Returns:
        e `[N, T, d]`, zeros where a tower has no present source.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices that do not fit, named; scales that need a gradient;
            on the CPU also ids out of range.
        BackendUnavailable: `backend` was asked for by name and can't serve.
    """
    _check(states, weights, structure, ids, scales, present)
    device, default = states[0].device.type, weights.gate[0].dtype
    dtype = compute_dtype(device, default)
    levels, rank = weights.down_bias[0].shape
    features = features_of(structure, levels, rank, weights.head_bias[0].shape[0])
    if any(s.requires_grad for s in states):
        features = ("states_grad", *features)
    choice = choose("side_network", device, dtype, features, backend)
    if choice.backend == "eager":
        return side_network_reference(
            states, weights, structure, ids=ids, scales=scales, present=present, dtype=default
        ).to(dtype)
    return _side_network(
        list(states),
        list(scales or ()),
        ids,
        present,
        weights.flatten(),
        *structure.static,
        dtype,
        choice.passes,
    )[0]


def features_of(structure: SideNetworkStructure, levels: int, rank: int, embedding: int) -> tuple[str, ...]:
    """What a backend may have limits on, as `Request.features`: sizes of the model, never of a batch."""
    features = [
        f"cross={structure.cross}",
        f"widths={structure.widths_text}",
        f"levels={levels}",
        f"rank={rank}",
        f"embedding={embedding}",
    ]
    if structure.cross != "none":
        features.append(f"cross_projection={structure.cross_projection}")
    return (*features, "unequal_pairs") if structure.narrowed_towers else tuple(features)


def _check(
    states: Sequence[Tensor],
    weights: SideNetworkWeights,
    structure: SideNetworkStructure,
    ids: Tensor | None,
    scales: Sequence[Tensor] | None,
    present: Tensor | None,
) -> None:
    check_weights(weights, SideNetworkWeights)
    if not isinstance(structure, SideNetworkStructure):
        raise TypeError(f"structure: expected SideNetworkStructure, got {describe(structure)}")
    check_tensors("states", states, len(structure.widths))
    _check_weights(weights, structure)
    levels = weights.gate[0].shape[0]
    rows = check_tensor("states[0]", states[0], (None, levels, structure.widths[0])).shape[0]
    for m, (state, width) in enumerate(zip(states, structure.widths, strict=True)):
        check_tensor(f"states[{m}]", state, (None, levels, width), dtypes=STATE_DTYPES)
        if state.shape[0] != rows:
            raise ValueError(f"states[{m}]: expected {rows} rows as in states[0], got {describe(state)}")
        if scales is None and state.dtype in SCALED_DTYPES:
            raise ValueError(f"scales: {describe(state)} in states[{m}] needs a scale per row and level")
    if scales is not None:
        check_tensors("scales", scales, len(states))
        for m, scale in enumerate(scales):
            check_tensor(f"scales[{m}]", scale, (None, levels), dtypes=(torch.float32,))
            refuse_gradient(f"scales[{m}]", scale)
            if scale.shape[0] != rows:
                raise ValueError(f"scales[{m}]: expected {rows} rows as in states, got {describe(scale)}")
    if ids is not None:
        check_tensor("ids", ids, (None,), dtypes=(torch.int64, torch.int32))
        check_range("ids", ids, 0, rows - 1)
    if present is not None:
        check_tensor("present", present, (None, len(states)), dtypes=(torch.bool,))
        count = rows if ids is None else ids.shape[0]
        if present.shape[0] != count:
            raise ValueError(f"present: expected a row for each of {count} items, got {describe(present)}")


def _check_weights(weights: SideNetworkWeights, structure: SideNetworkStructure) -> None:
    """Every tensor against the shape that the structure, and the first tower's sizes, give it."""
    towers = len(structure.sources)
    groups = (
        *((name, towers) for name in weights._fields[:7]),
        ("cross_gate", len(structure.cross_pairs)),
        ("cross_down", len(structure.projected_pairs)),
        ("cross_up", len(structure.projected_pairs)),
        ("pair_weight", len(structure.narrowed_towers)),
        ("pair_bias", len(structure.narrowed_towers)),
    )
    for name, count in groups:
        check_tensors(name, getattr(weights, name), count)
    first = check_tensor("down_bias[0]", weights.down_bias[0], (None, None), dtypes=FLOATS)
    levels, rank = first.shape
    head = check_tensor("head_bias[0]", weights.head_bias[0], (None,), dtypes=FLOATS)
    if not (levels and rank and head.shape[0]):
        raise ValueError(
            f"down_bias[0], head_bias[0]: expected [L, r] and [d] with no side of 0, got {describe(first)} "
            f"and {describe(head)}"
        )
    for name, index, shape in _shapes(structure, levels, rank, head.shape[0]):
        tensor = getattr(weights, name)[index]
        # Names are put together only for a complaint: this runs at every step.
        if tensor.shape != shape or tensor.dtype not in FLOATS or tensor.layout is not torch.strided:
            check_tensor(f"{name}[{index}]", tensor, shape, dtypes=FLOATS)


def _shapes(
    structure: SideNetworkStructure, levels: int, rank: int, embedding: int
) -> list[tuple[str, int, tuple[int, ...]]]:
    """Field, place and shape of each tensor of `SideNetworkWeights`."""
    widths = structure.widths
    shapes: list[tuple[str, int, tuple[int, ...]]] = []
    for t, width in enumerate(structure.tower_widths):
        shapes += [
            ("down_weight", t, (levels, rank, width)),
            ("down_bias", t, (levels, rank)),
            ("up_weight", t, (levels, width, rank)),
            ("up_bias", t, (levels, width)),
            ("gate", t, (levels,)),
            ("head_weight", t, (embedding, width)),
            ("head_bias", t, (embedding,)),
        ]
    shapes += [("cross_gate", p, (levels,)) for p in range(len(structure.cross_pairs))]
    for p, (m, n) in enumerate(structure.projected_pairs):
        shapes += [("cross_down", p, (rank, widths[n])), ("cross_up", p, (widths[m], rank))]
    for p, t in enumerate(structure.narrowed_towers):
        one, other = (widths[m] for m in structure.sources[t])
        narrow, wide = min(one, other), max(one, other)  # `sorted` is not traced with sizes that vary
        shapes += [("pair_weight", p, (levels, narrow, wide)), ("pair_bias", p, (levels, narrow))]
    return shapes


def _fake(states, scales, ids, present, weights, *static):
    """e; for the backward the bottlenecks' pre-activations z `[T, N, L, r]`, and what is made of weights."""
    *static, dtype, backend = static
    structure = SideNetworkStructure.from_static(*static)
    own, empty = structure.unflatten(weights), states[0].new_empty
    count, towers = states[0].shape[0] if ids is None else ids.shape[0], len(structure.sources)
    levels, rank = own.down_bias[0].shape
    embedding, wide = own.head_bias[0].shape[0], torch.promote_types(dtype, torch.float32)
    if _passes.of(backend, "forward") == "triton":
        layout = Layout.of(structure, own, dtype)
        links = layout.size if layout else 0
    else:
        links = links_size(structure, levels, rank, embedding, states[0].device)
    return [
        empty((count, towers, embedding), dtype=dtype),
        empty((towers, count, levels, rank), dtype=dtype),
        empty((towers, links), dtype=wide),
    ]


def links_size(
    structure: SideNetworkStructure, levels: int, rank: int, embedding: int, device: torch.device
) -> int:
    """Numbers a tower of what the CPU's forward keeps of its weights: for each level p the matrix
    `[(L − 1 − p)·r + d, r]` of κ W_l W_up,p over l > p, W_l being W_down,l and the head's last.

    CUDA's kernels make them anew, Triton's keep what `_kept` lays out. There are none where the CPU's walk
    with h itself (`Structure::walks_with_h` in C++): with `cross="side"`, and in towers too narrow for links
    to pay.
    """
    links = levels * (levels - 1) // 2 * rank * rank + levels * rank * embedding
    narrow = 4 * levels * rank * sum(structure.tower_widths) < 3 * links * len(structure.sources)
    return 0 if device.type != "cpu" or structure.cross == "side" or narrow else links


def _fake_backward(grad_embeddings, saved, links, states, scales, ids, present, weights, *static):
    return [torch.empty_like(weight, memory_format=torch.contiguous_format) for weight in weights]


def _keep(ctx, arguments, output):
    states, scales, ids, present, weights, *ctx.static = arguments
    _, *saved = output
    ctx.counts = (len(states), len(scales), len(weights))
    ctx.mark_non_differentiable(*saved)
    ctx.save_for_backward(ids, present, *saved, *states, *scales, *weights)


def _backward(ctx, grad_embeddings, *_):
    if grad_embeddings is None:  # nothing downstream reads e
        return None, None, None, None, None
    ids, present, saved, links, *rest = ctx.saved_tensors
    states, scales, weights = ([rest.pop(0) for _ in range(count)] for count in ctx.counts)
    grad_weights = _side_network_backward(
        grad_embeddings, saved, links, states, scales, ids, present, weights, *ctx.static
    )
    return None, None, None, None, grad_weights


_COMMON = (
    "Tensor[] states, Tensor[] scales, Tensor? ids, Tensor? present, Tensor[] weights, int[] widths, "
    "int[] sources, str cross, str activation, float temperature, str cross_projection, "
    "ScalarType dtype"
)
_side_network = define(f"side_network({_COMMON}) -> Tensor[]", _fake, by_backend=True)
_side_network_backward = define(
    f"side_network_backward(Tensor grad_embeddings, Tensor saved, Tensor links, {_COMMON}) -> Tensor[]",
    _fake_backward,
)
differentiate(_side_network, _keep, _backward)
