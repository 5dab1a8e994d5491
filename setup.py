"""Builds the extension module of flash_attn, with the operators and all backends. Metadata is in pyproject.toml.

Environment: MAX_JOBS limits the number of compiler processes; CUDA_HOME is the CUDA toolkit; FLASH_ATTN_CUDA_ARCHS, or
else TORCH_CUDA_ARCH_LIST, lists the GPU targets, such as "8.0+PTX;9.0a".
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import setuptools

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # pip does not add this folder to sys.path

from build_tools import cuda_archs, cuda_objects

try:
    import torch
    from torch.utils import cpp_extension
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    sys.exit(
        "flash-attn is compiled against the torch that is installed, and none is visible here. Run\n"
        "    pip install torch 'setuptools>=77' pybind11 ninja && pip install --no-build-isolation ."
    )
if int(setuptools.__version__.split(".")[0]) < 77:  # older ones do not know a license as pyproject.toml writes it
    sys.exit(f"flash-attn: setuptools is {setuptools.__version__}; run pip install 'setuptools>=77'")

ROOT = Path(__file__).resolve().parent

# -O3, not -O2: worth a tenth of the CPU backend's speed. Without errno and FP traps, loops with math functions
# vectorise. -Wno-psabi: vector arguments are only passed to inlined functions.
CXX_FLAGS = ["-std=c++20", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-g0", "-Wno-psabi"]


def sources(*patterns: str) -> list[str]:
    """Source files in csrc, relative to the root as setuptools requires, sorted."""
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in (ROOT / "csrc").glob(pattern))


def cuda_choice(home: Path) -> cuda_archs.Choice:
    """The GPU targets; exits with a one-line error if they are invalid."""
    try:
        nvcc = cuda_objects.nvcc_of(home)
        version = cuda_objects.cuda_version(nvcc)
        if version.split(".")[0] != torch.version.cuda.split(".")[0]:
            remedy = "set CUDA_HOME to a toolkit of the same major version"
            raise cuda_objects.ToolError(f"torch is for CUDA {torch.version.cuda}, {nvcc} is of {version}; {remedy}")
        present = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
        return cuda_archs.choose(os.environ, present, cuda_objects.known_codes(nvcc))
    except (cuda_archs.ArchError, cuda_objects.ToolError) as error:
        sys.exit(f"flash-attn: {error}")


class BuildExtension(cpp_extension.BuildExtension):
    """Compiles the CUDA kernels first, each source for its own targets; torch compiles the rest."""

    def build_extensions(self):
        """Build all extensions (there is one)."""
        for each in self.extensions:
            wanted = getattr(each, "cuda_objects", [])
            if wanted:
                each.extra_objects = [str(path) for path in self.compile_kernels(each.cuda_home, wanted)]
        super().build_extensions()
        self.write_compile_commands()

    def compile_kernels(self, home, wanted):
        """Compile the kernels to object files; exits with a one-line error on failure."""
        try:
            return cuda_objects.build(home, wanted)
        except cuda_objects.ToolError as error:
            sys.exit(f"flash-attn: {error}")

    def write_compile_commands(self):
        """compile_commands.json, for clangd and clang-tidy: what torch let ninja do, and how clang reads the rest."""
        entries = []
        if (Path(self.build_temp) / "build.ninja").exists():
            command = [*cuda_objects.ninja_command(), "-C", self.build_temp, "-t", "compdb"]
            entries += json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
        for extension in self.extensions:
            first = {each.source: each for each in reversed(getattr(extension, "cuda_objects", []))}
            for source, each in first.items():
                kind = ["-x", "cuda", f"--cuda-path={extension.cuda_home}"] if source.suffix == ".cu" else []
                flags = ["-std=c++20", "-Icsrc", *kind, *each.defines(), "-c", str(source)]
                entries.append({"directory": str(ROOT), "file": str(source), "arguments": ["clang++", *flags]})
        (ROOT / "compile_commands.json").write_text(json.dumps(entries, indent=1) + "\n")


def extension():
    """The extension for this machine; prints in one line which one, and why."""
    import pybind11  # here, so that a missing torch is reported first

    home = cuda_objects.cuda_home()
    reason = (
        "this torch is a CPU build"
        if torch.version.cuda is None
        else "there is no nvcc"
        if home is None
        else "the source tree has no CUDA kernels"
        if not cuda_objects.cuda_sources()
        else None
    )
    options = {
        "include_dirs": [str(ROOT / "csrc"), pybind11.get_include()],
        "extra_link_args": ["-fopenmp"],
    }
    if reason is not None:
        print(f"flash-attn: building for CPU only: {reason}")
        # Backends of GPUs report that this build does not have them.
        every = sources("cpu/*.cpp", "ops/*.cpp", "cuda/backends.cpp", "cuda/sm*/backend.cpp")
        cxx_sources = [name for name in every if Path(name).name != "cuda.cpp"]
        return cpp_extension.CppExtension("flash_attn._C", cxx_sources, extra_compile_args=CXX_FLAGS, **options)
    choice = cuda_choice(home)
    codes = " ".join(cuda_archs.code_names(choice.archs))
    print(f"flash-attn: building for CPU and CUDA {torch.version.cuda} with {home}: {codes} ({choice.reason})")
    cpp_extension.CUDA_HOME = str(home)
    macros = [f'-DFLASH_ATTN_CUDA_VERSION="{torch.version.cuda}"', f'-DFLASH_ATTN_CUDA_TARGETS="{codes}"']
    cxx_sources = [name for name in sources("cpu/*.cpp", "ops/*.cpp") if Path(name).name != "no_cuda.cpp"]
    result = cpp_extension.CUDAExtension(
        "flash_attn._C", cxx_sources, extra_compile_args=[*CXX_FLAGS, *macros], **options
    )
    result.cuda_home, result.cuda_objects = home, cuda_objects.objects(choice.archs)
    return result


setuptools.setup(ext_modules=[extension()], cmdclass={"build_ext": BuildExtension})
