"""PyTorch integration of the ops: schemas, fake tensors, torch.compile, existing and missing derivatives."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

import flash_attn
from bad_calls import backward, dense, into, paged, probs, varlen, varlen_backward, varlen_into
from cases import Case
from check import lengths_of, result_dtype, scores_of
from compare import assert_bitwise
from inputs import make_inputs

CASES = {
    "dense": Case((5, 5), (9, 9), head_dim=8, head_dim_v=6, num_heads=4),
    "float64": Case((5,), (3,), dtype="float64", head_dim=8, head_dim_v=8, causal=True, lse_grad=True),
    "everything": Case(
        (7, 7), (9, 9), dtype="bfloat16", head_dim=13, head_dim_v=5, causal=True, window_size=(4, -1), softcap=2.0,
        softmax_scale=0.4, alibi="batch", dropout_p=0.3, seqused_k=(9, 4), leftpad_k=(1, 0), lse_grad=True,
    ),
    "shards": Case(
        (5, 5), (9, 9), "bfloat16", 4, 2, head_dim=8, head_dim_v=16, causal=True, dropout_p=0.3, q_starts=(64, 32),
        k_starts=(32, 32), head_start=4, total_heads=12, float_results=True,
    ),
    "varlen": Case((3, 0, 6), (4, 2, 6), packed=True, head_dim=8, head_dim_v=8, causal=True, alibi="heads"),
    "unused rows": Case((3, 1), (4, 2), packed=True, head_dim=4, head_dim_v=4, unused_rows=2, dropout_p=0.5),
    "paged": Case((3, 1), (4, 2), packed=True, head_dim=4, head_dim_v=4, page_size=2),
    "no batch": Case((), (), seqlen_q_if_empty=3, seqlen_k_if_empty=2),
    "no keys": Case((3, 3), (0, 0), head_dim=4, head_dim_v=4),
}  # fmt: skip


def fwd_arguments(name):
    case = CASES[name]
    x = make_inputs(case, padding=0.0)
    shared = {**lengths_of(case, x), "block_table": x.block_table, **scores_of(case, x)}
    return case, x, {"q": x.q, "k": x.k, "v": x.v, **shared}


@pytest.mark.parametrize("name", CASES)
def test_opcheck(name):
    """opcheck of all of our ops: schema, autograd registration, fake tensors, tracing with dynamic shapes."""
    case, x, arguments = fwd_arguments(name)
    torch.library.opcheck(torch.ops.flash_attn.fwd.default, (), arguments)
    out, lse, _ = torch.ops.flash_attn.fwd(**arguments)
    torch.library.opcheck(torch.ops.flash_attn.fwd.out, (), {**arguments, "out": torch.zeros_like(out)})
    of_probs = {key: value for key, value in arguments.items() if key != "v"}
    torch.library.opcheck(torch.ops.flash_attn.attn_probs.default, (), {**of_probs, "softmax_lse": lse})
    if not case.page_size:
        grads = {f"d{name}": torch.zeros_like(arguments[name], dtype=result_dtype(case, x)) for name in "qkv"}
        more = {"dout": x.dout, "dlse": x.dlse if case.lse_grad else None, "out": out.to(x.q.dtype), "softmax_lse": lse}
        bwd_arguments = {**arguments, **more, "deterministic": True}
        torch.library.opcheck(torch.ops.flash_attn.bwd.default, (), bwd_arguments)
        torch.library.opcheck(torch.ops.flash_attn.bwd.out, (), {**bwd_arguments, **grads})
        leaf = {name: arguments[name].detach().clone().requires_grad_() for name in "qkv"}
        torch.library.opcheck(torch.ops.flash_attn.fwd.default, (), {**arguments, **leaf})


def functional(make):
    return lambda: {name: x for name, x in make().items() if name not in ("dq", "dk", "dv")}


ALL_OPS = {
    "fwd": (dense, varlen, paged),
    "fwd.out": (into, varlen_into),
    "bwd": (functional(backward), functional(varlen_backward)),
    "bwd.out": (backward, varlen_backward),
    "attn_probs": (probs,),
}


@pytest.mark.parametrize(("op", "call"), [(op, call) for op, calls in ALL_OPS.items() for call in calls])
def test_meta_and_fake_tensors_have_the_real_layout(op, call):
    arguments = call()
    packet, _, overload = op.partition(".")
    function = getattr(getattr(torch.ops.flash_attn, packet), overload or "default")
    real = function(**arguments)
    meta = function(**{key: x.to("meta") if isinstance(x, torch.Tensor) else x for key, x in arguments.items()})
    with FakeTensorMode() as mode:
        fakes = {key: mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for key, x in arguments.items()}
        fake = function(**fakes)
    for a, b, c in zip(*(x if isinstance(x, tuple) else (x,) for x in (real, meta, fake)), strict=True):
        assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype) == (c.shape, c.stride(), c.dtype)
        assert (b.device.type, c.device) == ("meta", a.device)


def leaves(*shapes, dtype=torch.float32):
    return [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]


def dense_of(seqlen=17, seqlen_k=33, dtype=torch.float32):
    return leaves((2, seqlen, 4, 16), (2, seqlen_k, 2, 16), (2, seqlen_k, 2, 16), dtype=dtype)


CU_Q, CU_K = torch.tensor([0, 5, 5, 17], dtype=torch.int32), torch.tensor([0, 9, 20, 33], dtype=torch.int32)


def varlen_of():
    return leaves((17, 4, 16), (33, 2, 16), (33, 2, 16))


def run_varlen(q, k, v, **options):
    return flash_attn.flash_attn_varlen_func(q, k, v, CU_Q, CU_K, 12, 13, **options)


FUNCTIONS = {
    "dense": (flash_attn.flash_attn_func, dense_of, {}),
    "causal with softmax_lse": (flash_attn.flash_attn_func, dense_of, {"causal": True, "return_attn_probs": True}),
    "dropout": (flash_attn.flash_attn_func, dense_of, {"dropout_p": 0.3}),
    "window": (flash_attn.flash_attn_func, dense_of, {"window_size": (4, 2), "softcap": 2.0, "softmax_scale": 0.5}),
    "chunks": (flash_attn.flash_attn_func, dense_of, {"attention_chunk": 5, "causal": True}),
    "shard": (
        flash_attn.flash_attn_func,
        lambda: dense_of(dtype=torch.bfloat16),
        {"causal": True, "q_start": 20, "k_start": 9, "out_dtype": torch.float32, "return_attn_probs": True},
    ),
    "shards": (run_varlen, varlen_of, {"causal": True, "q_start": torch.tensor([7, 0, 64], dtype=torch.int32)}),
    "alibi": (flash_attn.flash_attn_func, dense_of, {"alibi_slopes": torch.tensor([0.1, 0.2, 0.3, 0.4])}),
    "varlen": (run_varlen, varlen_of, {"causal": True}),
    "varlen with dropout": (run_varlen, varlen_of, {"dropout_p": 0.3}),
    "kvpacked": (
        flash_attn.flash_attn_kvpacked_func,
        lambda: leaves((2, 17, 4, 16), (2, 33, 2, 2, 16)),
        {"causal": True},
    ),
    "qkvpacked": (flash_attn.flash_attn_qkvpacked_func, lambda: leaves((2, 17, 3, 4, 16)), {"causal": True}),
    "qkvpacked with dropout": (
        flash_attn.flash_attn_qkvpacked_func,
        lambda: leaves((2, 17, 3, 4, 16)),
        {"dropout_p": 0.3},
    ),
}


def loss_and_gradients(function, inputs, options):
    torch.manual_seed(21)
    results = function(*inputs, **options)
    results = results[:2] if isinstance(results, tuple) else (results,)
    return [*results, *torch.autograd.grad(sum((r * r.detach().cos()).sum() for r in results), inputs)]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_compile(name):
    """One graph, forward and backward, with the same bits as eager mode; also without gradients."""
    function, make, options = FUNCTIONS[name]
    inputs = make()
    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    expected = loss_and_gradients(function, inputs, options)
    for i, (a, b) in enumerate(zip(loss_and_gradients(compiled, inputs, options), expected, strict=True)):
        assert_bitwise(f"result {i}", a, b)
    with torch.no_grad():
        torch.manual_seed(21)
        out = compiled(*inputs, **options)
        assert_bitwise("out without gradients", out[0] if isinstance(out, tuple) else out, expected[0])


def test_compile_with_inductor():
    """Inductor's code around the op changes only rounding."""
    q, k, v = dense_of()
    torch.compiler.reset()

    def run(q, k, v):
        return flash_attn.flash_attn_func(q * 2, k.sin(), v + 1, causal=True).cos()

    compiled = torch.compile(run, fullgraph=True)
    for a, b in zip(loss_and_gradients(compiled, (q, k, v), {}), loss_and_gradients(run, (q, k, v), {}), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
def test_compile_with_dynamic_shapes(causal):
    """The graph compiled for the first lengths is valid for all others."""
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(flash_attn.flash_attn_func, fullgraph=True, dynamic=True, backend=counter)
    compiled(*dense_of(19, 35), causal=causal).sum().backward()
    compiled_once = counter.frame_count
    for lengths in [(17, 33), (64, 129), (5, 7), (100, 40)]:
        inputs = dense_of(*lengths)
        expected = loss_and_gradients(flash_attn.flash_attn_func, inputs, {"causal": causal})
        for a, b in zip(loss_and_gradients(compiled, inputs, {"causal": causal}), expected, strict=True):
            assert_bitwise("result", a, b, f"lengths {lengths}")
    assert counter.frame_count == compiled_once


def test_compile_draws_a_new_mask_every_call():
    torch.compiler.reset()
    compiled = torch.compile(flash_attn.flash_attn_func, fullgraph=True, backend="aot_eager")
    inputs = dense_of()
    assert not torch.equal(compiled(*inputs, dropout_p=0.5), compiled(*inputs, dropout_p=0.5))


def test_export():
    """torch.export keeps a single op."""

    class Attention(torch.nn.Module):
        def forward(self, q, k, v):
            return flash_attn.flash_attn_func(q, k, v, causal=True)

    inputs = tuple(x.detach() for x in dense_of())
    program = torch.export.export(Attention(), inputs)
    assert sum("flash_attn._flash_attn_forward" in str(node.target) for node in program.graph.nodes) == 1
    assert_bitwise("out", program.module()(*inputs), flash_attn.flash_attn_func(*inputs, causal=True))


# Missing derivatives raise: by default torch would continue with zeros.


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("which", range(3))
def test_forward_mode_raises(requires_grad, which):
    x = [t.detach().requires_grad_(requires_grad) for t in dense_of()]
    call = dense()
    shared = {key: value for key, value in call.items() if key not in "qkv"}

    def public(t):
        return flash_attn.flash_attn_func(*x[:which], t, *x[which + 1 :])

    def op(t):
        return torch.ops.flash_attn.fwd(*x[:which], t, *x[which + 1 :], **shared)[0]

    for function in (public, op):
        with pytest.raises(RuntimeError, match=r"(?i)jvp|forward.mode|forward AD"):
            torch.func.jvp(function, (x[which],), (torch.ones_like(x[which]),))
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x[which], torch.ones_like(x[which]))
            with pytest.raises(RuntimeError, match=r"(?i)jvp|forward.mode|forward AD"):
                function(dual)
            with torch.no_grad(), pytest.raises(RuntimeError, match=r"(?i)jvp|forward.mode|forward AD"):
                function(dual)
    with pytest.raises(RuntimeError):
        torch.func.jacfwd(public)(x[which])


