"""PEFT's adapters on the model: what is computed is W + BA, or a refusal; never the frozen weight alone."""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from crossan_fast import CrossanConfig, CrossanModel, Modality
from crossan_fast.modules.linear import bias_of, weight_of

peft = pytest.importorskip("peft", reason="peft is not installed")

MODALITIES = [Modality("text", 12, 2), Modality("image", 20, 2)]
IDS = torch.tensor([[0, 0, 3, 2, 5], [1, 4, 4, 5, 9], [0, 5, 1, 1, 2], [7, 8, 9, 3, 2]])
CONFIGS: dict[str, Callable[..., CrossanConfig]] = {"crossan": CrossanConfig, "iisan": CrossanConfig.iisan}


def make_model(architecture: str = "crossan", backend: str = "eager") -> CrossanModel:
    torch.manual_seed(0)
    config = CONFIGS[architecture](MODALITIES, embedding_dim=16, bottleneck=4, window=4, dropout=0.0)
    model = CrossanModel(config, backend=backend)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gate" in name or "experts" in name or "router" in name:
                parameter.normal_(std=0.2)
    model.set_popularity(torch.arange(10))
    return model


def states() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {m.name: torch.randn(10, 2, m.width, generator=generator)[IDS] for m in MODALITIES}


def adapt(model: CrossanModel, **settings: Any) -> Any:
    """The model under LoRA, with factors that matter: PEFT starts B at 0."""
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(**{"r": 3, "lora_alpha": 5, "target_modules": "all-linear", **settings})
    )
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    return adapted


def by_hand(architecture: str, adapted: Any) -> CrossanModel:
    """A plain model with W + (alpha / r) B A written into it, told from the adapter's state dict."""
    state = {name.removeprefix("base_model.model."): value for name, value in adapted.state_dict().items()}
    plain = {
        name.replace(".base_layer.", "."): value for name, value in state.items() if ".lora_" not in name
    }
    for name, a in state.items():
        if name.endswith(".lora_A.default.weight"):
            stem = name.removesuffix(".lora_A.default.weight")
            plain[f"{stem}.weight"] = (
                plain[f"{stem}.weight"] + 5 / 3 * state[f"{stem}.lora_B.default.weight"] @ a
            )
    model = make_model(architecture)
    model.load_state_dict(plain)
    return model


_BLOCK = r"sequence_encoder\.blocks\.\d\.(attention\.\w+|widen|narrow)"
LINEARS = {
    "crossan": rf"heads\.(text|image)|fusion\.router|{_BLOCK}",
    "iisan": rf"heads\.[\w+]+\.inner|fusion|{_BLOCK}",
}


@pytest.mark.parametrize("backend", ["eager", "auto"])
@pytest.mark.parametrize("architecture", CONFIGS)
def test_all_linear_computes_with_every_factor(architecture: str, backend: str) -> None:
    model = make_model(architecture, backend)
    before = model.eval()(IDS, states()).loss.item()
    adapted = adapt(model).eval()
    wrapped = [name for name, module in model.named_modules() if hasattr(module, "lora_A")]
    assert len(wrapped) >= 14 and all(re.fullmatch(LINEARS[architecture], name) for name in wrapped)
    out = adapted(IDS, states())
    want = by_hand(architecture, adapted).eval()(IDS, states())
    for have, expected in zip(out, want, strict=True):
        torch.testing.assert_close(have, expected, rtol=1e-4, atol=1e-5)
    assert abs(out.loss.item() - before) > 1e-2, "the factors matter"
    with adapted.disable_adapter():
        assert adapted(IDS, states()).loss.item() == pytest.approx(before, rel=1e-5)
    out.loss.backward()
    for name, parameter in adapted.named_parameters():
        assert (parameter.grad is not None) == ("lora_" in name), name
        assert parameter.grad is None or parameter.grad.abs().sum() > 0, f"{name}: the loss must depend on it"
    merged = copy.deepcopy(adapted).merge_and_unload()
    assert type(merged) is CrossanModel
    torch.testing.assert_close(merged(IDS, states()).loss, out.loss.detach(), rtol=1e-4, atol=1e-5)


def test_the_gradient_is_that_of_the_factors() -> None:
    """Against autograd over the weights by hand: dA = s Bᵀ dW, dB = s dW Aᵀ."""
    adapted = adapt(make_model()).eval()
    adapted(IDS, states()).loss.backward()
    plain = by_hand("crossan", adapted).eval()
    plain(IDS, states()).loss.backward()
    for name, module in adapted.base_model.model.named_modules():
        if hasattr(module, "lora_A"):
            a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
            grad = plain.get_parameter(f"{name}.weight").grad
            torch.testing.assert_close(a.grad, 5 / 3 * b.mT @ grad, rtol=1e-3, atol=1e-6)
            torch.testing.assert_close(b.grad, 5 / 3 * grad @ a.mT, rtol=1e-3, atol=1e-6)


