"""Rotary embeddings by complex multiplication in float64."""

import torch


def rotated(x, angle, interleaved=False, scale=1.0):
    """Rotate x (..., seqlen, heads, head_dim) by angle (..., seqlen, rotary_dim / 2): each pair is a complex number."""
    half = angle.shape[-1]
    first, second = (
        (x[..., 0 : 2 * half : 2], x[..., 1 : 2 * half : 2]) if interleaved else x[..., : 2 * half].chunk(2, -1)
    )
    turned = torch.complex(first, second) * torch.polar(torch.ones_like(angle), angle)[..., None, :] * scale
    pairs = (turned.real, turned.imag)
    new = torch.stack(pairs, dim=-1).flatten(-2) if interleaved else torch.cat(pairs, dim=-1)
    return torch.cat([new, x[..., 2 * half :]], dim=-1)


def frequencies(dim, base=10000.0):
    return base ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
