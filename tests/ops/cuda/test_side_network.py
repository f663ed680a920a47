"""The side network's CUDA kernels on the emulator, both paths, against float64 and the definition, h and all.

Errors are judged by the reference's own in the same 16-bit type (tests/helpers/cuda_side_network.py).
"""

from dataclasses import replace

import pytest
import torch
from cuda_side_network import HOPPER, MMA, Case, error


def _flat(run):
    embeddings, saved, grads = run
    return [embeddings, saved, *grads]


def _name(case: Case) -> str:
    """What differs from the default case."""
    default = Case()
    changed = {k: v for k, v in vars(case).items() if v != getattr(default, k)}
    return (
        "-".join(f"{k}={v}".replace("torch.", "").replace(" ", "") for k, v in changed.items()) or "default"
    )


SMALL = Case(items=37, widths=(64, 64), levels=2)
SHAPES = [
    Case(),
    Case(items=1, widths=(64,), levels=1, rank=8),
    Case(items=33, widths=(64, 64), levels=2, rank=16, activation="relu"),
    Case(items=70, widths=(192,) * 3, levels=1),
    Case(items=35, widths=(64,) * 4, levels=2, rank=32),
    Case(items=35, widths=(64,), levels=8, rank=32, embedding=64),
    Case(items=40, widths=(64, 192, 128), cross="none", levels=2),
    Case(items=50, widths=(64,) * 3, cross="none", pairs=True, activation="relu", levels=2),
    Case(items=34, levels=2, embedding=64),
    Case(items=66, widths=(64,), levels=7, rank=16, embedding=128),
    Case(items=33, widths=(64, 64), levels=1, rank=8, embedding=200),
]
# μ of 0 and 1 to the last place, and near: what a division by 1 − μ would not survive.
GATES = [
    Case(items=37, levels=5, gates=(30, -30, 3, 30, -3)),
    Case(items=37, widths=(64,) * 3, levels=4, rank=8, cross="none", pairs=True, gates=(-30, 30, -3, 3)),
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
    case.check(ops, path)


@pytest.mark.parametrize("case", GATES, ids=_name)
def test_gates_that_are_shut_and_open(ops, path, case):
    case.check(ops, path)


@pytest.mark.parametrize("case", DTYPES, ids=_name)
def test_types(ops, path, case):
    case.check(ops, path)


@pytest.mark.parametrize("case", PRESENCE, ids=_name)
def test_missing_modalities(ops, path, case):
    embeddings, saved = case.check(ops, path)
    present = case.make()[3]
    for source, e, z in zip(case.structure.sources, embeddings.unbind(1), saved, strict=True):
        absent = ~present[:, list(source)].any(dim=1)
        assert absent.any() and not e[absent].any() and not z[absent].any()
        assert e[~absent].any(dim=1).all()


def test_absent_states_are_never_read(ops, path):
    case = replace(SMALL, presence=True)
    states, scales, ids, present, weights, _ = case.make()
    poisoned = [s.clone() for s in states]
    for m, state in enumerate(poisoned):
        rows = torch.ones(len(state), dtype=torch.bool)
        rows[ids[present[:, m]]] = False
        state[rows] = float("nan")
    arguments = (scales or [], ids, present, weights.flatten(), *case.static(path))
    clean = ops.side_network(states, *arguments)
    for got, want in zip(ops.side_network(poisoned, *arguments), clean, strict=True):
        assert torch.equal(got, want)


def test_saved_is_the_pre_activation(ops, path):
    case = replace(SMALL, widths=(64,), levels=1)
    states, _, ids, _, weights, _ = case.make()
    _, saved, _ = case.run(ops, path)
    mu = torch.sigmoid(weights.gate[0].double() / 0.5)
    x = mu * states[0][ids, 0].double()
    z = x @ weights.down_weight[0][0].double().T + weights.down_bias[0][0].double()
    assert error(saved[0][:, 0], z) < 2 * torch.finfo(case.dtype).eps


def test_any_order_of_threads_gives_the_same_bits(ops, path, emulate):
    architecture = 80 if path == MMA else 90
    first = None
    for seed in range(3):
        emulate(seed=seed, architecture=architecture, shared=227 * 1024)
        results = _flat(replace(SMALL, items=40).run(ops, path))
        first = first or results
        assert all(torch.equal(a, b) for a, b in zip(first, results, strict=True))


@pytest.mark.parametrize("processors", [1, 2, 4, 40])
def test_any_number_of_multiprocessors(ops, path, emulate, processors):
    # One or two groups a block, clusters that run once or persist, one to many splits of the items.
    emulate(architecture=80 if path == MMA else 90, processors=processors, shared=227 * 1024)
    replace(SMALL, items=150, widths=(64, 64)).check(ops, path)


@pytest.mark.parametrize(
    "case",
    [
        replace(SMALL, items=150, presence=True, widths=(64, 64), levels=1),
        replace(SMALL, items=130, ids=torch.int32, stored=torch.int8, widths=(64,)),
        replace(SMALL, items=130, ids=None, stored=torch.int8, widths=(64,)),
    ],
    ids=_name,
)
def test_backward_in_parts(ops, path, case):
    """Parts of the items give the gradients of the whole, up to the order of fp32 sums."""
    *_, whole = case.run(ops, path)
    # Parts that end within a block of items, with it, and one that would hold more than there are.
    for items_at_once in (24, 64, 200):
        *_, parts = case.run(ops, path, backward_items=items_at_once)
        for a, b in zip(whole, parts, strict=True):
            assert error(a, b) < 1e-5


def test_views_may_begin_anywhere(ops, path):
    def off(*tensors):  # one element into their memory: no 16 bytes at a time from there
        return [torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape) for t in tensors]

    case = replace(SMALL, weights=torch.bfloat16)
    states, _, ids, _, weights, grad = case.make()
    embeddings, saved, want = case.run(ops, path)
    shifted = (off(*states), [], ids, None, off(*weights.flatten()), *case.static(path))
    *first, links = ops.side_network(*shifted)
    assert all(torch.equal(a, b) for a, b in zip(first, (embeddings, saved), strict=True))
    got = ops.side_network_backward(*off(grad, saved), links, *shifted)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_no_items(ops, path):
    case = replace(SMALL, items=0)
    embeddings, saved, grads = case.run(ops, path)
    assert embeddings.shape == (0, 2, 24) and saved.shape == (2, 0, 2, 64)
    assert not any(g.any() for g in grads)


