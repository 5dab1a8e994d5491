"""Tensors with the same values and different memory layouts."""

import torch


def _in_padded(t: torch.Tensor, *padding: int) -> torch.Tensor:
    """t as a view into a larger tensor of NaN, with `padding` extra elements at the end of each dimension."""
    larger = t.new_full([n + p for n, p in zip(t.shape, padding, strict=True)], torch.nan)
    view = larger[tuple(slice(0, n) for n in t.shape)]
    return view.copy_(t)


def _permuted(t: torch.Tensor, order: tuple[int, ...]) -> torch.Tensor:
    """t stored with its dimensions permuted."""
    back = [order.index(i) for i in range(t.dim())]
    return t.permute(order).contiguous().permute(back)


def _at_offset(t: torch.Tensor, offset: int, gap: int) -> torch.Tensor:
    """t at a storage offset, with `gap` elements between consecutive rows of head_dim."""
    width = t.shape[-1] + gap
    storage = t.new_full((offset + t[..., 0].numel() * width,), torch.nan)
    return storage[offset:].view(*t.shape[:-1], width)[..., : t.shape[-1]].copy_(t)


def _packed(t: torch.Tensor, slot: int, slots: int, dim: int) -> torch.Tensor:
    """t as one of several slices of a packed tensor."""
    shape = list(t.shape)
    shape.insert(t.dim() + dim + 1, slots)
    return t.new_full(shape, torch.nan).select(dim, slot).copy_(t)


def _every_second(t: torch.Tensor, dim: int) -> torch.Tensor:
    shape = list(t.shape)
    shape[dim] *= 2
    index = [slice(None)] * t.dim()
    index[dim] = slice(1, None, 2)
    return t.new_full(shape, torch.nan)[tuple(index)].copy_(t)


def _last_dim_transposed(t: torch.Tensor) -> torch.Tensor:
    return t.transpose(-1, -2).contiguous().transpose(-1, -2)


# Layouts without overlapping elements: they can also be written.
WRITABLE = {
    "heads before rows": lambda t: _permuted(t, (0, 2, 1, 3)),
    "rows before batches": lambda t: _permuted(t, (1, 0, 2, 3)),
    "heads first": lambda t: _permuted(t, (2, 0, 1, 3)),
    "rows of a longer tensor": lambda t: _in_padded(t, 0, 3, 0, 0),
    "heads of a wider tensor": lambda t: _in_padded(t, 0, 0, 1, 0),
    "columns of a wider tensor, aligned": lambda t: _in_padded(t, 0, 0, 0, -t.shape[-1] % 16),
    "a slice of every dimension": lambda t: _in_padded(t, 1, 2, 3, 5),
    "odd storage offset": lambda t: _at_offset(t, offset=1, gap=0),
    "odd row stride": lambda t: _at_offset(t, offset=3, gap=1),
    "first of kv": lambda t: _packed(t, 0, 2, -3),
    "last of qkv": lambda t: _packed(t, 2, 3, -3),
    "interleaved with another head by head": lambda t: _packed(t, 1, 2, -2),
    "every second row": lambda t: _every_second(t, -3),
    "every second element": lambda t: _every_second(t, -1),
    "last dimension not contiguous": _last_dim_transposed,
}
# Layouts with overlapping (expanded) elements: the values are made equal.
SHARED = {
    "one head for all": lambda t: t[..., :1, :].expand_as(t),
    "one sequence for all": lambda t: t[:1].expand_as(t),
    "one row for all": lambda t: t[:, :1].expand_as(t),
    "one element for all of a row": lambda t: t[..., :1].expand_as(t),
    "one element for everything": lambda t: t.flatten()[:1].view([1] * t.dim()).expand_as(t),
}
LAYOUTS = {**WRITABLE, **SHARED}
