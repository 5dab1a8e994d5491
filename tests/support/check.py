"""Runs a Case through the package and compares with the reference: check_forward and check_backward."""

import contextlib
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch

import flash_attn
from cases import Case, edge_cases, paged_cases, shard_cases, small_table, table, used_key_cases
from compare import assert_bitwise, assert_finite, compare
from inputs import Inputs, eps_of, lse_dtype, make_inputs, sequences
from reference import ORDERS, Result, attention, attn_probs, mask_of
from variant_cases import variant_cases

Tensors = tuple[torch.Tensor, ...]


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill memory that torch allocates uninitialised with NaN, so that unwritten elements show."""
    fill = torch.utils.deterministic.fill_uninitialized_memory
    was_on = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = fill
        torch.use_deterministic_algorithms(was_on)


def lengths_of(case: Case, x: Inputs) -> dict:
    """The op arguments that describe the sequences."""
    longest = (case.seqlen_q, case.seqlen_k) if case.packed else (0, 0)
    return {
        "cu_seqlens_q": x.cu_seqlens_q,
        "cu_seqlens_k": x.cu_seqlens_k,
        "max_seqlen_q": longest[0],
        "max_seqlen_k": longest[1],
        "seqused_k": x.seqused_k,
        "leftpad_k": x.leftpad_k,
    }


def scores_of(case: Case, x: Inputs) -> dict:
    """The op arguments that affect scores and weights."""
    return {
        "alibi_slopes": x.alibi_slopes,
        "softmax_scale": case.softmax_scale,
        "causal": case.causal,
        "window_size_left": case.window_size[0],
        "window_size_right": case.window_size[1],
        "attention_chunk": case.attention_chunk,
        "softcap": case.softcap,
        "dropout_p": case.dropout_p,
        "rng_state": x.rng_state,
        "s_aux": x.s_aux,
        "key_ranges": x.key_ranges,
        **{key: value for side in "qk" for key, value in start_of(case, x, side, f"{side}_starts").items()},
        "head_start": case.head_start,
        "total_heads": case.total_heads or None,
        "float_results": case.float_results,
    }


def start_of(case: Case, x: Inputs, side: str, name_of_tensor: str) -> dict:
    """Where q or k starts: a number if all sequences have the same."""
    starts = case.q_starts if side == "q" else case.k_starts
    if starts is None:
        return {}
    if len(set(starts)) == 1:
        return {f"{side}_start": starts[0]}
    return {name_of_tensor: torch.tensor(starts, dtype=torch.int32, device=x.q.device)}


def result_dtype(case: Case, x: Inputs) -> torch.dtype:
    """Of out and, from the op, of gradients."""
    return lse_dtype(x.q.dtype) if case.float_results else x.q.dtype


def op_fwd(case: Case, x: Inputs) -> Tensors:
    """(out, softmax_lse) from the op."""
    return op_results(case, x)[:2]


def op_results(case: Case, x: Inputs) -> Tensors:
    """(out, softmax_lse, max_logits) from the op."""
    return torch.ops.flash_attn.fwd(x.q, x.k, x.v, **op_options(case, x))


def op_fwd_into(case: Case, x: Inputs, out: torch.Tensor) -> Tensors:
    """(softmax_lse,) from the op that writes out."""
    return torch.ops.flash_attn.fwd.out(x.q, x.k, x.v, **op_options(case, x), out=out)[:1]


def op_options(case: Case, x: Inputs) -> dict:
    """The arguments of the forward op after q, k and v."""
    options = {"block_table": x.block_table, "return_max_logits": case.max_logits}
    return {**lengths_of(case, x), **options, **scores_of(case, x)}


def op_bwd(
    case: Case,
    x: Inputs,
    out: torch.Tensor,
    lse: torch.Tensor,
    grads: Tensors | None = None,
    deterministic: bool = True,
) -> Tensors:
    """(dq, dk, dv, dsoftmax_sum) from the op, written into grads if given."""
    head = (x.dout, x.q, x.k, x.v, out.to(x.q.dtype), lse, x.dlse if case.lse_grad else None)
    arguments = {**lengths_of(case, x), **scores_of(case, x), "deterministic": deterministic}
    if grads is None:
        return torch.ops.flash_attn.bwd(*head, **arguments)
    dq, dk, dv = grads
    return *grads, torch.ops.flash_attn.bwd.out(*head, **arguments, dq=dq, dk=dk, dv=dv)


def op_probs(case: Case, x: Inputs, lse: torch.Tensor) -> torch.Tensor:
    """Attention weights from the op, with the sign bit set where dropped."""
    paged = {"block_table": x.block_table}
    q, k = x.q.detach(), x.k.detach()
    return torch.ops.flash_attn.attn_probs(q, k, lse.detach(), **lengths_of(case, x), **paged, **scores_of(case, x))


def public(case: Case, x: Inputs) -> Tensors:
    """(out, softmax_lse, S_dmask) and, if asked for, max_logits, of the public function.

    Dropout draws from torch's generator.
    """
    shared = {
        "dropout_p": case.dropout_p,
        "softmax_scale": case.softmax_scale,
        "causal": case.causal,
        "window_size": case.window_size,
        "attention_chunk": case.attention_chunk,
        "softcap": case.softcap,
        "alibi_slopes": x.alibi_slopes,
        "s_aux": x.s_aux,
        "key_ranges": x.key_ranges,
        "return_attn_probs": True,
        "return_max_logits": case.max_logits,
        **start_of(case, x, "q", "q_start"),
        **start_of(case, x, "k", "k_start"),
        "out_dtype": result_dtype(case, x) if case.float_results else None,
    }
    torch.manual_seed(case.seed)
    if not case.packed:
        return flash_attn.flash_attn_func(x.q, x.k, x.v, **shared)
    lengths = (x.cu_seqlens_q, x.cu_seqlens_k, case.seqlen_q, case.seqlen_k)
    return flash_attn.flash_attn_varlen_func(x.q, x.k, x.v, *lengths, **shared, block_table=x.block_table)


@dataclass
class Run:
    """Results, and the mask of kept weights (None without dropout)."""

    out: torch.Tensor
    softmax_lse: torch.Tensor
    probs: torch.Tensor
    keep: torch.Tensor | None
    max_logits: torch.Tensor | None


def run_forward(case: Case, x: Inputs, by_op: bool = False) -> Run:
    """Run the public function; the op if by_op is set or only it has arguments for the case."""
    if by_op or case.only_in_op:
        (out, lse, max_logits), probs = op_results(case, x), None
    else:
        out, lse, probs, max_logits = (*public(case, x), None)[:4]
    if probs is None or case.dropout_p == 0:
        probs = op_probs(case, x, lse)
    keep = ~torch.signbit(probs) if case.dropout_p > 0 else None
    return Run(out, lse, probs, keep, max_logits if case.max_logits else None)


def plain_attention(case: Case, x: Inputs, keep, grads: bool = False) -> list[Result]:
    """Plain attention in the dtype of the inputs, in several summation orders: a single one may be exact by chance.

    softmax_lse and max_logits are in float32 for narrower dtypes.
    """
    dtype = x.q.dtype
    results = [attention(case, x, keep, dtype, grads, order) for order in ORDERS]
    if dtype in (torch.bfloat16, torch.float16) and not grads:
        for result, order in zip(results, ORDERS, strict=True):
            precise = attention(case, x, keep, torch.float32, order=order)
            result.softmax_lse, result.max_logits = precise.softmax_lse, precise.max_logits
    return results


def cancelling_size(case: Case, x: Inputs, ref: Result, other: torch.Tensor) -> float:
    """Magnitude of the cancelling terms in the score gradients, times `other` (k for dq, q for dk).

    A query with a single visible key has zero gradients, or small ones if a sink has little weight. Plain attention
    subtracts equal numbers. The kernels subtract rowsum(dout * out) from dP, which has the same terms in the same
    order, unless dropout has rescaled out, or a sink has a share of it.
    """
    if case.dropout_p == 0 and x.s_aux is None:
        return 0.0
    products = (x.dout.double() * ref.out).nan_to_num(0)
    sizes = products.norm(dim=-1) if x.q.dtype in (torch.bfloat16, torch.float16) else products.abs().sum(-1)
    single = torch.zeros(sizes.shape[:-1], dtype=torch.bool, device=sizes.device)
    for s in sequences(case):
        s.take(single, s.rows_q)[:] = mask_of(case, x, s).sum(1) == 1
    largest = max(other.abs().double().nan_to_num(0).flatten().tolist(), default=0.0)
    return case.scale * sizes[single].norm().item() * largest


def check_forward(case: Case) -> None:
    """Check out, softmax_lse, max_logits and the attention weights."""
    x = make_inputs(case)
    with poisoned_memory():
        run = run_forward(case, x)
    ref, plain = attention(case, x, run.keep), plain_attention(case, x, run.keep)
    assert_finite("out", ref.out, case.name)
    compare("out", run.out, ref.out, [p.out for p in plain], context=case.name)
    # A relative error eps of a sum is an absolute error eps of its logarithm, even near 0: so size is at least 1.
    lse = [p.softmax_lse for p in plain]
    compare("softmax_lse", run.softmax_lse, ref.softmax_lse, lse, size=1.0, context=case.name)
    if case.max_logits:
        largest = [p.max_logits for p in plain]
        compare("max_logits", run.max_logits, ref.max_logits, largest, size=1.0, context=case.name)
        assert run.max_logits.dtype == lse_dtype(x.q.dtype)
        assert not run.max_logits.requires_grad
    assert run.out.dtype == result_dtype(case, x)
    assert run.softmax_lse.dtype == lse_dtype(x.q.dtype)
    ref_probs = attn_probs(case, x)
    scores_error = 64 * eps_of(lse_dtype(x.q.dtype)) * ref_probs
    compare("attn_probs", run.probs.abs(), ref_probs, [ref_probs + scores_error], context=case.name)


def check_backward(case: Case, deterministic: bool = True) -> None:
    """Check dq, dk, dv for a random dout (and dlse, if the case has it), and dsoftmax_sum.

    Not deterministic: through the op only, since autograd uses deterministic gradients while memory is poisoned.
    """
    x = make_inputs(case)
    with poisoned_memory():
        if case.only_in_op or not deterministic:
            run = run_forward(case, x, by_op=True)  # also returns the dropout state that op_bwd needs
            *grads, dsoftmax_sum = op_bwd(case, x, run.out, run.softmax_lse, deterministic=deterministic)
            ds_aux = None if x.s_aux is None else sinks_gradient(case, x.s_aux, run.softmax_lse, dsoftmax_sum)
        else:
            run, grads, ds_aux = _public_backward(case, x)
            *op_grads, dsoftmax_sum = op_bwd(case, x, run.out, run.softmax_lse)
            if case.dropout_p == 0:
                for name, got, expected in zip(("dq", "dk", "dv"), grads, op_grads, strict=True):
                    assert expected.dtype == result_dtype(case, x)
                    assert_bitwise(f"{name} by autograd and by the op", got, expected.to(got.dtype), case.name)
    ref, plain = attention(case, x, run.keep, grads=True), plain_attention(case, x, run.keep, grads=True)
    sizes = [cancelling_size(case, x, ref, other) for other in (x.k, x.q)] + [0.0]
    for name, got, size in zip(("dq", "dk", "dv"), grads, sizes, strict=True):
        assert_finite(name, getattr(ref, name), case.name)
        compare(name, got, getattr(ref, name), [getattr(p, name) for p in plain], 3.0, size, case.name)
    if ds_aux is not None:
        assert_finite("ds_aux", ref.ds_aux, case.name)
        # out is rounded to the type of q before dsoftmax_sum is computed, and so is the sum of plain attention.
        rows = sinks_gradient(case, x.s_aux, ref.softmax_lse, row_sizes(case, x, ref) ** 2, power=2)
        rounding = eps_of(x.q.dtype) * rows.abs().sqrt()
        plain_sums = [*(p.ds_aux for p in plain), ref.ds_aux + rounding]
        compare("ds_aux", ds_aux, ref.ds_aux, plain_sums, 3.0, context=case.name)
        assert ds_aux.dtype == x.s_aux.dtype
    _check_dsoftmax_sum(case, x, run, dsoftmax_sum)


def sinks_gradient(case: Case, s_aux, softmax_lse, dsoftmax_sum, power: int = 1) -> torch.Tensor:
    """-sum of the weights of a sink, to a power, times dsoftmax_sum: over all rows, for each head."""
    lse = softmax_lse if case.packed else softmax_lse.transpose(0, 1).flatten(1)
    rows = dsoftmax_sum if case.packed else dsoftmax_sum.transpose(0, 1).flatten(1)
    weights = torch.where(torch.isneginf(lse), 0.0, (s_aux.to(lse.dtype)[:, None] - lse).exp() ** power)
    return -torch.where(weights > 0, weights * rows, 0.0).sum(1).to(s_aux.dtype)


def row_sizes(case: Case, x: Inputs, result: Result) -> torch.Tensor:
    """Magnitude of the terms of dsoftmax_sum, of each row."""
    products = (x.dout.double() * result.out.double()).abs().sum(-1).transpose(-1, -2)
    return (products + x.dlse.abs() * case.lse_grad).nan_to_num(0)


def _public_backward(case: Case, x: Inputs) -> tuple[Run, Tensors, torch.Tensor | None]:
    """The results, the gradients of q, k and v, and that of the sinks."""
    names = ("q", "k", "v") if x.s_aux is None else ("q", "k", "v", "s_aux")
    leaves = [getattr(x, name).detach().clone().requires_grad_() for name in names]
    own = Inputs(**{**x.__dict__, **dict(zip(names, leaves, strict=True))})
    run = run_forward(case, own)
    outputs, gradients = [run.out], [x.dout]
    if case.lse_grad:
        outputs, gradients = [run.out, run.softmax_lse], [x.dout, x.dlse]
    gradients = [gradient.to(output.dtype) for gradient, output in zip(gradients, outputs, strict=True)]
    *grads, ds_aux = (*torch.autograd.grad(outputs, leaves, gradients), None)[:4]
    detached = Run(run.out.detach(), run.softmax_lse.detach(), run.probs, run.keep, run.max_logits)
    return detached, grads, ds_aux


def _check_dsoftmax_sum(case: Case, x: Inputs, run: Run, dsoftmax_sum: torch.Tensor) -> None:
    """dsoftmax_sum is 0 where softmax_lse is -inf, whatever dlse: softmax_lse has no derivative there."""
    assert dsoftmax_sum.dtype == run.softmax_lse.dtype
    assert dsoftmax_sum.shape == run.softmax_lse.shape
    dlse = x.dlse if case.lse_grad else torch.zeros_like(x.dlse)
    sees_any = torch.isfinite(run.softmax_lse)
    out = run.out.to(x.q.dtype)  # as the op gets it

    def expected(dtype: torch.dtype) -> torch.Tensor:
        products = (out.to(dtype) * x.dout.to(dtype)).sum(-1).transpose(-1, -2)
        return torch.where(sees_any, products - dlse.to(dtype), 0.0)

    size = row_sizes(case, x, Result(out, run.softmax_lse))
    slack = torch.where(sees_any, 2 * eps_of(dsoftmax_sum.dtype) * size, 0.0)
    compare("dsoftmax_sum", dsoftmax_sum, expected(torch.float64), [expected(torch.float64) + slack], context=case.name)


def main() -> None:
    """Run tables of cases in a process of its own; prints the number of passed cases.

    check.py whole: all of them; check.py 60 7: the small table and 60 cases of the others, chosen by the seed 7.
    """
    torch.set_num_threads(1)
    cases = [*table(), *edge_cases(), *used_key_cases(), *shard_cases(), *paged_cases(), *variant_cases()]
    if sys.argv[1:] != ["whole"]:
        size, seed = map(int, sys.argv[1:])
        cases = random.Random(seed).sample(cases, size)
    chosen = [*small_table(), *cases]
    for case in chosen:
        check_forward(case)
        if not case.page_size:
            check_backward(case)
    sys.stdout.write(f"passed {len(chosen)} on {flash_attn.build_info()['cpu_instruction_set']}\n")


if __name__ == "__main__":
    main()
