"""What setup.py builds, by what it finds: names, requirements, and whether for the CPU only. Imports no torch."""

from __future__ import annotations

import runpy
from collections.abc import Mapping, Sequence
from pathlib import Path

from build_tools import cuda_archs

OLDEST_TORCH = "2.11"
# Of flash-attn's own setup.py. Its FLASH_ATTENTION_FORCE_BUILD and NVCC_THREADS need not be read: here, every
# installation compiles, and ninja divides the work.
SKIP_VARIABLE = "FLASH_ATTENTION_SKIP_CUDA_BUILD"

_package = runpy.run_path(str(Path(__file__).resolve().parent.parent / "flash_attn" / "_version.py"))


def extension_name(torch_version: str) -> str:
    """The module that flash_attn looks for, with the packages it lies in."""
    return f"flash_attn.{_package['extension_name'](torch_version)}"


def needs_torch(commands: Sequence[str]) -> bool:
    """Whether one of the arguments of setup.py takes torch: all but packing the sources do."""
    return "bdist_wheel" in commands or not {"sdist", "egg_info"} & set(commands)


def requirements(commands: Sequence[str], torch_version: str | None) -> list[str]:
    """What the result of setup.py requires: sources any recent torch, what is compiled one minor version of it."""
    if torch_version is None or ("sdist" in commands and "bdist_wheel" not in commands):
        return [f"torch>={OLDEST_TORCH}", "einops"]
    return [f"torch=={'.'.join(torch_version.split('.')[:2])}.*", "einops"]


def cpu_only_because(
    environment: Mapping[str, str], torch_cuda: str | None, *, has_nvcc: bool, has_kernels: bool = True
) -> str | None:
    """Why the build is for the CPU only, in a few words; None if it is for CUDA as well.

    torch_cuda: the version of CUDA that torch is for, or None.
    """
    own = environment.get(cuda_archs.OWN_VARIABLE, "").strip()
    if own.lower() == "none":
        return f"{cuda_archs.OWN_VARIABLE}={own}"
    if environment.get(SKIP_VARIABLE, "").strip().upper() in ("TRUE", "1"):
        return f"{SKIP_VARIABLE}={environment[SKIP_VARIABLE].strip()}"
    if torch_cuda is None:
        return "torch is a CPU build"
    if not has_nvcc:
        return "no nvcc was found"
    return None if has_kernels else "the source tree has no CUDA kernels"
