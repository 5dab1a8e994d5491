"""Layers used together with attention."""
