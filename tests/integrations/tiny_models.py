"""Tiny transformers models with random weights, and two ways to make them call flash_attn on a CPU."""

import collections
import functools

import torch
import transformers
from transformers import modeling_flash_attention_utils as flash_utils

import flash_attn
from flash_attn import bert_padding

VOCABULARY = 100
PAD = 0
# Weights large enough for attention to matter: with the usual 0.02 all keys get about the same weight.
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": PAD,
    "bos_token_id": None,
    "eos_token_id": None,
}
WINDOW = 4
FAMILIES = {
    "llama": lambda: transformers.LlamaConfig(**_SIZES),
    "mistral": lambda: transformers.MistralConfig(**_SIZES, sliding_window=WINDOW),
    "gemma2": lambda: transformers.Gemma2Config(
        **_SIZES,
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=WINDOW,
        attn_logit_softcapping=2.0,
        layer_types=["sliding_attention", "full_attention"],
        tie_word_embeddings=False,  # tied embeddings repeat the last token, whatever attention computes
    ),
}


def save_model(family, path, dtype=torch.float32):
    """Save a model of a family with random weights in this dtype, with save_pretrained."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(FAMILIES[family](), attn_implementation="eager")
    model.to(dtype).save_pretrained(path)
    return path


def load_model(path, attention, dtype=torch.float32):
    """Load a saved model with this attention implementation, in evaluation mode."""
    model = transformers.AutoModelForCausalLM.from_pretrained(path, attn_implementation=attention, dtype=dtype)
    assert model.config._attn_implementation == attention
    return model


def padded_batch(lengths=(11, 6, 1), side="left"):
    """Random tokens of these lengths, padded on one side: input_ids and attention_mask."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, VOCABULARY, (len(lengths), max(lengths)), generator=generator)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    if side == "left":
        mask = mask.flip(1)
    return {"input_ids": tokens.masked_fill(mask == 0, PAD), "attention_mask": mask}


def positions(mask):
    """position_ids that count the tokens of each sequence from 0, as in generate."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


def count_calls(monkeypatch):
    """Count calls of each function of flash_attn, by name, from now on."""
    calls = collections.Counter()

    def counted(function):
        @functools.wraps(function)
        def call(*args, **kwargs):
            calls[function.__name__] += 1
            return function(*args, **kwargs)

        return call

    for name in ("flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache"):
        monkeypatch.setattr(flash_attn, name, counted(getattr(flash_attn, name)))
    for name in ("pad_input", "unpad_input"):
        monkeypatch.setattr(bert_padding, name, counted(getattr(bert_padding, name)))
    return calls


def open_gate(monkeypatch):
    """Enable attn_implementation="flash_attention_2" without a GPU; the code behind it is unchanged."""

    def yes(*args, **kwargs):
        return True

    row = flash_utils.FLASH_ATTENTION_COMPATIBILITY_MATRIX[2]
    monkeypatch.setattr(flash_utils, "is_flash_attn_2_available", yes)
    monkeypatch.setitem(row, "general_availability_check", yes)
    monkeypatch.setitem(row, "supported_devices", ((yes, "cpu"), *row["supported_devices"]))
    # transformers imports and caches our functions: cache the counted ones during the test, and none afterwards.
    monkeypatch.setattr(flash_utils, "_loaded_implementation", None)


def registered_attention(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **options):
    """A function for AttentionInterface.register: attention of (batch_size, heads, seqlen, head_dim) tensors."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    left = options.get("sliding_window")
    settings = {
        "dropout_p": dropout,
        "softmax_scale": scaling,
        "causal": module.is_causal,
        "window_size": (-1, -1) if left is None else (left - 1, 0),
        "softcap": options.get("softcap") or 0.0,
    }
    if attention_mask is None:
        return flash_attn.flash_attn_func(q, k, v, **settings), None
    batch_size, seqlen_q = q.shape[:2]
    seqlen_k = attention_mask.shape[1]  # shorter than a static cache
    q, indices, cu_seqlens_q, max_seqlen_q, _ = bert_padding.unpad_input(q, attention_mask[:, -seqlen_q:])
    k, _, cu_seqlens_k, max_seqlen_k, _ = bert_padding.unpad_input(k[:, :seqlen_k], attention_mask)
    v, *_ = bert_padding.unpad_input(v[:, :seqlen_k], attention_mask)
    out = flash_attn.flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **settings)
    return bert_padding.pad_input(out, indices, batch_size, seqlen_q), None
