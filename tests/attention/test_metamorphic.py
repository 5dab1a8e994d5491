"""Transformations of a problem with a known effect, or none, on its results."""

import dataclasses

import pytest
import torch

import flash_attn
from cases import Case, pairwise
from check import op_bwd, op_fwd, run_forward
from compare import assert_bitwise, assert_finite, compare
from device import on_device
from inputs import Inputs, eps_of, make_inputs, sequences
from reference import attention

DTYPES = ["float32", "float64", "bfloat16", "float16"]
NAMES = ("out", "softmax_lse", "dq", "dk", "dv", "dsoftmax_sum")
FEATURES = [
    {},
    {"causal": True},
    {"window_size": (40, 9)},
    {"softcap": 3.0, "alibi": "batch"},
    {"causal": True, "num_heads": 6, "num_heads_k": 2, "head_dim": 13, "head_dim_v": 40},
]
with_types = pytest.mark.parametrize("dtype", DTYPES)
with_features = pytest.mark.parametrize("features", FEATURES, ids=lambda features: "-".join(features) or "full")


def results(case: Case, x: Inputs) -> dict[str, torch.Tensor]:
    out, lse = op_fwd(case, x)
    return dict(zip(NAMES, (out, lse, *op_bwd(case, x, out, lse)), strict=True))


def assert_same(got: dict, expected: dict, context: str = "") -> None:
    for name in NAMES:
        assert_bitwise(name, got[name], expected[name], context)


@on_device
@with_features
@with_types
def test_batch_permutation(dtype, features):
    """A sequence gives the same bits at any index of the batch."""
    case = Case((150,) * 5, (290,) * 5, dtype=dtype, lse_grad=True, **features)
    x = make_inputs(case)
    expected = results(case, x)
    order = torch.tensor([3, 0, 4, 1, 2])
    moved = {name: getattr(x, name)[order] for name in ("q", "k", "v", "dout", "dlse")}
    if x.alibi_slopes is not None:
        moved["alibi_slopes"] = x.alibi_slopes[order]
    assert_same(results(case, dataclasses.replace(x, **moved)), {name: t[order] for name, t in expected.items()})


@on_device
@with_features
@with_types
def test_batch_size(dtype, features):
    """A sequence gives the same bits alone and in a batch of any size."""
    case = Case((70,) * 9, (700,) * 9, dtype=dtype, lse_grad=True, **features)
    x = make_inputs(case)
    for size in (1, 2, 9):
        part = dataclasses.replace(case, seqlens_q=(70,) * size, seqlens_k=(700,) * size)
        slopes = x.alibi_slopes if x.alibi_slopes is None else x.alibi_slopes[:size]
        own = {name: getattr(x, name)[:size] for name in ("q", "k", "v", "dout", "dlse")}
        got = results(part, dataclasses.replace(x, alibi_slopes=slopes, **own))
        if size == 1:
            expected = got
        assert_same({name: t[:1] for name, t in got.items()}, expected, f"batch of {size}")


@on_device
@with_features
@with_types
def test_varlen_is_a_loop_of_dense(dtype, features):
    """Packed sequences, including empty ones, give the same bits as separate dense calls."""
    lengths = (65, 0, 1, 300, 17, 129), (65, 20, 257, 300, 0, 64)
    case = Case(*lengths, dtype=dtype, packed=True, lse_grad=True, unused_rows=2, **features)
    x = make_inputs(case)
    packed = results(case, x)
    for s in sequences(case):
        alone = dataclasses.replace(
            case, seqlens_q=lengths[0][s.index : s.index + 1], seqlens_k=lengths[1][s.index : s.index + 1],
            packed=False, unused_rows=0,
        )  # fmt: skip
        rows_q = {name: getattr(x, name)[s.rows_q][None] for name in ("q", "dout")}
        rows_k = {name: getattr(x, name)[s.rows_k][None] for name in ("k", "v")}
        slopes = x.alibi_slopes if x.alibi_slopes is None else x.alibi_slopes[s.index : s.index + 1]
        rest = {"dlse": x.dlse[:, s.rows_q][None], "alibi_slopes": slopes, "cu_seqlens_q": None, "cu_seqlens_k": None}
        got = results(alone, dataclasses.replace(x, **rows_q, **rows_k, **rest))
        for name in ("out", "dq"):
            assert_bitwise(name, packed[name][s.rows_q], got[name][0], alone.name)
        for name in ("dk", "dv"):
            assert_bitwise(name, packed[name][s.rows_k], got[name][0], alone.name)
        for name in ("softmax_lse", "dsoftmax_sum"):
            assert_bitwise(name, packed[name][:, s.rows_q], got[name][0], alone.name)


