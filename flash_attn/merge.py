"""merge_attention_states(): joins the results of attention to two parts of the keys."""

from __future__ import annotations

import torch
from torch import Tensor

from flash_attn import _checks

_FUNCTION = "merge_attention_states"


def merge_attention_states(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Attention to the keys a and b together, from attention to each of them: Dao et al., "Flash-Decoding" (2023).

    The weights of a part are scaled by its share of the softmax denominator,

        lse = log(exp(lse_a) + exp(lse_b)),    out = exp(lse_a - lse) * out_a + exp(lse_b - lse) * out_b.

    Differentiable in all arguments, any number of times. Ask for the parts with return_attn_probs=True, which returns
    softmax_lse, and with out_dtype=torch.float32, so that they are not rounded; q_start and k_start say where the keys
    of a part are. With dropout, all parts must have been computed with the same state of the generator.

    Args:
        out_a, out_b: (batch_size, seqlen_q, num_heads, head_dim_v) or, packed, (total_q, num_heads, head_dim_v); any
            floating dtype.
        lse_a, lse_b: softmax_lse: (batch_size, num_heads, seqlen_q) or, packed, (num_heads, total_q); natural
            logarithms. A row with -inf has seen no key: the result is the other part's, bit for bit.

    Returns:
        out and lse in float32 (float64 if an argument is), shaped like the arguments. A row without keys in both parts
        has out = 0 and lse = -inf.

    Raises:
        TypeError: an argument is not a floating-point tensor.
        ValueError: shapes or devices differ.
    """
    _check(out_a, lse_a, out_b, lse_b)
    is_double = torch.float64 in (out_a.dtype, lse_a.dtype, out_b.dtype, lse_b.dtype)
    dtype = torch.float64 if is_double else torch.float32
    out_a, lse_a, out_b, lse_b = (x.to(dtype) for x in (out_a, lse_a, out_b, lse_b))
    a_is_empty, b_is_empty = lse_a == -torch.inf, lse_b == -torch.inf
    one_is_empty = a_is_empty | b_is_empty
    # Only finite numbers enter the formula: gradients are finite too.
    finite_a, finite_b = lse_a.masked_fill(one_is_empty, 0), lse_b.masked_fill(one_is_empty, 0)
    share_a = _per_row(torch.sigmoid(finite_a - finite_b))
    share_b = _per_row(torch.sigmoid(finite_b - finite_a))
    only_a, only_b = _per_row(b_is_empty), _per_row(a_is_empty)
    both = share_a * out_a.masked_fill(only_b, 0) + share_b * out_b.masked_fill(only_a, 0)
    out = torch.where(only_a, out_a, torch.where(only_b, out_b, both))
    lse = torch.where(b_is_empty, lse_a, torch.where(a_is_empty, lse_b, torch.logaddexp(finite_a, finite_b)))
    return out.masked_fill(only_a & only_b, 0), lse


def _per_row(lse: Tensor) -> Tensor:
    """(batch_size, num_heads, seqlen_q) as (batch_size, seqlen_q, num_heads, 1); packed likewise."""
    return lse.transpose(-1, -2).unsqueeze(-1)


def _check(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> None:
    given = {"out_a": out_a, "lse_a": lse_a, "out_b": out_b, "lse_b": lse_b}
    wrong = [name for name, x in given.items() if not (isinstance(x, Tensor) and x.is_floating_point())]
    if wrong:
        expected = "a floating-point torch.Tensor"
        reasons = [f"{name}: expected {expected}, got {_checks.describe(given[name])}" for name in wrong]
        _checks.reject(TypeError, _FUNCTION, reasons)
    if out_a.dim() not in (3, 4):
        expected = "shape (batch_size, seqlen_q, num_heads, head_dim_v) or (total_q, num_heads, head_dim_v)"
        _checks.reject(ValueError, _FUNCTION, [f"out_a: expected {expected}, got {tuple(out_a.shape)}"])
    *batch, rows, heads, _ = out_a.shape
    shapes = {"lse_a": (*batch, heads, rows), "out_b": tuple(out_a.shape), "lse_b": (*batch, heads, rows)}
    reasons = []
    for name, shape in shapes.items():
        if tuple(given[name].shape) != shape:
            reasons.append(f"{name}: expected shape {shape} to match out_a, got {tuple(given[name].shape)}")
        if given[name].device != out_a.device:
            reasons.append(f"{name}: expected device {out_a.device} like out_a, got {given[name].device}")
    if reasons:
        _checks.reject(ValueError, _FUNCTION, reasons)
