"""Names by which programs find attention: ops in policies and counters, autograd classes, the compiled module.

A selective checkpointing policy for torch.ops.flash_attn._flash_attn_forward saved nothing, FlopCounterMode counted
nothing, and imports of packages failed because of missing names.

Public threads: axolotl-ai-cloud/axolotl#3786, pytorch/pytorch#131041, Dao-AILab/flash-attention#431,
unslothai/unsloth#1437
"""

import importlib

import pytest
import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

import flash_attn
from flash_attn import flash_attn_interface as interface
from flash_attn.flash_attention import FlashMHA
from flash_attn.modules.mha import MHA
from plain_attention import OpCalls, assert_near, assert_same, attention, gradients, leaves

# As torch.library.custom_op infers them from the functions of 2.8.3, except for the alias names of written arguments.
SCORE = "float dropout_p, float softmax_scale, bool causal, SymInt window_size_left, SymInt window_size_right"
LENGTHS = "Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k"
HEAD = "Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, Tensor(a!)? dq, Tensor(b!)? dk, "
SCHEMAS = {
    "_flash_attn_forward": (
        f"(Tensor q, Tensor k, Tensor v, {SCORE}, float softcap, Tensor? alibi_slopes, bool return_softmax) "
        "-> (Tensor, Tensor, Tensor, Tensor)"
    ),
    "_flash_attn_varlen_forward": (
        f"(Tensor q, Tensor k, Tensor v, {LENGTHS}, {SCORE}=-1, float softcap=0., Tensor? alibi_slopes=None, "
        "bool return_softmax=False, Tensor? block_table=None, Tensor? leftpad_k=None, Tensor? seqused_k=None, "
        "bool zero_tensors=False) -> (Tensor, Tensor, Tensor, Tensor)"
    ).replace("window_size_left,", "window_size_left=-1,"),
    "_flash_attn_backward": (
        f"({HEAD}Tensor(c!)? dv, {SCORE}, float softcap, Tensor? alibi_slopes, bool deterministic, "
        "Tensor? rng_state=None) -> Tensor"
    ),
    "_flash_attn_varlen_backward": (
        f"({HEAD}Tensor(c!)? dv, {LENGTHS}, {SCORE}, float softcap, Tensor? alibi_slopes, bool deterministic, "
        "Tensor? rng_state=None, bool zero_tensors=False) -> Tensor"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SCHEMAS)
def test_schema(name):
    assert str(getattr(torch.ops.flash_attn, name).default._schema) == f"flash_attn::{name}{SCHEMAS[name]}"


B, S, SK, H, HK, D = 2, 6, 9, 4, 2, 8
CU_Q, CU_K = torch.tensor([0, 2, 2, 12], dtype=torch.int32), torch.tensor([0, 5, 8, 18], dtype=torch.int32)


def tensors(dtype=torch.float64):
    return leaves((B, S, H, D), (B, SK, HK, D), (B, SK, HK, D), dtype=dtype)


CALLS = {
    "dense": lambda **o: (flash_attn.flash_attn_func, tensors(), (), o),
    "kvpacked": lambda **o: (
        lambda q, k, v, **o: flash_attn.flash_attn_kvpacked_func(q, torch.stack([k, v], 2), **o), tensors(), (), o
    ),
    "varlen": lambda **o: (
        lambda q, k, v, *a, **o: flash_attn.flash_attn_varlen_func(*(x.flatten(0, 1) for x in (q, k, v)), *a, **o),
        tensors(), (CU_Q, CU_K, 10, 10), o,
    ),
}  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"dropout_p": 0.3}, {"causal": True, "softcap": 3.0}], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_public_functions_go_through_these_ops(name, options):
    function, inputs, lengths, options = CALLS[name](**options)
    middle = "_varlen" if lengths else ""
    with OpCalls() as recorded:
        function(*inputs, *lengths, **options).sum().backward()
        with torch.no_grad():
            function(*inputs, *lengths, **options)
    names = [f"_flash_attn{middle}_forward", f"_flash_attn{middle}_backward", f"_flash_attn{middle}_forward"]
    assert [name for name, _ in recorded.calls] == names


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("varlen", [False, True])
def test_ops_directly(varlen, dropout_p):
    """Positional arguments as in 2.8.3, output buffers filled, the mask repeated from rng_state."""
    q, k, v = (x.detach() for x in tensors())
    lengths, ops = (), torch.ops.flash_attn
    if varlen:
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
        lengths = (CU_Q, CU_K, 10, 10)
    options = (dropout_p, 0.3, True, -1, -1, 0.0, None)
    forward = ops._flash_attn_varlen_forward if varlen else ops._flash_attn_forward
    backward = ops._flash_attn_varlen_backward if varlen else ops._flash_attn_backward
    torch.manual_seed(7)
    out, lse, probs, rng_state = forward(q, k, v, *lengths, *options, True)
    assert (probs.numel() > 0) == (dropout_p > 0)
    assert (rng_state.dtype, tuple(rng_state.shape)) == (torch.int64, (2,))
    grads = [torch.full_like(x, torch.nan) for x in (q, k, v)]
    dout = torch.ones_like(out)
    backward(dout, q, k, v, out, lse, *grads, *lengths, *options, False, rng_state)
    backward(dout, q, k, v, out, lse, None, None, None, *lengths, *options, False, rng_state)
    function = flash_attn.flash_attn_varlen_func if varlen else flash_attn.flash_attn_func
    torch.manual_seed(7)
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    expected = function(*inputs, *lengths, dropout_p=dropout_p, softmax_scale=0.3, causal=True)
    assert_same([out, *grads], [expected, *torch.autograd.grad(expected, inputs, dout)])


