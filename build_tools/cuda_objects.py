"""Compiles csrc/cuda: one object file per .cu file, element type and head_dim, each for its own targets.

torch.utils.cpp_extension has one list of targets for all files of an extension, but a file for Hopper compiles for
sm_90a only. Hence a build.ninja of our own, whose objects the extension is then linked with. Needs nvcc, not torch:

    python -m build_tools.cuda_objects              # into build/cuda, for the default architectures
    FLASH_ATTN_CUDA_ARCHS=8.6 python -m build_tools.cuda_objects fwd_sm80_bf16_64
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from build_tools import cuda_archs, prebuilt

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "csrc" / "cuda"
FOLDER = ROOT / "build" / "cuda"
ELEMENTS = ("bf16", "fp16")
# For the backend.cpp of an architecture: what its kernels are compiled into.
CODE_MACRO = "FLASH_ATTN_BACKEND_CODE"

USUAL_HOME = "/usr/local/cuda"
PYTHON_VARIABLE = "FLASH_ATTN_BUILD_PYTHON"
FLAGS = ["-std=c++20", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden", "-Xptxas=-v", f"-I{ROOT / 'csrc'}"]


class ToolError(RuntimeError):
    """A tool is missing or fails; the text is one line for the user."""


@dataclass(frozen=True)
class Object:
    """One object file to be compiled."""

    source: Path
    codes: tuple[str, ...]  # what nvcc compiles it into: sm_80, ..., compute_80, ...
    element: str = ""  # empty: a source for the host, without instances
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
        """The object file."""
        return folder / f"{self.name}.o"

    def log(self, folder: Path) -> Path:
        """What compiling it cost, and what the compiler said; see measured.py."""
        return folder / f"{self.name}.json"

    def flags(self) -> list[str]:
        """nvcc's arguments that tell this object file from others."""
        if not self.element:
            return [f'-D{CODE_MACRO}="{" ".join(self.codes)}"'] if self.source.name == "backend.cpp" else []
        instance = [f"-DFA_ELEMENT={self.element}", f"-DFA_HEAD_DIM={self.head_dim}"]
        return [*instance, *cuda_archs.gencode_flags(self.codes)]


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
    """All object files. A source for which none of the architectures qualifies has none."""
    found = []
    for source in cuda_sources() if sources is None else sources:
        codes = tuple(cuda_archs.code_for_source(source, archs))
        if source.suffix == ".cpp":
            found.append(Object(source, codes))  # also where there is no code: it says so
        elif codes:
            dims = head_dims(source.parent)
            found += [Object(source, codes, element, head_dim) for head_dim in dims for element in ELEMENTS]
    return found


def cuda_home() -> Path | None:
    """The top of the CUDA toolkit: CUDA_HOME, or what nvcc says itself, since that on PATH may be a wrapper."""
    if os.environ.get("CUDA_HOME"):
        return Path(os.environ["CUDA_HOME"])
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path=USUAL_HOME + "/bin")
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
    is_recent = int(cuda_version(nvcc).split(".")[0]) >= 13
    return [*FLAGS, *(["--compress-mode=size"] if is_recent else [])]


def ninja_text(nvcc: str, wanted: Sequence[Object], folder: Path) -> str:
    """A build.ninja. A change of flags, of a header or of the compiler compiles what depends on it again."""
    measured = ROOT / "build_tools" / "measured.py"
    # Python is named by the shell, not by ninja: which one it is must not matter for what is up to date.
    wrapper = f'"$${PYTHON_VARIABLE}" {_shell([str(measured)])} $log'
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
            f"  log = {_shell([str(each.log(folder))])}",
            f"  flags = {_shell(each.flags())}",
        ]
    return "\n".join(lines) + "\n"


def _ninja(path: str | Path) -> str:
    return re.sub(r"([$ :])", r"$\1", str(path))


def _shell(arguments: Sequence[str]) -> str:
    return shlex.join(arguments).replace("$", "$$")


def jobs() -> int:
    """How many compilers may run at once."""
    text = os.environ.get("MAX_JOBS", "").strip()
    if not text:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not text.isdecimal() or int(text) < 1:
        raise ToolError(f"MAX_JOBS={text}: expected a number of at least 1")
    return int(text)


def facts(nvcc: str, wanted: Sequence[Object]) -> dict[str, str]:
    """All that these object files depend on. Where the sources lie does not matter."""
    flags = [flag for flag in common_flags(nvcc) if not flag.startswith("-I")]
    own = {each.name: shlex.join([*flags, *each.flags()]) for each in wanted}
    folders = {SOURCES.parent if SOURCES in each.source.parents else each.source.parent for each in wanted}
    sources = {folder.name: prebuilt.fingerprint(folder) for folder in sorted(folders)}
    return {**sources, "nvcc": cuda_version(nvcc), **own}


def build(home: Path, wanted: Sequence[Object], folder: Path = FOLDER) -> list[Path]:
    """Compiles what is not up to date; returns the object files. Raises ToolError if that fails."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [each.path(folder) for each in wanted]
    compiled_from = facts(nvcc_of(home), wanted)
    different = prebuilt.difference(folder, compiled_from, files)
    if not different:
        print(f"the object files in {folder} are those of this code", flush=True)
        return files
    if any(file.exists() for file in files):
        print(f"compiling kernels: {different}", flush=True)
    prebuilt.forget(folder)
    text = ninja_text(nvcc_of(home), wanted, folder)
    path = folder / "build.ninja"
    if not path.exists() or path.read_text() != text:
        path.write_text(text)
    command = [*_ninja_command(), "-C", str(folder), "-j", str(jobs())]
    environment = {**os.environ, PYTHON_VARIABLE: sys.executable}
    if subprocess.run(command, env=environment, check=False).returncode != 0:
        raise ToolError("compiling the CUDA kernels failed; the compiler's message is above")
    prebuilt.note(folder, compiled_from)
    return files


def _ninja_command() -> list[str]:
    if subprocess.run([sys.executable, "-m", "ninja", "--version"], capture_output=True, check=False).returncode == 0:
        return [sys.executable, "-m", "ninja"]
    ninja = shutil.which("ninja")
    if ninja is None:
        raise ToolError("compiling the CUDA kernels takes ninja; run pip install ninja")
    return [ninja]


def main(*names: str) -> int:
    """Compile the object files of these names, or all."""
    home = cuda_home()
    if home is None:
        sys.exit("there is no nvcc; put it on PATH, or set CUDA_HOME")
    try:
        choice = cuda_archs.choose(os.environ, [], known_codes(nvcc_of(home)))
        wanted = [each for each in objects(choice.archs) if not names or each.name in names]
        if not wanted:
            raise ToolError(f"no object file is called {' or '.join(names)}; there are, for example, fwd_sm80_bf16_64")
        build(home, wanted)
    except (cuda_archs.ArchError, ToolError) as error:
        sys.exit(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
