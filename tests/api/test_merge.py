"""merge_attention_states and out_dtype: attention to all keys from attention to parts of them."""

import itertools

import pytest
import torch
from torch.autograd import gradcheck

import flash_attn
from compare import assert_bitwise
from flash_attn import flash_attn_func, flash_attn_varlen_func, merge_attention_states

SHAPES = {"dense": ((2, 5, 3, 4), (2, 3, 5)), "packed": ((7, 3, 4), (3, 7))}
NARROW = (torch.bfloat16, torch.float16)


def states(kind, *dtypes, empty=()):
    """[(out, lse), ...]; the rows in `empty` of each have seen no key."""
    generator = torch.Generator().manual_seed(5)
    found = []
    for i, dtype in enumerate(dtypes):
        out, lse = (torch.randn(shape, generator=generator, dtype=torch.float64) * 3 for shape in SHAPES[kind])
        for row in empty[i] if empty else ():
            lse[..., row] = -torch.inf
            out.transpose(-2, -3)[..., row, :] = 0
        found.append((out.to(dtype), lse.to(torch.float64 if dtype is torch.float64 else torch.float32)))
    return found


def expected_of(parts):
    """The definition, in float64, for rows that have seen a key."""
    outs, lses = zip(*((out.double(), lse.double()) for out, lse in parts), strict=True)
    weights = [torch.exp(lse).transpose(-1, -2).unsqueeze(-1) for lse in lses]
    out = sum(w * o for w, o in zip(weights, outs, strict=True)) / sum(weights)
    return out, torch.logsumexp(torch.stack(lses), 0)


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("dtypes", [(torch.float64,) * 2, (torch.float32, torch.bfloat16), (torch.float16,) * 2])
def test_definition(kind, dtypes):
    a, b = states(kind, *dtypes)
    out, lse = merge_attention_states(*a, *b)
    dtype = torch.float64 if torch.float64 in dtypes else torch.float32
    assert (out.dtype, lse.dtype) == (dtype, dtype)
    expected, expected_lse = expected_of([a, b])
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-6, atol=1e-6)
    if dtype is torch.float64:
        torch.testing.assert_close(out, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("kind", SHAPES)
def test_an_empty_part_changes_nothing(kind):
    """Bit for bit, NaN in its rows or not, and without NaN in the gradients; two of them give an empty row."""
    a, b = states(kind, torch.float32, torch.float32, empty=((1, 3), (2, 3)))
    a[0].transpose(-2, -3)[..., 1, :] = torch.nan
    a[0].transpose(-2, -3)[..., 3, :] = torch.nan
    leaves = [x.clone().requires_grad_() for x in (*a, *b)]
    out, lse = merge_attention_states(*leaves)
    rows = out.transpose(-2, -3)
    assert_bitwise("out", rows[..., 1, :], b[0].transpose(-2, -3)[..., 1, :])
    assert_bitwise("lse", lse[..., 1], b[1][..., 1])
    assert_bitwise("out", rows[..., 2, :], a[0].transpose(-2, -3)[..., 2, :])
    assert (rows[..., 3, :] == 0).all()
    assert torch.isneginf(lse[..., 3]).all()
    for gradient in torch.autograd.grad(out.sum() + lse[..., [0, 1, 2, 4]].sum(), leaves):
        assert torch.isfinite(gradient).all()


def test_far_apart():
    """Logarithms whose exponentials are outside of the range of numbers."""
    (out_a, lse_a), (out_b, lse_b) = states("dense", torch.float32, torch.float32)
    for shift_a, shift_b, expected in [(1e4, -1e4, out_a), (-1e4, 1e4, out_b)]:
        out, lse = merge_attention_states(out_a, lse_a + shift_a, out_b, lse_b + shift_b)
        assert torch.equal(out, expected)
        assert torch.equal(lse, torch.maximum(lse_a + shift_a, lse_b + shift_b))
    out, lse = merge_attention_states(out_a, lse_a + 1e4, out_a, lse_a + 1e4)
    torch.testing.assert_close(out, out_a)
    torch.testing.assert_close(lse, lse_a + 1e4 + torch.tensor(2.0).log())


@pytest.mark.parametrize("kind", SHAPES)
def test_gradients(kind):
    leaves = [x.requires_grad_() for part in states(kind, torch.float64, torch.float64) for x in part]
    assert gradcheck(merge_attention_states, leaves)


def rows_of(seqlen, num_heads, dtype):
    return torch.randn(2, seqlen, num_heads, 32, dtype=dtype)


CALLS = {
    "causal": {"causal": True},
    "window": {"window_size": (70, 9)},
    "chunks and ALiBi": {"attention_chunk": 75, "alibi_slopes": torch.tensor([0.1, 0.0, 0.3, 0.2])},
    "dropout": {"dropout_p": 0.2, "causal": True, "softcap": 4.0},
}


def in_parts(q, k, v, bounds_q, bounds_k, **options):
    """Attention of parts of q to parts of k, merged: (out, lse), as of one call."""
    outs, lses = [], []
    for a, b in itertools.pairwise(bounds_q):
        state = None
        for c, d in itertools.pairwise(bounds_k):
            torch.manual_seed(8)
            part = flash_attn_func(
                *(q[:, a:b], k[:, c:d], v[:, c:d]), **options, q_start=a, k_start=c, return_attn_probs=True
            )[:2]
            state = part if state is None else merge_attention_states(*state, *part)
        outs.append(state[0])
        lses.append(state[1])
    return torch.cat(outs, 1), torch.cat(lses, 2)


@pytest.mark.parametrize("name", CALLS)
def test_parts_of_a_sequence_make_the_whole(name):
    """Outputs and gradients, for parts that begin inside of tiles and see some, all or none of the keys."""
    inputs = [rows_of(250, heads, torch.float64).requires_grad_() for heads in (4, 2, 2)]
    torch.manual_seed(8)
    out, lse, _ = flash_attn_func(*inputs, **CALLS[name], return_attn_probs=True)
    parts = in_parts(*inputs, (0, 64, 96, 250), (0, 128, 160, 250), **CALLS[name])
    torch.testing.assert_close(parts, (out, lse), rtol=1e-12, atol=1e-12)
    weights = torch.randn_like(out), torch.randn_like(lse)
    expected = torch.autograd.grad((out, lse), inputs, weights)
    torch.testing.assert_close(torch.autograd.grad(parts, inputs, weights), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", NARROW)
def test_parts_are_not_rounded(dtype):
    """With out_dtype=torch.float32, merging parts costs no accuracy: the error is that of one call."""
    q, k, v = (rows_of(256, heads, torch.float64).to(dtype) for heads in (4, 2, 2))
    exact = flash_attn_func(q.double(), k.double(), v.double(), causal=True)
    one_call = (flash_attn_func(q, k, v, causal=True).double() - exact).square().mean().sqrt()
    bounds = (0, 64, 128, 192, 256)
    out, _ = in_parts(q, k, v, (0, 256), bounds, causal=True, out_dtype=torch.float32)
    assert out.dtype == torch.float32
    assert (out != out.to(dtype)).float().mean() > 0.5
    error = (out.to(dtype).double() - exact).square().mean().sqrt()
    assert error < 1.01 * one_call


def test_starts_of_each_sequence():
    """A tensor of starts is a start per sequence; a number is one for all."""
    cu = torch.tensor([0, 32, 64], dtype=torch.int32)
    q, k, v = (torch.randn(64, 2, 16) for _ in range(3))
    starts = torch.tensor([64, 0], dtype=torch.int32)
    out = flash_attn_varlen_func(q, k, v, cu, cu, 32, 32, causal=True, q_start=starts, k_start=torch.tensor(32))
    for b, start in enumerate(starts.tolist()):
        own = slice(32 * b, 32 * (b + 1))
        alone = flash_attn_func(q[None, own], k[None, own], v[None, own], causal=True, q_start=start, k_start=32)
        assert_bitwise(f"sequence {b}", out[own], alone[0])
    assert (out[32:] == 0).all(), "its keys come after its queries"


OUT, LSE = SHAPES["dense"]
BAD = {
    "type": (TypeError, {"lse_a": 1.0}, "lse_a: expected a floating-point torch.Tensor, got float 1.0"),
    "integers": (TypeError, {"out_b": torch.ones(OUT, dtype=torch.int64)}, "out_b: expected a floating-point"),
    "rank": (ValueError, {"out_a": torch.ones(3, 4)}, "out_a: expected shape"),
    "shape of out": (ValueError, {"out_b": torch.ones(2, 6, 3, 4)}, r"out_b: expected shape \(2, 5, 3, 4\)"),
    "shape of lse": (ValueError, {"lse_b": torch.ones(2, 5, 3)}, r"lse_b: expected shape \(2, 3, 5\)"),
    "device": (
        ValueError,
        {"lse_a": torch.ones(LSE, device="meta")},
        "lse_a: expected device cpu like out_a, got meta",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name):
    error, changes, message = BAD[name]
    good = {"out_a": torch.ones(OUT), "lse_a": torch.ones(LSE), "out_b": torch.ones(OUT), "lse_b": torch.ones(LSE)}
    with pytest.raises(error, match=f"merge_attention_states: {message}"):
        merge_attention_states(**{**good, **changes})


def test_bad_starts():
    """What is neither a number nor a row of numbers; a bad number of keys is told at once."""
    x = torch.zeros(2, 2, 1, 4)
    with pytest.raises(TypeError) as error:
        flash_attn_func(x, x, x, q_start=torch.zeros(2, 2, dtype=torch.int32), k_start="0", attention_chunk=0.5)
    for name, got in (("q_start", "Tensor of shape (2, 2)"), ("k_start", "str '0'")):
        assert f"{name}: expected int or int32 Tensor (batch_size,), got {got}" in str(error.value)
    assert "attention_chunk: expected int, got float 0.5" in str(error.value)


@pytest.mark.parametrize(("dtype", "out_dtype"), [(torch.bfloat16, torch.float64), (torch.float64, torch.float32)])
def test_bad_out_dtype(dtype, out_dtype):
    x = torch.zeros(1, 2, 1, 4, dtype=dtype)
    with pytest.raises(ValueError, match=f"flash_attn_func: out_dtype: expected {dtype}.*, got {out_dtype}"):
        flash_attn_func(x, x, x, out_dtype=out_dtype)
    assert flash_attn.flash_attn_func(x, x, x, out_dtype=dtype).dtype == dtype
