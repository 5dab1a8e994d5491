"""Sinks, key ranges and largest scores in the public functions, against plain attention in float64."""

import pytest
import torch

import flash_attn
from plain_attention import alibi_bias, assert_near, assert_same, gradients, leaves, visible
from plain_attention import attention as without_sinks
from plain_sinks import attention, prefix_ranges, seen, strange_ranges

BATCH, SEQLEN, HEADS, HEAD_DIM = 2, 7, 4, 8
CU = torch.tensor([0, SEQLEN, 2 * SEQLEN], dtype=torch.int32)
VARLEN = (CU, CU, SEQLEN, SEQLEN)
S_AUX = torch.tensor([0.5, -3.0, 20.0, -torch.inf], dtype=torch.float64)


def unpacked(function, q, *rest, **options):
    """A varlen function for dense inputs; key_ranges too. Returns out, softmax_lse and what follows S_dmask."""
    if "key_ranges" in options:
        options["key_ranges"] = options["key_ranges"].expand(BATCH, -1, -1).flatten(0, 1)
    where = VARLEN if len(rest) > 0 else (CU, SEQLEN)
    out, softmax_lse, probs, *more = function(*(x.flatten(0, 1) for x in (q, *rest)), *where, **options)
    return out.unflatten(0, (BATCH, SEQLEN)), softmax_lse.unflatten(1, (BATCH, SEQLEN)).movedim(1, 0), probs, *more


# From dense q, k and v: (out, softmax_lse, S_dmask, ...).
FORMS = {
    "dense": flash_attn.flash_attn_func,
    "kvpacked": lambda q, k, v, **o: flash_attn.flash_attn_kvpacked_func(q, torch.stack([k, v], 2), **o),
    "qkvpacked": lambda q, k, v, **o: flash_attn.flash_attn_qkvpacked_func(torch.stack([q, k, v], 2), **o),
    "varlen": lambda *x, **o: unpacked(flash_attn.flash_attn_varlen_func, *x, **o),
    "varlen_kvpacked": lambda q, k, v, **o: unpacked(
        flash_attn.flash_attn_varlen_kvpacked_func, q, torch.stack([k, v], 2), **o
    ),
    "varlen_qkvpacked": lambda q, k, v, **o: unpacked(
        flash_attn.flash_attn_varlen_qkvpacked_func, torch.stack([q, k, v], 2), **o
    ),
}
with_forms = pytest.mark.parametrize("form", FORMS)
with_ranged_forms = pytest.mark.parametrize("form", ["dense", "varlen"])


def inputs_of(form, dtype=torch.float64):
    heads_k = HEADS if "qkv" in form else 2
    return leaves((BATCH, SEQLEN, HEADS, HEAD_DIM), *[(BATCH, SEQLEN, heads_k, HEAD_DIM)] * 2, dtype=dtype)


OPTIONS = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window_size": (2, 1)},
    "ALiBi": {"alibi_slopes": torch.tensor([0.1, 0.5, 1.0, 2.0]), "causal": True},
    "scale": {"softmax_scale": 1.3},
    "dropout": {"dropout_p": 0.4},
    "deterministic": {"deterministic": True},
}


def plain_of(options, key_ranges=None):
    """The arguments of plain attention for these options, but for dropout."""
    keep = visible(SEQLEN, SEQLEN, options.get("causal", False), options.get("window_size", (-1, -1)))
    if key_ranges is not None:
        keep = keep & seen(key_ranges, SEQLEN)
    keep = keep.expand(BATCH, 1, SEQLEN, SEQLEN) if keep.dim() == 2 else keep[:, None]
    slopes = options.get("alibi_slopes")
    bias = None if slopes is None else alibi_bias(slopes, SEQLEN, SEQLEN)
    return {"keep": keep, "bias": bias, "scale": options.get("softmax_scale")}


