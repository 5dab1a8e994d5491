"""Accepted forms of arguments: lengths, windows, pages, mixed dtypes under autocast; and errors for wrong types."""

import importlib
import re

import numpy as np
import pytest
import torch

from flash_attn import flash_attn_interface as interface
from flash_attn.modules.mha import FlashSelfAttention
from plain_attention import OpCalls, assert_near, assert_same, gradients, leaves

HEADS, HEADS_K, HEAD_DIM = 4, 2, 8
LENGTHS_Q, LENGTHS_K = (3, 0, 5, 1), (4, 2, 7, 0)


def cumulative(lengths):
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


def dense_inputs(seqlen=6, **kwargs):
    return leaves((2, seqlen, HEADS, HEAD_DIM), *[(2, seqlen, HEADS_K, HEAD_DIM)] * 2, **kwargs)


def varlen_inputs(**kwargs):
    total_q, total_k = sum(LENGTHS_Q), sum(LENGTHS_K)
    return leaves((total_q, HEADS, HEAD_DIM), *[(total_k, HEADS_K, HEAD_DIM)] * 2, **kwargs)


@pytest.mark.parametrize(
    "form", [np.int64, np.int32, torch.tensor, lambda n: torch.tensor(n, dtype=torch.int32)],
    ids=["numpy int64", "numpy int32", "0-dim int64 tensor", "0-dim int32 tensor"],
)  # fmt: skip
def test_max_seqlen_forms(form):
    q, k, v = varlen_inputs()
    cu_q, cu_k = cumulative(LENGTHS_Q), cumulative(LENGTHS_K)
    expected = interface.flash_attn_varlen_func(q, k, v, cu_q, cu_k, 5, 7, causal=True)
    actual = interface.flash_attn_varlen_func(q, k, v, cu_q, cu_k, form(5), form(7), causal=True)
    assert_same([actual, *gradients(actual, (q, k, v))], [expected, *gradients(expected, (q, k, v))])


# Equivalent arguments.
EQUAL_OPTIONS = {
    "window as list": ({"window_size": [2, 1]}, {"window_size": (2, 1)}),
    "window of numpy ints": ({"window_size": (np.int64(2), np.int64(1))}, {"window_size": (2, 1)}),
    "causal sets the right window to 0": ({"causal": True, "window_size": (2, 2)}, {"window_size": (2, 0)}),
    "causal is a window": ({"causal": True}, {"window_size": (-1, 0)}),
    "wide window": ({"window_size": (1000, 1000)}, {}),
    "integer scale": ({"softmax_scale": 1}, {"softmax_scale": 1.0}),
    "numpy scale": ({"softmax_scale": np.float64(0.5)}, {"softmax_scale": 0.5}),
    "softcap 0": ({"softcap": 0}, {}),
    "dropout 0": ({"dropout_p": 0}, {}),
    "deterministic": ({"deterministic": True}, {}),
    "slopes per batch entry": (
        {"alibi_slopes": torch.tensor([[0.5, 0.2, 0.1, 0.3]] * 2)},
        {"alibi_slopes": torch.tensor([0.5, 0.2, 0.1, 0.3])},
    ),
}


@pytest.mark.parametrize(("one", "other"), EQUAL_OPTIONS.values(), ids=EQUAL_OPTIONS)
def test_equal_options(one, other):
    q, k, v = dense_inputs()
    actual, expected = (interface.flash_attn_func(q, k, v, **options) for options in (one, other))
    assert_same([actual, *gradients(actual, (q, k, v))], [expected, *gradients(expected, (q, k, v))])


def test_default_scale():
    q, k, v = dense_inputs()
    actual, expected = interface.flash_attn_func(q, k, v), interface.flash_attn_func(q, k, v, 0.0, HEAD_DIM**-0.5)
    assert_near([actual], [expected], atol=1e-14)


