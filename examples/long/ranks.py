"""The processes that share a sequence, and what each of them holds of it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from flash_attn.context_parallel import shard
from gpt.machine import choose_device


@dataclass(frozen=True)
class Ranks:
    """This process among all that share a sequence, and how they share it."""

    group: dist.ProcessGroup
    device: torch.device
    method: str
    layout: str

    @property
    def rank(self) -> int:
        """Of this process."""
        return dist.get_rank(self.group)

    @property
    def size(self) -> int:
        """How many processes there are."""
        return dist.get_world_size(self.group)

    def part(self, x: Tensor, dim: int) -> Tensor:
        """This rank's part of x, which every rank has whole."""
        return shard(x, dim, self.group, self.layout)

    def sum_gradients(self, model: nn.Module) -> None:
        """Replace every gradient by its sum over ranks, in one exchange."""
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat, group=self.group)
        for gradient, total in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
            gradient.copy_(total.view_as(gradient))

    def total(self, x: Tensor) -> float:
        """The sum over ranks of a number."""
        x = x.detach().clone()
        dist.all_reduce(x, group=self.group)
        return x.item()

    def gather(self, number: float) -> list[float]:
        """The number of every rank."""
        numbers = torch.zeros(self.size, dtype=torch.float64, device=self.device)
        numbers[self.rank] = number
        dist.all_reduce(numbers, group=self.group)
        return numbers.tolist()


def num_cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def join(device: str, method: str, layout: str) -> Iterator[Ranks]:
    """Meet the other processes that torchrun started. Without torchrun this process is alone."""
    chosen = choose_device(device)
    if chosen.type == "cuda":
        chosen = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(chosen)
    else:
        torch.set_num_threads(max(1, num_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    backend = "nccl" if chosen.type == "cuda" else "gloo"
    if dist.is_torchelastic_launched():
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield Ranks(cast(dist.ProcessGroup, dist.group.WORLD), chosen, method, layout)
    finally:
        dist.destroy_process_group()
