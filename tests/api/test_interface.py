"""The functions of flash_attn_interface: results, output buffers and equivalent forms."""

import pytest
import torch

from flash_attn import flash_attn_interface as interface
from plain_attention import assert_near, assert_same, attention, gradients, leaves, visible

BATCH, SEQLEN_Q, SEQLEN_K, HEADS, HEADS_K, HEAD_DIM = 2, 5, 7, 4, 2, 8
LENGTHS_Q, LENGTHS_K = (3, 0, 5, 1), (4, 2, 7, 0)


def cumulative(lengths):
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


def dense_inputs(**kwargs):
    return leaves(
        (BATCH, SEQLEN_Q, HEADS, HEAD_DIM),
        (BATCH, SEQLEN_K, HEADS_K, HEAD_DIM),
        (BATCH, SEQLEN_K, HEADS_K, HEAD_DIM),
        **kwargs,
    )


def varlen_inputs(**kwargs):
    total_q, total_k = sum(LENGTHS_Q), sum(LENGTHS_K)
    return leaves((total_q, HEADS, HEAD_DIM), (total_k, HEADS_K, HEAD_DIM), (total_k, HEADS_K, HEAD_DIM), **kwargs)


def varlen_arguments():
    return cumulative(LENGTHS_Q), cumulative(LENGTHS_K), max(LENGTHS_Q), max(LENGTHS_K)


# Results and output buffers of the private functions.


@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
@pytest.mark.parametrize("return_softmax", [False, True])
@pytest.mark.parametrize("varlen", [False, True])
def test_forward_returns_four(varlen, return_softmax, dropout_p):
    before = torch.random.get_rng_state()
    if varlen:
        q, k, v = varlen_inputs(dtype=torch.bfloat16)
        shapes = (sum(LENGTHS_Q), HEADS, HEAD_DIM), (HEADS, sum(LENGTHS_Q))
        probs_shape = (len(LENGTHS_Q), HEADS, max(LENGTHS_Q), max(LENGTHS_K))
        outputs = interface._flash_attn_varlen_forward(
            q, k, v, *varlen_arguments(), dropout_p, 0.3, False, return_softmax=return_softmax
        )
    else:
        q, k, v = dense_inputs(dtype=torch.bfloat16)
        shapes = (BATCH, SEQLEN_Q, HEADS, HEAD_DIM), (BATCH, HEADS, SEQLEN_Q)
        probs_shape = (BATCH, HEADS, SEQLEN_Q, SEQLEN_K)
        outputs = interface._flash_attn_forward(q, k, v, dropout_p, 0.3, False, -1, -1, 0.0, None, return_softmax)
    out, softmax_lse, probs, rng_state = outputs
    assert (tuple(out.shape), tuple(softmax_lse.shape)) == shapes
    assert (out.dtype, softmax_lse.dtype) == (torch.bfloat16, torch.float32)
    assert (rng_state.dtype, tuple(rng_state.shape)) == (torch.int64, (2,))
    assert bool(rng_state.any()) == (dropout_p > 0)
    assert torch.equal(before, torch.random.get_rng_state()) == (dropout_p == 0)
    if return_softmax and dropout_p > 0:
        assert tuple(probs.shape) == probs_shape
        assert probs.dtype == torch.bfloat16
    else:
        assert probs.numel() == 0


def separate(q, k, v):
    return [torch.full_like(x, torch.nan) for x in (q, k, v)]


def packed_kv(q, k, v):
    """dk and dv as views of one (..., 2, heads, head_dim) buffer."""
    buffer = torch.full((*k.shape[:-2], 2, *k.shape[-2:]), torch.nan, dtype=k.dtype)
    return [torch.full_like(q, torch.nan), buffer.select(-3, 0), buffer.select(-3, 1)]


def packed_heads(q, k, v):
    """All three as slices of one buffer along the heads."""
    rows = max(q.shape[-3], k.shape[-3])
    buffer = torch.full((*q.shape[:-3], rows, HEADS + 2 * HEADS_K, HEAD_DIM), torch.nan, dtype=q.dtype)
    parts = buffer.split([HEADS, HEADS_K, HEADS_K], dim=-2)
    return [part.narrow(-3, 0, x.shape[-3]) for part, x in zip(parts, (q, k, v), strict=True)]


def heads_outermost(q, k, v):
    """Memory order heads, rows, head_dim."""
    return [torch.full_like(x.transpose(-3, -2).contiguous(), torch.nan).transpose(-3, -2) for x in (q, k, v)]


