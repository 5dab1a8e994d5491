"""Extreme values: checked in the precision in which they are used, and no finite substitutes for -infinity.

softmax_scale=1e39 is a valid double but infinite in float32; a mask of -1e4, or of the lowest finite number, does not
hide a key from scores that are lower.

Public threads: flashinfer-ai/flashinfer#4267, huggingface/transformers#14859, pytorch/pytorch#110213
"""

import pytest
import torch

import flash_attn
from flash_attn.flash_attention import FlashAttention
from flash_attn.modules.mha import MHA, CrossAttention, FlashCrossAttention, SelfAttention
from plain_attention import assert_near, attention, gradients, leaves, visible

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
LARGE = 3e38  # finite in float32, but infinite times log2(e)


def ones(dtype, *shape):
    return torch.ones(shape or (1, 3, 1, 8), dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e39, LARGE, 1e-39, 1e-46, 1e308 * 1.5])
def test_scale_in_the_type_of_scores(scale, dtype):
    x = ones(dtype)
    if dtype == torch.float64 and scale < 1e308:
        # Scores are equal: whatever their magnitude, all keys have the same weight.
        assert torch.equal(flash_attn.flash_attn_func(x, x, x, softmax_scale=scale), x)
        return
    for call in (
        lambda: flash_attn.flash_attn_func(x, x, x, softmax_scale=scale),
        lambda: flash_attn.flash_attn_qkvpacked_func(torch.stack([x] * 3, 2), softmax_scale=scale),
        lambda: FlashAttention(softmax_scale=scale)(torch.stack([x] * 3, 2)),
        lambda: torch.ops.flash_attn._flash_attn_forward(x, x, x, 0.0, scale, False, -1, -1, 0.0, None, False),
    ):
        kind = "" if dtype == torch.float64 else r" \(in float32\)"
        with pytest.raises(ValueError, match=rf"softmax_scale: expected a finite number above 0{kind}, got"):
            call()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [1e39, 1e-39, 1e-46])
def test_softcap_in_the_type_of_scores(softcap, dtype):
    x = ones(dtype)
    if dtype == torch.float64:
        assert torch.equal(flash_attn.flash_attn_func(x, x, x, softcap=softcap), x)
        return
    with pytest.raises(ValueError, match=r"softcap: expected a finite number \(in float32\), or 0, got"):
        flash_attn.flash_attn_func(x, x, x, softcap=softcap)


@pytest.mark.parametrize("dtype", DTYPES[:3])
@pytest.mark.parametrize(("scale", "softcap"), [(1e20, 1e-20), (1e-20, 1e20)])
def test_scale_over_softcap_in_the_type_of_scores(scale, softcap, dtype):
    x = ones(dtype)
    with pytest.raises(ValueError, match=r"softcap: expected a number by which softmax_scale=.* can be divided"):
        flash_attn.flash_attn_func(x, x, x, softmax_scale=scale, softcap=softcap)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{"softmax_scale": 1e18}, {"softmax_scale": 1e-18}, {"softcap": 1e18}], ids=str)
def test_large_and_small_numbers_that_fit(options, dtype):
    """One key gets all the weight, or all keys get the same: exact in both cases."""
    q, k, v = (x.detach().to(dtype) for x in leaves((1, 3, 1, 8), (1, 5, 1, 8), (1, 5, 1, 8)))
    out = flash_attn.flash_attn_func(q, k, v, **options)
    scores = torch.einsum("bihd,bjhd->bhij", q.double(), k.double()) * options.get("softmax_scale", 8**-0.5)
    expected = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v.double())
    assert_near([out], [expected], atol=4 * torch.finfo(dtype).eps)


MASK = torch.tensor([[False, True, True, False, True, False], [True, False, False, True, True, True]])
OPTIONS = {
    "window": {"window_size": (2, 1)},
    "causal window, GQA": {"window_size": (3, -1), "causal": True, "num_heads_kv": 1},
    "ALiBi": {"use_alibi": True},
    "cross, causal": {"cross_attn": True, "causal": True},
}


