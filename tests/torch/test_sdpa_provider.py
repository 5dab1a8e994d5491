"""flash_attn.integrations.sdpa: torch's own functions and ops of attention, computed by ours."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode
from torch.nn import attention as torch_attention
from torch.nn.attention.varlen import varlen_attn

from compare import compare
from flash_attn import flash_attn_func, flash_attn_varlen_func
from flash_attn.integrations import sdpa

aten = torch.ops.aten
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@pytest.fixture
def calls(monkeypatch):
    """Active during the test; the names of the ops of ours that are called."""
    called = []

    def counted(name):
        function = getattr(sdpa, name)
        return lambda *args, **kwargs: (called.append(name), function(*args, **kwargs))[1]

    for name in ("_fwd_out", "_bwd", "_bwd_out"):
        monkeypatch.setattr(sdpa, name, counted(name))
    torch_attention.activate_flash_attention_impl("flash_attn")
    yield called
    torch_attention.restore_flash_attention_impl()


def noise(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def heads(seqlen, num_heads=4, head_dim=64, heads_second=False, dtype=torch.float32, seed=0):
    """(2, num_heads, seqlen, head_dim), stored with heads second or, as after a projection, third."""
    shape = (2, num_heads, seqlen, head_dim) if heads_second else (2, seqlen, num_heads, head_dim)
    x = noise(*shape, dtype=dtype, seed=seed)
    return x if heads_second else x.transpose(1, 2)


def attend(inputs, dtype, function=F.scaled_dot_product_attention, **options):
    """out and the gradients of q, k and v."""
    q, k, v = (x.detach().to(dtype).requires_grad_() for x in inputs)
    out = function(q, k, v, **options)
    return [out, *torch.autograd.grad(out, (q, k, v), noise(*out.shape, dtype=dtype, seed=9))]


# (seqlen_q, seqlen_k, num_heads_k, head_dim, options)
CASES = {
    "full": (33, 70, 4, 64, {}),
    "causal": (65, 65, 4, 64, {"is_causal": True}),
    "causal_few_queries": (33, 70, 4, 40, {"is_causal": True}),
    "causal_few_keys": (70, 33, 4, 64, {"is_causal": True}),
    "grouped": (64, 64, 2, 72, {"is_causal": True, "enable_gqa": True}),
    "one_query": (1, 130, 1, 64, {"enable_gqa": True, "scale": 0.3}),
}


@pytest.mark.parametrize("heads_second", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_sdpa_on_the_cpu(case, dtype, heads_second, calls):
    """The error of each result is within the bounds of that of torch's own kernel; memory is laid out as there."""
    seqlen_q, seqlen_k, num_heads_k, head_dim, options = CASES[case]
    wanted = ((seqlen_q, 4, 1), (seqlen_k, num_heads_k, 2), (seqlen_k, num_heads_k, 3))
    inputs = [heads(length, n, head_dim, heads_second, dtype, seed) for length, n, seed in wanted]
    found = attend(inputs, dtype, **options)
    assert calls == ["_fwd_out", "_bwd"]
    torch_attention.restore_flash_attention_impl()
    exact, plain = attend(inputs, torch.float64, **options), attend(inputs, dtype, **options)
    for name, x, e, p, factor in zip(("out", "dq", "dk", "dv"), found, exact, plain, (2.0, 3.0, 3.0, 3.0), strict=True):
        # In float64 both are as exact as what they are compared with.
        compare(name, x, e, [p], factor=factor, size=64.0 if dtype in (torch.float32, torch.float64) else 0.0)
        assert x.stride() == p.stride(), name
    assert calls == ["_fwd_out", "_bwd"]


@pytest.mark.parametrize(
    "options",
    [{"attn_mask": torch.ones(9, 17).tril(4).bool()}, {"attn_mask": noise(9, 17)}, {"dropout_p": 0.5}, {"scale": -0.3}],
    ids=str,
)
def test_what_is_left_to_torch(options, calls):
    """Bit for bit what it is without us."""
    inputs = [heads(9, seed=1), heads(17, seed=2), heads(17, seed=3)]
    torch.manual_seed(5)
    found = attend(inputs, torch.float32, **options)
    assert not calls
    torch_attention.restore_flash_attention_impl()
    torch.manual_seed(5)
    assert all(torch.equal(x, y) for x, y in zip(found, attend(inputs, torch.float32, **options), strict=True))


