"""flash_attn in the models of transformers (4.57 and 5), on CPUs as on GPUs.

    import flash_attn.integrations.transformers as flash
    flash.register()
    model = AutoModelForCausalLM.from_pretrained(..., attn_implementation="flash_attention_2")

Where there is a GPU, transformers takes flash_attn for "flash_attention_2" without this; on a CPU it refuses.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AttentionInterface, PreTrainedModel
from transformers import modeling_flash_attention_utils as flash_utils
from transformers.integrations import flash_attention as flash_integration
from transformers.masking_utils import AttentionMaskInterface
from transformers.utils import import_utils

import flash_attn
from flash_attn.integrations._transformers_attention import attention_forward, padding_mask

__all__ = ["attention_forward", "register", "write_local_kernel"]

# The repository of kernels that transformers falls back to for "flash_attention_2".
_HUB_KERNEL = "kernels-community/flash-attn2"
# Models list the implementations that they work with. Those that list this one need sinks, which ours has.
_HUB_KERNEL_WITH_SINKS = "kernels-community/vllm-flash-attn3"
# The names of ours that are registered.
_names: set[str] = set()


def register(name: str = "fa2") -> None:
    """Let models use flash_attn on any device: as "flash_attention_2", and under a name of its own.

    The own name is registered with AttentionInterface and AttentionMaskInterface, so that it coexists with whatever
    else provides "flash_attention_2"; models that do not support flash attention are refused. "flash_attention_2" is
    opened for CPUs by replacing the checks of transformers that ask for a GPU, in this process; where a GPU is visible
    they are left as they are, and what it computes is as on GPUs.

    Both skip padding, given as attention_mask (batch_size, seqlen), and keep packed sequences apart (position_ids that
    begin anew, or cu_seq_lens_q and so on). Sinks, windows, softcap, dropout and gradients work, in float32 too, and
    so does continuous batching (generate_batch) with "flash_attention_2". Neither gives attention weights
    (output_attentions). May be called more than once; the first time before models are made, since some modules of
    transformers look for flash_attn when they are imported.

    The own name does more: padded keys of cross attention, packed rows in batches of several, static caches without a
    mask, and packed rows under torch.compile are right, where transformers' own code for "flash_attention_2" is not.

    Args:
        name: attn_implementation="fa2" and the like. It must not contain "flash": transformers would look for a
            package. Nor may another implementation have it.

    Raises:
        TypeError, ValueError: of name.
        RuntimeError: transformers is older than 4.57.
    """
    where = "flash_attn.integrations.transformers.register"
    if not isinstance(name, str):
        raise TypeError(f"{where}: name: expected str, got {type(name).__name__}")
    if not name or "flash" in name or "|" in name or "/" in name:
        raise ValueError(f'{where}: name: expected one without "flash", "|" and "/", got {name!r}')
    if int(transformers.__version__.split(".")[0]) < 5 and not transformers.__version__.startswith("4.57."):
        raise RuntimeError(f"{where}: expected transformers 4.57 or 5, got {transformers.__version__}")
    if name == "eager" or AttentionInterface().get(name, attention_forward) is not attention_forward:
        raise ValueError(f"{where}: name: expected one that no other implementation has, got {name!r}")
    AttentionInterface.register(name, attention_forward)
    AttentionMaskInterface.register(name, padding_mask)
    if not _names:
        _wrap("get_correct_attn_implementation", _refuse_unfit)
    _names.add(name)
    _open_gate()


def _yes(*args: Any, **kwargs: Any) -> bool:
    """Whether flash_attn can be used."""
    return True


def _open_gate() -> None:
    """Accept "flash_attention_2" without a GPU; does nothing where it is accepted."""
    asked = import_utils.is_flash_attn_2_available
    if asked():
        return
    for module in [module for name, module in sys.modules.items() if name.startswith("transformers")]:
        if vars(module).get("is_flash_attn_2_available") is asked:
            setattr(module, "is_flash_attn_2_available", _yes)  # noqa: B010
    flash_utils.fa_peft_integration_check = _without_casts_to_float32(flash_utils.fa_peft_integration_check)
    if hasattr(flash_utils, "FLASH_ATTENTION_COMPATIBILITY_MATRIX"):
        flash_utils.FLASH_ATTENTION_COMPATIBILITY_MATRIX[2]["general_availability_check"] = _yes
        flash_integration.get_target_dtype = _or_none(flash_integration.get_target_dtype)
        _wrap("_flash_attn_can_dispatch", _can_dispatch)
        _wrap("_check_and_adjust_attn_implementation", _choose_implementation)
    else:  # 4.57
        _wrap("_flash_attn_2_can_dispatch", _can_dispatch_2)
        paged = importlib.import_module("transformers.integrations.flash_paged")
        setattr(paged, "FLASH_ATTN_VARLEN_FUNC", flash_attn.flash_attn_varlen_func)  # noqa: B010


def _wrap(method: str, wrapper: Any) -> None:
    """Replace a method of models by wrapper(original method, self, ...)."""
    original = getattr(PreTrainedModel, method)

    @functools.wraps(original)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        return wrapper(original, self, *args, **kwargs)

    setattr(PreTrainedModel, method, wrapped)


def _without_casts_to_float32(cast: Any) -> Any:
    """Casting float32 to float32 changes nothing, but warns, at which torch.compile breaks its graph."""

    @functools.wraps(cast)
    def wrapped(q: Any, k: Any, v: Any, target_dtype: torch.dtype | None = None) -> Any:
        return cast(q, k, v, None if target_dtype is torch.float32 else target_dtype)

    return wrapped


def _or_none(target_dtype: Any) -> Any:
    """The dtype to cast float32 to is that of a Linear; layers without one, as in GPT-2, are left alone."""

    @functools.wraps(target_dtype)
    def wrapped(query: torch.Tensor, module: torch.nn.Module) -> torch.dtype | None:
        try:
            return target_dtype(query, module)
        except StopIteration:
            return None

    return wrapped


def _refuse_unfit(original: Any, self: Any, requested_attention: Any, *args: Any, **kwargs: Any) -> Any:
    """Models that do not support flash attention pass it masks or biases that it would ignore."""
    if requested_attention in _names and not _supports_flash_attention(self):
        expected = "a model that supports flash attention"
        raise ValueError(f'attn_implementation="{requested_attention}": expected {expected}, got {type(self).__name__}')
    return original(self, requested_attention, *args, **kwargs)


def _supports_flash_attention(model: Any) -> bool:
    return bool(model._supports_flash_attn or getattr(model, "_supports_flash_attn_2", False))


def _can_dispatch(original: Any, self: Any, flash_attn_version: int, is_init_check: bool = False) -> bool:
    """Version 2 needs neither a GPU nor half precision, of which transformers warns."""
    if flash_attn_version == 2 and _supports_flash_attention(self):
        return True
    return bool(original(self, flash_attn_version, is_init_check))


def _can_dispatch_2(original: Any, self: Any, is_init_check: bool = False) -> bool:
    """As _can_dispatch, in transformers 4.57."""
    if _supports_flash_attention(self):
        return True
    return bool(original(self, is_init_check))


def _choose_implementation(original: Any, self: Any, attn_implementation: Any, *args: Any, **kwargs: Any) -> Any:
    """Models with sinks list who has them: this package does, which no list knows."""
    listed = getattr(self, "_compatible_flash_implementations", None)
    if attn_implementation == "flash_attention_2" and listed is not None and _HUB_KERNEL_WITH_SINKS in listed:
        self._compatible_flash_implementations = [*listed, attn_implementation]
    return original(self, attn_implementation, *args, **kwargs)


def write_local_kernel(directory: str | os.PathLike[str]) -> str:
    """Write a folder from which the package `kernels` loads flash_attn in place of a download, and patches nothing.

    transformers 5 asks `kernels`, if it is installed, where it cannot use flash_attn. Set what this returns as the
    environment variable LOCAL_KERNELS before a model is loaded, and attn_implementation="flash_attention_2"
    works on CPUs.

    Args:
        directory: is created; files of that name in it are replaced.

    Returns:
        "kernels-community/flash-attn2=<directory>"; join several entries with ":".

    Raises:
        ValueError: the path contains ":" or "=", which LOCAL_KERNELS cannot express.
        OSError: of writing.
    """
    root = Path(directory).absolute()
    if ":" in str(root) or "=" in str(root):
        raise ValueError(f'write_local_kernel: directory: expected a path without ":" and "=", got {str(root)!r}')
    build = root / "build" / "torch-cpu"
    build.mkdir(parents=True, exist_ok=True)
    names = ("flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache")
    lines = [f"from flash_attn import {', '.join(names)}", "", f"__all__ = {list(names)!r}", ""]
    (build / "__init__.py").write_text("\n".join(lines))
    metadata = {
        "name": "flash-attn2",
        "id": "flash_attn2_local",
        "version": 4,
        "license": "BSD-3-Clause",
        "python-depends": [],
        "backend": {"type": "cpu"},
    }
    (build / "metadata.json").write_text(json.dumps(metadata, indent=1) + "\n")
    return f"{_HUB_KERNEL}={root}"
