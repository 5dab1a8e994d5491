"""A small byte-level GPT. The attention module is a parameter, so that two models differ in nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from flash_attn import flash_attn_with_kvcache
from flash_attn.flash_attention import FlashMHA

NUM_BYTES = 256


@dataclass(frozen=True)
class GPTConfig:
    """Model size."""

    context: int = 256  # context length, in bytes
    width: int = 128
    num_layers: int = 4
    num_heads: int = 2


def plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal softmax(q k^T / sqrt(d)) v in plain operations: it stores [seqlen, seqlen] matrices.

    q, k, v and the result are [batch_size, seqlen, num_heads, head_dim], as in flash_attn_func.
    """
    seqlen, head_dim = q.shape[1], q.shape[3]
    scores = torch.einsum("bihd,bjhd->bhij", q * head_dim**-0.5, k)
    future = torch.ones(seqlen, seqlen, dtype=torch.bool, device=q.device).triu(1)
    weights = scores.masked_fill(future, -math.inf).softmax(dim=-1)
    return torch.einsum("bhij,bjhd->bihd", weights, v)


class PlainMHA(nn.Module):
    """Plain attention with the parameters, names and return values of FlashMHA."""

    def __init__(self, embed_dim: int, num_heads: int, bias: bool = True, causal: bool = True):
        super().__init__()
        if not causal:
            raise ValueError("causal: expected True, got False")
        self.num_heads = num_heads
        self.Wqkv = nn.Linear(embed_dim, 3 * embed_dim, bias=bias)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """[batch_size, seqlen, embed_dim] to the same shape, and None for the weights."""
        q, k, v = rearrange(self.Wqkv(x), "b s (three h d) -> three b s h d", three=3, h=self.num_heads)
        return self.out_proj(rearrange(plain_attention(q, k, v), "b s h d -> b s (h d)")), None


ATTENTION: dict[str, Callable[..., FlashMHA | PlainMHA]] = {"flash": FlashMHA, "plain": PlainMHA}


class Block(nn.Module):
    """One pre-norm transformer layer: causal self-attention, then a two-layer MLP."""

    def __init__(self, config: GPTConfig, attention: str):
        super().__init__()
        width = config.width
        self.norm1 = nn.LayerNorm(width)
        self.attention = ATTENTION[attention](width, config.num_heads, bias=False, causal=True)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, cache: Tensor | None = None, start: int = 0) -> Tensor:
        """[batch_size, seqlen, width] to the same shape. With a cache, x is what follows the first `start` tokens."""
        h = self.norm1(x)
        x = x + (self.attention(h)[0] if cache is None else self.attend_to_cache(h, cache, start))
        return x + self.mlp(self.norm2(x))

    def attend_to_cache(self, h: Tensor, cache: Tensor, start: int) -> Tensor:
        """What self.attention computes, with the keys and values of earlier tokens from the cache. New ones go there.

        cache: [2, batch_size, capacity, num_heads, head_dim], of which `start` rows are filled.
        """
        k_cache, v_cache = cache
        q, k, v = rearrange(self.attention.Wqkv(h), "b s (three h d) -> three b s h d", three=3, d=cache.shape[-1])
        out = flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=start, causal=True)
        return self.attention.out_proj(rearrange(out, "b s h d -> b s (h d)"))


def sinusoids(context: int, width: int) -> Tensor:
    """Fixed position embeddings [context, width]: sines and cosines of wavelengths from 2 pi to 2000 pi."""
    frequencies = torch.exp(-math.log(1000.0) * torch.arange(width // 2) / (width // 2))
    angles = torch.arange(context)[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class GPT(nn.Module):
    """Maps bytes [batch_size, seqlen] to logits of the next byte [batch_size, seqlen, 256]."""

    position: Tensor

    def __init__(self, config: GPTConfig, attention: str, seed: int):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(NUM_BYTES, config.width)
        self.register_buffer("position", 0.5 * sinusoids(config.context, config.width), persistent=False)
        self.blocks = nn.ModuleList(Block(config, attention) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, NUM_BYTES, bias=False)
        self._initialise(seed)

    def _initialise(self, seed: int) -> None:
        """Weights that depend only on the seed and the parameter names, not on the attention module."""
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in sorted(self.named_parameters()):
            if name == "embedding.weight":
                nn.init.normal_(parameter, std=0.5, generator=generator)
            elif parameter.dim() == 2:
                std = parameter.shape[1] ** -0.5
                if name.endswith(("out_proj.weight", "mlp.2.weight")):  # projections into the residual stream
                    std /= math.sqrt(2 * self.config.num_layers)
                nn.init.normal_(parameter, std=0.02 if name == "head.weight" else std, generator=generator)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, tokens: Tensor, cache: Tensor | None = None, start: int = 0) -> Tensor:
        """tokens [batch_size, seqlen] to logits of the next byte, [batch_size, seqlen, 256].

        With a cache, tokens are only those that follow the first `start` ones, whose keys and values it holds.
        """
        x = self.embedding(tokens) + self.position[start : start + tokens.shape[1]]
        for layer, block in enumerate(self.blocks):
            x = block(x, None if cache is None else cache[layer], start)
        return self.head(self.norm(x))

    def new_cache(self, capacity: int, batch_size: int = 1) -> Tensor:
        """An empty cache for `capacity` tokens: [num_layers, 2, batch_size, capacity, num_heads, head_dim]."""
        config, weight = self.config, self.embedding.weight
        heads = (config.num_heads, config.width // config.num_heads)
        mixed = torch.is_autocast_enabled(weight.device.type)
        dtype = torch.get_autocast_dtype(weight.device.type) if mixed else weight.dtype
        return torch.empty(config.num_layers, 2, batch_size, capacity, *heads, dtype=dtype, device=weight.device)

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats per byte."""
        return F.cross_entropy(self(tokens).float().flatten(0, 1), targets.flatten())
