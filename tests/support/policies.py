"""csrc/policy/ as a shared library for tests of Python, a pytest plugin."""

import ctypes
import shutil
import subprocess

import hypothesis
import pytest

from paths import ROOT

hypothesis.settings.register_profile("flash_attn", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("flash_attn")


@pytest.fixture(scope="session")
def policies(tmp_path_factory):
    """policies.cpp as a shared library."""
    compiler = shutil.which("g++") or shutil.which("c++") or "g++"
    library = tmp_path_factory.mktemp("policies") / "policies.so"
    source = ROOT / "tests" / "attention" / "policies.cpp"
    flags = ["-std=c++17", "-O1", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror", f"-I{ROOT / 'csrc'}"]
    flags += ["-fsanitize=signed-integer-overflow", "-fsanitize-undefined-trap-on-error"]
    subprocess.run([compiler, *flags, str(source), "-o", str(library)], check=True)
    loaded = ctypes.CDLL(str(library))
    loaded.mask_keep.restype = loaded.mask_is_full_block.restype = ctypes.c_uint8
    loaded.row_offset.restype = ctypes.c_int64
    loaded.rescale.restype = ctypes.c_double
    return loaded


def ints(values, kind=ctypes.c_int32):
    return None if values is None else (kind * len(values))(*values)
