"""Training utilities that other projects import; they use no kernels."""