@pytest.mark.parametrize("buffers", [separate, packed_kv, packed_heads, heads_outermost])
@pytest.mark.parametrize("varlen", [False, True])
def test_backward_fills_the_callers_buffers(varlen, buffers):
    q, k, v = varlen_inputs() if varlen else dense_inputs()
    head = varlen_arguments() if varlen else ()
    tail = (0.0, 0.3, True, -1, -1, 0.0, None)
    if varlen:
        public = interface.flash_attn_varlen_func(q, k, v, *head, softmax_scale=0.3, causal=True)
        forward, backward = interface._flash_attn_varlen_forward, interface._flash_attn_varlen_backward
    else:
        public = interface.flash_attn_func(q, k, v, softmax_scale=0.3, causal=True)
        forward, backward = interface._flash_attn_forward, interface._flash_attn_backward
    expected = gradients(public, (q, k, v))
    q, k, v = q.detach(), k.detach(), v.detach()
    out, softmax_lse, _, rng_state = forward(q, k, v, *head, *tail, False)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    written = buffers(q, k, v)
    softmax_d = backward(dout, q, k, v, out, softmax_lse, *written, *head, *tail, False, rng_state)
    assert_same(written, expected)
    row_sums = (dout * out).sum(-1).transpose(-1, -2)
    assert softmax_d.shape == softmax_lse.shape
    assert_near([softmax_d], [row_sums.masked_fill(softmax_lse.isinf(), 0.0)])


@pytest.mark.parametrize("deterministic", [False, True])
def test_dropout_of_forward_and_backward_agree(deterministic):
    """The weights reported as dropped are those that the output and the gradients leave out."""
    q, k, v = dense_inputs()
    plain = [x.detach() for x in (q, k, v)]
    torch.manual_seed(3)
    out, lse, probs, rng_state = interface._flash_attn_forward(*plain, 0.25, 0.3, True, -1, -1, 0.0, None, True)
    dropped = torch.signbit(probs)
    keep = visible(SEQLEN_Q, SEQLEN_K, causal=True)
    assert 0.05 < dropped[keep.expand_as(dropped)].double().mean() < 0.5
    expected, expected_lse = attention(q, k, v, keep=keep, scale=0.3, dropped=dropped, dropout_p=0.25)
    assert_near([out, lse], [expected.detach(), expected_lse.detach()])
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    written = separate(*plain)
    interface._flash_attn_backward(
        dout, *plain, out, lse, *written, 0.25, 0.3, True, -1, -1, 0.0, None, deterministic, rng_state=rng_state
    )
    assert_near(written, gradients(expected, (q, k, v)))


def test_leftpad_and_seqused_select_rows_of_each_sequence():
    q, k, v = (x.detach() for x in varlen_inputs())
    cu_q, cu_k, max_q, max_k = varlen_arguments()
    leftpad, seqused = (1, 0, 2, 0), (3, 2, 6, 0)
    out, lse, _, _ = interface._flash_attn_varlen_forward(
        q, k, v, cu_q, cu_k, max_q, max_k, 0.0, 0.3, True,
        leftpad_k=torch.tensor(leftpad, dtype=torch.int32), seqused_k=torch.tensor(seqused, dtype=torch.int32),
    )  # fmt: skip
    for b, (first, used) in enumerate(zip(leftpad, seqused, strict=True)):
        rows = slice(cu_q[b], cu_q[b + 1])
        keys = slice(cu_k[b] + first, cu_k[b] + used)
        keep = visible(LENGTHS_Q[b], used - first, causal=True)
        expected, expected_lse = attention(q[None, rows], k[None, keys], v[None, keys], keep=keep, scale=0.3)
        assert_near([out[rows], lse[:, rows]], [expected[0], expected_lse[0]])


# Packed inputs (qkv, kv).

PACKED_OPTIONS = {
    "plain": {},
    "causal": {"causal": True, "softmax_scale": 0.4},
    "window": {"window_size": (2, 1), "softcap": 3.0},
    "alibi": {"alibi_slopes": torch.tensor([0.5, 0.25, 0.1, 0.0])},
    "dropout": {"dropout_p": 0.3, "deterministic": True},
}


