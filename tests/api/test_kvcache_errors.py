"""Invalid calls of flash_attn_with_kvcache: one error with all reasons, and no bit of the caches is changed."""

import re
from unittest.mock import patch

import numpy as np
import pytest
import torch

import flash_attn
from bad_calls import assert_lists, ints, rows
from bad_kvcache_calls import CALLS, FINE, PREFIX, SHAPES, VALUES, appending, latent, paged, plain
from flash_attn import kv_cache


def name_of(row) -> str:
    shown = [f"{key}={tuple(x.shape) if isinstance(x, torch.Tensor) else x}" for key, x in row[1].items()]
    return f"{row[0]}-{'-'.join(shown)}".replace(" ", "")


def call(arguments: dict):
    return flash_attn.flash_attn_with_kvcache(**arguments)


def to_meta(arguments: dict) -> dict:
    """The arguments on the meta device, with the same strides; what shares memory still does."""
    storages, moved = {}, {}
    for name, x in arguments.items():
        if not isinstance(x, torch.Tensor):
            moved[name] = x
            continue
        storage, size = x.untyped_storage(), x.untyped_storage().nbytes() // x.element_size()
        key = storage.data_ptr() or name
        if key not in storages:
            storages[key] = torch.empty(size, dtype=x.dtype, device="meta")
        moved[name] = storages[key].as_strided(x.shape, x.stride(), x.storage_offset())
    return moved


def rejection(arguments: dict, error: type = ValueError) -> str:
    """The text of the error, the same from C++ and through Python. The caches, full of different numbers, stay."""
    caches = [x for name, x in arguments.items() if name.endswith("_cache") and isinstance(x, torch.Tensor)]
    before = [x.clone() for x in caches]
    texts = []
    for eager_call in (kv_cache._eager_call, lambda *_: None):
        with patch.object(kv_cache, "_eager_call", eager_call), pytest.raises(error) as raised:
            call(arguments)
        texts.append(str(raised.value))
    assert all(x.is_meta or torch.equal(x, y) for x, y in zip(caches, before, strict=True)), "a cache was written"
    assert texts[0] == texts[1]
    return texts[0]


@pytest.mark.parametrize("row", SHAPES + VALUES, ids=name_of)
def test_message(row):
    """The message is complete; the caches are not written; the next valid call works."""
    of, changes, reasons = row
    arguments = {**CALLS[of](), **changes}
    for name in ("k", "v"):  # what would be written differs from what is there
        if isinstance(arguments.get(name), torch.Tensor):
            arguments[name] = arguments[name] + 1
    assert_lists(rejection(arguments), PREFIX, reasons)
    assert torch.isfinite(call(CALLS[of]())).all()


@pytest.mark.parametrize("row", SHAPES, ids=name_of)
def test_meta_says_the_same(row):
    of, changes, _ = row
    arguments = {**CALLS[of](), **changes}
    assert rejection(to_meta(arguments)) == rejection(arguments)


@pytest.mark.parametrize("row", VALUES, ids=name_of)
def test_meta_does_not_look_at_values(row):
    assert call(to_meta({**CALLS[row[0]](), **row[1]})).is_meta


@pytest.mark.parametrize("row", FINE, ids=name_of)
def test_fine(row):
    out = call({**CALLS[row[0]](), **row[1]})
    skipped = row[1].get("cache_seqlens")
    if isinstance(skipped, torch.Tensor):
        assert (out[skipped < 0] == 0).all()
    elif skipped == -1:
        assert (out == 0).all()
    assert torch.isfinite(out).all()


DEVICES = [
    *(("plain", name) for name in ("k_cache", "v_cache", "cache_seqlens", "cache_leftpad", "alibi_slopes")),
    *(("rotary", name) for name in ("k", "v", "rotary_cos", "rotary_sin")),
    ("chosen", "cache_batch_idx"),
    ("paged", "block_table"),
]


