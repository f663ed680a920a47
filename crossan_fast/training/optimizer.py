"""AdamW over the model's three parts, with warm-up and clipping that never wait for the device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from crossan_fast._checks import describe
from crossan_fast.model import CrossanModel
from crossan_fast.training.train_config import OptimizerConfig

# As in torch's clip_grad_norm_.
CLIP_EPS = 1e-6
PARTS = ("side_network", "fusion", "sequence_encoder")


def part_of(name: str) -> str:
    """Which of `PARTS` a parameter of `CrossanModel` belongs to."""
    first = name.split(".", 1)[0]
    return {"towers": "side_network", "sequence_encoder": "sequence_encoder"}.get(first, "fusion")


def decays(name: str) -> bool:
    """Whether weight decay applies: to matrices, not to biases, gates, norms and positions."""
    steps = name.split(".")
    if steps[0] == "towers":  # towers.<m>.<kind>...; a modality may have any name
        return steps[2] not in ("gate", "cross") and steps[-1] != "bias"
    if steps[-1] in ("bias", "b1", "b2"):
        return False
    return not any(step.endswith("norm") or step == "position" for step in steps)


def is_id_table(name: str) -> bool:
    """Whether a parameter holds a free vector for each item: `model.id_embedding`'s, or `SasRec`'s own."""
    return name in ("id_embedding.weight", "items.weight")


class DecayTooLarge(ValueError):
    """Items' own vectors would be gone after one step of their decay."""


def parameter_groups(model: CrossanModel, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Groups for an optimizer, each with `names` beside `params` and its `base_lr`.

    Parameters of one learning rate and one decay share a group: each group is a call of its own, which a
    small model's step feels.

    Raises:
        DecayTooLarge: a learning rate that would take all of items' own vectors away in one step.
    """
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        rate = config.learning_rate * getattr(config, part_of(name))
        decay = config.weight_decay if decays(name) else 0.0
        if is_id_table(name) and config.id_weight_decay is not None:
            decay = config.id_weight_decay
            if rate * decay >= 1:
                raise DecayTooLarge(
                    f"optimizer.id_weight_decay: expected below 1 / learning rate = {1 / rate:g}, got {decay}"
                )
        group = groups.setdefault(
            (rate, decay), {"params": [], "names": [], "base_lr": rate, "weight_decay": decay}
        )
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def make_optimizer(model: CrossanModel, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW, fused; on CUDA the learning rates are tensors, so that a captured step can change them."""
    groups = parameter_groups(model, config)
    device = next(model.parameters()).device
    for group in groups:
        rate = group["base_lr"]
        group["lr"] = torch.tensor(rate, device=device) if device.type == "cuda" else rate
    fused = device.type in ("cpu", "cuda")
    return torch.optim.AdamW(
        groups, betas=config.betas, eps=config.eps, fused=fused, capturable=device.type == "cuda"
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, step: int, warmup_steps: int) -> float:
    """The learning rates of step 0, 1, …: linear from base / warmup_steps to base, then constant.

    Gives the share of base that they are.
    """
    share = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(group["base_lr"] * share)
        else:
            group["lr"] = group["base_lr"] * share
    return share


def each_norm(parameters: Sequence[nn.Parameter]) -> Sequence[Tensor]:
    """The norm of each gradient, `[]`, 0 where there is none."""
    norms = torch._foreach_norm([p.grad for p in parameters if p.grad is not None])
    if len(norms) == len(parameters):
        return norms
    none, found = torch.zeros((), dtype=parameters[0].dtype, device=parameters[0].device), iter(norms)
    return [none if p.grad is None else next(found) for p in parameters]


def gradient_norms(parameters: Sequence[nn.Parameter]) -> Tensor:
    """`[len(parameters)]`, 0 where there is no gradient."""
    return torch.stack(tuple(each_norm(parameters)))


def clip_gradients(
    parameters: Sequence[nn.Parameter], norm: float | None, norms: Tensor | None = None
) -> Tensor:
    """Scale all gradients together to at most `norm` (None: as they are); gives the norm they had, `[]`.

    `norms`: as `gradient_norms` gives them, where they are at hand.
    """
    total: Tensor = torch.linalg.vector_norm(gradient_norms(parameters) if norms is None else norms)
    # On a CPU gradients within the bound need not be written again, and what is not finite stays where it is,
    # to be named.
    if norm is None or (total.device.type == "cpu" and not norm < float(total) < math.inf):
        return total
    gradients = [p.grad for p in parameters if p.grad is not None]
    torch._foreach_mul_(gradients, (norm / (total + CLIP_EPS)).clamp(max=1.0))
    return total


class ClippedByStep:
    """The same clipping by a fused optimizer's own kernels: they divide as they read.

    A GPU so writes no gradient twice, and launches two kernels in place of five.
    """

    def __init__(self, norm: float, device: torch.device) -> None:
        self._norm = norm
        self._eps = torch.full((), CLIP_EPS / norm, device=device)

    def prepare(self, optimizer: torch.optim.Optimizer, total: Tensor) -> None:
        """Have the optimizer's next step clip gradients whose `gradient_norm` is `total`."""
        divisor = torch.add(self._eps, total, alpha=1 / self._norm).clamp_(min=1.0)
        optimizer.grad_scale = divisor  # type: ignore[attr-defined]


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The state as named tensors, `<parameter>:<entry>`, for a checkpoint without pickle."""
    tensors = {}
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            for entry, value in optimizer.state.get(parameter, {}).items():
                tensors[f"{name}:{entry}"] = value
    return tensors


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` gave.

    Raises:
        ValueError: tensors of parameters that the model lacks, of other shapes than theirs, or not all that
            the others have. Nothing was put back.
    """
    parameters = {
        name: parameter
        for group in optimizer.param_groups
        for name, parameter in zip(group["names"], group["params"], strict=True)
    }
    found: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        name, _, entry = key.rpartition(":")
        if name not in parameters:
            raise ValueError(f"checkpoint: optimizer state of {name!r}, which the model lacks")
        if value.dim() and value.shape != parameters[name].shape:
            raise ValueError(
                f"checkpoint: optimizer state {key}: expected {describe(parameters[name])}, got "
                f"{describe(value)}"
            )
        found.setdefault(name, {})[entry] = value
    entries = {entry for own in found.values() for entry in own}
    for name, own in found.items():
        if own.keys() != entries:
            raise ValueError(f"checkpoint: optimizer state of {name!r}: lacks {sorted(entries - own.keys())}")
    for name, own in found.items():
        parameter = parameters[name]
        for entry, value in own.items():
            optimizer.state[parameter][entry] = value.to(parameter.device)
