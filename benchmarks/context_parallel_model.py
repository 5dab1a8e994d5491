"""A model on paper of context parallelism: time and memory of one causal attention layer against the number of GPUs.

Nothing of it was measured on more than one GPU. It counts the floating-point operations and the bytes that each method
of flash_attn.context_parallel needs, and divides by the speeds in `Machine`, which are assumptions, each with its
source. `plot_context_parallel.py` prints and draws it; docs/context_parallel.md says what it means.

Sequences are cut zigzag, so every rank has the same share of a causal mask. The batch is one sequence. Lengths are in
tokens, sizes in bytes, times in seconds.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

FLOAT = 4  # bytes of an element of what is summed over ranks: dk and dv
MILLION = 2**20
TABLE = [
    (2**17, 8),
    (2**17, 64),
    (MILLION, 64),
    (MILLION, 512),
    (MILLION, 1024),
    (10 * MILLION, 64),
    (10 * MILLION, 1024),
]


@dataclass(frozen=True)
class Machine:
    """Nodes of H100 SXM GPUs, NVLink within a node and one InfiniBand card for each GPU between nodes.

    NVLink: the data sheet's 900 GB/s per GPU are both directions together. InfiniBand NDR: 400 Gbit/s. Of the 989
    TFLOP/s of dense bfloat16 that the data sheet states, `forward_speed` and `backward_speed` are what our kernels
    reached on an H200, which computes as an H100 does (benchmarks/results/nvidia-h200/gpu.md, causal, 4096 tokens,
    head_dim 128). `link_share` and `overhead` are guesses.
    """

    forward_speed: float = 650e12  # FLOP/s
    backward_speed: float = 500e12
    gpus_per_node: int = 8
    nvlink: float = 450e9  # bytes/s, one direction, per GPU
    infiniband: float = 50e9  # bytes/s, one direction, per GPU
    link_share: float = 0.8  # of both, that transfers reach
    overhead: float = 20e-6  # seconds: launches and latency of a step of the ring, or of a collective

    def link(self, num_ranks: int) -> float:
        """Bytes per second of the slowest link of a group of neighbours."""
        return self.link_share * (self.nvlink if num_ranks <= self.gpus_per_node else self.infiniband)


@dataclass(frozen=True)
class Layer:
    """Attention of Llama 3 70B, in bfloat16."""

    num_heads: int = 64
    num_heads_k: int = 8
    head_dim: int = 128
    element: int = 2  # bytes

    def forward_flops(self, seqlen: int) -> int:
        """Two products of 2 * seqlen^2 * head_dim per head, half of them masked."""
        return 2 * seqlen**2 * self.num_heads * self.head_dim

    def backward_flops(self, seqlen: int) -> int:
        """Five products."""
        return 5 * seqlen**2 * self.num_heads * self.head_dim

    def query_bytes(self, num_tokens: int) -> int:
        """Of q, and so of out, dout and dq."""
        return num_tokens * self.num_heads * self.head_dim * self.element

    def key_bytes(self, num_tokens: int, heads: int | None = None) -> int:
        """Of k and v together, of all key heads or of some."""
        return 2 * num_tokens * (self.num_heads_k if heads is None else heads) * self.head_dim * self.element

    def key_gradient_bytes(self, num_tokens: int) -> int:
        """Of dk and dv together, in the precision they are summed in."""
        return self.key_bytes(num_tokens) // self.element * FLOAT


@dataclass(frozen=True)
class Cost:
    """Of one layer on every rank."""

    forward: float  # seconds
    backward: float  # seconds
    memory: int  # bytes beyond the rank's own shards of inputs, output and gradients: the least that the method needs

    @property
    def seconds(self) -> float:
        """Both passes."""
        return self.forward + self.backward


def ideal(layer: Layer, machine: Machine, seqlen: int, num_ranks: int) -> Cost:
    """Computation alone, evenly shared."""
    forward = layer.forward_flops(seqlen) / machine.forward_speed / num_ranks
    return Cost(forward, layer.backward_flops(seqlen) / machine.backward_speed / num_ranks, 0)


def ring(layer: Layer, machine: Machine, seqlen: int, num_ranks: int) -> Cost:
    """num_ranks blocks of keys, one after the other; the next one travels while this one is computed.

    The rank that gets most counts: under a causal mask rank 0 needs all keys of every other rank, the last one half.
    """
    return _ring(layer, ideal(layer, machine, seqlen, num_ranks), seqlen // num_ranks, num_ranks, machine, num_ranks)


def _ring(layer: Layer, compute: Cost, num_tokens: int, steps: int, machine: Machine, num_ranks: int) -> Cost:
    """Of steps blocks of num_tokens tokens of keys, num_ranks being all that take part."""
    link = machine.link(num_ranks)
    keys, gradients = layer.key_bytes(num_tokens), layer.key_gradient_bytes(num_tokens)
    forward = _overlapped(compute.forward / steps, keys / link, steps, machine.overhead)
    backward = _overlapped(compute.backward / steps, (keys + gradients) / link, steps, machine.overhead)
    if steps > 1:
        backward += gradients / link  # those of the last block have nothing left to hide behind
    # The block that comes, the one in use, and in the backward pass as many gradients of both.
    return Cost(forward, backward, 2 * (keys + gradients) if steps > 1 else 0)


def _overlapped(compute: float, transfer: float, steps: int, overhead: float) -> float:
    """A transfer beside every step of computation but the last."""
    return compute + (steps - 1) * (max(compute, transfer) + overhead)


def all_gather(layer: Layer, machine: Machine, seqlen: int, num_ranks: int) -> Cost:
    """All keys come first, in either pass; every rank's gradients of them go back, where they are added."""
    compute, keys, gradients = ideal(layer, machine, seqlen, num_ranks), layer.key_bytes(seqlen), 0
    gather = scatter = 0.0
    if num_ranks > 1:
        gradients = layer.key_gradient_bytes(seqlen)
        gather = all_gather_seconds(keys, num_ranks, machine)
        scatter = all_to_all(gradients, num_ranks, machine) + machine.overhead
    memory = keys + gradients if num_ranks > 1 else 0
    return Cost(compute.forward + gather, compute.backward + gather + scatter, memory)


