"""Autograd of the ops: saved tensors, gradients, and the memory that they are written to."""

import gc
import weakref

import pytest
import torch
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks

import flash_attn
from cases import Case
from check import lengths_of, op_bwd, op_fwd, scores_of
from compare import assert_bitwise
from inputs import make_inputs
from plain_attention import OpCalls, assert_same, leaves

CASES = {
    "dense": Case((5, 5), (9, 9), head_dim=8, head_dim_v=6, num_heads=4, causal=True, lse_grad=True),
    "without dlse": Case((5, 5), (9, 9), head_dim=8, head_dim_v=6, num_heads=4),
    "dropout": Case((7, 7), (9, 9), dtype="bfloat16", head_dim=8, head_dim_v=8, dropout_p=0.3, softcap=2.0),
    "varlen": Case((3, 0, 6), (4, 2, 6), packed=True, head_dim=8, head_dim_v=8, alibi="heads", lse_grad=True),
    "varlen without dlse": Case((3, 0, 6), (4, 2, 6), packed=True, head_dim=8, head_dim_v=8, causal=True),
    "padding": Case((7, 7), (9, 9), head_dim=8, head_dim_v=8, seqused_k=(9, 4), leftpad_k=(1, 0), lse_grad=True),
}
with_cases = pytest.mark.parametrize("name", CASES)


def arguments_of(case, x):
    return {**lengths_of(case, x), **scores_of(case, x)}


@with_cases
@pytest.mark.parametrize("through", ["out", "softmax_lse", "both"])
def test_fwd_is_differentiable(name, through):
    """The gradients are those of bwd for the gradients of the results, each of which may be missing."""
    case = CASES[name]
    x = make_inputs(case, padding=0.0)
    inputs = [t.detach().clone().requires_grad_() for t in (x.q, x.k, x.v)]
    out, lse, _ = torch.ops.flash_attn.fwd(*inputs, **arguments_of(case, x))
    results = {"out": [(out, x.dout)], "softmax_lse": [(lse, x.dlse)], "both": [(out, x.dout), (lse, x.dlse)]}[through]
    outputs, gradients = zip(*results, strict=True)
    got = torch.autograd.grad(outputs, inputs, gradients)
    dout = torch.zeros_like(x.dout) if through == "softmax_lse" else x.dout
    dlse = None if through == "out" else x.dlse
    expected = torch.ops.flash_attn.bwd(dout, *(t.detach() for t in (*inputs, out, lse)), dlse, **arguments_of(case, x))
    for which, a, b in zip(("dq", "dk", "dv"), got, expected, strict=False):
        assert_bitwise(which, a, b, name)


@with_cases
def test_all_backward_ops_are_one(name):
    """The backward op that returns gradients, the one that writes them, and those of 2.8.3 agree bitwise."""
    case = CASES[name]
    x = make_inputs(case, padding=0.0)
    out, lse = op_fwd(case, x)
    returned = op_bwd(case, x, out, lse)
    for gradient, t in zip(returned, (x.q, x.k, x.v), strict=False):
        assert gradient.is_contiguous()
        assert gradient.shape == t.shape
    grads = tuple(torch.full_like(t, torch.nan) for t in (x.q, x.k, x.v))
    written = op_bwd(case, x, out, lse, grads)
    names = ("dq", "dk", "dv", "dsoftmax_sum")
    for which, a, b in zip(names, written, returned, strict=True):
        assert_bitwise(which, a, b, name)
    if case.lse_grad or case.seqused_k:
        return
    grads = tuple(torch.full_like(t, torch.nan) for t in (x.q, x.k, x.v))
    given = arguments_of(case, x)
    ops = torch.ops.flash_attn
    op = ops._flash_attn_varlen_backward if case.packed else ops._flash_attn_backward
    known = {argument.name for argument in op.default._schema.arguments}
    given = {**{key: t for key, t in given.items() if key in known}, "softmax_scale": case.scale}
    softmax_d = op(x.dout, x.q, x.k, x.v, out, lse, *grads, **given, deterministic=True)
    for which, a, b in zip(names, (*grads, softmax_d), returned, strict=True):
        assert_bitwise(which, a, b, name)


