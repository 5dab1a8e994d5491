"""How the CUDA kernels are built, as far as that needs no compiler for them: for which GPUs, from what, when anew."""

import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parent.parent))

from build_tools import cuda_archs, cuda_objects
from build_tools.cuda_archs import Arch, ArchError, choose, code_for_source, code_names, gencode_flags, parse

ROOT = Path(__file__).resolve().parent.parent
KNOWN = {"sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"}


# Which GPUs.


@pytest.mark.parametrize(
    ("text", "codes"),
    [
        ("8.0", "sm_80"),
        ("8.0+PTX", "sm_80 compute_80"),
        ("8.0+ptx;9.0a", "sm_80 sm_90a compute_80"),
        ("9.0", "sm_90a"),
        ("9.0a", "sm_90a"),
        ("9.0a+PTX", "sm_90a compute_90"),
        ("9.0 8.6,8.0;;", "sm_80 sm_86 sm_90a"),
        ("12.0 10.0+PTX", "sm_100 sm_120 compute_100"),
        ("8.0 8.0+PTX 8.0", "sm_80 compute_80"),
        ("Ampere", "sm_80 sm_86 compute_86"),
        ("Ada;hopper", "sm_89 sm_90a compute_89 compute_90"),
        (cuda_archs.DEFAULT, "sm_80 sm_90a compute_80"),
    ],
)
def test_lists_of_architectures(text, codes):
    assert " ".join(code_names(parse(text))) == codes


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("80", '"80" is no architecture; write for example 8.0+PTX;9.0a'),
        ("sm_80", '"sm_80" is no architecture'),
        ("8.0;all", '"all" is no architecture'),
        ("8.0PTX", '"8.0PTX" is no architecture'),
        ("8.0a", '"8.0a": the suffix a is known for 9.0a only; write 8.0'),
        ("-8.0", '"-8.0" is no architecture'),
    ],
)
def test_nonsense(text, said):
    with pytest.raises(ArchError) as error:
        parse(text)
    assert str(error.value).startswith(f"FLASH_ATTN_CUDA_ARCHS={text}: ")
    assert said in str(error.value)


def chosen(present=(), known=KNOWN, own=None, torch_list=None):
    environment = {"FLASH_ATTN_CUDA_ARCHS": own, "TORCH_CUDA_ARCH_LIST": torch_list}
    choice = choose({key: value for key, value in environment.items() if value is not None}, present, known)
    return " ".join(code_names(choice.archs)), choice.reason


def test_choice():
    """The own variable goes before torch's, both before the GPUs present, these before the default."""
    hopper, default = [(9, 0)], "sm_80 sm_90a compute_80"
    assert chosen(hopper, own="8.6", torch_list="8.9") == ("sm_86", "FLASH_ATTN_CUDA_ARCHS")
    assert chosen(hopper, torch_list="8.9") == ("sm_89", "TORCH_CUDA_ARCH_LIST")
    assert chosen(hopper, own=" ", torch_list="") == ("sm_90a", "the GPU in this machine")
    assert chosen([(9, 0), (8, 0), (9, 0)]) == ("sm_80 sm_90a", "the GPUs in this machine")
    assert chosen() == (default, "there is no GPU in this machine")
    assert chosen([(7, 5)]) == (default, "the GPU in this machine is older than 8.0")
    assert chosen([(7, 5), (8, 6)]) == ("sm_86", "the GPU in this machine")


def test_a_gpu_newer_than_nvcc_gets_intermediate_code():
    assert chosen([(10, 3)])[0] == "sm_100 compute_100"
    assert chosen([(9, 0)], known={"sm_75", "sm_80", "sm_86"})[0] == "sm_86 compute_86"


