"""The upstream import path of apply_rotary."""

from flash_attn.layers.rotary import apply_rotary

__all__ = ["apply_rotary"]
