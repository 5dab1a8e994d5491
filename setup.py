"""Builds flash_attn: the Python package, and one extension module with the operators and every backend there is.

Environment: MAX_JOBS limits the number of compilers at work; CUDA_HOME names the CUDA toolkit.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent

try:
    import torch
    from torch.utils import cpp_extension
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    sys.exit(
        "flash-attn is compiled against the torch that is installed, and none is visible here. Run\n"
        "    pip install torch setuptools pybind11 ninja && pip install --no-build-isolation ."
    )

# -O3, not -O2: a tenth of the CPU backend's speed. Math functions set no errno and floating point does not trap, or
# loops with them would not become vector code. Vectors as arguments of inlined functions would set off -Wpsabi.
CXX_FLAGS = ["-std=c++20", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-g0", "-Wno-psabi"]


def version() -> str:
    """``__version__`` of the package, without importing it."""
    text = (ROOT / "flash_attn" / "_version.py").read_text()
    match = re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE)
    if match is None:
        sys.exit('flash_attn/_version.py: no line __version__ = "..."')
    return match.group(1)


def sources(*patterns: str) -> list[str]:
    """Source files below csrc, relative to the root as setuptools wants them, in a fixed order."""
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in (ROOT / "csrc").glob(pattern))


def cuda_home() -> str | None:
    """The top of the CUDA toolkit, asked of nvcc itself: the nvcc on PATH may be a wrapper in some other folder."""
    try:
        # The commands of a dry run go to standard error.
        command = ["nvcc", "--dryrun", "-c", "-x", "cu", "/dev/null"]
        dry_run = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return cpp_extension.CUDA_HOME
    top = re.search(r"^#\$ TOP=(.+)$", dry_run.stderr, re.MULTILINE)
    return str(Path(top.group(1).strip()).resolve()) if top else cpp_extension.CUDA_HOME


def extension():
    """The extension for this machine; says in one line which it is and why."""
    import pybind11  # here, so that torch is missed first

    cuda_sources = sources("**/*.cu")
    home = os.environ.get("CUDA_HOME") or cuda_home()
    reason = (
        "this torch is a CPU build"
        if torch.version.cuda is None
        else "there is no nvcc"
        if home is None
        else "the source tree has no CUDA kernels"
        if not cuda_sources
        else None
    )
    cxx_flags = list(CXX_FLAGS)
    options = {
        "include_dirs": [str(ROOT / "csrc"), pybind11.get_include()],
        "extra_link_args": ["-fopenmp"],
    }
    cxx_sources = sources("cpu/*.cpp", "ops/*.cpp")
    if reason is not None:
        print(f"flash-attn: building for CPU only: {reason}")
        options["extra_compile_args"] = {"cxx": cxx_flags}
        return cpp_extension.CppExtension("flash_attn._C", cxx_sources, **options)
    print(f"flash-attn: building for CPU and CUDA {torch.version.cuda}, with the toolkit in {home}")
    cpp_extension.CUDA_HOME = home
    cxx_flags.append(f'-DFLASH_ATTN_CUDA_VERSION="{torch.version.cuda}"')
    cxx_sources = [name for name in cxx_sources if Path(name).name != "no_cuda.cpp"]
    return cpp_extension.CUDAExtension(
        "flash_attn._C",
        cxx_sources + cuda_sources,
        extra_compile_args={"cxx": cxx_flags, "nvcc": ["-std=c++20", "-O3"]},
        **options,
    )


setup(
    name="flash-attn",
    version=version(),
    description="Exact attention tiled through on-chip memory, for training, on any machine",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="BSD-3-Clause",
    license_files=["LICENSE"],
    packages=find_packages(include=["flash_attn", "flash_attn.*"]),
    package_data={"flash_attn": ["py.typed"]},
    py_modules=["flash_attn_2_cuda"],
    ext_modules=[extension()],
    cmdclass={"build_ext": cpp_extension.BuildExtension},
    python_requires=">=3.10",
    install_requires=["torch>=2.11", "einops"],
    extras_require={"test": ["pytest>=7", "hypothesis", "numpy"], "demo": ["matplotlib", "tqdm"]},
    classifiers=[
        "Programming Language :: Python :: 3",
        "Programming Language :: C++",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
