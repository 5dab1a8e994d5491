"""Type checks and conversions of the Python layer. The operators check everything else.

Only calls with unusual types (numpy scalars, 0-dim tensors, lists for tuples, ...) get here: the fast paths of
csrc/ops/eager_call.h handle calls with plain Python types.
"""

from __future__ import annotations

import numbers
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor


def describe(value: object) -> str:
    """A value as text for error messages."""
    if isinstance(value, Tensor):
        return f"Tensor of shape {tuple(value.shape)} and dtype {value.dtype}"
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


def is_dtensor(x: Any) -> bool:
    """Whether x is a torch.distributed.tensor.DTensor. That module need not be loaded."""
    return type(x).__name__ == "DTensor" and hasattr(x, "device_mesh")


# The remedy for a nested tensor passed to a module.
PAD_IT = "pad it, torch.nested.to_padded_tensor does, and say with key_padding_mask which tokens to keep"


def is_dense(x: Tensor) -> bool:
    """Whether a tensor is strided and not nested."""
    return not x.is_nested and x.layout is torch.strided


def dense_reasons(tensors: dict[str, Tensor], remedy: str) -> list[str]:
    """One reason, with the remedy, for each tensor that is nested or not strided."""
    strange = {name: x for name, x in tensors.items() if not is_dense(x)}
    kinds = {name: "nested tensor" if x.is_nested else f"tensor of layout {x.layout}" for name, x in strange.items()}
    return [f"{name}: expected a dense tensor ({remedy}), got a {kind}" for name, kind in kinds.items()]


def optional_tensor_reasons(tensors: dict[str, Any]) -> list[str]:
    """One reason for each argument that is neither a tensor nor None."""
    return [
        f"{name}: expected torch.Tensor or None, got {describe(value)}"
        for name, value in tensors.items()
        if not (value is None or isinstance(value, Tensor))
    ]


def reject(error: type[Exception], function: str, reasons: Sequence[str]) -> NoReturn:
    """Raise one error with all reasons, each formatted ``<argument>: expected <what>, got <what>``."""
    if len(reasons) == 1:
        raise error(f"{function}: {reasons[0]}")
    raise error("\n  - ".join([f"{function}: {len(reasons)} problems:", *reasons]))


def as_int(value: Any) -> Any:
    """Convert an int, SymInt, numpy integer or 0-dim integer tensor to int (or SymInt); None for anything else."""
    if isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool):
        return value
    if isinstance(value, Tensor):
        is_integer = not (value.is_floating_point() or value.is_complex() or value.dtype is torch.bool)
        return value.item() if value.dim() == 0 and is_integer else None
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None


def integers(function: str, **values: Any) -> list[int]:
    """Convert int arguments (also numpy integers or 0-dim tensors) to ints.

    Raises:
            TypeError: an argument is not an integer; the error names all of them.
    """
    converted = {name: as_int(value) for name, value in values.items()}
    wrong = [name for name, value in converted.items() if value is None]
    if wrong:
        reject(TypeError, function, [f"{name}: expected int, got {describe(values[name])}" for name in wrong])
    return list(converted.values())


def _as_item(value: Any) -> Any:
    """The number in a 0-dim tensor or numpy array; other values, and tensors that require grad, are returned as is."""
    if isinstance(value, Tensor):
        return value.item() if value.dim() == 0 and not value.requires_grad else value
    is_array = type(value).__module__ == "numpy" and getattr(value, "shape", None) == ()
    return value.item() if is_array else value


def as_float(value: Any) -> Any:
    """Convert a real number to float (or SymFloat); None for anything else, such as a tensor that requires grad."""
    value = _as_item(value)
    if isinstance(value, (bool, torch.SymFloat)):
        return None if isinstance(value, bool) else value
    return float(value) if isinstance(value, numbers.Real) else None


def as_bool(value: Any) -> Any:
    """Convert a bool, 0 or 1 (also numpy or a 0-dim tensor) to bool; None for anything else."""
    value = _as_item(value)
    if isinstance(value, bool):
        return value
    return bool(value) if isinstance(value, int) and value in (0, 1) else None


