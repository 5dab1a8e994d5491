"""Sinks against the eager attention of transformers' GPT-OSS. The whole model: test_transformers_models.py."""

import pytest
import torch
import transformers
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.models.gpt_oss import modeling_gpt_oss as gpt_oss

import flash_attn
from plain_attention import assert_near, gradients, leaves
from tiny_models import VOCABULARY

BATCH, SEQLEN, HEADS, HEADS_K, HEAD_DIM, WINDOW = 2, 13, 8, 2, 16, 4
CONFIG = transformers.GptOssConfig(
    vocab_size=VOCABULARY,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=HEADS,
    num_key_value_heads=HEADS_K,
    head_dim=HEAD_DIM,
    num_local_experts=4,
    num_experts_per_tok=2,
    sliding_window=WINDOW,
    max_position_embeddings=64,
    initializer_range=0.2,
    layer_types=["sliding_attention", "full_attention"],
)


def make_attention(layer):
    """An attention of GPT-OSS in float64: layer 0 has the window, layer 1 sees everything before."""
    CONFIG._attn_implementation = "eager"
    torch.manual_seed(0)
    module = gpt_oss.GptOssAttention(CONFIG, layer).double().eval()
    with torch.no_grad():
        module.sinks.copy_(torch.linspace(-3, 4, HEADS))
    return module


def eager(module, q, k, v):
    """gpt_oss.eager_attention_forward of (batch_size, seqlen, heads, head_dim) tensors, with the model's own mask."""
    make_mask = create_causal_mask if module.sliding_window is None else create_sliding_window_causal_mask
    embeds = torch.zeros(BATCH, SEQLEN, CONFIG.hidden_size, dtype=q.dtype)
    mask = make_mask(config=CONFIG, inputs_embeds=embeds, attention_mask=None, cache=None)
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    return gpt_oss.eager_attention_forward(module, *heads_first, mask, scaling=module.scaling)[0]


def ours(module, q, k, v):
    left = -1 if module.sliding_window is None else module.sliding_window - 1
    return flash_attn.flash_attn_func(
        q, k, v, softmax_scale=module.scaling, causal=True, window_size=(left, 0), s_aux=module.sinks
    )


@pytest.mark.parametrize("layer", [0, 1], ids=CONFIG.layer_types)
def test_eager_attention_of_gpt_oss(layer):
    """Forward and the gradients of q, k, v and the sinks, in float64."""
    module = make_attention(layer)
    inputs = leaves((BATCH, SEQLEN, HEADS, HEAD_DIM), *[(BATCH, SEQLEN, HEADS_K, HEAD_DIM)] * 2)
    wanted = (*inputs, module.sinks)
    found, expected = (function(module, *inputs) for function in (ours, eager))
    assert_near([found, *gradients(found, wanted)], [expected, *gradients(expected, wanted)])
    assert gradients(ours(module, *inputs), [module.sinks])[0].abs().min() > 0
