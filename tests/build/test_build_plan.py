"""What setup.py decides before it compiles: for which torch, for the CPU only or for CUDA too."""

import os
import shutil
import subprocess
import sys
import tarfile

import pytest
import setuptools
from packaging.requirements import Requirement

from build_tools import extension, plan
from paths import ROOT


def torch_requirement(commands, torch_version):
    first, *others = map(Requirement, plan.requirements(commands, torch_version))
    assert (first.name, [str(each) for each in others]) == ("torch", ["einops"])
    return first.specifier


@pytest.mark.parametrize("command", ["bdist_wheel", "dist_info", "editable_wheel", "egg_info"])
def test_what_is_compiled_needs_one_minor_version_of_torch(command):
    needed = torch_requirement([command, "--quiet"], "2.14.1+cu130")
    assert all(version in needed for version in ("2.14.0", "2.14.1+cpu", "2.14.9"))
    assert not any(version in needed for version in ("2.13.0", "2.15.0", "3.14.0", "2.1.4"))


@pytest.mark.parametrize("torch_version", [None, "2.14.1"])
def test_a_source_distribution_takes_any_recent_torch(torch_version):
    needed = torch_requirement(["--quiet", "sdist"], torch_version)
    assert all(version in needed for version in ("2.11.0", "2.13.0+cpu", "2.15.0"))
    assert "2.10.0" not in needed


def test_name_of_the_extension():
    assert plan.extension_name("2.14.1+cu130") == plan.extension_name("2.14.0") == "flash_attn._C_torch2_14"
    assert plan.extension_name("2.1.4") != plan.extension_name("2.14.0")


def test_a_wheel_has_no_extension_of_an_earlier_torch(tmp_path):
    package = tmp_path / "flash_attn"
    package.mkdir()
    for name in ("_C_torch2_12.so", "_C.so", "_C_torch2_13.so", "_checks.py"):
        (package / name).touch()
    command = extension.BuildExtension(setuptools.Distribution())
    command.build_lib = str(tmp_path)
    command.remove_others(setuptools.Extension("flash_attn._C_torch2_13", []))
    assert {path.name for path in package.iterdir()} == {"_C_torch2_13.so", "_checks.py"}


CPU, CUDA = None, "13.0"


@pytest.mark.parametrize(
    ("torch_cuda", "has_nvcc", "environment", "because"),
    [
        (CPU, False, {}, "torch is a CPU build"),
        (CPU, True, {"FLASH_ATTN_CUDA_ARCHS": "9.0"}, "torch is a CPU build"),
        (CUDA, False, {}, "no nvcc was found"),
        (CUDA, True, {}, None),
        (CUDA, True, {"FLASH_ATTN_CUDA_ARCHS": "80;90"}, None),
        (CUDA, True, {"FLASH_ATTN_CUDA_ARCHS": "none"}, "FLASH_ATTN_CUDA_ARCHS=none"),
        (CUDA, True, {"FLASH_ATTN_CUDA_ARCHS": " None "}, "FLASH_ATTN_CUDA_ARCHS=None"),
        (CUDA, True, {"FLASH_ATTENTION_SKIP_CUDA_BUILD": "TRUE"}, "FLASH_ATTENTION_SKIP_CUDA_BUILD=TRUE"),
        (CUDA, True, {"FLASH_ATTENTION_SKIP_CUDA_BUILD": "FALSE"}, None),
        (CUDA, True, {"FLASH_ATTENTION_FORCE_BUILD": "TRUE", "NVCC_THREADS": "4", "MAX_JOBS": "2"}, None),
    ],
)
def test_cpu_only(torch_cuda, has_nvcc, environment, because):
    assert plan.cpu_only_because(environment, torch_cuda, has_nvcc=has_nvcc) == because


def test_cpu_only_without_kernels():
    assert plan.cpu_only_because({}, CUDA, has_nvcc=True, has_kernels=False) == "the source tree has no CUDA kernels"


@pytest.mark.parametrize(
    ("variable", "value"), [("FLASH_ATTN_CUDA_ARCHS", "none"), ("FLASH_ATTENTION_SKIP_CUDA_BUILD", "TRUE")]
)
def test_setup_says_why_it_is_for_the_cpu_only(variable, value):
    """With any torch, with nvcc and without."""
    settings = {"FLASH_ATTENTION_FORCE_BUILD": "TRUE", "NVCC_THREADS": "4", variable: value}
    command = [sys.executable, str(ROOT / "setup.py"), "--version"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | settings, cwd=ROOT, check=True)
    assert done.stdout.splitlines()[0] == f"flash-attn: building for CPU only: {variable}={value}"


def test_sources_are_packed_without_torch(tmp_path):
    """Nothing generated is among them, and they require no particular torch."""
    names = ["setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "flash_attn_2_cuda.py"]
    for name in names:
        shutil.copy(ROOT / name, tmp_path)
    for name in ("build_tools", "flash_attn", "csrc"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "flash_attn" / "_C_torch2_99.so").write_text("built in place")
    code = "import runpy, sys; sys.modules['torch'] = None; sys.argv = ['setup.py', '-q', 'sdist']"
    command = [sys.executable, "-c", f"{code}; runpy.run_path('setup.py', run_name='__main__')"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    (archive,) = (tmp_path / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        members = {member.name.partition("/")[2]: member for member in packed.getmembers()}
        metadata = packed.extractfile(members["PKG-INFO"]).read().decode()
    assert {"csrc/ops/module.cpp", "build_tools/plan.py", "flash_attn/_version.py"} <= set(members)
    assert not [name for name in members if name.endswith((".so", ".o", ".pyc"))]
    assert "Requires-Dist: torch>=2.11\n" in metadata
