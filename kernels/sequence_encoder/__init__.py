"""sequence_encoder in Triton: `host` launches the kernels of the files beside it."""

from crossan_fast.kernels.sequence_encoder.host import backward, forward, refuses

__all__ = ["backward", "forward", "refuses"]