@on_device
@with_types
def test_max_seqlen_may_be_larger_than_any_sequence(dtype):
    case = Case((33, 70), (64, 129), dtype=dtype, packed=True, causal=True)
    x = make_inputs(case)
    exact = flash_attn.flash_attn_varlen_func(x.q, x.k, x.v, x.cu_seqlens_q, x.cu_seqlens_k, 70, 129, causal=True)
    for longest in ((128, 129), (70, 1000), (2**29, 2**30 - 1)):
        got = flash_attn.flash_attn_varlen_func(x.q, x.k, x.v, x.cu_seqlens_q, x.cu_seqlens_k, *longest, causal=True)
        assert_bitwise("out", got, exact, f"max_seqlen {longest}")


@on_device
@with_types
def test_heads_share_keys_as_if_each_had_its_own(dtype):
    """GQA equals MHA with repeated keys and values: the same bits forward and for dq, sums for dk and dv."""
    case = Case((90, 90), (140, 140), dtype=dtype, num_heads=6, num_heads_k=2, causal=True)
    x = make_inputs(case)
    shared = results(case, x)
    repeated = dataclasses.replace(x, k=x.k.repeat_interleave(3, 2), v=x.v.repeat_interleave(3, 2))
    own = results(dataclasses.replace(case, num_heads_k=6), repeated)
    for name in ("out", "softmax_lse", "dq", "dsoftmax_sum"):
        assert_bitwise(name, shared[name], own[name])
    for name in ("dk", "dv"):
        total = own[name].double().unflatten(2, (2, 3)).sum(3)
        size = own[name].double().unflatten(2, (2, 3)).abs().sum(3).max().item()
        compare(name, shared[name], total, size=4 * size)


@on_device
@with_types
@pytest.mark.parametrize("dim", [1, 16, 40, 128])
def test_values_of_one_give_one(dtype, dim):
    """With v = 1, out is 1 (exactly in 16-bit dtypes), for any number of equal or different keys."""
    for seqlen_k, spread, window in [
        (1, 1.0, (-1, -1)),
        (300, 0.0, (-1, -1)),
        (2000, 2.0, (-1, -1)),
        (2000, 2.0, (777, 0)),
    ]:
        q, k = (torch.randn(1, n, 2, dim, dtype=torch.float64) * spread for n in (70, seqlen_k))
        x = [t.to(getattr(torch, dtype)) for t in (q, k, torch.ones_like(k))]
        out = flash_attn.flash_attn_func(*x, window_size=window)
        limit = 0 if dtype in ("bfloat16", "float16") else 8 * eps_of(out.dtype)
        seen = out[:, max(0, 70 - seqlen_k) :] if window != (-1, -1) else out
        assert (seen.double() - 1).abs().max().item() <= limit, (seqlen_k, spread, window)


@on_device
def test_many_equal_keys_do_not_stagnate():
    """A running sum in a 16-bit dtype would stop growing after 256 or 2048 equal terms."""
    q, k, v = (torch.ones(1, n, 1, 16, dtype=torch.bfloat16) for n in (3, 65536, 65536))
    out, lse, _ = flash_attn.flash_attn_func(q, k, v, return_attn_probs=True)
    assert (out == 1).all()
    torch.testing.assert_close(lse, torch.full_like(lse, 4.0 + torch.tensor(65536.0).log().item()))


@with_types
def test_repeated_calls_and_numbers_of_threads(dtype):
    """The same bits in repeated calls and with two threads."""
    case = Case(
        (300, 300), (520, 520), dtype=dtype, num_heads=4, num_heads_k=2, causal=True, dropout_p=0.1, lse_grad=True
    )
    x = make_inputs(case)
    expected = results(case, x)
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        assert_same(results(case, x), expected, f"{threads} threads")


@on_device
@with_types
def test_adding_keys_that_nobody_sees(dtype):
    """Keys outside the window, or past the end of the sequence, do not change results."""
    case = Case((128,), (128,), dtype=dtype, causal=True)
    x = make_inputs(case)
    expected = results(case, x)
    longer = dataclasses.replace(case, seqlens_k=(400,), seqused_k=(128,))
    more = {name: torch.cat([getattr(x, name), torch.full((1, 272, 2, 64), 7.0, dtype=x.k.dtype)], 1) for name in "kv"}
    used = torch.tensor([128], dtype=torch.int32)
    got = results(longer, dataclasses.replace(x, **more, seqused_k=used))
    for name in NAMES:
        if name in ("dk", "dv"):
            assert (got[name][:, 128:] == 0).all()
            got[name] = got[name][:, :128]
        assert_bitwise(name, got[name], expected[name])


