"""Weights of Linears as the ops read them, adapted ones too.

The ops take weights; no Linear's `forward` is called. What replaces or wraps a module, as PEFT's adapters do,
would therefore be passed over in silence if `weight` were read from it: it has the name, and gives the frozen
one. Here LoRA's factors are added, W + s B A, and whatever else stands in a Linear's place is refused, what a
hook computes before a forward, as `torch.nn.utils.spectral_norm` does, included.
"""

from __future__ import annotations

import sys
from typing import Any, NoReturn

from torch import Tensor, nn

_REMEDY = "the ops read weights and would pass it over; merge it into the weights, or leave this module out"


def weight_of(linear: Any) -> Tensor:
    """The weight that a Linear computes with, `[out, in]`.

    Raises:
        TypeError: a module in its place whose weight cannot be told, or that a hook would compute.
        ValueError: an adapter of PEFT that is no plain LoRA, or that drops inputs while it trains.
    """
    if type(linear) is nn.Linear:
        refuse_hooked(linear)
        return linear.weight
    if adapters := _lora(linear):
        weight: Tensor = _base(linear).weight
        for name in adapters:
            weight = weight + linear.get_delta_weight(name).to(weight.dtype)
        return weight
    return _base(linear).weight


def bias_of(linear: Any) -> Tensor:
    """Its bias `[out]`; raises as `weight_of`."""
    if type(linear) is nn.Linear:
        refuse_hooked(linear)
        return linear.bias
    bias: Tensor = _base(linear).bias
    for name in _lora(linear):
        if linear.lora_bias[name]:
            bias = bias + linear.lora_B[name].bias * linear.scaling[name]
    return bias


def own(module: Any) -> Any:
    """A module of ours or of torch's itself, out of what `unwrapped` unwraps.

    Raises:
        TypeError: another module in its place, or one whose weights a hook would compute.
    """
    found = unwrapped(module)
    if not type(found).__module__.startswith(("torch.", "crossan_fast.")):
        _refuse(found)
    refuse_hooked(found)
    return found


def refuse_hooked(module: nn.Module) -> None:
    """Raise TypeError for a module whose forward would first compute a weight anew: no forward is called.

    Such a hook leaves a plain tensor, its last result, where the parameter stood; it would be read at every
    step as it was at first. Hooks that only look on leave parameters as they are.
    """
    if not module._forward_pre_hooks:
        return
    for name, value in vars(module).items():
        if isinstance(value, Tensor):
            hooks = ", ".join(_kind(hook) for hook in module._forward_pre_hooks.values())
            raise TypeError(
                f"module: expected {name!r} of a {type(module).__name__} to be a parameter, got what a hook "
                f"computes before its forward ({hooks}), which is never called; "
                "torch.nn.utils.parametrizations has spectral_norm and weight_norm, which are read, and "
                "torch.nn.utils.prune.remove ends a pruning"
            )


def _kind(hook: Any) -> str:
    kind = type(hook)
    return getattr(hook, "__qualname__", f"{kind.__module__}.{kind.__qualname__}")


def unwrapped(module: Any) -> Any:
    """A module out of the wrapper by which PEFT trains a copy (`modules_to_save`); others as they are."""
    other = sys.modules.get("peft.utils.other")
    if other is None or type(module) is not other.ModulesToSaveWrapper:
        return module
    if module.disable_adapters or not module.active_adapters:
        return module.original_module
    return module.modules_to_save[module.active_adapters[0]]


def _base(linear: Any) -> nn.Linear:
    """The Linear behind adapters, if it computes as a Linear does."""
    layer = _lora_layer()
    adapted = layer is not None and type(linear) is layer.Linear
    found = linear.get_base_layer() if adapted else unwrapped(linear)
    if not (isinstance(found, nn.Linear) and type(found).forward is nn.Linear.forward):
        found = own(found)
    if not isinstance(found, nn.Linear):
        _refuse(linear)
    refuse_hooked(found)
    return found


def _lora(linear: Any) -> list[str]:
    """The adapters of a LoRA layer that its `forward` would add; none of another module."""
    layer = _lora_layer()
    if layer is None or type(linear) is not layer.Linear:
        return []
    if linear.disable_adapters:
        if linear.merged:
            linear.unmerge()
        return []
    if linear.merged:
        return []
    if linear._forward_pre_hooks:
        raise ValueError(
            "adapter_names: expected one adapter for the whole batch; several are not computed here"
        )
    names = [name for name in linear.active_adapters if name in linear.lora_A]
    for name in names:
        dropout = linear.lora_dropout[name]
        if name in linear.lora_variant:
            variant = type(linear.lora_variant[name]).__name__
            raise ValueError(f"adapter {name!r}: expected plain LoRA, got PEFT's {variant}; {_REMEDY}")
        if linear.training and getattr(dropout, "p", 0):
            raise ValueError(
                f"lora_dropout: expected 0, for W + BA has no place between an input and A, got {dropout.p} "
                f"of adapter {name!r}"
            )
        if linear.lora_bias[name] and linear.get_base_layer().bias is None:
            raise ValueError(
                f"lora_bias: expected a Linear with a bias, got one without under adapter {name!r}; leave "
                "query, key, value and out of the attention out of target_modules"
            )
    return names


def _lora_layer() -> Any:
    """PEFT's module of LoRA layers, where something has imported it."""
    return sys.modules.get("peft.tuners.lora.layer")


def _refuse(module: nn.Module) -> NoReturn:
    kind = type(module)
    raise TypeError(
        f"module: expected one of torch or of this library, got {kind.__module__}.{kind.__qualname__} in its "
        f"place: {_REMEDY}"
    )
