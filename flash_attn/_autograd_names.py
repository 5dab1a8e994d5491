"""The public functions under the names of the autograd classes that flash_attn 2.8.3 has behind them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch


class AutogradName:
    """A function with ``apply``, which takes all of its arguments by position.

    After them may come is_grad_enabled: whether anything is kept for a backward pass.
    """

    function: Callable[..., Any]

    @classmethod
    def apply(cls, *args: Any) -> Any:
        """Call the function."""
        names = list(inspect.signature(cls.function).parameters)
        arguments = dict(zip([*names, "is_grad_enabled"], args, strict=False))
        is_grad_enabled = arguments.pop("is_grad_enabled", True)
        with torch.set_grad_enabled(is_grad_enabled and torch.is_grad_enabled()):
            return cls.function(**arguments)


def autograd_name(name: str, function: Callable[..., Any]) -> type[AutogradName]:
    """A class of that name for the function."""
    return type(name, (AutogradName,), {"function": staticmethod(function), "__doc__": f"{function.__name__}."})
