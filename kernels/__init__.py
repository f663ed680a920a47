"""Triton kernels, one file or folder an op, with the names of crossan_fast.ops."""
