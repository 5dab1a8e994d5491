"""Names, parameters, order and defaults that code written for flash-attn 2.8.3 and for v1 relies on.

Projects build calls from inspect.signature, getfullargspec, keywords and positions, so all four must match.
"""

import importlib
import inspect

import pytest

TAIL = (
    "dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, "
    "deterministic=False, return_attn_probs=False"
)
CU_SEQLENS = "cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k"
SCORE = "window_size_left, window_size_right, softcap, alibi_slopes"
BACKWARD_HEAD = "dout, q, k, v, out, softmax_lse, dq, dk, dv"
FORWARD = f"q, k, v, dropout_p, softmax_scale, causal, {SCORE}, return_softmax"
BACKWARD = f"{BACKWARD_HEAD}, dropout_p, softmax_scale, causal, {SCORE}, deterministic, rng_state=None"
VARLEN_FORWARD = (
    f"q, k, v, {CU_SEQLENS}, dropout_p, softmax_scale, causal, window_size_left=-1, window_size_right=-1, softcap=0.0, "
    "alibi_slopes=None, return_softmax=False, block_table=None, leftpad_k=None, seqused_k=None, zero_tensors=False"
)
VARLEN_BACKWARD = (
    f"{BACKWARD_HEAD}, {CU_SEQLENS}, dropout_p, softmax_scale, causal, {SCORE}, deterministic, rng_state=None, "
    "zero_tensors=False"
)
V1_TAIL = "dropout_p, softmax_scale=None, causal=False, return_attn_probs=False, deterministic=False"
NORM = (
    "x, weight, bias, residual=None, x1=None, weight1=None, bias1=None, eps=1e-06, dropout_p=0.0, rowscale=None, "
    "prenorm=False"
)
ADD_NORM = (
    "x0, residual, weight, bias, dropout_p, epsilon, rowscale=None, layerscale=None, prenorm=False, "
    "residual_in_fp32=False, return_dropout_mask=False"
)
BUFFERS = "return_dropout_mask=False, out_dtype=None, out=None, residual_out=None"

# Not in flash_attn 2.8.3.
OURS = (
    "attention_chunk=0, q_start=None, k_start=None, out_dtype=None, s_aux=None, key_ranges=None, "
    "return_max_logits=False"
)
OUR_NAMES = {"attention_chunk", "q_start", "k_start", "out_dtype", "s_aux", "key_ranges", "return_max_logits", "sinks"}

FUNCTIONS = {
    "flash_attn.flash_attn_interface": {
        "flash_attn_func": f"q, k, v, {TAIL}, {OURS}",
        "flash_attn_kvpacked_func": f"q, kv, {TAIL}, s_aux=None",
        "flash_attn_qkvpacked_func": f"qkv, {TAIL}, s_aux=None",
        "flash_attn_varlen_func": f"q, k, v, {CU_SEQLENS}, {TAIL}, block_table=None, {OURS}",
        "flash_attn_varlen_kvpacked_func": f"q, kv, {CU_SEQLENS}, {TAIL}, s_aux=None",
        "flash_attn_varlen_qkvpacked_func": f"qkv, cu_seqlens, max_seqlen, {TAIL}, s_aux=None",
        "flash_attn_with_kvcache": (
            "q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None, "
            "cache_batch_idx=None, cache_leftpad=None, block_table=None, softmax_scale=None, causal=False, "
            "window_size=(-1, -1), softcap=0.0, rotary_interleaved=True, alibi_slopes=None, num_splits=0, "
            "return_softmax_lse=False, attention_chunk=0, s_aux=None"
        ),
        "_flash_attn_forward": FORWARD,
        "_wrapped_flash_attn_forward": FORWARD,
        "_flash_attn_backward": BACKWARD,
        "_wrapped_flash_attn_backward": BACKWARD,
        "_flash_attn_varlen_forward": VARLEN_FORWARD,
        "_wrapped_flash_attn_varlen_forward": VARLEN_FORWARD,
        "_flash_attn_varlen_backward": VARLEN_BACKWARD,
        "_wrapped_flash_attn_varlen_backward": VARLEN_BACKWARD,
    },
    "flash_attn.v1_functions": {
        "flash_attn_unpadded_func": f"q, k, v, {CU_SEQLENS}, {V1_TAIL}",
        "flash_attn_unpadded_kvpacked_func": f"q, kv, {CU_SEQLENS}, {V1_TAIL}",
        "flash_attn_unpadded_qkvpacked_func": f"qkv, cu_seqlens, max_seqlen, {V1_TAIL}",
    },
    "flash_attn.bert_padding": {
        "unpad_input": "hidden_states, attention_mask, unused_mask=None",
        "pad_input": "hidden_states, indices, batch, seqlen",
        "index_first_axis": "input, indices",
        "index_put_first_axis": "values, indices, first_axis_dim",
        "unpad_input_for_concatenated_sequences": "hidden_states, attention_mask_in_length",
    },
    "flash_attn.layers.rotary": {
        "apply_rotary_emb": (
            "x, cos, sin, interleaved=False, inplace=False, seqlen_offsets=0, cu_seqlens=None, max_seqlen=None"
        ),
        "apply_rotary_emb_func": (
            "x, cos, sin, interleaved=False, inplace=False, seqlen_offsets=0, cu_seqlens=None, max_seqlen=None"
        ),
    },
    "flash_attn.ops.triton.rotary": {
        "apply_rotary": (
            "x, cos, sin, seqlen_offsets=0, cu_seqlens=None, max_seqlen=None, interleaved=False, inplace=False, "
            "conjugate=False"
        ),
    },
    "flash_attn.modules.mha": {"get_alibi_slopes": "nheads"},
    "flash_attn.ops.triton.layer_norm": {
        "layer_norm_fn": f"{NORM}, residual_in_fp32=False, zero_centered_weight=False, is_rms_norm=False, {BUFFERS}",
        "rms_norm_fn": f"{NORM}, residual_in_fp32=False, zero_centered_weight=False, {BUFFERS}",
        "layer_norm_ref": f"{NORM}, zero_centered_weight=False, dropout_mask=None, dropout_mask1=None, upcast=False",
        "rms_norm_ref": f"{NORM}, zero_centered_weight=False, dropout_mask=None, dropout_mask1=None, upcast=False",
    },
    "flash_attn.ops.layer_norm": {"layer_norm": "x, weight, bias, epsilon", "dropout_add_layer_norm": ADD_NORM},
    "flash_attn.ops.rms_norm": {"rms_norm": "x, weight, epsilon", "dropout_add_rms_norm": ADD_NORM},
    "flash_attn.ops.triton.cross_entropy": {
        "cross_entropy_loss": (
            "logits, labels, precomputed_lse=None, label_smoothing=0.0, logit_scale=1.0, lse_square_scale=0.0, "
            "ignore_index=-100, inplace_backward=False, process_group=None"
        ),
    },
}

