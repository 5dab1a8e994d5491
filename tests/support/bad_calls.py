"""Valid calls of the ops, for each argument the invalid values that must be rejected, and what the errors must say."""

import math
import re

import torch

DTYPE = torch.float32
NO_MASK = {"causal": False, "window_size_left": -1, "window_size_right": -1, "attention_chunk": 0}
POLICY = {
    "alibi_slopes": None, "softmax_scale": None, **NO_MASK, "softcap": 0.0, "dropout_p": 0.0,
    "rng_state": torch.tensor([3, 4]), "q_start": None, "k_start": None, "q_starts": None, "k_starts": None,
    "head_start": 0, "total_heads": None, "float_results": False, "s_aux": None, "key_ranges": None,
}  # fmt: skip
DENSE_LENGTHS = {
    "cu_seqlens_q": None, "cu_seqlens_k": None, "max_seqlen_q": 0, "max_seqlen_k": 0, "seqused_k": None,
    "leftpad_k": None,
}  # fmt: skip


def rows(*shape, dtype=DTYPE):
    return torch.ones(shape, dtype=dtype)


def ints(*values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype)


def dense() -> dict:
    """fwd: batch_size 2, seqlen_q 5, seqlen_k 7, 4 heads of q and 2 of k, head_dim 8, head_dim_v 6."""
    tensors = {"q": rows(2, 5, 4, 8), "k": rows(2, 7, 2, 8), "v": rows(2, 7, 2, 6)}
    return {**tensors, **DENSE_LENGTHS, "block_table": None, **POLICY}


def varlen() -> dict:
    """fwd: two sequences of 2 and 3 queries, 3 and 4 keys; one unused row at the end of q, k and v."""
    tensors = {"q": rows(6, 4, 8), "k": rows(8, 2, 8), "v": rows(8, 2, 6)}
    lengths = {"cu_seqlens_q": ints(0, 2, 5), "cu_seqlens_k": ints(0, 3, 7), "max_seqlen_q": 3, "max_seqlen_k": 4}
    return {**dense(), **tensors, **lengths}


def paged() -> dict:
    """fwd: the sequences of varlen with paged keys: a pool of 5 pages of 2 rows."""
    tensors = {"k": rows(5, 2, 2, 8), "v": rows(5, 2, 2, 6), "block_table": ints([0, 1, 0], [2, 4, 0])}
    return {**varlen(), **tensors}


def into() -> dict:
    """fwd.out for the inputs of dense."""
    return {**dense(), "out": rows(2, 5, 4, 6)}


def varlen_into() -> dict:
    """fwd.out for the inputs of varlen."""
    return {**varlen(), "out": rows(6, 4, 6)}


def backward() -> dict:
    """bwd.out for the inputs of dense."""
    grads = {"dq": rows(2, 5, 4, 8), "dk": rows(2, 7, 2, 8), "dv": rows(2, 7, 2, 6)}
    results = {"dout": rows(2, 5, 4, 6), "dlse": None, "out": rows(2, 5, 4, 6), "softmax_lse": rows(2, 4, 5)}
    return {**dense(), **results, **grads, "deterministic": False}


def varlen_backward() -> dict:
    """bwd.out for the inputs of varlen."""
    grads = {"dq": rows(6, 4, 8), "dk": rows(8, 2, 8), "dv": rows(8, 2, 6)}
    results = {"dout": rows(6, 4, 6), "dlse": None, "out": rows(6, 4, 6), "softmax_lse": rows(4, 6)}
    return {**varlen(), **results, **grads, "deterministic": False}


def probs() -> dict:
    """attn_probs for the inputs of dense."""
    call = dense()
    del call["v"]
    return {**call, "softmax_lse": rows(2, 4, 5)}


CALLS = {
    "dense": (dense, "fwd", "flash_attn_func: "),
    "varlen": (varlen, "fwd", "flash_attn_varlen_func: "),
    "paged": (paged, "fwd", "flash_attn_varlen_func: "),
    "into": (into, "fwd.out", "flash_attn_func: "),
    "varlen_into": (varlen_into, "fwd.out", "flash_attn_varlen_func: "),
    "backward": (backward, "bwd.out", "flash_attn backward: "),
    "varlen_backward": (varlen_backward, "bwd.out", "flash_attn varlen backward: "),
    "probs": (probs, "attn_probs", "flash_attn attn_probs: "),
}


