"""Rotary embeddings against complex multiplication in float64."""

import pytest
import torch

from flash_attn.layers.rotary import (
    RotaryEmbedding,
    apply_rotary_emb,
    apply_rotary_emb_func,
    apply_rotary_emb_kv_,
    apply_rotary_emb_qkv_,
)
from flash_attn.ops.triton.rotary import apply_rotary
from plain_attention import assert_near, gradients, leaves
from rotation import frequencies, rotated

BATCH, SEQLEN, HEADS, HEAD_DIM = 3, 5, 2, 12
LENGTHS = (2, 0, 5)
POSITIONS = 16


def angles(rotary_dim=8, seed=7):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(POSITIONS, rotary_dim // 2, generator=generator, dtype=torch.float64) * 6


def positions_of(offsets):
    start = torch.as_tensor(offsets).reshape(-1, 1)
    return (start + torch.arange(SEQLEN)).expand(BATCH, SEQLEN)


OFFSETS = {
    "none": 0,
    "int": 4,
    "tensor": torch.tensor([3, 0, 11]),
    "int32": torch.tensor([3, 0, 11], dtype=torch.int32),
}


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("offsets", OFFSETS.values(), ids=OFFSETS)
@pytest.mark.parametrize("rotary_dim", [2, 8, 12])
@pytest.mark.parametrize("interleaved", [False, True])
def test_dense(interleaved, rotary_dim, offsets, inplace):
    (x,) = leaves((BATCH, SEQLEN, HEADS, HEAD_DIM))
    angle = angles(rotary_dim)
    expected = rotated(x, angle[positions_of(offsets)], interleaved)
    given = x * 1.0
    out = apply_rotary_emb(given, angle.cos(), angle.sin(), interleaved, inplace, seqlen_offsets=offsets)
    assert_near([out], [expected], atol=1e-13)
    assert (out.data_ptr() == given.data_ptr()) == inplace
    assert_near(gradients(out, [x]), gradients(expected, [x]), atol=1e-13)
    raw = apply_rotary(x.detach(), angle.cos(), angle.sin(), seqlen_offsets=offsets, interleaved=interleaved)
    back = apply_rotary(raw, angle.cos(), angle.sin(), seqlen_offsets=offsets, interleaved=interleaved, conjugate=True)
    assert_near([raw, back], [expected, x], atol=1e-13)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("offsets", OFFSETS.values(), ids=OFFSETS)
@pytest.mark.parametrize("interleaved", [False, True])
def test_varlen(interleaved, offsets, inplace):
    total = sum(LENGTHS)
    (x,) = leaves((total, HEADS, HEAD_DIM))
    angle = angles()
    cu_seqlens = torch.tensor([0, 2, 2, 7], dtype=torch.int32)
    starts = torch.as_tensor(offsets).expand(BATCH).tolist()
    positions = torch.cat([torch.arange(n) + start for n, start in zip(LENGTHS, starts, strict=True)])
    expected = rotated(x, angle[positions], interleaved)
    given = x * 1.0
    out = apply_rotary_emb(
        given, angle.cos(), angle.sin(), interleaved, inplace, offsets, cu_seqlens=cu_seqlens, max_seqlen=max(LENGTHS)
    )
    assert_near([out], [expected], atol=1e-13)
    assert (out.data_ptr() == given.data_ptr()) == inplace
    assert_near(gradients(out, [x]), gradients(expected, [x]), atol=1e-13)


def test_apply_rotary_in_place_returns_what_it_was_given():
    (x,) = leaves((BATCH, SEQLEN, HEADS, HEAD_DIM))
    x = x.detach()
    angle = angles()
    expected = rotated(x, angle[:SEQLEN])
    out = apply_rotary(x, angle.cos(), angle.sin(), inplace=True)
    assert out.data_ptr() == x.data_ptr()
    assert_near([out, x], [expected, expected], atol=1e-13)


def test_func_is_another_name():
    x, angle = torch.randn(1, 3, 2, 8, dtype=torch.float64), angles()
    assert torch.equal(
        apply_rotary_emb_func(x, angle.cos(), angle.sin()), apply_rotary_emb(x, angle.cos(), angle.sin())
    )


@pytest.mark.parametrize("offsets", [0, torch.tensor([3, 0, 11])], ids=["none", "tensor"])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("key_angles", [False, True])
@pytest.mark.parametrize("layout", ["qkv", "heads", "noncontiguous"])
def test_qkv(layout, key_angles, interleaved, offsets):
    """Queries and keys are rotated, values are not; keys may have tables of their own."""
    heads_k = 1 if layout == "heads" else HEADS
    q, k, v = leaves((BATCH, SEQLEN, HEADS, HEAD_DIM), *[(BATCH, SEQLEN, heads_k, HEAD_DIM)] * 2)
    qkv = torch.cat([q, k, v], dim=2) if layout == "heads" else torch.stack([q, k, v], dim=2)
    if layout == "noncontiguous":
        qkv = torch.stack([q, k, v], dim=3).transpose(2, 3)
    angle, angle_k = angles(), angles(seed=8) if key_angles else None
    key = {} if angle_k is None else {"cos_k": angle_k.cos(), "sin_k": angle_k.sin()}
    heads = {"num_heads_q": HEADS} if layout == "heads" else {}
    out = apply_rotary_emb_qkv_(
        qkv, angle.cos(), angle.sin(), **key, interleaved=interleaved, seqlen_offsets=offsets, **heads
    )
    assert out.data_ptr() == qkv.data_ptr()
    positions = positions_of(offsets)
    turned = [rotated(q, angle[positions], interleaved)]
    turned += [rotated(k, (angle if angle_k is None else angle_k)[positions], interleaved), v]
    actual = out.split([HEADS, heads_k, heads_k], dim=2) if layout == "heads" else out.unbind(2)
    assert_near(actual, turned, atol=1e-13)
    assert_near(gradients(actual, (q, k, v)), gradients(turned, (q, k, v)), atol=1e-13)


@pytest.mark.parametrize("offsets", [0, torch.tensor([3, 0, 11])], ids=["none", "tensor"])
@pytest.mark.parametrize("interleaved", [False, True])
def test_kv(interleaved, offsets):
    k, v = leaves(*[(BATCH, SEQLEN, HEADS, HEAD_DIM)] * 2)
    kv = torch.stack([k, v], dim=2)
    angle = angles()
    out = apply_rotary_emb_kv_(kv, angle.cos(), angle.sin(), interleaved=interleaved, seqlen_offsets=offsets)
    assert out.data_ptr() == kv.data_ptr()
    expected = [rotated(k, angle[positions_of(offsets)], interleaved), v]
    assert_near(out.unbind(2), expected, atol=1e-13)
    assert_near(gradients(out.unbind(2), (k, v)), gradients(expected, (k, v)), atol=1e-13)


@pytest.mark.parametrize(("dtype", "eps"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)], ids=str)
@pytest.mark.parametrize("table_dtype", [torch.float32, None], ids=["float32 tables", "tables of the same type"])
def test_low_precision_rounds_once(table_dtype, dtype, eps):
    """Computed in float32: the only error is the final rounding (and that of the tables, if they are rounded)."""
    (x,) = leaves((BATCH, SEQLEN, HEADS, HEAD_DIM), dtype=dtype)
    cos, sin = (t.to(table_dtype or dtype) for t in (angles().cos(), angles().sin()))
    out = apply_rotary_emb(x, cos, sin)
    assert out.dtype == dtype
    first, second = x.double()[..., :4], x.double()[..., 4:8]
    c, s = (t.double()[:SEQLEN, None] for t in (cos, sin))
    expected = torch.cat([first * c - second * s, second * c + first * s, x.double()[..., 8:]], dim=-1)
    error = (out.double() - expected).abs()
    assert (error <= expected.abs() * eps + 1e-6).all()


