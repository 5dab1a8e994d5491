"""Tensors that are computed on the host, and kept where they are used."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor


class HostTensors:
    """Copies on devices of what a function returns, a tensor on the CPU. The host does not wait for a GPU.

    A copy is made on the stream that needs it first. Others wait for it, but not while a CUDA graph is captured: what a
    graph reads has been copied in the warm-up before.
    """

    def __init__(self, make: Callable[..., Tensor], maxsize: int):
        self._make = make
        self._copy = lru_cache(maxsize)(self._make_copy)

    def _make_copy(self, device: torch.device, *key: Hashable) -> tuple[Tensor, torch.cuda.Stream | None, Any]:
        x = self._make(*key)
        if device.type != "cuda":
            return x.to(device), None, None
        copy = x.pin_memory().to(device, non_blocking=True)  # not pinned, the host would wait
        stream = torch.cuda.current_stream(device)
        return copy, stream, stream.record_event()

    def __call__(self, like: Tensor, *key: Hashable) -> Tensor:
        """The tensor of make(*key), on the device of `like`."""
        x, stream, copied = self._copy(like.device, *key)
        if stream is None:
            return x
        current = torch.cuda.current_stream(like.device)
        if current != stream and not torch.cuda.is_current_stream_capturing():
            current.wait_event(copied)
            x.record_stream(current)
        return x
