"""Where NaN and inf are: the first bad one of some named tensors, in words. It waits for the device."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn


@torch.no_grad()
def first_nonfinite(named: Iterable[tuple[str, Tensor | None]]) -> str | None:
    """Which of the tensors (None is passed over) is the first with NaN or inf, and where; None: none is."""
    for name, tensor in named:
        if tensor is None or not tensor.is_floating_point() or bool(tensor.isfinite().all()):
            continue
        bad = (~tensor.isfinite()).nonzero()
        where = bad[0].tolist()
        return (
            f"{name}: expected finite values, got {float(tensor[tuple(where)])} at {where}, in {len(bad)} of "
            f"{tensor.numel()} places"
        )
    return None


def first_of_step(model: nn.Module, output: Mapping[str, Tensor]) -> str | None:
    """The same of parameters and buffers, then of what a forward gave, then of gradients."""
    return first_nonfinite(
        [
            *model.named_parameters(),
            *model.named_buffers(),
            *(
                (f"output.{name}", output[name])
                for name in ("item_embeddings", "user_embeddings", "loss")
                if output
            ),
            *((f"gradient of {name}", parameter.grad) for name, parameter in model.named_parameters()),
        ]
    )


def refuse_nonfinite_items(items: Tensor, names: Sequence[str]) -> None:
    """Raise ValueError for an item's embedding with NaN or inf, of `[I + 1, d]`, by its name."""
    finite = torch.isfinite(items).all(dim=1)
    if not bool(finite.all()):
        row = int((~finite).nonzero()[0])
        raise ValueError(f"model: the embedding of item {names[row]!r} (row {row}) is not finite")