@pytest.mark.parametrize("heads_second", [False, True])
def test_compiled(heads_second, calls):
    """One graph, forward and backward; inductor asserts the strides that torch promises."""
    inputs = [heads(33, heads_second=heads_second, seed=seed) for seed in range(3)]
    torch.compiler.reset()
    compiled = torch.compile(F.scaled_dot_product_attention, fullgraph=True)
    found = attend(inputs, torch.float32, compiled, is_causal=True)
    assert sorted(calls) == ["_bwd", "_fwd_out"]
    for x, y in zip(found, attend(inputs, torch.float32, is_causal=True), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-5)


def layout(result):
    """Shapes, dtypes and strides of all tensors."""
    return [(x.shape, x.dtype, x.stride()) for x in result if isinstance(x, torch.Tensor)]


@pytest.mark.parametrize("is_packed", [False, True])
def test_results_are_as_torch_says(is_packed, calls):
    """The fake kernels of torch, from which compilers plan memory, agree."""
    shape = (20, 4, 64) if is_packed else (2, 10, 4, 64)
    q = noise(*shape)
    where = [torch.tensor([0, 8, 20], dtype=torch.int32)] * 2 if is_packed else [None, None]
    out, softmax_lse, *_ = result = aten._flash_attention_forward(q, q, q, *where, 12, 12, 0.0, True, False)
    rest = (0.0, True, torch.zeros(2, dtype=torch.uint64), torch.zeros(()))
    of_cpu = aten._scaled_dot_product_flash_attention_for_cpu
    real = [result, of_cpu(*[heads(9)] * 3), of_cpu(*[heads(9, heads_second=True)] * 3)]
    real.append(aten._flash_attention_backward(out, q, q, q, out, softmax_lse, *where, 12, 12, *rest))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        q, out, softmax_lse, heads_third, heads_second = (
            mode.from_tensor(x) for x in (q, out, softmax_lse, heads(9), heads(9, heads_second=True))
        )
        where = [x if x is None else mode.from_tensor(x) for x in where]
        result = aten._flash_attention_forward(q, q, q, *where, 12, 12, 0.0, True, False)
        fake = [result, of_cpu(*[heads_third] * 3), of_cpu(*[heads_second] * 3)]
        fake.append(aten._flash_attention_backward(out, q, q, q, out, softmax_lse, *where, 12, 12, *rest))
    for x, y in zip(real, fake, strict=True):
        assert layout(x)[:2] == layout(y)[:2]
    assert layout(real[-1]) == layout(fake[-1])


