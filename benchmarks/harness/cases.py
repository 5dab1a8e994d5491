"""What is measured: one table of attention problems, those of a device first that tell most."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
PASSES = ("forward", "backward", "both")

# On a GPU: of a batch, whatever the length of its sequences; and num_heads * head_dim.
TOTAL_TOKENS, HIDDEN = 16384, 2048
SWEEP = (64, 128, 256)  # values of head_dim, over all lengths
# One batch of documents of very different lengths, as they come before packing.
RAGGED_SEQLENS = (1024, 768, 512, 448, 320, 192, 96, 32)
QUICK_SEQLEN = 64


@dataclass(frozen=True)
class Case:
    """One attention problem for one kind of device. Tensors are (batch, seqlen, heads, head_dim)."""

    device: str
    group: str
    dtype: str
    seqlen_q: int
    seqlen_k: int
    batch_size: int = 1
    num_heads: int = 8
    num_heads_k: int = 8
    head_dim: int = 64
    head_dim_v: int = 64
    causal: bool = False
    window: int | None = None  # a query sees itself and this many keys before it
    prefix: int | None = None  # a query sees all keys up to itself, and this many first ones
    softcap: float = 0.0
    alibi: bool = False
    sinks: bool = False
    dropout_p: float = 0.0
    seqlens: tuple[int, ...] = ()  # of a packed batch; seqlen_q and seqlen_k are then the longest
    backward: bool = False  # whether there is a backward pass

    @property
    def name(self) -> str:
        """A readable name, also what --only looks at."""
        seqlen = str(self.seqlen_q) if self.seqlen_q == self.seqlen_k else f"{self.seqlen_q}x{self.seqlen_k}"
        heads = f"h{self.num_heads}" + (f"/{self.num_heads_k}" if self.num_heads_k != self.num_heads else "")
        width = f"d{self.head_dim}" + (f"/{self.head_dim_v}" if self.head_dim_v != self.head_dim else "")
        if self.seqlens:
            seqlen = f"{min(self.seqlens)}..{max(self.seqlens)}"
        mask = "causal" if self.causal else "full"
        if self.window is not None:
            mask = f"window{self.window}"
        if self.prefix is not None:
            mask = f"prefix{self.prefix}"
        return f"{self.group} {self.dtype} {mask} b{len(self.seqlens) or self.batch_size} n{seqlen} {heads} {width}"

    @property
    def window_size(self) -> tuple[int, int]:
        """The window in flash_attn's convention."""
        return (-1, -1) if self.window is None else (self.window, 0)

    def passes(self, wanted: Iterable[str]) -> list[str]:
        """Those of the wanted passes that the case has."""
        return [which for which in wanted if self.backward or which == "forward"]

    def flops(self, which: str) -> float:
        """Floating-point operations of the products that the mask leaves: two forward, five backward."""
        lengths = self.seqlens or (None,)
        pairs = sum(self._visible_pairs(length or self.seqlen_q, length or self.seqlen_k) for length in lengths)
        pairs *= self.num_heads * (1 if self.seqlens else self.batch_size)
        forward = self.head_dim + self.head_dim_v
        backward = 3 * self.head_dim + 2 * self.head_dim_v
        return 2.0 * pairs * {"forward": forward, "backward": backward, "both": forward + backward}[which]

    def _visible_pairs(self, seqlen_q: int, seqlen_k: int) -> int:
        if not self.causal:
            return seqlen_q * seqlen_k
        last = torch.arange(seqlen_q) + seqlen_k - seqlen_q  # the last key that a query sees
        last = last if self.prefix is None else last.clamp(min=self.prefix - 1)
        first = (last - self.window).clamp(min=0) if self.window is not None else torch.zeros_like(last)
        return int((last - first + 1).clamp(min=0).sum())


