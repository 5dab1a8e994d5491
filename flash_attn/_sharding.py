"""Attention of DTensors: every rank computes the heads or the sequences of the batch that it has.

A call runs on the local tensors, and its results are DTensors again. Nothing is communicated, unless q, k and v are cut
differently, are partial sums, or are cut in a way that attention cannot use; with dropout, two numbers are.

The module is loaded with the first DTensor: torch.distributed.tensor takes long to import, and not every build of torch
has it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from flash_attn._checks import as_float, describe, reject
from flash_attn._library import draw_rng_state

# How the ranks of a dimension of the mesh share the work.
WHOLE, _HEADS, _BATCH = "whole", "heads", "batch"
# Options that have a number for every sequence. The ops have names of their own for starts that are tensors.
_OF_SEQUENCES = {"q_start", "k_start", "q_starts", "k_starts", "seqused_k", "leftpad_k"}


class Dims(NamedTuple):
    """The dimensions of a tensor that heads and the batch have; None: none."""

    heads: int | None = None
    batch: int | None = None

    def of(self, cut: str) -> int | None:
        return {WHOLE: None, _HEADS: self.heads, _BATCH: self.batch}[cut]


class Plan(NamedTuple):
    """One cut for every dimension of the mesh, and the sizes of what is cut."""

    mesh: DeviceMesh
    cuts: tuple[str, ...]
    num_heads: int
    num_heads_k: int
    batch_size: int

    @property
    def shares_key_heads(self) -> bool:
        """Whether the query heads of each rank use one key head, which those of other ranks use as well."""
        return 0 < self.num_heads_k < self.num_head_ranks and self.num_head_ranks % self.num_heads_k == 0

    @property
    def num_head_ranks(self) -> int:
        """How many ranks the heads are cut over."""
        return math.prod([self.mesh.size(i) for i, cut in enumerate(self.cuts) if cut == _HEADS])

    @property
    def head_rank(self) -> int:
        """The number of this rank among those."""
        rank = 0
        for i, cut in enumerate(self.cuts):
            if cut == _HEADS:
                rank = rank * self.mesh.size(i) + self.mesh.get_local_rank(i)
        return rank

    def placements(self, dims: Dims) -> list[Placement]:
        """Those of a tensor that has heads and the batch in these dimensions."""
        cut_dims = [dims.of(cut) for cut in self.cuts]
        return [Replicate() if dim is None else Shard(dim) for dim in cut_dims]

    def local(self, x: Any, dims: Dims) -> Any:
        """This rank's part of a tensor; plain tensors are the same on all ranks. Anything else is returned as is."""
        if not isinstance(x, Tensor):
            return x
        if not isinstance(x, DTensor):
            x = DTensor.from_local(x, self.mesh, [Replicate()] * self.mesh.ndim, run_check=False)
        placements = self.placements(dims)
        # The gradient of what ranks share is the sum of theirs, unless they compute the same.
        grads = [
            Partial() if cut != WHOLE and dims.of(cut) is None else placement
            for cut, placement in zip(self.cuts, placements, strict=True)
        ]
        if placements != [*x.placements] or grads != placements:
            x = x.redistribute(self.mesh, placements)
        return x.to_local(grad_placements=grads)

    def whole(self, x: Tensor, dims: Dims) -> DTensor:
        """The DTensor of the local parts of a contiguous result."""
        shape = list(x.shape)
        if dims.heads is not None:
            shape[dims.heads] = self.num_heads
        if dims.batch is not None:
            shape[dims.batch] = self.batch_size
        stride = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
        placements = self.placements(dims)
        return DTensor.from_local(x, self.mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride)


def replicate(x: Tensor, like: Any) -> DTensor:
    """The DTensor of a tensor that is the same on all ranks, on the mesh of another DTensor."""
    mesh: DeviceMesh = like.device_mesh
    return x if isinstance(x, DTensor) else DTensor.from_local(x, mesh, [Replicate()] * mesh.ndim, run_check=False)


def _cut_of(inputs: Sequence[Any], mesh_dim: int, dims: Sequence[Dims]) -> str:
    """What a dimension of the mesh cuts: of the first input that is cut in a way that attention can use."""
    for x, of_x in zip(inputs, dims, strict=True):
        for cut in (_HEADS, _BATCH):
            dim = of_x.of(cut)
            if dim is not None and x.placements[mesh_dim].is_shard(dim):
                return cut
    return WHOLE


def plan_of(inputs: Sequence[Any], dims: Sequence[Dims], shares_key_heads: bool = True) -> Plan:
    """How to compute attention of DTensors, or of their specs: by what is cut already.

    Heads are cut where each rank has as many query heads as any other and the key heads of these or, if
    shares_key_heads is set, one key head, which other ranks use as well.
    """
    mesh = inputs[0].device_mesh
    cuts = [_cut_of(inputs, i, dims) for i in range(mesh.ndim)]
    num_heads, num_heads_k = inputs[0].shape[-2], inputs[-1].shape[-2]
    plan = Plan(mesh, tuple(cuts), num_heads, num_heads_k, inputs[0].shape[0])
    num_ranks = plan.num_head_ranks
    if num_heads % num_ranks == 0 and (num_heads_k % num_ranks == 0 or (shares_key_heads and plan.shares_key_heads)):
        return plan
    return plan._replace(cuts=tuple(WHOLE if cut == _HEADS else cut for cut in cuts))


