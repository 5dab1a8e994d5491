"""How other projects import and call this package, each reduced to a few lines."""

import functools
import importlib
import importlib.metadata
import importlib.util
import inspect

import pytest
import torch
from packaging.version import Version

import flash_attn_2_cuda as native
from flash_attn import flash_attn_interface as interface
from plain_attention import assert_same, attention, leaves, visible

B, S, H, D = 2, 6, 4, 16


def inputs(dtype=torch.float64, seqlen=S):
    return [x.detach() for x in leaves(*[(B, seqlen, H, D)] * 3, dtype=dtype)]


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


# Detection of the package and its version.


def test_transformers_finds_the_distribution():
    assert importlib.util.find_spec("flash_attn") is not None
    owners = importlib.metadata.packages_distributions()
    for module in ("flash_attn", "flash_attn_2_cuda"):
        assert "flash-attn" in [name.replace("_", "-") for name in owners[module]]
    assert Version(importlib.metadata.version("flash_attn")) >= Version("2.3.3")


@pytest.mark.parametrize("lowest", ["2.1.1", "2.7.3"])
def test_transformer_engine_accepts_the_version(lowest):
    assert Version(lowest) <= Version(importlib.metadata.version("flash-attn")) < Version("2.8.4")


@pytest.mark.parametrize("requirement", ["==2.8.3", ">=2.6.3", ">=2.3.3,<3", "~=2.8.0"])
def test_pins_match(requirement):
    from packaging.specifiers import SpecifierSet

    assert Version(importlib.metadata.version("flash-attn")) in SpecifierSet(requirement)


# Call forms.


def keyword_defaults(function):
    """Argument names and defaults, as ring attention reads them from a plain function."""
    assert inspect.isfunction(function)
    spec = inspect.getfullargspec(function)
    defaults = spec.defaults or ()
    return dict(zip(spec.args, (None,) * (len(spec.args) - len(defaults)) + defaults, strict=True))


def ring_call(function, **values):
    arguments = keyword_defaults(function)
    arguments["softcap"] = 0.0
    assert set(values) <= set(arguments)
    return function(**{**arguments, **values})


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_ring_attention(dtype):
    """Keys in two blocks, merged by softmax_lse; backward block by block with the merged results."""
    q, k, v = leaves(*[(B, S, H, D)] * 3)
    expected, expected_lse = attention(q, k, v)
    dout = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    expected_gradients = torch.autograd.grad(expected, (q, k, v), dout)
    q, k, v, dout = (x.detach().to(dtype) for x in (q, k, v, dout))
    common = {"dropout_p": 0.0, "softmax_scale": D**-0.5, "causal": False, "window_size_left": -1,
              "window_size_right": -1, "alibi_slopes": None}  # fmt: skip
    blocks = [(k[:, :2], v[:, :2]), (k[:, 2:], v[:, 2:])]
    parts = []
    for key, value in blocks:
        outputs = ring_call(interface._flash_attn_forward, q=q, k=key, v=value, return_softmax=False, **common)
        assert len(outputs) == 4
        parts.append((outputs[0].double(), outputs[1].double()))
    lse = torch.logaddexp(parts[0][1], parts[1][1])
    out = sum(part * torch.exp(part_lse - lse).transpose(1, 2)[..., None] for part, part_lse in parts)
    tolerance = 1e-12 if dtype == torch.float64 else 0.05
    torch.testing.assert_close(out, expected.detach(), rtol=0, atol=tolerance)
    torch.testing.assert_close(lse, expected_lse.detach(), rtol=0, atol=tolerance)
    written = []
    lse_type = torch.float64 if dtype == torch.float64 else torch.float32
    for key, value in blocks:
        grads = [torch.empty_like(x) for x in (q, key, value)]
        ring_call(
            interface._flash_attn_backward, dout=dout, q=q, k=key, v=value, out=out.to(dtype),
            softmax_lse=lse.to(lse_type), dq=grads[0], dk=grads[1], dv=grads[2], deterministic=False, **common,
        )  # fmt: skip
        written.append([x.double() for x in grads])
    merged = [
        written[0][0] + written[1][0],
        *(torch.cat(pair, dim=1) for pair in zip(*(w[1:] for w in written), strict=True)),
    ]
    for actual, expected_gradient in zip(merged, expected_gradients, strict=True):
        torch.testing.assert_close(actual, expected_gradient, rtol=0, atol=tolerance * 2)


def test_diffusers_positional_calls():
    """11 positional arguments forward, 18 backward."""
    q, k, v = inputs()
    out, lse, _probs, rng_state = interface._wrapped_flash_attn_forward(
        q, k, v, 0.0, D**-0.5, False, -1, -1, 0.0, None, False
    )
    close(out, attention(q, k, v)[0])
    close(lse, attention(q, k, v)[1])
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    interface._wrapped_flash_attn_backward(
        out, q, k, v, out, lse, dq, dk, dv, 0.0, D**-0.5, False, -1, -1, 0.0, None, False, rng_state
    )
    expected = [torch.empty_like(x) for x in (q, k, v)]
    interface._flash_attn_backward(out, q, k, v, out, lse, *expected, 0.0, D**-0.5, False, -1, -1, 0.0, None, False)
    for actual, other in zip((dq, dk, dv), expected, strict=True):
        assert torch.equal(actual, other)