@pytest.mark.parametrize("varlen", [False, True])
def test_opcheck(varlen):
    q, k, v = (x.detach() for x in tensors(torch.float32))
    lengths = {"cu_seqlens_q": CU_Q, "cu_seqlens_k": CU_K, "max_seqlen_q": 10, "max_seqlen_k": 10} if varlen else {}
    if varlen:
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    shared = {
        "dropout_p": 0.0, "softmax_scale": 0.3, "causal": True, "window_size_left": -1, "window_size_right": -1,
        "softcap": 0.0, "alibi_slopes": None,
    }  # fmt: skip
    name = "_flash_attn_varlen" if varlen else "_flash_attn"
    forward, backward = (getattr(torch.ops.flash_attn, f"{name}_{which}").default for which in ("forward", "backward"))
    torch.library.opcheck(forward, (q, k, v), {**lengths, **shared, "return_softmax": False})
    out, lse, _, rng_state = forward(q, k, v, **lengths, **shared, return_softmax=False)
    grads = {"dq": torch.zeros_like(q), "dk": torch.zeros_like(k), "dv": torch.zeros_like(v)}
    more = {**grads, **lengths, **shared, "deterministic": True, "rng_state": rng_state}
    torch.library.opcheck(backward, (out, q, k, v, out, lse), more)


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("which", ["_flash_attn_forward", "_flash_attn_varlen_forward"])
def test_an_op_alone_is_differentiable(which, dropout_p):
    """Like the public function, through out and softmax_lse; S_dmask and rng_state are not differentiable."""
    inputs, lengths, function = tensors(), (), flash_attn.flash_attn_func
    if "varlen" in which:
        inputs = [x.detach().flatten(0, 1).requires_grad_() for x in inputs]
        lengths, function = (CU_Q, CU_K, 10, 10), flash_attn.flash_attn_varlen_func
    torch.manual_seed(3)
    op = getattr(torch.ops.flash_attn, which)
    out, lse, probs, rng_state = op(*inputs, *lengths, dropout_p, 0.3, False, -1, -1, 0.0, None, True)
    assert not (probs.requires_grad or rng_state.requires_grad)
    torch.manual_seed(3)
    options = {"dropout_p": dropout_p, "softmax_scale": 0.3, "return_attn_probs": True}
    expected = function(*inputs, *lengths, **options)
    assert_same([out, lse], expected[:2])
    for found, same in (
        (out, expected[0]),
        (lse, expected[1]),
        (out.sum() + lse.sum(), expected[0].sum() + expected[1].sum()),
    ):
        grads, same_grads = (torch.autograd.grad(x.sum(), inputs, retain_graph=True) for x in (found, same))
        assert_same(grads, same_grads)


# Selective checkpointing.

SAVED = {
    "_flash_attn_forward": lambda module, x: module(x),
    "_flash_attn_varlen_forward": lambda module, x: module(x, key_padding_mask=torch.arange(x.shape[1]) < 5),
}


