"""The device under test: pytest --device=cpu (default) or --device=cuda.

Tests with the fixture `device` or the mark on_device run on either device; the mark needs_gpu: on a GPU only. All other
tests run on the CPU only.
"""

import contextlib
import dataclasses
import fcntl
import os
from collections.abc import Iterator

import pytest
import torch

from cases import Case
from paths import ROOT

# Set by tests/conftest.py from the option, before tests are imported; inherited by child processes.
DEVICE = os.environ.get("FLASH_ATTN_TEST_DEVICE", "cpu")
IS_GPU = DEVICE == "cuda"
MAX_HEAD_DIM = 256 if IS_GPU else 512

on_device = pytest.mark.usefixtures("device")
needs_gpu = pytest.mark.gpu

# Kernel families: on Hopper, the best backend per problem and sm80 for all; "" lets the package choose.
HAS_SM90 = IS_GPU and torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
BACKENDS = {"best": "", "sm80": "sm80"} if HAS_SM90 else {DEVICE: ""}

# The dtypes of the GPU kernels that replace the CPU-only dtypes.
NARROW = {"float32": "bfloat16", "float64": "float16"}


def unavailable_reason() -> str:
    """Why nothing can run on a GPU here, in one line; empty if it can."""
    import flash_attn

    if torch.version.cuda is None:
        return f"no CUDA device: torch {torch.__version__} is a CPU build"
    if not torch.cuda.is_available():
        return f"no CUDA device: torch {torch.__version__} finds none"
    capability, built = torch.cuda.get_device_capability(), flash_attn.build_info()
    if capability < (8, 0):
        return f"{torch.cuda.get_device_name()} has compute capability {capability}, and the kernels need 8.0 or newer"
    names = {each["name"] for each in built["backends"] if each["built_for"]}
    if not {"sm80", "sm90" if HAS_SM90 else "sm80"} <= names:
        return f"the build has no kernels for this GPU, only {built['cuda_archs']}; run make clean, and build again"
    return ""


def narrow(case: Case) -> Case:
    """The same problem in a dtype that the device supports."""
    return dataclasses.replace(case, dtype=NARROW.get(case.dtype, case.dtype)) if IS_GPU else case


def for_device(cases: list[Case]) -> list[Case]:
    """The cases in dtypes that the device supports, without duplicates."""
    fitting = [case for case in cases if max(case.head_dim, case.head_dim_v) <= MAX_HEAD_DIM]
    return list(dict.fromkeys(map(narrow, fitting)))


@contextlib.contextmanager
def gpu_memory(gigabytes: float) -> Iterator[None]:
    """Skip the test if less GPU memory is free; afterwards release what the test allocated."""
    if not IS_GPU:
        yield
        return
    with (ROOT / "build" / ".gpu-memory.lock").open("w") as lock:  # one of these tests at a time, of all processes
        fcntl.flock(lock, fcntl.LOCK_EX)
        torch.cuda.empty_cache()
        if torch.cuda.mem_get_info()[0] < gigabytes * 1e9:
            pytest.skip(f"less than {gigabytes:.0f} GB of GPU memory are free")
        yield
        torch.cuda.empty_cache()


def is_lost() -> bool:
    """Whether the GPU no longer works: errors of a single call are reported once, sticky errors always."""
    for _ in range(2 * IS_GPU):
        try:
            torch.cuda.synchronize()
        except Exception:  # noqa: BLE001 (whatever the error, the device does not respond)
            continue
        return False
    return IS_GPU