def test_deepspeed_calls():
    """Forward by keyword, with the window as two numbers; backward by position, with rng_state=None."""
    q, k, v = inputs(seqlen=4)
    out, lse, _, _ = interface._flash_attn_forward(
        q=q, k=k, v=v, dropout_p=0.0, softmax_scale=0.25, causal=True, window_size_left=-1, window_size_right=-1,
        softcap=0.0, alibi_slopes=None, return_softmax=False,
    )  # fmt: skip
    close(out, attention(q, k, v, keep=visible(4, 4, causal=True))[0])
    grads = [torch.empty_like(x) for x in (q, k, v)]
    interface._flash_attn_backward(
        out, q, k, v, out, lse, *grads, 0.0, 0.25, True, -1, -1, softcap=0.0, alibi_slopes=None, deterministic=False,
        rng_state=None,
    )  # fmt: skip
    leaf = [x.clone().requires_grad_() for x in (q, k, v)]
    expected = torch.autograd.grad(attention(*leaf, keep=visible(4, 4, causal=True))[0], leaf, out)
    for actual, other in zip(grads, expected, strict=True):
        close(actual, other)


def test_transformer_engine_reads_outputs_by_index():
    q, k, v = (x.flatten(0, 1) for x in inputs())
    cu = torch.tensor([0, S, 2 * S], dtype=torch.int32)
    outputs = interface._flash_attn_varlen_forward(
        q, k, v, cu, cu, S, S, 0.0, D**-0.5, causal=True, return_softmax=False, alibi_slopes=None, block_table=None,
        window_size_left=-1, window_size_right=0, softcap=0.0,
    )  # fmt: skip
    out, lse, rng_state = outputs[0], outputs[1], outputs[3]
    assert rng_state.dtype == torch.int64
    grads = [torch.empty_like(x) for x in (q, k, v)]
    interface._flash_attn_varlen_backward(
        out, q, k, v, out, lse, *grads, cu, cu, S, S, 0.0, D**-0.5, window_size_left=-1, window_size_right=0,
        alibi_slopes=None, deterministic=True, softcap=0.0, causal=True, rng_state=rng_state,
    )  # fmt: skip
    leaf = [x.clone().requires_grad_() for x in (q, k, v)]
    dense = [x.unflatten(0, (B, S)) for x in leaf]
    expected_out = attention(*dense, keep=visible(S, S, causal=True))[0].flatten(0, 1)
    close(out, expected_out.detach())
    for actual, expected in zip(grads, torch.autograd.grad(expected_out, leaf, out), strict=True):
        close(actual, expected)


def test_transformers_packed_call():
    """Keywords filtered by signature, max_seqlen as a 0-dim tensor, a window of w - 1 on both sides."""
    q, k, v = (x.flatten(0, 1) for x in inputs())
    cu = torch.tensor([0, 2, 7, 12], dtype=torch.int32)
    longest = cu.diff().max()
    wanted = {"dropout_p": 0.0, "softmax_scale": 0.2, "causal": True, "window_size": (2, 2), "deterministic": False,
              "softcap": 0.0, "s_aux": None, "cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_seqlen_q": longest,
              "max_seqlen_k": longest}  # fmt: skip
    names = inspect.signature(interface.flash_attn_varlen_func).parameters
    assert {"block_table", "window_size", "softcap", "deterministic", "max_seqlen_q"} <= set(names)
    out = interface.flash_attn_varlen_func(q, k, v, **{name: x for name, x in wanted.items() if name in names})
    out = out[0] if isinstance(out, tuple) else out
    for first, last in ((0, 2), (2, 7), (7, 12)):
        rows = slice(first, last)
        keep = visible(last - first, last - first, window=(2, 0))
        close(out[rows], attention(q[None, rows], k[None, rows], v[None, rows], keep=keep, scale=0.2)[0][0])


def test_native_functions():
    """The argument order of the compiled module, dense and packed; the caller's buffers are filled."""
    q, k, v = inputs()
    options = (0.0, 0.3, True)
    out, lse, _, rng_state = interface._flash_attn_forward(q, k, v, *options, -1, -1, 0.0, None, False)
    expected = [torch.empty_like(x) for x in (q, k, v)]
    softmax_d = interface._flash_attn_backward(
        out, q, k, v, out, lse, *expected, *options, -1, -1, 0.0, None, False, rng_state
    )
    buffers = [torch.empty_like(x) for x in (q, q, k, v)]
    dense = native.fwd(q, k, v, buffers[0], None, *options, -1, -1, 0.0, False, None)
    dense += native.bwd(out, q, k, v, out, lse, *buffers[1:], None, *options, -1, -1, 0.0, False, None, rng_state)
    assert [x.data_ptr() for x in (dense[0], *dense[4:7])] == [x.data_ptr() for x in buffers]
    assert_same([*dense[:2], *dense[4:]], [out, lse, *expected, softmax_d])
    flat = [x.flatten(0, 1) for x in (q, k, v)]
    cu = torch.tensor([0, S, 2 * S], dtype=torch.int32)
    flat_out, flat_lse = out.flatten(0, 1), lse.transpose(0, 1).flatten(1)
    packed = native.varlen_fwd(
        *flat, None, cu, cu, None, None, None, None, S, S, *options[:2], False, True, -1, -1, 0.0, False, None
    )
    packed += native.varlen_bwd(
        flat_out, *flat, flat_out, flat_lse, None, None, None, cu, cu, None, S, S, *options[:2], False, True, -1, -1,
        0.0, False, None, rng_state,
    )  # fmt: skip
    close(packed[0], flat_out)
    close(packed[1], flat_lse)
    for actual, other in zip(packed[4:7], expected, strict=True):
        close(actual, other.flatten(0, 1))


def test_a_partial_of_the_function_keeps_its_keywords():
    bound = functools.partial(interface.flash_attn_func, causal=True, window_size=(3, 0))
    q, k, v = inputs()
    close(bound(q, k, v), attention(q, k, v, keep=visible(S, S, window=(3, 0)))[0])
