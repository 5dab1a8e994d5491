"""Attention modules with parameters."""