METHODS = {
    "flash_attn.layers.rotary:RotaryEmbedding.__init__": (
        "self, dim, base=10000.0, interleaved=False, scale_base=None, device=None"
    ),
    "flash_attn.layers.rotary:RotaryEmbedding._update_cos_sin_cache": "self, seqlen, device=None, dtype=None",
    "flash_attn.flash_attention:FlashAttention.__init__": (
        "self, softmax_scale=None, attention_dropout=0.0, device=None, dtype=None"
    ),
    "flash_attn.flash_attention:FlashAttention.forward": (
        "self, qkv, key_padding_mask=None, causal=False, cu_seqlens=None, max_s=None, need_weights=False, s_aux=None"
    ),
    "flash_attn.flash_attention:FlashMHA.__init__": (
        "self, embed_dim, num_heads, bias=True, batch_first=True, attention_dropout=0.0, causal=False, device=None, "
        "dtype=None, sinks=False, **kwargs"
    ),
    "flash_attn.flash_attention:FlashMHA.forward": "self, x, key_padding_mask=None, need_weights=False",
    "flash_attn.modules.mha:FlashSelfAttention.__init__": (
        "self, causal=False, softmax_scale=None, attention_dropout=0.0, window_size=(-1, -1), alibi_slopes=None, "
        "deterministic=False"
    ),
    "flash_attn.modules.mha:FlashCrossAttention.__init__": (
        "self, causal=False, softmax_scale=None, attention_dropout=0.0, alibi_slopes=None, window_size=(-1, -1), "
        "deterministic=False"
    ),
    "flash_attn.modules.mha:FlashSelfAttention.forward": (
        "self, qkv, causal=None, cu_seqlens=None, max_seqlen=None, s_aux=None"
    ),
    "flash_attn.modules.mha:FlashCrossAttention.forward": (
        "self, q, kv, causal=None, cu_seqlens=None, max_seqlen=None, cu_seqlens_k=None, max_seqlen_k=None, s_aux=None"
    ),
    "flash_attn.modules.mha:MHA.__init__": (
        "self, embed_dim, num_heads, num_heads_kv=None, cross_attn=False, qkv_proj_bias=True, out_proj_bias=True, "
        "dropout=0.0, softmax_scale=None, causal=False, layer_idx=None, dwconv=False, rotary_emb_dim=0, "
        "rotary_emb_base=10000.0, rotary_emb_scale_base=None, rotary_emb_interleaved=False, use_alibi=False, "
        "window_size=(-1, -1), fused_bias_fc=False, use_flash_attn=False, return_residual=False, checkpointing=False, "
        "device=None, dtype=None, sinks=False"
    ),
    "flash_attn.ops.triton.layer_norm:RMSNorm.__init__": (
        "self, hidden_size, eps=1e-05, dropout_p=0.0, zero_centered_weight=False, device=None, dtype=None"
    ),
    "flash_attn.ops.triton.layer_norm:RMSNorm.forward": (
        "self, x, residual=None, prenorm=False, residual_in_fp32=False"
    ),
    "flash_attn.ops.rms_norm:RMSNorm.__init__": "self, hidden_size, eps=1e-05, device=None, dtype=None",
    "flash_attn.ops.layer_norm:DropoutAddLayerNorm.__init__": (
        "self, hidden_size, prenorm=False, p=0.0, eps=1e-05, residual_in_fp32=False, device=None, dtype=None"
    ),
    "flash_attn.losses.cross_entropy:CrossEntropyLoss.__init__": (
        "self, ignore_index=-100, reduction='mean', label_smoothing=0.0, logit_scale=1.0, lse_square_scale=0.0, "
        "inplace_backward=False, process_group=None, return_z_loss=False"
    ),
    "flash_attn.losses.cross_entropy:CrossEntropyLoss.forward": "self, input, target, precomputed_lse=None",
    "flash_attn.modules.mha:MHA.forward": (
        "self, x, x_kv=None, key_padding_mask=None, cu_seqlens=None, max_seqlen=None, mixer_subset=None, "
        "inference_params=None, **kwargs"
    ),
}

