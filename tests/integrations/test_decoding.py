"""Decoding with flash_attn_with_kvcache inside models of transformers: in pages, and in caches of other layouts."""

import pytest
import torch
import transformers
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.generation import ContinuousBatchingConfig
from transformers.generation.continuous_batching import initialization
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

import flash_attn
from compare import compare
from tiny_models import PAD, VOCABULARY, load_model, save_model

PROMPTS = [[5, 6, 7, 8, 9], [11], [3, 1, 4, 1, 5, 9, 2, 6]]
NEW, LAYERS = 7, 2
DTYPES = (torch.float32, torch.bfloat16)


def greedy(model):
    """New tokens of every prompt, computed one prompt at a time."""
    options = {"do_sample": False, "max_new_tokens": NEW, "min_new_tokens": NEW}
    return [model.generate(input_ids=torch.tensor([p]), **options)[0, len(p) :].tolist() for p in PROMPTS]


@pytest.mark.parametrize("page_size", [4, 16, 256])
def test_continuous_batching(page_size, calls, tmp_path, monkeypatch):
    """generate_batch: prompts by flash_attn_varlen_func, then one token of each by flash_attn_with_kvcache.

    transformers takes that path on accelerators only, so one is announced. Pages of keys and values of all layers are
    in one tensor, of which each cache is a view.
    """
    monkeypatch.setattr(initialization, "is_torch_xpu_available", lambda: True)
    path = save_model("llama", tmp_path)
    expected = greedy(load_model(path, "eager"))
    assert not calls
    settings = transformers.GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1, pad_token_id=PAD)
    pages = ContinuousBatchingConfig(page_size=page_size, num_blocks=16, max_batch_tokens=16, max_blocks_per_request=6)
    done = load_model(path, "flash_attention_2").generate_batch(
        inputs=PROMPTS, generation_config=settings, continuous_batching_config=pages
    )
    assert [list(request.generated_tokens) for request in done.values()] == expected
    assert calls["flash_attn_with_kvcache"] == LAYERS * (NEW - 1)


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_continuous_batching_on_the_cpu(family, calls, tmp_path):
    """What transformers does there: all of a step, prompts and single tokens, in one call of flash_attn_varlen_func."""
    path = save_model(family, tmp_path)
    expected = greedy(load_model(path, "eager"))
    settings = transformers.GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1, pad_token_id=PAD)
    pages = ContinuousBatchingConfig(page_size=16, num_blocks=16, max_batch_tokens=16)
    done = load_model(path, "flash_attention_2").generate_batch(
        inputs=PROMPTS, generation_config=settings, continuous_batching_config=pages
    )
    assert [list(request.generated_tokens) for request in done.values()] == expected
    assert calls["flash_attn_with_kvcache"] == 0
    assert calls["flash_attn_varlen_func"] >= LAYERS * NEW


class Cached:
    """Attention for AttentionInterface, with a cache per layer that is stored in another order of dimensions."""

    def __init__(self, order: str):
        self.order = order  # of the dimensions batch_size, seqlen, num_heads_k and head_dim
        self.caches: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.lengths: torch.Tensor | int = 0

    def views(self, layer, like):
        """k_cache and v_cache of a layer, for 32 tokens."""
        if layer not in self.caches:
            sizes = {"b": like.shape[0], "s": 32, "h": like.shape[2], "d": like.shape[3]}
            shape = [sizes[dim] for dim in self.order]
            self.caches[layer] = tuple(torch.full(shape, torch.nan, dtype=like.dtype) for _ in "kv")
        return [cache.permute([self.order.index(dim) for dim in "bshd"]) for cache in self.caches[layer]]

    def __call__(self, module, query, key, value, attention_mask, scaling=None, **options):
        assert attention_mask is None
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        caches = self.views(module.layer_idx, k)
        options = {"cache_seqlens": self.lengths, "causal": True, "softmax_scale": scaling}
        return flash_attn.flash_attn_with_kvcache(q, *caches, k, v, **options), None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("order", ["bshd", "bhsd", "sbhd"])
def test_static_caches(order, dtype, calls, tmp_path):
    """Prompts padded on the right in one step, then a token for each at its own position: logits are those of eager.

    The layouts of flash_attn, of transformers' static cache and of Megatron's.
    """
    attention = Cached(order)
    AttentionInterface.register("fa_cached", attention)
    AttentionMaskInterface.register("fa_cached", ALL_MASK_ATTENTION_FUNCTIONS["flash_attention_2"])
    path = save_model("llama", tmp_path, dtype)
    model = load_model(path, "fa_cached", dtype)
    lengths = torch.tensor([len(p) for p in PROMPTS])
    longest = int(lengths.max())
    tokens = torch.randint(1, VOCABULARY, (len(PROMPTS), longest + NEW), generator=torch.Generator().manual_seed(2))
    for row, prompt in zip(tokens, PROMPTS, strict=True):
        row[: len(prompt)] = torch.tensor(prompt)

    def step(ids, positions):
        with torch.no_grad():
            return model(input_ids=ids, position_ids=positions, use_cache=False).logits

    got = [step(tokens[:, :longest], torch.arange(longest).expand(len(PROMPTS), -1))]
    rows = torch.arange(len(PROMPTS))
    for i in range(NEW):
        attention.lengths = (lengths + i).int()
        got.append(step(tokens[rows, lengths + i][:, None], (lengths + i)[:, None]))
    assert calls["flash_attn_with_kvcache"] == LAYERS * (NEW + 1)
    exact, plain = (load_model(path, "eager", each) for each in (torch.float32, dtype))
    for b, n in enumerate(lengths.tolist()):
        with torch.no_grad():
            expected, rounded = (each(input_ids=tokens[b : b + 1, : n + NEW]).logits[0] for each in (exact, plain))
        ours = torch.cat([got[0][b, :n], *(logits[b] for logits in got[1:])])
        # In float32 there is nothing more exact to compare with: all of two layers is rounded in both.
        compare("logits", ours, expected, [rounded], size=64.0 if dtype == torch.float32 else 0.0)
