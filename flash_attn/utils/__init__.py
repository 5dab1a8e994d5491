"""Helpers for training that other projects import; they need no kernels."""