@pytest.mark.parametrize("size", [1.0, 1e2, 1e4])
@pytest.mark.parametrize("softmax_scale", [1e-9, 1e-6, 0.4])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_masked_keys_however_small_the_scale(options, softmax_scale, size):
    """With position-dependent options the mask is in an extra dimension: it hides keys at any scale of the scores."""
    found = []
    for use_flash_attn in (True, False):
        torch.manual_seed(4)
        module = MHA(16, 2, softmax_scale=softmax_scale, use_flash_attn=use_flash_attn, dtype=torch.float64, **options)
        inputs = leaves(*[(2, 6, 16)] * (2 if "cross_attn" in options else 1))
        out = module(*(x * size for x in inputs), key_padding_mask=MASK)
        found.append([out, *gradients(out, inputs)])
    scale = max(x.abs().max().item() for x in found[1])
    assert all(torch.isfinite(x).all() for x in found[0])
    # The relative error of a weight is the absolute error of its score.
    assert_near(found[0], found[1], atol=scale * (1e-11 + 1e-15 * size**2))


@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_masked_keys_in_every_type(options, dtype, autocast):
    """No intermediate result is NaN, except in float16, which has no suitable finite number."""
    mask = MASK.clone()
    mask[0, :5] = False  # queries that see only masked keys
    torch.manual_seed(4)
    module = MHA(16, 2, use_flash_attn=True, dtype=dtype, **options)
    exact = MHA(16, 2, use_flash_attn=True, dtype=torch.float64, **options)
    exact.load_state_dict({name: p.double() for name, p in module.state_dict().items()})
    inputs = leaves(*[(2, 6, 16)] * (2 if "cross_attn" in options else 1), dtype=dtype)
    check_nan = torch.float16 not in (dtype, autocast)
    enabled = autocast is not None
    with torch.autograd.detect_anomaly(check_nan=check_nan), torch.autocast("cpu", autocast, enabled=enabled):
        out = module(*inputs, key_padding_mask=mask)
        found = [out, *torch.autograd.grad(out.double().sum(), inputs)]
    wide = [x.detach().double().requires_grad_() for x in inputs]
    expected = exact(*wide, key_padding_mask=mask)
    assert_near(found, [expected, *torch.autograd.grad(expected.sum(), wide)], atol=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_plain_attention_masks_scores_below_any_stand_in(dtype):
    """Scores that overflow to -inf are not below the mask: such a row must not see hidden keys."""
    largest = torch.finfo(dtype).max
    q, k = torch.full((1, 2, 1, 4), largest, dtype=dtype), torch.full((1, 3, 1, 4), -largest, dtype=dtype)
    v = torch.arange(3.0).view(1, 3, 1, 1).expand(1, 3, 1, 4).to(dtype)
    keep = torch.tensor([[True, True, False]])
    out = CrossAttention(softmax_scale=1.0)(q, torch.stack([k, v], dim=2), key_padding_mask=keep)
    unmasked = CrossAttention(softmax_scale=1.0)(q, torch.stack([k, v], dim=2)[:, :2])
    assert torch.equal(out.isnan(), unmasked.isnan())
    assert torch.equal(out.nan_to_num(), unmasked.nan_to_num())


@pytest.mark.parametrize("kind", [SelfAttention, CrossAttention])
def test_rows_that_see_nothing(kind):
    """Output 0, zero gradients, and no NaN that anomaly detection would report."""
    q, kv = leaves((2, 3, 2, 8), (2, 4, 2, 2, 8))
    keep = torch.tensor([[False] * 4, [True, True, False, True]])
    inputs = (q, kv)
    if kind is SelfAttention:
        inputs, keep = leaves((2, 4, 3, 2, 8)), keep
    with torch.autograd.detect_anomaly(check_nan=True):
        out = kind(causal=True)(*inputs, key_padding_mask=keep)
        found = gradients(out, inputs)
    assert (out[0] == 0).all()
    assert all((x[0] == 0).all() for x in found)
    assert all(torch.isfinite(x).all() for x in (out, *found))


def test_flash_and_plain_agree_where_scores_are_huge():
    q, kv = leaves((1, 5, 2, 8), (1, 7, 2, 2, 8))
    options = {"softmax_scale": 1e6, "window_size": (2, 0)}
    out = FlashCrossAttention(**options)(q, kv)
    expected, _ = attention(q, *kv.unbind(2), keep=visible(5, 7, window=(2, 0)), scale=1e6)
    assert_near([out, CrossAttention(**options)(q, kv)], [expected] * 2, atol=1e-9)
