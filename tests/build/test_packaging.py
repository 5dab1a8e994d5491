"""The installed package: names, versions, and what is said where something is missing."""

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.version import Version

import flash_attn
from paths import ROOT

PACKAGE = Path(flash_attn.__file__).parent
EXTENSION = flash_attn._version.extension_name(torch.__version__)


def python(code, *, path=(), cwd=None, **environment):
    """Runs code in a new interpreter with the given folders in front of the search path."""
    folders = [str(p) for p in (*path, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)))]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(folders), **environment}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=cwd, timeout=120)


# Metadata.


def test_version():
    assert flash_attn.__version__ == importlib.metadata.version("flash-attn") == "2.8.3+0.13.0"
    assert str(Version(flash_attn.__version__)) == flash_attn.__version__, "in normal form"


@pytest.mark.parametrize("module", ["flash_attn", "flash_attn_2_cuda"])
def test_modules_belong_to_the_distribution(module):
    assert "flash-attn" in importlib.metadata.packages_distributions()[module]


def test_requirements():
    found = [Requirement(line) for line in importlib.metadata.requires("flash-attn")]
    always = {r.name: r.specifier for r in found if r.marker is None}
    assert set(always) == {"torch", "einops"}
    major, minor = torch.__version__.split(".")[:2]
    assert str(always["torch"]) == f"=={major}.{minor}.*", "what the extension was compiled against"
    test_extra = {r.name for r in found if r.marker is not None and r.marker.evaluate({"extra": "test"})}
    assert {"pytest", "hypothesis", "numpy"} <= test_extra


def test_metadata_says_what_it_is():
    metadata = importlib.metadata.metadata("flash-attn")
    assert metadata["Name"] == "flash-attn"
    assert "BSD-3-Clause" in str(metadata["License-Expression"] or metadata["License"])
    assert Version(metadata["Requires-Python"].removeprefix(">=")) <= Version("3.10")


def test_build_info():
    info = flash_attn.build_info()
    always = {"torch_version", "cuda_version", "cpu_instruction_set", "cuda_archs", "max_head_dim"}
    always |= {"built_because"}
    assert set(info) == always | {"hopper_kernels", "backends"}
    assert info["torch_version"].split("+")[0] == torch.__version__.split("+")[0]
    assert info["built_because"]
    assert info["cuda_version"] is None or re.fullmatch(r"\d+\.\d+", info["cuda_version"])
    assert isinstance(info["cpu_instruction_set"], str)
    assert info["cpu_instruction_set"]
    assert isinstance(info["cuda_archs"], list)
    assert bool(info["cuda_archs"]) == (info["cuda_version"] is not None)
    built_for = {backend["name"]: backend["built_for"] for backend in info["backends"]}
    assert list(built_for) == ["sm90", "sm80", "cpu"]
    assert built_for["cpu"] == [info["cpu_instruction_set"]]
    assert built_for["sm80"] == info["cuda_archs"]
    assert built_for["sm90"] == [code for code in info["cuda_archs"] if code == "sm_90a"]
    assert info["hopper_kernels"] is bool(built_for["sm90"])
    assert info["max_head_dim"] == 512


def test_types_are_published():
    assert (PACKAGE / "py.typed").is_file()


# Import where things are missing.


def test_import_without_gpu_and_compiler():
    """One process: no visible GPU, nothing on PATH. Import says nothing and attention works."""
    code = (
        "import warnings; warnings.simplefilter('error')\n"
        "import flash_attn, flash_attn_2_cuda, flash_attn.flash_attention, flash_attn.modules.mha, torch\n"
        "q = torch.ones(1, 2, 1, 8)\n"
        "print(flash_attn.flash_attn_func(q, q, q).sum().item())\n"
    )
    result = python(code, path=[PACKAGE.parent], CUDA_VISIBLE_DEVICES="", PATH="")
    assert (result.returncode, result.stdout, result.stderr) == (0, "16.0\n", "")


def copied_package(folder):
    """The Python files of the package and of its top-level module, without the compiled extension."""
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(PACKAGE, folder / "flash_attn", ignore=ignored)
    shutil.copy(Path(sys.modules["flash_attn"].__file__).parent.parent / "flash_attn_2_cuda.py", folder)
    return folder / "flash_attn"


def not_built(package):
    return "is not built"


def damaged(package):
    (package / (EXTENSION + sysconfig.get_config_var("EXT_SUFFIX"))).write_text("not a shared library")
    return "does not load"


def wrong_symbols(package):
    (package / f"{EXTENSION}.py").write_text("raise ImportError('_C.so: undefined symbol: _ZN3c105ErrorC2E')\n")
    return "undefined symbol"


