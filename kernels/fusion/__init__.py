"""fusion in Triton: `host` launches the kernels of `forward_kernels` and `backward_kernels`."""

from crossan_fast.kernels.fusion.host import backward, forward

__all__ = ["backward", "forward"]