def op_of(call: str):
    """The op that a call uses."""
    packet, _, overload = CALLS[call][1].partition(".")
    return getattr(getattr(torch.ops.flash_attn, packet), overload or "default")


def assert_lists(text: str, prefix: str, reasons: list) -> None:
    """One line for one reason; otherwise the number of reasons and one line each. (argument, expected, got): parts."""
    lines = text.splitlines()
    if len(reasons) == 1:
        assert len(lines) == 1, text
        found = [lines[0].removeprefix(prefix)]
    else:
        assert lines[0] == f"{prefix}{len(reasons)} problems:", text
        assert all(line.startswith("  - ") for line in lines[1:]), text
        found = [line[4:] for line in lines[1:]]
    assert text.startswith(prefix), text
    for argument, expected, got in reasons:
        pattern = f"{re.escape(argument)}: expected .*{re.escape(expected)}.*, got .*{re.escape(got)}"
        assert any(re.fullmatch(pattern + ".*", line) for line in found), f"{pattern}\n{text}"


# (call, changed arguments, [(argument, part of the expected text, part of the received text)])
SHAPES = [
    ("dense", {"q": rows(2, 5, 4, 8, dtype=torch.int32)}, [("q, k, v", "one dtype among", "int32")]),
    ("dense", {"k": rows(2, 7, 2, 8, dtype=torch.bfloat16)}, [("q, k, v", "one dtype among", "bfloat16")]),
    ("dense", {"v": rows(2, 7, 2, 6, dtype=torch.float64)}, [("q, k, v", "one dtype among", "v float64")]),
    ("dense", {"q": rows(2, 5, 8)}, [("q", "(batch_size, seqlen_q, num_heads, head_dim)", "(2, 5, 8)")]),
    ("dense", {"q": torch.ones(())}, [("q", "(batch_size, seqlen_q, num_heads, head_dim)", "()")]),
    ("dense", {"k": rows(2, 7, 8)}, [("k", "(batch_size=2, seqlen_k, num_heads_k, head_dim=8)", "(2, 7, 8)")]),
    ("dense", {"k": rows(3, 7, 2, 8)}, [("k", "batch_size=2", "(3, 7, 2, 8)")]),
    ("dense", {"k": rows(2, 7, 2, 9)}, [("k", "head_dim=8", "(2, 7, 2, 9)")]),
    ("dense", {"v": rows(1, 7, 2, 6)}, [("v", "batch_size=2", "(1, 7, 2, 6)")]),
    ("dense", {"v": rows(2, 6, 2, 6)}, [("v", "seqlen_k=7", "(2, 6, 2, 6)")]),
    ("dense", {"v": rows(2, 7, 1, 6)}, [("v", "num_heads_k=2", "(2, 7, 1, 6)")]),
    ("dense", {"q": rows(2, 5, 3, 8)}, [("k", "divides num_heads=3", "2")]),
    ("dense", {"q": rows(2, 5, 0, 8)}, [("q", "num_heads", "0")]),
    ("dense", {"k": rows(2, 7, 0, 8), "v": rows(2, 7, 0, 6)}, [("k", "num_heads_k", "0")]),
    ("dense", {"q": rows(2, 5, 4, 0), "k": rows(2, 7, 2, 0)}, [("q", "head_dim from 1 to 512", "0")]),
    ("dense", {"q": rows(2, 5, 4, 513), "k": rows(2, 7, 2, 513)}, [("q", "head_dim from 1 to 512", "513")]),
    ("dense", {"v": rows(2, 7, 2, 513)}, [("v", "head_dim_v from 1 to 512", "513")]),
    ("dense", {"v": rows(2, 7, 2, 0)}, [("v", "head_dim_v from 1 to 512", "0")]),
    ("dense", {"q": rows(1, 1, 1, 8).expand(1, 2**30, 1, 8), "k": rows(1, 7, 1, 8), "v": rows(1, 7, 1, 6)},
     [("q", "seqlen_q", str(2**30))]),
    *[("dense", {"dropout_p": p}, [("dropout_p", "[0, 1)", "")]) for p in (-0.1, 1.0, 1.5, math.nan, math.inf)],
    *[("dense", {"softcap": x}, [("softcap", "finite", "")]) for x in (math.nan, math.inf, 1e39, 1e-39, 1e-46)],
    *[("dense", {"softmax_scale": x}, [("softmax_scale", "finite", "")])
      for x in (0.0, -0.1, math.nan, math.inf, 1e39, 2.5e38, 1e-39)],
    ("dense", {"softmax_scale": 1e20, "softcap": 1e-20}, [("softcap", "softmax_scale=1e+20 can be divided", "1e-20")]),
    ("dense", {"softmax_scale": 1e-20, "softcap": 1e20}, [("softcap", "softmax_scale=1e-20 can be divided", "1e+20")]),
    ("dense", {"attention_chunk": -1}, [("attention_chunk", "a number of keys, or 0", "-1")]),
    ("dense", {"q_start": -1}, [("q_start", "at least 0", "-1")]),
    ("dense", {"k_start": 2**30 - 262}, [("k_start", "all of the sequence below 2^30-256", str(2**30 - 262))]),
    ("varlen", {"k_start": 2**30 - 259}, [("k_start", "all of the sequence below 2^30-256", str(2**30 - 259))]),
    ("dense", {"q_start": 2**40}, [("q_start", "below 2^30-256", str(2**40))]),
    ("dense", {"q_start": 33, "k_start": 31, "dropout_p": 0.1},
     [("q_start", "a multiple of 32, as dropout_p is above 0", "33"), ("k_start", "a multiple of 32", "31")]),
    ("dense", {"q_starts": ints(1, 2, 3)}, [("q_start", "(batch_size=2,)", "(3,)")]),
    ("varlen", {"k_starts": ints(1, 2, dtype=torch.int64)}, [("k_start", "int32", "int64")]),
    ("dense", {"q_start": 3, "q_starts": ints(1, 2)}, [("q_start", "None, as starts of each sequence", "3")]),
    ("dense", {"head_start": -1}, [("head_start", "at least 0", "-1")]),
    ("dense", {"head_start": 2**63 - 1}, [("head_start", "below 2^30", str(2**63 - 1))]),
    ("dense", {"head_start": 1}, [("total_heads", "at least head_start + num_heads = 5", "4")]),
    ("dense", {"total_heads": 2**30}, [("total_heads", "below 2^30", str(2**30))]),
    ("dense", {"total_heads": 3}, [("total_heads", "at least head_start + num_heads = 4", "3")]),
    ("backward", {"float_results": True, "dk": rows(2, 7, 2, 8, dtype=torch.float64)}, [("dk", "float32", "float64")]),
    ("dense", {"alibi_slopes": rows(3)}, [("alibi_slopes", "(num_heads=4,) or (batch_size=2, num_heads=4)", "(3,)")]),
    ("dense", {"alibi_slopes": rows(3, 4)}, [("alibi_slopes", "(batch_size=2, num_heads=4)", "(3, 4)")]),
    ("dense", {"alibi_slopes": rows(2, 4, 1)}, [("alibi_slopes", "(num_heads=4,)", "(2, 4, 1)")]),
    ("dense", {"alibi_slopes": rows(4, dtype=torch.float64)}, [("alibi_slopes", "float32", "float64")]),
    ("dense", {"s_aux": rows(3)}, [("s_aux", "(num_heads=4,)", "(3,)")]),
    ("dense", {"s_aux": rows(4, 1)}, [("s_aux", "(num_heads=4,)", "(4, 1)")]),
    ("varlen", {"s_aux": ints(1, 2, 3, 4)}, [("s_aux", "float32, float64, bfloat16 or float16", "int32")]),
    ("dense", {"key_ranges": ints(1, 2)}, [("key_ranges", "(batch_size=2, seqlen_q=5, 2)", "(2,)")]),
    ("dense", {"key_ranges": rows(3, 5, 2, dtype=torch.int32)},
     [("key_ranges", "(batch_size=2, seqlen_q=5, 2) or (1, seqlen_q=5, 2)", "(3, 5, 2)")]),
    ("dense", {"key_ranges": rows(1, 5, 3, dtype=torch.int32)}, [("key_ranges", "(1, seqlen_q=5, 2)", "(1, 5, 3)")]),
    ("dense", {"key_ranges": rows(2, 5, 2, dtype=torch.int64)}, [("key_ranges", "int32", "int64")]),
    ("varlen", {"key_ranges": rows(5, 2, dtype=torch.int32)}, [("key_ranges", "(total_q=6, 2)", "(5, 2)")]),
    ("backward", {"s_aux": rows(5)}, [("s_aux", "(num_heads=4,)", "(5,)")]),
    ("dense", {"dropout_p": 0.1, "rng_state": None}, [("rng_state", "int64", "None")]),
    ("dense", {"dropout_p": 0.1, "rng_state": ints(1, 2)}, [("rng_state", "int64", "int32")]),
    ("dense", {"dropout_p": 0.1, "rng_state": ints(1, dtype=torch.int64)}, [("rng_state", "2", "(1,)")]),
    ("dense", {"block_table": ints([0, 1], [2, 3])}, [("block_table", "None", "a tensor")]),
    ("dense", {"seqused_k": ints(1)}, [("seqused_k", "(batch_size=2,)", "(1,)")]),
    ("dense", {"seqused_k": ints(1, 2, dtype=torch.int64)}, [("seqused_k", "int32", "int64")]),
    ("dense", {"leftpad_k": ints(1, 2, 3)}, [("leftpad_k", "(batch_size=2,)", "(3,)")]),
    ("dense", {"leftpad_k": rows(2)}, [("leftpad_k", "int32", "float32")]),
    ("varlen", {"q": rows(2, 3, 4, 8)}, [("q", "(total_q, num_heads, head_dim)", "(2, 3, 4, 8)")]),
    ("varlen", {"k": rows(8, 2, 7)}, [("k", "(total_k, num_heads_k, head_dim=8)", "(8, 2, 7)")]),
    ("varlen", {"v": rows(7, 2, 6)}, [("v", "total_k=8", "(7, 2, 6)")]),
    ("varlen", {"cu_seqlens_q": ints(0, 2, 5, dtype=torch.int64)}, [("cu_seqlens_q", "int32", "int64")]),
    ("varlen", {"cu_seqlens_k": rows(3)}, [("cu_seqlens_k", "int32", "float32")]),
    ("varlen", {"cu_seqlens_k": ints(0, 3, 5, 7)}, [("cu_seqlens_k", "(batch_size+1=3,)", "(4,)")]),
    ("varlen", {"cu_seqlens_q": ints([0, 2, 5])}, [("cu_seqlens_q", "(batch_size+1,)", "(1, 3)")]),
    ("varlen", {"cu_seqlens_q": ints(), "cu_seqlens_k": ints()},
     [("cu_seqlens_q", "(batch_size+1,)", "(0,)"), ("cu_seqlens_k", "(batch_size+1,)", "(0,)")]),
    ("varlen", {"max_seqlen_q": -1}, [("max_seqlen_q", "at least 0", "-1")]),
    ("varlen", {"max_seqlen_k": 2**30}, [("max_seqlen_k", "below 2^30", str(2**30))]),
    ("varlen", {"cu_seqlens_q": None}, [("cu_seqlens_q", "a tensor", "None")]),
    ("varlen", {"cu_seqlens_k": None}, [("cu_seqlens_k", "a tensor", "None")]),
    ("paged", {"block_table": ints([0, 1, 0])}, [("block_table", "(batch_size=2, max_pages)", "(1, 3)")]),
    ("paged", {"block_table": ints(0, 1)}, [("block_table", "(batch_size=2, max_pages)", "(2,)")]),
    ("paged", {"block_table": torch.zeros(2, 3)}, [("block_table", "int32", "float32")]),
    ("paged", {"k": rows(8, 2, 8)}, [("k", "(num_pages, page_size, num_heads_k, head_dim=8)", "(8, 2, 8)")]),
    ("paged", {"v": rows(5, 3, 2, 6)}, [("v", "page_size=2", "(5, 3, 2, 6)")]),
    ("paged", {"v": rows(4, 2, 2, 6)}, [("v", "num_pages=5", "(4, 2, 2, 6)")]),
    ("paged", {"k": rows(5, 0, 2, 8), "v": rows(5, 0, 2, 6)}, [("k", "page_size of at least 1", "0")]),
    ("into", {"out": rows(2, 5, 4, 8)}, [("out", "head_dim_v=6", "(2, 5, 4, 8)")]),
    ("into", {"out": rows(2, 5, 4, 6, dtype=torch.float16)}, [("out", "float32", "float16")]),
    ("into", {"out": rows(2, 5, 1, 6).expand(2, 5, 4, 6)}, [("out", "share memory", "expanded")]),
    ("into", {"float_results": True, "out": rows(2, 5, 4, 6, dtype=torch.float64)}, [("out", "float32", "float64")]),
    ("varlen_into", {"out": rows(5, 4, 6)}, [("out", "total_q=6", "(5, 4, 6)")]),
    *[("backward", {name: rows(2, 5, 4, 7)}, [(name, "head_dim_v=6", "(2, 5, 4, 7)")]) for name in ("dout", "out")],
    ("backward", {"dout": rows(2, 5, 4, 6, dtype=torch.float64)}, [("dout", "float32", "float64")]),
    ("backward", {"softmax_lse": rows(2, 5, 4)},
     [("softmax_lse", "(batch_size=2, num_heads=4, seqlen_q=5)", "(2, 5, 4)")]),
    ("backward", {"softmax_lse": rows(2, 4, 5, dtype=torch.float64)}, [("softmax_lse", "float32", "float64")]),
    ("backward", {"dlse": rows(2, 4, 6)}, [("dlse", "seqlen_q=5", "(2, 4, 6)")]),
    ("backward", {"dq": rows(2, 5, 4, 6)}, [("dq", "head_dim=8", "(2, 5, 4, 6)")]),
    ("backward", {"dk": rows(2, 7, 4, 8)}, [("dk", "num_heads_k=2", "(2, 7, 4, 8)")]),
    ("backward", {"dv": rows(2, 7, 2, 6, dtype=torch.bfloat16)}, [("dv", "float32", "bfloat16")]),
    ("backward", {"dq": rows(1, 5, 4, 8).expand(2, 5, 4, 8)}, [("dq", "share memory", "expanded")]),
    ("backward", {"dropout_p": 0.5, "rng_state": None}, [("rng_state", "int64", "None")]),
    ("backward", {"softmax_scale": -1.0}, [("softmax_scale", "above 0", "-1")]),
    ("varlen_backward", {"softmax_lse": rows(6, 4)}, [("softmax_lse", "(num_heads=4, total_q=6)", "(6, 4)")]),
    ("varlen_backward", {"block_table": ints([0, 1], [2, 3]), "k": rows(5, 2, 2, 8), "v": rows(5, 2, 2, 6)},
     [("dk", "", ""), ("dv", "", ""), ("block_table", "None, for pages of keys get no gradients", "a tensor")]),
    ("varlen_backward", {"dk": rows(7, 2, 8)}, [("dk", "total_k=8", "(7, 2, 8)")]),
    ("probs", {"softmax_lse": rows(2, 4, 4)}, [("softmax_lse", "seqlen_q=5", "(2, 4, 4)")]),
    ("dense", {"k": rows(3, 7, 2, 9), "dropout_p": 1.0, "softmax_scale": -2.0},
     [("k", "batch_size=2", "(3, 7, 2, 9)"), ("dropout_p", "[0, 1)", "1"), ("softmax_scale", "above 0", "-2")]),
    ("backward", {"dq": rows(1), "dv": rows(2), "dout": rows(3), "softcap": math.nan},
     [("dq", "head_dim=8", "(1,)"), ("dv", "head_dim_v=6", "(2,)"), ("dout", "", "(3,)"),
      ("softcap", "finite", "nan")]),
]  # fmt: skip

