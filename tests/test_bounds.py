"""Not one byte is read or written beside a tensor."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest


def run(*arguments: str, level: str = "") -> subprocess.CompletedProcess:
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), *filter(None, sys.path)])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    if level:
        environment["FLASH_ATTN_CPU_ISA"] = level
    command = [sys.executable, str(here / "guarded.py"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)


@pytest.mark.parametrize("place", ["start", "end"])
@pytest.mark.parametrize("level", ["base", "avx2", "avx512", "avx512_bf16"])
def test_nothing_beside_a_tensor_is_touched(place, level):
    done = run(place, level=level)
    assert done.returncode == 0, f"last of {done.stdout[-600:]}\n{done.stderr[-2000:]}"
    assert done.stdout.endswith("passed\n")


def test_the_guard_works():
    """One byte too far ends the process."""
    done = run("end", "trespass")
    assert done.returncode in (-signal.SIGSEGV, -signal.SIGBUS)
