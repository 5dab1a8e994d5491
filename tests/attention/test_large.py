"""Offsets past 2^31 elements: rows, heads and batch entries far apart in storage that is otherwise never touched."""

import pytest
import torch

from compare import assert_bitwise

# Of a virtual allocation, of which only the rows that are written take memory.
FAR = 2**31 + 64

# Strides of (batch_size, seqlen, num_heads, head_dim) = (2, 3, 2, 8): the last element of each is past FAR.
STRIDES = {
    "batch entries": (FAR, 16, 8, 1),
    "rows": (48, FAR // 2, 8, 1),
    "heads": (24, 8, FAR, 1),
}
SHAPE = (2, 3, 2, 8)


def spread(x: torch.Tensor, strides: tuple[int, ...]) -> torch.Tensor:
    """x at places that far apart."""
    length = 1 + sum((n - 1) * stride for n, stride in zip(x.shape, strides, strict=True))
    return torch.empty(length, dtype=x.dtype).as_strided(x.shape, strides).copy_(x)


@pytest.mark.parametrize("strides", STRIDES.values(), ids=STRIDES)
def test_offsets_have_64_bits(strides):
    torch.manual_seed(0)
    q, k, v, dout = (torch.randn(SHAPE, dtype=torch.bfloat16) for _ in range(4))

    def run(q, k, v, dout, grads):
        out, lse = torch.ops.flash_attn.fwd(q, k, v, causal=True)
        written = dict(zip(("dq", "dk", "dv"), grads, strict=True))
        dsoftmax_sum = torch.ops.flash_attn.bwd.out(dout, q, k, v, out, lse, **written, causal=True, deterministic=True)
        return out, lse, *grads, dsoftmax_sum

    expected = run(q, k, v, dout, [torch.empty_like(q) for _ in range(3)])
    far = [spread(x, strides) for x in (q, k, v, dout)]
    got = run(*far, [spread(torch.full_like(q, torch.nan), strides) for _ in range(3)])
    for name, a, b in zip(("out", "softmax_lse", "dq", "dk", "dv", "dsoftmax_sum"), got, expected, strict=True):
        assert_bitwise(name, a, b)
