"""Packages whose import failed because of a missing name."""

import subprocess
import sys

import pytest

IMPORTS = {
    "xformers": "import xformers.ops; from xformers.ops.fmha import flash; assert flash.FLASH_VERSION",
}


@pytest.mark.parametrize("package", IMPORTS)
def test_import(package):
    """Public thread: facebookresearch/xformers#1267"""
    result = subprocess.run([sys.executable, "-c", IMPORTS[package]], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
