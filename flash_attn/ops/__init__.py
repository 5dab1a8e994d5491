"""Upstream import paths of operators."""