def _local_inputs(plan: Plan, inputs: Sequence[DTensor], dims: Sequence[Dims]) -> tuple[Tensor, ...]:
    if not plan.shares_key_heads:
        return tuple(plan.local(x, of_x) for x, of_x in zip(inputs, dims, strict=True))
    head = plan.head_rank * plan.num_heads_k // plan.num_head_ranks
    keys = [
        plan.local(x, of_x._replace(heads=None)).narrow(-2, head, 1)
        for x, of_x in zip(inputs[1:], dims[1:], strict=True)
    ]
    return plan.local(inputs[0], dims[0]), *keys


def _dropout_mask(function: str, plan: Plan, q: Tensor, dropout_p: Any) -> dict[str, Any]:
    """The arguments of the operators for this rank's part of the mask of one device; none without dropout."""
    if not as_float(dropout_p):  # what is not a number is refused later
        return {}
    if _BATCH in plan.cuts:
        expected = "0 for DTensors whose batch is cut (pass what to_local() gives: each rank then draws a mask)"
        reject(ValueError, function, [f"dropout_p: expected {expected}, got {describe(dropout_p)}"])
    state = draw_rng_state(q.device)
    is_first = not any(plan.mesh.get_local_rank(i) for i in range(plan.mesh.ndim))
    # The sum of what the first rank has drawn, and of zeros.
    own = state if is_first else torch.zeros_like(state)
    parts = DTensor.from_local(own, plan.mesh, [Partial()] * plan.mesh.ndim, run_check=False)
    shared = parts.redistribute(plan.mesh, [Replicate()] * plan.mesh.ndim).to_local()
    head_start = plan.head_rank * plan.num_heads // plan.num_head_ranks
    return {"rng_state": shared, "head_start": head_start, "total_heads": plan.num_heads}


def _check(function: str, names: Sequence[str], inputs: Sequence[Any], row_dim: int) -> None:
    plain = [name for name, x in zip(names, inputs, strict=True) if not isinstance(x, DTensor)]
    if plain:
        expected = "a DTensor, as the others are (distribute_tensor makes one)"
        got = dict(zip(names, inputs, strict=True))
        reject(TypeError, function, [f"{name}: expected {expected}, got {describe(got[name])}" for name in plain])
    reasons = reasons_against_cuts(names, inputs, row_dim)
    if reasons:
        reject(ValueError, function, reasons)


def reasons_against_cuts(names: Sequence[str], inputs: Sequence[Any], row_dim: int) -> list[str]:
    """Why attention cannot be computed of DTensors, or of their specs, whose sequences are in a dimension."""
    reasons = []
    for name, x in zip(names, inputs, strict=True):
        if x.device_mesh != inputs[0].device_mesh:
            reasons.append(f"{name}: expected the mesh of {names[0]}, got {x.device_mesh}")
        if x.ndim < 3:
            reasons.append(f"{name}: expected at least 3 dimensions, got shape {tuple(x.shape)}")
        if any(placement.is_shard(row_dim) for placement in x.placements):
            expected = "heads or the batch to be cut, not the sequence, which flash_attn.context_parallel is for"
            reasons.append(f"{name}: expected {expected}, got placements {x.placements}")
    return reasons


def dims_of_options(options: dict[str, Any], is_packed: bool) -> dict[str, Dims]:
    """The dimensions of the tensors, or of the specs of DTensors, among the options of a function or an op."""
    batch = None if is_packed else 0
    dims = {"s_aux": Dims(heads=0)}
    for name, x in options.items():
        ndim = getattr(x, "ndim", 0)
        if ndim == 0:
            continue
        if name == "alibi_slopes":
            dims[name] = Dims(ndim - 1, batch if ndim == 2 else None)
        elif name == "key_ranges":
            dims[name] = Dims(batch=None if x.shape[0] == 1 else batch)
        elif name in _OF_SEQUENCES:
            dims[name] = Dims(batch=batch)
    return dims


def attend(
    run: Callable[..., Any], function: str, layout: str, inputs: Sequence[Any], sequences: Any, options: dict[str, Any]
) -> Any:
    """Run attention on local tensors.

    Args:
        run: attention of a rank, flash_attn.autograd._attend_shard.
        function, layout, inputs, sequences, options: its arguments; some of the inputs are DTensors.

    Returns:
        What run returns, as DTensors.

    Raises:
        TypeError: some of the inputs are not DTensors.
        ValueError: the inputs are on different meshes; their sequences are cut; or the batch is cut, with dropout.
    """
    is_packed = sequences is not None
    _check(function, layout.split(", "), inputs, 0 if is_packed else 1)
    dims = [Dims(x.dim() - 2, None if is_packed else 0) for x in inputs]
    plan = plan_of(inputs, dims)
    local = _local_inputs(plan, inputs, dims)
    if is_packed:
        sequences = type(sequences)(*(plan.local(x, Dims()) for x in sequences))
    of_options = dims_of_options(options, is_packed)
    options = options | {name: plan.local(options[name], of_option) for name, of_option in of_options.items()}
    of_mask = _dropout_mask(function, plan, local[0], options["dropout_p"])
    results = run(function, layout, local, sequences, options, of_mask)
    of_results = [dims[0]._replace(heads=1 if is_packed else 2)]
    if options["return_attn_probs"]:
        of_probs = Dims(1, None if is_packed else 0) if of_mask else Dims()
        of_results += [Dims(0) if is_packed else Dims(1, 0), of_probs]
    if options["return_max_logits"]:
        of_results.append(Dims(1, None if is_packed else 0))
    if not isinstance(results, tuple):
        return plan.whole(results, of_results[0])
    return tuple(plan.whole(x, of_x) for x, of_x in zip(results, of_results, strict=True))
