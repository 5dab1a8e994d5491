"""The one differentiable path to the attention operators, shared by all layouts, dense and packed."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flash_attn import _checks, _library

_fwd = _library.op("fwd")
_bwd = _library.op("bwd")
_attn_probs = _library.op("attn_probs")
# What flash_attn 2.8.3 has goes through the ops of its names, which other programs look for.
_dense_forward = _library.op("_flash_attn_forward")
_dense_backward = _library.op("_flash_attn_backward")
_varlen_forward = _library.op("_flash_attn_varlen_forward")
_varlen_backward = _library.op("_flash_attn_varlen_backward")

# How the inputs of a call hold q, k and v: the names of its tensor arguments.
SEPARATE = "q, k, v"
KV_PACKED = "q, kv"
QKV_PACKED = "qkv"

# Arguments of FlashAttention before its inputs: config and the constants.
_NUM_CONSTANTS = 5

_STRIDED = torch.strided

_TRACED = (
    "flash_attn: torch.jit.trace records a call that needs gradients as one of Python, which torch.jit.save cannot "
    "store; trace under torch.no_grad() for that"
)

_AUTOCAST_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class AttnConfig(NamedTuple):
    """What one differentiable call of attention is told besides its tensors."""

    layout: str
    max_seqlen_q: int
    max_seqlen_k: int
    softmax_scale: float
    causal: bool
    window_size: tuple[int, int]
    softcap: float
    dropout_p: float
    deterministic: bool

    def split(self, tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v, or their gradients, as views of the tensors in this layout."""
        return split_layout(self.layout, tensors)

    def options(self, alibi_slopes: Tensor | None) -> tuple[Any, ...]:
        """The arguments that the ops of 2.8.3 take in this order: how scores are made, masked and dropped."""
        return self.dropout_p, self.softmax_scale, self.causal, *self.window_size, self.softcap, alibi_slopes

    def policy(self, alibi_slopes: Tensor | None, rng_state: Tensor | None) -> tuple[Any, ...]:
        """The same for our ops."""
        return (
            *(alibi_slopes, self.softmax_scale, self.causal, *self.window_size, self.softcap, self.dropout_p),
            rng_state if self.dropout_p > 0 else None,
        )


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


def join_layout(layout: str, parts: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The reverse of split_layout, by copying."""
    q, k, v = parts
    if layout == SEPARATE:
        return q, k, v
    return (q, torch.stack([k, v], dim=-3)) if layout == KV_PACKED else (torch.stack([q, k, v], dim=-3),)


def default_scale(q: Tensor) -> float:
    """head_dim ** -0.5. Of a tensor that has no such thing, which the ops refuse, some number."""
    try:
        return q.shape[-1] ** -0.5
    except (IndexError, ZeroDivisionError):
        return 1.0


def run_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    seqused_k: Tensor | None,
    block_table: Tensor | None,
    options: tuple[Any, ...],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out, softmax_lse, S_dmask (empty) and rng_state of the forward op. options: see AttnConfig.options."""
    if cu_seqlens_q is None:
        return _dense_forward(q, k, v, *options, False)
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    if block_table is None and seqused_k is None:
        return _varlen_forward(q, k, v, *lengths, *options)
    return _varlen_forward(q, k, v, *lengths, *options, False, block_table, None, seqused_k)


def _run_backward(
    config: AttnConfig,
    dout: Tensor | None,
    dlse: Tensor | None,
    out: Tensor,
    softmax_lse: Tensor,
    rng_state: Tensor | None,
    *tensors: Any,
) -> tuple[Tensor, ...]:
    """The gradients of the inputs, the last of tensors. dout or dlse is None if nothing was computed from it."""
    cu_seqlens_q, cu_seqlens_k, seqused_k, alibi_slopes, *inputs = tensors
    # One buffer for each input: the gradients of a packed input are written through views of it. Not where autograd
    # looks on (create_graph), which lets nobody write to views of no history, nor when compiling: with dynamic shapes,
    # inductor (torch 2.13) forgets where in the buffer such views begin.
    is_apart = torch.is_grad_enabled() or torch.compiler.is_compiling()
    q, k, v = config.split(inputs)
    buffers = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in ((q, k, v) if is_apart else inputs)]
    gradients = buffers if is_apart else config.split(buffers)
    if dout is None:
        dout = torch.zeros_like(out)
    deterministic = config.deterministic or torch.are_deterministic_algorithms_enabled()
    lengths = (cu_seqlens_q, cu_seqlens_k, config.max_seqlen_q, config.max_seqlen_k)
    options = config.options(alibi_slopes)
    if dlse is not None or seqused_k is not None:
        policy = config.policy(alibi_slopes, rng_state)
        _bwd(dout, dlse, q, k, v, out, softmax_lse, *gradients, *lengths, seqused_k, None, *policy, deterministic)
    elif cu_seqlens_q is not None:
        _varlen_backward(dout, q, k, v, out, softmax_lse, *gradients, *lengths, *options, deterministic, rng_state)
    else:
        _dense_backward(dout, q, k, v, out, softmax_lse, *gradients, *options, deterministic, rng_state)
    return join_layout(config.layout, buffers) if is_apart else tuple(buffers)


