"""Tiny transformers models with random weights."""

import collections
import functools

import torch
import transformers
from transformers import modeling_flash_attention_utils as flash_utils
from transformers.models.modernbert import modeling_modernbert

import flash_attn
from flash_attn import bert_padding

VOCABULARY = 100
PAD = 0
# Weights large enough for attention to matter: with the usual 0.02 all keys get about the same weight.
SIZES = {
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
    "llama": lambda: transformers.LlamaConfig(**SIZES),
    "mistral": lambda: transformers.MistralConfig(**SIZES, sliding_window=WINDOW),
    "gemma2": lambda: transformers.Gemma2Config(
        **SIZES,
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
    name = "flash_attn_varlen_qkvpacked_func"
    if hasattr(modeling_modernbert, name):  # transformers 4.57
        monkeypatch.setattr(modeling_modernbert, name, counted(getattr(flash_attn, name)))
    for name in ("pad_input", "unpad_input"):
        monkeypatch.setattr(bert_padding, name, counted(getattr(bert_padding, name)))
    # transformers imports and caches our functions: the counted ones during the test, and none afterwards.
    for name in ("_loaded_implementation", "_flash_fn"):
        if hasattr(flash_utils, name):
            monkeypatch.setattr(flash_utils, name, None)
    return calls
