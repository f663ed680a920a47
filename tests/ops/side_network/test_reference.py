"""The plain side network against a second implementation that walks one item at a time in numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from crossan_fast.config import CrossanConfig, Modality
from crossan_fast.modules.fusion import make_head
from crossan_fast.modules.side_network import SideNetwork
from crossan_fast.ops import side_network, side_network_hidden, side_network_reference

LEVELS, RANK, ROWS, D = 3, 4, 6, 4


def network(widths, **overrides):
    modalities = [Modality(f"m{i}", width, LEVELS) for i, width in enumerate(widths)]
    make = CrossanConfig.iisan if overrides.pop("iisan", False) else CrossanConfig
    config = make(modalities, bottleneck=RANK, embedding_dim=D, **overrides)
    towers = SideNetwork(config).double()
    heads = torch.nn.ModuleDict(
        {spec.name: make_head(spec.width, D, config.head == "two").double() for spec in config.towers}
    )
    for parameter in (*towers.parameters(), *heads.parameters()):
        torch.nn.init.normal_(parameter, std=0.3)  # biases and gates too: a zero would hide a missing term
    return config, towers, heads


def random_states(widths, rows=ROWS):
    return [torch.randn(rows, LEVELS, width, dtype=torch.float64) for width in widths]


def by_hand(config, towers, heads, states, present):
    """h and e: one item, tower and level at a time, straight from the sentences of docs/mathematics.md."""
    out = [np.zeros((ROWS, spec.width)) for spec in config.towers]
    embeddings = np.zeros((ROWS, len(config.towers), D))
    names = config.modality_names
    p = {k: v.detach().numpy() for k, v in towers.state_dict().items()}
    q = {k: v.detach().numpy() for k, v in heads.state_dict().items()}

    def act(v):
        if config.activation == "relu":
            return np.maximum(v, 0)
        return np.array([0.5 * u * (1 + math.erf(u / math.sqrt(2))) for u in v])

    for i in range(ROWS):
        h = {spec.name: np.zeros(spec.width) for spec in config.towers}
        for level in range(LEVELS):
            c = [s[i, level].numpy() for s in states]
            new = {}
            for spec in config.towers:
                key = spec.name
                if not any(present[i, m] for m in spec.sources):
                    new[key] = np.zeros(spec.width)
                    continue
                mu = 1 / (1 + math.exp(-p[f"{key}.gate"][level] / config.gate_temperature))
                if len(spec.sources) == 1:
                    (m,) = spec.sources
                    x = mu * c[m] + (1 - mu) * h[key]
                    for n, other in enumerate(names):
                        if config.cross == "none" or n == m or not present[i, n]:
                            continue
                        s = c[n] if config.cross == "backbone" else h[other]
                        if len(s) != spec.width or config.cross_projection == "low_rank":
                            s = p[f"{key}.cross_up.{other}"] @ (p[f"{key}.cross_down.{other}"] @ s)
                        x = x + math.tanh(p[f"{key}.cross.{other}"][level]) * s
                else:
                    x = h[key].copy()
                    for m, weight in zip(spec.sources, (mu, 1 - mu), strict=True):
                        if not present[i, m]:
                            continue
                        s = c[m]
                        if len(s) != spec.width:
                            s = p[f"{key}.narrow.weight"][level] @ s + p[f"{key}.narrow.bias"][level]
                        x = x + weight * s
                a = act(p[f"{key}.down.weight"][level] @ x + p[f"{key}.down.bias"][level])
                new[key] = x + p[f"{key}.up.weight"][level] @ a + p[f"{key}.up.bias"][level]
            h = new
        for t, spec in enumerate(config.towers):
            out[t][i] = last = h[spec.name]
            if config.head == "two":
                last = q[f"{spec.name}.inner.weight"] @ last + q[f"{spec.name}.inner.bias"]
            if any(present[i, m] for m in spec.sources):
                embeddings[i, t] = q[f"{spec.name}.weight"] @ last + q[f"{spec.name}.bias"]
    return out, embeddings


CASES = {
    "backbone": ((5, 5, 5), {}),
    "side": ((5, 5), {"cross": "side"}),
    "none": ((5, 7), {"cross": "none"}),
    "unequal widths": ((5, 8, 5), {}),
    "unequal widths, side": ((5, 8), {"cross": "side", "activation": "relu"}),
    "low rank": ((5, 8, 5), {"cross_projection": "low_rank"}),
    "low rank, side": ((5, 5, 8), {"cross": "side", "cross_projection": "low_rank"}),
    "iisan": ((5, 5, 5), {"iisan": True}),
    "iisan, unequal widths": ((5, 8, 6), {"iisan": True}),
}


@pytest.mark.parametrize("missing", [False, True], ids=["all present", "some missing"])
@pytest.mark.parametrize("case", CASES)
def test_reference_equals_the_definition_item_by_item(case, missing):
    widths, overrides = CASES[case]
    config, towers, heads = network(widths, **overrides)
    states = random_states(widths)
    present = torch.rand(ROWS, len(widths)) > 0.4 if missing else torch.ones(ROWS, len(widths)).bool()
    present[0] = False  # not even one
    arguments = (states, towers.weights(heads), towers.structure)
    given = present if missing else None
    everyone = present if missing else torch.ones_like(present)
    hidden, embeddings = by_hand(config, towers, heads, states, everyone)
    out = side_network_reference(*arguments, present=given).detach()
    np.testing.assert_allclose(out.numpy(), embeddings, rtol=1e-10, atol=1e-10)
    for found in (
        side_network_hidden(*arguments, present=given),
        towers.hidden(states, heads, present=given),
    ):
        for have, want in zip(found, hidden, strict=True):
            np.testing.assert_allclose(have.detach().numpy(), want, rtol=1e-10, atol=1e-10)


def test_a_tower_without_a_present_source_gives_zeros():
    """Not what the head makes of h = 0, its bias."""
    _, towers, heads = network((5, 8, 6), iisan=True)
    present = torch.tensor([[False, False, True], [True, False, False], [False] * 3] * 2)
    exists = torch.stack([present[:, list(s)].any(dim=1) for s in towers.structure.sources], dim=1)
    e = towers(random_states((5, 8, 6)), heads, present=present, backend="eager")
    assert not e[~exists].any() and e[exists].all()


def test_ids_read_rows():
    _, towers, heads = network((5, 8))
    states, ids = random_states((5, 8)), torch.tensor([4, 0, 0, 5], dtype=torch.int32)
    direct = side_network_reference([s[ids] for s in states], towers.weights(heads), towers.structure)
    assert torch.equal(
        direct, side_network_reference(states, towers.weights(heads), towers.structure, ids=ids)
    )
    hidden = towers.hidden([s[ids] for s in states], heads)
    by_id = towers.hidden(states, heads, ids=ids)
    assert all(torch.equal(a, b) for a, b in zip(hidden, by_id, strict=True))


def test_scales_multiply_stored_values():
    _, towers, heads = network((4, 4))
    stored = [torch.randint(-127, 128, (ROWS, LEVELS, 4), dtype=torch.int8) for _ in range(2)]
    scales = [torch.rand(ROWS, LEVELS) for _ in range(2)]
    dense = [s.double() * c[..., None].double() for s, c in zip(stored, scales, strict=True)]
    want = side_network_reference(dense, towers.weights(heads), towers.structure)
    have = side_network_reference(stored, towers.weights(heads), towers.structure, scales=scales)
    assert torch.equal(want, have)
    hidden = zip(towers.hidden(dense, heads), towers.hidden(stored, heads, scales=scales), strict=True)
    assert all(torch.equal(a, b) for a, b in hidden)


@pytest.mark.parametrize("case", CASES)
def test_reference_gradients(case):
    widths, overrides = CASES[case]
    _, towers, heads = network(widths, **overrides)
    states = random_states(widths)
    present = torch.rand(ROWS, len(widths)) > 0.3
    flat = [t.detach().requires_grad_() for t in towers.weights(heads).flatten()]

    def run(*tensors):
        weights = towers.structure.unflatten(tensors)
        return side_network_reference(states, weights, towers.structure, present=present)

    # ReLU has a kink, but random pre-activations stay away from it by far more than gradcheck's step.
    assert torch.autograd.gradcheck(run, flat, fast_mode=True)


def test_unflatten_counts():
    _, towers, heads = network((5, 8))
    with pytest.raises(ValueError, match=r"weights: expected \d+ tensors, got 3"):
        towers.structure.unflatten(towers.weights(heads).flatten()[:3])


def bad(**changes):
    _, towers, heads = network((5, 8))
    arguments = {"states": random_states((5, 8)), **changes}
    states = arguments.pop("states")
    weights = towers.weights(heads)
    weights = weights._replace(**{n: arguments.pop(n) for n in weights._fields if n in arguments})
    return side_network(states, weights, towers.structure, **arguments)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"states": random_states((5,))}, ValueError, r"states: expected 2 tensors, got 1"),
        ({"states": random_states((5, 7))}, ValueError, r"states\[1\]: expected shape \[\?, 3, 8\].*7\]"),
        ({"ids": torch.tensor([1.0])}, TypeError, r"ids: expected dtype int64, int32, got float32"),
        ({"ids": torch.tensor([[1]])}, ValueError, r"ids: expected shape \[\?\], got int64 \[1, 1\]"),
        ({"present": torch.ones(ROWS, 2)}, TypeError, r"present: expected dtype bool"),
        ({"present": torch.ones(2, 2).bool()}, ValueError, r"present: expected a row for each of 6 items"),
        ({"scales": [torch.ones(ROWS, LEVELS)]}, ValueError, r"scales: expected 2 tensors, got 1"),
        ({"head_weight": [torch.ones(D, 5)]}, ValueError, r"head_weight: expected 2 tensors, got 1"),
        ({"head_bias": []}, ValueError, r"head_bias: expected 2 tensors, got 0"),
        (
            {"head_weight": [torch.ones(D, 5), torch.ones(D, 7)]},
            ValueError,
            r"head_weight\[1\]: expected shape \[4, 8\], got float32 \[4, 7\]",
        ),
        (
            {"head_weight": [torch.ones(3, 5), torch.ones(3, 8)]},
            ValueError,
            r"head_weight\[0\]: expected shape \[4, 5\], got float32 \[3, 5\]",
        ),
        (
            {"head_bias": [torch.ones(D), torch.ones(3)]},
            ValueError,
            r"head_bias\[1\]: expected shape \[4\], got float32 \[3\]",
        ),
        ({"backend": "fast"}, ValueError, r"backend: expected one of .*'fast'"),
    ],
)
def test_bad_arguments_are_named(changes, error, message):
    with pytest.raises(error, match=message):
        bad(**changes)


def test_quantised_states_need_scales():
    states = [s.to(torch.int8) for s in random_states((5, 8))]
    with pytest.raises(ValueError, match=r"scales: int8 .* in states\[0\] needs a scale"):
        bad(states=states)
