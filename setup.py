"""Builds the extension module of flash_attn, with the operators and all backends. Metadata is in pyproject.toml.

Environment: MAX_JOBS limits the number of compiler processes; CUDA_HOME is the CUDA toolkit; FLASH_ATTN_CUDA_ARCHS, or
else TORCH_CUDA_ARCH_LIST, lists the GPU targets, such as "8.0+PTX;9.0a"; "none" is for the CPU only.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import setuptools

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # pip does not add this folder to sys.path

from build_tools import plan

commands = sys.argv[1:]
torch_version = None
compiled: dict[str, Any] = {}
try:
    import torch

    torch_version = torch.__version__
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    if plan.needs_torch(commands):
        sys.exit(
            "flash-attn is compiled against the torch that is installed, and none is visible here. Run\n"
            "    pip install torch 'setuptools>=77' ninja && pip install --no-build-isolation ."
        )
if int(setuptools.__version__.split(".")[0]) < 77:  # older ones do not know a license as pyproject.toml writes it
    sys.exit(f"flash-attn: setuptools is {setuptools.__version__}; run pip install 'setuptools>=77'")
if torch_version is not None:
    from build_tools import extension

    compiled = {"ext_modules": [extension.extension()], "cmdclass": {"build_ext": extension.BuildExtension}}
setuptools.setup(install_requires=plan.requirements(commands, torch_version), **compiled)
