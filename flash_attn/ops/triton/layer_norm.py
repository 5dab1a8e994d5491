"""Layer norm and RMS norm of a sum of inputs, with dropout, in plain torch operations.

Ba et al., "Layer Normalization" (2016), section 3; Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019),
section 3.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flash_attn._autograd_names import autograd_name
from flash_attn._checks import as_float, describe, dropout_reasons, optional_tensor_reasons, reject


class _Inputs(NamedTuple):
    """The tensors of a call, as in layer_norm_fn."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None = None
    residual: Tensor | None = None
    x1: Tensor | None = None
    weight1: Tensor | None = None
    bias1: Tensor | None = None
    rowscale: Tensor | None = None


class _Options(NamedTuple):
    """The other arguments, as in layer_norm_fn."""

    eps: float
    dropout_p: float
    prenorm: bool
    residual_in_fp32: bool
    zero_centered_weight: bool
    is_rms_norm: bool
    return_dropout_mask: bool = False
    out_dtype: torch.dtype | None = None
    out: Tensor | None = None
    residual_out: Tensor | None = None


def layer_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    zero_centered_weight: bool = False,
    is_rms_norm: bool = False,
    return_dropout_mask: bool = False,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    residual_out: Tensor | None = None,
) -> Any:
    """Layer norm of total = dropout(rowscale * x) + dropout(x1) + residual, where absent terms are 0.

    Computed in float32 (float64 for float64 x), rounded once, differentiable in all tensors.

    Args:
        x: (..., hidden_size), floating point.
        weight, bias: (hidden_size,), floating point; bias may be None.
        residual, x1: shape of x, floating point.
        weight1, bias1: (hidden_size,): a second result, total normalised with these.
        eps: added to the variance, or to the mean square.
        dropout_p: probability in [0, 1) of dropping an element of x and x1, each with a mask of its own; the others are
            divided by 1 - dropout_p. There is no training mode: use 0 for evaluation.
        rowscale: (...), the shape of x without its last dimension: a factor of each row of x. Not together with x1.
        prenorm: also return total.
        residual_in_fp32: return total unrounded if residual is None. Otherwise it has the dtype of residual.
        zero_centered_weight: weights are 1 + weight and 1 + weight1.
        is_rms_norm: divide by the root of the mean square, and subtract no mean.
        return_dropout_mask: also return both masks.
        out_dtype: dtype of the results; None: that of x.
        out, residual_out: shape of x: tensors to write the first result and total to, and to return.

    Returns:
        The first result, (..., hidden_size), or a tuple of: the first result; with weight1 the second; with prenorm
        total, in the dtype of residual, or else of x unless residual_in_fp32; with return_dropout_mask the masks of x
        and x1, bool, True where kept, None without dropout, and that of x1 without x1.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a shape or value violates the above; lists all reasons. Nothing is computed.
    """
    inputs = _Inputs(x, weight, bias, residual, x1, weight1, bias1, rowscale)
    flags = (prenorm, residual_in_fp32, zero_centered_weight, is_rms_norm, return_dropout_mask)
    return _norm("layer_norm_fn", inputs, _Options(eps, dropout_p, *flags, out_dtype, out, residual_out))


def rms_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    zero_centered_weight: bool = False,
    return_dropout_mask: bool = False,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    residual_out: Tensor | None = None,
) -> Any:
    """layer_norm_fn with is_rms_norm=True. Arguments, results and errors are those of layer_norm_fn."""
    inputs = _Inputs(x, weight, bias, residual, x1, weight1, bias1, rowscale)
    flags = (prenorm, residual_in_fp32, zero_centered_weight, True, return_dropout_mask)
    return _norm("rms_norm_fn", inputs, _Options(eps, dropout_p, *flags, out_dtype, out, residual_out))


LayerNormFn = autograd_name("LayerNormFn", layer_norm_fn)


