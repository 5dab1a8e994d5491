"""Loads the compiled extension, which registers ``torch.ops.flash_attn``.

Importing flash_attn works without the extension: it warns in one line, and the first use of an operator raises that
line.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import torch

from flash_attn._version import extension_name

_REMEDY = "rebuild it with `pip install --no-build-isolation .` in the source tree of flash-attn"


def _load() -> tuple[ModuleType | None, str]:
    """(extension module or None, one-line problem with its remedy or "")."""
    name = f"flash_attn.{extension_name(torch.__version__)}"
    found = importlib.util.find_spec(name)
    # The package path may contain other copies of flash_attn, with extensions of other versions.
    if found is None or Path(str(found.origin)).parent != Path(__file__).parent:
        return None, _missing()
    try:
        return importlib.import_module(name), ""
    except ImportError as error:
        lines = str(error).splitlines() or [type(error).__name__]
        reason = f"does not load with torch {torch.__version__} ({lines[0]})"
        return None, f"flash_attn: the compiled extension {reason}; {_REMEDY}"


def _missing() -> str:
    """Why there is no extension for this torch, with the remedy."""
    others = [
        path.name.removeprefix("_C_torch").removesuffix(suffix).replace("_", ".")
        for suffix in importlib.machinery.EXTENSION_SUFFIXES
        for path in Path(__file__).parent.glob(f"_C_torch*_*{suffix}")
        if path.name.count(".") == suffix.count(".")
    ]
    if not others:
        return f"flash_attn: the compiled extension is not built; {_REMEDY}"
    built_for = " and ".join(sorted(others))
    return (
        f"flash_attn: the compiled extension is for torch {built_for}, not {torch.__version__}; {_REMEDY}, "
        f"or run `pip install torch=={sorted(others)[-1]}.*`"
    )


_extension, _unavailable_reason = _load()
if _unavailable_reason:
    warnings.warn(_unavailable_reason, stacklevel=2)

MAX_HEAD_DIM: int = _extension.build_info().get("max_head_dim", 0) if _extension is not None else 0


def op(name: str, overload: str = "default") -> Callable[..., Any]:
    """The operator ``torch.ops.flash_attn.<name>``, or a function that raises if the extension is missing."""
    if _extension is not None and hasattr(torch.ops.flash_attn, name):
        return getattr(getattr(torch.ops.flash_attn, name), overload)
    return _unavailable


def function(name: str) -> Callable[..., Any]:
    """A function of the extension module, or a function that raises if the extension is missing."""
    return getattr(_extension, name, _unavailable)


def _unavailable(*args: Any, **kwargs: Any) -> NoReturn:
    raise RuntimeError(_unavailable_reason)


def draw_rng_state(device: torch.device) -> torch.Tensor:
    """Seed and offset of a dropout mask, (2,) int64, from torch's generator, as the ops of 2.8.3 draw them."""
    return torch.randint(2**63 - 1, (2,), dtype=torch.int64, device=device)


def build_info() -> dict[str, Any]:
    """What the extension was built for.

    Returns:
        A dict with torch_version, cuda_version (None: no CUDA kernels), built_because (why for the CPU only, or why for
        these GPUs), cpu_instruction_set, max_head_dim, cuda_archs (targets of the kernels), backends (best first, each
        a dict with name and built_for, a list of targets, empty if not in this build) and hopper_kernels (whether sm90
        is in this build).

        A call runs on the best backend that supports it, or on the one named by the environment variable
        FLASH_ATTN_BACKEND. sm90 runs on GPUs of compute capability 9.0; it supports neither paged KV (block_table) nor
        tensors that TMA cannot access: rows must not overlap and must be 16-byte aligned, which contiguous rows are not
        if head_dim is not a multiple of 8. sm80 supports all calls, on compute capability 8.0 and later.

    Raises:
        RuntimeError: the extension is not available.
    """
    if _extension is None:
        raise RuntimeError(_unavailable_reason)
    return dict(_extension.build_info())
