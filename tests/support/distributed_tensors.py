"""DTensors for tests: made of plain tensors, put together again, and compared."""

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, distribute_tensor

from distributed_world import group_of


def mesh_of(size):
    """The mesh of the first `size` ranks."""
    return DeviceMesh.from_group(group_of(size), "cpu")


def distributed(x, mesh, placements):
    """A leaf, cut, that requires grad if x does."""
    return distribute_tensor(x.detach(), mesh, placements).requires_grad_(x.requires_grad)


def whole(x):
    """The tensor that all ranks have together."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def assert_near(found, expected, tolerance=1e-12):
    """Two lists of tensors."""
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
