"""MHA and its inner attention modules against plain attention in float64."""

import pytest
import torch
import torch.nn.functional as F

from flash_attn.modules.mha import (
    MHA,
    CrossAttention,
    FlashCrossAttention,
    FlashSelfAttention,
    SelfAttention,
    get_alibi_slopes,
)
from plain_attention import OpCalls, alibi_bias, assert_near, assert_same, attention, gradients, leaves, visible
from rotation import frequencies, rotated

BATCH, SEQLEN, SEQLEN_KV, EMBED, HEADS = 3, 6, 8, 32, 4
HEAD_DIM = EMBED // HEADS

# Options of MHA; "cross": cross-attention.
OPTIONS = {
    "self": {},
    "no biases": {"qkv_proj_bias": False, "out_proj_bias": False},
    "causal": {"causal": True},
    "scale": {"softmax_scale": 0.9},
    "window": {"window_size": (2, 1)},
    "causal window": {"causal": True, "window_size": (2, 2)},
    "GQA": {"num_heads_kv": 2, "causal": True},
    "MQA": {"num_heads_kv": 1},
    "ALiBi": {"use_alibi": True},
    "ALiBi, causal, GQA": {"use_alibi": True, "causal": True, "num_heads_kv": 2},
    "rotary": {"rotary_emb_dim": HEAD_DIM, "causal": True},
    "rotary in part, interleaved": {"rotary_emb_dim": 4, "rotary_emb_interleaved": True},
    "rotary, base, GQA": {"rotary_emb_dim": HEAD_DIM, "rotary_emb_base": 300.0, "num_heads_kv": 2},
    "xPos": {"rotary_emb_dim": HEAD_DIM, "rotary_emb_scale_base": 512.0, "causal": True},
    "cross": {"cross_attn": True},
    "cross, GQA, causal": {"cross_attn": True, "num_heads_kv": 2, "causal": True},
    "cross, window": {"cross_attn": True, "window_size": (3, 1)},
}
with_options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def make(use_flash_attn=True, dtype=torch.float64, **options):
    torch.manual_seed(4)
    return MHA(EMBED, HEADS, use_flash_attn=use_flash_attn, dtype=dtype, **options)


def inputs_of(options, dtype=torch.float64):
    x, x_kv = leaves((BATCH, SEQLEN, EMBED), (BATCH, SEQLEN_KV, EMBED), dtype=dtype)
    return (x, x_kv) if options.get("cross_attn") else (x,)


def project(module, x, x_kv):
    """q, k, v from the parameters of MHA."""
    heads_kv = module.num_heads_kv
    if module.cross_attn:
        q, kv = module.Wq(x), module.Wkv(x if x_kv is None else x_kv)
        q = q.unflatten(-1, (HEADS, HEAD_DIM))
        return q, *kv.unflatten(-1, (2, heads_kv, HEAD_DIM)).unbind(-3)
    qkv = module.Wqkv(x).unflatten(-1, (HEADS + 2 * heads_kv, HEAD_DIM))
    return qkv.split([HEADS, heads_kv, heads_kv], dim=-2)


