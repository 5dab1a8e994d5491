"""Decoding with MHA: small modules, their caches, and the same without a cache."""

import torch

from flash_attn.modules.mha import MHA
from flash_attn.utils.generation import InferenceParams
from plain_attention import leaves

BATCH, SEQLEN, EMBED, HEADS = 3, 9, 32, 4
HEAD_DIM = EMBED // HEADS
CAPACITY, MAX_BATCH = 12, 5


def make(use_flash_attn=True, dtype=torch.float64, **options):
    torch.manual_seed(4)
    options = {"causal": True, "layer_idx": 0, **options}
    return MHA(EMBED, HEADS, use_flash_attn=use_flash_attn, dtype=dtype, **options)


def tokens(batch_size=BATCH, seqlen=SEQLEN, dtype=torch.float64):
    return leaves((batch_size, seqlen, EMBED), dtype=dtype)[0].detach()


def params_of(module, **fields):
    """InferenceParams with a cache that is larger than need be, full of NaN."""
    cache = module.allocate_inference_cache(MAX_BATCH, CAPACITY).fill_(torch.nan)
    return InferenceParams(CAPACITY, MAX_BATCH, key_value_memory_dict={module.layer_idx: cache}, **fields)


def run(module, x, steps, params, mask=None):
    """The outputs of the calls, one after the other: (batch, sum of steps, embed_dim)."""
    outs = []
    for seqlen in steps:
        begin = params.seqlen_offset
        end = begin + seqlen
        call = {} if mask is None else {"key_padding_mask": mask[:, :end]}
        outs.append(module(x[:, begin:end], inference_params=params, **call))
        params.seqlen_offset = end
    return torch.cat(outs, dim=1)


def one_pass(module, x, steps, mask=None):
    """The same without a cache: rows of one pass; those of one pass up to there if tokens see later ones."""
    outs, end = [], 0
    for seqlen in steps:
        begin, end = end, end + seqlen
        stop = x.shape[1] if module.causal else end
        out = module(x[:, :stop], key_padding_mask=None if mask is None else mask[:, :stop])
        outs.append(out[:, begin:end])
    return torch.cat(outs, dim=1)
