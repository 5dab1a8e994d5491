"""context_parallel_attention(): its arguments, and the choice of a method."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from flash_attn import _checks, _library
from flash_attn.autograd import cast_for_autocast, default_scale
from flash_attn.context_parallel import agreement
from flash_attn.context_parallel.all_gather import AllGather
from flash_attn.context_parallel.blocks import Blocks, sink_gradient
from flash_attn.context_parallel.layout import Cut, local_length, make_cut
from flash_attn.context_parallel.ranks import Ranks, resolve
from flash_attn.context_parallel.ring import Ring
from flash_attn.context_parallel.sharding import (
    cut_of_lengths,
    data_reasons,
    gather_lengths,
    layout_reasons,
    lengths_reasons,
    seqlen_reasons,
)
from flash_attn.context_parallel.ulysses import Ulysses

_FUNCTION = "context_parallel_attention"
_PAIR = ("ulysses", "ring")
_METHODS = ("ring", "all_gather", "ulysses", _PAIR)
_fwd = _library.op("fwd")


class _ContextParallelAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, method: Any, alibi_slopes: Tensor | None, s_aux: Tensor | None, q: Tensor, k: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor]:
        out, softmax_lse, saved = method.forward(q, k, v)
        ctx.method = method
        ctx.dtype = q.dtype
        ctx.sinks_need_grad = ctx.needs_input_grad[2]
        results = (out, softmax_lse) if ctx.sinks_need_grad else (None, None)
        # The method has slopes and sinks: autograd sees to it that they stay as they are.
        ctx.save_for_backward(alibi_slopes, s_aux, *results, *saved)
        ctx.mark_non_differentiable(softmax_lse)
        return out, softmax_lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        dout, (_, s_aux, out, softmax_lse, *saved) = grads[0], ctx.saved_tensors
        with torch.no_grad():
            results = [grad.to(ctx.dtype) for grad in ctx.method.backward(dout, *saved)]
            if ctx.sinks_need_grad:
                results.insert(0, sink_gradient(s_aux, dout, out, softmax_lse))
        if torch.is_grad_enabled():  # create_graph: torch would take the results for constants
            results = list(_NoSecondDerivatives.apply(len(results), *results, dout, *saved))
        return None, None, *(results if ctx.sinks_need_grad else (None, *results))


class _NoSecondDerivatives(torch.autograd.Function):
    """The first `count` tensors, with all as inputs.

    torch.autograd.function.once_differentiable looks at the incoming gradient alone: where that is a constant, second
    derivatives in q, k and v would be missing without an error.
    """

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.view_as(x) for x in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> NoReturn:
        remedy = "unshard q, k and v and use torch.nn.functional.scaled_dot_product_attention with SDPBackend.MATH"
        raise RuntimeError(f"{_FUNCTION}: gradients of gradients are not supported; where they are needed, {remedy}")


def _whole_call(inputs: tuple[Any, ...], options: dict[str, Any], batch_size: int | None) -> list[str]:
    """The reasons of the op to reject a call like this one; nothing is computed. batch_size: of documents."""
    q, k, v = (torch.empty_like(x, device="meta") for x in inputs[:3])
    alibi_slopes, s_aux = (None if x is None else torch.empty_like(x, device="meta") for x in inputs[3:])
    q = q[..., :0, :, :] if q.dim() > 2 else q  # FlopCounterMode counts this call too
    where: dict[str, Any] = {}
    if batch_size is not None:
        cu_seqlens = torch.empty(batch_size + 1, dtype=torch.int32, device="meta")
        where = {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens}
    rng_state = torch.empty(2, dtype=torch.int64, device="meta") if options["dropout_p"] > 0 else None
    try:
        _fwd(q, k, v, **where, **options, alibi_slopes=alibi_slopes, s_aux=s_aux, rng_state=rng_state)
    except ValueError as error:
        first, *reasons = str(error).split("\n  - ")
        return reasons or [first.partition(": ")[2]]
    return []


def _local_reasons(
    ranks: Ranks, method: Any, inputs: tuple[Any, ...], options: dict[str, Any], batch_size: int | None
) -> list[str]:
    """The reasons to reject the call that one rank alone can see."""
    q, k, _, alibi_slopes, _ = inputs
    reasons = _whole_call(inputs, options, batch_size)
    if not reasons and q.shape[-3] != k.shape[-3]:
        expected = f"the {q.shape[-3]} rows of q, as queries and keys are cut alike"
        reasons.append(f"k: expected {expected}, got shape {tuple(k.shape)}")
    devices = {str(x.device) for x in inputs if x is not None}
    if len(devices) > 1:
        reasons.append(f"q, k, v, alibi_slopes, s_aux: expected one device, got {', '.join(sorted(devices))}")
    num_heads, size = q.shape[-2] if q.dim() > 1 else 0, ranks.sizes[0]
    if method in ("ulysses", _PAIR) and num_heads % size != 0:
        reasons.append(f"q: expected num_heads divisible by the {size} ranks of the ulysses group, got {num_heads}")
    if alibi_slopes is not None and alibi_slopes.requires_grad:
        expected = "a tensor that does not require grad, since slopes get no gradient"
        reasons.append(f"alibi_slopes: expected {expected}, got requires_grad=True")
    return reasons


def _facts(
    inputs: tuple[Any, ...], options: dict[str, Any], others: dict[str, Any], lengths: tuple[int, ...] | None
) -> dict[str, Any]:
    """What all ranks must agree on, by the names of arguments."""
    q, k, v, alibi_slopes, s_aux = inputs
    facts = {**options, **others, "cu_seqlens": None if lengths is None else f"of lengths {lengths}"}
    facts["window_size"] = facts.pop("window_size_left"), facts.pop("window_size_right")
    for name, x in (("q", q), ("k", k), ("v", v)):
        shape = list(map(str, x.shape))
        shape[-3:-2] = ["local_seqlen"]
        facts[name] = f"({', '.join(shape)}) {x.dtype}{' that requires grad' * x.requires_grad}"
    facts["alibi_slopes"] = None if alibi_slopes is None else tuple(alibi_slopes.shape)
    facts["s_aux"] = None if s_aux is None else f"{tuple(s_aux.shape)} {s_aux.dtype}"
    facts["torch.is_grad_enabled()"] = torch.is_grad_enabled()
    return facts


def _find_cut(
    ranks: Ranks,
    layout: str,
    lengths: tuple[int, ...] | None,
    inputs: tuple[Any, ...],
    facts: dict[str, Any],
    reasons: list[str],
) -> Cut:
    """The cut of the batch. Communicates if ranks are to be compared, or the whole length is not known."""
    q = inputs[0]
    length = q.shape[-3] if q.dim() > 2 else 0
    found = None
    is_new = ranks.is_new(q.device)
    if is_new or facts["check"]:
        found = agreement.compare(_FUNCTION, ranks, facts, reasons, length, q.device)
    elif reasons:
        _checks.reject(ValueError, _FUNCTION, reasons)
    if lengths is None:
        found = gather_lengths(length, ranks, q.device) if found is None else found
        return cut_of_lengths(_FUNCTION, "q", found, layout)
    cut = make_cut(lengths, ranks.size, layout)
    expected = [local_length(cut, rank) for rank in range(ranks.size)]
    got = found or [length if rank == ranks.index else rows for rank, rows in enumerate(expected)]
    if got != expected:
        wanted = f"the shards of a {layout} layout of {cut.total} rows, {expected}"
        _checks.reject(ValueError, _FUNCTION, [f"q: expected {wanted} on the ranks, got {got}"])
    return cut


def _make_method(method: Any, ranks: Ranks, cut: Cut, blocks: Any, heads: tuple[int, int]) -> Any:
    """blocks(cut, rank, head_start, local heads) makes the Blocks of a rank."""
    num_heads = heads[0]
    if ranks.size == 1:
        return Ring(blocks(cut.whole(), 0, 0, num_heads), ranks.groups[-1])
    if method == "ring":
        return Ring(blocks(cut, ranks.index, 0, num_heads), ranks.groups[0])
    if method == "all_gather":
        return AllGather(blocks(cut, ranks.index, 0, num_heads), ranks)
    size = ranks.sizes[0]
    ring_cut = cut.joined(size) if method == _PAIR and ranks.sizes[1] > 1 else cut.whole()
    ring_rank = ranks.coordinates[1] if ring_cut.num_ranks > 1 else 0
    local_heads = num_heads // size
    inner = Ring(blocks(ring_cut, ring_rank, ranks.coordinates[0] * local_heads, local_heads), ranks.groups[-1])
    return Ulysses(inner, cut, ranks.index, ranks.groups[0], heads)


def _convert(
    tensors: dict[str, Any], optional_tensors: dict[str, Any], numbers: tuple[Any, ...], attention_chunk: Any
) -> dict:
    """The options of the ops, as plain Python types; raises TypeError. numbers: dropout_p to softcap, in this order."""
    scalars = _checks.convert_arguments(_FUNCTION, tensors, optional_tensors, _checks.Scalars(0, 0, *numbers), ())
    (attention_chunk,) = _checks.integers(_FUNCTION, attention_chunk=attention_chunk)
    scale = default_scale(tensors["q"]) if scalars.softmax_scale is None else scalars.softmax_scale
    return {
        "dropout_p": scalars.dropout_p,
        "softmax_scale": scale,
        "causal": scalars.causal,
        "window_size_left": scalars.window_size[0],
        "window_size_right": scalars.window_size[1],
        "softcap": scalars.softcap,
        "attention_chunk": attention_chunk,
    }


def _method_reasons(method: Any) -> tuple[Any, list[str]]:
    """The method, with its pair as a tuple, or a text for what is none, and the reasons to reject it."""
    method = tuple(method) if isinstance(method, list) else method
    if method in _METHODS:
        return method, []
    expected = "'ring', 'all_gather', 'ulysses' or ('ulysses', 'ring')"
    return _checks.describe(method), [f"method: expected {expected}, got {_checks.describe(method)}"]


def _draw_rng_state(ranks: Ranks, dropout_p: float, device: torch.device) -> Tensor | None:
    """The state that one device would draw. All ranks draw, so that their generators stay alike; the first's counts."""
    if dropout_p == 0:
        return None
    return ranks.broadcast(_library.draw_rng_state(device))


