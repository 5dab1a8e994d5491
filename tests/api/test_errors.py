"""Invalid calls: one error with function, argument, expected and received value, before any computation."""

import itertools

import pytest
import torch

import flash_attn
from bad_calls import CALLS, SHAPES, VALUES, assert_lists, backward, dense, into, op_of, varlen

ROWS = SHAPES + VALUES
ONLY_IN_OPS = {"seqused_k", "leftpad_k", "rng_state", "block_table", "cu_seqlens_q", "cu_seqlens_k"}
ONLY_IN_OPS |= {"head_start", "total_heads"}


def name_of(row) -> str:
    call, changes, _ = row
    shown = [f"{key}={tuple(x.shape) if isinstance(x, torch.Tensor) else x}" for key, x in changes.items()]
    return f"{call}-{'-'.join(shown)}".replace(" ", "")


def run_op(call: str, arguments: dict):
    return op_of(call)(**arguments)


def rejection(call: str, arguments: dict) -> str:
    with pytest.raises(ValueError) as error:
        run_op(call, arguments)
    return str(error.value)


def assert_explains(text: str, call: str, reasons: list) -> None:
    assert_lists(text, CALLS[call][2], reasons)


def to_meta(arguments: dict) -> dict:
    return {name: x.to("meta") if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}


@pytest.mark.parametrize("row", ROWS, ids=name_of)
def test_message(row):
    """The message is complete; outputs are not written; the next valid call works."""
    call, changes, reasons = row
    arguments = {**CALLS[call][0](), **changes}
    results = ("out",) if "into" in call else ("dq", "dk", "dv")
    written = {name: arguments[name].clone() for name in results if name in arguments}
    assert_explains(rejection(call, arguments), call, reasons)
    for name, before in written.items():
        assert torch.equal(arguments[name], before), f"{name} was written"
    result = run_op(call, CALLS[call][0]())
    results = result if isinstance(result, tuple) else (result,)
    assert all(torch.isfinite(x).any() for x in results if x.numel())  # max_logits: none, as they are not asked for


def expand_of_meta(row) -> dict:
    """The arguments of a row on the meta device; a tensor that is used twice stays one tensor."""
    call, changes, _ = row
    arguments = to_meta({**CALLS[call][0](), **changes})
    for name, x in changes.items():
        if isinstance(x, torch.Tensor) and 0 in x.stride():
            arguments[name] = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
    return arguments


@pytest.mark.parametrize("row", SHAPES, ids=name_of)
def test_meta_says_the_same(row):
    call, changes, _ = row
    assert rejection(call, expand_of_meta(row)) == rejection(call, {**CALLS[call][0](), **changes})


@pytest.mark.parametrize("row", VALUES, ids=name_of)
def test_meta_does_not_look_at_values(row):
    result = run_op(row[0], expand_of_meta(row))
    assert all(x.is_meta for x in (result if isinstance(result, tuple) else (result,)))


def is_public(row) -> bool:
    """Whether a public function has all of the changed arguments."""
    call, changes, _ = row
    if {"q_start", "q_starts"} <= set(changes):
        return False  # one argument of the public functions
    of_varlen = {"block_table", "cu_seqlens_q", "cu_seqlens_k"} if call in ("varlen", "paged") else set()
    return call in ("dense", "varlen", "paged") and not set(changes) & (ONLY_IN_OPS - of_varlen)


PUBLIC = [row for row in ROWS if is_public(row)]


def call_public(call: str, a: dict):
    names = ("dropout_p", "softmax_scale", "causal", "attention_chunk", "softcap", "alibi_slopes")
    options = {name: a[name] for name in (*names, "s_aux", "key_ranges")}
    options["window_size"] = (a["window_size_left"], a["window_size_right"])
    for name in ("q_start", "k_start"):
        options[name] = a[name] if a[f"{name}s"] is None else a[f"{name}s"]
    if call == "dense":
        return flash_attn.flash_attn_func(a["q"], a["k"], a["v"], **options)
    lengths = (a["cu_seqlens_q"], a["cu_seqlens_k"], a["max_seqlen_q"], a["max_seqlen_k"])
    return flash_attn.flash_attn_varlen_func(a["q"], a["k"], a["v"], *lengths, **options, block_table=a["block_table"])