def first(result):
    return result[0] if isinstance(result, tuple) else result


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("kind", [FlashMHA, MHA])
@pytest.mark.parametrize("saved", SAVED)
def test_a_policy_that_saves_attention(saved, kind, dropout):
    """Attention runs once in forward and backward, and gradients equal those without checkpointing."""
    options = {"attention_dropout": dropout} if kind is FlashMHA else {"dropout": dropout, "use_flash_attn": True}
    module, (x,) = kind(16, 2, **options), leaves((2, 6, 16), dtype=torch.float32)

    def call(x):
        mask = {"key_padding_mask": (torch.arange(6) < 4).expand(2, 6)} if "varlen" in saved else {}
        return first(module(x, **mask))

    def policy(context, op, *args, **kwargs):
        wanted = getattr(torch.ops.flash_attn, saved).default
        return CheckpointPolicy.MUST_SAVE if op is wanted else CheckpointPolicy.PREFER_RECOMPUTE

    found = []
    for checkpointed in (False, True):
        torch.manual_seed(9)
        with OpCalls() as recorded:
            if checkpointed:
                out = checkpoint(
                    call, x, use_reentrant=False, context_fn=lambda: create_selective_checkpoint_contexts(policy)
                )
            else:
                out = call(x)
            found.append([out, *gradients(out, [x, *module.parameters()])])
        assert [name for name, _ in recorded.calls] == [saved, saved.replace("forward", "backward")]
    assert_same(found[1], found[0])


# FlopCounterMode.


def flops(call):
    with FlopCounterMode(display=False) as counter:
        call()
    return {str(op).removeprefix("flash_attn."): n for op, n in counter.get_flop_counts()["Global"].items()}


def test_flops_of_the_smallest_example():
    q = torch.randn(2, 64, 4, 32)
    assert flops(lambda: flash_attn.flash_attn_func(q, q, q)) == {"_flash_attn_forward": 4_194_304}
    assert flops(lambda: flash_attn.flash_attn_func(q, q, q, causal=True)) == {"_flash_attn_forward": 4_194_304}


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_flops_forward_and_backward(device):
    """Forward 4 B H Sq Sk D, with H query heads; backward 2.5 times that; head_dim_v is counted separately."""
    q, k, v = (torch.randn(*shape, device=device) for shape in ((B, S, H, D), (B, SK, HK, D), (B, SK, HK, 12)))
    inputs = [x.requires_grad_() for x in (q, k, v)]
    pairs = B * H * S * SK
    expected = {"_flash_attn_forward": pairs * 2 * (D + 12), "_flash_attn_backward": pairs * 2 * (3 * D + 2 * 12)}
    assert flops(lambda: flash_attn.flash_attn_func(*inputs).sum().backward()) == expected
    with torch.no_grad():
        assert flops(lambda: torch.ops.flash_attn.fwd(*inputs)) == {"fwd": pairs * 2 * (D + 12)}


def test_flops_of_packed_sequences():
    """Per sequence, only keys in use; if lengths cannot be read, those of the longest sequence."""
    q, k, v = (x.flatten(0, 1) for x in tensors())
    pairs = H * sum(int(i * j) for i, j in zip(CU_Q.diff(), CU_K.diff(), strict=True))
    call = flash_attn.flash_attn_varlen_func
    counted = flops(lambda: call(q, k, v, CU_Q, CU_K, 10, 10).sum().backward())
    assert counted == {"_flash_attn_varlen_forward": 4 * pairs * D, "_flash_attn_varlen_backward": 10 * pairs * D}
    used = torch.tensor([1, -1, 4], dtype=torch.int32)
    counted = flops(
        lambda: interface._flash_attn_varlen_forward(q, k, v, CU_Q, CU_K, 10, 10, 0.0, 1.0, False, seqused_k=used)
    )
    assert counted == {"_flash_attn_varlen_forward": 4 * H * (2 * 1 + 10 * 4) * D}
    meta = [x.detach().to("meta") for x in (q, k, v, CU_Q, CU_K)]
    assert flops(lambda: call(*meta, 10, 10)) == {"_flash_attn_varlen_forward": 4 * H * 3 * 10 * 10 * D}


def test_flops_of_a_module():
    module, x = FlashMHA(16, 2), torch.randn(2, 5, 16)
    with FlopCounterMode(display=False) as counter:
        module(x)
    counts = {str(op): n for op, n in counter.get_flop_counts()["FlashMHA"].items()}
    assert counts["flash_attn._flash_attn_forward"] == 4 * 2 * 2 * 5 * 5 * 8


# Autograd classes.

TAIL = (0.0, 0.4, True, (3, -1), 2.0, torch.tensor([0.5, 0.25, 0.1, 0.0]), True)
OPTIONS = dict(
    zip(
        ("dropout_p", "softmax_scale", "causal", "window_size", "softcap", "alibi_slopes", "deterministic"),
        TAIL, strict=True,
    )
)  # fmt: skip