@torch.compiler.disable
def context_parallel_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group: Any,
    method: str | Sequence[str] = "ring",
    layout: str = "zigzag",
    cu_seqlens: Tensor | None = None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    attention_chunk: int = 0,
    s_aux: Tensor | None = None,
    deterministic: bool = False,
    seqlen: int | None = None,
    return_lse: bool = False,
    check: bool | None = None,
) -> Any:
    """Self-attention over sequences of which every rank has a shard.

    The result is that of flash_attn_func or flash_attn_varlen_func of the whole. Masks, ALiBi, chunks and dropout are
    those of one device: the same keys are visible, the same weights are dropped. Partial results are kept and added in
    float32 (float64 for float64), and rounded once.

    method:
        "ring": keys and values travel while blocks of attention are computed. Liu et al., "Ring Attention" (2023). Only
            those pieces of shards are sent, and only those blocks computed, of which the mask shows anything: with a
            window smaller than a piece, neighbours alone communicate. A piece of all documents travels as one. In
            backward, gradients of keys and values travel back in float32.
        "all_gather": every rank gathers all keys and values. Llama 3 (2024), section 3.3.2. For few key heads.
        "ulysses": an all-to-all exchanges rows for heads and back: each rank computes num_heads / n heads of all rows.
            Jacobs et al., "DeepSpeed Ulysses" (2023). n must divide num_heads; key heads are repeated as needed.
        ("ulysses", "ring"): ulysses in rows of the mesh, a ring across them. Fang and Zhao, "USP" (2024).

    All ranks must call this with the same arguments, and run backward if one does. torch.compile breaks the graph here.

    Args:
        q, k, v: this rank's shards, as made by shard: (batch_size, local_seqlen, num_heads, head_dim) or, with
            cu_seqlens, (local_rows, num_heads, head_dim); otherwise as in flash_attn_func. q and k have equal lengths.
            Shards may be empty. Under autocast they are cast to its dtype, except float64.
        group: a ProcessGroup or 1-D DeviceMesh; for ("ulysses", "ring") a 2-D DeviceMesh, first dimension ulysses, or a
            pair of ProcessGroups. Of U ulysses ranks, rank u in ring position w has shard w * U + u.
        layout: of the shards, "zigzag" or "contiguous". Zigzag balances the work of causal attention.
        cu_seqlens: (batch_size + 1,), int32 or int64: cumulative lengths of the documents of the whole batch, from 0.
            Documents do not see each other. Read to the host: a CPU tensor costs no wait for the GPU.
        dropout_p: as in flash_attn_func. The generators of all ranks advance; the state of the first rank counts.
        softmax_scale, causal, window_size, softcap, attention_chunk: as in flash_attn_func.
        alibi_slopes: (num_heads,) or (batch_size or documents, num_heads), float32, of all heads on every rank.
        s_aux: (num_heads,), sinks of all heads on every rank, as in flash_attn_func. Each rank has the gradient of its
            part, to be summed over the group like those of weights.
        deterministic: bitwise reproducible gradients. What other ranks contribute is always added in a fixed order.
        seqlen: the length of the whole sequence, without cu_seqlens. None: the sum over ranks, which they exchange.
        return_lse: also return softmax_lse of the local rows, which gets no gradient.
        check: compare the arguments of all ranks at every call: one small collective, and a wait for the GPU. None:
            yes, unless the environment variable FLASH_ATTN_CP_CHECK is 0. The first call of a group always compares.
            Without it, and with seqlen or a cu_seqlens on the CPU, the host does not wait.

    Returns:
        out: the local rows, (batch_size, local_seqlen, num_heads, head_dim_v) or (local_rows, num_heads, head_dim_v),
        dtype of q. With return_lse: (out, softmax_lse), softmax_lse being (batch_size, num_heads, local_seqlen) or
        (num_heads, local_rows), float32 (float64 for float64 input).

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument violates the above; lists all reasons. Ranks that compare raise it together, also if
            only one of them has a reason, or if their arguments differ. Nothing is computed.
        RuntimeError: a rank fails or is silent for the timeout of the group; or second derivatives are requested.
    """
    method, reasons = _method_reasons(method)
    tensors = {"q": q, "k": k, "v": v}
    numbers = dropout_p, softmax_scale, causal, window_size, softcap
    options = _convert(tensors, {"alibi_slopes": alibi_slopes, "s_aux": s_aux}, numbers, attention_chunk)
    if wrong := data_reasons("q", q):
        _checks.reject(ValueError, _FUNCTION, wrong)
    counts = (1, 2) if reasons else (2,) if method == _PAIR else (1,)
    ranks = resolve(_FUNCTION, group, counts)
    reasons += layout_reasons(layout)
    lengths, wrong = (None, []) if cu_seqlens is None else lengths_reasons(cu_seqlens)
    reasons += wrong
    if seqlen is not None:
        seqlen, wrong = seqlen_reasons(_FUNCTION, seqlen, lengths)
        reasons += wrong
    inputs: tuple[Tensor, ...] = (q, k, v)
    if torch.is_autocast_enabled(q.device.type):
        inputs = cast_for_autocast(inputs, q.device.type)
    everything = (*inputs, alibi_slopes, s_aux)
    reasons += _local_reasons(ranks, method, everything, options, None if lengths is None else len(lengths))
    others = {"method": method, "layout": str(layout), "deterministic": bool(deterministic), "seqlen": seqlen}
    others["check"] = agreement.is_wanted(check)
    facts = _facts(everything, options, others, lengths)
    if lengths is None and seqlen is not None:
        lengths = (seqlen,)
    cut = _find_cut(ranks, layout, lengths, everything, facts, reasons)
    rng_state = _draw_rng_state(ranks, options["dropout_p"], q.device)
    num_heads, num_heads_k = q.shape[-2], k.shape[-2]

    def blocks(cut: Cut, rank: int, head_start: int, local_heads: int) -> Blocks:
        mine = slice(head_start, head_start + local_heads)
        slopes, sinks = (None if x is None else x.detach()[..., mine] for x in (alibi_slopes, s_aux))
        heads = {"alibi_slopes": slopes, "head_start": head_start, "total_heads": num_heads, "rng_state": rng_state}
        is_deterministic = bool(deterministic) or torch.are_deterministic_algorithms_enabled()
        return Blocks(cut, rank, cu_seqlens is not None, {**options, **heads}, is_deterministic, sinks)

    chosen = _make_method(method, ranks, cut, blocks, (num_heads, num_heads_k))
    out, softmax_lse = _ContextParallelAttention.apply(chosen, alibi_slopes, s_aux, *inputs)
    return (out, softmax_lse) if return_lse else out
