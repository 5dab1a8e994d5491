"""Upstream import path of layer norm: the functions of flash_attn.ops.triton.layer_norm with older arguments."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from flash_attn._checks import dropout_reasons, reject
from flash_attn.ops.triton.layer_norm import layer_norm_fn


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float) -> Tensor:
    """layer_norm_fn of x, (..., hidden_size), with weight and bias, (hidden_size,), and eps=epsilon."""
    return layer_norm_fn(x, weight, bias, eps=epsilon)


def dropout_add_layer_norm(
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
    """layer_norm_fn of x0 with another order of arguments, and one dropout mask.

    Args:
        x0: (..., hidden_size): x of layer_norm_fn.
        epsilon: eps of layer_norm_fn.
        layerscale: (hidden_size,): a factor of each column of x0; the product has the dtype of x0. Touvron et al.,
            "Going Deeper with Image Transformers" (2021), section 2.
        The other arguments: as in layer_norm_fn.

    Returns:
        The result, or a tuple of: the result; with prenorm total; with return_dropout_mask the mask of x0, bool, True
        where kept, all True without dropout.

    Raises:
        TypeError, ValueError: as layer_norm_fn.
    """
    return dropout_add_norm(
        x0, residual, weight, bias, dropout_p, epsilon, rowscale, layerscale, prenorm, residual_in_fp32,
        return_dropout_mask, is_rms_norm=False,
    )  # fmt: skip


def dropout_add_norm(
    x0: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    dropout_p: float,
    epsilon: float,
    rowscale: Tensor | None,
    layerscale: Tensor | None,
    prenorm: bool,
    residual_in_fp32: bool,
    return_dropout_mask: bool,
    is_rms_norm: bool,
) -> Any:
    """dropout_add_layer_norm, or with is_rms_norm dropout_add_rms_norm, which have the same arguments."""
    results = layer_norm_fn(
        x0 if layerscale is None else (x0 * layerscale).to(x0.dtype),
        weight,
        bias,
        residual=residual,
        eps=epsilon,
        dropout_p=dropout_p,
        rowscale=rowscale,
        prenorm=prenorm,
        residual_in_fp32=residual_in_fp32,
        is_rms_norm=is_rms_norm,
        return_dropout_mask=return_dropout_mask,
    )
    if not return_dropout_mask:
        return results
    *results, mask, _ = results
    return *results, torch.ones_like(x0, dtype=torch.bool) if mask is None else mask


class DropoutAddLayerNorm(nn.Module):
    """dropout_add_layer_norm with a weight of ones and a bias of zeros, (hidden_size,).

    Args:
        hidden_size: size of the last dimension of x0.
        p: dropout_p in training mode.
        prenorm, residual_in_fp32: as in layer_norm_fn.
        eps: epsilon.
        device, dtype: of weight and bias.

    Raises:
        ValueError: p is not in [0, 1).
    """

    is_rms_norm = False
    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        hidden_size: int,
        prenorm: bool = False,
        p: float = 0.0,
        eps: float = 1e-5,
        residual_in_fp32: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if reasons := dropout_reasons("p", p):
            reject(ValueError, type(self).__name__, reasons)
        self.prenorm = prenorm
        self.p = p
        self.eps = eps
        self.residual_in_fp32 = residual_in_fp32
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        bias = None if self.is_rms_norm else nn.Parameter(torch.zeros(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", bias)

    def reset_parameters(self) -> None:
        """Set the weight to ones and the bias to zeros."""
        nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x0: Tensor, residual: Tensor | None = None) -> Any:
        """The result, or with prenorm (result, total), for x0 and residual, (..., hidden_size)."""
        return dropout_add_norm(
            x0,
            residual,
            self.weight,
            self.bias,
            self.p if self.training else 0.0,
            self.eps,
            None,
            None,
            self.prenorm,
            self.residual_in_fp32,
            return_dropout_mask=False,
            is_rms_norm=self.is_rms_norm,
        )
