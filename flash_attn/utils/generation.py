"""State of decoding token by token: the caches of keys and values of all layers, and how far they are filled."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class InferenceParams:
    """State of decoding, shared by all layers: MHA takes it as inference_params. The caller moves it on.

    Args:
        max_seqlen: number of rows per sequence of caches that are allocated.
        max_batch_size: number of sequences of caches that are allocated.
        seqlen_offset: number of tokens in the caches. Add the seqlen of x to it after each step.
        batch_size_offset: index in the caches of the first sequence of x.
        key_value_memory_dict: the cache of each layer, by its layer_idx: (max_batch_size, max_seqlen, 2, num_heads_kv,
            head_dim). MHA allocates what is missing. Rows that are not in use may hold anything.
        lengths_per_sample: (at least batch_size,), int32: number of tokens of each sequence of x in the caches, in
            place of seqlen_offset; negative: the sequence is skipped, nothing is written, and its attention is 0.
    """

    max_seqlen: int
    max_batch_size: int
    seqlen_offset: int = 0
    batch_size_offset: int = 0
    key_value_memory_dict: dict[int, Tensor] = field(default_factory=dict)
    lengths_per_sample: Tensor | None = None

    def reset(self, max_seqlen: int, max_batch_size: int) -> None:
        """Begin new sequences: set both sizes, and the offset and lengths to 0. Caches are kept."""
        self.max_seqlen = max_seqlen
        self.max_batch_size = max_batch_size
        self.seqlen_offset = 0
        if self.lengths_per_sample is not None:
            self.lengths_per_sample.zero_()
