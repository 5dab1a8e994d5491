"""Streams, CUDA graphs, and calls that do not synchronise with the device."""

import concurrent.futures
import contextlib
import dataclasses

import pytest
import torch

import flash_attn
from cases import Case
from check import op_bwd, op_fwd, op_probs
from compare import assert_bitwise
from device import IS_GPU, needs_gpu, on_device
from inputs import make_inputs, random_qkv

pytestmark = on_device

NAMES = ("out", "softmax_lse", "dq", "dk", "dv", "dsoftmax_sum")

# One case per path through the ops.
CASES = {
    "dense": Case((130, 130), (200, 200), dtype="bfloat16", lse_grad=True),
    "causal": Case((130, 130), (200, 200), dtype="float16", causal=True, head_dim=128, head_dim_v=128),
    "window, softcap, alibi": Case((130,), (200,), dtype="bfloat16", window_size=(40, 9), softcap=2.0, alibi="heads"),
    "dropout": Case((130, 130), (200, 200), dtype="bfloat16", dropout_p=0.3),
    "packed": Case((70, 0, 140), (130, 129, 65), dtype="bfloat16", packed=True, causal=True, unused_rows=3),
    "key ranges": Case((70, 70), (130, 130), dtype="bfloat16", seqused_k=(129, 7), leftpad_k=(5, 0)),
    "paged": Case((5, 0, 70), (129, 3, 65), dtype="bfloat16", packed=True, page_size=16),
    "rows that are not aligned": Case((70,), (130,), dtype="bfloat16", head_dim=13, head_dim_v=37),
    "no keys": Case((70,), (0,), dtype="bfloat16", lse_grad=True),
    "head_dim 256": Case((70,), (130,), dtype="float16", head_dim=256, head_dim_v=256),
}
of_every_kind = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def run(case, x, grads=None):
    out, lse = op_fwd(case, x)
    if case.page_size:
        return out, lse, op_probs(case, x, lse)
    return out, lse, *op_bwd(case, x, out, lse, grads), op_probs(case, x, lse)


def assert_all_bitwise(got, expected, context=""):
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert_bitwise(f"result {i}", a, b, context)


@contextlib.contextmanager
def waiting_is_an_error():
    if not IS_GPU:
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@of_every_kind
def test_ops_do_not_wait(case):
    x = make_inputs(case)
    expected = run(case, x)
    with waiting_is_an_error():
        got = run(case, x)
    assert_all_bitwise(got, expected, case.name)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_functions_do_not_wait(dropout_p, deterministic):
    options = {"dropout_p": dropout_p, "deterministic": deterministic, "causal": True}
    q, k, v = random_qkv()
    qkv = torch.stack([q, k, v], 2).detach().requires_grad_()
    cu_seqlens = torch.tensor([0, 150, 150, 400], dtype=torch.int32)
    flat = [x.detach().flatten(0, 1).requires_grad_() for x in (q, k, v)]

    def run_all():
        flash_attn.flash_attn_func(q, k, v, **options).sum().backward()
        flash_attn.flash_attn_qkvpacked_func(qkv, **options).sum().backward()
        lengths = (cu_seqlens, cu_seqlens, 250, 250)
        flash_attn.flash_attn_varlen_func(*flat, *lengths, **options).sum().backward()

    run_all()
    with waiting_is_an_error():
        run_all()
    assert all(torch.isfinite(x.grad).all() for x in (q, k, v, qkv, *flat))


@needs_gpu
@of_every_kind
def test_side_stream(case):
    """A call is ordered after earlier work of its stream, and nothing runs on other streams."""
    x = make_inputs(case)
    expected = run(case, x)
    zeroed = {name: torch.zeros_like(getattr(x, name)) for name in ("q", "k", "v", "dout")}
    late = dataclasses.replace(x, **zeroed)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        for name, tensor in zeroed.items():
            tensor.copy_(getattr(x, name))
        got = run(case, late)
    stream.synchronize()
    assert_all_bitwise(got, expected, case.name)