def layer_norm_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    zero_centered_weight: bool = False,
    dropout_mask: Tensor | None = None,
    dropout_mask1: Tensor | None = None,
    upcast: bool = False,
) -> Any:
    """layer_norm_fn with given dropout masks: dropout_mask of x and dropout_mask1 of x1, bool, True where kept.

    A mask that is None is drawn. upcast has no effect: sums are in float32 at least. The other arguments, results and
    errors are those of layer_norm_fn.
    """
    inputs = _Inputs(x, weight, bias, residual, x1, weight1, bias1, rowscale)
    options = _Options(eps, dropout_p, prenorm, False, zero_centered_weight, is_rms_norm=False)
    return _norm("layer_norm_ref", inputs, options, (dropout_mask, dropout_mask1))


def rms_norm_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    zero_centered_weight: bool = False,
    dropout_mask: Tensor | None = None,
    dropout_mask1: Tensor | None = None,
    upcast: bool = False,
) -> Any:
    """rms_norm_fn with given dropout masks, as layer_norm_ref."""
    inputs = _Inputs(x, weight, bias, residual, x1, weight1, bias1, rowscale)
    options = _Options(eps, dropout_p, prenorm, False, zero_centered_weight, is_rms_norm=True)
    return _norm("rms_norm_ref", inputs, options, (dropout_mask, dropout_mask1))


