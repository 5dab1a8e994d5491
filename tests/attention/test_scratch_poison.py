"""No reads of uninitialised memory: tables of cases on memory full of NaN, with every instruction set."""

import os
import subprocess
import sys

import pytest

import flash_attn
from paths import ROOT, environment

LEVELS = ("base", "avx2", "avx512", "avx512_bf16")


def run_tables(level: str, *which: str) -> subprocess.CompletedProcess:
    """Run check.py in a process of its own, with the settings of conftest.py."""
    command = [sys.executable, str(ROOT / "tests/support/check.py"), *which]
    env = environment(FLASH_ATTN_CPU_ISA=level)
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=900, check=False)


@pytest.mark.parametrize("level", LEVELS)
def test_tables(level, request):
    """A sample of the cases, or all. test_forward.py and test_backward.py run all by the best instruction set."""
    assert os.environ["FLASH_ATTN_CPU_POISON"] == "1"
    best = flash_attn.build_info()["cpu_instruction_set"]
    if LEVELS.index(level) > LEVELS.index(best):
        pytest.skip(f"this processor has {best} at most")
    which = ["whole"] if request.config.getoption("--whole") else ["60", str(request.config.seed)]
    done = run_tables(level, *which)
    assert done.returncode == 0, f"{which}: {done.stderr[-3000:]}"
    assert done.stdout.split()[-1] == level
