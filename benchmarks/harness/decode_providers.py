"""Who is measured by `bench.py decode`: ours, torch in all its ways, and a plain read of as many bytes."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from flash_attn import flash_attn_with_kvcache
from harness.cases import Case
from harness.decode import LARGEST, Cached, cache_bytes, copies
from harness.provider import OURS, Call, Provider, visibility
from harness.sdpa import BACKENDS, KNOW_LOWER_RIGHT, MATH, ON_GPUS_ONLY
from harness.torch_others import flex

READ = {"cpu": "plain read", "cuda": "plain copy"}
PAGE_SIZES = (16, 256)


def _by_turns(
    problem: Cached, function: Callable[..., Any], arguments: Sequence[tuple[Tensor, ...]], own: bool = False
) -> Call:
    """The function with the arguments of one copy after the other. own: of copies that no other provider reads."""
    turns = itertools.cycle(range(len(arguments))) if own else problem.turns
    return Call(lambda: function(*arguments[next(turns)]), (problem.q,), problem.q)


def _keys_and_values(caches: Tensor) -> list[tuple[Tensor, ...]]:
    return [copy.unbind() for copy in caches]


# Ours.


def _ours(problem: Cached) -> Call:
    q, options = problem.q, problem.options
    return _by_turns(
        problem, lambda k, v: flash_attn_with_kvcache(q, k, v, **options), _keys_and_values(problem.caches)
    )


def _paged(problem: Cached, page_size: int) -> Call:
    """The same rows in pages, in random order."""
    q, case = problem.q, problem.case
    pages = problem.caches.flatten(2, 3).unflatten(2, (-1, page_size))  # (copies, 2, pages, page_size, heads, head_dim)
    order = torch.randperm(pages.shape[2], device=case.device)
    options = {**problem.options, "block_table": order.argsort().int().view(case.batch_size, -1)}
    shuffled = [(k[order], v[order]) for k, v in pages]
    return _by_turns(problem, lambda k, v: flash_attn_with_kvcache(q, k, v, **options), shuffled, own=True)


def _op(problem: Cached, library: str) -> Call:
    """Without the public function."""
    op = getattr(torch.ops, library).fwd_kvcache.default
    q, options = problem.q, problem.options
    return _by_turns(problem, lambda k, v: op(q, k, v, **options)[0], _keys_and_values(problem.caches))


def other_build(name: str, path: Path) -> Provider:
    """Ours by the op of another build, torch.ops.flash_attn_NAME."""
    torch.ops.load_library(str(path))
    return Provider(f"{OURS}, {name}", functools.partial(_op, library=f"flash_attn_{name}"))


# torch.


def _mask(case: Case, backend: str) -> Any:
    """None, or the causal mask aligned at the bottom right: is_causal would align it at the top left."""
    if case.seqlen_q == 1:
        return None
    if case.device == "cuda" and backend in KNOW_LOWER_RIGHT:
        return causal_lower_right(case.seqlen_q, case.seqlen_k)
    return visibility(case)


def _sdpa(problem: Cached, backend: str) -> Call:
    """The cache as it is: torch is told that several heads of queries share one of keys."""
    case, q, mask = problem.case, problem.q.transpose(1, 2), _mask(problem.case, backend)
    views = _keys_and_values(problem.caches.transpose(3, 4))

    def function(k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=case.num_heads != case.num_heads_k)

    return replace(_by_turns(problem, function, views), packed=lambda out: out.transpose(1, 2))


def _folded(problem: Cached, backend: str) -> Call:
    """The heads that share one of keys as more queries of one head, which reads every key once."""
    case, shared = problem.case, problem.case.num_heads // problem.case.num_heads_k
    q = problem.q.transpose(1, 2).unflatten(1, (-1, shared)).flatten(2, 3)
    mask = None if case.seqlen_q == 1 else visibility(case).repeat(shared, 1)
    views = _keys_and_values(problem.caches.transpose(3, 4))

    def unfolded(out: Tensor) -> Tensor:
        return out.unflatten(2, (shared, -1)).flatten(1, 2).transpose(1, 2)

    call = _by_turns(problem, lambda k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask), views)
    return replace(call, packed=unfolded)


def _expanded(problem: Cached, backend: str) -> Call:
    """A cache with as many heads of keys as there are of queries."""
    case, q, mask = problem.case, problem.q.transpose(1, 2), _mask(problem.case, backend)
    shared = case.num_heads // case.num_heads_k
    caches = problem.caches[: copies(case, shared)].repeat_interleave(shared, dim=4)
    views = _keys_and_values(caches.transpose(3, 4))
    call = _by_turns(problem, lambda k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask), views, own=True)
    return replace(call, packed=lambda out: out.transpose(1, 2))


def _shares_heads(case: Case) -> bool:
    return case.num_heads != case.num_heads_k


def _too_large(case: Case) -> str:
    size, most = cache_bytes(case) * case.num_heads // case.num_heads_k, LARGEST[case.device]
    return f"expands the heads, to more than {most / 2**30:.0f} GiB" if size > most else ""


def _providers(backend: str) -> list[Provider]:
    common: dict[str, Any] = {"context": functools.partial(sdpa_kernel, BACKENDS[backend])}
    common["devices"] = ("cuda",) if backend in ON_GPUS_ONLY else ("cpu", "cuda")
    makers = [functools.partial(each, backend=backend) for each in (_sdpa, _folded, _expanded)]
    if backend == MATH:
        return [Provider(backend, makers[0], why_not=_too_large, **common)]
    return [
        Provider(backend, makers[0], **common),
        Provider(f"{backend}, folded", makers[1], _shares_heads, **common),
        Provider(f"{backend}, expanded", makers[2], _shares_heads, _too_large, **common),
    ]


# As fast as memory goes.


def _read(problem: Cached) -> Call:
    """A sum, which every thread takes over its rows: no operation of torch reads quicker."""
    rows = [(each.flatten().view(torch.float64).view(64, -1),) for each in problem.caches]
    return _by_turns(problem, lambda numbers: numbers.sum(1), rows)


def _copy(problem: Cached) -> Call:
    """Half of the bytes to another place, where as many are written: a GPU moves as many bytes in all."""
    k, _ = problem.caches[0]
    target = torch.empty_like(k)
    return _by_turns(problem, lambda source, other: target.copy_(source), _keys_and_values(problem.caches))


PROVIDERS = (
    Provider(OURS, _ours),
    Provider(
        f"{OURS}, op alone",
        functools.partial(_op, library="flash_attn"),
        lambda case: case.group == "overhead",
    ),
    *(
        Provider(
            f"{OURS}, pages of {size}",
            functools.partial(_paged, page_size=size),
            lambda case: case.group == "bandwidth" or (case.device, case.group) == ("cuda", "grid"),
        )
        for size in PAGE_SIZES
    ),
    *(provider for backend in BACKENDS for provider in _providers(backend)),
    # It compiles for every case; on a CPU it is the slowest, and is measured with a few only.
    Provider("torch flex", flex, lambda case: case.device == "cuda" or case.group == "bandwidth", stage=2),
    Provider(READ["cpu"], _read, devices=("cpu",), computes=False),
    Provider(READ["cuda"], _copy, devices=("cuda",), computes=False),
)
