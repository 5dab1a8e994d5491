"""No writes through views that autograd or a hook may hold.

Gradients of packed inputs were written through views, which create_graph and torch.func forbid; MHA rotated queries and
keys in place, in the output of a projection that hooks and tensor parallelism also see.

Public threads: pytorch/pytorch#61519, huggingface/transformers#41535, pytorch/pytorch#56093
"""

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import flash_attn
from flash_attn.flash_attention import FlashAttention, FlashMHA
from flash_attn.modules.mha import MHA
from plain_attention import assert_near, assert_same, leaves

CU = torch.tensor([0, 2, 5], dtype=torch.int32)
CALLS = {
    "qkvpacked": (flash_attn.flash_attn_qkvpacked_func, [(1, 5, 3, 2, 8)]),
    "kvpacked": (flash_attn.flash_attn_kvpacked_func, [(1, 4, 2, 8), (1, 5, 2, 1, 8)]),
    "separate": (flash_attn.flash_attn_func, [(1, 4, 2, 8), (1, 5, 1, 8), (1, 5, 1, 8)]),
    "varlen": (lambda q, k, v: flash_attn.flash_attn_varlen_func(q, k, v, CU, CU, 3, 3), [(5, 2, 8)] * 3),
    "varlen kvpacked": (
        lambda q, kv: flash_attn.flash_attn_varlen_kvpacked_func(q, kv, CU, CU, 3, 3),
        [(5, 2, 8), (5, 2, 2, 8)],
    ),
    "varlen qkvpacked": (lambda qkv: flash_attn.flash_attn_varlen_qkvpacked_func(qkv, CU, 3), [(5, 3, 2, 8)]),
    "paged": (
        lambda q, k, v: flash_attn.flash_attn_varlen_func(
            q, k, v, CU, CU, 3, 3, block_table=torch.tensor([[1, 0], [2, 1]], dtype=torch.int32)
        ),
        [(5, 2, 8), (3, 2, 2, 8), (3, 2, 2, 8)],
    ),
    "softmax_lse": (
        lambda qkv: flash_attn.flash_attn_qkvpacked_func(qkv, return_attn_probs=True)[1], [(1, 5, 3, 2, 8)]
    ),
    "FlashAttention": (lambda qkv: FlashAttention()(qkv)[0], [(1, 5, 3, 2, 8)]),
    "FlashMHA": (lambda x: flash_mha()(x)[0], [(1, 5, 16)]),
    "FlashMHA, padded": (
        lambda x: flash_mha()(x, key_padding_mask=torch.tensor([[True, True, False, True, True]]))[0], [(1, 5, 16)]
    ),
    "MHA, rotary": (lambda x: mha(rotary_emb_dim=8)(x), [(1, 5, 16)]),
    "MHA, rotary, GQA, plain": (lambda x: mha(rotary_emb_dim=8, num_heads_kv=1, use_flash_attn=False)(x), [(1, 5, 16)]),
    "MHA, cross, ALiBi": (lambda x, y: mha(cross_attn=True, use_alibi=True)(x, y), [(1, 5, 16), (1, 7, 16)]),
}  # fmt: skip
with_calls = pytest.mark.parametrize("name", CALLS)


def flash_mha():
    torch.manual_seed(3)
    return FlashMHA(16, 2, dtype=torch.float64)


def mha(use_flash_attn=True, **options):
    torch.manual_seed(3)
    return MHA(16, 2, dtype=torch.float64, use_flash_attn=use_flash_attn, **options)


def value(function):
    return lambda *inputs: function(*inputs).square().sum()


@with_calls
def test_create_graph_changes_no_gradient(name):
    """A second derivative raises, since there is none."""
    function, shapes = CALLS[name]
    inputs = leaves(*shapes)
    expected = torch.autograd.grad(value(function)(*inputs), inputs)
    found = torch.autograd.grad(value(function)(*inputs), inputs, create_graph=True)
    assert_same(found, expected)
    second = sum(x.square().sum() for x in found)
    if "plain" in name:
        torch.autograd.grad(second, inputs)
        return
    with pytest.raises(RuntimeError, match=r"gradients of gradients are not supported; .* use plain attention"):
        torch.autograd.grad(second, inputs)


@with_calls
def test_torch_func(name):
    function, shapes = CALLS[name]
    inputs = leaves(*shapes)
    plain = [x.detach() for x in inputs]
    expected = torch.autograd.grad(value(function)(*inputs), inputs)
    argnums = tuple(range(len(inputs)))
    assert_same(torch.func.grad(value(function), argnums=argnums)(*plain), expected)
    _, pull = torch.func.vjp(value(function), *plain)
    assert_same(pull(torch.ones((), dtype=torch.float64)), expected)


