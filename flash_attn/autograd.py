"""The path from the public functions to the attention operators, for all layouts, dense and packed.

The operators themselves are differentiable (csrc/ops/autograd.cpp).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flash_attn import _checks, _library

_eager_call = _library.function("attention")
_fwd = _library.op("fwd")
_attn_probs = _library.op("attn_probs")
_attention = _library.op("_attention")
# Calls that flash_attn 2.8.3 supports use the ops with its names: other programs look for them.
_dense_forward = _library.op("_flash_attn_forward")
_dense_backward = _library.op("_flash_attn_backward")
_varlen_forward = _library.op("_flash_attn_varlen_forward")
_varlen_backward = _library.op("_flash_attn_varlen_backward")

# Layouts of the inputs: the names of the tensor arguments.
SEPARATE = "q, k, v"
KV_PACKED = "q, kv"
QKV_PACKED = "qkv"

_AUTOCAST_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Sequences(NamedTuple):
    """The sequences of a packed call. The fields are arguments of the operators."""

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: Any
    max_seqlen_k: Any
    block_table: Tensor | None = None
    seqused_k: Tensor | None = None


def split_layout(layout: str, tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v as views of the tensors in the given layout."""
    if layout == SEPARATE:
        q, k, v = tensors
    elif layout == KV_PACKED:
        q, kv = tensors
        k, v = kv.unbind(-3)
    else:
        q, k, v = tensors[0].unbind(-3)
    return q, k, v


def default_scale(q: Tensor) -> float:
    """head_dim ** -0.5; 1.0 for tensors without a head_dim, which the ops reject."""
    try:
        return q.shape[-1] ** -0.5
    except (IndexError, ZeroDivisionError):
        return 1.0


def cast_for_autocast(inputs: Sequence[Tensor], device_type: str) -> tuple[Tensor, ...]:
    """Cast the inputs to the dtype of the autocast region; float64 and integers are not cast."""
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(x.to(dtype) if x.dtype in _AUTOCAST_DTYPES else x for x in inputs)


def _check_packing(function: str, layout: str, inputs: Sequence[Tensor], is_varlen: bool) -> None:
    name, packed = layout.split(", ")[-1], inputs[-1]
    if packed.dim() == (4 if is_varlen else 5) and packed.shape[-3] == len(name):
        return
    shape = f"({'total_k' if is_varlen else 'batch_size, seqlen_k'}, {len(name)}, num_heads_k, head_dim)"
    if layout == QKV_PACKED:
        shape = shape.replace("_k", "")
    _checks.reject(ValueError, function, [f"{name}: expected shape {shape}, got {tuple(packed.shape)}"])


def convert_arguments(
    function: str,
    layout: str,
    inputs: Sequence[Any],
    sequences: Sequences | None,
    alibi_slopes: Any,
    *numbers: Any,
) -> tuple[Any, ...]:
    """Convert sequences and numbers to plain Python types; raises TypeError."""
    max_seqlens: tuple[Any, Any] = (0, 0) if sequences is None else (sequences.max_seqlen_q, sequences.max_seqlen_k)
    tensors = dict(zip(layout.split(", "), inputs, strict=True))
    optional_tensors = {"alibi_slopes": alibi_slopes}
    max_seqlen_names: tuple[str, ...] = ()
    if sequences is not None and layout == QKV_PACKED:
        tensors["cu_seqlens"] = sequences.cu_seqlens_q
        max_seqlen_names = ("max_seqlen",)
    elif sequences is not None:
        tensors.update(cu_seqlens_q=sequences.cu_seqlens_q, cu_seqlens_k=sequences.cu_seqlens_k)
        optional_tensors["block_table"] = sequences.block_table
        max_seqlen_names = ("max_seqlen_q", "max_seqlen_k")
    scalars = _checks.Scalars(*max_seqlens, *numbers)
    max_seqlen_q, max_seqlen_k, *rest = _checks.convert_arguments(
        function, tensors, optional_tensors, scalars, max_seqlen_names
    )
    if sequences is not None:
        sequences = sequences._replace(max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k)
    return sequences, *rest


class Extensions(NamedTuple):
    """The arguments that flash_attn 2.8.3 does not have, as in flash_attn_func."""

    attention_chunk: Any
    q_start: Any
    k_start: Any
    out_dtype: Any
    s_aux: Any
    key_ranges: Any
    return_max_logits: Any


