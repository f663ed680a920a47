"""The registered ops' glue (schemas, fakes, gradients, dispatch), over a backend made of the references."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F

from crossan_fast import ops
from crossan_fast.config import CrossanConfig, Modality
from crossan_fast.modules.fusion import make_head
from crossan_fast.modules.side_network import SideNetwork
from crossan_fast.ops import _dispatch, fusion_reference, side_network_reference
from crossan_fast.ops._dispatch import Implementation, Request
from crossan_fast.ops.fusion import _softmax, _top
from crossan_fast.ops.side_network import links_size

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
    e = side_network_reference(
        states,
        structure.unflatten(weights),
        structure,
        ids=ids,
        scales=scales or None,
        present=present,
        dtype=dtype,
    )
    count, towers, width = e.shape
    links = links_size(structure, LEVELS, RANK, width, e.device)
    return [e, e.new_zeros(towers, count, LEVELS, RANK), e.new_zeros(towers, links)]


def side_backward(grad, saved, links, states, scales, ids, present, weights, *static):
    assert saved.shape == (grad.shape[1], grad.shape[0], LEVELS, RANK) and len(links) == grad.shape[1]

    def run(flat):
        return side_forward(states, scales, ids, present, flat, *static)[0]

    return vjp(run, weights, grad)


def router(embeddings, weights, present, top_k, counts):
    e = embeddings if present is None else torch.where(present[:, :, None], embeddings, 0)
    logits = F.linear(e.flatten(1), weights.router_weight, weights.router_bias)
    exists = torch.ones_like(logits, dtype=torch.bool) if present is None else present
    probability = _softmax(logits, exists)
    weight = exists.any(1).to(logits.dtype) * (1 if counts is None else counts)
    assigned = (weight[:, None] * _top(probability, exists, top_k or 1)).sum(0)
    return assigned / assigned.sum(), (weight[:, None] * probability).sum(0) / weight.sum(), logits


def fusion_forward(embeddings, weights, present, top_k, counts, dtype):
    weights = ops.FusionWeights(*weights)
    items = fusion_reference(embeddings, weights, present=present, top_k=top_k, dtype=dtype).items
    return [items, *router(embeddings, weights, present, top_k, counts)]


def fusion_backward(grad_items, grad_probability, logits, embeddings, weights, present, top_k, counts, dtype):
    assert logits.shape == embeddings.shape[:2]

    def run(flat):
        items, _, probability, _ = fusion_forward(flat[0], flat[1:], present, top_k, counts, dtype)
        return items, probability

    return vjp(run, [embeddings, *weights], (grad_items, grad_probability))


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
    heads = torch.nn.ModuleDict(
        {spec.name: make_head(spec.width, D, False).to(dtype) for spec in config.towers}
    )
    for parameter in (*towers.parameters(), *heads.parameters()):
        torch.nn.init.normal_(parameter, std=0.3)
    states = [torch.randn(8, LEVELS, width, dtype=dtype) for width in WIDTHS]
    return towers, heads, states


def fusion_problem(dtype=torch.float64):
    def r(*shape):
        return torch.randn(*shape, dtype=dtype, requires_grad=True)

    return r(5, M, D), [r(M, M * D), r(M), r(M, 6, D), r(M, 6), r(M, D, 6), r(M, D)]


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
    towers, heads, states = side_problem()
    flat = towers.weights(heads).flatten()

    def run(*tensors):
        weights = towers.structure.unflatten(tensors)
        return ops.side_network(states, weights, towers.structure, ids=IDS, present=present)

    want = side_network_reference(states, towers.weights(heads), towers.structure, ids=IDS, present=present)
    assert torch.equal(run(*flat), want)
    assert torch.autograd.gradcheck(run, flat, fast_mode=True)
    static = (*towers.structure.static, torch.float64, "cpp")
    arguments = (states, [], IDS, present, flat, *static)
    torch.library.opcheck(torch.ops.crossan_fast.side_network.default, arguments)


def test_only_some_weights_need_gradients():
    towers, heads, states = side_problem()
    for name, parameter in (*towers.named_parameters(), *heads.named_parameters()):
        parameter.requires_grad_("m1.up" in name or name == "m1.weight")
    wanted = towers["m1"].up.weight, heads["m1"].weight
    e = ops.side_network(states, towers.weights(heads), towers.structure)
    e[:, 1].sum().backward()  # and the other tower's output goes unused
    have = [weight.grad.clone() for weight in wanted]
    assert towers["m0"].down.weight.grad is None and heads["m0"].weight.grad is None
    towers.zero_grad()
    heads.zero_grad()
    side_network_reference(states, towers.weights(heads), towers.structure)[:, 1].sum().backward()
    torch.testing.assert_close(have, [weight.grad for weight in wanted])


@pytest.mark.parametrize("top_k", [None, 1])
def test_fusion(top_k):
    embeddings, weights = fusion_problem()
    counts = torch.tensor([1, 2, 0, 3, 1])

    def run(embeddings, *weights, backend="auto"):
        return tuple(
            ops.fusion(
                embeddings,
                ops.FusionWeights(*weights),
                present=PRESENT,
                top_k=top_k,
                counts=counts,
                backend=backend,
            )
        )

    for have, want in zip(run(embeddings, *weights), run(embeddings, *weights, backend="eager"), strict=True):
        torch.testing.assert_close(have, want)
    assert torch.autograd.gradcheck(run, [embeddings, *weights], fast_mode=True)
    arguments = (embeddings, weights, PRESENT, top_k, counts, torch.float64, "cpp")
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
    with pytest.raises(RuntimeError, match="in_batch_loss: expected to be differentiated once"):
        grad.square().sum().backward()


@pytest.mark.parametrize("op", ["in_batch_loss", "full_loss", "fusion", "side_network"])
def test_a_penalty_on_the_gradients_of_a_loss_is_refused(op):
    """What comes in at a loss is a 1 that requires no gradient: the penalty had none, in silence."""
    if op == "side_network":
        towers, heads, states = side_problem()
        leaves, loss = [*towers.parameters()], towers(states, heads).sum()
    elif op == "fusion":
        e, weights = fusion_problem()
        leaves, loss = [e, *weights], ops.fusion(e, ops.FusionWeights(*weights)).items.sum()
    else:
        users, items, unique, log_popularity = loss_problem()
        leaves = [users, items]
        if op == "full_loss":
            loss = ops.full_loss(users, items, torch.tensor([[1, 0, 3], [2, 4, 4], [0, 1, 12]]))
        else:
            loss = ops.in_batch_loss(users, items, unique.slots, unique.counts, log_popularity)
    grads = torch.autograd.grad(loss, leaves, create_graph=True, allow_unused=True)
    plain = torch.autograd.grad(loss, leaves, allow_unused=True, retain_graph=True)
    assert all(torch.equal(g, p) for g, p in zip(grads, plain, strict=True) if g is not None)
    penalty = sum(g.square().sum() for g in grads if g is not None)
    assert penalty.requires_grad
    with pytest.raises(RuntimeError, match=f"{op}: expected to be differentiated once; .*backend='eager'"):
        (loss + penalty).backward()


def test_forward_mode_is_refused_and_not_zero():
    users, items, *_ = loss_problem()
    users, items = users.detach(), items.detach()
    targets = torch.tensor([[1, 0, 3], [2, 4, 4], [0, 1, 12]])

    def loss(users, backend="auto"):
        return ops.full_loss(users, items, targets, backend=backend)

    with pytest.raises(
        NotImplementedError, match=r"full_loss: expected no forward-mode derivative .*'eager'"
    ):
        torch.func.jvp(loss, (users,), (torch.ones_like(users),))
    _, tangent = torch.func.jvp(lambda u: loss(u, "eager"), (users,), (torch.ones_like(users),))
    step = 1e-6
    truth = (loss(users + step, "eager") - loss(users - step, "eager")) / (2 * step)
    torch.testing.assert_close(tangent, truth, rtol=1e-6, atol=1e-8)


def test_without_gradients_nothing_is_kept():
    towers, heads, states = side_problem()
    with torch.no_grad():
        assert towers(states, heads).grad_fn is None
    towers.requires_grad_(False)
    heads.requires_grad_(False)
    assert towers(states, heads).grad_fn is None


def test_ops_without_gradient():
    users, items = torch.randn(4, D), torch.randn(30, D)
    exclude = torch.randint(0, 30, (4, 3))
    library = torch.ops.crossan_fast
    torch.library.opcheck(library.topk_scores.default, (users, items, 7, exclude, "cpp"))
    targets = torch.tensor([1, 2, 3, 29])
    torch.library.opcheck(library.rank_of_target.default, (users, items, targets, exclude, "cpp"))
    torch.library.opcheck(library.deduplicate.default, (torch.randint(0, 9, (4, 3)), 13, "cpp"))


def test_compile_without_graph_breaks_and_with_dynamic_sizes():
    towers, heads, states = side_problem()
    _, weights = fusion_problem()
    both = torch.nn.ModuleList([towers, heads])

    def step(ids):
        embeddings = ops.side_network(states, towers.weights(heads), towers.structure, ids=ids)
        fused = ops.fusion(embeddings, ops.FusionWeights(*weights))
        return fused.items.square().sum() + fused.balance

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for ids in (IDS, IDS[:3], IDS.repeat(2)):
        both.zero_grad()
        compiled(ids).backward()
        have = [p.grad.clone() for p in both.parameters()]
        both.zero_grad()
        step(ids).backward()
        for a, b in zip(have, (p.grad for p in both.parameters()), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", ["auto", "eager", "cpp", "triton"])
def test_what_is_exported_is_plain_torch(backend):
    towers, heads, states = side_problem(torch.float32)

    class Encode(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.towers, self.heads = towers, heads

        def forward(self, ids):
            return self.towers(states, self.heads, ids=ids, backend=backend)

    exported = torch.export.export(Encode(), (IDS,), dynamic_shapes=({0: torch.export.Dim("n", min=2)},))
    names = [str(node.target) for node in exported.graph.nodes]
    assert len(names) > 20 and not any("crossan_fast" in name for name in names)
    torch.testing.assert_close(
        exported.module()(IDS[:3]), towers(states, heads, ids=IDS[:3], backend="eager")
    )


def test_autocast_decides_the_type():
    towers, heads, states = side_problem(torch.float32)
    users, items, unique, log_popularity = loss_problem()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert towers(states, heads).dtype == torch.bfloat16
        assert towers(states, heads, backend="eager").dtype == torch.bfloat16
        loss = ops.in_batch_loss(
            users.float(), items.float(), *unique[1:], log_popularity.float(), backend="eager"
        )
    assert loss.dtype == torch.float32  # sums are wide whatever the inputs


def test_states_that_need_gradients_run_eager_and_say_so():
    towers, heads, states = side_problem()
    states[0].requires_grad_()
    with pytest.warns(ops.FallbackWarning, match="cpp: gives states no gradient"):
        e = towers(states, heads)
    e[:, 0].sum().backward()
    assert states[0].grad is not None
    with pytest.raises(ops.BackendUnavailable, match=r"'cpp' was asked for .*gives states no gradient"):
        towers(states, heads, backend="cpp")


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
