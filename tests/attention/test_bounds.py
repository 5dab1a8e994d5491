"""No out-of-bounds reads or writes."""

import signal
import subprocess
import sys

import pytest

from paths import ROOT, environment


def run(*arguments: str, level: str = "") -> subprocess.CompletedProcess:
    env = environment(**({"FLASH_ATTN_CPU_ISA": level} if level else {}))
    command = [sys.executable, str(ROOT / "tests/support/guarded.py"), *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=240, check=False)


@pytest.mark.parametrize("place", ["start", "end"])
@pytest.mark.parametrize("level", ["base", "avx2", "avx512", "avx512_bf16"])
def test_nothing_beside_a_tensor_is_touched(place, level):
    done = run(place, level=level)
    assert done.returncode == 0, f"last of {done.stdout[-600:]}\n{done.stderr[-2000:]}"
    assert done.stdout.endswith("passed\n")


def test_the_guard_works():
    """An access one byte out of bounds ends the process."""
    done = run("end", "trespass")
    assert done.returncode in (-signal.SIGSEGV, -signal.SIGBUS)
