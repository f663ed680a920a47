"""Triton kernels, one file an op, with the names of crossan_fast.ops."""