def _square(device: str, group: str, dtype: str, seqlen: int, head_dim: int, **changes: Any) -> Case:
    """As many queries as keys. On a CPU one sequence and 8 heads, on a GPU the usual tokens and hidden size."""
    num_heads, batch_size = (8, 1) if device == "cpu" else (HIDDEN // head_dim, max(1, TOTAL_TOKENS // seqlen))
    shape = {"head_dim": head_dim, "head_dim_v": head_dim, "num_heads": num_heads, "num_heads_k": num_heads}
    settings = {**shape, "batch_size": batch_size, "backward": True, **changes}
    return Case(device, group, dtype, seqlen, seqlen, **settings)


def _both_masks(*arguments: Any, **changes: Any) -> Iterator[Case]:
    for causal in (False, True):
        yield _square(*arguments, causal=causal, **changes)


def _cpu_cases() -> Iterator[Case]:
    for dtype in ("fp32", "bf16"):
        for seqlen in (512, 2048, 4096):
            for head_dim in (64, 128):
                yield from _both_masks("cpu", "dense", dtype, seqlen, head_dim)
    yield _square("cpu", "dense", "fp16", 2048, 64, causal=True)
    yield _square("cpu", "dense", "fp64", 1024, 64, causal=True)
    for dtype in ("fp32", "bf16"):
        yield _square("cpu", "gqa", dtype, 2048, 64, num_heads_k=2, causal=True)
        yield _square("cpu", "window", dtype, 4096, 64, causal=True, window=256)
        yield _square("cpu", "prefix", dtype, 2048, 64, causal=True, prefix=512)
        yield _square("cpu", "prefix", dtype, 4096, 64, causal=True, prefix=1024)
        yield _square("cpu", "prefix", dtype, 2048, 128, causal=True, prefix=1536)
        yield _square("cpu", "sinks", dtype, 512, 64, causal=True, sinks=True)
        yield _square("cpu", "sinks", dtype, 2048, 64, causal=True, sinks=True)
        yield _square("cpu", "varlen", dtype, max(RAGGED_SEQLENS), 64, causal=True, seqlens=RAGGED_SEQLENS)
        yield _square("cpu", "head_dim_v", dtype, 2048, 64, head_dim_v=128, causal=True)
        yield _square("cpu", "head_dim_v", dtype, 2048, 192, head_dim_v=128, causal=True)
        yield _square("cpu", "alibi", dtype, 2048, 64, causal=True, alibi=True)
        yield _square("cpu", "softcap", dtype, 2048, 64, causal=True, softcap=30.0)
        yield _square("cpu", "dropout", dtype, 2048, 64, causal=True, dropout_p=0.1)
    for dtype in ("fp32", "bf16"):
        for seqlen_q in (1, 16, 40):
            yield Case("cpu", "decode", dtype, seqlen_q, 4096, batch_size=4, head_dim=128, head_dim_v=128)


def _gpu_cases() -> Iterator[Case]:
    for dtype in ("bf16", "fp16"):
        for head_dim in (128, 64, 256):
            for seqlen in (4096, 16384, 8192):
                yield from _both_masks("cuda", "dense", dtype, seqlen, head_dim)
        for seqlen in (2048, 1024, 512):
            for head_dim in (128, 64, 256):
                yield from _both_masks("cuda", "dense", dtype, seqlen, head_dim)
    for head_dim, head_dim_v in ((192, 128), (96, 96)):
        heads = {"num_heads": 16, "num_heads_k": 16}
        yield from _both_masks("cuda", "dense", "bf16", 4096, head_dim, head_dim_v=head_dim_v, **heads)
    yield _square("cuda", "gqa", "bf16", 8192, 128, causal=True, num_heads=64, num_heads_k=8, batch_size=2)
    yield _square("cuda", "window", "bf16", 8192, 128, causal=True, window=1024)
    yield _square("cuda", "window", "bf16", 16384, 64, causal=True, window=128)
    yield _square("cuda", "prefix", "bf16", 8192, 128, causal=True, prefix=2048)
    yield _square("cuda", "sinks", "bf16", 8192, 64, causal=True, sinks=True, num_heads=64, num_heads_k=8)
    yield _square("cuda", "alibi", "bf16", 4096, 128, causal=True, alibi=True)
    yield _square("cuda", "softcap", "bf16", 4096, 128, causal=True, softcap=30.0)
    yield _square("cuda", "dropout", "bf16", 4096, 128, causal=True, dropout_p=0.1)
    yield _square("cuda", "unaligned", "bf16", 4096, 72, causal=True, num_heads=16, num_heads_k=16)
    seqlens = tuple(4 * n for n in RAGGED_SEQLENS)
    yield _square("cuda", "varlen", "bf16", max(seqlens), 128, causal=True, seqlens=seqlens)
    yield _square("cuda", "short", "bf16", 128, 64, causal=True, batch_size=1)
    for batch_size, seqlen_q, seqlen_k in [(1, 1, 8192), (32, 1, 8192), (8, 16, 8192), (1, 256, 65536)]:
        few = _square("cuda", "decode", "bf16", seqlen_k, 128, batch_size=batch_size, num_heads=32, num_heads_k=8)
        yield replace(few, seqlen_q=seqlen_q, causal=True, backward=False)


CASES = (*_cpu_cases(), *_gpu_cases())


def cases_for(device: str, quick: bool = False) -> list[Case]:
    """Those for a device, in their order. quick: all that it can run, a CPU those for GPUs too, made small."""
    if not quick:
        return [case for case in CASES if case.device == device]
    return list(dict.fromkeys(_small(case, device) for case in CASES if device in ("cpu", case.device)))


def _small(case: Case, device: str) -> Case:
    return replace(
        case,
        device=device,
        seqlen_q=min(case.seqlen_q, QUICK_SEQLEN),
        seqlen_k=min(case.seqlen_k, QUICK_SEQLEN),
        batch_size=min(case.batch_size, 2),
        num_heads=4,
        num_heads_k=4 if case.num_heads == case.num_heads_k else 2,
        seqlens=tuple(min(n, QUICK_SEQLEN) for n in case.seqlens),
        window=None if case.window is None else min(case.window, QUICK_SEQLEN // 4),
        prefix=None if case.prefix is None else min(case.prefix, QUICK_SEQLEN // 4),
    )
