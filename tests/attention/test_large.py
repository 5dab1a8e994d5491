"""Offsets past 2^31 elements, batches beyond the limit of a grid dimension, and tensors of such sizes.

A sequence gives the same bits in every batch, so a few sequences repeated many times are their own reference.
"""

import pytest
import torch

from cases import Case
from check import op_bwd, op_fwd
from compare import assert_bitwise
from device import IS_GPU, gpu_memory, on_device
from inputs import Inputs, make_inputs

pytestmark = on_device

NAMES = ("out", "softmax_lse", "dq", "dk", "dv", "dsoftmax_sum")
TIMES = 10_000 if IS_GPU else 10  # seven sequences: a batch of 70,000


@pytest.fixture(autouse=True)
def enough_memory():
    with gpu_memory(55):
        yield


# Rows, heads and batch entries far apart in storage that is otherwise untouched.

# Size of a virtual allocation: only the pages of rows that are written take memory.
FAR = 2**31 + 64

# Strides of (batch_size, seqlen, num_heads, head_dim) = (2, 3, 2, 8): each puts its last element past FAR.
STRIDES = {
    "batch entries": (FAR, 16, 8, 1),
    "rows": (48, FAR // 2, 8, 1),
    "heads": (24, 8, FAR, 1),
}
SHAPE = (2, 3, 2, 8)


def spread(x: torch.Tensor, strides: tuple[int, ...]) -> torch.Tensor:
    """A copy of x with the given strides."""
    length = 1 + sum((n - 1) * stride for n, stride in zip(x.shape, strides, strict=True))
    return torch.empty(length, dtype=x.dtype).as_strided(x.shape, strides).copy_(x)


@pytest.mark.last
@pytest.mark.parametrize("strides", STRIDES.values(), ids=STRIDES)
def test_offsets_have_64_bits(strides):
    torch.manual_seed(0)
    q, k, v, dout = (torch.randn(SHAPE, dtype=torch.bfloat16) for _ in range(4))

    def run(q, k, v, dout, grads):
        out, lse, _ = torch.ops.flash_attn.fwd(q, k, v, causal=True)
        written = dict(zip(("dq", "dk", "dv"), grads, strict=True))
        dsoftmax_sum = torch.ops.flash_attn.bwd.out(dout, q, k, v, out, lse, **written, causal=True, deterministic=True)
        return out, lse, *grads, dsoftmax_sum

    expected = run(q, k, v, dout, [torch.empty_like(q) for _ in range(3)])
    far = [spread(x, strides) for x in (q, k, v, dout)]
    got = run(*far, [spread(torch.full_like(q, torch.nan), strides) for _ in range(3)])
    for name, a, b in zip(NAMES, got, expected, strict=True):
        assert_bitwise(name, a, b)


# Batches of many sequences, and large contiguous tensors.


def repeated(case: Case, times: int) -> tuple[Case, Inputs, Inputs]:
    """A case with its sequences repeated `times` times; the inputs of that and of the original case."""
    few = make_inputs(case)
    many = Case(**{**case.__dict__, "seqlens_q": case.seqlens_q * times, "seqlens_k": case.seqlens_k * times})
    names = ("q", "k", "v", "dout", "dlse")
    repeats = {name: torch.cat([getattr(few, name)] * times) for name in names}
    return many, Inputs(**{**few.__dict__, **repeats}), few


def assert_repeated(got: torch.Tensor, expected: torch.Tensor, name: str) -> None:
    """Each repetition in `got` equals `expected`."""
    parts = got.unflatten(0, (-1, len(expected)))
    same = ((parts == expected) | (parts.isnan() & expected.isnan())).flatten(1).all(1)
    for i in (~same).nonzero().flatten().tolist()[:1]:
        assert_bitwise(f"{name}, repetition {i}", parts[i], expected)


@pytest.mark.last
@pytest.mark.timeout(300)
def test_many_sequences():
    case = Case((20,) * 7, (33,) * 7, dtype="bfloat16", head_dim=40, head_dim_v=40, causal=True)
    many, x, few = repeated(case, TIMES)
    out, lse = op_fwd(many, x)
    got = (out, lse, *op_bwd(many, x, out, lse))
    out, lse = op_fwd(case, few)
    for name, a, b in zip(NAMES, got, (out, lse, *op_bwd(case, few, out, lse)), strict=True):
        assert_repeated(a, b, name)


@pytest.mark.last
@pytest.mark.timeout(300)
def test_many_packed_sequences():
    """Sequences of different lengths, some empty."""
    lengths_q, lengths_k = (20, 0, 3, 1, 65, 7, 0), (33, 5, 0, 1, 65, 129, 0)
    case = Case(lengths_q, lengths_k, dtype="float16", head_dim=40, head_dim_v=40, packed=True, causal=True)
    many, x, few = repeated(case, TIMES)
    for name, lengths in (("cu_seqlens_q", many.seqlens_q), ("cu_seqlens_k", many.seqlens_k)):
        setattr(x, name, torch.tensor((0, *lengths), dtype=torch.int32).cumsum(0, dtype=torch.int32))
    x.dlse = few.dlse.repeat(1, TIMES)
    out, lse = op_fwd(many, x)
    got = (out, lse.T, *op_bwd(many, x, out, lse)[:3])
    out, lse = op_fwd(case, few)
    for name, a, b in zip(NAMES, got, (out, lse.T, *op_bwd(case, few, out, lse)[:3]), strict=False):
        assert_repeated(a, b, name)


@pytest.mark.last
@pytest.mark.timeout(300)
def test_more_than_2_to_the_31_elements():
    """All tensors of both passes; the dQ workspace then has as many 4-byte elements."""
    seqlen, num_heads = (16_400, 128) if IS_GPU else (40, 2)
    shape = {"num_heads": num_heads, "num_heads_k": num_heads, "head_dim": 256, "head_dim_v": 256}
    one = Case((seqlen,), (seqlen,), dtype="bfloat16", causal=True, **shape)
    four = Case((seqlen,) * 4, (seqlen,) * 4, dtype="bfloat16", causal=True, **shape)
    q, k, v, dout = (torch.randn(4, seqlen, num_heads, 256, dtype=torch.bfloat16) for _ in range(4))
    assert q.numel() > 2**31 or not IS_GPU
    small = make_inputs(Case((1,), (1,), dtype="bfloat16", **shape))
    x = Inputs(**{**small.__dict__, "q": q, "k": k, "v": v, "dout": dout})
    out, lse = op_fwd(four, x)
    got = (out, lse, *op_bwd(four, x, out, lse))
    for i in (0, 3):
        own = Inputs(**{**x.__dict__, **{name: getattr(x, name)[i : i + 1] for name in ("q", "k", "v", "dout")}})
        out, lse = op_fwd(one, own)
        for name, a, b in zip(NAMES, got, (out, lse, *op_bwd(one, own, out, lse)), strict=True):
            assert_bitwise(f"{name} of sequence {i}", a[i : i + 1], b)
