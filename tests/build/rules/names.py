"""One word per concept."""

import ast
import re

from .source import Findings, Source, is_include

SYNONYMS = {
    word: right
    for right, words in {
        "batch_size": "batchsize bsz",
        "seqlen_q": "seq_len_q len_q",
        "seqlen_k": "seqlen_kv seq_len_k len_k kv_len seqlen_key",
        "max_seqlen_k": "max_seqlen_kv",
        "cu_seqlens_k": "cu_seqlens_kv",
        "num_heads": "nheads n_heads num_head nhead n_head heads_q num_heads_q",
        "num_heads_k": "nheads_k nheads_kv num_head_k num_head_kv num_heads_kv num_kv_heads n_kv_heads h_k",
        "head_dim": "hdim headdim head_size d_head dim_head hd",
        "head_dim_v": "hdim_v headdim_v head_size_v",
        "softmax_scale": "sm_scale attn_scale scale_softmax",
        "softmax_lse": "logsumexp log_sum_exp",
        "dsoftmax_sum": "dpsum",
        "dropout_p": "p_dropout dropout_prob dropout_rate",
        "block_table": "page_table block_tables",
        "page_size": "page_block_size",
        "causal": "is_causal",
        "window_size": "sliding_window local_window",
        "softcap": "soft_cap logit_cap",
    }.items()
    for word in words.split()
}
# Argument names of the public API of flash_attn 2.8.3, and those of transformers and torch.
PUBLIC_NAMES = {
    "flash_attn/modules/mha.py": {"num_heads_kv", "nheads"},
    "flash_attn/layers/rotary.py": {"num_heads_q"},
    "flash_attn/integrations/_transformers_attention.py": {"sliding_window", "is_causal"},
    "flash_attn/integrations/sdpa.py": {"is_causal"},
    "flash_attn_2_cuda.py": {"p_dropout", "is_causal"},
}


def synonyms_in_cpp(source: Source) -> Findings:
    for number, line in enumerate(source.cpp_code, 1):
        for word in re.findall(r"\w+", "" if is_include(line) else line):
            if word in SYNONYMS:
                yield number, f"{word}: say {SYNONYMS[word]}"


def synonyms_in_python(source: Source) -> Findings:
    """Checks definitions only: keywords of calls are names chosen by the callee."""
    for node in ast.walk(source.tree):
        name = None
        if isinstance(node, ast.arg):
            name = node.arg
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            name = node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            name = node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            name = node.attr
        if name in SYNONYMS and name not in PUBLIC_NAMES.get(source.path, ()):
            yield node.lineno, f"{name}: say {SYNONYMS[name]}"
