"""What MHA refuses with inference_params, before it writes to a cache."""

import pytest
import torch

from decoding import make, params_of, tokens
from flash_attn.modules.mha import MHA
from flash_attn.utils.generation import InferenceParams

with_backends = pytest.mark.parametrize("use_flash_attn", [True, False], ids=["flash", "torch"])


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def call(options=None, seqlen=2, x_options=None, cache=None, **fields):
    """A call of MHA with 2 tokens of 3 sequences, and a cache of 5 sequences and 12 rows."""

    def run_it(use_flash_attn):
        module = make(use_flash_attn, **(options or {}))
        params = params_of(make(use_flash_attn), **fields)
        if cache is not None:
            params.key_value_memory_dict[0] = cache
        try:
            module(tokens(seqlen=seqlen), inference_params=params, **(x_options or {}))
        finally:
            stored = params.key_value_memory_dict[0]
            is_readable = isinstance(stored, torch.Tensor) and not stored.is_meta
            assert not is_readable or stored.isnan().all(), "nothing is written"

    return run_it


def nan(*shape, dtype=torch.float64, **options):
    return torch.full(shape, torch.nan, dtype=dtype, **options)


def lengths(*values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype)


NAME = r"MHA: inference_params\."
CACHE = NAME + r"key_value_memory_dict\[0\]: expected shape \(batch_size, max_seqlen, 2, num_heads_kv=4, head_dim=8\), "
WRONG = {
    "too long": (call(seqlen_offset=11), NAME + "seqlen_offset: expected from 0 to max_seqlen=12 - seqlen=2, got 11"),
    "negative": (call(seqlen_offset=-1), NAME + "seqlen_offset: expected from 0 .*, got -1"),
    "offset as a float": (call(seqlen_offset=1.5), "MHA: .*seqlen_offset: expected int, got float 1.5"),
    "too many sequences": (
        call(batch_size_offset=3), NAME + "batch_size_offset: expected from 0 to max_batch_size=5 - batch_size=3, got 3"
    ),
    "a length too long": (
        call(lengths_per_sample=lengths(3, 11, 4)),
        NAME + r"lengths_per_sample\[1\]: expected at most max_seqlen=12 - seqlen=2, got 11",
    ),
    "too few lengths": (
        call(lengths_per_sample=lengths(3, 4)),
        NAME + r"lengths_per_sample: expected shape \(at least batch_size=3,\), torch.int32, on cpu, got \(2,\)",
    ),
    "lengths of another rank": (
        call(lengths_per_sample=lengths(1, 2, 3)[:, None]), NAME + r"lengths_per_sample: .*, got \(3, 1\)"
    ),
    "lengths of another type": (
        call(lengths_per_sample=lengths(1, 2, 3, dtype=torch.float32)), NAME + "lengths_per_sample: .*torch.float32"
    ),
    "lengths as a list": (call(lengths_per_sample=[1, 2, 3]), NAME + "lengths_per_sample: expected torch.Tensor"),
    "cache of another shape": (call(cache=nan(5, 12, 2, 2, 8)), CACHE + r".*, got \(5, 12, 2, 2, 8\), torch.float64"),
    "cache of another rank": (call(cache=nan(5, 12, 4, 8)), CACHE + r".*, got \(5, 12, 4, 8\)"),
    "cache of another type": (call(cache=nan(5, 12, 2, 4, 8, dtype=torch.float32)), CACHE + ".*, got .* torch.float32"),
    "cache on another device": (call(cache=torch.empty(5, 12, 2, 4, 8, device="meta", dtype=torch.float64)), CACHE),
    "cache as a list": (call(cache=[]), NAME + r"key_value_memory_dict\[0\]: expected torch.Tensor, got list"),
    "no layer_idx": (call({"layer_idx": None}), "MHA: layer_idx: expected the key of this layer's cache"),
    "cross-attention": (call({"cross_attn": True}), "MHA: cross_attn: expected False, as inference_params is given"),
    "dwconv": (call({"dwconv": True}), "MHA: dwconv: expected False, as inference_params is given, got bool True"),
    "dropout": (call({"dropout": 0.1}), r"MHA: dropout: expected 0 in training, .*eval\(\).*, got 0.1"),
    "mixer_subset": (
        call({"causal": False}, x_options={"mixer_subset": slice(0, 1)}),
        "MHA: mixer_subset: expected None, as inference_params is given",
    ),
    "mask of x alone, later": (
        call(seqlen_offset=3, x_options={"key_padding_mask": torch.ones(3, 2).bool()}),
        r"MHA: key_padding_mask \(of all tokens up to seqlen_offset \+ seqlen\): expected .*seqlen=5.*, got \(3, 2\)",
    ),
    "mask shorter than a length": (
        call(lengths_per_sample=lengths(3, 5, 4), x_options={"key_padding_mask": torch.ones(3, 6).bool()}),
        r"MHA: key_padding_mask \(of all tokens up to the largest .*seqlen=7.*, got \(3, 6\)",
    ),
    "several": (
        call(seqlen_offset=11, batch_size_offset=9), r"MHA: 2 problems:\n  - inference_params\.batch_size_offset"
    ),
}  # fmt: skip


@pytest.mark.parametrize(("wrong", "words"), WRONG.values(), ids=WRONG)
@with_backends
def test_wrong_calls(use_flash_attn, wrong, words):
    with pytest.raises((TypeError, ValueError), match=words):
        wrong(use_flash_attn)


def test_other_objects_are_refused():
    with pytest.raises(
        TypeError, match=r"MHA: inference_params: expected an object with .*InferenceParams, got"
    ) as error:
        make()(tokens(), inference_params=object())
    assert "without max_seqlen, max_batch_size, seqlen_offset" in str(error.value)
    assert "\n" not in str(error.value)


def test_cu_seqlens_are_refused():
    module, x = make(), tokens().flatten(0, 1)
    bounds = {"cu_seqlens": lengths(0, x.shape[0]), "max_seqlen": x.shape[0]}
    with pytest.raises(ValueError, match="MHA: cu_seqlens: expected None, as inference_params is given, got Tensor"):
        module(x, inference_params=params_of(module), **bounds)


def test_no_room_for_a_mask():
    """Padding that is neither on the left nor on the right takes one more dimension of head_dim."""
    module = MHA(512, 1, use_flash_attn=True, causal=True, layer_idx=0)
    params = InferenceParams(4, 1)
    mask = torch.tensor([[True, False, True]])
    with pytest.raises(ValueError, match="MHA: head_dim: expected at most 511"):
        module(torch.zeros(1, 3, 512), inference_params=params, key_padding_mask=mask)
    assert not params.key_value_memory_dict


@pytest.mark.parametrize("owner", ["weights", "x", "cache"])
@with_backends
def test_gradients_are_refused(use_flash_attn, owner):
    module, x = make(use_flash_attn).requires_grad_(owner == "weights"), tokens().requires_grad_(owner == "x")
    params = params_of(module)
    params.key_value_memory_dict[0].requires_grad_(owner == "cache")
    with torch.enable_grad(), pytest.raises(ValueError, match=r"MHA: inference_params: expected None .*no_grad\(\)"):
        module(x, inference_params=params)
    assert params.key_value_memory_dict[0].isnan().all()
    module.requires_grad_(False)
    params.key_value_memory_dict[0].requires_grad_(False)
    with torch.enable_grad():
        module(x.detach(), inference_params=params)