CU_SEQLENS = torch.tensor([0, 5, 5, 20], dtype=torch.int32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_varlen_attn(causal, dtype, calls):
    """torch has it for GPUs alone; here it runs on the CPU, and its gradients are ours bit for bit."""
    q, k, v = (noise(20, n, 64, dtype=dtype, seed=n).requires_grad_() for n in (4, 4, 4))
    options = (
        {"window_size": (-1, 0)} if "window_size" in inspect.signature(varlen_attn).parameters else {"is_causal": True}
    )
    out = varlen_attn(q, k, v, CU_SEQLENS, CU_SEQLENS, 15, 15, **options if causal else {})
    found = [out, *torch.autograd.grad(out, (q, k, v), noise(*out.shape, dtype=dtype))]
    assert calls == ["_fwd_out", "_bwd_out"]
    out = flash_attn_varlen_func(q, k, v, CU_SEQLENS, CU_SEQLENS, 15, 15, causal=causal)
    expected = [out, *torch.autograd.grad(out, (q, k, v), noise(*out.shape, dtype=dtype))]
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def test_pages_and_used_keys():
    """Lengths of the keys are in seqused_k; pages of four rows, in another order than the keys."""
    q, k, v = noise(3, 4, 64), noise(24, 2, 64, seed=1), noise(24, 2, 64, seed=2)
    used = torch.tensor([7, 2, 4], dtype=torch.int32)
    cu_q = torch.arange(4, dtype=torch.int32)
    rows = [torch.arange(8)[: used[0]], 8 + torch.arange(8)[: used[1]], 16 + torch.arange(8)[: used[2]]]
    cu_k = torch.tensor([0, 7, 9, 13], dtype=torch.int32)
    expected = flash_attn_varlen_func(q, k[torch.cat(rows)], v[torch.cat(rows)], cu_q, cu_k, 1, 7, causal=True)
    slots = torch.tensor([0, 8, 16, 24], dtype=torch.int32)
    found = sdpa.flash_attention_forward(q, k, v, cu_q, slots, 1, 8, 0.0, True, False, seqused_k=used)[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    pages = [x.view(6, 4, 2, 64)[order.argsort()] for x in (k, v)]
    table = {"block_table": order.int().view(3, 2), "seqused_k": used, "num_splits": 1}
    found = sdpa.flash_attention_forward(q, *pages, cu_q, None, 1, 8, 0.0, True, False, **table)[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    out = torch.full_like(q, torch.nan)
    sdpa.flash_attention_forward_into(out, q, *pages, cu_q, None, 1, 8, 0.0, True, False, **table)
    assert torch.equal(out, found)
    with pytest.raises(
        ValueError, match="seqused_k: expected a tensor with block_table or without cum_seq_k, got None"
    ):
        sdpa.flash_attention_forward(q, *pages, cu_q, None, 1, 8, 0.0, True, False, block_table=table["block_table"])


@pytest.mark.parametrize("heads_second", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_functions_for_cuda(dropout_p, heads_second):
    """Called here with tensors of the CPU: results of flash_attn_func, with its dropout mask, and torch's layout."""
    q, k, v = (heads(33, heads_second=heads_second, seed=seed) for seed in range(3))
    torch.manual_seed(7)
    out, softmax_lse, cum_q, cum_k, max_q, max_k, rng_state, unused, mask = sdpa.sdpa_on_cuda(
        q, k, v, dropout_p, True, True, scale=0.2
    )
    dout = noise(*out.shape, seed=4)
    rest = (cum_q, cum_k, max_q, max_k, dropout_p, True, rng_state, unused)
    gradients = sdpa.sdpa_on_cuda_backward(dout, q, k, v, out, softmax_lse, *rest, scale=0.2)
    assert (max_q, max_k, rng_state.dtype) == (33, 33, torch.uint64)
    assert all(x.stride() == y.stride() for x, y in zip((out, *gradients), (q, q, k, v), strict=True))
    leaves = [x.detach().transpose(1, 2).requires_grad_() for x in (q, k, v)]
    torch.manual_seed(7)
    expected, expected_lse, probs = flash_attn_func(
        *leaves, dropout_p=dropout_p, causal=True, softmax_scale=0.2, return_attn_probs=True
    )
    expected_grads = torch.autograd.grad(expected, leaves, dout.transpose(1, 2))
    for x, y in zip((out, *gradients), (expected, *expected_grads), strict=True):
        assert torch.equal(x.transpose(1, 2), y)
    assert torch.equal(softmax_lse, expected_lse)
    assert dropout_p == 0 or torch.equal(mask, probs)


@pytest.mark.parametrize(
    ("op", "function"),
    [
        ("_flash_attention_forward", sdpa.flash_attention_forward),
        ("_flash_attention_backward", sdpa.flash_attention_backward),
        ("_scaled_dot_product_flash_attention", sdpa.sdpa_on_cuda),
        ("_scaled_dot_product_flash_attention_backward", sdpa.sdpa_on_cuda_backward),
    ],
)
def test_functions_take_what_torch_passes(op, function):
    """As many arguments by position as the schema has, and each of its keywords."""
    schema = getattr(aten, op).default._schema
    parameters = inspect.signature(function).parameters.values()
    assert sum(not a.kwarg_only for a in schema.arguments) == sum(p.kind is not p.KEYWORD_ONLY for p in parameters)
    assert {a.name for a in schema.arguments if a.kwarg_only} <= {p.name for p in parameters}


def test_activation_is_the_users_and_ends():
    """Nothing is overridden by the import, nor after restoring; activating again works."""
    q = noise(3, 4, 64)
    arguments = (q, q, q, torch.tensor([0, 3], dtype=torch.int32), torch.tensor([0, 3], dtype=torch.int32), 3, 3)
    assert "flash_attn" in torch_attention.list_flash_attention_impls()
    for _ in range(2):
        assert torch_attention.current_flash_attention_impl() is None
        with pytest.raises(NotImplementedError, match=r"aten::_flash_attention_forward.* from the 'CPU' backend"):
            aten._flash_attention_forward(*arguments, 0.0, False, False)
        torch_attention.activate_flash_attention_impl("flash_attn")
        assert torch_attention.current_flash_attention_impl() == "flash_attn"
        aten._flash_attention_forward(*arguments, 0.0, False, False)
        torch_attention.restore_flash_attention_impl()
