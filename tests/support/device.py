"""Where tests run: pytest --device=cpu, the default, or --device=cuda.

A test that takes the fixture `device`, or is marked on_device, runs on either; all others concern the CPU alone, and
are left out on a GPU. One that is marked needs_gpu runs there only.
"""

import contextlib
import dataclasses
import os
from collections.abc import Iterator

import pytest
import torch

from cases import Case

# tests/conftest.py sets it by the option, before any test is imported; processes that tests start inherit it.
DEVICE = os.environ.get("FLASH_ATTN_TEST_DEVICE", "cpu")
IS_GPU = DEVICE == "cuda"
MAX_HEAD_DIM = 256 if IS_GPU else 512

on_device = pytest.mark.usefixtures("device")
needs_gpu = pytest.mark.gpu

# Which kernels: on Hopper the best for each problem, and the generic ones for all; "" lets the package choose.
HAS_SM90 = IS_GPU and torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
BACKENDS = {"best": "", "sm80": "sm80"} if HAS_SM90 else {DEVICE: ""}

# The element types of the GPU's kernels, in place of those that only the CPU has.
NARROW = {"float32": "bfloat16", "float64": "float16"}


def unavailable_reason() -> str:
    """Why nothing can be run on a GPU here, in one line; empty if it can."""
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
    """The same problem in a type that the device takes."""
    return dataclasses.replace(case, dtype=NARROW.get(case.dtype, case.dtype)) if IS_GPU else case


def for_device(cases: list[Case]) -> list[Case]:
    """Those that the device takes, each once."""
    fitting = [case for case in cases if max(case.head_dim, case.head_dim_v) <= MAX_HEAD_DIM]
    return list(dict.fromkeys(map(narrow, fitting)))


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


def is_lost() -> bool:
    """Whether the GPU refuses everything from here on: an error of one call is told once, this one always."""
    for _ in range(2 * IS_GPU):
        try:
            torch.cuda.synchronize()
        except Exception:  # noqa: BLE001 (whatever it is, the device does not answer)
            continue
        return False
    return IS_GPU