# RotaryEmbedding.


@pytest.mark.parametrize("base", [10000.0, 500])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("offset", [0, 3, torch.tensor([3, 0, 1])], ids=["none", "int", "tensor"])
@pytest.mark.parametrize("form", ["qkv", "q and kv", "heads"])
def test_embedding(form, offset, interleaved, base):
    rotary = RotaryEmbedding(8, base=base, interleaved=interleaved)
    heads_k = HEADS if form == "qkv" else 1
    q, k, v = leaves((BATCH, SEQLEN, HEADS, HEAD_DIM), *[(BATCH, SEQLEN, heads_k, HEAD_DIM)] * 2, dtype=torch.float32)
    extra = {"max_seqlen": SEQLEN + 3}
    if form == "qkv":
        out = rotary(torch.stack([q, k, v], dim=2), seqlen_offset=offset, **extra).unbind(2)
    elif form == "heads":
        packed = rotary(torch.cat([q, k, v], dim=2), seqlen_offset=offset, num_heads_q=HEADS, **extra)
        out = packed.split([HEADS, heads_k, heads_k], dim=2)
    else:
        new_q, new_kv = rotary(q * 1.0, torch.stack([k, v], dim=2), seqlen_offset=offset, **extra)
        out = [new_q, *new_kv.unbind(2)]
    angle = positions_of(offset)[..., None] * frequencies(8, base)
    expected = [rotated(q.double(), angle, interleaved), rotated(k.double(), angle, interleaved), v]
    assert_near(out, expected, atol=3e-6)


