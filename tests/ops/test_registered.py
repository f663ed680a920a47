"""The registered ops' glue (schemas, fakes, gradients, dispatch), over a backend made of the references."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F

from crossan_fast import ops
from crossan_fast.config import CrossanConfig, Modality
from crossan_fast.modules.side_network import SideNetwork
from crossan_fast.ops import _dispatch, fusion_reference, side_network_reference
from crossan_fast.ops._dispatch import Implementation, Request
from crossan_fast.ops.fusion import _softmax, _top

LEVELS, RANK, M, D = 3, 4, 2, 4
WIDTHS = (6, 9)
_pool = ThreadPoolExecutor(1)


def vjp(function, inputs, grads):
    """Gradients by autograd, in a thread of its own: inside an op autograd is switched off."""

    def work():
        leaves = [t.detach().requires_grad_() for t in inputs]
        out = function(leaves)
        found = torch.autograd.grad(out, leaves, grads, allow_unused=True)
        return [torch.zeros_like(t) if g is None else g.clone() for t, g in zip(leaves, found, strict=True)]

    return _pool.submit(work).result()


def side_forward(states, scales, ids, present, weights, *static):
    *fields, dtype = static
    structure = ops.SideNetworkStructure.from_static(*fields)
    out = side_network_reference(
        states,
        structure.unflatten(weights),
        structure,
        ids=ids,
        scales=scales or None,
        present=present,
        dtype=dtype,
    )
    return [*(h.clone() for h in out), *(h.new_zeros(len(h), LEVELS, RANK) for h in out)]


def side_backward(grads, saved, states, scales, ids, present, weights, *static):
    assert all(z.shape[1:] == (LEVELS, RANK) for z in saved)

    def run(flat):
        return side_forward(states, scales, ids, present, flat, *static)[: len(grads)]

    return vjp(run, weights, grads)


def router(hidden, weights, present, top_k, counts):
    e = [F.linear(h, w, b) for h, w, b in zip(hidden, weights.head_weight, weights.head_bias, strict=True)]
    e = e if present is None else [torch.where(present[:, m, None], e[m], 0) for m in range(len(e))]
    logits = F.linear(torch.cat(e, 1), weights.router_weight, weights.router_bias)
    exists = torch.ones_like(logits, dtype=torch.bool) if present is None else present
    probability = _softmax(logits, exists)
    weight = exists.any(1).to(logits.dtype) * (1 if counts is None else counts)
    assigned = (weight[:, None] * _top(probability, exists, top_k or 1)).sum(0)
    return (
        assigned / assigned.sum(),
        (weight[:, None] * probability).sum(0) / weight.sum(),
        torch.cat(e, 1),
        logits,
    )


def fusion_forward(hidden, weights, present, top_k, counts, dtype):
    weights = ops.FusionWeights.unflatten(weights)
    items = fusion_reference(hidden, weights, present=present, top_k=top_k, dtype=dtype).items
    return [items, *router(hidden, weights, present, top_k, counts)]


def fusion_backward(grad_items, grad_probability, saved, hidden, weights, present, top_k, counts, dtype):
    count = len(hidden)

    def run(flat):
        items, _, probability, *_ = fusion_forward(flat[:count], flat[count:], present, top_k, counts, dtype)
        return items, probability

    return vjp(run, [*hidden, *weights], (grad_items, grad_probability))


def loss_implementation(reference):
    def forward(users, items, *rest):
        return reference(users, items, *rest), users.new_zeros(users.shape[:-1])

    def backward(grad, lse, users, items, *rest):
        return tuple(vjp(lambda leaves: reference(*leaves, *rest), (users, items), grad))

    return Implementation(forward, backward)


def refuses(request: Request) -> str | None:
    return "gives states no gradient" if "states_grad" in request.features else None


@pytest.fixture(autouse=True)
def mirror(monkeypatch):
    """Put the references behind the name of a compiled backend."""
    table = {
        ("side_network", "cpp"): Implementation(side_forward, side_backward, refuses),
        ("fusion", "cpp"): Implementation(fusion_forward, fusion_backward),
        ("in_batch_loss", "cpp"): loss_implementation(ops.in_batch_loss_reference),
        ("full_loss", "cpp"): loss_implementation(ops.full_loss_reference),
        ("topk_scores", "cpp"): Implementation(
            lambda users, items, k, exclude: tuple(ops.topk_scores_reference(users, items, k, exclude))
        ),
        ("rank_of_target", "cpp"): Implementation(ops.rank_of_target_reference),
        ("deduplicate", "cpp"): Implementation(
            lambda ids, capacity: tuple(t.clone() for t in ops.deduplicate_reference(ids, capacity))
        ),
    }
    monkeypatch.delenv("CROSSAN_FAST_BACKEND", raising=False)
    monkeypatch.setattr(_dispatch, "_find", lambda *key: table.get(key, _dispatch.NO_KERNEL))
    _dispatch._choose.cache_clear()
    torch.compiler.reset()
    yield
    _dispatch._choose.cache_clear()


def side_problem(dtype=torch.float64):
    config = CrossanConfig(
        [Modality(f"m{i}", width, LEVELS) for i, width in enumerate(WIDTHS)],
        bottleneck=RANK,
        embedding_dim=D,
    )
    towers = SideNetwork(config).to(dtype)
    for parameter in towers.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    states = [torch.randn(8, LEVELS, width, dtype=dtype) for width in WIDTHS]
    return towers, states


def fusion_problem(dtype=torch.float64):
    def r(*shape):
        return torch.randn(*shape, dtype=dtype, requires_grad=True)

    hidden = [r(5, width) for width in WIDTHS]
    weights = [*(r(D, w) for w in WIDTHS), *(r(D) for _ in WIDTHS), r(M, M * D), r(M)]
    weights += [r(M, 6, D), r(M, 6), r(M, D, 6), r(M, D)]
    return hidden, weights


def loss_problem():
    item_ids = torch.tensor([[0, 0, 3, 2], [1, 4, 4, 5], [0, 5, 1, 1]])
    unique = ops.deduplicate(item_ids, 13)
    users = torch.randn(3, 3, D, dtype=torch.float64, requires_grad=True)
    items = torch.randn(13, D, dtype=torch.float64, requires_grad=True)
    return users, items, unique, torch.rand(13, dtype=torch.float64).log()


PRESENT = torch.tensor([[True, True], [True, False], [False, True], [True, True], [False, False]])
IDS = torch.tensor([1, 5, 5, 0, 7])


@pytest.mark.parametrize("present", [None, PRESENT], ids=["all present", "some missing"])
def test_side_network(present):
    towers, states = side_problem()
    flat = towers.weights().flatten()

    def run(*tensors):
        weights = towers.structure.unflatten(tensors)
        return tuple(ops.side_network(states, weights, towers.structure, ids=IDS, present=present))

    want = side_network_reference(states, towers.weights(), towers.structure, ids=IDS, present=present)
    assert all(torch.equal(a, b) for a, b in zip(run(*flat), want, strict=True))
    assert torch.autograd.gradcheck(run, flat, fast_mode=True)
    static = (*towers.structure.static, torch.float64, "cpp")
    arguments = (states, [], IDS, present, flat, *static)
    torch.library.opcheck(torch.ops.crossan_fast.side_network.default, arguments)


def test_only_some_weights_need_gradients():
    towers, states = side_problem()
    for name, parameter in towers.named_parameters():
        parameter.requires_grad_("m1.up" in name)
    out = ops.side_network(states, towers.weights(), towers.structure)
    out[1].sum().backward()  # and the other tower's output goes unused
    have = towers["m1"].up.weight.grad.clone()
    assert towers["m0"].down.weight.grad is None
    towers.zero_grad()
    side_network_reference(states, towers.weights(), towers.structure)[1].sum().backward()
    torch.testing.assert_close(have, towers["m1"].up.weight.grad)


@pytest.mark.parametrize("top_k", [None, 1])
def test_fusion(top_k):
    hidden, weights = fusion_problem()
    counts = torch.tensor([1, 2, 0, 3, 1])

    def run(*tensors, backend="auto"):
        return tuple(
            ops.fusion(
                tensors[:M],
                ops.FusionWeights.unflatten(tensors[M:]),
                present=PRESENT,
                top_k=top_k,
                counts=counts,
                backend=backend,
            )
        )

    for have, want in zip(run(*hidden, *weights), run(*hidden, *weights, backend="eager"), strict=True):
        torch.testing.assert_close(have, want)
    assert torch.autograd.gradcheck(run, [*hidden, *weights], fast_mode=True)
    arguments = (hidden, weights, PRESENT, top_k, counts, torch.float64, "cpp")
    torch.library.opcheck(torch.ops.crossan_fast.fusion.default, arguments)


def test_losses():
    users, items, unique, log_popularity = loss_problem()
    rest = (unique.slots, unique.counts, log_popularity)
    assert torch.autograd.gradcheck(lambda u, i: ops.in_batch_loss(u, i, *rest), [users, items])
    torch.library.opcheck(torch.ops.crossan_fast.in_batch_loss.default, (users, items, *rest, "cpp"))
    targets = torch.tensor([[1, 0, 3], [2, 4, 4], [0, 1, 12]])
    assert torch.autograd.gradcheck(lambda u, i: ops.full_loss(u, i, targets), [users, items])
    arguments = (users.flatten(0, 1), items, targets.flatten(), "cpp")
    torch.library.opcheck(torch.ops.crossan_fast.full_loss.default, arguments)


def test_a_second_derivative_is_refused_and_not_wrong():
    users, items, unique, log_popularity = loss_problem()
    loss = ops.in_batch_loss(users, items, unique.slots, unique.counts, log_popularity)
    (grad,) = torch.autograd.grad(loss.square(), users, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.square().sum().backward()


def test_without_gradients_nothing_is_kept():
    towers, states = side_problem()
    with torch.no_grad():
        assert all(h.grad_fn is None for h in ops.side_network(states, towers.weights(), towers.structure))
    towers.requires_grad_(False)
    assert all(h.grad_fn is None for h in ops.side_network(states, towers.weights(), towers.structure))


def test_ops_without_gradient():
    users, items = torch.randn(4, D), torch.randn(30, D)
    exclude = torch.randint(0, 30, (4, 3))
    library = torch.ops.crossan_fast
    torch.library.opcheck(library.topk_scores.default, (users, items, 7, exclude, "cpp"))
    targets = torch.tensor([1, 2, 3, 29])
    torch.library.opcheck(library.rank_of_target.default, (users, items, targets, exclude, "cpp"))
    torch.library.opcheck(library.deduplicate.default, (torch.randint(0, 9, (4, 3)), 13, "cpp"))


def test_compile_without_graph_breaks_and_with_dynamic_sizes():
    towers, states = side_problem()
    _, weights = fusion_problem()

    def step(ids):
        hidden = ops.side_network(states, towers.weights(), towers.structure, ids=ids)
        fused = ops.fusion(hidden, ops.FusionWeights.unflatten(weights))
        return fused.items.square().sum() + fused.balance

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for ids in (IDS, IDS[:3], IDS.repeat(2)):
        towers.zero_grad()
        compiled(ids).backward()
        have = [p.grad.clone() for p in towers.parameters()]
        towers.zero_grad()
        step(ids).backward()
        for a, b in zip(have, (p.grad for p in towers.parameters()), strict=True):
            torch.testing.assert_close(a, b)


def test_export_keeps_the_ops():
    towers, states = side_problem(torch.float32)

    class Encode(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.towers = towers

        def forward(self, ids):
            return self.towers(states, ids=ids)[0]

    exported = torch.export.export(Encode(), (IDS,), dynamic_shapes=({0: torch.export.Dim("n", min=2)},))
    names = [str(node.target) for node in exported.graph.nodes]
    assert "crossan_fast.side_network.default" in names
    torch.testing.assert_close(exported.module()(IDS[:3]), Encode()(IDS[:3]))


def test_autocast_decides_the_type():
    towers, states = side_problem(torch.float32)
    users, items, unique, log_popularity = loss_problem()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert towers(states)[0].dtype == torch.bfloat16
        assert towers(states, backend="eager")[0].dtype == torch.bfloat16
        loss = ops.in_batch_loss(
            users.float(), items.float(), *unique[1:], log_popularity.float(), backend="eager"
        )
    assert loss.dtype == torch.float32  # sums are wide whatever the inputs


def test_states_that_need_gradients_run_eager_and_say_so():
    towers, states = side_problem()
    states[0].requires_grad_()
    with pytest.warns(ops.FallbackWarning, match="cpp: gives states no gradient"):
        out = towers(states)
    out[0].sum().backward()
    assert states[0].grad is not None
    with pytest.raises(ops.BackendUnavailable, match=r"'cpp' was asked for .*gives states no gradient"):
        towers(states, backend="cpp")


def test_choice_by_environment_and_by_name(monkeypatch):
    choice = _dispatch.choose("fusion", "cpu", torch.float32)
    assert (choice.backend, choice.rejected) == ("cpp", ()) and "measured" in choice.reason
    monkeypatch.setenv("CROSSAN_FAST_BACKEND", "eager")
    assert _dispatch.choose("fusion", "cpu", torch.float32).backend == "eager"
    assert _dispatch.choose("fusion", "cpu", torch.float32, (), "cpp").backend == "cpp"
    monkeypatch.setenv("CROSSAN_FAST_BACKEND", "tritn")
    with pytest.raises(ValueError, match=r"CROSSAN_FAST_BACKEND: .*'tritn'; did you mean 'triton'"):
        _dispatch.choose("fusion", "cpu", torch.float32)
    monkeypatch.delenv("CROSSAN_FAST_BACKEND")
    with pytest.raises(ops.BackendUnavailable, match=r"'cuda' was asked for on cpu .*no kernel for this op"):
        _dispatch.choose("fusion", "cpu", torch.float32, (), "cuda")
