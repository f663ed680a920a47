"""Each op's contract is written once: schemas agree on every floor, and what is flattened comes back."""

from __future__ import annotations

import calls
import pytest
import torch
from compiled_ops import library, needs_cpp

from crossan_fast import _build, ops
from crossan_fast.config import CrossanConfig, Modality
from crossan_fast.modules.sequence_encoder import SequenceEncoder
from crossan_fast.ops._dispatch import OPS

BUILT = [op for op in OPS if _build.has_source("cpu", op)]


def schema(overload) -> list[str]:
    return [f"{argument.type} {argument.name}" for argument in overload._schema.arguments]


def parts(namespace, op: str):
    """The op and, where it has one, its backward."""
    for name in (op, f"{op}_backward"):
        if hasattr(namespace, name):
            yield name, getattr(namespace, name).default


@pytest.mark.parametrize("op", OPS)
def test_an_op_is_registered_under_its_name_with_the_backend_last(op):
    found = dict(parts(torch.ops.crossan_fast, op))
    assert op in found
    for overload in found.values():
        assert schema(overload)[-1] == "str backend"
    assert {"draw", "follow"} <= vars(calls.of(op)).keys()


@needs_cpp
@pytest.mark.parametrize("op", BUILT)
def test_the_compiled_op_takes_the_registered_one_s_arguments(op):
    registered, compiled = dict(parts(torch.ops.crossan_fast, op)), dict(parts(library(), op))
    assert registered.keys() == compiled.keys()
    for name, overload in registered.items():
        assert schema(overload)[:-1] == schema(compiled[name])
        assert [str(r.type) for r in overload._schema.returns] == [
            str(r.type) for r in compiled[name]._schema.returns
        ]


STRUCTURES = [
    ops.SideNetworkStructure((6, 9), ((0,), (1,))),
    ops.SideNetworkStructure((6, 9, 6), ((0,), (1,), (2,), (0, 1), (1, 2)), "none", "relu", 0.3),
    ops.SideNetworkStructure((6, 6), ((0,), (1,)), "side"),
    ops.SideNetworkStructure((6, 6), ((0,), (1,)), cross_projection="low_rank"),
]


@pytest.mark.parametrize("structure", STRUCTURES, ids=["backbone", "pairs", "side", "low rank"])
def test_a_structure_comes_back_from_its_static_fields(structure):
    assert ops.SideNetworkStructure.from_static(*structure.static) == structure


def numbered(count: int) -> list[torch.Tensor]:
    return [torch.full((2,), float(i)) for i in range(count)]


def test_weights_come_back_from_their_flat_lists():
    structure = STRUCTURES[1]
    flat = numbered(7 * 5 + 2 * 2)
    unflattened = structure.unflatten(flat)
    assert unflattened.flatten() == flat
    assert [len(group) for group in unflattened] == [5] * 7 + [0] * 3 + [2] * 2
    with pytest.raises(ValueError, match=r"weights: expected 39 tensors, got 38"):
        structure.unflatten(flat[:-1])
    encoder = SequenceEncoder(CrossanConfig([Modality("m", 6, 2)], embedding_dim=4, blocks=2)).weights()
    again = ops.SequenceEncoderWeights.unflatten(encoder.flatten())
    assert len(again.blocks) == 2
    assert all(a is b for a, b in zip(again.flatten(), encoder.flatten(), strict=True))
