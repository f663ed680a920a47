"""side_network in Triton: `host` chunks and launches, the other files hold what it launches."""

from crossan_fast.kernels.side_network.host import backward, forward, refuses

__all__ = ["backward", "forward", "refuses"]
