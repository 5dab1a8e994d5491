"""Tables of cases by every instruction set of the CPU backend, on memory full of NaN: nothing is read unwritten."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from paths import ROOT, environment

LEVELS = ("base", "avx2", "avx512", "avx512_bf16")


def _best_level() -> str:
    """The best instruction set of this processor, according to the kernel's CPU flags."""
    info = Path("/proc/cpuinfo")
    flags = set(info.read_text().split()) if info.exists() else set()
    needs = {
        "avx512_bf16": {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16"},
        "avx512": {"avx512f", "avx512bw", "avx512vl", "avx512dq"},
        "avx2": {"avx2", "fma"},
    }
    return next((level for level, flag in needs.items() if flag <= flags), "base")


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("script", ["check.py", "kvcache_cases.py"])
def test_tables(script, level, request):
    """A few cases and a sample of the others, or all, in a process of its own. Unsupported sets fall back."""
    assert os.environ["FLASH_ATTN_CPU_POISON"] == "1"
    which = ["whole"] if request.config.getoption("--whole") else ["40", str(request.config.seed)]
    command = [sys.executable, str(ROOT / "tests/support" / script), *which]
    env = environment(FLASH_ATTN_CPU_ISA=level)
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, f"{which}: {done.stderr[-3000:]}"
    assert LEVELS.index(done.stdout.split()[-1]) == min(LEVELS.index(level), LEVELS.index(_best_level()))


def test_default():
    """The best one, but on Intel's processors, whose dot products of pairs are slow."""
    code = "import flash_attn; print(flash_attn.build_info()['cpu_instruction_set'])"
    env, best = environment(FLASH_ATTN_CPU_ISA=""), _best_level()
    used = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
    slow = best == "avx512_bf16" and "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    assert used.strip() == ("avx512" if slow else best)
