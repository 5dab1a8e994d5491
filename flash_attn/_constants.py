"""Constant tensors derived from Python numbers: when they may be cached, and the ALiBi slopes.

They are not buffers. Non-persistent buffers are left uninitialised when a model is built on the meta device and
materialised later (transformers' from_pretrained, to_empty), and casting a model casts them. Python numbers survive.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flash_attn._checks import describe, reject


def may_cache() -> bool:
    """Whether a tensor created now is a plain one that may be cached for later calls.

    Under compilers, torch.func transforms, FakeTensorMode and other dispatch modes, tensors are valid only inside; and
    selective activation checkpointing must see the same ops in the forward pass and in the recomputation.
    """
    if torch.compiler.is_compiling():
        return False
    return (
        torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.maybe_current_level() is None
        and not torch.jit.is_tracing()
    )


def is_plain(x: Tensor) -> bool:
    """Whether a cached tensor is valid in any call: no tracer's tensor, and autograd can save it."""
    return type(x) is Tensor and not torch._C._functorch.is_functorch_wrapped_tensor(x) and not x.is_inference()


class Slopes:
    """ALiBi slopes, float32, stored as Python numbers.

    Args:
        owner: name of the class that holds them, for error messages.
        value: (num_heads,) or (batch_size, num_heads), a tensor or a sequence of numbers; copied.

    Raises:
        ValueError: value is a tensor that requires grad.
    """

    def __init__(self, owner: str, value: Tensor | Sequence[Any]) -> None:
        self.owner = owner
        self.numbers: Any = None  # None for a tensor on the meta device
        if isinstance(value, Tensor) and value.requires_grad:
            expected = "slopes that do not require grad, for they get no gradient (pass alibi_slopes.detach())"
            reject(ValueError, owner, [f"alibi_slopes: expected {expected}, got requires_grad=True"])
        self.shape = tuple(value.shape) if isinstance(value, Tensor) else (len(value),)
        if not (isinstance(value, Tensor) and value.is_meta):
            self.numbers = value.tolist() if isinstance(value, Tensor) else [float(x) for x in value]
        self._cached: Tensor | None = None

    def copy(self) -> Tensor:
        """A copy of the slopes, on the device of the cached tensor or the CPU; a meta tensor if they have no values."""
        device = "meta" if self.numbers is None else "cpu" if self._cached is None else self._cached.device
        return self._make(device)

    def on(self, device: torch.device | str) -> Tensor:
        """The slopes as a tensor on the device, cached where possible."""
        if not may_cache():
            return self._make(device)
        cached = self._cached
        if cached is None or cached.device != torch.device(device):
            with torch.inference_mode(False):
                cached = self._make(device)
            self._cached = cached
        return cached

    def _make(self, device: torch.device | str) -> Tensor:
        if self.numbers is not None:
            return torch.tensor(self.numbers, dtype=torch.float32, device=device)
        if torch.device(device).type != "meta":
            expected = "numbers (assign module.alibi_slopes anew, or build the module from a list of numbers)"
            reject(ValueError, self.owner, [f"alibi_slopes: expected {expected}, got a tensor of the meta device"])
        return torch.empty(self.shape, dtype=torch.float32, device=device)

    def __repr__(self) -> str:
        return f"Slopes({describe(self.numbers)})"
