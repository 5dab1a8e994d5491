"""What a provider of attention is: it says why it cannot compute a case, or builds a call that does."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from harness.cases import DTYPES, PASSES, Case

OURS = "ours"
Context = Callable[[], contextlib.AbstractContextManager]


@dataclass
class Problem:
    """A case with random data, in the layout of flash_attn: the same numbers for every provider."""

    case: Case
    q: Tensor  # (batch, seqlen_q, num_heads, head_dim), or (total, num_heads, head_dim) of a packed batch
    k: Tensor
    v: Tensor
    dout: Tensor
    alibi_slopes: Tensor | None  # (num_heads,), the usual geometric ones
    cu_seqlens: Tensor | None  # of a packed batch
    s_aux: Tensor | None  # (num_heads,), sinks

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v, which want gradients where the case has a backward pass."""
        return self.q, self.k, self.v


def make_problem(case: Case) -> Problem:
    """Normal random data from torch's generator."""
    device = case.device

    def random(seqlen: int, num_heads: int, head_dim: int) -> Tensor:
        rows = (sum(case.seqlens),) if case.seqlens else (case.batch_size, seqlen)
        return torch.randn(*rows, num_heads, head_dim, dtype=DTYPES[case.dtype], device=device)

    q = random(case.seqlen_q, case.num_heads, case.head_dim)
    k = random(case.seqlen_k, case.num_heads_k, case.head_dim)
    v = random(case.seqlen_k, case.num_heads_k, case.head_dim_v)
    dout = random(case.seqlen_q, case.num_heads, case.head_dim_v)
    for x in (q, k, v):
        x.requires_grad_(case.backward)
    slopes = 2.0 ** (-8.0 / case.num_heads * torch.arange(1.0, case.num_heads + 1, device=device))
    cu_seqlens = torch.tensor([0, *itertools.accumulate(case.seqlens)], dtype=torch.int32, device=device)
    # exp(-30) is less than any type resolves: calls without the sink compute the same, and times do not depend on it.
    sinks = torch.full((case.num_heads,), -30.0, device=device, requires_grad=case.backward)
    optional = slopes if case.alibi else None, cu_seqlens if case.seqlens else None, sinks if case.sinks else None
    return Problem(case, q, k, v, dout, *optional)


def visibility(case: Case) -> Tensor:
    """Boolean (seqlen_q, seqlen_k), True where a query may see a key; aligned at the bottom right."""
    query = torch.arange(case.seqlen_q, device=case.device)[:, None] + case.seqlen_k - case.seqlen_q
    key = torch.arange(case.seqlen_k, device=case.device)[None, :]
    visible = torch.ones(case.seqlen_q, case.seqlen_k, dtype=torch.bool, device=case.device)
    if case.causal:
        visible &= key <= query
    if case.window is not None:
        visible &= key >= query - case.window
    return visible if case.prefix is None else visible | (key < case.prefix)


@dataclass
class Call:
    """A provider's way to compute one case, on inputs in the layout that is natural to it."""

    forward: Callable[[], Tensor]
    inputs: tuple[Tensor, ...]
    dout: Tensor
    name: str = ""  # the provider's, unless it depends on the case
    packed: Callable[[Tensor], Tensor] = lambda out: out  # brings a result into the layout of the problem
    context: Context = contextlib.nullcontext  # entered outside of timed regions
    passes: tuple[str, ...] = PASSES  # that are timed

    def run(self) -> dict[str, Tensor]:
        """out, and dq, dk and dv where the case has a backward pass; in the layout of the problem."""
        with self.context():
            out = self.forward()
            backward = self.inputs[0].requires_grad
            gradients = torch.autograd.grad(out, self.inputs, self.dout) if backward else ()
        results = zip(("out", "dq", "dk", "dv"), (out, *gradients), strict=False)
        return {name: self.packed(x.detach()) for name, x in results}


@dataclass(frozen=True)
class Provider:
    """One way to compute attention."""

    name: str
    make_call: Callable[[Any], Call]  # of the problem; masks and copies too, before the clock starts
    is_for: Callable[[Case], bool] = lambda case: True  # otherwise it is not even listed
    why_not: Callable[[Case], str] = lambda case: ""  # why it is not tried
    devices: tuple[str, ...] = ("cpu", "cuda")
    context: Context = contextlib.nullcontext
    passes: tuple[str, ...] = PASSES
    stage: int = 1  # 2: compiles for long, and is measured when all else is
    computes: bool = True  # attention; otherwise it is timed as a yardstick

    def takes_part(self, case: Case, stage: int) -> bool:
        """Ours and yardsticks in every stage, the others in their own."""
        always = self.name == OURS or not self.computes
        return case.device in self.devices and self.is_for(case) and (always or self.stage == stage)

    def build(self, problem: Problem) -> Call:
        """The call with all that it needs."""
        call = self.make_call(problem)
        return replace(call, name=call.name or self.name, context=self.context, passes=self.passes)