def test_old_architectures():
    """torch's list is meant for other packages too; one that names this package must fit it."""
    assert chosen(torch_list="6.0 7.5 8.0 9.0+PTX")[0] == "sm_80 sm_90a compute_90"
    with pytest.raises(
        ArchError, match=r"TORCH_CUDA_ARCH_LIST=7\.5: the kernels need 8\.0 or newer; set FLASH_ATTN_CUDA"
    ):
        chosen(torch_list="7.5")
    with pytest.raises(ArchError, match=r"FLASH_ATTN_CUDA_ARCHS=8\.0 7\.5: the kernels need 8\.0 or newer, not 7\.5"):
        chosen(own="8.0 7.5")


def test_what_nvcc_does_not_know():
    with pytest.raises(
        ArchError, match=r"FLASH_ATTN_CUDA_ARCHS: this nvcc makes no code for 15\.0; it knows sm_75, .*120"
    ):
        chosen(own="8.0;15.0")


def test_targets_of_a_source():
    archs = parse("8.0+PTX;9.0a;9.0+PTX")
    assert code_for_source("fwd_sm80.cu", archs) == ["sm_80", "sm_90a", "compute_80", "compute_90"]
    assert code_for_source("fwd_sm90.cu", archs) == ["sm_90a"]
    assert code_for_source("fwd_sm90.cu", parse("8.0+PTX")) == []
    assert gencode_flags(["sm_90a", "compute_80"]) == [
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_80,code=compute_80",
    ]


# setup.py.


def setup_says(**environment):
    """What setup.py prints before it does anything."""
    command = [sys.executable, str(ROOT / "setup.py"), "--version"]
    env = {key: value for key, value in os.environ.items() if "CUDA_ARCH" not in key} | environment
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT, check=False)


@pytest.mark.skipif(torch.version.cuda is not None, reason="a CUDA build of torch")
def test_torch_without_cuda():
    done = setup_says(FLASH_ATTN_CUDA_ARCHS="nonsense")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[0] == "flash-attn: building for CPU only: this torch is a CPU build"


needs_cuda = pytest.mark.skipif(
    torch.version.cuda is None or cuda_objects.cuda_home() is None, reason="no CUDA build of torch, or no nvcc"
)


@needs_cuda
def test_choice_is_told():
    done = setup_says(FLASH_ATTN_CUDA_ARCHS="8.6;9.0+PTX")
    assert done.returncode == 0, done.stderr
    said = r"flash-attn: building for CPU and CUDA [\d.]+ with /.*: sm_86 sm_90a compute_90 \(FLASH_ATTN_CUDA_ARCHS\)"
    assert re.fullmatch(said, done.stdout.splitlines()[0])


@needs_cuda
@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"FLASH_ATTN_CUDA_ARCHS": "80"}, 'flash-attn: FLASH_ATTN_CUDA_ARCHS=80: "80" is no architecture; write for '),
        ({"FLASH_ATTN_CUDA_ARCHS": "99.0"}, "flash-attn: FLASH_ATTN_CUDA_ARCHS: this nvcc makes no code for 99.0; it "),
        (
            {"CUDA_HOME": "/nowhere"},
            "flash-attn: /nowhere/bin: no nvcc there; set CUDA_HOME to the top of a CUDA ",
        ),
    ],
)
def test_a_build_that_makes_no_sense_ends_with_one_line(environment, said):
    done = setup_says(**environment)
    assert done.returncode != 0
    assert done.stderr.splitlines()[-1].startswith(said)
    assert "Traceback" not in done.stderr


# The device on which a build finds itself.


