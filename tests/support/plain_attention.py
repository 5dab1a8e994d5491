"""Attention in plain torch operations, in the dtype of its inputs, differentiable: small and slow."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import reference
from compare import assert_bitwise


def attention(q, k, v, keep=None, bias=None, scale=None, dropped=None, dropout_p=0.0):
    """out and softmax_lse of (batch, seqlen, heads, head_dim) tensors.

    keep: bool, True where a query sees a key; bias: added to the scores; dropped: bool, True where a weight is dropped.
    Each broadcasts to (batch, heads, seqlen_q, seqlen_k). A query without visible keys gives 0 and -inf.
    """
    groups = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(groups, dim=2), v.repeat_interleave(groups, dim=2)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if bias is not None:
        scores = scores + bias
    keep = torch.ones_like(scores, dtype=torch.bool) if keep is None else keep.expand_as(scores)
    weights = scores.masked_fill(~keep, -1e30).softmax(dim=-1).masked_fill(~keep, 0.0)
    lse = scores.masked_fill(~keep, -torch.inf).logsumexp(dim=-1)
    if dropped is not None:
        weights = weights.masked_fill(dropped, 0.0) / (1 - dropout_p)
    return torch.einsum("bhij,bjhd->bihd", weights, v), lse


def visible(seqlen_q, seqlen_k, causal=False, window=(-1, -1)):
    """Bool (seqlen_q, seqlen_k): the keys that each query sees, bottom-right aligned."""
    return reference.visible(seqlen_q, seqlen_k, (window[0], 0) if causal else window)


def alibi_bias(slopes, seqlen_q, seqlen_k):
    """-slope * distance: (heads, seqlen_q, seqlen_k), with a leading batch dimension if the slopes have one."""
    return -slopes.double()[..., None, None] * reference.distances(seqlen_q, seqlen_k)


def leaves(*shapes, dtype=torch.float64, seed=0):
    """Random leaf tensors that require grad."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def gradients(out, inputs, seed=1, retain_graph=False):
    """Gradients of the inputs for a fixed random gradient of out (a tensor or a sequence of tensors)."""
    outputs = [out] if isinstance(out, torch.Tensor) else list(out)
    generator = torch.Generator().manual_seed(seed)
    upstream = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.dtype) for o in outputs]
    return torch.autograd.grad(outputs, inputs, upstream, retain_graph=retain_graph)


def assert_same(actual, expected):
    """Bitwise equal, tensor by tensor."""
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert_bitwise(f"tensor {i}", a, e)


def assert_near(actual, expected, atol=1e-10):
    """Equal within atol, tensor by tensor, with infinities at the same positions; dtypes may differ."""
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert torch.equal(a.isinf(), e.isinf()), f"tensor {i}: infinities misplaced"
        torch.testing.assert_close(a.detach().double(), e.detach().double(), rtol=0, atol=atol)


class OpCalls(TorchDispatchMode):
    """A mode that records calls of this package's ops as (name, {argument: value})."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "flash_attn":
            names = [argument.name for argument in func._schema.arguments]
            self.calls.append((func._opname, {**dict(zip(names, args, strict=False)), **(kwargs or {})}))
        return func(*args, **(kwargs or {}))