# Imports of other projects, one per line.
IMPORTS = """\
from flash_attn import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
from flash_attn import flash_attn_kvpacked_func, flash_attn_qkvpacked_func
from flash_attn import flash_attn_varlen_kvpacked_func, flash_attn_varlen_qkvpacked_func
from flash_attn.flash_attn_interface import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
from flash_attn.flash_attn_interface import flash_attn_varlen_qkvpacked_func
from flash_attn.flash_attn_interface import _flash_attn_forward, _flash_attn_backward
from flash_attn.flash_attn_interface import _flash_attn_varlen_forward, _flash_attn_varlen_backward
from flash_attn.flash_attn_interface import _wrapped_flash_attn_forward, _wrapped_flash_attn_backward
from flash_attn.flash_attn_interface import flash_attn_unpadded_func, flash_attn_unpadded_kvpacked_func
from flash_attn.flash_attn_interface import flash_attn_unpadded_qkvpacked_func
from flash_attn.bert_padding import index_first_axis, index_put_first_axis, pad_input, unpad_input
from flash_attn.layers.rotary import RotaryEmbedding, apply_rotary_emb, apply_rotary_emb_func
from flash_attn.layers.rotary import apply_rotary_emb_qkv_, apply_rotary_emb_kv_
from flash_attn.ops.triton.rotary import apply_rotary
from flash_attn.modules.mha import MHA, FlashCrossAttention, FlashSelfAttention, get_alibi_slopes
from flash_attn.modules.mha import CrossAttention, SelfAttention
from flash_attn.flash_attention import FlashAttention, FlashMHA
from flash_attn_2_cuda import bwd, fwd, fwd_kvcache, varlen_bwd, varlen_fwd
import flash_attn_2_cuda as flash_attn_cuda
""".splitlines()


def parameters_of(function) -> str:
    """Names, order and defaults in one line, without annotations."""
    parameters = inspect.signature(function).parameters.values()
    return ", ".join(str(parameter.replace(annotation=inspect.Parameter.empty)) for parameter in parameters)


def check_kinds(function, ours=frozenset(OUR_NAMES)) -> None:
    """Arguments that flash_attn 2.8.3 does not have are keyword-only."""
    spec, names = inspect.getfullargspec(function), list(inspect.signature(function).parameters)
    names = [name for name in names if name != spec.varkw]
    assert spec.args == [name for name in names if name not in ours]
    assert spec.kwonlyargs == [name for name in names if name in ours]


@pytest.mark.parametrize(
    ("module", "name"), [(module, name) for module, functions in FUNCTIONS.items() for name in functions]
)
def test_function_signature(module, name):
    function = getattr(importlib.import_module(module), name)
    assert parameters_of(function).replace(" = ", "=") == FUNCTIONS[module][name]
    assert inspect.isfunction(function), "getfullargspec-based callers need a plain Python function"
    check_kinds(function, ours={} if module.startswith("flash_attn.ops") else OUR_NAMES)
    assert function.__doc__ or name.startswith("_wrapped"), "a public function explains itself"


@pytest.mark.parametrize("path", METHODS)
def test_method_signature(path):
    module, qualified = path.split(":")
    cls, method = qualified.split(".")
    function = getattr(getattr(importlib.import_module(module), cls), method)
    assert parameters_of(function).replace(" = ", "=") == METHODS[path]
    check_kinds(function)


@pytest.mark.parametrize("statement", IMPORTS)
def test_import_statement(statement):
    namespace: dict = {}
    exec(statement, namespace)
    names = [name for name in namespace if not name.startswith("__")]
    assert names
    assert all(namespace[name] is not None for name in names)


def test_top_level_names_are_the_functions_of_the_interface():
    package = importlib.import_module("flash_attn")
    interface = importlib.import_module("flash_attn.flash_attn_interface")
    public = [name for name in FUNCTIONS["flash_attn.flash_attn_interface"] if not name.startswith("_")]
    assert len(public) == 7
    for name in public:
        assert getattr(package, name) is getattr(interface, name)