@pytest.mark.parametrize("everywhere", [False, True])
@pytest.mark.parametrize("wanted", [False, True])
@pytest.mark.parametrize("kind", ["func", "qkvpacked_func", "varlen_func", "FlashSelfAttention", "_backward"])
def test_deterministic_reaches_the_backward_op(kind, wanted, everywhere):
    """Requested by the argument, or by torch.use_deterministic_algorithms."""
    (qkv,) = leaves((2, 6, 3, HEADS, HEAD_DIM))
    cu = torch.tensor([0, 6, 12], dtype=torch.int32)
    torch.use_deterministic_algorithms(everywhere)
    try:
        with OpCalls() as recorded:
            if kind == "func":
                interface.flash_attn_func(*qkv.unbind(2), deterministic=wanted).sum().backward()
            elif kind == "qkvpacked_func":
                interface.flash_attn_qkvpacked_func(qkv, deterministic=wanted).sum().backward()
            elif kind == "varlen_func":
                flat = qkv.flatten(0, 1).unbind(1)
                interface.flash_attn_varlen_func(*flat, cu, cu, 6, 6, deterministic=wanted).sum().backward()
            elif kind == "FlashSelfAttention":
                FlashSelfAttention(deterministic=wanted)(qkv).sum().backward()
            else:
                q, k, v = (x.detach() for x in qkv.unbind(2))
                out, lse, _, _ = interface._flash_attn_forward(q, k, v, 0.0, 0.3, False, -1, -1, 0.0, None, False)
                grads = [torch.empty_like(x) for x in (q, k, v)]
                interface._flash_attn_backward(
                    out, q, k, v, out, lse, *grads, 0.0, 0.3, False, -1, -1, 0.0, None, wanted
                )
    finally:
        torch.use_deterministic_algorithms(False)
    assert [arguments["deterministic"] for name, arguments in recorded.calls if "backward" in name] == [
        wanted or everywhere
    ]


