"""The demo's GPT on a part of each sequence."""

from __future__ import annotations

from typing import cast

from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from flash_attn.context_parallel import context_parallel_attention
from flash_attn.flash_attention import FlashMHA
from gpt.model import GPT, GPTConfig
from long.ranks import Ranks


class ContextParallelMHA(nn.Module):
    """FlashMHA of sequences of seqlen tokens, of which each rank has a part. It takes the parameters of `whole`."""

    def __init__(self, whole: FlashMHA, seqlen: int, ranks: Ranks):
        super().__init__()
        self.num_heads, self.seqlen, self.ranks = whole.num_heads, seqlen, ranks
        self.Wqkv, self.out_proj = whole.Wqkv, whole.out_proj

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """[batch_size, this rank's tokens, embed_dim] to the same shape, and None for the weights."""
        q, k, v = rearrange(self.Wqkv(x), "b s (three h d) -> three b s h d", three=3, h=self.num_heads)
        ranks = self.ranks
        out = context_parallel_attention(
            q, k, v, group=ranks.group, method=ranks.method, layout=ranks.layout, seqlen=self.seqlen, causal=True
        )
        return self.out_proj(rearrange(out, "b s h d -> b s (h d)")), None


class LongGPT(GPT):
    """GPT whose sequences are cut over ranks; without ranks, the demo's with FlashMHA. The parameters are the same."""

    def __init__(self, config: GPTConfig, seed: int, ranks: Ranks | None = None):
        super().__init__(config, "flash", seed)
        if ranks is not None:
            for block in self.blocks:
                block.attention = ContextParallelMHA(cast(FlashMHA, block.attention), config.context, ranks)

    def total_loss(self, tokens: Tensor, targets: Tensor, positions: Tensor) -> Tensor:
        """Sum of the cross-entropies, in nats.

        tokens, targets: this rank's part, [batch_size, part]; positions, [part]: where in the sequence that is.
        """
        x = self.embedding(tokens) + self.position[positions]
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x)).float()
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
