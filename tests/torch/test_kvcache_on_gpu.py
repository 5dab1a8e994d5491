"""The KV cache on a GPU: lengths and tables that lie there, and CUDA graphs."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import flash_attn
from bad_kvcache_calls import CALLS, VALUES
from compare import assert_bitwise
from device import needs_gpu, on_device
from kvcache import KvCase, make_kv_inputs, run_kvcache
from paths import environment

pytestmark = [needs_gpu, on_device]


def on_the_gpu(arguments: dict) -> dict:
    """The arguments of a call of bad_kvcache_calls.py in bfloat16, on the GPU."""

    def move(name, t):
        if not isinstance(t, torch.Tensor):
            return t
        return t.to("cuda", torch.bfloat16 if t.is_floating_point() and name != "alibi_slopes" else t.dtype)

    return {name: move(name, t) for name, t in arguments.items()}


CHECK = """
import flash_attn
from bad_kvcache_calls import CALLS, VALUES
from test_kvcache_on_gpu import on_the_gpu
for call, changes, reasons in VALUES:
    try:
        flash_attn.flash_attn_with_kvcache(**on_the_gpu({**CALLS[call](), **changes}))
        print("nothing is raised", call, changes)
    except ValueError as error:
        if not all(argument in str(error) for argument, _, _ in reasons):
            print("another reason:", error)
print("checked", len(VALUES))
"""


def test_values_are_checked_on_request():
    """FLASH_ATTN_CHECK=1 looks at lengths and tables as on the CPU."""
    command, env = [sys.executable, "-c", CHECK], environment(FLASH_ATTN_CHECK="1")
    here = Path(__file__).parent
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=here, check=False)
    assert done.stdout == f"checked {len(VALUES)}\n", done.stdout + done.stderr[-2000:]


@pytest.mark.last
@pytest.mark.parametrize(("call", "changes", "reasons"), VALUES)
def test_wrong_values_do_no_harm(call, changes, reasons):
    """Without it wrong values give wrong numbers and no invalid accesses; the next call is right."""
    arguments = on_the_gpu({**CALLS[call](), **changes})
    flash_attn.flash_attn_with_kvcache(**arguments)
    torch.cuda.synchronize()
    assert (flash_attn.flash_attn_with_kvcache(**on_the_gpu(CALLS[call]())) == 1).all()


@pytest.mark.parametrize("page_size", [0, 16])
def test_cuda_graph(page_size):
    """Nothing waits for the device: a step is captured once and replayed with other lengths."""
    case = KvCase(
        (60, 5), 1, 1, dtype="bfloat16", num_heads=8, causal=True, page_size=page_size, rotary_dim=32, spare=70
    )
    x, other = make_kv_inputs(case), make_kv_inputs(case)
    x.rotary_cos, x.rotary_sin = (torch.nan_to_num(t, 0.5) for t in (x.rotary_cos, x.rotary_sin))
    other.rotary_cos, other.rotary_sin = x.rotary_cos, x.rotary_sin
    start = x.cache_seqlens.clone()
    run_kvcache(case, x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run_kvcache(case, x)
    for length in range(3):
        x.cache_seqlens.copy_(start + length)
        graph.replay()
        expected = run_kvcache(case, other, cache_seqlens=start + length)
        for name, a, b in zip(("out", "softmax_lse"), captured, expected, strict=True):
            assert_bitwise(name, a, b)