def extended_options(function: str, dtype: torch.dtype, given: Extensions) -> dict[str, Any]:
    """The given options as arguments of the operators, without those at their defaults.

    Args:
        dtype: of the inputs.

    Raises:
        TypeError: an argument has the wrong type; the error names all of them.
        ValueError: out_dtype is not one that results can have.
    """
    tensors = {"s_aux": given.s_aux, "key_ranges": given.key_ranges}
    options: dict[str, Any] = {name: value for name, value in tensors.items() if value is not None}
    numbers = {"attention_chunk": given.attention_chunk, "q_start": given.q_start, "k_start": given.k_start}
    for name in ("q_start", "k_start"):
        if isinstance(numbers[name], Tensor) and numbers[name].dim() == 1:
            options[f"{name}s"] = numbers.pop(name)
        elif numbers[name] is None:
            del numbers[name]
    values = {name: _checks.as_int(value) for name, value in numbers.items()}
    expected_of = {name: "int" if name == "attention_chunk" else "int or int32 Tensor (batch_size,)" for name in values}
    reasons = [
        f"{name}: expected {expected}, got {_checks.describe(numbers[name])}"
        for name, expected in expected_of.items()
        if values[name] is None
    ]
    reasons += _checks.optional_tensor_reasons(tensors)
    wants_max_logits = _checks.as_bool(given.return_max_logits)
    if wants_max_logits is None:
        reasons.append(f"return_max_logits: expected bool, got {_checks.describe(given.return_max_logits)}")
    if reasons:
        _checks.reject(TypeError, function, reasons)
    options |= {name: value for name, value in values.items() if name != "attention_chunk" or value != 0}
    options |= {"return_max_logits": True} if wants_max_logits else {}
    full = torch.float64 if dtype is torch.float64 else torch.float32
    if given.out_dtype not in (None, dtype, full):
        expected = f"{' or '.join(dict.fromkeys((str(dtype), str(full))))} for inputs of {dtype}"
        _checks.reject(ValueError, function, [f"out_dtype: expected {expected}, got {given.out_dtype}"])
    return options | ({"float_results": True} if given.out_dtype not in (None, dtype) else {})


def _needs_grad(function: str, inputs: tuple[Tensor, ...], alibi_slopes: Tensor | None, s_aux: Tensor | None) -> bool:
    if not torch.is_grad_enabled():
        return False
    if alibi_slopes is not None and alibi_slopes.requires_grad:
        expected = "a tensor that does not require grad, since slopes get no gradient (pass alibi_slopes.detach())"
        _checks.reject(ValueError, function, [f"alibi_slopes: expected {expected}, got requires_grad=True"])
    return any(x.requires_grad for x in inputs) or (s_aux is not None and s_aux.requires_grad)


def _gather_pages(inputs: tuple[Tensor, ...], sequences: Sequences) -> tuple[tuple[Tensor, ...], Sequences]:
    """Gather paged keys and values into packed ones, by differentiable indexing; returns (inputs, sequences).

    Every sequence gets all rows of its pages; seqused_k says how many of them are valid.
    """
    cu_seqlens_q, cu_seqlens_k, block_table = sequences.cu_seqlens_q, sequences.cu_seqlens_k, sequences.block_table
    if block_table is None:
        return inputs, sequences
    q, k, v = inputs
    with torch.no_grad():
        # Validates the arguments, including the block table, without any computation: all sequences of q are empty.
        empty = sequences._replace(cu_seqlens_q=torch.zeros_like(cu_seqlens_q), max_seqlen_q=0)
        _fwd(q, k, v, **empty._asdict())
    batch_size, max_pages = block_table.shape
    page_size = k.shape[1]
    seqused_k = cu_seqlens_k[1:] - cu_seqlens_k[:-1]
    first_rows = torch.arange(max_pages, device=block_table.device) * page_size
    pages = torch.where(first_rows < seqused_k[:, None], block_table, 0).flatten()
    cu_rows = torch.arange(batch_size + 1, dtype=torch.int32, device=block_table.device) * (max_pages * page_size)
    return (q, k[pages].flatten(0, 1), v[pages].flatten(0, 1)), sequences._replace(
        cu_seqlens_k=cu_rows, max_seqlen_k=max_pages * page_size, block_table=None, seqused_k=seqused_k
    )


