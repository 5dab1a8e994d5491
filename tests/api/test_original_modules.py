"""Names of flash_attn 2.8.3 and of version 1 that published packages import, and modules that are left out."""

import importlib
import importlib.util
import inspect
import subprocess
import sys

import pytest
import torch

import flash_attn
from flash_attn import _absent
from flash_attn.layers import rotary
from plain_attention import assert_same, gradients, leaves

# What 47 published packages import, by module.
NAMES = {
    "losses.cross_entropy": "CrossEntropyLoss",
    "ops.triton.cross_entropy": "cross_entropy_loss CrossEntropyLoss",
    "ops.triton.layer_norm": "layer_norm_fn rms_norm_fn RMSNorm LayerNormFn layer_norm_ref rms_norm_ref",
    "ops.layer_norm": "layer_norm dropout_add_layer_norm DropoutAddLayerNorm",
    "ops.rms_norm": "rms_norm RMSNorm dropout_add_rms_norm DropoutAddRMSNorm",
    "ops.triton.rotary": "apply_rotary",
    "utils.distributed": "all_gather reduce_scatter all_reduce",
    "utils.generation": "InferenceParams",
    "bert_padding": (
        "unpad_input pad_input index_first_axis index_put_first_axis index_first_axis_residual IndexFirstAxis "
        "IndexPutFirstAxis IndexFirstAxisResidual unpad_input_for_concatenated_sequences"
    ),
    "layers.rotary": (
        "RotaryEmbedding apply_rotary_emb apply_rotary_emb_func apply_rotary_emb_qkv_ apply_rotary_emb_kv_ "
        "apply_rotary_emb_torch rotate_half ApplyRotaryEmb ApplyRotaryEmbQKV_ ApplyRotaryEmbKV_"
    ),
    "flash_attn_interface": (
        "flash_attn_cuda flash_attn_gpu _get_block_size_n maybe_contiguous round_multiple FlashAttnFunc "
        "FlashAttnKVPackedFunc FlashAttnQKVPackedFunc FlashAttnVarlenFunc FlashAttnVarlenKVPackedFunc "
        "FlashAttnVarlenQKVPackedFunc flash_attn_unpadded_func flash_attn_unpadded_kvpacked_func "
        "flash_attn_unpadded_qkvpacked_func"
    ),
}
# Kernels in Triton, and functions for the tests of the original.
LEFT_OUT = {"ops.triton.rotary": "rotary_kernel", "utils.testing": "attention_ref generate_qkv"}


def test_names():
    wanted = [(module, name) for module, names in NAMES.items() for name in names.split()]
    found = [name for name in wanted if hasattr(importlib.import_module(f"flash_attn.{name[0]}"), name[1])]
    print(f"{len(found)} of {len(wanted)}")
    assert found == wanted
    assert len(wanted) == 54
    assert {op for op in dir(torch.ops.flash_attn) if op.startswith("_flash_attn")} >= {
        "_flash_attn_forward", "_flash_attn_backward", "_flash_attn_varlen_forward", "_flash_attn_varlen_backward"
    }  # fmt: skip


@pytest.mark.parametrize(("module", "name"), [(m, n) for m, names in LEFT_OUT.items() for n in names.split()])
def test_names_that_are_left_out(module, name):
    with pytest.raises(ImportError):
        exec(f"from flash_attn.{module} import {name}")


# Modules that are left out.

ABSENT = """\
import flash_attn.models
import flash_attn.models.gpt
from flash_attn.models.bert import BertModel
from flash_attn.ops.fused_dense import FusedDense, FusedMLP
from flash_attn.ops.activations import swiglu
from flash_attn.modules.mlp import GatedMlp
from flash_attn.modules.block import Block
from flash_attn.modules.embedding import GPT2Embeddings
from flash_attn.utils.pretrained import state_dict_from_pretrained
from flash_attn.flash_blocksparse_attention import FlashBlocksparseMHA
from flash_attn.flash_attn_triton import flash_attn_func
from flash_attn.fused_softmax import scaled_upper_triang_masked_softmax
""".splitlines()


@pytest.mark.parametrize("statement", ABSENT)
def test_an_import_says_what_to_use_instead(statement):
    with pytest.raises(ModuleNotFoundError) as error:
        exec(statement)
    assert error.value.name in _absent.INSTEAD
    expected = f"{error.value.name} of flash_attn 2.8.3 is not part of this package. Instead: "
    assert str(error.value) == expected + _absent.INSTEAD[error.value.name]


@pytest.mark.parametrize("module", _absent.INSTEAD)
def test_a_question_is_answered_with_none(module):
    assert importlib.util.find_spec(module) is None
    with pytest.raises(ModuleNotFoundError, match="is not part of this package"):
        importlib.import_module(module)
    assert module not in sys.modules
    parent, _, last = module.rpartition(".")
    with pytest.raises(ImportError, match=last):
        exec(f"from {parent} import {last}")
    assert not hasattr(importlib.import_module(parent), last)


def test_other_modules_fail_as_ever():
    with pytest.raises(ModuleNotFoundError, match=r"^No module named 'flash_attn.nothing'$"):
        importlib.import_module("flash_attn.nothing")
    assert _absent.AbsentModules.find_spec("flash_attn.models", None) is None


def test_what_another_distribution_provides_is_found(tmp_path, monkeypatch):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "__init__.py").write_text("is_theirs = True\n")
    monkeypatch.setattr(flash_attn, "__path__", [*flash_attn.__path__, str(tmp_path)])
    importlib.invalidate_caches()
    try:
        assert importlib.util.find_spec("flash_attn.models") is not None
        assert importlib.import_module("flash_attn.models").is_theirs
    finally:
        sys.modules.pop("flash_attn.models", None)
        vars(flash_attn).pop("models", None)


def test_the_finder_is_asked_last_and_once():
    code = "import sys, flash_attn; from flash_attn import _absent; _absent.explain_absent_modules(); "
    code += "found = [each is _absent.AbsentModules for each in sys.meta_path]; assert found[-1] and sum(found) == 1"
    subprocess.run([sys.executable, "-c", code], check=True)


# Rotation by the autograd classes.


def rotary_call(name):
    tables = [t(torch.rand(6, 3, dtype=torch.float64)) for t in (torch.cos, torch.sin)]
    offsets = torch.tensor([0, 1], dtype=torch.int32)
    if name == "ApplyRotaryEmb":
        return rotary.apply_rotary_emb, (2, 5, 3, 8), (*tables, True, False, offsets, None, None)
    if name == "ApplyRotaryEmbQKV_":
        return rotary.apply_rotary_emb_qkv_, (2, 5, 3, 3, 8), (*tables, *reversed(tables), True, offsets, None)
    return rotary.apply_rotary_emb_kv_, (2, 5, 2, 3, 8), (*tables, True, offsets)


@pytest.mark.parametrize("name", ["ApplyRotaryEmb", "ApplyRotaryEmbQKV_", "ApplyRotaryEmbKV_"])
def test_rotation_by_class(name):
    function, shape, arguments = rotary_call(name)
    found = []
    for call in (getattr(rotary, name).apply, function):
        (x,) = leaves(shape)
        out = call(x.clone(), *arguments)
        found.append([out, *gradients(out, [x])])
    assert_same(*found)
    names = list(inspect.signature(function).parameters)[1:]
    (x,) = leaves(shape)
    assert_same([function(x.clone(), **dict(zip(names, arguments, strict=True)))], found[0][:1])
