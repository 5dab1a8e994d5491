"""FlashAttention: exact attention that never writes the seqlen_q x seqlen_k matrix to memory.

Dao et al., "FlashAttention: Fast and Memory-Efficient Exact Attention with IO-Awareness", 2022.
Dao, "FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning", 2023.
"""

from pkgutil import extend_path

__path__ = extend_path(__path__, __name__)

from flash_attn import _flops  # noqa: F401  for torch.utils.flop_counter
from flash_attn._absent import explain_absent_modules
from flash_attn._explain import Explanation, explain
from flash_attn._library import build_info
from flash_attn._version import __version__
from flash_attn.flash_attn_interface import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)
from flash_attn.merge import merge_attention_states

explain_absent_modules()

__all__ = [
    "Explanation",
    "__version__",
    "build_info",
    "explain",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "merge_attention_states",
]
