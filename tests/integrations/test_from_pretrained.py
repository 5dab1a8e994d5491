"""Models with our modules, saved by save_pretrained and loaded by from_pretrained.

from_pretrained builds the model on the meta device, sets the default dtype to that of the checkpoint, assigns the saved
tensors, and replaces every other buffer by uninitialised memory. Values computed in __init__ (rotary frequencies, ALiBi
slopes) must survive all of that.
"""

import copy

import pytest
import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from compare import assert_bitwise
from flash_attn.flash_attention import FlashMHA
from flash_attn.modules.mha import MHA

HIDDEN, HEADS, VOCABULARY = 48, 6, 40
OPTIONS = {
    "plain": {},
    "rotary": {"rotary_emb_dim": 8},
    "xpos": {"rotary_emb_dim": 8, "rotary_emb_scale_base": 16.0},
    "alibi": {"use_alibi": True},
    "sinks": {"sinks": True, "num_heads_kv": 2},
    "grouped": {"rotary_emb_dim": 4, "rotary_emb_interleaved": True, "num_heads_kv": 2, "use_alibi": True},
}
SETTINGS = [
    pytest.param({**options, "causal": True, "use_flash_attn": flash}, id=f"{name}-{'flash' if flash else 'torch'}")
    for name, options in OPTIONS.items()
    for flash in (True, False)
]
SETTINGS.append(pytest.param("FlashMHA", id="FlashMHA"))
WITH_BUFFERS = {"use_alibi": True, "rotary_emb_dim": 8, "rotary_emb_scale_base": 16.0, "causal": True}


class StackConfig(PreTrainedConfig):
    model_type = "flash_attn_stack"

    def __init__(self, hidden_size=HIDDEN, num_heads=HEADS, attention=None, **kwargs):
        self.hidden_size = hidden_size
        self.num_heads = num_heads
        self.attention = {} if attention is None else attention
        super().__init__(**kwargs)


class Stack(PreTrainedModel):
    """Embeddings and two attention layers, as in user-defined models."""

    config_class = StackConfig
    _no_split_modules = ("MHA", "FlashMHA")

    def __init__(self, config):
        super().__init__(config)
        self.embeddings = nn.Embedding(VOCABULARY, config.hidden_size)
        self.layers = nn.ModuleList([self._make_layer(config) for _ in range(2)])
        self.post_init()

    @staticmethod
    def _make_layer(config):
        if config.attention == "FlashMHA":
            return FlashMHA(config.hidden_size, config.num_heads, causal=True)
        return MHA(config.hidden_size, config.num_heads, **config.attention)

    def forward(self, input_ids, attention_mask=None):
        keep = None if attention_mask is None else attention_mask.bool()
        x = self.embeddings(input_ids)
        for layer in self.layers:
            out = layer(x, key_padding_mask=keep)
            x = x + (out[0] if isinstance(out, tuple) else out)
        return x


