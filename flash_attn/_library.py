"""Loads the compiled extension, which registers ``torch.ops.flash_attn``.

Importing flash_attn never fails for want of the extension: without it there is one line of warning, and the first use
of an operator raises that line.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import torch

_REMEDY = "rebuild it with `pip install --no-build-isolation .` in the source tree of flash-attn"


def _load() -> tuple[ModuleType | None, str]:
    """The extension module, if there is one, and the line that says what is wrong and what to do, if anything is."""
    try:
        module = importlib.import_module("flash_attn._C")
        if Path(str(module.__file__)).parent != Path(__file__).parent:
            # The path of this package may hold other copies of it; theirs may be of another version.
            raise ModuleNotFoundError(name="flash_attn._C")
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "flash_attn._C":
            reason = "is not built"
        else:
            lines = str(error).splitlines() or [type(error).__name__]
            reason = f"does not load with torch {torch.__version__} ({lines[0]})"
        return None, f"flash_attn: the compiled extension {reason}; {_REMEDY}"
    built_for = str(module.build_info()["torch_version"])
    if built_for.split("+")[0] == torch.__version__.split("+")[0]:
        return module, ""
    return module, f"flash_attn: the extension was built for torch {built_for}, not {torch.__version__}; {_REMEDY}"


_extension, _unavailable_reason = _load()
if _unavailable_reason:
    warnings.warn(_unavailable_reason, stacklevel=2)

MAX_HEAD_DIM: int = _extension.build_info().get("max_head_dim", 0) if _extension is not None else 0


def op(name: str) -> Callable[..., Any]:
    """The operator ``torch.ops.flash_attn.<name>``, or a stand-in that raises when it is called."""
    if _extension is not None and hasattr(torch.ops.flash_attn, name):
        return getattr(torch.ops.flash_attn, name).default
    return _unavailable


def function(name: str) -> Callable[..., Any]:
    """A function of the extension module, or a stand-in that raises when it is called."""
    return getattr(_extension, name, _unavailable)


def _unavailable(*args: Any, **kwargs: Any) -> NoReturn:
    raise RuntimeError(_unavailable_reason)


def build_info() -> dict[str, Any]:
    """What the extension was built for.

    Returns:
        torch_version, cuda_version (None: no CUDA kernels), cpu_instruction_set, max_head_dim; cuda_archs, the code
        that there is for GPUs; backends, best first, each a dict with its name and what it was built_for, an empty
        list where it is not in this build; hopper_kernels, whether sm90 is.

        A call runs on the best backend that can, or, with the environment variable FLASH_ATTN_BACKEND, on the one of
        that name. sm90 takes GPUs of compute capability 9.0, but no pages of keys (block_table), nor tensors that TMA
        cannot read or write: their rows must be apart, and start at multiples of 16 bytes, which they do not where they
        are contiguous and head_dim is no multiple of 8. sm80 takes all of them, on 8.0 and later.

    Raises:
        RuntimeError: the extension is not available.
    """
    if _extension is None:
        raise RuntimeError(_unavailable_reason)
    return dict(_extension.build_info())