class RMSNorm(nn.Module):
    """rms_norm_fn with a weight, (hidden_size,): ones, or zeros with zero_centered_weight.

    Args:
        hidden_size: size of the last dimension of x.
        eps, zero_centered_weight: as in layer_norm_fn.
        dropout_p: as in layer_norm_fn, in training mode.
        device, dtype: of the weight.

    Raises:
        ValueError: dropout_p is not in [0, 1).
    """

    weight: nn.Parameter

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        dropout_p: float = 0.0,
        zero_centered_weight: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if reasons := dropout_reasons("dropout_p", dropout_p):
            reject(ValueError, "RMSNorm", reasons)
        self.eps = eps
        self.drop = nn.Dropout(dropout_p) if dropout_p > 0 else None
        self.zero_centered_weight = zero_centered_weight
        self.weight = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the factors of all elements to 1."""
        nn.init.constant_(self.weight, 0.0 if self.zero_centered_weight else 1.0)

    def forward(
        self, x: Tensor, residual: Tensor | None = None, prenorm: bool = False, residual_in_fp32: bool = False
    ) -> Any:
        """The result, or with prenorm (result, total): see layer_norm_fn, which has the errors, too.

        Args:
            x: (..., hidden_size).
            residual, prenorm, residual_in_fp32: as in layer_norm_fn.
        """
        return rms_norm_fn(
            x,
            self.weight,
            None,
            residual=residual,
            eps=self.eps,
            dropout_p=self.drop.p if self.drop is not None and self.training else 0.0,
            prenorm=prenorm,
            residual_in_fp32=residual_in_fp32,
            zero_centered_weight=self.zero_centered_weight,
        )


def _norm(
    function: str, inputs: _Inputs, options: _Options, masks: tuple[Tensor | None, Tensor | None] = (None, None)
) -> Any:
    """What layer_norm_fn returns. masks: dropout masks that are not drawn."""
    options = _check(function, inputs, options)
    x, residual = inputs.x, inputs.residual
    masks = _draw_masks(inputs, options.dropout_p, masks)
    total = _sum(inputs, options.dropout_p, masks)
    results = [_normalise(total, inputs.weight, inputs.bias, options).to(options.out_dtype or x.dtype)]
    if inputs.weight1 is not None:
        second = _normalise(total, inputs.weight1, inputs.bias1, options)
        results.append(second.to(options.out_dtype or x.dtype))
    if options.out is not None:
        if options.prenorm and options.out.untyped_storage().data_ptr() == total.untyped_storage().data_ptr():
            total = total.clone()  # x itself: it is returned as it was
        results[0] = options.out.copy_(results[0])
    if options.residual_out is not None:
        total = options.residual_out.copy_(total)
    elif residual is not None:
        total = total.to(residual.dtype)
    else:
        total = total if options.residual_in_fp32 else total.to(x.dtype)
    returned: list[Tensor | None] = [*results, total] if options.prenorm else [*results]
    if options.return_dropout_mask:
        returned += masks
    return tuple(returned) if len(returned) > 1 else returned[0]


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _draw_masks(
    inputs: _Inputs, dropout_p: float, given: tuple[Tensor | None, Tensor | None]
) -> tuple[Tensor | None, Tensor | None]:
    """The given masks, or new ones where an input needs one."""
    masks: list[Tensor | None] = [None, None]
    for i, x in enumerate((inputs.x, inputs.x1)):
        if x is not None and dropout_p > 0:
            masks[i] = torch.rand_like(x, dtype=torch.float32) >= dropout_p if given[i] is None else given[i]
    return masks[0], masks[1]


def _sum(inputs: _Inputs, dropout_p: float, masks: tuple[Tensor | None, Tensor | None]) -> Tensor:
    """total of layer_norm_fn, before it is rounded."""
    dtype = _compute_dtype(inputs.x)
    total = inputs.x.to(dtype)
    if inputs.rowscale is not None:
        total = total * inputs.rowscale.to(dtype)[..., None]
    if masks[0] is not None:
        total = _drop(total, masks[0], dropout_p)
    if inputs.x1 is not None:
        x1 = inputs.x1.to(dtype)
        total = total + (x1 if masks[1] is None else _drop(x1, masks[1], dropout_p))
    return total if inputs.residual is None else total + inputs.residual.to(dtype)


def _drop(x: Tensor, mask: Tensor, dropout_p: float) -> Tensor:
    return x.masked_fill(~mask, 0) / (1 - dropout_p)


def _normalise(total: Tensor, weight: Tensor, bias: Tensor | None, options: _Options) -> Tensor:
    weight = weight.to(total.dtype) + 1 if options.zero_centered_weight else weight.to(total.dtype)
    bias = None if bias is None else bias.to(total.dtype)
    if not options.is_rms_norm:
        return F.layer_norm(total, weight.shape, weight, bias, options.eps)
    result = F.rms_norm(total, weight.shape, weight, options.eps)
    return result if bias is None else result + bias


def _check(function: str, inputs: _Inputs, options: _Options) -> _Options:
    """The options with plain numbers; raises TypeError or ValueError."""
    x, weight = inputs.x, inputs.weight
    named = {"x": x, "weight": weight}
    reasons = [
        f"{name}: expected torch.Tensor, got {describe(value)}"
        for name, value in named.items()
        if not isinstance(value, Tensor)
    ]
    optional = {**inputs._asdict(), "out": options.out, "residual_out": options.residual_out}
    reasons += optional_tensor_reasons({name: value for name, value in optional.items() if name not in named})
    eps, dropout_p = as_float(options.eps), as_float(options.dropout_p)
    if eps is None:
        reasons.append(f"eps: expected float, got {describe(options.eps)}")
    if dropout_p is None:
        reasons.append(f"dropout_p: expected float, got {describe(options.dropout_p)}")
    if not reasons:
        tensors = {name: value for name, value in inputs._asdict().items() if value is not None}
        wrong = {name: value.dtype for name, value in tensors.items() if not value.is_floating_point()}
        reasons = [f"{name}: expected a floating dtype, got {dtype}" for name, dtype in wrong.items()]
    if reasons:
        reject(TypeError, function, reasons)
    reasons = dropout_reasons("dropout_p", dropout_p)
    if x.dim() == 0:
        reject(ValueError, function, ["x: expected shape (..., hidden_size), got ()", *reasons])
    columns, rows = x.shape[-1:], x.shape[:-1]
    shapes = {"weight": columns, "bias": columns, "weight1": columns, "bias1": columns, "rowscale": rows}
    for name, value in optional.items():
        expected = shapes.get(name, x.shape)
        if value is not None and value.shape != expected:
            reasons.append(f"{name}: expected shape {tuple(expected)} for x {tuple(x.shape)}, got {tuple(value.shape)}")
    if inputs.x1 is not None and inputs.rowscale is not None:
        reasons.append(f"rowscale: expected None together with x1, got {describe(inputs.rowscale)}")
    if inputs.bias1 is not None and inputs.weight1 is None:
        reasons.append(f"bias1: expected None without weight1, got {describe(inputs.bias1)}")
    if reasons:
        reject(ValueError, function, reasons)
    return options._replace(eps=eps, dropout_p=dropout_p)
