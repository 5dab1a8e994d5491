"""Do the sources that include torch compile with the headers of other versions of it?

    python -m tools.torch_headers 2.11.0 2.14.1

pip downloads a wheel of each, half a gigabyte; only the headers are kept, in build/headers. g++ checks every file of
csrc/ops with them, and generates no code. What includes CUDA's headers is checked where nvcc and those of torch are.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tempfile
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from build_tools import cuda_objects, extension

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "headers"
MACROS = {"BUILT_BECAUSE": "a check", "CUDA_VERSION": "", "CUDA_TARGETS": ""}


def headers(version: str) -> Path:
    """The headers of a version of torch: of an earlier run, or from its wheel."""
    folder = FOLDER / version
    if not folder.exists():
        FOLDER.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=FOLDER) as scratch:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-cache-dir"]
            subprocess.run([*command, "--dest", scratch, f"torch=={version}"], check=True)
            (wheel,) = Path(scratch).glob("*.whl")
            with zipfile.ZipFile(wheel) as packed:
                names = [name for name in packed.namelist() if name.startswith("torch/include/")]
                packed.extractall(Path(scratch) / "unpacked", names)
            (Path(scratch) / "unpacked").rename(folder)
    return folder / "torch" / "include"


def command_of(source: Path, include: Path, home: Path | None) -> list[str]:
    """How g++ checks a file."""
    folders = [include, include / "torch" / "csrc" / "api" / "include", Path(sysconfig.get_path("include"))]
    folders += [home / "include"] if home else []
    flags = [*extension.CXX_FLAGS, "-fsyntax-only", "-DTORCH_EXTENSION_NAME=_C"]
    flags += [f'-DFLASH_ATTN_{name}="{value}"' for name, value in MACROS.items()]
    system = [flag for folder in folders for flag in ("-isystem", str(folder))]
    return [os.environ.get("CXX", "g++"), *flags, f"-I{ROOT / 'csrc'}", *system, str(source)]


def check(version: str) -> bool:
    """Whether every file compiles; prints what the compiler says, and a line."""
    start, include, home = time.monotonic(), headers(version), cuda_objects.cuda_home()
    with_cuda = home is not None and (include / "c10/cuda/impl/cuda_cmake_macros.h").exists()
    sources = [path for path in sorted((ROOT / "csrc/ops").glob("*.cpp")) if with_cuda or path.name != "cuda.cpp"]

    def compiles(source: Path) -> bool:
        done = subprocess.run(command_of(source, include, home), capture_output=True, text=True, check=False)
        sys.stdout.write(done.stderr)
        return done.returncode == 0

    with ThreadPoolExecutor(cuda_objects.jobs()) as pool:
        failed = [source.name for source, good in zip(sources, pool.map(compiles, sources), strict=True) if not good]
    what = f"{len(sources)} files{' with those for CUDA' if with_cuda else ''}"
    result = f"do not compile: {', '.join(failed)}" if failed else "compile"
    print(f"torch {version}: {what} {result}, {time.monotonic() - start:.0f} s", flush=True)
    return not failed


if __name__ == "__main__":
    results = [check(version) for version in sys.argv[1:]]
    sys.exit(not all(results))
