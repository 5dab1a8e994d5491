"""Do all ranks call with the same arguments? If not, each of them says so: none waits for another until a timeout."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from typing import Any

import torch

from flash_attn import _checks
from flash_attn.context_parallel.ranks import Ranks


def is_wanted(check: bool | None) -> bool:
    """Whether calls are compared: as asked for, or else unless the environment says FLASH_ATTN_CP_CHECK=0."""
    return check if check is not None else os.environ.get("FLASH_ATTN_CP_CHECK", "1") != "0"


def _digest(facts: dict[str, Any], reasons: Sequence[str]) -> int:
    text = repr((sorted(facts.items()), list(reasons)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big", signed=True)


def _difference(name: str, values: list[Any]) -> str:
    ranks: dict[str, list[str]] = {}
    for rank, value in enumerate(values):
        text = str(value) if len(str(value)) <= 120 else str(value)[:117] + "..."
        ranks.setdefault(text, []).append(str(rank))
    got = "; ".join(f"{text} on rank{'s' * (len(on) > 1)} {', '.join(on)}" for text, on in ranks.items())
    return f"{name}: expected the same on every rank, got {got}"


def compare(
    function: str, ranks: Ranks, facts: dict[str, Any], reasons: Sequence[str], length: int, device: torch.device
) -> list[int]:
    """Compare the call of this rank with those of all others, in one small collective.

    Args:
        facts: what must be the same on every rank, by the names of arguments.
        reasons: why this rank rejects its own call.
        length: a number, which may differ.
        device: where the groups communicate.

    Returns:
        The lengths of all ranks.

    Raises:
        ValueError: on every rank, if one of them has reasons, or facts differ.
    """
    own = torch.tensor([_digest(facts, reasons), len(reasons), length], device=device)
    digests, failures, lengths = zip(*ranks.all_gather(own).view(-1, 3).tolist(), strict=True)
    if len(set(digests)) == 1 and reasons:
        _checks.reject(ValueError, function, reasons)
    if len(set(digests)) == 1:
        return list(lengths)
    everywhere = ranks.all_gather_objects((facts, list(reasons)), device)
    found = [f"on rank {rank}: {reason}" for rank, (_, wrong) in enumerate(everywhere) for reason in wrong]
    if not any(failures):
        names = [name for name in facts if len({str(other.get(name)) for other, _ in everywhere}) > 1]
        found = [_difference(name, [other.get(name) for other, _ in everywhere]) for name in names]
    _checks.reject(ValueError, function, found)
