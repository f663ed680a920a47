"""Every op: tensors on one device or an error that names the stray; implementations run without autocast."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from crossan_fast import CrossanConfig, CrossanModel, Modality, _build, ops
from crossan_fast.modules.sequence_encoder import SequenceEncoder
from crossan_fast.ops import _cuda, _dispatch, _registration

META = torch.device("meta")
WIDTHS = (6, 9)
LEVELS, ITEMS, D = 2, 5, 4


def side_network() -> tuple[Any, ...]:
    modalities = [Modality(f"m{i}", width, LEVELS) for i, width in enumerate(WIDTHS)]
    model = CrossanModel(CrossanConfig(modalities, bottleneck=4, embedding_dim=D, attention_heads=2))
    towers = model.towers
    states = [torch.zeros(ITEMS, LEVELS, width, dtype=torch.int8) for width in WIDTHS]
    scales = [torch.ones(ITEMS, LEVELS) for _ in WIDTHS]
    present = torch.ones(ITEMS, 2, dtype=torch.bool)
    return (
        ops.side_network,
        (states, towers.weights(model.heads), towers.structure),
        {"ids": torch.arange(ITEMS), "scales": scales, "present": present},
    )


def fusion() -> tuple[Any, ...]:
    router = (torch.randn(2, 2 * D), torch.zeros(2))
    experts = (torch.randn(2, 8, D), torch.zeros(2, 8), torch.randn(2, D, 8), torch.zeros(2, D))
    weights = ops.FusionWeights(*router, *experts)
    present, counts = torch.ones(ITEMS, 2, dtype=torch.bool), torch.ones(ITEMS, dtype=torch.int64)
    return ops.fusion, (torch.randn(ITEMS, 2, D), weights), {"present": present, "counts": counts}


def sequence_encoder() -> tuple[Any, ...]:
    config = CrossanConfig([Modality("m", 6, LEVELS)], embedding_dim=D, window=3, attention_heads=2)
    weights = SequenceEncoder(config).weights()
    mask = torch.ones(2, 3, dtype=torch.bool)
    seed = torch.zeros((), dtype=torch.int64)
    return (
        ops.sequence_encoder,
        (torch.randn(2, 3, D), mask, weights, 2),
        {"dropout": 0.1, "seed": seed},
    )


def batch_rows() -> tuple[Any, ...]:
    slots, ids = torch.tensor([[0, 1, 2], [3, 1, 4]]), torch.arange(5)
    return ops.batch_rows, (torch.randn(5, D), slots, ids, torch.ones(7)), {}


def in_batch_loss() -> tuple[Any, ...]:
    unique = ops.deduplicate(torch.tensor([[0, 1, 2], [3, 1, 4]]), 7)
    users, items = torch.randn(2, 2, D), torch.randn(7, D)
    return ops.in_batch_loss, (users, items, unique.slots, unique.counts, torch.zeros(7)), {}


def in_batch_loss_by_place() -> tuple[Any, ...]:
    ids = torch.tensor([[0, 1, 2], [3, 1, 4]])
    return (
        ops.in_batch_loss_by_place,
        (torch.randn(2, 2, D), torch.randn(2, 3, D), ids, torch.zeros(2, 3)),
        {},
    )


def full_loss() -> tuple[Any, ...]:
    return ops.full_loss, (torch.randn(3, D), torch.randn(9, D), torch.tensor([1, 8, 0])), {}


def topk_scores() -> tuple[Any, ...]:
    return (
        ops.topk_scores,
        (torch.randn(3, D), torch.randn(9, D), 2, torch.zeros(3, 1, dtype=torch.int64)),
        {},
    )


def rank_of_target() -> tuple[Any, ...]:
    exclude = torch.zeros(3, 1, dtype=torch.int64)
    return ops.rank_of_target, (torch.randn(3, D), torch.randn(9, D), torch.tensor([1, 8, 2]), exclude), {}


CASES = (
    side_network,
    fusion,
    sequence_encoder,
    batch_rows,
    in_batch_loss,
    in_batch_loss_by_place,
    full_loss,
    topk_scores,
    rank_of_target,
)


def strays(argument: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Copies of an argument with one of its tensors on `meta`, by that tensor's name."""
    if isinstance(argument, Tensor):
        yield name, argument.detach().to(META)
    elif isinstance(argument, (list, tuple)):
        fields = getattr(argument, "_fields", None)
        for index, member in enumerate(argument):
            inner = f"{name}.{fields[index]}" if fields else f"{name}[{index}]"
            for stray, moved in strays(member, inner):
                members = [*argument[:index], moved, *argument[index + 1 :]]
                yield stray, type(argument)(*members) if fields else type(argument)(members)


def check_strays(call: Callable[..., Any], names: list[str], arguments: list[Any]) -> int:
    """Call with every tensor in turn on another device; gives how many there are."""
    found = 0
    for index, argument in enumerate(arguments):
        for stray, moved in strays(argument, names[index]):
            found += 1
            with pytest.raises(ValueError) as caught:
                call(*arguments[:index], moved, *arguments[index + 1 :])
            message = str(caught.value)
            # The first tensor is what the others are measured by.
            if found == 1:
                assert "expected device meta as " in message
            else:
                assert message.startswith(f"{stray}: expected device cpu as {names[0]}"), message
                assert message.endswith("on meta")
    return found