@pytest.mark.parametrize("name", OPTIONS)
@with_forms
def test_sinks(form, name):
    """out and softmax_lse, and the gradients of q, k, v and the sinks through both."""
    options, inputs, s_aux = OPTIONS[name], inputs_of(form), S_AUX.clone().requires_grad_()
    torch.manual_seed(1)
    out, lse, probs = FORMS[form](*inputs, s_aux=s_aux, return_attn_probs=True, **options)
    plain = plain_of(options)
    if "dropout_p" in options:
        plain |= {"dropped": probs.signbit(), "dropout_p": round(options["dropout_p"] * 65536) / 65536}
    expected = attention(*inputs, s_aux, **plain)
    wanted = (*inputs, s_aux)
    found = [out, lse, *gradients((out, lse), wanted)]
    assert_near(found, [*expected, *gradients(expected, wanted)])
    assert found[-1][3] == 0, "minus infinity is no sink"


@with_ranged_forms
@pytest.mark.parametrize("name", [name for name in OPTIONS if name != "dropout"])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("sinks", [False, True])
def test_key_ranges(form, name, shared, sinks):
    ranges = torch.stack([prefix_ranges(SEQLEN, SEQLEN, 3), strange_ranges(SEQLEN)])
    ranges = ranges[1:] if shared else ranges
    options, inputs = OPTIONS[name], inputs_of(form)
    s_aux = S_AUX.clamp(min=-5).requires_grad_()  # of a row with nothing to sum, logsumexp has the gradient NaN
    given = {**options, **({"s_aux": s_aux} if sinks else {})}
    out, lse, _ = FORMS[form](*inputs, key_ranges=ranges, return_attn_probs=True, **given)
    plain = plain_of(options, ranges.expand(BATCH, -1, -1))
    expected = attention(*inputs, s_aux, **plain) if sinks else without_sinks(*inputs, **plain)
    wanted = (*inputs, s_aux) if sinks else inputs
    upstream = lse.detach().isfinite()
    found = gradients((out, lse.where(upstream, 0)), wanted)
    assert_near([out, lse, *found], [*expected, *gradients((expected[0], expected[1].where(upstream, 0)), wanted)])


def largest_scores(q, k, keep, bias, scale, softcap=0.0):
    """(batch_size, num_heads): of visible pairs."""
    k = k.repeat_interleave(q.shape[2] // k.shape[2], 2)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    scores = scores if bias is None else scores + bias
    return scores.masked_fill(~keep, -torch.inf).amax((2, 3))


@with_ranged_forms
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [*OPTIONS, "softcap"])
def test_max_logits(form, name, dtype):
    """It comes last, is not differentiable, knows no sink, and changes no other result."""
    options = OPTIONS.get(name, {"softcap": 2.0})
    inputs, s_aux = inputs_of(form, dtype), S_AUX.to(dtype)
    ranges = torch.stack([prefix_ranges(SEQLEN, SEQLEN, 3), strange_ranges(SEQLEN)])
    call = {**options, "s_aux": s_aux, "key_ranges": ranges, "return_attn_probs": True}
    results = []
    for more in ({}, {"return_max_logits": True}):
        torch.manual_seed(1)
        results.append(FORMS[form](*inputs, **call, **more))
    *same, found = results[1]
    assert_same(same, results[0])
    assert (found.shape, found.requires_grad) == ((BATCH, HEADS), False)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    q, k = (x.detach().double() for x in inputs[:2])
    expected = largest_scores(q, k, **plain_of(options, ranges), softcap=options.get("softcap", 0.0))
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-12 if dtype == torch.float64 else 1e-5)


def test_max_logits_without_probs_follows_out():
    inputs = inputs_of("dense")
    out, found = flash_attn.flash_attn_func(*inputs, return_max_logits=True)
    assert_same([out], [flash_attn.flash_attn_func(*inputs)])
    assert_same([found], [flash_attn.flash_attn_func(*inputs, return_attn_probs=True, return_max_logits=True)[3]])


