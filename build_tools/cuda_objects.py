"""Compiles csrc/cuda: one object file per .cu file, element type and head_dim, each for its own targets.

torch.utils.cpp_extension has one list of targets for all files of an extension, but a file for Hopper compiles for
sm_90a only. Hence a build.ninja of our own, whose objects the extension is then linked with. It needs nvcc, not torch:
`python -m build_tools.cuda_objects` compiles for the default architectures, or those in FLASH_ATTN_CUDA_ARCHS.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from build_tools import cuda_archs

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "csrc" / "cuda"
FOLDER = ROOT / "build" / "cuda"
ELEMENTS = ("bf16", "fp16")
# For the backend.cpp of an architecture: what its kernels are compiled into.
CODE_MACRO = "FLASH_ATTN_BACKEND_CODE"
PYTHON_VARIABLE = "FLASH_ATTN_BUILD_PYTHON"
FLAGS = ["-std=c++20", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden", "-Xptxas=-v", f"-I{ROOT / 'csrc'}"]


class ToolError(RuntimeError):
    """A tool is missing or fails; the text is one line for the user."""


@dataclass(frozen=True)
class Object:
    """One object file to be compiled."""

    source: Path
    codes: tuple[str, ...]  # what nvcc compiles it into: sm_80, ..., compute_80, ...
    element: str = ""  # empty: a source without instances, for the host or of kernels for every problem
    head_dim: int = 0

    @property
    def kernel(self) -> str:
        """The name of the source, with that of the folder of its architecture: fwd_sm80."""
        folder = self.source.parent.name
        return f"{self.source.stem}_{folder}" if folder.startswith("sm") else self.source.stem

    @property
    def name(self) -> str:
        """The name of the object file, without the suffix."""
        return f"{self.kernel}_{self.element}_{self.head_dim}" if self.element else self.kernel

    def path(self, folder: Path) -> Path:
        """The object file. Beside it lies a .log: what the compiler said."""
        return folder / f"{self.name}.o"

    def defines(self) -> list[str]:
        """The macros that tell this object file from others."""
        if self.element:
            return [f"-DFA_ELEMENT={self.element}", f"-DFA_HEAD_DIM={self.head_dim}"]
        return [f'-D{CODE_MACRO}="{" ".join(self.codes)}"'] if self.source.name == "backend.cpp" else []

    def flags(self) -> list[str]:
        """The same, and for what code nvcc compiles it."""
        if self.source.suffix != ".cu":
            return self.defines()
        return [*self.defines(), *cuda_archs.gencode_flags(self.codes, cuda_archs.front_end_of(self.source))]


def cuda_sources(folder: Path = SOURCES) -> list[Path]:
    """The files that instantiate kernels (.cu), and those that choose among them (.cpp)."""
    return sorted([*folder.glob("**/*.cu"), *folder.glob("**/*.cpp")])


def head_dims(folder: Path) -> tuple[int, ...]:
    """For which head_dims the kernels in the folder of an architecture are compiled."""
    code = re.sub("//.*", "", (folder / "head_dims.inl").read_text())
    return tuple(map(int, re.findall(r"\d+", code)))


def all_head_dims() -> list[int]:
    """Those of every architecture, ascending."""
    return sorted({head_dim for path in SOURCES.glob("sm*/head_dims.inl") for head_dim in head_dims(path.parent)})


def objects(archs: Sequence[cuda_archs.Arch], sources: Sequence[Path] | None = None) -> list[Object]:
    """All object files. A source for which none of the architectures qualifies has none.

    Only folders with a list of head_dims have instances.
    """
    found = []
    for source in cuda_sources() if sources is None else sources:
        codes = tuple(cuda_archs.code_for_source(source, archs))
        if source.suffix == ".cpp":
            found.append(Object(source, codes))  # also where there is no code: it says so
        elif codes and not (source.parent / "head_dims.inl").exists():
            found.append(Object(source, codes))
        elif codes:
            dims = head_dims(source.parent)
            found += [Object(source, codes, element, head_dim) for head_dim in dims for element in ELEMENTS]
    return found


def cuda_home() -> Path | None:
    """The top of the CUDA toolkit: CUDA_HOME, or what nvcc says itself, since that on PATH may be a wrapper."""
    if os.environ.get("CUDA_HOME"):
        return Path(os.environ["CUDA_HOME"])
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if nvcc is None:
        return None
    # The commands of a dry run go to standard error.
    command = [nvcc, "--dryrun", "-c", "-x", "cu", "/dev/null"]
    dry_run = subprocess.run(command, capture_output=True, text=True, check=False)
    top = re.search(r"^#\$ TOP=(.+)$", dry_run.stderr, re.MULTILINE)
    return Path(top.group(1).strip()).resolve() if top else None


def nvcc_of(home: Path) -> str:
    """The compiler of a toolkit. Raises ToolError if there is none."""
    nvcc = shutil.which("nvcc", path=str(home / "bin"))
    if nvcc is None:
        raise ToolError(f"{home / 'bin'}: no nvcc there; set CUDA_HOME to the top of a CUDA toolkit")
    return nvcc


def known_codes(nvcc: str) -> set[str]:
    """The machine code that this nvcc makes: sm_80, ..."""
    result = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise ToolError(f"{nvcc} --list-gpu-code: {result.stderr.strip()}")
    return set(result.stdout.split())


def cuda_version(nvcc: str) -> str:
    """Major and minor version of the toolkit, such as "13.0"."""
    result = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False)
    match = re.search(r"release (\d+\.\d+)", result.stdout)
    if match is None:
        raise ToolError(f"{nvcc} --version: no release number in what it prints")
    return match[1]


def common_flags(nvcc: str) -> list[str]:
    """nvcc's arguments for every file."""
    # A quarter of the default size; decompressed when a kernel is first used. Drivers for CUDA 13 all know how.
    return [*FLAGS, "--compress-mode=size"] if int(cuda_version(nvcc).split(".")[0]) >= 13 else FLAGS


