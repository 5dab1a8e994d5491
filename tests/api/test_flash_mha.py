"""FlashMHA and FlashAttention, the modules of version 1, against plain attention in float64."""

import pytest
import torch
import torch.nn.functional as F

from flash_attn.flash_attention import FlashAttention, FlashMHA
from plain_attention import assert_near, assert_same, attention, gradients, leaves, visible

BATCH, SEQLEN, EMBED, HEADS = 3, 6, 24, 4
HEAD_DIM = EMBED // HEADS

MASKS = {
    "none": None,
    "padding on the right": [[1, 1, 1, 1, 0, 0], [1, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1]],
    "padding on the left": [[0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1], [1, 1, 1, 1, 1, 1]],
    "holes": [[1, 0, 1, 0, 1, 1], [0, 1, 0, 0, 1, 0], [0, 0, 0, 1, 0, 1]],
    "an empty sequence": [[1, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0], [0, 1, 1, 1, 1, 0]],
    "nothing kept": [[0] * 6] * 3,
}
with_masks = pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)


def as_mask(mask):
    return None if mask is None else torch.tensor(mask, dtype=torch.bool)


def make(dtype=torch.float64, **kwargs):
    torch.manual_seed(4)
    return FlashMHA(EMBED, HEADS, dtype=dtype, **kwargs)


def keep_of(mask, causal):
    """(batch, 1, seqlen, seqlen): padding sees nothing and is not seen."""
    keep = visible(SEQLEN, SEQLEN, causal).expand(BATCH, 1, SEQLEN, SEQLEN)
    return keep if mask is None else keep & mask[:, None, None, :] & mask[:, None, :, None]


def plain_mha(module, x, mask, causal):
    qkv = F.linear(x, module.Wqkv.weight, module.Wqkv.bias).unflatten(-1, (3, HEADS, HEAD_DIM))
    out, _ = attention(*qkv.unbind(2), keep=keep_of(mask, causal))
    return F.linear(out.flatten(2), module.out_proj.weight, module.out_proj.bias)


@with_masks
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_flash_mha(bias, causal, mask):
    module, mask = make(bias=bias, causal=causal), as_mask(mask)
    (x,) = leaves((BATCH, SEQLEN, EMBED))
    result = module(x, key_padding_mask=mask)
    assert type(result) is tuple
    assert len(result) == 2
    assert result[1] is None
    expected = plain_mha(module, x, mask, causal)
    inputs = (x, *module.parameters())
    assert_near([result[0], *gradients(result[0], inputs)], [expected, *gradients(expected, inputs)])
    if mask is not None:
        bias_row = module.out_proj.bias.detach() if bias else torch.zeros(EMBED, dtype=x.dtype)
        assert torch.equal(result[0][~mask], bias_row.expand(int((~mask).sum()), -1))


@with_masks
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("scale", [None, 0.7])
def test_flash_attention(scale, causal, mask):
    module, mask = FlashAttention(softmax_scale=scale), as_mask(mask)
    (qkv,) = leaves((BATCH, SEQLEN, 3, HEADS, HEAD_DIM))
    out, weights = module(qkv, key_padding_mask=mask, causal=causal)
    assert weights is None
    expected, _ = attention(*qkv.unbind(2), keep=keep_of(mask, causal), scale=scale)
    assert_near([out, *gradients(out, [qkv])], [expected, *gradients(expected, [qkv])])
    if mask is not None:
        assert (out[~mask] == 0).all()


def test_flash_attention_of_rows_without_padding():
    """Packed qkv (total, 3, heads, head_dim) with cu_seqlens and max_s."""
    (qkv,) = leaves((9, 3, HEADS, HEAD_DIM))
    cu_seqlens = torch.tensor([0, 4, 4, 9], dtype=torch.int32)
    out, weights = FlashAttention()(qkv, causal=True, cu_seqlens=cu_seqlens, max_s=5)
    assert weights is None
    parts = [attention(*qkv[None, a:b].unbind(2), keep=visible(b - a, b - a, True))[0][0] for a, b in ((0, 4), (4, 9))]
    expected = torch.cat(parts)
    assert_near([out, *gradients(out, [qkv])], [expected, *gradients(expected, [qkv])])


