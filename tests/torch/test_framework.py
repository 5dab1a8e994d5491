"""PyTorch features on any device: torch.compile, opcheck, autocast, checkpointing, training, errors."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import flash_attn
from bad_calls import CALLS, VALUES, op_of
from compare import assert_bitwise
from device import DEVICE, needs_gpu, on_device
from flash_attn.flash_attention import FlashMHA
from inputs import random_qkv
from paths import environment

pytestmark = on_device

KEPT = {"softmax_lse", "dlse", "alibi_slopes"}


def on_the_device(arguments: dict, device: str = DEVICE) -> dict:
    """The arguments of a call of bad_calls.py in bfloat16, on the device under test."""

    def move(name, x):
        if not isinstance(x, torch.Tensor):
            return x
        return x.to(device, torch.bfloat16 if x.is_floating_point() and name not in KEPT else x.dtype)

    return {name: move(name, x) for name, x in arguments.items()}


@pytest.mark.parametrize("call", ["dense", "varlen", "backward", "probs"])
def test_opcheck(call):
    torch.library.opcheck(op_of(call), (), on_the_device(CALLS[call][0]()))


def loss_and_gradients(function, x, **options):
    torch.manual_seed(3)
    out = function(*x, **options)
    return out.detach(), *torch.autograd.grad((out * out.detach().cos()).sum(), x)


@pytest.mark.parametrize(
    "options", [{}, {"causal": True}, {"dropout_p": 0.3}, {"window_size": (20, 5), "softcap": 2.0}]
)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(options, dynamic):
    """One graph, with the same bits as eager mode."""
    options = {**options, "deterministic": True}
    torch.compiler.reset()
    compiled = torch.compile(flash_attn.flash_attn_func, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for seqlen in (100, 77):
        x = random_qkv(seqlen=seqlen)
        expected = loss_and_gradients(flash_attn.flash_attn_func, x, **options)
        for i, (a, b) in enumerate(zip(loss_and_gradients(compiled, x, **options), expected, strict=True)):
            assert_bitwise(f"result {i}", a, b)


def test_autocast():
    """float32 inputs are computed in bfloat16; gradients are float32."""
    x = random_qkv(dtype=torch.float32)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        out = flash_attn.flash_attn_func(*x, causal=True)
    assert out.dtype == torch.bfloat16
    assert all(grad.dtype == torch.float32 for grad in torch.autograd.grad(out.sum(), x))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint_drops_the_same_weights(use_reentrant):
    x = random_qkv()

    def attend(*x):
        return flash_attn.flash_attn_func(*x, dropout_p=0.4, deterministic=True)

    def gradients(function):
        torch.manual_seed(5)
        for t in x:
            t.grad = None
        function(*x).float().square().sum().backward()
        return [t.grad for t in x]

    expected = gradients(attend)
    for a, b in zip(gradients(lambda *x: checkpoint(attend, *x, use_reentrant=use_reentrant)), expected, strict=True):
        assert_bitwise("gradient", a, b)


@pytest.mark.parametrize("masked", [False, True])
def test_training(masked):
    """A layer trains on the device as on the CPU."""
    losses = {}
    for device in {"cpu", DEVICE}:
        torch.manual_seed(0)
        with torch.device("cpu"):
            layer = FlashMHA(embed_dim=128, num_heads=2, causal=True, dtype=torch.bfloat16)
            x, target = (torch.randn(2, 100, 128).to(torch.bfloat16) for _ in range(2))
            keep = torch.arange(100) < torch.tensor([[100], [60]])
        layer, x, target, keep = layer.to(device), x.to(device), target.to(device), keep.to(device)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
        losses[device] = []
        for _ in range(5):
            optimizer.zero_grad()
            out = layer(x, key_padding_mask=keep if masked else None)[0]
            loss = (out - target).float().square()[keep].mean()
            loss.backward()
            optimizer.step()
            losses[device].append(loss.item())
    torch.testing.assert_close(losses[DEVICE], losses["cpu"], rtol=2e-2, atol=2e-2)
    assert losses[DEVICE][-1] < losses[DEVICE][0]


# Errors.


@needs_gpu
def test_what_the_kernels_do_not_take():
    """A one-line error with the remedy; the next call works."""
    wide = [torch.ones(1, 3, 2, 300, dtype=torch.bfloat16) for _ in range(3)]
    with pytest.raises(ValueError, match=r"q: expected head_dim of at most 256 on a CUDA device"):
        flash_attn.flash_attn_func(*wide)
    with pytest.raises(ValueError, match=r"expected dtype bfloat16 or float16 on a CUDA device \(cast them, "):
        flash_attn.flash_attn_func(*(torch.ones(1, 3, 2, 8) for _ in range(3)))
    q = torch.ones(1, 3, 2, 8, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"k: expected device cuda:0 like q, got cpu"):
        flash_attn.flash_attn_func(q, q.cpu(), q)
    assert (flash_attn.flash_attn_func(q, q, q) == 1).all()


CHECK = """
import torch
from bad_calls import CALLS, VALUES, op_of
from test_framework import on_the_device
for call, changes, reasons in VALUES:
    arguments = on_the_device({**CALLS[call][0](), **changes})
    try:
        op_of(call)(**arguments)
        print("nothing is raised", call, changes)
    except ValueError as error:
        if not all(argument in str(error) for argument, _, _ in reasons):
            print("another reason:", error)
print("checked", len(VALUES))
"""


@needs_gpu
def test_values_are_checked_on_request():
    """FLASH_ATTN_CHECK=1 validates lengths and tables as on the CPU."""
    here = Path(__file__).parent
    env = environment(FLASH_ATTN_CHECK="1")
    command = [sys.executable, "-c", CHECK]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=here, check=False)
    assert done.stdout == f"checked {len(VALUES)}\n", done.stdout + done.stderr[-2000:]


@needs_gpu
@pytest.mark.last
@pytest.mark.parametrize(("call", "changes", "reasons"), VALUES)
def test_wrong_values_do_no_harm(call, changes, reasons):
    """Without it, invalid values give wrong results but no invalid accesses; the next call is correct."""
    op_of(call)(**on_the_device({**CALLS[call][0](), **changes}))
    torch.cuda.synchronize()
    q = torch.ones(1, 3, 2, 8, dtype=torch.bfloat16)
    assert (flash_attn.flash_attn_func(q, q, q) == 1).all()