@pytest.fixture(scope="module")
def targets(tmp_path_factory):
    """The shared library of cuda_targets.cpp."""
    library = tmp_path_factory.mktemp("cuda_targets") / "libcuda_targets.so"
    source = Path(__file__).with_name("cuda_targets.cpp")
    flags = ["-std=c++20", "-O1", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared", f"-I{ROOT / 'csrc'}"]
    subprocess.run([os.environ.get("CXX", "g++"), *flags, str(source), "-o", str(library)], check=True)
    loaded = ctypes.CDLL(str(library))
    loaded.runs_on.restype = loaded.has_hopper_kernels.restype = ctypes.c_bool
    return loaded


@pytest.mark.parametrize(
    ("target", "devices"),
    [
        ("sm_80", {80, 86, 89}),
        ("sm_86", {86, 89}),
        ("sm_90", {90}),
        ("sm_90a", {90}),
        ("sm_100", {100, 103}),
        ("compute_80", {80, 86, 89, 90, 100, 103, 120}),
        ("compute_90", {90, 100, 103, 120}),
        ("compute_90a", {90}),
    ],
)
def test_code_runs_on(targets, target, devices):
    assert {d for d in (75, 80, 86, 89, 90, 100, 103, 120) if targets.runs_on(target.encode(), d)} == devices


@pytest.mark.parametrize(
    "archs", ["8.0", "8.0+PTX", "9.0", "9.0a", "9.0+PTX", "8.0 9.0a", "9.0 12.0", cuda_archs.DEFAULT]
)
def test_kernels_for_hopper_are_those_that_are_compiled(targets, archs):
    chosen = parse(archs)
    compiled = any(each.source.stem == "fwd_sm90" for each in cuda_objects.objects(chosen, [Path("fwd_sm90.cu")]))
    assert targets.has_hopper_kernels(" ".join(code_names(chosen)).encode()) == compiled


REBUILD = "rebuild it with FLASH_ATTN_CUDA_ARCHS=12.0 pip install --no-build-isolation ."


@pytest.mark.parametrize(
    ("capability", "codes", "said"),
    [
        (80, "sm_80 sm_90a", ""),
        (90, "sm_80 sm_90a", ""),
        (120, "sm_80 compute_80", ""),
        (75, "sm_80 compute_80",
         "GPU has compute capability 7.5, and the CUDA kernels need 8.0 or newer; move the tensors to the CPU"),
        (120, "sm_80 sm_90a",
         "GPU has compute capability 12.0, and this build has code for sm_80 sm_90a only; " + REBUILD),
    ],
)  # fmt: skip
def test_what_a_device_is_told(targets, capability, codes, said):
    text = ctypes.create_string_buffer(1000)
    targets.device_trouble(b"GPU", capability, codes.encode(), text, len(text))
    assert text.value.decode() == said


# Object files.


def test_object_files():
    sources = [Path("fwd_sm80.cu"), Path("fwd_sm90.cu"), Path("run.cpp")]
    found = cuda_objects.objects(parse("8.0;9.0a"), sources)
    assert len({each.name for each in found}) == len(found) == 2 * 2 * 5 + 1
    assert {each.codes for each in found if each.source == sources[0]} == {("sm_80", "sm_90a")}
    assert {each.codes for each in found if each.source == sources[1]} == {("sm_90a",)}
    flags = next(each for each in found if each.name == "fwd_sm90_fp16_128").flags()
    assert {"-DFA_ELEMENT=fp16", "-DFA_HEAD_DIM=128", "-gencode=arch=compute_90a,code=sm_90a"} <= set(flags)
    assert {each.source for each in cuda_objects.objects((Arch(8, 0),), sources)} == {sources[0], sources[2]}


@pytest.mark.parametrize(
    ("archs", "macro", "code"),
    [
        ("8.0", [], 80),
        ("8.0+PTX", [], 80),
        ("8.6;12.0", [], 86),
        ("8.0;9.0a", ["-DFLASH_ATTN_HOPPER"], 80),
        ("9.0", ["-DFLASH_ATTN_HOPPER"], "90a"),
        (cuda_archs.DEFAULT, ["-DFLASH_ATTN_HOPPER"], 80),
    ],
)
def test_kernels_for_hopper_are_chosen_where_there_are_any(archs, macro, code, tmp_path):
    sources = [Path("fwd_sm80.cu"), Path("fwd_sm90.cu"), Path("run.cpp")]
    found = cuda_objects.objects(parse(archs), sources)
    (chooser,) = (each for each in found if each.source == sources[2])
    flags = ["-x=cu", *macro, f"-gencode=arch=compute_{code},code=sm_{code}"]
    assert (chooser.name, chooser.flags()) == ("run", flags)
    assert {each.macros for each in found if each is not chooser} == {()}
    assert bool(macro) == any(each.source == sources[1] for each in found)
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(FAKE_NVCC)
    nvcc.chmod(0o755)
    text = cuda_objects.ninja_text(str(nvcc), found, tmp_path)
    assert text.count("FLASH_ATTN_HOPPER") == len(macro)
    assert ("fwd_sm90" in text) == bool(macro)


def test_every_cuda_source_of_the_tree_is_built():
    built = {each.source for each in cuda_objects.objects(parse(cuda_archs.DEFAULT))}
    assert {source for source in built if source.suffix == ".cu"} == set((ROOT / "csrc").rglob("*.cu"))


@pytest.mark.parametrize("text", ["0", "-1", "two", "1.5"])
def test_bad_max_jobs(text, monkeypatch):
    monkeypatch.setenv("MAX_JOBS", text)
    with pytest.raises(cuda_objects.ToolError, match=f"MAX_JOBS={text}: expected a number of at least 1"):
        cuda_objects.jobs()


def test_max_jobs(monkeypatch):
    monkeypatch.setenv("MAX_JOBS", "3")
    assert cuda_objects.jobs() == 3
    monkeypatch.delenv("MAX_JOBS")
    assert cuda_objects.jobs() >= 1


FAKE_NVCC = """#!/bin/sh
# Stands in for nvcc: "compiles" by copying, says what ptxas says, and notes that it ran.
[ "$1" = --version ] && { echo "Cuda compilation tools, release 13.0, V13.0.88"; exit; }
for argument; do
    case "$last" in -MF) depfile=$argument ;; -c) source=$argument ;; -o) object=$argument ;; esac
    last=$argument
done
grep -q broken "$source" && { echo "$source: broken" >&2; exit 2; }
cp "$source" "$object"
echo "$object: $source ${source%/*}/common.h" >"$depfile"
echo "${object##*/}" >>"${0%/*}/ran"
echo "ptxas info    : Used 24 registers, used 1 barriers" >&2
grep -q serialised "$source" && echo "ptxas info    : (C7510) Potential Performance Loss" >&2
echo "odd.cu(1): warning #1: odd" >&2
"""


class Toolkit:
    """A folder that looks like a CUDA toolkit, and sources to compile with it."""

    def __init__(self, folder: Path):
        self.home, self.sources, self.built = folder / "home of $cuda", folder / "sources", folder / "built"
        (self.home / "bin").mkdir(parents=True)
        self.sources.mkdir()
        nvcc = self.home / "bin" / "nvcc"
        nvcc.write_text(FAKE_NVCC)
        nvcc.chmod(0o755)
        for name in ("one_sm80.cu", "two_sm80.cu", "common.h"):
            (self.sources / name).write_text("text")

    def build(self, archs="8.0"):
        """What the compiler was run for."""
        ran = self.home / "bin" / "ran"
        ran.unlink(missing_ok=True)
        wanted = [
            each
            for each in cuda_objects.objects(parse(archs), cuda_objects.cuda_sources(self.sources))
            if each.head_dim == 64 and each.element == "bf16"
        ]
        found = cuda_objects.build(self.home, wanted, self.built)
        assert all(path.exists() for path in found)
        return sorted(ran.read_text().split()) if ran.exists() else []


def test_only_what_changed_is_compiled_again(tmp_path, capfd):
    toolkit = Toolkit(tmp_path)
    both = ["one_sm80_bf16_64.o", "two_sm80_bf16_64.o"]
    assert toolkit.build() == both
    assert toolkit.build() == []
    (toolkit.sources / "two_sm80.cu").write_text("other text")
    assert toolkit.build() == both[1:]
    (toolkit.sources / "common.h").write_text("other text")
    assert toolkit.build() == both
    assert toolkit.build("8.0;9.0") == both
    assert toolkit.build("8.0;9.0") == []
    out, _ = capfd.readouterr()
    assert "odd.cu(1): warning #1: odd" in out
    assert "registers" not in out
    log = json.loads((toolkit.built / "one_sm80_bf16_64.json").read_text())
    assert log["cpu_seconds"] >= 0
    assert log["peak_bytes"] > 0
    assert "Used 24 registers" in log["output"]
    assert {"-DFA_HEAD_DIM=64", "-std=c++20", "--compress-mode=size"} < set(log["command"])


def test_object_files_from_elsewhere_are_taken_as_they_are(tmp_path, capfd):
    """Their times, and where they lie, say nothing; what they were compiled from does."""
    first = Toolkit(tmp_path / "here")
    assert len(first.build()) == 2
    there = Toolkit(tmp_path / "there")
    shutil.copytree(first.built, there.built)
    for path in there.built.glob("*.o"):
        os.utime(path, (0, 0))
    assert there.build() == []
    assert "are those of this code" in capfd.readouterr().out
    assert there.build("8.6") == ["one_sm80_bf16_64.o", "two_sm80_bf16_64.o"]
    said = capfd.readouterr().out
    assert re.search(r"one_sm80_bf16_64 has changed: .*code=sm_80.* before, .*code=sm_86.* now", said), said
    (there.sources / "common.h").write_text("other text")
    assert len(there.build("8.6")) == 2
    assert "compiling kernels: sources has changed: " in capfd.readouterr().out
    nvcc = there.home / "bin" / "nvcc"
    nvcc.write_text(FAKE_NVCC.replace("13.0", "13.1"))
    assert len(there.build("8.6")) == 2
    assert "nvcc has changed: 13.0 before, 13.1 now" in capfd.readouterr().out
    (there.built / "one_sm80_bf16_64.o").unlink()
    assert there.build("8.6") == ["one_sm80_bf16_64.o"]
    assert "one_sm80_bf16_64.o is missing" in capfd.readouterr().out


def test_a_build_that_ends_halfway_is_not_taken_for_what_was_before(tmp_path):
    toolkit = Toolkit(tmp_path)
    toolkit.build()
    (toolkit.sources / "two_sm80.cu").write_text("broken")
    with pytest.raises(cuda_objects.ToolError):
        toolkit.build()
    (toolkit.sources / "two_sm80.cu").write_text("text")
    assert not (toolkit.built / "compiled_from.json").exists()
    assert toolkit.build() == ["two_sm80_bf16_64.o"]


def test_an_error_of_the_compiler_ends_the_build(tmp_path, capfd):
    toolkit = Toolkit(tmp_path)
    (toolkit.sources / "two_sm80.cu").write_text("broken")
    with pytest.raises(cuda_objects.ToolError, match="compiling the CUDA kernels failed"):
        toolkit.build()
    assert "two_sm80.cu: broken" in capfd.readouterr().out


def test_products_that_wait_for_one_another_are_an_error(tmp_path, capfd):
    """And remain one when the build is tried again."""
    toolkit = Toolkit(tmp_path)
    (toolkit.sources / "two_sm80.cu").write_text("serialised")
    for _ in range(2):
        with pytest.raises(cuda_objects.ToolError, match="compiling the CUDA kernels failed"):
            toolkit.build()
        out = capfd.readouterr().out
        assert "(C7510)" in out
        assert "error: this compiler makes a slow kernel of that (C75xx)" in out
    assert not (toolkit.built / "two_sm80_bf16_64.o").exists()
    (toolkit.sources / "two_sm80.cu").write_text("text")
    assert "two_sm80_bf16_64.o" in toolkit.build()


def test_toolkit_without_a_compiler(tmp_path):
    with pytest.raises(cuda_objects.ToolError, match=r"no nvcc there; set CUDA_HOME"):
        cuda_objects.nvcc_of(tmp_path)
