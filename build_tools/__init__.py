"""Compiles the CUDA kernels, for setup.py and tools/. Not installed."""
