"""Runs cases on tensors between protected pages: any out-of-bounds access ends the process.

    python guarded.py end|start

places each tensor at the end, or the start, of its accessible pages, with a protected page on either side.
"""

import ctypes
import dataclasses
import faulthandler
import mmap
import sys

import torch

from cases import Case
from check import op_bwd, op_fwd, op_probs
from compare import assert_bitwise
from inputs import Inputs, make_inputs
from kvcache import KvCase, KvInputs, make_kv_inputs, run_kvcache

PAGE = mmap.PAGESIZE
FORBIDDEN = 0  # PROT_NONE
MAPS = []  # mapped until the process ends

CASES = [
    *(
        Case((17, 70), (65, 131), dtype=dtype, packed=True, head_dim=dim, head_dim_v=dim_v, causal=True, lse_grad=True)
        for dtype in ("float32", "float64", "bfloat16", "float16")
        for dim, dim_v in [(64, 64), (13, 7), (1, 1), (40, 33)]
    ),
    Case((1, 1), (5, 5), dtype="bfloat16", num_heads=3, num_heads_k=1, head_dim=5, head_dim_v=3, alibi="batch"),
    Case((33,), (129,), head_dim=31, head_dim_v=9, dropout_p=0.3, seqused_k=(70,), leftpad_k=(3,)),
    Case((5, 9), (8, 20), dtype="bfloat16", packed=True, page_size=4, head_dim=7, head_dim_v=9),
    Case((5, 9), (8, 20), packed=True, page_size=1, head_dim=8, head_dim_v=3, unused_rows=3),
]


KV_CASES = [
    KvCase(
        (40, 0, -1, 129), q, new, dtype=dtype, head_dim=dim, head_dim_v=dim_v, num_heads=4, rotary_dim=rotary, **rest
    )
    for q, new, dtype, dim, dim_v, rotary, rest in [
        (1, 1, "bfloat16", 13, 7, 6, {"interleaved": False, "spare": 0}),
        (3, 2, "float32", 33, 40, 32, {"page_size": 4, "spare": 0, "causal": True, "alibi": "batch"}),
        (1, 3, "float16", 64, 64, 64, {"page_size": 1, "leftpad": (2, 0, 7, 64), "num_splits": 3}),
        (20, 1, "float64", 5, 1, 4, {"shuffled": True, "spare": 0, "window_size": (9, 2)}),
        (2, 0, "bfloat16", 96, 96, 0, {"spare": 0, "num_splits": 128}),
    ]
]


def guarded(t: torch.Tensor | None, at_end: bool) -> torch.Tensor | None:
    """A copy of t between protected pages."""
    if t is None or t.numel() == 0:
        return t
    size = t.numel() * t.element_size()
    pages = -(-size // PAGE)
    area = mmap.mmap(-1, (pages + 2) * PAGE)
    MAPS.append(area)
    start = ctypes.addressof(ctypes.c_char.from_buffer(area))
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    for page in (0, pages + 1):
        if protect(ctypes.c_void_p(start + page * PAGE), ctypes.c_size_t(PAGE), FORBIDDEN) != 0:
            raise OSError(ctypes.get_errno(), "mprotect")
    offset = PAGE + (pages * PAGE - size if at_end else 0)
    view = torch.frombuffer(area, dtype=t.dtype, count=t.numel(), offset=offset).view(t.shape)
    return view.copy_(t)


def results(case: Case, x: Inputs, guard) -> tuple[torch.Tensor, ...]:
    """All results of the ops; guard is applied to every tensor that they read or write."""
    out, lse = op_fwd(case, x)
    if case.page_size:
        return out, lse, op_probs(case, x, lse)
    grads = tuple(guard(torch.zeros_like(t)) for t in (x.q, x.k, x.v))
    return out, lse, op_probs(case, x, guard(lse)), *op_bwd(case, x, guard(out), guard(lse), grads)


def main() -> None:
    faulthandler.enable()
    torch.set_num_threads(1)

    def guard(t):
        return guarded(t, at_end=sys.argv[1] == "end")

    for case in CASES:
        sys.stdout.write(f"{case.name}\n")
        sys.stdout.flush()
        x = make_inputs(case)
        fields = {field.name: guard(getattr(x, field.name)) for field in dataclasses.fields(x)}
        got = results(case, Inputs(**fields), guard)
        for i, (a, b) in enumerate(zip(got, results(case, x, lambda t: t), strict=True)):
            assert_bitwise(f"result {i}", a, b, case.name)
    for case in KV_CASES:
        sys.stdout.write(f"{case.name}\n")
        sys.stdout.flush()
        x, other = make_kv_inputs(case, padding=0.0), make_kv_inputs(case, padding=0.0)
        own = KvInputs(**{name: guard(t) if isinstance(t, torch.Tensor) else t for name, t in x.__dict__.items()})
        results_of_own = (*run_kvcache(case, own), own.k_cache, own.v_cache)
        results_of_other = (*run_kvcache(case, other), other.k_cache, other.v_cache)
        for i, (a, b) in enumerate(zip(results_of_own, results_of_other, strict=True)):
            assert_bitwise(f"result {i}", a, b, case.name)
    if sys.argv[2:] == ["trespass"]:
        ctypes.string_at(guarded(torch.zeros(4), at_end=True).data_ptr(), 17)
    sys.stdout.write("passed\n")


if __name__ == "__main__":
    main()
