"""Errors of the ops' CUDA implementation, tested without a GPU by calling it directly with CPU tensors."""

import pytest
import torch

import flash_attn
from bad_calls import CALLS, backward, dense, op_of, probs, varlen

HAS_KERNELS = bool(flash_attn.build_info()["cuda_archs"])
NO_KERNELS = (
    r"this build is for the CPU only, because .*: rebuild it with nvcc and a CUDA build of torch by .*, or move"
)
needs_kernels = pytest.mark.skipif(not HAS_KERNELS, reason="a build without CUDA kernels")


def call_on_cuda(call: str, arguments: dict):
    """The op's CUDA implementation, for tensors on any device."""
    op = torch.ops.flash_attn.fwd_kvcache.default if call == "cache" else op_of(call)
    cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    return op.redispatch(cuda, **arguments)


def in_bfloat16(arguments: dict) -> dict:
    kept = {"softmax_lse", "dlse", "alibi_slopes"}
    return {
        name: x.to(torch.bfloat16) if isinstance(x, torch.Tensor) and x.is_floating_point() and name not in kept else x
        for name, x in arguments.items()
    }


def cache(head_dim: int = 8, head_dim_v: int = 8, dtype: torch.dtype = torch.bfloat16) -> dict:
    """A call of fwd_kvcache."""
    sizes = {"q": (2, 1, 4, head_dim), "k_cache": (2, 9, 2, head_dim), "v_cache": (2, 9, 2, head_dim_v)}
    new = {"k": (2, 1, 2, head_dim), "v": (2, 1, 2, head_dim_v)}
    tensors = {name: torch.ones(size, dtype=dtype) for name, size in {**sizes, **new}.items()}
    return {**tensors, "cache_seqlen": 3, "softmax_scale": 0.1}


def rejection(call: str, arguments: dict) -> str:
    with pytest.raises(ValueError) as error:
        call_on_cuda(call, arguments)
    return str(error.value)


@pytest.mark.skipif(HAS_KERNELS, reason="a build with CUDA kernels")
@pytest.mark.parametrize("call", CALLS)
def test_build_without_kernels(call):
    """Invalid arguments are reported first; then the missing kernels, with the reason and the remedy."""
    with pytest.raises(RuntimeError, match=NO_KERNELS) as error:
        call_on_cuda(call, CALLS[call][0]())
    assert f"because {flash_attn.build_info()['built_because']}: " in str(error.value)
    assert "softcap: expected" in rejection(call, {**CALLS[call][0](), "softcap": float("inf")})


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("call", CALLS)
def test_types(call, dtype):
    arguments = {
        name: x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for name, x in CALLS[call][0]().items()
    }
    text = rejection(call, arguments)
    names = "q, k" if call == "probs" else "q, k, v"
    assert text.startswith(f"{CALLS[call][2]}{names}: expected dtype bfloat16 or float16 on a CUDA device (cast them, ")
    assert text.endswith(f"torch.autocast, or move them to the CPU, which takes every dtype), got {str(dtype)[6:]}")


@needs_kernels
def test_head_dims():
    """All reasons are reported; sizes that both backends reject give the same message as on the CPU."""

    def wide(make, head_dim, head_dim_v):
        call = in_bfloat16(make())
        for name, size in [("q", head_dim), ("k", head_dim), ("v", head_dim_v), ("dq", head_dim), ("dk", head_dim),
                           ("dv", head_dim_v), ("out", head_dim_v), ("dout", head_dim_v)]:  # fmt: skip
            if name in call:
                call[name] = torch.ones(*call[name].shape[:-1], size, dtype=torch.bfloat16)
        return call

    on_cuda = "of at most 256 on a CUDA device (the CPU takes up to 512), got"
    assert rejection("dense", wide(dense, 257, 8)) == f"flash_attn_func: q: expected head_dim {on_cuda} 257"
    assert rejection("varlen", wide(varlen, 8, 300)) == f"flash_attn_varlen_func: v: expected head_dim_v {on_cuda} 300"
    assert rejection("probs", wide(probs, 512, 8)) == f"flash_attn attn_probs: q: expected head_dim {on_cuda} 512"
    lines = rejection("backward", wide(backward, 257, 512)).splitlines()
    assert lines[0] == "flash_attn backward: 2 problems:"
    assert lines[1:] == [f"  - q: expected head_dim {on_cuda} 257", f"  - v: expected head_dim_v {on_cuda} 512"]
    assert "head_dim from 1 to 512" in rejection("dense", wide(dense, 513, 8))


@needs_kernels
@pytest.mark.parametrize("call", CALLS)
def test_nothing_runs_elsewhere(call):
    """Tensors that kernels cannot read are rejected before any launch."""
    with pytest.raises(RuntimeError, match="CUDA"):
        call_on_cuda(call, in_bfloat16(CALLS[call][0]()))


@pytest.mark.skipif(HAS_KERNELS, reason="a build with CUDA kernels")
def test_cache_in_a_build_without_kernels():
    with pytest.raises(RuntimeError, match=NO_KERNELS):
        call_on_cuda("cache", cache())
    assert "softcap: expected" in rejection("cache", {**cache(), "softcap": float("inf")})


@needs_kernels
def test_what_the_cpu_alone_takes_with_a_cache():
    """Errors come before anything is written."""
    prefix = "flash_attn_with_kvcache: "
    for dtype in (torch.float32, torch.float64):
        arguments = cache(dtype=dtype)
        text = rejection("cache", arguments)
        assert text.startswith(
            f"{prefix}q, k_cache, v_cache: expected dtype bfloat16 or float16 on a CUDA device (cast "
        )
        assert (arguments["k_cache"] == 1).all()
    on_cuda = "of at most 256 on a CUDA device (the CPU takes up to 576), got"
    assert rejection("cache", cache(257, 8)) == f"{prefix}k_cache: expected head_dim {on_cuda} 257"
    assert rejection("cache", cache(8, 300)) == f"{prefix}v_cache: expected head_dim_v {on_cuda} 300"
    lines = rejection("cache", cache(576, 512)).splitlines()
    assert lines == [
        f"{prefix}2 problems:",
        f"  - k_cache: expected head_dim {on_cuda} 576",
        f"  - v_cache: expected head_dim_v {on_cuda} 512",
    ]
    assert "head_dim from 1 to 576" in rejection("cache", cache(577, 8))
    with pytest.raises(RuntimeError, match="CUDA"):
        call_on_cuda("cache", cache())
