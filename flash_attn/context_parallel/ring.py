"""Keys and values travel while the blocks that are here are computed. See plan.py for who sends what to whom."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flash_attn.context_parallel.blocks import Block, Blocks, float_type
from flash_attn.context_parallel.layout import slot_lengths, slot_of
from flash_attn.context_parallel.plan import Pair, Step, make_plan
from flash_attn.merge import merge_attention_states

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass
class Parcel:
    """Keys and values of some slots, or their gradients, one after another in one buffer: k and v of a slot, ..."""

    buffer: Tensor
    k: dict[int, Tensor]
    v: dict[int, Tensor]

    @classmethod
    def empty(cls, k: Tensor, v: Tensor, lengths: dict[int, int], dtype: torch.dtype) -> Parcel:
        """An uninitialised parcel for slots with these numbers of rows; other dimensions are those of k and v."""
        shapes = {slot: [[*x.shape[:-3], length, *x.shape[-2:]] for x in (k, v)] for slot, length in lengths.items()}
        sizes = [torch.Size(shape).numel() for pair in shapes.values() for shape in pair]
        buffer = torch.empty(sum(sizes), dtype=dtype, device=k.device)
        parts = iter(buffer.split(sizes)) if sizes else iter(())
        views = {slot: [next(parts).view(shape) for shape in pair] for slot, pair in shapes.items()}
        return cls(buffer, {s: pair[0] for s, pair in views.items()}, {s: pair[1] for s, pair in views.items()})

    def part(self, slots: Iterable[int]) -> Tensor:
        """The part of the buffer with these slots, which are next to each other."""
        wanted = [x for slot in slots for x in (self.k[slot], self.v[slot])]
        if not wanted:
            return self.buffer[:0]
        return self.buffer.narrow(0, wanted[0].storage_offset(), sum(x.numel() for x in wanted))

    def add(self, slot: int, dk: Tensor, dv: Tensor) -> None:
        """Add to the gradients of a slot."""
        self.k[slot] += dk
        self.v[slot] += dv


@dataclass
class Return:
    """Gradients on their way: those computed here, which must stay in memory, and those computed elsewhere."""

    departing: Parcel
    home: Parcel
    works: list[Any]

    def add_to(self, own: Parcel) -> None:
        """Wait for them, and add those that arrive."""
        for work in self.works:
            work.wait()
        for slot in self.home.k:
            own.add(slot, self.home.k[slot], self.home.v[slot])


class Ring:
    """Attention of one rank of a ring. A ring of one rank communicates with nobody."""

    def __init__(self, blocks: Blocks, group: ProcessGroup):
        self.blocks = blocks
        self.group = group
        self.cut, self.rank = blocks.cut, blocks.rank
        self.plan = make_plan(blocks.cut, blocks.mask, blocks.rank)

    def _slots(self, x: Tensor, dim: int = -3) -> list[Tensor]:
        """Views of the local rows x, by slot."""
        return [slot_of(x, self.cut, self.rank, slot, dim) for slot in self.cut.slots]

    def _block(self, step: Step, pair: Pair) -> Block:
        return Block(pair.q_slot, (self.cut, step.source, pair.k_slot), pair.used)

    def _exchange(self, sent: Tensor, target: int, received: Tensor, source: int) -> list[Any]:
        """Start to send and to receive, each unless it is empty."""
        distributed = torch.distributed
        operations = []
        if sent.numel() > 0:
            operations.append(distributed.P2POp(distributed.isend, sent, group=self.group, group_peer=target))
        if received.numel() > 0:
            operations.append(distributed.P2POp(distributed.irecv, received, group=self.group, group_peer=source))
        return distributed.batch_isend_irecv(operations) if operations else []

    def _lengths(self, rank: int, slots: Iterable[int]) -> dict[int, int]:
        lengths = slot_lengths(self.cut, rank)
        return {slot: lengths[slot] for slot in slots}

    def _pack(self, k: Tensor, v: Tensor) -> Parcel:
        """This rank's keys and values that somebody needs."""
        slots = sorted({slot for step in self.plan for slot in step.sent})
        parcel = Parcel.empty(k, v, self._lengths(self.rank, slots), k.dtype)
        for slot in slots:
            parcel.k[slot].copy_(slot_of(k, self.cut, self.rank, slot))
            parcel.v[slot].copy_(slot_of(v, self.cut, self.rank, slot))
        return parcel

    def _visits(self, k: Tensor, v: Tensor) -> Iterator[tuple[Step, dict[int, Tensor], dict[int, Tensor]]]:
        """Every step with the keys and values that it needs, by slot; those of the next step travel meanwhile."""
        own = self._pack(k, v)

        def fetch(step: Step) -> tuple[Parcel, list[Any]]:
            arriving = Parcel.empty(k, v, self._lengths(step.source, step.received), k.dtype)
            return arriving, self._exchange(own.part(step.sent), step.target, arriving.buffer, step.source)

        works: list[Any] = []
        arriving = Parcel(own.buffer, dict(enumerate(self._slots(k))), dict(enumerate(self._slots(v))))
        for step, following in zip(self.plan, [*self.plan[1:], None], strict=True):
            here = arriving
            for work in works:
                work.wait()
            if following is not None:
                arriving, works = fetch(following)
            yield step, here.k, here.v

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """out, softmax_lse and what backward needs, for this rank's rows."""
        queries = self._slots(q)
        states: dict[int, tuple[Tensor, Tensor]] = {}
        for step, keys, values in self._visits(k, v):
            for pair in step.pairs:
                block = self._block(step, pair)
                before = states.get(pair.q_slot)
                inputs = queries[pair.q_slot], keys[pair.k_slot], values[pair.k_slot]
                state = self.blocks.forward(*inputs, block, with_sinks=before is None)
                states[pair.q_slot] = state if before is None else merge_attention_states(*before, *state)
        out = q.new_zeros(*q.shape[:-1], v.shape[-1])
        lse_shape = (*q.shape[:-3], q.shape[-2], q.shape[-3])
        softmax_lse = torch.full(lse_shape, -torch.inf, dtype=float_type(q), device=q.device)
        for slot, (part, part_lse) in states.items():
            self._slots(out)[slot].copy_(part)
            self._slots(softmax_lse, -1)[slot].copy_(part_lse)
        return out, softmax_lse, (q, k, v, out, softmax_lse)

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk and dv in float_type. What others contribute to dk and dv comes back, and is added step by step."""
        kind = float_type(q)
        rows = list(zip(*map(self._slots, (dout, q, out)), self._slots(softmax_lse, -1), strict=True))
        dq = torch.zeros_like(q, dtype=kind)
        own = Parcel.empty(k, v, self._lengths(self.rank, self.cut.slots), kind)
        own.buffer.zero_()
        returning: list[Return] = []
        for step, keys, values in self._visits(k, v):
            grads = own
            if step is not self.plan[0]:
                grads = Parcel.empty(k, v, self._lengths(step.source, step.received), kind)
                grads.buffer.zero_()
            for pair in step.pairs:
                dout_rows, q_rows, out_rows, lse_rows = rows[pair.q_slot]
                inputs = q_rows, keys[pair.k_slot], values[pair.k_slot], out_rows, lse_rows
                part, dk, dv = self.blocks.backward(dout_rows, *inputs, self._block(step, pair))
                self._slots(dq)[pair.q_slot].add_(part)
                grads.add(pair.k_slot, dk, dv)
            while returning:
                returning.pop().add_to(own)
            if step is not self.plan[0]:
                home = Parcel.empty(k, v, self._lengths(self.rank, step.sent), kind)
                works = self._exchange(grads.buffer, step.source, home.buffer, step.target)
                returning.append(Return(grads, home, works))
        while returning:
            returning.pop().add_to(own)
        dims = k.dim() - 3
        return dq, torch.cat(list(own.k.values()), dims), torch.cat(list(own.v.values()), dims)