@pytest.mark.parametrize("row", PUBLIC, ids=name_of)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_public_functions_say_the_same(row, requires_grad):
    call, changes, reasons = row
    if any(x is None for x in changes.values()):
        return check_missing_lengths(changes)
    a = {**CALLS[call][0](), **changes}
    for name in "qkv":
        if requires_grad and a[name].is_floating_point():
            a[name] = a[name].detach().requires_grad_()
    with pytest.raises(ValueError) as error:
        call_public(call, a)
    assert_explains(str(error.value), call, reasons)


def check_missing_lengths(changes: dict) -> None:
    """None has the wrong type where a public function has no default."""
    a = {**varlen(), **changes}
    with pytest.raises(TypeError, match=f"flash_attn_varlen_func: {next(iter(changes))}: expected .*, got NoneType"):
        flash_attn.flash_attn_varlen_func(a["q"], a["k"], a["v"], a["cu_seqlens_q"], a["cu_seqlens_k"], 3, 4)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        *(("dense", name) for name in ("k", "v", "alibi_slopes", "seqused_k", "leftpad_k", "rng_state")),
        *(("varlen", name) for name in ("cu_seqlens_q", "cu_seqlens_k")),
        ("paged", "block_table"),
        ("into", "out"),
        *(("backward", name) for name in ("k", "v", "dout", "out", "softmax_lse", "dlse", "dq", "dk", "dv")),
    ],
)
def test_devices(call, name):
    """A tensor on another device than q: the error names both devices."""
    good = CALLS[call][0]()
    optional = {
        "alibi_slopes": torch.ones(4),
        "dlse": torch.ones(2, 4, 5),
        "rng_state": torch.zeros(2, dtype=torch.int64),
    }
    optional.update(seqused_k=torch.ones(2, dtype=torch.int32), leftpad_k=torch.zeros(2, dtype=torch.int32))
    good.update({key: value for key, value in optional.items() if key == name})
    good["dropout_p"] = 0.5 if name == "rng_state" else 0.0
    run_op(call, good)
    text = rejection(call, {**good, name: good[name].to("meta")})
    assert_explains(text, call, [(name, "device cpu like q", "meta")])
    text = rejection(call, {**to_meta(good), name: good[name]})
    assert_explains(text, call, [(name, "device meta like q", "cpu")])


def test_other_kinds_of_tensors():
    """Sparse, nested and other non-strided tensors are rejected by name."""
    call = dense()
    call["q"], call["k"], call["v"] = (call[name].to_sparse() for name in "qkv")
    with pytest.raises(NotImplementedError, match="flash_attn::fwd"):
        torch.ops.flash_attn.fwd(**call)


def test_rejected_backward_writes_nothing():
    """Not even uninitialised memory: NaN stays NaN."""
    call = backward()
    for name in ("dq", "dk", "dv"):
        call[name].fill_(torch.nan)
    call["dout"] = call["dout"][:1]
    assert_explains(rejection("backward", call), "backward", [("dout", "batch_size=2", "(1, 5, 4, 6)")])
    assert all(torch.isnan(call[name]).all() for name in ("dq", "dk", "dv"))


def square(make) -> dict:
    """The call with 4 rows of 8 for every tensor, so that each could be any other."""
    tensors = {"q", "k", "v", "dout", "out", "dq", "dk", "dv"}
    return {name: torch.ones(2, 4, 4, 8) if name in tensors else x for name, x in make().items()} | (
        {"softmax_lse": torch.ones(2, 4, 4)} if make is backward else {}
    )


