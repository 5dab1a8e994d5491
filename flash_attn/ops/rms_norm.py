"""Upstream import path of RMS norm: the functions of flash_attn.ops.triton.layer_norm with older arguments."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from flash_attn.ops.layer_norm import DropoutAddLayerNorm, dropout_add_norm
from flash_attn.ops.triton.layer_norm import rms_norm_fn


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """rms_norm_fn of x, (..., hidden_size), with weight, (hidden_size,), and eps=epsilon."""
    return rms_norm_fn(x, weight, None, eps=epsilon)


def dropout_add_rms_norm(
    x0: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    dropout_p: float,
    epsilon: float,
    rowscale: Tensor | None = None,
    layerscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    return_dropout_mask: bool = False,
) -> Any:
    """dropout_add_layer_norm with RMS norm; arguments, results and errors are the same."""
    return dropout_add_norm(
        x0, residual, weight, bias, dropout_p, epsilon, rowscale, layerscale, prenorm, residual_in_fp32,
        return_dropout_mask, is_rms_norm=True,
    )  # fmt: skip


class RMSNorm(nn.Module):
    """rms_norm with a weight of ones, (hidden_size,).

    Args:
        hidden_size: size of the last dimension of x.
        eps: epsilon of rms_norm.
        device, dtype: of the weight.
    """

    weight: nn.Parameter

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)

    def reset_parameters(self) -> None:
        """Set the weight to ones."""
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """rms_norm of x, (..., hidden_size)."""
        return rms_norm(x, self.weight, self.eps)


class DropoutAddRMSNorm(DropoutAddLayerNorm):
    """DropoutAddLayerNorm with RMS norm, and no bias."""

    is_rms_norm = True