@pytest.mark.parametrize("fill", [torch.nan, torch.inf])
def test_padding_may_hold_anything(fill):
    """The content of padding affects neither the result nor the gradients of the parameters."""
    module, mask = make(), as_mask(MASKS["holes"])
    x = torch.randn(BATCH, SEQLEN, EMBED, dtype=torch.float64)
    results = []
    for given in (x, x.masked_fill(~mask[..., None], fill)):
        out, _ = module(given, key_padding_mask=mask)
        results.append([out, *gradients(out, list(module.parameters()))])
    assert_same(results[1], results[0])


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int64, torch.uint8])
def test_mask_types(mask_dtype):
    module, mask = make(), as_mask(MASKS["holes"])
    x = torch.randn(BATCH, SEQLEN, EMBED, dtype=torch.float64)
    assert_same([module(x, mask.to(mask_dtype))[0]], [module(x, key_padding_mask=mask)[0]])


def test_state_dict_names():
    """Checkpoints of version 1 load."""
    shapes = {name: tuple(x.shape) for name, x in make().state_dict().items()}
    assert shapes == {
        "Wqkv.weight": (3 * EMBED, EMBED),
        "Wqkv.bias": (3 * EMBED,),
        "out_proj.weight": (EMBED, EMBED),
        "out_proj.bias": (EMBED,),
    }
    assert list(make(bias=False).state_dict()) == ["Wqkv.weight", "out_proj.weight"]


def test_attributes():
    module = make(causal=True, attention_dropout=0.1)
    assert (module.embed_dim, module.num_heads, module.head_dim, module.causal) == (EMBED, HEADS, HEAD_DIM, True)
    assert isinstance(module.inner_attn, FlashAttention)


CONSTRUCTIONS = {
    "embed_dim and num_heads by position": lambda: FlashMHA(EMBED, HEADS),
    "all keywords": lambda: FlashMHA(
        embed_dim=EMBED, num_heads=HEADS, bias=True, batch_first=True, attention_dropout=0.0, causal=False,
        device=torch.device("cpu"), dtype=torch.float32,
    ),
    "dropout by two names": lambda: FlashMHA(embed_dim=EMBED, num_heads=HEADS, dropout=0.1, attention_dropout=0.1),
    "device by name": lambda: FlashMHA(EMBED, HEADS, device="cpu", dtype=torch.bfloat16),
    "one head": lambda: FlashMHA(EMBED, 1),
}  # fmt: skip


@pytest.mark.parametrize("build", CONSTRUCTIONS.values(), ids=CONSTRUCTIONS)
def test_constructions(build):
    module = build()
    dtype = module.Wqkv.weight.dtype
    x = torch.randn(2, 5, EMBED, dtype=dtype)
    out, _ = module(x)
    assert (out.dtype, out.shape) == (dtype, x.shape)
    assert torch.isfinite(out).all()


def test_meta_device():
    module = FlashMHA(EMBED, HEADS, device="meta", dtype=torch.bfloat16)
    out, _ = module(torch.empty(2, 5, EMBED, device="meta", dtype=torch.bfloat16))
    assert (out.device.type, out.dtype, tuple(out.shape)) == ("meta", torch.bfloat16, (2, 5, EMBED))


def test_dropout_only_in_training():
    module, x = make(attention_dropout=0.5), torch.randn(BATCH, SEQLEN, EMBED, dtype=torch.float64)
    module.eval()
    before = torch.random.get_rng_state()
    assert_near([module(x)[0]], [plain_mha(module, x, None, causal=False)])
    assert torch.equal(before, torch.random.get_rng_state()), "evaluation draws no random numbers"
    module.train()
    torch.manual_seed(5)
    one, two = module(x)[0], module(x)[0]
    assert not torch.equal(one, two)
    torch.manual_seed(5)
    assert_same([module(x)[0]], [one])
    many = torch.stack([module(x)[0] for _ in range(2000)]).mean(0)
    assert (many - plain_mha(module, x, None, causal=False)).abs().max() < 0.05