@pytest.mark.parametrize(
    ("make", "op", "name", "other"),
    [
        *((into, "fwd", "out", other) for other in "qkv"),
        *((backward, "bwd", name, other) for name in ("dq", "dk", "dv") for other in ("q", "k", "v", "dout", "out")),
        *((backward, "bwd", *pair) for pair in (("dk", "dq"), ("dv", "dq"), ("dv", "dk"))),
    ],
)
def test_results_in_the_memory_of_others(make, op, name, other):
    """Kernels read what they have not written yet. Slices of one tensor are apart."""
    call, function = square(make), getattr(torch.ops.flash_attn, op).out
    message = f"{name}: expected memory apart from {other}, got a tensor that shares"
    packed, longer, halves = torch.ones(2, 4, 3, 4, 8), torch.ones(2, 5, 4, 8), torch.ones(2, 2, 4, 4, 8)
    for one, two in (
        (call[other], call[other]),
        (call[other].view(-1).view_as(call[other]), call[other]),
        (packed[:, :, 1], packed[:, :, 1]),
        (longer[:, 1:], longer[:, :4]),
        (halves[:, 0], halves[:, 0].transpose(1, 2)),
    ):
        with pytest.raises(ValueError, match=message):
            function(**{**call, name: one, other: two})
    for one, two in (
        *itertools.permutations(packed.unbind(2), 2),
        torch.ones(2, 4, 4, 2, 8).unbind(3),
        torch.ones(2, 4, 4, 8, 2).unbind(4),
        torch.ones(2, 4, 8, 8).split(4, 2),
        torch.ones(2, 8, 4, 8).split(4, 1),
        (halves[:, 0], halves[:, 1].transpose(1, 2)),
    ):
        function(**{**call, name: one, other: two})


@pytest.mark.parametrize(
    "strides", [(0, 64, 8, 1), (128, 32, 4, 1), (128, 32, 8, 0), (8, 8, 8, 8), (96, 32, 8, 1), (1, 8, 64, 65)]
)
def test_results_whose_elements_share_memory(strides):
    out = torch.ones(1000).as_strided((2, 4, 4, 8), strides)
    with pytest.raises(ValueError, match=r"out: expected elements that do not share memory, got (an expanded|a view)"):
        torch.ops.flash_attn.fwd.out(**square(into) | {"out": out})


@pytest.mark.parametrize("strides", [(1, 2, 8, 32), (256, 8, 64, 1), (8, 64, 16, 1), (129, 32, 8, 1)])
def test_results_in_unusual_order(strides):
    call = square(into)
    call["out"] = torch.full((2000,), torch.nan).as_strided((2, 4, 4, 8), strides)
    torch.ops.flash_attn.fwd.out(**call)
    assert torch.equal(call["out"], torch.ones(2, 4, 4, 8))


def test_autograd_rejects_before_drawing():
    """A rejected call with dropout does not advance the generator."""
    x = [t.requires_grad_() for t in (torch.ones(1, 3, 2, 8), torch.ones(1, 3, 2, 8), torch.ones(1, 3, 2, 8))]
    with pytest.raises(ValueError, match="softcap"):
        flash_attn.flash_attn_func(*x, dropout_p=0.5, softcap=float("inf"))
    out = flash_attn.flash_attn_func(*x, dropout_p=0.5)
    out.sum().backward()
    assert torch.isfinite(x[0].grad).all()


@pytest.mark.parametrize("p", [1.0, -0.5, 2.0, float("nan")])
def test_bad_probability_draws_nothing_it_needs(p):
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match=r"flash_attn_func: dropout_p: expected .*\[0, 1\), got"):
        flash_attn.flash_attn_func(torch.ones(1, 3, 2, 8), torch.ones(1, 3, 2, 8), torch.ones(1, 3, 2, 8), p)
    torch.set_rng_state(before)
    assert torch.isfinite(flash_attn.flash_attn_func(*(torch.ones(1, 3, 2, 8) for _ in range(3)), 0.5)).all()
