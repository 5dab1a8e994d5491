"""What went wrong, in a line; whether the device can still be used; and whether it can be used at all."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch

import flash_attn

LONGEST = 200  # characters of a reason
LOST = ("CUDA error", "illegal memory access", "unspecified launch failure", "misaligned address")


def reason(error: BaseException) -> str:
    """The first line of an error's text, or its type if there is none."""
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:LONGEST]


def result_or_reason(name: str, function: Callable[[], Any]) -> tuple[Any, str]:
    """What a provider returns, or None and why it cannot. An error that ends the CUDA context is raised."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            return function(), ""
        except Exception as error:
            if device_is_lost(error):
                raise RuntimeError(f"{name}: {error}") from error
            return None, _explained(reason(error), [str(warning.message) for warning in caught])


def _explained(text: str, said: Sequence[str]) -> str:
    """torch says only in warnings why a backend cannot."""
    if "No available kernel" not in text:
        return text
    known = [each.partition(" (Triggered")[0].strip() for each in said]
    reasons = [each for each in known if "runtime disabled" not in each and not each.endswith("because:")]
    return reason(ValueError(" ".join(dict.fromkeys(reasons)) or text))


def device_is_lost(error: BaseException) -> bool:
    """Whether the error has ended the CUDA context: then the GPU refuses every later call of this process."""
    if not any(text in str(error) for text in LOST):
        return False
    for _ in range(2):  # an error of one call is told once, this one always
        try:
            torch.cuda.synchronize()
        except Exception:  # noqa: BLE001 (whatever it is, the device does not answer)
            continue
        return False
    return True


def unavailable_reason(device: str) -> str:
    """Why nothing can be measured on the device, in a line; empty if something can."""
    if device == "cuda" and not torch.cuda.is_available():
        finds = "is a CPU build" if torch.version.cuda is None else "finds none"
        return f"no CUDA device: torch {torch.__version__} {finds}"
    try:
        built = flash_attn.build_info()
    except RuntimeError as error:
        return reason(error)
    if device == "cpu":
        return ""
    capability = torch.cuda.get_device_capability()
    if not built["cuda_archs"]:
        return "flash_attn is built for CPUs only; run make clean, and see what the build says"
    if capability == (9, 0) and not built["hopper_kernels"]:
        return f"flash_attn has no kernels for Hopper, only {built['cuda_archs']}; run make clean, and build again"
    if capability < (8, 0):
        return f"{torch.cuda.get_device_name()} has compute capability {capability}, and the kernels need (8, 0)"
    return ""