CU = torch.tensor([0, 2, 6, 11], dtype=torch.int32)
TOTAL, HEADS, HEAD_DIM = 11, 4, 8
PACKED = {
    "qkvpacked": (flash_attn.flash_attn_qkvpacked_func, ((2, 5, 3, HEADS, HEAD_DIM),), ()),
    "kvpacked": (flash_attn.flash_attn_kvpacked_func, ((2, 5, HEADS, HEAD_DIM), (2, 7, 2, 2, HEAD_DIM)), ()),
    "varlen_qkvpacked": (flash_attn.flash_attn_varlen_qkvpacked_func, ((TOTAL, 3, HEADS, HEAD_DIM),), (CU, 5)),
    "varlen_kvpacked": (
        flash_attn.flash_attn_varlen_kvpacked_func,
        ((TOTAL, HEADS, HEAD_DIM), (TOTAL, 2, 2, HEAD_DIM)),
        (CU, CU, 5, 5),
    ),
}


@pytest.mark.parametrize("with_lse", [False, True])
@pytest.mark.parametrize("form", PACKED)
def test_packed_gradients_are_written_in_one_piece(form, with_lse):
    """The backward op writes to views of the returned gradient: no stacking and no copies."""
    function, shapes, lengths = PACKED[form]
    inputs = leaves(*shapes, dtype=torch.float32)
    with OpCalls() as recorded:
        out, lse, _ = function(*inputs, *lengths, causal=True, return_attn_probs=True)
        grads = torch.autograd.grad(out.sum() + (lse.sum() if with_lse else 0), inputs)
    _, written = recorded.calls[-1]
    assert grads[-1].is_contiguous()
    packed = [grads[-1].data_ptr() + i * HEAD_DIM * 4 * inputs[-1].shape[-2] for i in range(inputs[-1].shape[-3])]
    expected = packed if len(inputs) == 1 else [grads[0].data_ptr(), *packed]
    assert [written[which].data_ptr() for which in ("dq", "dk", "dv")] == expected


@pytest.mark.parametrize("form", PACKED)
def test_packed_gradients_in_a_graph(form):
    """With create_graph the gradients are the same, and differentiating them raises."""
    function, shapes, lengths = PACKED[form]
    inputs = leaves(*shapes)
    expected = torch.autograd.grad(function(*inputs, *lengths, causal=True).square().sum(), inputs)
    grads = torch.autograd.grad(function(*inputs, *lengths, causal=True).square().sum(), inputs, create_graph=True)
    assert_same([x.detach() for x in grads], expected)
    with pytest.raises(RuntimeError, match="gradients of gradients are not supported"):
        torch.autograd.grad(grads[-1].square().sum(), inputs)


def inputs_of():
    return leaves((2, 5, HEADS, HEAD_DIM), (2, 7, 2, HEAD_DIM), (2, 7, 2, HEAD_DIM))


FUNCTIONS = {
    "public": lambda *x: flash_attn.flash_attn_func(*x, causal=True),
    "deterministic": lambda *x: flash_attn.flash_attn_func(*x, causal=True, deterministic=True),
    "op": lambda *x: torch.ops.flash_attn.fwd(*x, causal=True)[0],
    "original op": lambda *x: torch.ops.flash_attn._flash_attn_forward(
        *x, 0.0, HEAD_DIM**-0.5, True, -1, -1, 0.0, None, False
    )[0],
}
with_functions = pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)


def gradients_of(function, inputs, **kwargs):
    out = function(*inputs)
    return torch.autograd.grad(out, inputs, torch.ones_like(out), **kwargs)


