"""The name under which programs import the rotation itself."""

from flash_attn.layers.rotary import apply_rotary

__all__ = ["apply_rotary"]