def run_seeded(function, *args, **kwargs):
    torch.manual_seed(11)
    return function(*args, **kwargs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", PACKED_OPTIONS.values(), ids=PACKED_OPTIONS)
@pytest.mark.parametrize("form", ["qkv", "kv", "varlen_qkv", "varlen_kv"])
def test_packed_equals_unpacked(form, options, dtype):
    varlen, qkv = form.startswith("varlen"), form.endswith("qkv")
    q, k, v = varlen_inputs(dtype=dtype) if varlen else dense_inputs(dtype=dtype)
    if qkv:
        q, k, v = leaves(*[(*q.shape[:-2], HEADS, HEAD_DIM)] * 3, dtype=dtype)
    cu_q, cu_k, max_q, max_k = varlen_arguments()
    name = ("flash_attn_varlen_" if varlen else "flash_attn_") + ("qkvpacked_func" if qkv else "kvpacked_func")
    packed = torch.stack([q, k, v] if qkv else [k, v], dim=-3).detach().requires_grad_()
    inputs = (packed,) if qkv else (q, packed)
    lengths = () if not varlen else ((cu_q, max_q) if qkv else (cu_q, cu_k, max_q, max_k))
    actual = run_seeded(getattr(interface, name), *inputs, *lengths, return_attn_probs=True, **options)
    unpacked_lengths = () if not varlen else ((cu_q, cu_q, max_q, max_q) if qkv else lengths)
    function = interface.flash_attn_varlen_func if varlen else interface.flash_attn_func
    expected = run_seeded(function, q, k, v, *unpacked_lengths, return_attn_probs=True, **options)
    assert_same(actual, expected)
    actual_gradients = gradients(actual[0], inputs)
    expected_gradients = gradients(expected[0], (q, k, v))
    assert_same([*actual_gradients[:-1], *actual_gradients[-1].unbind(-3)], expected_gradients)


# return_attn_probs and softmax_lse.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("varlen", [False, True])
def test_return_attn_probs(varlen, dtype):
    q, k, v = (x.detach() for x in (varlen_inputs(dtype=dtype) if varlen else dense_inputs(dtype=dtype)))
    function = interface.flash_attn_varlen_func if varlen else interface.flash_attn_func
    lengths = varlen_arguments() if varlen else ()
    _out, lse, probs = function(q, k, v, *lengths, dropout_p=0.25, causal=True, return_attn_probs=True)
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert probs.dtype == dtype
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 4e-3}[dtype]
    sequences = zip(LENGTHS_Q, LENGTHS_K, strict=True) if varlen else [(SEQLEN_Q, SEQLEN_K)] * BATCH
    row = key = 0
    for b, (seqlen_q, seqlen_k) in enumerate(sequences):
        rows, keys = slice(row, row + seqlen_q), slice(key, key + seqlen_k)
        part = [q[rows], k[keys], v[keys]] if varlen else [q[b], k[b], v[b]]
        one_lse = lse[:, rows] if varlen else lse[b]
        keep = visible(seqlen_q, seqlen_k, causal=True)
        ones = torch.eye(seqlen_k, dtype=torch.float64)[None, :, None, :].expand(1, -1, HEADS_K, -1)
        weights, expected_lse = attention(part[0][None].double(), part[1][None].double(), ones, keep=keep)
        assert_near([one_lse], [expected_lse[0]], atol=max(tolerance, 1e-12) * 2)
        actual = probs[b, :, :seqlen_q, :seqlen_k]
        assert_near([actual.abs()], [weights[0].transpose(0, 1)], atol=tolerance)
        assert (actual[:, ~keep] == 0).all()
        assert (probs[b, :, seqlen_q:] == 0).all()
        assert (probs[b, :, :, seqlen_k:] == 0).all()
        row, key = row + seqlen_q, key + seqlen_k
    assert torch.signbit(probs).any()
    assert not torch.signbit(probs).all()


def test_without_dropout_no_weights_are_returned():
    """As in 2.8.3: S_dmask is returned only with dropout."""
    q, k, v = dense_inputs()
    _out, lse, probs = interface.flash_attn_func(q, k, v, return_attn_probs=True)
    assert tuple(lse.shape) == (BATCH, HEADS, SEQLEN_Q)
    assert probs.numel() == 0


@pytest.mark.parametrize("varlen", [False, True])
def test_softmax_lse_is_differentiable(varlen):
    lengths = (3, 5)
    if varlen:
        q, k, v = leaves((8, HEADS, HEAD_DIM), (8, HEADS_K, HEAD_DIM), (8, HEADS_K, HEAD_DIM))
        cu = cumulative(lengths)
        out, lse, _ = interface.flash_attn_varlen_func(q, k, v, cu, cu, 5, 5, causal=True, return_attn_probs=True)
        parts = [
            attention(q[None, a:b], k[None, a:b], v[None, a:b], keep=visible(b - a, b - a, causal=True))
            for a, b in ((0, 3), (3, 8))
        ]
        expected = torch.cat([part[0][0] for part in parts]), torch.cat([part[1][0] for part in parts], dim=-1)
    else:
        q, k, v = dense_inputs()
        out, lse, _ = interface.flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
        expected = attention(q, k, v, keep=visible(SEQLEN_Q, SEQLEN_K, causal=True))
    assert_near([out.detach(), lse.detach()], [x.detach() for x in expected])
    both, expected_both = (gradients(pair, (q, k, v), retain_graph=True) for pair in ((out, lse), expected))
    assert_near(both, expected_both)
    assert_near(gradients(lse, (q, k)), gradients(expected[1], (q, k)))
