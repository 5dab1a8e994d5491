"""torch.ops.flash_attn.fwd and bwd on DTensors, for programs that call these ops themselves.

    import flash_attn.integrations.dtensor

    flash_attn.integrations.dtensor.register()

Each rank then computes the heads or the sequences of the batch that it has. The functions of flash_attn do so without
this, also with dropout, with keyword tensors that are not cut yet, and with fewer key heads than ranks.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._dtensor_spec import DTensorSpec
from torch.distributed.tensor._op_schema import OpSchema, OpSpec, OpStrategy, RuntimeSchemaInfo

from flash_attn._checks import describe, reject
from flash_attn._library import build_info
from flash_attn._sharding import WHOLE, Dims, Plan, dims_of_options, plan_of, reasons_against_cuts

_RESULTS = {"fwd": ("out", "softmax_lse", "max_logits"), "bwd": ("dq", "dk", "dv", "dsoftmax_sum")}
_LIKE_Q = ("q", "k", "v", "dout", "out", "dq", "dk", "dv")

# The arguments of a call by name. Tensors are DTensorSpecs.
_Call = dict[str, Any]


def _schema_of(name: str) -> torch.FunctionSchema:
    schema: torch.FunctionSchema = getattr(torch.ops.flash_attn, name).default._schema
    return schema


def _keywords_of(name: str) -> list[str]:
    return [argument.name for argument in _schema_of(name).arguments if argument.kwarg_only]


def _dims_of(call: _Call) -> dict[str, Dims]:
    """The dimensions of heads and of the batch, of arguments and results. What is not in the dict has neither."""
    is_packed = call.get("cu_seqlens_q") is not None
    batch = None if is_packed else 0
    dims = {name: Dims((call[name] if name in "qkv" else call["q"]).ndim - 2, batch) for name in _LIKE_Q}
    dims |= dict.fromkeys(("softmax_lse", "dlse", "dsoftmax_sum"), Dims(0) if is_packed else Dims(1, 0))
    if call.get("return_max_logits"):
        dims["max_logits"] = Dims(1, batch)
    return dims | dims_of_options(call, is_packed)


def _plan(name: str, call: _Call, dims: dict[str, Dims]) -> Plan:
    """What each dimension of the mesh cuts.

    Raises:
        ValueError: the sequences are cut; or dropout is on and anything is cut; or a keyword argument is on another
            mesh, or not cut as it has to be: DTensor redistributes positional arguments only.
    """
    qkv = [call[key] for key in "qkv"]
    is_packed = call.get("cu_seqlens_q") is not None
    function = f"torch.ops.flash_attn.{name}"
    if reasons := reasons_against_cuts("qkv", qkv, 0 if is_packed else 1):
        reject(ValueError, function, reasons)
    plan = plan_of(qkv, [dims[key] for key in "qkv"], shares_key_heads=False)
    for key in _keywords_of(name):
        spec, wanted = call.get(key), tuple(plan.placements(dims.get(key, Dims())))
        if not isinstance(spec, DTensorSpec):
            continue
        if spec.mesh != qkv[0].mesh:
            reasons.append(f"{key}: expected the mesh of q, got {spec.mesh}")
        elif spec.placements != wanted:
            expected = f"placements {wanted}, as this call cuts heads and the batch"
            reasons.append(f"{key}: expected {expected}, got {spec.placements}")
    dropout_p = call.get("dropout_p", 0.0)
    if dropout_p > 0 and set(plan.cuts) != {WHOLE}:
        expected = "0 for tensors that are cut, unless flash_attn_func is called, which has the mask of one device"
        reasons.append(f"dropout_p: expected {expected}, got {describe(dropout_p)}")
    if reasons:
        reject(ValueError, function, reasons)
    return plan


def _strategy(name: str, schema: OpSchema) -> OpStrategy:
    """How an op runs on DTensors: the placements of its arguments, which DTensor sees to, and of its results."""

    def as_spec(x: Any) -> Any:
        return x.strategies[0].output_spec if isinstance(x, OpStrategy) else x

    names = [argument.name for argument in _schema_of(name).arguments]
    call = {key: as_spec(x) for key, x in zip(names, schema.args_schema, strict=False)}
    call |= {key: as_spec(x) for key, x in schema.kwargs_schema.items()}
    dims = _dims_of(call)
    plan = _plan(name, call, dims)

    def spec_of(key: str) -> DTensorSpec:
        meta = call[key].tensor_meta if key in call else None
        return DTensorSpec(plan.mesh, tuple(plan.placements(dims.get(key, Dims()))), tensor_meta=meta)

    results = tuple(spec_of(key) for key in _RESULTS[name])
    inputs = [spec_of(key) for key, x in call.items() if isinstance(x, DTensorSpec)]
    return OpStrategy([OpSpec(results, inputs, [[0.0] for _ in inputs])])


def register() -> None:
    """Make the ops fwd and bwd accept DTensors; called twice, it changes nothing.

    Heads or the batch of q, k and v may be cut, on a mesh of any number of dimensions, or nothing. Where they are cut
    differently, k and v follow q; heads that cannot be cut evenly are put together first. Tensors among the keyword
    arguments are DTensors as well, cut as heads and the batch then are.

    Raises:
        RuntimeError: the extension is not available.
    """
    build_info()
    # register_sharding, above this, takes the dimensions of the mesh one by one and offers every combination of them.
    # Of these DTensor takes what moves least, and it may be one that keyword arguments do not fit.
    propagator = DTensor._op_dispatcher.sharding_propagator
    for name in _RESULTS:
        # A decision is kept for calls that are alike in their tensors and in these keywords.
        alike = RuntimeSchemaInfo(static_kwargkey=_keywords_of(name))
        propagator.register_op_strategy(getattr(torch.ops.flash_attn, name).default, partial(_strategy, name), alike)