def rotate(x, options, sign=0):
    """Rotary embeddings; with xPos, sign is 1 for queries and -1 for keys."""
    dim, base = options["rotary_emb_dim"], options.get("rotary_emb_base", 10000.0)
    positions = torch.arange(x.shape[1])
    scale = 1.0
    if options.get("rotary_emb_scale_base"):
        power = (positions - x.shape[1] // 2) / options["rotary_emb_scale_base"]
        scale = ((torch.arange(0, dim, 2) + 0.4 * dim) / (1.4 * dim)) ** (sign * power[:, None, None])
    return rotated(x, positions[:, None] * frequencies(dim, base), options.get("rotary_emb_interleaved", False), scale)


def plain_mha(module, options, x, x_kv=None, mask=None):
    """Reference for MHA; mask (batch, seqlen_k): padding queries give 0 before out_proj."""
    q, k, v = project(module, x, x_kv)
    if options.get("rotary_emb_dim"):
        q, k = rotate(q, options, 1), rotate(k, options, -1)
    seqlen_q, seqlen_k = q.shape[1], k.shape[1]
    keep = visible(seqlen_q, seqlen_k, options.get("causal", False), options.get("window_size", (-1, -1)))
    keep = keep.expand(x.shape[0], 1, seqlen_q, seqlen_k)
    if mask is not None:
        keep = keep & mask[:, None, None, :]
        if x_kv is None:
            keep = keep & mask[:, None, :, None]
    bias = alibi_bias(torch.tensor(get_alibi_slopes(HEADS)), seqlen_q, seqlen_k) if options.get("use_alibi") else None
    out, _ = attention(q, k, v, keep=keep, bias=bias, scale=options.get("softmax_scale"))
    return module.out_proj(out.flatten(-2))


@with_options
@pytest.mark.parametrize("use_flash_attn", [True, False])
def test_mha(use_flash_attn, options):
    module, inputs = make(use_flash_attn, **options), inputs_of(options)
    out = module(*inputs)
    expected = plain_mha(module, options, *inputs)
    wanted = (*inputs, *module.parameters())
    tolerance = 2e-6 if "rotary_emb_dim" in options else 1e-10
    assert_near([out, *gradients(out, wanted)], [expected, *gradients(expected, wanted)], atol=tolerance * 10)


MASKS = {
    "padding on the right": [[1, 1, 1, 1, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1]],
    "padding on the left": [[0, 0, 1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 1]],
    "holes": [[1, 0, 1, 0, 1, 1, 0, 1], [0, 1, 0, 0, 1, 0, 1, 0], [0, 0, 0, 1, 0, 1, 1, 0]],
    "an empty sequence": [[1, 1, 1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0, 0], [0, 1, 1, 1, 1, 0, 0, 0]],
}


@with_options
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("use_flash_attn", [True, False])
def test_key_padding_mask(use_flash_attn, mask, options):
    """True = keep; positions and distances are those of the padded batch."""
    module, inputs = make(use_flash_attn, **options), inputs_of(options)
    mask = torch.tensor(mask, dtype=torch.bool)[:, : inputs[-1].shape[1]]
    out = module(*inputs, key_padding_mask=mask)
    expected = plain_mha(module, options, *inputs, mask=mask)
    wanted = (*inputs, *module.parameters())
    tolerance = 2e-6 if "rotary_emb_dim" in options else 1e-10
    assert_near([out, *gradients(out, wanted)], [expected, *gradients(expected, wanted)], atol=tolerance * 10)


@pytest.mark.parametrize("options", [OPTIONS[name] for name in OPTIONS if "cross" not in name], ids=str)
def test_varlen(options):
    """Packed rows: each sequence as if alone, with rotary positions from its start."""
    module = make(**options)
    (x,) = leaves((9, EMBED))
    bounds = ((0, 4), (4, 4), (4, 9))
    out = module(x, cu_seqlens=torch.tensor([0, 4, 4, 9], dtype=torch.int32), max_seqlen=5)
    expected = torch.cat([plain_mha(module, options, x[None, a:b])[0] for a, b in bounds if a < b])
    wanted = (x, *module.parameters())
    tolerance = 2e-5 if "rotary_emb_dim" in options else 1e-10
    assert_near([out, *gradients(out, wanted)], [expected, *gradients(expected, wanted)], atol=tolerance)


def test_state_dict_names():
    names = {name: tuple(x.shape) for name, x in make(num_heads_kv=2).state_dict().items()}
    assert names == {
        "Wqkv.weight": (EMBED + 4 * HEAD_DIM, EMBED),
        "Wqkv.bias": (EMBED + 4 * HEAD_DIM,),
        "out_proj.weight": (EMBED, EMBED),
        "out_proj.bias": (EMBED,),
    }
    cross = make(cross_attn=True, rotary_emb_dim=0).state_dict()
    assert sorted(name.split(".")[0] for name in cross) == ["Wkv", "Wkv", "Wq", "Wq", "out_proj", "out_proj"]
    assert set(make(rotary_emb_dim=4).state_dict()) == set(make().state_dict()), "rotary tables are not saved"


@pytest.mark.parametrize("use_flash_attn", [True, False])
def test_return_residual(use_flash_attn):
    module, (x,) = make(use_flash_attn, return_residual=True), inputs_of({})
    out, residual = module(x)
    assert residual is x or torch.equal(residual, x)
    assert_same([out], [make(use_flash_attn)(x)])


@pytest.mark.parametrize("options", [{"cross_attn": True}, {"num_heads_kv": 2}], ids=str)
@pytest.mark.parametrize("subset", [slice(0, 1), slice(2, 5)], ids=str)
def test_mixer_subset(subset, options):
    """Queries from a subset of the rows, keys and values from all."""
    module, (x,) = make(**options), inputs_of({})
    out = module(x, mixer_subset=subset)
    expected = plain_mha(module, options, x)[:, subset]
    assert_near([out, *gradients(out, [x])], [expected, *gradients(expected, [x])])


@pytest.mark.parametrize("options", [{}, {"num_heads_kv": 2}, {"cross_attn": True}], ids=str)
def test_dwconv(options):
    """A causal depthwise convolution of width 3 after the projections."""
    module, inputs = make(dwconv=True, **options), inputs_of(options)
    convolutions = [name for name in module.state_dict() if name.startswith("dwconv")]
    assert convolutions, "the convolution has parameters"

    def convolved(conv, x):
        padded = F.pad(x.transpose(1, 2), (2, 0))
        return F.conv1d(padded, conv.weight, conv.bias, groups=x.shape[-1]).transpose(1, 2)

    if hasattr(module, "dwconv_qkv"):
        qkv = convolved(module.dwconv_qkv, module.Wqkv(inputs[0])).unflatten(-1, (3, HEADS, HEAD_DIM))
        q, k, v = qkv.unbind(2)
    else:
        q, k, v = project(module, *inputs, None) if len(inputs) == 1 else project(module, *inputs)
        q = convolved(module.dwconv_q, q.flatten(2)).unflatten(-1, (HEADS, HEAD_DIM))
        kv = convolved(module.dwconv_kv, torch.stack([k, v], dim=2).flatten(2))
        k, v = kv.unflatten(-1, (2, -1, HEAD_DIM)).unbind(2)
    expected = module.out_proj(attention(q, k, v)[0].flatten(2))
    out = module(*inputs)
    wanted = (*inputs, *module.parameters())
    assert_near([out, *gradients(out, wanted)], [expected, *gradients(expected, wanted)])


@pytest.mark.parametrize("options", [{}, {"cross_attn": True}, {"dropout": 0.4}], ids=str)
def test_checkpointing_computes_twice_and_changes_nothing(options):
    inputs = inputs_of(options)
    results = []
    for checkpointing in (False, True):
        module = make(checkpointing=checkpointing, **options)
        torch.manual_seed(6)
        with OpCalls() as recorded:
            out = module(*inputs)
            results.append([out, *gradients(out, (*inputs, *module.parameters()))])
        assert [name for name, _ in recorded.calls] == (
            ["_flash_attn_forward"] * (1 + checkpointing) + ["_flash_attn_backward"]
        )
    assert_same(results[1], results[0])


@pytest.mark.parametrize("use_flash_attn", [True, False])
@pytest.mark.parametrize("options", [{}, {"num_heads_kv": 2, "use_alibi": True}, {"cross_attn": True}], ids=str)
def test_dropout_only_in_training(options, use_flash_attn):
    module, inputs = make(use_flash_attn, dropout=0.4, **options), inputs_of(options)
    expected = plain_mha(module, options, *inputs)
    assert not torch.equal(module(*inputs), module(*inputs))
    many = torch.stack([module(*inputs).detach() for _ in range(1000)]).mean(0)
    assert (many - expected).abs().max() < 0.1
    module.eval()
    assert_near([module(*inputs)], [expected])


SLOPES = {
    1: [2**-8], 2: [2**-4, 2**-8], 4: [2**-2, 2**-4, 2**-6, 2**-8], 8: [2**-i for i in range(1, 9)],
    6: [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3],
    12: [2**-i for i in range(1, 9)] + [2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5],
}  # fmt: skip


@pytest.mark.parametrize("heads", SLOPES)
def test_alibi_slopes(heads):
    assert get_alibi_slopes(heads) == pytest.approx(SLOPES[heads], rel=1e-12)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("override", [None, True, False])
def test_inner_attentions(override, causal):
    """Flash and plain modules agree; the causal argument of the call overrides that of the module."""
    effective = causal if override is None else override
    (qkv,) = leaves((BATCH, SEQLEN, 3, HEADS, HEAD_DIM))
    expected, _ = attention(*qkv.unbind(2), keep=visible(SEQLEN, SEQLEN, effective), scale=0.6)
    for kind in (FlashSelfAttention, SelfAttention):
        assert_near([kind(causal=causal, softmax_scale=0.6)(qkv, causal=override)], [expected])
    q, kv = leaves((BATCH, SEQLEN, HEADS, HEAD_DIM), (BATCH, SEQLEN_KV, 2, 2, HEAD_DIM))
    expected, _ = attention(q, *kv.unbind(2), keep=visible(SEQLEN, SEQLEN_KV, effective), scale=0.6)
    for kind in (FlashCrossAttention, CrossAttention):
        assert_near([kind(causal=causal, softmax_scale=0.6)(q, kv, causal=override)], [expected])


def test_inner_attentions_of_rows_without_padding():
    q, kv, qkv = leaves((9, HEADS, HEAD_DIM), (12, 2, 2, HEAD_DIM), (9, 3, HEADS, HEAD_DIM))
    cu_q, cu_k = torch.tensor([0, 4, 9], dtype=torch.int32), torch.tensor([0, 5, 12], dtype=torch.int32)
    out = FlashCrossAttention(causal=True)(q, kv, cu_seqlens=cu_q, max_seqlen=5, cu_seqlens_k=cu_k, max_seqlen_k=7)
    self_out = FlashSelfAttention(window_size=(1, 0))(qkv, cu_seqlens=cu_q, max_seqlen=5)
    for rows, keys in ((slice(0, 4), slice(0, 5)), (slice(4, 9), slice(5, 12))):
        n, m = rows.stop - rows.start, keys.stop - keys.start
        expected, _ = attention(q[None, rows], *kv[None, keys].unbind(2), keep=visible(n, m, causal=True))
        assert_near([out[rows]], [expected[0]])
        expected, _ = attention(*qkv[None, rows].unbind(2), keep=visible(n, n, window=(1, 0)))
        assert_near([self_out[rows]], [expected[0]])


WRONG = {
    "heads do not divide": (lambda: MHA(EMBED, 5), ValueError, "embed_dim.*num_heads|num_heads.*embed_dim"),
    "heads as a float": (lambda: MHA(EMBED, 4.0), TypeError, "num_heads: expected int, got"),
    "heads of keys as a float": (lambda: MHA(EMBED, HEADS, num_heads_kv=2.0), TypeError, "num_heads_kv: expected int"),
    "heads of keys do not divide": (lambda: MHA(EMBED, HEADS, num_heads_kv=3), ValueError, "num_heads_kv"),
    "dropout of 1": (lambda: MHA(EMBED, HEADS, dropout=1.0), ValueError, "dropout"),
    "mask of another shape": (
        lambda: make()(*inputs_of({}), key_padding_mask=torch.ones(BATCH, 5).bool()), ValueError, "key_padding_mask"
    ),
    "cu_seqlens without max_seqlen": (
        lambda: make()(torch.zeros(9, EMBED).double(), cu_seqlens=torch.tensor([0, 9], dtype=torch.int32)),
        ValueError, "max_seqlen",
    ),
    "cu_seqlens and key_padding_mask": (
        lambda: make()(
            torch.zeros(9, EMBED).double(), cu_seqlens=torch.tensor([0, 9], dtype=torch.int32), max_seqlen=9,
            key_padding_mask=torch.ones(1, 9).bool(),
        ), ValueError, "key_padding_mask",
    ),
    "no room for the mask": (
        lambda: MHA(512, 1, window_size=(2, 2), use_flash_attn=True)(
            torch.zeros(1, 3, 512), key_padding_mask=torch.tensor([[True, False, True]])
        ), ValueError, "head_dim: expected at most 511",
    ),
    "x_kv without cross_attn": (lambda: make()(*inputs_of({"cross_attn": True})), ValueError, "x_kv"),
}  # fmt: skip


@pytest.mark.parametrize(("call", "error", "words"), WRONG.values(), ids=WRONG)
def test_wrong_calls(call, error, words):
    with pytest.raises(error, match=words):
        call()
    assert torch.isfinite(make()(*inputs_of({}))).all(), "the next good call works"
