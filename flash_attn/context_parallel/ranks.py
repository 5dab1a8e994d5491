"""The processes that share a sequence: one process group, or two that span a grid of ranks."""

from __future__ import annotations

import contextlib
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flash_attn import _checks

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# The devices on which a group has had a collective of all its ranks.
_connected: weakref.WeakKeyDictionary[ProcessGroup, set[torch.device]] = weakref.WeakKeyDictionary()


def all_gather_flat(x: Tensor, group: ProcessGroup) -> Tensor:
    """Concatenate (n,) tensors of equal size of all ranks, in their order."""
    distributed = torch.distributed
    # Has another name since torch 2.13.
    gather = getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor
    gathered = x.new_empty(distributed.get_world_size(group) * x.numel())
    gather(gathered, x.contiguous(), group=group)
    return gathered


@dataclass(frozen=True)
class Ranks:
    """One group, or the pair (ulysses, ring).

    Rank u of its ulysses group and w of its ring group is number w * U + u of all, U being the size of a ulysses group:
    the ranks of a ulysses group have neighbouring pieces of the sequence.
    """

    groups: tuple[ProcessGroup, ...]
    sizes: tuple[int, ...]
    coordinates: tuple[int, ...]

    @property
    def size(self) -> int:
        """The number of all ranks."""
        return self.sizes[0] * (self.sizes[1] if len(self.sizes) > 1 else 1)

    @property
    def index(self) -> int:
        """The number of this rank among all."""
        return self.coordinates[0] + (self.coordinates[1] * self.sizes[0] if len(self.sizes) > 1 else 0)

    def all_gather(self, x: Tensor) -> Tensor:
        """Concatenate (n,) tensors of equal size of all ranks, in their order."""
        for group, size in zip(self.groups, self.sizes, strict=True):
            x = all_gather_flat(x, group) if size > 1 else x
        return x

    def all_gather_objects(self, value: Any, device: torch.device) -> list[Any]:
        """Any values of all ranks, in their order. They are pickled: not for what is fast."""
        values = [value]
        # torch sends them from the current device, which need not be that of this rank.
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            for group, size in zip(self.groups, self.sizes, strict=True):
                gathered: list[Any] = [None] * size
                torch.distributed.all_gather_object(gathered, values, group=group)
                values = [value for part in gathered for value in part]
        return values

    def broadcast(self, x: Tensor) -> Tensor:
        """The tensor of the first rank, written into x on all others."""
        for group, size in zip(self.groups, self.sizes, strict=True):
            if size > 1:
                torch.distributed.broadcast(x, group=group, group_src=0)
        return x

    def is_new(self, device: torch.device) -> bool:
        """Whether this is the first call of these groups on a device, which must begin with a collective of all ranks.

        NCCL connects the ranks of a group in its first operation, in which all of them must take part. A ring need not:
        a rank whose neighbours want nothing sends nothing.
        """
        known = [_connected.setdefault(group, set()) for group in self.groups]
        is_new = any(device not in devices for devices in known)
        for devices in known:
            devices.add(device)
        return is_new


def _group_of(function: str, value: Any) -> list[ProcessGroup] | None:
    """The groups of an argument `group`; None if it is of no kind known."""
    distributed = torch.distributed
    if isinstance(value, distributed.ProcessGroup):
        return [value]
    if isinstance(value, distributed.DeviceMesh):
        return [value.get_group(dim) for dim in range(value.ndim)]
    is_pair = isinstance(value, (tuple, list)) and len(value) == 2
    if is_pair and all(isinstance(group, distributed.ProcessGroup) for group in value):
        return list(value)
    return None


def resolve(function: str, group: Any, counts: tuple[int, ...] = (1, 2)) -> Ranks:
    """The ranks of an argument `group`.

    Raises:
        RuntimeError: torch has no torch.distributed.
        TypeError: neither a ProcessGroup nor a DeviceMesh nor a pair of ProcessGroups.
        ValueError: another number of groups, or dimensions of the mesh, than one of counts.
    """
    if not torch.distributed.is_available():
        raise RuntimeError(f"{function}: expected a build of torch with torch.distributed, got torch without it")
    groups = _group_of(function, group)
    if groups is None:
        expected = "a ProcessGroup of which this process is a member, a DeviceMesh or a pair of ProcessGroups"
        _checks.reject(TypeError, function, [f"group: expected {expected}, got {_checks.describe(group)}"])
    if len(groups) not in counts:
        one, two = "one group or a 1-D mesh", "two groups or a 2-D mesh for method ('ulysses', 'ring')"
        wanted = f"{one}, or {two}" if len(counts) == 2 else one if counts == (1,) else two
        _checks.reject(ValueError, function, [f"group: expected {wanted}, got {len(groups)}"])
    sizes = tuple(torch.distributed.get_world_size(group) for group in groups)
    coordinates = tuple(torch.distributed.get_rank(group) for group in groups)
    return Ranks(tuple(groups), sizes, coordinates)
