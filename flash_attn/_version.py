"""The version: the API level of flash_attn that this package follows, then its own release."""

__version__ = "2.8.3+0.7.0"