# Values of metadata tensors: checked only in host memory.
VALUES = [
    ("varlen", {"cu_seqlens_q": ints(1, 2, 5)}, [("cu_seqlens_q[0]", "0", "1")]),
    ("varlen", {"cu_seqlens_k": ints(-1, 3, 7)}, [("cu_seqlens_k[0]", "0", "-1")]),
    ("varlen", {"cu_seqlens_q": ints(0, 5, 2), "max_seqlen_q": 5}, [("cu_seqlens_q[2]", "cu_seqlens_q[1]=5", "2")]),
    ("varlen", {"cu_seqlens_q": ints(0, 2, 7), "max_seqlen_q": 5}, [("cu_seqlens_q[2]", "total_q=6", "7")]),
    ("varlen", {"cu_seqlens_k": ints(0, 9, 9), "max_seqlen_k": 9}, [("cu_seqlens_k[2]", "total_k=8", "9")]),
    ("varlen", {"cu_seqlens_k": ints(0, 2**31 - 1, -(2**31))},
     [("cu_seqlens_k[2]", "", str(-(2**31))), ("max_seqlen_k", "at least 2147483647", "4")]),
    ("varlen", {"max_seqlen_q": 2}, [("max_seqlen_q", "at least 3, the length of sequence 1", "2")]),
    ("varlen", {"max_seqlen_k": 0}, [("max_seqlen_k", "at least 4", "0")]),
    ("varlen", {"seqused_k": ints(4, 6)},
     [("seqused_k[1]", "at most 5, the rows of k from cu_seqlens_k[1]=3", "6"),
      ("max_seqlen_k", "at least seqused_k[1]=6", "4")]),
    ("varlen", {"seqused_k": ints(4, 3), "max_seqlen_k": 3}, [("max_seqlen_k", "at least seqused_k[0]=4", "3")]),
    ("varlen", {"seqused_k": ints(1, 1), "cu_seqlens_k": ints(2, 9, 0)}, [("cu_seqlens_k[1]", "to total_k=8", "9")]),
    ("varlen", {"seqused_k": ints(0, 0), "cu_seqlens_k": ints(-1, 2, 3)}, [("cu_seqlens_k[0]", "from 0", "-1")]),
    ("varlen", {"leftpad_k": ints(0, -5)}, [("leftpad_k[1]", "at least 0", "-5")]),
    ("paged", {"seqused_k": ints(2, 5), "max_seqlen_k": 4}, [("max_seqlen_k", "at least seqused_k[1]=5", "4")]),
    ("paged", {"seqused_k": ints(2, 7), "max_seqlen_k": 7}, [("block_table", "4 pages of 2 rows", "max_pages=3")]),
    ("dense", {"seqused_k": ints(7, 8)}, [("seqused_k[1]", "seqlen_k=7", "8")]),
    ("dense", {"q_starts": ints(7, -2)}, [("q_start[1]", f"from 0 to {2**30 - 261}", "-2")]),
    ("varlen", {"q_starts": ints(0, 2**30 - 258)}, [("q_start[1]", f"from 0 to {2**30 - 259}", str(2**30 - 258))]),
    ("varlen", {"k_starts": ints(2**31 - 1, 0)}, [("k_start[0]", f"from 0 to {2**30 - 259}", str(2**31 - 1))]),
    ("dense", {"k_starts": ints(32, 48), "dropout_p": 0.1}, [("k_start[1]", "multiple of 32, as dropout_p is", "48")]),
    ("dense", {"leftpad_k": ints(-2, 0)}, [("leftpad_k[0]", "at least 0", "-2")]),
    ("paged", {"block_table": ints([0, 5, 0], [2, 4, 0])}, [("block_table[0, 1]", "num_pages=5", "5")]),
    ("paged", {"block_table": ints([0, 1, 0], [-1, 4, 0])}, [("block_table[1, 0]", "num_pages=5", "-1")]),
    ("paged", {"block_table": ints([0], [2])}, [("block_table", "2 pages of 2 rows", "max_pages=1")]),
    ("varlen_backward", {"cu_seqlens_q": ints(0, 4, 5)}, [("max_seqlen_q", "at least 4", "3")]),
    ("varlen_backward", {"seqused_k": ints(9, 9), "max_seqlen_k": 9},
     [("seqused_k[0]", "at most 8, the rows of k from cu_seqlens_k[0]=0", "9"),
      ("seqused_k[0]", "at most 3, the rows of k before those of sequence 1", "9")]),
    ("varlen_backward", {"seqused_k": ints(4, 4)}, [("seqused_k[0]", "at most 3, the rows of k before those", "4")]),
    ("varlen_backward", {"seqused_k": ints(2, 4), "cu_seqlens_k": ints(3, 0, 0)},
     [("seqused_k[1]", "at most 3, the rows of k before those of sequence 0", "4")]),
    ("varlen", {"cu_seqlens_q": ints(1, 2, 9), "max_seqlen_k": 1},
     [("cu_seqlens_q[0]", "0", "1"), ("cu_seqlens_q[2]", "total_q=6", "9"), ("max_seqlen_q", "at least 7", "3"),
      ("max_seqlen_k", "at least 4", "1")]),
]  # fmt: skip
