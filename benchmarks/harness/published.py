"""What others have published of attention on Hopper GPUs, to be seen beside our measurements and never mixed with them.

published.json has TFLOP/s in 16 bits, of consecutive powers of two of seqlen. FLOPs are counted as ours are: two
products forward, five backward, causal about half of them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness.provider import OURS

CONTENT = json.loads(Path(__file__).with_suffix(".json").read_text())
COLUMNS = tuple(dict.fromkeys(each["who"] for each in CONTENT["figures"]))


def _figures(case: dict[str, Any], which: str) -> dict[str, float]:
    """Who has published what of a case of ours."""
    found = {}
    for each in CONTENT["figures"]:
        same = all(case[key] == each[key] for key in ("head_dim", "head_dim_v", "causal")) and each["pass"] == which
        seqlens = [each["first_seqlen"] << i for i in range(len(each["tflops"]))]
        if same and case["seqlen_q"] in seqlens:
            found[each["who"]] = each["tflops"][seqlens.index(case["seqlen_q"])]
    return found


def published_table(rows: Sequence[dict[str, Any]], processor: str) -> str:
    """Markdown: our TFLOP/s in the dense bf16 cases that others have published figures of, and those figures."""
    lines = [
        "## Published by others, on other machines, not part of ratios or means\n",
        f"TFLOP/s. Ours: bfloat16, measured here, on {processor}. Theirs: other clocks, software, batches and heads.\n",
        f"| head_dim | mask | seqlen | pass | {OURS}, here | {' | '.join(COLUMNS)} |",
        "|---|---|---:|---|---:|" + "---:|" * len(COLUMNS),
    ]
    for row in rows:
        case = row["case"]
        if case["group"] != "dense" or case["dtype"] != "bf16":
            continue
        width = f"{case['head_dim']}" + (f"/{case['head_dim_v']}" if case["head_dim_v"] != case["head_dim"] else "")
        for which, measured in row["passes"].items():
            if figures := _figures(case, which):
                cells = [width, "causal" if case["causal"] else "full", f"{case['seqlen_q']}", which]
                cells += [f"{measured['tflops']:.0f}", *(f"{figures[x]:g}" if x in figures else "" for x in COLUMNS)]
                lines.append("| " + " | ".join(cells) + " |")
    sources = [f"- {what}: {source}" for what, source in CONTENT["sources"].items()]
    return "\n".join([*lines, "", "Sources:\n", *sources, ""])
