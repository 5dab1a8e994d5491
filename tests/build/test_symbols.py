"""The files of the CPU backend that are compiled for one instruction set define nothing outside of their own namespace.

The linker keeps one definition of a weak or global symbol. If a file compiled for AVX-512 offered a definition of, say,
std::min<int>, the code for older processors could be linked against it, and would die of an illegal instruction.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from paths import ROOT

CSRC = ROOT / "csrc"
SOURCES = sorted((CSRC / "cpu").glob("isa_*.cpp"))
FLAGS = ["-std=c++20", "-O3", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi", f"-I{CSRC}"]

# "0000000000000000 W _ZSt3minIiERKT_S2_S2_": lower-case letters are local to the file, but for u and v.
EXTERNAL = re.compile(r"^[0-9a-f]* *[A-Zuv] (\S+)$")
# The personality of exceptions, the same in every object file of a compiler.
COMPILERS_OWN = re.compile(r"^(DW\.ref\.\w+|__clang_call_terminate)$")


def leaks(listing: str, namespace: str) -> list[str]:
    """The external definitions in what nm printed that do not belong to flash_attn::cpu::namespace."""
    # A mangled name starts with what it is (vtable, type information, guard, thunk, local), then comes its scope.
    kind = r"(T[VTIS]|GVR?|Th[n\d]+_|Tv[n\d]+_n?\d+_)?Z*"
    own = re.compile(rf"^_Z{kind}N[rVKRO]*10flash_attn3cpu{len(namespace)}{namespace}")
    names = [match[1] for match in map(EXTERNAL.match, listing.splitlines()) if match]
    return [name for name in names if not COMPILERS_OWN.match(name) and not own.match(name)]


def definitions(compiled: Path) -> str:
    command = ["nm", "--defined-only", str(compiled)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def object_of(source: Path, folder: Path) -> Path:
    """The file that the build left, if it is newer than every source; else the source, compiled as the build does."""
    newest = max(path.stat().st_mtime for path in CSRC.rglob("*") if path.is_file())
    for built in (ROOT / "build").rglob(f"csrc/cpu/{source.stem}.o"):
        if built.stat().st_mtime > newest:
            return built
    compiled = folder / f"{source.stem}.o"
    compiler = os.environ.get("CXX") or shutil.which("g++") or "c++"
    subprocess.run([*compiler.split(), *FLAGS, "-c", str(source), "-o", str(compiled)], check=True)
    return compiled


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_no_symbol_outside_of_the_namespace(source, tmp_path):
    listing = definitions(object_of(source, tmp_path))
    if not listing:
        pytest.skip(f"{source.name} is empty on this family of processors")
    assert not leaks(listing, source.stem.removeprefix("isa_"))
    assert "kernels" in listing


def test_instruction_sets_are_found():
    assert [source.stem for source in SOURCES] == ["isa_avx2", "isa_avx512", "isa_avx512_bf16", "isa_base"]


def compiled_definitions(code: str, folder: Path) -> str:
    """Nothing is inlined, so that nothing which could leak goes unseen."""
    source, compiled = folder / "sample.cpp", folder / "sample.o"
    source.write_text(code)
    subprocess.run(["g++", "-std=c++20", "-O0", "-fPIC", "-c", str(source), "-o", str(compiled)], check=True)
    return definitions(compiled)


@pytest.mark.parametrize(
    ("code", "leaking"),
    [
        ("inline int twice(int x) { return 2 * x; } namespace flash_attn::cpu::avx2 { auto f = &twice; }", "_Z5twicei"),
        ("template <class T> T same(T x) { return x; } template int same(int);", "_Z4sameIiET_S0_"),
        ("namespace flash_attn::cpu::avx512 { void run() {} }", "_ZN10flash_attn3cpu6avx5123runEv"),
        ("namespace flash_attn::cpu { void run() {} }", "_ZN10flash_attn3cpu3runEv"),
        ("struct Task { virtual ~Task() {} } task;", "_ZTV4Task"),
        ("int counter = 1;", "counter"),
    ],
)
def test_leaks_are_seen(code, leaking, tmp_path):
    assert leaking in leaks(compiled_definitions(code, tmp_path), "avx2")


def test_own_symbols_and_local_ones_are_no_leaks(tmp_path):
    code = """
        namespace { struct Local { virtual ~Local() {} }; }
        static int hidden(int x) { return x; }
        namespace flash_attn::cpu::avx2 {
        struct Base { virtual ~Base() {} virtual int f() const { return 1; } int size = 0; };
        struct Other { virtual int g() { return 2; } };
        struct Task : Base, Other { int g() override { return 3; } };
        template <class T> T same(T x) { return x; }
        inline int& kept() { static int x = hidden(3); return x; }
        int run() { Task task; Local local; return same(kept()) + task.f(); }
        }
    """
    listing = compiled_definitions(code, tmp_path)
    assert "_ZThn" in listing
    assert not leaks(listing, "avx2")