def test_forward_mode_through_the_backward_op_raises():
    call = backward()
    with torch.autograd.forward_ad.dual_level():
        call["dout"] = torch.autograd.forward_ad.make_dual(call["dout"], torch.ones_like(call["dout"]))
        with pytest.raises(RuntimeError, match="forward-mode"):
            torch.ops.flash_attn.bwd.out(**call)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_vmap_raises(requires_grad):
    x = [t.detach()[None].requires_grad_(requires_grad) for t in dense_of()]
    with pytest.raises(RuntimeError, match=r"(?i)vmap"):
        torch.vmap(flash_attn.flash_attn_func)(*x)
    with pytest.raises(RuntimeError, match=r"(?i)vmap"):
        torch.vmap(flash_attn.flash_attn_func, in_dims=(0, None, None))(x[0], x[1][0], x[2][0])
    shared = {key: value for key, value in dense().items() if key not in "qkv"}
    with pytest.raises(RuntimeError, match=r"vmap is not supported"):
        torch.vmap(lambda q, k, v: torch.ops.flash_attn.fwd(q, k, v, **shared))(*x)


@pytest.mark.parametrize("through", ["out", "softmax_lse"])
def test_double_backward_raises(through):
    """Double backward raises in every form: no zeros, and no first-order part alone."""
    x = dense_of(dtype=torch.float64)

    def value(*x):
        out, lse, _ = flash_attn.flash_attn_func(*x, causal=True, return_attn_probs=True)
        return (out if through == "out" else lse).square().sum()

    grads = torch.autograd.grad(value(*x), x, create_graph=True, materialize_grads=True)
    with pytest.raises(RuntimeError, match="gradients of gradients are not supported"):
        torch.autograd.grad(grads[0].square().sum(), x)
    with pytest.raises(RuntimeError, match="gradients of gradients are not supported"):
        torch.func.grad(lambda q: torch.func.grad(lambda q: value(q, *x[1:]))(q).square().sum())(x[0].detach())
    with pytest.raises(RuntimeError):
        torch.func.hessian(lambda q: value(q, *x[1:]))(x[0].detach())


