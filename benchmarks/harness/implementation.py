"""Who is measured: one way to compute a case, and what all of them share."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from harness.cases import DTYPES, Case
from harness.failures import device_is_lost, reason

OURS = "ours"
PASSES = ("forward", "backward", "both")

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


@dataclass
class Implementation:
    """A way to compute one case, on inputs in the layout that is natural to it."""

    name: str
    forward: Callable[[], Tensor]
    inputs: tuple[Tensor, ...]
    dout: Tensor
    backend: SDPBackend | None = None
    packed: Callable[[Tensor], Tensor] = lambda out: out  # brings a result into the layout of ours, to compare

    passes: ClassVar[tuple[str, ...]] = PASSES  # that are timed

    def run(self) -> None:
        """The forward, and the backward when the inputs want gradients."""
        out = self.forward()
        if self.inputs[0].requires_grad:
            torch.autograd.grad(out, self.inputs, self.dout)

    def context(self) -> contextlib.AbstractContextManager:
        """Chooses torch's backend; entered outside of the timed region."""
        return contextlib.nullcontext() if self.backend is None else sdpa_kernel(self.backend)


def why_not(each: Implementation) -> str:
    """Empty if it can compute the case here, forward and backward; otherwise the reason."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            with each.context():
                each.run()
        except Exception as error:
            if device_is_lost(error):
                raise RuntimeError(f"{each.name}: {error}") from error
            return _explained(reason(error), [str(warning.message) for warning in caught])
    return ""


def _explained(text: str, said: Sequence[str]) -> str:
    """torch says only in warnings why a backend cannot."""
    if "No available kernel" not in text:
        return text
    known = [each.partition(" (Triggered")[0].strip() for each in said]
    reasons = [each for each in known if "runtime disabled" not in each and not each.endswith("because:")]
    return reason(ValueError(" ".join(dict.fromkeys(reasons)) or text))


def works(peer: Implementation) -> bool:
    """Whether torch accepts the combination of backend, device, type and options."""
    return not why_not(peer)


def reference_of(peers: Sequence[Implementation]) -> Implementation | None:
    """The peer that is taken to be right; None without peers."""
    for name in REFERENCES:
        for peer in peers:
            if peer.name.startswith(name):
                return peer
    return peers[0] if peers else None


def results_of(each: Implementation) -> dict[str, Tensor]:
    """out, and dq, dk and dv where the case has a backward pass; in the layout of ours."""
    with each.context():
        out = each.forward()
        backward = each.inputs[0].requires_grad
        gradients = torch.autograd.grad(out, each.inputs, each.dout) if backward else ()
    names = ("out", "dq", "dk", "dv")[: 1 + len(gradients)]
    return {name: each.packed(x.detach()) for name, x in zip(names, (out, *gradients), strict=True)}


def distance(result: Tensor, expected: Tensor) -> float:
    """||result - expected|| / ||expected||, the largest over the heads and every 128 rows; NaN if there is one."""

    def squares(x: Tensor) -> Tensor:
        rows = x.double().square().sum(-1).flatten(0, -2)  # (rows, heads)
        return torch.stack([block.sum(0) for block in rows.split(ROWS)])

    smallest = torch.finfo(torch.float64).tiny
    ratios = squares(result.double() - expected.double()) / squares(expected).clamp_min(smallest)
    return ratios.max().sqrt().item()


def differences(case: Case, results: dict[str, Tensor], expected: dict[str, Tensor], names: str) -> list[str]:
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


def disagreement(case: Case, ours: Implementation, peer: Implementation) -> str:
    """Empty when both compute the same thing; otherwise a sentence."""
    return "; ".join(differences(case, results_of(ours), results_of(peer), f"{ours.name} and {peer.name}"))


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
