"""Attention of several ranks is that of one device: every feature, with every method, layout and number of ranks."""

import dataclasses

import pytest
import torch

from distributed_cases import PAIR, Case, check_exactly, check_rounding
from distributed_world import group_of
from flash_attn.context_parallel import context_parallel_attention, shard
from flash_attn.context_parallel.all_gather import sum_of_parts
from flash_attn.context_parallel.layout import make_cut, rows_of
from flash_attn.context_parallel.ranks import resolve

pytestmark = pytest.mark.xdist_group("distributed")

CAUSAL = {"causal": True}
FEATURES = (
    Case("plain", (300,), batch_size=2),
    Case("causal", (384,), batch_size=2, options=CAUSAL),
    Case("uneven", (201,), batch_size=1, head_dim_v=16, options=CAUSAL),
    Case("small_window", (500,), batch_size=1, options={"window_size": (9, 3)}),
    Case("large_window", (500,), batch_size=1, options={"window_size": (200, 150)}),
    Case("sliding_causal", (500,), batch_size=1, options={**CAUSAL, "window_size": (70, 0)}),
    Case("look_ahead", (260,), batch_size=1, options={"window_size": (0, -1)}),
    Case("chunks", (420,), batch_size=1, options={**CAUSAL, "attention_chunk": 100}),
    Case("chunks_and_window", (420,), batch_size=1, options={"attention_chunk": 90, "window_size": (40, 20)}),
    Case("softcap", (260,), batch_size=1, options={"softcap": 2.0, "softmax_scale": 0.7}),
    Case("alibi", (300,), batch_size=2, alibi="heads", options=CAUSAL),
    Case("alibi_per_sequence", (260,), batch_size=2, alibi="batch"),
    Case("dropout", (310,), batch_size=2, options={"dropout_p": 0.3}),
    Case("dropout_causal", (310,), batch_size=2, num_heads_k=4, options={**CAUSAL, "dropout_p": 0.2}),
    Case("grouped", (260,), batch_size=2, num_heads_k=4, options=CAUSAL),
    Case("few_key_heads", (260,), batch_size=1, num_heads_k=2, options=CAUSAL),
    Case("multi_query", (260,), batch_size=1, num_heads_k=1, head_dim_v=4),
    Case("tiny", (40,), batch_size=2, options=CAUSAL),
    Case("one_token", (1,), batch_size=1, options=CAUSAL),
    Case("empty", (0,), batch_size=1),
    Case("packed", (100, 0, 37, 400, 1), options=CAUSAL),
    Case("packed_not_causal", (70, 190, 33)),
    Case("packed_window", (90, 500, 10), num_heads_k=4, options={"window_size": (33, 0)}),
    Case("packed_dropout", (100, 260, 64), alibi="batch", options={**CAUSAL, "dropout_p": 0.25}),
    Case("packed_chunks", (100, 260, 64), options={**CAUSAL, "attention_chunk": 50, "softcap": 3.0}),
    Case("no_documents", ()),
    Case("sinks", (300,), batch_size=2, num_heads_k=4, sinks=True, options=CAUSAL),
    Case("sinks_window", (500,), batch_size=1, sinks=True, options={"window_size": (9, 3)}),
    Case("sinks_dropout", (310,), batch_size=2, sinks=True, alibi="heads", options={"dropout_p": 0.3}),
    Case("packed_sinks", (100, 0, 37, 400, 1), num_heads_k=4, sinks=True, options={**CAUSAL, "softcap": 3.0}),
)
METHODS = [
    (method, layout, ranks)
    for ranks in (2, 3, 4)
    for method in ("ring", "all_gather", "ulysses", PAIR)
    for layout in ("zigzag", "contiguous")
    if method != PAIR or ranks == 4
]
CASES = [
    dataclasses.replace(case, method=method, layout=layout, ranks=ranks)
    for method, layout, ranks in METHODS
    for case in FEATURES
]
# Of every feature with every method, half the layouts and numbers of ranks.
SOME = [case for i, case in enumerate(CASES) if (i // len(FEATURES) + i % len(FEATURES) + case.ranks) % 2 == 0]


@pytest.mark.parametrize(
    "case", [case if case in SOME else pytest.param(case, marks=pytest.mark.whole) for case in CASES], ids=str
)
def test_ranks_compute_what_one_device_computes(world, case):
    world.run(check_exactly, case, ranks=case.ranks)


@pytest.mark.parametrize("method", ["ring", "all_gather", "ulysses"])
def test_one_rank_computes_what_one_device_computes(world, method):
    for case in FEATURES:
        world.run(check_exactly, dataclasses.replace(case, method=method, ranks=1), ranks=1)


ROUNDED = [
    dataclasses.replace(case, method=method, ranks=4, dtype=dtype, head_dim=32, head_dim_v=32)
    for method in ("ring", "all_gather", "ulysses", PAIR)
    for case in FEATURES
    for dtype in ("bfloat16", "float16", "float32")
    if case.name in ("causal", "packed_window", "sinks") or (case.name == "dropout_causal" and dtype == "bfloat16")
]


@pytest.mark.parametrize("case", ROUNDED, ids=lambda case: f"{case}-{case.dtype}")
def test_error_is_that_of_one_device(world, case):
    world.run(check_rounding, case, ranks=case.ranks)


def check_empty_batch(method):
    inputs = [torch.zeros(0, 64, 4, 8, requires_grad=True) for _ in range(3)]
    out = context_parallel_attention(*inputs, group=group_of(2), method=method)
    assert out.shape == (0, 64, 4, 8)
    out.sum().backward()
    assert all(x.grad.shape == x.shape for x in inputs)


@pytest.mark.parametrize("method", ["ring", "all_gather", "ulysses"])
def test_batch_without_sequences(world, method):
    world.run(check_empty_batch, method, ranks=2)


def check_sum():
    cut = make_cut((256,), 2, "zigzag")
    x = torch.arange(512.0).view(256, 2)
    part = sum_of_parts(x, cut, resolve("test", group_of(2)))
    assert torch.equal(part, 2 * x[rows_of(cut, group_of(2).rank())])
    assert part.untyped_storage().nbytes() == part.nbytes


def test_summed_gradients_do_not_keep_the_summands(world):
    world.run(check_sum, ranks=2)


def check_layouts_of_memory(method):
    """Inputs that must be copied, and a gradient that is one number, expanded."""
    group, results = group_of(2), []
    torch.manual_seed(1)
    inputs = [shard(torch.randn(2, 128, 4, 16, dtype=torch.float64), 1, group)[..., ::2] for _ in range(3)]
    for copied in (False, True):
        leaves = [(x.contiguous() if copied else x).detach().requires_grad_() for x in inputs]
        out = context_parallel_attention(*leaves, group=group, method=method, causal=True)
        out.backward(torch.ones(1, dtype=torch.float64).expand(out.shape))
        results.append([out, *(x.grad for x in leaves)])
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


@pytest.mark.parametrize("method", ["ring", "all_gather", "ulysses"])
def test_inputs_need_not_be_contiguous(world, method):
    world.run(check_layouts_of_memory, method, ranks=2)
