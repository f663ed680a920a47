"""C++ and CUDA sources, compiled on first use; see crossan_fast/_build.py."""