class FlashAttention(torch.autograd.Function):
    """``apply(config, *constants, *inputs)`` -> (out, softmax_lse[, rng_state]), differentiable once, in the inputs.

    The constants are cu_seqlens_q, cu_seqlens_k, seqused_k and alibi_slopes, each a tensor or None; rng_state is there
    with dropout. The backward pass recomputes the weights from softmax_lse: FlashAttention-2, section 3.1.2.
    """

    @staticmethod
    def forward(config: AttnConfig, *tensors: Any) -> tuple[Tensor, ...]:
        """Run the forward operator."""
        cu_seqlens_q, cu_seqlens_k, seqused_k, alibi_slopes, *inputs = tensors
        out, softmax_lse, _, rng_state = run_forward(
            *config.split(inputs),
            cu_seqlens_q,
            cu_seqlens_k,
            config.max_seqlen_q,
            config.max_seqlen_k,
            seqused_k,
            None,
            config.options(alibi_slopes),
        )
        return (out, softmax_lse, rng_state) if config.dropout_p > 0 else (out, softmax_lse)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Keep what the backward pass needs: inputs and outputs, and no matrix of weights."""
        ctx.config = inputs[0]
        ctx.set_materialize_grads(False)
        rng_state = output[2] if len(output) == 3 else None
        if rng_state is not None:
            ctx.mark_non_differentiable(rng_state)
        ctx.save_for_backward(*output[:2], rng_state, *inputs[1:])

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        """Run the backward operator, whose results refuse to be differentiated again."""
        grads = _run_backward(ctx.config, dout, dlse, *ctx.saved_tensors)
        needed = ctx.needs_input_grad[_NUM_CONSTANTS:]
        return (None,) * _NUM_CONSTANTS + tuple(
            grad if need else None for grad, need in zip(grads, needed, strict=True)
        )


# torch asks for it in every call, and would take 10 microseconds to find it out each time.
FlashAttention.forward.__signature__ = inspect.signature(FlashAttention.forward)  # type: ignore[attr-defined]


def _cast_for_autocast(inputs: Sequence[Tensor], device_type: str) -> tuple[Tensor, ...]:
    """The inputs in the dtype of the autocast region around the call; float64 and others stay as they are."""
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


def _convert_arguments(
    function: str,
    layout: str,
    inputs: Sequence[Any],
    lengths: Sequence[Any],
    scalars: _checks.Scalars,
    alibi: Any,
) -> _checks.Scalars:
    """Arguments that are not of the plainest types: as such, or a TypeError. lengths is empty for a dense call."""
    tensors = dict(zip(layout.split(", "), inputs, strict=True))
    optional_tensors = {"alibi_slopes": alibi}
    max_seqlen_names: tuple[str, ...] = ()
    if lengths and layout == QKV_PACKED:
        tensors["cu_seqlens"] = lengths[0]
        max_seqlen_names = ("max_seqlen",)
    elif lengths:
        tensors.update(cu_seqlens_q=lengths[0], cu_seqlens_k=lengths[1])
        optional_tensors["block_table"] = lengths[2]
        max_seqlen_names = ("max_seqlen_q", "max_seqlen_k")
    return _checks.convert_arguments(function, tensors, optional_tensors, scalars, max_seqlen_names)


def _is_plain(
    inputs: tuple[Any, ...],
    lengths: tuple[Any, ...],
    max_seqlens: tuple[Any, Any],
    dropout_p: Any,
    softmax_scale: Any,
    causal: Any,
    window_size: Any,
    softcap: Any,
    alibi_slopes: Any,
) -> bool:
    """Every argument has the type that the operators want. Others may still be converted; see _convert_arguments."""
    for x in inputs:
        if not isinstance(x, Tensor) or x.is_nested or x.layout is not _STRIDED:
            return False
    if lengths and not (
        isinstance(lengths[0], Tensor)
        and isinstance(lengths[1], Tensor)
        and (lengths[2] is None or isinstance(lengths[2], Tensor))
        and type(max_seqlens[0]) is int
        and type(max_seqlens[1]) is int
    ):
        return False
    return (
        type(dropout_p) is float
        and (softmax_scale is None or type(softmax_scale) is float)
        and type(causal) is bool
        and type(window_size) is tuple
        and len(window_size) == 2
        and type(window_size[0]) is int
        and type(window_size[1]) is int
        and type(softcap) is float
        and (alibi_slopes is None or isinstance(alibi_slopes, Tensor))
    )


def _needs_grad(function: str, inputs: tuple[Tensor, ...], alibi_slopes: Tensor | None) -> bool:
    if not torch.is_grad_enabled():
        return False
    if alibi_slopes is not None and alibi_slopes.requires_grad:
        expected = "a tensor that does not require grad, since slopes get no gradient (pass alibi_slopes.detach())"
        _checks.reject(ValueError, function, [f"alibi_slopes: expected {expected}, got requires_grad=True"])
    return any(x.requires_grad for x in inputs)


def _gather_pages(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_k: int, block_table: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    """Paged keys and values as packed ones, by differentiable indexing: k, v, cu_seqlens_k, seqused_k, max_seqlen_k.

    Every sequence gets the rows of all of its pages, of which seqused_k are in use.
    """
    with torch.no_grad():
        # Checks the arguments, the entries of the table included, and computes nothing: all sequences of q are empty.
        no_queries = torch.zeros_like(cu_seqlens_q)
        policy = (None, None, False, -1, -1, 0.0, 0.0, None)
        _fwd(q, k, v, no_queries, cu_seqlens_k, 0, max_seqlen_k, None, None, block_table, *policy)
    batch_size, max_pages = block_table.shape
    page_size = k.shape[1]
    seqused_k = cu_seqlens_k[1:] - cu_seqlens_k[:-1]
    first_rows = torch.arange(max_pages, device=block_table.device) * page_size
    pages = torch.where(first_rows < seqused_k[:, None], block_table, 0).flatten()
    cu_rows = torch.arange(batch_size + 1, dtype=torch.int32, device=block_table.device) * (max_pages * page_size)
    return k[pages].flatten(0, 1), v[pages].flatten(0, 1), cu_rows, seqused_k, max_pages * page_size


def _without_repeats(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The tensors, with views in place of those that come again: torch.compile wants differing arguments."""
    distinct: list[Tensor | None] = []
    for x in tensors:
        is_repeated = x is not None and any(x is other for other in distinct)
        distinct.append(x.view_as(x) if x is not None and is_repeated else x)
    return distinct