def _run(
    layout: str,
    inputs: tuple[Tensor, ...],
    where: dict[str, Any],
    options: dict[str, Any],
    is_extended: bool,
    deterministic: bool | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns out, softmax_lse, max_logits, which has a meaning only if it is asked for, and rng_state.

    Args:
        is_extended: the options are more than those of flash_attn 2.8.3.
        deterministic: for the gradients; None if none are needed.
    """
    # Under torch.compile packed inputs are split here: with dynamic shapes, inductor (torch 2.13) loses the storage
    # offsets of the views through which the gradient buffer would be written.
    in_one_piece = layout != SEPARATE and not torch.compiler.is_compiling()
    if deterministic or (deterministic is not None and in_one_piece) or is_extended:
        return _attention(inputs, **where, **options, deterministic=bool(deterministic))
    forward = _varlen_forward if where else _dense_forward
    return forward(*split_layout(layout, inputs), **where, **options, return_softmax=False)


def _results(
    layout: str,
    inputs: tuple[Tensor, ...],
    sequences: Sequences | None,
    options: dict[str, Any],
    extended: dict[str, Any],
    deterministic: bool | None,
    return_attn_probs: bool,
) -> Any:
    """What the public functions return: out, then softmax_lse and S_dmask, then max_logits, if they are asked for.

    Args:
        extended: further options, those of extended_options.
        deterministic: as in _run.
    """
    where = {} if sequences is None else sequences._asdict()
    out, softmax_lse, max_logits, rng_state = _run(
        layout, inputs, where, {**options, **extended}, len(extended) > 0, deterministic
    )
    wants_max_logits = extended.pop("return_max_logits", False)
    results: list[Any] = [out]
    if return_attn_probs and options["dropout_p"] == 0:
        results += [softmax_lse, inputs[0].new_empty(0)]
    elif return_attn_probs:
        q, k, _ = split_layout(layout, inputs)
        with torch.no_grad():
            probs = _attn_probs(q, k, softmax_lse, **where, **options, **extended | {"rng_state": rng_state})
        results += [softmax_lse, probs]
    if wants_max_logits:
        results.append(max_logits)
    return tuple(results) if len(results) > 1 else out


class _Options(NamedTuple):
    """The arguments that flash_attn 2.8.3 has, as in flash_attn_func."""

    dropout_p: Any
    softmax_scale: Any
    causal: Any
    window_size: Any
    softcap: Any
    alibi_slopes: Any
    deterministic: Any
    return_attn_probs: Any


def _attend(
    function: str,
    layout: str,
    inputs: tuple[Tensor, ...],
    sequences: Sequences | None,
    usual: _Options,
    given: Extensions,
    of_mask: dict[str, Any],
) -> Any:
    """attention, for arguments of any types.

    Args:
        of_mask: further arguments of the operators, which choose the dropout mask.
    """
    alibi_slopes = usual.alibi_slopes
    sequences, dropout_p, softmax_scale, causal, window_size, softcap = convert_arguments(
        *(function, layout, inputs, sequences, alibi_slopes),
        *(usual.dropout_p, usual.softmax_scale, usual.causal, usual.window_size, usual.softcap),
    )
    if layout != SEPARATE:
        _check_packing(function, layout, inputs, sequences is not None)
    first = inputs[0]
    if not first.is_meta and torch.is_autocast_enabled(first.device.type):
        inputs = cast_for_autocast(inputs, first.device.type)
    extended = extended_options(function, inputs[0].dtype, given) | of_mask
    needs_grad = _needs_grad(function, inputs, alibi_slopes, given.s_aux)
    if needs_grad and layout == SEPARATE and sequences is not None:
        inputs, sequences = _gather_pages(inputs, sequences)
    options = {
        "alibi_slopes": alibi_slopes,
        "softmax_scale": default_scale(first) if softmax_scale is None else softmax_scale,
        "causal": causal,
        "window_size_left": window_size[0],
        "window_size_right": window_size[1],
        "softcap": softcap,
        "dropout_p": dropout_p,
    }
    reproducible = bool(usual.deterministic) if needs_grad else None
    return _results(layout, inputs, sequences, options, extended, reproducible, usual.return_attn_probs)


def attention(
    function: str,
    layout: str,
    inputs: tuple[Tensor, ...],
    sequences: Sequences | None = None,
    *,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size: Any,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    return_attn_probs: bool,
    attention_chunk: int = 0,
    q_start: Any = None,
    k_start: Any = None,
    out_dtype: torch.dtype | None = None,
    s_aux: Tensor | None = None,
    key_ranges: Tensor | None = None,
    return_max_logits: bool = False,
) -> Any:
    """The implementation of every public function.

    Args:
        function: name of the public function, for error messages.
        layout: SEPARATE, KV_PACKED or QKV_PACKED: the layout of inputs.
        sequences: None for a dense call.
        The other arguments: as in flash_attn_func.
    """
    is_usual = q_start is None and k_start is None and out_dtype is None
    is_usual = is_usual and key_ranges is None and return_max_logits is False
    if is_usual and not torch.compiler.is_compiling():
        numbers = (dropout_p, softmax_scale, causal, window_size, attention_chunk, softcap)
        result = _eager_call(inputs, sequences, *numbers, alibi_slopes, s_aux, deterministic, return_attn_probs)
        if result is not None:
            return result
    usual = _Options(
        *(dropout_p, softmax_scale, causal, window_size),
        *(softcap, alibi_slopes, deterministic, return_attn_probs),
    )
    given = Extensions(attention_chunk, q_start, k_start, out_dtype, s_aux, key_ranges, return_max_logits)
    if any(map(_checks.is_dtensor, inputs)):
        from flash_attn import _sharding  # takes long to load

        return _sharding.attend(_attend_shard, function, layout, inputs, sequences, usual._asdict() | given._asdict())
    return _attend(function, layout, inputs, sequences, usual, given, {})


def _attend_shard(
    function: str,
    layout: str,
    inputs: tuple[Tensor, ...],
    sequences: Sequences | None,
    options: dict[str, Any],
    of_mask: dict[str, Any],
) -> Any:
    """Attention of a rank: the options are those of attention, and of_mask that of _attend."""
    if not of_mask:
        return attention(function, layout, inputs, sequences, **options)
    usual = _Options(*(options[name] for name in _Options._fields))
    given = Extensions(*(options[name] for name in Extensions._fields))
    return _attend(function, layout, inputs, sequences, usual, given, of_mask)
