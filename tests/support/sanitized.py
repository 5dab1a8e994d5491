"""A small set of calls for compute-sanitizer: every kernel at least once, also with invalid lengths.

    export PYTHONPATH=$PWD:$PWD/tests/support FLASH_ATTN_TEST_DEVICE=cuda
    compute-sanitizer --tool memcheck python3 tests/support/sanitized.py
    compute-sanitizer --tool racecheck python3 tests/support/sanitized.py 12

The number limits the number of cases.
"""

import dataclasses
import sys

import torch

from cases import Case, small_table
from check import op_bwd, op_fwd, op_probs
from device import DEVICE, IS_GPU, for_device
from inputs import Inputs, make_inputs

EXTRA = [
    Case((17, 70), (65, 131), dtype="bfloat16", packed=True, head_dim=13, head_dim_v=7, causal=True, lse_grad=True),
    Case((33,), (129,), dtype="float16", head_dim=31, head_dim_v=9, dropout_p=0.3, seqused_k=(70,), leftpad_k=(3,)),
    Case((5, 9), (8, 20), dtype="bfloat16", packed=True, page_size=4, head_dim=96, head_dim_v=96),
    Case((70,), (140,), dtype="bfloat16", head_dim=192, head_dim_v=192, window_size=(20, 3)),
    Case((70,), (140,), dtype="bfloat16", head_dim=256, head_dim_v=256, softcap=2.0, num_heads=4),
]


def run(case: Case, x: Inputs) -> None:
    """Run every op; backward with and without deterministic."""
    out, lse = op_fwd(case, x)
    op_probs(case, x, lse)
    if not case.page_size:
        op_bwd(case, x, out, lse)


def hostile(case: Case) -> Inputs:
    """Lengths that would cause out-of-bounds accesses if they were not clamped."""
    x = make_inputs(case)
    for name in ("cu_seqlens_q", "cu_seqlens_k", "seqused_k", "leftpad_k", "block_table"):
        tensor = getattr(x, name)
        if tensor is not None:
            noise = torch.randint(-(2**31), 2**31 - 1, tensor.shape, dtype=torch.int64).to(DEVICE, torch.int32)
            x = dataclasses.replace(x, **{name: noise})
    return x


def main() -> None:
    torch.manual_seed(0)
    cases = [*EXTRA, *for_device(small_table())][: int(sys.argv[1]) if len(sys.argv) > 1 else None]
    for case in cases:
        print(case.name, flush=True)
        run(case, make_inputs(case))
        if IS_GPU:  # the CPU rejects them
            run(case, hostile(case))
    if IS_GPU:
        torch.cuda.synchronize()
    sys.stdout.write(f"ran {len(cases)} cases\n")


if __name__ == "__main__":
    main()
