"""Repeated calls give the same bits, also beside other work on the device."""

import pytest
import torch

import flash_attn
from compare import assert_bitwise
from device import IS_GPU, needs_gpu, on_device
from inputs import random_qkv

pytestmark = on_device

TIMES = 1000 if IS_GPU else 2

SHAPES = {
    "small": {"batch_size": 1, "seqlen": 100, "num_heads": 2, "head_dim": 64},
    "many blocks": {"batch_size": 8, "seqlen": 300, "num_heads": 8, "head_dim": 64},
    "head_dim 96": {"batch_size": 2, "seqlen": 257, "num_heads": 4, "head_dim": 96},
    "head_dim 128, shared keys": {"batch_size": 4, "seqlen": 513, "num_heads": 8, "num_heads_k": 2, "head_dim": 128},
    "head_dim 192": {"batch_size": 2, "seqlen": 200, "num_heads": 4, "head_dim": 192},
    "head_dim 256": {"batch_size": 2, "seqlen": 256, "num_heads": 4, "head_dim": 256, "dtype": torch.float16},
}
FEATURES = {
    "causal": {"causal": True},
    "window, softcap": {"window_size": (60, 10), "softcap": 3.0},
    "dropout": {"dropout_p": 0.2},
}


def forward_and_backward(x, dout, features, deterministic):
    torch.manual_seed(1)
    out, lse, _ = flash_attn.flash_attn_func(*x, **features, deterministic=deterministic, return_attn_probs=True)
    return dict(
        zip(("out", "softmax_lse", "dq", "dk", "dv"), (out, lse, *torch.autograd.grad(out, x, dout)), strict=True)
    )


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_same_bits_every_time(shape, features, deterministic):
    """All results if deterministic; otherwise all but dq, which is close."""
    x = random_qkv(**shape) if IS_GPU else random_qkv(**{**shape, "batch_size": 1})
    dout = torch.randn_like(x[0])
    expected = forward_and_backward(x, dout, features, deterministic)
    size = expected["dq"].abs().max().item()
    differing = {name: torch.zeros((), dtype=torch.int64) for name in expected}
    furthest = torch.zeros(())
    for _ in range(TIMES if deterministic else -(-TIMES // 10)):
        got = forward_and_backward(x, dout, features, deterministic)
        for name, tensor in got.items():
            differing[name] += (tensor != expected[name]).sum()
        furthest = torch.maximum(furthest, (got["dq"].float() - expected["dq"].float()).abs().max())
    if not deterministic:
        assert furthest.item() <= 0.02 * size
        del differing["dq"]
    assert {name: int(count) for name, count in differing.items() if count} == {}


@needs_gpu
def test_same_bits_beside_other_work():
    """Another stream keeps memory and SMs busy."""
    x = random_qkv(batch_size=4, seqlen=1000, num_heads=8, head_dim=64)
    dout = torch.randn_like(x[0])
    expected = forward_and_backward(x, dout, {"causal": True}, True)
    matrix = torch.randn(4096, 4096, dtype=torch.bfloat16)
    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    for _ in range(50):
        with torch.cuda.stream(beside):
            for _ in range(4):
                matrix @ matrix
        for name, tensor in forward_and_backward(x, dout, {"causal": True}, True).items():
            assert_bitwise(name, tensor, expected[name])