@pytest.mark.parametrize("breakage", [not_built, damaged, wrong_symbols])
def test_import_without_a_working_extension(breakage, tmp_path):
    """One warning of one line; everything imports; use raises the same line, which says what to do."""
    reason = breakage(copied_package(tmp_path))
    code = (
        "import warnings\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    import flash_attn, flash_attn_2_cuda, torch\n"
        "    import flash_attn.flash_attention, flash_attn.modules.mha, flash_attn.bert_padding\n"
        "assert flash_attn.__file__.startswith(FOLDER), flash_attn.__file__\n"
        "messages = [str(w.message) for w in caught]\n"
        "q = torch.ones(1, 2, 1, 8)\n"
        "uses = [lambda: flash_attn.flash_attn_func(q, q, q), flash_attn.build_info,\n"
        "        lambda: flash_attn.flash_attention.FlashMHA(8, 1)(torch.ones(1, 2, 8)),\n"
        "        lambda: flash_attn.flash_attn_func(q.requires_grad_(), q, q)]\n"
        "for use in uses:\n"
        "    try:\n"
        "        use()\n"
        "    except RuntimeError as error:\n"
        "        messages.append(str(error))\n"
        "print(*messages, sep='\\n')\n"
    ).replace("FOLDER", repr(str(tmp_path)))
    result = python(code, path=[tmp_path], cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) == 5, result.stdout
    assert len(set(lines)) == 1, result.stdout
    assert reason in lines[0]
    assert "pip install --no-build-isolation" in lines[0]


def import_with(torch_version):
    """Imports the package as if this were another torch, calls a function, and says which extension is loaded."""
    code = (
        "import sys, warnings, torch\n"
        f"torch.__version__ = {torch_version!r}\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    import flash_attn\n"
        "print(*(w.message for w in caught), sep='\\n')\n"
        "try:\n"
        "    flash_attn.flash_attn_func(*[torch.ones(1, 2, 1, 8)] * 3)\n"
        "    print('works')\n"
        "except RuntimeError as error:\n"
        "    print(error)\n"
        "print('loaded' if '_C_torch' in open('/proc/self/maps').read() else 'not loaded')\n"
    )
    return python(code, path=[PACKAGE.parent]).stdout.splitlines()


def test_another_patch_of_the_same_torch():
    assert import_with(".".join([*torch.__version__.split(".")[:2], "99+cpu"])) == ["", "works", "loaded"]


def test_extension_built_for_another_torch():
    """It is not even loaded. One line has both versions, and what to do."""
    warning, error, loaded = import_with("2.1000.0+cu999")
    built_for = re.escape(".".join(torch.__version__.split(".")[:2]))
    assert re.fullmatch(
        rf"flash_attn: the compiled extension is for torch (.* and )?{built_for}( and .*)?, not 2\.1000\.0\+cu999; "
        r"rebuild it with `pip install --no-build-isolation \.` .*, or run `pip install torch==[\d.]+\.\*`",
        warning,
    )
    assert (error, loaded) == (warning, "not loaded")


def test_a_second_distribution_can_add_to_the_package(tmp_path):
    """flash_attn.cute of the distribution flash-attn-4 lives elsewhere on the path."""
    (tmp_path / "flash_attn" / "beside").mkdir(parents=True)
    (tmp_path / "flash_attn" / "__init__.py").write_text("")
    (tmp_path / "flash_attn" / "beside" / "__init__.py").write_text("print('found')\n")
    code = (
        f"import sys; sys.path.append({str(tmp_path)!r})\n"
        "import flash_attn.beside, flash_attn\n"
        "print(flash_attn.__version__)\n"
    )
    result = python(code, path=[PACKAGE.parent])
    assert result.stdout == f"found\n{flash_attn.__version__}\n", result.stderr


# setup.py.


@pytest.mark.skipif(not (ROOT / "compile_commands.json").exists(), reason="this tree was not built in place")
def test_every_source_has_a_compile_command():
    """But for the one that this build has no use for."""
    known = {Path(entry["file"]) for entry in json.loads((ROOT / "compile_commands.json").read_text())}
    missing = set((ROOT / "csrc").resolve().rglob("*.cpp")) - known
    assert {path.name for path in missing} == {"no_cuda.cpp" if flash_attn.build_info()["cuda_version"] else "cuda.cpp"}


@pytest.mark.parametrize("command", ["bdist_wheel", "build_ext", "install", "--version"])
def test_setup_without_torch_says_the_command(command, tmp_path):
    code = (
        "import runpy, sys\n"
        "sys.modules['torch'] = None\n"
        f"sys.argv = ['setup.py', {command!r}]\n"
        f"runpy.run_path({str(ROOT / 'setup.py')!r}, run_name='__main__')\n"
    )
    result = python(code, cwd=tmp_path)
    assert result.returncode != 0
    assert "pip install --no-build-isolation ." in result.stderr
    assert "torch" in result.stderr
    assert "Traceback" not in result.stderr, "a sentence, not a stack"
