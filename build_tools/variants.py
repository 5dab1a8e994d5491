"""Other builds of the kernels for Hopper, to be raced against this one by benchmarks/race_variants.py.

    python -m build_tools.variants before --revision HEAD~3 --predict "0.97 at 512 causal"
    python -m build_tools.variants wide --sources ../experiment/csrc

bfloat16, head_dim 64, 128 and 256, forward and backward, for compute capability 9.0 alone: build/variants/NAME.so, with
operators torch.ops.flash_attn_NAME, and what was predicted of it in NAME.txt. Needs nvcc and a torch for CUDA, and no
GPU. Never part of the package.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from build_tools import cuda_archs, cuda_objects
from build_tools.cuda_objects import ROOT, ToolError

FOLDER = ROOT / "build" / "variants"
HEAD_DIMS = (64, 128, 256)
OPS = ("schema", "cuda", "prepare", "validate", "validate_values")
CODE = "sm_90a"
HOST_FLAGS = ["-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden", "-fopenmp"]


def check_out(revision: str, folder: Path) -> Path:
    """The csrc of a commit, in a folder."""
    archive = subprocess.run(["git", "archive", revision, "csrc"], cwd=ROOT, capture_output=True, check=False)
    if archive.returncode != 0:
        raise ToolError(f"git archive {revision} csrc: {archive.stderr.decode().strip()}")
    subprocess.run(["tar", "x", "-C", str(folder)], input=archive.stdout, check=True)
    return folder / "csrc"


def kernel_commands(nvcc: str, csrc: Path, folder: Path) -> list[list[str]]:
    """One compilation for every object file of the kernels."""
    flags = [flag for flag in cuda_objects.common_flags(nvcc) if not flag.startswith("-I")]
    codes = cuda_archs.gencode_flags((CODE,))
    return [
        [nvcc, *flags, f"-I{csrc}", "-DFA_ELEMENT=bf16", f"-DFA_HEAD_DIM={head_dim}", *codes]
        + ["-c", str(csrc / "cuda" / "sm90" / f"{kernel}.cu"), "-o", str(folder / f"{kernel}_{head_dim}.o")]
        for kernel in ("bwd", "fwd")
        for head_dim in HEAD_DIMS
    ]


def host_commands(home: Path, csrc: Path, folder: Path, name: str) -> list[list[str]]:
    """Those of what calls the kernels, registered under another name."""
    import pybind11
    from torch.utils import cpp_extension

    compiler = shlex.split(os.environ.get("CXX") or "g++")
    paths = [*cpp_extension.include_paths(), pybind11.get_include(), sysconfig.get_path("include"), home / "include"]
    includes = [f"-I{csrc}", *(f"-I{path}" for path in paths)]
    macros = ["-DTORCH_EXTENSION_NAME=_C", '-DFLASH_ATTN_CUDA_VERSION="?"', f'-DFLASH_ATTN_CUDA_TARGETS="{CODE}"']
    commands = []
    for each in OPS:
        text = (csrc / "ops" / f"{each}.cpp").read_text()
        for macro in ("TORCH_LIBRARY", "TORCH_LIBRARY_IMPL"):
            text = text.replace(f"{macro}(flash_attn,", f"{macro}(flash_attn_{name},")
        source = folder / f"{each}.cpp"
        source.write_text(text)
        commands.append(
            [*compiler, *HOST_FLAGS, *macros, *includes, "-c", str(source), "-o", str(folder / f"{each}.o")]
        )
    # What this build leaves out says so when it is called: sm80 as a whole, of sm90 some instances.
    hopper = [f'-D{cuda_objects.CODE_MACRO}="{CODE}"', "-DFA_ARCH=90", '-DFA_HEAD_DIMS="cuda/sm90/head_dims.inl"']
    sources = {
        "backends": (csrc / "cuda" / "backends.cpp", []),
        "backend_sm80": (csrc / "cuda" / "sm80" / "backend.cpp", []),
        "backend_sm90": (csrc / "cuda" / "sm90" / "backend.cpp", hopper),
        "missing": (ROOT / "tests" / "kernels" / "runner" / "missing.cpp", hopper),
    }
    for each, (source, own) in sources.items():
        target = ["-c", str(source), "-o", str(folder / f"{each}.o")]
        commands.append([*compiler, *HOST_FLAGS, *own, *includes, *target])
    return commands


def link_command(home: Path, folder: Path, library: Path) -> list[str]:
    """The library."""
    from torch.utils import cpp_extension

    objects = sorted(folder.glob("*.o"))
    paths = [*cpp_extension.library_paths(), home / "lib64"]
    names = ("c10", "torch", "torch_cpu", "c10_cuda", "torch_cuda", "cudart")
    compiler = shlex.split(os.environ.get("CXX") or "g++")
    own = [*compiler, "-shared", "-s", "-fopenmp", "-Wl,-Bsymbolic", *map(str, objects), "-o", str(library)]
    return [*own, *(f"-L{path}" for path in paths), *(f"-l{each}" for each in names)]


def run(command: Sequence[str]) -> None:
    """Raises ToolError with what the compiler said if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ToolError(f"{shlex.join(command)}\n{done.stdout}{done.stderr}")


def build(name: str, csrc: Path, prediction: str) -> Path:
    """Compile and link. Raises ToolError."""
    import torch

    home = cuda_objects.cuda_home()
    if home is None:
        raise ToolError("there is no nvcc; put it on PATH, or set CUDA_HOME")
    if torch.version.cuda is None:
        raise ToolError(f"torch {torch.__version__} is a CPU build; the library has to be linked with one for CUDA")
    folder = FOLDER / name
    commands = kernel_commands(cuda_objects.nvcc_of(home), csrc, folder) + host_commands(home, csrc, folder, name)
    with ThreadPoolExecutor(cuda_objects.jobs()) as pool:
        list(pool.map(run, commands))
    library = FOLDER / f"{name}.so"
    run(link_command(home, folder, library))
    library.with_suffix(".txt").write_text(prediction + "\n")
    return library


def main() -> int:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="letters and digits")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--revision", help="of a commit")
    source.add_argument("--sources", type=Path, help="a folder like csrc")
    parser.add_argument("--predict", default="", metavar="TEXT", help="what it should make of the speed")
    arguments = parser.parse_args()
    name = arguments.name
    if not name.isidentifier():
        sys.exit(f"{name}: expected a name of letters and digits")
    folder = FOLDER / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        csrc = check_out(arguments.revision, folder) if arguments.revision else arguments.sources.resolve()
        print(build(name, csrc, arguments.predict))
    except (ToolError, OSError) as error:
        sys.exit(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
