"""Collectives along the first dimension, with and without autograd, for tensor parallel training.

torch.distributed is not accessed on import, so this imports without it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def all_gather_raw(input_: Tensor, process_group: ProcessGroup, async_op: bool = False) -> tuple[Tensor, Any]:
    """Concatenate the inputs of all ranks, without autograd.

    Args:
        input_: (n, ...), the same shape on every rank.
        process_group: the participating ranks.
        async_op: return before completion.

    Returns:
        output: (world_size * n, ...), in rank order.
        handle: with async_op, the work to wait() for before output is read, else None.
    """
    world_size = torch.distributed.get_world_size(process_group)
    output = input_.new_empty(world_size * input_.shape[0], *input_.shape[1:])
    handle = torch.distributed.all_gather_into_tensor(
        output, input_.contiguous(), group=process_group, async_op=async_op
    )
    return output, handle


def reduce_scatter_raw(input_: Tensor, process_group: ProcessGroup, async_op: bool = False) -> tuple[Tensor, Any]:
    """Sum the inputs of all ranks and return this rank's part, without autograd.

    Args:
        input_: (n, ...), the same shape on every rank; world_size divides n.
        process_group: the participating ranks.
        async_op: return before completion.

    Returns:
        output: (n / world_size, ...), consecutive rows of the sum in rank order.
        handle: with async_op, the work to wait() for before output is read, else None.

    Raises:
        ValueError: world_size does not divide n.
    """
    world_size = torch.distributed.get_world_size(process_group)
    if input_.shape[0] % world_size != 0:
        expected = f"expected a first dimension that world_size = {world_size} divides"
        raise ValueError(f"reduce_scatter: input_: {expected}, got shape {tuple(input_.shape)}")
    output = input_.new_empty(input_.shape[0] // world_size, *input_.shape[1:])
    handle = torch.distributed.reduce_scatter_tensor(
        output, input_.contiguous(), group=process_group, async_op=async_op
    )
    return output, handle


def all_reduce_raw(input_: Tensor, process_group: ProcessGroup, async_op: bool = False) -> tuple[Tensor, Any]:
    """Sum the inputs of all ranks, without autograd.

    Args:
        input_: any shape, the same on every rank. A contiguous input is overwritten with the sum.
        process_group: the participating ranks.
        async_op: return before completion.

    Returns:
        output: the sum, in the shape of input_; input_ itself if it is contiguous.
        handle: with async_op, the work to wait() for before output is read, else None.
    """
    output = input_.contiguous()
    handle = torch.distributed.all_reduce(output, group=process_group, async_op=async_op)
    return output, handle


class AllGatherFunc(torch.autograd.Function):
    """all_gather_raw, (n, ...) to (world_size * n, ...). Backward: reduce-scatter of the gradients."""

    @staticmethod
    def forward(ctx: Any, input_: Tensor, process_group: ProcessGroup) -> Tensor:
        """See all_gather_raw."""
        ctx.process_group = process_group
        return all_gather_raw(input_, process_group)[0]

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        """(world_size * n, ...) to (n, ...)."""
        return reduce_scatter_raw(grad_output, ctx.process_group)[0], None


class ReduceScatterFunc(torch.autograd.Function):
    """reduce_scatter_raw, (n, ...) to (n / world_size, ...). Backward: all-gather of the gradients."""

    @staticmethod
    def forward(ctx: Any, input_: Tensor, process_group: ProcessGroup) -> Tensor:
        """See reduce_scatter_raw."""
        ctx.process_group = process_group
        return reduce_scatter_raw(input_, process_group)[0]

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        """(n / world_size, ...) to (n, ...)."""
        return all_gather_raw(grad_output, ctx.process_group)[0], None


class AllReduceFunc(torch.autograd.Function):
    """all_reduce_raw into a new tensor. Backward: identity, since what follows is the same on all ranks, and so is its
    gradient.
    """

    @staticmethod
    def forward(ctx: Any, input_: Tensor, process_group: ProcessGroup) -> Tensor:
        """See all_reduce_raw; input_ is not overwritten."""
        return all_reduce_raw(input_.clone(memory_format=torch.contiguous_format), process_group)[0]

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        """Identity."""
        return grad_output, None


all_gather = AllGatherFunc.apply
reduce_scatter = ReduceScatterFunc.apply
all_reduce = AllReduceFunc.apply


def _marked(model: torch.nn.Module, mark: str) -> list[torch.nn.Parameter]:
    """Parameters whose attribute `mark` is true, sorted by name: the same order on all ranks."""
    marked = {name: parameter for name, parameter in model.named_parameters() if getattr(parameter, mark, False)}
    return [marked[name] for name in sorted(marked)]


@torch.no_grad()
def sync_shared_params(model: torch.nn.Module, process_group: ProcessGroup) -> None:
    """Broadcast the parameters marked `_shared_params` from the first rank of the group."""
    source = torch.distributed.get_process_group_ranks(process_group)[0]
    for parameter in _marked(model, "_shared_params"):
        values = parameter.contiguous()
        torch.distributed.broadcast(values, src=source, group=process_group)
        if values is not parameter:
            parameter.copy_(values)


@torch.no_grad()
def allreduce_sequence_parallel_grad(model: torch.nn.Module, process_group: ProcessGroup) -> None:
    """All-reduce (sum) the gradients of the parameters marked `_sequence_parallel`.

    Each rank processed different tokens of a sequence. A parameter that requires grad but got none counts as 0, because
    all ranks must participate.
    """
    by_type: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for parameter in _marked(model, "_sequence_parallel"):
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            by_type.setdefault((parameter.grad.dtype, parameter.grad.device), []).append(parameter.grad)
    for gradients in by_type.values():
        sums = torch.cat([gradient.flatten() for gradient in gradients])
        torch.distributed.all_reduce(sums, group=process_group)
        for gradient, summed in zip(gradients, sums.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(summed.view(gradient.shape))


def get_dim_for_local_rank(dim: int, world_size: int, local_rank: int, multiple_of: int = 1) -> int:
    """Size of this rank's part of a dimension: a multiple of multiple_of; low ranks may have multiple_of more.

    The parts add up to dim rounded down to a multiple of multiple_of.
    """
    units = dim // multiple_of
    return (units // world_size + int(local_rank < units % world_size)) * multiple_of
