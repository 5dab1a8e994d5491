"""How programs run attention: deterministic mode, autocast, checkpointing, threads, forked workers."""

import concurrent.futures
import functools

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset

import flash_attn
from compare import assert_bitwise
from flash_attn.flash_attn_interface import _flash_attn_backward


def leaves(seqlen=150, dtype=torch.float32, seed=1):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(2, seqlen, 4, 32), (2, seqlen, 2, 32), (2, seqlen, 2, 32)]
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def gradients(inputs, function=flash_attn.flash_attn_func, **options):
    torch.manual_seed(5)
    out = function(*inputs, **options)
    return [out.detach(), *torch.autograd.grad(out.float().square().sum(), inputs)]


def assert_same(got, expected, context=""):
    for name, a, b in zip(("out", "dq", "dk", "dv"), got, expected, strict=True):
        assert_bitwise(name, a, b, context)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_deterministic_flags(dtype):
    """The CPU is deterministic with and without the flag, for any number of threads."""
    inputs = leaves(600, dtype)
    expected = gradients(inputs, causal=True, deterministic=True)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        assert_same(gradients(inputs, causal=True, deterministic=False), expected, f"{threads} threads")
        torch.use_deterministic_algorithms(True)
        try:
            assert_same(gradients(inputs, causal=True), expected, f"{threads} threads")
        finally:
            torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32, torch.bfloat16), (torch.float16,) * 3])
def test_autocast(dtypes):
    """q, k and v, also of mixed dtypes, are cast to the autocast dtype; gradients have the dtypes of the inputs."""
    inputs = [t.detach().to(dtype).requires_grad_() for t, dtype in zip(leaves(), dtypes, strict=True)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, *grads = gradients(inputs)
    assert out.dtype == torch.bfloat16
    assert tuple(grad.dtype for grad in grads) == dtypes
    cast = [t.detach().to(torch.bfloat16).requires_grad_() for t in inputs]
    expected = gradients(cast)
    assert_bitwise("out", out, expected[0])
    for a, b, dtype in zip(grads, expected[1:], dtypes, strict=True):
        assert_bitwise("gradient", a, b.to(dtype))


def test_autocast_leaves_float64_alone():
    inputs = [t.detach().double().requires_grad_() for t in leaves()]
    expected = gradients(inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(gradients(inputs), expected)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_checkpoint(use_reentrant, dropout_p):
    """The recomputed forward pass drops the same weights."""
    inputs = leaves()
    function = functools.partial(flash_attn.flash_attn_func, dropout_p=dropout_p, causal=True)

    def checkpointed(*x):
        return checkpoint(function, *x, use_reentrant=use_reentrant)

    expected = gradients(inputs, function)
    torch.manual_seed(5)
    out = checkpointed(*inputs)
    torch.rand(7)
    for t in inputs:
        t.grad = None
    out.float().square().sum().backward()
    assert_same([out.detach(), *(t.grad for t in inputs)], expected)


def test_inference_mode():
    inputs = leaves()
    expected = flash_attn.flash_attn_func(*inputs).detach()
    with torch.inference_mode():
        out = flash_attn.flash_attn_func(*inputs)
    assert out.is_inference()
    assert_bitwise("out", out, expected)


def test_retained_graph_gives_the_same_again():
    inputs = leaves()
    out = flash_attn.flash_attn_func(*inputs, dropout_p=0.2)
    first = torch.autograd.grad(out.sum(), inputs, retain_graph=True)
    second = torch.autograd.grad(out.sum(), inputs)
    for a, b in zip(first, second, strict=True):
        assert_bitwise("gradient", a, b)


def test_one_tensor_as_query_key_and_value():
    (q, _, _), expected = leaves(), []
    separate = [q.detach().clone().requires_grad_() for _ in range(3)]
    expected = torch.autograd.grad(flash_attn.flash_attn_func(*separate).sum(), separate)
    (got,) = torch.autograd.grad(flash_attn.flash_attn_func(q, q, q).sum(), [q])
    torch.testing.assert_close(got, sum(expected), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("threads_each", [1, 2])
def test_many_python_threads_at_once(threads_each):
    """Concurrent calls from Python threads do not interfere."""
    problems = [leaves(100 + 37 * i, dtype, seed=i) for i in range(4) for dtype in (torch.float32, torch.bfloat16)]
    expected = [gradients_of(x) for x in problems]

    def work(index):
        torch.set_num_threads(threads_each)
        return [gradients_of(problems[index % len(problems)]) for _ in range(4)]

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for index, results in enumerate(pool.map(work, range(16))):
            for result in results:
                assert_same(result, expected[index % len(problems)], f"problem {index % len(problems)}")


def gradients_of(inputs):
    """gradients() without the generator, which is shared by all threads."""
    out = flash_attn.flash_attn_func(*inputs, causal=True)
    return [out.detach(), *torch.autograd.grad(out.float().square().sum(), inputs)]


class Attended(Dataset):
    """Items that a worker process computes with attention."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        # No autograd: in CUDA builds of torch its engine refuses to run in a forked process.
        q, k, v = (x.detach() for x in leaves(64, seed=index))
        out, lse, _ = flash_attn.flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
        dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
        _flash_attn_backward(out, q, k, v, out, lse, dq, dk, dv, 0.0, None, True, -1, -1, 0.0, None, True)
        return torch.stack([out, dq])


def test_forked_workers():
    """Worker processes forked after the parent used several threads compute the same results."""
    torch.set_num_threads(2)
    gradients_of(leaves(600))
    torch.set_num_threads(1)
    expected = [Attended()[i] for i in range(4)]
    torch.set_num_threads(2)
    loader = DataLoader(Attended(), batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60)
    for got, item in zip(loader, expected, strict=True):
        assert_bitwise("item", got, item)
