"""Context parallelism: attention over sequences that are cut into shards, one for each rank of a process group.

Attention is exactly that of one device, for all masks, scores and dropout, forward and backward. For example, in each
of the processes that torchrun starts:

    group = torch.distributed.group.WORLD
    q, k, v = (shard(x, 1, group) for x in (q, k, v))  # (batch_size, seqlen, ...) -> (batch_size, local_seqlen, ...)
    out = unshard(context_parallel_attention(q, k, v, group=group, causal=True), 1, group)

A model runs on shards of its tokens, positions and labels. The gradients of its parameters are then those of the loss
of a shard, to be summed over the ranks. DistributedDataParallel and fully_shard average them instead: multiply the loss
by the number of ranks.
"""

from flash_attn.context_parallel.attention import context_parallel_attention
from flash_attn.context_parallel.sharding import shard, unshard

__all__ = ["context_parallel_attention", "shard", "unshard"]
