"""Reference attention: the full matrix, an explicit mask, gradients by autograd.

In float64 it is the reference of all comparisons; in the dtype of the inputs it is the plain attention whose error
sets the tolerance.
"""

from dataclasses import dataclass

import torch

from cases import Case
from inputs import Inputs, Sequence, lse_dtype, sequences


@dataclass
class Result:
    """Outputs and, if requested, gradients, in the shapes of the op."""

    out: torch.Tensor
    softmax_lse: torch.Tensor
    dq: torch.Tensor | None = None
    dk: torch.Tensor | None = None
    dv: torch.Tensor | None = None
    max_logits: torch.Tensor | None = None
    ds_aux: torch.Tensor | None = None


Places = tuple[int, int] | None  # positions of the first query and the first key, if they are parts of longer ones


def positions(seqlen_q: int, seqlen_k: int, device="cpu", places: Places = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions of the queries, (seqlen_q, 1), and of the keys, (1, seqlen_k); bottom-right aligned by default."""
    first_q, first_k = places if places else (seqlen_k - seqlen_q, 0)
    row = torch.arange(seqlen_q, device=device)[:, None] + first_q
    return row, torch.arange(seqlen_k, device=device)[None, :] + first_k


def visible(
    seqlen_q: int,
    seqlen_k: int,
    window: tuple[int, int],
    device="cpu",
    attention_chunk: int = 0,
    places: Places = None,
) -> torch.Tensor:
    """Visible keys of each query: bool (seqlen_q, seqlen_k). -1: unbounded."""
    row, key = positions(seqlen_q, seqlen_k, device, places)
    mask = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool, device=device)
    if window[0] >= 0:
        mask &= key >= row - window[0]
    if window[1] >= 0:
        mask &= key <= row + window[1]
    if attention_chunk > 0:
        mask &= torch.div(row, attention_chunk, rounding_mode="floor") == key // attention_chunk
    return mask


def mask_of(case: Case, x: Inputs, s: Sequence) -> torch.Tensor:
    """Visible keys of each query of a sequence: bool (seqlen_q, seqlen_k)."""
    seqlen_k = s.rows_k.stop - s.rows_k.start
    shape = (s.rows_q.stop - s.rows_q.start, seqlen_k)
    mask = visible(*shape, case.window, x.q.device, case.attention_chunk, case.places(s.index))
    if x.key_ranges is None:
        return mask
    whole = x.key_ranges.expand(case.batch_size, -1, -1) if s.batch is not None else x.key_ranges
    ranges = s.take(whole, s.rows_q)
    key = torch.arange(seqlen_k, device=x.q.device)
    return mask & (key >= ranges[:, :1]) & (key < ranges[:, 1:])


def distances(seqlen_q: int, seqlen_k: int, device="cpu", places: Places = None) -> torch.Tensor:
    """Distances between queries and keys, (seqlen_q, seqlen_k), for ALiBi."""
    row, key = positions(seqlen_q, seqlen_k, device, places)
    return (row - key).abs()


def dropout_threshold(dropout_p: float) -> int:
    """Weights are dropped with probability threshold / 65536: the nearest value to dropout_p below 1."""
    return min(round(dropout_p * 65536), 65535)


@dataclass(frozen=True)
class Order:
    """Order of summation and of scaling: affects rounding only."""

    keys_reversed: bool = False
    dims_reversed: bool = False
    scale_first: bool = False
    rows_added: bool = False  # pad q: BLAS sums products of a single row in another order


USUAL = Order()
ORDERS = [
    USUAL,
    Order(keys_reversed=True, scale_first=True),
    Order(dims_reversed=True, rows_added=True),
    Order(keys_reversed=True, dims_reversed=True, scale_first=True, rows_added=True),
]


@dataclass
class Scoring:
    """What one sequence has beside q, k and v."""

    mask: torch.Tensor  # (seqlen_q, seqlen_k): True where a query sees a key
    slopes: torch.Tensor | None = None  # (num_heads,)
    sinks: torch.Tensor | None = None  # (num_heads,)
    keep: torch.Tensor | None = None  # (num_heads, seqlen_q, seqlen_k): False where a weight is dropped
    places: Places = None


@dataclass
class SequenceResult:
    """Of one sequence."""

    out: torch.Tensor  # (seqlen_q, num_heads, head_dim_v)
    softmax_lse: torch.Tensor  # (num_heads, seqlen_q)
    probs: torch.Tensor  # (num_heads, seqlen_q, seqlen_k): before dropout
    max_logits: torch.Tensor  # (num_heads,)


def one_sequence(case: Case, q, k, v, scoring: Scoring, order: Order = USUAL) -> SequenceResult:
    """Attention of one sequence: q (seqlen_q, num_heads, head_dim), k and v accordingly.

    A sink is the score of one more key, whose weight is then left out.
    """
    mask, slopes, sinks, keep = scoring.mask, scoring.slopes, scoring.sinks, scoring.keep
    group = q.shape[1] // k.shape[1]
    q, k, v = (t.transpose(0, 1) for t in (q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)))
    distance = distances(q.shape[1], k.shape[1], q.device, scoring.places)
    if order.keys_reversed:
        k, v, mask, distance = k.flip(1), v.flip(1), mask.flip(1), distance.flip(1)
        keep = keep if keep is None else keep.flip(2)
    if order.dims_reversed:
        q, k = q.flip(2), k.flip(2)
    rows = q.shape[1]
    if order.rows_added:
        q = torch.cat([q, q.new_zeros(q.shape[0], 16, q.shape[2])], 1)
    scores = (q * case.scale) @ k.transpose(1, 2) if order.scale_first else q @ k.transpose(1, 2) * case.scale
    scores = scores[:, :rows]
    if case.softcap > 0:
        scores = case.softcap * torch.tanh(scores / case.softcap)
    if slopes is not None:
        scores = scores - (slopes[:, None, None].to(torch.float64) * distance).to(scores.dtype)
    sinks = scores.new_full((q.shape[0],), -torch.inf) if sinks is None else sinks
    sees_any = mask.any(1) | ~torch.isneginf(sinks.detach())[:, None]  # a key or a sink
    masked = scores.masked_fill(~mask & sees_any[:, :, None], -torch.inf)
    scores_of_sinks = torch.where(sees_any, sinks[:, None], 0.0).to(masked.dtype)
    with_sink = torch.cat([masked, scores_of_sinks[:, :, None]], -1)
    probs = torch.softmax(with_sink, -1)[..., :-1].masked_fill(~mask, 0.0)
    lse = torch.logsumexp(with_sink.to(lse_dtype(q.dtype)), -1).masked_fill(~sees_any, -torch.inf)
    seen = torch.cat([scores.detach()[:, mask], scores.new_full((len(scores), 1), -torch.inf)], 1)
    weights = probs
    if keep is not None:
        rescale = 65536 / (65536 - dropout_threshold(case.dropout_p))
        weights = torch.where(keep, probs * rescale, 0.0)
    out = (weights @ v).transpose(0, 1)
    return SequenceResult(out, lse, probs.flip(2) if order.keys_reversed else probs, seen.amax(1))


def attention(
    case: Case, x: Inputs, keep=None, dtype: torch.dtype = torch.float64, grads: bool = False, order: Order = USUAL
) -> Result:
    """Attention of the whole batch in dtype. keep: dropout mask (batch_size, num_heads, seqlen_q, seqlen_k)."""
    inputs = [x.q, x.k_rows, x.v_rows] + ([] if x.s_aux is None else [x.s_aux])
    q, k, v, *sinks = inputs = [t.detach().to(dtype).requires_grad_(grads) for t in inputs]
    results = []
    for s in sequences(case):
        scoring = scoring_of(case, x, s, None if keep is None else _part(keep, s), *sinks)
        results.append(
            one_sequence(case, s.take(q, s.rows_q), s.take(k, s.rows_k), s.take(v, s.rows_k), scoring, order)
        )
    out, lse = _join(case, x, [r.out for r in results], [r.softmax_lse for r in results], dtype)
    largest = [r.max_logits for r in results]
    max_logits = torch.stack(largest) if results else q.new_zeros(0, case.num_heads)
    result = Result(out.detach(), lse.detach(), max_logits=max_logits.to(lse_dtype(dtype)))
    if grads:
        loss = (out * x.dout.to(dtype)).nansum()
        if case.lse_grad:
            seen = torch.isfinite(lse.detach()) & torch.isfinite(x.dlse)
            loss = loss + torch.where(seen, lse * x.dlse.to(lse.dtype), 0.0).to(dtype).sum()
        gradients = torch.autograd.grad(loss, inputs, materialize_grads=True)
        result.dq, result.dk, result.dv, result.ds_aux = (*gradients, None)[:4]
    return result


def scoring_of(case: Case, x: Inputs, s: Sequence, keep=None, sinks=None) -> Scoring:
    return Scoring(mask_of(case, x, s), slopes_of(x, s), sinks, keep, case.places(s.index))


def slopes_of(x: Inputs, s: Sequence) -> torch.Tensor | None:
    if x.alibi_slopes is None:
        return None
    return x.alibi_slopes if x.alibi_slopes.dim() == 1 else x.alibi_slopes[s.index]


def _part(matrix: torch.Tensor, s: Sequence) -> torch.Tensor:
    rows, keys = s.rows_q.stop - s.rows_q.start, s.rows_k.stop - s.rows_k.start
    return matrix[s.index, :, :rows, :keys]


def _join(case: Case, x: Inputs, outs: list, lses: list, dtype: torch.dtype):
    """Join the sequences' results; unused rows of packed tensors get those of a query without visible keys."""
    if not case.packed:
        shape = (*x.q.shape[:3], x.v_rows.shape[-1])
        out = torch.stack(outs) if outs else x.q.new_zeros(shape, dtype=dtype, requires_grad=True)
        lse_shape = (shape[0], shape[2], shape[1])
        return out, torch.stack(lses) if lses else x.q.new_zeros(lse_shape, dtype=lse_dtype(dtype))
    rest = (case.num_heads, case.head_dim_v)
    outs = [*outs, x.q.new_zeros(case.unused_rows, *rest, dtype=dtype, requires_grad=True)]
    unused = x.dlse.new_full((case.num_heads, case.unused_rows), -torch.inf, dtype=lse_dtype(dtype))
    lses = [*lses, unused]
    return torch.cat(outs), torch.cat(lses, 1)


def attn_probs(case: Case, x: Inputs) -> torch.Tensor:
    """float64 softmax weights before dropout: (batch_size, num_heads, seqlen_q, seqlen_k), 0 outside sequences."""
    probs = torch.zeros(case.batch_size, case.num_heads, case.seqlen_q, case.seqlen_k, dtype=torch.float64)
    for s in sequences(case):
        tensors = [
            s.take(t.double(), rows) for t, rows in ((x.q, s.rows_q), (x.k_rows, s.rows_k), (x.v_rows, s.rows_k))
        ]
        sinks = None if x.s_aux is None else x.s_aux.double()
        _part(probs, s)[:] = one_sequence(case, *tensors, scoring_of(case, x, s, sinks=sinks)).probs
    return probs