EXTREMES = {
    "large logits": lambda q, k: (q * 100, k * 100),
    "all scores far below zero": lambda q, k: (q.abs() * 60 + 60, -k.abs() * 60 - 60),
    "all scores far above zero": lambda q, k: (q.abs() * 60 + 60, k.abs() * 60 + 60),
    "equal scores": lambda q, k: (q.new_ones(()).expand_as(q), k.new_full((), -120.0).expand_as(k)),
    "one huge key": lambda q, k: (q, torch.cat([k[:, :-1], k[:, -1:] * 1e4], 1)),
    "rising scores": lambda q, k: (q.abs(), k.abs() * torch.arange(k.shape[1]).to(k.dtype)[None, :, None, None] / 8),
    "falling scores": lambda q, k: (q.abs(), k.abs() * -torch.arange(k.shape[1]).to(k.dtype)[None, :, None, None] / 8),
    "tiny": lambda q, k: (q * 1e-4, k * 1e-4),
    "zero": lambda q, k: (q * 0, k * 0),
}


@on_device
@pytest.mark.parametrize("extreme", EXTREMES)
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_extreme_scores(dtype, extreme):
    """For scores of any magnitude out is the softmax average, and gradients are finite."""
    for features in ({}, {"causal": True}, {"window_size": (40, -1), "softmax_scale": 8.0}, {"alibi": "heads"}):
        case = Case((150,), (300,), dtype=dtype, **features)
        x = make_inputs(case)
        q, k = EXTREMES[extreme](x.q, x.k)
        x = dataclasses.replace(x, q=q.contiguous(), k=k.contiguous(), k_rows=k.contiguous())
        got, ref = results(case, x), attention(case, x)
        assert_finite("out", ref.out, extreme)
        plain = attention(case, x, dtype=x.q.dtype)
        # An error of 1 ulp in a score changes its weight by that relative amount.
        wide = eps_of(got["softmax_lse"].dtype)
        score = case.scale * (q.double().norm(dim=-1).max() * k.double().norm(dim=-1).max()).item()
        limit = 2 * (plain.out - ref.out).abs().max().item() + 4 * wide * (score + 1) + 8 * eps_of(x.q.dtype)
        assert (got["out"].double() - ref.out).abs().max().item() <= limit, case.name
        lse_error = (got["softmax_lse"].double() - ref.softmax_lse).abs().max().item()
        assert lse_error <= 4 * wide * (score + 8), case.name
        for name in ("dq", "dk", "dv"):
            assert torch.isfinite(got[name]).all(), f"{name} of {case.name}"


@on_device
@with_types
def test_first_tile_visited_is_masked(dtype):
    """The first or last keys are all hidden and scores are very low: the initial row max must be -inf, not 0."""
    cases = [
        Case((300,), (600,), dtype=dtype, window_size=(5, 0)),
        Case((300,), (40,), dtype=dtype, window_size=(10, -1)),
        Case((40,), (600,), dtype=dtype, window_size=(-1, 0), softmax_scale=2.0),
        Case((257,), (385,), dtype=dtype, window_size=(0, 130)),
    ]
    for case in cases:
        x = make_inputs(case)
        q, k = x.q.abs() * 4 + 4, -x.k.abs() * 4 - 4
        x = dataclasses.replace(x, q=q, k=k, k_rows=k)
        run, ref, plain = run_forward(case, x), attention(case, x), attention(case, x, dtype=x.q.dtype)
        seen = ref.softmax_lse[torch.isfinite(ref.softmax_lse)]
        assert seen.max() < -90
        size = -seen.min().item() if dtype in ("float32", "float64") else 0.0
        compare("out", run.out, ref.out, [plain.out], size=size, context=case.name)


def test_pairwise_covers_every_pair():
    """The case tables rely on pairwise()."""
    axes = {"a": [1, 2, 3], "b": ["x", "y"], "c": [0.5, 1.5, 2.5, 3.5], "d": [True, False]}
    rows = pairwise(axes)
    for one in axes:
        for other in axes:
            if one < other:
                pairs = {(row[one], row[other]) for row in rows}
                assert pairs == {(x, y) for x in axes[one] for y in axes[other]}
    assert len(rows) < 24
