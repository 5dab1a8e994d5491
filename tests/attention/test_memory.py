"""Peak memory, measured in one process per length, is linear in seqlen."""

import itertools
import subprocess
import sys

import pytest

from paths import environment

SCRIPT = """
import sys
import torch
import flash_attn

def resident(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))

torch.set_num_threads(1)
seqlen, varlen, dtype = int(sys.argv[1]), sys.argv[2] == "varlen", getattr(torch, sys.argv[3])

def run(seqlen):
    q, k, v = (torch.randn(1, seqlen, 2, 64, dtype=dtype, requires_grad=True) for _ in range(3))
    if varlen:
        cu = torch.tensor([0, seqlen // 4, seqlen], dtype=torch.int32)
        out = flash_attn.flash_attn_varlen_func(q[0], k[0], v[0], cu, cu, seqlen, seqlen, causal=True)
    else:
        out = flash_attn.flash_attn_func(q, k, v, causal=True)
    out.backward(torch.ones_like(out))

run(64)
with open("/proc/self/clear_refs", "w") as clear:
    clear.write("5")
before = resident("VmRSS:")
run(seqlen)
print(resident("VmHWM:") - before)
"""


def peak(seqlen: int, layout: str, dtype: str) -> int:
    """Peak bytes of forward and backward, including inputs and gradients."""
    command = [sys.executable, "-c", SCRIPT, str(seqlen), layout, dtype]
    done = subprocess.run(
        command, env=environment(MALLOC_ARENA_MAX="1"), capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return int(done.stdout)


@pytest.mark.parametrize(
    ("layout", "dtype", "lengths"),
    [("dense", "float32", (2048, 4096, 8192)), ("varlen", "bfloat16", (4096, 8192, 16384))],
)
def test_peak_is_linear(layout, dtype, lengths):
    peaks = [peak(seqlen, layout, dtype) for seqlen in lengths]
    for shorter, longer in itertools.pairwise(peaks):
        assert longer < 2.3 * shorter, peaks
    matrix = 2 * lengths[-1] ** 2 * (4 if dtype == "float32" else 2)
    tensors = 8 * 2 * 64 * lengths[-1] * (4 if dtype == "float32" else 2)
    assert peaks[-1] < matrix / 4, peaks
    assert tensors < peaks[-1] < 8 * tensors, peaks