@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_a_tensor_on_another_device_is_named(case: Callable[[], Any], backend: str) -> None:
    op, positional, named = case()
    if backend == "eager" and case is not in_batch_loss_by_place:
        named = {**named, "backend": backend}
    names = list(op.__wrapped__.__code__.co_varnames[: len(positional)])

    def call(*values: Any) -> Any:
        return op(*values[: len(positional)], **dict(zip(named, values[len(positional) :], strict=True)))

    call(*positional, *named.values())  # as they are, they are good arguments
    found = check_strays(call, [*names, *named], [*positional, *named.values()])
    assert found >= 3


def test_every_op_has_a_case_here() -> None:
    # gather_convert reads page-locked memory for a GPU: it checks for itself, see its own tests.
    checked = set(ops._dispatch.OPS) - {"gather_convert"}
    assert {case.__name__ for case in CASES} | {"deduplicate"} >= checked  # deduplicate has one tensor
    assert all(hasattr(getattr(ops, name), "__wrapped__") for name in checked)


def test_cuda_fusion_gives_its_kernels_fp32_logits_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, torch.dtype] = {}

    class Kernels:
        """Enough of csrc/cuda's fusion to see what its host functions hand over."""

        def routing_forward(self, logits, present, weights, top_k):
            seen["logits"] = logits.dtype
            probability = torch.softmax(logits.float(), dim=1)
            return probability, probability, probability.mean(0), probability.mean(0), probability.sum()

        def routing_backward(self, grad_share, grad_probability, probability, share, weights, total):
            return grad_share.float()

        def experts_forward(self, joined, share, *weights):
            seen["joined"] = joined.dtype
            return joined[:, :D].clone()

        def experts_backward(self, grad_items, joined, share, w1, b1, w2, b2):
            assert grad_items.dtype == torch.bfloat16
            return (
                torch.zeros_like(joined, dtype=torch.float32),
                share,
                *(w.float() for w in (w1, b1, w2, b2)),
            )

    monkeypatch.setattr(_cuda, "library", Kernels)
    _, (embeddings, weights), named = fusion()
    flat = [t.requires_grad_() for t in weights]
    arguments = (embeddings, flat, named["present"], None, named["counts"], torch.bfloat16, "cuda")
    with torch.autocast("cpu", torch.bfloat16):
        items, *_ = torch.ops.crossan_fast.fusion.default(*arguments)
        items.sum().backward()
    assert seen == {"logits": torch.float32, "joined": torch.bfloat16}
    assert all(t.grad is not None for t in flat)


@pytest.fixture(scope="module")
def probe() -> Iterator[Any]:
    """An op whose implementation multiplies, registered as every op is."""

    def run(states: list[Tensor], weight: Tensor, ids: Tensor | None) -> Tensor:
        return F.linear(states[0], weight)

    def fake(states: list[Tensor], weight: Tensor, ids: Tensor | None) -> Tensor:
        return states[0].new_empty((states[0].shape[0], weight.shape[0]))

    op = _registration.define("probe(Tensor[] states, Tensor weight, Tensor? ids) -> Tensor", fake)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_registration, "host_function", lambda *key: run)
        yield lambda *arguments: op(*arguments, "cpp")


def test_the_registration_refuses_what_the_dispatcher_would_mix(probe: Any) -> None:
    states, weight, ids = [torch.randn(3, D), torch.randn(3, D)], torch.randn(2, D), torch.arange(3)
    torch.testing.assert_close(probe(states, weight, ids), states[0] @ weight.T)
    assert probe([s.to(META) for s in states], weight.to(META), None).device == META
    found = check_strays(probe, ["states", "weight", "ids"], [states, weight, ids])
    assert found == 4


def test_implementations_run_without_autocast(probe: Any) -> None:
    states, weight = [torch.randn(3, D)], torch.randn(2, D)
    with torch.autocast("cpu", torch.bfloat16):
        assert F.linear(states[0], weight).dtype == torch.bfloat16
        given = probe(states, weight, None)
        assert F.linear(states[0], weight).dtype == torch.bfloat16, "on again behind the op"
    assert torch.equal(given, F.linear(states[0], weight))


def test_a_model_on_meta_gives_shapes_and_gradients():
    """What is asked for before a large model is allocated; torch knows no autocast there."""
    width, levels = 6, 2
    modalities = [Modality(name, width, levels) for name in ("text", "image")]
    with META:
        model = CrossanModel(CrossanConfig(modalities, bottleneck=4, embedding_dim=8))
        items = model.encode_items({m.name: torch.empty(5, levels, width) for m in modalities})
        users = model.encode_users(torch.empty(2, 3, 8), torch.empty(2, 3, dtype=torch.bool))
        loss = ops.full_loss(users, items, torch.empty(2, 3, dtype=torch.int64))
        in_batch = ops.in_batch_loss(
            users,
            items,
            torch.empty(2, 4, dtype=torch.int64),
            torch.empty(5, dtype=torch.int64),
            torch.empty(5),
        )
    assert items.shape == (5, 8) and users.shape == (2, 3, 8)
    assert loss.device == in_batch.device == META and loss.shape == in_batch.shape == ()
    (loss + in_batch).backward()
    assert model.towers["text"].up.weight.grad.device == META


def test_every_gpu_is_asked_what_the_kernels_need(monkeypatch):
    """A choice holds for a device type: the current GPU says nothing of where a tensor lies."""
    capabilities = [(9, 0), (7, 5)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=0: capabilities[device])
    monkeypatch.setattr(_build, "problem", lambda part: None)
    request = _dispatch.Request("fusion", "cuda", torch.bfloat16)
    assert "8.0 or later, got 7.5 of cuda:1" in _cuda.refuses(request)
    capabilities.pop()
    assert _cuda.refuses(request) is None