@of_every_kind
def test_first_work_of_a_thread(case):
    """A new thread has no CUDA context yet, like autograd's. Memory comes from torch's cache."""
    x = make_inputs(case)
    run(case, x)  # its memory is reused without a CUDA call
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        got = thread.submit(run, case, x).result()
    assert_all_bitwise(got, run(case, x), case.name)


def captured(function):
    """A CUDA graph of one call, and its output tensors."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = function()
    return graph, results


@needs_gpu
@of_every_kind
def test_graph(case):
    """A replay equals a call with the inputs' current values."""
    x = make_inputs(case)
    graph, results = captured(lambda: run(case, x))
    for scale in (1.0, 0.5, 2.0):
        for name in ("q", "k", "v", "dout"):
            getattr(x, name).mul_(scale)
        graph.replay()
        assert_all_bitwise(results, run(case, x), f"{case.name}, inputs times {scale}")


@needs_gpu
def test_graph_with_other_lengths():
    """Lengths are in device memory, so a replay may use other lengths than the capture."""
    case = Case((100, 100, 100), (150, 150, 150), dtype="bfloat16", packed=True, causal=True)
    x = make_inputs(case, padding=0.0)
    graph, results = captured(lambda: run(case, x))
    for lengths_q, lengths_k in [((0, 100, 3), (150, 1, 0)), ((100, 0, 100), (64, 0, 150)), ((1, 1, 1), (128, 65, 2))]:
        for cu_seqlens, lengths in ((x.cu_seqlens_q, lengths_q), (x.cu_seqlens_k, lengths_k)):
            cu_seqlens[1:] = torch.tensor(lengths, dtype=torch.int32).cumsum(0)
        for _ in range(350):
            graph.replay()
        assert_all_bitwise(results, run(case, x), f"{lengths_q} {lengths_k}")


@needs_gpu
def test_graph_with_dropout():
    """Every replay draws another mask, on the device. A given rng_state gives its own mask."""
    q, k, v = (x.detach() for x in random_qkv())
    graph, out = captured(lambda: flash_attn.flash_attn_func(q, k, v, 0.5))
    seen = []
    for _ in range(3):
        graph.replay()
        seen.append(out.clone())
    assert not any(torch.equal(seen[i], seen[j]) for i in range(3) for j in range(i))

    case = CASES["dropout"]
    x = make_inputs(case)
    graph, results = captured(lambda: run(case, x))
    for state in ([1, 2], [-5, 2**60]):
        x.rng_state.copy_(torch.tensor(state))
        graph.replay()
        assert_all_bitwise(results, run(case, x), f"state {state}")


@needs_gpu
def test_graphed_training_step():
    """Forward and backward through autograd, captured by torch.cuda.make_graphed_callables."""
    x = random_qkv(num_heads_k=2)

    def attend(q, k, v):
        return flash_attn.flash_attn_func(q, k, v, causal=True, deterministic=True)

    expected = torch.autograd.grad(attend(*x).float().square().sum(), x)
    graphed = torch.cuda.make_graphed_callables(attend, tuple(t.detach().clone().requires_grad_() for t in x))
    got = torch.autograd.grad(graphed(*x).float().square().sum(), x)
    assert_all_bitwise(got, expected)


@needs_gpu
def test_gradients_in_place():
    """Gradients that are views of one packed tensor are written in place in a graph as well."""
    case = Case((70, 70), (70, 70), dtype="bfloat16", head_dim=40, head_dim_v=40, causal=True)
    x = make_inputs(case)
    packed = torch.zeros(2, 70, 3, 2, 40, dtype=torch.bfloat16)
    graph, _ = captured(lambda: run(case, x, packed.unbind(2)))
    packed.fill_(torch.nan)
    graph.replay()
    for i, grad in enumerate(run(case, x)[2:5]):
        assert_bitwise(NAMES[2 + i], packed[:, :, i], grad)
