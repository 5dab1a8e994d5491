"""What went wrong, in a line; and whether the device can still be used."""

from __future__ import annotations

from build_tools import preflight

LONGEST = 200  # characters of a reason
LOST = ("CUDA error", "illegal memory access", "unspecified launch failure", "misaligned address")


def reason(error: BaseException) -> str:
    """The first line of an error's text, or its type if there is none."""
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:LONGEST]


def device_is_lost(error: BaseException) -> bool:
    """Whether the error has ended the CUDA context: then every later call fails, in this process."""
    return any(text in str(error) for text in LOST) and preflight.device_is_lost()