class Scalars(NamedTuple):
    """The non-tensor arguments of an attention call."""

    max_seqlen_q: int
    max_seqlen_k: int
    dropout_p: float
    softmax_scale: float | None
    causal: bool
    window_size: tuple[int, int]
    softcap: float


def convert_window(window_size: Any) -> tuple[int, int] | None:
    """Convert a sequence of two integers to a tuple of ints; None for anything else."""
    try:
        left, right = as_int(window_size[0]), as_int(window_size[1])
        is_pair = len(window_size) == 2
    except (TypeError, LookupError):
        return None
    return (left, right) if is_pair and left is not None and right is not None else None


def convert_arguments(
    function: str,
    tensors: dict[str, Any],
    optional_tensors: dict[str, Any],
    scalars: Scalars,
    max_seqlen_names: Sequence[str],
) -> Scalars:
    """Convert the scalars to plain Python numbers.

    Raises:
            TypeError: an argument has the wrong type; the error names all of them.
    """
    reasons = []
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            reasons.append(f"{name}: expected torch.Tensor, got {describe(value)}")
    given = {name: value for name, value in tensors.items() if isinstance(value, Tensor)}
    reasons += dense_reasons(given, "pack sequences of different lengths and call flash_attn_varlen_func")
    reasons += optional_tensor_reasons(optional_tensors)

    def convert(name: str, value: Any, converted: Any, expected: str) -> Any:
        if converted is None:
            reasons.append(f"{name}: expected {expected}, got {describe(value)}")
        return converted

    max_seqlens = [scalars.max_seqlen_q, scalars.max_seqlen_k]
    for i, name in enumerate(max_seqlen_names):
        max_seqlens[i] = convert(name, max_seqlens[i], as_int(max_seqlens[i]), "int or 0-dim integer tensor")
    if len(max_seqlen_names) == 1:
        max_seqlens[1] = max_seqlens[0]
    dropout_p = convert("dropout_p", scalars.dropout_p, as_float(scalars.dropout_p), "float")
    scale = scalars.softmax_scale
    if scale is not None:
        scale = convert("softmax_scale", scale, as_float(scale), "float or None (a learned scale belongs into q)")
    causal = convert("causal", scalars.causal, as_bool(scalars.causal), "bool")
    window = convert("window_size", scalars.window_size, convert_window(scalars.window_size), "two ints (left, right)")
    softcap = convert("softcap", scalars.softcap, as_float(scalars.softcap), "float")
    if reasons:
        reject(TypeError, function, reasons)
    return Scalars(max_seqlens[0], max_seqlens[1], dropout_p, scale, causal, window, softcap)


def check_padding_mask(
    function: str, mask: Any, batch_size: int, seqlen: int, argument: str = "key_padding_mask"
) -> Tensor:
    """Convert a padding mask (batch_size, seqlen), bool or integer, to bool: True for the tokens to keep.

    Raises:
        TypeError: not a tensor, or of a floating dtype (such as an additive mask).
        ValueError: wrong shape.
    """
    if not isinstance(mask, Tensor):
        reject(TypeError, function, [f"{argument}: expected a bool torch.Tensor, got {describe(mask)}"])
    if mask.is_floating_point() or mask.is_complex():
        reject(TypeError, function, [f"{argument}: expected dtype torch.bool (True = keep), got {mask.dtype}"])
    if mask.shape != (batch_size, seqlen):
        expected = f"shape (batch_size={batch_size}, seqlen={seqlen})"
        reject(ValueError, function, [f"{argument}: expected {expected}, got {tuple(mask.shape)}"])
    return mask if mask.dtype is torch.bool else mask != 0


def dropout_reasons(argument: str, value: float) -> list[str]:
    """The reason to reject a dropout probability. For modules: the operators would only check it in training."""
    return [] if 0 <= value < 1 else [f"{argument}: expected a probability in [0, 1), got {value}"]
