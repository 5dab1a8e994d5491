"""Modules in training code: copied, saved, cast, compiled, checkpointed and distributed."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from flash_attn.flash_attention import FlashMHA
from flash_attn.modules.mha import MHA
from plain_attention import assert_near, assert_same, gradients, leaves

BATCH, SEQLEN, EMBED, HEADS = 4, 6, 32, 4

MODULES = {
    "FlashMHA": lambda **kw: FlashMHA(EMBED, HEADS, causal=True, **kw),
    "MHA": lambda **kw: MHA(EMBED, HEADS, causal=True, use_flash_attn=True, **kw),
    "MHA with everything": lambda **kw: MHA(
        EMBED, HEADS, num_heads_kv=2, causal=True, use_flash_attn=True, rotary_emb_dim=4, use_alibi=True,
        window_size=(3, 0), dwconv=True, **kw,
    ),
}  # fmt: skip
DROPOUT_NAMES = {"FlashMHA": "attention_dropout", "MHA": "dropout", "MHA with everything": "dropout"}
with_modules = pytest.mark.parametrize("name", MODULES)


def build(name, dtype=torch.float32, seed=4, dropout=0.0):
    torch.manual_seed(seed)
    return MODULES[name](dtype=dtype, **{DROPOUT_NAMES[name]: dropout})


def call(module, x):
    out = module(x)
    return out[0] if isinstance(out, tuple) else out


def results(module, x):
    """Output and all gradients of a module with dropout and a fixed seed."""
    torch.manual_seed(9)
    out = call(module, x)
    return [out, *gradients(out, (x, *module.parameters()))]


@with_modules
@pytest.mark.parametrize("used_before", [False, True])
@pytest.mark.parametrize(
    "copier", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))], ids=["deepcopy", "pickle"]
)
def test_copies_are_independent(copier, used_before, name):
    module, (x,) = build(name), leaves((BATCH, SEQLEN, EMBED), dtype=torch.float32)
    if used_before:
        call(module, x).sum().backward()
    expected = results(module, x)
    twin = copier(module)
    assert_same(results(twin, x), expected)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    assert_same(results(twin, x), expected)


@with_modules
def test_state_dict_round_trip(name):
    module, (x,) = build(name), leaves((BATCH, SEQLEN, EMBED), dtype=torch.float32)
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    other = build(name, seed=5)
    assert not torch.equal(call(other, x), call(module, x))
    other.load_state_dict(torch.load(file, weights_only=True), strict=True)
    assert_same(results(other, x), results(module, x))


@with_modules
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.bfloat16, 0.03), (torch.float16, 0.004), (torch.float32, 1e-5)], ids=str
)
def test_types(dtype, tolerance, name):
    """Modules cast to a dtype agree with float64."""
    exact, module = build(name, torch.float64), build(name, torch.float64).to(dtype)
    exact.load_state_dict({key: value.double() for key, value in module.state_dict().items()})
    (x,) = leaves((BATCH, SEQLEN, EMBED), dtype=dtype)
    out = call(module, x)
    assert out.dtype == dtype
    (dx,) = gradients(out, [x])
    double = x.detach().double().requires_grad_()
    expected = call(exact, double)
    assert_near([out], [expected], atol=tolerance)
    assert_near([dx], gradients(expected, [double]), atol=tolerance * 4)


@with_modules
def test_autocast_training_step(name):
    """float32 parameters and optimizer with bfloat16 autocast: the loss falls about as in float32."""
    target = torch.randn(BATCH, SEQLEN, EMBED, generator=torch.Generator().manual_seed(3))
    (x,) = leaves((BATCH, SEQLEN, EMBED), dtype=torch.float32)
    losses = {}
    for enabled in (False, True):
        module = build(name)
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.02)
        losses[enabled] = []
        for _ in range(12):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                out = call(module, x.detach())
            assert out.dtype == (torch.bfloat16 if enabled else torch.float32)
            loss = F.mse_loss(out.float(), target)
            optimizer.zero_grad()
            loss.backward()
            assert all(p.grad.dtype == torch.float32 and torch.isfinite(p.grad).all() for p in module.parameters())
            optimizer.step()
            losses[enabled].append(loss.item())
    assert losses[False][-1] < losses[False][0] * 0.8
    assert losses[True] == pytest.approx(losses[False], rel=0.05)


@with_modules
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_with_dropout(use_reentrant, name):
    """The recomputation drops the same weights."""
    module, (x,) = build(name, dropout=0.4), leaves((BATCH, SEQLEN, EMBED), dtype=torch.float32)
    found = []
    for checkpointed in (False, True):
        module.zero_grad()
        x.grad = None
        torch.manual_seed(9)
        out = checkpoint(lambda t: call(module, t), x, use_reentrant=use_reentrant) if checkpointed else call(module, x)
        torch.rand(3)  # draws in between must not matter
        out.square().sum().backward()
        found.append([out, x.grad, *(p.grad.clone() for p in module.parameters())])
    assert_same(found[1], found[0])


@with_modules
@pytest.mark.parametrize("masked", [False, True])
def test_dropout_and_padding(masked, name):
    """Dropout with padding: padding affects neither outputs nor gradients."""
    module, (x,) = build(name, dropout=0.3), leaves((BATCH, SEQLEN, EMBED), dtype=torch.float32)
    keep = torch.ones(BATCH, SEQLEN, dtype=torch.bool)
    if masked:
        keep[0, 3:] = keep[2, ::2] = False
    torch.manual_seed(9)
    out = module(x, key_padding_mask=keep)
    out = out[0] if isinstance(out, tuple) else out
    (dx,) = gradients(out, [x])
    assert torch.isfinite(dx).all()
    assert (dx[~keep] == 0).all()
    bias = module.out_proj.bias.detach()
    assert torch.equal(out[~keep], bias.expand(int((~keep).sum()), -1))


COMPILED = [
    # module; backend; with padding mask; fullgraph
    ("FlashMHA", "aot_eager", False, True),
    ("FlashMHA", "inductor", False, True),
    ("FlashMHA", "aot_eager", True, False),  # the number of kept tokens depends on the values of the mask
    ("MHA", "aot_eager", True, True),
    ("MHA with everything", "aot_eager", False, True),
    ("MHA with everything", "aot_eager", True, True),
]


@pytest.mark.parametrize(("name", "backend", "masked", "fullgraph"), COMPILED)
def test_compiled_module(name, backend, masked, fullgraph):
    """Same results forward and backward; small graphs also after a change of batch size and length."""
    torch._dynamo.reset()
    module = build(name)
    compiled = torch.compile(module, fullgraph=fullgraph, backend=backend)
    again = [(BATCH + 1, SEQLEN + 3)] if (name, backend, masked) == ("FlashMHA", "aot_eager", False) else []
    for batch_size, seqlen in [(BATCH, SEQLEN), *again]:
        (x,) = leaves((batch_size, seqlen, EMBED), dtype=torch.float32)
        mask = {}
        if masked:
            mask["key_padding_mask"] = torch.arange(seqlen) < torch.arange(2, 2 + batch_size)[:, None]
        found = []
        for function in (module, compiled):
            out = function(x, **mask)
            out = out[0] if isinstance(out, tuple) else out
            found.append([out, *gradients(out, (x, *module.parameters()))])
        assert_near(found[1], found[0], atol=1e-4)


# Two processes with averaged gradients equal one process with the whole batch.


def ddp_worker(rank, world_size, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    try:
        (x,) = leaves((BATCH, SEQLEN, EMBED))
        own = x.detach().chunk(world_size)[rank]
        found = {}
        for name in MODULES:
            module = DistributedDataParallel(build(name, torch.float64, seed=4 + rank))
            for _ in range(2):
                module.zero_grad()
                call(module, own).square().mean().backward()
            found[name] = {key: parameter.grad for key, parameter in module.module.named_parameters()}
        torch.save(found, f"{folder}/gradients{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


def test_distributed_data_parallel(tmp_path):
    torch.multiprocessing.spawn(ddp_worker, args=(2, str(tmp_path)), nprocs=2)
    (x,) = leaves((BATCH, SEQLEN, EMBED))
    found = [torch.load(tmp_path / f"gradients{rank}.pt", weights_only=True) for rank in range(2)]
    for name in MODULES:
        module = build(name, torch.float64, seed=4)
        call(module, x.detach()).square().mean().backward()
        expected = {key: parameter.grad for key, parameter in module.named_parameters()}
        for of_rank in found:
            assert list(of_rank[name]) == list(expected)
            assert_near(of_rank[name].values(), expected.values(), atol=1e-12)
