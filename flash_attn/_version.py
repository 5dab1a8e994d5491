"""The version: the flash_attn version whose API this package follows, then its own release."""

__version__ = "2.8.3+0.11.0"
