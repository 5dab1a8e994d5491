"""Who is measured: one way to compute a case, and what all of them share."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from harness.cases import DTYPES, Case

OURS = "ours"
TOLERANCE = {"fp32": 1e-4, "bf16": 4e-2, "fp16": 1e-2, "fp64": 1e-10}  # of outputs of the size of 1


@dataclass
class Implementation:
    """A way to compute one case, on inputs in the layout that is natural to it."""

    name: str
    forward: Callable[[], Tensor]
    inputs: tuple[Tensor, ...]
    dout: Tensor
    backend: SDPBackend | None = None
    packed: Callable[[Tensor], Tensor] = lambda out: out  # brings the output into the layout of ours, to compare

    def run(self) -> None:
        """The forward, and the backward when the inputs want gradients."""
        out = self.forward()
        if self.inputs[0].requires_grad:
            torch.autograd.grad(out, self.inputs, self.dout)

    def context(self) -> contextlib.AbstractContextManager:
        """Chooses torch's backend; entered outside of the timed region."""
        return contextlib.nullcontext() if self.backend is None else sdpa_kernel(self.backend)


def works(peer: Implementation) -> bool:
    """Whether torch accepts the combination of backend, device, type and options."""
    try:
        with warnings.catch_warnings(), peer.context():
            warnings.simplefilter("ignore")
            peer.run()
    except (RuntimeError, ValueError, TypeError, AttributeError):
        return False
    return True


def disagreement(case: Case, ours: Implementation, peer: Implementation) -> str:
    """Empty when both compute the same thing; otherwise a sentence."""
    if case.dropout_p:
        return ""
    with torch.no_grad(), peer.context():
        difference = (peer.packed(peer.forward()).double() - ours.forward().double()).abs().max().item()
    if difference <= TOLERANCE[case.dtype]:
        return ""
    return f"{case.name}: outputs of ours and {peer.name} differ by {difference:.1e}"


def torch_backends(device: str) -> dict[str, SDPBackend]:
    """Every SDPA backend that a build of torch may have for this kind of device."""
    backends = {"torch flash": SDPBackend.FLASH_ATTENTION, "torch math": SDPBackend.MATH}
    if device == "cuda":
        backends |= {"torch cudnn": SDPBackend.CUDNN_ATTENTION, "torch efficient": SDPBackend.EFFICIENT_ATTENTION}
    return backends


def random_tensor(case: Case, device: str, *shape: int, grad: bool | None = None) -> Tensor:
    """Normal random data; it wants a gradient when the case has a backward."""
    tensor = torch.randn(shape, dtype=DTYPES[case.dtype], device=device)
    return tensor.requires_grad_(case.backward if grad is None else grad)


def visibility(case: Case, device: str) -> Tensor:
    """Boolean (seqlen_q, seqlen_k), True where a query may see a key; aligned at the bottom right."""
    query = torch.arange(case.seqlen_q, device=device)[:, None] + case.seqlen_k - case.seqlen_q
    key = torch.arange(case.seqlen_k, device=device)[None, :]
    visible = torch.ones(case.seqlen_q, case.seqlen_k, dtype=torch.bool, device=device)
    if case.causal:
        visible &= key <= query
    if case.window is not None:
        visible &= key >= query - case.window
    return visible
