"""C++ and CUDA sources, compiled on first use."""
