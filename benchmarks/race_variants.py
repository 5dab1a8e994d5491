"""Races other builds of the kernels for Hopper (build_tools/variants.py) against this one and cuDNN, op by op.

    python benchmarks/race_variants.py [--seconds 60] [--only 'causal']

bfloat16, 16384 tokens, hidden size 2048, lengths from 512 on. Every round times each once, in one process. The speedup
is over the kernels of this build; what a build was predicted to do stands above the table. Writes variants.json and
variants.md to RESULTS (build/variants), after every case.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).resolve().parent.parent))

import flash_attn  # noqa: F401 (its operators)
from build_tools.variants import FOLDER, HEAD_DIMS
from harness.timing import Provider, time_interleaved

TOKENS, HIDDEN = 16384, 2048
LENGTHS = (512, 1024, 4096, 16384, 2048, 8192)  # in the order of their value
THIS, CUDNN = "this", "cuDNN"
PASSES = ("forward", "backward")

Calls = dict[str, Callable[[], object]]


def libraries() -> dict[str, Any]:
    """The operators of this build, and of every other."""
    found = {THIS: torch.ops.flash_attn}
    for path in sorted(FOLDER.glob("*.so")):
        torch.ops.load_library(str(path))
        found[path.stem] = getattr(torch.ops, f"flash_attn_{path.stem}")
    return found


def arguments_of(head_dim: int, causal: bool) -> dict[str, Any]:
    """Of fwd and of bwd, but for the tensors."""
    return {"causal": causal, "softmax_scale": head_dim**-0.5}


def of_build(ops: Any, tensors: list[torch.Tensor], options: dict[str, Any]) -> tuple[Calls, list[torch.Tensor]]:
    """Its passes, and what they compute: output, log-sum-exp, dQ, dK, dV."""
    q, k, v, dout = tensors
    forward = lambda: ops.fwd(q, k, v, **options)  # noqa: E731
    out, lse = forward()
    grads = [torch.empty_like(each) for each in (q, k, v)]
    written = dict(zip(("dq", "dk", "dv"), grads, strict=True))
    backward = lambda: ops.bwd.out(dout, q, k, v, out, lse, **written, **options)  # noqa: E731
    backward()
    return {"forward": forward, "backward": backward}, [out, lse, *(each.clone() for each in grads)]


def of_cudnn(tensors: list[torch.Tensor], causal: bool) -> Calls:
    """The same."""
    q, k, v, dout = (each.transpose(1, 2) for each in tensors)
    aten = torch.ops.aten
    forward = lambda: aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal, False)  # noqa: E731
    r = forward()
    rest = (r[0], r[1], r[6], r[7], None, r[2], r[3], r[4], r[5], 0.0, causal)
    backward = lambda: aten._scaled_dot_product_cudnn_attention_backward(dout, q, k, v, *rest)  # noqa: E731
    backward()
    return {"forward": forward, "backward": backward}


def distance(results: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """The largest difference of a tensor, relative to its norm. Bits that are equal make 0."""
    pairs = zip(results, expected, strict=True)
    return max(float((a.double() - b.double()).norm() / b.double().norm()) for a, b in pairs)


def cases(only: str) -> Iterator[tuple[str, int, int, bool]]:
    """Name, length, head_dim, and whether it is causal."""
    for length in LENGTHS:
        for head_dim in HEAD_DIMS:
            for causal in (True, False):
                name = f"d{head_dim} n{length} {'causal' if causal else 'full'}"
                if re.search(only, name):
                    yield name, length, head_dim, causal


def measure(name: str, length: int, head_dim: int, causal: bool, budget: float) -> Iterator[dict[str, Any]]:
    """A row for either pass."""
    torch.manual_seed(0)
    shape = (TOKENS // length, length, HIDDEN // head_dim, head_dim)
    tensors = [torch.randn(shape, dtype=torch.bfloat16, device="cuda") for _ in range(4)]
    made = {each: of_build(ops, tensors, arguments_of(head_dim, causal)) for each, ops in libraries().items()}
    calls = {each: own for each, (own, _) in made.items()}
    differ = {each: distance(results, made[THIS][1]) for each, (_, results) in made.items() if each != THIS}
    try:
        calls[CUDNN] = of_cudnn(tensors, causal)
    except (RuntimeError, AttributeError) as error:
        differ[f"no cuDNN: {str(error).splitlines()[0]}"] = 0.0
    for which in PASSES:
        providers = {each: Provider(own[which]) for each, own in calls.items()}
        time_interleaved(providers, "cuda", budget, min_rounds=5)
        speedups = {each: providers[THIS].ratio_to(providers[each]) for each in calls if each != THIS}
        milliseconds = {each: round(1e3 * provider.median(), 5) for each, provider in providers.items()}
        yield {"case": name, "pass": which, "ms": milliseconds, "speedup": speedups, "differ": differ}


def markdown(rows: list[dict[str, Any]]) -> str:
    """Predictions, and a line for every case and pass."""
    names = list(dict.fromkeys(name for row in rows for name in row["speedup"]))
    lines = [
        f"* {path.stem}: {path.read_text().strip() or 'nothing predicted'}" for path in sorted(FOLDER.glob("*.txt"))
    ]
    lines += ["", "| case | pass | this, ms | " + " | ".join(names) + " | largest difference |"]
    lines.append("|---|---|---:|" + "---:|" * (len(names) + 1))
    for row in rows:
        cells = [f"{row['speedup'][name]:.3f}" if name in row["speedup"] else "-" for name in names]
        most = max(row["differ"].values(), default=0.0)
        lines.append(f"| {row['case']} | {row['pass']} | {row['ms'][THIS]:.4f} | {' | '.join(cells)} | {most:.0e} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Race until the time is over."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=float(os.environ.get("LIMIT") or 60), help="in all (60)")
    parser.add_argument("--budget", type=float, default=0.03, help="per case and pass (0.03)")
    parser.add_argument("--only", metavar="REGEX", default="", help="the cases whose name matches")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit(f"race-variants: no CUDA device: torch {torch.__version__} finds none")
    if not list(FOLDER.glob("*.so")):
        print(f"race-variants: no other builds in {FOLDER}; python -m build_tools.variants makes them")
        return 0
    end = time.monotonic() + arguments.seconds
    folder = Path(os.environ.get("RESULTS") or FOLDER)
    rows: list[dict[str, Any]] = []
    for case in cases(arguments.only):
        if time.monotonic() > end:
            print("race-variants: the time is over")
            break
        for row in measure(*case, arguments.budget):
            rows.append(row)
            speedups = ", ".join(f"{name} {value:.3f}" for name, value in row["speedup"].items())
            print(f"{row['case']} {row['pass']}: {row['ms'][THIS]:.4f} ms; {speedups}", flush=True)
        (folder / "variants.json").write_text(json.dumps(rows, indent=1) + "\n")
        (folder / "variants.md").write_text(markdown(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
