"""Cases of context parallel attention, and their check against one device, which runs on every rank."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch

import flash_attn
from distributed_world import group_of
from flash_attn.context_parallel import context_parallel_attention, shard

PAIR = ("ulysses", "ring")


@dataclass(frozen=True)
class Case:
    """A call. Documents of these lengths, packed; or, if there is a batch_size, sequences of the only length."""

    name: str
    lengths: tuple[int, ...]
    batch_size: int = 0
    num_heads: int = 12
    num_heads_k: int = 12
    head_dim: int = 8
    head_dim_v: int = 8
    alibi: str = ""  # "heads": (num_heads,), "batch": (batch_size, num_heads)
    sinks: bool = False
    dtype: str = "float64"
    options: dict[str, Any] = field(default_factory=dict)
    method: Any = "ring"
    layout: str = "zigzag"
    ranks: int = 2

    def __str__(self) -> str:
        method = self.method if isinstance(self.method, str) else "usp"
        return f"{self.name}-{method}-{self.layout}-{self.ranks}"

    @property
    def results(self) -> tuple[str, ...]:
        """The names of what the functions below return."""
        return ("out", "softmax_lse", "dq", "dk", "dv", *(("ds_aux",) if self.sinks else ()))

    @property
    def dim(self) -> int:
        """The dimension of rows."""
        return 1 if self.batch_size else 0

    def cu_seqlens(self) -> torch.Tensor | None:
        """None for dense sequences."""
        if self.batch_size:
            return None
        return torch.tensor([0, *self.lengths]).cumsum(0).to(torch.int32)


@dataclass
class Inputs:
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    dout: torch.Tensor
    alibi_slopes: torch.Tensor | None
    s_aux: torch.Tensor | None

    def leaves(self) -> list[torch.Tensor]:
        """Copies of q, k, v and, if there are sinks, s_aux, which require grad."""
        given = [x for x in (self.q, self.k, self.v, self.s_aux) if x is not None]
        return [x.detach().clone().requires_grad_() for x in given]


def make_inputs(case: Case) -> Inputs:
    """The whole inputs, the same on every rank. They are not contiguous."""
    generator = torch.Generator().manual_seed(1)
    batch = [case.batch_size] if case.batch_size else []

    def random(heads, width):
        shape = [*batch, heads, sum(case.lengths), width]
        x = torch.randn(shape, generator=generator, dtype=torch.float64).to(getattr(torch, case.dtype))
        return x.transpose(-2, -3)

    q, k = random(case.num_heads, case.head_dim), random(case.num_heads_k, case.head_dim)
    v, dout = random(case.num_heads_k, case.head_dim_v), random(case.num_heads, case.head_dim_v)
    documents = case.batch_size or len(case.lengths)
    shape = {"": None, "heads": [case.num_heads], "batch": [documents, case.num_heads]}[case.alibi]
    slopes = None if shape is None else torch.rand(shape, generator=generator)
    s_aux = torch.linspace(-3, 6, case.num_heads, dtype=torch.float64) if case.sinks else None
    return Inputs(q, k, v, dout, slopes, s_aux)


def on_one_device(case: Case, inputs: Inputs) -> list[torch.Tensor]:
    """The results of the whole."""
    leaves = inputs.leaves()
    options = {**case.options, "alibi_slopes": inputs.alibi_slopes, "s_aux": leaves[3] if case.sinks else None}
    torch.manual_seed(3)
    if case.batch_size:
        out, lse, _ = flash_attn.flash_attn_func(*leaves[:3], **options, return_attn_probs=True)
    else:
        where = [case.cu_seqlens()] * 2 + [max(case.lengths, default=0)] * 2
        out, lse, _ = flash_attn.flash_attn_varlen_func(*leaves[:3], *where, **options, return_attn_probs=True)
    out.backward(inputs.dout)
    return [out.detach(), lse.detach(), *(x.grad for x in leaves)]


def places(case: Case) -> dict[str, Any]:
    """The arguments that shard and context_parallel_attention share."""
    group = pair_of_groups() if case.method == PAIR else group_of(case.ranks)
    return {"group": group, "layout": case.layout, "cu_seqlens": case.cu_seqlens()}


def pair_of_groups() -> torch.distributed.DeviceMesh:
    """The mesh of 4 ranks for ("ulysses", "ring"). Ranks of a ulysses group are not neighbours in the world."""
    if not hasattr(pair_of_groups, "mesh"):
        pair_of_groups.mesh = torch.distributed.init_device_mesh("cpu", (2, 2))
    return pair_of_groups.mesh


def on_many(case: Case, inputs: Inputs) -> list[torch.Tensor]:
    """The local out and softmax_lse, and the gradients of the whole; those of the sinks are summed here."""
    leaves = inputs.leaves()
    where = places(case)
    locals_ = [shard(x, case.dim, **where) for x in leaves[:3]]
    scores = {"alibi_slopes": inputs.alibi_slopes, "s_aux": leaves[3] if case.sinks else None}
    torch.manual_seed(3)
    out, lse = context_parallel_attention(
        *locals_, method=case.method, **where, **case.options, **scores, return_lse=True
    )
    assert out.dtype == inputs.q.dtype
    out.backward(shard(inputs.dout, case.dim, **where))
    if case.sinks:
        torch.distributed.all_reduce(leaves[3].grad, group=group_of(case.ranks))
    return [out.detach(), lse.detach(), *(x.grad for x in leaves)]


def of_this_rank(case: Case, results: list[torch.Tensor]) -> list[torch.Tensor]:
    """What on_many would return, from the results of one device."""
    where = places(case)
    out, lse, *grads = results
    return [shard(out, case.dim, **where), shard(lse, -1, **where), *grads]


def check_exactly(case: Case) -> None:
    """In float64 the ranks compute what one device computes."""
    inputs = make_inputs(case)
    expected = of_this_rank(case, on_one_device(case, inputs))
    found = on_many(case, inputs)
    for name, one, many in zip(case.results, expected, found, strict=True):
        assert one.shape == many.shape, f"{case}: {name} has shape {tuple(many.shape)}, not {tuple(one.shape)}"
        assert torch.isfinite(many).logical_or(one == -torch.inf).all(), f"{case}: {name} is not finite"
        hidden = (one == -torch.inf) & (many == -torch.inf)
        error = (one - many).masked_fill(hidden, 0).abs().amax().item() if one.numel() else 0.0
        assert error < 1e-10, f"{case}: {name} differs by {error:.2e}"


def check_rounding(case: Case) -> None:
    """In bfloat16 or float16, the error of the ranks is at most 1.1 times that of one device."""
    inputs = make_inputs(case)
    exact_inputs = dataclasses.replace(
        inputs, **{name: getattr(inputs, name).double() for name in ("q", "k", "v", "dout")}
    )
    results = [on_one_device(case, x) for x in (exact_inputs, inputs)]
    exact, one = (of_this_rank(case, result) for result in results)
    many = on_many(case, inputs)
    for i, name in enumerate(case.results):
        theirs, ours = ((x[i].double() - exact[i]).norm().item() for x in (one, many))
        limit = 1.1 * theirs + 1e-6 * exact[i].norm().item()
        assert ours <= limit, f"{case}: {name}: error {ours:.3e}, that of one device is {theirs:.3e}"
