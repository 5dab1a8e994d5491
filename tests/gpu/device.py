"""Where the tests of this folder run, and how problems of the CPU's tables are made to fit."""

import contextlib
import dataclasses
import math
import os
from collections.abc import Iterator

import pytest
import torch

import inputs
from cases import Case

# "cpu" rehearses the tests on the CPU backend, where there is no GPU: that shows whether the tests are right.
DEVICE = os.environ.get("FLASH_ATTN_TEST_DEVICE", "cuda")
IS_GPU = DEVICE != "cpu"
MAX_HEAD_DIM = 256

# Both families of kernels, on a GPU that has both.
HAS_HOPPER_KERNELS = IS_GPU and torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
KERNELS = ("for Hopper", "generic") if HAS_HOPPER_KERNELS else ("generic",)


def environment_of(kernels: str) -> dict[str, str]:
    """What chooses them. Those for Hopper are not asked for by name: tables have cases that they leave to others."""
    generic = "sm80" if IS_GPU else "cpu"
    return {"FLASH_ATTN_BACKEND": generic if kernels == "generic" else ""}


needs_gpu = pytest.mark.skipif(not IS_GPU, reason="a rehearsal on the CPU")


@contextlib.contextmanager
def gpu_memory(gigabytes: float) -> Iterator[None]:
    """For tests that need so much of it: they are skipped where less is free, and what they took is given back."""
    if not IS_GPU:
        yield
        return
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < gigabytes * 1e9:
        pytest.skip(f"less than {gigabytes:.0f} GB of GPU memory are free")
    yield
    torch.cuda.empty_cache()


make_inputs_anywhere = inputs.make_inputs

# The element types of the kernels, in place of those that only the CPU has.
NARROW = {"float32": "bfloat16", "float64": "float16"}


def narrow(case: Case) -> Case:
    """The same problem in a type that the kernels take."""
    return dataclasses.replace(case, dtype=NARROW.get(case.dtype, case.dtype))


def for_kernels(cases: list[Case]) -> list[Case]:
    """Those that the kernels take, each once."""
    fitting = [case for case in cases if max(case.head_dim, case.head_dim_v) <= MAX_HEAD_DIM]
    return list(dict.fromkeys(map(narrow, fitting)))


def make_inputs(case: Case, device: str = DEVICE, padding: float = math.nan) -> inputs.Inputs:
    """As inputs.make_inputs, on the device, whatever the caller asks for."""
    with torch.device("cpu"):
        return make_inputs_anywhere(narrow(case), DEVICE, padding)


def random_qkv(batch_size=2, seqlen=200, num_heads=4, head_dim=64, dtype=torch.bfloat16, num_heads_k=None):
    """q, k and v that want gradients."""
    shape = (batch_size, seqlen, num_heads, head_dim)
    shape_k = (batch_size, seqlen, num_heads_k or num_heads, head_dim)
    return [torch.randn(s, dtype=dtype, device=DEVICE).requires_grad_() for s in (shape, shape_k, shape_k)]