@pytest.mark.parametrize("gradients_are_needed", [False, True])
def test_max_logits_of_nothing_and_of_nan(gradients_are_needed):
    """Minus infinity where nothing is visible; NaN where a visible score is, of that sequence and head alone."""
    q, k, v = (x.detach() for x in inputs_of("dense"))
    q[0, 3, 2], k[1, 6] = torch.nan, torch.nan
    ranges = prefix_ranges(SEQLEN, SEQLEN, 3).expand(BATCH, -1, -1).clone()
    ranges[1] = torch.tensor([2, 2])
    q.requires_grad_(gradients_are_needed)
    found = flash_attn.flash_attn_func(q, k, v, key_ranges=ranges, return_max_logits=True)[1]
    assert found[0].isnan().tolist() == [False, False, True, False]
    assert (found[1] == -torch.inf).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("inputs_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sinks_of_any_dtype(inputs_dtype, dtype):
    """The gradient has the dtype of the sinks; nothing else depends on it."""
    inputs, results = [x.detach() for x in inputs_of("dense", inputs_dtype)], []
    for kind in (dtype, torch.float32):
        s_aux = torch.tensor([0.5, -3.0, 2.0, 0.0], dtype=kind, requires_grad=True)
        out = flash_attn.flash_attn_func(*inputs, s_aux=s_aux)
        out.float().square().sum().backward()
        assert s_aux.grad.dtype == kind
        results.append([out, s_aux.grad.to(dtype)])
    assert_same(*results)


def test_a_sink_alone_may_require_grad():
    inputs = [x.detach() for x in inputs_of("dense")]
    s_aux = torch.zeros(HEADS, dtype=torch.float64, requires_grad=True)
    for function in (flash_attn.flash_attn_func, FORMS["kvpacked"]):
        out = function(*inputs, s_aux=s_aux)
        expected = attention(*inputs, s_aux)[0]
        assert_near(gradients(out, [s_aux]), gradients(expected, [s_aux]))


def test_pages_are_gathered_with_sinks_and_ranges():
    """Pages of keys that need gradients."""
    q, k, v = inputs_of("varlen")
    rows = [x.detach().flatten(0, 1) for x in (q, k, v)]
    table = torch.tensor([[1, 3], [0, 2]], dtype=torch.int32)
    pages = [rows[0].clone().requires_grad_()]
    for x in rows[1:]:
        pool = torch.full((4, 4, *x.shape[1:]), torch.nan, dtype=x.dtype)
        for b in range(BATCH):
            pool[table[b].long()] = torch.cat([x[b * SEQLEN : (b + 1) * SEQLEN], x[:1] * 0]).unflatten(0, (2, 4))
        pages.append(pool.requires_grad_())
    ranges = torch.cat([prefix_ranges(SEQLEN, SEQLEN, 3), strange_ranges(SEQLEN)])
    s_aux = S_AUX.clone().requires_grad_()
    call = {"key_ranges": ranges, "s_aux": s_aux, "causal": True, "return_attn_probs": True, "return_max_logits": True}
    found = flash_attn.flash_attn_varlen_func(*pages, *VARLEN, block_table=table, **call)
    dense = [x.requires_grad_() for x in rows]
    expected = flash_attn.flash_attn_varlen_func(*dense, *VARLEN, **call)
    assert_same(found, expected)
    with torch.no_grad():
        assert_same(flash_attn.flash_attn_varlen_func(*pages, *VARLEN, block_table=table, **call), expected)
    assert_same(gradients(found[0], (pages[0], s_aux)), gradients(expected[0], (dense[0], s_aux)))


CACHE = {
    "all of it": {},
    "lengths": {"cache_seqlens": torch.tensor([5, 2], dtype=torch.int32)},
    "causal": {"cache_seqlens": 6, "causal": True},
    "padding": {"cache_seqlens": 6, "cache_leftpad": torch.tensor([1, 3], dtype=torch.int32), "causal": True},
    "splits": {"num_splits": 3},
}


@pytest.mark.parametrize("name", CACHE)
@pytest.mark.parametrize("seqlen_q", [1, 3])
def test_cache_with_sinks(name, seqlen_q):
    options = CACHE[name]
    q, k, v = (x.detach() for x in inputs_of("dense"))
    q = q[:, :seqlen_q]
    found = flash_attn.flash_attn_with_kvcache(q, k, v, s_aux=S_AUX, return_softmax_lse=True, **options)
    length = torch.as_tensor(options.get("cache_seqlens", SEQLEN)).expand(BATCH)
    first = options.get("cache_leftpad", torch.zeros(BATCH, dtype=torch.int32))
    for b in range(BATCH):
        keys = slice(int(first[b]), int(length[b]))
        tensors = q[b : b + 1], k[b : b + 1, keys], v[b : b + 1, keys]
        keep = visible(seqlen_q, keys.stop - keys.start, options.get("causal", False))
        assert_near([x[b : b + 1] for x in found], attention(*tensors, S_AUX, keep=keep))


def test_cache_of_skipped_and_empty_sequences():
    q, k, v = (x.detach() for x in inputs_of("dense"))
    lengths = torch.tensor([-1, 0], dtype=torch.int32)
    call = {"cache_seqlens": lengths, "s_aux": S_AUX, "return_softmax_lse": True}
    out, lse = flash_attn.flash_attn_with_kvcache(q[:, :1], k, v, **call)
    assert (out == 0).all()
    assert_same([lse[1, :, 0]], [S_AUX])


WRONG = {
    "a list": (TypeError, {"s_aux": [0.0] * HEADS}, "s_aux: expected torch.Tensor or None, got list"),
    "a list of ranges": (TypeError, {"key_ranges": [[0, 1]]}, "key_ranges: expected torch.Tensor or None, got list"),
    "a word": (TypeError, {"return_max_logits": "yes"}, "return_max_logits: expected bool, got str 'yes'"),
    "heads": (ValueError, {"s_aux": torch.zeros(3)}, r"s_aux: expected .*num_heads=4.*, got .*3"),
    "ints": (ValueError, {"s_aux": torch.zeros(HEADS, dtype=torch.int32)}, r"s_aux: expected .*, got .*int32"),
    "meta": (ValueError, {"s_aux": torch.zeros(HEADS, device="meta")}, r"s_aux: expected .*cpu.*, got .*meta"),
    "no pairs": (ValueError, {"key_ranges": torch.zeros(1, SEQLEN, dtype=torch.int32)}, r"key_ranges: expected .*2"),
    "rows": (ValueError, {"key_ranges": torch.zeros(1, 3, 2, dtype=torch.int32)}, r"key_ranges: expected .*seqlen_q=7"),
    "batch": (ValueError, {"key_ranges": torch.zeros(3, SEQLEN, 2, dtype=torch.int32)}, r"key_ranges: expected .*2"),
    "int64": (ValueError, {"key_ranges": torch.zeros(1, SEQLEN, 2).long()}, r"key_ranges: expected .*int32.*int64"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_refused(name):
    error, options, message = WRONG[name]
    inputs = inputs_of("dense")
    with pytest.raises(error, match=f"^flash_attn_func: (.*\n)*.*{message}"):
        flash_attn.flash_attn_func(*inputs, **options)
    assert flash_attn.flash_attn_func(*inputs).isfinite().all(), "the next good call works"
    if "s_aux" in options:
        with pytest.raises(error, match=f"^flash_attn_with_kvcache: (.*\n)*.*{message}"):
            flash_attn.flash_attn_with_kvcache(*(x.detach() for x in inputs), **options)


def test_packed_ranges_of_wrong_shape_are_refused():
    rows = [x.flatten(0, 1) for x in inputs_of("varlen")]
    for shape in ((2 * SEQLEN,), (2 * SEQLEN, 3), (SEQLEN, 2), (BATCH, SEQLEN, 2)):
        with pytest.raises(ValueError, match=r"^flash_attn_varlen_func: key_ranges: expected .*total_q=14"):
            flash_attn.flash_attn_varlen_func(*rows, *VARLEN, key_ranges=torch.zeros(shape, dtype=torch.int32))