@pytest.mark.parametrize(("of", "name"), DEVICES)
def test_devices(of, name):
    """A tensor on another device than q: the error names both devices."""
    good = CALLS[of]()
    good.update({"cache_leftpad": ints(0, 1), "alibi_slopes": rows(4)} if name not in good else {})
    call(good)
    assert_lists(rejection({**good, name: good[name].to("meta")}), PREFIX, [(name, "device cpu like q", "meta")])
    text = rejection({**to_meta(good), name: good[name]})
    assert_lists(text, PREFIX, [(name, "device meta like q", "cpu")])


@pytest.mark.parametrize("name", ["q", "k", "v", "k_cache", "v_cache"])
def test_grad_mode(name):
    """There is no backward pass: an error says what to do instead, and nothing is written."""
    arguments = appending()
    arguments[name] = arguments[name].requires_grad_()
    text = rejection(arguments)
    assert re.fullmatch(rf"{PREFIX}({name}|inputs): expected .*torch.no_grad\(\).*flash_attn_func.*, got .+", text), (
        text
    )
    with torch.no_grad():
        assert not call(arguments).requires_grad


TYPE_ERRORS = {
    "q": [None, [1.0], np.zeros((2, 3, 4, 8))],
    "k_cache": [None, 3],
    "v_cache": [None, "v"],
    "k": [3, [1.0]],
    "v": ["v"],
    "rotary_cos": [0.5],
    "rotary_sin": [[[0.5]]],
    "cache_seqlens": ["4", 4.5, [4, 7], (4, 7)],
    "cache_batch_idx": [[0, 1], 0],
    "cache_leftpad": [[0, 0], 0],
    "block_table": [[[0]], 0],
    "softmax_scale": ["1", [1.0], 1j],
    "causal": ["yes", None, 2],
    "window_size": [3, None, (1,), (1, 2, 3), (1.5, 2), "12"],
    "softcap": ["1", None],
    "rotary_interleaved": ["yes", None, 2],
    "alibi_slopes": [[0.1] * 4, 0.5],
    "num_splits": [None, 1.5, "2"],
    "attention_chunk": [None, 1.5, "8"],
}


@pytest.mark.parametrize(
    ("argument", "value"), [(argument, value) for argument, values in TYPE_ERRORS.items() for value in values], ids=repr
)
def test_type_errors(argument, value):
    text = rejection({**appending(), argument: value}, TypeError)
    assert re.fullmatch(rf"{PREFIX}{argument}: expected .+, got .+", text, re.DOTALL), text
    assert torch.isfinite(call(appending())).all(), "the next good call works"


def test_several_wrong_types_are_told_at_once():
    text = rejection({**appending(), "q": None, "num_splits": "2", "window_size": 7}, TypeError)
    for argument in ("q", "num_splits", "window_size"):
        assert re.search(rf"\b{argument}: expected .+, got .+", text), text


NUMPY = {
    "softmax_scale": np.float64(0.5),
    "num_splits": np.int64(2),
    "window_size": np.array([2, 1]),
    "causal": np.True_,
}


@pytest.mark.parametrize(
    ("argument", "value", "equal"),
    [
        *((name, value, value.tolist()) for name, value in NUMPY.items()),
        ("cache_seqlens", np.int32(5), 5),
        ("softcap", 3, 3.0),
        ("causal", 1, True),
    ],
)
def test_other_types_of_numbers(argument, value, equal):
    torch.manual_seed(0)
    good = {name: torch.randn_like(x) if x.is_floating_point() else x for name, x in plain().items()}
    assert torch.equal(call({**good, argument: value}), call({**good, argument: equal}))


def test_missing_scale_of_latent_attention_is_explained():
    """No default: the scale of multi-head latent attention is 192 ** -0.5, not 576 ** -0.5."""
    text = rejection({**latent(), "softmax_scale": None})
    assert "softmax_scale" in text and "576" in text


def test_rejected_calls_in_a_row():
    """Many rejected calls leave no trace in the next good one."""
    arguments = paged()
    expected = call(paged())
    for of, changes, _ in [row for row in VALUES if row[0] == "paged"] * 3:
        rejection({**CALLS[of](), **changes})
        assert torch.equal(call(arguments), expected)