def all_gather_seconds(size: int, num_ranks: int, machine: Machine) -> float:
    """Every rank gets size bytes, of which it has its share: once over the network into each node, then NVLink."""
    nodes = math.ceil(num_ranks / machine.gpus_per_node)
    network = size * (1 - 1 / nodes) / machine.gpus_per_node / machine.infiniband
    within = size * (1 - 1 / num_ranks) / machine.nvlink
    return max(network, within) / machine.link_share + machine.overhead


def ulysses(layer: Layer, machine: Machine, seqlen: int, num_ranks: int) -> Cost | None:
    """Heads are scattered and the sequence is gathered, in an all-to-all before and one after. None: too few heads."""
    if layer.num_heads % num_ranks:
        return None
    compute = ideal(layer, machine, seqlen, num_ranks)
    return _with_heads_scattered(compute, layer, machine, seqlen // num_ranks, num_ranks)


def _with_heads_scattered(cost: Cost, layer: Layer, machine: Machine, num_tokens: int, num_ranks: int) -> Cost:
    """The same with all-to-alls among num_ranks ranks around it: two forward, three backward, none for one rank."""
    if num_ranks == 1:
        return cost
    size, gradients = (ulysses_bytes(layer, num_tokens, num_ranks, backward) for backward in (False, True))
    return Cost(
        cost.forward + all_to_all(size, num_ranks, machine) + 2 * machine.overhead,
        cost.backward + all_to_all(gradients, num_ranks, machine) + 3 * machine.overhead,
        cost.memory + size,
    )


def ulysses_bytes(layer: Layer, num_tokens: int, num_ranks: int, backward: bool = False) -> int:
    """What a rank with num_tokens tokens rearranges in one pass: q, k, v and out; or dout, dq, dk and dv.

    A rank needs one head of keys at least: with fewer key heads than ranks they are sent more than once, and their
    gradients are added in float32.
    """
    keys = layer.key_bytes(num_tokens, max(layer.num_heads_k, num_ranks))
    if backward and num_ranks > layer.num_heads_k:
        keys = keys // layer.element * FLOAT
    return 2 * layer.query_bytes(num_tokens) + keys


def all_to_all(size: int, num_ranks: int, machine: Machine) -> float:
    """Seconds in which every rank sends an equal part of size bytes to each: to its own node and beyond it at once."""
    neighbours = min(num_ranks, machine.gpus_per_node)
    within = size * (neighbours - 1) / num_ranks / machine.nvlink
    return max(within, size * (num_ranks - neighbours) / num_ranks / machine.infiniband) / machine.link_share


def ulysses_ring(layer: Layer, machine: Machine, seqlen: int, num_ranks: int) -> Cost | None:
    """Ulysses within every node, and a ring of nodes. None: too few heads."""
    inner = min(num_ranks, machine.gpus_per_node)
    if layer.num_heads % inner:
        return None
    compute, steps = ideal(layer, machine, seqlen, num_ranks), num_ranks // inner
    # After the exchange a rank has inner times the tokens and one inner-th of the heads: a block is as large as before.
    outer = _ring(layer, compute, seqlen // num_ranks, steps, machine, num_ranks)
    return _with_heads_scattered(outer, layer, machine, seqlen // num_ranks, inner)


Method = Callable[[Layer, Machine, int, int], Cost | None]
METHODS: dict[str, Method] = {
    "ring": ring,
    "all_gather": all_gather,
    "ulysses": ulysses,
    "ulysses + ring": ulysses_ring,
}


def hidden_from(layer: Layer, machine: Machine, num_ranks: int, inner: int = 1) -> tuple[float, float]:
    """Tokens per rank from which a ring of num_ranks / inner steps hides its transfers: forward, backward.

    For t tokens per rank, a step computes in proportion to inner * t^2 and moves in proportion to t. inner: ranks of
    Ulysses within every step.
    """
    link = machine.link(num_ranks)
    compute = inner * layer.forward_flops(1) / machine.forward_speed
    compute_backward = inner * layer.backward_flops(1) / machine.backward_speed
    keys, gradients = layer.key_bytes(1), layer.key_gradient_bytes(1)
    return keys / link / compute, (keys + gradients) / link / compute_backward


def length(num_tokens: int) -> str:
    """128k, 1M."""
    return f"{num_tokens // MILLION}M" if num_tokens >= MILLION else f"{num_tokens // 2**10}k"


def duration(seconds: float) -> str:
    """12 ms, 3.4 s."""
    return f"{seconds:.1f} s" if seconds >= 1 else f"{1e3 * seconds:.0f} ms"


def table(layer: Layer, machine: Machine) -> str:
    """Time of one layer, the share of it that is computation, and memory, of every method, as Markdown."""
    lines = ["| tokens | GPUs | " + " | ".join(METHODS) + " |", "|---:|---:|" + "---:|" * len(METHODS)]
    for seqlen, num_ranks in TABLE:
        best = ideal(layer, machine, seqlen, num_ranks).seconds
        cells = []
        for method in METHODS.values():
            cost = method(layer, machine, seqlen, num_ranks)
            if cost is None:
                cells.append("too few heads")
            else:
                share = best / cost.seconds
                cells.append(f"{duration(cost.seconds)}, {share:.0%}, {cost.memory / 1e9:.2f} GB")
        lines.append(f"| {length(seqlen)} | {num_ranks} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def thresholds(layer: Layer, machine: Machine) -> str:
    """From how many tokens per GPU on transfers of the ring are hidden, as Markdown."""
    lines = ["| ring | forward | backward |", "|---|---:|---:|"]
    for name, num_ranks, inner in (
        ("within a node", 8, 1),
        ("across nodes", 64, 1),
        ("of nodes, Ulysses within each", 64, 8),
    ):
        forward, backward = hidden_from(layer, machine, num_ranks, inner)
        lines.append(f"| {name} | {forward:,.0f} | {backward:,.0f} |")
    return "\n".join(lines)
