"""Groups, decay, warm-up and clipping, against plain arithmetic."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from crossan_fast import CrossanConfig, CrossanModel, Modality
from crossan_fast.sasrec import SasRec
from crossan_fast.training.optimizer import (
    PARTS,
    ClippedByStep,
    clip_gradients,
    decays,
    gradient_norms,
    load_optimizer_tensors,
    make_optimizer,
    optimizer_tensors,
    parameter_groups,
    part_of,
    set_learning_rate,
)
from crossan_fast.training.train_config import OptimizerConfig


@pytest.fixture
def model() -> CrossanModel:
    # Names that look like kinds of parameters, and unequal widths for the projections between towers.
    return CrossanModel(CrossanConfig([Modality("cross", 8, 2), Modality("norm", 12, 2)], embedding_dim=4))


@pytest.mark.parametrize("factors", [(2, 3, 5), (1, 1, 1)])
@pytest.mark.parametrize("weight_decay", [0.01, 0.0])
def test_every_parameter_is_in_one_group_with_its_rate_and_decay(
    model: CrossanModel, factors: tuple[int, ...], weight_decay: float
) -> None:
    parts = dict(zip(PARTS, factors, strict=True))
    groups = parameter_groups(model, OptimizerConfig(learning_rate=0.1, weight_decay=weight_decay, **parts))
    named = dict(model.named_parameters())
    assert sorted(name for group in groups for name in group["names"]) == sorted(named)
    assert len(groups) == len(set(factors)) * (2 if weight_decay else 1)
    for group in groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            assert named[name] is parameter
            assert group["base_lr"] == pytest.approx(0.1 * parts[part_of(name)])
            assert group["weight_decay"] == (weight_decay if decays(name) else 0)


@pytest.mark.parametrize(("id_weight_decay", "expected"), [(3.0, 3.0), (0.0, 0.0), (None, 0.01)])
def test_items_own_vectors_decay_apart_from_other_matrices(
    id_weight_decay: float | None, expected: float
) -> None:
    config = OptimizerConfig(weight_decay=0.01, id_weight_decay=id_weight_decay)
    shape = CrossanConfig([Modality("text", 8, 2)], embedding_dim=4)
    for made, table in (
        (CrossanModel(replace(shape, id_embedding=True)), "id_embedding.weight"),
        (SasRec(shape, 6), "items.weight"),
    ):
        found = {name: g["weight_decay"] for g in parameter_groups(made, config) for name in g["names"]}
        assert found[table] == expected
        others = {name for name in found if name != table}
        assert others and all(found[name] == (0.01 if decays(name) else 0) for name in others)
        with pytest.raises(ValueError, match=r"id_weight_decay: expected below 1 / learning rate = 4, got 5"):
            parameter_groups(made, OptimizerConfig(learning_rate=0.25, id_weight_decay=5.0))
    parameter_groups(CrossanModel(shape), OptimizerConfig(learning_rate=0.25))  # without ids it is idle


@pytest.mark.parametrize(
    ("name", "part", "decay"),
    [
        ("towers.cross.down.weight", "side_network", True),
        ("towers.norm.up.weight", "side_network", True),
        ("towers.norm.cross_down.cross", "side_network", True),
        ("towers.cross.down.bias", "side_network", False),
        ("towers.cross.gate", "side_network", False),
        ("towers.cross.cross.norm", "side_network", False),
        ("heads.cross.weight", "fusion", True),
        ("heads.cross.bias", "fusion", False),
        ("fusion.router.weight", "fusion", True),
        ("fusion.experts.w1", "fusion", True),
        ("fusion.experts.b2", "fusion", False),
        ("sequence_encoder.position.weight", "sequence_encoder", False),
        ("sequence_encoder.blocks.0.attention_norm.weight", "sequence_encoder", False),
        ("sequence_encoder.blocks.0.attention.query.weight", "sequence_encoder", True),
        ("sequence_encoder.blocks.1.widen.bias", "sequence_encoder", False),
    ],
)
def test_parts_and_decay_by_name(model: CrossanModel, name: str, part: str, decay: bool) -> None:
    assert name in dict(model.named_parameters())
    assert (part_of(name), decays(name)) == (part, decay)


def test_warm_up_is_linear_then_constant(model: CrossanModel) -> None:
    optimizer = make_optimizer(model, OptimizerConfig(learning_rate=1.0, side_network=0.5))
    shares = []
    for step in range(6):
        set_learning_rate(optimizer, step, warmup_steps=4)
        rates = {part_of(group["names"][0]): group["lr"] for group in optimizer.param_groups}
        assert rates.keys() == {"side_network", "fusion"}  # the sequence encoder shares fusion's group
        assert rates["side_network"] == pytest.approx(0.5 * rates["fusion"])
        shares.append(rates["fusion"])
    assert shares == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1])


def test_clipping_keeps_the_direction(model: CrossanModel) -> None:
    parameters = list(model.parameters())
    fresh = [torch.randn_like(p) for p in parameters]
    total = torch.cat([g.flatten() for g in fresh]).norm()
    for norm, factor in ((0.5, 0.5 / total), (1e9, 1.0), (None, 1.0)):
        for parameter, gradient in zip(parameters, fresh, strict=True):
            parameter.grad = gradient.clone()
        clip_gradients(parameters, norm)
        for parameter, gradient in zip(parameters, fresh, strict=True):
            torch.testing.assert_close(parameter.grad, gradient * factor)


@pytest.mark.parametrize("norm", [0.5, 1e9])
def test_the_fused_step_clips_alike(norm: float) -> None:
    """Two steps, of other gradients: the second goes by its own norm."""
    drawn, results = [torch.randn(4, 3), torch.randn(5), 9 * torch.randn(4, 3), torch.randn(5)], []
    for clipped in (None, ClippedByStep(norm, torch.device("cpu"))):
        parameters = [nn.Parameter(torch.ones(4, 3)), nn.Parameter(torch.ones(5))]
        # So large an eps that a step depends on its gradients' size.
        optimizer = torch.optim.AdamW(parameters, lr=0.1, eps=1.0, fused=True)
        for gradients in (drawn[:2], drawn[2:]):
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient.clone()
            if clipped is None:
                clip_gradients(parameters, norm)
            else:
                clipped.prepare(optimizer, torch.linalg.vector_norm(gradient_norms(parameters)))
            optimizer.step()
        results.append(parameters)
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-6, atol=1e-7)


def test_state_without_pickle_round_trips(model: CrossanModel) -> None:
    config = OptimizerConfig()
    optimizer = make_optimizer(model, config)
    model.set_popularity([0, 1, 2, 3])
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    saved = optimizer_tensors(optimizer)
    assert saved["heads.cross.weight:exp_avg"].abs().sum() > 0
    other = make_optimizer(model, config)
    load_optimizer_tensors(other, saved)
    for name, value in optimizer_tensors(other).items():
        assert torch.equal(value, saved[name]), name
    with pytest.raises(ValueError, match=r"optimizer state of 'heads\.other\.weight', which the model lacks"):
        load_optimizer_tensors(other, {"heads.other.weight:step": torch.ones(())})