def applied(name):
    """apply's arguments before the options, the public function, and the inputs that get gradients."""
    q, k, v = leaves(*[(B * S, H, D)] * 3) if "Varlen" in name else leaves(*[(B, S, H, D)] * 3)
    cu = torch.tensor([0, 4, 12], dtype=torch.int32)
    lengths = (cu, cu, 8, 8) if "Varlen" in name else ()
    function = getattr(interface, "flash_attn_" + ("varlen_" if lengths else "") + {
        "KV": "kvpacked_func", "QKV": "qkvpacked_func", "": "func"
    }[name.removeprefix("FlashAttn").removeprefix("Varlen").removesuffix("Func").removesuffix("Packed")])  # fmt: skip
    if "QKV" in name:
        qkv = torch.stack([q, k, v], -3).detach().requires_grad_()
        return ((qkv, *((cu, 8) if lengths else ())), function, [qkv])
    if "KV" in name:
        kv = torch.stack([k, v], -3).detach().requires_grad_()
        return ((q, kv, *lengths), function, [q, kv])
    return ((q, k, v, *lengths), function, [q, k, v])


CLASSES = ["FlashAttnFunc", "FlashAttnKVPackedFunc", "FlashAttnQKVPackedFunc"]
CLASSES += [name.replace("Attn", "AttnVarlen") for name in CLASSES]


@pytest.mark.parametrize("name", CLASSES)
def test_autograd_classes(name):
    head, function, inputs = applied(name)
    block_table = (None,) if name == "FlashAttnVarlenFunc" else ()
    expected = function(*head, **OPTIONS, return_attn_probs=True)
    cls = getattr(interface, name)
    for last in ((), (*block_table, True)):  # argument lists before and since 2.7
        found = cls.apply(*head, *TAIL, True, *last)
        assert_same(found, expected)
        assert_same(gradients(found[0], inputs), gradients(expected[0], inputs, retain_graph=True))
    out = cls.apply(*head, *TAIL, False, *block_table, False)
    assert_same([out], [expected[0]])
    assert not out.requires_grad


def test_paged_keys_by_the_autograd_class():
    q, k, v = leaves((5, H, D), (3, 2, HK, D), (3, 2, HK, D))
    cu = torch.tensor([0, 2, 5], dtype=torch.int32)
    table = torch.tensor([[1, 0], [2, 1]], dtype=torch.int32)
    out = interface.FlashAttnVarlenFunc.apply(q, k, v, cu, cu, 3, 3, *TAIL, False, table, True)
    assert_same([out], [interface.flash_attn_varlen_func(q, k, v, cu, cu, 3, 3, **OPTIONS, block_table=table)])


# Names that packages import.


def test_the_compiled_module_under_its_names():
    native = importlib.import_module("flash_attn_2_cuda")
    assert interface.flash_attn_gpu is interface.flash_attn_cuda is native
    q, k, v = (x.detach() for x in tensors())
    out = interface.flash_attn_gpu.fwd(q, k, v, None, None, 0.0, 0.3, False, -1, -1, 0.0, False, None)[0]
    assert_near([out], [attention(q, k, v, scale=0.3)[0]])


def test_small_helpers():
    x = torch.zeros(2, 3, 4)
    assert interface.maybe_contiguous(x) is x
    assert interface.maybe_contiguous(None) is None
    assert interface.maybe_contiguous(x.transpose(0, 1)).stride() == (4, 12, 1)
    assert interface.maybe_contiguous(x.transpose(1, 2)).stride(-1) == 1
    assert [interface.round_multiple(n, 8) for n in (0, 1, 8, 9)] == [0, 8, 8, 16]
    assert interface._get_block_size_n(torch.device("cpu"), 64, True, False) == 32


def test_plain_rotation():
    from flash_attn.layers.rotary import apply_rotary_emb, apply_rotary_emb_torch, rotate_half

    (x,) = leaves((2, 5, 3, 8))
    angles = torch.rand(5, 3, dtype=torch.float64) * 6
    for interleaved in (False, True):
        tables = (angles.cos(), angles.sin())
        expected = apply_rotary_emb(x, *tables, interleaved)
        wide = [t.repeat_interleave(2, -1) if interleaved else torch.cat([t, t], -1) for t in tables]
        turned = x[..., :6] * wide[0][:, None] + rotate_half(x[..., :6], interleaved) * wide[1][:, None]
        batched = [t.expand(2, 5, 3) for t in tables]
        assert_near(
            [apply_rotary_emb_torch(x, *tables, interleaved), torch.cat([turned, x[..., 6:]], -1)], [expected] * 2
        )
        assert_near([apply_rotary_emb_torch(x, *batched, interleaved)], [expected])