@with_calls
@pytest.mark.parametrize("wanted", ["first", "last"])
def test_some_gradients(name, wanted):
    function, shapes = CALLS[name]
    inputs = leaves(*shapes)
    one = inputs[0 if wanted == "first" else -1]
    expected = dict(zip(map(id, inputs), torch.autograd.grad(value(function)(*inputs), inputs), strict=True))
    for x in inputs:
        x.requires_grad_(x is one)
    for create_graph in (False, True):
        assert_same(torch.autograd.grad(value(function)(*inputs), one, create_graph=create_graph), [expected[id(one)]])


def hook_backward(layer):
    layer.register_full_backward_hook(lambda *_: None)


def hook_backward_pre(layer):
    layer.register_full_backward_pre_hook(lambda *_: None)


def hook_tensor(layer):
    layer.register_forward_hook(lambda _module, _inputs, out: out.register_hook(lambda g: g) and None)


class Alias(torch.autograd.Function):
    """A view made inside a Function, as by tensor parallel wrappers."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dout):
        return dout


def wrap_in_function(layer):
    layer.register_forward_hook(lambda _module, _inputs, out: Alias.apply(out))


kept = []


def keep_output(layer):
    """A hook that keeps the projection's output, which must not change later."""
    layer.register_forward_hook(lambda _module, _inputs, out: kept.append((out, out.detach().clone())))


def save_output(layer):
    """A hook that saves the output for a backward pass of its own."""
    layer.register_forward_hook(lambda _module, _inputs, out: kept.append((out.square(), out.detach().square())))


HOOKS = [hook_backward, hook_backward_pre, hook_tensor, wrap_in_function, keep_output, save_output]
MODULES = {
    "MHA": {},
    "MHA, rotary": {"rotary_emb_dim": 8},
    "MHA, xPos, GQA": {"rotary_emb_dim": 4, "rotary_emb_scale_base": 64.0, "num_heads_kv": 1},
    "MHA, rotary, cross": {"rotary_emb_dim": 8, "cross_attn": True},
    "MHA, rotary, dwconv": {"rotary_emb_dim": 8, "dwconv": True},
}


@pytest.mark.parametrize("use_flash_attn", [True, False])
@pytest.mark.parametrize("hook", HOOKS, ids=lambda hook: hook.__name__)
@pytest.mark.parametrize("name", MODULES)
def test_hooks_on_every_layer(name, hook, use_flash_attn):
    (x,) = leaves((1, 5, 16))
    kept.clear()
    found = []
    for hooked in (False, True):
        module = mha(use_flash_attn, **MODULES[name])
        if hooked:
            for layer in module.children():
                if isinstance(layer, (torch.nn.Linear, torch.nn.Conv1d)):
                    hook(layer)
        out = module(x)
        found.append([out, *torch.autograd.grad(out.square().sum(), [x, *module.parameters()], retain_graph=True)])
    assert_same(found[1], found[0])
    for now, before in kept:
        assert_same([now], [before])
        torch.autograd.grad(now.sum(), x, retain_graph=True, allow_unused=True)


@pytest.mark.parametrize("hook", HOOKS, ids=lambda hook: hook.__name__)
def test_hooks_on_layers_of_flash_mha(hook):
    (x,) = leaves((1, 5, 16))
    plain, hooked = flash_mha(), flash_mha()
    for layer in (hooked.Wqkv, hooked.out_proj):
        hook(layer)
    assert_near(
        torch.autograd.grad(hooked(x)[0].sum(), [x, *hooked.parameters()]),
        torch.autograd.grad(plain(x)[0].sum(), [x, *plain.parameters()]),
        atol=0,
    )


@pytest.mark.parametrize("use_flash_attn", [True, False])
@pytest.mark.parametrize("name", MODULES)
def test_tensor_parallel_projections(name, use_flash_attn, tmp_path):
    """torch's tensor parallelism, in a group of one process: projection outputs are views made in a Function."""
    (x,) = leaves((1, 5, 16))
    plain, module = mha(use_flash_attn, **MODULES[name]), mha(use_flash_attn, **MODULES[name])
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        columns = {n: ColwiseParallel() for n in ("Wqkv", "Wq", "Wkv") if hasattr(module, n)}
        parallelize_module(module, mesh, {**columns, "out_proj": RowwiseParallel()})
        found, expected = module(x), plain(x)
        assert_near([found], [expected], atol=1e-12)
        assert_near(torch.autograd.grad(found.sum(), x), torch.autograd.grad(expected.sum(), x), atol=1e-12)
    finally:
        torch.distributed.destroy_process_group()
