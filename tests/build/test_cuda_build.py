"""How the CUDA kernels are built, as far as that needs no compiler for them: for which GPUs, from what, when anew."""

import ctypes
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from build_tools import cuda_archs, cuda_objects
from build_tools.cuda_archs import ArchError, choose, code_for_source, code_names, front_end_of, gencode_flags, parse
from paths import ROOT

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
        ("80;90;100;120", "sm_80 sm_90a sm_100 sm_120"),
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
        ("8", '"8" is no architecture; write for example 8.0+PTX;9.0a'),
        ("8.0;none", '"none" is no architecture'),
        ("sm_80", '"sm_80" is no architecture'),
        ("8.0;all", '"all" is no architecture'),
        ("8.0PTX", '"8.0PTX" is no architecture'),
        ("8.0a", '"8.0a": no suffix a is known but 9.0a; write 8.0'),
        ("12.0f", '"12.0f": no suffix f is known but 9.0a; write 12.0'),
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
    assert chosen(hopper, torch_list="Turing;8.9;10.0a;12.0f+PTX")[0] == "sm_89 sm_100 sm_120 compute_120"
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
    assert code_for_source(Path("sm80/fwd.cu"), archs) == ["sm_80", "sm_90a", "compute_80", "compute_90"]
    assert code_for_source(Path("sm90/fwd.cu"), archs) == ["sm_90a"]
    assert code_for_source(Path("sm90/fwd.cu"), parse("8.0+PTX")) == []
    assert code_for_source(Path("sm89/fwd.cu"), archs) == ["sm_90a", "compute_90"]


def test_the_front_end_runs_once_for_all_architectures():
    codes = ["sm_80", "sm_90a", "compute_80", "compute_90"]
    assert gencode_flags(codes, front_end_of(Path("sm80/fwd.cu"))) == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_80,code=sm_90a",
        "-gencode=arch=compute_80,code=compute_80",
        "-gencode=arch=compute_90,code=compute_90",
    ]
    assert front_end_of(Path("attention/range_blocks.cu")) == "compute_80"
    assert gencode_flags(["sm_90a"], front_end_of(Path("sm90/fwd.cu"))) == ["-gencode=arch=compute_90a,code=sm_90a"]


def test_no_source_tells_gpus_apart():
    """Otherwise one pass of the front end could not serve them all."""
    assert not [path for path in sorted((ROOT / "csrc").rglob("*.*")) if "__CUDA_ARCH" in path.read_text()]


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
    assert done.stdout.splitlines()[0] == "flash-attn: building for CPU only: torch is a CPU build"


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
        ({"FLASH_ATTN_CUDA_ARCHS": "8"}, 'flash-attn: FLASH_ATTN_CUDA_ARCHS=8: "8" is no architecture; write for '),
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
    loaded.runs_on.restype = ctypes.c_bool
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
    targets.unavailable_reason(b"GPU", capability, codes.encode(), text, len(text))
    assert text.value.decode() == said
