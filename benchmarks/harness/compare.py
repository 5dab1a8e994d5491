"""Whether all providers of a case compute the same thing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from harness.cases import Case
from harness.provider import OURS

# How far results may be apart: ||a - b|| / ||b||, over 128 rows of one head. The unit roundoff u is 2^-8 for bf16 and
# 2^-11 for fp16. Each side rounds the weights (or their gradients) and then the result, each time by 0.4 u in the mean
# square; for random data the errors are independent, and sums over keys keep their relative size. So two right results
# are about 0.8 u apart, 3e-3 and 4e-4. A tile of 64 keys that is left out is sqrt(64 / seqlen_k): 6e-2 at 16384.
BOUND = {"fp64": 1e-10, "fp32": 1e-4, "bf16": 1e-2, "fp16": 2e-3}
# The dense mask of ALiBi is rounded to the type, and so are the scores of single operations: scores of 4, say, by 4 u.
ROUNDED_SCORES = 4.0
ROWS = 128
# The first that can is what all others are compared with. math computes 16-bit types in float32.
REFERENCES = ("torch math", "torch flash", "torch cudnn", "torch efficient", "torch varlen")

Results = Mapping[str, Tensor]


def reference_of(names: Iterable[str]) -> str | None:
    """The peer that is taken to be right; None without peers."""
    peers = [name for name in names if not name.startswith(OURS)]
    ranked = (name for start in REFERENCES for name in peers if name.startswith(start))
    return next(ranked, peers[0] if peers else None)


def distance(result: Tensor, expected: Tensor) -> float:
    """||result - expected|| / ||expected||, the largest over the heads and every 128 rows; NaN if there is one."""

    def squares(x: Tensor) -> Tensor:
        rows = x.double().square().sum(-1).flatten(0, -2)  # (rows, heads)
        return torch.stack([block.sum(0) for block in rows.split(ROWS)])

    smallest = torch.finfo(torch.float64).tiny
    ratios = squares(result.double() - expected.double()) / squares(expected).clamp_min(smallest)
    return ratios.max().sqrt().item()


def differences(case: Case, results: Results, expected: Results, names: str) -> list[str]:
    """A sentence for every result that is too far from what is expected of it. With dropout it has to be finite."""
    if case.dropout_p:
        return [] if bool(results["out"].isfinite().all()) else [f"{case.name}: out of {names} is not finite"]
    bound = BOUND[case.dtype] * (ROUNDED_SCORES if case.alibi or case.softcap else 1)
    found = {name: distance(result, expected[name]) for name, result in results.items()}
    return [
        f"{case.name}: {name} of {names} differ by {value:.1e}, more than {bound:.0e}"
        for name, value in found.items()
        if not value <= bound
    ]


def disagreements(case: Case, results: Mapping[str, Results]) -> tuple[str | None, list[str]]:
    """The name of the peer that all are compared with, and a sentence for everything that differs from it."""
    reference = reference_of(results)
    if reference is None:
        return None, []
    pairs = ((name, each) for name, each in results.items() if name != reference or case.dropout_p)
    return reference, [
        text for name, each in pairs for text in differences(case, each, results[reference], f"{name} and {reference}")
    ]