def test_it_trains_the_factors_alone_saves_and_merges(tmp_path: Path) -> None:
    adapted = adapt(
        make_model(),
        target_modules=r"heads\.\w+|.*\.(router|widen|narrow)",
        lora_bias=True,
        modules_to_save=["position", "experts"],
    )
    trainable, total = adapted.get_nb_trainable_parameters()
    assert 0 < trainable < total
    frozen = {n: p.clone() for n, p in adapted.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.Adam([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = adapted(IDS, states()).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    assert all(torch.equal(frozen[n], p) for n, p in adapted.named_parameters() if n in frozen)
    adapted.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(make_model(), tmp_path / "adapter").eval()
    want = adapted.eval()(IDS, states()).loss.item()
    assert again(IDS, states()).loss.item() == pytest.approx(want, rel=1e-5)
    with pytest.raises(ValueError, match=r"heads.text.*: holds adapters, .* merge_and_unload\(\)"):
        adapted.base_model.model.save_pretrained(tmp_path / "whole")
    merged = adapted.merge_and_unload()
    merged.save_pretrained(tmp_path / "whole")
    loaded = CrossanModel.from_pretrained(tmp_path / "whole").eval()
    assert loaded(IDS, states()).loss.item() == pytest.approx(want, rel=1e-5)


@contextlib.contextmanager
def refused(match: str) -> Any:
    with pytest.raises((TypeError, ValueError), match=match):
        yield


def test_what_a_weight_cannot_hold_is_refused() -> None:
    with refused(r"lora_dropout: expected 0, .* got 0.1 of adapter 'default'"):
        adapt(make_model(), lora_dropout=0.1).train()(IDS, states())
    adapt(make_model(), lora_dropout=0.1).eval()(IDS, states())
    with refused(r"lora_bias: expected a Linear with a bias, got one without under adapter 'default'"):
        adapt(make_model(), lora_bias=True)(IDS, states())
    with refused(r"adapter 'default': expected plain LoRA, got PEFT's Dora"):
        adapt(make_model(), use_dora=True)(IDS, states())
    with refused(r"got peft\.tuners\.lora\.layer\.ParamWrapper in its place: the ops read weights"):
        adapt(make_model(), target_modules=[], target_parameters=["towers.text.down.weight"])(IDS, states())
    with refused(r"got peft\.tuners\.lora\.layer\.Embedding in its place"):
        adapt(make_model(), target_modules=["position"])(IDS, states())
    others: list[Any] = [
        peft.IA3Config(target_modules=["query"], feedforward_modules=[]),
        peft.LoHaConfig(target_modules=["query"]),
        peft.LNTuningConfig(target_modules=["attention_norm"]),
    ]
    for config in others:
        with refused(r"got peft\.tuners\.\w+\.layer\.\w+ in its place"):
            peft.get_peft_model(make_model(), config)(IDS, states())


def test_several_adapters_add_up_and_a_mixed_batch_is_refused() -> None:
    adapted = adapt(make_model())
    adapted.add_adapter("other", peft.LoraConfig(r=2, target_modules=["query"], init_lora_weights=False))
    alone = adapted(IDS, states()).loss.item()
    adapted.base_model.set_adapter(["default", "other"])
    both = adapted(IDS, states())
    assert abs(both.loss.item() - alone) > 1e-4
    layer = adapted.base_model.model.sequence_encoder.blocks[0].attention.query
    want = layer.base_layer.weight + layer.get_delta_weight("default") + layer.get_delta_weight("other")
    torch.testing.assert_close(weight_of(layer), want)
    with refused("adapter_names: expected one adapter for the whole batch"):
        adapted.eval()(IDS, states(), adapter_names=["default"] * len(IDS))


class Twice(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def test_a_linear_that_computes_otherwise_is_refused_and_a_parametrized_one_read() -> None:
    model = make_model()
    model.sequence_encoder.blocks[0].widen = Twice(16, 64)  # type: ignore[union-attr]
    with refused(r"got .*Twice in its place"):
        model(IDS, states())
    linear = nn.Linear(3, 2)
    nn.utils.parametrizations.weight_norm(linear)
    assert torch.equal(weight_of(linear), linear.weight)
    assert bias_of(linear) is linear.bias