def _differentiable_attention(
    config: AttnConfig, inputs: tuple[Tensor, ...], lengths: tuple[Any, ...], alibi_slopes: Tensor | None
) -> tuple[Tensor, ...]:
    """out and softmax_lse and, with dropout, rng_state."""
    if torch.jit.is_tracing() and not torch.compiler.is_compiling():
        warnings.warn(_TRACED, stacklevel=4)
    cu_seqlens_q, cu_seqlens_k, block_table = lengths or (None, None, None)
    seqused_k = None
    if block_table is not None:
        q, k, v = inputs
        k, v, cu_seqlens_k, seqused_k, max_seqlen_k = _gather_pages(
            q, k, v, cu_seqlens_q, cu_seqlens_k, config.max_seqlen_k, block_table
        )
        inputs, config = (q, k, v), config._replace(max_seqlen_k=max_seqlen_k)
    tensors = (cu_seqlens_q, cu_seqlens_k, seqused_k, alibi_slopes, *inputs)
    return FlashAttention.apply(config, *(_without_repeats(tensors) if torch.compiler.is_compiling() else tensors))


def attention(
    function: str,
    layout: str,
    inputs: tuple[Tensor, ...],
    lengths: tuple[Any, ...],
    max_seqlens: tuple[Any, Any],
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size: Any,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    return_attn_probs: bool,
) -> Any:
    """What every public function calls, with its own name and its arguments.

    Args:
        layout: SEPARATE, KV_PACKED or QKV_PACKED: what inputs are.
        lengths: () for a dense call, else (cu_seqlens_q, cu_seqlens_k, block_table), the last of which may be None.
    """
    if not _is_plain(
        inputs, lengths, max_seqlens, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes
    ):
        scalars = _checks.Scalars(*max_seqlens, dropout_p, softmax_scale, causal, window_size, softcap)
        scalars = _convert_arguments(function, layout, inputs, lengths, scalars, alibi_slopes)
        *_, dropout_p, softmax_scale, causal, window_size, softcap = scalars
        max_seqlens = scalars[:2]
    if layout != SEPARATE:
        _check_packing(function, layout, inputs, bool(lengths))
    first = inputs[0]
    if not first.is_meta and torch.is_autocast_enabled(first.device.type):
        inputs = _cast_for_autocast(inputs, first.device.type)
    q, k, v = inputs if layout == SEPARATE else split_layout(layout, inputs)
    if softmax_scale is None:
        softmax_scale = default_scale(q)
    cu_seqlens_q, cu_seqlens_k, block_table = lengths or (None, None, None)
    max_seqlen_q, max_seqlen_k = max_seqlens
    rng_state: Tensor | None = None
    if _needs_grad(function, inputs, alibi_slopes):
        config = AttnConfig(
            *(layout, max_seqlen_q, max_seqlen_k, softmax_scale, causal, window_size, softcap, dropout_p),
            bool(deterministic),
        )
        out, softmax_lse, *rest = _differentiable_attention(config, inputs, lengths, alibi_slopes)
        rng_state = rest[0] if rest else None
    else:
        options = (dropout_p, softmax_scale, causal, window_size[0], window_size[1], softcap, alibi_slopes)
        out, softmax_lse, _, rng_state = run_forward(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, None, block_table, options
        )
    if not return_attn_probs:
        return out
    if dropout_p == 0:
        return out, softmax_lse, q.new_empty(0)
    where = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, None, None, block_table)
    policy = (alibi_slopes, softmax_scale, causal, window_size[0], window_size[1], softcap, dropout_p, rng_state)
    with torch.no_grad():
        return out, softmax_lse, _attn_probs(q, k, softmax_lse, *where, *policy)