@pytest.mark.parametrize("page_size", [1, 3, 16])
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window_size": (2, 0), "softcap": 5.0}], ids=str)
def test_block_table(options, page_size):
    """Paged keys in shuffled pages, unused pages full of NaN: values and gradients equal those without pages."""
    q, k, v = varlen_inputs()
    lengths = cumulative(LENGTHS_Q), cumulative(LENGTHS_K), max(LENGTHS_Q), max(LENGTHS_K)
    pages_of = [-(-length // page_size) for length in LENGTHS_K]
    order = torch.randperm(2 * sum(pages_of) + 1, generator=torch.Generator().manual_seed(5)).tolist()
    table = torch.zeros(len(LENGTHS_K), max(pages_of), dtype=torch.int32)
    rows = []
    for b, pages in enumerate(pages_of):
        table[b, :pages] = torch.tensor([order.pop() for _ in range(pages)], dtype=torch.int32)
        rows += [int(table[b, j // page_size]) * page_size + j % page_size for j in range(LENGTHS_K[b])]
    paged = []
    for x in (k, v):
        pool = torch.full(((2 * sum(pages_of) + 1) * page_size, HEADS_K, HEAD_DIM), torch.nan, dtype=x.dtype)
        pool[rows] = x.detach()
        paged.append(pool.view(-1, page_size, HEADS_K, HEAD_DIM).requires_grad_())
    actual = interface.flash_attn_varlen_func(q, *paged, *lengths, block_table=table, **options)
    expected = interface.flash_attn_varlen_func(q, k, v, *lengths, **options)
    assert_same([actual], [expected])
    dq, *dpaged = gradients(actual, (q, *paged))
    unpaged = [dx.reshape(-1, HEADS_K, HEAD_DIM)[rows] for dx in dpaged]
    assert_same([dq, *unpaged], gradients(expected, (q, k, v)))
    unused = torch.ones(len(pool), dtype=torch.bool)
    unused[rows] = False
    assert all((dx.reshape(-1, HEADS_K, HEAD_DIM)[unused] == 0).all() for dx in dpaged)


AUTOCAST_CASES = [
    # dtypes of q, k, v; autocast dtype; dtype of the result
    ((torch.float32, torch.float32, torch.float32), torch.bfloat16, torch.bfloat16),
    ((torch.float32, torch.float32, torch.bfloat16), torch.bfloat16, torch.bfloat16),
    ((torch.bfloat16, torch.float32, torch.float32), torch.bfloat16, torch.bfloat16),
    ((torch.bfloat16, torch.bfloat16, torch.bfloat16), torch.bfloat16, torch.bfloat16),
    ((torch.float32, torch.float32, torch.float16), torch.float16, torch.float16),
    ((torch.float16, torch.float16, torch.float16), torch.bfloat16, torch.bfloat16),
    ((torch.float64, torch.float64, torch.float64), torch.bfloat16, torch.float64),
]


@pytest.mark.parametrize(("dtypes", "autocast_dtype", "out_dtype"), AUTOCAST_CASES, ids=str)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("varlen", [False, True])
def test_autocast(varlen, packed, dtypes, autocast_dtype, out_dtype):
    """Inputs are cast as in F.scaled_dot_product_attention; gradients have the dtypes of the inputs."""
    inputs = [x.detach().to(dtype).requires_grad_() for x, dtype in zip(dense_inputs(), dtypes, strict=True)]
    if packed:
        inputs = [inputs[0], torch.stack([x.detach().to(dtypes[1]) for x in inputs[1:]], dim=2).requires_grad_()]
    casts = [x.detach().to(out_dtype).requires_grad_() for x in inputs]
    function = getattr(interface, f"flash_attn_{'varlen_' * varlen}{'kvpacked_' * packed}func")

    def call(tensors):
        if not varlen:
            return function(*tensors, causal=True)
        cu = torch.tensor([0, 6, 12], dtype=torch.int32)
        return function(*(x.flatten(0, 1) for x in tensors), cu, cu, 6, 6, causal=True)

    with torch.autocast("cpu", dtype=autocast_dtype):
        actual = call(inputs)
    assert actual.dtype == out_dtype
    expected = call(casts)
    assert_same([actual], [expected])
    actual_gradients = gradients(actual, inputs)
    assert [g.dtype for g in actual_gradients] == [x.dtype for x in inputs]
    assert_same(actual_gradients, [g.to(x.dtype) for g, x in zip(gradients(expected, casts), inputs, strict=True)])


def test_mixed_types_without_autocast_are_refused():
    q, k, v = dense_inputs(dtype=torch.float32)
    with pytest.raises(ValueError, match=r"^flash_attn_func: .*expected .*, got .*q float32, k float32, v bfloat16$"):
        interface.flash_attn_func(q, k, v.bfloat16())


# The module named like the compiled one.


@pytest.mark.parametrize("name", ["fwd", "varlen_fwd", "bwd", "varlen_bwd", "fwd_kvcache"])
def test_native_names_can_be_imported(name):
    assert callable(getattr(importlib.import_module("flash_attn_2_cuda"), name))


# Wrong types: a TypeError with function, argument, expected and received type.

TYPE_ERRORS = {
    "q": [None, [1.0], np.zeros((2, 6, HEADS, HEAD_DIM))],
    "k": [None, 3],
    "v": [None, "v"],
    "dropout_p": ["0.1", None, [0.1]],
    "softmax_scale": ["1", [1.0], 1j],
    "window_size": [3, None, (1,), (1, 2, 3), (1.5, 2), ("1", 2), "12", torch.ones(2)],
    "attention_chunk": [None, 1.5, "8"],
    "q_start": [1.5, "8", [0, 32], torch.zeros(2, 2, dtype=torch.int32)],
    "k_start": [True, torch.tensor(0.5)],
    "softcap": ["1", None],
    "alibi_slopes": [[0.1] * HEADS, 0.5],
    "cu_seqlens_q": [[0, 3], None],
    "cu_seqlens_k": [(0, 3), None],
    "max_seqlen_q": ["5", None, 5.5],
    "max_seqlen_k": [[7], None, 7.5],
    "block_table": [[[0]], 0],
}


@pytest.mark.parametrize(
    ("argument", "value"), [(argument, value) for argument, values in TYPE_ERRORS.items() for value in values], ids=repr
)
@pytest.mark.parametrize("varlen", [False, True])
def test_type_errors(varlen, argument, value):
    if varlen:
        function, (q, k, v) = interface.flash_attn_varlen_func, varlen_inputs()
        lengths = {"cu_seqlens_q": cumulative(LENGTHS_Q), "cu_seqlens_k": cumulative(LENGTHS_K)}
        arguments = {"q": q, "k": k, "v": v, **lengths, "max_seqlen_q": 5, "max_seqlen_k": 7}
    else:
        function = interface.flash_attn_func
        arguments = dict(zip("qkv", dense_inputs(), strict=True))
    message = rf"{function.__name__}: (.*\n)*.*{argument}: expected .+, got .+"
    if not varlen and (argument.startswith(("cu_", "max_")) or argument == "block_table"):
        message = f"unexpected keyword argument '{argument}'"
    with pytest.raises(TypeError) as error:
        function(**{**arguments, argument: value})
    assert re.search(message, str(error.value)), str(error.value)
    assert torch.isfinite(function(**arguments)).all(), "the next good call works"


def test_several_wrong_types_are_told_at_once():
    with pytest.raises(TypeError) as error:
        interface.flash_attn_func(None, torch.zeros(1, 1, 1, 1), 5, window_size=7)
    for argument in ("q", "v", "window_size"):
        assert re.search(rf"\b{argument}: expected .+, got .+", str(error.value)), str(error.value)
