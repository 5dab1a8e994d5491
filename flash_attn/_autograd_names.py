"""The public functions under the names of the autograd.Function classes of flash_attn 2.8.3."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch


class AutogradName:
    """A function with ``apply``, which takes all of its arguments by position.

    An extra argument, is_grad_enabled, may follow: whether to record the call for a backward pass.
    """

    function: Callable[..., Any]

    @classmethod
    def apply(cls, *args: Any) -> Any:
        """Call the function."""
        parameters = inspect.signature(cls.function).parameters.values()
        names = [each.name for each in parameters if each.kind is not inspect.Parameter.KEYWORD_ONLY]
        arguments = dict(zip([*names, "is_grad_enabled"], args, strict=False))
        is_grad_enabled = arguments.pop("is_grad_enabled", True)
        with torch.set_grad_enabled(is_grad_enabled and torch.is_grad_enabled()):
            return cls.function(**arguments)


def autograd_name(name: str, function: Callable[..., Any]) -> type[AutogradName]:
    """A class of that name whose apply calls the function."""
    return type(name, (AutogradName,), {"function": staticmethod(function), "__doc__": f"{function.__name__}."})
