"""What is measured: a table of attention problems."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}

# One batch of documents of very different lengths, as they come before packing.
RAGGED_SEQLENS = (1024, 768, 512, 448, 320, 192, 96, 32)


@dataclass(frozen=True)
class Case:
    """One attention problem and whether its backward is timed too. Tensors are (batch, seqlen, heads, head_dim)."""

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
    softcap: float = 0.0
    alibi: bool = False
    dropout_p: float = 0.0
    seqlens: tuple[int, ...] = ()  # of a packed batch; seqlen_q and seqlen_k are then the longest
    backward: bool = False

    @property
    def name(self) -> str:
        """A readable name, also what --only looks at."""
        seqlen = str(self.seqlen_q) if self.seqlen_q == self.seqlen_k else f"{self.seqlen_q}x{self.seqlen_k}"
        heads = f"h{self.num_heads}" + (f"/{self.num_heads_k}" if self.num_heads_k != self.num_heads else "")
        width = f"d{self.head_dim}" + (f"/{self.head_dim_v}" if self.head_dim_v != self.head_dim else "")
        if self.seqlens:
            seqlen = f"{min(self.seqlens)}..{max(self.seqlens)}"
        batch_size = len(self.seqlens) or self.batch_size
        parts = [self.group, self.dtype, self.mask_name, f"b{batch_size}", f"n{seqlen}", heads, width]
        return " ".join([*parts, "fwd+bwd" if self.backward else "fwd"])

    @property
    def mask_name(self) -> str:
        """The kind of mask, in one word."""
        if self.window is not None:
            return f"window{self.window}"
        return "causal" if self.causal else "full"

    @property
    def window_size(self) -> tuple[int, int]:
        """The window in flash_attn's convention."""
        return (-1, -1) if self.window is None else (self.window, 0)

    def flops(self) -> float:
        """Floating-point operations of the products that the mask leaves: two matrix products, seven with backward."""
        lengths = self.seqlens or (None,)
        pairs = sum(self._visible_pairs(length or self.seqlen_q, length or self.seqlen_k) for length in lengths)
        pairs *= self.num_heads * (1 if self.seqlens else self.batch_size)
        if not self.backward:
            return 2.0 * pairs * (self.head_dim + self.head_dim_v)
        return 2.0 * pairs * (4 * self.head_dim + 3 * self.head_dim_v)

    def _visible_pairs(self, seqlen_q: int, seqlen_k: int) -> int:
        if not self.causal:
            return seqlen_q * seqlen_k
        last = torch.arange(seqlen_q) + seqlen_k - seqlen_q  # the last key that a query sees
        first = (last - self.window).clamp(min=0) if self.window is not None else torch.zeros_like(last)
        return int((last - first + 1).clamp(min=0).sum())


def _square(group: str, dtype: str, seqlen: int, **changes: Any) -> Case:
    head_dim = changes.pop("head_dim", 64)
    changes.setdefault("head_dim_v", head_dim)
    return Case(group, dtype, seqlen, seqlen, head_dim=head_dim, **changes)


def _dense() -> Iterator[Case]:
    for dtype in ("fp32", "bf16"):
        for seqlen in (512, 2048, 4096):
            for head_dim in (64, 128):
                for causal in (False, True):
                    yield _square("dense", dtype, seqlen, head_dim=head_dim, causal=causal)
    yield _square("dense", "fp16", 2048, causal=True)
    yield _square("dense", "fp64", 1024, causal=True)


def _special() -> Iterator[Case]:
    for dtype in ("fp32", "bf16"):
        yield _square("gqa", dtype, 2048, num_heads_k=2, causal=True)
        yield _square("window", dtype, 4096, causal=True, window=256)
        yield _square("varlen", dtype, max(RAGGED_SEQLENS), causal=True, seqlens=RAGGED_SEQLENS)
        yield _square("head_dim_v", dtype, 2048, head_dim=64, head_dim_v=128, causal=True)
        yield _square("head_dim_v", dtype, 2048, head_dim=192, head_dim_v=128, causal=True)
        yield _square("alibi", dtype, 2048, causal=True, alibi=True)
        yield _square("softcap", dtype, 2048, causal=True, softcap=30.0)
        yield _square("dropout", dtype, 2048, causal=True, dropout_p=0.1)


def _decode() -> Iterator[Case]:
    """Few queries against many keys: forward only."""
    for dtype in ("fp32", "bf16"):
        for seqlen_q in (1, 16, 40):
            yield Case("decode", dtype, seqlen_q, 4096, batch_size=4, head_dim=128, head_dim_v=128)


def all_cases() -> list[Case]:
    """Every case, forward alone first and then forward + backward."""
    cases = []
    for case in (*_dense(), *_special()):
        cases += [case, replace(case, backward=True)]
    return cases + list(_decode())


def quick_cases() -> list[Case]:
    """One small case of every kind, to see that everything runs."""
    cases = []
    for case in all_cases():
        if case.group == "dense" and (case.seqlen_q > 512 or case.head_dim > 64) and case.dtype in ("fp32", "bf16"):
            continue
        seqlen = min(case.seqlen_k, 512)
        scale: dict[str, Any] = {
            "seqlen_q": min(case.seqlen_q, seqlen),
            "seqlen_k": seqlen,
            "batch_size": min(case.batch_size, 2),
        }
        cases.append(replace(case, **scale, seqlens=tuple(min(n, seqlen) for n in case.seqlens)))
    return list(dict.fromkeys(cases))
