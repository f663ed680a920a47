"""A GPU that is not there, for what only a machine with one would show.

`tensors`: tensors that lie on cuda:0 for torch, and compute on the CPU. `driver`: Triton's own CUDA driver
and launcher on a `libcuda.so.1` of a few functions (`libcuda.c`), which keeps launches in place of running
them; every launch is checked. What kernels would have written stays as it was allocated, integers as zeros.
"""

from benchmarks.pretended_gpu.tensors import GPU, OnGpu, PretendedGpu, observers

__all__ = ["GPU", "OnGpu", "PretendedGpu", "observers"]