def test_embedding_of_seqlens_that_grow_and_shrink():
    rotary = RotaryEmbedding(8)
    for seqlen in (3, 9, 4):
        (qkv,) = leaves((1, seqlen, 3, HEADS, 8), dtype=torch.float32)
        out = rotary(qkv * 1.0)
        angle = torch.arange(seqlen)[:, None] * frequencies(8)
        assert_near([out[:, :, 0]], [rotated(qkv[:, :, 0].double(), angle)], atol=3e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cache_attributes(dtype):
    """Subclasses in other projects fill the tables with _update_cos_sin_cache and read the attributes."""
    rotary = RotaryEmbedding(dim=8, base=500.0, device=torch.device("cpu"), interleaved=False)
    assert list(rotary.state_dict()) == []
    assert (rotary.dim, rotary.base, rotary.interleaved, rotary.scale_base, rotary.scale) == (
        8,
        500.0,
        False,
        None,
        None,
    )
    assert (rotary._cos_cached, rotary._sin_cached) == (None, None)
    rotary._update_cos_sin_cache(6, device=torch.device("cpu"), dtype=dtype)
    angle = torch.arange(6)[:, None] * frequencies(8, 500.0)
    assert rotary._cos_cached.dtype == rotary._sin_cached.dtype == dtype
    tolerance = 1e-6 if dtype == torch.float32 else 2**-8
    assert_near([rotary._cos_cached, rotary._sin_cached], [angle.cos(), angle.sin()], atol=tolerance)
    assert_near([rotary.inv_freq], [frequencies(8, 500.0)], atol=1e-7)


def test_bfloat16_module_keeps_exact_angles():
    """Positions times frequencies are computed in float32 even after the module is cast."""
    rotary = RotaryEmbedding(8).bfloat16()
    rotary._update_cos_sin_cache(300, device=torch.device("cpu"), dtype=torch.float32)
    angle = torch.arange(300)[:, None] * frequencies(8)
    assert_near([rotary._cos_cached, rotary._sin_cached], [angle.cos(), angle.sin()], atol=1e-4)


@pytest.mark.parametrize("form", ["qkv", "q and kv"])
def test_xpos(form):
    """scale_base: queries are multiplied by scale ** power, keys divided by it."""
    rotary = RotaryEmbedding(8, scale_base=512.0)
    q, k, v = leaves(*[(1, SEQLEN, HEADS, 8)] * 3, dtype=torch.float32)
    if form == "qkv":
        out = rotary(torch.stack([q, k, v], dim=2)).unbind(2)
    else:
        new_q, new_kv = rotary(q * 1.0, torch.stack([k, v], dim=2))
        out = [new_q, *new_kv.unbind(2)]
    power = (torch.arange(SEQLEN, dtype=torch.float64) - SEQLEN // 2) / 512.0
    scale = ((torch.arange(0, 8, 2, dtype=torch.float64) + 0.4 * 8) / (1.4 * 8)) ** power[:, None]
    angle = torch.arange(SEQLEN)[:, None] * frequencies(8)
    expected = [
        rotated(q.double(), angle, scale=scale[:, None]),
        rotated(k.double(), angle, scale=1 / scale[:, None]),
        v,
    ]
    assert_near(out, expected, atol=3e-6)


def test_tables_made_in_inference_mode_serve_training():
    rotary = RotaryEmbedding(8)
    (qkv,) = leaves((1, SEQLEN, 3, HEADS, 8), dtype=torch.float32)
    with torch.inference_mode():
        expected = rotary(qkv.detach().clone())
    out = rotary(qkv * 1.0)
    assert_near([out], [expected], atol=0)
    assert torch.isfinite(gradients(out, [qkv])[0]).all()
