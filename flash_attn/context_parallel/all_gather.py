"""Every rank gathers all keys and values, and computes attention of its queries to them."""

from __future__ import annotations

import torch
from torch import Tensor

from flash_attn.context_parallel.blocks import Block, Blocks, float_type
from flash_attn.context_parallel.layout import Cut, all_ranks, local_length, reorder, slot_of
from flash_attn.context_parallel.ranks import Ranks
from flash_attn.context_parallel.sharding import gather_rows


def sum_of_parts(x: Tensor, cut: Cut, ranks: Ranks) -> Tensor:
    """This rank's rows of the sum over all ranks of x, whose rows (total, ...) are the whole.

    Added in the order of the ranks, so that it is the same in every run: a reduce-scatter may add in any order.
    """
    x = reorder(x, 0, ((cut.whole(), 0),), all_ranks(cut))
    if cut.num_ranks == 1:
        return x
    row = x[:1].numel() if len(x) > 0 else 0
    sent = [local_length(cut, rank) * row for rank in range(cut.num_ranks)]
    mine = sent[ranks.index]
    received = x.new_empty(cut.num_ranks * mine)
    torch.distributed.all_to_all_single(received, x.reshape(-1), [mine] * cut.num_ranks, sent, group=ranks.groups[0])
    parts = received.view(cut.num_ranks, local_length(cut, ranks.index), *x.shape[1:])
    total = parts[0] + parts[1]  # of its own memory
    for part in parts[2:]:
        total += part
    return total


class AllGather:
    """Attention of one rank. Its memory for keys, values and their gradients is that of the whole sequence.

    A slot of queries is one call: the kernels leave out what the mask hides.
    """

    def __init__(self, blocks: Blocks, ranks: Ranks):
        self.ranks = ranks
        self.cut, self.rank = blocks.cut, blocks.rank
        self.blocks = blocks

    def _block(self, slot: int) -> Block:
        return Block(slot, (self.cut.whole(), 0, 0))

    def _gather(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values, in their order."""
        widths = [k.shape[-2] * k.shape[-1], v.shape[-2] * v.shape[-1]]
        rows = torch.cat([k.flatten(-2), v.flatten(-2)], -1).movedim(-2, 0)
        gathered = gather_rows(rows, self.cut, self.ranks).movedim(0, -2)
        whole_k, whole_v = gathered.split(widths, -1)
        return whole_k.unflatten(-1, k.shape[-2:]), whole_v.unflatten(-1, v.shape[-2:])

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """out, softmax_lse and what backward needs, for this rank's rows."""
        whole_k, whole_v = self._gather(k, v)
        outs, lses = [], []
        for slot in self.cut.slots:
            queries, block = slot_of(q, self.cut, self.rank, slot), self._block(slot)
            out, softmax_lse = self.blocks.forward(
                *(queries, whole_k, whole_v, block), with_sinks=True, float_results=False
            )
            outs.append(out)
            lses.append(softmax_lse)
        joined, joined_lse = torch.cat(outs, -3), torch.cat(lses, -1)
        return joined, joined_lse, (q, k, v, joined, joined_lse)

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk and dv, in float_type."""
        whole_k, whole_v = self._gather(k, v)
        dqs: list[Tensor] = []
        dk, dv = (torch.zeros_like(x, dtype=float_type(q)) for x in (whole_k, whole_v))
        for slot in self.cut.slots:
            dout_rows, q_rows, out_rows = (slot_of(x, self.cut, self.rank, slot) for x in (dout, q, out))
            lse_rows = slot_of(softmax_lse, self.cut, self.rank, slot, -1)
            part, part_dk, part_dv = self.blocks.backward(
                *(dout_rows, q_rows, whole_k, whole_v, out_rows, lse_rows, self._block(slot))
            )
            dqs.append(part)
            dk += part_dk
            dv += part_dv
        widths = [k.shape[-2] * k.shape[-1], v.shape[-2] * v.shape[-1]]
        rows_of_both = torch.cat([dk.flatten(-2), dv.flatten(-2)], -1).movedim(-2, 0)
        local = sum_of_parts(rows_of_both, self.cut, self.ranks).movedim(0, -2)
        local_dk, local_dv = local.split(widths, -1)
        return torch.cat(dqs, -3), local_dk.unflatten(-1, k.shape[-2:]), local_dv.unflatten(-1, v.shape[-2:])
