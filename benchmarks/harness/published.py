"""What others have published of attention on Hopper GPUs, to be seen beside our measurements and never mixed with them.

TFLOP/s in 16 bits. FLOPs are counted as ours are: two products forward, five backward, causal about half of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from harness.implementation import OURS

FA3, FA4, CUDNN = "FlashAttention-3, H100", "FlashAttention-4, H200", "cuDNN 9.27, H200"
COLUMNS = (FA3, FA4, CUDNN)

_RESULTS = "https://github.com/NVIDIA/cudnn-frontend/blob/main/benchmark/attention_training/results"
SOURCES = {
    "FlashAttention-3, H100 SXM": "arXiv 2407.08608, read off its figures: CUDA 12.3, 16384 tokens, hidden size 2048",
    "FlashAttention-4 (CuTe) and cuDNN 9.27, H200, head_dim 128": (
        f"{_RESULTS}/llama3.1/h200/llama3.1_20260928_130009.csv: batch 2, 64 heads, 8 of keys"
    ),
    "the same, head_dim 192/128": f"{_RESULTS}/dsv3/h200/dsv3_20260928_121853.csv: batch 2, 128 heads",
    "FlashAttention-4, H200, head_dim 256 backward": "https://github.com/Dao-AILab/flash-attention/pull/2889",
}


@dataclass(frozen=True)
class Published:
    """TFLOP/s of consecutive powers of two of seqlen."""

    who: str
    which: str
    head_dim: int
    causal: bool
    first_seqlen: int
    tflops: tuple[float, ...]
    head_dim_v: int = 0  # 0: as head_dim

    def at(self, case: dict[str, Any], which: str) -> float | None:
        """What is published of a case of ours, None if nothing is."""
        same = (case["head_dim"], case["head_dim_v"]) == (self.head_dim, self.head_dim_v or self.head_dim)
        if not same or case["causal"] != self.causal or which != self.which:
            return None
        seqlens = [self.first_seqlen << i for i in range(len(self.tflops))]
        return dict(zip(seqlens, self.tflops, strict=True)).get(case["seqlen_q"])


PUBLISHED = (
    Published(FA3, "forward", 64, False, 512, (333, 392, 460, 476, 496, 497)),
    Published(FA3, "forward", 64, True, 512, (197, 265, 371, 420, 460, 473)),
    Published(FA3, "forward", 128, False, 512, (467, 565, 625, 638, 646, 648)),
    Published(FA3, "forward", 128, True, 512, (292, 423, 521, 579, 602, 616)),
    Published(FA3, "forward", 256, False, 512, (482, 639, 707, 736, 746, 756)),
    Published(FA3, "forward", 256, True, 512, (286, 427, 537, 612, 628, 642)),
    Published(FA3, "backward", 64, False, 512, (272, 363, 422, 453, 472, 474)),
    Published(FA3, "backward", 128, False, 512, (316, 424, 501, 542, 559, 561)),
    Published(FA4, "forward", 128, False, 2048, (671, 734, 756, 686)),
    Published(FA4, "forward", 128, True, 2048, (522, 619, 675, 702)),
    Published(FA4, "backward", 128, False, 2048, (562, 636, 656, 621)),
    Published(FA4, "backward", 128, True, 2048, (446, 558, 629, 606)),
    Published(FA4, "forward", 192, False, 2048, (728, 784, 813, 744), head_dim_v=128),
    Published(FA4, "forward", 192, True, 2048, (566, 663, 714, 679), head_dim_v=128),
    Published(FA4, "backward", 192, False, 2048, (482, 515, 496, 496), head_dim_v=128),
    Published(FA4, "backward", 192, True, 2048, (415, 490, 489, 479), head_dim_v=128),
    Published(FA4, "backward", 256, False, 16384, (530,)),
    Published(CUDNN, "forward", 128, False, 2048, (660, 687, 701, 640)),
    Published(CUDNN, "forward", 128, True, 2048, (534, 616, 655, 633)),
    Published(CUDNN, "backward", 128, False, 2048, (519, 576, 562, 549)),
    Published(CUDNN, "backward", 128, True, 2048, (402, 495, 526, 539)),
    Published(CUDNN, "forward", 192, False, 2048, (643, 676, 687, 636), head_dim_v=128),
    Published(CUDNN, "forward", 192, True, 2048, (550, 612, 640, 614), head_dim_v=128),
    Published(CUDNN, "backward", 192, False, 2048, (300, 317, 321, 323), head_dim_v=128),
    Published(CUDNN, "backward", 192, True, 2048, (416, 490, 500, 498), head_dim_v=128),
)


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
            figures = {each.who: x for each in PUBLISHED if (x := each.at(case, which)) is not None}
            if figures:
                cells = [width, "causal" if case["causal"] else "full", f"{case['seqlen_q']}", which]
                cells += [f"{measured['tflops']:.0f}", *(f"{figures[x]:g}" if x in figures else "" for x in COLUMNS)]
                lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "Sources:\n", *(f"- {what}: {source}" for what, source in SOURCES.items()), ""]
    return "\n".join(lines)
