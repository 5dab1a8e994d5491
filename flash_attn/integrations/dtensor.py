"""torch.ops.flash_attn.fwd and bwd on DTensors, for programs that call these ops themselves.

    import flash_attn.integrations.dtensor

    flash_attn.integrations.dtensor.register()

Each rank then computes the heads or the sequences of the batch that it has, as the functions of flash_attn do, which
take DTensors without this.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding

from flash_attn._checks import describe, reject
from flash_attn._library import build_info
from flash_attn._sharding import CUTS, WHOLE, Dims, plan_of, reasons_against_cuts

_RESULTS = {"fwd": ("out", "softmax_lse", "max_logits"), "bwd": ("dq", "dk", "dv", "dsoftmax_sum")}
_LIKE_Q = ("q", "k", "v", "dout", "out", "dq", "dk", "dv")
_OF_SEQUENCES = ("seqused_k", "leftpad_k", "q_starts", "k_starts")

# The arguments of a call by name. Tensors are specs, with shape, ndim and placements.
_Call = dict[str, Any]


def _schema_of(name: str) -> torch.FunctionSchema:
    schema: torch.FunctionSchema = getattr(torch.ops.flash_attn, name).default._schema
    return schema


def _keywords_of(name: str) -> list[str]:
    return [argument.name for argument in _schema_of(name).arguments if argument.kwarg_only]


def _dims_of(call: _Call) -> dict[str, Dims]:
    """The dimensions of heads and of the batch, of arguments and results; none of those that are not named here."""
    is_packed = call.get("cu_seqlens_q") is not None
    batch = None if is_packed else 0
    dims = {name: Dims((call[name] if name in "qkv" else call["q"]).ndim - 2, batch) for name in _LIKE_Q}
    dims |= dict.fromkeys(("softmax_lse", "dlse", "dsoftmax_sum"), Dims(0) if is_packed else Dims(1, 0))
    dims |= dict.fromkeys(_OF_SEQUENCES, Dims(batch=batch))
    dims["s_aux"] = Dims(heads=0)
    if call.get("return_max_logits"):
        dims["max_logits"] = Dims(1, batch)
    if (slopes := call.get("alibi_slopes")) is not None:
        dims["alibi_slopes"] = Dims(slopes.ndim - 1, batch if slopes.ndim == 2 else None)
    if (ranges := call.get("key_ranges")) is not None and ranges.shape[0] > 1:
        dims["key_ranges"] = Dims(batch=batch)
    return dims


def _placement(dims: Dims, cut: str) -> Placement:
    dim = dims.of(cut)
    return Replicate() if dim is None else Shard(dim)


def _cuts_of(name: str, call: _Call, dims: dict[str, Dims]) -> tuple[str, ...]:
    """What each dimension of the mesh cuts.

    Raises:
        ValueError: the sequences are cut, or dropout is on and anything is cut, or a keyword argument is not cut as it
            has to be. DTensor redistributes positional arguments only.
    """
    qkv = [call[key] for key in "qkv"]
    is_packed = call.get("cu_seqlens_q") is not None
    function = f"torch.ops.flash_attn.{name}"
    if reasons := reasons_against_cuts("qkv", qkv, 0 if is_packed else 1):
        reject(ValueError, function, reasons)
    cuts = plan_of(qkv, [dims[key] for key in "qkv"], shares_key_heads=False).cuts
    for key in _keywords_of(name):
        found = getattr(call.get(key), "placements", None)
        wanted = tuple(_placement(dims.get(key, Dims()), cut) for cut in cuts)
        if found is not None and tuple(found) != wanted:
            reasons.append(f"{key}: expected placements {wanted}, which q, k and v ask for, got {found}")
    dropout_p = call.get("dropout_p", 0.0)
    if dropout_p > 0 and set(cuts) != {WHOLE}:
        expected = "0 for tensors that are cut, unless flash_attn_func is called, which has the mask of one device"
        reasons.append(f"dropout_p: expected {expected}, got {describe(dropout_p)}")
    if reasons:
        reject(ValueError, function, reasons)
    return cuts


def _shardings(name: str, *args: Any, **kwargs: Any) -> list[tuple[list[Placement | None], list[Placement | None]]]:
    """The placements of results and arguments on one dimension of the mesh, for every cut that is used.

    DTensor takes, over all dimensions of the mesh, what moves least. It skips what leaves a rank without a row: then
    all ranks compute everything, if the keyword arguments allow that.
    """
    names = [argument.name for argument in _schema_of(name).arguments]
    call = dict(zip(names, args, strict=False)) | kwargs
    dims = _dims_of(call)
    used = {*_cuts_of(name, call, dims)}
    keywords = [key for key in kwargs if hasattr(call[key], "placements")]
    if all(placement.is_replicate() for key in keywords for placement in call[key].placements):
        used.add(WHOLE)

    def placement(key: str, cut: str) -> Placement | None:
        return _placement(dims.get(key, Dims()), cut) if hasattr(call[key], "placements") else None

    shardings = []
    for cut in (cut for cut in CUTS if cut in used):
        results: list[Placement | None] = [_placement(dims.get(key, Dims()), cut) for key in _RESULTS[name]]
        given = [placement(key, cut) for key in names[: len(args)]]
        given += [placement(key, cut) for key in keywords]
        shardings.append((results, given))
    return shardings


def register() -> None:
    """Make the ops fwd and bwd accept DTensors; called twice, it changes nothing.

    Heads or the batch of q, k and v may be cut, on a mesh of any number of dimensions, or nothing. Where they are cut
    differently, k and v follow q. Tensors among the keyword arguments are DTensors as well, cut like the heads and the
    batch of q.

    Raises:
        RuntimeError: the extension is not available.
    """
    build_info()
    known = DTensor._op_dispatcher.sharding_propagator.op_to_schema_info
    for name in _RESULTS:
        overload = getattr(torch.ops.flash_attn, name).default
        if overload in known:
            continue
        register_sharding(overload)(partial(_shardings, name))
        # A decision is kept for calls alike in these arguments. By default, only integers count.
        known[overload] = dataclasses.replace(known[overload], static_kwargkey=_keywords_of(name))