def test_paths_agree_with_each_other(ops, emulate):
    emulate(architecture=90, shared=227 * 1024)
    both = [Case().run(ops, path) for path in (MMA, HOPPER)]
    for a, b in zip(*map(_flat, both), strict=True):
        assert error(a, b) < torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize(
    "architecture, kilobytes, levels, embedding, widest",
    [(90, 227, 8, 64, 2496), (80, 163, 8, 64, 1472), (86, 99, 6, 64, 576), (86, 99, 7, 64, 0)],
)
def test_widest_tower_is_the_shared_memory_s(
    ops, emulate, architecture, kilobytes, levels, embedding, widest
):
    emulate(architecture=architecture, shared=kilobytes * 1024)
    assert ops.side_network_widest(levels, embedding) == widest


def test_limits_of_the_device(ops, emulate):
    states, _, ids, _, weights, _ = SMALL.make()
    emulate(architecture=80)
    with pytest.raises(RuntimeError, match="the path that was asked for needs another GPU"):
        ops.side_network(states, [], ids, None, weights.flatten(), *SMALL.static(HOPPER))
    emulate(architecture=80, shared=40 * 1024)
    with pytest.raises(RuntimeError, match="side_network: more elements"):
        ops.side_network(states, [], ids, None, weights.flatten(), *SMALL.static(MMA))


@pytest.mark.parametrize("place", [0, 2047, 2048, 4099])
def test_a_wrong_id_is_found_wherever_it_stands(ops, emulate, place):
    case = replace(SMALL, items=4100, widths=(64,), levels=1, rank=8)
    states, _, ids, _, weights, _ = case.make()
    ids[place] = case.rows
    with pytest.raises(RuntimeError, match=r"ids: an id is outside of the states' rows \(got 57\)"):
        ops.side_network(states, [], ids, None, weights.flatten(), *case.static(MMA))


def test_errors_name_the_argument(ops, emulate):
    states, _, ids, _, weights, grad = SMALL.make()
    flat, static = weights.flatten(), SMALL.static(MMA)

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
        ({"flat": flat[:-1]}, ValueError, "weights: expected 16 tensors, got 15"),
        ({"flat": [*flat[:-1], flat[-1][:-1]]}, ValueError, r"weights\[15\]: expected shape"),
        ({"flat": [*flat[:10], flat[10][0], *flat[11:]]}, ValueError, r"weights\[10\]: expected shape"),
        ({"flat": [*flat[:10], flat[10][:20], *flat[11:]]}, ValueError, r"weights\[10\]: expected an emb"),
        ({"flat": [*flat[:11], flat[11][:16], *flat[12:]]}, ValueError, r"weights\[11\]: expected shape"),
        ({"flat": [*flat[:13], flat[13][:16], *flat[14:]]}, ValueError, r"weights\[13\]: expected shape"),
        ({"flat": [*flat[:3], flat[3].half(), *flat[4:]]}, TypeError, r"weights\[3\]: expected Float"),
        ({"static": changed(0, [100, 100])}, ValueError, "widths: expected multiples of 64"),
        ({"static": changed(1, [0, -1, 0, -1])}, ValueError, "sources: tower 1"),
        ({"static": changed(2, "side")}, ValueError, "cross: expected backbone or none"),
        ({"static": changed(3, "silu")}, ValueError, "activation: expected gelu or relu"),
        ({"static": changed(4, 0.0)}, ValueError, "temperature: expected a positive"),
        ({"static": changed(6, torch.float32)}, TypeError, "dtype: expected float16 or bfloat16"),
        ({"static": changed(7, 3)}, ValueError, "path: expected"),
        ({"static": changed(8, -1)}, ValueError, "backward_items: expected"),
    ]
    for arguments, kind, message in cases:
        with pytest.raises(kind, match=message):
            forward(**arguments)
    _, saved, links = forward()
    rest = (links, states, [], ids, None, flat, *static)
    with pytest.raises(ValueError, match="grad_embeddings: expected shape"):
        ops.side_network_backward(grad[:, :1], saved, *rest)
    with pytest.raises(TypeError, match="grad_embeddings: expected BFloat16"):
        ops.side_network_backward(grad.float(), saved, *rest)
    with pytest.raises(ValueError, match="saved: expected shape"):
        ops.side_network_backward(grad, saved[:, :-1], *rest)
