"""Text, one byte at a time: with a cache of keys and values, or with the whole forward pass for every byte."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from gpt.model import GPT

Choose = Callable[[Tensor], int]  # logits [256] to the next byte


def sampler(temperature: float, seed: int, top_k: int | None = None) -> Choose:
    """Chooses the likeliest byte at temperature 0, otherwise a random one, among all or the top_k likeliest."""
    generator = torch.Generator().manual_seed(seed)

    def choose(logits: Tensor) -> int:
        logits = logits.float().cpu()
        if temperature == 0:
            return int(logits.argmax())
        if top_k is not None:
            logits = logits.masked_fill(logits < logits.topk(top_k).values[-1], -math.inf)
        return int(torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator))

    return choose


@torch.no_grad()
def with_cache(model: GPT, prompt: bytes, num_bytes: int, choose: Choose) -> Iterator[int]:
    """Computes every byte once: first the prompt as a whole, then one byte at a time."""
    cache = model.new_cache(len(prompt) + num_bytes)
    tokens, start = torch.tensor([list(prompt)], device=cache.device), 0
    for _ in range(num_bytes):
        byte = choose(model(tokens, cache, start)[0, -1])
        start += tokens.shape[1]
        tokens = torch.tensor([[byte]], device=cache.device)
        yield byte


@torch.no_grad()
def without_cache(model: GPT, prompt: bytes, num_bytes: int, choose: Choose) -> Iterator[int]:
    """Computes everything again for every byte; of a text longer than the context, the last part."""
    text = list(prompt)
    for _ in range(num_bytes):
        window = torch.tensor([text[-model.config.context :]], device=model.embedding.weight.device)
        text.append(choose(model(window)[0, -1]))
        yield text[-1]


@torch.no_grad()
def gap(model: GPT, text: bytes, other: bytes) -> float:
    """Of two texts the difference in logits of the first bytes in which they differ: tiny if rounding decided."""
    place = next((i for i, (a, b) in enumerate(zip(text, other, strict=True)) if a != b), None)
    if place is None:
        return 0.0
    logits = model(torch.tensor([list(text[:place])], device=model.embedding.weight.device))[0, -1].float()
    return abs(float(logits[text[place]] - logits[other[place]]))
