"""seqused_k gives the lengths of key sequences: only the starts in cu_seqlens_k are used.

Caches and padded layouts have gaps between sequences, sequences in any order, and max_seqlen_k = the longest length in
use. 2.8.3 accepts them; this package raised "max_seqlen_k: expected at least 6".

Public threads: Dao-AILab/flash-attention#647, Dao-AILab/flash-attention#1990, facebookresearch/xformers#737
"""

import pytest
import torch

from compare import assert_bitwise
from flash_attn import flash_attn_interface as interface
from plain_attention import assert_near, attention, leaves, visible

H, HK, D, DV, ROWS = 4, 2, 8, 6, 20
LENGTHS_Q = (2, 0, 5, 1)
LAYOUTS = {
    # starts of the keys, and one unused number; keys in use
    "the example": ([0, 6, 12, 12, 0], [3, 2, 0, 0]),
    "gaps": ([1, 6, 10, 18, 19], [3, 2, 7, 2]),
    "out of order": ([12, 5, 0, 17, 3], [4, 6, 5, 3]),
    "one upon another": ([0, 0, 2, 1, 0], [6, 3, 6, 2]),
    "longer than the next start": ([0, 2, 4, 6, 8], [9, 8, 7, 6]),
    "fewer than none": ([0, 3, 6, 20, 20], [3, -1, 4, 0]),
    "an end beyond the rows": ([0, 4, 8, 12, 500], [4, 3, 2, 1]),
    "up to the last row": ([20, 19, 0, 10, 20], [0, 1, 10, 9]),
}
with_layouts = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


def int32(values):
    return torch.tensor(values, dtype=torch.int32)


def tensors(dtype):
    q, k, v = (x.detach().to(dtype) for x in leaves((sum(LENGTHS_Q), H, D), (ROWS, HK, D), (ROWS, HK, DV)))
    return q, k, v


def keys_of(layout, b, leftpad=0):
    starts, used = layout
    return slice(starts[b] + min(leftpad, max(used[b], 0)), starts[b] + max(used[b], 0))


def forward(q, k, v, layout, causal=False, dropout_p=0.0, **more):
    cu_q = int32([0, *torch.tensor(LENGTHS_Q).cumsum(0).tolist()])
    starts, used = layout
    return cu_q, interface._flash_attn_varlen_forward(
        q, k, v, cu_q, int32(starts), max(LENGTHS_Q), max(*used, 0), dropout_p, 0.3, causal, seqused_k=int32(used),
        **more,
    )  # fmt: skip


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 0.03)])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("leftpad", [None, (1, 0, 9, 1)], ids=["", "leftpad_k"])
@with_layouts
def test_forward(layout, leftpad, causal, dtype, atol):
    """Rows outside all sequences hold NaN; leftpad_k may leave no key."""
    q, k, v = tensors(dtype)
    pads = leftpad or (0, 0, 0, 0)
    is_used = torch.zeros(ROWS, dtype=torch.bool)
    for b in range(4):
        is_used[keys_of(layout, b, pads[b])] = True
    k[~is_used] = v[~is_used] = torch.nan
    more = {} if leftpad is None else {"leftpad_k": int32(leftpad)}
    cu_q, (out, lse, _, _) = forward(q, k, v, layout, causal, **more)
    for b, length in enumerate(LENGTHS_Q):
        rows, keys = slice(cu_q[b], cu_q[b + 1]), keys_of(layout, b, pads[b])
        keep = visible(length, keys.stop - keys.start, causal)
        one = [x[None].double() for x in (q[rows], k[keys], v[keys])]
        expected, expected_lse = attention(*one, keep=keep, scale=0.3)
        assert_near([out[rows], lse[:, rows]], [expected[0], expected_lse[0]], atol=atol)


@with_layouts
def test_dropout(layout):
    """The mask of each sequence equals that of the same sequence without gaps."""
    q, k, v = tensors(torch.float64)
    torch.manual_seed(3)
    _, (out, lse, probs, _) = forward(q, k, v, layout, dropout_p=0.4, return_softmax=True)
    used = [max(n, 0) for n in layout[1]]
    packed_k, packed_v = (torch.cat([x[keys_of(layout, b)] for b in range(4)]) for x in (k, v))
    cu_k = [0, *torch.tensor(used).cumsum(0).tolist()]
    torch.manual_seed(3)
    _, (same, same_lse, same_probs, _) = forward(
        q, packed_k, packed_v, (cu_k, used), dropout_p=0.4, return_softmax=True
    )
    for name, a, b in (("out", out, same), ("softmax_lse", lse, same_lse), ("S_dmask", probs, same_probs)):
        assert_bitwise(name, a, b)


@pytest.mark.parametrize("name", ["the example", "gaps", "out of order", "fewer than none", "up to the last row"])
def test_backward_of_sequences_that_share_no_row(name):
    """Rows between sequences get zero gradients."""
    layout = LAYOUTS[name]
    q, k, v = tensors(torch.float64)
    cu_q, (out, lse, _, _) = forward(q, k, v, layout)
    dout = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    grads = [torch.full_like(x, torch.nan) for x in (q, k, v)]
    starts, used = layout
    torch.ops.flash_attn.bwd.out(
        dout, q, k, v, out, lse, dq=grads[0], dk=grads[1], dv=grads[2], cu_seqlens_q=cu_q, cu_seqlens_k=int32(starts),
        max_seqlen_q=max(LENGTHS_Q), max_seqlen_k=max(used), seqused_k=int32(used), softmax_scale=0.3,
        deterministic=True,
    )  # fmt: skip
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    outs = []
    for b in range(4):
        keys = keys_of(layout, b)
        rows = inputs[0][None, cu_q[b] : cu_q[b + 1]]
        keep = visible(rows.shape[1], keys.stop - keys.start)
        outs.append(attention(rows, *(x[None, keys] for x in inputs[1:]), keep=keep, scale=0.3)[0][0])
    assert_near(grads, torch.autograd.grad(torch.cat(outs), inputs, dout), atol=1e-11)


def test_paged_keys_by_their_numbers_in_use():
    """As in serving code: lengths by seqused_k, meaningless cu_seqlens_k."""
    q, k, v = tensors(torch.float64)
    used, cu_q = (3, 0, 7, 2), int32([0, *torch.tensor(LENGTHS_Q).cumsum(0).tolist()])
    pages = int32([[4, 0, 0, 0], [0, 0, 0, 0], [1, 3, 0, 2], [2, 0, 0, 0]])
    paged_k, paged_v = (x.unflatten(0, (10, 2)) for x in (k, v))
    out, _, _, _ = interface._flash_attn_varlen_forward(
        q, paged_k, paged_v, cu_q, int32([7, 7, 0, 3, 1]), max(LENGTHS_Q), max(used), 0.0, 0.3, False,
        block_table=pages, seqused_k=int32(used),
    )  # fmt: skip
    for b, length in enumerate(used):
        rows = slice(cu_q[b], cu_q[b + 1])
        keys, values = (x[pages[b].long()].flatten(0, 1)[None, :length] for x in (paged_k, paged_v))
        keep = visible(LENGTHS_Q[b], length)
        assert_near([out[rows]], [attention(q[None, rows], keys, values, keep=keep, scale=0.3)[0][0]])
