"""The extension module, for setup.py: what it is compiled from and how."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import setuptools
import torch
from torch.utils import cpp_extension

from build_tools import cuda_archs, cuda_objects, plan

ROOT = Path(__file__).resolve().parent.parent

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
        if version.split(".")[0] != str(torch.version.cuda).split(".")[0]:
            remedy = "set CUDA_HOME to a toolkit of the same major version"
            raise cuda_objects.ToolError(f"torch is for CUDA {torch.version.cuda}, {nvcc} is of {version}; {remedy}")
        present = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
        return cuda_archs.choose(os.environ, present, cuda_objects.known_codes(nvcc))
    except (cuda_archs.ArchError, cuda_objects.ToolError) as error:
        sys.exit(f"flash-attn: {error}")


class BuildExtension(cpp_extension.BuildExtension):
    """Compiles the CUDA kernels first, each source for its own targets; torch compiles the rest."""

    def build_extensions(self) -> None:
        """Build all extensions (there is one)."""
        if self.editable_mode:  # its object files would lie in a folder that is removed, and compile every time
            self.build_temp = f"build/temp.{self.plat_name}-{sys.implementation.cache_tag}"
        for each in self.extensions:
            self.remove_others(each)
            wanted = getattr(each, "cuda_objects", [])
            if wanted:
                each.extra_objects = [str(path) for path in self.compile_kernels(each.cuda_home, wanted)]
        super().build_extensions()
        self.write_compile_commands()

    def remove_others(self, extension: setuptools.Extension) -> None:
        """Remove what an earlier run has built for another torch: it would become a part of the wheel."""
        result = Path(self.build_lib, *extension.name.split("."))
        for path in result.parent.glob("_C*"):
            if path.name.split(".")[0] != result.name:
                path.unlink()

    def compile_kernels(self, home: Path, wanted: Sequence[cuda_objects.Object]) -> list[Path]:
        """Compile the kernels to object files; exits with a one-line error on failure."""
        try:
            return cuda_objects.build(home, wanted)
        except cuda_objects.ToolError as error:
            sys.exit(f"flash-attn: {error}")

    def write_compile_commands(self) -> None:
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


def extension() -> setuptools.Extension:
    """The extension for this machine; prints in one line which one, and why."""
    home = cuda_objects.cuda_home()
    because = plan.cpu_only_because(
        os.environ, torch.version.cuda, has_nvcc=home is not None, has_kernels=bool(cuda_objects.cuda_sources())
    )
    name = plan.extension_name(torch.__version__)
    # pybind11 is that of torch, which has its headers among its own.
    options = {"include_dirs": [str(ROOT / "csrc")], "extra_link_args": ["-fopenmp"]}
    if home is None or because is not None:
        print(f"flash-attn: building for CPU only: {because}")
        # Backends of GPUs report that this build does not have them.
        every = sources("cpu/*.cpp", "ops/*.cpp", "cuda/backends.cpp", "cuda/sm*/backend.cpp")
        cxx_sources = [path for path in every if Path(path).name != "cuda.cpp"]
        flags = [*CXX_FLAGS, f'-DFLASH_ATTN_BUILT_BECAUSE="{because}"']
        return cpp_extension.CppExtension(name, cxx_sources, extra_compile_args=flags, **options)
    choice = cuda_choice(home)
    codes = " ".join(cuda_archs.code_names(choice.archs))
    print(f"flash-attn: building for CPU and CUDA {torch.version.cuda} with {home}: {codes} ({choice.reason})")
    cpp_extension.CUDA_HOME = str(home)
    flags = [
        *CXX_FLAGS,
        f'-DFLASH_ATTN_BUILT_BECAUSE="{choice.reason}"',
        f'-DFLASH_ATTN_CUDA_VERSION="{torch.version.cuda}"',
        f'-DFLASH_ATTN_CUDA_TARGETS="{codes}"',
    ]
    cxx_sources = [path for path in sources("cpu/*.cpp", "ops/*.cpp") if Path(path).name != "no_cuda.cpp"]
    result = cpp_extension.CUDAExtension(name, cxx_sources, extra_compile_args=flags, **options)
    result.cuda_home, result.cuda_objects = home, cuda_objects.objects(choice.archs)
    return result
