"""Which parameters of an encoder are trained, and what is added to it: the papers' efficient methods."""

from __future__ import annotations

from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

Adaptation = Literal["full", "houlsby", "lora", "bitfit"]

RANK, BOTTLENECK, STD = 8, 64, 1e-3
# Where transformers' BERT and ViT keep what LoRA adapts, and what ends a block's two halves.
_QUERY_VALUE = ("query", "value", "q_proj", "v_proj")
_ENDS = ("attention.output.dense", "attention.o_proj", "mlp.fc2")


def adapt(model: nn.Module, how: Adaptation) -> nn.Module:
    """`model` made ready to train in this way; the same object, or `peft`'s around it.

    Raises:
        ValueError: none of the layers that the method changes is there.
    """
    if how == "full":
        return model.requires_grad_(True)
    model.requires_grad_(False)
    if how == "bitfit":
        return _bitfit(model)
    return _lora(model) if how == "lora" else _houlsby(model)


def _bitfit(model: nn.Module) -> nn.Module:
    """BitFit (arXiv 2106.10199): every bias, and nothing else."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("bias"))
    return model


def _lora(model: Any) -> nn.Module:
    """LoRA (arXiv 2106.09685) of rank 8 at queries and values, by `peft`."""
    from peft import LoraConfig, get_peft_model

    found = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
    targets = [name for name in _QUERY_VALUE if name in found]
    if not targets:
        raise ValueError(
            f"model: expected layers called {_QUERY_VALUE}, found none in {type(model).__name__}"
        )
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, lora_dropout=0.0, target_modules=targets)
    return get_peft_model(model, config)


class Bottleneck(nn.Module):
    """x + W_up gelu(W_down x): an adapter, which starts near the identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(width, BOTTLENECK), nn.Linear(BOTTLENECK, width)
        for layer in (self.down, self.up):
            nn.init.normal_(layer.weight, std=STD)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        added: Tensor = self.up(F.gelu(self.down(x)))
        return x + added


def _houlsby(model: nn.Module) -> nn.Module:
    """Adapters (arXiv 1902.00751) of width 64 behind both halves of every block; norms are trained, too.

    `peft` has none of these: they stand in the encoder's own modules.
    """
    ends = [
        (name, layer)
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and (name.endswith(_ENDS) or _is_second_half(name))
    ]
    if not ends:
        raise ValueError(f"model: expected layers that end in {_ENDS}, found none in {type(model).__name__}")
    for name, layer in ends:
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, nn.Sequential(layer, Bottleneck(layer.out_features)))
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.requires_grad_(True)
    return model


def _is_second_half(name: str) -> bool:
    """BERT's `layer.<k>.output.dense`."""
    parts = name.split(".")
    return parts[-2:] == ["output", "dense"] and parts[-3:-2] != ["attention"]