def test_func_grad():
    """torch.func.grad and vjp give the same gradients as autograd."""
    x = dense_of()
    expected = torch.autograd.grad(flash_attn.flash_attn_func(*x, causal=True).sum(), x)
    plain = tuple(t.detach() for t in x)
    got = torch.func.grad(lambda *x: flash_attn.flash_attn_func(*x, causal=True).sum(), argnums=(0, 1, 2))(*plain)
    out, pull = torch.func.vjp(lambda *x: flash_attn.flash_attn_func(*x, causal=True), *plain)
    for i, (a, b, c) in enumerate(zip(got, pull(torch.ones_like(out)), expected, strict=True)):
        assert_bitwise(f"gradient {i}", a, c)
        assert_bitwise(f"gradient {i}", b, c)


def test_backward_through_attn_probs_raises():
    call = probs()
    call["q"] = call["q"].requires_grad_()
    result = torch.ops.flash_attn.attn_probs(**call)
    assert result.requires_grad
    with pytest.raises(RuntimeError, match="flash_attn::attn_probs: the op alone has no backward"):
        result.sum().backward()


def test_backward_through_what_fwd_out_wrote_raises():
    call = into()
    call["q"] = call["q"].requires_grad_()
    for result in (*torch.ops.flash_attn.fwd.out(**call), call["out"]):
        assert result.requires_grad
        with pytest.raises(RuntimeError, match="flash_attn::fwd: the op alone has no backward"):
            result.sum().backward()


def test_backward_through_pages_raises():
    """Paged keys get no gradients from the op; the public function gathers the pages first."""
    call = paged()
    call["k"] = call["k"].requires_grad_()
    for result in torch.ops.flash_attn.fwd(**call)[:2]:
        assert result.requires_grad
        with pytest.raises(RuntimeError, match="flash_attn::fwd: the op alone has no backward; call"):
            result.sum().backward()


@pytest.mark.parametrize(("make", "op", "name"), [(into, "fwd", "out"), (backward, "bwd", "dq")])
def test_writing_results_counts_as_a_write(make, op, name):
    """Autograd detects that an op has overwritten a saved tensor."""
    call = make()
    weight = torch.ones_like(call[name]).requires_grad_()
    product = weight * call[name]
    getattr(torch.ops.flash_attn, op).out(**call)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


def test_changing_an_input_before_backward_is_noticed():
    x = dense_of()
    copies = [t * 1 for t in x]
    out = flash_attn.flash_attn_func(*copies)
    copies[1].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
