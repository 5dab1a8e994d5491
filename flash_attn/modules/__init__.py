"""Attention as torch modules with parameters."""
