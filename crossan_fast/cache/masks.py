"""Which items have which modalities, as the ops take it."""

from __future__ import annotations

import torch
from torch import Tensor


def masks_of(
    present: Tensor, device: torch.device, chosen: tuple[int, ...]
) -> tuple[Tensor | None, Tensor | None]:
    """Of columns `chosen` of `present` `[I + 1, M]`: themselves, and which items have none; on `device`.

    None where every item has all of them, and where every item has one.

    Raises:
        RuntimeError: within `torch.compile`, which cannot tell whether there is a mask at all.
    """
    if torch.compiler.is_compiling():
        raise RuntimeError(
            f"cache: which items have modalities {list(chosen)} was not looked up on {device} yet, and can't "
            f"be while torch.compile traces: call cache.present_mask({str(device)!r}, {list(chosen)}), or "
            "take one step that is not compiled, before"
        )
    rows = present[:, list(chosen)]
    bare = ~rows[1:].any(dim=1)
    return (
        None if bool(rows[1:].all()) else rows.to(device),
        torch.nn.functional.pad(bare, (1, 0)).to(device) if bool(bare.any()) else None,
    )