@with_functions
def test_saved_tensors_go_through_hooks(function):
    """Saved are q, k, v, out and softmax_lse, and nothing of size seqlen_q x seqlen_k."""
    inputs = inputs_of()
    expected = gradients_of(function, inputs)
    packed, unpacked = [], []

    def pack(x):
        packed.append(tuple(x.shape))
        return x.clone()

    def unpack(x):
        unpacked.append(tuple(x.shape))
        return x

    with saved_tensors_hooks(pack, unpack):
        found = gradients_of(function, inputs)
    assert_same(found, expected)
    shapes = [*(tuple(x.shape) for x in inputs), (2, 5, HEADS, HEAD_DIM), (2, HEADS, 5)]
    assert sorted(packed) == sorted(unpacked) == sorted(shapes)
    with save_on_cpu():
        assert_same(gradients_of(function, inputs), expected)


@with_functions
def test_func_grad_and_vjp(function):
    inputs = inputs_of()
    expected = gradients_of(function, inputs)
    plain = tuple(x.detach() for x in inputs)
    out, pull = torch.func.vjp(function, *plain)
    assert_same(pull(torch.ones_like(out)), expected)
    assert_same(torch.func.grad(lambda *x: function(*x).sum(), argnums=(0, 1, 2))(*plain), expected)


@with_functions
def test_gradcheck(function):
    assert torch.autograd.gradcheck(function, inputs_of())


@with_functions
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(function, backend):
    inputs = inputs_of()
    torch.compiler.reset()
    compiled = torch.compile(lambda *x: function(*x), fullgraph=True, backend=backend)
    assert_same([compiled(*inputs)], [function(*inputs)])
    assert_same(gradients_of(compiled, inputs), gradients_of(function, inputs))


@with_functions
def test_the_graph_is_freed_and_can_be_kept(function):
    inputs = inputs_of()
    out = function(*inputs)
    first, second = (torch.autograd.grad(out.sum(), inputs, retain_graph=True) for _ in range(2))
    assert_same(first, second)
    torch.autograd.grad(out.sum(), inputs)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(out.sum(), inputs)


@with_functions
def test_only_what_is_asked_for(function):
    """Inputs without requires_grad get no gradient; incoming gradients may have any strides; hooks see them."""
    inputs = inputs_of()
    expected = gradients_of(function, inputs)
    q, k, v = inputs[0].detach(), inputs[1], inputs[2].detach()
    seen = []
    k.register_hook(seen.append)
    out = function(q, k, v)
    assert out.grad_fn.name() == "FlashAttentionBackward"
    assert [edge[0] is not None for edge in out.grad_fn.next_functions] == [False, True, False]
    out.backward(torch.ones(1, 1, 1, 1, dtype=out.dtype).expand(out.shape))
    assert q.grad is None
    assert v.grad is None
    assert_same([k.grad, *seen], [expected[1]] * 2)


@with_functions
def test_strided_inputs(function):
    """Expanded and transposed inputs get summed gradients."""
    base = leaves((1, HEADS, 5, HEAD_DIM), (1, 7, 1, HEAD_DIM), (2, 2, HEAD_DIM, 7))
    views = [base[0].expand(2, -1, -1, -1).transpose(1, 2), base[1].expand(2, -1, 2, -1), base[2].permute(0, 3, 1, 2)]
    copies = [x.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for x in views]
    dq, dk, dv = gradients_of(function, copies)
    expected = [dq.sum(0, True).transpose(1, 2), dk.sum((0, 2), True), dv.permute(0, 2, 3, 1)]
    out = function(*views)
    assert_same(torch.autograd.grad(out.sum(), base), expected)


@with_functions
def test_anomaly_mode_names_the_call(function):
    inputs = inputs_of()
    with torch.autograd.detect_anomaly(check_nan=True):
        out = function(*inputs)
        dout = torch.full_like(out, torch.nan)
        with (
            pytest.warns(UserWarning, match=r"(?s)Error detected in FlashAttentionBackward.*test_autograd.py"),
            pytest.raises(RuntimeError, match="returned nan values"),
        ):
            out.backward(dout)


