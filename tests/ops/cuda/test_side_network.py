"""The side network's CUDA kernels on the emulator, both paths, against float64.

Errors are judged by the reference's own in the same 16-bit type: kernels that keep fp32 between their
products must not be worse than eager torch.
"""

from dataclasses import dataclass, replace
from itertools import combinations

import pytest
import torch

from crossan_fast.cache.quantize import quantize
from crossan_fast.ops.side_network import (
    SideNetworkStructure,
    SideNetworkWeights,
    side_network_reference,
)

MMA, HOPPER = 1, 2


@dataclass(frozen=True)
class Case:
    items: int = 40
    widths: tuple[int, ...] = (128, 128)
    levels: int = 3
    rank: int = 64
    cross: str = "backbone"
    pairs: bool = False
    activation: str = "gelu"
    stored: torch.dtype = torch.bfloat16
    dtype: torch.dtype = torch.bfloat16
    weights: torch.dtype = torch.float32
    ids: torch.dtype | None = torch.int64
    presence: bool = False
    rows: int = 57

    @property
    def structure(self) -> SideNetworkStructure:
        count = len(self.widths)
        sources = tuple((m,) for m in range(count))
        if self.pairs:
            sources += tuple(combinations(range(count), 2))
        cross = self.cross if count > 1 else "none"
        return SideNetworkStructure(self.widths, sources, cross, self.activation, 0.5)

    def make(self, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        structure = self.structure

        def draw(*shape, scale=1.0):
            return torch.randn(shape, generator=generator) * scale

        # Values of the compute type, so that only the kernels' own roundings remain.
        def weight(*shape, scale):
            return draw(*shape, scale=scale).to(self.dtype).to(self.weights)

        levels, rank, widths = self.levels, self.rank, structure.tower_widths
        weights = SideNetworkWeights(
            down_weight=[weight(levels, rank, width, scale=width**-0.5) for width in widths],
            down_bias=[weight(levels, rank, scale=0.2) for _ in widths],
            up_weight=[weight(levels, width, rank, scale=rank**-0.5) for width in widths],
            up_bias=[weight(levels, width, scale=0.2) for width in widths],
            gate=[weight(levels, scale=0.5) for _ in widths],
            cross_gate=[weight(levels, scale=0.5) for _ in structure.cross_pairs],
        )
        rows = self.rows if self.ids else self.items
        states, scales = [draw(rows, levels, width) for width in self.widths], None
        if self.stored in (torch.int8, torch.float8_e4m3fn):
            states, scales = map(list, zip(*(quantize(s, self.stored) for s in states), strict=True))
        else:
            states = [s.to(self.stored) for s in states]
        ids = torch.randint(0, rows, (self.items,), generator=generator).to(self.ids) if self.ids else None
        present = None
        if self.presence:
            present = torch.rand(self.items, len(self.widths), generator=generator) < 0.6
            present[: self.items // 4] = False
        grads = [draw(self.items, width).to(self.dtype) for width in widths]
        return states, scales, ids, present, weights, grads


def _static(case: Case, path: int, backward_items: int = 0):
    structure = case.structure
    sources = [i for source in structure.sources for i in (*source, -1)[:2]]
    return (
        list(structure.widths),
        sources,
        structure.cross,
        structure.activation,
        structure.temperature,
        case.dtype,
        path,
        backward_items,
    )


def _reference(case: Case, dtype: torch.dtype, seed: int = 0):
    """Outputs, and gradients of all weights, by autograd through the definition."""
    states, scales, ids, present, weights, grads = case.make(seed)
    flat = [w.to(dtype).requires_grad_() for w in weights.flatten()]
    outputs = side_network_reference(
        states,
        case.structure.unflatten(flat),
        case.structure,
        ids=ids,
        scales=scales,
        present=present,
        dtype=dtype,
    )
    torch.autograd.backward(outputs, [g.to(dtype) for g in grads])
    return [o.detach() for o in outputs], [w.grad for w in flat]


def _run(ops, case: Case, path: int, seed: int = 0, backward_items: int = 0):
    states, scales, ids, present, weights, grads = case.make(seed)
    static = _static(case, path, backward_items)
    results = ops.side_network(states, scales or [], ids, present, weights.flatten(), *static)
    towers = len(case.structure.sources)
    outputs, saved = results[:towers], results[towers:]
    flat = ops.side_network_backward(
        grads, saved, states, scales or [], ids, present, weights.flatten(), *static
    )
    return outputs, saved, flat


def _error(got, exact) -> float:
    exact = exact.double()
    return float((got.double() - exact).norm() / exact.norm().clamp_min(1e-30))


def _check(ops, case: Case, path: int, seed: int = 0, backward_items: int = 0):
    exact_outputs, exact_grads = _reference(case, torch.float64, seed)
    eager_outputs, eager_grads = _reference(case, case.dtype, seed)
    outputs, saved, grads = _run(ops, case, path, seed, backward_items)
    floor = 2 * torch.finfo(case.dtype).eps
    for got, eager, exact in zip(outputs, eager_outputs, exact_outputs, strict=True):
        assert got.dtype == case.dtype and got.shape == exact.shape
        assert _error(got, exact) <= 1.25 * _error(eager, exact) + floor / 8
    # A gate's gradient is one sum over everything, whose terms cancel: judged by all gates of a kind.
    groups = [list(g) for g in zip(*_grouped(case, grads, eager_grads, exact_grads), strict=True)]
    for got, eager, exact in groups:
        assert _error(got, exact) <= 1.25 * _error(eager, exact) + floor
    for z, level_count in zip(saved, [case.levels] * len(saved), strict=True):
        assert z.shape == (case.items, level_count, case.rank) and z.isfinite().all()
    return outputs, saved, grads


def _grouped(case: Case, *lists):
    for tensors in lists:
        weights = case.structure.unflatten(tensors)
        yield [torch.cat([t.double().flatten() for t in group]) for group in weights if group]


def _name(case: Case) -> str:
    """What differs from the default case."""
    default = Case()
    changed = {k: v for k, v in vars(case).items() if v != getattr(default, k)}
    return (
        "-".join(f"{k}={v}".replace("torch.", "").replace(" ", "") for k, v in changed.items()) or "default"
    )


SMALL = Case(items=37, levels=2)
SHAPES = [
    Case(),
    Case(items=1, widths=(64,), levels=1, rank=8),
    Case(items=33, widths=(64, 64), levels=2, rank=16, activation="relu"),
    Case(items=70, widths=(192,) * 3, levels=1),
    Case(items=35, widths=(64,) * 4, levels=8, rank=32),
    Case(items=40, widths=(64, 192, 128), cross="none", levels=2),
    Case(items=50, widths=(64,) * 3, cross="none", pairs=True, activation="relu", levels=2),
]
DTYPES = [
    replace(SMALL, stored=torch.float16),
    replace(SMALL, stored=torch.float16, dtype=torch.float16),
    replace(SMALL, stored=torch.int8),
    replace(SMALL, stored=torch.float8_e4m3fn, dtype=torch.float16),
    replace(SMALL, stored=torch.float32),
    replace(SMALL, weights=torch.bfloat16),
    replace(SMALL, ids=torch.int32),
    replace(SMALL, ids=None),
]
PRESENCE = [
    replace(SMALL, presence=True, widths=(64,) * 3),
    replace(SMALL, presence=True, widths=(64,) * 3, cross="none", pairs=True, activation="relu"),
    replace(SMALL, presence=True, stored=torch.int8),
    replace(SMALL, presence=True, stored=torch.float32),
]


@pytest.fixture(params=[MMA, HOPPER], ids=["mma", "hopper"])
def path(request, emulate):
    emulate(architecture=80 if request.param == MMA else 90, shared=227 * 1024)
    return request.param


@pytest.mark.parametrize("case", SHAPES, ids=_name)
def test_shapes(ops, path, case):
    _check(ops, case, path)


@pytest.mark.parametrize("case", DTYPES, ids=_name)
def test_types(ops, path, case):
    _check(ops, case, path)


@pytest.mark.parametrize("case", PRESENCE, ids=_name)
def test_missing_modalities(ops, path, case):
    outputs, saved, _ = _check(ops, case, path)
    present = case.make()[3]
    for source, hidden, z in zip(case.structure.sources, outputs, saved, strict=True):
        absent = ~present[:, list(source)].any(dim=1)
        assert absent.any() and not hidden[absent].any() and not z[absent].any()
        assert hidden[~absent].any(dim=1).all()


def test_absent_states_are_never_read(ops, path):
    case = replace(SMALL, presence=True)
    states, scales, ids, present, weights, _ = case.make()
    poisoned = [s.clone() for s in states]
    for m, state in enumerate(poisoned):
        rows = torch.ones(len(state), dtype=torch.bool)
        rows[ids[present[:, m]]] = False
        state[rows] = float("nan")
    arguments = (scales or [], ids, present, weights.flatten(), *_static(case, path))
    clean = ops.side_network(states, *arguments)
    for got, want in zip(ops.side_network(poisoned, *arguments), clean, strict=True):
        assert torch.equal(got, want)


def test_saved_is_the_pre_activation(ops, path):
    case = replace(SMALL, widths=(64,), levels=1)
    states, _, ids, _, weights, _ = case.make()
    _, saved, _ = _run(ops, case, path)
    mu = torch.sigmoid(weights.gate[0].double() / 0.5)
    x = mu * states[0][ids, 0].double()
    z = x @ weights.down_weight[0][0].double().T + weights.down_bias[0][0].double()
    assert _error(saved[0][:, 0], z) < 2 * torch.finfo(case.dtype).eps


def test_any_order_of_threads_gives_the_same_bits(ops, path, emulate):
    architecture = 80 if path == MMA else 90
    first = None
    for seed in range(3):
        emulate(seed=seed, architecture=architecture, shared=227 * 1024)
        results = [t for group in _run(ops, replace(SMALL, items=40), path) for t in group]
        first = first or results
        assert all(torch.equal(a, b) for a, b in zip(first, results, strict=True))


@pytest.mark.parametrize("processors", [1, 2, 4, 40])
def test_any_number_of_multiprocessors(ops, path, emulate, processors):
    # One or two groups a block, clusters that run once or persist, one to many splits of the items.
    emulate(architecture=80 if path == MMA else 90, processors=processors, shared=227 * 1024)
    _check(ops, replace(SMALL, items=150, widths=(64, 64)), path)


# Parts that end within a block of items, with it, and one that would hold more than there are.
@pytest.mark.parametrize("items_at_once", [24, 64, 200])
@pytest.mark.parametrize(
    "case",
    [
        replace(SMALL, items=150, presence=True, widths=(64, 64)),
        replace(SMALL, items=130, ids=torch.int32, stored=torch.int8, widths=(64, 64)),
        replace(SMALL, items=130, ids=None, stored=torch.int8, widths=(64, 64)),
    ],
    ids=_name,
)
def test_backward_in_parts(ops, path, case, items_at_once):
    _check(ops, case, path, backward_items=items_at_once)


def test_views_may_begin_anywhere(ops, path):
    def off(tensors):  # one element into their memory: no 16 bytes at a time from there
        return [torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape) for t in tensors]

    case = replace(SMALL, weights=torch.bfloat16)
    states, _, ids, _, weights, grads = case.make()
    flat, static = weights.flatten(), _static(case, path)
    outputs, saved, want = _run(ops, case, path)
    shifted = ops.side_network(off(states), [], ids, None, off(flat), *static)
    assert all(torch.equal(a, b) for a, b in zip(shifted, [*outputs, *saved], strict=True))
    got = ops.side_network_backward(off(grads), off(saved), off(states), [], ids, None, off(flat), *static)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_no_items(ops, path):
    case = replace(SMALL, items=0)
    outputs, saved, grads = _run(ops, case, path)
    assert all(o.shape == (0, 128) for o in outputs) and all(z.shape == (0, 2, 64) for z in saved)
    assert not any(g.any() for g in grads)


def test_paths_agree_with_each_other(ops, emulate):
    emulate(architecture=90, shared=227 * 1024)
    both = [_run(ops, Case(), path) for path in (MMA, HOPPER)]
    for a, b in zip(*([t for group in run for t in group] for run in both), strict=True):
        assert _error(a, b) < torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize(
    "architecture, kilobytes, levels, widest",
    [(90, 227, 8, 3008), (80, 163, 8, 1984), (86, 99, 4, 960), (86, 99, 5, 0)],
)
def test_widest_tower_is_the_shared_memory_s(ops, emulate, architecture, kilobytes, levels, widest):
    emulate(architecture=architecture, shared=kilobytes * 1024)
    assert ops.side_network_widest(levels) == widest


def test_limits_of_the_device(ops, emulate):
    states, _, ids, _, weights, _ = SMALL.make()
    emulate(architecture=80)
    with pytest.raises(RuntimeError, match="the path that was asked for needs another GPU"):
        ops.side_network(states, [], ids, None, weights.flatten(), *_static(SMALL, HOPPER))
    emulate(architecture=80, shared=40 * 1024)
    with pytest.raises(RuntimeError, match="side_network: more elements"):
        ops.side_network(states, [], ids, None, weights.flatten(), *_static(SMALL, MMA))


@pytest.mark.parametrize("place", [0, 2047, 2048, 4099])
def test_a_wrong_id_is_found_wherever_it_stands(ops, emulate, place):
    case = replace(SMALL, items=4100, widths=(64,), levels=1, rank=8)
    states, _, ids, _, weights, _ = case.make()
    ids[place] = case.rows
    with pytest.raises(RuntimeError, match=r"ids: an id is outside of the states' rows \(got 57\)"):
        ops.side_network(states, [], ids, None, weights.flatten(), *_static(case, MMA))


def test_errors_name_the_argument(ops, emulate):
    states, _, ids, _, weights, grads = SMALL.make()
    flat, static = weights.flatten(), _static(SMALL, MMA)

    def forward(states=states, scales=(), ids=ids, present=None, flat=flat, static=static):
        return ops.side_network(states, list(scales), ids, present, flat, *static)

    def changed(index, value):
        return (*static[:index], value, *static[index + 1 :])

    eight = [s.to(torch.int8) for s in states]
    cases = [
        ({"states": states[:1]}, ValueError, "states: expected 2 tensors"),
        ({"states": [states[0], states[1][:-1]]}, ValueError, r"states\[1\]: expected shape"),
        ({"states": [states[0], states[1].double()]}, TypeError, r"states\[1\]: expected float32"),
        ({"states": eight}, ValueError, r"states\[0\]: .* needs scales"),
        ({"states": eight, "scales": [torch.ones(57, 2)]}, ValueError, "scales: expected none or 2"),
        ({"states": eight, "scales": [torch.ones(57, 3)] * 2}, ValueError, r"scales\[0\]: expected shape"),
        ({"ids": ids.to(torch.int16)}, TypeError, "ids: expected int64"),
        ({"ids": ids[None]}, ValueError, "ids: expected shape"),
        ({"ids": torch.tensor([57])}, RuntimeError, "ids: an id is outside"),
        ({"ids": torch.tensor([-1])}, RuntimeError, "ids: an id is outside"),
        ({"present": torch.ones(37, 3, dtype=torch.bool)}, ValueError, "present: expected shape"),
        ({"present": torch.ones(37, 2)}, TypeError, "present: expected Bool"),
        ({"flat": flat[:-1]}, ValueError, "weights: expected 12 tensors, got 11"),
        ({"flat": [*flat[:-1], flat[-1][:-1]]}, ValueError, r"weights\[11\]: expected shape"),
        ({"flat": [*flat[:3], flat[3].half(), *flat[4:]]}, TypeError, r"weights\[3\]: expected Float"),
        ({"static": changed(0, [100, 100])}, ValueError, "widths: expected multiples of 64"),
        ({"static": changed(1, [0, -1, 0, -1])}, ValueError, "sources: tower 1"),
        ({"static": changed(2, "side")}, ValueError, "cross: expected backbone or none"),
        ({"static": changed(3, "silu")}, ValueError, "activation: expected gelu or relu"),
        ({"static": changed(4, 0.0)}, ValueError, "temperature: expected a positive"),
        ({"static": changed(5, torch.float32)}, TypeError, "dtype: expected float16 or bfloat16"),
        ({"static": changed(6, 3)}, ValueError, "path: expected"),
        ({"static": changed(7, -1)}, ValueError, "backward_items: expected"),
    ]
    for arguments, error, message in cases:
        with pytest.raises(error, match=message):
            forward(**arguments)
    saved = forward()[2:]
    backward = ops.side_network_backward
    rest = (states, [], ids, None, flat, *static)
    with pytest.raises(ValueError, match=r"grad_outputs: expected 2 tensors, got 1"):
        backward(grads[:1], saved, *rest)
    with pytest.raises(TypeError, match=r"grad_outputs\[1\]: expected BFloat16"):
        backward([grads[0], grads[1].float()], saved, *rest)
    with pytest.raises(ValueError, match=r"saved\[0\]: expected shape"):
        backward(grads, [saved[0][:-1], saved[1]], *rest)