@pytest.fixture(autouse=True)
def uninitialised_memory_is_nan(monkeypatch):
    """Make uninitialised memory visible: torch fills it with NaN in deterministic mode."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def new_model(attention):
    torch.manual_seed(3)
    model = Stack(StackConfig(attention=attention)).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # large enough for attention to matter; nonzero biases
            parameter.copy_(torch.randn(parameter.shape) * 0.3)
    return model


def load(path, **options):
    """Load the model in a folder, without missing or unexpected keys."""
    model, info = Stack.from_pretrained(path, output_loading_info=True, **options)
    assert not {name: keys for name, keys in info.items() if keys}
    assert not [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta]
    assert not model.training
    return model


def results(model):
    """Output with and without a mask, and the gradients of both."""
    generator = torch.Generator().manual_seed(4)
    tokens = torch.randint(0, VOCABULARY, (2, 9), generator=generator)
    keep = torch.arange(9) < torch.tensor([[9], [5]])
    outputs = [model(tokens), model(tokens, keep)]
    gradients = torch.autograd.grad(sum(out.square().sum() for out in outputs), list(model.parameters()))
    return [*outputs, *gradients]


def assert_same_results(actual, expected):
    for i, (a, e) in enumerate(zip(results(actual), results(expected), strict=True)):
        assert torch.isfinite(e).all()
        assert_bitwise(f"tensor {i}", a, e)


def test_memory_is_filled_with_nan():
    assert torch.empty_like(torch.ones(4)).isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("attention", SETTINGS)
def test_loaded_model_computes_the_same(attention, dtype, tmp_path):
    """Users put MHA into a PreTrainedModel, save it, and load it, also with dtype=torch.bfloat16.

    Outputs and gradients equal, bitwise, those of the saved model, or of the saved model after .to(torch.bfloat16).
    Public thread: huggingface/transformers#48892
    """
    saved = new_model(attention)
    saved.save_pretrained(tmp_path)
    loaded = load(tmp_path, dtype=dtype)
    assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
    assert_same_results(loaded, saved.to(dtype))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"low_cpu_mem_usage": True},  # ignored since 5.0, but common in scripts
        {"torch_dtype": torch.float32},
        {"dtype": "auto"},
        {"device_map": "cpu"},
        {"device_map": "auto"},
        {"device_map": {"": "cpu"}},
        {"device_map": {"embeddings": "cpu", "layers.0": "cpu", "layers.1": "cpu"}},
    ],
    ids=["plain", "low_cpu_mem_usage", "torch_dtype", "dtype_auto", "map_cpu", "map_auto", "map_all", "map_layers"],
)
@pytest.mark.parametrize("flash", [True, False], ids=["flash", "torch"])
def test_ways_of_loading(options, flash, tmp_path):
    """Users load with various options. device_map requires accelerate."""
    if "device_map" in options:
        pytest.importorskip("accelerate")
    saved = new_model({**WITH_BUFFERS, "use_flash_attn": flash})
    saved.save_pretrained(tmp_path)
    assert_same_results(load(tmp_path, **options), saved)


def outputs(model):
    with torch.no_grad():
        return model(torch.arange(9)[None])


@pytest.mark.parametrize("flash", [True, False], ids=["flash", "torch"])
def test_layer_on_disk(flash, tmp_path):
    """Users with little memory offload layers to disk: accelerate loads the weights of each layer when it is called."""
    pytest.importorskip("accelerate")
    saved = new_model({**WITH_BUFFERS, "use_flash_attn": flash})
    saved.save_pretrained(tmp_path)
    places = {"embeddings": "cpu", "layers.0": "cpu", "layers.1": "disk"}
    model = Stack.from_pretrained(tmp_path, device_map=places, offload_folder=tmp_path / "offload")
    assert model.layers[1].Wqkv.weight.is_meta
    assert_bitwise("output", outputs(model), outputs(saved))


@pytest.mark.parametrize("include_buffers", [False, True])
@pytest.mark.parametrize("flash", [True, False], ids=["flash", "torch"])
def test_accelerate_loads_an_empty_model(flash, include_buffers, tmp_path):
    """Users build a model under init_empty_weights, with or without buffers, and load it with accelerate."""
    accelerate = pytest.importorskip("accelerate")
    saved = new_model({**WITH_BUFFERS, "use_flash_attn": flash})
    saved.save_pretrained(tmp_path)
    with accelerate.init_empty_weights(include_buffers=include_buffers):
        empty = Stack(saved.config)
    model = accelerate.load_checkpoint_and_dispatch(empty, tmp_path, device_map={"": "cpu"}).eval()
    assert_bitwise("output", outputs(model), outputs(saved))


@pytest.mark.parametrize("flash", [True, False], ids=["flash", "torch"])
def test_state_dict_is_assigned_to_a_model_on_meta(flash):
    """Users build a model on the meta device and call load_state_dict(assign=True)."""
    saved = new_model({**WITH_BUFFERS, "use_flash_attn": flash})
    with torch.device("meta"):
        model = Stack(saved.config).eval()
    model.load_state_dict(saved.state_dict(), assign=True)
    assert_bitwise("output", outputs(model), outputs(saved))


@pytest.mark.parametrize("flash", [True, False], ids=["flash", "torch"])
def test_checkpoint_in_bfloat16(flash, tmp_path):
    """Users save a model in bfloat16; dtype="auto" keeps bfloat16, dtype=torch.float32 converts."""
    saved = new_model({**WITH_BUFFERS, "use_flash_attn": flash}).to(torch.bfloat16)
    saved.save_pretrained(tmp_path)
    assert_same_results(load(tmp_path, dtype="auto"), saved)
    assert_same_results(load(tmp_path, dtype=torch.float32), saved.to(torch.float32))


@pytest.mark.parametrize("attention", SETTINGS)
def test_second_round_trip(attention, tmp_path):
    """Users load a model, train it, save it and load it again: checkpoints contain only the parameters."""
    saved = new_model(attention)
    saved.save_pretrained(tmp_path / "first")
    once = load(tmp_path / "first")
    once.save_pretrained(tmp_path / "second")
    twice = load(tmp_path / "second")
    assert sorted(twice.state_dict()) == sorted(name for name, _ in saved.named_parameters())
    assert_same_results(twice, saved)


@pytest.mark.parametrize("flash", [True, False], ids=["flash", "torch"])
def test_loaded_model_is_copied_and_cast(flash, tmp_path):
    """Users copy a loaded model for distillation, and cast it after loading."""
    attention = {**WITH_BUFFERS, "use_flash_attn": flash}
    new_model(attention).save_pretrained(tmp_path)
    assert_same_results(copy.deepcopy(load(tmp_path)), new_model(attention))
    assert_same_results(load(tmp_path).to(torch.bfloat16), new_model(attention).to(torch.bfloat16))
    assert_same_results(load(tmp_path).double(), new_model(attention).double())