def test_slopes_that_want_a_gradient_are_refused_by_the_ops():
    q, k, v = inputs_of()
    slopes = torch.ones(HEADS, requires_grad=True)
    with pytest.raises(ValueError, match="flash_attn_func: alibi_slopes: expected a tensor that does not require grad"):
        torch.ops.flash_attn.fwd(q, k, v, alibi_slopes=slopes)
    with torch.no_grad():
        torch.ops.flash_attn.fwd(q, k, v, alibi_slopes=slopes)


@pytest.mark.parametrize("return_attn_probs", [False, True])
def test_results_live_no_longer_than_they_are_held(return_attn_probs):
    inputs = inputs_of()
    results = flash_attn.flash_attn_func(*inputs, return_attn_probs=return_attn_probs)
    results = results if return_attn_probs else (results,)
    alive = [weakref.ref(x) for x in (*results, *inputs)]
    del results, inputs
    gc.collect()
    assert not any(x() is not None for x in alive)


# Tensor subclasses, and modes that intercept every function.


class Counted(torch.Tensor):
    """A Tensor subclass whose results keep the class."""


def test_subclasses_keep_their_class():
    inputs = [x.detach().as_subclass(Counted).requires_grad_() for x in inputs_of()]
    out = flash_attn.flash_attn_func(*inputs, causal=True)
    assert type(out) is Counted
    plain = [x.detach().as_subclass(torch.Tensor).requires_grad_() for x in inputs]
    grads = torch.autograd.grad(out.sum(), inputs)
    assert_same([x.as_subclass(torch.Tensor) for x in grads], gradients_of(FUNCTIONS["public"], plain))


def test_torch_function_modes_see_the_op():
    class Names(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            names.append(str(func))
            return func(*args, **(kwargs or {}))

    names, inputs = [], inputs_of()
    with Names():
        out = flash_attn.flash_attn_func(*inputs)
    assert "flash_attn._flash_attn_forward.default" in names
    assert_same([out], [flash_attn.flash_attn_func(*inputs)])


@pytest.mark.parametrize("form", [*FUNCTIONS, *PACKED])
def test_compiled_autograd(form):
    """Compiled autograd traces the backward pass through the node."""
    function, shapes, lengths = PACKED.get(form, (None, None, ()))
    inputs = inputs_of() if shapes is None else leaves(*shapes)

    def loss():
        out = FUNCTIONS[form](*inputs) if function is None else function(*inputs, *lengths, causal=True)
        return out.square().sum()

    expected = torch.autograd.grad(loss(), inputs)
    torch.compiler.reset()
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager", fullgraph=True)):
        loss().backward()
    assert_same([x.grad for x in inputs], expected)


@pytest.mark.parametrize("form", PACKED)
def test_packed_by_func_grad(form):
    function, shapes, lengths = PACKED[form]
    inputs = leaves(*shapes)
    expected = torch.autograd.grad(function(*inputs, *lengths, causal=True).sum(), inputs)
    argnums = tuple(range(len(inputs)))
    found = torch.func.grad(lambda *x: function(*x, *lengths, causal=True).sum(), argnums)(
        *(x.detach() for x in inputs)
    )
    assert_same(found, expected)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("form", PACKED)
def test_opcheck_of_packed_inputs(form, deterministic):
    _, shapes, lengths = PACKED[form]
    given = {"causal": True, "softmax_scale": 0.3, "deterministic": deterministic}
    if lengths:
        given |= {"cu_seqlens_q": CU, "cu_seqlens_k": CU, "max_seqlen_q": 5, "max_seqlen_k": 5}
    torch.library.opcheck(torch.ops.flash_attn._attention.default, (leaves(*shapes),), given)
