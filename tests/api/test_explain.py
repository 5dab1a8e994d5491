"""flash_attn.explain: the backend of a call, and why no better one runs it; also FLASH_ATTN_BACKEND."""

import dataclasses

import pytest
import torch

import flash_attn

NAMES = [backend["name"] for backend in flash_attn.build_info()["backends"]]


def tensors(*shape, dtype=torch.float32):
    return tuple(torch.zeros(shape, dtype=dtype) for _ in range(3))


def packed(**changes):
    cu = torch.tensor([0, 3, 7], dtype=torch.int32)
    return {"cu_seqlens_q": cu, "cu_seqlens_k": cu, **changes}


CALLS = {
    "dense": (tensors(1, 5, 2, 8), {}),
    "every option": (
        tensors(1, 5, 2, 8),
        {
            "dropout_p": 0.1, "softmax_scale": 0.3, "causal": True, "window_size": [3, 1], "softcap": 2.0,
            "alibi_slopes": torch.ones(2), "deterministic": True, "return_attn_probs": True, "attention_chunk": 4,
            "q_start": 32, "k_start": torch.tensor([64], dtype=torch.int32), "out_dtype": torch.float32,
            "s_aux": torch.ones(2), "key_ranges": torch.zeros(1, 5, 2, dtype=torch.int32), "return_max_logits": True,
        },
    ),
    "packed": (tensors(7, 2, 8), packed()),
    "packed, lengths given": (tensors(7, 2, 8), packed(max_seqlen_q=4, max_seqlen_k=torch.tensor(4))),
    "pages": (
        (torch.zeros(7, 2, 8), *tensors(3, 4, 2, 8)[:2]),
        packed(block_table=torch.tensor([[0], [2]], dtype=torch.int32)),
    ),
    "needs gradients": (tuple(x.requires_grad_() for x in tensors(1, 5, 2, 8)), {}),
    "empty batch": (tensors(0, 5, 2, 8), {}),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_calls_on_the_cpu(name):
    inputs, options = CALLS[name]
    said = flash_attn.explain(*inputs, **options)
    assert said.backend == "cpu"
    assert [backend for backend, _ in said.better] == NAMES[:-1]
    built = {backend["name"]: backend["built_for"] for backend in flash_attn.build_info()["backends"]}
    for backend, reason in said.better:
        assert reason == ("the tensors are on the CPU" if built[backend] else "it is not in this build")


def test_it_is_a_record_that_prints_well():
    said = flash_attn.explain(*tensors(1, 5, 2, 8))
    assert isinstance(said, flash_attn.Explanation)
    with pytest.raises(dataclasses.FrozenInstanceError):
        said.backend = "sm90"
    example = flash_attn.Explanation("sm80", (("sm90", "keys and values are in pages (block_table)"),))
    assert str(example) == "runs on sm80\nnot on sm90: keys and values are in pages (block_table)"
    assert str(flash_attn.Explanation("", ())) == "no backend can run it"


def test_under_autocast_it_is_the_call_with_cast_inputs():
    q, k, v = tensors(1, 5, 2, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert flash_attn.explain(q, k.half(), v).backend == "cpu"
    with pytest.raises(ValueError, match="q, k, v: expected one dtype"):
        flash_attn.explain(q, k.half(), v)


BAD = {
    "type": (TypeError, {"causal": "yes"}, "explain: causal: expected bool"),
    "type of a later argument": (TypeError, {"attention_chunk": 1.5}, "explain: attention_chunk: expected int"),
    "sinks": (ValueError, {"s_aux": torch.ones(3)}, r"s_aux: expected .*num_heads=2"),
    "dtype": (ValueError, {"out_dtype": torch.bfloat16}, "explain: out_dtype: expected torch.float32 for inputs of"),
    "start": (ValueError, {"q_start": -1}, "q_start: expected a position of at least 0"),
    "shape": (ValueError, {"k": torch.zeros(1, 5, 2, 9)}, "k: expected shape"),
    "value": (ValueError, {"dropout_p": 2.0}, "dropout_p: expected a number in"),
    "one of two": (TypeError, packed(cu_seqlens_k=None), "cu_seqlens_k: expected torch.Tensor, got None"),
    "lengths": (ValueError, packed(cu_seqlens_k=torch.tensor([0, 9, 7], dtype=torch.int32)), "cu_seqlens_k"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_the_call_would_refuse_is_refused(name):
    error, changes, message = BAD[name]
    inputs = dict(zip("qkv", tensors(7, 2, 8) if "cu_seqlens_q" in changes else tensors(1, 5, 2, 8), strict=True))
    with pytest.raises(error, match=message):
        flash_attn.explain(**{**inputs, **changes})


def test_a_backend_that_is_asked_for(monkeypatch):
    inputs = tensors(1, 5, 2, 8)
    monkeypatch.setenv("FLASH_ATTN_BACKEND", "cpu")
    assert flash_attn.explain(*inputs).backend == "cpu"
    for name, message in [("sm80", "takes tensors on a CUDA device"), ("sm70", "there is no such backend")]:
        monkeypatch.setenv("FLASH_ATTN_BACKEND", name)
        with pytest.raises(RuntimeError, match=message):
            flash_attn.explain(*inputs)
