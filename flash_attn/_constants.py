"""Tensors that follow from plain numbers: where they may be kept, and ALiBi's slopes.

They are no buffers. Whoever builds a model without memory and fills it later (transformers' from_pretrained, to_empty)
fills buffers that are not in the checkpoint with anything, and whoever casts a model casts them. Numbers survive both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flash_attn._checks import describe, reject


def may_keep() -> bool:
    """Whether a tensor that is made now is a plain one, to be used again in later calls.

    Compilers, transforms of torch.func, FakeTensorMode and other modes make tensors that mean nothing outside of them;
    and what selective checkpointing sees in the forward pass it wants to see again when it recomputes.
    """
    if torch.compiler.is_compiling():
        return False
    return (
        torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.maybe_current_level() is None
        and not torch.jit.is_tracing()
    )


def is_plain(x: Tensor) -> bool:
    """Whether a tensor that was kept serves any call: it belongs to no tracer, and autograd may save it."""
    return type(x) is Tensor and not torch._C._functorch.is_functorch_wrapped_tensor(x) and not x.is_inference()


class Slopes:
    """Slopes of ALiBi, float32, by their numbers.

    Args:
        owner: the class that has been given them, for messages.
        value: (num_heads,) or (batch_size, num_heads), a tensor or a sequence of numbers; copied.

    Raises:
        ValueError: a tensor that requires grad.
    """

    def __init__(self, owner: str, value: Tensor | Sequence[Any]) -> None:
        self.owner = owner
        self.numbers: Any = None  # of a tensor on the meta device there are none
        if isinstance(value, Tensor) and value.requires_grad:
            expected = "slopes that do not require grad, for they get no gradient (pass alibi_slopes.detach())"
            reject(ValueError, owner, [f"alibi_slopes: expected {expected}, got requires_grad=True"])
        self.shape = tuple(value.shape) if isinstance(value, Tensor) else (len(value),)
        if not (isinstance(value, Tensor) and value.is_meta):
            self.numbers = value.tolist() if isinstance(value, Tensor) else [float(x) for x in value]
        self._kept: Tensor | None = None

    def copy(self) -> Tensor:
        """The slopes on the device where they were last used, else the CPU; without values if they have none."""
        device = "meta" if self.numbers is None else "cpu" if self._kept is None else self._kept.device
        return self._make(device)

    def on(self, device: torch.device | str) -> Tensor:
        """The slopes as a tensor on the device."""
        if not may_keep():
            return self._make(device)
        kept = self._kept
        if kept is None or kept.device != torch.device(device):
            with torch.inference_mode(False):
                kept = self._make(device)
            self._kept = kept
        return kept

    def _make(self, device: torch.device | str) -> Tensor:
        if self.numbers is not None:
            return torch.tensor(self.numbers, dtype=torch.float32, device=device)
        if torch.device(device).type != "meta":
            expected = "numbers (assign module.alibi_slopes anew, or build the module from a list of numbers)"
            reject(ValueError, self.owner, [f"alibi_slopes: expected {expected}, got a tensor of the meta device"])
        return torch.empty(self.shape, dtype=torch.float32, device=device)

    def __repr__(self) -> str:
        return f"Slopes({describe(self.numbers)})"
