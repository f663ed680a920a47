"""The limits of csrc/cuda/interface.h, each by its name; those of the device, once it is known."""

from __future__ import annotations

from crossan_fast.ops import _cuda
from crossan_fast.ops._dispatch import Request


def refuses(request: Request) -> str | None:
    """See `crossan_fast.ops._cuda`."""
    widths, cross = request.sizes("widths"), request.feature("cross", "none")
    levels, rank = request.size("levels", 1), request.size("rank", 8)
    embedding = request.size("embedding", 8)
    if cross == "side":
        return "walks every tower alone, which cross='side' rules out"
    if any(width % 64 for width in widths):
        return f"serves widths that are multiples of 64, not {widths}"
    if "unequal_pairs" in request.features:
        return f"serves pair towers of equal widths only, not {widths}"
    if cross == "backbone" and len(set(widths)) > 1:
        return f"adds other modalities' states at equal widths only, not {widths}"
    if "cross_projection=low_rank" in request.features:
        return "adds other modalities' states as they are, which cross_projection='low_rank' rules out"
    if len(widths) > (most := 4 if cross == "backbone" else 8):
        return f"serves at most {most} modalities with cross={cross!r}, not {len(widths)}"
    if levels > 8:
        return f"serves at most 8 levels, not {levels}"
    if rank > 64 or rank % 8:
        return f"serves bottlenecks that are multiples of 8 up to 64, not {rank}"
    # A block of the weight gradients keeps 9 matrices: the levels', and one for each 64 of the embedding.
    most = 64 * (9 - levels)
    if embedding % 8 or embedding > most:
        return (
            f"serves embeddings that are multiples of 8, with {levels} levels up to {most}, not {embedding}"
        )
    if reason := _cuda.refuses(request):
        return reason
    if widths and max(widths) > (widest := _cuda.library().side_network_widest(levels, embedding)):
        return (
            f"keeps a tower in shared memory: with {levels} levels up to width {widest} on this GPU, "
            f"not {max(widths)}"
        )
    return None