def ninja_text(nvcc: str, wanted: Sequence[Object], folder: Path) -> str:
    """A build.ninja. A change of flags, of a header or of the compiler compiles what depends on it again."""
    # Python is named by the shell, not by ninja: which one it is must not matter for what is up to date.
    wrapper = f'"$${PYTHON_VARIABLE}" {_shell([str(ROOT / "build_tools" / "run_nvcc.py")])} $log'
    lines = [
        "ninja_required_version = 1.5",
        "rule nvcc",
        "  depfile = $out.d",
        "  deps = gcc",
        f"  command = {wrapper} {_shell([nvcc, *common_flags(nvcc)])} $flags -MD -MF $out.d -c $in -o $out",
        "  description = nvcc $name",
    ]
    for each in wanted:
        lines += [
            f"build {_ninja(each.path(folder))}: nvcc {_ninja(each.source)} | {_ninja(nvcc)}",
            f"  name = {each.name} ({' '.join(each.codes)})",
            f"  log = {_shell([str(each.path(folder).with_suffix('.log'))])}",
            f"  flags = {_shell(each.flags())}",
        ]
    return "\n".join(lines) + "\n"


def _ninja(path: str | Path) -> str:
    return re.sub(r"([$ :])", r"$\1", str(path))


def _shell(arguments: Sequence[str]) -> str:
    return shlex.join(arguments).replace("$", "$$")


def jobs() -> int:
    """How many compilers may run at once."""
    text = os.environ.get("MAX_JOBS", "").strip() or str(len(os.sched_getaffinity(0)))
    if not text.isdecimal() or int(text) < 1:
        raise ToolError(f"MAX_JOBS={text}: expected a number of at least 1")
    return int(text)


def build(home: Path, wanted: Sequence[Object], folder: Path = FOLDER) -> list[Path]:
    """Compiles what is not up to date; returns the object files. Raises ToolError if that fails."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "build.ninja").write_text(ninja_text(nvcc_of(home), wanted, folder))
    command = [*ninja_command(), "-C", str(folder), "-j", str(jobs())]
    if subprocess.run(command, env={**os.environ, PYTHON_VARIABLE: sys.executable}, check=False).returncode != 0:
        raise ToolError("compiling the CUDA kernels failed; the compiler's message is above")
    return [each.path(folder) for each in wanted]


def ninja_command() -> list[str]:
    """ninja: of the package of that name, or from PATH."""
    if importlib.util.find_spec("ninja"):
        return [sys.executable, "-m", "ninja"]
    if shutil.which("ninja"):
        return ["ninja"]
    raise ToolError("compiling the CUDA kernels takes ninja; run pip install ninja")


def main() -> None:
    """Compile all object files."""
    home = cuda_home()
    if home is None:
        sys.exit("there is no nvcc; put it on PATH, or set CUDA_HOME")
    try:
        build(home, objects(cuda_archs.choose(os.environ, [], known_codes(nvcc_of(home))).archs))
    except (cuda_archs.ArchError, ToolError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
