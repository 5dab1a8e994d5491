"""What a call of MHA with inference_params writes and sees: reads and checks inference_params and key_padding_mask."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from flash_attn._checks import check_padding_mask, describe, integers, reject
from flash_attn.modules.inner_attention import CrossAttention, FlashCrossAttention


def check_call(
    params: Any, layer_idx: Any, attention: FlashCrossAttention | CrossAttention, refused: dict[str, Any]
) -> None:
    """Check that MHA and its call have what a cache takes, and nothing refused: options that are not None or False."""
    names = ("max_seqlen", "max_batch_size", "seqlen_offset", "batch_size_offset", "key_value_memory_dict")
    if missing := [name for name in names if not hasattr(params, name)]:
        expected = "an object with the attributes of flash_attn.utils.generation.InferenceParams"
        got = f"{describe(params)} without {', '.join(missing)}"
        reject(TypeError, "MHA", [f"inference_params: expected {expected}, got {got}"])
    reasons = [
        f"{name}: expected {False if value is True else None}, as inference_params is given, got {describe(value)}"
        for name, value in refused.items()
        if value is not None and value is not False
    ]
    if layer_idx is None:
        reasons.append("layer_idx: expected the key of this layer's cache, as inference_params is given, got None")
    if attention.training and attention.drop.p > 0:
        expected = "0 in training, as inference_params is given (eval() turns dropout off)"
        reasons.append(f"dropout: expected {expected}, got {attention.drop.p}")
    if reasons:
        reject(ValueError, "MHA", reasons)


def refuse_gradients(*tensors: Tensor | None) -> None:
    """Raise ValueError if any of the tensors needs a gradient: caches pass none on."""
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        expected = "None unless in torch.no_grad() or torch.inference_mode(), as caches pass no gradients on"
        got = "one, with x, weights or a cache that require grad"
        reject(ValueError, "MHA", [f"inference_params: expected {expected}, got {got}"])


class Step(NamedTuple):
    """The rows of the cache that one call writes, seqlen of them from offset on, and sees, those before end."""

    first: int  # index in the cache of the first sequence of the call
    batch_size: int
    seqlen: int
    capacity: int  # rows of the cache
    offset: Any  # int, or (batch_size,), int32; a negative one skips its sequence

    @property
    def end(self) -> Any:
        """int, or (batch_size, 1); 0 for skipped sequences."""
        if not isinstance(self.offset, Tensor):
            return self.offset + self.seqlen
        end = (self.offset + self.seqlen).clamp(max=self.capacity)
        return end.masked_fill(self.offset < 0, 0)[:, None]

    def new_rows(self, device: torch.device) -> Tensor:
        """The rows to write where lengths differ, (batch_size, seqlen); negative for skipped sequences."""
        rows = self.offset[:, None] + torch.arange(self.seqlen, device=device)
        return rows.masked_fill(self.offset[:, None] < 0, -1)


def can_read(x: Tensor) -> bool:
    """Whether Python may look at the values of x."""
    return not (torch.compiler.is_compiling() or x.is_meta)


def allocate_cache(
    batch_size: int, max_seqlen: int, num_heads_k: int, head_dim: int, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """An uninitialised cache, (batch_size, max_seqlen, 2, num_heads_k, head_dim)."""
    with torch.inference_mode(False):  # so that calls outside of inference mode may write to it
        return torch.empty(batch_size, max_seqlen, 2, num_heads_k, head_dim, device=device, dtype=dtype)


def find_cache(params: Any, layer_idx: int | None, kv: Tensor) -> Tensor | None:
    """The cache of the layer, checked; None if there is none yet."""
    cache = params.key_value_memory_dict.get(layer_idx)
    if cache is None:
        return None
    name = f"inference_params.key_value_memory_dict[{layer_idx}]"
    if not isinstance(cache, Tensor):
        reject(TypeError, "MHA", [f"{name}: expected torch.Tensor, got {describe(cache)}"])
    has_dtype = cache.dtype == kv.dtype or torch.is_autocast_enabled(kv.device.type)
    if cache.shape[2:] != kv.shape[2:] or cache.device != kv.device or not has_dtype:
        shape = f"(batch_size, max_seqlen, 2, num_heads_kv={kv.shape[3]}, head_dim={kv.shape[4]})"
        got = f"{tuple(cache.shape)}, {cache.dtype}, on {cache.device}"
        reject(ValueError, "MHA", [f"{name}: expected shape {shape}, {kv.dtype}, on {kv.device}, got {got}"])
    return cache


def _check_lengths(lengths: Any, batch_size: int, seqlen: int, capacity: int, device: torch.device) -> list[str]:
    name = "inference_params.lengths_per_sample"
    if not isinstance(lengths, Tensor):
        reject(TypeError, "MHA", [f"{name}: expected torch.Tensor or None, got {describe(lengths)}"])
    is_integer = lengths.dtype in (torch.int32, torch.int64)
    if lengths.dim() != 1 or lengths.shape[0] < batch_size or not is_integer or lengths.device != device:
        expected = f"shape (at least batch_size={batch_size},), torch.int32, on {device}"
        return [f"{name}: expected {expected}, got {tuple(lengths.shape)}, {lengths.dtype}, on {lengths.device}"]
    if device.type != "cpu" or not can_read(lengths):
        return []
    limit, expected = capacity - seqlen, f"at most max_seqlen={capacity} - seqlen={seqlen}"
    return [
        f"{name}[{b}]: expected {expected}, got {length}"
        for b, length in enumerate(lengths[:batch_size].tolist())
        if length > limit
    ]


def read_step(params: Any, cache: Tensor | None, kv: Tensor) -> Step:
    """Read offsets and lengths, and check that kv, (batch_size, seqlen, ...), fits into the cache."""
    batch_size, seqlen = kv.shape[:2]
    sizes = (params.max_batch_size, params.max_seqlen) if cache is None else cache.shape[:2]
    max_batch_size, capacity = integers("MHA", max_batch_size=sizes[0], max_seqlen=sizes[1])
    (first,) = integers("MHA", batch_size_offset=params.batch_size_offset)
    reasons = []
    if first < 0 or first + batch_size > max_batch_size:
        expected = f"from 0 to max_batch_size={max_batch_size} - batch_size={batch_size}"
        reasons.append(f"inference_params.batch_size_offset: expected {expected}, got {first}")
    lengths = getattr(params, "lengths_per_sample", None)
    if lengths is None:
        (offset,) = integers("MHA", seqlen_offset=params.seqlen_offset)
        if offset < 0 or offset + seqlen > capacity:
            expected = f"from 0 to max_seqlen={capacity} - seqlen={seqlen}"
            reasons.append(f"inference_params.seqlen_offset: expected {expected}, got {offset}")
    else:
        reasons += _check_lengths(lengths, batch_size, seqlen, capacity, kv.device)
    if reasons:
        reject(ValueError, "MHA", reasons)
    if lengths is not None:
        offset = lengths[:batch_size].to(torch.int32)
    return Step(first, batch_size, seqlen, capacity, offset)


def read_mask(mask: Any, step: Step, looks_back: bool) -> tuple[Tensor | None, Tensor | None]:
    """Read key_padding_mask. Tokens that only look back see no padding after the last token.

    Returns:
        keep: (batch_size, rows), which rows of the cache hold tokens; None if all before the end do.
        leftpad: (batch_size,), int32, how many rows to hide before the first token, if no others need to be hidden;
            None if others do, or may do.
    """
    if mask is None:
        return None, None
    end = step.end
    keep = check_padding_mask("MHA", mask, step.batch_size, *_width_of_mask(mask, step))
    if not can_read(keep):
        return keep, None
    row = torch.arange(keep.shape[1], device=keep.device)
    tokens = keep & (row < end)
    padding = ~keep & (row < end)
    leading = (~tokens).cumprod(dim=1).sum(dim=1, keepdim=True)
    hidden = padding & (row >= leading)
    if looks_back:
        hidden = hidden & (tokens.flip(1).cumsum(dim=1).flip(1) > 0)
    has_padding, needs_more = torch.stack([padding.any(), hidden.any()]).tolist()
    if not has_padding:
        return None, None
    return keep, None if needs_more else leading[:, 0].to(torch.int32)


def _width_of_mask(mask: Any, step: Step) -> tuple[Any, str]:
    """The number of columns of key_padding_mask, and what it is called in errors."""
    end = step.end
    if not isinstance(end, Tensor):
        return end, "key_padding_mask (of all tokens up to seqlen_offset + seqlen)"
    width = mask.shape[1] if isinstance(mask, Tensor) and mask.dim() == 2 else step.seqlen
    if can_read(end) and end.numel() > 0:
        width = max(width, int(end.max()))
    return width, "key_padding_mask (of all tokens up to the largest of lengths_per_sample + seqlen)"


def of_new_rows(keep: Tensor, step: Step) -> Tensor:
    """Which tokens of x are no padding, (batch_size, seqlen)."""
    if not isinstance(step.offset, Tensor):
        return keep[:, step.offset :]
    return keep.gather(1, step.new_rows(keep.device).clamp(0, keep.shape[1] - 1))
