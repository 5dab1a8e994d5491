"""In-place rotation of tensors that autograd protects: leaves that require grad, their views, views from unbind.

2.8.3 writes to them, and its results have the right gradient; torch raises "a view of a leaf Variable that requires
grad is being used in an in-place operation".

Public threads: pytorch/pytorch#153094, 2U1/Qwen-VL-Series-Finetune#178
"""

import pytest
import torch

from flash_attn.layers.rotary import RotaryEmbedding, apply_rotary_emb, apply_rotary_emb_kv_, apply_rotary_emb_qkv_
from flash_attn.ops.triton.rotary import apply_rotary
from plain_attention import assert_near, leaves

SEQLEN, HEADS, HEAD_DIM = 4, 2, 8
ANGLES = torch.rand(SEQLEN, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 6
TABLES = (ANGLES.cos(), ANGLES.sin())


def rotate_part(x, index, tables=TABLES):
    """x with one part rotated, out of place."""
    x = x.clone()
    x[index] = apply_rotary_emb(x[index], *tables)
    return x


def rotary_expected(qkv):
    angles = torch.arange(SEQLEN, dtype=torch.float64)[:, None] * 10000.0 ** (-torch.arange(0, 6, 2).double() / 6)
    tables = (angles.cos(), angles.sin())
    return rotate_part(rotate_part(qkv, (slice(None), slice(None), 0), tables), (slice(None), slice(None), 1), tables)


Q, K = (slice(None), slice(None), 0), (slice(None), slice(None), 1)
CALLS = {
    # in place; out of place; shape
    "apply_rotary_emb": (
        lambda x: apply_rotary_emb(x, *TABLES, inplace=True), lambda x: apply_rotary_emb(x, *TABLES),
        (1, SEQLEN, HEADS, HEAD_DIM),
    ),
    "apply_rotary": (
        lambda x: apply_rotary(x, *TABLES, inplace=True, conjugate=True, interleaved=True),
        lambda x: apply_rotary(x, *TABLES, conjugate=True, interleaved=True), (1, SEQLEN, HEADS, HEAD_DIM),
    ),
    "apply_rotary_emb_qkv_": (
        lambda x: apply_rotary_emb_qkv_(x, *TABLES), lambda x: rotate_part(rotate_part(x, Q), K),
        (1, SEQLEN, 3, HEADS, HEAD_DIM),
    ),
    "apply_rotary_emb_qkv_ with heads": (
        lambda x: apply_rotary_emb_qkv_(x, *TABLES, num_heads_q=HEADS),
        lambda x: rotate_part(x, (slice(None), slice(None), slice(HEADS + 1))), (1, SEQLEN, HEADS + 2, HEAD_DIM),
    ),
    "apply_rotary_emb_kv_": (
        lambda x: apply_rotary_emb_kv_(x, *TABLES), lambda x: rotate_part(x, Q), (1, SEQLEN, 2, HEADS, HEAD_DIM)
    ),
    "RotaryEmbedding": (lambda x: RotaryEmbedding(6)(x), rotary_expected, (1, SEQLEN, 3, HEADS, HEAD_DIM)),
}  # fmt: skip


GUARDED = {
    "a leaf": lambda shape: (leaf := leaves(shape)[0], leaf),
    "a view of a leaf": lambda shape: (leaf := leaves((2, *shape))[0], leaf[1]),
    "unbind of a leaf": lambda shape: (leaf := leaves((2, *shape))[0], leaf.unbind(0)[1]),
    "unbind of a result": lambda shape: (leaf := leaves((2, *shape))[0], (leaf * 1.0).unbind(0)[1]),
    "chunk of a result": lambda shape: (leaf := leaves((2, *shape))[0], (leaf * 1.0).chunk(2)[1][0]),
    "a result": lambda shape: (leaf := leaves(shape)[0], leaf * 1.0),
    "a transposed result": lambda shape: (leaf := leaves(shape[:1] + shape[:0:-1])[0], (leaf * 1.0).permute(
        0, *range(len(shape) - 1, 0, -1))),
    "a parameter": lambda shape: (leaf := torch.nn.Parameter(leaves(shape)[0].detach()), leaf),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("guarded", GUARDED)
def test_turned_in_place_with_the_right_gradient(guarded, name):
    call, plain, shape = CALLS[name]
    leaf, x = GUARDED[guarded](shape)
    other_leaf, other = GUARDED[guarded](shape)
    expected = plain(other)
    out = call(x)
    assert out.data_ptr() == x.data_ptr()
    assert_near([out, x], [expected] * 2, atol=1e-12)
    upstream = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    found = torch.autograd.grad(out, leaf, upstream, create_graph=True)
    assert_near(found, torch.autograd.grad(expected, other_leaf, upstream), atol=1e-12)


@pytest.mark.parametrize("name", CALLS)
def test_without_gradients_nothing_is_recorded(name):
    call, plain, shape = CALLS[name]
    (x,) = leaves(shape)
    expected = plain(x.detach())
    with torch.no_grad():
        out = call(x)
    assert out is x
    assert_near([x], [expected], atol=1e-12)


def test_what_cannot_be_written_still_says_so():
    """Elements that share memory are not an autograd matter: the error stays, and nothing is rotated twice."""
    x = leaves((1, SEQLEN, 1, HEAD_DIM))[0].detach().expand(1, SEQLEN, HEADS, HEAD_DIM).requires_grad_()
    with pytest.raises(RuntimeError, match="single memory location"):
        apply_rotary_emb(x, *TABLES, inplace=True)


def test_a_saved_tensor_that_is_turned_is_noticed():
    """Autograd detects writes to saved tensors: 2.8.3 returns wrong gradients here."""
    (x,) = leaves((1, SEQLEN, HEADS, HEAD_DIM))
    square = x.square()
    apply_rotary_emb(x, *TABLES, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        square.sum().backward()