WRONG = {
    # invalid call; error type; words of the message
    "batch_first=False": (lambda: FlashMHA(EMBED, HEADS, batch_first=False), ValueError, "batch_first"),
    "heads do not divide": (lambda: FlashMHA(EMBED, 5), ValueError, "embed_dim.*num_heads|num_heads.*embed_dim"),
    "heads as a float": (lambda: FlashMHA(EMBED, 4.0), TypeError, "num_heads: expected int, got"),
    "width as a string": (lambda: FlashMHA("24", HEADS), TypeError, "embed_dim: expected int, got"),
    "no heads": (lambda: FlashMHA(EMBED, 0), ValueError, "num_heads"),
    "dropout of 1": (lambda: FlashMHA(EMBED, HEADS, attention_dropout=1.0), ValueError, "dropout"),
    "negative dropout": (lambda: FlashMHA(EMBED, HEADS, attention_dropout=-0.1), ValueError, "dropout"),
    "weights wanted": (lambda: make()(x_of(), need_weights=True), ValueError, "need_weights"),
    "query, key and value, as nn.MultiheadAttention": (lambda: make()(x_of(), x_of(), x_of()), TypeError, "FlashMHA"),
    "query and key": (lambda: make()(x_of(), x_of()), (TypeError, ValueError), "key_padding_mask"),
    "mask of another shape": (lambda: make()(x_of(), torch.ones(3, 5).bool()), ValueError, "key_padding_mask.*6.*5"),
    "mask as a list": (lambda: make()(x_of(), [[True] * 6] * 3), TypeError, "key_padding_mask"),
    "x of rank 2": (lambda: make()(x_of()[0]), ValueError, "x: expected.*got"),
    "x of another width": (lambda: make()(x_of()[..., :8]), ValueError, "x: expected.*24.*got.*8"),
    "x is no tensor": (lambda: make()([1.0]), TypeError, "x: expected.*got"),
    "qkv of rank 4 without cu_seqlens": (lambda: FlashAttention()(qkv_of()[0]), ValueError, "qkv"),
    "cu_seqlens without max_s": (
        lambda: FlashAttention()(qkv_of()[0], cu_seqlens=torch.tensor([0, 6], dtype=torch.int32)), ValueError, "max_s"
    ),
    "a name of nothing": (lambda: FlashMHA(EMBED, HEADS, rotary=True), TypeError, "rotary"),
    "two dropouts": (lambda: FlashMHA(EMBED, HEADS, dropout=0.1, attention_dropout=0.2), ValueError, "dropout"),
    "float mask": (lambda: make()(x_of(), torch.zeros(BATCH, SEQLEN)), TypeError, "key_padding_mask.*bool.*float"),
    "mask and cu_seqlens": (
        lambda: FlashAttention()(
            qkv_of().flatten(0, 1), torch.ones(3, 6).bool(), cu_seqlens=torch.tensor([0, 18], dtype=torch.int32)
        ),
        ValueError, "key_padding_mask",
    ),
    "weights of FlashAttention": (lambda: FlashAttention()(qkv_of(), need_weights=True), ValueError, "need_weights"),
}  # fmt: skip


def x_of():
    return torch.zeros(BATCH, SEQLEN, EMBED, dtype=torch.float64)


def qkv_of():
    return torch.zeros(BATCH, SEQLEN, 3, HEADS, HEAD_DIM, dtype=torch.float64)


@pytest.mark.parametrize(("call", "error", "words"), WRONG.values(), ids=WRONG)
def test_wrong_calls(call, error, words):
    with pytest.raises(error, match=words):
        call()
    assert torch.isfinite(make()(x_of())[0]).all(), "the next good call works"
